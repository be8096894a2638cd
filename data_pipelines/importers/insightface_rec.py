"""InsightFace's training sets: MXNet's RecordIO (train.rec, train.idx), read without MXNet.

A record is one part or several, each at a multiple of 4 bytes, little-endian: uint32 magic, uint32 flag << 29 | size, `size` bytes, zeros
up to a multiple of 4. Flag 0 is a whole record. Where the data hold the magic at a multiple of 4 they are split and it is left out: flag 1
is the first part, 2 a middle one, 3 the last (dmlc-core, recordio.h).

The data are MXNet's IRHeader (uint32 count, float32 label, uint64 id, uint64 id2), then `count` float32 labels, which replace `label` where
count > 0, then the image's bytes. Record 0 of InsightFace's files has no image and the labels (first, end): images are the records 1 to
first - 1, people the records first to end - 1, each without an image and with labels (a, b): images a to b - 1 are this person's.
Without such a record 0 (im2rec) every record is an image. A line of the .idx is a record's number, a tab, and its first byte in the .rec.
"""

import os
import struct
from array import array
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_pipelines.importers import Photograph, left_out
from facenet_jax.errors import BadInput

_MAGIC = 0xCED7230A
_PART = struct.Struct("<II")
_HEADER = struct.Struct("<IfQQ")


@dataclass(frozen=True)
class _Table:
    """One row a record: number int64 [n], first byte int64 [n], labels float64 [n, 2] (nan where there is one), image: bool [n]."""

    numbers: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    image: np.ndarray

    def take(self, rows: np.ndarray) -> "_Table":
        return _Table(self.numbers[rows], self.offsets[rows], self.labels[rows], self.image[rows])


def insightface_rec(path: Path) -> list[Photograph]:
    """A .rec file, with its .idx beside it, or a folder that holds train.rec; by label and number, keys are label/number.

    Images are read one by one, when they are asked for. Without an .idx records are numbered by the ids in them. BadInput names the byte
    of damage, the line of a bad index, and records that disagree with record 0.
    """
    rec = path / "train.rec" if path.is_dir() else path
    if not rec.is_file():
        raise BadInput(f"{path}: no train.rec in it")
    table = _scan(rec)
    index = rec.with_suffix(".idx")
    table = _numbered(table, index) if index.exists() else table
    table = table.take(np.argsort(table.numbers, kind="stable"))
    if len(repeated := table.numbers[1:][np.diff(table.numbers) == 0]):
        raise BadInput(
            f"{rec}: two records have the number {repeated[0]}" + ("" if index.exists() else f": it needs {index.name} beside it")
        )
    if table.numbers[0] == 0 and not table.image[0] and not np.isnan(table.labels[0, 1]):
        table = _described(table, rec)
    return _photographs(table, rec)


def _record(file: BinaryIO, offset: int, total: int, most: int = 1 << 30) -> tuple[bytes, int, int]:
    """(`most` bytes or a few more of the data of the record at `offset`, their whole number, where the next record begins)."""
    data, size, expected, start = bytearray(), 0, (0, 1), offset
    while True:
        file.seek(offset)
        head = file.read(_PART.size)
        if len(head) < _PART.size:
            raise BadInput(f"the record at byte {start} is cut off")
        magic, word = _PART.unpack(head)
        flag, length = word >> 29, word & 0x1FFFFFFF
        if magic != _MAGIC or flag not in expected:
            raise BadInput(f"no record of MXNet at byte {offset}: the file is damaged, or of another kind")
        offset += _PART.size + length + -length % 4
        if offset > total:
            raise BadInput(f"the record at byte {start} is cut off")
        if flag > 1:
            data += head[:4]
            size += 4
        data += file.read(min(length, max(most - size, 0)))
        size += length
        if flag in (0, 3):
            return bytes(data), size, offset
        expected = (2, 3)


def _labels(data: bytes, size: int) -> tuple[int, list[float], int]:
    """(id, the first labels, where the image begins)."""
    if size >= _HEADER.size:
        count, label, number, _ = _HEADER.unpack_from(data)
        begin = _HEADER.size + 4 * count
        if begin <= size:
            return number, [label] if not count else list(struct.unpack_from(f"<{min(count, 2)}f", data, _HEADER.size)), begin
    raise BadInput(f"{size} bytes are too few for an image record's head")


def _scan(rec: Path) -> _Table:
    """Reads the head of every record."""
    total = rec.stat().st_size
    columns = numbers, offsets, labels, image = array("Q"), array("q"), array("d"), array("b")
    offset = 0
    with rec.open("rb") as file:
        while offset < total:
            try:
                data, size, following = _record(file, offset, total, _HEADER.size + 8)
                number, some, begin = _labels(data, size)
            except BadInput as error:
                raise BadInput(f"{rec}: record {len(offsets)} (byte {offset}): {error}") from None
            numbers.append(number)
            offsets.append(offset)
            labels.extend([*some, np.nan][:2])
            image.append(begin < size)
            offset = following
    if not offsets:
        raise BadInput(f"{rec}: no records")
    ids, places, values, whether = (np.asarray(column) for column in columns)
    return _Table(ids, places, values.reshape(-1, 2), whether.astype(bool))


