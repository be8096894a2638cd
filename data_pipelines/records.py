"""Records: TFRecord shards of faces, each with an index, in a directory that tfds.builder_from_directory also opens.

    <name>-<split>.tfrecord-00000-of-00008              length and data CRCs, as TensorFlow writes them
    <name>-<split>.tfrecord-00000-of-00008.index.npz    offsets [n + 1], labels [n], keys [n]
    dataset_info.json, features.json                    what TFDS reads
    metadata.json                                       alignment, people, counts, content hash (docs/formats.md)

`Writer` writes aside and renames at the end, so a directory of records is whole or absent.
"""

import errno
import hashlib
import json
import os
import shutil
import struct
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_pipelines import example
from facenet_jax.errors import NPZ_ERRORS, BadInput
from facenet_jax.files import written
from facenet_jax.wire import masked_crc32c

VERSION = "1.0.0"
_LENGTH = struct.Struct("<Q")
_CRC = struct.Struct("<I")
_HEADER = _LENGTH.size + _CRC.size


def frame(data: bytes) -> bytes:
    """A TFRecord: length, its CRC, data, its CRC."""
    length = _LENGTH.pack(len(data))
    return length + _CRC.pack(masked_crc32c(length)) + data + _CRC.pack(masked_crc32c(data))


def unframe(framed: bytes, where: str) -> bytes:
    """The data of one framed record; BadInput naming `where` when lengths or CRCs disagree."""
    if len(framed) >= _HEADER + _CRC.size:
        length = framed[: _LENGTH.size]
        data = framed[_HEADER : -_CRC.size]
        sound = _LENGTH.unpack(length)[0] == len(data) and _CRC.unpack(framed[_LENGTH.size : _HEADER])[0] == masked_crc32c(length)
        if sound and _CRC.unpack(framed[-_CRC.size :])[0] == masked_crc32c(data):
            return data
    raise BadInput(f"{where} is damaged (its length or CRC does not match): prepare these records again")


def scan(path: Path) -> np.ndarray:
    """Offsets [n + 1] int64 of a shard's records by walking it; BadInput where it is truncated or damaged."""
    offsets, end = [0], path.stat().st_size
    with path.open("rb") as file:
        while offsets[-1] < end:
            head = file.read(_HEADER)
            where = f"{path}: record {len(offsets) - 1}"
            if len(head) < _HEADER or _CRC.unpack(head[_LENGTH.size :])[0] != masked_crc32c(head[: _LENGTH.size]):
                raise BadInput(f"{where} is damaged (its length or CRC does not match): prepare these records again")
            offsets.append(offsets[-1] + _HEADER + _LENGTH.unpack(head[: _LENGTH.size])[0] + _CRC.size)
            if offsets[-1] > end:
                raise BadInput(f"{where} is cut off")
            file.seek(offsets[-1])
    return np.asarray(offsets, np.int64)


def index_path(shard: Path) -> Path:
    """Where a shard's index lies."""
    return shard.with_name(shard.name + ".index.npz")


@dataclass(frozen=True)
class Shard:
    """One file of records and its index."""

    path: Path
    offsets: np.ndarray
    labels: np.ndarray
    keys: np.ndarray

    def read(self, file: BinaryIO, position: int) -> bytes:
        """The serialised example at `position`, its CRCs checked."""
        start, end = int(self.offsets[position]), int(self.offsets[position + 1])
        return unframe(os.pread(file.fileno(), end - start, start), f"{self.path}: record {position}")


def read_index(path: Path) -> Shard:
    """A shard with its index; BadInput where the index is missing, unreadable or of another file."""
    try:
        with np.load(index_path(path), allow_pickle=False) as index:
            shard = Shard(path, index["offsets"], index["labels"], index["keys"])
    except (*NPZ_ERRORS, KeyError) as error:
        raise BadInput(
            f"{index_path(path)}: cannot be read ({error}); `python -m data_pipelines.prepare --reindex {path.parent}` makes it anew"
        ) from None
    sizes = {len(shard.offsets) - 1, len(shard.labels), len(shard.keys)}
    if len(sizes) != 1 or shard.offsets[-1] != path.stat().st_size:
        raise BadInput(
            f"{index_path(path)}: does not match its shard; `python -m data_pipelines.prepare --reindex {path.parent}` makes it anew"
        )
    return shard


