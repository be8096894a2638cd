"""What a network expects of pixels. Stored with the weights, applied on the device to uint8 RGB images."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp

from facenet_jax.errors import BadInput


def _per_image(x: jax.Array) -> jax.Array:
    """The original code's prewhiten: zero mean, unit deviation, the deviation no smaller than 1 / sqrt(values)."""
    axes = (1, 2, 3)
    mean = x.mean(axes, keepdims=True)
    deviation = jnp.sqrt(jnp.maximum(jnp.square(x - mean).mean(axes, keepdims=True), 0))
    return (x - mean) / jnp.maximum(deviation, (x.shape[1] * x.shape[2] * x.shape[3]) ** -0.5)


_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_DEVIATION = (0.229, 0.224, 0.225)
_DLIB_MEAN = (122.782, 117.001, 104.298)

STANDARDISATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "fixed": lambda x: (x - 127.5) / 128.0,
    "per_image": _per_image,
    "unit": lambda x: x / 255.0,
    "imagenet": lambda x: (x / 255.0 - jnp.array(_IMAGENET_MEAN)) / jnp.array(_IMAGENET_DEVIATION),
    "symmetric": lambda x: (x - 127.5) / 127.5,
    "dlib": lambda x: (x - jnp.array(_DLIB_MEAN)) / 256.0,
}


@dataclass(frozen=True)
class Preprocessing:
    """Square input side in pixels, and the name of the rule from 0..255 to what the network saw in training."""

    size: int
    standardisation: str = "fixed"

    def __post_init__(self) -> None:
        if self.standardisation not in STANDARDISATIONS:
            raise BadInput(f"no standardisation named {self.standardisation!r}; there are {', '.join(STANDARDISATIONS)}")

    def __call__(self, images: jax.Array) -> jax.Array:
        """uint8 RGB [n, size, size, 3] -> float32 [n, size, size, 3]."""
        return STANDARDISATIONS[self.standardisation](images.astype(jnp.float32))

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary that `Preprocessing(**d)` takes back."""
        return asdict(self)
