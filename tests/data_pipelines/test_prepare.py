"""Photographs to records: every kind of file, every layout, the command line."""

import gzip
import io
import json
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from data_pipelines import images, prepare, records
from data_pipelines.sources import TfRecords
from facenet_jax.errors import BadInput


def picture(seed=0, size=(24, 20), mode="RGB", form="JPEG", **options):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (*size[::-1], 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, form, **options)
    return out.getvalue()


def people(root, counts=(("ada", 3), ("bob", 2), ("cy", 1))):
    for name, count in counts:
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{name}_{i}.jpg").write_bytes(picture(hash((name, i)) % 1000))
    return root


def read(directory, split="train"):
    return {r["key"]: r for r in records.iterate(directory, split)}


def test_folder_zip_tar_and_csv_agree(tmp_path):
    root = people(tmp_path / "faces")
    with zipfile.ZipFile(tmp_path / "faces.zip", "w") as archive:
        for path in root.rglob("*.jpg"):
            archive.write(path, f"faces/{path.parent.name}/{path.name}")
    for ending in ("tar", "tar.gz"):
        with tarfile.open(tmp_path / f"faces.{ending}", "w:gz" if ending.endswith("gz") else "w") as archive:
            archive.add(root, "faces")
    rows = [f"faces/{p.parent.name}/{p.name},{p.parent.name}" for p in sorted(root.rglob("*.jpg"))]
    (tmp_path / "faces.csv").write_text("\n".join(["image,identity", *rows]))
    found = {}
    for name in ("faces", "faces.zip", "faces.tar", "faces.tar.gz", "faces.csv"):
        output = tmp_path / f"out_{name}"
        prepare.prepare(prepare.photographs(tmp_path / name), output, prepare.Settings())
        found[name] = {key.removeprefix("faces/"): (r["image"], r["identity"], r["label"]) for key, r in read(output).items()}
    assert len(found["faces"]) == 6 and found["faces"]["ada/ada_0"][0] == (root / "ada" / "ada_0.jpg").read_bytes()
    assert all(value == found["faces"] for value in found.values())


def test_every_kind_of_file(tmp_path):
    root = people(tmp_path / "faces", (("ada", 40),))
    sixteen = io.BytesIO()
    Image.fromarray((np.arange(400).reshape(20, 20) * 160).astype(np.uint16)).save(sixteen, "PNG")
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20), "red").save(turned, "JPEG", exif=exif)
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    animated = io.BytesIO()
    frames[0].save(animated, "GIF", save_all=True, append_images=frames[1:])
    good = {
        "grey.jpg": picture(mode="L"),
        "cmyk.jpg": picture(mode="CMYK"),
        "alpha.png": picture(mode="RGBA", form="PNG"),
        "palette.png": picture(mode="P", form="PNG"),
        "sixteen.png": sixteen.getvalue(),
        "turned.jpg": turned.getvalue(),
        "animated.gif": animated.getvalue(),
        "kept.webp": picture(form="WEBP"),
    }
    bad = {
        "empty.jpg": (b"", "empty"),
        "text.jpg": (b"hello", "not an image"),
        "cut.jpg": (picture()[:300], "damaged"),
        "cut_png.png": (picture(form="PNG")[:200], "damaged"),
        "tiny.png": (picture(size=(3, 3), form="PNG"), "too few"),
    }
    for name, data in [*good.items(), *((n, d) for n, (d, _) in bad.items())]:
        (root / "ada" / name).write_bytes(data)
    with pytest.raises(BadInput, match="cannot be used"):
        prepare.prepare(prepare.photographs(root), tmp_path / "none", prepare.Settings(), reject_limit=0.01)
    assert not (tmp_path / "none").exists()
    metadata = prepare.prepare(prepare.photographs(root), tmp_path / "out", prepare.Settings(), reject_limit=0.5)
    assert set(metadata["rejected"]) == {f"ada/{n.split('.')[0]}" for n in bad}
    for key, words in (("ada/" + n.split(".")[0], w) for n, (_, w) in bad.items()):
        assert words in metadata["rejected"][key]
    found = read(tmp_path / "out")
    for name in good:
        pixels = images.decode(found["ada/" + name.split(".")[0]]["image"])
        assert pixels.ndim == 3 and pixels.shape[-1] == 3
    assert images.decode(found["ada/turned"]["image"]).shape[:2] == (30, 20)
    first = images.decode(found["ada/animated"]["image"])
    assert first[..., 0].mean() > 200 and first[..., 2].mean() < 50
    ramp = images.decode(found["ada/sixteen"]["image"])
    assert ramp[0, 0, 0] < 5 and 235 < ramp[-1, -1, 0] < 255