def write_index(path: Path) -> None:
    """Makes a shard's index by reading every record."""
    offsets = scan(path)
    nothing = np.zeros(len(offsets) - 1, np.int64)
    whole = Shard(path, offsets, nothing, nothing)
    with path.open("rb") as file:
        parsed = [example.parse(whole.read(file, i)) for i in range(len(nothing))]
    save_index(path, offsets, [p["label"] for p in parsed], [p["key"] for p in parsed])


def save_index(path: Path, offsets: Sequence[int] | np.ndarray, labels: Sequence[Any], keys: Sequence[Any]) -> None:
    """Writes the index beside a shard, aside first."""
    with written(index_path(path)) as aside, aside.open("wb") as file:
        np.savez(file, offsets=np.asarray(offsets, np.int64), labels=np.asarray(labels, np.int64), keys=np.asarray(keys, np.str_))


_NUMBER = "[0-9]" * 5


def shards_in(directory: Path, split: str = "*") -> list[Path]:
    """The shards that lie there, in order; neither their indices nor what a killed run left."""
    return sorted(directory.glob(f"*-{split}.tfrecord-{_NUMBER}-of-{_NUMBER}"))


def shard_paths(directory: Path, split: str) -> list[Path]:
    """The split's shards in order; BadInput where there are none or some are missing."""
    paths = shards_in(directory, split)
    if not paths:
        there = sorted({p.name.rsplit(".tfrecord-", 1)[0].rsplit("-", 1)[-1] for p in shards_in(directory)})
        found = (
            f"it has the splits {', '.join(there)}" if there else "it holds no records (make them with `python -m data_pipelines.prepare`)"
        )
        raise BadInput(f"{directory}: no split named {split!r}; {found}")
    total = int(paths[0].name.rsplit("-", 1)[-1])
    if len(paths) != total:
        raise BadInput(f"{directory}: {len(paths)} of the {total} shards of split {split!r} are there")
    return paths


def read_metadata(directory: Path) -> dict[str, Any]:
    """metadata.json; BadInput where it is missing or broken."""
    path = directory / "metadata.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise BadInput(f"{directory}: no metadata.json, so this is not a directory of records") from None
    except ValueError as error:
        raise BadInput(f"{path}: not JSON ({error})") from None


_FEATURE = "tensorflow_datasets.core.features."
FEATURES = {
    "pythonClassName": _FEATURE + "features_dict.FeaturesDict",
    "featuresDict": {
        "features": {
            "image": {
                "pythonClassName": _FEATURE + "image_feature.Image",
                "image": {"shape": {"dimensions": ["-1", "-1", "3"]}, "dtype": "uint8"},
            },
            "label": {"pythonClassName": _FEATURE + "scalar.Scalar", "tensor": {"shape": {}, "dtype": "int64", "encoding": "none"}},
            "identity": {"pythonClassName": _FEATURE + "text_feature.Text", "text": {}},
            "key": {"pythonClassName": _FEATURE + "text_feature.Text", "text": {}},
        }
    },
}


def check_absent(directory: Path) -> None:
    """BadInput where there is something already."""
    if directory.exists() and any(directory.iterdir()):
        raise BadInput(f"{directory}: already there; remove it or choose another output")


def working_folder(directory: Path) -> Path:
    """Beside the directory, of this run alone: two runs that write the same directory, on whichever machines, must not meet before one is done."""
    return directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.writing")


def shard_name(name: str, split: str, shard: int, shards: int) -> str:
    """What a shard's file is called."""
    return f"{name}-{split}.tfrecord-{shard:05d}-of-{shards:05d}"


def content(split: str, image_sha256: bytes, label: int, identity: str, key: str) -> bytes:
    """What an image adds to the hash of a data set's content."""
    return f"{split}\0{label}\0{identity}\0{key}\0".encode() + image_sha256


