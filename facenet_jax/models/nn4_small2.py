"""OpenFace's nn4.small2: the paper's NN4 thinned, 96x96 -> 128.

`pooling="released"` is the trained network: the pool branches stride, unpadded (maxima by 2, L2 by 3), and their outputs are zero-padded
back to the size of the others, as models/openface/nn4.small2.def.lua has it, where LPPooling strides by its window (OpenFace #349, #351).
`pooling="definition"` is the paper's table instead: pools stride as their block does, and keep its size.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from facenet_jax.errors import BadInput
from facenet_jax.layers import BatchNorm, Conv, Dense, l2_pool, local_response_norm, max_pool

_PAD = {1: ((0, 0), (0, 0)), 3: ((1, 1), (1, 1)), 5: ((2, 2), (2, 2)), 7: ((3, 3), (3, 3))}


class _ConvNorm(nn.Module):
    features: int
    kernel: int
    stride: int
    bn_groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = Conv(self.features, self.kernel, self.stride, _PAD[self.kernel], True, self.dtype, name="conv")(x)
        return BatchNorm(groups=self.bn_groups, dtype=self.dtype, name="norm")(x, train, relu=True)


def _pad_to(x: jax.Array, size: int) -> jax.Array:
    """Centres x in a size x size map of zeros, the odd pixel at the right and bottom."""
    missing = size - x.shape[1]
    low = missing // 2
    return jnp.pad(x, ((0, 0), (low, missing - low), (low, missing - low), (0, 0)))


class _Inception(nn.Module):
    """1x1, 3x3 and 5x5 branches and a pool branch; a width of 0 leaves the branch or projection out.

    `pool` is (kind, stride of the released network, projected width).
    """

    one: int
    three: tuple[int, int]
    five: tuple[int, int]
    pool: tuple[str, int, int]
    stride: int
    released: bool
    bn_groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        def unit(y: jax.Array, name: str, features: int, kernel: int = 1, stride: int = 1) -> jax.Array:
            return _ConvNorm(features, kernel, stride, self.bn_groups, self.dtype, name=name)(y, train)

        size = -(-x.shape[1] // self.stride)
        outputs = []
        for kernel, (reduced, features) in ((3, self.three), (5, self.five)):
            if features:
                y = unit(x, f"reduce{kernel}x{kernel}", reduced)
                outputs.append(unit(y, f"conv{kernel}x{kernel}", features, kernel, self.stride))
        kind, released_stride, projected = self.pool
        pool = max_pool if kind == "max" else l2_pool
        y = pool(x, 3, released_stride) if self.released else pool(x, 3, self.stride, _PAD[3])
        if projected:
            y = unit(y, "pool_proj", projected)
        outputs.append(_pad_to(y, size))
        if self.one:
            outputs.append(unit(x, "conv1x1", self.one))
        return jnp.concatenate(outputs, -1)


# name, 1x1, 3x3, 5x5, pool branch, stride
_STAGES = (
    ("3a", 64, (96, 128), (16, 32), ("max", 2, 32), 1),
    ("3b", 64, (96, 128), (32, 64), ("l2", 3, 64), 1),
    ("3c", 0, (128, 256), (32, 64), ("max", 2, 0), 2),
    ("4a", 256, (96, 192), (32, 64), ("l2", 3, 128), 1),
    ("4e", 0, (160, 256), (64, 128), ("max", 2, 0), 2),
    ("5a", 256, (96, 384), (0, 0), ("l2", 3, 96), 1),
    ("5b", 256, (96, 384), (0, 0), ("max", 2, 96), 1),
)


class Nn4Small2(nn.Module):
    """[n, s, s, 3] images in 0..1 -> [n, embedding_size], not normalised; s a multiple of 32, at least 96. 3,733,968 trainable values."""

    embedding_size: int = 128
    dropout: float = 0.0
    bn_groups: int = 1
    pooling: str = "released"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        def unit(y: jax.Array, name: str, features: int, kernel: int, stride: int = 1) -> jax.Array:
            return _ConvNorm(features, kernel, stride, self.bn_groups, self.dtype, name=name)(y, train)

        if self.pooling not in ("released", "definition"):
            raise BadInput(f"nn4_small2: no pooling named {self.pooling!r}; there are released, definition")
        released = self.pooling == "released"
        x = unit(images, "conv1", 64, 7, 2)
        x = local_response_norm(max_pool(x, 3, 2, _PAD[3]))
        x = unit(x, "conv2", 64, 1)
        x = local_response_norm(unit(x, "conv3", 192, 3))
        x = max_pool(x, 3, 2, _PAD[3])
        for name, one, three, five, pool, stride in _STAGES:
            block = _Inception(one, three, five, pool, stride, released, self.bn_groups, self.dtype, name=f"inception_{name}")
            x = block(x, train)
        x = nn.avg_pool(x, x.shape[1:3]).reshape(x.shape[0], -1)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return Dense(self.embedding_size, dtype=self.dtype, name="dense")(x)
