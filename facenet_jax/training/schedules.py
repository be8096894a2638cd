"""Learning rate by step: named shapes, or the original code's text files (epoch: rate)."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from facenet_jax.errors import BadInput

Schedule = Callable[[jax.Array | int], jax.Array]

SHAPES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "constant": lambda share: jnp.ones_like(share),
    "linear": lambda share: 1 - share,
    "cosine": lambda share: 0.5 * (1 + jnp.cos(jnp.pi * share)),
}


@dataclass(frozen=True)
class TextSchedule:
    """Rates that hold from an epoch on; -1 where the original code ends the run."""

    epochs: tuple[int, ...]
    rates: tuple[float, ...]


def read_text(path: Path) -> TextSchedule:
    """Reads `epoch: rate` lines; `#` starts a comment (src/facenet.py, get_learning_rate_from_file)."""
    epochs: list[int] = []
    rates: list[float] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        line = line.split("#", 1)[0].strip()
        if not line:
            continue
        try:
            epoch, rate = line.split(":")
            epochs.append(int(epoch))
            rates.append(-1.0 if rate.strip() == "-" else float(rate))
        except ValueError:
            raise BadInput(f"{path}: line {number} is not 'epoch: rate'") from None
    if not epochs or epochs[0] != 0 or any(b <= a for a, b in itertools.pairwise(epochs)):
        raise BadInput(f"{path}: epochs must start at 0 and grow")
    return TextSchedule(tuple(epochs), tuple(rates))


def create(name: str, rate: float, steps: int, *, warmup: int = 0, epoch_steps: int = 1000) -> Schedule:
    """The rate at each step.

    name: a shape of `SHAPES` from `rate` at the start to its end at `steps`, or the path of a text file, whose rates stand as
    they are and whose epochs are `epoch_steps` long (from its rate -1 on the rate is 0: set `steps` to end there). `warmup` steps climb linearly to
    the rate. BadInput where a number is impossible; a rate of 0 trains nothing, and is allowed.
    """
    # Also refuses NaN.
    if not 0 <= rate < math.inf:
        raise BadInput(f"optimizer.learning_rate={rate}: it must not be negative, nor infinite")
    if warmup < 0:
        raise BadInput(f"optimizer.warmup={warmup}: it must not be negative")
    if epoch_steps < 1:
        raise BadInput(f"optimizer.epoch_steps={epoch_steps}: it must be at least 1")
    if name in SHAPES:
        shape = SHAPES[name]
        base: Schedule = lambda step: rate * shape(jnp.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0))
    elif Path(name).is_file():
        text = read_text(Path(name))
        starts, rates = np.asarray(text.epochs) * epoch_steps, jnp.asarray(np.maximum(text.rates, 0), jnp.float32)
        base = lambda step: rates[jnp.searchsorted(jnp.asarray(starts), step, side="right") - 1]
    else:
        raise BadInput(f"no schedule named {name!r}, nor such a file; there are {', '.join(SHAPES)}")
    if warmup:
        return lambda step: base(step) * jnp.minimum((step + 1) / warmup, 1.0)
    return base
