"""Convolution of NHWC maps with HWIO kernels, with the ways of computing it and its gradients that a CPU wants; XLA's own elsewhere."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from facenet_jax import winograd
from facenet_jax.parallel import summed_over_rows
from facenet_jax.windows import Padding, explicit_padding, from_phases, places_of_windows

Array = jax.Array

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


def convolve_valid(x: Array, kernel: Array) -> Array:
    """The same of stride 1, without padding."""
    return convolve(x, kernel, 1, "VALID")


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


def convolve_by_squares(x: Array, kernel: Array, padding: Padding, inner: Callable[[Array, Array], Array] = convolve_valid) -> Array:
    """A convolution of stride 2 of an image with few channels as one of stride 1 with four times as many, `inner`: two by two pixels are one.

    Three channels leave most of a CPU's vector units idle.
    """
    window = kernel.shape[:2]
    pads = explicit_padding(x.shape[1:3], window, 2, padding)
    count = [(x.shape[1 + a] + sum(pads[a]) - window[a]) // 2 + 1 for a in (0, 1)]
    size = [-(-side // 2) for side in window]
    # What is missing to whole squares; less where the stride leaves pixels over.
    ends = [2 * (count[a] + size[a] - 1) - pads[a][0] - x.shape[1 + a] for a in (0, 1)]
    padded = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (pads[0][0], ends[0], 0), (pads[1][0], ends[1], 0), (0, 0, 0)])
    whole = jnp.pad(kernel, (*((0, 2 * size[a] - window[a]) for a in (0, 1)), (0, 0), (0, 0)))
    return inner(_squares(padded), _squares(whole.transpose(3, 0, 1, 2)).transpose(1, 2, 3, 0))


def convolve_by_rows(x: Array, kernel: Array) -> Array:
    """A convolution of stride 1 without padding as one matrix product: of what a kernel's row reads, with all its rows; their outputs are added, shifted.

    For few channels of maps that stay in a CPU's cache: of larger ones what is written in between costs more than the product gains.
    """
    (high, wide), features = kernel.shape[:2], kernel.shape[3]
    count = [x.shape[1 + a] - kernel.shape[a] + 1 for a in (0, 1)]
    read = jnp.concatenate([x[:, :, j : j + count[1]] for j in range(wide)], -1)
    y = jnp.dot(read, kernel.transpose(1, 2, 0, 3).reshape(read.shape[-1], high * features), precision=precision_for(x.dtype))
    rows = [y[:, i : i + count[0], :, i * features : (i + 1) * features] for i in range(high)]
    return sum(rows[1:], rows[0])


def _convolve_by_pairs(x: Array, kernel: Array, padding: Padding) -> Array:
    """A convolution of stride 1 of an image with few channels as a matrix product of patches, two neighbouring outputs a row.

    Twice as many columns for a third more multiplications: a CPU's product of so few is faster for it.
    """
    (high, wide), features = kernel.shape[:2], kernel.shape[3]
    (top, bottom), (left, right) = explicit_padding(x.shape[1:3], (high, wide), 1, padding)
    out = x.shape[2] + left + right - wide + 1
    pairs, blocks = -(-out // 2), wide // 2 + 1
    padded = lax.pad(
        x, jnp.zeros((), x.dtype), [(0, 0, 0), (top, bottom, 0), (left, 2 * (pairs + blocks - 1) - left - x.shape[2], 0), (0, 0, 0)]
    )
    paired = padded.reshape(*padded.shape[:2], -1, 2 * x.shape[3])
    shifted = [jnp.pad(kernel, ((0, 0), (j, 2 * blocks - wide - j), (0, 0), (0, 0))) for j in (0, 1)]
    patches = _patches(paired, (high, blocks), 1, [(0, 0), (0, 0)])
    y = jnp.dot(patches, jnp.concatenate(shifted, -1).reshape(-1, 2 * features), precision=precision_for(x.dtype))
    return y.reshape(x.shape[0], -1, 2 * pairs, features)[:, :, :out]


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

    On a CPU 1x1 kernels run as a matrix product (a TPU would flatten x for it, which is another layout there), images of few channels by pairs or squares, 3x3
    kernels of many by `winograd`.
    """
    convolution = lambda a, k: convolve(a, k, stride, padding)
    if _is_product(kernel, stride, padding):
        return lax.platform_dependent(x, kernel, cpu=_product, default=convolution)
    if x.shape[-1] <= 4 and stride <= 2:
        image = partial(_convolve_by_pairs if stride == 1 else convolve_by_squares, padding=padding)
        return lax.platform_dependent(x, kernel, cpu=image, default=convolution)
    pads = explicit_padding(x.shape[1:3], kernel.shape[:2], stride, padding)
    if x.dtype == jnp.float32 and winograd.pays(x.shape, kernel.shape, stride, pads):
        return lax.platform_dependent(x, kernel, cpu=partial(winograd.convolve, pads=pads), default=convolution)
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

    pads = explicit_padding(x.shape[1:3], kernel.shape[:2], stride, padding)
    image_on_cpu: Callable[[Array, Array], Array] = image_by_xla
    kernel_on_cpu: Callable[[Array, Array], Array] = partial(
        _kernel_gradient_by_patches, shape=kernel.shape, stride=stride, padding=padding
    )
    if _is_product(kernel, stride, padding):
        image_on_cpu = lambda b, k: _product(b, k.swapaxes(2, 3))
    elif stride > 1:
        image_on_cpu = partial(_image_gradient_by_phases, size=x.shape[1:3], stride=stride, padding=padding)
    elif x.dtype == jnp.float32 and winograd.pays(x.shape, kernel.shape, stride, pads):
        around = [(2 - low, 2 - high) for low, high in pads]
        image_on_cpu = lambda b, k: winograd.convolve(b, jnp.flip(k, (0, 1)).swapaxes(2, 3), around)
        kernel_on_cpu = partial(winograd.kernel_gradient, pads=pads)
    dx = lax.platform_dependent(dy, kernel, cpu=image_on_cpu, default=image_by_xla)
    return dx, lax.platform_dependent(x, dy, cpu=partial(summed_over_rows, kernel_on_cpu), default=kernel_by_xla)


conv2d.defvjp(_conv2d_forward, _conv2d_backward)