class ShardWriter:
    """Writes one shard, and its index when it is closed."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._index: list[tuple[int, int, str]] = []
        self._bytes = 0

    def add(self, image: bytes, label: int, identity: str, key: str) -> None:
        """Appends one face; image is JPEG or PNG bytes."""
        self._index.append((self._file.tell(), label, key))
        self._file.write(frame(example.serialise(image, label, identity, key)))
        self._bytes += len(image)

    def close(self) -> None:
        """Without an index: for a shard that is given up."""
        self._file.close()

    def finish(self) -> "Filled":
        """Writes the index."""
        end = self._file.tell()
        self._file.close()
        save_index(Path(self._file.name), [*(e[0] for e in self._index), end], [e[1] for e in self._index], [e[2] for e in self._index])
        return Filled(len(self._index), self._bytes, frozenset(e[1] for e in self._index))


@dataclass(frozen=True)
class Filled:
    """What a shard holds: how many images, their bytes, whose (labels)."""

    images: int
    bytes: int
    labels: frozenset[int]


def seal(
    aside: Path, directory: Path, name: str, splits: Mapping[str, Sequence[Filled]], content_sha256: str, metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """Describes the shards that lie in `aside` and moves it into place; returns the whole metadata."""
    told = {
        split: {
            "images": sum(s.images for s in shards),
            "people": len(frozenset().union(*(s.labels for s in shards))),
            "shards": len(shards),
        }
        for split, shards in splits.items()
    }
    whole = {"format": VERSION, "name": name, "splits": told, "content_sha256": content_sha256, **metadata}
    info = {
        "name": name,
        "version": VERSION,
        "fileFormat": "tfrecord",
        "moduleName": "",
        "description": "Faces, by facenet_jax.",
        "splits": [
            {
                "name": split,
                "shardLengths": [str(s.images) for s in shards],
                "numBytes": str(sum(s.bytes for s in shards)),
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
            for split, shards in splits.items()
        ],
    }
    for file_name, described in (("metadata.json", whole), ("dataset_info.json", info), ("features.json", FEATURES)):
        (aside / file_name).write_text(json.dumps(described, indent=1) + "\n")
    if directory.exists():
        directory.rmdir()
    aside.rename(directory)
    return whole


class Writer:
    """Writes one directory of records; use as a context manager. Shards fill round robin, so each holds many people."""

    def __init__(self, directory: Path, name: str, shards: dict[str, int]) -> None:
        check_absent(directory)
        self.directory = directory
        self._aside = working_folder(directory)
        self._name, self._counts = name, shards
        self._shards: dict[str, list[ShardWriter]] = {}
        self._images = dict.fromkeys(shards, 0)
        self._hash = hashlib.sha256()

    def __enter__(self) -> "Writer":
        self._aside.mkdir(parents=True)
        try:
            for split, count in self._counts.items():
                self._shards[split] = []
                for i in range(count):
                    self._shards[split].append(ShardWriter(self._aside / shard_name(self._name, split, i, count)))
        except OSError as error:
            self.__exit__(type(error))
            if error.errno != errno.EMFILE:
                raise
            raise BadInput(
                f"{sum(self._counts.values())} shards are more files than a process may open: raise --images_per_shard"
            ) from None
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        for shards in self._shards.values():
            for shard in shards:
                shard.close()
        if kind is not None:
            shutil.rmtree(self._aside, ignore_errors=True)

    def add(self, split: str, image: bytes, label: int, identity: str, key: str) -> None:
        """Appends one face; image is JPEG or PNG bytes."""
        shards = self._shards[split]
        shards[self._images[split] % len(shards)].add(image, label, identity, key)
        self._images[split] += 1
        self._hash.update(content(split, hashlib.sha256(image).digest(), label, identity, key))

    def splits_with_images(self) -> set[str]:
        """Splits that hold something."""
        return {split for split, count in self._images.items() if count}

    def finish(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """Writes indices and descriptions and moves the directory into place; returns the whole metadata."""
        filled = {split: [shard.finish() for shard in shards] for split, shards in self._shards.items()}
        return seal(self._aside, self.directory, self._name, filled, self._hash.hexdigest(), metadata)


def iterate(directory: Path, split: str) -> Iterator[dict[str, Any]]:
    """Every record of a split, shard by shard."""
    for path in shard_paths(directory, split):
        shard = read_index(path)
        with path.open("rb") as file:
            for position in range(len(shard.labels)):
                yield example.parse(shard.read(file, position))
