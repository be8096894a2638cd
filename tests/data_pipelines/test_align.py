"""Photographs to aligned faces: every kind of file, stopped runs, the command lines, and records of the same crops."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines import align, detected, images, prepare, processes, records
from data_pipelines.detected import Detection, Found, find_faces
from data_pipelines.importers import Photograph
from data_pipelines.importers.layouts import photographs
from facenet_jax.alignment import Alignment
from facenet_jax.apps import pretrained
from facenet_jax.detection import Faces
from facenet_jax.errors import BadInput

HOW = Alignment(size=32, margin=4)
WHAT = Detection()
ROOT = Path(__file__).resolve().parents[2]


def picture(seed=0, size=(48, 40), mode="RGB", form="PNG", face=(10.123456, 8.5, 30.25, 30.75), **options):
    """Noise with a bright red rectangle, which is what `Red` takes for a face."""
    pixels = np.random.default_rng(seed).integers(0, 200, (*size[::-1], 3), np.uint8)
    if face:
        x1, y1, x2, y2 = (int(v) for v in face)
        pixels[max(y1, 0) : y2, max(x1, 0) : x2] = (255, 0, 0)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, form, **options)
    return out.getvalue()


class Red:
    """One face on every photograph with a pixel of pure red, at its extent and a bit; two where `twice`; raises after `limit` photographs."""

    def __init__(self, limit=10**6, twice=False):
        self.limit, self.twice, self.seen = limit, twice, 0

    def __call__(self, given):
        self.seen += len(given)
        if self.seen > self.limit:
            raise KeyboardInterrupt
        return [self._one(pixels) for pixels in given]

    def _one(self, pixels):
        y, x = np.nonzero((pixels == (255, 0, 0)).all(-1))
        if not len(y):
            return Faces(np.zeros((0, 4), np.float32), np.zeros(0, np.float32))
        # A third of a pixel more: what a journal of four digits does not hold exactly.
        box = np.asarray([x.min() - 1 / 3, y.min() + 1 / 3, x.max() + 4 / 3, y.max() + 2 / 3], np.float32)
        boxes = np.stack([box, box + 2]) if self.twice else box[None]
        points = np.repeat(boxes[:, None, :2], 5, 1) + np.arange(10, dtype=np.float32).reshape(5, 2) / 3
        return Faces(boxes, np.linspace(0.99, 0.9, len(boxes), dtype=np.float32), points)


def never(given):
    raise AssertionError("nothing was left to look at")


def collection(root, count=9):
    for i in range(count):
        folder = root / f"person{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.png").write_bytes(picture(i, face=(4 + i, 5, 24 + i, 30)))
    return root


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def odd_files(root):
    """Files by what is wrong with them (or nothing): name -> (bytes, words of the problem)."""
    sixteen, turned, animated = io.BytesIO(), io.BytesIO(), io.BytesIO()
    Image.fromarray((np.arange(2000).reshape(40, 50) * 30).astype(np.uint16)).save(sixteen, "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    sideways = Image.open(io.BytesIO(picture(form="PNG"))).rotate(90, expand=True)
    sideways.save(turned, "PNG", exif=exif)
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    frames[0].save(animated, "GIF", save_all=True, append_images=frames[1:])
    files = {
        "empty.jpg": (b"", "empty file"),
        "text.jpg": (b"hello", "not an image"),
        "cut.jpg": (picture(form="JPEG")[:400], "damaged"),
        "narrow.png": (picture(size=(3, 40), face=None), "no face"),
        "grey.png": (picture(mode="L"), "no face"),
        "cmyk.jpg": (picture(mode="CMYK", form="JPEG", face=None), "no face"),
        "sixteen.png": (sixteen.getvalue(), "no face"),
        "nobody.png": (picture(face=None), "no face"),
        "alpha.png": (picture(mode="RGBA"), ""),
        "animated.gif": (animated.getvalue(), ""),
        "border.png": (picture(face=(-5, -5, 20, 20)), ""),
        "corner.png": (picture(face=(40, 30, 60, 60)), ""),
        "turned.png": (turned.getvalue(), ""),
    }
    folder = root / "odd"
    folder.mkdir(parents=True)
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    (folder / "nowhere.png").symlink_to(folder / "missing")
    files["nowhere.png"] = (b"", "cannot be read")
    if os.geteuid():
        (folder / "locked.png").write_bytes(picture())
        (folder / "locked.png").chmod(0)
        files["locked.png"] = (b"", "cannot be read")
    return {f"odd/{name.split('.')[0]}": words for name, (_, words) in files.items()}


@pytest.mark.parametrize("middle", [False, True])
def test_every_kind_of_file_is_cut_or_named(tmp_path, middle):
    expected = odd_files(tmp_path / "in")
    listed = photographs(tmp_path / "in")
    assert {p.key for p in listed} == set(expected)
    output = tmp_path / "out"
    problems = align.align(listed, output, WHAT, HOW, middle=middle, detector=Red())
    assert json.loads((output / "rejected.json").read_text()) == problems
    assert set(problems) == {key for key, words in expected.items() if words}
    assert all(expected[key] in problem for key, problem in problems.items())
    cut = {key for key, words in expected.items() if not words or (middle and words == "no face")}
    assert {name.removesuffix(".png") for name in tree(output) if name.endswith(".png")} == cut
    done = "its middle was cut" if middle else "left out"
    assert all(problems[key].endswith(done if expected[key] == "no face" else "left out") for key in problems)
    lines = dict(line.split(" ", 1) if " " in line else (line, "") for line in (output / "bounding_boxes.txt").read_text().splitlines())
    assert list(lines) == [f"{p.key}.png" for p in listed]
    assert {name.removesuffix(".png") for name, box in lines.items() if box} == cut
    for key in cut:
        x1, y1, x2, y2 = map(int, lines[f"{key}.png"].split(" "))
        height, width = images.open_photograph(next(p for p in listed if p.key == key).read()).shape[:2]
        assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
        assert images.decode((output / f"{key}.png").read_bytes()).shape == (32, 32, 3)
    # The turned one is the same picture as an upright one would be.
    upright = Found((40, 48), Red()([images.open_photograph(picture())])[0])
    assert lines["odd/turned.png"] == " ".join(map(str, align.planned(upright, HOW, False)[0].rectangle))


def test_crops_are_the_rectangles_of_bounding_boxes(tmp_path):
    listed = photographs(collection(tmp_path / "in"))
    align.align(listed, tmp_path / "out", WHAT, HOW, detector=Red())
    lines = (tmp_path / "out" / "bounding_boxes.txt").read_text().splitlines()
    for photograph, line in zip(listed, lines, strict=True):
        name, *box = line.split(" ")
        x1, y1, x2, y2 = map(int, box)
        i = int(photograph.key.split("/")[1])
        # The box is (4 + i - 1/3, 5 + 1/3, 24 + i + 1/3, 30 - 1/3), its margin 2 a side, and all is cut to whole pixels.
        assert (x1, y1, x2, y2) == (1 + i, 3, 26 + i, 31) and name == f"{photograph.key}.png"
        pixels = Image.open(io.BytesIO(photograph.read())).crop((x1, y1, x2, y2)).resize((32, 32), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(images.decode((tmp_path / "out" / name).read_bytes()), np.asarray(pixels))


def test_a_second_run_does_nothing_and_a_stopped_one_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(detected, "_WINDOW", 2)
    odd_files(tmp_path / "in")
    listed = photographs(collection(tmp_path / "in"))
    align.align(listed, tmp_path / "whole", WHAT, HOW, detector=Red())
    whole = tree(tmp_path / "whole")
    crops = list((tmp_path / "whole").rglob("*.png"))
    times = {p: p.stat().st_mtime_ns for p in crops}
    align.align(listed, tmp_path / "whole", WHAT, HOW, detector=never)
    assert tree(tmp_path / "whole") == whole and times == {p: p.stat().st_mtime_ns for p in crops}

    output = tmp_path / "stopped"
    for limit in (5, 3):
        with pytest.raises(KeyboardInterrupt):
            align.align(listed, output, WHAT, HOW, detector=Red(limit))
    journal = output / "faces.jsonl"
    text = journal.read_text()
    journal.write_text(text + text.splitlines()[-1][:20])
    rest = Red()
    align.align(listed, output, WHAT, HOW, detector=rest)
    assert 0 < rest.seen < sum(not found.problem for found in detected.read_journal(journal, WHAT).values())
    assert tree(output) == whole
    # Stopped while it cuts.
    for name in ("person0/0.png", "person1/4.png", "rejected.json", "bounding_boxes.txt"):
        (output / name).unlink()
    align.align(listed, output, WHAT, HOW, detector=never)
    assert tree(output) == whole


def test_journals_that_are_cut_off_damaged_or_of_others(tmp_path):
    listed = photographs(collection(tmp_path / "in", 2))
    journal = tmp_path / "faces.jsonl"
    for begun in ("", '{"detector": "mt'):
        journal.write_text(begun)
        found = find_faces(listed, WHAT, journal, detector=Red())
        assert len(journal.read_text().splitlines()) == 3 and set(found) == {p.key for p in listed}
    with pytest.raises(BadInput, match="another detector or other settings"):
        find_faces(listed, Detection("haar"), journal, detector=Red())
    header = journal.read_text().splitlines()[0]
    for damage in ("nothing\n", "[1]\n", '{"key": "a", "size": []}\n', "\xe4\n"):
        journal.write_text(f"{header}\n{damage}")
        with pytest.raises(BadInput, match="damaged"):
            find_faces(listed, WHAT, journal, detector=Red())


def test_a_file_that_was_mended_is_looked_at_again(tmp_path):
    root = collection(tmp_path / "in", 2)
    (root / "person0" / "0.png").write_bytes(b"")
    assert set(align.align(photographs(root), tmp_path / "out", WHAT, HOW, detector=Red())) == {"person0/0"}
    (root / "person0" / "0.png").write_bytes(picture())
    assert align.align(photographs(root), tmp_path / "out", WHAT, HOW, detector=Red(limit=1)) == {}
    assert align.align(photographs(root), tmp_path / "out", WHAT, HOW, detector=never) == {}
    # One that is another photograph now, and whose crop is not there, is not cut by the old one's box.
    (root / "person1" / "1.png").write_bytes(picture(size=(60, 60)))
    (tmp_path / "out" / "person1" / "1.png").unlink()
    problems = align.align(photographs(root), tmp_path / "out", WHAT, HOW, detector=never)
    assert "has changed since" in problems["person1/1"]


def test_all_faces(tmp_path):
    listed = photographs(collection(tmp_path / "in", 2))
    align.align(listed, tmp_path / "out", WHAT, Alignment(size=32, choose="all"), detector=Red(twice=True))
    assert {n for n in tree(tmp_path / "out") if n.endswith(".png")} == {f"person{i}/{i}_{face}.png" for i in range(2) for face in range(2)}
    assert len((tmp_path / "out" / "bounding_boxes.txt").read_text().splitlines()) == 4


def test_a_face_outside_the_photograph_is_no_face():
    found = Found((40, 48), Faces(np.asarray([[100, 100, 120, 120]], np.float32), np.ones(1, np.float32)))
    assert align.planned(found, HOW, False) == []
    assert align.planned(found, HOW, True)[0].which is None


def test_outputs_that_cannot_be_used(tmp_path):
    listed = photographs(collection(tmp_path / "in", 1))
    align.align(listed, tmp_path / "out", WHAT, HOW, detector=Red())
    for what, how, options in ((Detection("haar"), HOW, {}), (WHAT, Alignment(size=48), {}), (WHAT, HOW, {"form": "jpeg"})):
        with pytest.raises(BadInput, match="aligned otherwise"):
            align.align(listed, tmp_path / "out", what, how, detector=never, **options)
    with pytest.raises(BadInput, match="not an alignment begun before"):
        align.align(listed, tmp_path / "in", WHAT, HOW, detector=never)
    (tmp_path / "list.csv").write_text(f"image,identity\n../{tmp_path.name}/in/person0/0.png,ada\n")
    with pytest.raises(BadInput, match="leads out of"):
        align.align(photographs(tmp_path / "list.csv"), tmp_path / "other", WHAT, HOW, detector=never)
    assert not (tmp_path / "other").exists()


def test_prepare_gives_the_crops_of_align(tmp_path):
    odd_files(tmp_path / "in")
    listed = photographs(collection(tmp_path / "in"))
    align.align(listed, tmp_path / "crops", WHAT, HOW, detector=Red())
    where = find_faces(listed, WHAT, tmp_path / "faces.jsonl", detector=Red())
    settings = prepare.Settings(HOW.size, "png", HOW)
    metadata = prepare.prepare(listed, tmp_path / "records", settings, where=where, reject_limit=0.5)
    stored = {r["key"]: r["image"] for r in records.iterate(tmp_path / "records", "train")}
    assert {f"{key}.png": data for key, data in stored.items()} == {n: d for n, d in tree(tmp_path / "crops").items() if n.endswith(".png")}
    rejected = json.loads((tmp_path / "crops" / "rejected.json").read_text())
    assert metadata["rejected"] == {key: why.removesuffix(": left out") for key, why in rejected.items()}
    # Photographs without a face do not count against the limit; the others do.
    unusable = sum(why != "no face" for why in metadata["rejected"].values())
    for limit, enough in ((unusable / len(listed), True), ((unusable - 0.5) / len(listed), False)):
        output = tmp_path / f"limit{enough}"
        if enough:
            prepare.prepare(listed, output, settings, where=where, reject_limit=limit)
        else:
            with pytest.raises(BadInput, match="cannot be used"):
                prepare.prepare(listed, output, settings, where=where, reject_limit=limit)
        assert output.exists() == enough


def _die(_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_named():
    with pytest.raises(BadInput, match="worker process was killed"):
        list(processes.in_processes(_die, [1], 2))


def test_how_far_ahead_processes_work(monkeypatch):
    begun = []

    class Pool:
        """One that begins, as it is told, at once."""

        def __init__(self, *_): ...

        def __enter__(self):
            return self

        def __exit__(self, *_): ...

        def map(self, work, part, chunksize):
            begun.extend(part)
            return map(work, part)

    monkeypatch.setattr(processes, "ProcessPoolExecutor", Pool)
    taken = 0
    for taken, (result, thing) in enumerate(zip(processes.in_processes(str, list(range(100)), 2, chunk=3, ahead=4), range(100)), 1):
        assert result == str(thing) and taken <= len(begun) <= taken - 1 + 24
    assert taken == 100
    # Decoded photographs: two a process, beside the window that is looked at.
    begun.clear()
    monkeypatch.setattr(detected, "_WINDOW", 5)
    photographs = [Photograph(str(i), "ada", picture) for i in range(23)]
    for number, window in enumerate(detected.look(photographs, "", Red, processes=2), 1):
        assert [photograph.key for photograph, _ in window] == [p.key for p in photographs[5 * number - 5 : 5 * number]]
        assert len(begun) <= 5 * number + 4


def test_workers_end_with_a_process_that_is_killed(tmp_path):
    told = tmp_path / "pid"
    work = f"echo $PPID > {told}.aside && mv {told}.aside {told} && exec sleep 30"
    script = f"import os; from data_pipelines.processes import in_processes; list(in_processes(os.system, [{work!r}], 2))"
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT) as process:
        while not told.exists() and process.poll() is None:
            time.sleep(0.02)
        process.kill()
    worker = Path("/proc") / told.read_text().strip()
    if not worker.parent.joinpath("self").exists():
        pytest.skip("no /proc to look at")
    for _ in range(500):
        # A worker whose new parent does not wait for it stays listed as a zombie.
        if not worker.exists() or worker.joinpath("stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.02)
    raise AssertionError("a worker is still there")


def run(*arguments, module="align"):
    command = [sys.executable, "-m", f"data_pipelines.{module}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_flags_that_do_not_go_together(tmp_path):
    root = collection(tmp_path / "in", 1)
    align.align(photographs(root), tmp_path / "out", Detection("haar"), HOW, detector=Red())
    for arguments, words in (
        ([f"--input={root}", f"--output={root}/faces"], "would be read as photographs"),
        ([f"--input={root}", f"--output={tmp_path}/out", "--detector=haar"], "aligned otherwise"),
        ([f"--input={root}", f"--output={tmp_path}/new", "--detector=haar", "--pyramid_factor=0.8"], "has no setting factor"),
    ):
        done = run(*arguments)
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.fixture(scope="module")
def people(shared, tmp_path_factory):
    """13 photographs of LFW, a grey one, an empty file; and mtcnn's weights at hand."""
    try:
        pretrained.fetch("mtcnn")
    except BadInput as error:
        pytest.skip(f"mtcnn's weights cannot be had: {error}")
    if not (shared / "data" / "lfw.tar").exists():
        pytest.skip("no ../shared/data/lfw.tar")
    root = tmp_path_factory.mktemp("people") / "in"
    # All of one size, for which mtcnn is compiled once.
    with tarfile.open(shared / "data" / "lfw.tar") as tar:
        for name in [m.name for m in tar if m.name.endswith(".jpg")][::640]:
            path = root / Path(name).parent.name / Path(name).name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(tar.extractfile(name).read())
    (root / "nobody").mkdir()
    Image.new("RGB", (250, 250), "grey").save(root / "nobody" / "nobody_0001.jpg")
    (root / "nobody" / "nobody_0002.jpg").write_bytes(b"")
    return root


