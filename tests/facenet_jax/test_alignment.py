"""Crops and templates."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facenet_jax import alignment
from facenet_jax.alignment import TEMPLATES, Alignment
from facenet_jax.detection import CORNERS, Faces
from facenet_jax.errors import BadInput
from tests.conftest import SHARED


def faces(*boxes, scores=None, points=None, landmarks="centres"):
    scores = np.linspace(0.99, 0.9, len(boxes)) if scores is None else scores
    return Faces(np.asarray(boxes, np.float32).reshape(-1, 4), np.asarray(scores, np.float32), points, landmarks)


def test_the_originals_rectangles_from_its_own_boxes():
    """All 7,701 LFW photographs: margin 32 of the photograph's pixels, clipped, cut off to whole pixels."""
    path = SHARED / "golden" / "lfw_mtcnn_original.npz"
    if not path.exists():
        pytest.skip("no ../shared")
    golden = np.load(path)
    how = Alignment(160, 32)
    found = [alignment.rectangle(box[:4], (250, 250), how) for box in golden["box"]]
    assert (np.abs(np.asarray(found) - golden["crop_160_32"]).max(1) == 0).mean() > 0.999


def test_the_originals_choice_and_its_other_size():
    path = SHARED / "golden" / "mtcnn_original.json"
    if not path.exists():
        pytest.skip("no ../shared")
    for name, told in json.loads(path.read_text()).items():
        boxes = np.asarray(told["boxes"]).reshape(-1, 5)
        if not len(boxes):
            continue
        size = (told["size"][1], told["size"][0])
        which = alignment.choose(faces(*boxes[:, :4]), size, "largest_central")[0]
        assert which == told["chosen"], name
        for key, how in (("crop_182_44", Alignment(182, 44)), ("crop_160_32", Alignment(160, 32))):
            assert np.abs(np.subtract(alignment.rectangle(boxes[which, :4], size, how), told[key])).max() <= 1, name


def test_choices():
    found = faces((0, 0, 40, 40), (40, 40, 70, 70), (90, 90, 100, 100), scores=(0.8, 0.7, 0.9))
    expected = {"largest": [0], "confident": [2], "central": [1], "largest_central": [1], "all": [0, 1, 2]}
    for rule, which in expected.items():
        assert alignment.choose(found, (110, 110), rule) == which
    assert alignment.choose(faces(), (10, 10), "largest") == []


def test_margin_of_the_crop_is_facenet_pytorchs():
    """A box of 100 pixels becomes 128 of 160 pixels, 32 are margin: 25 pixels of the photograph."""
    how = Alignment(160, 32, margin_of="crop")
    assert alignment.rectangle(np.asarray([100, 100, 200, 200]), (400, 400), how) == (87, 87, 212, 212)


angles = st.floats(-3.1, 3.1)


@settings(max_examples=50, deadline=None)
@given(angles, st.floats(0.2, 5), st.floats(-200, 200), st.floats(-200, 200), st.sampled_from(["insightface"]))
def test_a_similarity_is_recovered(angle, scale, dx, dy, name):
    """Exactly turned, scaled and shifted landmarks come back to the template within half a pixel (in fact 1e-6)."""
    template = TEMPLATES[name]  # dlib's own map is tested beside dlib
    goal = np.asarray(template.points) * 112
    turn = scale * np.asarray([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = alignment.onto_template(goal @ turn.T + (dx, dy), template, 112)
    back = (goal @ turn.T + (dx, dy)) @ matrix[:, :2].T + matrix[:, 2]
    np.testing.assert_allclose(back, goal, atol=1e-6)
    np.testing.assert_allclose(matrix[:, :2] @ turn, np.eye(2), atol=1e-9)


def test_noisy_landmarks_are_met_by_least_squares_and_never_mirrored():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(5, 2)) * 30
    onto = points * [-1, 1]  # only a reflection would fit
    matrix = alignment.similarity(points, onto)
    assert np.linalg.det(matrix[:, :2]) > 0
    loss = lambda m: ((points @ m[:, :2].T + m[:, 2] - onto) ** 2).sum()
    for _ in range(200):
        a, b, *shift = rng.normal(size=4) * 0.05
        other = np.column_stack([matrix[:, :2] + [[a, -b], [b, a]], matrix[:, 2] + shift])
        assert loss(other) >= loss(matrix) - 1e-9


def test_the_112_template_is_hit_in_pixels():
    """A picture with five dots, drawn turned: each dot lands within half a pixel of its place in PAPER.md."""
    places = np.asarray([(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)])
    angle = 0.3
    turn = 1.7 * np.asarray([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = places @ turn.T + (90, 20)
    y, x = np.mgrid[:300, :300]
    photograph = np.zeros((300, 300, 3), np.uint8)
    for px, py in points:
        photograph[..., 0] = np.maximum(photograph[..., 0], 255 * np.exp(-((x - px) ** 2 + (y - py) ** 2) / 18))
    found = faces((0, 0, 1, 1), points=points[None].astype(np.float32))
    crop = alignment.crop(photograph, found, 0, Alignment(112, template="insightface"))[..., 0].astype(float)
    y, x = np.mgrid[:112, :112]
    for px, py in places:
        near = crop * (((x - px) ** 2 + (y - py) ** 2) < 36)
        assert abs((near * x).sum() / near.sum() - px) < 0.5
        assert abs((near * y).sum() / near.sum() - py) < 0.5


def test_openface_takes_three_points():
    points = np.asarray([(30, 40), (45, 41), (70, 42), (85, 40), (58, 70)], float)
    matrix = alignment.onto_template(points, TEMPLATES["openface"], 96)
    goal = np.asarray(TEMPLATES["openface"].points) * 96
    np.testing.assert_allclose(points[[0, 3, 4]] @ matrix[:, :2].T + matrix[:, 2], goal, atol=1e-4)


def test_what_cannot_be_aligned():
    photograph = np.zeros((50, 50, 3), np.uint8)
    with pytest.raises(BadInput, match="outside"):
        alignment.crop(photograph, faces((100, 100, 120, 120)), 0, Alignment(160, 0))
    with pytest.raises(BadInput, match="landmarks"):
        alignment.crop(photograph, faces((1, 1, 40, 40)), 0, Alignment(112, template="insightface"))
    with pytest.raises(BadInput, match="landmarks"):
        corners = faces((1, 1, 40, 40), points=np.ones((1, 5, 2)), landmarks=CORNERS)
        alignment.crop(photograph, corners, 0, Alignment(112, template="insightface"))
    for wrong in (
        {"template": "x"},
        {"choose": "x"},
        {"margin_of": "x"},
        {"size": 4},
        {"margin": -1},
        {"margin": 160, "margin_of": "crop"},
    ):
        with pytest.raises(BadInput):
            Alignment(**wrong)


def test_method_in_words():
    assert Alignment().method == "mtcnn margin 32 at 160"
    assert Alignment(112, template="insightface").method == "mtcnn insightface template at 112"
