"""The ONNX converter, rule by rule: ONNX Runtime gives what JAX gives, for sizes drawn at random where sizes matter."""

import collections

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax import lax

from facenet_jax.convolution import conv2d
from facenet_jax.errors import BadInput
from facenet_jax.layers import l2_normalize, l2_pool, local_response_norm, max_pool

onnx = pytest.importorskip("onnx", reason="writes ONNX: requirements-onnx.txt")
onnxruntime = pytest.importorskip("onnxruntime", reason="runs ONNX: requirements-onnx.txt")

from facenet_jax.weights.onnx import to_onnx  # noqa: E402 - needs onnx

FEW = settings(deadline=None, max_examples=10)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def converted(function, x, variables=None):
    (batch,) = jax.export.symbolic_shape("batch")
    return to_onnx(function, variables or {}, jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype), {"a": "b"})


def check(function, x, variables=None):
    """Equal to JAX for this batch and for its first row; gives the operations of the graph, counted."""
    model = converted(function, x, variables)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    expected = np.asarray(jax.jit(function)(variables or {}, x))
    for rows in (len(x), 1):
        (found,) = session.run(["embeddings"], {"images": x[:rows]})
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected[:rows], rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    return collections.Counter(node.op_type for node in onnx.load_from_string(model).graph.node)


SIZES = {"height": st.integers(1, 9), "width": st.integers(1, 9), "window": st.tuples(st.integers(1, 4), st.integers(1, 4))}
PADS = st.one_of(st.sampled_from(["SAME", "VALID"]), st.tuples(*[st.tuples(st.integers(0, 2), st.integers(0, 2))] * 2))


@FEW
@given(**SIZES, stride=st.integers(1, 3), padding=PADS, groups=st.sampled_from([1, 2]), dilation=st.integers(1, 2))
def test_convolutions(height, width, window, stride, padding, groups, dilation):
    kernel = random(*window, 4 // groups, 6, seed=1)

    def convolve(variables, x):
        strides, dimensions = (stride, stride), ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, variables["k"], strides, padding, rhs_dilation=(dilation, 1), dimension_numbers=dimensions, feature_group_count=groups
        )

    x = random(2, height, width, 4)
    assume(0 not in jax.eval_shape(convolve, {"k": kernel}, x).shape)
    assert check(convolve, x, {"k": kernel})["Conv"] == 1


@FEW
@given(**SIZES, stride=st.integers(1, 3), padding=PADS, kind=st.sampled_from(["max", "average", "l2"]))
def test_pools(height, width, window, stride, padding, kind):
    def pool(_, x):
        if kind == "l2":
            return l2_pool(x, window[0], stride, padding)
        return {"max": nn.max_pool, "average": nn.avg_pool}[kind](x, window, (stride, stride), padding)

    size = (window[0],) * 2 if kind == "l2" else window
    # ONNX has no pools that lie in the padding as a whole.
    assume(isinstance(padding, str) or all(max(pair) < edge for pair, edge in zip(padding, size)))
    x = random(2, height, width, 3)
    assume(0 not in jax.eval_shape(pool, {}, x).shape)
    check(pool, x)


@pytest.mark.parametrize(("height", "width", "step"), [(8, 8, 2), (9, 8, 2), (1, 4, 3), (5, 2, 4), (7, 6, 3)])
def test_every_so_many_pixels(height, width, step):
    x, kernel = random(2, height, width, 3), random(3, 5)
    operations = check(lambda _, a: a[:, ::step, ::step] @ kernel, x)
    assert operations["Slice"] == 0 and operations["Conv"] == 1
    assert check(lambda _, a: a[:, ::step, ::step] * 2, x)["Slice"] == 1


@FEW
@given(pads=st.tuples(*[st.tuples(st.integers(-1, 2), st.integers(-1, 2))] * 3), size=st.integers(1, 5))
def test_pads(pads, size):
    check(lambda _, x: lax.pad(x, jnp.float32(3), ((0, 0, 0), *((*pair, 0) for pair in pads))), random(2, 3, 2 + size, 3))


def prelu(x, slope):
    return jnp.where(x > 0, x, x * slope)


KERNEL, NARROW, SLOPE = random(3, 3, 4, 4), random(4, 5), random(4)

