"""MTCNN against the original's own results, and against a version that goes one photograph and one box at a time."""

import json
import tarfile
from functools import lru_cache
from pathlib import Path

import jax
import numpy as np
import pytest

from data_pipelines import images
from facenet_jax.alignment import Alignment, choose, rectangle
from facenet_jax.apps import pretrained
from facenet_jax.detection import mtcnn
from facenet_jax.detection.networks import ONet, PNet, RNet
from facenet_jax.errors import BadInput
from facenet_jax.weights.portable import load_weights
from tests.conftest import SHARED
from tests.references import mtcnn_one_by_one as reference


@lru_cache(1)
def weights_path() -> Path:
    try:
        return pretrained.fetch("mtcnn")
    except BadInput as error:
        pytest.skip(f"mtcnn's weights cannot be had: {error}")


@lru_cache(1)
def detector() -> mtcnn.Mtcnn:
    return mtcnn.Mtcnn(weights_path())


@lru_cache(1)
def networks():
    params = load_weights(weights_path()).variables["params"]
    rnet, onet = (
        jax.jit(lambda x, n=n, name=name: n.apply({"params": params[name]}, x)) for n, name in ((RNet(), "rnet"), (ONet(), "onet"))
    )

    def propose(x):
        height, width = x.shape[:2]
        x = np.pad(x, ((0, height % 2), (0, width % 2), (0, 0))).astype(np.float32)
        inside = np.zeros(x.shape[:2], bool)
        inside[: height - 2, : width - 2] = True
        score, shift = PNet().apply({"params": params["pnet"]}, x[None], inside[None])
        return np.asarray(score)[0], np.asarray(shift)[0]

    def padded(network):
        def run(x):
            rows = np.zeros((-(-len(x) // 64) * 64, *x.shape[1:]), np.float32)
            rows[: len(x)] = x
            return [np.asarray(a)[: len(x)] for a in network(rows)]

        return run

    return propose, padded(rnet), padded(onet)


@lru_cache(1)
def photographs() -> dict[str, bytes]:
    path = SHARED / "data" / "photos.tar"
    if not path.exists():
        pytest.skip("no ../shared/data/photos.tar")
    with tarfile.open(path) as archive:
        return {Path(m.name).name: archive.extractfile(m).read() for m in archive if m.name.endswith(".jpg")}


def lfw(every: int) -> tuple[list[str], list[bytes]]:
    if not (SHARED / "data" / "lfw.tar").exists():
        pytest.skip("no ../shared/data/lfw.tar")
    with tarfile.open(SHARED / "data" / "lfw.tar") as archive:
        members = [m for m in archive if m.name.endswith(".jpg")][::every]
        return [Path(m.name).stem for m in members], [archive.extractfile(m).read() for m in members]


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    shared = np.prod(np.maximum(np.minimum(a[2:4], b[2:4]) - np.maximum(a[:2], b[:2]), 0))
    return shared / (np.prod(a[2:4] - a[:2]) + np.prod(b[2:4] - b[:2]) - shared)


def test_equals_one_photograph_at_a_time():
    names = ["five_people.jpg", "two_people.jpg", "no_face_dogs.jpg", "one_person.jpg"]
    opened = [images.open_photograph(photographs()[name])[:400, :380] for name in names]
    for photograph, found in zip(opened, detector()(opened), strict=True):
        boxes, points = reference.detect(photograph, networks())
        order = np.argsort(-boxes[:, 4], kind="stable")
        assert len(found) == len(boxes)
        np.testing.assert_allclose(found.scores, boxes[order, 4], atol=1e-4)
        # Sorted by place: equal scores may come in another order.
        rank = lambda b: np.lexsort(b.T.round())
        np.testing.assert_allclose(found.boxes[rank(found.boxes)], boxes[rank(boxes[:, :4]), :4], atol=0.05)
        np.testing.assert_allclose(found.points[rank(found.boxes)], points[rank(boxes[:, :4])], atol=0.05)


def test_the_accelerators_way_finds_the_same(monkeypatch):
    """Batches whole through P-Net, crops gathered from sums: what this process's backend would take, were it a GPU."""
    opened = [images.open_photograph(data)[::2, ::2] for data in lfw(1900)[1]]
    expected = detector()(opened)
    assert sum(len(found) for found in expected) >= 2
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(mtcnn, "_compiled", lambda: jax.jit(mtcnn._detect, static_argnames=("scales", "settings")))
    monkeypatch.setattr(mtcnn, "_BATCH", len(opened))
    for found, wanted in zip(detector()(opened), expected, strict=True):
        np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-4)
        np.testing.assert_allclose(found.boxes, wanted.boxes, atol=0.01)
        np.testing.assert_allclose(found.points, wanted.points, atol=0.01)


def test_company_and_canvas_do_not_matter():
    opened = [images.open_photograph(photographs()[name])[:240, :250] for name in ("one_person.jpg", "five_people.jpg", "two_people.jpg")]
    together = detector()(opened)
    for photograph, found in zip(opened, together, strict=True):
        alone = detector()([photograph])[0]
        np.testing.assert_allclose(alone.boxes, found.boxes, atol=1e-2)
        wide = np.zeros((240, 300, 3), np.uint8)
        wide[:, :250] = photograph  # another canvas; the black part beside the photograph is part of this one
        assert len(detector()([wide])[0]) >= len(found)


@pytest.mark.parametrize("jpeg", [pytest.param("", marks=pytest.mark.slow), "ijg9"])
def test_finds_what_the_original_finds_on_photographs(shared, jpeg):
    if jpeg:
        pytest.importorskip("jpeglib", reason="pip install -r requirements-legacy.txt")
    golden = json.loads((shared / "golden" / "mtcnn_original.json").read_text())
    names = [name for name in photographs() if name in golden]
    opened = [images.open_photograph(photographs()[name], jpeg) for name in names]
    wanted = missed = extra = 0
    for name, found in zip(names, detector()(opened), strict=True):
        theirs = np.asarray(golden[name]["boxes"]).reshape(-1, 5)
        ours = np.concatenate([found.boxes, found.scores[:, None]], 1)
        sure = theirs[theirs[:, 4] > 0.95]
        wanted += len(sure)
        missed += sum(max((overlap(box, other) for other in ours), default=0) < 0.9 for box in sure)
        extra += sum(max((overlap(box, other) for other in theirs), default=0) < 0.9 for box in ours[ours[:, 4] > 0.95])
    assert wanted == 92
    # Another decoder's pixels move a few boxes.
    assert max(missed, extra) <= (0 if jpeg else 3)


def test_lfw_rectangles_are_the_originals(shared):
    """500 photographs, decoded as the original's Pillow did: at least 99% of rectangles and landmarks within a pixel. Most within 0.01."""
    pytest.importorskip("jpeglib", reason="pip install -r requirements-legacy.txt")
    golden = np.load(shared / "golden" / "lfw_mtcnn_original.npz")
    place = {str(name): i for i, name in enumerate(golden["names"])}
    names, data = lfw(7701 // 500)
    opened = [images.open_photograph(d, "ijg9") for d in data]
    how = Alignment(160, 32)
    near_box = near_points = exact = 0
    for name, photograph, found in zip(names, opened, detector()(opened), strict=True):
        at = place[name]
        which = choose(found, photograph.shape[:2], how.choose)[0]
        cut = np.asarray(rectangle(found.boxes[which], photograph.shape[:2], how))
        near_box += np.abs(cut - golden["crop_160_32"][at]).max() <= 1
        off = np.abs(found.points[which] - golden["points"][at].reshape(2, 5).T).max()
        near_points += off <= 1
        exact += off < 0.01
    assert near_box >= 0.99 * len(names), near_box
    assert near_points >= 0.99 * len(names), near_points
    assert exact >= 0.95 * len(names), exact


def test_odd_photographs():
    black = np.zeros((250, 250, 3), np.uint8)
    assert [len(f) for f in detector()([black, black[:3], black[:19, :40], np.zeros((1, 1, 3), np.uint8)])] == [0, 0, 0, 0]
    with pytest.raises(BadInput, match="uint8 RGB"):
        detector()([black[..., 0]])
    assert detector()([]) == []


def test_a_photograph_wider_than_the_canvases_is_shrunk_and_reported_in_its_own_pixels(monkeypatch):
    photograph = images.open_photograph(photographs()["five_people.jpg"])[:300, 450:750]
    plain = detector()([photograph])[0]
    monkeypatch.setattr(mtcnn, "_SIDES", (128, 256))
    shrunk = detector()([photograph])[0]
    assert len(shrunk) >= 1
    assert overlap(shrunk.boxes[0], plain.boxes[0]) > 0.8


def test_nothing_compiles_twice():
    opened = images.open_photograph(photographs()["one_person.jpg"])
    detector()([opened[:200, :190]])
    before = mtcnn._compiled()._cache_size()
    detector()([opened[:210, :180], opened[:150, :250]])
    detector()([opened[:201, :133]] * 5)
    assert mtcnn._compiled()._cache_size() == before


def test_settings_out_of_range():
    for wrong in ({"minimum": 2}, {"factor": 1.0}, {"thresholds": (0.6, 0.7, 1.5)}):
        with pytest.raises(BadInput, match="mtcnn"):
            mtcnn.Settings(**wrong)


def test_pyramid_of_the_paper():
    scales = mtcnn.pyramid(250, 250, mtcnn.Settings())
    np.testing.assert_allclose(scales, 0.6 * 0.709 ** np.arange(len(scales)))
    assert 250 * scales[-1] >= 12 > 250 * scales[-1] * 0.709
    assert mtcnn.pyramid(19, 500, mtcnn.Settings()) == []
