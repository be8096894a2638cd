"""Drawn people as records: a training and a validation split of different people, made once."""

from functools import partial
from pathlib import Path

from tqdm import tqdm

from data_pipelines import images, records, synthetic
from data_pipelines.processes import in_processes
from facenet_jax.errors import BadInput

IMAGES = 20
VALIDATION_PEOPLE = 100


def _draw(place: tuple[int, int], size: int) -> bytes:
    return images.encode(synthetic.draw(place[0], place[1], size))


def ensure(directory: Path, people: int, size: int, processes: int = 2) -> None:
    """Draws `people` and 100 more for validation, 20 pictures each, unless the directory has them already."""
    described = {"drawn_people": people, "size": size, "images": IMAGES}
    if (directory / "metadata.json").exists():
        there = records.read_metadata(directory)
        if any(there.get(key) != value for key, value in described.items()):
            raise BadInput(f"{directory}: holds other drawn people than {described}; remove it or set data.records")
        return
    total = people + VALIDATION_PEOPLE
    places = [(person, image) for person in range(total) for image in range(IMAGES)]
    with records.Writer(directory, "synthetic", {"train": 2, "validation": 1}) as writer:
        drawn = in_processes(partial(_draw, size=size), places, processes, chunk=64)
        for (person, image), data in zip(
            places, tqdm(drawn, total=len(places), unit="image", desc="draw people", mininterval=2), strict=True
        ):
            split = "train" if person < people else "validation"
            writer.add(split, data, person, f"person{person:05d}", f"person{person:05d}/{image:03d}")
        writer.finish({"alignment": {"method": "drawn"}, "identities": [f"person{p:05d}" for p in range(total)], **described})
