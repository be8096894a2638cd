"""Windows of maps [n, h, w, c]: their padding, their places as maps, and a map of the places that a stride picks."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
Padding = str | tuple[tuple[int, int], tuple[int, int]]


def explicit_padding(size: tuple[int, ...], window: tuple[int, ...], stride: int, padding: Padding) -> list[tuple[int, ...]]:
    """(low, high) padding of height and width for "SAME", "VALID" or explicit pairs."""
    if not isinstance(padding, str):
        return [tuple(pair) for pair in padding]
    return [tuple(pair) for pair in lax.padtype_to_pads(size, window, (stride, stride), padding)]


def places_of_windows(x: Array, window: tuple[int, ...], stride: int, pads: Sequence[tuple[int, ...]], fill: float = 0) -> list[Array]:
    """The first, second, ... place, row by row, of all windows of x [n, h, w, c]: each [n, out_h, out_w, c]."""
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=fill)
    out = [(padded.shape[1 + a] - window[a]) // stride + 1 for a in (0, 1)]
    return [
        padded[:, i : i + stride * (out[0] - 1) + 1 : stride, j : j + stride * (out[1] - 1) + 1 : stride]
        for i in range(window[0])
        for j in range(window[1])
    ]


def from_phases(
    phase: Callable[[int, int, list[int]], Array], size: tuple[int, ...], stride: int, pads: Sequence[tuple[int, ...]]
) -> Array:
    """The map [n, *size, c] made of phase(a, b, count) [n, *count, c]: with its padding, its places a, a + stride, ... by b, b + stride, ..."""
    count = [-(-(side + sum(pad)) // stride) for side, pad in zip(size, pads)]
    together = jnp.stack([jnp.stack([phase(a, b, count) for b in range(stride)], 3) for a in range(stride)], 2)
    padded = together.reshape(together.shape[0], count[0] * stride, count[1] * stride, together.shape[-1])
    (top, _), (left, _) = pads
    return padded[:, top : top + size[0], left : left + size[1]]
