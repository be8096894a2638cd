"""OpenFace's nn4.small2 as the Keras port (Keras-OpenFace, weights/) carries it: one line of comma-separated numbers a tensor, one file a tensor.

Read from a folder, a tar (plain, gz, bz2, xz) or a zip of one, in memory: nothing is unpacked. File names follow from the Flax tree by rule.
"""

import bz2
import functools
import gzip
import io
import lzma
import math
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from facenet_jax import models
from facenet_jax.errors import BadInput
from facenet_jax.weights.portable import Weights

# All 224 files as text are 66 MB; the longest number a double prints as has 24 characters.
_LARGEST_SET = 192 << 20
_LONGEST_NUMBER = 32
_MOST_MEMBERS = 2000
# What the archive modules raise on broken files, beside their own errors.
_BROKEN = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    OSError,
    ValueError,
    RuntimeError,
    OverflowError,
    MemoryError,
)

# From a Flax path to the file's name, applied in order.
_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^(params|batch_stats)/", ""),
        (r"^conv(\d)/norm/", r"bn\1/"),
        (r"^conv(\d)/conv/", r"conv\1/"),
        (r"/reduce(\dx\d)/(conv|norm)/", r"_\1_\g<2>1/"),
        (r"/conv(3x3|5x5)/(conv|norm)/", r"_\1_\g<2>2/"),
        (r"/conv1x1/(conv|norm)/", r"_1x1_\1/"),
        (r"/pool_proj/(conv|norm)/", r"_pool_\1/"),
        (r"_norm(?=\d?/)", "_bn"),
        (r"/(kernel|scale)$", "_w"),
        (r"/bias$", "_b"),
        (r"/mean$", "_m"),
        (r"/var$", "_v"),
    )
)
# The published set has two files more: a convolution's "statistics", copies of the BatchNorm before it.
_STRAYS = {f"inception_5a_3x3_conv2_{letter}.csv": f"inception_5a_3x3_bn1_{letter}.csv" for letter in "mv"}


@dataclass(frozen=True)
class Entry:
    """One file's place: path in the Flax tree, joined by slashes, and the tensor's shape there."""

    path: str
    shape: tuple[int, ...]

    def to_flax(self, values: np.ndarray) -> np.ndarray:
        """Numbers [n] in the file's order -> float32 of `shape`: Torch holds convolutions as OIHW and the dense layer as [out, in]."""
        order = self._torch_order
        torch = values.astype(np.float32).reshape([self.shape[axis] for axis in order])
        return np.ascontiguousarray(torch.transpose(np.argsort(order)))

    def from_flax(self, tensor: np.ndarray) -> np.ndarray:
        """The inverse of `to_flax`."""
        return np.asarray(tensor, np.float32).transpose(self._torch_order).ravel()

    @property
    def _torch_order(self) -> tuple[int, ...]:
        return {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[len(self.shape)]


@functools.cache
def entries() -> dict[str, Entry]:
    """File name -> its place, for the 224 files that are needed, sorted by name."""
    model = models.create("nn4_small2")
    tree = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 96, 96, 3)), train=False))
    found = {}
    for path, leaf in flatten_dict(tree, sep="/").items():
        name = path
        for pattern, replacement in _RULES:
            name = pattern.sub(replacement, name)
        found[f"{name}.csv"] = Entry(path, leaf.shape)
    return dict(sorted(found.items()))


def parse(name: str, text: bytes) -> np.ndarray:
    """The tensor of one file, float32 in its Flax shape; `name` is one of `entries()`. BadInput: other counts, words, NaN or infinity."""
    entry = entries()[name]
    expected = f"expected {math.prod(entry.shape)} numbers for shape {list(entry.shape)}"
    if len(text) > _LONGEST_NUMBER * (math.prod(entry.shape) + 1):
        raise BadInput(f"{name} has {len(text)} bytes, {expected}")
    words = text.replace(b",", b" ").split()
    if len(words) != math.prod(entry.shape):
        raise BadInput(f"{name} has {len(words)} numbers, {expected}")
    try:
        values = np.array(words).astype(np.float64)
    except ValueError:
        raise BadInput(f"{name} holds something that is no number, {expected}") from None
    if not (np.abs(values) <= np.finfo(np.float32).max).all():
        raise BadInput(f"{name} holds values that are not finite in float32, {expected}")
    if entry.path.endswith("/var") and (values < 0).any():
        raise BadInput(f"{name} holds a negative variance, {expected}")
    return entry.to_flax(values)


def format_csv(values: np.ndarray) -> bytes:
    """Numbers [n] as the published files write them: 14 significant digits (Torch's print), which keep every float32 bit for bit."""
    return (",".join(f"{value:.14g}" for value in values.tolist()) + "\n").encode()


