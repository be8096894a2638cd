"""OpenCV's INTER_AREA on a device, for sizes that are known only when it runs: each output pixel is the mean over an interval of the input.

Shrinking, the intervals tile the input. Where either side grows, OpenCV interpolates between two neighbours, which is the mean over an
interval one pixel wide.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

# Intervals of a resized row that are made together.
_BLOCK = 16
# Sides of the pieces of a photograph from which a CPU makes crops.
_WINDOWS = (32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048)


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


def _shares(start: Array, end: Array, pixel: Array) -> Array:
    """[places, pixels]: the share of each of these input pixels in each interval's mean."""
    covered = jnp.minimum(end[:, None], pixel + 1) - jnp.maximum(start[:, None], pixel)
    return jnp.maximum(covered, 0) / jnp.maximum(end - start, 1e-6)[:, None]


def shrink(columns: Array, size: Array, out: Array, canvas: tuple[int, int], scale: float) -> Array:
    """A photograph resized, rounded to whole values as OpenCV does with bytes.

    columns [h + 1, w, 3] int32: running sums down each column, from 0; size, out [2]: height and width that count, before and after, out at least
    size * scale -> [*canvas, 3]; what lies beyond `out` is nonsense.
    """
    reach = math.ceil(_BLOCK / scale) + 2
    out = jnp.maximum(out, 1)
    shrinks = (size >= out).all()
    height = columns.shape[0] - 1

    def down_to(places: Array) -> tuple[Array, Array]:
        whole = jnp.clip(places.astype(jnp.int32), 0, height - 1)
        return columns[whole], (places - whole)[:, None, None] * (columns[whole + 1] - columns[whole])

    start, end = intervals(size[0], out[0], canvas[0], shrinks)
    rows = _between(down_to(start), down_to(end)) / jnp.maximum(end - start, 1e-6)[:, None, None]
    return jnp.round(_means(rows, *intervals(size[1], out[1], canvas[1], shrinks), reach))


def _between(above: tuple[Array, Array], below: tuple[Array, Array]) -> Array:
    """What lies between two running sums, each a whole one and a part of the next row. Whole sums are subtracted as integers: as float32 they would
    lose what decides the rounding."""
    return (below[0] - above[0]) + (below[1] - above[1])


def _means(rows: Array, start: Array, end: Array, reach: int) -> Array:
    """rows [i, w, c] and intervals [j] along their second axis, in order -> each one's mean [i, j, c], as products with shares of pixels.

    `reach`: pixels that any _BLOCK neighbouring intervals cover. In blocks, because most of a whole row's shares are 0.
    """
    width, count = rows.shape[1], start.shape[0]

    def product(pixels: Array, first: Array | int, start: Array, end: Array) -> Array:
        shares = _shares(start, end, first + jnp.arange(pixels.shape[1]))
        return jnp.einsum("jw,iwc->ijc", shares, pixels, precision=lax.Precision.HIGHEST)

    if reach >= width:
        return product(rows, 0, start, end)

    def block(bounds: tuple[Array, Array]) -> Array:
        first = jnp.clip(bounds[0][0].astype(jnp.int32), 0, width - reach)
        return product(lax.dynamic_slice_in_dim(rows, first, reach, 1), first, *bounds)

    # Past the last one, intervals as far as it is.
    split = lambda a: jnp.pad(a, (0, -count % _BLOCK), mode="edge").reshape(-1, _BLOCK)
    found = lax.map(block, (split(start), split(end)))
    return found.swapaxes(0, 1).reshape(rows.shape[0], -1, rows.shape[2])[:, :count]


def running_sums(photographs: Array) -> tuple[Array, Array]:
    """uint8 [b, h, w, 3] -> sums down columns [h + 1, b, w, 3], and sums over rectangles from the corner [b, h + 1, w + 1, 3], int32.

    Sums over rectangles may pass 2^31 and wrap; their differences do not.
    """

    def loop(photographs: Array) -> Array:
        # Reads each row once.
        rows = jnp.moveaxis(jnp.pad(photographs, ((0, 0), (0, 1), (0, 0), (0, 0))), 1, 0)
        return lax.scan(lambda total, row: (total + row, total), jnp.zeros(rows.shape[1:], jnp.int32), rows)[1]

    def at_once(photographs: Array) -> Array:
        return jnp.pad(jnp.cumsum(jnp.moveaxis(photographs, 1, 0).astype(jnp.int32), 0), ((1, 0), (0, 0), (0, 0), (0, 0)))

    columns = lax.platform_dependent(photographs, cpu=loop, default=at_once)
    return columns, jnp.pad(jnp.cumsum(jnp.moveaxis(columns, 1, 0), 2), ((0, 0), (0, 0), (1, 0), (0, 0)))


