"""MTCNN's published weights: from the `mtcnn` package, from facenet-pytorch's .pt files, from the original det1..3.npy. Nothing in a file is executed.

Files of Python objects are read by `_Inert`, which knows arrays, dictionaries and lists, and refuses every other name.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import lz4.frame
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from facenet_jax.detection.networks import variables_shapes
from facenet_jax.errors import BadInput
from facenet_jax.weights.checks import problem, refuse
from facenet_jax.weights.portable import Weights

NETWORKS = ("pnet", "rnet", "onet")
_LIMIT = 64 << 20  # bytes; the three files together hold 2 MB


# The one written in Python: its methods can be replaced.
_Unpickler: Any = pickle._Unpickler


class _Inert(_Unpickler):
    """A reader of pickled arrays in which the names of `known` mean these functions, and any other name ends the reading."""

    known: dict[tuple[str, str], Any]

    def __init__(self, data: bytes, known: dict[tuple[str, str], Any], **options: Any) -> None:
        self.stream = io.BytesIO(data)
        self.known = known
        super().__init__(self.stream, **options)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.known:
            raise BadInput(f"it names {module}.{name}, which has no place among weights")
        return self.known[module, name]


def _dtype(text: Any = "", *_: Any) -> np.dtype:
    if text not in ("f4", "f8", "<f4", "<f8"):
        raise BadInput(f"an array of {text!r}, expected float32")
    return np.dtype(str(text))


class _DtypeState:
    """Stands for numpy.dtype while its state is set, which changes nothing for floats."""

    def __init__(self, text: Any = "", *_: Any) -> None:
        self.dtype = _dtype(text)

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("<", "="):
            raise BadInput("arrays in another byte order")


class _JoblibArray:
    """Description of an array whose bytes follow in the file."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.shape, self.dtype = tuple(state["shape"]), state["dtype"].dtype
        self.padded = "numpy_array_alignment_bytes" in state


class _Joblib(_Inert):
    """joblib's dump: after the description of an array, its bytes."""

    dispatch: ClassVar[dict[int, Any]] = dict(_Unpickler.dispatch)

    def load_build(self) -> None:
        super().load_build()
        described = self.stack[-1]
        if isinstance(described, _JoblibArray):
            if described.padded:
                self.stream.read(self.stream.read(1)[0])
            self.stack[-1] = _array(self.stream.read(int(np.prod(described.shape)) * described.dtype.itemsize), described)

    dispatch[pickle.BUILD[0]] = load_build


def _array(data: bytes, described: Any) -> np.ndarray:
    return np.frombuffer(data, described.dtype).reshape(described.shape).astype(np.float32)


def _joblib(data: bytes) -> list[np.ndarray]:
    """The list of arrays in an .lz4 file of the `mtcnn` package."""
    reader = lz4.frame.LZ4FrameDecompressor()
    plain = reader.decompress(data, max_length=_LIMIT)
    known = {
        ("joblib.numpy_pickle", "NumpyArrayWrapper"): _JoblibArray,
        ("numpy", "ndarray"): None,
        ("numpy", "dtype"): _DtypeState,
    }
    return _Joblib(plain, known).load()


class _NpyArray:
    """Stands for numpy.ndarray in an old .npy file of objects."""

    def __init__(self, *_: Any) -> None:
        self.value = np.zeros(0, np.float32)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        raw = data.encode("latin1") if isinstance(data, str) else data
        if isinstance(raw, list):
            self.value = raw[0]
            return
        self.value = np.frombuffer(raw, dtype.dtype).reshape(shape, order="F" if fortran else "C").astype(np.float32)


class _AnyDtype(_DtypeState):
    """Also the dtype of the object array that a pickled dictionary is wrapped in."""

    def __init__(self, text: Any = "", *rest: Any) -> None:
        if text in ("O8", "O", "O4"):
            self.dtype = np.dtype(object)
        else:
            super().__init__(text, *rest)

    def __setstate__(self, state: tuple) -> None:
        if self.dtype != object:
            super().__setstate__(state)


