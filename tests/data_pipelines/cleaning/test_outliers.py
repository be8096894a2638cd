"""Outliers, against the original code's metric and planted ones."""

import numpy as np
import pytest

from data_pipelines import clean
from data_pipelines.cleaning.exclusions import Exclusions
from data_pipelines.cleaning.outliers import outliers
from tests.data_pipelines.cleaning.planted import make


def test_outliers_by_the_original_metric():
    """The original's arithmetic, person by person; its distances are the roots of ours."""
    faces = make([5, 1, 9, 2], seed=3, noise=1.0)
    expected = []
    for label in range(4):
        of = faces.embeddings[faces.source.labels == label]
        expected.append(np.sqrt(np.sum(np.square(of - np.mean(of, axis=0)), axis=1)))
    expected = np.concatenate(expected).astype(np.float64) ** 2
    for percentile in (1, 50, 90):
        found = outliers(faces, 0, percentile)
        threshold = np.percentile(expected, percentile)
        assert found.numbers["threshold"] == pytest.approx(threshold, abs=1e-6)
        assert set(found.exclusions.images) == set(faces.source.keys[expected > threshold])
    listed = [(finding.facts["image"], finding.distance) for finding in outliers(faces, 0.3).sections[0].findings]
    assert [key for key, _ in listed] == faces.source.keys[np.argsort(-expected)][: (expected > 0.3).sum()].tolist()
    np.testing.assert_allclose([distance for _, distance in listed], np.sort(expected)[::-1][: len(listed)], atol=1e-6)


def test_planted_outliers_and_people_left_with_too_few():
    faces = make([8, 8, 4, 1])
    faces.embeddings[[3, 17]] = faces.embeddings[[12, 0]]
    found = outliers(faces, **clean.options("outliers", {}))
    assert found.exclusions == Exclusions({key: found.exclusions.images[key] for key in ("p0/3", "p2/17")}, {})
    found = outliers(faces, 0.75, minimum_images=4)
    assert set(found.exclusions.people) == {"p2", "p3"} and found.numbers["people_excluded"] == 2
    # At the highest percentile nothing is further; with people of one image each nothing has a distance.
    assert not outliers(faces, 0, percentile=100).exclusions.images
    assert not outliers(make([1, 1, 1]), 0, percentile=50).exclusions.images
