"""Records to host batches: the only file that knows grain.

Everything about a row, which record and which chance, follows from (seed, batch number, row): the position of a run is
one integer, whatever the number of workers or hosts. Worker processes make whole batches, every host its own rows.
"""

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import grain
import numpy as np
from absl import flags

from data_pipelines import images, transforms
from data_pipelines.processes import end_with_parent
from data_pipelines.sources import Source
from facenet_jax.errors import BadInput


class Sampler(Protocol):
    """Says which records make a batch."""

    @property
    def rows(self) -> int:
        """Rows of the global batch."""
        ...

    def batch(self, number: int) -> np.ndarray:
        """Record indices [rows]."""
        ...


def load_pixels(source: Source, index: int) -> np.ndarray:
    """One decoded record, uint8 RGB [h, w, 3]; BadInput names the record that cannot be decoded."""
    data = source.image(index)
    if isinstance(data, np.ndarray):
        return data if data.shape[-1] == 3 else np.repeat(data, 3, -1)
    try:
        return images.decode(data)
    except ValueError as error:
        raise BadInput(f"record {source.keys[index]}: {error}") from None


_NO_CHANCE = np.random.default_rng(0)


def decoded_into(place: np.ndarray, source: Source, index: int) -> bool:
    """Decodes a JPEG of just that size into its place in a batch [h, w, 3]; False, and nothing done, for any other picture."""
    data = source.image(index)
    if not isinstance(data, bytes):
        return False
    try:
        return images.decode_into(place, data)
    except ValueError as error:
        raise BadInput(f"record {source.keys[index]}: {error}") from None


@dataclass(frozen=True)
class _HostBatch:
    """Makes one host's rows of batch `number`."""

    source: Source
    sampler: Sampler
    settings: transforms.Transforms
    seed: int
    rows: slice

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        indices = self.sampler.batch(number)[self.rows]
        batch = np.empty((len(indices), self.settings.size, self.settings.size, 3), np.uint8)
        chance = self.settings != self.settings.without_chance()
        for row, index in enumerate(indices):
            # A generator costs a fifth of a picture's decoding; without chance nobody draws from it.
            rng = np.random.default_rng((self.seed, 2, number, self.rows.start + row)) if chance else _NO_CHANCE
            if chance or self.settings.crop or not decoded_into(batch[row], self.source, int(index)):
                batch[row] = transforms.apply(load_pixels(self.source, int(index)), self.settings, rng)
        return {"image": batch, "label": self.source.labels[indices].astype(np.int32), "index": indices.astype(np.int32)}


def _start_worker(number: int, count: int) -> None:
    """A signal to the whole process group is the trainer's to answer, who still needs batches to end its step; a worker ends with the trainer, however
    that ended."""
    del number, count
    for ignored in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ignored, signal.SIG_IGN)
    end_with_parent()


class Batches(Iterator[dict[str, np.ndarray]]):
    """Host batches, in order. BadInput where a worker process died; `close()` ends the workers."""

    def __init__(self, iterator: "grain.DatasetIterator[dict[str, np.ndarray]]") -> None:
        self._iterator = iterator

    def __next__(self) -> dict[str, np.ndarray]:
        try:
            return next(self._iterator)
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            raise BadInput(
                f"a process that makes batches died ({str(error).split('.')[0]}); -9 is mostly the system's answer to too little memory: fewer "
                "data.workers need less. The same command goes on from the last checkpoint"
            ) from None

    def close(self) -> None:
        """Ends the workers."""
        self._iterator.close()


def batches(
    source: Source,
    sampler: Sampler,
    settings: transforms.Transforms,
    seed: int,
    *,
    start: int = 0,
    stop: int,
    workers: int = 0,
    host: int = 0,
    hosts: int = 1,
) -> Batches:
    """Batches start..stop-1 of this host: image [rows / hosts, size, size, 3] uint8, label and record index [rows / hosts] int32.

    `workers` processes make them ahead of time; 0 uses one thread of this process. `close()` ends them.
    """
    if sampler.rows % hosts:
        raise BadInput(f"a batch of {sampler.rows} images does not divide over {hosts} hosts")
    host_rows = sampler.rows // hosts
    make = _HostBatch(source, sampler, settings, seed, slice(host * host_rows, (host + 1) * host_rows))
    dataset = grain.MapDataset.range(start, stop).map(make).to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    if workers:
        # Grain reads absl flags when it starts workers, also in programs that have none.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        options = grain.multiprocessing.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        dataset = dataset.mp_prefetch(options, _start_worker)
    return Batches(iter(dataset))


def in_order(source: Source, indices: np.ndarray, settings: transforms.Transforms, rows: int) -> Iterator[np.ndarray]:
    """The named records as [rows, size, size, 3] uint8, in order, without chance; the last batch is what is left."""

    def decode(index: int) -> np.ndarray:
        return transforms.apply(load_pixels(source, int(indices[index])), settings, _NO_CHANCE)

    dataset = grain.MapDataset.range(len(indices)).map(decode).batch(rows)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))
