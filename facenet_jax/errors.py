"""The one exception that means "your input, not our bug": command lines print it as one line and exit with 2."""

import contextlib
import sys
import zipfile
import zlib
from collections.abc import Iterator

# What NumPy raises for a file that is no whole .npz (a .npy gives TypeError: it is no archive).
NPZ_ERRORS = (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error)


class BadInput(ValueError):
    """Something the user gave cannot be used; the message says what and what to do about it."""


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns `BadInput` and missing or unwritable files into one line on stderr and exit code 2."""
    try:
        yield
    except BadInput as error:
        sys.exit(say_error(str(error)))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(say_error(f"{where}{error.strerror or error}"))


def say_error(message: str) -> int:
    """Says it in one line on stderr; the exit code of bad input."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2
