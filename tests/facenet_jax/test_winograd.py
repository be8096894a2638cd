"""Minimal filtering against XLA's own convolution and its derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facenet_jax import convolution, windows, winograd

side = st.integers(3, 8)
pad = st.integers(0, 2)


@settings(max_examples=10, deadline=None)
@given(
    n=st.integers(1, 3),
    size=st.tuples(side, side),
    pads=st.tuples(st.tuples(pad, pad), st.tuples(pad, pad)),
    channels=st.tuples(side, side),
)
def test_output_and_kernel_gradient_at_any_size(n, size, pads, channels):
    rng = np.random.default_rng(n)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    x, kernel = draw(n, *size, channels[0]), draw(3, 3, *channels)
    dy = draw(n, *(side + sum(pair) - 2 for side, pair in zip(size, pads, strict=True)), channels[1])

    @jax.jit
    def both(x, kernel, dy):
        y, pull = jax.vjp(lambda k: convolution.convolve(x, k, 1, pads), kernel)
        return (y, pull(dy)[0]), (winograd.convolve(x, kernel, pads), winograd.kernel_gradient(x, dy, pads))

    expected, found = both(x, kernel, dy)
    np.testing.assert_allclose(found[0], expected[0], atol=2e-5)
    np.testing.assert_allclose(found[1], expected[1], atol=5e-5)


@pytest.mark.parametrize("padding", ["SAME", "VALID", ((2, 0), (1, 2))])
def test_where_it_pays_a_convolution_and_both_its_gradients_are_filtered(padding):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    x, kernel = draw(16, 9, 8, 64), draw(3, 3, 64, 66)
    pads = windows.explicit_padding((9, 8), (3, 3), 1, padding)
    assert winograd.pays(x.shape, kernel.shape, 1, pads)
    dy = draw(16, *(side + sum(pair) - 2 for side, pair in zip((9, 8), pads, strict=True)), 66)

    def with_gradients(function, x, kernel, dy):
        y, pull = jax.vjp(lambda a, k: function(a, k, 1, padding), x, kernel)
        return y, *pull(dy)

    results = (
        jax.jit(with_gradients, static_argnums=0)(function, x, kernel, dy) for function in (convolution.conv2d, convolution.convolve)
    )
    for found, expected in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("images", "kernel", "stride"),
    [
        ((16, 9, 9, 64), (3, 3, 64, 64), 2),
        ((16, 9, 9, 64), (1, 7, 64, 64), 1),
        ((16, 9, 9, 32), (3, 3, 32, 64), 1),
        ((1, 9, 9, 64), (3, 3, 64, 64), 1),
    ],
)
def test_other_convolutions_are_left_alone(images, kernel, stride):
    assert not winograd.pays(images, kernel, stride, [(1, 1), (1, 1)])
