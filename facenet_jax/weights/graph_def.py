"""Constants of a frozen TensorFlow graph (`.pb`, a serialised GraphDef), read without TensorFlow.

The protobuf messages are described here with the few fields that are needed; protobuf itself skips the others.
"""

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from google.protobuf.message import DecodeError

from facenet_jax.errors import BadInput
from facenet_jax.wire import messages

# Nodes are left as bytes so that one at a time is decoded.
_SCHEMA = {
    "Graph": "1 node *bytes",
    "Node": "1 name string, 2 op string, 5 attr *Attribute",
    "Attribute": "1 key string, 2 value Value",
    "Value": "8 tensor Tensor",
    "Tensor": "1 dtype int32, 2 shape Shape, 4 content bytes, 5 float_val *float, 6 double_val *double, 7 int_val *int32, "
    "10 int64_val *int64, 11 bool_val *bool, 13 half_val *int32, 16 uint32_val *uint32, 17 uint64_val *uint64",
    "Shape": "2 dim *Dimension, 3 unknown_rank bool",
    "Dimension": "1 size int64",
    "BundleHeader": "1 shards int32, 2 endianness int32",
    "BundleEntry": "1 dtype int32, 2 shape Shape, 3 shard int32, 4 offset int64, 5 size int64, 6 crc32c fixed32, 7 slices *bytes",
}


MESSAGES = messages("facenet_jax.tensorflow", _SCHEMA)

# TensorFlow's DataType -> (the stored type, the field of Tensor that lists single values). Absent: strings, complex, quantised.
DTYPES: dict[int, tuple[np.dtype, str]] = {
    number: (np.dtype(kind), field)
    for number, kind, field in (
        (1, "<f4", "float_val"),
        (2, "<f8", "double_val"),
        (3, "<i4", "int_val"),
        (4, "u1", "int_val"),
        (5, "<i2", "int_val"),
        (6, "i1", "int_val"),
        (9, "<i8", "int64_val"),
        (10, "?", "bool_val"),
        (14, ml_dtypes.bfloat16, "half_val"),
        (17, "<u2", "int_val"),
        (19, "<f2", "half_val"),
        (22, "<u4", "uint32_val"),
        (23, "<u8", "uint64_val"),
    )
}

# A few bytes can claim any shape. These are far above any network here and far below a machine's memory.
_MOST_ELEMENTS = 1 << 31
_MOST_REPEATS = 1 << 24
_MOST_DIMENSIONS = 32
_MOST_BYTES = 1 << 29


def decode(message: str, data: bytes, where: str) -> Any:
    """Parses one of `MESSAGES`; damage is a `BadInput` that starts with `where`."""
    try:
        return MESSAGES[message].FromString(data)
    except DecodeError:
        raise BadInput(f"{where}: damaged, or not what its name says (no {message} message)") from None


def shape_of(shape: Any, where: str) -> tuple[int, ...]:
    """A Shape message as a tuple; unknown, negative or absurd sizes are a `BadInput`."""
    if len(shape.dim) > _MOST_DIMENSIONS or shape.unknown_rank:
        raise BadInput(f"{where}: a tensor of unknown or absurd rank")
    sizes = tuple(dimension.size for dimension in shape.dim)
    if min(sizes, default=0) < 0 or math.prod(max(size, 1) for size in sizes) > _MOST_ELEMENTS:
        raise BadInput(f"{where}: impossible shape {list(sizes)}")
    return sizes


def _array(tensor: Any, where: str) -> np.ndarray:
    dtype, field = DTYPES[tensor.dtype]
    shape = shape_of(tensor.shape, where)
    count = math.prod(shape)
    if tensor.content:
        content = tensor.content
        if len(content) != count * dtype.itemsize:
            raise BadInput(f"{where}: {len(content)} bytes for {list(shape)} of {dtype}")
        return np.frombuffer(content, dtype).reshape(shape)
    listed = getattr(tensor, field)
    # Narrow integers are listed as int32, and halves as the bits of one.
    values = np.fromiter(listed, np.int32 if field in ("int_val", "half_val") else dtype, len(listed))
    values = values.astype(np.uint16).view(dtype) if field == "half_val" else values.astype(dtype, copy=False)
    if values.size == count:
        return values.reshape(shape)
    # One value stands for all of them; none stands for zero.
    if values.size > 1 or count > _MOST_REPEATS:
        raise BadInput(f"{where}: {values.size} values for shape {list(shape)}")
    return np.broadcast_to(values[0] if values.size else np.zeros((), dtype), shape)


def read_graph(path: Path | str) -> dict[str, np.ndarray]:
    """Reads every numeric `Const` node of a frozen graph: name -> read-only array of the stored shape and type.

    Strings and other non-numeric constants are left out. Memory stays near twice the file. Nothing is executed. A missing,
    truncated or foreign file is a `BadInput` of one line.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    if path.stat().st_size > _MOST_BYTES:
        raise BadInput(f"{path}: {path.stat().st_size >> 20} MiB is no graph of a face network (at most {_MOST_BYTES >> 20} MiB)")
    graph = decode("Graph", path.read_bytes(), str(path))
    arrays = {}
    for data in graph.node:
        node = decode("Node", data, str(path))
        if node.op != "Const":
            continue
        tensor = next((attribute.value.tensor for attribute in node.attr if attribute.key == "value"), None)
        if tensor is not None and tensor.dtype in DTYPES:
            arrays[node.name] = _array(tensor, f"{path}: constant {node.name[:200]!r}")
    if not arrays:
        raise BadInput(f"{path}: no constants: not a frozen TensorFlow graph")
    return arrays
