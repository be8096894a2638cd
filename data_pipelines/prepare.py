"""Photographs to records: `python -m data_pipelines.prepare --input=faces.zip --output=records/faces`.

Input: a folder per person, a zip or tar of such a folder, or a CSV with columns `image` and `identity`. Images are cut (--crops), resized
(--size) and stored as JPEG 95; a JPEG or PNG that needs neither is stored as it came.
"""

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from data_pipelines import images, records
from data_pipelines.importers import Photograph
from data_pipelines.importers.csv_file import csv_file
from data_pipelines.importers.folders import folder, natural, tar_file, zip_file
from facenet_jax import command_line
from facenet_jax.errors import NPZ_ERRORS, BadInput

FLAGS = flags.FLAGS


@dataclass(frozen=True)
class Settings:
    """size: output side in pixels, 0 to keep; form: "jpeg" or "png"; crops: rectangles (x1, y1, x2, y2) by key, None for whole images."""

    size: int = 0
    form: str = "jpeg"
    crops: dict[str, tuple[int, int, int, int]] | None = None


def photographs(path: Path) -> list[Photograph]:
    """Reads the listing of whatever the path is."""
    if path.is_dir():
        return folder(path)
    if not path.exists():
        raise BadInput(f"{path}: no such file or folder")
    name = path.name.lower()
    if name.endswith(".zip"):
        return zip_file(path)
    if name.endswith((".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")):
        return tar_file(path)
    if name.endswith(".csv"):
        return csv_file(path)
    raise BadInput(f"{path}: not a folder, zip, tar or csv")


def read_crops(path: Path, key: str) -> dict[str, tuple[int, int, int, int]]:
    """Rectangles from an .npz with `names` [n] and `key` [n, 4] (x1, y1, x2, y2), by name."""
    try:
        with np.load(path, allow_pickle=False) as data:
            names, boxes = data["names"], data[key]
    except (*NPZ_ERRORS, KeyError) as error:
        raise BadInput(f"{path}: {error}") from None
    return {str(name): (int(box[0]), int(box[1]), int(box[2]), int(box[3])) for name, box in zip(names, boxes, strict=True)}


def convert(photograph: Photograph, settings: Settings) -> tuple[bytes, str]:
    """(image bytes, "") or (b"", what is wrong)."""
    try:
        data = photograph.read()
        pixels = images.open_photograph(data)
        cut = pixels
        if settings.crops is not None:
            box = settings.crops.get(photograph.key.rsplit("/", 1)[-1])
            if box is None:
                return b"", "no crop rectangle"
            cut = pixels[max(box[1], 0) : box[3], max(box[0], 0) : box[2]]
        if min(cut.shape[:2]) < 8:
            return b"", f"{cut.shape[1]}x{cut.shape[0]} pixels are too few"
        if settings.size:
            cut = images.resize(cut, settings.size)
        if cut is pixels and images.is_plain(data) and images.decodes(data):
            return data, ""
        return images.encode(cut, settings.form), ""
    except (BadInput, OSError) as error:
        return b"", str(error)


def converted(found: list[Photograph], settings: Settings, processes: int) -> Iterator[tuple[bytes, str]]:
    """`convert` over all, in order, by several processes."""
    work = partial(convert, settings=settings)
    if processes <= 1:
        yield from map(work, found)
        return
    # Fresh processes: one that forks after JAX has started its threads may hang.
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        # Futures in windows: submitting everything at once would hold every result in memory.
        window = 64 * processes
        for start in range(0, len(found), window):
            yield from pool.map(work, found[start : start + window], chunksize=8)


def splits_of(found: list[Photograph], held_out: int, split: str) -> tuple[list[str], dict[str, str]]:
    """People in natural order (their place is their label), and each one's split: `split`, or "validation" for the last `held_out`."""
    people = sorted({p.identity for p in found}, key=natural)
    if held_out and held_out >= len(people) - 1:
        raise BadInput(f"--validation_people={held_out}, but there are only {len(people)} people")
    train = len(people) - held_out
    return people, {person: split if i < train else "validation" for i, person in enumerate(people)}


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
    alignment: dict | None = None,
) -> dict:
    """Writes records and returns their metadata. Images that cannot be used are counted and listed in rejected.json.

    BadInput, and nothing written, where more than the share `reject_limit` of the images cannot be used.
    """
    people, split_of = splits_of(found, held_out, split)
    label_of = {person: label for label, person in enumerate(people)}
    counts = Counter(split_of[p.identity] for p in found)
    shards = {split: max(1, -(-count // images_per_shard)) for split, count in sorted(counts.items())}
    rejected: dict[str, str] = {}
    with records.Writer(output, output.name, shards) as writer:
        results = converted(found, settings, processes)
        for photograph, (data, problem) in zip(
            found, tqdm(results, total=len(found), unit="image", desc="prepare", mininterval=2), strict=True
        ):
            if problem:
                rejected[photograph.key] = problem
                if len(rejected) > reject_limit * len(found):
                    raise BadInput(
                        f"{len(rejected)} of the first images cannot be used (the last: {photograph.key}: {problem}); "
                        f"--reject_limit={reject_limit} allows a share of {reject_limit:g}"
                    )
                continue
            writer.add(split_of[photograph.identity], data, label_of[photograph.identity], photograph.identity, photograph.key)
        if empty := set(shards) - writer.splits_with_images():
            raise BadInput(f"no image is left for the split {min(empty)!r}")
        described = {"alignment": alignment or {}, "size": settings.size, "identities": people, "rejected": rejected}
        return writer.finish(described)


def _flags() -> None:
    flags.DEFINE_string("input", None, "Folder of folders, zip, tar or CSV.")
    flags.DEFINE_string("output", None, "Directory of records to make.")
    flags.DEFINE_string("reindex", None, "Instead: make the indices of this directory of records anew.")
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
        for path in sorted(p for p in Path(FLAGS.reindex).glob("*.tfrecord-*-of-*") if p.suffix != ".npz"):
            records.write_index(path)
            print(f"indexed {path}")
        return
    if not FLAGS.input or not FLAGS.output:
        raise BadInput("--input and --output are needed (or --reindex)")
    crops = read_crops(Path(FLAGS.crops), FLAGS.crops_key) if FLAGS.crops else None
    alignment = {"method": FLAGS.alignment or (f"{FLAGS.crops_key} of {Path(FLAGS.crops).name}" if crops else "as given")}
    metadata = prepare(
        photographs(Path(FLAGS.input)),
        Path(FLAGS.output),
        Settings(FLAGS.size, FLAGS.form, crops),
        split=FLAGS.split,
        held_out=FLAGS.validation_people,
        images_per_shard=FLAGS.images_per_shard,
        processes=FLAGS.processes,
        reject_limit=FLAGS.reject_limit,
        alignment=alignment,
    )
    for key, problem in metadata["rejected"].items():
        print(f"left out {key}: {problem}")
    print(json.dumps({"output": FLAGS.output, **metadata["splits"], "left_out": len(metadata["rejected"])}))


if __name__ == "__main__":
    _flags()
    command_line.run(main)