def _whole(stream: Any, path: Path) -> bytes:
    """All of a stream, where it is no larger than a set can be."""
    data = stream.read(_LARGEST_SET + 1)
    if len(data) > _LARGEST_SET:
        raise BadInput(f"{path}: holds more than {_LARGEST_SET >> 20} MiB, more than any nn4.small2 has")
    return data


def _read_file(path: Path) -> bytes:
    with path.open("rb") as file:
        return _whole(file, path)


def _tar_members(path: Path) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as file:
        magic = file.read(6)
        file.seek(0)
        openers = ((b"\xfd7zXZ", lzma.open), (b"\x1f\x8b", gzip.open), (b"BZh", bz2.open))
        opener: Any = next((opener for start, opener in openers if magic.startswith(start)), None)
        # Unpacked whole under a bound first: a tar's own headers may claim any size.
        data = _whole(opener(file) if opener else file, path)
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        for count, member in enumerate(archive):
            if count > _MOST_MEMBERS:
                raise BadInput(f"{path}: more than {_MOST_MEMBERS} members")
            content = archive.extractfile(member) if member.isreg() and not member.issparse() else None
            yield member.name, content.read() if content else b""


def _zip_members(path: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) > _MOST_MEMBERS or sum(member.file_size for member in members) > _LARGEST_SET:
            raise BadInput(f"{path}: unpacks to more than {_MOST_MEMBERS} files or {_LARGEST_SET >> 20} MiB, more than any nn4.small2 has")
        for member in members:
            with archive.open(member) as content:
                yield member.filename, b"" if member.is_dir() else _whole(content, path)


def _files(path: Path) -> dict[str, bytes]:
    """File name -> content, of those in the set; members that would leave the archive's folder are refused."""
    known = entries()
    if path.is_dir():
        return {name: _read_file(path / name) for name in known if (path / name).is_file()}
    if not path.is_file():
        raise BadInput(f"{path}: no such folder or archive of CSV files")
    found: dict[str, bytes] = {}
    try:
        for member, content in _zip_members(path) if zipfile.is_zipfile(path) else _tar_members(path):
            where = PurePosixPath(member.replace("\\", "/"))
            if where.is_absolute() or ".." in where.parts:
                raise BadInput(f"{path}: member {member!r} leaves the archive's folder")
            if where.name in found:
                raise BadInput(f"{path}: {where.name} is there twice")
            if where.name in known:
                found[where.name] = content
    except BadInput:
        raise
    except _BROKEN as error:
        raise BadInput(f"{path}: no folder, tar or zip of CSV files, or a broken one ({error})") from None
    return found


def read_partial(path: Path) -> dict[str, np.ndarray]:
    """The files that are there, checked one by one: path in the Flax tree -> float32 tensor. Other files are passed over."""
    known = entries()
    tensors = {}
    for name, text in _files(path).items():
        try:
            tensors[known[name].path] = parse(name, text)
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from None
    return tensors


def read_openface_csv(path: Path) -> dict[str, Any]:
    """{"params": ..., "batch_stats": ...}, float32, for models.create("nn4_small2"), from a folder or an archive of CSV files.

    BadInput, one line: every missing file by name, the first with another count than its shape's, words, NaN, infinity, negative
    variances; archives that are broken, too large, or whose members leave their folder.
    """
    tensors = read_partial(path)
    missing = [name for name, entry in entries().items() if entry.path not in tensors]
    if missing:
        raise BadInput(f"{path}: {len(missing)} of {len(entries())} files missing: {', '.join(missing)}")
    return unflatten_dict(tensors, sep="/")


def write_openface_csv(variables: dict[str, Any], folder: Path) -> None:
    """The inverse: the 226 files of the published set in `folder`, which is made. Variables of another network are a BadInput."""
    flat = flatten_dict(variables, sep="/")
    known = entries()
    for path in sorted(set(flat) | {entry.path for entry in known.values()}):
        shape = next((entry.shape for entry in known.values() if entry.path == path), None)
        if path not in flat or flat[path].shape != shape:
            there = list(flat[path].shape) if path in flat else "none (missing)"
            raise BadInput(f"not an nn4.small2: {path} has shape {there}, expected {list(shape) if shape else 'none (unknown)'}")
    folder.mkdir(parents=True, exist_ok=True)
    for name in [*known, *_STRAYS]:
        entry = known[_STRAYS.get(name, name)]
        (folder / name).write_bytes(format_csv(entry.from_flax(flat[entry.path])))


def read(path: Path) -> Weights:
    """The `Weights` of a CSV set: the released network (its strided pools), 96x96 in 0..1. Errors as in `read_openface_csv`."""
    variables = read_openface_csv(path)
    return Weights(variables, "nn4_small2", {"pooling": "released"}, {"size": 96, "standardisation": "unit"}, 128)