def _npy(data: bytes) -> dict[str, dict[str, np.ndarray]]:
    """The dictionary in det1.npy, det2.npy or det3.npy: layer -> {"weights", "biases" or "alpha": array}."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    read_header(stream)
    known: dict[tuple[str, str], Any] = {("numpy", "ndarray"): None}
    for package in ("numpy.core.multiarray", "numpy._core.multiarray"):
        known[package, "_reconstruct"] = _NpyArray
    known["numpy", "dtype"] = _AnyDtype
    known["_codecs", "encode"] = lambda text, _: text.encode("latin1")
    found = _Inert(stream.read(), known, encoding="latin1").load()
    layers = found.value if isinstance(found, _NpyArray) else found
    if not isinstance(layers, dict):
        raise BadInput("no dictionary of layers")
    return {name: {key: array.value for key, array in parts.items()} for name, parts in layers.items()}


@dataclass(frozen=True)
class _Tensor:
    """A view of a storage, by its key; the bytes come later in the file or lie elsewhere in it."""

    storage: tuple[str, int]
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, values: np.ndarray) -> np.ndarray:
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        if min((0, self.offset, *self.strides, *self.shape)) < 0 or last >= len(values):
            raise BadInput("a tensor reaches beyond its bytes")
        return np.lib.stride_tricks.as_strided(values[self.offset :], self.shape, [4 * s for s in self.strides]).copy()


class _Torch(_Inert):
    """torch.save's pickles: state dicts of float32 tensors."""

    def __init__(self, data: bytes) -> None:
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "FloatStorage"): "FloatStorage",
            ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, shape, strides, *_: _Tensor(storage, offset, shape, strides),
        }
        super().__init__(data, known)

    def persistent_load(self, identifier: tuple) -> tuple[str, int]:
        _, kind, key, _, count, *_ = identifier
        if kind != "FloatStorage":
            raise BadInput(f"a tensor of {kind}, expected float32")
        return key, count


def _pt(data: bytes) -> dict[str, np.ndarray]:
    """A state dict in PyTorch's zip format, or in the format before 1.6: five pickles, then each storage's length and bytes."""
    if zipfile.is_zipfile(io.BytesIO(data)):
        archive = zipfile.ZipFile(io.BytesIO(data))
        pickled = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        tensors = _Torch(_member(archive, pickled)).load()
        of = lambda key: np.frombuffer(_member(archive, pickled.removesuffix("data.pkl") + f"data/{key}"), np.float32)
        return {name: tensor.of(of(tensor.storage[0])) for name, tensor in tensors.items()}
    at = 0
    parts = []
    for _ in range(5):
        reader = _Torch(data[at:])
        parts.append(reader.load())
        at += reader.stream.tell()
    values = {}
    for key in parts[4]:
        count = int.from_bytes(data[at : at + 8], "little")
        values[key] = np.frombuffer(data, np.float32, count, at + 8)
        at += 8 + 4 * count
    return {name: tensor.of(values[tensor.storage[0]]) for name, tensor in parts[3].items()}


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    if archive.getinfo(name).file_size > _LIMIT:
        raise BadInput(f"{name} would unpack to more than {_LIMIT >> 20} MB")
    return archive.read(name)


def _from_list(arrays: list[np.ndarray], network: str) -> dict[str, np.ndarray]:
    """The `mtcnn` package keeps the arrays in the order of its layers, kernels upright."""
    convolutions, dense, heads = {
        "pnet": (3, 0, ("boxes", "scores")),
        "rnet": (3, 1, ("boxes", "scores")),
        "onet": (4, 1, ("boxes", "points", "scores")),
    }[network]
    names = []
    for i in range(1, convolutions + 1):
        names += [f"conv{i}/kernel", f"conv{i}/bias", f"prelu{i}/slope"]
    if dense:
        names += [f"dense{convolutions + 1}/kernel", f"dense{convolutions + 1}/bias", f"prelu{convolutions + 1}/slope"]
    for head in heads:
        names += [f"{head}/kernel", f"{head}/bias"]
    if len(arrays) != len(names):
        raise BadInput(f"{len(arrays)} arrays, expected {len(names)}")
    return dict(zip(names, arrays, strict=True))


