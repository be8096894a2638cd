"""What every importer says of a tensor that cannot be used."""

from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np

from facenet_jax.errors import BadInput

_VARIANCES = ("running_var", "moving_variance")


def problem(name: str, array: np.ndarray | None, shape: tuple[int, ...]) -> str | None:
    """What is wrong with the tensor (None: it is missing): another shape, no floating point, not finite, a negative variance. None where nothing is."""
    if array is None:
        return f"{name} is missing, expected shape {list(shape)}"
    if array.shape != shape:
        return f"{name} has shape {list(array.shape)}, expected {list(shape)}"
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return f"{name} {list(shape)} is {array.dtype}, expected floating point"
    with np.errstate(over="ignore"):
        finite = np.isfinite(array.astype(np.float32, copy=False)).all()
    if not finite:
        return f"{name} {list(shape)} holds values that are not finite in float32"
    return f"{name} {list(shape)} holds a negative variance" if name.endswith(_VARIANCES) and (array < 0).any() else None


def refuse(what: str, problems: Iterable[str | None]) -> None:
    """BadInput in one line where there are problems: the first three, and how many more."""
    found = [text for text in problems if text]
    if found:
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise BadInput(f"{what}: {'; '.join(found[:3])}{more}")
