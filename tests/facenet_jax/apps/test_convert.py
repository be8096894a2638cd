"""Foreign files to portable ones, by function and by command line."""

import subprocess
import sys
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import facenet_jax
from facenet_jax import models
from facenet_jax.apps.convert import FORMATS, convert, describe
from facenet_jax.errors import BadInput
from facenet_jax.weights.portable import load_weights
from facenet_jax.weights.torch import to_torch

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def iresnet(tmp_path_factory):
    """A state dict of an iresnet18 for 16 x 16 images, 6-d, as .safetensors, and its variables."""
    model = models.create("iresnet18", embedding_size=6)
    tree = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), False))
    random = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: random.uniform(0, 0.1, leaf.shape).astype(np.float32), tree)
    path = tmp_path_factory.mktemp("iresnet") / "backbone.safetensors"
    save_file(to_torch(variables, "iresnet18"), path)
    return path, variables


def command(*arguments):
    line = [sys.executable, "-m", "facenet_jax.apps.convert", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True)


def test_a_tensorflow_checkpoint(shared, tmp_path):
    with tarfile.open(shared / "golden" / "irv1_tf1.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    folder, output = tmp_path / "irv1_tf1", tmp_path / "out" / "w.safetensors"
    weights, unused = convert("tf_checkpoint", folder, output, source="golden", licence="none")
    assert unused == ("Logits/weights", "Logits/biases")
    assert weights.provenance == {"format": "tf_checkpoint", "source": "golden", "licence": "none"}
    expected = np.load(folder / "expected.npz")
    embedder = facenet_jax.load(output)
    np.testing.assert_allclose(embedder(expected["images"]), expected["embeddings"], rtol=0, atol=1e-5)
    assert embedder.weights.preprocessing == {"size": 160, "standardisation": "fixed"} and embedder.fingerprint == weights.fingerprint

    convert("tf_checkpoint", folder / "frozen.pb", output, standardisation="per_image")
    again = load_weights(output)
    assert again.preprocessing == {"size": 160, "standardisation": "per_image"}
    assert again.provenance == {"format": "tf_checkpoint", "source": "frozen.pb", "licence": "not stated"}
    assert jax.tree.all(jax.tree.map(np.array_equal, again.variables, weights.variables))


def test_a_state_dict_by_command_line(iresnet, tmp_path):
    path, variables = iresnet
    output = tmp_path / "w.safetensors"
    done = command("torch", path, output, "--network=iresnet18", "--licence=research")
    assert done.returncode == 0, done.stderr
    weights = load_weights(output)
    assert jax.tree.all(jax.tree.map(np.array_equal, weights.variables, variables))
    assert weights.network == "iresnet18" and weights.preprocessing == {"size": 16, "standardisation": "symmetric"}
    assert done.stdout == f"{describe(weights, ())}\n{output}\n"
    for words in ("iresnet18", "6", f"{models.parameter_count(variables):,}", "16 pixels, standardisation symmetric", weights.fingerprint):
        assert words in done.stdout
    assert "14 (a0, a1, a2, a3, a4, a5 and 8 more)" in describe(weights, tuple(f"a{i}" for i in range(14)))
    assert facenet_jax.load(output)(np.zeros((1, 16, 16, 3), np.uint8)).shape == (1, 6)


def test_a_refusal_is_one_line_and_writes_nothing(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"<html>")
    done = command("torch", tmp_path / "w.safetensors", tmp_path / "out.safetensors")
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("error: ") and "not a whole safetensors file" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_bad_requests(iresnet, tmp_path):
    path, output = iresnet[0], tmp_path / "w.safetensors"
    for arguments, options, message in (
        (("caffe", path, output), {}, r"no format named 'caffe'; there are tf_checkpoint, torch"),
        (("torch", path, tmp_path / "w.npz"), {}, r"end in \.safetensors"),
        (("torch", path, path), {}, "must be another file"),
        (("torch", path, output), {"standardisation": "whiten"}, "there are fixed, per_image"),
        (("torch", path, output), {"use_moving_average": True}, "--use_moving_average is not for torch but for tf_checkpoint"),
        (("tf_checkpoint", path, output), {"network": "iresnet18"}, "--network is not for tf_checkpoint but for torch"),
        (("torch", path, output), {"network": "iresnet50"}, "not a whole iresnet50: .* is missing"),
        *(((form, tmp_path / "none", output), {}, "none") for form in FORMATS),
    ):
        with pytest.raises(BadInput, match=message):
            convert(*arguments, **options)
    assert list(tmp_path.iterdir()) == []


def test_symmetric_standardisation():
    from facenet_jax.preprocessing import Preprocessing

    x = np.random.default_rng(0).integers(0, 256, (1, 4, 4, 3), np.uint8)
    np.testing.assert_allclose(Preprocessing(4, "symmetric")(x), (x / 255 - 0.5) / 0.5, atol=1e-6)
