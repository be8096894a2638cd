"""Layouts by name: each written in a temporary folder, read back, damaged; two taken to records."""

import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines import prepare, records
from data_pipelines.importers import folders, insightface_rec
from data_pipelines.importers.layouts import LAYOUTS, photographs
from facenet_jax.errors import BadInput

MAGIC = struct.pack("<I", 0xCED7230A)


def picture(seed=0):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 12, 3), np.uint8)).save(out, "JPEG")
    return out.getvalue()


def write(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def zipped(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def read(found):
    """Everything that a listing gives, through the pickle that workers get."""
    return {p.key: (p.identity, p.read()) for p in pickle.loads(pickle.dumps(found))}


def refused(words, path, layout="auto"):
    with pytest.raises(BadInput, match=words) as caught:
        photographs(path, layout)
    return str(caught.value)


# RecordIO, written from its description.


def record(data):
    parts, start = [], 0
    for i in range(0, len(data) // 4 * 4, 4):
        if data[i : i + 4] == MAGIC:
            parts.append(data[start:i])
            start = i + 4
    parts.append(data[start:])
    flags = [0] if len(parts) == 1 else [1, *[2] * (len(parts) - 2), 3]
    return b"".join(MAGIC + struct.pack("<I", f << 29 | len(p)) + p + bytes(-len(p) % 4) for f, p in zip(flags, parts, strict=True))


def pack(number, labels, image=b""):
    if isinstance(labels, list):
        return struct.pack("<IfQQ", len(labels), 0, number, 0) + struct.pack(f"<{len(labels)}f", *labels) + image
    return struct.pack("<IfQQ", 0, labels, number, 0) + image


def write_rec(root, entries, index=True):
    """entries: (number, labels, image); returns the .rec's path."""
    root.mkdir(exist_ok=True)
    lines, data = [], b""
    for number, labels, image in entries:
        lines.append(f"{number}\t{len(data)}\n")
        data += record(pack(number, labels, image))
    (root / "train.rec").write_bytes(data)
    if index:
        (root / "train.idx").write_text("".join(lines))
    return root / "train.rec"


def insightface(people):
    """Entries in the order in which InsightFace's face2rec2.py writes them: images, record 0, people."""
    entries, ranges, number = [], [], 1
    for label, images in people.items():
        ranges.append([number, number + len(images)])
        for image in images:
            entries.append((number, [label, 1.0], image))
            number += 1
    entries.append((0, [number, number + len(ranges)], b""))
    return entries + [(number + i, list(range_), b"") for i, range_ in enumerate(ranges)]


PEOPLE = {0: [picture(1), picture(2)], 1: [picture(3)], 10: [picture(4), picture(5)], 2: [picture(6)]}
EXPECTED = dict(zip(["0/1", "0/2", "1/3", "10/4", "10/5", "2/6"], [image for images in PEOPLE.values() for image in images], strict=True))


def test_the_writer_agrees_with_mxnet():
    """Five records of MXIndexedRecordIO's docstring end at 16, 32, ... bytes."""
    assert [len(b"".join(record(b"record_%d" % i) for i in range(n))) for n in range(1, 6)] == [16, 32, 48, 64, 80]


@pytest.mark.parametrize("index", [True, False])
def test_insightface_rec(tmp_path, index):
    rec = write_rec(tmp_path / "faces", insightface(PEOPLE), index)
    for path in (rec, rec.parent):
        found = photographs(path)
        assert [p.key for p in found] == ["0/1", "0/2", "1/3", "2/6", "10/4", "10/5"]
        assert read(found) == {key: (key.split("/")[0], image) for key, image in EXPECTED.items()}


def test_a_rec_without_record_0(tmp_path, capsys):
    """im2rec's: every record is an image, in any order, labels alone or several."""
    entries = [(2, 7.0, picture(1)), (0, [7.0, 0.5, 0.25], picture(2)), (5, 3.0, b"")]
    rec = write_rec(tmp_path / "a", entries)
    assert read(photographs(rec)) == {"3/5": ("3", b""), "7/0": ("7", picture(2)), "7/2": ("7", picture(1))}
    index = tmp_path / "a" / "train.idx"
    index.write_text("".join(index.read_text().splitlines(keepends=True)[:2]))
    assert len(photographs(rec)) == 2 and "left out 1 records of the .rec that it does not list" in capsys.readouterr().err
    refused("needs train.idx beside it", write_rec(tmp_path / "b", [(0, 1.0, b"x"), (0, 1.0, b"y")], index=False))


CHUNKS = st.lists(st.one_of(st.just(MAGIC), st.binary(max_size=9)), max_size=8).map(b"".join)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(images=st.lists(CHUNKS.filter(bool), min_size=1, max_size=5), magic_label=st.booleans())
def test_magic_inside_of_the_data(tmp_path, images, magic_label):
    """Records that are split wherever their own bytes hold the magic, even in the labels."""
    extra = [struct.unpack("<f", MAGIC)[0]] if magic_label else []
    entries = [(i, [3.0, *extra], image) for i, image in enumerate(images)]
    assert read(photographs(write_rec(tmp_path / "a", entries))) == {f"3/{i}": ("3", image) for i, image in enumerate(images)}


def test_a_listing_reads_heads_alone():
    """Of a record of a megabyte, whole or split, it asks for some bytes."""
    for image in (bytes(1 << 20), bytes(1 << 19) + MAGIC + bytes(1 << 19)):
        data = record(pack(1, 2.0, image))
        head, size, following = insightface_rec._record(io.BytesIO(data), 0, len(data), 32)
        assert len(head) < 64 and size == 24 + len(image) and following == len(data)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e: [*e[:2], (2, *e[1][1:]), *e[3:]], "two records have the number 2"),
        (lambda e: e[:2] + e[3:], "images 1 to 6, but 1 are missing, the first is 3"),
        (lambda e: [*e, (40, [1.0], b"x")], "record 40 is an image, but record 0 says that the last is 6"),
        (lambda e: [(0, [float("nan"), 3], b"") if x[0] == 0 else x for x in e], "record 0 gives no range"),
        (lambda e: [(0, [1e30, float("inf")], b"") if x[0] == 0 else x for x in e], "record 0 gives no range"),
        (lambda e: [(0, [1e7, 2e7], b"") if x[0] == 0 else x for x in e], "images 1 to 9999999, but 9999989 are missing, the first is 11"),
        (lambda e: [(7, [1, 4], b"") if x[0] == 7 else x for x in e], "record 7 gives images 1 to 3 to one person"),
        (lambda e: [(7, [6, 9], b"") if x[0] == 7 else x for x in e], "record 7 gives images 6 to 8 to one person"),
        (lambda e: [(2, [0.5, 1], b"x") if x[0] == 2 else x for x in e if x[0] < 7], "record 2 has the label 0.5"),
        (lambda e: [(1, -1.0, b"x")], "record 1 has the label -1"),
        (lambda e: [(1, float("nan"), b"x")], "record 1 has the label nan"),
        (lambda e: [(0, [1, 1], b"")], "no images"),
        (lambda e: [], "no records"),
    ],
)
def test_records_that_contradict(tmp_path, change, words):
    refused(words, write_rec(tmp_path / "a", change(insightface(PEOPLE))))


