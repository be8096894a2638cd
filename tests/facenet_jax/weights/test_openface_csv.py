"""nn4.small2's CSV files: the published ones, whole sets of random weights, and the network they are for against PyTorch."""

import io
import json
import re
import tarfile
import zipfile

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from facenet_jax import models
from facenet_jax.errors import BadInput
from facenet_jax.inference import Embedder
from facenet_jax.weights import openface_csv


@pytest.fixture(scope="module")
def variables():
    """Random float32 weights and statistics. Activations stay near 1, but near 30 where a response normalisation follows, so that it tells."""
    rng = np.random.default_rng(0)
    loud = re.compile(r"params/conv[13]/norm/scale")
    after_loud = re.compile(r"batch_stats/(conv2|inception_3a/(reduce3x3|reduce5x5|pool_proj|conv1x1))/norm/var")

    def draw(path, shape):
        if path.endswith("kernel"):
            return rng.normal(0, np.prod(shape[:-1]) ** -0.5, shape)
        if path.endswith(("scale", "var")):
            return rng.uniform(0.5, 2.0, shape) * (30 if loud.match(path) else 900 if after_loud.match(path) else 1)
        return rng.normal(0, 0.3, shape)

    flat = {entry.path: draw(entry.path, entry.shape).astype(np.float32) for entry in openface_csv.entries().values()}
    return unflatten_dict(flat, sep="/")


@pytest.fixture(scope="module")
def folder(variables, tmp_path_factory):
    path = tmp_path_factory.mktemp("set") / "weights"
    openface_csv.write_openface_csv(variables, path)
    return path


@pytest.fixture(scope="module")
def published(shared, tmp_path_factory):
    """The folder of published files, unpacked."""
    path = tmp_path_factory.mktemp("published")
    with tarfile.open(shared / "data" / "openface_csv.tar.xz") as archive:
        archive.extractall(path, filter="data")
    return path / "openface_csv"


@pytest.fixture(scope="module")
def weights(folder):
    return openface_csv.read(folder)


@pytest.fixture(scope="module")
def torch_tensors(folder):
    """The files' numbers as Torch lays them out, read without the importer; names without the ending."""
    tensors = {}
    for name, entry in openface_csv.entries().items():
        shape = entry.shape[::-1] if len(entry.shape) < 4 else (entry.shape[3], entry.shape[2], *entry.shape[:2])
        tensors[name.removesuffix(".csv")] = np.array(json.loads(f"[{(folder / name).read_text()}]")).reshape(shape)
    return tensors


@pytest.mark.parametrize("pooling", ["released", "definition"])
def test_forward_pass_is_that_of_the_torch_layers(weights, torch_tensors, pooling):
    torch = pytest.importorskip("torch", reason="the reference is written in PyTorch")
    from tests.references.nn4_small2 import forward

    torch.set_num_threads(1)
    images = np.random.default_rng(1).uniform(0, 1, (3, 96, 96, 3)).astype(np.float32)
    model = models.create("nn4_small2", pooling=pooling)
    ours = np.asarray(jax.jit(lambda v, x: model.apply(v, x, train=False))(weights.variables, images))
    expected = forward(torch_tensors, images, pooling == "released")
    assert ours.shape == (3, 128) and 0.3 < np.std(expected) < 30 and np.abs(expected[0] - expected[1]).max() > 0.01
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


def test_a_set_of_the_published_names_round_trips_bit_for_bit(variables, folder, weights, shared):
    with tarfile.open(shared / "data" / "openface_csv.tar.xz") as archive:
        names = archive.extractfile("openface_csv/ALL_FILE_NAMES.txt").read().decode().split()
    assert len(names) == 226 and {file.name for file in folder.iterdir()} == set(names)
    jax.tree.map(np.testing.assert_array_equal, weights.variables, variables)
    assert weights.arguments == {"pooling": "released"} and weights.preprocessing == {"size": 96, "standardisation": "unit"}
    embeddings = Embedder(weights)(np.zeros((1, 96, 96, 3), np.uint8))
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)


def test_published_files_load_and_are_written_back_byte_for_byte(published):
    """And the folder and the archive give the same."""
    files = {file.name: file.read_bytes() for file in published.glob("*.csv")}
    assert len(files) == 189
    tensors = openface_csv.read_partial(published)
    known = openface_csv.entries()
    strays = set(files) - set(known)
    assert strays == {"inception_5a_3x3_conv2_m.csv", "inception_5a_3x3_conv2_v.csv"} and len(tensors) == 187
    for name in set(files) - strays:
        tensor = tensors[known[name].path]
        assert tensor.shape == known[name].shape and tensor.dtype == np.float32
        assert openface_csv.format_csv(known[name].from_flax(tensor)) == files[name], name