def _from_torch(tensors: dict[str, np.ndarray], network: str) -> dict[str, np.ndarray]:
    """facenet-pytorch: kernels [out, in, width, height] of the transposed image; dense [out, in]."""
    heads = {
        "pnet": {"conv4_1": "scores", "conv4_2": "boxes"},
        "rnet": {"dense5_1": "scores", "dense5_2": "boxes"},
        "onet": {"dense6_1": "scores", "dense6_2": "boxes", "dense6_3": "points"},
    }[network]
    found = {}
    for name, tensor in tensors.items():
        layer, _, part = name.partition(".")
        kind = "slope" if layer.startswith("prelu") else {"weight": "kernel", "bias": "bias"}.get(part, part)
        turned = {4: (2, 3, 1, 0), 2: (1, 0)}.get(tensor.ndim)
        found[f"{heads.get(layer, layer)}/{kind}"] = tensor.transpose(turned) if turned else tensor
    return found


def _from_original(layers: dict[str, dict[str, np.ndarray]], network: str) -> dict[str, np.ndarray]:
    """The original's names; kernels [height, width, in, out] of the transposed image."""
    heads = {
        "pnet": {"conv4-1": "scores", "conv4-2": "boxes"},
        "rnet": {"conv4": "dense4", "conv5-1": "scores", "conv5-2": "boxes"},
        "onet": {"conv5": "dense5", "conv6-1": "scores", "conv6-2": "boxes", "conv6-3": "points"},
    }[network]
    found = {}
    for layer, parts in layers.items():
        for part, array in parts.items():
            name = heads.get(layer, layer.lower())
            kind = {"weights": "kernel", "biases": "bias", "alpha": "slope"}.get(part, part)
            found[f"{name}/{kind}"] = array.swapaxes(0, 1) if array.ndim == 4 else array
    return found


def _checked(found: dict[str, np.ndarray], network: str, where: str) -> dict[str, Any]:
    """The tree of a network's parameters; BadInput names the first tensor that is missing, unknown or of another shape."""
    # The slope of P-Net's first layer lives with its convolution; heads of P-Net are 1x1 convolutions.
    tensors = {("conv1/slope" if network == "pnet" and name == "prelu1/slope" else name): np.asarray(a) for name, a in found.items()}
    wanted = {path: leaf.shape for path, leaf in flatten_dict(variables_shapes()[network], sep="/").items()}
    for name in sorted(set(wanted) | set(tensors)):
        have = tensors[name].shape if name in tensors else None
        if name in tensors and name.endswith("/slope"):
            tensors[name] = tensors[name].reshape(-1)
            have = tensors[name].shape
        if have is not None and name in wanted and network == "pnet" and len(wanted[name]) == 4 and len(have) == 2:
            tensors[name] = tensors[name][None, None]
            have = tensors[name].shape
        if wanted.get(name) != have:
            raise BadInput(
                f"{where}: {network} tensor {name} has shape {have or 'none (missing)'}, expected {wanted.get(name, 'none (unknown)')}"
            )
        refuse(f"{where}: {network}", [problem(name, tensors[name], wanted[name])])
    return unflatten_dict({name: np.ascontiguousarray(array, np.float32) for name, array in tensors.items()}, sep="/")


def _read(path: Path, data: bytes, network: str) -> dict[str, Any]:
    readers: dict[str, Callable[[bytes], dict[str, np.ndarray]]] = {
        ".lz4": lambda d: _from_list(_joblib(d), network),
        ".pt": lambda d: _from_torch(_pt(d), network),
        ".npy": lambda d: _from_original(_npy(d), network),
    }
    try:
        return _checked(readers[path.suffix](data), network, str(path))
    except BadInput as error:
        raise BadInput(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    # What damaged bytes can raise in a reader of opcodes is open-ended, and none of it is ours.
    except Exception as error:
        raise BadInput(f"{path}: damaged, or no weights of MTCNN ({type(error).__name__})") from None


def read(folder: Path, provenance: dict[str, Any] | None = None) -> Weights:
    """MTCNN from a folder with pnet, rnet, onet (.lz4 or .pt), or det1, det2, det3 (.npy)."""
    params = {}
    for index, network in enumerate(NETWORKS, 1):
        names = [f"{network}.lz4", f"{network}.pt", f"det{index}.npy"]
        path = next((folder / name for name in names if (folder / name).is_file()), None)
        if path is None:
            raise BadInput(f"{folder}: no {', '.join(names[:-1])} or {names[-1]}")
        params[network] = _read(path, path.read_bytes(), network)
    return Weights({"params": params}, "mtcnn", {}, {}, 0, normalise=False, provenance=provenance or {})
