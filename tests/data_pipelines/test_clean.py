"""The cleaning command and the files it writes."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from data_pipelines import clean, records
from data_pipelines.cleaning import report
from data_pipelines.cleaning.exclusions import read_exclusions
from data_pipelines.cleaning.faces import open_faces
from facenet_jax.errors import BadInput
from tests.data_pipelines.cleaning.planted import make, planted_overlap


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
