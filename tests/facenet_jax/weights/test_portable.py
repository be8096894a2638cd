"""The weights file: round trip, fingerprint, and every kind of broken file."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facenet_jax import models
from facenet_jax.errors import BadInput
from facenet_jax.inference import Embedder, load
from facenet_jax.weights.portable import Weights, load_weights, save_weights

ARGUMENTS = {"embedding_size": 8, "stem": 4, "widths": [4, 8], "depths": [1, 1]}


@pytest.fixture(scope="module")
def weights():
    variables = jax.tree.map(np.asarray, models.initialise(models.create("small_resnet", **ARGUMENTS), jax.random.key(0), 32))
    return Weights(
        variables, "small_resnet", ARGUMENTS, {"size": 32, "standardisation": "fixed"}, 8, thresholds={"squared": {"far_0.001": 1.1}}
    )


def test_round_trip(weights, tmp_path):
    path = tmp_path / "w.safetensors"
    fingerprint = save_weights(path, weights)
    found = load_weights(path)
    assert found.fingerprint == fingerprint and found.thresholds == weights.thresholds and list(tmp_path.iterdir()) == [path]
    jax.tree.map(np.testing.assert_array_equal, found.variables, weights.variables)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    np.testing.assert_array_equal(load(path)(images), Embedder(weights)(images))
    assert dataclasses.replace(weights, preprocessing={"size": 32, "standardisation": "per_image"}).fingerprint != fingerprint


def test_embedder(weights):
    embedder = Embedder(weights)
    images = np.random.default_rng(0).integers(0, 256, (150, 32, 32, 3), np.uint8)
    found = embedder(images)
    assert found.shape == (150, 8) and found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(found[:3], np.concatenate([embedder(images[i : i + 1]) for i in range(3)]), atol=1e-5)
    flipped = embedder(images[:2], flip=True)
    np.testing.assert_allclose(flipped, np.concatenate([embedder(images[:2]), embedder(images[:2, :, ::-1])], 1), atol=1e-6)
    assert embedder(images[:0]).shape == (0, 8) and embedder(images[:2, :20]).shape == (2, 8)
    for bad in (images.astype(np.float32), images[0], images[..., :1]):
        with pytest.raises(BadInput, match="uint8 RGB"):
            embedder(bad)


def test_sizes_compile_once(weights):
    embedder = Embedder(dataclasses.replace(weights, normalise=False))
    for count in (1, 2, 5, 8, 9, 30, 1, 7, 130):
        embedder(np.zeros((count, 32, 32, 3), np.uint8))
    assert embedder._forward._cache_size() <= 4


def test_wrong_tensors_are_named(weights, tmp_path):
    variables = jax.tree.map(lambda a: a, weights.variables)
    kernel = variables["params"]["stem1"].pop("kernel")
    with pytest.raises(BadInput, match=r"\['params'\]\['stem1'\]\['kernel'\] has shape none \(missing\), expected \(3, 3, 3, 4\)"):
        Embedder(dataclasses.replace(weights, variables=variables))
    variables["params"]["stem1"]["kernel"] = kernel[:2]
    with pytest.raises(BadInput, match=r"stem1.*\(2, 3, 3, 4\)"):
        Embedder(dataclasses.replace(weights, variables=variables))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_damaged_files_are_bad_input(weights, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "w.safetensors"
    save_weights(path, weights)
    whole = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["flip", "cut", "noise"]))
    if kind == "flip":
        position = data.draw(st.integers(0, len(whole) - 1))
        whole[position] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        whole = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        whole = bytearray(data.draw(st.binary(max_size=200)))
    path.write_bytes(bytes(whole))
    try:
        found = load_weights(path)
    except BadInput as error:
        assert "\n" not in str(error)
    else:
        # A flip in free text (provenance, thresholds) changes no embedding and passes.
        assert found.fingerprint == weights.fingerprint


def test_a_pickle_is_not_read(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(BadInput, match="not a whole safetensors file"):
        load(tmp_path / "w.safetensors")
