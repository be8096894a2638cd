"""The table of networks: sizes to the last parameter, dtypes, bad arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from facenet_jax import models
from facenet_jax.errors import BadInput
from facenet_jax.models import inception_resnet_v1
from tests.references.variables import random_variables


@pytest.mark.parametrize(
    ("name", "arguments", "count"),
    [
        ("inception_resnet_v1", {"embedding_size": 128}, 22_779_312),
        ("inception_resnet_v1", {"embedding_size": 512}, 23_467_824),
        ("inception_resnet_v1", {"embedding_size": 512, "bn_scale": True}, 23_482_624),
        ("nn4_small2", {}, 3_733_968),
        ("nn4_small2", {"pooling": "definition"}, 3_733_968),
    ],
)
def test_trainable_values(name, arguments, count):
    model = models.create(name, **arguments)
    size = models.network(name).size
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, size, size, 3)), False))
    assert models.parameter_count(shapes) == count
    out = jax.eval_shape(lambda v: model.apply(v, jnp.zeros((2, size, size, 3)), False), shapes)
    assert out.shape == (2, arguments.get("embedding_size", 128))


def test_maps_of_inception_resnet_v1():
    """Spatial sizes of PAPER.md 2 at 160: 79, 77, 38, 36, 17, 8, 3."""
    model = models.create("inception_resnet_v1")

    def sizes(x):
        _, state = model.apply(model.init(jax.random.key(0), x, False), x, False, capture_intermediates=True)
        return {name: value["__call__"][0] for name, value in state["intermediates"].items() if "__call__" in value}

    shapes = jax.eval_shape(sizes, jnp.zeros((1, 160, 160, 3)))
    expected = {
        "Conv2d_1a_3x3": (79, 32),
        "Conv2d_2a_3x3": (77, 32),
        "Conv2d_3b_1x1": (38, 80),
        "Conv2d_4a_3x3": (36, 192),
        "Conv2d_4b_3x3": (17, 256),
        "Mixed_6a": (8, 896),
        "Mixed_7a": (3, 1792),
    }
    for name, (side, channels) in expected.items():
        assert shapes[name].shape == (1, side, side, channels), name


@pytest.mark.parametrize("name", ["small_resnet", "nn4_small2"])
def test_runs_in_bfloat16_with_float32_parameters(name):
    size = models.network(name).size
    model = models.create(name, dtype="bfloat16")
    variables = random_variables(model, size)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    x = jax.random.uniform(jax.random.key(1), (2, size, size, 3))
    out = jax.jit(lambda v, a: model.apply(v, a, False))(variables, x)
    exact = jax.jit(lambda v, a: models.create(name).apply(v, a, False))(variables, x)
    assert out.dtype == jnp.bfloat16
    assert np.linalg.norm(np.asarray(out, np.float32) - exact) < 0.05 * np.linalg.norm(exact)


@pytest.mark.slow
def test_branches_trained_together_are_the_branches(monkeypatch):
    """Kernels and BatchNorms that read the same input run as one in training: same output, statistics and gradients as one by one."""
    model = models.create("inception_resnet_v1", embedding_size=8)
    variables = random_variables(model, 75)
    rng = np.random.default_rng(0)
    images, weight = rng.normal(size=(4, 75, 75, 3)).astype(np.float32), rng.normal(size=(4, 8)).astype(np.float32)

    def loss(params):
        variables_ = {"params": params, "batch_stats": variables["batch_stats"]}
        y, moved = model.apply(variables_, images, train=True, mutable=["batch_stats"])
        return (y * weight).sum(), (y, moved)

    together = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    monkeypatch.setattr(inception_resnet_v1, "_together", lambda units, x, train: [unit(x, train) for unit in units])
    one_by_one = jax.jit(jax.value_and_grad(lambda p: loss(p), has_aux=True))(variables["params"])
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(one_by_one[1]))
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(one_by_one), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4 * scale)


def test_a_block_trained_together_is_its_branches(monkeypatch):
    """The same for a block of three branches and one of two."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(4, 9, 9, 24)).astype(np.float32)
    norm = {"groups": 1, "momentum": 0.9, "epsilon": 1e-3, "use_scale": False}
    for layers in (inception_resnet_v1.BLOCK35, inception_resnet_v1.BLOCK8):
        block = inception_resnet_v1._Residual(layers, 0.2, True, norm, jnp.float32)
        variables = block.init(jax.random.key(0), images, False)

        def loss(params, block=block, variables=variables):
            y, moved = block.apply({**variables, "params": params}, images, True, mutable=["batch_stats"])
            return jnp.sin(y).sum(), (y, moved)

        found = []
        for together in (inception_resnet_v1._together, lambda units, x, train: [unit(x, train) for unit in units]):
            with monkeypatch.context() as patched:
                patched.setattr(inception_resnet_v1, "_together", together)
                found.append(jax.jit(jax.value_and_grad(lambda p: loss(p), has_aux=True))(variables["params"]))
        for a, b in zip(*map(jax.tree.leaves, found), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_an_embedding_does_not_depend_on_its_company():
    model = models.create("small_resnet")
    variables = random_variables(model, 32)
    x = jax.random.uniform(jax.random.key(1), (5, 32, 32, 3))
    together = model.apply(variables, x, False)
    alone = jnp.concatenate([model.apply(variables, x[i : i + 1], False) for i in range(5)])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_bad_arguments_list_the_good_ones():
    with pytest.raises(BadInput, match=r"facenet.*inception_resnet_v1, nn4_small2, small_resnet"):
        models.create("facenet")
    with pytest.raises(BadInput, match=r"no argument 'embeding_size'.*embedding_size"):
        models.create("small_resnet", embeding_size=64)
    with pytest.raises(BadInput, match="float32 or bfloat16"):
        models.create("small_resnet", dtype="float16")
    for name, size in (("nn4_small2", 100), ("small_resnet", 50), ("inception_resnet_v1", 64)):
        with pytest.raises(BadInput, match=f"not {size}"):
            models.check_size(name, size)