def test_a_picture_that_only_pillow_takes_is_stored_anew(tmp_path):
    """What is stored must decode in training, where nothing can be left out any more."""
    root = people(tmp_path / "faces", (("ada", 2),))
    odd = picture()[:-2] + b"\x12" * 40 + picture()[-2:]
    (root / "ada" / "odd.jpg").write_bytes(odd)
    prepare.prepare(prepare.photographs(root), tmp_path / "out", prepare.Settings())
    stored = read(tmp_path / "out")["ada/odd"]["image"]
    assert stored != odd and images.decode(stored).shape == (20, 24, 3)


def test_nothing_is_written_where_nothing_is_left(tmp_path):
    root = people(tmp_path / "faces", (("ada", 1), ("bob", 1)))
    (root / "bob" / "bob_0.jpg").write_bytes(b"")
    with pytest.raises(BadInput, match="cannot be used"):
        prepare.prepare(prepare.photographs(root), tmp_path / "out", prepare.Settings(), reject_limit=0.0)
    with pytest.raises(BadInput, match="no image is left"):
        (root / "ada" / "ada_0.jpg").write_bytes(b"")
        prepare.prepare(prepare.photographs(root), tmp_path / "out", prepare.Settings(), reject_limit=1.0)
    assert not (tmp_path / "out").exists()