def test_damaged_rec_and_idx(tmp_path):
    rec = write_rec(tmp_path / "a", insightface(PEOPLE))
    index, data = rec.with_suffix(".idx"), rec.read_bytes()
    lines = index.read_text().splitlines()
    second = int(lines[1].split("\t")[1])
    for damaged, words in (
        (data[:second] + b"\0" + data[second + 1 :], rf"record 1 \(byte {second}\): no record of MXNet at byte {second}"),
        (data[:-20], "is cut off"),
        (data[: second + 3], f"byte {second} is cut off"),
        (record(b"short"), "5 bytes are too few"),
        (record(struct.pack("<IfQQ", 1000, 0, 0, 0)), "too few"),
        (MAGIC + struct.pack("<I", 2 << 29), "no record of MXNet at byte 0"),
        (MAGIC + struct.pack("<I", 1 << 29) + record(b"x" * 30), "no record of MXNet at byte 8"),
        (b"PK\3\4 a zip file", "no record of MXNet at byte 0"),
    ):
        rec.write_bytes(damaged)
        assert str(rec) in refused(words, rec)
    rec.write_bytes(data)
    for text, words in (
        ("\n".join([*lines, f"99\t{len(data)}"]), f"line 12: no record of the .rec begins at byte {len(data)}"),
        ("\n".join([*lines[:3], "4\t5"]), "line 4: no record of the .rec begins at byte 5"),
        ("\n".join([*lines, "99\t0"]), "two lines point to byte 0"),
        ("\n".join([*lines[:4], "5 77"]), "line 5 is not a number, a tab and a number"),
        ("1\t" + "9" * 5000, "line 1 is not"),
        ("", "no lines"),
    ):
        index.write_text(text)
        assert str(index) in refused(words, rec)
    # A file that changes after it was listed: the one image is refused, by name.
    index.write_text("\n".join(lines))
    found = photographs(rec)
    rec.write_bytes(data[: second + 50])
    with pytest.raises(BadInput, match="cut off"):
        found[1].read()
    refused("no train.rec", write(tmp_path / "b", {"x/a.jpg": picture()}), "insightface_rec")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    which=st.sampled_from(["train.rec", "train.idx"]),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 12), st.binary(max_size=12)), min_size=1, max_size=4),
    words=st.booleans(),
)
def test_only_bad_input_comes_out_of_damage(tmp_path, which, edits, words):
    """Bytes cut out, put in, or replaced (also whole words, so that heads and labels are hit): a listing or BadInput."""
    rec = write_rec(tmp_path / "a", insightface({0: [b"one", b"two"], 1: [MAGIC * 2]}))
    data = (rec.parent / which).read_bytes()
    for where, removed, added in edits:
        at = int(where * len(data)) // (4 if words else 1) * (4 if words else 1)
        data = data[:at] + added + data[at + removed :]
    (rec.parent / which).write_bytes(data)
    try:
        for photograph in photographs(rec):
            photograph.read()
    except BadInput as error:
        assert str(rec.parent) in str(error) and "\n" not in str(error)


