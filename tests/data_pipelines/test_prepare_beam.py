"""`prepare_beam` beside `prepare`: the same directory, byte for byte, with and without a runner's retries and batches."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import detected, prepare, records
from facenet_jax import detection
from facenet_jax.alignment import Alignment
from facenet_jax.errors import BadInput
from tests.data_pipelines.test_align import HOW, WHAT, Red, collection, odd_files, people, picture, run, tree  # noqa: F401 - people is a fixture

pytestmark = pytest.mark.beam
pytest.importorskip("apache_beam", reason="pip install -r requirements-beam.txt")
from apache_beam.options.pipeline_options import PipelineOptions  # noqa: E402

from data_pipelines import beam_steps  # noqa: E402

HERE = PipelineOptions(["--runner=FnApiRunner", "--direct_running_mode=in_memory"])


@pytest.fixture(autouse=True)
def detectors(monkeypatch):
    """The workers' detector, without the weights it would fetch."""
    beam_steps.places.cache_clear()
    made = []

    def create(name, **settings):
        made.append(Red())
        return made[-1]

    monkeypatch.setattr(detection, "create", create)
    monkeypatch.setattr(beam_steps.pretrained, "fetch", lambda name: None)
    return made


def job(root, output, settings, held_out=0, images_per_shard=4, what=None, crops=None, exclude=()):
    found = prepare.taken(prepare.photographs(root), exclude)
    _, split_of = prepare.splits_of(found, held_out, "train")
    shards = tuple(prepare.shards_of(found, split_of, images_per_shard).items())
    aside = str(output.with_name(".aside"))
    hashed = beam_steps.listing_of(found)
    return beam_steps.Job(str(root), "auto", exclude, hashed, settings, what, crops, "train", held_out, shards, aside, output.name)


def by_prepare(root, output, settings, held_out=0, images_per_shard=4, what=None, crops=None, exclude=()):
    found = prepare.taken(prepare.photographs(root), exclude)
    where = detected.find_faces(found, what, output.with_suffix(".jsonl"), detector=Red()) if what else None
    if crops:
        where = prepare.crops_by_key(found, prepare.read_crops(Path(crops[0]), crops[1]))
    options = {"held_out": held_out, "images_per_shard": images_per_shard, "reject_limit": 0.9}
    return prepare.prepare(found, output, settings, where=where, alignment={"method": "x"}, **options)


@pytest.mark.parametrize("kind", ["as they are", "found", "middle", "crops", "excluded"])
def test_the_same_directory_as_prepare(tmp_path, kind, detectors):
    root = collection(tmp_path / "in", 14)
    odd_files(root)
    options = {"held_out": 1}
    settings = prepare.Settings()
    if kind in ("found", "middle"):
        settings = prepare.Settings(HOW.size, "png", HOW, kind == "middle")
        options |= {"what": WHAT, "images_per_shard": 3}
    elif kind == "crops":
        settings = prepare.Settings(16, "png")
        np.savez(tmp_path / "crops.npz", names=[str(i) for i in range(13)], boxes=np.asarray([[2, 3, 30, 30]] * 13))
        options |= {"crops": (str(tmp_path / "crops.npz"), "boxes"), "held_out": 0}
    elif kind == "excluded":
        (tmp_path / "exclude.txt").write_text("person1/4\nodd/\n")
        options |= {"exclude": (str(tmp_path / "exclude.txt"),)}
    expected = by_prepare(root, tmp_path / "a" / "faces", settings, **options)
    output = tmp_path / "b" / "faces"
    metadata, counters = beam_steps.run(job(root, output, settings, **options), output, HERE, 0.9, {"method": "x"})
    assert metadata == expected and tree(output) == tree(tmp_path / "a" / "faces")
    assert [p.name for p in output.parent.iterdir()] == ["faces"]
    images = sum(split["images"] for split in metadata["splits"].values())
    assert counters["images written"] == images and counters["photographs"] == images + len(metadata["rejected"])
    kinds = {name.removeprefix("rejected: "): count for name, count in counters.items() if name.startswith("rejected: ")}
    assert sum(kinds.values()) == len(metadata["rejected"]) and "other" not in kinds
    if kind == "found":
        assert kinds == {"no face": 5, "empty file": 1, "not an image": 1, "damaged image": 1, "unreadable file": 1 + bool(os.geteuid())}
        assert len(detectors) == 1


def test_batches_do_not_matter_and_empty_shards_are_written(tmp_path, monkeypatch):
    root = collection(tmp_path / "in", 7)
    for i in (0, 3, 1):
        (root / f"person{i % 3}" / f"{i}.png").write_bytes(b"")
    settings = prepare.Settings(HOW.size, "png", HOW)
    by_prepare(root, tmp_path / "a" / "faces", settings, what=WHAT, images_per_shard=1)
    for number, batch in enumerate((1, 3)):
        monkeypatch.setattr(beam_steps, "_BATCH", batch)
        output = tmp_path / f"b{number}" / "faces"
        beam_steps.run(job(root, output, settings, what=WHAT, images_per_shard=1), output, HERE, 0.9, {"method": "x"})
        assert tree(output) == tree(tmp_path / "a" / "faces")
    assert len(list(output.glob("*.tfrecord-*-of-00007"))) == 7


