"""Boxes as MTCNN handles them (davidsandberg/facenet src/align/detect_face.py): corners (x1, y1, x2, y2), both inside, counted from 1."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def overlap(box: Array, boxes: Array, of_smaller: bool) -> Array:
    """Intersection of box [4] with boxes [4, k] (coordinates first) as a share of their union, or of the smaller one."""
    area = lambda b: (b[2] - b[0] + 1) * (b[3] - b[1] + 1)
    width = jnp.minimum(box[2], boxes[2]) - jnp.maximum(box[0], boxes[0]) + 1
    height = jnp.minimum(box[3], boxes[3]) - jnp.maximum(box[1], boxes[1]) + 1
    shared = jnp.maximum(width, 0) * jnp.maximum(height, 0)
    return shared / (jnp.minimum(area(box), area(boxes)) if of_smaller else area(box) + area(boxes) - shared)


@partial(jax.vmap, in_axes=(0, 0, None, None))
def suppress(boxes: Array, scores: Array, threshold: float, of_smaller: bool) -> Array:
    """Non-maximum suppression, batched: boxes [b, k, 4], best first, scores [b, k] (-inf: no box) -> which stay [b, k] bool.

    Takes the first box left, drops those that overlap it more than `threshold`, and goes on; as many rounds as boxes stay.
    """
    count = len(scores)
    order = jnp.arange(count)
    first = lambda left: jnp.where(left, order, count).min()
    corners = boxes.T

    def take(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        left, kept, best = state
        # A finished row of the batch goes through the loop with the others: no box is its best.
        left &= ~(overlap(corners[:, best], corners, of_smaller) > threshold) & (order != best)
        return left, kept | (order == best), first(left)

    left = jnp.isfinite(scores)
    return lax.while_loop(lambda state: state[2] < count, take, (left, jnp.zeros_like(left), first(left)))[1]


def regress(boxes: Array, corrections: Array, inclusive: bool = True) -> Array:
    """Boxes [..., 4] moved by corrections [..., 4], which are shares of their width and height."""
    width = boxes[..., 2] - boxes[..., 0] + inclusive
    height = boxes[..., 3] - boxes[..., 1] + inclusive
    return boxes + corrections * jnp.stack([width, height, width, height], -1)


def square(boxes: Array) -> Array:
    """The squares around boxes [..., 4] with their longer side."""
    width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    side = jnp.maximum(width, height)
    left, top = boxes[..., 0] + width / 2 - side / 2, boxes[..., 1] + height / 2 - side / 2
    return jnp.stack([left, top, left + side, top + side], -1)