RULES = {
    "local response": lambda x: local_response_norm(x),
    "local response, even": lambda x: local_response_norm(x, size=2, k=2.0),
    "a map flattened": lambda x: x.reshape(x.shape[0], -1) @ np.ones((6 * 5 * 4, 3), np.float32),
    "a map flattened, channels first": lambda x: x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1),
    "convolution, flattened": lambda x: conv2d(x, KERNEL, 2, "SAME").reshape(x.shape[0], -1),
    "convolution, flattened, channels first": lambda x: conv2d(x, KERNEL, 2, "SAME").transpose(0, 3, 1, 2).reshape(x.shape[0], -1),
    "mean of a map": lambda x: conv2d(x, KERNEL, 1, "SAME").mean((1, 2)),
    "mean of channels": lambda x: conv2d(x, KERNEL, 1, "SAME").mean(-1),
    "unit length": lambda x: l2_normalize(x.mean((1, 2))),
    "two layouts added": lambda x: x + conv2d(x, KERNEL, 1, "SAME"),
    "two layouts joined": lambda x: jnp.concatenate([x, conv2d(x, KERNEL, 1, "SAME"), max_pool(x, 3, 1, "SAME")], -1),
    "scaled convolution": lambda x: x + 0.1 * (conv2d(x, KERNEL, 1, "SAME") + SLOPE),
    "scaled convolution, used twice": lambda x: (lambda y: y + 0.1 * y)(conv2d(x, KERNEL, 1, "SAME") + SLOPE),
    "1x1": lambda x: conv2d(x, NARROW[None, None], 1, "SAME"),
    "relu": lambda x: nn.relu(x - 0.5),
    "prelu": lambda x: prelu(conv2d(x, KERNEL, 1, "SAME"), SLOPE),
    "where, not a prelu": lambda x: jnp.where(x > 0.5, x, x * SLOPE),
    "where, another one": lambda x: jnp.where(x > 0, x, (x + 1) * SLOPE),
    "constants of every rank": lambda x: (x - SLOPE) / 3 + np.arange(30, dtype=np.float32).reshape(6, 5, 1),
    "cast": lambda x: (x * 40).astype(jnp.uint8).astype(jnp.float32),
    "broadcast": lambda x: jnp.broadcast_to(x.sum(1, keepdims=True), x.shape) + 0,
    "powers": lambda x: jnp.sqrt(jnp.maximum(jnp.square(x), 0.25)) ** -0.75 + lax.rsqrt(jnp.square(x) + 1),
}


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule):
    check(lambda _, x: RULES[rule](x), np.abs(random(3, 6, 5, 4)))


@pytest.mark.parametrize("rule", ["relu", "prelu", "where, another one", "where, not a prelu"])
def test_signs(rule):
    operations = check(lambda _, x: RULES[rule](x), random(3, 6, 5, 4))
    assert operations["PRelu"] == (rule == "prelu") and operations["Relu"] == (rule == "relu")


def test_layouts_cost_one_transpose():
    def network(variables, x):
        for _ in range(3):
            x = x + 0.1 * nn.relu(conv2d(x, variables["kernel"], 1, "SAME") * SLOPE + SLOPE)
        x = jnp.concatenate([max_pool(x, 2, 2), x[:, ::2, ::2]], -1)
        return x.mean((1, 2)) @ np.tile(NARROW, (2, 1))

    assert check(network, random(2, 8, 8, 4), {"kernel": KERNEL})["Transpose"] == 1


def test_weights_keep_their_names():
    variables = {"params": {"one": {"kernel": KERNEL}, "two": {"kernel": KERNEL}}}
    function = lambda v, x: 2 * conv2d(conv2d(x, v["params"]["one"]["kernel"], 1, "SAME"), v["params"]["two"]["kernel"], 1, "SAME")
    model = onnx.load_from_string(converted(function, random(1, 4, 4, 4), variables))
    assert [array.name.rsplit("_", 1)[0] for array in model.graph.initializer] == ["params/one/kernel", "params/two/kernel"]
    assert {entry.key: entry.value for entry in model.metadata_props} == {"a": "b"}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda _, x: jnp.sin(x), r"no rule for the primitive sin; there are add, .*transpose"),
        (lambda _, x: x[:, ::2, 1::2], r"no rule for gather of other places than every so many \(float32\[batch,6,5,4\]"),
        (lambda _, x: x[:, :, ::-1], r"no rule for gather of this kind"),
        (lambda _, x: lax.conv_transpose(x, KERNEL, (2, 2), "SAME"), "no rule for conv_general_dilated of this kind"),
        (lambda _, x: jnp.einsum("nhwc,nhwd->ncd", x, x), r"no rule for dot_general of this kind \(float32\[batch,6,5,4\]"),
        (lambda _, x: lax.reduce_window(x, 1.0, lax.mul, (1, 2, 2, 1), (1, 1, 1, 1), "VALID"), "no rule for"),
        (lambda _, x: lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 2), (1, 1, 1, 1), "VALID"), "over such windows"),
        (lambda _, x: lax.pad(x, 0.0, ((0, 0, 0), (0, 0, 1), (0, 0, 0), (0, 0, 0))), "between elements"),
    ],
)
def test_what_has_no_rule_is_named(function, message):
    with pytest.raises(BadInput, match=message) as caught:
        converted(function, random(1, 6, 5, 4))
    assert "\n" not in str(caught.value)