def test_a_shard_written_again_is_the_same_and_a_gap_is_an_error(tmp_path):
    root, output = collection(tmp_path / "in", 6), tmp_path / "faces"
    what = job(root, output, prepare.Settings(), images_per_shard=3)
    Path(what.aside).mkdir()
    values = [(kept, kept, picture(kept)) for kept in (1, 3, 5)]
    name = records.shard_name("faces", "train", 1, 2)
    for order in (values, values[::-1]):
        beam_steps.write_shard((("train", 1), [None, *order]), what)
        assert sorted(tree(Path(what.aside))) == [name, f"{name}.index.npz", f"{name}.part.json"]
        shard = records.read_index(Path(what.aside) / name)
        assert shard.keys.tolist() == [beam_steps.places(what)[i].photograph.key for i in (1, 3, 5)]
    for wrong in (values[1:], [*values, values[0]]):
        with pytest.raises(RuntimeError, match="missing or there twice"):
            beam_steps.write_shard((("train", 1), wrong), what)


def test_bad_input_leaves_nothing(tmp_path, monkeypatch):
    root, output = collection(tmp_path / "in", 3), tmp_path / "out" / "faces"
    (root / "person0" / "0.png").write_bytes(b"")
    with pytest.raises(BadInput, match=r"1 images cannot be used .*person0/0: empty file"):
        beam_steps.run(job(root, output, prepare.Settings()), output, HERE, 0.1, {})
    with pytest.raises(BadInput, match="no image is left for the split 'train'"):
        settings = prepare.Settings(8, "png", Alignment(size=8))
        for path in root.rglob("*.png"):
            path.write_bytes(picture(face=None))
        beam_steps.run(job(root, output, settings, what=WHAT), output, HERE, 0.1, {})
    what = job(root, output, prepare.Settings())
    (root / "person0" / "0.png").unlink()
    with pytest.raises(BadInput, match="a worker sees other photographs"):
        beam_steps.run(what, output, HERE, 0.1, {})

    def broken(name, **settings):
        raise BadInput("no such weights; fetch them")

    monkeypatch.setattr(detection, "create", broken)
    with pytest.raises(BadInput, match=r"^no such weights; fetch them$"):
        beam_steps.run(job(root, output, prepare.Settings(HOW.size, "png", HOW), what=WHAT), output, HERE, 0.1, {})
    assert not list(output.parent.iterdir())


def test_kinds_of_problems():
    assert beam_steps.kind("9000x90000 pixels are too many (limit 100,000,000)") == "too many pixels"
    assert beam_steps.kind("damaged image (not an image of its kind)") == "damaged image"
    assert beam_steps.kind("something else") == "other"


def test_command_line_with_two_workers(tmp_path):
    root = collection(tmp_path / "in", 8)
    flags = [f"--input={root}", "--size=16", "--form=png", "--images_per_shard=3"]
    done = run(*flags, f"--output={tmp_path}/prepare/faces", "--processes=1", module="prepare")
    assert done.returncode == 0, done.stderr
    done = run(*flags, f"--output={tmp_path}/beam/faces", "--processes=2", module="prepare_beam")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["counters"] == {"images written": 8, "photographs": 8}
    assert tree(tmp_path / "beam" / "faces") == tree(tmp_path / "prepare" / "faces")
    done = run(*flags, f"--output={tmp_path}/other", "stray", module="prepare_beam")
    assert done.returncode == 2 and "'stray' is not a flag" in done.stderr


@pytest.mark.slow
def test_mtcnn_in_two_workers(people, tmp_path):  # noqa: F811
    flags = ["--align", f"--input={people}", "--size=64", "--form=png", "--reject_limit=0.5"]
    assert run(*flags, f"--output={tmp_path}/prepare/faces", module="prepare").returncode == 0
    done = run(*flags, f"--output={tmp_path}/beam/faces", "--processes=2", module="prepare_beam")
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "beam" / "faces") == tree(tmp_path / "prepare" / "faces")
    counters = json.loads(done.stdout.splitlines()[-1])["counters"]
    assert counters["rejected: no face"] == counters["rejected: empty file"] == 1
    # What goes wrong in a worker is one line here too, after what Beam itself says.
    done = run(*flags, f"--output={tmp_path}/bad", "--thresholds=0.6,0.7,2", module="prepare_beam")
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: mtcnn: minimum must be"), done.stderr
    assert not (tmp_path / "bad").exists() and not list(tmp_path.glob(".*"))
