"""Where training examples come from: our TFRecords, ArrayRecords of the same examples, or a named TFDS data set.

A source has `labels` [n] int64 (dense, 0..people-1), `keys` [n], `people` (names by label) and `source[i]` -> (image bytes or uint8 pixels).
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from data_pipelines import example, records
from facenet_jax.errors import BadInput

# Shards that are kept open: systems allow a process 1,024 files, and there are several sources.
_OPEN = 128


class Source(Protocol):
    """Random access to faces."""

    labels: np.ndarray
    keys: np.ndarray
    identities: np.ndarray
    metadata: dict[str, Any]

    def image(self, index: int) -> bytes | np.ndarray:
        """Encoded bytes, or decoded uint8 pixels [h, w, 3]."""
        ...


def _dense(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels renumbered 0..people-1 in order of value, and the values."""
    values, dense = np.unique(labels, return_inverse=True)
    return dense.astype(np.int64), values


@dataclass
class TfRecords:
    """A split of a directory of records. Files open on first use, so that it can be sent to worker processes."""

    directory: Path
    split: str
    labels: np.ndarray = field(init=False)
    keys: np.ndarray = field(init=False)
    identities: np.ndarray = field(init=False)
    metadata: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.metadata = records.read_metadata(self.directory)
        self._shards = [records.read_index(path) for path in records.shard_paths(self.directory, self.split)]
        lengths = [len(shard.labels) for shard in self._shards]
        self._shard_of = np.repeat(np.arange(len(lengths)), lengths)
        self._position = np.concatenate([np.arange(length) for length in lengths])
        self.labels, values = _dense(np.concatenate([shard.labels for shard in self._shards]))
        self.keys = np.concatenate([shard.keys for shard in self._shards])
        names = self.metadata.get("identities", {})
        self.identities = np.asarray([names[value] if isinstance(names, list) else str(value) for value in values], np.str_)
        self._files: OrderedDict[int, BinaryIO] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    def image(self, index: int) -> bytes:
        """JPEG or PNG bytes; BadInput where the record is damaged."""
        number = int(self._shard_of[index])
        shard = self._shards[number]
        file = self._files.pop(number, None) or shard.path.open("rb")
        self._files[number] = file
        if len(self._files) > _OPEN:
            # Not closed here: another thread may be reading it, and the last to hold it closes it.
            self._files.popitem(last=False)
        return example.parse_image(shard.read(file, int(self._position[index])))


@dataclass
class ArrayRecords:
    """ArrayRecord files of the same serialised examples: `*-<split>.array_record*` in a directory."""

    directory: Path
    split: str
    labels: np.ndarray = field(init=False)
    keys: np.ndarray = field(init=False)
    identities: np.ndarray = field(init=False)
    metadata: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        import grain.sources

        paths = sorted(self.directory.glob(f"*-{self.split}.array_record*"))
        if not paths:
            raise BadInput(f"{self.directory}: no *-{self.split}.array_record* files")
        self._source = grain.sources.ArrayRecordDataSource([str(path) for path in paths])
        parsed = [example.parse(self._source[i]) for i in range(len(self._source))]
        self.labels, values = _dense(np.asarray([p["label"] for p in parsed]))
        self.keys = np.asarray([p["key"] for p in parsed])
        names = {p["label"]: p["identity"] for p in parsed}
        self.identities = np.asarray([names[value] for value in values], np.str_)
        self.metadata = records.read_metadata(self.directory) if (self.directory / "metadata.json").exists() else {}

    def image(self, index: int) -> bytes:
        """JPEG or PNG bytes."""
        return example.parse_image(self._source[index])


@dataclass
class Tfds:
    """A TFDS data set that was prepared as ArrayRecord, by name: features `image` and `label`."""

    name: str
    split: str
    labels: np.ndarray = field(init=False)
    keys: np.ndarray = field(init=False)
    identities: np.ndarray = field(init=False)
    metadata: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        import tensorflow_datasets as tfds

        try:
            builder = tfds.builder(self.name)
            self._source = builder.as_data_source(self.split, decoders={"image": tfds.decode.SkipDecoding()})
            missing = {"image", "label"} - set(builder.info.features)
        except (ValueError, AttributeError, NotImplementedError, tfds.core.registered.DatasetNotFoundError) as error:
            raise BadInput(f"tfds:{self.name}: {str(error).splitlines()[0]}") from None
        if missing:
            raise BadInput(f"tfds:{self.name}: has no feature named {', '.join(sorted(missing))}")
        self.labels, values = _dense(np.asarray([int(record["label"]) for record in self._source]))
        self.keys = np.asarray([str(i) for i in range(len(self.labels))])
        self.identities = values.astype(np.str_)
        self.metadata = {"name": self.name}

    def image(self, index: int) -> bytes | np.ndarray:
        """Encoded bytes as TFDS stores them."""
        return self._source[index]["image"]


def open_source(where: str, split: str) -> Source:
    """A directory of TFRecords or ArrayRecords, or `tfds:name`."""
    if where.startswith("tfds:"):
        return Tfds(where.removeprefix("tfds:"), split)
    directory = Path(where)
    if not directory.is_dir():
        raise BadInput(f"{where}: no such directory of records")
    if any(directory.glob("*.array_record*")):
        return ArrayRecords(directory, split)
    return TfRecords(directory, split)
