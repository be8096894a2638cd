"""Duplicates, planted."""

import numpy as np
import pytest

from data_pipelines.cleaning.duplicates import duplicates
from facenet_jax.errors import BadInput
from tests.data_pipelines.cleaning.planted import SIZE, make, normalised, picture


def test_planted_duplicates():
    faces = make([6, 6, 1, 5])
    data, x, rng = faces.source.data, faces.embeddings, np.random.default_rng(5)
    data[4] = data[1]  # the same file, one person
    data[8] = picture((0, 3), compress_level=1)  # the pixels of row 3, other bytes, another person: row 3 agrees with its own
    data[12] = data[10]  # of a person with no other image
    for row, twin in ((4, 1), (8, 3), (12, 10), (17, 14), (16, 5)):
        x[row] = x[twin]
    near = normalised(x[[14, 5]] + 0.02 * normalised(rng.normal(size=(2, SIZE))))
    x[[17, 16]] = near  # nearly the same: of one person; and of another's, where it is a stranger
    found = duplicates(faces, 0.05)
    by_kind = {section.name: [(f.facts["kept"], f.facts["dropped"]) for f in section.findings] for section in found.sections}
    within = {frozenset(pair) for name in ("bytes_within", "near_within") for pair in by_kind.pop(name)}
    assert within == {frozenset(("p0/1", "p0/4")), frozenset(("p3/14", "p3/17"))}
    assert by_kind == {
        "pixels_within": [],
        "bytes_between": [("p1/10", "p2/12")],
        "pixels_between": [("p0/3", "p1/8")],
        "near_between": [("p0/5", "p3/16")],
    }
    assert set(found.exclusions.images) == {f.facts["dropped"] for section in found.sections for f in section.findings}
    exact = duplicates(faces, 0)
    assert len(exact.exclusions.images) == 3 and exact.numbers["near_within"] == exact.numbers["near_between"] == 0


def test_many_copies_leave_one():
    faces = make([9, 3])
    for row in (2, 5, 6, 11):
        faces.source.data[row] = faces.source.data[0]
        faces.embeddings[row] = faces.embeddings[0]
    found = duplicates(faces, 0.05)
    twins = {"p0/0", "p0/2", "p0/5", "p0/6", "p1/11"}
    assert len(found.exclusions.images) == 4 and set(found.exclusions.images) < twins and "p1/11" in found.exclusions.images


def test_a_record_that_does_not_decode():
    faces = make([2])
    faces.source.data[1] = b"\xff\xd8 no picture"
    with pytest.raises(BadInput, match="p0/1"):
        duplicates(faces, 0.05)
