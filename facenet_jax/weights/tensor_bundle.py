"""TensorFlow 1 checkpoints (V2 "tensor bundles"), read without TensorFlow.

`.index` is a LevelDB table from a tensor's name to its type, shape, place and checksum in `.data-0000i-of-0000n`; the empty
name holds the bundle's header. Format: tensorflow/core/protobuf/tensor_bundle.proto, leveldb/doc/table_format.md.
"""

import glob
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from facenet_jax.errors import BadInput
from facenet_jax.weights.graph_def import DTYPES, decode, shape_of
from facenet_jax.wire import masked_crc32c

_MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")
_FOOTER = 48
_TRAILER = 5
_COMPRESSIONS = {1: "snappy", 2: "zstd"}
# Prefix compression lets four bytes stand for a key of any length.
_LONGEST_NAME = 1000


def _varint(data: bytes, at: int, where: str) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if at >= len(data):
            break
        byte, at = data[at], at + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise BadInput(f"{where}: damaged checkpoint index (bad length)")


def _block(table: bytes, handle: bytes, where: str) -> bytes:
    offset, at = _varint(handle, 0, where)
    size, _ = _varint(handle, at, where)
    end = offset + size
    if end + _TRAILER > len(table) - _FOOTER:
        raise BadInput(f"{where}: damaged checkpoint index (a block beyond the end)")
    if masked_crc32c(table[offset : end + 1]) != int.from_bytes(table[end + 1 : end + _TRAILER], "little"):
        raise BadInput(f"{where}: damaged checkpoint index (checksum of the block at {offset})")
    if compression := table[end]:
        name = _COMPRESSIONS.get(compression, f"method {compression}")
        raise BadInput(f"{where}: a block is compressed by {name}; only uncompressed indices, as TensorFlow writes them, are read")
    return table[offset:end]


def _entries(block: bytes, where: str) -> Iterator[tuple[bytes, bytes]]:
    restarts = int.from_bytes(block[-4:], "little")
    end = len(block) - 4 * (restarts + 1)
    if end < 0:
        raise BadInput(f"{where}: damaged checkpoint index (a block of {len(block)} bytes with {restarts} restarts)")
    at, key = 0, b""
    while at < end:
        shared, at = _varint(block, at, where)
        fresh, at = _varint(block, at, where)
        size, at = _varint(block, at, where)
        if shared > len(key) or shared + fresh > _LONGEST_NAME or at + fresh + size > end:
            raise BadInput(f"{where}: damaged checkpoint index (an entry beyond its block)")
        key = key[:shared] + block[at : at + fresh]
        yield key, block[at + fresh : at + fresh + size]
        at += fresh + size


def _table(path: Path) -> Iterator[tuple[bytes, bytes]]:
    table = path.read_bytes()
    if len(table) < _FOOTER or table[-8:] != _MAGIC:
        raise BadInput(f"{path}: not a TensorFlow checkpoint index, or truncated")
    footer = table[-_FOOTER:]
    _, at = _varint(footer, 0, str(path))
    _, at = _varint(footer, at, str(path))
    previous = None
    for _, handle in _entries(_block(table, footer[at:], str(path)), str(path)):
        for key, value in _entries(_block(table, handle, str(path)), str(path)):
            # Also what keeps a small file from listing one block a million times.
            if previous is not None and key <= previous:
                raise BadInput(f"{path}: damaged checkpoint index (names out of order)")
            yield key, value
            previous = key


def _newest(folder: Path, pattern: str) -> Path | None:
    """The checkpoint index of the highest step."""
    steps = ((re.search(r"-(\d{1,18})\.index$", index.name), index) for index in folder.glob(pattern))
    found = [(int(step[1]), index.name, index) for step, index in steps if step]
    return max(found)[2] if found else None


def _find_index(path: Path) -> Path:
    if path.is_dir():
        state = path / "checkpoint"
        if not state.is_file():
            index = _newest(path, "model-*.ckpt-*.index")
            if index is None:
                raise BadInput(f"{path}: no `checkpoint` file and no model-*.ckpt-*.index in this directory")
            return index
        with state.open(errors="replace") as file:
            match = re.search(r'^model_checkpoint_path:\s*"(?:[^"\n]*[/\\])?([^"\n/\\]{1,200})"', file.read(1 << 16), re.MULTILINE)
        if match is None:
            raise BadInput(f"{state}: names no checkpoint")
        # The path in it is of the machine that trained; the files lie beside it.
        path = path / match[1]
    name = re.sub(r"\.(index|meta|data-\d{5}-of-\d{5})$", "", path.name)
    index = path.parent / f"{name}.index"
    # The original code writes model-X.meta once, beside model-X.ckpt-N.index.
    found = index if index.is_file() else _newest(path.parent, f"{glob.escape(name)}.ckpt-*.index")
    if found is None:
        raise BadInput(f"{index}: no such checkpoint")
    return found


def read_checkpoint(path: Path | str) -> dict[str, np.ndarray]:
    """Reads every numeric tensor of a checkpoint: name -> read-only array of the stored shape and type.

    `path` is the checkpoint's prefix, one of its files, or the directory that holds it: there the `checkpoint` file names it,
    or else the highest step of model-*.ckpt-*.index is taken. Checksums are checked. Strings are left out. Missing, truncated,
    damaged or partitioned files are a `BadInput` of one line, before more than the data files' size is allocated.
    """
    index = _find_index(Path(path))
    table = _table(index)
    key, value = next(table, (None, b""))
    if key != b"":
        raise BadInput(f"{index}: a table, but not of a TensorFlow checkpoint (no header)")
    header = decode("BundleHeader", value, str(index))
    if header.endianness:
        raise BadInput(f"{index}: written on a big-endian machine, which is not read")
    arrays, files, sizes = {}, {}, {}
    total = 0
    with ExitStack() as stack:
        for key, value in table:
            entry = decode("BundleEntry", value, str(index))
            if entry.dtype not in DTYPES:
                continue
            name = key.decode(errors="replace")
            where = f"{index}: tensor {name!r}"
            if entry.slices:
                raise BadInput(f"{where}: partitioned over several tensors, which is not read")
            dtype, shape = DTYPES[entry.dtype][0], shape_of(entry.shape, where)
            if not 0 <= entry.shard < header.shards or entry.offset < 0 or entry.size != math.prod(shape) * dtype.itemsize:
                raise BadInput(f"{where}: {entry.size} bytes at {entry.offset} of data file {entry.shard} for {list(shape)} of {dtype}")
            if entry.shard not in files:
                data_path = index.with_name(f"{index.stem}.data-{entry.shard:05d}-of-{header.shards:05d}")
                if not data_path.is_file():
                    raise BadInput(f"{data_path}: missing; a checkpoint is its .index and all its .data files")
                files[entry.shard] = stack.enter_context(data_path.open("rb"))
                sizes[entry.shard] = data_path.stat().st_size
            total += entry.size
            if entry.offset + entry.size > sizes[entry.shard] or total > sum(sizes.values()):
                raise BadInput(f"{where}: beyond the end of its data file, which is truncated")
            files[entry.shard].seek(entry.offset)
            data = files[entry.shard].read(entry.size)
            if masked_crc32c(data) != entry.crc32c:
                raise BadInput(f"{where}: checksum does not match: the data file is damaged")
            arrays[name] = np.frombuffer(data, dtype).reshape(shape)
    return arrays
