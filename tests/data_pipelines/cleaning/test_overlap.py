"""Overlap of two sets, against brute force and planted."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import clean
from data_pipelines.cleaning.overlap import overlap, plain_name
from tests.data_pipelines.cleaning.planted import all_distances, make, normalised, planted_overlap


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Renée_Zellweger", "renee zellweger", True),
        ("Zellweger, Renée", "Renee_Zellweger", True),
        (unicodedata.normalize("NFD", "Zoë"), "ZOE", True),
        ("Wang_Nan", "Nan_Wang", True),
        ("Jean-Claude Juncker", "Jean_Claude_Juncker", True),
        ("王菲", "王菲", True),
        ("John_Smith", "Jon_Smith", False),
        ("Ann Marie", "Annmarie", False),
    ],
)
def test_names(one, other, same):
    assert (plain_name(one) == plain_name(other)) == same and plain_name(one)


def test_numbers_are_no_names():
    assert plain_name("0012") == plain_name("--") == "" and plain_name("n000012") == "n000012"


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 999),
    counts=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    other=st.lists(st.integers(1, 4), min_size=1, max_size=6),
)
def test_overlap_against_brute_force(seed, counts, other):
    faces, others = make(counts, seed, noise=2), make(other, seed + 1, noise=2, prefix="q")
    d = all_distances(faces.embeddings, others.embeddings)
    centres = [normalised(np.stack([f.embeddings[of].mean(0, dtype=np.float64) for of in f.rows])) for f in (faces, others)]
    c = all_distances(*centres)
    threshold = float(np.median(d))
    found = overlap(faces, others, threshold)
    for label, (of, facts) in enumerate(zip(faces.rows, found.records["all_people"], strict=True)):
        row, pair = np.unravel_index(d[of].argmin(), d[of].shape)
        assert facts["identity"] == f"p{label}" and facts["images"] == len(of) and facts["same_name"] == ""
        assert facts["closest_pair"] == [faces.source.keys[of[row]], others.source.keys[pair]]
        assert facts["closest_identity"] == f"q{others.source.labels[pair]}"
        assert facts["closest_distance"] == pytest.approx(d[of].min(), abs=1e-9)
        assert facts["centre_identity"] == f"q{c[label].argmin()}" and facts["centre_distance"] == pytest.approx(c[label].min(), abs=1e-5)
        assert facts["excluded"] == (f"p{label}" in found.exclusions.people) == (min(d[of].min(), facts["centre_distance"]) < threshold)
    table = found.table[1:]
    best, nearest = (np.asarray([facts[name] for facts in found.records["all_people"]]) for name in ("closest_distance", "centre_distance"))
    for step, by_images, by_centres, either in table:
        at = min((*(t for t in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)), threshold), key=lambda t: abs(t - float(step)))
        assert (int(by_images), int(by_centres), int(either)) == (
            (best < at).sum(),
            (nearest < at).sum(),
            (np.minimum(best, nearest) < at).sum(),
        )


def test_planted_overlap():
    faces, others = planted_overlap()
    found = overlap(faces, others, **clean.options("overlap", {}))
    assert set(found.exclusions.people) == {"p1", "p2", "Bjørk Guðmund"} and not found.exclusions.images
    by_name, by_face = ([f.facts["identity"] for f in section.findings] for section in found.sections)
    assert by_name == ["Bjørk Guðmund"] and by_face == ["p1", "p2"]
    assert "same name as guðmund, BJØRK" in found.exclusions.people["Bjørk Guðmund"]
    # Of a namesake it tells the distance to them, not to whoever is closest.
    apart = all_distances(faces.embeddings[12:14], others.embeddings[2:5]).min()
    assert found.sections[0].findings[0].distance <= apart and f"closest images at {apart:.3f}" in found.sections[0].findings[0].caption
    assert found.numbers["images_excluded"] == 10
    assert [f.facts["excluded"] for f in found.sections[1].findings] == [True, True]
