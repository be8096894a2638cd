"""PyTorch state dicts in and out: facenet-pytorch's InceptionResnetV1, torchvision's ResNet-50, InsightFace's iResNet.

Names follow from the Flax tree by rule. PyTorch holds the kernels of convolutions as OIHW, those of dense layers as [out, in].
"""

import functools
import io
import math
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from facenet_jax import models
from facenet_jax.errors import BadInput
from facenet_jax.models.iresnet import DEPTHS
from facenet_jax.weights.checks import problem, refuse

_IRESNETS = {depths: f"iresnet{number}" for number, depths in DEPTHS.items()}
NETWORKS = ("inception_resnet_v1", "resnet50", *_IRESNETS.values())

# Older ones can be made to run code by a file, weights_only or not (CVE-2025-32434).
_OLDEST_TORCH = "2.6"

# How the state dict of a network is told from others, and where its embedding size is read.
_SIGNATURES = {"repeat_1.0.conv2d.weight": "inception_resnet_v1", "layer1.0.conv3.weight": "resnet50", "layer1.0.prelu.weight": "iresnet"}
_EMBEDDINGS = {"inception_resnet_v1": "last_linear.weight", "resnet50": "embedding.weight"}

_REPEATS = {"35": "repeat_1", "17": "repeat_2", "8": "repeat_3"}
_UNIT = re.compile(r"(.*Branch_\d)_(Conv2d_\w+)")
_BLOCK = re.compile(r"layer([1-4])\.(\d{1,3})\.")
# From a Flax path without its collection to the name in PyTorch, applied in order, after the convolutions of branches are numbered.
_RULES: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^block(35|17|8)_(\d{1,3})(?=/)", lambda match: f"{_REPEATS[match[1]]}/{int(match[2]) - 1}"),
        (r"^Conv2d_(\d[ab])_\dx\d", r"conv2d_\1"),
        (r"^Block8", "block8"),
        (r"^Mixed_", "mixed_"),
        (r"^Bottleneck_norm", "last_bn"),
        (r"^Bottleneck", "last_linear"),
        (r"/mixed/", "/"),
        (r"/Branch_", "/branch"),
        (r"/Conv2d_1x1/", "/conv2d/"),
        (r"/norm/", "/bn/"),
        (r"(?<=layer\d)_|(?<=downsample)_", "/"),
        (r"/(kernel|scale|slope)$", "/weight"),
        (r"/(mean|var)$", r"/running_\1"),
        (r"/", "."),
    )
)
# Axes of a Flax kernel in PyTorch's order, by their number.
_AXES = {4: (3, 2, 0, 1), 2: (1, 0)}


@dataclass(frozen=True)
class Imported:
    """What a state dict held.

    `variables`: {"params": ..., "batch_stats": ...} of float32 arrays for models.create(network, **arguments). `size`: side of the
    images in pixels: the network's usual one, unless a dense layer over the last map says otherwise. `logits`: the classifier of
    facenet-pytorch, {"kernel": [embedding_size, classes], "bias": [classes]}, or None. `unused`: sorted names of what was left out.
    """

    variables: dict[str, Any]
    network: str
    arguments: dict[str, Any]
    size: int
    embedding_size: int
    logits: dict[str, np.ndarray] | None
    unused: tuple[str, ...]


def _torch_names(paths: Iterable[str]) -> dict[str, str]:
    """Flax path -> name in PyTorch. A branch of several convolutions is a numbered sequence there, one of a single convolution is not."""
    bare = {path: path.split("/", 1)[1] for path in paths}
    branches: dict[str, set[str]] = {}
    for match in filter(None, map(_UNIT.match, bare.values())):
        branches.setdefault(match[1], set()).add(match[2])

    def number(match: re.Match[str]) -> str:
        units = sorted(branches[match[1]])
        return match[1] if len(units) == 1 else f"{match[1]}/{units.index(match[2])}"

    def name(path: str) -> str:
        path = _UNIT.sub(number, path)
        for pattern, replacement in _RULES:
            path = pattern.sub(replacement, path)
        return path

    return {path: name(rest) for path, rest in bare.items()}


