"""Optimisers by name, with the constants of the original code (src/facenet.py, train), and weight decay on kernels only."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from facenet_jax.errors import BadInput
from facenet_jax.training.schedules import Schedule


def _adagrad() -> optax.GradientTransformation:
    """The paper's. TensorFlow's has no epsilon; optax guards the first division."""
    return optax.scale_by_rss(initial_accumulator_value=0.1, eps=1e-7)


def _rmsprop() -> optax.GradientTransformation:
    return optax.chain(optax.scale_by_rms(decay=0.9, eps=1.0, initial_scale=1.0), optax.trace(0.9))


# Adam adds epsilon after the bias correction, as its paper does; TensorFlow 1 added it before, which slows the first hundreds of steps more.
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adagrad": _adagrad,
    "adam": lambda: optax.scale_by_adam(0.9, 0.999, eps=0.1),
    "adam_small_epsilon": lambda: optax.scale_by_adam(0.9, 0.999, eps=1e-8),
    "rmsprop": _rmsprop,
    "adadelta": lambda: optax.scale_by_adadelta(rho=0.9, eps=1e-6),
    "momentum": lambda: optax.trace(0.9, nesterov=True),
}


@dataclass(frozen=True)
class Optimizer:
    """name: of `OPTIMIZERS`; weight_decay: added to the gradients of kernels (half the squared norm, as the original's regulariser); clip: the
    largest global gradient norm, 0 for none; moving_average: decay of the averaged weights, 0 for none."""

    name: str = "adagrad"
    weight_decay: float = 0.0
    clip: float = 0.0
    moving_average: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise BadInput(f"no optimiser named {self.name!r}; there are {', '.join(OPTIMIZERS)}")
        if not 0 <= self.moving_average < 1 or self.weight_decay < 0 or self.clip < 0:
            raise BadInput("optimizer.moving_average must be in [0, 1), weight_decay and clip not negative")


def is_kernel(params: Any) -> Any:
    """True for convolution and dense kernels, False for biases and BatchNorm parameters."""
    return jax.tree_util.tree_map_with_path(lambda path, _: getattr(path[-1], "key", "") == "kernel", params)


def create(settings: Optimizer, schedule: Schedule) -> optax.GradientTransformation:
    """Decay, clipping, the optimiser and the schedule as one transformation."""
    parts = [optax.clip_by_global_norm(settings.clip)] if settings.clip else []
    if settings.weight_decay:
        parts.append(optax.add_decayed_weights(settings.weight_decay, mask=is_kernel))
    return optax.chain(*parts, OPTIMIZERS[settings.name](), optax.scale_by_learning_rate(schedule))


def global_norm(tree: Any) -> jax.Array:
    """Euclidean norm of all leaves together, float32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)))
