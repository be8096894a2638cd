"""A residual network small enough to train on two CPU cores in an evening; our own.

Strides come early and widths grow late, because CPU convolutions run near the machine's peak only on small maps with many
channels; no max pooling, whose backward pass is slow there. The map before the embedding is flattened, not averaged:
aligned faces keep their eyes and mouths in fixed places.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from facenet_jax.layers import BatchNorm, Conv, Dense, add_relu


class _Block(nn.Module):
    features: int
    stride: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        norm = lambda name: BatchNorm(groups=self.groups, dtype=self.dtype, name=name)
        y = Conv(self.features, 3, self.stride, dtype=self.dtype, name="conv1")(x)
        y = norm("norm1")(y, train, relu=True)
        y = Conv(self.features, 3, dtype=self.dtype, name="conv2")(y)
        y = norm("norm2")(y, train)
        if x.shape != y.shape:
            x = Conv(self.features, 1, dtype=self.dtype, name="shortcut")(x[:, :: self.stride, :: self.stride])
            x = norm("shortcut_norm")(x, train)
        return add_relu(x, y)


class SmallResnet(nn.Module):
    """[n, s, s, 3] standardised images -> [n, embedding_size] prelogits; s a multiple of 16."""

    embedding_size: int = 128
    dropout: float = 0.0
    bn_groups: int = 1
    dtype: Any = jnp.float32
    stem: int = 24
    widths: tuple[int, ...] = (64, 128, 256)
    depths: tuple[int, ...] = (1, 2, 2)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        x = images
        for step, features in enumerate((self.stem, self.widths[0])):
            x = Conv(features, 3, 2, dtype=self.dtype, name=f"stem{step + 1}")(x)
            x = BatchNorm(groups=self.bn_groups, dtype=self.dtype, name=f"stem{step + 1}_norm")(x, train, relu=True)
        for stage, (features, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            for block in range(depth):
                stride = 2 if block == 0 and stage > 0 else 1
                x = _Block(features, stride, self.bn_groups, self.dtype, name=f"stage{stage + 1}_block{block + 1}")(x, train)
        x = x.reshape(x.shape[0], -1)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = Dense(self.embedding_size, use_bias=False, dtype=self.dtype, name="embedding")(x)
        return BatchNorm(groups=self.bn_groups, dtype=self.dtype, name="embedding_norm")(x, train)