# CelebA.

CELEBA = {f"img_align_celeba/{i:06d}.jpg": picture(i) for i in range(1, 6)}
IDENTITIES = b"000001.jpg 2880\n000002.jpg 12\r\n000003.jpg 2880\n000004.jpg 9\n000005.jpg 12\n\n"
CELEBA_KEYS = ["9/000004", "12/000002", "12/000005", "2880/000001", "2880/000003"]


def celebas(root):
    """Every way in which people have it: (path, layout)."""
    yield (
        write(
            root / "together", {**CELEBA, "identity_CelebA.txt": IDENTITIES, "list_attr_celeba.txt": b"5", "img_align_celeba.zip": b"cut"}
        ),
        "auto",
    )
    write(root / "beside", {**CELEBA, "identity_CelebA.txt": IDENTITIES})
    yield root / "beside" / "img_align_celeba", "auto"
    zipped(write(root / "zip", {"identity_CelebA.txt": IDENTITIES}) / "img_align_celeba.zip", CELEBA)
    yield root / "zip" / "img_align_celeba.zip", "auto"
    yield zipped(root / "inside.zip", {**CELEBA, "identity_CelebA.txt": IDENTITIES, "__MACOSX/._000001.jpg": b"x"}), "celeba"
    given_out = write(root / "CelebA", {"Anno/identity_CelebA.txt": IDENTITIES, "Img/.hidden": b""})
    zipped(given_out / "Img" / "img_align_celeba.zip", CELEBA)
    yield given_out, "auto"
    yield given_out / "Img" / "img_align_celeba.zip", "celeba"
    unpacked = write(root / "unpacked", {**CELEBA, "Anno/identity_CelebA.txt": IDENTITIES})
    yield unpacked, "auto"
    yield unpacked / "img_align_celeba", "auto"
    inside = write(root / "Img", {**{f"Img/{name}": data for name, data in CELEBA.items()}, "Anno/identity_CelebA.txt": IDENTITIES})
    yield inside, "auto"
    zipped(write(root / "zip_inside", {"Anno/identity_CelebA.txt": IDENTITIES}) / "img_align_celeba.zip", CELEBA)
    yield root / "zip_inside", "auto"
    png = {name.replace(".jpg", ".png"): data for name, data in CELEBA.items()}
    yield write(root / "png", {**png, "identity_CelebA.txt": IDENTITIES, "img_celeba/000001.jpg": b"wild"}), "auto"