def _numbered(table: _Table, index: Path) -> _Table:
    """The records that the index lists, under its numbers."""
    numbers, offsets = array("q"), array("q")
    for line, text in enumerate(index.read_bytes().splitlines(), 1):
        number, _, offset = text.partition(b"\t")
        if not (number.isdigit() and offset.isdigit() and max(len(number), len(offset)) < 19):
            raise BadInput(f"{index}: line {line} is not a number, a tab and a number")
        numbers.append(int(number))
        offsets.append(int(offset))
    if not offsets:
        raise BadInput(f"{index}: no lines")
    places = np.asarray(offsets)
    rows = np.searchsorted(table.offsets, places).clip(max=len(table.offsets) - 1)
    if len(wrong := np.flatnonzero(table.offsets[rows] != places)):
        raise BadInput(
            f"{index}: line {wrong[0] + 1}: no record of the .rec begins at byte {places[wrong[0]]}: an index of another file, or damaged"
        )
    listed, times = np.unique(rows, return_counts=True)
    if (times > 1).any():
        raise BadInput(f"{index}: two lines point to byte {table.offsets[listed[times > 1][0]]}")
    left_out(index, "records of the .rec that it does not list", [f"byte {place}" for place in np.delete(table.offsets, listed)])
    return _Table(np.asarray(numbers), places, table.labels[rows], table.image[rows])


def _described(table: _Table, rec: Path) -> _Table:
    """The images of a file whose record 0 (row 0) tells which records are images; rows are in the order of their numbers."""
    first, end = table.labels[0]
    if not (1 <= first <= end < np.inf and first % 1 == 0):
        raise BadInput(f"{rec}: record 0 gives no range of people ({first:g} to {end:g})")
    exact = first < 1 << 24
    # float32 cannot say larger numbers exactly: the last record with an image does.
    last = int(first) - 1 if exact else int(table.numbers[table.image].max(initial=0))
    numbers = table.numbers[1:]
    images = table.take(1 + np.flatnonzero(numbers <= last))
    if len(images.numbers) != last:
        gap = 1 + int(np.argmin(np.append(images.numbers == np.arange(1, len(images.numbers) + 1), False)))
        raise BadInput(f"{rec}: record 0 tells of images 1 to {last}, but {last - len(images.numbers)} are missing, the first is {gap}")
    if len(beyond := numbers[(numbers > last) & table.image[1:]]):
        raise BadInput(f"{rec}: record {beyond[0]} is an image, but record 0 says that the last is {last}")
    people = table.take(1 + np.flatnonzero((numbers > last) & (numbers < end)))
    if exact and len(people.numbers):
        a, b = people.labels.T
        bad = ~((a >= 1) & (a < b) & (b <= first))
        runs = np.cumsum(np.append(True, images.labels[1:, 0] != images.labels[:-1, 0])) if last else np.zeros(1)
        inside = ~bad
        bad[inside] = runs[a[inside].astype(int) - 1] != runs[b[inside].astype(int) - 2]
        if bad.any():
            person, a, b = people.numbers[bad][0], a[bad][0], b[bad][0]
            raise BadInput(
                f"{rec}: record {person} gives images {a:g} to {b - 1:g} to one person, but they are not there or of several labels"
            )
    return images


def _photographs(table: _Table, rec: Path) -> list[Photograph]:
    values = table.labels[:, 0]
    if len(odd := np.flatnonzero(~((values >= 0) & (values < 1 << 53) & (values == np.floor(values))))):
        raise BadInput(f"{rec}: record {table.numbers[odd[0]]} has the label {values[odd[0]]:g}, which is no person's number")
    if not len(values):
        raise BadInput(f"{rec}: no images")
    table = table.take(np.lexsort((table.numbers, values)))
    people = {label: str(int(label)) for label in np.unique(table.labels[:, 0]).tolist()}
    return [
        Photograph(f"{people[label]}/{number}", people[label], partial(_image, rec, offset))
        for label, number, offset in zip(table.labels[:, 0].tolist(), table.numbers.tolist(), table.offsets.tolist(), strict=True)
    ]


def _image(rec: Path, offset: int) -> bytes:
    """The bytes of one image."""
    with rec.open("rb") as file:
        data, size, _ = _record(file, offset, os.fstat(file.fileno()).st_size)
    return data[_labels(data, size)[2] :]
