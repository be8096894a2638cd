"""What every command line here shares: one-line errors, the compilation cache and memory, small files."""

import ctypes
import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging

from facenet_jax.errors import one_line_errors, say_error
from facenet_jax.files import written


def run(main: Callable[[list[str]], Any], positional: bool = False, define_flags: Callable[[], None] | None = None) -> None:
    """Runs an absl main. Bad flags and bad input end in one line and exit code 2; Ctrl-C in 130.

    Words that are no flags are errors unless `positional`. `define_flags` is called first, by programs whose definitions can fail: the default config is read,
    --config.key=value included, when its flag is defined.
    """
    try:
        if define_flags:
            define_flags()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        sys.exit(fail(_told(error)))

    def parse(arguments: list[str]) -> list[str]:
        try:
            left = flags.FLAGS(arguments)
        except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
            # The others are what a config file or an unknown --config.key raises while flags are read.
            sys.exit(fail(_told(error)))
        if len(left) > 1 and not positional:
            sys.exit(fail(f"{left[1]!r} is not a flag"))
        return left

    def guarded(arguments: list[str]) -> None:
        # Libraries tell their inner life at "info"; people want their own run's lines.
        logging.set_verbosity(logging.WARNING)
        with one_line_errors():
            main(arguments)

    try:
        app.run(guarded, flags_parser=parse)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _told(error: Exception) -> str:
    """A ConfigDict names an unknown key of a --config.key by the key alone."""
    word = str(error).strip("'\"")
    typed = any(argument.split("=")[0].startswith("--config.") and word in argument.split("=")[0].split(".") for argument in sys.argv)
    return f"the config has no setting {word!r}" if isinstance(error, KeyError | AttributeError) and typed else str(error)


def fail(message: str) -> int:
    """Says it in one line on stderr and gives the exit code of bad input."""
    return say_error(f"{message}; --help lists the flags")


def command() -> str:
    """This process's own command, to be typed again."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return shlex.join(["python", *(["-m", spec.name] if spec else sys.argv[:1]), *sys.argv[1:]])


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, so that a second start of the same config compiles nothing."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "facenet_jax" / "compiled"
    jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(default)))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def keep_freed_memory() -> None:
    """Lets this process keep what it frees, where its C library is glibc.

    XLA's CPU backend takes and frees all memory of a step in every step, and glibc gives large blocks back to the kernel, which clears each page again:
    222,000 page faults and a tenth to a third of the time of a step of Inception-ResNet-v1.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    # M_MMAP_MAX, M_TRIM_THRESHOLD and M_ARENA_MAX of malloc.h: no block of its own mapping, none given back, one heap for all threads.
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-8, 1)):
        mallopt(option, value)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def write_json(path: Path, value: Any) -> None:
    """Writes aside, then renames."""
    with written(path) as aside:
        aside.write_text(json.dumps(value, indent=1) + "\n")