def _boundaries(size: Array, out: int, corner: Array, limit: int) -> tuple[Array, Array]:
    """(whole pixels, parts of the next) [out + 1] at which the `out` intervals of a box's side begin and end, held within the photograph's `limit`."""
    place = jnp.clip(jnp.arange(out + 1) * (size / out) + corner, 0, limit)
    whole = jnp.minimum(place.astype(jnp.int32), limit - 1)
    return whole, place - whole


def crops(photographs: Array, columns: Array, corners: Array, owner: Array, box: Array, side: int) -> Array:
    """Boxes of photographs, resized: photographs uint8 [b, h, w, 3], columns and corners of `running_sums`, owner [n], box [n, 4] int -> [n, side, side, 3] float32.

    Boxes have both corners inside and count from 1; what lies outside the photograph is black. An accelerator takes all together, a CPU one by one.
    """
    if jax.default_backend() == "cpu":
        return crops_by_columns(columns, owner, box, side)
    return jax.vmap(lambda owner, box: crop_by_sums(photographs, corners, owner, box, side))(owner, box)


def crops_by_columns(columns: Array, owner: Array, box: Array, side: int) -> Array:
    """`crops` one by one as `shrink` does it, each of a piece of the photograph about as wide as the box."""
    height, width = columns.shape[0] - 1, columns.shape[2]
    windows = [*(window for window in _WINDOWS if window < width), width]

    # For all at once what is small: alone, each of these operations costs as much as a row of pixels.
    @jax.vmap
    def plan(box: Array) -> tuple:
        corner, size = _placed(box)
        (top, bottom), (start, end) = (intervals(size[axis], side, side, (size >= side).all()) for axis in (0, 1))
        edges = jnp.clip(corner[0] + jnp.stack([top, bottom]), 0, height)
        whole = jnp.minimum(edges.astype(jnp.int32), height - 1)
        return sum(size[1] > window for window in windows[:-1]), whole, edges - whole, bottom - top, corner[1], start, end

    def cut(owner: Array, whole: Array, part: Array, rows_in: Array, left: Array, start: Array, end: Array, window: int) -> Array:
        at = jnp.clip(left, 0, width - window)
        row_at = jax.vmap(lambda row: lax.dynamic_slice(columns, (row, owner, at, 0), (1, 1, window, 3))[0, 0])

        def down_to(whole: Array, part: Array) -> tuple[Array, Array]:
            sums = row_at(whole)
            return sums, part[:, None, None] * (row_at(whole + 1) - sums)

        rows = _between(down_to(whole[0], part[0]), down_to(whole[1], part[1])) / rows_in[:, None, None]
        return jnp.einsum("jw,iwc->ijc", _shares(left + start, left + end, at + jnp.arange(window)), rows)

    branches = [partial(cut, window=window) for window in windows]
    which, *planned = plan(box)
    return lax.map(lambda one: lax.switch(one[0], branches, *one[1:]), (which, owner, *planned))


def _placed(box: Array) -> tuple[Array, Array]:
    """A box's first pixel, from 0, and its size: (y, x) each."""
    return jnp.stack([box[1] - 1, box[0] - 1]), jnp.maximum(jnp.stack([box[3] - box[1] + 1, box[2] - box[0] + 1]), 1)


def crop_by_sums(photographs: Array, corners: Array, owner: Array, box: Array, side: int) -> Array:
    """One of `crops` [side, side, 3], from the sums at the corners of its pixels; two by two pixels where it grows."""
    height, width = photographs.shape[1:3]
    corner, size = _placed(box)
    shrinks = (size >= side).all()

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
