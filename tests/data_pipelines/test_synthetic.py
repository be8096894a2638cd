"""Tests of the cartoon people: the same call gives the same picture, people differ, and raw pixels do not tell them apart."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.synthetic import draw


def _standardised(images: np.ndarray) -> np.ndarray:
    flat = images.reshape(len(images), -1).astype(np.float32)
    return (flat - flat.mean(axis=1, keepdims=True)) / flat.std(axis=1, keepdims=True)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 2**31), st.sampled_from([24, 33, 64]), st.integers(0, 2**31))
def test_any_person_and_image_can_be_drawn_twice_alike(identity: int, image: int, size: int, seed: int) -> None:
    picture = draw(identity, image, size, seed)
    assert picture.dtype == np.uint8
    assert picture.shape == (size, size, 3)
    assert picture.std() > 5  # Even the darkest, palest shot shows something.
    np.testing.assert_array_equal(picture, draw(identity, image, size, seed))


def test_identity_image_and_seed_each_change_the_picture() -> None:
    pictures = [draw(*arguments) for arguments in [(3, 0), (4, 0), (3, 1), (3, 0, 64, 1), (0, 3), (0, 0), (0, 1)]]
    for first in range(len(pictures)):
        for second in range(first):
            assert np.abs(pictures[first].astype(int) - pictures[second]).mean() > 5


def test_drawing_order_does_not_matter() -> None:
    expected = [draw(identity, 2) for identity in range(3)]
    backwards = [draw(identity, 2) for identity in reversed(range(3))]
    np.testing.assert_array_equal(expected, backwards[::-1])


@pytest.mark.parametrize("identity", range(8))
def test_another_size_is_the_same_scene(identity: int) -> None:
    small = draw(identity, 0, 64).astype(np.float32)
    large = cv2.resize(draw(identity, 0, 128), (64, 64), interpolation=cv2.INTER_AREA).astype(np.float32)
    assert np.corrcoef(small.ravel(), large.ravel())[0, 1] > 0.95


def test_the_average_image_of_a_person_is_the_persons_own() -> None:
    """Averaging cancels the light and the background, and what stays, the traits, recurs in other images of the same person."""
    people, images = 20, 40
    faces = _standardised(np.stack([draw(person, image, 24) for person in range(people) for image in range(images)]))
    faces = faces.reshape(people, 2, images // 2, -1).mean(axis=2)
    distances = np.square(faces[:, None, 0] - faces[None, :, 1]).sum(axis=-1)
    assert np.mean(distances.argmin(axis=1) == np.arange(people)) > 0.5  # Chance is 0.05.


def test_raw_pixels_hardly_tell_people_apart() -> None:
    people, images = 60, 4
    faces = _standardised(np.stack([draw(person, image, 32) for person in range(people) for image in range(images)]))
    owner = np.repeat(np.arange(people), images)
    squares = np.square(faces).sum(axis=1)
    first, second = np.triu_indices(len(faces), 1)
    distances = (squares[:, None] + squares - 2 * faces @ faces.T)[first, second]
    same = owner[first] == owner[second]
    thresholds = np.quantile(distances, np.linspace(0, 1, 200))
    # The mean of both kinds' accuracy, at the threshold that suits these very pairs best: an upper bound of what held-out folds give.
    best = max((np.mean(distances[same] < limit) + np.mean(distances[~same] >= limit)) / 2 for limit in thresholds)
    assert 0.5 < best < 0.75
