"""A JAX computation as an ONNX graph: the primitives of inference, one small rule each.

The jaxpr is walked with its calls inlined. What depends on the weights alone is computed here; the rest becomes nodes. JAX's maps are NHWC, ONNX's
NCHW: every tensor carries the order that its axes have in the graph, and a Transpose is written only where an operation needs another one.
A network then has one after its input and, where it flattens a map, one before the dense layer. Needs requirements-onnx.txt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import onnx
from onnx import helper, numpy_helper

from facenet_jax.errors import BadInput

# Read by ONNX Runtime 1.12 (2022) and later.
_OPSET, _IR_VERSION = 17, 8

_ELEMENTWISE = {
    "add": "Add",
    "sub": "Sub",
    "mul": "Mul",
    "div": "Div",
    "max": "Max",
    "pow": "Pow",
    "gt": "Greater",
    "sqrt": "Sqrt",
    "neg": "Neg",
}
# Where a map's axes n, c, h, w are in [n, h, w, c].
_MAP = (0, 3, 1, 2)
_CALLS = {"jit": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}


@dataclass(frozen=True)
class _Constant:
    """An array in JAX's order of axes, 1 long where the batch would be, and the path of the weight it comes from."""

    array: np.ndarray
    path: str = ""


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the graph: its axis i is axis order[i] of the JAX value."""

    name: str
    order: tuple[int, ...]


_Value = _Constant | _Tensor


class _Graph:
    """Nodes and constants written so far."""

    def __init__(self) -> None:
        self.made: dict[str, onnx.NodeProto] = {}
        self.arrays: dict[str, np.ndarray] = {}

    def emit(self, op: str, inputs: Sequence[str], order: Sequence[int], name: str = "", **attributes: Any) -> _Tensor:
        name = name or f"{op}_{len(self.made)}"
        self.made[name] = helper.make_node(op, list(inputs), [name], name=name, **attributes)
        return _Tensor(name, tuple(order))

    def constant(self, array: np.ndarray, path: str = "") -> str:
        name = path or f"constant_{len(self.arrays)}"
        name = f"{name}_{len(self.arrays)}" if name in self.arrays else name
        self.arrays[name] = np.asarray(array)
        return name

    def integers(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def ordered(self, value: _Value, order: Sequence[int]) -> str:
        """The name under which the value's axes are in this order."""
        if isinstance(value, _Constant):
            return self.constant(value.array.transpose(order), value.path)
        if value.order == tuple(order):
            return value.name
        name = f"{value.name}_{''.join(map(str, order))}"
        if name not in self.made:
            self.emit("Transpose", [value.name], order, name, perm=[value.order.index(axis) for axis in order])
        return name

    def maker(self, value: _Value, op: str) -> onnx.NodeProto | None:
        """The node that made the value, where it is an `op`."""
        node = self.made.get(value.name) if isinstance(value, _Tensor) else None
        return node if node is not None and node.op_type == op else None

    def needed(self, output: str) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
        """The nodes and constants that the output depends on, in order."""
        names = {output}
        for name, node in reversed(self.made.items()):
            if name in names:
                names.update(node.input)
        nodes = [node for name, node in self.made.items() if name in names]
        return nodes, [numpy_helper.from_array(array, name) for name, array in self.arrays.items() if name in names]


def _unsupported(eqn: Any, why: str) -> BadInput:
    return BadInput(f"ONNX: no rule for {eqn.primitive.name} {why} ({', '.join(str(v.aval) for v in eqn.invars)})")


def _sizes(shape: Sequence[Any], batch: int) -> list[int]:
    """A shape with `batch` in place of the symbolic size."""
    return [size if isinstance(size, int) else batch for size in shape]


def _scaled(graph: _Graph, x: _Tensor, factor: float) -> _Tensor | None:
    """What a convolution gave, with or without a bias, times a number: the number goes into the weights, as a runtime would not do by itself."""
    if (added := graph.maker(x, "Add")) and added.input[1] in graph.arrays:
        y = _scaled(graph, _Tensor(added.input[0], x.order), factor)
        bias = graph.arrays[added.input[1]] * np.float32(factor)
        return y and graph.emit("Add", [y.name, graph.constant(bias, added.input[1])], x.order)
    if convolution := graph.maker(x, "Conv"):
        source, kernel = convolution.input
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in convolution.attribute}
        scaled = graph.constant(graph.arrays[kernel] * np.float32(factor), kernel)
        return graph.emit("Conv", [source, scaled], x.order, **attributes)
    return None


