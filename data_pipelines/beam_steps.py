"""The steps of `data_pipelines.prepare_beam`, as Apache Beam runs them in its workers.

Every worker lists the input itself, so only numbers, images and shards travel. The input, the output's folder and --crops must be where all workers see them.
"""

import hashlib
import json
import re
import shutil
import uuid
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.metrics.metric import MetricsFilter
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.runner import PipelineState

from data_pipelines import detected, prepare, records
from data_pipelines.align import NO_FACE, Rectangle
from data_pipelines.detected import Detection, Found
from data_pipelines.importers import Photograph
from data_pipelines.importers.layouts import photographs
from facenet_jax import command_line, detection
from facenet_jax.apps import pretrained
from facenet_jax.errors import BadInput
from facenet_jax.files import written

NAMESPACE = "facenet_jax"
# Photographs whose places travel together, and those that are looked at together.
_TOGETHER, _BATCH = 4, 64
# What a rejection is counted as, by words of its problem.
KINDS = {
    "damaged": "damaged image",
    NO_FACE: NO_FACE,
    "empty file": "empty file",
    "not an image": "not an image",
    "pixels are too many": "too many pixels",
    "pixels are too few": "too few pixels",
    "no crop rectangle": "no crop rectangle",
    "cannot be read": "unreadable file",
}

Rejection = tuple[str, int, int, str]
"""Split, place in it, place in the list, what is wrong."""


@dataclass(frozen=True)
class Job:
    """What a worker must know: how to list the photographs, and what becomes of them."""

    input: str
    layout: str
    exclude: tuple[str, ...]
    listing: str
    settings: prepare.Settings
    detection: Detection | None
    crops: tuple[str, str] | None
    split: str
    held_out: int
    shards: tuple[tuple[str, int], ...]
    aside: str
    name: str


@dataclass(frozen=True)
class Place:
    """A photograph's split, its place among that split's photographs, its person's label, and its rectangle, if those are given."""

    photograph: Photograph
    split: str
    place: int
    label: int
    where: Rectangle | Found | None


def listing_of(found: list[Photograph]) -> str:
    """A hash of a list of photographs: two workers that see different inputs must not write one data set."""
    return hashlib.sha256("".join(f"{p.key}\0{p.identity}\0" for p in found).encode()).hexdigest()


def kind(problem: str) -> str:
    """What a problem is counted as."""
    return next((name for words, name in KINDS.items() if words in problem), "other")


@lru_cache(1)
def places(job: Job) -> list[Place]:
    """All photographs in their order; listed once in each process."""
    found = prepare.taken(photographs(Path(job.input), job.layout), job.exclude, quiet=True)
    if listing_of(found) != job.listing:
        raise BadInput(
            f"{job.input}: a worker sees other photographs there than the process that began: is it the same folder on all machines?"
        )
    people, split_of = prepare.splits_of(found, job.held_out, job.split)
    labels = {person: label for label, person in enumerate(people)}
    crops = prepare.crops_by_key(found, prepare.read_crops(Path(job.crops[0]), job.crops[1])) if job.crops else {}
    seen: Counter[str] = Counter()
    listed = []
    for photograph in found:
        split = split_of[photograph.identity]
        listed.append(Place(photograph, split, seen[split], labels[photograph.identity], crops.get(photograph.key)))
        seen[split] += 1
    return listed


