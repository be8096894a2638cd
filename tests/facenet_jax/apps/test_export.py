"""Weights out: each format read back by what it is for, and compared with the Embedder of the same weights."""

import collections
import json
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from facenet_jax import models
from facenet_jax.apps.convert import convert
from facenet_jax.apps.export import FORMATS, PLATFORMS, export
from facenet_jax.errors import BadInput
from facenet_jax.inference import Embedder, load
from facenet_jax.preprocessing import Preprocessing
from facenet_jax.weights.cache import cached_path
from facenet_jax.weights.portable import Weights, load_weights, save_weights
from facenet_jax.weights.tensor_bundle import read_checkpoint
from facenet_jax.weights.tensorflow import from_tensorflow
from facenet_jax.weights.torch import from_torch, read_state_dict
from tests.facenet_jax.apps.test_pretrained import cache  # noqa: F401 - a fixture
from tests.facenet_jax.weights.test_torch import facenet, torch  # noqa: F401 - fixtures
from tests.references.variables import random_variables

ROOT = Path(__file__).resolve().parents[3]
SMALL = 32


def random_weights(name, size, seed=0, standardisation="", **arguments):
    """Weights whose every tensor is random, BatchNorm's statistics too."""
    model = models.create(name, **arguments)
    preprocessing = {"size": size, "standardisation": standardisation or models.network(name).standardisation}
    return Weights(
        random_variables(model, size, seed),
        name,
        arguments,
        preprocessing,
        model.embedding_size,
        provenance={"licence": "none", "source": "random"},
    )


def saved(path, weights):
    save_weights(path, weights)
    return path