def test_celeba(tmp_path):
    for path, layout in celebas(tmp_path):
        found = photographs(path, layout)
        assert [p.key for p in found] == CELEBA_KEYS, path
        expected = {key: (key.split("/")[0], CELEBA[f"img_align_celeba/{key.split('/')[1]}.jpg"]) for key in CELEBA_KEYS}
        assert read(found) == expected


def test_celeba_with_gaps(tmp_path):
    root = write(tmp_path / "a", {**CELEBA, "identity_CelebA.txt": IDENTITIES})
    (root / "img_align_celeba" / "000009.jpg").write_bytes(b"x")
    (root / "img_align_celeba" / "000002.jpg").unlink()
    message = refused("1 images have no line in identity_CelebA.txt: 000009; 1 lines of identity_CelebA.txt have no image: 000002", root)
    assert "\n" not in message
    for text, words in (
        (b"000001.jpg 5\n000001.jpg 5\n", "line 2: 000001.jpg is there twice"),
        (b"000001.jpg 5\n000003.jpg\n", "line 2 is not a file name and a number"),
        (b"000001.jpg \xff\n", "line 1 is not"),
        (b"202599\n", "line 1 is not"),
    ):
        (root / "identity_CelebA.txt").write_bytes(text)
        refused(words, root)
    (root / "identity_CelebA.txt").unlink()
    refused("identity_CelebA.txt is neither in it nor beside it", root, "celeba")
    write(root, {"img_align_celeba/000001.png": b"x", "identity_CelebA.txt": IDENTITIES})
    refused("img_align_celeba/000001.jpg and img_align_celeba/000001.png are the same", root)


# Folders whose names are known.

NAMED = {
    "casia_webface": {"0000045/001.jpg": b"a", "0000045/002.jpg": b"b", "0000099/001.jpg": b"c"},
    "vggface2": {"train/n000002/0001_01.jpg": b"a", "test/n000001/0001_01.jpg": b"b", "test/n000001/0014_02.jpg": b"c"},
    "lfw": {"lfw/Al_Gore/Al_Gore_0001.jpg": b"a", "lfw/Al_Gore/Al_Gore_0002.jpg": b"b", "lfw/AJ/AJ_0001.jpg": b"c"},
}


@pytest.mark.parametrize("layout", NAMED)
def test_named_folders(tmp_path, layout):
    files = NAMED[layout]
    expected = {"/".join(name[:-4].split("/")[-2:]): (name.split("/")[-2], data) for name, data in files.items()}
    root = write(tmp_path / "a", files)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(root, ".")
    for path in (root, tmp_path / "a.tar.gz", zipped(tmp_path / "a.zip", files)):
        assert read(photographs(path, layout)) == expected
    top = next(iter(files)).split("/")[0]
    write(root, {f"{top}/holiday/me.jpg": b"x", f"{top}/holiday/you.jpg": b"x"})
    refused(rf"2 images are not called as in {layout} \(.*\): holiday/me, holiday/you", root, layout)
    assert len(photographs(root)) == len(files) + 2


