"""Blocks the networks share: convolution, dense, BatchNorm, pooling, local response normalisation.

Activations are NHWC. Kernels are HWIO. Parameters are float32 whatever the compute dtype.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from facenet_jax.errors import BadInput

Array = jax.Array
Padding = str | tuple[tuple[int, int], tuple[int, int]]

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")
# Patches of about this many floats fit a CPU core's cache while their weight gradient is one matrix product.
_PATCH_FLOATS = 1 << 20


def precision_for(dtype: Any) -> lax.Precision | None:
    """float32 means float32: no TF32 or bfloat16 passes behind the user's back."""
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def _convolve(x: Array, kernel: Array, stride: int, padding: Padding, groups: int = 1) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=_DIMENSIONS,
        feature_group_count=groups,
        precision=precision_for(x.dtype),
    )


def explicit_padding(size: tuple[int, ...], window: tuple[int, ...], stride: int, padding: Padding) -> list[tuple[int, ...]]:
    """(low, high) padding of height and width for "SAME", "VALID" or explicit pairs."""
    if not isinstance(padding, str):
        return [tuple(pair) for pair in padding]
    return [tuple(pair) for pair in lax.padtype_to_pads(size, window, (stride, stride), padding)]


def _places_of_windows(x: Array, window: tuple[int, ...], stride: int, pads: Sequence[tuple[int, ...]], fill: float = 0) -> list[Array]:
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
    return jnp.concatenate(_places_of_windows(x, window, stride, pads), -1).reshape(-1, window[0] * window[1] * x.shape[-1])


