"""Options for the compiler: given where it knows them, and to no other."""

import jax
import jax.numpy as jnp
import pytest

from facenet_jax import compiling


@pytest.fixture(autouse=True)
def asked_anew():
    compiling.options.cache_clear()
    yield
    compiling.options.cache_clear()


def test_a_cpu_compiles_convolutions_itself_and_others_are_told_nothing():
    options = compiling.options("cpu")
    assert options and compiling.options("tpu") == compiling.options("gpu") == {}
    convolve = lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x, kernel = jnp.ones((8, 16, 16, 32)), jnp.ones((3, 3, 32, 32))
    text = jax.jit(convolve, compiler_options=options).lower(x, kernel).compile().as_text()
    assert "ynn_fusion" not in text.split("ENTRY")[1]


def test_what_the_user_says_goes_before(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=")
    assert compiling.options("cpu") == {}


def test_a_compiler_that_does_not_know_the_option_is_not_told(monkeypatch):
    monkeypatch.setattr(compiling, "_CPU", {"xla_no_such_option": "1"})
    assert compiling.options("cpu") == {}
