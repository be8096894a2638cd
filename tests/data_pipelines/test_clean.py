"""Cleaning against brute force, and against sets with known faults."""

import io
import json
import re
import subprocess
import sys
import unicodedata
from dataclasses import dataclass, field
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines import clean, records
from data_pipelines.cleaning import distances, report
from data_pipelines.cleaning.duplicates import duplicates
from data_pipelines.cleaning.exclusions import Exclusions, read_exclusions, write_exclusions
from data_pipelines.cleaning.faces import Faces, open_faces
from data_pipelines.cleaning.identities import identities, pieces, spread
from data_pipelines.cleaning.outliers import outliers
from data_pipelines.cleaning.overlap import overlap, plain_name
from facenet_jax.errors import BadInput

SIZE = 64


def picture(seed, **options):
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), np.uint8)
    Image.fromarray(pixels).save(out, "PNG", **options)
    return out.getvalue()


@dataclass
class Pictures:
    """Records in memory."""

    labels: np.ndarray
    keys: np.ndarray
    identities: np.ndarray
    data: list[bytes]
    metadata: dict = field(default_factory=dict)

    def image(self, index):
        return self.data[index]


def normalised(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def make(counts, seed=0, noise=0.5, prefix="p"):
    """Unrelated people of so many images each: two of one person about 0.4 apart, of two people about 2."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    people = normalised(rng.normal(size=(len(counts), SIZE)))
    x = normalised(people[labels] + noise * normalised(rng.normal(size=(len(labels), SIZE))))
    names = np.asarray([f"{prefix}{i}" for i in range(len(counts))], "<U40")
    keys = np.asarray([f"{names[label]}/{row}" for row, label in enumerate(labels)], "<U40")
    return Faces(Pictures(labels, keys, names, [picture((seed, row)) for row in range(len(labels))]), x, "weights")


def all_distances(x, y):
    return ((x.astype(np.float64)[:, None] - y.astype(np.float64)[None]) ** 2).sum(-1)


@st.composite
def rows(draw, least=0, most=50):
    """Unit rows, some of them copies and near copies of others."""
    n, d = draw(st.integers(least, most)), draw(st.sampled_from([1, 2, 7, 32]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.normal(size=(n, d)) + 1e-3
    if n:
        copies = rng.random(n) < 0.3
        x[copies] = x[rng.integers(n, size=copies.sum())] + rng.choice([0, 1e-3, 0.1], size=(copies.sum(), 1)) * rng.normal(
            size=(copies.sum(), d)
        )
    return normalised(x) if n else x.astype(np.float32)


@settings(max_examples=80, deadline=None)
@given(x=rows(), block=st.integers(1, 20), threshold=st.sampled_from([1e-6, 0.01, 0.3, 1.0, 4.0]))
def test_close_pairs(x, block, threshold):
    """Every pair below the threshold and no other, whatever the block."""
    expected = all_distances(x, x)
    first, second = np.nonzero(np.triu(expected < threshold, 1))
    found = distances.close_pairs(x, threshold, block)
    np.testing.assert_array_equal(found[0], first)
    np.testing.assert_array_equal(found[1], second)
    np.testing.assert_allclose(found[2], expected[first, second], rtol=1e-12, atol=1e-15)


def test_too_many_close_pairs():
    x = np.ones((40, 1), np.float32)
    assert len(distances.close_pairs(x, 0.1, 7, most=780)[0]) == 780
    with pytest.raises(BadInput, match=r"more than 779 pairs are closer than a threshold of 0\.1"):
        distances.close_pairs(x, 0.1, 7, most=779)


@settings(max_examples=60, deadline=None)
@given(x=rows(), y=rows(1), block=st.integers(1, 20))
def test_nearest(x, y, block):
    """The least distance; of rows that are equally near to float32's rounding any may be named."""
    y = np.resize(y, (len(y), x.shape[1])) if y.shape[1] != x.shape[1] else y
    y = normalised(y + 1e-3)
    expected = all_distances(x, y)
    row, distance = distances.nearest(x, y, block)
    np.testing.assert_allclose(distance, expected[np.arange(len(x)), row], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(distance, expected.min(1, initial=9), atol=2e-6)


@settings(max_examples=40, deadline=None)
@given(x=rows(2), block=st.integers(1, 20))
def test_nearest_other(x, block):
    expected = all_distances(x, x)
    np.fill_diagonal(expected, np.inf)
    row, distance = distances.nearest(x, x, block, but_itself=True)
    assert (row != np.arange(len(x))).all()
    np.testing.assert_allclose(distance, expected.min(1), atol=2e-6)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 15), seed=st.integers(0, 2**32 - 1), share=st.floats(0, 1))