def _renamed(flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Flax path -> leaf becomes name in PyTorch -> float32 array in its layout; a BatchNorm without scale gets a weight of ones."""
    names = _torch_names(flat)
    leaves = {path: np.asarray(leaf) for path, leaf in flat.items()}
    arrays = {
        names[path]: np.ascontiguousarray(leaf.transpose(_AXES.get(leaf.ndim, range(leaf.ndim))), np.float32)
        for path, leaf in leaves.items()
    }
    weights = {_weight_beside(name): np.ones_like(arrays[name]) for name in names.values() if name.endswith(".running_var")}
    return weights | arrays


def _weight_beside(running_var: str) -> str:
    return running_var.removesuffix("running_var") + "weight"


@functools.lru_cache(maxsize=8)
def _expected(network: str, arguments: tuple[tuple[str, Any], ...], size: int) -> dict[str, tuple[int, ...]]:
    """Flax path, joined by slashes -> shape."""
    model = models.create(network, **dict(arguments))
    tree = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, size, size, 3)), train=False))
    return {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}


def _guess(names: Iterable[str]) -> str:
    """The network with these tensors, known by its signature and, for iResNets, by the number of blocks in each stage."""
    names = set(names)
    network = next((network for signature, network in _SIGNATURES.items() if signature in names), None)
    if network is None:
        some = ", ".join(repr(name[:60]) for name in sorted(names)[:5])
        raise BadInput(f"these are the names of no known network: {some or 'none'}; known by one of theirs are {', '.join(_SIGNATURES)}")
    if network != "iresnet":
        return network
    blocks = [match.groups() for match in map(_BLOCK.match, names) if match]
    depths = tuple(1 + max((int(index) for stage, index in blocks if stage == wanted), default=-1) for wanted in "1234")
    if depths not in _IRESNETS:
        known = "; ".join(f"{name}: {', '.join(map(str, known))}" for known, name in _IRESNETS.items())
        raise BadInput(f"an iResNet of {', '.join(map(str, depths))} blocks in its stages is not known ({known})")
    return _IRESNETS[depths]


def _measures(tensors: Mapping[str, np.ndarray], network: str) -> tuple[dict[str, Any], int]:
    """Arguments for models.create and image size, from the shape of the last dense layer; the usual ones where it is no matrix."""
    size = models.network(network).size
    dense = tensors.get(_EMBEDDINGS.get(network, "fc.weight"))
    outputs, inputs = dense.shape if dense is not None and dense.ndim == 2 and dense.size else (0, 0)
    if network == "inception_resnet_v1":
        return {"embedding_size": outputs or 512, "bn_scale": True}, size
    # An iResNet flattens a map of side x side x 512, and each of its four stages halves the image.
    side = math.isqrt(inputs // 512)
    if network != "resnet50" and side and inputs == 512 * side**2:
        size = 16 * side
    return {"embedding_size": outputs or models.create(network).embedding_size}, size


def _bare(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without the prefixes of wrappers (DataParallel, torch.compile) and without the counters of BatchNorm, which no embedding needs."""
    tensors: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        bare = re.sub(r"^((module|_orig_mod)\.)+", "", name)
        if bare in tensors:
            raise BadInput(f"{bare[:200]!r} is there twice, with and without a prefix")
        if not bare.endswith("num_batches_tracked"):
            tensors[bare] = np.asarray(array)
    return tensors


def from_torch(arrays: Mapping[str, np.ndarray], network: str | None = None) -> Imported:
    """Converts a state dict (read_state_dict) to this project's variables.

    `network` is one of NETWORKS, by default the one whose names these are; embedding size, image size and an iResNet's depth follow from
    the tensors. facenet-pytorch's `logits` are optional; the classifier of a ResNet-50, `fc`, is left out and among the unused. Names of
    ours ("params/..." and "batch_stats/...", kernels as Flax has them) are taken too. A missing or unexpected tensor, another shape,
    integers, NaN or infinity are a `BadInput` that names up to three of them.
    """
    tensors = _bare(arrays)
    if tensors and all(re.match("(params|batch_stats)/.", name) for name in tensors):
        tensors = _renamed(tensors)
    network = network or _guess(tensors)
    if network not in NETWORKS:
        raise BadInput(f"no PyTorch names are known for {network!r}; they are for {', '.join(NETWORKS)}")
    arguments, size = _measures(tensors, network)

    expected = dict(_expected(network, tuple(arguments.items()), size))
    if network == "inception_resnet_v1" and (classifier := [tensors[n] for n in ("logits.weight", "logits.bias") if n in tensors]):
        classes = classifier[0].shape[:1]
        expected |= {"params/logits/kernel": (arguments["embedding_size"], *classes), "params/logits/bias": classes}
    names = _torch_names(expected)
    laid = {path: tuple(shape[axis] for axis in _AXES.get(len(shape), range(len(shape)))) for path, shape in expected.items()}
    problems = [problem(name, tensors.get(name), laid[path]) for path, name in names.items()]

    # Where the network has no scale, the weight that PyTorch stores nevertheless must be 1.
    ones = {_weight_beside(name): expected[path] for path, name in names.items() if name.endswith(".running_var")}
    ones = {name: shape for name, shape in ones.items() if name not in names.values()}
    for name, shape in ones.items():
        wrong = problem(name, tensors.get(name), shape)
        if wrong or (tensors[name] == 1).all():
            problems.append(wrong)
        else:
            problems.append(f"{name} {list(shape)} holds other values than 1, which {network} keeps it at")

    left = sorted(set(tensors) - set(names.values()) - set(ones))
    unused = tuple(name for name in left if network == "resnet50" and name in ("fc.weight", "fc.bias"))
    problems += [f"{name[:200]!r} {list(tensors[name].shape)} is there, expected none" for name in left if name not in unused]
    refuse(f"not a whole {network}", problems)

    def leaf(path: str) -> np.ndarray:
        array = tensors[names[path]]
        axes = np.argsort(_AXES.get(array.ndim, range(array.ndim)))
        return np.ascontiguousarray(array.transpose(axes), np.float32)

    tree = unflatten_dict({path: leaf(path) for path in expected}, sep="/")
    logits = tree["params"].pop("logits", None)
    return Imported(tree, network, arguments, size, arguments["embedding_size"], logits, unused)


def to_torch(variables: dict[str, Any], network: str, logits: dict[str, Any] | None = None) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`: names in PyTorch -> float32 arrays, and the int64 counters of BatchNorm; `logits` as in `Imported`.

    A BatchNorm without scale, as the original code trains Inception-ResNet-v1, gets a weight of ones. The result loads with strict=True,
    into a ResNet-50 whose `fc` is an Identity. Variables of another network are a `BadInput`.
    """
    flat = flatten_dict(variables, sep="/") | {f"params/logits/{name}": leaf for name, leaf in (logits or {}).items()}
    arrays = _renamed(flat)
    from_torch(arrays, network)
    counters = {
        name.removesuffix("running_var") + "num_batches_tracked": np.zeros((), np.int64) for name in arrays if "running_var" in name
    }
    return arrays | counters


def encode_state_dict(arrays: dict[str, np.ndarray], suffix: str) -> bytes:
    """The file that `read_state_dict` reads: what torch.save writes of plain tensors, or safetensors where the suffix is ".safetensors"."""
    if suffix == ".safetensors":
        return save(arrays)
    try:
        import torch
    except ImportError:
        raise BadInput(f"a {suffix} file needs PyTorch: pip install -r requirements-torch.txt (a .safetensors file does not)") from None
    content = io.BytesIO()
    torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, content)
    return content.getvalue()


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    except (SafetensorError, ValueError, TypeError, AttributeError, OSError) as error:
        raise BadInput(f"{path}: not a whole safetensors file ({' '.join(str(error).split())[:200]})") from None


def _check_archive(path: Path) -> None:
    """Parts that are compressed or overlap could fill the memory from a small file; PyTorch writes neither."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            total = sum(part.file_size for part in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise BadInput(f"{path}: a damaged archive ({error})") from None
    if total > path.stat().st_size:
        raise BadInput(f"{path}: its parts would unpack to {total} bytes, more than the file; PyTorch writes no such archive")


def _read_pickled(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise BadInput(f"{path}: needs PyTorch to be read: pip install -r requirements-torch.txt (a .safetensors file does not)") from None
    if torch.__version__ < _OLDEST_TORCH:
        raise BadInput(f"PyTorch {torch.__version__} does not read files safely: pip install -r requirements-torch.txt")
    _check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stored = torch.load(path, map_location="cpu", weights_only=True)
    # What it raises over foreign bytes is anything at all.
    except Exception as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it asks for {wanted[1][:100]}" if wanted else "truncated, or another kind of file"
        raise BadInput(f"{path}: not plain PyTorch weights ({why}); nothing in it was run") from None
    for wrapper in ("state_dict", "model"):
        if isinstance(stored, Mapping) and isinstance(stored.get(wrapper), Mapping):
            stored = stored[wrapper]
    if not isinstance(stored, Mapping):
        raise BadInput(f"{path}: holds a {type(stored).__name__}, expected a state dict")
    largest, arrays = path.stat().st_size, {}
    for name, tensor in stored.items():
        where = f"{path}: {str(name)[:200]!r}"
        if not isinstance(tensor, torch.Tensor):
            raise BadInput(f"{where} is a {type(tensor).__name__}, expected a tensor")
        if tensor.numel() * tensor.element_size() > largest:
            raise BadInput(f"{where} {list(tensor.shape)} claims more values than the file has")
        try:
            arrays[str(name)] = (tensor.float() if tensor.is_floating_point() else tensor).detach().numpy()
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            raise BadInput(f"{where}: not a plain tensor ({' '.join(str(error).split())[:100]})") from None
    return arrays


def read_state_dict(path: Path | str) -> dict[str, np.ndarray]:
    """Reads the tensors of a `.safetensors` file, or else of what torch.save wrote (.pt, .pth): name -> array; float types as float32 from a .pt.

    A .pt is read with weights_only=True, by PyTorch 2.6 or later, and may hold the state dict under "state_dict" or "model". A missing,
    truncated or foreign file, and a pickle of anything but plain weights, are a `BadInput` of one line; nothing is executed.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickled(path)


def read_torch(path: Path | str, network: str | None = None) -> Imported:
    """Reads and converts a state dict; see `read_state_dict` and `from_torch`, also for the errors."""
    arrays = read_state_dict(path)
    try:
        return from_torch(arrays, network)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
