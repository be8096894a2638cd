"""The training step: gradient caching against the gradient in one piece."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import roofline
from facenet_jax import models, parallel
from facenet_jax.layers import KEPT
from facenet_jax.losses.classification import Softmax
from facenet_jax.losses.triplet import Triplet
from facenet_jax.preprocessing import Preprocessing
from facenet_jax.training import optimizers, schedules, step


def make(mesh, microbatches, bn_groups, dropout, remat=False):
    """(fresh state, step); SGD at rate 1, so that the change of the parameters is the gradient."""
    model = models.create("small_resnet", embedding_size=8, stem=4, widths=(4, 8), depths=(1, 1), bn_groups=bn_groups, dropout=dropout)
    settings = optimizers.Optimizer("momentum")
    schedule = schedules.create("constant", 1.0, 1)
    optimizer = optimizers.create(settings, schedule)
    objective = step.Objective(Triplet("batch_all", 0.5, 5, 4), Softmax(6, 8.0, 0.1))
    state = jax.device_put(step.initial_state(model, objective, optimizer, settings, 32, 0), parallel.replicated(mesh))
    return state, step.make_train_step(model, Preprocessing(32), objective, optimizer, settings, schedule, mesh, 0, microbatches, remat)


def run(mesh, microbatches, bn_groups, rows, images, labels, dropout=0.0, remat=False):
    """One step on the rows in this order."""
    state, function = make(mesh, microbatches, bn_groups, dropout, remat)
    # The step gives its state away, and on CPU a NumPy view of it would go with it.
    before = jax.tree.map(np.array, state.params)
    state, metrics = function(state, parallel.to_global(mesh, {"image": images[rows], "label": labels[rows]}))
    return (
        jax.tree.map(lambda a, b: np.asarray(a) - b, state.params, before),
        jax.tree.map(np.asarray, state.batch_stats),
        float(metrics["loss"]),
    )


@pytest.fixture(scope="module")
def batch():
    images = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), np.uint8)
    return images, np.tile(np.arange(6), 4).astype(np.int32)


@pytest.mark.parametrize("devices", [1, 4])
def test_cached_gradient_equals_one_piece(batch, devices):
    """With BatchNorm groups that are the micro-batches, one piece normalises by the same statistics."""
    mesh = parallel.make_mesh(jax.devices()[:devices])
    pieces = 3
    # Micro-batch i is rows i, i + 3, ...; as groups they must be runs of rows.
    rows = np.arange(24)
    runs = np.concatenate([rows[i::pieces] for i in range(pieces)])
    gradients, statistics, loss = run(mesh, pieces, 1, rows, *batch)
    expected, expected_statistics, expected_loss = run(parallel.make_mesh(jax.devices()[:1]), 1, pieces, runs, *batch)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected)) > 0.01
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradients, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), statistics, expected_statistics)


@pytest.mark.parametrize("microbatches", [1, 3])
def test_rematerialised_step_is_the_same_step(batch, microbatches):
    mesh = parallel.make_mesh(jax.devices()[:2])
    rows = np.arange(24)
    kept, made_again = (run(mesh, microbatches, 1, rows, *batch, dropout=0.2, remat=remat) for remat in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), made_again, kept)


def test_rematerialisation_keeps_outputs_of_convolutions_and_blocks():
    network = models.create("small_resnet", embedding_size=8, stem=4, widths=(4, 8), depths=(1, 1))
    images = jnp.zeros((24, 32, 32, 3))
    variables = jax.eval_shape(lambda: network.init(jax.random.key(0), images, train=False))
    forward = lambda variables: network.apply(variables, images, train=True, mutable=["batch_stats"])[0]
    again = jax.checkpoint(forward, policy=jax.checkpoint_policies.save_only_these_names(KEPT))

    def kept(function):
        """Shapes of the maps that the backward pass is given."""
        pull = jax.eval_shape(lambda variables: jax.vjp(function, variables)[1], variables)
        return sorted(a.shape for a in jax.tree.leaves(pull) if 24 in a.shape and a.shape != images.shape)

    # The stem's two convolutions; a block's two and its sum; a second block's two, its shortcut and its sum.
    assert kept(again) == sorted([(24, 16, 16, 4), *[(24, 8, 8, 4)] * 4, *[(24, 4, 4, 8)] * 4])
    assert len(kept(forward)) > 1.5 * len(kept(again))


def test_maps_stay_on_their_device():
    """All that a device is told of other rows are their embeddings, labels and sums: a loop over rows that XLA cuts by itself brings all maps to all."""
    mesh = parallel.make_mesh()
    state, function = make(mesh, 1, 1, 0.0)
    cut = parallel.batch_sharded(mesh)
    batch = {
        "image": jax.ShapeDtypeStruct((24, 32, 32, 3), jnp.uint8, sharding=cut),
        "label": jax.ShapeDtypeStruct((24,), jnp.int32, sharding=cut),
    }
    found = {entry["op"]: entry["bytes"] for entry in roofline.collectives(function.lower(state, batch).compile().as_text())}
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    assert found["all-gather"] <= 24 * (8 + 1) * 4
    assert parameters <= found["all-reduce"] < 2 * parameters
    assert set(found) <= {"all-gather", "all-reduce", "reduce-scatter"}


def test_both_passes_drop_the_same_values(batch):
    """The loss is a function of the parameters: its cached gradient must be the slope along itself, dropout and all (a mean would jump with the number of triplets)."""
    mesh = parallel.make_mesh(jax.devices()[:1])

    def forward(params, images, key):
        x = images.reshape(len(images), -1).astype(jnp.float32) / 255
        hidden = jnp.tanh(x[:, :64] @ params) * jax.random.bernoulli(key, 0.5, (len(images), 8))
        return hidden, {}

    images, labels = batch
    value_of = lambda params, prelogits: step.objective_value(
        step.Objective(Triplet("batch_all", 0.5, 8, 4, "sum")), {}, prelogits, jnp.asarray(labels), jax.random.key(1), mesh
    )
    params = jax.random.normal(jax.random.key(2), (64, 8))
    cached = jax.jit(lambda p: step.cached_gradient(forward, value_of, p, jnp.asarray(images), jax.random.key(3), 4)[::2])
    value, gradient = cached(params)
    slope = jnp.vdot(gradient, gradient)
    small = 1e-2 / float(jnp.sqrt(slope))
    change = (cached(params + small * gradient)[0] - cached(params - small * gradient)[0]) / (2 * small)
    assert float(value) > 0 and float(change) == pytest.approx(float(slope), rel=0.02)
