"""The page of an evaluation: what it says, what it leaves out, and that it stands alone."""

import dataclasses
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from facenet_jax.evaluation.pairs import verify
from facenet_jax.report import page

VOID = {"meta", "img", "br", "wbr"}


class Reader(HTMLParser):
    """Tags, attributes and text; fails where tags do not close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert not reader.open
    return reader


def written(tmp_path: Path, report: page.Report) -> Reader:
    page.write(tmp_path / "report.html", report)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    return read(tmp_path / "report.html")


def embeddings_of_people(people: int, images: int, noise: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(people), images)
    points = rng.normal(size=(people, 16))[labels] + noise * rng.normal(size=(len(labels), 16))
    return points / np.linalg.norm(points, axis=1, keepdims=True), labels


def bare_report(pairs: int = 400, folds: int = 10, **settings) -> page.Report:
    """Only what every report has."""
    rng = np.random.default_rng(1)
    same = np.arange(pairs) % 2 == 0
    first = rng.normal(size=(pairs, 8))
    second = np.where(same[:, None], first + 0.5 * rng.normal(size=(pairs, 8)), rng.normal(size=(pairs, 8)))
    first, second = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (first, second))
    found = verify(first, second, same, np.arange(pairs) * folds // pairs, **settings)
    return page.Report("A report", found, np.square(first - second).sum(1), same, (), (), np.empty((0, 8)), np.empty(0, np.str_))


def without_plots() -> page.Report:
    return dataclasses.replace(bare_report(), distances=np.empty(0), same=np.empty(0, bool))


def mistake(same: bool, caption: str = "a/a_0001, b/b_0002") -> page.Mistake:
    pictures = np.random.default_rng(2).integers(0, 255, (2, 40, 30, 3), np.uint8)
    return page.Mistake(pictures[0], pictures[1], same, 1.234567, 0.98765, caption)


def full_report() -> page.Report:
    embeddings, labels = embeddings_of_people(4, 6)
    values = {"loss": 0.2, "triplet_loss": 0.2, "active": 0.5, "positive": 0.4, "negative": 0.9, "spread": 0.8, "images_per_s": 900.0}
    train = [{"kind": "train", "step": step, **values} for step in range(10, 100, 10)]
    evaluation = [{"kind": "evaluation", "step": 90, "accuracy": 0.9, "val": 0.5}]
    return dataclasses.replace(
        bare_report(far_target=0.01),
        mistakes=(mistake(False), mistake(True)),
        metrics=(*train, *evaluation),
        embeddings=embeddings,
        people=np.asarray(["Ann", "Bob", "Cid", "Dée"])[labels],
        command="python -m experiments.evaluate --flip",
        details={"weights_fingerprint": "0a1b2c"},
    )


@pytest.fixture(scope="module")
def full_page(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    page.write(path, full_report())
    return path


def test_holds_the_numbers(full_page):
    found = full_report().verification
    text = read(full_page).text
    shares = (found.accuracy, found.accuracy_sem, found.accuracy_std, found.val, found.val_std, found.far, found.eer)
    for share in (*shares, *found.fold_accuracies):
        assert f"{100 * share:.2f}%" in text
    for threshold in found.fold_thresholds:
        assert f"{threshold:#.4g}" in text
    assert f"{found.auc:.4f}" in text
    for words in ("400 pairs in 10 folds", "no image missing", "squared distance", "exact mode", "FAR target 0.01", "same (200)"):
        assert words in text
    assert f"median threshold {np.median(found.fold_thresholds):.3g}" in text
    for words in ("python -m experiments.evaluate --flip", "weights fingerprint", "0a1b2c"):
        assert words in text
    for words in ("False accepts", "1.235 < 0.9877", "False rejects", "1.235 ≥ 0.9877", "a/a_0001, b/b_0002"):
        assert words in text
    for words in ("Loss", "Shares", "Images per second", "Evaluation", "Ann", "Dée", "24 images of the 4 people"):
        assert words in text


def test_stands_alone(full_page):
    reader = read(full_page)
    raw = full_page.read_text()
    assert not re.search(r"https?://", raw)
    assert "script" not in reader.tags and "link" not in reader.tags
    assert not re.search(r"url\((?!#)|@import", raw)
    assert sum(name == "src" for name, _ in reader.attributes) == 4
    for name, value in reader.attributes:
        assert not name.startswith("on")
        if name in ("src", "href"):
            assert value.startswith(("data:image/jpeg;base64,", "#"))


def test_references_inside_plots_resolve_to_one_element(full_page):
    raw = full_page.read_text()
    names = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', raw))
    assert names
    for name in names:
        assert raw.count(f'id="{name[0] or name[1]}"') == 1


def test_the_same_report_is_the_same_file(full_page, tmp_path):
    written(tmp_path, full_report())
    assert (tmp_path / "report.html").read_bytes() == full_page.read_bytes()


def test_leaves_out_what_is_absent(tmp_path):
    text = written(tmp_path, bare_report()).text
    assert "ROC" in text and "Folds" in text
    for words in ("mistakes", "False", "Training", "Map of people", "repeat"):
        assert words not in text


def test_escapes_every_text(tmp_path):
    evil = '"><script>alert(1)</script>&$\\_{'
    report = full_report()
    report = dataclasses.replace(
        report,
        title=evil,
        command=evil,
        details={evil: evil},
        mistakes=(mistake(True, evil),),
        people=np.where(report.people == "Ann", evil, report.people),
        verification=dataclasses.replace(report.verification, distance=evil, mode=evil),
    )
    reader = written(tmp_path, report)
    assert "script" not in reader.tags
    # Title twice, facts twice, command, detail twice, caption, person, and the axis of the histogram.
    assert reader.text.count("<script>alert(1)</script>") == 10


def test_writes_names_that_are_not_utf8(tmp_path):
    written(tmp_path, dataclasses.replace(without_plots(), command=b"caf\xe9".decode("utf-8", "surrogateescape")))


@pytest.mark.parametrize("thresholds", [[math.inf] * 10, [-math.inf] * 5 + [math.inf] * 5, [1.0] * 9 + [math.inf]])
def test_infinite_thresholds(tmp_path, thresholds):
    report = bare_report()
    found = dataclasses.replace(report.verification, fold_thresholds=thresholds, fold_val_thresholds=[math.inf] * 10)
    one = dataclasses.replace(mistake(False), threshold=math.inf)
    text = written(tmp_path, dataclasses.replace(report, verification=found, mistakes=(one,))).text
    assert "∞" in text and "1.235 < ∞" in text
    assert ("median threshold" in text) == (thresholds[0] == 1)


@pytest.mark.parametrize("kept", [slice(0, 0), slice(0, 1), slice(1, 2), slice(0, 2), slice(0, None, 2), slice(1, None, 2)])
def test_few_pairs_or_of_one_kind(tmp_path, kept):
    report = bare_report()
    same = report.same[kept]
    text = written(tmp_path, dataclasses.replace(report, distances=report.distances[kept], same=same)).text
    assert ("true accept rate" in text) == (len(set(same)) == 2)
    assert ("share of pairs" in text) == bool(len(same))


def test_equal_and_infinite_distances(tmp_path):
    report = bare_report()
    written(tmp_path, dataclasses.replace(report, distances=np.ones_like(report.distances)))
    raw = np.where(np.arange(400) % 7, report.distances, np.inf)
    raw[::11] = np.nan
    assert f"same ({np.isfinite(raw[report.same]).sum()})" in written(tmp_path, dataclasses.replace(report, distances=raw)).text
    assert "nan" not in (tmp_path / "report.html").read_text().lower()


def test_missing_images_and_mean_subtraction_are_said(tmp_path):
    report = bare_report(mean_subtraction=True)
    text = written(tmp_path, dataclasses.replace(report, verification=dataclasses.replace(report.verification, missing=10))).text
    assert "10 lack an image and count as wrong (97.50% covered)" in text
    # Distances and thresholds are both of the tested folds, so the line belongs into the histogram here too.
    assert "mean subtracted" in text and "median threshold" in text


def test_target_that_the_pairs_cannot_show(tmp_path):
    text = written(tmp_path, bare_report(far_target=1e-5)).text
    assert "200 different pairs cannot show a FAR of 1e-05" in text and "FAR target" not in text.replace("the FAR target", "")


def test_metrics_that_are_not_numbers_are_passed_over(tmp_path):
    bad = ({"step": 1, "loss": math.nan}, {"loss": 0.5}, {"step": 2, "loss": "low"}, {"step": 3})
    lines = tuple({"kind": "train", **line} for line in bad)
    assert not len(page._series(lines, "train", "loss"))
    report = dataclasses.replace(without_plots(), metrics=lines)
    assert "Training" not in written(tmp_path, report).text
    good = {"kind": "train", "step": 4, "loss": 0.4}
    assert "Loss" in written(tmp_path, dataclasses.replace(report, metrics=(*lines, good))).text


def test_long_runs_are_thinned_to_their_means():
    metrics = [{"kind": "train", "step": step, "loss": float(step % 2)} for step in range(100_000)]
    points = page._series(metrics, "train", "loss")
    assert points.shape == (page.CURVE_POINTS, 2)
    np.testing.assert_allclose(points[:, 1], 0.5)


@pytest.mark.parametrize(("count", "dimensions", "shown"), [(4, 8, False), (5, 8, True), (5, 1, True)])
def test_map_of_few_points(count, dimensions, shown):
    points = np.random.default_rng(0).normal(size=(count, dimensions))
    assert bool(page._map(dataclasses.replace(bare_report(), embeddings=points, people=np.asarray(["x"] * count)))) == shown


def test_map_of_a_collapsed_network():
    report = dataclasses.replace(bare_report(distance="cosine"), embeddings=np.zeros((12, 8)), people=np.repeat(["a", "b"], 6))
    drawn = page._map(report)
    assert "<svg" in drawn and "nan" not in drawn.lower()


def test_map_takes_the_people_with_most_images():
    people = np.random.default_rng(0).permutation(np.repeat(np.arange(40), np.arange(40) + 11))
    rows, ranks = page._choose_people(people)
    assert len(rows) <= page.MAP_POINTS and len(set(rows)) == len(rows)
    assert [people[rows[ranks == rank]][0] for rank in range(20)] == list(range(39, 19, -1))
    assert all(len(set(people[rows[ranks == rank]])) == 1 for rank in range(20))


@pytest.mark.parametrize(("shape", "dtype"), [((4, 4, 3), float), ((4, 4), np.uint8), ((0, 4, 3), np.uint8), ((4, 4, 4), np.uint8)])
def test_a_bad_picture_leaves_the_old_page(tmp_path, shape, dtype):
    bad = np.zeros(shape, dtype)
    path = tmp_path / "report.html"
    path.write_text("before")
    report = dataclasses.replace(without_plots(), mistakes=(mistake(True), dataclasses.replace(mistake(False, "k/k_0001"), second=bad)))
    with pytest.raises(ValueError, match="k/k_0001"):
        page.write(path, report)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_nothing(tmp_path):
    path = tmp_path / "report.html"
    path.mkdir()
    with pytest.raises(OSError):
        page.write(path, without_plots())
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("thresholds", [[1.0, 0.8, 1.2, 0.9], [math.inf, 0.8, -math.inf, 0.9]])
@pytest.mark.parametrize("count", [0, 3, 1000])
def test_worst_pairs_against_a_loop(thresholds, count):
    rng = np.random.default_rng(3)
    distances, same, fold = rng.uniform(0, 2, 200), rng.random(200) < 0.5, rng.integers(0, 4, 200)
    distances[:4], fold[:4] = 0.9, 3  # exactly at the threshold: rejected
    accepts, rejects = [], []
    for i in range(200):
        accepted = distances[i] < thresholds[fold[i]]
        if accepted and not same[i]:
            accepts.append((distances[i] - thresholds[fold[i]], distances[i], i))
        if not accepted and same[i]:
            rejects.append((thresholds[fold[i]] - distances[i], -distances[i], i))
    found_accepts, found_rejects = page.worst_pairs(distances, same, fold, thresholds, count)
    assert found_accepts.tolist() == [i for *_, i in sorted(accepts)[:count]]
    assert found_rejects.tolist() == [i for *_, i in sorted(rejects)[:count]]


def test_worst_pairs_of_nothing():
    none = page.worst_pairs(np.empty(0), np.empty(0, bool), np.empty(0, int), [1.0, 1.0])
    assert [len(part) for part in none] == [0, 0]
    right = page.worst_pairs(np.asarray([0.1, 1.9]), np.asarray([True, False]), np.asarray([0, 1]), [1.0, 1.0])
    assert [len(part) for part in right] == [0, 0]
