"""dlib's face recognition network (examples/dnn_face_recognition_ex.cpp, `anet_type`): 29 convolutions, 150x150 -> 128.

A ResNet-34 with half the widths whose BatchNorms were frozen into scales and biases. Nothing pads but the 3x3 convolutions of
stride 1; where the two ways of a block differ in size or width, the smaller is filled with zeros at the right, the bottom and the end.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from facenet_jax.layers import Conv, Dense, max_pool

# (width, whether the block halves the map), from the input on.
BLOCKS = (
    *((32, False),) * 3,
    *((64, True), *((64, False),) * 3),
    *((128, True), *((128, False),) * 2),
    *((256, True), *((256, False),) * 2),
    (256, True),
)


class _ConvAffine(nn.Module):
    """Convolution with bias, then a scale and a bias a channel."""

    features: int
    kernel: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        side = self.kernel // 2 if self.stride == 1 else 0
        x = Conv(self.features, self.kernel, self.stride, ((side, side), (side, side)), True, self.dtype, name="conv")(x)
        scale = self.param("scale", nn.initializers.ones, (self.features,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return x * scale.astype(self.dtype) + bias.astype(self.dtype)


def _add(a: jax.Array, b: jax.Array) -> jax.Array:
    """Sum of [n, h, w, c] arrays of any sizes, each filled with zeros at its ends."""
    shape = [max(pair) for pair in zip(a.shape, b.shape)]
    fill = lambda x: jnp.pad(x, [(0, want - have) for want, have in zip(shape, x.shape)])
    return fill(a) + fill(b)


class DlibResnet(nn.Module):
    """[n, s, s, 3] images standardised by "dlib" -> [n, embedding_size], not normalised; s >= 103. 5,614,592 trainable values.

    It has no BatchNorm, so `bn_groups`, which every network takes, changes nothing.
    """

    embedding_size: int = 128
    dropout: float = 0.0
    bn_groups: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        unit = lambda features, kernel, stride, name: _ConvAffine(features, kernel, stride, self.dtype, name=name)
        x = nn.relu(unit(32, 7, 2, "stem")(images))
        x = max_pool(x, 3, 2)
        for index, (features, down) in enumerate(BLOCKS, 1):
            y = nn.relu(unit(features, 3, 2 if down else 1, f"block{index}_1")(x))
            y = unit(features, 3, 1, f"block{index}_2")(y)
            x = nn.relu(_add(nn.avg_pool(x, (2, 2), (2, 2)) if down else x, y))
        x = nn.Dropout(self.dropout, deterministic=not train)(x.mean((1, 2)))
        return Dense(self.embedding_size, use_bias=False, dtype=self.dtype, name="dense")(x)
