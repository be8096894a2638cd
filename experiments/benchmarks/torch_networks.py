"""Our networks in PyTorch with the same weights, for timing: facenet-pytorch's InceptionResnetV1, and small_resnet written out."""

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flax.traverse_util import flatten_dict
from torch import nn

from facenet_jax import models
from facenet_jax.errors import BadInput
from facenet_jax.weights.torch import to_torch

NETWORKS = ("inception_resnet_v1", "small_resnet")


class _Block(nn.Module):
    def __init__(self, channels: int, features: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, features, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(features)
        self.stride = stride
        if stride != 1 or channels != features:
            self.shortcut = nn.Conv2d(channels, features, 1, bias=False)
            self.shortcut_norm = nn.BatchNorm2d(features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(self.conv1(x)).relu()
        y = self.norm2(self.conv2(y))
        if hasattr(self, "shortcut"):
            last = self.stride - 1
            x = self.shortcut_norm(self.shortcut(x[:, :, last :: self.stride, last :: self.stride]))
        return (x + y).relu()


class SmallResnet(nn.Module):
    """models/small_resnet.py turned by 180 degrees: [n, 3, s, s] turned images -> [n, embedding_size] unit rows.

    "SAME" with stride 2 pads below and to the right, PyTorch's `padding=1` on all sides. Turned by 180 degrees, images and kernels alike,
    the two are one computation, and neither side pays for a pad of its own.
    """

    def __init__(self, stem: int, widths: tuple[int, ...], depths: tuple[int, ...], embedding_size: int, size: int):
        super().__init__()
        self.stem1, self.stem1_norm = nn.Conv2d(3, stem, 3, 2, 1, bias=False), nn.BatchNorm2d(stem)
        self.stem2, self.stem2_norm = nn.Conv2d(stem, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0])
        channels, blocks = widths[0], []
        for stage, (features, depth) in enumerate(zip(widths, depths, strict=True)):
            for block in range(depth):
                name = f"stage{stage + 1}_block{block + 1}"
                setattr(self, name, _Block(channels, features, 2 if block == 0 and stage > 0 else 1))
                blocks.append(name)
                channels = features
        self.blocks = blocks
        side = size >> (1 + len(widths))
        self.embedding = nn.Linear(side * side * channels, embedding_size, bias=False)
        self.embedding_norm = nn.BatchNorm1d(embedding_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem1_norm(self.stem1(x)).relu()
        x = self.stem2_norm(self.stem2(x)).relu()
        for name in self.blocks:
            x = getattr(self, name)(x)
        x = self.embedding_norm(self.embedding(x.permute(0, 2, 3, 1).flatten(1)))
        return nn.functional.normalize(x, dim=1)


def _small_resnet(model: Any, variables: dict[str, Any], size: int) -> nn.Module:
    module = SmallResnet(model.stem, model.widths, model.depths, model.embedding_size, size)
    names = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    state = {}
    for path, leaf in flatten_dict(variables).items():
        array = np.asarray(leaf)
        if array.ndim == 4:
            array = array[::-1, ::-1].transpose(3, 2, 0, 1)
        elif array.ndim == 2:
            side = size >> (1 + len(model.widths))
            array = array.reshape(side, side, -1, array.shape[-1])[::-1, ::-1].reshape(array.shape).T
        state[".".join((*path[1:-1], names[path[-1]]))] = torch.tensor(np.ascontiguousarray(array))
    counters = {name: value for name, value in module.state_dict().items() if name.endswith("num_batches_tracked")}
    module.load_state_dict(state | counters)
    return module


def _inception_resnet_v1(variables: dict[str, Any], size: int) -> nn.Module:
    # The package imports torchvision for its detector; the network's own file does not.
    spec = importlib.util.find_spec("facenet_pytorch")
    if spec is None or spec.origin is None or importlib.util.find_spec("requests") is None:
        raise BadInput("the peer is facenet-pytorch: pip install --no-deps facenet-pytorch requests")
    package = types.ModuleType("facenet_pytorch_models")
    package.__path__ = [str(Path(spec.origin).parent / "models")]
    sys.modules.setdefault(package.__name__, package)
    module = importlib.import_module(f"{package.__name__}.inception_resnet_v1").InceptionResnetV1(dropout_prob=0.0)
    state = {name: torch.tensor(array) for name, array in to_torch(variables, "inception_resnet_v1").items()}
    if len(state["last_linear.weight"]) != 512:
        raise BadInput(f"facenet-pytorch's embeddings have 512 numbers, these weights' {len(state['last_linear.weight'])}")
    module.load_state_dict(state)
    return module


def build(network: str, arguments: dict[str, Any], variables: dict[str, Any], size: int) -> nn.Module:
    """The network with these weights, channels last: `as_images` -> [n, d] unit rows. BadInput where no PyTorch form is known."""
    if network not in NETWORKS:
        raise BadInput(f"no PyTorch form of {network} is known; there are {', '.join(NETWORKS)}")
    if network == "small_resnet":
        module: Any = _small_resnet(models.create(network, **arguments), variables, size)
    else:
        module = _inception_resnet_v1(variables, size)
    return module.to(memory_format=torch.channels_last)


def as_images(network: str, images: np.ndarray) -> torch.Tensor:
    """uint8 [n, s, s, 3] as the network's input [n, 3, s, s] uint8, channels last in memory (no copy on use)."""
    images = images[:, ::-1, ::-1] if network == "small_resnet" else images
    return torch.tensor(np.ascontiguousarray(images)).permute(0, 3, 1, 2)


def standardise(images: torch.Tensor) -> torch.Tensor:
    """The fixed standardisation, as preprocessing.py has it."""
    return (images.float() - 127.5) / 128.0