def test_names_of_layouts(tmp_path):
    message = refused("no layout 'celebb'", tmp_path, "celebb")
    assert all(name in message for name in LAYOUTS)
    (tmp_path / "notes.txt").write_text("x")
    refused("not a folder, zip, tar, csv or rec", tmp_path / "notes.txt")
    refused("not a folder, zip or tar", tmp_path / "notes.txt", "lfw")
    refused(str(tmp_path), tmp_path, "csv")
    (tmp_path / "nul.csv").write_bytes(b"image,identity\n" + b"a" * 200_000 + b",b\n")
    refused("not a CSV file", tmp_path / "nul.csv")
    (tmp_path / "nul.csv").write_bytes(b"image,identity\na\0.jpg,b\n")
    refused("line 2: a file's name cannot hold a zero byte", tmp_path / "nul.csv")
    refused("Al_Gore_00012", write(tmp_path / "long", {"Al_Gore/Al_Gore_00012.jpg": b""}), "lfw")


# Listings of what file systems and archives can hold.


def test_links_loops_and_things_that_are_no_files(tmp_path, capsys):
    elsewhere = write(tmp_path / "elsewhere" / "eve", {"eve_0.jpg": b"e", "more/deep/dan/dan_0.jpg": b"d"})
    root = write(tmp_path / "faces", {"ada/ada_0.jpg": b"a", "bob/bob_0.jpg": b"b"})
    (elsewhere / "back").symlink_to(root)
    (elsewhere / "self").symlink_to(elsewhere)
    for name, target in (("ada/up", ".."), ("everything", tmp_path), ("ada2", "ada"), ("eve", elsewhere), ("again", elsewhere)):
        (root / name).symlink_to(target)
    (root / "ada" / "loop.jpg").symlink_to("loop.jpg")
    (root / "bob" / "gone.jpg").symlink_to("nowhere.jpg")
    (root / "cy").symlink_to("nobody")
    os.mkfifo(root / "ada" / "pipe.jpg")
    found = photographs(root)
    assert [p.key for p in found] == ["ada/ada_0", "ada/loop", "again/eve_0", "bob/bob_0", "bob/gone", "dan/dan_0"]
    assert {p.key: p.read() for p in found if p.key[-1] == "0"} == {
        "ada/ada_0": b"a",
        "again/eve_0": b"e",
        "bob/bob_0": b"b",
        "dan/dan_0": b"d",
    }
    said = capsys.readouterr().err
    assert "left out 6 links to folders that are listed already" in said and "ada/up, ada2, again/back, again/self, eve and 1 more" in said
    assert "left out 1 things that are no files: ada/pipe.jpg" in said
    assert "left out 1 files whose ending is not an image's: cy" in said


def test_unreadable_images_are_counted_by_prepare(tmp_path):
    root = write(tmp_path / "faces", {f"ada/{i}.jpg": picture(i) for i in range(3)})
    (root / "ada" / "loop.jpg").symlink_to("loop.jpg")
    metadata = prepare.prepare(photographs(root), tmp_path / "out", prepare.Settings(), reject_limit=0.5)
    assert list(metadata["rejected"]) == ["ada/loop"] and "symbolic links" in metadata["rejected"]["ada/loop"]


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    root = write(tmp_path / "faces", {"ada/0.jpg": b"", "bob/0.jpg": b""})
    real = os.scandir

    def scandir(path):
        if str(path).endswith("bob"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(folders.os, "scandir", scandir)
    refused("faces/bob: cannot be listed .Permission denied", root)


def test_nothing_is_left_out_in_silence(tmp_path, capsys):
    files = {"ada/0.jpg": b"a", "stray.png": b"s", "bob/notes.txt": b"n", "deep/cy/0.jpg": b"c", "ada/new.heic": b"h"}
    root = write(tmp_path / "faces", files)
    (root / "nobody").mkdir()
    with tarfile.open(tmp_path / "faces.tar", "w") as archive:
        archive.add(root, ".")
    for path, empty in ((root, 2), (tmp_path / "faces.tar", 2), (zipped(tmp_path / "faces.zip", files), 1)):
        assert [p.key for p in photographs(path)] == ["ada/0", "cy/0"]
        said = capsys.readouterr().err
        assert f"left out {empty} folders without an image: bob{', nobody' * (empty - 1)}\n" in said
        assert "left out 1 images outside of a person's folder: stray.png\n" in said
        assert "left out 2 files whose ending is not an image's: ada/new.heic, bob/notes.txt\n" in said
    (tmp_path / "void").mkdir()
    refused("no images in folders", tmp_path / "void")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"ada/A.jpg": b"", "ada/a.jpg": b""}, "two images are called ada/A and ada/a, which differ only in case"),
        ({"Ada/0.jpg": b"", "ada/1.jpg": b""}, "two people are called Ada and ada, which differ only in case"),
    ],
)
def test_names_that_differ_only_in_case(tmp_path, files, words):
    refused(words, zipped(tmp_path / "faces.zip", files))
    rows = [f"{name},{name.split('/')[0]}" for name in files]
    (tmp_path / "faces.csv").write_text("\n".join(["image,identity", *rows]))
    refused(words, tmp_path / "faces.csv")


