"""OpenCV's cascade behind our interface: against OpenCV's plain call, hand-made boxes, and photographs without a face."""

import io
import json
import tarfile

import cv2
import numpy as np
import pytest
from PIL import Image

from facenet_jax.detection import create
from facenet_jax.detection.haar import Haar
from facenet_jax.errors import BadInput

SMALL = ("dlib_2007_007763.jpg", "dlib_2008_001322.jpg", "dlib_2008_002506.jpg", "dlib_2009_004587.jpg")


@pytest.fixture(scope="module")
def photos(shared):
    """By name: uint8 RGB; and the hand-made boxes by name."""
    with tarfile.open(shared / "data" / "photos.tar") as archive:
        read = lambda name: archive.extractfile(f"photos/{name}").read()
        images = {name: np.asarray(Image.open(io.BytesIO(read(name))).convert("RGB")) for name in (*SMALL, "no_face_dogs.jpg")}
        by_hand = {name: np.asarray(boxes, float) for name, boxes in json.loads(read("dlib_boxes.json")).items()}
    return images, {name: np.concatenate([b[:, :2], b[:, :2] + b[:, 2:]], 1) for name, b in by_hand.items()}


def overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes [n, 4] and [m, 4] -> [n, m]."""
    side = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    shared = np.maximum(side, 0).prod(-1)
    area = lambda boxes: (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    return shared / (area(a)[:, None] + area(b)[None] - shared)


def test_boxes_are_opencvs_and_most_faces_are_found(photos):
    images, by_hand = photos
    plain = cv2.CascadeClassifier(cv2.data.haarcascades + "haarcascade_frontalface_default.xml")
    results = create("haar", minimum=30)([images[name] for name in SMALL])
    hits = 0
    for name, faces in zip(SMALL, results, strict=True):
        x, y, width, height = plain.detectMultiScale(cv2.cvtColor(images[name], cv2.COLOR_RGB2GRAY), 1.1, 5, 0, (30, 30)).T
        assert sorted(faces.boxes.tolist()) == sorted(np.stack([x, y, x + width, y + height], 1).tolist())
        assert (np.diff(faces.scores) <= 0).all() and faces.points is None
        assert (faces.boxes.dtype, faces.scores.dtype) == (np.float32,) * 2
        shares = overlaps(by_hand[name], faces.boxes)
        assert (shares.max(0) > 0.3).all()
        hits += (shares.max(1) >= 0.5).sum()
    # Of 15. dlib finds them all.
    assert hits >= 11


def test_photographs_without_a_face(photos):
    detector = Haar(minimum=60)
    dogs = photos[0]["no_face_dogs.jpg"][::3, ::3]  # a view with gaps
    for photograph in (dogs, np.zeros((1, 1, 3), np.uint8), np.full((3, 200, 3), 255, np.uint8), np.zeros((120, 90, 3), np.uint8)):
        (faces,) = detector([photograph])
        assert len(faces) == 0 and faces.boxes.shape == (0, 4) and faces.scores.shape == (0,)
    assert detector([]) == []


@pytest.mark.parametrize("settings", [{"minimum": 0}, {"scale_factor": 1.0}, {"neighbours": 0}])
def test_settings_that_cannot_be(settings):
    with pytest.raises(BadInput, match="haar: minimum and neighbours"):
        Haar(**settings)


def test_bad_input(tmp_path, monkeypatch):
    with pytest.raises(BadInput, match=r"uint8 RGB \[h, w, 3\], not uint8 \[30, 30\]"):
        Haar()([np.zeros((30, 30), np.uint8)])
    with pytest.raises(BadInput, match=r"none\.xml: no such cascade file"):
        Haar(cascade=tmp_path / "none.xml")
    contents = {"rubbish.xml": b"rubbish", "empty.xml": b"", "other.xml": b'<?xml version="1.0"?><opencv_storage><a>1</a></opencv_storage>'}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput, match=f"{name}: not a cascade of OpenCV") as caught:
            Haar(cascade=tmp_path / name)
        assert "\n" not in str(caught.value)
    # What OpenCV 5 is like.
    monkeypatch.setattr(cv2.data, "haarcascades", str(tmp_path))
    with pytest.raises(BadInput, match="opencv-python-headless<5"):
        Haar()