def test_huge_pictures_are_refused(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(BadInput, match="24x20 pixels are too many"):
        images.open_photograph(picture())


def test_crops_resize_and_held_out_people(tmp_path):
    root = people(tmp_path / "faces", (("p1", 2), ("p2", 2), ("p10", 2)))
    np.savez(tmp_path / "crops.npz", names=["p1_0", "p1_1", "p2_0", "p2_1", "p10_0"], boxes=np.asarray([[2, 3, 12, 15]] * 5))
    crops = prepare.read_crops(tmp_path / "crops.npz", "boxes")
    settings = prepare.Settings(size=16, form="png")
    found = prepare.photographs(root)
    where = prepare.crops_by_key(found, crops)
    metadata = prepare.prepare(found, tmp_path / "out", settings, held_out=1, reject_limit=0.2, where=where)
    assert metadata["rejected"] == {"p10/p10_1": "no crop rectangle"}
    assert metadata["identities"] == ["p1", "p2", "p10"]
    assert set(read(tmp_path / "out", "validation")) == {"p10/p10_0"}
    original = images.open_photograph((root / "p1" / "p1_0.jpg").read_bytes())
    expected = np.asarray(Image.fromarray(original[3:15, 2:12]).resize((16, 16), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(images.decode(read(tmp_path / "out")["p1/p1_0"]["image"]), expected)
    assert TfRecords(tmp_path / "out", "train").identities.tolist() == ["p1", "p2"]


def test_layouts_that_cannot_be_read(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.zip").write_bytes(b"no zip")
    (tmp_path / "bad.tar").write_bytes(b"no tar" * 200)
    (tmp_path / "no_column.csv").write_text("file,person\na,b\n")
    (tmp_path / "gap.csv").write_text("image,identity\na.jpg,\n")
    (tmp_path / "twice.csv").write_text("image,identity\na.jpg,a\na.jpg,b\n")
    (tmp_path / "latin.csv").write_bytes("image,identity\na.jpg,José\n".encode("latin-1"))
    (tmp_path / "cut.tar.gz").write_bytes(gzip.compress(b"x" * 5000)[:-20])
    for name, words in (
        ("empty", "no images in folders"),
        ("none", "no such file"),
        ("bad.zip", "not a zip"),
        ("bad.tar", "bad.tar"),
        ("no_column.csv", "no column 'image'"),
        ("gap.csv", "line 2"),
        ("twice.csv", "line 3: a.jpg is there twice"),
        ("latin.csv", "not UTF-8"),
        ("cut.tar.gz", "cut.tar.gz"),
    ):
        with pytest.raises(BadInput, match=words):
            prepare.photographs(tmp_path / name)
    root = people(tmp_path / "twice", (("ada", 1),))
    (root / "ada" / "ada_0.png").write_bytes(picture(form="PNG"))
    with pytest.raises(BadInput, match="two images are called ada/ada_0"):
        prepare.photographs(root)


def test_lines_of_a_list_that_name_nothing(tmp_path, capsys):
    found = prepare.photographs(people(tmp_path / "faces"))
    (tmp_path / "exclude.txt").write_text("ada/ada_1\nada/ada_9\tgone\nzoe/\ncy/\n")
    kept = prepare.taken(found, [str(tmp_path / "exclude.txt")])
    assert [p.key for p in kept] == ["ada/ada_0", "ada/ada_2", "bob/bob_0", "bob/bob_1"]
    left, warning = capsys.readouterr().out.splitlines()
    assert "left out 2 images" in left and warning == "warning: 2 lines of --exclude name nothing of the input: ada/ada_9, zoe/"
    prepare.taken(found, [str(tmp_path / "exclude.txt")], quiet=True)
    (tmp_path / "exclude.txt").write_text("cy/\n")
    prepare.taken(found, [str(tmp_path / "exclude.txt")])
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.fixture
def command():
    """Reads flags as the command line does, and forgets them after."""
    there = set(flags.FLAGS)
    prepare.define_flags()
    with flagsaver.flagsaver():
        yield lambda *arguments: flags.FLAGS(["prepare", *arguments])
    for name in set(flags.FLAGS) - there:
        delattr(flags.FLAGS, name)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--split=validation --validation_people=1", "--split=validation"),
        ("--align --alignment=mine", "leave it out with --align"),
        ("--crops_key=box", "--crops_key: of no effect without --crops"),
        ("--margin=32 --no_face=skip", "--margin, --no_face: of no effect"),
        ("--detector=haar", "--detector: of no effect without --align"),
        ("--thresholds=1,1,1", "--thresholds: of no"),
        ("--pyramid_factor=0.5 --minimum_face=9", "--minimum_face, --pyramid_factor: of no"),
        ("--template=insightface --margin_of=crop", "--margin_of, --template: of no"),
        ("--choose=all", "--choose: of no"),
    ],
)
def test_flags_without_effect(tmp_path, command, given, words):
    places = [f"--input={people(tmp_path / 'faces')}", f"--output={tmp_path / 'out'}"]
    command(*places, *given.split())
    with pytest.raises(BadInput, match=words):
        prepare.job_of_flags()


def test_flags_with_effect(tmp_path, command):
    np.savez(tmp_path / "crops.npz", names=["ada_0"], box=np.asarray([[2, 3, 12, 15]]))
    places = [f"--input={people(tmp_path / 'faces')}", f"--output={tmp_path / 'out'}", "--alignment=mine", "--validation_people=1"]
    command(*places, "--form=png", f"--crops={tmp_path / 'crops.npz'}", "--crops_key=box")
    job = prepare.job_of_flags()
    assert job.alignment == {"method": "mine"} and job.crops["ada/ada_0"] == (2, 3, 12, 15) and len(job.found) == 6


def test_command_line(tmp_path):
    people(tmp_path / "faces")
    command = [sys.executable, "-m", "data_pipelines.prepare"]
    done = subprocess.run(
        [*command, f"--input={tmp_path / 'faces'}", f"--output={tmp_path / 'out'}", "--size=16"], capture_output=True, text=True
    )
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])["train"]["images"] == 6
    for arguments, words in (
        ([f"--input={tmp_path / 'none'}", "--output=x"], "no such file"),
        (["--size=4"], "--input and --output"),
        (["--sise=4"], "sise"),
        ([f"--reindex={tmp_path / 'faces'}"], "no shard of records"),
    ):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True)
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
