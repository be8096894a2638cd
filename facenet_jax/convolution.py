"""Convolution of NHWC maps with HWIO kernels, with the ways of computing it and its gradients that a CPU wants; XLA's own elsewhere."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from facenet_jax.parallel import summed_over_rows

Array = jax.Array
Padding = str | tuple[tuple[int, int], tuple[int, int]]

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")
# Patches of about this many floats fit a CPU core's cache while their weight gradient is one matrix product.
_PATCH_FLOATS = 1 << 20


def precision_for(dtype: Any) -> lax.Precision | None:
    """float32 means float32: no TF32 or bfloat16 passes behind the user's back."""
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def convolve(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    """XLA's own convolution of x [n, h, w, c] with kernel [kh, kw, c, d]."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=_DIMENSIONS,
        precision=precision_for(x.dtype),
    )


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


def _patches(x: Array, window: tuple[int, ...], stride: int, pads: Sequence[tuple[int, ...]]) -> Array:
    """[n, h, w, c] -> [n * out_h * out_w, window * c], rows in the order of a reshaped HWIO kernel."""
    return jnp.concatenate(places_of_windows(x, window, stride, pads), -1).reshape(-1, window[0] * window[1] * x.shape[-1])


def _kernel_gradient_by_patches(x: Array, dy: Array, shape: tuple[int, ...], stride: int, padding: Padding) -> Array:
    """Gradient of a convolution's kernel as matrix products over cache-sized groups of images.

    XLA's CPU backend runs this gradient as a convolution with an image-sized window, 2 to 10 times slower.
    """
    window = shape[:2]
    pads = explicit_padding(x.shape[1:3], window, stride, padding)
    floats_per_image = dy.shape[1] * dy.shape[2] * window[0] * window[1] * x.shape[-1]
    count = x.shape[0]
    # Two turns at least: a loop of one is unrolled, and what makes x fused into the transposed copy that its product then wants.
    chunk = max(c for c in range(1, count + 1) if count % c == 0 and (c == 1 or (c < count and c * floats_per_image <= _PATCH_FLOATS)))
    sizes = window[0] * window[1] * x.shape[-1], dy.shape[-1]
    # A product of rows with rows turns its first factor over: the narrow one (a fifth to a half faster, the wide one being patches as a rule).
    narrow = 0 if sizes[0] <= sizes[1] else 1

    def add(total: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
        images, gradients = pair
        factors = _patches(images, window, stride, pads), gradients.reshape(-1, gradients.shape[-1])
        product = lax.dot_general(factors[narrow], factors[1 - narrow], (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return total + product, None

    split = lambda a: a.reshape(count // chunk, chunk, *a.shape[1:])
    zero = jnp.zeros((sizes[narrow], sizes[1 - narrow]), jnp.float32)
    total, _ = lax.scan(add, zero, (split(x), split(dy)))
    return (total.T if narrow else total).reshape(shape).astype(x.dtype)


def _squares(x: Array) -> Array:
    """[n, 2h, 2w, c] -> [n, h, w, 4c]: two by two pixels as one."""
    n, h, w, c = x.shape
    return x.reshape(n, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(n, h // 2, w // 2, 4 * c)


def _convolve_image(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    """A convolution, of stride 1 or 2, of an image with few channels as one of stride 1 with four times as many: two by two pixels are one.

    Three channels leave most of a CPU's vector units idle; of stride 1, all four places of two by two are made at once, as channels.
    """
    window, features = kernel.shape[:2], kernel.shape[3]
    pads = explicit_padding(x.shape[1:3], window, stride, padding)
    out = [(x.shape[1 + a] + sum(pads[a]) - window[a]) // stride + 1 for a in (0, 1)]
    places = 2 // stride
    count, size = [-(-n // places) for n in out], [-(-(k + places - 1) // 2) for k in window]
    # What is missing to whole squares; more where a square's last places are not asked for, less where the stride leaves pixels over.
    ends = [2 * (count[a] + size[a] - 1) - pads[a][0] - x.shape[1 + a] for a in (0, 1)]
    padded = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (pads[0][0], ends[0], 0), (pads[1][0], ends[1], 0), (0, 0, 0)])
    shifted = [
        jnp.pad(kernel, ((i, 2 * size[0] - window[0] - i), (j, 2 * size[1] - window[1] - j), (0, 0), (0, 0)))
        for i in range(places)
        for j in range(places)
    ]
    packed = _squares(jnp.concatenate(shifted, -1).transpose(3, 0, 1, 2)).transpose(1, 2, 3, 0)
    y = convolve(_squares(padded), packed, 1, "VALID")
    apart = y.reshape(y.shape[0], *count, places, places, features).transpose(0, 1, 3, 2, 4, 5)
    return apart.reshape(y.shape[0], count[0] * places, count[1] * places, features)[:, : out[0], : out[1]]


def from_phases(
    phase: Callable[[int, int, list[int]], Array], size: tuple[int, ...], stride: int, pads: Sequence[tuple[int, ...]]
) -> Array:
    """The map [n, *size, c] made of phase(a, b, count) [n, *count, c]: with its padding, its places a, a + stride, ... by b, b + stride, ..."""
    count = [-(-(side + sum(pad)) // stride) for side, pad in zip(size, pads)]
    together = jnp.stack([jnp.stack([phase(a, b, count) for b in range(stride)], 3) for a in range(stride)], 2)
    padded = together.reshape(together.shape[0], count[0] * stride, count[1] * stride, together.shape[-1])
    (top, _), (left, _) = pads
    return padded[:, top : top + size[0], left : left + size[1]]


def _image_gradient_by_phases(dy: Array, kernel: Array, size: tuple[int, ...], stride: int, padding: Padding) -> Array:
    """Gradient of a strided convolution's image as a convolution for each phase of the stride, with that phase's part of the kernel.

    XLA's CPU backend puts zeros between the places of dy instead and multiplies them all, stride^2 times the work.
    """

    def phase(a: int, b: int, count: list[int]) -> Array:
        part = jnp.flip(kernel[a::stride, b::stride], (0, 1)).swapaxes(2, 3)
        if 0 in part.shape:
            return jnp.zeros((dy.shape[0], *count, kernel.shape[2]), dy.dtype)
        rows, columns = ((part.shape[axis] - 1, count[axis] - dy.shape[1 + axis]) for axis in (0, 1))
        if part.shape[:2] == (1, 1):
            return jnp.pad(_product(dy, part), ((0, 0), rows, columns, (0, 0)))
        return convolve(dy, part, 1, (rows, columns))

    return from_phases(phase, size, stride, explicit_padding(size, kernel.shape[:2], stride, padding))


def _is_product(kernel: Array, stride: int, padding: Padding) -> bool:
    return kernel.shape[:2] == (1, 1) and stride == 1 and (isinstance(padding, str) or not any(map(any, padding)))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv2d(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    """Convolution of x [n, h, w, c] with kernel [kh, kw, c, d].

    On a CPU 1x1 kernels run as a matrix product (a TPU would flatten x for it, which is another layout there), images as `_convolve_image` says.
    """
    convolution = lambda a, k: convolve(a, k, stride, padding)
    if _is_product(kernel, stride, padding):
        return lax.platform_dependent(x, kernel, cpu=_product, default=convolution)
    if x.shape[-1] <= 4 and stride <= 2:
        image = lambda a, k: _convolve_image(a, k, stride, padding)
        return lax.platform_dependent(x, kernel, cpu=image, default=convolution)
    return convolution(x, kernel)


def _product(x: Array, kernel: Array) -> Array:
    return jnp.einsum("nhwc,cd->nhwd", x, kernel[0, 0], precision=precision_for(x.dtype))


def _conv2d_forward(x: Array, kernel: Array, stride: int, padding: Padding) -> tuple[Array, tuple[Array, Array]]:
    return conv2d(x, kernel, stride, padding), (x, kernel)


def _conv2d_backward(stride: int, padding: Padding, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = saved

    def image_by_xla(b: Array, k: Array) -> Array:
        return jax.vjp(lambda a: convolve(a, k, stride, padding), x)[1](b)[0]

    def kernel_by_xla(a: Array, b: Array) -> Array:
        return jax.vjp(lambda k: convolve(a, k, stride, padding), kernel)[1](b)[0]

    image_on_cpu: Callable[[Array, Array], Array] = image_by_xla
    if _is_product(kernel, stride, padding):
        image_on_cpu = lambda b, k: _product(b, k.swapaxes(2, 3))
    elif stride > 1:
        image_on_cpu = partial(_image_gradient_by_phases, size=x.shape[1:3], stride=stride, padding=padding)
    by_patches = partial(_kernel_gradient_by_patches, shape=kernel.shape, stride=stride, padding=padding)
    kernel_on_cpu = partial(summed_over_rows, by_patches)
    dx = lax.platform_dependent(dy, kernel, cpu=image_on_cpu, default=image_by_xla)
    return dx, lax.platform_dependent(x, dy, cpu=kernel_on_cpu, default=kernel_by_xla)


conv2d.defvjp(_conv2d_forward, _conv2d_backward)
