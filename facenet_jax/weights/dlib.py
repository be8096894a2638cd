"""dlib_face_recognition_resnet_model_v1.dat: dlib's own serialisation, read without dlib.

Integers are a byte (count of bytes, top bit for the sign) and that many bytes, low first; floats are a mantissa and a power of two, both
integers; a tensor is a version, four sizes and little-endian float32s. The net is nested: first the versions of all layers from the loss
to the input, then the input's settings, then each layer's name, settings and parameters from the input back to the loss.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from facenet_jax.errors import BadInput
from facenet_jax.models.dlib_resnet import BLOCKS
from facenet_jax.weights.portable import Weights

# The file has 22 MB; with gradients and optimiser state kept, a few times that.
_LARGEST_FILE = 256 << 20
_MEANS = (122.782, 117.001, 104.298)
_SIZE, _EMBEDDING = 150, 128


class _Reader:
    """Takes dlib's values one after the other; `where` says which layer is being read."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position, self.where = data, 0, "header"

    def fail(self, found: object, expected: object) -> BadInput:
        return BadInput(f"byte {self.position}, {self.where}: {found}, expected {expected}")

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.position:
            raise self.fail("the file ends", f"{count} bytes more")
        self.position += count
        return self.data[self.position - count : self.position]

    def integer(self) -> int:
        control = self.take(1)[0]
        if control & 0x70 or not 1 <= control & 0x0F <= 8:
            raise self.fail(f"byte {control:#04x}", "an integer")
        value = int.from_bytes(self.take(control & 0x0F), "little")
        return -value if control & 0x80 else value

    def real(self) -> float:
        mantissa, exponent = self.integer(), self.integer()
        if abs(exponent) > 1100:
            raise self.fail(f"a float of exponent {exponent}", "a finite one")
        return math.ldexp(mantissa, exponent) if abs(mantissa) < 1 << 63 and exponent < 900 else math.inf

    def expect(self, what: str, *values: int) -> None:
        found = tuple(self.integer() for _ in values)
        if found != values:
            raise self.fail(f"{what} {list(found)}", list(values))

    def name(self, expected: str) -> None:
        length = self.integer()
        found = self.take(length) if 0 <= length <= 100 else b"?"
        if found != expected.encode():
            raise self.fail(f"layer {found.decode('ascii', 'replace')!r}", repr(expected))

    def tensor(self, shape: tuple[int, ...] | None) -> np.ndarray:
        """Its values in order. None: any shape."""
        self.expect("tensor version", 2)
        found = tuple(self.integer() for _ in range(4))
        if shape is not None and found != shape:
            raise self.fail(f"tensor {list(found)}", list(shape))
        if min(found) < 0:
            raise self.fail(f"tensor {list(found)}", "sizes")
        values = np.frombuffer(self.take(4 * math.prod(found)), "<f4").astype(np.float32)
        if shape is not None and not np.isfinite(values).all():
            raise self.fail("NaN or infinity", "finite parameters")
        return values


@dataclass(frozen=True)
class _Layer:
    """A layer as dlib nests it, from the input on: its kind, the Flax module that takes its parameters, sizes, settings."""

    kind: str
    path: tuple[str, ...] = ()
    inputs: int = 0
    outputs: int = 0
    window: int = 0
    stride: int = 1

    @property
    def padding(self) -> int:
        return self.window // 2 if self.stride == 1 else 0


def _unit(path: str, inputs: int, outputs: int, window: int, stride: int) -> tuple[_Layer, _Layer]:
    return _Layer("con_4", (path, "conv"), inputs, outputs, window, stride), _Layer("affine_", (path,), outputs, outputs)


def _layers() -> Iterator[_Layer]:
    """The whole network in the file's order."""
    yield from (*_unit("stem", 3, 32, 7, 2), _Layer("relu_"), _Layer("max_pool_2", window=3, stride=2))
    width = 32
    for index, (features, down) in enumerate(BLOCKS, 1):
        yield _Layer("tag")
        yield from (*_unit(f"block{index}_1", width, features, 3, 2 if down else 1), _Layer("relu_"))
        yield from _unit(f"block{index}_2", features, features, 3, 1)
        if down:
            yield from (_Layer("tag"), _Layer("tag"), _Layer("avg_pool_2", window=2, stride=2))
        yield from (_Layer("add_prev_"), _Layer("relu_"))
        width = features
    yield from (_Layer("avg_pool_2"), _Layer("fc_2", ("dense",), width, _EMBEDDING))


