"""ResNet-50 (He et al. 2015) as an embedding network, in torchvision's variant, "v1.5": the 3x3 convolution of a block strides, not the first 1x1.

Module names are torchvision's, with an underscore before a block's number. Pads are PyTorch's: the same on both sides whatever the size.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from facenet_jax.layers import BatchNorm, Conv, Dense, add_relu, max_pool

_PAD1 = ((1, 1), (1, 1))
_PAD3 = ((3, 3), (3, 3))
_EXPANSION = 4
# Width and blocks of each stage.
_STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
_FEATURES = 2048


class _Bottleneck(nn.Module):
    """1x1 to `width`, 3x3, 1x1 to 4 x width, added to the input, or to its 1x1 projection where `project`; ReLU."""

    width: int
    stride: int
    project: bool
    bn_groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        norm = lambda y, name, relu=False: BatchNorm(groups=self.bn_groups, dtype=self.dtype, name=name)(y, train, relu=relu)
        y = Conv(self.width, 1, dtype=self.dtype, name="conv1")(x)
        y = norm(y, "bn1", relu=True)
        y = Conv(self.width, 3, self.stride, _PAD1, dtype=self.dtype, name="conv2")(y)
        y = norm(y, "bn2", relu=True)
        y = Conv(self.width * _EXPANSION, 1, dtype=self.dtype, name="conv3")(y)
        y = norm(y, "bn3")
        if self.project:
            x = x[:, :: self.stride, :: self.stride]
            x = norm(Conv(self.width * _EXPANSION, 1, dtype=self.dtype, name="downsample_0")(x), "downsample_1")
        return add_relu(x, y)


class Resnet50(nn.Module):
    """[n, s, s, 3] standardised images -> [n, embedding_size], not normalised; s >= 32.

    At 2048 the embedding is the pooled features themselves (23,508,032 trainable values); any other size adds a dense layer.
    """

    embedding_size: int = _FEATURES
    dropout: float = 0.0
    bn_groups: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        x = Conv(64, 7, 2, _PAD3, dtype=self.dtype, name="conv1")(images)
        x = BatchNorm(groups=self.bn_groups, dtype=self.dtype, name="bn1")(x, train, relu=True)
        x = max_pool(x, 3, 2, _PAD1)
        for stage, (width, blocks) in enumerate(_STAGES, 1):
            for index in range(blocks):
                stride = 2 if stage > 1 and index == 0 else 1
                block = _Bottleneck(width, stride, index == 0, self.bn_groups, self.dtype, name=f"layer{stage}_{index}")
                x = block(x, train)
        x = x.mean((1, 2))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return x if self.embedding_size == _FEATURES else Dense(self.embedding_size, dtype=self.dtype, name="embedding")(x)
