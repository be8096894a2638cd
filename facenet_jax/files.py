"""Files that are whole or absent."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the name of `path` when all went well, and is removed when not. Makes the directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: two processes may write the same file, also on one disk of two machines.
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.writing")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