def _read_layer(reader: _Reader, layer: _Layer) -> dict[tuple[str, ...], np.ndarray]:
    """The settings and parameters of one layer, by Flax path."""
    inputs, outputs, window = layer.inputs, layer.outputs, layer.window

    def vector_views() -> None:
        """dlib says where in the parameters the two halves lie: version, then four sizes."""
        for _ in range(2):
            reader.expect("view", 1, 1, outputs, 1, 1)

    def multipliers() -> None:
        """Of learning rate and weight decay: nothing at inference."""
        for _ in range(4):
            reader.real()

    reader.name(layer.kind)
    if layer.kind == "con_4":
        size = outputs * inputs * window**2
        values = reader.tensor((size + outputs, 1, 1, 1))
        settings = (outputs, window, window, layer.stride, layer.stride, layer.padding, layer.padding)
        reader.expect("filters, window, stride and padding", *settings)
        reader.expect("view", 1, outputs, inputs, window, window)
        reader.expect("view", 1, 1, outputs, 1, 1)
        multipliers()
        kernel = values[:size].reshape(outputs, inputs, window, window).transpose(2, 3, 1, 0)
        return {(*layer.path, "kernel"): np.ascontiguousarray(kernel), (*layer.path, "bias"): values[size:]}
    if layer.kind == "affine_":
        values = reader.tensor((2 * outputs, 1, 1, 1))
        vector_views()
        reader.expect("affine mode", 0)
        return {(*layer.path, "scale"): values[:outputs], (*layer.path, "bias"): values[outputs:]}
    if layer.kind == "fc_2":
        reader.expect("outputs and inputs", outputs, inputs)
        values = reader.tensor((inputs, outputs, 1, 1))
        reader.expect("view", 1, inputs, outputs, 1, 1)
        reader.expect("view", 1, 0, 0, 0, 0)
        reader.expect("bias mode", 1)
        multipliers()
        return {(*layer.path, "kernel"): values.reshape(inputs, outputs)}
    if "pool" in layer.kind:
        reader.expect("window, stride and padding", window, window, layer.stride, layer.stride, 0, 0)
    return {}


def _parse(data: bytes) -> dict[str, Any]:
    reader = _Reader(data)
    reader.expect("loss layer version", 1)
    reader.name("loss_metric_2")
    for _ in range(2):  # margin and threshold of the training loss
        reader.real()
    layers = list(_layers())
    for layer in layers[:0:-1]:
        reader.expect("layer version", 1 if layer.kind == "tag" else 2)
    reader.where = "input"
    reader.expect("layer version", 3)
    reader.name("input_rgb_image_sized")
    means = tuple(reader.real() for _ in range(3))
    if not np.allclose(means, _MEANS, rtol=0, atol=1e-4):
        raise reader.fail(f"means {list(means)}", list(_MEANS))
    reader.expect("image size", _SIZE, _SIZE)
    found: dict[tuple[str, ...], np.ndarray] = {}
    for index, layer in enumerate(layers):
        reader.where = "/".join(layer.path) or f"{layer.kind} (layer {index})"
        if layer.kind == "tag":
            continue
        found |= _read_layer(reader, layer)
        if set(flags := reader.take(3)) - set(b"01"):
            raise reader.fail(f"bytes {flags.hex()}", "three flags")
        for _ in range(3):  # gradients and the last output, empty in a cleaned network
            reader.tensor(None)
        if index == 0:
            reader.expect("sample expansion", 1)
    if reader.position != len(data):
        raise reader.fail(f"{len(data) - reader.position} bytes more", "the end")
    return unflatten_dict({("params", *path): values for path, values in found.items()})


def read_dlib(path: Path) -> dict[str, Any]:
    """{"params": ...}, float32, for models.create("dlib_resnet"). Every size and setting in the file is checked; each affine stays scale and bias.

    BadInput in one line for truncated, foreign and oversized files: the byte and layer, what is there and what was expected.
    """
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    if path.stat().st_size > _LARGEST_FILE:
        raise BadInput(f"{path}: more than {_LARGEST_FILE >> 20} MiB, no dlib face recognition network")
    try:
        return _parse(path.read_bytes())
    except BadInput as error:
        raise BadInput(f"{path}: not dlib's face recognition network, or not whole: {error}") from None


def read(path: Path) -> Weights:
    """The `Weights` of the file: 150x150, embeddings as they come (not of unit length). Errors as in `read_dlib`."""
    preprocessing = {"size": _SIZE, "standardisation": "dlib"}
    return Weights(read_dlib(path), "dlib_resnet", {}, preprocessing, _EMBEDDING, normalise=False, thresholds={"squared": {"stated": 0.36}})
