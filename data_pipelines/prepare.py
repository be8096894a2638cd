"""Photographs to records: `python -m data_pipelines.prepare --input=faces.zip --output=records/faces [--align]`.

Input: a folder per person, a zip or tar of such a folder, a CSV with columns `image` and `identity`, and other layouts (docs/data.md). Faces are
found and cut (--align) or cut by given rectangles (--crops), images resized (--size) and stored as JPEG 95; a JPEG or PNG that needs none of that is
stored as it came. Stopped while it looks for faces, the same command goes on where it was.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from data_pipelines import align, images, records
from data_pipelines.align import NO_FACE, Rectangle, alignment_of_flags, cut_out, detection_of_flags, planned
from data_pipelines.cleaning.exclusions import read_exclusions
from data_pipelines.detected import NOTHING, Detection, Found, find_faces, read
from data_pipelines.importers import Photograph, some
from data_pipelines.importers.folders import natural
from data_pipelines.importers.layouts import photographs
from data_pipelines.processes import in_processes
from facenet_jax import command_line
from facenet_jax.alignment import Alignment
from facenet_jax.errors import NPZ_ERRORS, BadInput

FLAGS = flags.FLAGS


@dataclass(frozen=True)
class Settings:
    """size: output side in pixels, 0 to keep; form: "jpeg" or "png"; alignment: how found faces are cut; middle: cut it where no face is."""

    size: int = 0
    form: str = "jpeg"
    alignment: Alignment | None = None
    middle: bool = False
    jpeg: str = ""


def read_crops(path: Path, key: str) -> dict[str, Rectangle]:
    """Rectangles from an .npz with `names` [n] and `key` [n, 4] (x1, y1, x2, y2), by name."""
    try:
        with np.load(path, allow_pickle=False) as data:
            names, boxes = data["names"], data[key]
    except (*NPZ_ERRORS, KeyError) as error:
        raise BadInput(f"{path}: {error}") from None
    return {str(name): (int(box[0]), int(box[1]), int(box[2]), int(box[3])) for name, box in zip(names, boxes, strict=True)}


def _cut(pixels: np.ndarray, where: Rectangle | Found | None, settings: Settings) -> np.ndarray:
    """The part of a photograph that is stored; BadInput says why there is none."""
    if isinstance(where, Found):
        if where.problem:
            raise BadInput(where.problem)
        assert settings.alignment is not None
        cuts = planned(where, settings.alignment, settings.middle)
        if not cuts:
            raise BadInput(NO_FACE)
        return cut_out(pixels, where, cuts[0], settings.alignment)
    cut = pixels if where is None else pixels[max(where[1], 0) : where[3], max(where[0], 0) : where[2]]
    if min(cut.shape[:2]) < 8:
        raise BadInput(f"{cut.shape[1]}x{cut.shape[0]} pixels are too few")
    return images.resize(cut, settings.size) if settings.size else cut


def convert(item: tuple[Photograph, Rectangle | Found | None], settings: Settings) -> tuple[bytes, str]:
    """(image bytes, "") or (b"", what is wrong) of a photograph and where its face is (None: everywhere)."""
    photograph, where = item
    try:
        data = read(photograph)
        pixels = images.open_photograph(data, settings.jpeg)
        cut = _cut(pixels, where, settings)
        if cut is pixels and images.is_plain(data) and images.decodes(data):
            return data, ""
        return images.encode(cut, settings.form), ""
    except (BadInput, OSError) as error:
        return b"", str(error)


def splits_of(found: list[Photograph], held_out: int, split: str) -> tuple[list[str], dict[str, str]]:
    """People in natural order (their place is their label), and each one's split: `split`, or "validation" for the last `held_out`."""
    people = sorted({p.identity for p in found}, key=natural)
    if held_out and held_out >= len(people) - 1:
        raise BadInput(f"--validation_people={held_out}, but there are only {len(people)} people")
    train = len(people) - held_out
    return people, {person: split if i < train else "validation" for i, person in enumerate(people)}