def _kernel_gradient_by_patches(x: Array, dy: Array, shape: tuple[int, ...], stride: int, padding: Padding) -> Array:
    """Gradient of a convolution's kernel as matrix products over cache-sized groups of images.

    XLA's CPU backend runs this gradient as a convolution with an image-sized window, 2 to 10 times slower.
    """
    window = shape[:2]
    pads = explicit_padding(x.shape[1:3], window, stride, padding)
    floats_per_image = dy.shape[1] * dy.shape[2] * window[0] * window[1] * x.shape[-1]
    count = x.shape[0]
    chunk = max(c for c in range(1, count + 1) if count % c == 0 and (c == 1 or (c < count and c * floats_per_image <= _PATCH_FLOATS)))

    def add(total: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
        images, gradients = pair
        columns = _patches(images, window, stride, pads)
        rows = gradients.reshape(-1, gradients.shape[-1])
        product = lax.dot_general(columns, rows, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return total + product, None

    split = lambda a: a.reshape(count // chunk, chunk, *a.shape[1:])
    zero = jnp.zeros((window[0] * window[1] * x.shape[-1], dy.shape[-1]), jnp.float32)
    total, _ = lax.scan(add, zero, (split(x), split(dy)))
    return total.reshape(shape).astype(x.dtype)


def _pairs(x: Array) -> Array:
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
    # What is missing to whole pairs; more where the last of a pair is not asked for, less where the stride leaves pixels over.
    ends = [2 * (count[a] + size[a] - 1) - pads[a][0] - x.shape[1 + a] for a in (0, 1)]
    padded = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (pads[0][0], ends[0], 0), (pads[1][0], ends[1], 0), (0, 0, 0)])
    shifted = [
        jnp.pad(kernel, ((i, 2 * size[0] - window[0] - i), (j, 2 * size[1] - window[1] - j), (0, 0), (0, 0)))
        for i in range(places)
        for j in range(places)
    ]
    packed = _pairs(jnp.concatenate(shifted, -1).transpose(3, 0, 1, 2)).transpose(1, 2, 3, 0)
    y = _convolve(_pairs(padded), packed, 1, "VALID")
    phases = y.reshape(*y.shape[:3], places, places, features)
    y = _interleave([[phases[:, :, :, i, j] for j in range(places)] for i in range(places)])
    return y[:, : out[0], : out[1]]


def _interleave(phases: Sequence[Sequence[Array]]) -> Array:
    """[a][b] of [n, h, w, c] -> [n, rows * h, columns * w, c]: phase (a, b) holds the places a, a + rows, ... by b, b + columns, ..."""
    together = jnp.stack([jnp.stack(row, 3) for row in phases], 2)
    n, h, rows, w, columns, c = together.shape
    return together.reshape(n, h * rows, w * columns, c)


def _image_gradient_by_phases(dy: Array, kernel: Array, size: tuple[int, ...], stride: int, padding: Padding) -> Array:
    """Gradient of a strided convolution's image as a convolution for each phase of the stride, with that phase's part of the kernel.

    XLA's CPU backend puts zeros between the places of dy instead and multiplies them all, stride^2 times the work.
    """
    window = kernel.shape[:2]
    pads = explicit_padding(size, window, stride, padding)
    padded = [side + sum(pad) for side, pad in zip(size, pads)]
    count = [-(-side // stride) for side in padded]

    def phase(a: int, b: int) -> Array:
        part = jnp.flip(kernel[a::stride, b::stride], (0, 1)).swapaxes(2, 3)
        if 0 in part.shape:
            return jnp.zeros((dy.shape[0], *count, kernel.shape[2]), dy.dtype)
        rows, columns = ((part.shape[axis] - 1, count[axis] - dy.shape[1 + axis]) for axis in (0, 1))
        if part.shape[:2] == (1, 1):
            return jnp.pad(_product(dy, part), ((0, 0), rows, columns, (0, 0)))
        return _convolve(dy, part, 1, (rows, columns))

    dx = _interleave([[phase(a, b) for b in range(stride)] for a in range(stride)])
    (top, _), (left, _) = pads
    return dx[:, top : top + size[0], left : left + size[1]]


def _is_product(kernel: Array, stride: int, padding: Padding) -> bool:
    return kernel.shape[:2] == (1, 1) and stride == 1 and (isinstance(padding, str) or not any(map(any, padding)))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv2d(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    """Convolution of x [n, h, w, c] with kernel [kh, kw, c, d].

    On a CPU 1x1 kernels run as a matrix product (a TPU would flatten x for it, which is another layout there), images as `_convolve_image` says.
    """
    convolution = lambda a, k: _convolve(a, k, stride, padding)
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
        return jax.vjp(lambda a: _convolve(a, k, stride, padding), x)[1](b)[0]

    def kernel_by_xla(a: Array, b: Array) -> Array:
        return jax.vjp(lambda k: _convolve(a, k, stride, padding), kernel)[1](b)[0]

    image_on_cpu = image_by_xla
    if _is_product(kernel, stride, padding):
        image_on_cpu = lambda b, k: _product(b, k.swapaxes(2, 3))
    elif stride > 1:
        image_on_cpu = partial(_image_gradient_by_phases, size=x.shape[1:3], stride=stride, padding=padding)
    kernel_on_cpu = partial(_kernel_gradient_by_patches, shape=kernel.shape, stride=stride, padding=padding)
    dx = lax.platform_dependent(dy, kernel, cpu=image_on_cpu, default=image_by_xla)
    return dx, lax.platform_dependent(x, dy, cpu=kernel_on_cpu, default=kernel_by_xla)


conv2d.defvjp(_conv2d_forward, _conv2d_backward)


class Conv(nn.Module):
    """Convolution. `padding` is "SAME", "VALID" or ((top, bottom), (left, right)).

    `kernel` is a size or (height, width). Initialised by Xavier's uniform rule, as the original code does.
    """

    features: int
    kernel: int | tuple[int, int] = 3
    stride: int = 1
    padding: Padding = "SAME"
    use_bias: bool = False
    dtype: Any = jnp.float32
    kernel_init: Callable = nn.initializers.xavier_uniform()

    @nn.compact
    def variables_of(self, channels: int) -> tuple[Array, Array | None]:
        """(kernel [kh, kw, channels, features], bias or None), made where they are not there yet."""
        window = self.kernel if isinstance(self.kernel, tuple) else (self.kernel, self.kernel)
        kernel = self.param("kernel", self.kernel_init, (*window, channels, self.features), jnp.float32)
        return kernel, self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32) if self.use_bias else None

    def __call__(self, x: Array) -> Array:
        kernel, bias = self.variables_of(x.shape[-1])
        y = conv2d(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, self.padding)
        return y if bias is None else y + bias.astype(self.dtype)


def convolve_together(convolutions: Sequence[Conv], x: Array) -> Array:
    """Convolutions of equal settings that read the same x, as one: their outputs side by side, x read once, its gradient made once."""
    first = convolutions[0]
    kernel = jnp.concatenate([c.variables_of(x.shape[-1])[0] for c in convolutions], -1)
    return conv2d(x.astype(first.dtype), kernel.astype(first.dtype), first.stride, first.padding)


class Dense(nn.Module):
    """Affine map of the last axis, [..., c] -> [..., features]."""

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", nn.initializers.xavier_uniform(), (x.shape[-1], self.features), jnp.float32)
        y = jnp.dot(x.astype(self.dtype), kernel.astype(self.dtype), precision=precision_for(self.dtype))
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32).astype(self.dtype)
        return y


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def normalize_batch(
    x: Array, scale: Array, bias: Array, near: Array, epsilon: float, relu: bool = False, pool: tuple[int, int] | None = None
) -> tuple[Array, Array, Array]:
    """Normalises each group of x [groups, rows, ..., c] by its own statistics: (y, mean [groups, 1, ..., c], biased variance), y after ReLU if asked.

    pool, (window, stride) of a maximum of y over height and width: taken of x, the statistics being those of all of x. The same where scale is
    positive, and what is normalised, kept and read again is a quarter.

    `near` [c], a guess of the mean, is taken off before squares are summed, so that one pass over x gives both sums without losing digits. The
    gradient is written out, because the derived one reads x five times and, on CPU, reduces it without vector instructions; ReLU's is made
    again from x, where the derived one would keep a mask. Gradients do not flow through the returned statistics. Sums are in float32. x keeps its
    axes: flattened, a TPU would have to bring it into another layout and back.
    """
    return _normalize_batch_forward(x, scale, bias, near, epsilon, relu, pool)[0]


def _pool_groups(x: Array, pool: tuple[int, int] | None) -> Array:
    """Maximum over height and width of x [groups, rows, h, w, c]."""
    if pool is None:
        return x
    y = max_pool(x.reshape(-1, *x.shape[2:]), *pool)
    return y.reshape(*x.shape[:2], *y.shape[1:])


def _normalize_batch_forward(
    x: Array, scale: Array, bias: Array, near: Array, epsilon: float, relu: bool, pool: tuple[int, int] | None
) -> tuple[Any, Any]:
    axes = tuple(range(1, x.ndim - 1))
    values = x.astype(jnp.float32) - near
    away, squares = values.mean(axes, keepdims=True), jnp.square(values).mean(axes, keepdims=True)
    mean, var = away + near, jnp.maximum(squares - jnp.square(away), 0)
    inverse = lax.rsqrt(var + epsilon)
    pooled = _pool_groups(x, pool)
    y = (pooled.astype(jnp.float32) - mean) * (inverse * scale) + bias
    return ((nn.relu(y) if relu else y).astype(x.dtype), mean, var), (x, pooled, mean, inverse, scale, bias)


def _normalize_batch_backward(
    epsilon: float, relu: bool, pool: tuple[int, int] | None, saved: Any, cotangents: Any
) -> tuple[Array, Array, Array, Array]:
    x, pooled, mean, inverse, scale, bias = saved
    axes = tuple(range(1, x.ndim - 1))
    dy, centred = cotangents[0].astype(jnp.float32), pooled.astype(jnp.float32) - mean
    if relu:
        dy = jnp.where(centred * (inverse * scale) + bias > 0, dy, 0)
    normal = centred * inverse
    dbias = dy.sum(axes, keepdims=True)
    dscale = (dy * normal).sum(axes, keepdims=True)
    if pool is not None:
        dy = jax.vjp(lambda a: _pool_groups(a, pool), x)[1](dy.astype(x.dtype))[0].astype(jnp.float32)
        normal = (x.astype(jnp.float32) - mean) * inverse
    rows = x.size // (x.shape[0] * x.shape[-1])
    dx = (inverse * scale) * (dy - dbias / rows - normal * (dscale / rows))
    whole = tuple(range(x.ndim - 1))
    return dx.astype(x.dtype), dscale.sum(whole), dbias.sum(whole), jnp.zeros_like(bias)


normalize_batch.defvjp(_normalize_batch_forward, _normalize_batch_backward)


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last; statistics in float32.

    In training the batch is cut into `groups` equal runs of rows, each normalised by its own statistics: 1 is
    the whole global batch whatever the devices, the number of devices is each device on its own (no traffic). The
    running mean and variance are averages over the groups. The result depends on `groups`, never on the mesh.
    """

    use_scale: bool = True
    momentum: float = 0.9
    epsilon: float = 1e-5
    groups: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def variables_of(self, features: int) -> tuple[Array, Array, nn.Variable, nn.Variable]:
        """(scale, bias, running mean, running variance), made where they are not there yet."""
        bias = self.param("bias", nn.initializers.zeros, (features,), jnp.float32)
        scale = self.param("scale", nn.initializers.ones, (features,), jnp.float32) if self.use_scale else jnp.ones((features,))
        mean = self.variable("batch_stats", "mean", jnp.zeros, (features,), jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, (features,), jnp.float32)
        return scale, bias, mean, var

    def __call__(self, x: Array, train: bool, *, relu: bool = False, pool: tuple[int, int] | None = None) -> Array:
        """x [n, ..., c] normalised; then, if asked, ReLU and a maximum over pool's (window, stride)."""
        early = pool if train and not self.use_scale else None
        y = normalize_together([self], [x.shape[-1]], x, train, relu, early)
        return max_pool(y, *pool) if pool is not None and early is None else y


def normalize_together(
    norms: Sequence[BatchNorm], features: Sequence[int], x: Array, train: bool, relu: bool = False, pool: tuple[int, int] | None = None
) -> Array:
    """BatchNorms of equal settings over neighbouring runs of x's channels at once: what each would give its own run, in one pass over x.

    relu, pool: as `normalize_batch` has them.
    """
    first = norms[0]
    parts = [norm.variables_of(n) for norm, n in zip(norms, features, strict=True)]
    scale, bias = jnp.concatenate([part[0] for part in parts]), jnp.concatenate([part[1] for part in parts])
    x = x.astype(first.dtype)
    mean, var = jnp.concatenate([part[2].value for part in parts]), jnp.concatenate([part[3].value for part in parts])
    if not train:
        factor = scale * lax.rsqrt(var + first.epsilon)
        y = x * factor.astype(first.dtype) + (bias - mean * factor).astype(first.dtype)
        return nn.relu(y) if relu else y
    if x.shape[0] % first.groups:
        raise BadInput(f"a batch of {x.shape[0]} images does not divide into {first.groups} BatchNorm groups: set model.bn_groups")
    grouped = x.reshape(first.groups, x.shape[0] // first.groups, *x.shape[1:])
    y, mean, var = normalize_batch(grouped, scale, bias, mean, first.epsilon, relu, pool)
    if not first.is_initializing():
        axes = tuple(range(grouped.ndim - 1))
        keep, start = first.momentum, 0
        for (_, _, running_mean, running_var), n in zip(parts, features, strict=True):
            run = slice(start, start + n)
            running_mean.value = keep * running_mean.value + (1 - keep) * mean.mean(axes)[run]
            running_var.value = keep * running_var.value + (1 - keep) * var.mean(axes)[run]
            start += n
    return y.reshape(x.shape[0], *y.shape[2:])


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def max_pool(x: Array, window: int, stride: int, padding: Padding = "VALID") -> Array:
    """Maximum over window x window; of equals the first, row by row, has the gradient."""
    by_xla = lambda a: nn.max_pool(a, (window, window), (stride, stride), padding)
    pads = explicit_padding(x.shape[1:3], (window, window), stride, padding)
    on_cpu = lambda a: reduce(jnp.maximum, _places_of_windows(a, (window, window), stride, pads, -jnp.inf))
    return lax.platform_dependent(x, cpu=on_cpu, default=by_xla)


def _max_pool_forward(x: Array, window: int, stride: int, padding: Padding) -> tuple[Array, Array]:
    return max_pool(x, window, stride, padding), x


def _max_pool_backward(window: int, stride: int, padding: Padding, x: Array, dy: Array) -> tuple[Array]:
    def by_xla(x: Array, dy: Array) -> Array:
        return jax.vjp(lambda a: nn.max_pool(a, (window, window), (stride, stride), padding), x)[1](dy)[0]

    by_phases = partial(_pool_gradient_by_phases, window=window, stride=stride, padding=padding)
    return (lax.platform_dependent(x, dy, cpu=by_phases, default=by_xla),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def _pool_gradient_by_phases(x: Array, dy: Array, window: int, stride: int, padding: Padding) -> Array:
    """Gradient of a maximum: which place of its window each output has taken, then a sum for each phase of the stride.

    XLA's CPU backend scatters instead, over four arrays of indices as large as x.
    """
    pads = explicit_padding(x.shape[1:3], (window, window), stride, padding)
    best, *others = _places_of_windows(x, (window, window), stride, pads, -jnp.inf)
    taken = jnp.zeros(dy.shape, jnp.uint8)
    for index, values in enumerate(others, 1):
        best, taken = jnp.maximum(best, values), jnp.where(values > best, jnp.uint8(index), taken)
    count = [-(-(side + sum(pad)) // stride) for side, pad in zip(x.shape[1:3], pads)]

    def phase(a: int, b: int) -> Array:
        total = jnp.zeros((dy.shape[0], *count, dy.shape[3]), dy.dtype)
        for i in range(a, window, stride):
            for j in range(b, window, stride):
                given = jnp.where(taken == i * window + j, dy, 0)
                before = i // stride, j // stride
                around = [(before[axis], count[axis] - dy.shape[1 + axis] - before[axis]) for axis in (0, 1)]
                total += jnp.pad(given, ((0, 0), *around, (0, 0)))
        return total

    dx = _interleave([[phase(a, b) for b in range(stride)] for a in range(stride)])
    (top, _), (left, _) = pads
    return dx[:, top : top + x.shape[1], left : left + x.shape[2]]


@jax.custom_vjp
def add_relu(x: Array, y: Array) -> Array:
    """relu(x + y), the end of a residual block.

    Written as max(x, -y) + y, the same number: XLA's CPU backend makes what looks like a function of one array again for each of its readers, and
    the sums of a chain of blocks so grow into one another, quadratically.
    """
    return jnp.maximum(x, -y) + y


def _add_relu_forward(x: Array, y: Array) -> tuple[Array, Array]:
    total = add_relu(x, y)
    return total, total


def _add_relu_backward(total: Array, dy: Array) -> tuple[Array, Array]:
    dx = jnp.where(total > 0, dy, 0)
    return dx, dx


add_relu.defvjp(_add_relu_forward, _add_relu_backward)


def l2_pool(x: Array, window: int, stride: int, padding: Padding = "VALID") -> Array:
    """Square root of the *sum* of squares over the window, as Torch's SpatialLPPooling(2) has it; gradient 0 at 0."""
    pads = padding if isinstance(padding, str) else ((0, 0), *padding, (0, 0))
    total = lax.reduce_window(jnp.square(x), jnp.zeros((), x.dtype), lax.add, (1, window, window, 1), (1, stride, stride, 1), pads)
    positive = total > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, total, 1)), 0)


def local_response_norm(x: Array, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Array:
    """Torch's SpatialCrossMapLRN: x / (k + alpha / size * sum over `size` channels of x^2) ** beta, in float32."""
    squares = jnp.square(x.astype(jnp.float32))
    half = size // 2
    total = lax.reduce_window(squares, 0.0, lax.add, (1, 1, 1, size), (1, 1, 1, 1), ((0, 0), (0, 0), (0, 0), (half, size - 1 - half)))
    return (x.astype(jnp.float32) * (k + alpha / size * total) ** -beta).astype(x.dtype)


def l2_normalize(x: Array, epsilon: float = 1e-10) -> Array:
    """Unit rows in float32: x / sqrt(max(sum x^2, epsilon)), as tf.nn.l2_normalize has it."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), epsilon))
