"""Faces of photographs, found once: a journal beside the output keeps them, so that a run that was stopped goes on where it was."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_pipelines import images
from data_pipelines.importers import Photograph
from data_pipelines.processes import in_processes
from facenet_jax import detection
from facenet_jax.detection import Detector, Faces
from facenet_jax.errors import BadInput

# Photographs, and their pixels, that are held at a time.
_WINDOW, _WINDOW_PIXELS = 128, 48_000_000


@dataclass(frozen=True)
class Detection:
    """Which detector with which settings (flags that were given), and how JPEGs are decoded: "" or "ijg9"."""

    detector: str = "mtcnn"
    settings: tuple[tuple[str, Any], ...] = ()
    jpeg: str = ""


@dataclass(frozen=True)
class Found:
    """Faces on a photograph of `size` (height, width), or what is wrong with it."""

    size: tuple[int, int]
    faces: Faces
    problem: str = ""


NOTHING = Faces(np.zeros((0, 4), np.float32), np.zeros(0, np.float32))


def _to_line(key: str, found: Found) -> str:
    if found.problem:
        return json.dumps({"key": key, "problem": found.problem})
    faces, tenths = found.faces, lambda a: [] if a is None else np.round(a.astype(np.float64), 4).tolist()
    line = {"key": key, "size": found.size, "boxes": tenths(faces.boxes), "scores": faces.scores.astype(float).tolist()}
    return json.dumps(line | ({"points": tenths(faces.points), "landmarks": faces.landmarks} if faces.points is not None else {}))


def _of_line(line: str) -> tuple[str, Found]:
    told = json.loads(line)
    if "problem" in told:
        return told["key"], Found((0, 0), NOTHING, told["problem"])
    array = lambda name, *shape: np.asarray(told[name], np.float32).reshape(-1, *shape)
    points = array("points", 5, 2) if "points" in told else None
    faces = Faces(array("boxes", 4), array("scores"), points, told.get("landmarks", detection.CENTRES))
    return told["key"], Found((told["size"][0], told["size"][1]), faces)


def read_journal(path: Path, detection_settings: Detection) -> dict[str, Found]:
    """What is known by key; nothing where there is no journal. A line cut off by a kill is dropped; BadInput where another detection wrote it."""
    header = json.dumps(asdict(detection_settings))
    if not path.exists():
        return {}
    lines = path.read_text().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    if not whole or whole[0].strip() != header:
        raise BadInput(f"{path} holds faces of another detector or other settings: delete it, or choose another output")
    if len(whole) < len(lines):
        aside = path.with_suffix(".aside")
        aside.write_text("".join(whole))
        aside.rename(path)
    try:
        return dict(map(_of_line, whole[1:]))
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: damaged ({error}): delete it and the faces are found again") from None


def _open(photograph: Photograph, jpeg: str) -> np.ndarray | str:
    """Pixels, or what is wrong."""
    try:
        return images.open_photograph(photograph.read(), jpeg)
    except (BadInput, OSError) as error:
        return str(error)


def _windows(pixels: Iterator[np.ndarray | str], photographs: list[Photograph]) -> Iterator[list[tuple[Photograph, np.ndarray | str]]]:
    held: list[tuple[Photograph, np.ndarray | str]] = []
    count = 0
    for photograph, opened in zip(photographs, pixels, strict=True):
        held.append((photograph, opened))
        count += 0 if isinstance(opened, str) else opened.shape[0] * opened.shape[1]
        if len(held) == _WINDOW or count > _WINDOW_PIXELS:
            yield held
            held, count = [], 0
    if held:
        yield held


def find_faces(
    photographs: list[Photograph], what: Detection, journal: Path, processes: int = 1, detector: Detector | None = None
) -> dict[str, Found]:
    """Faces by key of all photographs; those that the journal knows are not looked at again. `detector` saves making it anew."""
    known = read_journal(journal, what)
    missing = [p for p in photographs if p.key not in known]
    if not missing:
        return known
    detector = detector or detection.create(what.detector, **dict(what.settings))
    journal.parent.mkdir(parents=True, exist_ok=True)
    if not journal.exists():
        journal.write_text(json.dumps(asdict(what)) + "\n")
    with journal.open("a") as file, tqdm(total=len(photographs), initial=len(known), unit="image", desc="detect", mininterval=2) as bar:
        for window in _windows(in_processes(partial(_open, jpeg=what.jpeg), missing, processes, chunk=2), missing):
            pixels = [p for _, p in window if not isinstance(p, str)]
            faces = iter(detector(pixels))
            for photograph, image in window:
                found = Found((0, 0), NOTHING, image) if isinstance(image, str) else Found(image.shape[:2], next(faces))
                known[photograph.key] = found
                file.write(_to_line(photograph.key, found) + "\n")
            file.flush()
            bar.update(len(window))
    return known
