"""Faces of photographs, found once: a journal beside the output keeps them, so that a run that was stopped goes on where it was."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
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
from facenet_jax.files import written

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
    faces, rounded = found.faces, lambda a: np.round(a.astype(np.float64), 4).tolist()
    line = {"key": key, "size": found.size, "boxes": rounded(faces.boxes), "scores": faces.scores.astype(float).tolist()}
    return json.dumps(line | ({"points": rounded(faces.points), "landmarks": faces.landmarks} if faces.points is not None else {}))


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
    # Ours is ASCII; any other byte makes a line that is no JSON.
    lines = path.read_text(encoding="ascii", errors="replace").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    if not whole:
        path.unlink()
        return {}
    if whole[0].strip() != header:
        raise BadInput(f"{path} holds faces of another detector or other settings: delete it, or choose another output")
    if len(whole) < len(lines):
        with written(path) as aside:
            aside.write_text("".join(whole))
    try:
        return dict(map(_of_line, whole[1:]))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise BadInput(f"{path}: damaged ({error}): delete it and the faces are found again") from None


def read(photograph: Photograph) -> bytes:
    """The file's bytes; BadInput where it cannot be read."""
    try:
        return photograph.read()
    except OSError as error:
        raise BadInput(f"cannot be read ({error.strerror or error})") from None


def _open(photograph: Photograph, jpeg: str) -> np.ndarray | str:
    """Pixels, or what is wrong."""
    try:
        return images.open_photograph(read(photograph), jpeg)
    except BadInput as error:
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


def look(
    photographs: list[Photograph], jpeg: str, detector: Callable[[], Detector], processes: int = 1
) -> Iterator[list[tuple[Photograph, Found]]]:
    """What is on each photograph, some at a time, in order; numbers rounded as the journal has them. `detector` is called where there are pixels."""
    # Pixels are large: beside the window, two photographs a process.
    for window in _windows(in_processes(partial(_open, jpeg=jpeg), photographs, processes, chunk=1, ahead=2), photographs):
        pixels = [p for _, p in window if not isinstance(p, str)]
        faces = iter(detector()(pixels) if pixels else [])
        yield [
            (photograph, Found((0, 0), NOTHING, image) if isinstance(image, str) else _rounded(Found(image.shape[:2], next(faces))))
            for photograph, image in window
        ]


def _rounded(found: Found) -> Found:
    """A run that goes on from its journal cuts the same pixels as one that was never stopped."""
    return _of_line(_to_line("", found))[1]


def find_faces(
    photographs: list[Photograph], what: Detection, journal: Path, processes: int = 1, detector: Detector | None = None
) -> dict[str, Found]:
    """Faces by key of all photographs; those that the journal knows are not looked at again, but those with a problem, which may be mended now.

    `detector` saves making it anew.
    """
    known = read_journal(journal, what)
    missing = [p for p in photographs if p.key not in known or known[p.key].problem]
    if not missing:
        return known
    made = cache(lambda: detector or detection.create(what.detector, **dict(what.settings)))
    journal.parent.mkdir(parents=True, exist_ok=True)
    begun, done = journal.exists(), len(photographs) - len(missing)
    with journal.open("a") as file, tqdm(total=len(photographs), initial=done, unit="image", desc="detect", mininterval=2) as bar:
        if not begun:
            file.write(json.dumps(asdict(what)) + "\n")
        for window in look(missing, what.jpeg, made, processes):
            for photograph, found in window:
                before = known.get(photograph.key)
                if before is None or before.problem != found.problem:
                    file.write(_to_line(photograph.key, found) + "\n")
                known[photograph.key] = found
            file.flush()
            bar.update(len(window))
    return known
