"""ResNet-50 and iResNet against PyTorch definitions of them (tests/references/torch_networks.py), with random weights and statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from facenet_jax import models
from facenet_jax.models.iresnet import DEPTHS
from facenet_jax.weights.torch import from_torch, to_torch


@pytest.fixture(scope="module")
def torch():
    module = pytest.importorskip("torch", reason="compares with PyTorch: requirements-torch.txt")
    module.set_num_threads(1)
    return module


def shapes(name, size, **arguments):
    model = models.create(name, **arguments)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, size, size, 3)), False))


def trainable(module):
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


# 33 has odd maps throughout: 17, 9, 5, 3, 2. At 32, what an iResNet flattens is 2 x 2, and so its order tells.
@pytest.mark.parametrize(("name", "size"), [("resnet50", 33), ("iresnet18", 32), ("iresnet50", 16)])
def test_the_same_embeddings_as_in_pytorch(torch, name, size):
    from tests.references.torch_networks import IResNet, ResNet50, fill

    reference = ResNet50(5) if name == "resnet50" else IResNet(DEPTHS[int(name.removeprefix("iresnet"))], size // 16, 24)
    fill(reference, 1)
    stored = {key: value.numpy() for key, value in reference.state_dict().items()}
    imported = from_torch(stored)
    assert imported.network == name and imported.embedding_size == (2048 if name == "resnet50" else 24)
    assert imported.size == (224 if name == "resnet50" else size)
    assert imported.unused == (("fc.bias", "fc.weight") if name == "resnet50" else ()) and imported.logits is None

    x = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    model = models.create(name, **imported.arguments)
    found = jax.jit(lambda variables, images: model.apply(variables, images, train=False))(imported.variables, x)
    with torch.no_grad():
        expected = reference(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    assert np.linalg.norm(expected[0] - expected[1]) > 0.05 * np.linalg.norm(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())

    back = to_torch(imported.variables, name)
    assert set(stored) - set(back) == set(imported.unused) and set(back) <= set(stored)
    assert all(np.array_equal(back[key], stored[key]) for key in back if not key.endswith("num_batches_tracked"))
    if imported.unused:
        reference.fc = torch.nn.Identity()
    reference.load_state_dict({key: torch.from_numpy(value) for key, value in back.items()}, strict=True)


def test_trainable_values(torch):
    from tests.references.torch_networks import IResNet, ResNet50

    counts = {"resnet50": 23_508_032, "iresnet18": 24_025_088, "iresnet34": 34_138_816, "iresnet50": 43_590_336, "iresnet100": 65_155_648}
    with torch.device("meta"):
        references = {"resnet50": ResNet50()} | {f"iresnet{number}": IResNet(depths) for number, depths in DEPTHS.items()}
    for name, count in counts.items():
        assert models.parameter_count(shapes(name, models.network(name).size)) == count == trainable(references[name]), name


def test_a_resnet_of_another_size_has_a_dense_layer():
    tree = shapes("resnet50", 33, embedding_size=12)
    assert models.parameter_count(tree) == 23_508_032 + 2048 * 12 + 12
    variables = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), tree)
    back = from_torch(to_torch(variables, "resnet50"))
    assert back.arguments == {"embedding_size": 12} and back.unused == ()


@pytest.mark.parametrize("name", ["resnet50", "iresnet18"])
def test_trains_in_groups_with_dropout_and_bfloat16(name):
    model = models.create(name, embedding_size=8, bn_groups=2, dropout=0.5, dtype="bfloat16")
    tree = shapes(name, 32, embedding_size=8)

    def step(variables, x):
        return model.apply(variables, x, True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)})

    out, updated = jax.eval_shape(step, tree, jnp.zeros((4, 32, 32, 3)))
    assert out.shape == (4, 8) and out.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(updated))
