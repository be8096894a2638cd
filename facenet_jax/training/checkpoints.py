"""Saving and restoring a run: the only file that knows orbax.

One checkpoint holds the state (parameters, statistics, optimiser, moving average, step) and the position in the data; random keys
follow from the seed and the step. Restoring takes shardings from the present mesh, never from the file: any number of devices and
processes goes on. Every process of a run saves and restores, in one directory that all of them see.
"""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from facenet_jax.errors import BadInput


def saved_steps(directory: Path) -> list[int]:
    """Steps of the whole checkpoints that lie there, oldest first; seen without opening them."""
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdigit())


class Checkpoints:
    """Checkpoints of one run, newest last."""

    def __init__(self, directory: Path, keep: int = 2) -> None:
        # What orbax logs as an error it also raises, and it is said once, in our words.
        logging.getLogger("absl").addFilter(_not_orbax)
        if not isinstance(sys.unraisablehook, _WithoutLateWrites):
            sys.unraisablehook = _WithoutLateWrites(sys.unraisablehook)
        self._directory = directory.resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True, enable_async_checkpointing=True)
        handlers = {"state": ocp.StandardCheckpointHandler(), "position": ocp.JsonCheckpointHandler()}
        with self._writing():
            self._manager = ocp.CheckpointManager(self._directory, options=options, item_handlers=handlers)

    @property
    def latest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, position: dict[str, Any], wait: bool = False) -> None:
        """Saves in the background; a checkpoint appears whole or not at all. BadInput where the disk is full, at the latest with the next save."""
        with self._writing():
            if self._manager.latest_step() != step:
                items = ocp.args.Composite(state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position))
                self._manager.save(step, args=items)
            if wait:
                self._manager.wait_until_finished()

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]]:
        """The newest state, laid out like `like` (arrays or shapes with shardings), and its position.

        BadInput says whether the checkpoint is of another configuration or damaged.
        """
        step = self._manager.latest_step()
        if step is None:
            raise BadInput("there is no checkpoint to restore")
        target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), like)
        try:
            self._check_same_shapes(step, target)
            found = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target), position=ocp.args.JsonRestore())
            )
            return found["state"], found["position"]
        except BadInput:
            raise
        except Exception as error:  # Orbax answers a broken file with anything from OSError to a bare Exception.
            raise BadInput(
                f"{self._directory / str(step)}: this checkpoint is damaged ({str(error).splitlines()[0][:200]}): delete that directory, "
                "and the same command goes on from the checkpoint before it"
            ) from None

    def _check_same_shapes(self, step: int, target: Any) -> None:
        described = self._manager.item_metadata(step)["state"]
        if described is None:
            raise ValueError("its description cannot be read")
        there, here = (_shapes(tree) for tree in (described, target))
        for name in sorted(there.keys() | here.keys()):
            if there.get(name) != here.get(name):
                raise BadInput(
                    f"checkpoint {step} in {self._directory} is not of this configuration: {name} has shape {there.get(name, 'none')} there, "
                    f"{here.get(name, 'none')} here"
                )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns what the system refused (a full disk, a quota, a missing right) into one line."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            # The library that writes arrays gives the system's error as text.
            code = error.errno if isinstance(error, OSError) else int((re.findall(r"os_error_code='(\d+)'", str(error)) or [0])[0])
            if not code:
                raise
            whole = saved_steps(self._directory)
            kept = f"the last whole checkpoint, of step {whole[-1]}, is kept" if whole else "there is no checkpoint yet"
            raise BadInput(
                f"{self._directory}: a checkpoint cannot be written ({os.strerror(code)}); {kept}. The same command goes on when that is mended"
            ) from None

    def close(self) -> None:
        """Waits for saves under way."""
        with self._writing():
            self._manager.wait_until_finished()
        self._manager.close()


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    flat = ocp.tree.to_flat_dict(tree, sep="/")
    return {name: tuple(leaf.shape) for name, leaf in flat.items() if hasattr(leaf, "shape")}


@dataclass(frozen=True)
class _WithoutLateWrites:
    """After a write that failed, the writes beside it report to an event loop that orbax has closed: a traceback each, and nothing to act on."""

    before: Callable[["sys.UnraisableHookArgs"], object]

    def __call__(self, told: "sys.UnraisableHookArgs") -> None:
        if not (isinstance(told.exc_value, RuntimeError) and str(told.exc_value) == "Event loop is closed"):
            self.before(told)


def _not_orbax(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname
