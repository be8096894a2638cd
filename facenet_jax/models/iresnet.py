"""InsightFace's iResNet, as its arcface_torch defines it (recognition/arcface_torch/backbones/iresnet.py), names included.

A block normalises before its first convolution and has no activation after the sum; activations are PReLU. The last map is flattened, channels
first, because the published dense layers are trained on that order.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from facenet_jax.layers import BatchNorm, Conv, Dense

_PAD1 = ((1, 1), (1, 1))
_WIDTHS = (64, 128, 256, 512)
# Blocks of each stage.
DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3)}


class _PReLU(nn.Module):
    """max(x, 0) + slope * min(x, 0), one slope a channel."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        slope = self.param("slope", nn.initializers.constant(0.25), (x.shape[-1],), jnp.float32)
        return jnp.where(x > 0, x, x * slope.astype(self.dtype))


class _Block(nn.Module):
    """BatchNorm, 3x3, BatchNorm, PReLU, 3x3 with the stride, BatchNorm, added to the input or to its 1x1 projection."""

    features: int
    stride: int
    bn_groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        norm = lambda y, name: BatchNorm(groups=self.bn_groups, dtype=self.dtype, name=name)(y, train)
        y = Conv(self.features, 3, 1, _PAD1, dtype=self.dtype, name="conv1")(norm(x, "bn1"))
        y = _PReLU(self.dtype, name="prelu")(norm(y, "bn2"))
        y = Conv(self.features, 3, self.stride, _PAD1, dtype=self.dtype, name="conv2")(y)
        y = norm(y, "bn3")
        if self.stride > 1:
            x = x[:, :: self.stride, :: self.stride]
            x = norm(Conv(self.features, 1, dtype=self.dtype, name="downsample_0")(x), "downsample_1")
        return x + y


class IResnet50(nn.Module):
    """[n, s, s, 3] standardised images -> [n, embedding_size], not normalised; s >= 16, and weights fit one s / 16 only.

    43,590,336 trainable values at 112 pixels and 512-d. The last BatchNorm shifts and does not scale: InsightFace holds its weight at 1.
    """

    embedding_size: int = 512
    dropout: float = 0.0
    bn_groups: int = 1
    dtype: Any = jnp.float32
    depths: tuple[int, ...] = DEPTHS[50]

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        x = Conv(_WIDTHS[0], 3, 1, _PAD1, dtype=self.dtype, name="conv1")(images)
        x = BatchNorm(groups=self.bn_groups, dtype=self.dtype, name="bn1")(x, train)
        x = _PReLU(self.dtype, name="prelu")(x)
        for stage, (features, blocks) in enumerate(zip(_WIDTHS, self.depths, strict=True), 1):
            for index in range(blocks):
                block = _Block(features, 2 if index == 0 else 1, self.bn_groups, self.dtype, name=f"layer{stage}_{index}")
                x = block(x, train)
        x = BatchNorm(groups=self.bn_groups, dtype=self.dtype, name="bn2")(x, train)
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = Dense(self.embedding_size, dtype=self.dtype, name="fc")(x)
        return BatchNorm(use_scale=False, groups=self.bn_groups, dtype=self.dtype, name="features")(x, train)


class IResnet18(IResnet50):
    """The same with blocks (2, 2, 2, 2)."""

    depths: tuple[int, ...] = DEPTHS[18]


class IResnet34(IResnet50):
    """The same with blocks (3, 4, 6, 3)."""

    depths: tuple[int, ...] = DEPTHS[34]


class IResnet100(IResnet50):
    """The same with blocks (3, 13, 30, 3)."""

    depths: tuple[int, ...] = DEPTHS[100]
