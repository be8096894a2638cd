"""Mined triplet loss against the oracle, on any mesh, at any block size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facenet_jax import mining, parallel
from facenet_jax.errors import BadInput
from facenet_jax.layers import l2_normalize
from facenet_jax.losses.triplet import Triplet, explicit_triplet_loss, mined_triplet_loss
from tests.references import triplets as oracle


def ours(embeddings, labels, mask, settings_, mesh, draw=3):
    def loss(e):
        return mined_triplet_loss(e, jnp.asarray(labels), jnp.asarray(mask), jnp.uint32(draw), mesh, settings_)

    embeddings = jax.device_put(jnp.asarray(embeddings), parallel.batch_sharded(mesh))
    (value, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(embeddings)
    return float(value), np.asarray(gradient), {k: float(v) for k, v in metrics.items()}


def batch(people, images, dimensions, seed, spread=0.6):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(rng.integers(0, 1 << 30, people), images))
    centres = {label: rng.normal(size=dimensions) for label in labels}
    rows = np.stack([centres[label] + spread * rng.normal(size=dimensions) for label in labels])
    return np.asarray(l2_normalize(jnp.asarray(rows))), labels.astype(np.int32)


@pytest.mark.parametrize("rule", mining.RULES)
def test_equals_oracle(rule, mesh):
    embeddings, labels = batch(8, 4, 12, seed=1, spread=1.0)
    mask = np.ones(32, bool)
    mask[[3, 17, 30]] = False
    expected, gradient = oracle.loss_and_gradient(embeddings, oracle.select(embeddings, labels, mask, rule, 0.3, 3), 0.3)
    value, ours_gradient, metrics = ours(embeddings, labels, mask, Triplet(rule, 0.3, 3, 4), mesh)
    assert expected > 0.01
    assert value == pytest.approx(expected, abs=1e-5)
    np.testing.assert_allclose(ours_gradient, gradient, atol=1e-5)
    assert metrics["triplets"] == len(oracle.select(embeddings, labels, mask, rule, 0.3, 3))


@settings(max_examples=12, deadline=None)
@given(
    people=st.integers(1, 6),
    images=st.integers(1, 5),
    masked=st.integers(0, 8),
    rule=st.sampled_from(sorted(mining.RULES)),
    margin=st.sampled_from([0.05, 0.2, 1.0]),
    devices=st.sampled_from([1, 2, 8]),
    block=st.sampled_from([1, 2, 7, 100]),
    seed=st.integers(0, 10_000),
)
def test_any_batch_on_any_mesh(people, images, masked, rule, margin, devices, block, seed):
    embeddings, labels = batch(people, images, 6, seed)
    missing = -len(labels) % 8
    embeddings = np.concatenate([embeddings, np.zeros((missing, 6), np.float32)])
    labels = np.concatenate([labels, np.full(missing, labels[0], np.int32)])
    mask = np.arange(len(labels)) < len(labels) - missing
    mask[np.random.default_rng(seed).permutation(len(mask))[:masked]] = False
    chosen = oracle.select(embeddings, labels, mask, rule, margin, 3)
    expected, gradient = oracle.loss_and_gradient(embeddings, chosen, margin)
    value, ours_gradient, metrics = ours(
        embeddings, labels, mask, Triplet(rule, margin, block, max(images, 2)), parallel.make_mesh(jax.devices()[:devices])
    )
    assert metrics["triplets"] == len(chosen)
    assert value == pytest.approx(expected, abs=1e-5)
    np.testing.assert_allclose(ours_gradient, gradient, atol=1e-5)


@pytest.mark.parametrize("rule", mining.RULES)
def test_no_positive_no_negative_and_duplicates_are_harmless(rule, mesh):
    embeddings, _ = batch(16, 1, 8, seed=2)
    for labels in (np.arange(16), np.zeros(16, int)):
        value, gradient, _ = ours(embeddings, labels.astype(np.int32), np.ones(16, bool), Triplet(rule, 0.2, 8, 16), mesh)
        assert value == 0 and not gradient.any()
    same = np.repeat(embeddings[:1], 16, 0)
    value, gradient, _ = ours(same, np.repeat(np.arange(8), 2).astype(np.int32), np.ones(16, bool), Triplet(rule, 0.2, 8, 2), mesh)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_low_precision_embeddings_are_mined_in_float32():
    mesh = parallel.make_mesh(jax.devices()[:1])
    embeddings, labels = batch(8, 4, 16, seed=5)
    half = jnp.asarray(embeddings, jnp.bfloat16)
    value, gradient, _ = ours(half, labels, np.ones(32, bool), Triplet(), mesh)
    exact = np.asarray(half, np.float32)
    expected, _ = oracle.loss_and_gradient(exact, oracle.select(exact, labels, np.ones(32, bool), "semi_hard", 0.2, 3), 0.2)
    assert value == pytest.approx(expected, abs=1e-5)
    assert gradient.dtype == jnp.bfloat16


def test_more_images_than_promised_poison_the_loss():
    embeddings, labels = batch(2, 6, 4, seed=0)
    mesh = parallel.make_mesh(jax.devices()[:1])
    assert np.isnan(ours(embeddings, labels, np.ones(12, bool), Triplet(max_images=5), mesh)[0])


def test_golden_loss_and_gradients(shared):
    golden = np.load(shared / "golden" / "losses.npz", allow_pickle=False)
    rows = [jnp.asarray(golden[name]) for name in ("anchor", "positive", "negative")]
    value, gradients = jax.value_and_grad(explicit_triplet_loss, argnums=(0, 1, 2))(*rows, float(golden["triplet_alpha"]))
    assert float(value) == pytest.approx(float(golden["triplet_loss"]), abs=1e-6)
    for name, gradient in zip(("anchor", "positive", "negative"), gradients, strict=True):
        np.testing.assert_allclose(gradient, golden[f"grad_{name}"], atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"rule": "semihard"}, "semi_hard, semi_hard_random"), ({"margin": 0.0}, "margin"), ({"reduction": "none"}, "mean or sum")],
)
def test_bad_settings_name_the_remedy(arguments, words):
    with pytest.raises(BadInput, match=words):
        Triplet(**arguments)
