"""Folding changes the work, not the embeddings."""

import jax
import numpy as np
import pytest

from facenet_jax import folding, models
from facenet_jax.weights.portable import Weights
from tests.references.variables import random_variables

# (network, input side, BatchNorms, those that a layer feeds directly): the others normalise sums and stay.
CASES = [
    ("inception_resnet_v1", 75, 112, 112),
    ("nn4_small2", 96, 37, 37),
    ("small_resnet", 32, 15, 15),
    ("resnet50", 32, 53, 53),
    ("iresnet18", 32, 31, 22),
    ("dlib_resnet", 103, 0, 0),
]


@pytest.mark.parametrize(("name", "size", "norms", "foldable"), CASES)
def test_folded_network_gives_the_same_prelogits(name: str, size: int, norms: int, foldable: int) -> None:
    model = models.create(name)
    variables = random_variables(model, size)
    assert len(jax.tree.leaves(variables.get("batch_stats", {}))) == 2 * norms
    assert len(folding.foldable(model, size)) == foldable
    preprocessing = {"size": size, "standardisation": models.NETWORKS[name].standardisation}
    weights = Weights(variables, name, {}, preprocessing, 128)
    images = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    kept, plain = folding.network(weights, folded=False)
    folded, short = folding.network(weights)
    expected = np.asarray(jax.jit(plain)(kept, images))
    assert len(jax.tree.leaves(folded)) < len(jax.tree.leaves(kept)) or not foldable
    np.testing.assert_allclose(jax.jit(short)(folded, images), expected, atol=2e-5 * np.abs(expected).max())