def photographs(count, size, seed=1):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small network of 8 dimensions that standardises each image by itself, as a file."""
    weights = random_weights("small_resnet", SMALL, standardisation="per_image", embedding_size=8)
    return saved(tmp_path_factory.mktemp("small") / "small.safetensors", weights)


def onnx_session(path):
    pytest.importorskip("onnx", reason="requirements-onnx.txt")
    return pytest.importorskip("onnxruntime", reason="requirements-onnx.txt").InferenceSession(path, providers=["CPUExecutionProvider"])


def exported(form, source, folder, **options):
    """The exported network as images -> embeddings, in its own runtime."""
    if form == "onnx":
        pytest.importorskip("onnx", reason="requirements-onnx.txt")
    output = folder / f"w.{form}"
    export(form, source, output, **options)
    assert [path.name for path in folder.iterdir()] == [output.name]
    if form == "onnx":
        session = onnx_session(output)
        return lambda images: session.run(["embeddings"], {"images": np.asarray(images)})[0]
    return jax.jit(jax.export.deserialize(output.read_bytes()).call)


@pytest.mark.parametrize("preprocessing", [False, True])
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("form", ["onnx", "stablehlo"])
def test_the_embeddings_of_any_batch(small, tmp_path, form, fold, preprocessing):
    embed, embedder = exported(form, small, tmp_path, fold=fold, preprocessing=preprocessing), load(small)
    for count in (1, 3, 16):
        images = photographs(count, SMALL, count)
        expected = embedder(images)
        given = images if preprocessing else np.asarray(Preprocessing(SMALL, "per_image")(images))
        found = np.asarray(embed(given))
        assert found.dtype == np.float32 and (count == 1 or np.linalg.norm(expected[0] - expected[1]) > 0.05)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("nn4_small2", {}),
        ("nn4_small2", {"pooling": "definition"}),
        pytest.param("resnet50", {}, marks=pytest.mark.slow),
        *(
            pytest.param(name, {"embedding_size": 24}, marks=[pytest.mark.slow] if name in ("iresnet34", "iresnet50", "iresnet100") else [])
            for name in models.NETWORKS
            if name != "nn4_small2"
        ),
    ],
)
def test_every_network_in_onnx(tmp_path, name, arguments):
    onnx = pytest.importorskip("onnx", reason="requirements-onnx.txt")
    # iResNets flatten their last map: at 32, its order tells.
    size = 32 if name.startswith("iresnet") else models.network(name).minimum
    weights = random_weights(name, size, **arguments)
    (tmp_path / "out").mkdir()
    embed = exported("onnx", saved(tmp_path / "w.safetensors", weights), tmp_path / "out", fold=True, preprocessing=True)
    images = photographs(3, size)
    images[0] //= 4
    expected = Embedder(weights)(images)
    assert np.linalg.norm(expected[0] - expected[1]) > 0.05
    np.testing.assert_allclose(embed(images), expected, rtol=0, atol=1e-4)
    model = onnx.load(tmp_path / "out" / "w.onnx")
    onnx.checker.check_model(model, full_check=True)
    operations = collections.Counter(node.op_type for node in model.graph.node)
    # One after the images, and one before a map is flattened.
    assert operations["Transpose"] == 1 + (name in ("small_resnet", "nn4_small2")) and operations["Slice"] == operations["Neg"] == 0


def test_stablehlo_names_its_weights_and_platforms(small, tmp_path):
    weights = export("stablehlo", small, tmp_path / "w.stablehlo", preprocessing=True)
    found = jax.export.deserialize((tmp_path / "w.stablehlo").read_bytes())
    assert tuple(found.platforms) == PLATFORMS == ("cpu", "cuda", "tpu")
    assert found.fun_name == f"small_resnet_{weights.fingerprint}"
    assert [str(aval) for aval in found.in_avals] == ["uint8[batch,32,32,3]"]


def test_onnx_carries_the_portable_files_metadata(small, tmp_path):
    onnx = pytest.importorskip("onnx", reason="requirements-onnx.txt")
    export("onnx", small, tmp_path / "w.onnx", fold=True)
    model, weights = onnx.load(tmp_path / "w.onnx"), load_weights(small)
    found = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert found == {
        "network": "small_resnet",
        "arguments": {"embedding_size": 8},
        "preprocessing": {"size": 32, "standardisation": "per_image"},
        "embedding_size": 8,
        "normalise": True,
        "thresholds": {},
        "provenance": weights.provenance,
        "fingerprint": weights.fingerprint,
        "folded": True,
        "preprocessing_included": False,
    }
    names = {array.name for array in model.graph.initializer}
    assert "params/stem1/kernel" in names and not any(name.startswith("batch_stats") for name in names)


@pytest.mark.parametrize("form", ["onnx", "stablehlo"])
def test_raw_embeddings_in_float32(small, tmp_path, form):
    """Weights that are not normalised, and were trained in bfloat16."""
    weights = replace(load_weights(small), normalise=False)
    rounded = replace(weights, arguments={**weights.arguments, "dtype": "bfloat16"})
    (tmp_path / "out").mkdir()
    embed = exported(form, saved(tmp_path / "w.safetensors", rounded), tmp_path / "out", preprocessing=True)
    images = photographs(3, SMALL)
    expected = Embedder(weights)(images)
    assert np.abs(np.linalg.norm(expected, axis=1) - 1).min() > 0.1
    np.testing.assert_allclose(embed(images), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert np.abs(Embedder(rounded)(images) - expected).max() > 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("form", ["onnx", "stablehlo"])
def test_the_published_network(cache, shared, tmp_path, form):  # noqa: F811
    golden = np.load(shared / "golden" / "casia_webface_20180408.npz", allow_pickle=False)
    embed = exported(form, "casia-webface", tmp_path, fold=True, preprocessing=True)
    np.testing.assert_allclose(embed(golden["images"]), golden["embeddings_fixed"], rtol=0, atol=1e-4)
    assert (tmp_path / f"w.{form}").stat().st_size < 1.05 * cached_path("casia-webface").stat().st_size


def test_the_original_codes_tensors_are_given_back(shared, tmp_path):
    with tarfile.open(shared / "golden" / "irv1_tf1.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    convert("tf_checkpoint", tmp_path / "irv1_tf1", tmp_path / "w.safetensors")
    weights = export("tf_npz", tmp_path / "w.safetensors", tmp_path / "w.npz")
    original = {name: array for name, array in read_checkpoint(tmp_path / "irv1_tf1").items() if name.startswith("InceptionResnetV1/")}
    found = np.load(tmp_path / "w.npz", allow_pickle=False)
    assert set(found.files) == {name for name in original if not name.endswith("/ExponentialMovingAverage")} and len(found.files) > 400
    assert all(found[name].dtype == np.float32 and np.array_equal(found[name], original[name]) for name in found.files)
    again = from_tensorflow(dict(found)).variables
    assert jax.tree.all(jax.tree.map(np.array_equal, again, weights.variables))


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """Inception-ResNet-v1 as the original code trains it: no BatchNorm scale, 512-d, for images of 80 pixels."""
    return saved(tmp_path_factory.mktemp("inception") / "w.safetensors", random_weights("inception_resnet_v1", 80, embedding_size=512))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_facenet_pytorch_gives_the_same_embeddings(torch, facenet, inception, tmp_path, suffix):  # noqa: F811
    weights = export("facenet_pytorch", inception, tmp_path / f"w{suffix}")
    state = (
        torch.load(tmp_path / "w.pt", weights_only=True)
        if suffix == ".pt"
        else {name: torch.from_numpy(array) for name, array in read_state_dict(tmp_path / "w.safetensors").items()}
    )
    network = facenet(3)
    network.load_state_dict(state, strict=True)
    images = photographs(3, 80)
    images[0] //= 4
    with torch.no_grad():
        found = network.eval()((torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).float() - 127.5) / 128).numpy()
    expected = Embedder(weights)(images)
    assert np.linalg.norm(expected[0] - expected[1]) > 0.05
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    back = from_torch(read_state_dict(tmp_path / f"w{suffix}")).variables
    np.testing.assert_array_equal(back["params"]["Bottleneck"]["kernel"], weights.variables["params"]["Bottleneck"]["kernel"])


def command(*arguments):
    line = [sys.executable, "-m", "facenet_jax.apps.export", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True)


def test_by_command_line(small, tmp_path):
    done = command("stablehlo", f"--weights={small}", f"--output={tmp_path / 'new' / 'w.stablehlo'}", "--fold", "--preprocessing")
    assert done.returncode == 0, done.stderr
    fingerprint = load_weights(small).fingerprint
    first, second, third = done.stdout.splitlines()
    assert first == f"small_resnet, 8-d, fingerprint {fingerprint}" and second == "images: [n, 32, 32, 3] RGB, uint8"
    assert third.startswith(str(tmp_path / "new" / "w.stablehlo")) and third.endswith("MB)")


def test_an_unwritable_output_is_one_line(small, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    done = command("stablehlo", f"--weights={small}", f"--output={tmp_path / 'file' / 'w.stablehlo'}")
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.strip().splitlines()) == 1 and "file" in done.stderr
    (tmp_path / "w.stablehlo").mkdir()
    with pytest.raises(OSError, match="directory"):
        export("stablehlo", small, tmp_path / "w.stablehlo")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "w.stablehlo"]


def test_bad_requests(small, tmp_path):
    output = tmp_path / "w.onnx"
    for arguments, options, message in (
        (("caffe", small, output), {}, "no format named 'caffe'; there are onnx, stablehlo, tf_npz, facenet_pytorch"),
        (("onnx", small, tmp_path / "w.npz"), {}, r"must be another file, and end in \.onnx"),
        (("facenet_pytorch", small, small), {}, r"must be another file, and end in \.pt or \.pth or \.safetensors"),
        (("onnx", tmp_path / "none.safetensors", output), {}, "no such weights file"),
        (("tf_npz", small, tmp_path / "w.npz"), {}, "tf_npz carries inception_resnet_v1 only, not small_resnet; onnx and stablehlo carry"),
        (("facenet_pytorch", small, tmp_path / "w.pt"), {}, "facenet_pytorch carries inception_resnet_v1 only, not small_resnet"),
        (("tf_npz", small, tmp_path / "w.npz"), {"fold": True}, "--fold is not for tf_npz but for onnx, stablehlo"),
        (("facenet_pytorch", small, tmp_path / "w.pt"), {"preprocessing": True}, "--preprocessing is not for facenet_pytorch but for onnx"),
    ):
        with pytest.raises(BadInput, match=message):
            export(*arguments, **options)
    done = command("onnx", f"--weights={small}")
    assert done.returncode == 2 and "expected FORMAT --weights=FILE_OR_NAME --output=FILE" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_weights_that_the_other_projects_cannot_hold(inception, tmp_path):
    weights = load_weights(inception)
    other = saved(tmp_path / "other.safetensors", replace(weights, arguments={**weights.arguments, "bn_epsilon": 1e-5}))
    scaled = saved(tmp_path / "scaled.safetensors", random_weights("inception_resnet_v1", 80, embedding_size=3, bn_scale=True))
    for form in ("tf_npz", "facenet_pytorch"):
        with pytest.raises(BadInput, match=rf"{form} has a BatchNorm epsilon of 0\.001, these weights were trained with 1e-05"):
            export(form, other, tmp_path / f"w{FORMATS[form].suffixes[0]}")
    with pytest.raises(BadInput, match="BatchNorm/scale has no place in an Inception-ResNet-v1 of the original code"):
        export("tf_npz", scaled, tmp_path / "w.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.safetensors", "scaled.safetensors"]


def test_a_missing_package_is_named(small, inception, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "facenet_jax.weights.onnx", raising=False)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(BadInput, match=r"pip install -r requirements-onnx\.txt"):
        export("onnx", small, tmp_path / "w.onnx")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BadInput, match=r"a \.pt file needs PyTorch: pip install -r requirements-torch\.txt"):
        export("facenet_pytorch", inception, tmp_path / "w.pt")
    assert list(tmp_path.iterdir()) == []
