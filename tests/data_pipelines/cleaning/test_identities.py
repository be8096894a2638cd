"""People whose images disagree and people in two folders, against brute force and planted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import clean
from data_pipelines.cleaning.exclusions import Exclusions
from data_pipelines.cleaning.identities import identities, pieces, spread
from tests.data_pipelines.cleaning.planted import SIZE, all_distances, make, normalised


def naive_pieces(x, cut):
    """Average linkage as its definition says."""
    d = all_distances(x, x)
    found = [[i] for i in range(len(x))]
    while len(found) > 1:
        means = {(a, b): d[np.ix_(found[a], found[b])].mean() for b in range(len(found)) for a in range(b)}
        (a, b), least = min(means.items(), key=lambda item: item[1])
        if least > cut:
            break
        found[a] += found.pop(b)
    return sorted((sorted(piece) for piece in found), key=lambda piece: (-len(piece), piece[0]))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 14), cut=st.sampled_from([0.5, 1.2, 1.6, 2.0]))
def test_pieces(seed, n, cut):
    x = normalised(np.random.default_rng(seed).normal(size=(n, 5)))
    assert [piece.tolist() for piece in pieces(x, cut)] == naive_pieces(x, cut)


@settings(max_examples=20, deadline=None)
@given(counts=st.lists(st.integers(1, 6), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_spread(counts, seed):
    faces = make(counts, seed, noise=1.5)
    expected = []
    for of in faces.rows:
        d = all_distances(faces.embeddings[of], faces.embeddings[of])
        expected.append(d[np.triu_indices(len(of), 1)].mean() if len(of) > 1 else 0)
    np.testing.assert_allclose(spread(faces.centres, np.asarray(counts)), expected, atol=1e-6)


def test_mixed_and_divided_people():
    faces = make([9, 8, 6, 4, 5, 1])
    x = faces.embeddings
    stranger = make([3, 4, 1], seed=9).embeddings
    x[6:9] = stranger[:3]  # three of the nine images of p0 are of one other person
    x[13:17] = stranger[3:7]  # half of p1's
    x[17] = stranger[7]  # a single image of p2's is an outlier, no second person
    p2 = x[18:23].mean(0)
    x[23:27] = normalised(p2 + 0.3 * normalised(np.random.default_rng(1).normal(size=(4, SIZE))))  # p3 is p2
    found = identities(faces, **clean.options("identities", {}))
    disagreeing, one = found.sections
    assert {f.facts["identity"]: [len(piece) for piece in f.facts["pieces"]] for f in disagreeing.findings} == {"p0": [6, 3], "p1": [4, 4]}
    for f in disagreeing.findings:
        large, small = ([faces.source.keys.tolist().index(key) for key in piece] for piece in f.facts["pieces"][:2])
        assert f.distance == pytest.approx(all_distances(x[large], x[small]).mean(), abs=1e-6)
    assert [f.facts["identities"] for f in one.findings] == [["p2", "p3"]]
    facts = one.findings[0].facts
    between = all_distances(x[17:23], x[23:27])
    assert facts["closest_distance"] == pytest.approx(between.min(), abs=1e-6) and facts["mean_distance"] == pytest.approx(
        between.mean(), abs=1e-6
    )
    assert facts["closest_pair"] == [f"p2/{17 + between.min(1).argmin()}", f"p3/{23 + between.min(0).argmin()}"]
    assert set(found.exclusions.images) == {"p0/6", "p0/7", "p0/8"}
    assert set(found.exclusions.people) == {"p1", "p3"}
    # Near centres are not enough where no two images are near.
    apart = identities(faces, **clean.options("identities", {"closest": facts["closest_distance"]}))
    assert set(apart.exclusions.people) == {"p1"} and not apart.sections[1].findings


def test_of_two_folders_of_one_person_one_stays():
    faces = make([8, 2, 5])
    x = faces.embeddings
    x[4:8] = make([4], seed=9).embeddings  # p0 is two people, with half of its images each
    # And so is p1, of whom there are too few images to tell.
    x[8:10] = normalised(x[[0, 4]] + 0.1 * normalised(np.random.default_rng(2).normal(size=(1, SIZE))))
    found = identities(faces, **clean.options("identities", {}))
    assert [f.facts["identities"] for f in found.sections[1].findings] == [["p0", "p1"]]
    assert set(found.exclusions.people) == {"p0"}


def test_one_person_alone():
    found = identities(make([3]), 0.4, 0.5, 1.5)
    assert found.exclusions == Exclusions() and not any(section.findings for section in found.sections)
