"""The table of networks. `create(name, **arguments)` gives a Flax module: (images [n, s, s, 3], train) -> prelogits [n, d]."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from facenet_jax.errors import BadInput
from facenet_jax.models.dlib_resnet import DlibResnet
from facenet_jax.models.inception_resnet_v1 import InceptionResnetV1
from facenet_jax.models.iresnet import IResnet18, IResnet34, IResnet50, IResnet100
from facenet_jax.models.nn4_small2 import Nn4Small2
from facenet_jax.models.resnet50 import Resnet50
from facenet_jax.models.small_resnet import SmallResnet


@dataclass(frozen=True)
class Network:
    """A network and what it expects when nobody says otherwise: input side in pixels, standardisation."""

    module: type[nn.Module]
    size: int
    minimum: int
    multiple: int
    standardisation: str


NETWORKS: dict[str, Network] = {
    "dlib_resnet": Network(DlibResnet, 150, 103, 1, "dlib"),
    "inception_resnet_v1": Network(InceptionResnetV1, 160, 75, 1, "fixed"),
    "nn4_small2": Network(Nn4Small2, 96, 96, 32, "unit"),
    "small_resnet": Network(SmallResnet, 64, 32, 16, "fixed"),
    "resnet50": Network(Resnet50, 224, 32, 1, "imagenet"),
    "iresnet18": Network(IResnet18, 112, 16, 1, "symmetric"),
    "iresnet34": Network(IResnet34, 112, 16, 1, "symmetric"),
    "iresnet50": Network(IResnet50, 112, 16, 1, "symmetric"),
    "iresnet100": Network(IResnet100, 112, 16, 1, "symmetric"),
}


def network(name: str) -> Network:
    """The table's entry; an unknown name is an error that lists the known ones."""
    if name not in NETWORKS:
        raise BadInput(f"no network named {name!r}; there are {', '.join(NETWORKS)}")
    return NETWORKS[name]


def create(name: str, **arguments: Any) -> nn.Module:
    """Builds a network. `dtype` may be "float32" or "bfloat16"; unknown arguments are errors that list the known ones."""
    module = network(name).module
    known = [field for field in module.__dataclass_fields__ if field not in ("parent", "name")]
    if unknown := sorted(set(arguments) - set(known)):
        raise BadInput(f"{name} has no argument {unknown[0]!r}; it has {', '.join(known)}")
    if isinstance(dtype := arguments.get("dtype"), str):
        if dtype not in ("float32", "bfloat16"):
            raise BadInput(f"model dtype must be float32 or bfloat16, not {dtype!r}")
        arguments["dtype"] = jnp.dtype(dtype)
    return module(**{key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()})


def check_size(name: str, size: int) -> None:
    """Raises where the network cannot take size x size images."""
    entry = network(name)
    if size < entry.minimum or size % entry.multiple:
        rule = f"a multiple of {entry.multiple}, " if entry.multiple > 1 else ""
        raise BadInput(f"{name} takes square images whose side is {rule}at least {entry.minimum} pixels, not {size}")


def initialise(model: nn.Module, key: jax.Array, size: int) -> dict[str, Any]:
    """Fresh variables {"params": ..., "batch_stats": ...} for size x size images."""
    return jax.jit(lambda k: model.init(k, jnp.zeros((1, size, size, 3)), train=False))(key)


def parameter_count(variables: dict[str, Any]) -> int:
    """Number of trainable values."""
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
