"""OpenCV's INTER_AREA on a device, for sizes that are known only when it runs: each output pixel is the mean over an interval of the input.

Shrinking, the intervals tile the input. Where either side grows, OpenCV interpolates between two neighbours, which is the mean over an
interval one pixel wide.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def intervals(size: Array, out: Array | int, places: int, shrinks: Array) -> tuple[Array, Array]:
    """(starts, ends) [places] in input pixels of the outputs 0, 1, ... when `size` pixels become `out`."""
    i = jnp.arange(places)
    scale = size / out
    # In integers, because a product that should be whole decides which pixel is meant.
    first = i * size // out
    part = ((i + 1) * size - (first + 1) * out) / jnp.maximum(size, 1)
    part = jnp.where(part <= 0, 0, part - jnp.floor(part))
    last = first >= size - 1
    start = jnp.where(last, size - 1, first + jnp.where(last, 0, part)).astype(jnp.float32)
    return (
        jnp.where(shrinks, i * scale, start),
        jnp.where(shrinks, jnp.minimum((i + 1) * scale, size), start + 1),
    )


def _shares(start: Array, end: Array, size: int) -> Array:
    """[places, size]: the share of each input pixel in each interval's mean."""
    pixel = jnp.arange(size)
    covered = jnp.minimum(end[:, None], pixel + 1) - jnp.maximum(start[:, None], pixel)
    return jnp.maximum(covered, 0) / jnp.maximum(end - start, 1e-6)[:, None]


def shrink(columns: Array, size: Array, out: Array, canvas: tuple[int, int]) -> Array:
    """A photograph resized, rounded to whole values as OpenCV does with bytes.

    columns [h + 1, w, 3] int32: running sums down each column, from 0; size, out [2]: height and width that count, before and after -> [*canvas, 3];
    what lies beyond `out` is nonsense.
    """
    out = jnp.maximum(out, 1)
    shrinks = (size >= out).all()
    height = columns.shape[0] - 1

    def down_to(places: Array) -> tuple[Array, Array]:
        whole = jnp.clip(places.astype(jnp.int32), 0, height - 1)
        return columns[whole], (places - whole)[:, None, None] * (columns[whole + 1] - columns[whole])

    start, end = intervals(size[0], out[0], canvas[0], shrinks)
    (above, above_part), (below, below_part) = down_to(start), down_to(end)
    # Whole sums are subtracted as integers: as float32 they would lose what decides the rounding.
    rows = ((below - above) + (below_part - above_part)) / jnp.maximum(end - start, 1e-6)[:, None, None]
    shares = _shares(*intervals(size[1], out[1], canvas[1], shrinks), columns.shape[1])
    return jnp.round(jnp.einsum("jw,iwc->ijc", shares, rows, precision=lax.Precision.HIGHEST))


def running_sums(photographs: Array) -> tuple[Array, Array]:
    """uint8 [b, h, w, 3] -> sums down columns [b, h + 1, w, 3], and sums over rectangles from the corner [b, h + 1, w + 1, 3], int32.

    Sums over rectangles may pass 2^31 and wrap; their differences do not.
    """
    columns = jnp.pad(_running(photographs.astype(jnp.int32), 1), ((0, 0), (1, 0), (0, 0), (0, 0)))
    corners = jnp.pad(_running(columns, 2), ((0, 0), (0, 0), (1, 0), (0, 0)))
    return columns, corners


def _running(x: Array, axis: int) -> Array:
    """Running sum; on a CPU as a loop, which reads the array once."""

    def loop(x: Array) -> Array:
        moved = jnp.moveaxis(x, axis, 0)
        add = lambda total, row: (total + row, total + row)
        return jnp.moveaxis(lax.scan(add, jnp.zeros_like(moved[0]), moved)[1], 0, axis)

    return lax.platform_dependent(x, cpu=loop, default=partial(jnp.cumsum, axis=axis))


def _boundaries(size: Array, out: int, corner: Array, limit: int) -> tuple[Array, Array]:
    """(whole pixels, parts of the next) [out + 1] at which the `out` intervals of a box's side begin and end, held within the photograph's `limit`."""
    place = jnp.clip(jnp.arange(out + 1) * (size / out) + corner, 0, limit)
    whole = jnp.minimum(place.astype(jnp.int32), limit - 1)
    return whole, place - whole


def crops(photographs: Array, corners: Array, owner: Array, box: Array, side: int) -> Array:
    """Boxes of photographs, resized: photographs uint8 [b, h, w, 3], corners of `running_sums`, owner [n], box [n, 4] int -> [n, side, side, 3] float32.

    Boxes have both corners inside and count from 1; what lies outside the photograph is black.
    """
    one = lambda pair: _crop(photographs, corners, pair[0], pair[1], side)
    # A CPU takes them one by one, each by one of two ways of resampling; an accelerator all together, by both.
    return lax.map(one, (owner, box)) if jax.default_backend() == "cpu" else jax.vmap(one)((owner, box))


def _crop(photographs: Array, corners: Array, owner: Array, box: Array, side: int) -> Array:
    height, width = photographs.shape[1:3]
    size = jnp.maximum(jnp.stack([box[3] - box[1] + 1, box[2] - box[0] + 1]), 1)
    shrinks = (size >= side).all()
    corner = jnp.stack([box[1] - 1, box[0] - 1])

    def mean() -> Array:
        # The sum down to a boundary between pixels is that to the pixel's edge, and parts of the next row, the next column and the next pixel.
        # Differences are taken of the whole sums, as integers, before parts are multiplied in.
        (y, part_y), (x, part_x) = (_boundaries(size[axis], side, corner[axis], limit) for axis, limit in ((0, height), (1, width)))
        at = lambda i, j: corners[owner, (y + i)[:, None], (x + j)[None]]
        here, right, below, both = at(0, 0), at(0, 1), at(1, 0), at(1, 1)
        part_y, part_x = part_y[:, None, None], part_x[None, :, None]
        down, across = partial(jnp.diff, axis=0), partial(jnp.diff, axis=1)
        total = down(across(here)) + across(part_x * down(right - here)) + down(part_y * across(below - here))
        total += down(across(part_y * part_x * (both - right - below + here)))
        return total / ((size[0] / side) * (size[1] / side))

    def between() -> Array:
        def neighbours(axis: int) -> tuple[Array, Array]:
            start, _ = intervals(size[axis], side, side, jnp.asarray(False))
            whole = start.astype(jnp.int32)
            return whole + corner[axis], start - whole

        (top, part_y), (left, part_x) = neighbours(0), neighbours(1)

        def pixel(i: int, j: int) -> Array:
            row, column = top + i, left + j
            inside = ((row >= 0) & (row < height))[:, None] & ((column >= 0) & (column < width))[None]
            values = photographs[owner, jnp.clip(row, 0, height - 1)[:, None], jnp.clip(column, 0, width - 1)[None]]
            return jnp.where(inside[..., None], values, 0).astype(jnp.float32)

        row = lambda i: pixel(i, 0) * (1 - part_x)[None, :, None] + pixel(i, 1) * part_x[None, :, None]
        return row(0) * (1 - part_y)[:, None, None] + row(1) * part_y[:, None, None]

    return lax.cond(shrinks, mean, between)