def test_every_missing_file_is_named(published, shared):
    for path in (published, shared / "data" / "openface_csv.tar.xz"):
        with pytest.raises(BadInput, match=r"37 of 224 files missing: conv1_w\.csv, ") as caught:
            openface_csv.read(path)
        names = str(caught.value).split("missing: ")[1].split(", ")
        assert len(names) == 37 and "dense_w.csv" in names and "\n" not in str(caught.value)


def test_archives_give_what_the_folder_gives(published, shared, tmp_path):
    expected = openface_csv.read_partial(published)
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in published.iterdir():
            archive.write(file, f"weights/{file.name}")
    for path in (tmp_path / "set.zip", shared / "data" / "openface_csv.tar.xz"):
        found = openface_csv.read_partial(path)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"1,2,3\n", r"bn1_m.csv has 3 numbers, expected 64 numbers for shape \[64\]"),
        (b"x," * 64, "bn1_m.csv holds something that is no number"),
        (b"nan," * 64, "bn1_m.csv holds values that are not finite"),
        (b"1e39," * 64, "bn1_m.csv holds values that are not finite"),
        (b" " * 5000, "bn1_m.csv has 5000 bytes"),
        (b"\xff\x00," * 64, "bn1_m.csv holds something that is no number"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, message):
    (tmp_path / "bn1_m.csv").write_bytes(text)
    with pytest.raises(BadInput, match=message):
        openface_csv.read(tmp_path)


def test_variances_are_positive():
    with pytest.raises(BadInput, match="negative variance"):
        openface_csv.parse("bn1_v.csv", b"-1," * 64)


def _tar(path, name, content=b"1", mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))


def test_bad_archives(tmp_path, monkeypatch):
    monkeypatch.setattr(openface_csv, "_LARGEST_SET", 1 << 20)
    _tar(tmp_path / "out.tar", "../bn1_m.csv")
    _tar(tmp_path / "bomb.tar.gz", "bn1_m.csv", bytes(openface_csv._LARGEST_SET + 1))
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bn1_m.csv", bytes(openface_csv._LARGEST_SET + 1))
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive:
        archive.writestr("a/bn1_m.csv", b"1")
        archive.writestr("b/bn1_m.csv", b"1")
    (tmp_path / "text").write_bytes(b"hello")
    messages = {
        "out.tar": "leaves the archive's folder",
        "bomb.tar.gz": "more than",
        "bomb.zip": "more than",
        "twice.zip": "there twice",
        "text": "no folder, tar or zip",
        "none": "no such folder",
    }
    for name, message in messages.items():
        with pytest.raises(BadInput, match=message):
            openface_csv.read(tmp_path / name)


def test_other_networks_are_not_written(tmp_path, variables):
    with pytest.raises(BadInput, match=r"params/dense/bias has shape none \(missing\), expected \[128\]"):
        openface_csv.write_openface_csv({**variables, "params": {**variables["params"], "dense": {}}}, tmp_path / "set")
    assert not (tmp_path / "set").exists()


@pytest.fixture(scope="module")
def small_archives(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    text = b",".join([b"0.5"] * 64)
    for mode in ("", "gz", "xz", "bz2"):
        _tar(folder / f"tar{mode}", "weights/bn1_m.csv", text, f"w:{mode}")
    with zipfile.ZipFile(folder / "zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("weights/bn1_m.csv", text)
    return [file.read_bytes() for file in sorted(folder.iterdir())]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_raise_bad_input_only(tmp_path, small_archives, data):
    """Random bytes, and archives that are cut short or changed in places."""
    whole = data.draw(st.sampled_from(small_archives))
    changed = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=4)):
        if place < len(changed):
            changed[place] = value
    path = tmp_path / "archive"
    path.write_bytes(data.draw(st.sampled_from([bytes(changed), data.draw(st.binary(max_size=600))])))
    with pytest.raises(BadInput) as caught:
        openface_csv.read(path)
    assert "\n" not in str(caught.value)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400))
def test_any_text_raises_bad_input_only(text):
    with pytest.raises(BadInput):
        openface_csv.parse("bn1_m.csv", text)