def test_thin(n, seed, share):
    """No two that are kept are a pair; what goes has its nearest kept partner named; who comes first is kept before its partners."""
    rng = np.random.default_rng(seed)
    apart = np.triu(rng.random((n, n)), 1)
    first, second = np.nonzero((apart > 0) & (apart < share))
    order = rng.permutation(n).tolist()
    dropped = distances.thin(order, zip(first.tolist(), second.tolist(), apart[first, second].tolist()))
    both = apart + apart.T
    kept = []
    for item in order:
        twins = [(both[item, other], other) for other in kept if both[item, other] < share]
        assert (item in dropped) == bool(twins)
        if twins:
            assert dropped[item] == min(twins)[::-1]
        else:
            kept.append(item)


# Exclusions.

names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)


@settings(max_examples=80, deadline=None)
@given(images=st.dictionaries(names, names, max_size=5), people=st.dictionaries(names, names, max_size=5))
def test_exclusions_come_back(tmp_path_factory, images, people):
    """Whatever the names: the same exclusions, or an error that says why not."""
    path = tmp_path_factory.mktemp("list") / "exclude.txt"
    images = {f"{key}x": reason for key, reason in images.items()}
    odd = [name for name in (*images, *people) if "\t" in name or len(f"{name}/".splitlines()) > 1]
    if odd:
        with pytest.raises(BadInput, match="rename it"):
            write_exclusions(path, Exclusions(images, people))
        assert not path.exists()
        return
    write_exclusions(path, Exclusions(images, people))
    found = read_exclusions(path)
    assert set(found.images) == set(images) and set(found.people) == set(people)
    assert all(found.images[key] == " ".join(reason.split()) for key, reason in images.items())


def test_exclusions_by_hand(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffada/1\r\n\r\nZoë Ö./\n".encode())
    (tmp_path / "b.txt").write_text("bob/2\tblurred\nada/1\tblurred too")
    found = read_exclusions(tmp_path / "a.txt", tmp_path / "b.txt")
    assert found == Exclusions({"ada/1": "blurred too", "bob/2": "blurred"}, {"Zoë Ö.": ""})
    asked = [("ada/1", "ada"), ("ada/2", "ada"), ("x/9", "Zoë Ö."), ("bob/2", "other"), ("Zoë Ö./1", "Zoe")]
    assert [found.excluded(*one) for one in asked] == [True, False, True, True, False]
    assert found.unmatched(["ada/1", "ada/2"], ["ada"]) == ["bob/2", "Zoë Ö./"]
    assert read_exclusions() == Exclusions()


def test_exclusions_that_cannot_be_read(tmp_path):
    with pytest.raises(BadInput, match="no such list of exclusions"):
        read_exclusions(tmp_path / "none.txt")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="not UTF-8 text"):
        read_exclusions(tmp_path / "bad.txt")


# Outliers.


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


# Duplicates.


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


# Identities.


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


# Overlap.


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


def planted_overlap():
    faces, others = make([4, 3, 5, 2]), make([2, 3, 1], seed=7, prefix="q")
    others.embeddings[0] = faces.embeddings[5]  # a picture of p1
    others.embeddings[5] = normalised(faces.embeddings[7:12].mean(0, keepdims=True))[0]  # a face like p2's
    faces.source.identities[3], others.source.identities[1] = "Bjørk Guðmund", "guðmund, BJØRK"
    return faces, others


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


# Files and the command line.


def save(faces, directory, path, split, **changes):
    """The same faces as real records and a real file of embeddings."""
    with records.Writer(directory, directory.name, {split: 2}) as writer:
        for row, label in enumerate(faces.source.labels.tolist()):
            writer.add(split, faces.source.data[row], label, faces.person(label), faces.key(row))
        writer.finish({"identities": faces.source.identities.tolist()})
    # Records lie in shards in turns.
    order = np.concatenate([np.arange(len(faces.source.labels))[shard::2] for shard in (0, 1)])
    content = {
        "embeddings": faces.embeddings[order] * 3,
        "keys": faces.source.keys[order],
        "identities": faces.source.identities[faces.source.labels][order],
        "weights_fingerprint": np.asarray("weights"),
    }
    np.savez(path, **{name: value for name, value in {**content, **changes}.items() if value is not None})
    return order


def test_faces_from_files(tmp_path):
    faces = make([3, 2])
    order = save(faces, tmp_path / "r", tmp_path / "e.npz", "train")
    found = open_faces(str(tmp_path / "r"), "train", tmp_path / "e.npz")
    assert found.source.keys.tolist() == faces.source.keys[order].tolist() and found.fingerprint == "weights"
    np.testing.assert_allclose(found.embeddings, faces.embeddings[order], atol=1e-6)
    assert [found.source.labels[of].tolist() for of in found.rows] == [[0, 0, 0], [1, 1]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keys": np.asarray(["p0/0", "p0/2", "p1/4", "p0/1", "p1/33"])}, "embedding 4 is of p1/33, but record 4 is p1/3"),
        ({"keys": None}, "not an embeddings file"),
        ({"keys": np.asarray(["p0/0"])}, "do not belong together"),
        (
            {name: np.ones((4, 3)) if name == "embeddings" else np.asarray(list("abcd")) for name in ("embeddings", "keys", "identities")},
            "4 embeddings, but 5 records",
        ),
        ({"embeddings": np.diag([1, 1, 0, 1, 1])}, "1 embeddings have no direction (zero or not finite), the first is p1/4"),
        ({"embeddings": np.full((5, 2), np.nan)}, "5 embeddings have no direction"),
        ({"embeddings": np.ones(5)}, "do not belong together"),
        ({"keys": np.asarray([object()] * 5)}, "not an embeddings file"),
    ],
)
def test_embeddings_of_other_records(tmp_path, changes, words):
    save(make([3, 2]), tmp_path / "r", tmp_path / "e.npz", "train", **changes)
    with pytest.raises(BadInput, match=re.escape(words)):
        open_faces(str(tmp_path / "r"), "train", tmp_path / "e.npz")