def _elementwise(graph: _Graph, eqn: Any, values: Sequence[Any], op: str) -> _Tensor:
    shape = eqn.outvars[0].aval.shape
    whole = [value for value, v in zip(values, eqn.invars) if isinstance(value, _Tensor) and v.aval.shape == shape]
    if not whole:
        raise _unsupported(eqn, "where every operand is broadcast")
    # Where layouts meet, that of the convolutions.
    order = next((value.order for value in whole if value.order != tuple(sorted(value.order))), whole[0].order)

    def operand(value: _Value) -> str:
        if isinstance(value, _Constant) and value.array.size and (value.array == value.array.flat[0]).all():
            return graph.constant(value.array.flat[0])
        rank = value.array.ndim if isinstance(value, _Constant) else len(value.order)
        return graph.ordered(value, order if rank else ())

    if op == "Mul":
        numbers = [value.array.item() for value in values if isinstance(value, _Constant) and value.array.size == 1]
        if numbers and (scaled := _scaled(graph, whole[0], numbers[0])):
            return scaled
    zero = [isinstance(value, _Constant) and not value.array.any() for value in values]
    if op == "Add" and any(zero):
        return whole[0]
    if op == "Max" and any(zero):
        return graph.emit("Relu", [whole[0].name], order)
    if op == "Add" and (maximum := graph.maker(values[0], "Max")):
        # layers.add_relu: max(x, -y) + y.
        x, negative = maximum.input
        if negative in graph.made and graph.made[negative].op_type == "Neg" and graph.made[negative].input[0] == operand(values[1]):
            total = graph.emit("Add", [x, operand(values[1])], order)
            return graph.emit("Relu", [total.name], order)
    return graph.emit(op, [operand(value) for value in values], order)


def _select(graph: _Graph, eqn: Any, values: Sequence[Any]) -> _Value:
    """where(p, b, a). An iResNet's where(x > 0, x, slope * x) is a PRelu."""
    condition, scaled, x = values
    greater, product = graph.maker(condition, "Greater"), graph.maker(scaled, "Mul")
    if greater and product and isinstance(x, _Tensor) and greater.input[0] == product.input[0] == x.name:
        limit, slope = graph.arrays.get(greater.input[1]), graph.arrays.get(product.input[1])
        if limit is not None and slope is not None and not limit.any():
            return graph.emit("PRelu", [x.name, product.input[1]], x.order)
    return _elementwise(graph, eqn, (condition, x, scaled), "Where")


def _square(graph: _Graph, eqn: Any, values: Sequence[Any]) -> _Value:
    return _elementwise(graph, eqn, [values[0], values[0]], "Mul")


def _rsqrt(graph: _Graph, eqn: Any, values: Sequence[Any]) -> _Value:
    root = _elementwise(graph, eqn, values, "Sqrt")
    return graph.emit("Reciprocal", [root.name], root.order)