def shards_of(found: list[Photograph], split_of: Mapping[str, str], images_per_shard: int) -> dict[str, int]:
    """How many shards each split has."""
    counts = Counter(split_of[p.identity] for p in found)
    return {split: -(-count // images_per_shard) for split, count in sorted(counts.items())}


def too_many(unusable: int, last: str, problem: str, reject_limit: float) -> BadInput:
    """What is said where more than the share `reject_limit` of the images cannot be used."""
    return BadInput(
        f"{unusable} images cannot be used (the last: {last}: {problem}); --reject_limit={reject_limit} allows a share of {reject_limit:g}"
    )


def described(alignment: dict | None, settings: Settings, people: list[str], rejected: dict[str, str]) -> dict:
    """What the records' metadata says beside what the writer knows."""
    return {"alignment": alignment or {}, "size": settings.size, "identities": people, "rejected": rejected}


def prepare(
    found: list[Photograph],
    output: Path,
    settings: Settings,
    *,
    split: str = "train",
    held_out: int = 0,
    images_per_shard: int = 8192,
    processes: int = 1,
    reject_limit: float = 0.01,
    where: Mapping[str, Rectangle | Found] | None = None,
    alignment: dict | None = None,
) -> dict:
    """Writes records and returns their metadata, which names the images that cannot be used and says why.

    where: rectangles, or faces found, by key. BadInput, and nothing written, where more than the share `reject_limit` of the images cannot be
    used; photographs without a face do not count among them.
    """
    people, split_of = splits_of(found, held_out, split)
    label_of = {person: label for label, person in enumerate(people)}
    shards = shards_of(found, split_of, images_per_shard)
    rejected: dict[str, str] = {}
    unusable = 0
    with records.Writer(output, output.name, shards) as writer:
        items = [(p, None if where is None else where[p.key]) for p in found]
        results = in_processes(partial(convert, settings=settings), items, processes)
        for photograph, (data, problem) in zip(
            found, tqdm(results, total=len(found), unit="image", desc="prepare", mininterval=2), strict=True
        ):
            if problem:
                rejected[photograph.key] = problem
                unusable += problem != NO_FACE
                if unusable > reject_limit * len(found):
                    raise too_many(unusable, photograph.key, problem, reject_limit)
                continue
            writer.add(split_of[photograph.identity], data, label_of[photograph.identity], photograph.identity, photograph.key)
        if empty := set(shards) - writer.splits_with_images():
            raise BadInput(f"no image is left for the split {min(empty)!r}")
        return writer.finish(described(alignment, settings, people, rejected))


def taken(found: list[Photograph], lists: Sequence[str], quiet: bool = False) -> list[Photograph]:
    """Without what the lists of `data_pipelines.clean` leave out; BadInput where they name nothing of this collection."""
    exclusions = read_exclusions(*map(Path, lists))
    kept = [p for p in found if not exclusions.excluded(p.key, p.identity)]
    if lists:
        if len(kept) == len(found):
            raise BadInput(f"--exclude={','.join(lists)} names no image and no person of the input: is it another data set's?")
        if not quiet:
            print(f"left out {len(found) - len(kept)} images that --exclude names", flush=True)
            if unmatched := exclusions.unmatched((p.key for p in found), (p.identity for p in found)):
                print(f"warning: {len(unmatched)} lines of --exclude name nothing of the input: {some(unmatched)}", flush=True)
    return kept


def crops_by_key(found: list[Photograph], crops: dict[str, Rectangle]) -> dict[str, Rectangle | Found]:
    """By the names' last parts, which the original's files go by."""
    nothing = Found((0, 0), NOTHING, "no crop rectangle")
    return {p.key: crops.get(p.key.rsplit("/", 1)[-1], nothing) for p in found}


@dataclass(frozen=True)
class Job:
    """What the flags ask for: records of `found`; faces found by `detection`, or cut by rectangles `crops`, or neither."""

    found: list[Photograph]
    output: Path
    settings: Settings
    alignment: dict
    detection: Detection | None = None
    crops: Mapping[str, Rectangle | Found] | None = None


# Flags that do nothing without another: who gives one expects something of it.
_NEEDS = {
    "align": ("detector", "minimum_face", "thresholds", "pyramid_factor", "margin", "margin_of", "template", "choose", "no_face"),
    "crops": ("crops_key",),
}


def check_flags() -> None:
    """BadInput for flags that were given and would do nothing."""
    for needed, names in _NEEDS.items():
        given = [f"--{name}" for name in names if FLAGS[name].present]
        if given and not FLAGS[needed].value:
            raise BadInput(f"{', '.join(given)}: of no effect without --{needed}")
    if FLAGS.align and FLAGS["alignment"].present:
        raise BadInput("--alignment says how the input was cut before: leave it out with --align, which writes down its own")
    if FLAGS.validation_people and FLAGS.split == "validation":
        raise BadInput("--split=validation is where --validation_people keeps people apart: give another --split, or leave one out")


def job_of_flags() -> Job:
    """BadInput for flags that do not go together."""
    if not FLAGS.input or not FLAGS.output:
        raise BadInput("--input and --output are needed (or --reindex)")
    check_flags()
    if FLAGS.align and (FLAGS.crops or FLAGS.choose == "all"):
        raise BadInput("--align cuts one face of each photograph by itself: leave out --crops, and --choose=all")
    output = Path(FLAGS.output)
    records.check_absent(output)
    found = taken(photographs(Path(FLAGS.input), FLAGS.layout), FLAGS.exclude)
    if FLAGS.align:
        command_line.use_compilation_cache()
        how, what = alignment_of_flags(FLAGS.size or 160), detection_of_flags()
        settings = Settings(how.size, FLAGS.form, how, FLAGS.no_face == "middle", FLAGS.jpeg)
        return Job(found, output, settings, {"method": how.method, **asdict(how), "detection": asdict(what)}, what)
    settings = Settings(FLAGS.size, FLAGS.form, jpeg=FLAGS.jpeg)
    if not FLAGS.crops:
        return Job(found, output, settings, {"method": FLAGS.alignment or "as given"})
    crops = crops_by_key(found, read_crops(Path(FLAGS.crops), FLAGS.crops_key))
    method = FLAGS.alignment or f"{FLAGS.crops_key} of {Path(FLAGS.crops).name}"
    return Job(found, output, settings, {"method": method}, crops=crops)


def tell(metadata: dict, **more: Any) -> None:
    """The images left out, a line each, and the counts."""
    for key, problem in metadata["rejected"].items():
        print(f"left out {key}: {problem}")
    print(json.dumps({"output": FLAGS.output, **metadata["splits"], "left_out": len(metadata["rejected"]), **more}))


def define_flags() -> None:
    """Flags that `prepare` and `prepare_beam` share."""
    align.define_flags()
    flags.DEFINE_string("input", None, "Folder of folders, zip, tar, CSV or .rec.")
    flags.DEFINE_bool("align", False, "Find faces and cut them (the flags of data_pipelines.align; --size is 160 if not given).")
    flags.DEFINE_list("exclude", [], "Lists of images and people to leave out, as data_pipelines.clean writes them.")
    flags.DEFINE_string("output", None, "Directory of records to make.")
    flags.DEFINE_integer("size", 0, "Side of the stored images in pixels; 0 keeps them as they are.", lower_bound=0)
    flags.DEFINE_enum("form", "jpeg", ["jpeg", "png"], "How cut or converted images are stored.")
    flags.DEFINE_string("crops", None, "An .npz with `names` and rectangles by name.")
    flags.DEFINE_string("crops_key", "crop_160_32", "Name of the rectangles in --crops.")
    flags.DEFINE_string("alignment", "", "What --crops or the input's own cut is, for the record: e.g. 'mtcnn margin 32 at 160'.")
    flags.DEFINE_integer(
        "validation_people", 0, "Keep the last so many people (in natural order) apart as the split 'validation'.", lower_bound=0
    )
    flags.DEFINE_string("split", "train", "Name of the split.")
    flags.DEFINE_integer("images_per_shard", 8192, "Images a shard holds.", lower_bound=1)
    flags.DEFINE_integer("processes", 2, "Worker processes.", lower_bound=1)
    flags.DEFINE_float("reject_limit", 0.01, "Share of unusable images above which nothing is written.", 0, 1)


def main(_: list[str]) -> None:
    """Command line."""
    if FLAGS.reindex:
        shards = records.shards_in(Path(FLAGS.reindex))
        if not shards:
            raise BadInput(f"--reindex={FLAGS.reindex}: no shard of records is there (NAME-SPLIT.tfrecord-00000-of-00001)")
        for path in shards:
            records.write_index(path)
            print(f"indexed {path}")
        return
    job = job_of_flags()
    where = job.crops
    if job.detection:
        where = find_faces(job.found, job.detection, job.output.with_name(f"{job.output.name}.faces.jsonl"), FLAGS.processes)
    metadata = prepare(
        job.found,
        job.output,
        job.settings,
        split=FLAGS.split,
        held_out=FLAGS.validation_people,
        images_per_shard=FLAGS.images_per_shard,
        processes=FLAGS.processes,
        reject_limit=FLAGS.reject_limit,
        where=where,
        alignment=job.alignment,
    )
    tell(metadata)


if __name__ == "__main__":
    define_flags()
    flags.DEFINE_string("reindex", None, "Instead: make the indices of this directory of records anew.")
    command_line.run(main)