class Convert(beam.DoFn):
    """Places in the list -> (place, image bytes), and tagged "rejected" a `Rejection`. The detector is made once in each worker."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def setup(self) -> None:
        what = self.job.detection
        self._detector = cache(lambda: detection.create(what.detector, **dict(what.settings))) if what else None
        if what:
            command_line.use_compilation_cache()
            if what.detector == "mtcnn":
                pretrained.fetch("mtcnn")

    def process(self, indices: list[int]) -> Iterator[Any]:
        """Faces are looked for on many photographs together; what is found on one does not depend on the others."""
        listed = places(self.job)
        for index, item in zip(indices, self._with_faces([listed[i] for i in indices]), strict=True):
            Metrics.counter(NAMESPACE, "photographs").inc()
            data, problem = prepare.convert(item, self.job.settings)
            if problem:
                Metrics.counter(NAMESPACE, f"rejected: {kind(problem)}").inc()
                yield beam.pvalue.TaggedOutput("rejected", (listed[index].split, listed[index].place, index, problem))
            else:
                yield index, data

    def _with_faces(self, wanted: list[Place]) -> Iterator[tuple[Photograph, Rectangle | Found | None]]:
        if self._detector is None:
            yield from ((place.photograph, place.where) for place in wanted)
            return
        for window in detected.look([place.photograph for place in wanted], self.job.settings.jpeg, self._detector):
            yield from window


def to_shard(image: tuple[int, bytes], rejected: list[Rejection], job: Job) -> tuple[tuple[str, int], tuple[int, int, bytes]]:
    """((split, shard), (place among the images kept, place in the list, image bytes)): shards fill round robin, as `records.Writer` fills them.

    rejected: all of them, sorted.
    """
    index, data = image
    place = places(job)[index]
    kept = place.place - (bisect_left(rejected, (place.split, place.place)) - bisect_left(rejected, (place.split,)))
    return (place.split, kept % dict(job.shards)[place.split]), (kept, index, data)


def write_shard(grouped: tuple[tuple[str, int], Iterable[tuple[int, int, bytes] | None]], job: Job) -> None:
    """Writes a shard aside, then renames it: a step that is run again, or twice at once, puts the same bytes in the same place."""
    (split, shard), values = grouped
    images = sorted(value for value in values if value is not None)
    count = dict(job.shards)[split]
    if [kept for kept, _, _ in images] != list(range(shard, shard + count * len(images), count)):
        raise RuntimeError(f"shard {shard} of {split}: an image is missing or there twice")
    target = Path(job.aside) / records.shard_name(job.name, split, shard, count)
    aside = target.with_name(f".{uuid.uuid4().hex}")
    writer = records.ShardWriter(aside)
    for _, index, data in images:
        place = places(job)[index]
        writer.add(data, place.label, place.photograph.identity, place.photograph.key)
    filled = writer.finish()
    part = {"bytes": filled.bytes, "images": [(index, hashlib.sha256(data).hexdigest()) for _, index, data in images]}
    command_line.write_json(part_path(aside), part)
    for path in (records.index_path, part_path, Path):
        path(aside).rename(path(target))
    Metrics.counter(NAMESPACE, "images written").inc(filled.images)


def part_path(shard: Path) -> Path:
    """Where a worker says what it wrote into a shard."""
    return shard.with_name(f"{shard.name}.part.json")


def rejections_path(aside: Path) -> Path:
    """Where the rejections are told."""
    return aside / "rejections.json"


def write_rejections(rejected: list[Rejection], aside: str) -> None:
    """Writes all of them, aside first."""
    with written(rejections_path(Path(aside))) as temporary:
        temporary.write_text(json.dumps(rejected))


def build(pipeline: beam.Pipeline, job: Job, count: int) -> None:
    """Adds the steps for `count` photographs to a pipeline."""
    converted = (
        pipeline
        | "list" >> beam.Create(range(0, count, _TOGETHER))
        | "spread" >> beam.Reshuffle()
        | "places" >> beam.FlatMap(lambda start: range(start, min(start + _TOGETHER, count)))
        | "batch" >> beam.BatchElements(min_batch_size=_BATCH, max_batch_size=_BATCH)
        | "convert" >> beam.ParDo(Convert(job)).with_outputs("rejected", main="images")
    )
    rejected = converted.rejected | "gather rejections" >> beam.combiners.ToList() | "sort" >> beam.Map(sorted)
    _ = rejected | "write rejections" >> beam.Map(write_rejections, aside=job.aside)
    # So that a shard without an image is written too.
    every = [((split, shard), None) for split, shards in job.shards for shard in range(shards)]
    placed = converted.images | "place" >> beam.Map(to_shard, beam.pvalue.AsSingleton(rejected), job=job)
    _ = (
        (placed, pipeline | "shards" >> beam.Create(every))
        | "all" >> beam.Flatten()
        | "gather shards" >> beam.GroupByKey()
        | "write shards" >> beam.Map(write_shard, job=job)
    )


def seal(job: Job, directory: Path, reject_limit: float, alignment: dict) -> dict[str, Any]:
    """Checks that every photograph is in a shard or rejected, and moves the directory into place; returns its metadata.

    BadInput where too many cannot be used, or a split has none left.
    """
    aside, listed = Path(job.aside), places(job)
    rejections = sorted(json.loads(rejections_path(aside).read_text()), key=lambda rejection: rejection[2])
    rejected = {listed[index].photograph.key: problem for _, _, index, problem in rejections}
    unusable = [(key, problem) for key, problem in rejected.items() if problem != NO_FACE]
    if len(unusable) > reject_limit * len(listed):
        raise prepare.too_many(len(unusable), *unusable[-1], reject_limit)
    hashes: dict[int, bytes] = {}
    splits: dict[str, list[records.Filled]] = {}
    for split, count in job.shards:
        splits[split] = []
        for shard in range(count):
            path = part_path(aside / records.shard_name(job.name, split, shard, count))
            told = json.loads(path.read_text())
            labels = frozenset(listed[index].label for index, _ in told["images"])
            splits[split].append(records.Filled(len(told["images"]), told["bytes"], labels))
            hashes |= {index: bytes.fromhex(digest) for index, digest in told["images"]}
            path.unlink()
        if not any(filled.images for filled in splits[split]):
            raise BadInput(f"no image is left for the split {split!r}")
    images = sum(filled.images for filled in chain(*splits.values()))
    if len(hashes) != images or images + len(rejections) != len(listed):
        raise RuntimeError(f"{len(listed)} photographs, but {images} images written and {len(rejections)} rejected")
    content = hashlib.sha256()
    for index in sorted(hashes):
        place = listed[index]
        content.update(records.content(place.split, hashes[index], place.label, place.photograph.identity, place.photograph.key))
    rejections_path(aside).unlink()
    for left in aside.glob(".*"):
        left.unlink()
    people = prepare.splits_of([place.photograph for place in listed], job.held_out, job.split)[0]
    metadata = prepare.described(alignment, job.settings, people, rejected)
    return records.seal(aside, directory, job.name, splits, content.hexdigest(), metadata)


def run(job: Job, directory: Path, options: PipelineOptions, reject_limit: float, alignment: dict) -> tuple[dict[str, Any], dict[str, int]]:
    """Runs the pipeline: the records' metadata, and the counters. What a worker calls bad input is BadInput here."""
    aside = Path(job.aside)
    aside.mkdir(parents=True)
    try:
        pipeline = beam.Pipeline(options=options)
        build(pipeline, job, len(places(job)))
        try:
            result = pipeline.run()
            state = result.wait_until_finish()
        except Exception as error:
            # Every runner has exceptions of its own; what a worker said comes as text, from another process or with the step's name.
            told = f"{type(error).__name__}: {error}"
            if said := re.findall(r"BadInput: (.*?)(?:\\n| \[while running|$)", told, re.MULTILINE):
                raise BadInput(said[0]) from None
            raise
        if state != PipelineState.DONE:
            raise RuntimeError(f"the pipeline ended as {state}")
        found = result.metrics().query(MetricsFilter().with_namespace(NAMESPACE))["counters"]
        metadata = seal(job, directory, reject_limit, alignment)
        return metadata, {counter.key.metric.name: counter.result for counter in sorted(found, key=lambda c: c.key.metric.name)}
    finally:
        shutil.rmtree(aside, ignore_errors=True)