def test_embeddings_that_are_no_file(tmp_path):
    save(make([3, 2]), tmp_path / "r", tmp_path / "e.npz", "train")
    with pytest.raises(BadInput, match="no such embeddings file"):
        open_faces(str(tmp_path / "r"), "train", tmp_path / "none.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "e.npz").read_bytes()[:300])
    with pytest.raises(BadInput, match="not an embeddings file"):
        open_faces(str(tmp_path / "r"), "train", tmp_path / "cut.npz")


def test_options():
    assert clean.options("duplicates", {"threshold": 0.2, "cut": None}) == {"threshold": 0.2}
    assert clean.options("outliers", {"percentile": 99.0})["percentile"] == 99
    for mode, given_options, words in (
        ("tidy", {}, "no mode named 'tidy'"),
        ("duplicates", {"cut": 1.0}, "--cut is not for duplicates but for identities"),
        ("outliers", {"percentile": 99.0, "threshold": 1.0}, "not both"),
    ):
        with pytest.raises(BadInput, match=words):
            clean.options(mode, given_options)


class Page(HTMLParser):
    """Which tags are open, which pictures there are, and all text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.sources, self.words = [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "link", "iframe")
        if tag == "img":
            self.sources.append(dict(attributes)["src"])
        if tag not in ("img", "meta", "wbr", "br", "path", "use"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        if tag not in ("path", "use"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


@pytest.mark.parametrize("mode", ["outliers", "duplicates", "identities", "overlap"])
def test_files_that_are_written(tmp_path, mode):
    faces, others = planted_overlap()
    x = faces.embeddings
    faces.source.identities[0] = "<p&0>"
    faces.source.keys[:4] = ["<p&0>/0", "<p&0>/1", "<p&0>/2", "<p&0>/3"]
    faces.source.data[2] = faces.source.data[1]
    x[2:4] = x[8:10]
    x[11] = make([1], seed=50).embeddings[0]
    sets = (faces, others) if mode == "overlap" else (faces,)
    found = clean.MODES[mode].find(*sets, **clean.options(mode, {}))
    report.write(tmp_path / "out", "A < B", found, {"mode": mode}, pictures=1)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["exclude.txt", "report.html", "report.json"]
    assert set(read_exclusions(tmp_path / "out" / "exclude.txt").images) == set(found.exclusions.images)
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["mode"] == mode and written["numbers"] == found.numbers
    findings = [finding for section in found.sections for finding in section.findings]
    assert findings and sum(len(written[section.name]) for section in found.sections) == len(findings)
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert not page.open and "A < B" in page.words
    shown = [section.findings[0] for section in found.sections if section.findings]
    assert len(page.sources) == sum(len(line) for finding in shown for line in finding.pictures)
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    assert all(finding.caption in page.words for finding in shown)


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "data_pipelines.clean", *arguments], capture_output=True, text=True)


def test_command_line(tmp_path):
    faces, others = planted_overlap()
    save(faces, tmp_path / "ours", tmp_path / "ours.npz", "train")
    save(others, tmp_path / "theirs", tmp_path / "theirs.npz", "test")
    common = [f"--records={tmp_path}/ours", f"--embeddings={tmp_path}/ours.npz", f"--output={tmp_path}/out"]
    other = [f"--other_records={tmp_path}/theirs", f"--other_embeddings={tmp_path}/theirs.npz"]
    done = run("overlap", *common, *other)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["people_excluded"] == 3
    assert set(read_exclusions(tmp_path / "out" / "exclude.txt").people) == {"p1", "p2", "Bjørk Guðmund"}
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["threshold"] == 0.6 and "data_pipelines.clean overlap" in written["command"] and len(written["records_hash"]) == 2
    save(others, tmp_path / "again", tmp_path / "theirs.npz", "test", weights_fingerprint=np.asarray("others"))
    done = run("overlap", *common, *other)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "embed both with the same weights" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "expected one MODE of outliers, duplicates, identities, overlap"),
        (["outliers", "--records=x"], "--records, --embeddings and --output are needed"),
    ],
)
def test_command_lines_that_cannot_be_run(arguments, words):
    done = run(*arguments)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
