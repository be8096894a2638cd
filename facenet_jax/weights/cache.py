"""Where fetched weights are kept and found."""

import os
from pathlib import Path

from facenet_jax.errors import BadInput


def cached_path(name: str) -> Path:
    """The portable file of a published network by name, whether it is there or not."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "facenet_jax" / "weights"
    return Path(os.environ.get("FACENET_JAX_CACHE", default)) / f"{name}.safetensors"


def find_weights(path_or_name: str | Path) -> Path:
    """A weights file as given, or the one of a published network that `facenet_jax.apps.pretrained` has fetched; BadInput where neither is there."""
    path, name = Path(path_or_name), str(path_or_name)
    # A folder may have a network's name.
    if path.is_file():
        return path
    if "/" not in name and cached_path(name).is_file():
        return cached_path(name)
    raise BadInput(f"{name}: no such weights file; published networks come by `python -m facenet_jax.apps.pretrained NAME`")
