"""3x3 convolutions of stride 1 by minimal filtering, F(2x2, 3x3): sixteen products for four outputs, where written out they are 36.

Source: Lavin and Gray 2015 (arXiv 1509.09308), section 4.1. Four by four pixels, two apart, make two by two outputs: pixels and kernel are each brought
into sixteen sums, these are multiplied channels by channels as matrices, and sums of the products are the outputs. The transforms only add and halve,
so float32 keeps its digits (seen: 7e-7 of the largest output). For CPUs, where the products are what a step takes its time for.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim

from facenet_jax.windows import from_phases, places_of_windows

Array = jax.Array
# Arrays of equal shape, as rows of columns.
Grid = Sequence[Sequence[Array]]
Sums = Callable[..., tuple[Array, ...]]
Pads = Sequence[tuple[int, ...]]

# Fewer channels, in or out, and the sums take as long as the products that they save; fewer tiles, and the kernel's do.
_CHANNELS = 64
_TILES = 128


def pays(images: tuple[int, ...], kernel: tuple[int, ...], stride: int, pads: Pads) -> bool:
    """Whether a CPU is faster this way for images [n, h, w, c] and a kernel [kh, kw, c, d], shapes both; of unknown n (an export) it is not known to be."""
    if kernel[:2] != (3, 3) or stride != 1 or min(kernel[2:]) < _CHANNELS or not all(0 <= pad <= 2 for pair in pads for pad in pair):
        return False
    high, wide = _size(images, pads)
    return not is_symbolic_dim(images[0]) and images[0] * (high // 2) * (wide // 2) >= _TILES


def _size(images: tuple[int, ...], pads: Pads) -> list[int]:
    return [images[1 + axis] + sum(pads[axis]) - 2 for axis in (0, 1)]


def _both_ways(sums: Sums, grid: Grid) -> Grid:
    """`sums` of each column of arrays, then of each row of what that gave."""
    return [sums(*row) for row in zip(*(sums(*column) for column in zip(*grid, strict=True)), strict=True)]


def _of_pixels(a: Array, b: Array, c: Array, d: Array) -> tuple[Array, ...]:
    return a - c, b + c, c - b, b - d


def _of_kernel(a: Array, b: Array, c: Array) -> tuple[Array, ...]:
    return a, 0.5 * (a + c) + 0.5 * b, 0.5 * (a + c) - 0.5 * b, c


def _to_outputs(a: Array, b: Array, c: Array, d: Array) -> tuple[Array, ...]:
    return a + b + c, b - c - d


# The transposes of the last two, for the kernel's gradient.
def _of_gradients(a: Array, b: Array) -> tuple[Array, ...]:
    return a, a + b, a - b, -b


def _to_kernel(a: Array, b: Array, c: Array, d: Array) -> tuple[Array, ...]:
    return a + 0.5 * (b + c), 0.5 * (b - c), d + 0.5 * (b + c)


def _tiles(x: Array, side: int, pads: Pads) -> Grid:
    """x [n, h, w, c] -> its places in windows of side x side, two apart, each [n, tiles down, tiles across, c]."""
    places = places_of_windows(x, (side, side), 2, pads)
    return [places[side * row : side * (row + 1)] for row in range(side)]


def _sums_of_pixels(x: Array, pads: Pads) -> Grid:
    # An odd row or column of outputs gets a neighbour that is cut off in the end.
    return _both_ways(_of_pixels, _tiles(x, 4, [(low, high + size % 2) for (low, high), size in zip(pads, _size(x.shape, pads))]))


def convolve(x: Array, kernel: Array, pads: Pads) -> Array:
    """x [n, h, w, c] with kernel [3, 3, c, d], float32 -> [n, h', w', d]."""
    rows = zip(_sums_of_pixels(x, pads), _both_ways(_of_kernel, [[*row] for row in kernel]), strict=True)
    products = [[jnp.einsum("nhwc,cd->nhwd", a, k) for a, k in zip(*row, strict=True)] for row in rows]
    outputs = _both_ways(_to_outputs, products)
    return from_phases(lambda i, j, _: outputs[i][j], tuple(_size(x.shape, pads)), 2, [(0, 0), (0, 0)])


def kernel_gradient(x: Array, dy: Array, pads: Pads) -> Array:
    """x [n, h, w, c], the output's gradient dy [n, h', w', d], float32 -> the kernel's [3, 3, c, d]."""
    gradients = _both_ways(_of_gradients, _tiles(dy, 2, [(0, side % 2) for side in dy.shape[1:3]]))
    rows = zip(_sums_of_pixels(x, pads), gradients, strict=True)
    flat = lambda a: a.reshape(-1, a.shape[-1])
    products = [[flat(a).T @ flat(b) for a, b in zip(*row, strict=True)] for row in rows]
    return jnp.stack([jnp.stack(row) for row in _both_ways(_to_kernel, products)])
