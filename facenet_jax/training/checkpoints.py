"""Saving and restoring a run: the only file that knows orbax.

One checkpoint holds the state (parameters, statistics, optimiser, moving average, step) and the position in the data; random keys
follow from the seed and the step. Restoring takes shardings from the present mesh, never from the file.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from facenet_jax.errors import BadInput


class Checkpoints:
    """Checkpoints of one run, newest last."""

    def __init__(self, directory: Path, keep: int = 2) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(directory.resolve(), options=options)

    @property
    def latest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, position: dict[str, Any], wait: bool = False) -> None:
        """Saves in the background; a checkpoint appears whole or not at all."""
        if self._manager.latest_step() != step:
            items = ocp.args.Composite(state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position))
            self._manager.save(step, args=items)
        if wait:
            self._manager.wait_until_finished()

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]]:
        """The newest state, laid out like `like` (arrays or shapes with shardings), and its position."""
        step = self._manager.latest_step()
        if step is None:
            raise BadInput("there is no checkpoint to restore")
        target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), like)
        try:
            found = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target), position=ocp.args.JsonRestore())
            )
        except (ValueError, KeyError) as error:
            raise BadInput(f"checkpoint {step} is not of this configuration: {str(error)[:300]}") from None
        return found["state"], found["position"]

    def close(self) -> None:
        """Waits for saves under way."""
        self._manager.wait_until_finished()
        self._manager.close()
