"""Triplet loss over the global batch (FaceNet section 3.1), mined by any rule of `mining`."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from facenet_jax import mining, parallel
from facenet_jax.errors import BadInput

Array = jax.Array


@dataclass(frozen=True)
class Triplet:
    """rule: a name of `mining.RULES`; margin: of squared distances, 0.2 in the paper; block: anchors a device mines at
    once; max_images: the most rows one identity has in a batch; reduction: "mean" over triplets, or the paper's "sum"."""

    rule: str = "semi_hard"
    margin: float = 0.2
    block: int = 256
    max_images: int = 40
    reduction: str = "mean"

    def __post_init__(self) -> None:
        mining.rule(self.rule)
        if self.reduction not in ("mean", "sum"):
            raise BadInput(f"triplet reduction must be mean or sum, not {self.reduction!r}")
        if self.margin <= 0 or self.block < 1 or self.max_images < 2:
            raise BadInput("triplet margin must be positive, block at least 1, max_images at least 2")


def explicit_triplet_loss(anchor: Array, positive: Array, negative: Array, margin: float) -> Array:
    """Mean over rows of max(0, |a - p|^2 - |a - n|^2 + margin); [n, d] each (src/facenet.py, triplet_loss)."""
    to_positive = jnp.sum(jnp.square(anchor - positive), -1)
    to_negative = jnp.sum(jnp.square(anchor - negative), -1)
    return jnp.maximum(to_positive - to_negative + margin, 0).mean()


def mined_triplet_loss(
    embeddings: Array, labels: Array, mask: Array, draw: Array, mesh: Mesh, settings: Triplet
) -> tuple[Array, Mapping[str, Array]]:
    """Loss of the triplets that the rule finds among all rows, and what to watch.

    Args:
        embeddings: [N, d], any float dtype, cut over the mesh; mined in float32.
        labels: [N] int identities; mask: [N] bool, False rows take no part.
        draw: uint32 scalar, the randomness of random rules.
    Returns:
        float32 loss (0 with zero gradient where nothing is mined; NaN where an identity has more than `max_images` rows),
        and metrics: triplets, active (share of pairs with a positive loss), positive and negative (mean distances).
    """
    return _mined(embeddings.astype(jnp.float32), labels, mask, draw, mesh, settings)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _mined(embeddings: Array, labels: Array, mask: Array, draw: Array, mesh: Mesh, settings: Triplet) -> tuple[Array, Mapping[str, Array]]:
    return _forward(embeddings, labels, mask, draw, mesh, settings)[0]


def _forward(embeddings: Array, labels: Array, mask: Array, draw: Array, mesh: Mesh, settings: Triplet):
    # The gradient is known as soon as the triplets are, so it is made here and kept: nothing of size N^2 survives.
    how = mining.rule(settings.rule)
    mine = partial(mining.mine_rows, how=how, margin=settings.margin, max_images=settings.max_images, block=settings.block)
    sums, gradient = parallel.map_rows(mesh, mine, embeddings, labels, mask, draw)
    count = jnp.maximum(sums.triplets, 1) if settings.reduction == "mean" else jnp.float32(1)
    too_many = mining.identities(labels, mask).size.max() > settings.max_images
    loss = jnp.where(too_many, jnp.nan, sums.loss / count)
    metrics = {
        "triplets": sums.triplets,
        "active": sums.active / jnp.maximum(sums.possible, 1),
        "positive": sums.positive / jnp.maximum(sums.pairs, 1),
        "negative": sums.negative / jnp.maximum(sums.anchors, 1),
    }
    return (loss, metrics), gradient / count


def _backward(mesh: Mesh, settings: Triplet, gradient: Array, cotangents):
    return cotangents[0] * gradient, None, None, None


_mined.defvjp(_forward, _backward)
