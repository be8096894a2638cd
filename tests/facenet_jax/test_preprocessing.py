"""Standardisations against the original code's arithmetic."""

import jax.numpy as jnp
import numpy as np
import pytest

from facenet_jax.errors import BadInput
from facenet_jax.preprocessing import Preprocessing


def test_rules():
    x = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    np.testing.assert_allclose(Preprocessing(8, "fixed")(jnp.asarray(x)), (x.astype(float) - 127.5) / 128, atol=1e-6)
    np.testing.assert_allclose(Preprocessing(8, "unit")(jnp.asarray(x)), x / 255, atol=1e-6)
    for row, found in zip(x, Preprocessing(8, "per_image")(jnp.asarray(x)), strict=True):
        expected = (row - row.mean()) / max(row.std(), 1 / np.sqrt(row.size))
        np.testing.assert_allclose(found, expected, atol=1e-5)
    flat = np.full((1, 8, 8, 3), 7, np.uint8)
    assert not np.asarray(Preprocessing(8, "per_image")(jnp.asarray(flat))).any()


def test_unknown_rule_lists_the_known():
    with pytest.raises(BadInput, match="fixed, per_image"):
        Preprocessing(160, "whiten")