def test_odd_names(tmp_path):
    root = write(tmp_path / "faces", {"x²/².jpg": b"a", "x²/1²2.jpg": b"b", "名/10.jpg": b"c", "名/9.jpg": b"d"})
    assert [p.key for p in photographs(root)] == ["x²/1²2", "x²/²", "名/9", "名/10"]
    (root / os.fsdecode(b"\xff")).mkdir()
    (root / os.fsdecode(b"\xff") / "0.jpg").write_bytes(b"")
    assert refused("is not UTF-8: rename it", root).isascii()


def test_links_in_tar_files(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        info = tarfile.TarInfo("set/ada/0.jpg")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"one"))
        for name, kind, target in (
            ("set/bob/hard.jpg", tarfile.LNKTYPE, "set/ada/0.jpg"),
            ("set/bob/soft.jpg", tarfile.SYMTYPE, "../ada/0.jpg"),
            ("set/bob/gone.jpg", tarfile.SYMTYPE, "../ada/9.jpg"),
            ("set/bob/pipe.jpg", tarfile.FIFOTYPE, ""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
    found = {p.key: p for p in photographs(tmp_path / "a.tar")}
    assert all(found[key].read() == b"one" for key in ("ada/0", "bob/hard", "bob/soft"))
    for key, words in (("bob/gone", "a link to ../ada/9.jpg"), ("bob/pipe", "no file")):
        with pytest.raises(BadInput, match=words):
            found[key].read()


def test_zip_members_that_cannot_be_read(tmp_path):
    """Encrypted, and compressed by a method that nobody has: named, as prepare counts them."""
    whole = zipped(tmp_path / "a.zip", {"ada/0.jpg": b"one"}).read_bytes()
    central = whole.index(b"PK\1\2")
    for name, byte, value in (("locked.zip", 6, 1), ("method.zip", 8, 77)):
        data = bytearray(whole)
        data[byte] = data[central + byte + 2] = value
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BadInput, match="cannot be read from its zip file"):
            photographs(tmp_path / name)[0].read()


# To records.


def test_celeba_to_records(tmp_path):
    root = write(tmp_path / "celeba", {**CELEBA, "identity_CelebA.txt": IDENTITIES})
    metadata = prepare.prepare(photographs(root), tmp_path / "out", prepare.Settings())
    assert metadata["identities"] == ["9", "12", "2880"] and not metadata["rejected"]
    found = {r["key"]: (r["identity"], r["label"], r["image"]) for r in records.iterate(tmp_path / "out", "train")}
    assert sorted(found) == sorted(CELEBA_KEYS)
    assert found["2880/000003"] == ("2880", 2, CELEBA["img_align_celeba/000003.jpg"])


def test_insightface_rec_to_records_by_command(tmp_path):
    """By two worker processes, one image being damaged."""
    rec = write_rec(tmp_path / "faces", insightface({**PEOPLE, 4: [b"no image"]}))
    command = [sys.executable, "-m", "data_pipelines.prepare", f"--input={rec.parent}", f"--output={tmp_path / 'out'}"]
    done = subprocess.run([*command, "--layout=insightface_rec", "--reject_limit=0.2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["left_out"] == 1 and re.search("left out 4/7: not an image", done.stdout)
    assert {r["key"]: r["image"] for r in records.iterate(tmp_path / "out", "train")} == EXPECTED