def _cast(graph: _Graph, eqn: Any, values: Sequence[Any]) -> _Value:
    (value,), dtype = values, eqn.params["new_dtype"]
    if dtype == eqn.invars[0].aval.dtype:
        return value
    return graph.emit("Cast", [value.name], value.order, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def _convolution(graph: _Graph, eqn: Any, values: Sequence[Any]) -> _Value:
    p, (x, kernel) = eqn.params, values
    if not isinstance(kernel, _Constant) or set(p["lhs_dilation"]) != {1} or p["batch_group_count"] != 1:
        raise _unsupported(eqn, "of this kind")
    lhs, rhs, out = p["dimension_numbers"]
    (tops, bottoms), window, strides = zip(*p["padding"]), [kernel.array.shape[axis] for axis in rhs[2:]], p["window_strides"]
    if window == [1, 1] and not any(tops + bottoms) and (sliced := graph.maker(x, "Slice")):
        x, strides = _unsliced(graph, sliced, strides)
    return graph.emit(
        "Conv",
        [graph.ordered(x, lhs), graph.ordered(kernel, rhs)],
        out,
        kernel_shape=window,
        strides=strides,
        pads=[*tops, *bottoms],
        dilations=p["rhs_dilation"],
        group=p["feature_group_count"],
    )


def _unsliced(graph: _Graph, sliced: onnx.NodeProto, strides: Sequence[int]) -> tuple[_Tensor, list[int]]:
    """What every so many pixels were taken of, and the strides with which a 1x1 convolution takes them itself."""
    steps = graph.arrays[sliced.input[4]].tolist()
    return _Tensor(sliced.input[0], _MAP), [step * stride for step, stride in zip(steps, strides)]


def _dot(graph: _Graph, eqn: Any, values: Sequence[Any]) -> _Value:
    """A matrix product, or where x is a map, the 1x1 convolution that it is."""
    (x, matrix), contracted = values, eqn.params["dimension_numbers"]
    rank = len(eqn.invars[0].aval.shape)
    if not isinstance(matrix, _Constant) or contracted != (((rank - 1,), (0,)), ((), ())) or matrix.array.ndim != 2 or rank not in (2, 4):
        raise _unsupported(eqn, "of this kind")
    if rank == 2:
        return graph.emit("MatMul", [graph.ordered(x, (0, 1)), graph.ordered(matrix, (0, 1))], (0, 1))
    strides = [1, 1]
    if sliced := graph.maker(x, "Slice"):
        x, strides = _unsliced(graph, sliced, strides)
    kernel = graph.constant(matrix.array.T[:, :, None, None], matrix.path)
    return graph.emit("Conv", [graph.ordered(x, _MAP), kernel], _MAP, kernel_shape=(1, 1), strides=strides)


def _gather(graph: _Graph, eqn: Any, values: Sequence[Any]) -> _Value:
    """x[:, ::s, ::s], which is a gather where the batch has no fixed size."""
    (x, indices), numbers, (_, height, width, _) = values, eqn.params["dimension_numbers"], eqn.invars[0].aval.shape
    kind = numbers.offset_dims, numbers.collapsed_slice_dims, numbers.start_index_map
    if not isinstance(indices, _Constant) or kind != ((0, 3), (1, 2), (1, 2)):
        raise _unsupported(eqn, "of this kind")
    rows, columns = indices.array[:, 0, 0], indices.array[0, :, 1]
    steps = [int(places[1]) if len(places) > 1 else size for places, size in ((rows, height), (columns, width))]
    grid = np.meshgrid(np.arange(0, height, steps[0]), np.arange(0, width, steps[1]), indexing="ij")
    if not np.array_equal(np.stack(grid, -1), indices.array):
        raise _unsupported(eqn, "of other places than every so many")
    limits = graph.integers(0, 0), graph.integers(height, width), graph.integers(2, 3), graph.integers(*steps)
    return graph.emit("Slice", [graph.ordered(x, _MAP), *limits], _MAP)


def _window(graph: _Graph, eqn: Any, values: Sequence[Any], op: str) -> _Value:
    """Maximum or sum over a window. Over channels, a map is read as [n, 1, c, h * w]."""
    p = eqn.params
    window, strides, padding = p["window_dimensions"], p["window_strides"], p["padding"]
    used = {axis for axis in range(len(window)) if (window[axis], strides[axis], *padding[axis]) != (1, 1, 0, 0)}
    if len(window) != 4 or not (used <= {1, 2} or used == {3}) or {*p["base_dilation"], *p["window_dilation"]} != {1}:
        raise _unsupported(eqn, "over such windows")
    over_channels, name = used == {3}, graph.ordered(values[0], _MAP)
    if over_channels:
        name = graph.emit("Reshape", [name, graph.integers(0, 1, eqn.invars[0].aval.shape[3], -1)], _MAP).name
    # Axis 0 is the batch's: its window is 1, unpadded.
    axes = (3, 0) if over_channels else (1, 2)
    attributes: dict[str, Any] = {
        "kernel_shape": [window[axis] for axis in axes],
        "strides": [strides[axis] for axis in axes],
        "pads": [padding[axis][side] for side in (0, 1) for axis in axes],
    }
    if op == "AveragePool":
        attributes["count_include_pad"] = 1
    y = graph.emit(op, [name], _MAP, **attributes)
    if op == "AveragePool":
        y = graph.emit("Mul", [y.name, graph.constant(np.array(np.prod(window), np.float32))], _MAP)
    if over_channels:
        _, height, width, channels = eqn.outvars[0].aval.shape
        y = graph.emit("Reshape", [y.name, graph.integers(0, channels, height, width)], _MAP)
    return y


def _general_window(graph: _Graph, eqn: Any, values: Sequence[Any]) -> _Value:
    body, start = eqn.params["jaxpr"], values[1]
    if [inner.primitive.name for inner in body.eqns] != ["add"] or not isinstance(start, _Constant) or start.array.any():
        raise _unsupported(eqn, "of this kind")
    return _window(graph, eqn, values, "AveragePool")


def _pad(graph: _Graph, eqn: Any, values: Sequence[Any]) -> _Value:
    (x, fill), config = values, eqn.params["padding_config"]
    if any(interior for _, _, interior in config) or not isinstance(fill, _Constant):
        raise _unsupported(eqn, "between elements")
    if not any(low or high for low, high, _ in config):
        return x
    pads = graph.integers(*(config[axis][side] for side in (0, 1) for axis in x.order))
    return graph.emit("Pad", [x.name, pads, graph.constant(fill.array)], x.order)


def _sum(graph: _Graph, eqn: Any, values: Sequence[Any]) -> _Value:
    (x,), axes = values, eqn.params["axes"]
    left = [axis for axis in x.order if axis not in axes]
    places = sorted(x.order.index(axis) for axis in axes)
    return graph.emit("ReduceSum", [x.name, graph.integers(*places)], [sorted(left).index(axis) for axis in left], keepdims=0)


def _concatenate(graph: _Graph, eqn: Any, values: Sequence[Any]) -> _Value:
    if not all(isinstance(value, _Tensor) for value in values):
        raise _unsupported(eqn, "with constants")
    order = max(value.order for value in values)
    names = [graph.ordered(value, order) for value in values]
    return graph.emit("Concat", names, order, axis=order.index(eqn.params["dimension"]))


def _transpose(graph: _Graph, eqn: Any, values: Sequence[Any]) -> _Value:
    permutation = eqn.params["permutation"]
    return _Tensor(values[0].name, tuple(permutation.index(axis) for axis in values[0].order))


def _reshape(graph: _Graph, eqn: Any, values: Sequence[Any]) -> _Value:
    shape = eqn.outvars[0].aval.shape
    if sum(not isinstance(size, int) for size in shape) > 1:
        raise _unsupported(eqn, "with more than one free size")
    return _reshaped(graph, eqn, values[0], _sizes(shape, -1))


def _reshaped(graph: _Graph, eqn: Any, x: _Value, sizes: list[int]) -> _Tensor:
    name = graph.ordered(x, range(len(eqn.invars[0].aval.shape)))
    return graph.emit("Reshape", [name, graph.integers(*sizes)], range(len(sizes)))


def _broadcast(graph: _Graph, eqn: Any, values: Sequence[Any]) -> _Value:
    axes, shape, before = eqn.params["broadcast_dimensions"], eqn.outvars[0].aval.shape, eqn.invars[0].aval.shape
    sizes = [before[axes.index(axis)] if axis in axes else 1 for axis in range(len(shape))]
    x = _reshaped(graph, eqn, values[0], _sizes(sizes, -1))
    if tuple(sizes) == tuple(shape):
        return x
    return graph.emit("Expand", [x.name, graph.integers(*_sizes(shape, 1))], x.order)


_Rule = Callable[[_Graph, Any, Sequence[Any]], _Value]


def _with(rule: Callable[..., _Value], op: str) -> _Rule:
    return lambda graph, eqn, values: rule(graph, eqn, values, op)


_RULES: dict[str, _Rule] = {
    **{primitive: _with(_elementwise, op) for primitive, op in _ELEMENTWISE.items()},
    "select_n": _select,
    "square": _square,
    "rsqrt": _rsqrt,
    "convert_element_type": _cast,
    "conv_general_dilated": _convolution,
    "dot_general": _dot,
    "gather": _gather,
    "reduce_window_max": _with(_window, "MaxPool"),
    "reduce_window_sum": _with(_window, "AveragePool"),
    "reduce_window": _general_window,
    "pad": _pad,
    "reduce_sum": _sum,
    "concatenate": _concatenate,
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _reshape,
    "broadcast_in_dim": _broadcast,
    # A mark for rematerialisation.
    "name": lambda graph, eqn, values: values[0],
}


def _folded(eqn: Any, values: Sequence[Any]) -> _Constant:
    """The equation computed now; the batch, which only a broadcast can bring in, is 1 long."""
    params, arrays = dict(eqn.params), [value.array for value in values]
    if "shape" in params:
        params["shape"] = tuple(_sizes(params["shape"], 1))
    path = next((value.path for value in values if value.path), "")
    return _Constant(np.asarray(eqn.primitive.bind(*arrays, **params)), path)


def _walk(graph: _Graph, jaxpr: Any, constants: Sequence[Any], values: Sequence[_Value]) -> list[_Value]:
    known: dict[Any, _Value] = dict(zip(jaxpr.constvars, (_Constant(np.asarray(array)) for array in constants)))
    known |= dict(zip(jaxpr.invars, values))
    read = lambda v: _Constant(np.asarray(v.val, v.aval.dtype)) if hasattr(v, "val") else known[v]
    for eqn in jaxpr.eqns:
        inputs, name = [read(v) for v in eqn.invars], eqn.primitive.name
        if name in _CALLS:
            inner = eqn.params[_CALLS[name]]
            outputs = _walk(graph, inner.jaxpr, inner.consts, inputs)
        elif name == "platform_index":
            # Where a layer is written for each platform, the way of those that are not named.
            outputs = [_Constant(np.asarray(eqn.params["platforms"].index(None), np.int32))]
        elif name == "cond" and isinstance(inputs[0], _Constant):
            branch = eqn.params["branches"][int(inputs[0].array)]
            outputs = _walk(graph, branch.jaxpr, branch.consts, inputs[1:])
        elif all(isinstance(value, _Constant) for value in inputs):
            outputs = [_folded(eqn, inputs)]
        elif name in _RULES:
            outputs = [_RULES[name](graph, eqn, inputs)]
        else:
            raise BadInput(f"ONNX: no rule for the primitive {name}; there are {', '.join(sorted({*_RULES, *_CALLS}))}")
        known |= dict(zip(eqn.outvars, outputs))
    return [read(v) for v in jaxpr.outvars]


def _described(name: str, aval: Any) -> onnx.ValueInfoProto:
    shape = [size if isinstance(size, int) else str(size) for size in aval.shape]
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(aval.dtype)), shape)


def to_onnx(
    function: Callable[[Any, jax.Array], jax.Array], variables: Any, images: jax.ShapeDtypeStruct, metadata: dict[str, str]
) -> bytes:
    """`function(variables, images)` as a checked ONNX model: input "images", output "embeddings", the variables inside, `metadata` as properties.

    The first size of `images` may be symbolic (jax.export.symbolic_shape). A primitive without a rule is a `BadInput`.
    """
    closed = jax.make_jaxpr(function)(variables, images)
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    constants = [_Constant(np.asarray(leaf), jax.tree_util.keystr(path, simple=True, separator="/")) for path, leaf in leaves]
    graph = _Graph()
    source = _Tensor("images", tuple(range(len(images.shape))))
    (result,), (aval,) = _walk(graph, closed.jaxpr, closed.consts, [*constants, source]), closed.out_avals
    graph.emit("Identity", [graph.ordered(result, range(len(aval.shape)))], (), name="embeddings")
    nodes, arrays = graph.needed("embeddings")
    model = helper.make_model(
        helper.make_graph(nodes, "facenet_jax", [_described("images", images)], [_described("embeddings", aval)], arrays),
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
        producer_name="facenet_jax",
    )
    helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()
