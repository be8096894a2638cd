"""P-, R- and O-Net of MTCNN (Zhang et al. 2016) as davidsandberg/facenet has them (src/align/detect_face.py), for upright images.

The published weights were trained on transposed images; `weights.mtcnn` turns their kernels, and the last maps are flattened with x first.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from facenet_jax import winograd
from facenet_jax.convolution import convolve, convolve_by_rows, convolve_by_squares, convolve_valid
from facenet_jax.layers import Conv, Dense, convolve_together, max_pool

Array = jax.Array


class _PReLU(nn.Module):
    """max(x, 0) + slope * min(x, 0), one slope a channel."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        slope = self.param("slope", nn.initializers.constant(0.25), (x.shape[-1],), jnp.float32)
        return jnp.where(x > 0, x, x * slope)


class _CachedConv(Conv):
    """3x3 without padding of maps that stay in a CPU's cache: there `on_cpu`, which would not pay for larger ones."""

    on_cpu: Callable[[Array, Array], Array] = partial(winograd.convolve, pads=[(0, 0), (0, 0)])

    def __call__(self, x: Array) -> Array:
        kernel, bias = self.variables_of(x.shape[-1])
        return lax.platform_dependent(x, kernel, cpu=self.on_cpu, default=convolve_valid) + bias


class _ConvPool(nn.Module):
    """3x3 convolution of an image with channels to spare, PReLU, 2x2 maximum of stride 2: four pixels at once as 4x4 of stride 2.

    Three channels in and ten out leave most of a vector unit idle; the four places of a pool as forty channels run 4 times faster on a CPU.
    """

    features: int = 10

    @nn.compact
    def __call__(self, x: Array, inside: Array) -> Array:
        """x [b, h, w, 3] with even h and w, inside [b, h, w] bool: where a 3x3 window may begin -> [b, h / 2 - 1, w / 2 - 1, features]."""
        kernel = self.param("kernel", nn.initializers.xavier_uniform(), (3, 3, x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        slope = self.param("slope", nn.initializers.constant(0.25), (self.features,), jnp.float32)
        places = [(i, j) for i in (0, 1) for j in (0, 1)]
        packed = jnp.concatenate([jnp.pad(kernel, ((i, 1 - i), (j, 1 - j), (0, 0), (0, 0))) for i, j in places], -1)
        on_cpu = partial(convolve_by_squares, padding="VALID", inner=convolve_by_rows)
        y = lax.platform_dependent(x, packed, cpu=on_cpu, default=partial(convolve, stride=2, padding="VALID"))
        y = y.reshape(*y.shape[:3], 4, self.features) + bias
        y = jnp.where(y > 0, y, y * slope)
        # A pool at the edge of an odd map holds places beyond it.
        rows, columns = 2 * y.shape[1], 2 * y.shape[2]
        placed = inside[:, :rows, :columns].reshape(-1, y.shape[1], 2, y.shape[2], 2).transpose(0, 1, 3, 2, 4).reshape(*y.shape[:4])
        return jnp.where(placed[..., None], y, -jnp.inf).max(3)


class PNet(nn.Module):
    """Proposals: standardised images [b, h, w, 3] (even h, w), inside [b, h, w] -> (face score [b, h', w'], box corrections [b, h', w', 4]).

    Several images may lie in one; `inside` says where a 3x3 window has all its pixels in one of them. A cell at (y, x) looks at the 12x12 window
    at (2y, 2x), and means nothing where that window is not in one image (an odd side counts as one more).
    """

    @nn.compact
    def __call__(self, x: Array, inside: Array) -> tuple[Array, Array]:
        x = _ConvPool(name="conv1")(x, inside)
        # Nothing between the images may be infinite: 0 * inf.
        x = jnp.where(jnp.isfinite(x), x, 0)
        x = _PReLU(name="prelu2")(_CachedConv(16, use_bias=True, on_cpu=convolve_by_rows, name="conv2")(x))
        x = _PReLU(name="prelu3")(_CachedConv(32, use_bias=True, name="conv3")(x))
        heads = Conv(4, 1, use_bias=True, name="boxes"), Conv(2, 1, use_bias=True, name="scores")
        boxes, scores = jnp.split(convolve_together(heads, x), [4], -1)
        return _face(scores), boxes


class RNet(nn.Module):
    """Refinement: standardised crops [n, 24, 24, 3] -> (face score [n], box corrections [n, 4])."""

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        x = _PReLU(name="prelu1")(Conv(28, 3, 1, "VALID", True, name="conv1")(x))
        x = max_pool(x, 3, 2, "SAME")
        x = _PReLU(name="prelu2")(Conv(48, 3, 1, "VALID", True, name="conv2")(x))
        x = max_pool(x, 3, 2)
        x = _PReLU(name="prelu3")(Conv(64, 2, 1, "VALID", True, name="conv3")(x))
        x = _PReLU(name="prelu4")(Dense(128, name="dense4")(_flatten(x)))
        return _face(Dense(2, name="scores")(x)), Dense(4, name="boxes")(x)


class ONet(nn.Module):
    """Output: standardised crops [n, 48, 48, 3] -> (face score [n], box corrections [n, 4], five points [n, 10]: x1..x5, y1..y5 in the box)."""

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array, Array]:
        x = _PReLU(name="prelu1")(Conv(32, 3, 1, "VALID", True, name="conv1")(x))
        x = max_pool(x, 3, 2, "SAME")
        x = _PReLU(name="prelu2")(_CachedConv(64, use_bias=True, name="conv2")(x))
        x = max_pool(x, 3, 2)
        x = _PReLU(name="prelu3")(Conv(64, 3, 1, "VALID", True, name="conv3")(x))
        x = max_pool(x, 2, 2, "SAME")
        x = _PReLU(name="prelu4")(Conv(128, 2, 1, "VALID", True, name="conv4")(x))
        x = _PReLU(name="prelu5")(Dense(256, name="dense5")(_flatten(x)))
        return _face(Dense(2, name="scores")(x)), Dense(4, name="boxes")(x), Dense(10, name="points")(x)


def _face(logits: Array) -> Array:
    """Probability of the second of two classes."""
    return jax.nn.softmax(logits, -1)[..., 1]


def _flatten(x: Array) -> Array:
    """[n, h, w, c] -> [n, w * h * c], x first."""
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], -1)


def variables_shapes() -> dict[str, dict]:
    """{"pnet": variables as shapes, "rnet": ..., "onet": ...}."""
    key = jax.random.key(0)
    inside = jnp.zeros((1, 16, 16), bool)
    return {
        "pnet": jax.eval_shape(PNet().init, key, jnp.zeros((1, 16, 16, 3)), inside)["params"],
        "rnet": jax.eval_shape(RNet().init, key, jnp.zeros((1, 24, 24, 3)))["params"],
        "onet": jax.eval_shape(ONet().init, key, jnp.zeros((1, 48, 48, 3)))["params"],
    }