@pytest.mark.slow
def test_killed_and_run_again_by_command_line(people, tmp_path):
    """mtcnn itself, a real kill: the same tree as a run that was never stopped, and the same crops from `prepare --align`."""
    flags = [f"--input={people}", "--size=64", "--processes=1"]
    assert run(*flags, f"--output={tmp_path}/whole").returncode == 0
    output = tmp_path / "killed"
    command = [sys.executable, "-m", "data_pipelines.align", *flags, f"--output={output}"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (output / "faces.jsonl").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (output / "rejected.json").exists()
    # What was found up to the kill is a whole number of lines, perhaps none, and a part of one.
    lines = (tmp_path / "whole" / "faces.jsonl").read_text().splitlines(keepends=True)
    (output / "faces.jsonl").write_text("".join(lines[:6]) + lines[6][:30])
    done = run(*flags, f"--output={output}", "--draw=3")
    assert done.returncode == 0, done.stderr
    assert tree(output) == tree(tmp_path / "whole")
    assert len(list((tmp_path / "killed.drawn").rglob("*.jpg"))) == 3
    rejected = json.loads((output / "rejected.json").read_text())
    assert rejected == {"nobody/nobody_0001": "no face: left out", "nobody/nobody_0002": "empty file: left out"}

    done = run("--align", *flags, "--form=png", f"--output={tmp_path}/records", "--reject_limit=0.5", "--split=test", module="prepare")
    assert done.returncode == 0, done.stderr
    stored = {f"{r['key']}.png": r["image"] for r in records.iterate(tmp_path / "records", "test")}
    assert stored == {n: d for n, d in tree(output).items() if n.endswith(".png")}
    alignment = json.loads((tmp_path / "records" / "metadata.json").read_text())["alignment"]
    assert alignment["method"] == "mtcnn margin 32 at 64" and alignment["detection"]["detector"] == "mtcnn"

    key = next(iter(stored)).removesuffix(".png")
    (tmp_path / "exclude.txt").write_text(f"{key}\ttoo dark\nnobody/\n")
    done = run(f"--input={people}", f"--exclude={tmp_path}/exclude.txt", f"--output={tmp_path}/less", module="prepare")
    assert done.returncode == 0 and "left out 3 images that --exclude names" in done.stdout, done.stderr
    assert {r["key"] for r in records.iterate(tmp_path / "less", "train")} == {n.removesuffix(".png") for n in stored} - {key}
