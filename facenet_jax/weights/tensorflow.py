"""Inception-ResNet-v1 between davidsandberg/facenet's TensorFlow 1 files and this project's variables.

Reads training checkpoints, frozen training graphs, and inference graphs whose BatchNorm was folded into the convolutions. Both
hold kernels as HWIO, so tensors change their names only; the names follow from the Flax tree by rule.
"""

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from facenet_jax import models
from facenet_jax.errors import BadInput
from facenet_jax.weights.checks import problem, refuse
from facenet_jax.weights.graph_def import read_graph
from facenet_jax.weights.tensor_bundle import read_checkpoint

_SCOPE = "InceptionResnetV1/"
_SHADOW = "/ExponentialMovingAverage"
_NORM = "/BatchNorm/"
_OFFSET = "/Conv2D_bn_offset"

# From a Flax path to the original name, applied in order.
_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^(params|batch_stats)/", _SCOPE),
        (r"^logits/", "Logits/"),
        (r"/(?=block35_)", "/Repeat/"),
        (r"/(?=block17_)", "/Repeat_1/"),
        (r"/(?=block8_)", "/Repeat_2/"),
        (r"(Branch_\d)_", r"\1/"),
        (r"/(mixed|conv)/", "/"),
        (r"[/_]norm/", _NORM),
        (r"(?<=BatchNorm/)bias$", "beta"),
        (r"(?<=BatchNorm/)mean$", "moving_mean"),
        (r"(?<=BatchNorm/)var$", "moving_variance"),
        (r"/bias$", "/biases"),
        (r"/kernel$", "/weights"),
    )
)


@dataclass(frozen=True)
class Imported:
    """What a TensorFlow file held.

    `variables`: {"params": ..., "batch_stats": ...} of float32 arrays for models.create("inception_resnet_v1",
    embedding_size=embedding_size). `logits`: the training people's classifier, {"kernel": [embedding_size, classes],
    "bias": [classes]}, or None. `unused`: sorted names of all the other tensors.
    """

    variables: dict[str, Any]
    embedding_size: int
    logits: dict[str, np.ndarray] | None
    unused: tuple[str, ...]


def _original_name(path: str) -> str:
    for pattern, replacement in _RULES:
        path = pattern.sub(replacement, path)
    return path


@functools.lru_cache(maxsize=4)
def _expected(embedding_size: int) -> dict[str, tuple[int, ...]]:
    """Flax path, joined by slashes -> shape."""
    model = models.create("inception_resnet_v1", embedding_size=embedding_size)
    tree = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 160, 160, 3)), train=False))
    return {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}


def _unfolded(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Adds, for each convolution with a folded BatchNorm, one that only adds the offset: it can still be fine-tuned."""
    epsilon = models.create("inception_resnet_v1").bn_epsilon
    added = {}
    for name, offset in tensors.items():
        if name.endswith(_OFFSET):
            scope = name.removesuffix(_OFFSET) + _NORM
            added[scope + "beta"] = offset
            added[scope + "moving_mean"] = np.broadcast_to(np.float32(0), offset.shape)
            added[scope + "moving_variance"] = np.broadcast_to(np.float32(1 - epsilon), offset.shape)
    return added | tensors


def from_tensorflow(arrays: dict[str, np.ndarray], use_moving_average: bool = False) -> Imported:
    """Converts tensors by their original names (read_checkpoint, read_graph) to this project's variables.

    `use_moving_average` takes the ExponentialMovingAverage of each weight that has one; otherwise, and for all optimiser slots,
    they are among the unused. A folded BatchNorm becomes bias = offset, mean 0, variance 1 - epsilon. Missing tensors, other
    shapes, integers, NaN or infinity are a `BadInput` that names up to three of them.
    """
    if not any(name.startswith(_SCOPE) for name in arrays):
        scopes = sorted({name.split("/")[0][:40] for name in arrays})
        raise BadInput(f"not an Inception-ResNet-v1: no tensor under {_SCOPE}; there are {', '.join(map(repr, scopes[:5])) or 'none'}")
    shadows = {name.removesuffix(_SHADOW): name for name in arrays if name.endswith(_SHADOW)}
    if use_moving_average and not shadows:
        raise BadInput(f"no moving averages (names ending in {_SHADOW}) are stored here: read the weights themselves")
    sources = {name: name for name in arrays} | (shadows if use_moving_average else {})
    tensors = _unfolded({name: np.asarray(arrays[source]) for name, source in sources.items()})

    bottleneck = tensors.get(f"{_SCOPE}Bottleneck/weights")
    embedding_size = bottleneck.shape[-1] if bottleneck is not None and bottleneck.ndim == 2 and bottleneck.size else 128
    expected = dict(_expected(embedding_size))
    classifier = [tensors[name] for name in ("Logits/weights", "Logits/biases") if name in tensors]
    if classifier:
        classes = classifier[0].shape[-1:]
        expected |= {"logits/kernel": (embedding_size, *classes), "logits/bias": classes}

    names = {path: _original_name(path) for path in expected}
    found = {path: tensors.get(names[path]) for path in expected}
    # A gamma ignored would be a wrong network without a word.
    scales = sorted(name for name in tensors if name.startswith(_SCOPE) and name.endswith(f"{_NORM}gamma"))
    problems = [f"{name} {list(tensors[name].shape)} is there, expected none" for name in scales]
    tensors_wrong = (problem(names[path], found[path], shape) for path, shape in expected.items())
    refuse("not an Inception-ResNet-v1 of the expected kind", [*problems, *tensors_wrong])
    tree = unflatten_dict({path: np.ascontiguousarray(array, np.float32) for path, array in found.items()}, sep="/")
    logits = tree.pop("logits", None)
    used = {sources.get(name, name.split(_NORM)[0] + _OFFSET) for name in names.values()}
    return Imported(tree, embedding_size, logits, tuple(sorted(set(arrays) - used)))


def to_tensorflow(variables: dict[str, Any], logits: dict[str, Any] | None = None) -> dict[str, np.ndarray]:
    """The inverse of `from_tensorflow`: original names -> float32 arrays; `logits` as in `Imported`.

    Variables of another network, or with BatchNorm scales, are a `BadInput`.
    """
    flat = flatten_dict({**variables, "logits": logits} if logits else dict(variables), sep="/")
    arrays = {_original_name(path): np.asarray(leaf, np.float32) for path, leaf in flat.items()}
    if unused := from_tensorflow(arrays).unused:
        raise BadInput(f"{unused[0]} has no place in an Inception-ResNet-v1 of the original code")
    return arrays


def read_tensorflow(path: Path | str, use_moving_average: bool = False) -> Imported:
    """Reads a frozen graph (`.pb`) or else a checkpoint (prefix, file or directory); see `from_tensorflow` for the errors."""
    path = Path(path)
    arrays = read_graph(path) if path.suffix == ".pb" else read_checkpoint(path)
    try:
        return from_tensorflow(arrays, use_moving_average)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
