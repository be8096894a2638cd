"""Convolutions and their gradients, each way of computing them, against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facenet_jax import convolution, windows


def conv_loops(x, kernel, stride, pads):
    padded = np.pad(x.astype(np.float64), ((0, 0), *pads, (0, 0)))
    kh, kw = kernel.shape[:2]
    oh, ow = ((padded.shape[1 + a] - kernel.shape[a]) // stride + 1 for a in (0, 1))
    out = np.zeros((len(x), oh, ow, kernel.shape[-1]))
    for i in range(oh):
        for j in range(ow):
            window = padded[:, i * stride : i * stride + kh, j * stride : j * stride + kw]
            out[:, i, j] = np.tensordot(window, kernel.astype(np.float64), 3)
    return out


SHAPES = [
    ((1, 1), 1, "SAME"),
    ((1, 1), 2, "VALID"),
    ((3, 3), 1, "SAME"),
    ((3, 3), 2, "SAME"),
    ((3, 3), 2, "VALID"),
    ((1, 7), 1, "SAME"),
    ((7, 1), 1, "SAME"),
    ((7, 7), 2, ((3, 3), (3, 3))),
    ((5, 3), 2, ((2, 1), (0, 2))),
    ((2, 3), 3, "VALID"),
]


# Few channels and many take different ways.
@pytest.mark.parametrize("channels", [3, 6])
@pytest.mark.parametrize(("window", "stride", "padding"), SHAPES)
def test_convolution_and_its_gradients(window, stride, padding, channels):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 9, 8, channels)).astype(np.float32)
    kernel = rng.normal(size=(*window, channels, 5)).astype(np.float32)
    pads = windows.explicit_padding((9, 8), window, stride, padding)
    expected = conv_loops(x, kernel, stride, pads)
    out, pull = jax.vjp(lambda a, k: convolution.conv2d(a, k, stride, padding), jnp.asarray(x), jnp.asarray(kernel))
    np.testing.assert_allclose(out, expected, atol=1e-4)
    dy = rng.normal(size=expected.shape).astype(np.float32)
    dx, dkernel = pull(jnp.asarray(dy))
    # A convolution is linear in each argument: its gradient's inner product with a direction is the output's change along it.
    for direction, gradient, change in (
        (d := rng.normal(size=x.shape), dx, conv_loops(d, kernel, stride, pads)),
        (d := rng.normal(size=kernel.shape), dkernel, conv_loops(x, d, stride, pads)),
    ):
        assert (np.asarray(gradient) * direction).sum() == pytest.approx((dy * change).sum(), rel=1e-4)


@settings(max_examples=10, deadline=None)
@given(n=st.integers(1, 13), side=st.integers(3, 9), limit=st.sampled_from([1, 500, 1 << 20]))
def test_kernel_gradient_by_patches_at_any_size(n, side, limit):
    rng = np.random.default_rng(n)
    x, dy = (jnp.asarray(rng.normal(size=(n, side, side, 2)), jnp.float32) for _ in range(2))
    expected = jax.vjp(lambda k: convolution.convolve(x, k, 1, "SAME"), jnp.zeros((3, 3, 2, 2)))[1](dy)[0]
    before, convolution._PATCH_FLOATS = convolution._PATCH_FLOATS, limit
    try:
        found = convolution._kernel_gradient_by_patches(x, dy, (3, 3, 2, 2), 1, "SAME")
    finally:
        convolution._PATCH_FLOATS = before
    np.testing.assert_allclose(found, expected, atol=1e-3)


@settings(max_examples=10, deadline=None)
@given(sizes=st.tuples(*[st.integers(1, 4)] * 4, st.integers(0, 3), st.integers(0, 4)))
def test_convolution_by_rows(sizes):
    high, wide, channels, features, *more = sizes
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, high + more[0], wide + more[1], channels)).astype(np.float32)
    kernel = rng.normal(size=(high, wide, channels, features)).astype(np.float32)
    found = convolution.convolve_by_rows(jnp.asarray(x), jnp.asarray(kernel))
    np.testing.assert_allclose(found, conv_loops(x, kernel, 1, [(0, 0), (0, 0)]), atol=1e-4)


@pytest.mark.parametrize("inner", [convolution.convolve_valid, convolution.convolve_by_rows])
def test_convolution_by_squares(inner):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 9, 8, 3)).astype(np.float32), rng.normal(size=(4, 3, 3, 5)).astype(np.float32)
    found = convolution.convolve_by_squares(jnp.asarray(x), jnp.asarray(kernel), ((1, 2), (0, 1)), inner)
    np.testing.assert_allclose(found, conv_loops(x, kernel, 2, [(1, 2), (0, 1)]), atol=1e-4)
