"""Photographs to aligned faces: `python -m data_pipelines.align --input=photographs --output=faces`.

Finds faces, cuts one of each photograph (or all), and writes a tree like the input's, `bounding_boxes.txt` as davidsandberg/facenet has it,
`alignment.json`, and `rejected.json`: photographs without a face or not to be read, and what was done. Run again, it goes on where it was.
"""

import json
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from absl import flags
from tqdm import tqdm

from data_pipelines import images
from data_pipelines.detected import Detection, Found, find_faces, read, read_journal
from data_pipelines.importers import Photograph
from data_pipelines.importers.layouts import LAYOUTS, photographs
from data_pipelines.processes import in_processes
from facenet_jax import alignment, command_line
from facenet_jax.alignment import Alignment
from facenet_jax.apps import pretrained
from facenet_jax.detection import CENTRES, CORNERS, DETECTORS, Detector
from facenet_jax.errors import BadInput
from facenet_jax.files import written

FLAGS = flags.FLAGS
NO_FACE = "no face"
ENDINGS = {"png": "png", "jpeg": "jpg"}
# What each detector's landmarks are; haar has none.
LANDMARKS = {"mtcnn": CENTRES, "dlib_hog": CORNERS}
# Settings of each that flags reach.
SETTINGS = {"mtcnn": ("minimum", "thresholds", "factor"), "haar": ("minimum",), "dlib_hog": ()}
# Of the shorter side, where a photograph without a face is cut in its middle.
_MIDDLE = 0.6


Rectangle = tuple[int, int, int, int]


@dataclass(frozen=True)
class Cut:
    """What is cut of a photograph: face number `which`, or its middle (None); the rectangle (x1, y1, x2, y2), zeros where a template warps."""

    which: int | None
    rectangle: Rectangle


def planned(found: Found, how: Alignment, middle: bool) -> list[Cut]:
    """The faces chosen on a photograph, less those that lie outside of it; its middle where there is none and `middle`; else nothing."""
    chosen = alignment.choose(found.faces, found.size, how.choose)
    if how.template:
        cuts = [Cut(which, (0, 0, 0, 0)) for which in chosen]
    else:
        cuts = [Cut(which, alignment.rectangle(found.faces.boxes[which], found.size, how)) for which in chosen]
        cuts = [cut for cut in cuts if cut.rectangle[0] < cut.rectangle[2] and cut.rectangle[1] < cut.rectangle[3]]
    if not cuts and middle:
        height, width = found.size
        half = max(int(_MIDDLE * min(height, width) / 2), 1)
        x, y = width // 2, height // 2
        cuts.append(Cut(None, (max(x - half, 0), max(y - half, 0), x + half, y + half)))
    return cuts


def cut_out(photograph: np.ndarray, found: Found, cut: Cut, how: Alignment) -> np.ndarray:
    """uint8 [size, size, 3]; BadInput where `found` is another photograph's."""
    if photograph.shape[:2] != tuple(found.size):
        raise BadInput("has changed since its faces were found: delete the .jsonl of faces")
    if cut.which is not None:
        return alignment.crop(photograph, found.faces, cut.which, how)
    x1, y1, x2, y2 = cut.rectangle
    return images.resize(np.ascontiguousarray(photograph[y1:y2, x1:x2]), how.size)


def align_one(
    pair: tuple[Photograph, Found], output: Path, how: Alignment, form: str, middle: bool, jpeg: str
) -> tuple[list[tuple[str, Rectangle]], str]:
    """Writes a photograph's faces (aside, then renamed) that are not there yet: ([(file, rectangle)], "" or what is wrong)."""
    photograph, found = pair
    if found.problem:
        return [], found.problem
    cuts = planned(found, how, middle)
    problem = "" if cuts and cuts[0].which is not None else NO_FACE
    paths = [output / f"{photograph.key}{f'_{i}' if how.choose == 'all' else ''}.{ENDINGS[form]}" for i in range(len(cuts))]
    files = [(str(path.relative_to(output)), cut.rectangle) for path, cut in zip(paths, cuts, strict=True)]
    if all(path.exists() for path in paths):
        return files, problem
    try:
        pixels = images.open_photograph(read(photograph), jpeg)
        faces = [cut_out(pixels, found, cut, how) for cut in cuts]
    except BadInput as error:
        return [], str(error)
    for path, face in zip(paths, faces, strict=True):
        with written(path) as aside:
            aside.write_bytes(images.encode(face, form))
    return files, problem


def draw(photograph: np.ndarray, found: Found) -> np.ndarray:
    """The photograph with boxes, scores and landmarks."""
    canvas = np.ascontiguousarray(photograph.copy())
    thick = max(1, min(canvas.shape[:2]) // 250)
    for index, (box, score) in enumerate(zip(found.faces.boxes, found.faces.scores, strict=True)):
        x1, y1, x2, y2 = (round(float(v)) for v in box)
        cv2.rectangle(canvas, (x1, y1), (x2, y2), (60, 220, 60), thick)
        cv2.putText(canvas, f"{score:.2f}", (x1, max(y1 - 3, 10)), cv2.FONT_HERSHEY_SIMPLEX, 0.4 * thick, (60, 220, 60), thick)
        if found.faces.points is not None:
            for x, y in found.faces.points[index]:
                cv2.circle(canvas, (round(float(x)), round(float(y))), 2 * thick, (230, 60, 60), -1)
    return canvas


def align(
    listed: list[Photograph],
    output: Path,
    what: Detection,
    how: Alignment,
    *,
    form: str = "png",
    middle: bool = False,
    processes: int = 1,
    detector: Detector | None = None,
) -> dict[str, str]:
    """Aligns a collection; returns what is wrong by key ("no face" among it). BadInput where `output` holds another alignment.

    `detector` saves making it anew.
    """
    for photograph in listed:
        if photograph.key.startswith("/") or ".." in photograph.key.split("/"):
            raise BadInput(f"{photograph.key}: leads out of {output}: name photographs by paths below their list's folder")
    described = {
        "alignment": asdict(how),
        "method": how.method,
        "detection": asdict(what),
        "form": form,
        "no_face": "middle" if middle else "skip",
    }
    settings = output / "alignment.json"
    if settings.exists() and json.loads(settings.read_text()) != json.loads(json.dumps(described)):
        raise BadInput(f"{output} holds faces aligned otherwise ({settings}): choose another --output or delete it")
    if not settings.exists() and output.exists() and any(not path.name.startswith(".") for path in output.iterdir()):
        raise BadInput(f"{output} is not empty and not an alignment begun before: choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    command_line.write_json(settings, described)
    known = find_faces(listed, what, output / "faces.jsonl", processes, detector)
    work = partial(align_one, output=output, how=how, form=form, middle=middle, jpeg=what.jpeg)
    problems, lines = {}, []
    results = in_processes(work, [(p, known[p.key]) for p in listed], processes)
    for photograph, (files, problem) in zip(listed, tqdm(results, total=len(listed), unit="image", desc="cut", mininterval=2), strict=True):
        if problem:
            problems[photograph.key] = problem + (": its middle was cut" if files else ": left out")
        lines += [f"{name} {' '.join(map(str, box))}\n" for name, box in files] or [f"{photograph.key}.{ENDINGS[form]}\n"]
    with written(output / "bounding_boxes.txt") as aside:
        aside.write_text("".join(lines))
    command_line.write_json(output / "rejected.json", problems)
    return problems


def detection_of_flags() -> Detection:
    """The detector's flags; fetches MTCNN's published weights where they are not in the cache."""
    if FLAGS.jpeg and find_spec("jpeglib") is None:
        raise BadInput("--jpeg=ijg9 needs jpeglib: pip install -r requirements-legacy.txt")
    if FLAGS.detector == "mtcnn":
        pretrained.fetch("mtcnn")
    settings: dict[str, Any] = {}
    if FLAGS.minimum_face:
        settings["minimum"] = FLAGS.minimum_face
    if FLAGS.thresholds:
        if len(FLAGS.thresholds) != 3:
            raise BadInput("--thresholds are mtcnn's three, e.g. 0.6,0.7,0.7")
        try:
            settings["thresholds"] = tuple(float(t) for t in FLAGS.thresholds)
        except ValueError as error:
            raise BadInput(f"--thresholds: {error}") from None
    if FLAGS.pyramid_factor:
        settings["factor"] = FLAGS.pyramid_factor
    if others := [name for name in settings if name not in SETTINGS[FLAGS.detector]]:
        raise BadInput(f"--detector={FLAGS.detector} has no setting {' or '.join(others)} (--minimum_face, --thresholds, --pyramid_factor)")
    return Detection(FLAGS.detector, tuple(sorted(settings.items())), FLAGS.jpeg)


def alignment_of_flags(size: int) -> Alignment:
    """The crop's flags."""
    template = FLAGS.template
    if template and alignment.TEMPLATES[template].landmarks != LANDMARKS.get(FLAGS.detector):
        able = [name for name, landmarks in LANDMARKS.items() if landmarks == alignment.TEMPLATES[template].landmarks]
        raise BadInput(f"--template={template} needs the landmarks of --detector={' or '.join(able)}")
    return Alignment(size, FLAGS.margin, FLAGS.margin_of, template, FLAGS.choose, FLAGS.detector)


def define_flags() -> None:
    """Flags that `align` and `prepare --align` share."""
    flags.DEFINE_enum("layout", "auto", ["auto", *LAYOUTS], "How --input is laid out (docs/data.md); auto looks at it.")
    flags.DEFINE_enum("detector", "mtcnn", DETECTORS, "Who finds the faces.")
    flags.DEFINE_integer("minimum_face", 0, "Smallest face in pixels; 0 is the detector's own choice (mtcnn: 20).", lower_bound=0)
    flags.DEFINE_list("thresholds", [], "mtcnn: least scores of its three stages (0.6,0.7,0.7).")
    flags.DEFINE_float("pyramid_factor", 0, "mtcnn: from one pyramid level to the next (0.709).", 0, 1)
    flags.DEFINE_integer("margin", 32, "Pixels added to the box's width and height.", lower_bound=0)
    flags.DEFINE_enum("margin_of", "photograph", ["photograph", "crop"], "Whose pixels the margin counts (the original: the photograph's).")
    flags.DEFINE_enum("template", "", ["", *alignment.TEMPLATES], "Warp landmarks onto this template instead of cutting by the box.")
    flags.DEFINE_enum("choose", "largest_central", list(alignment.CHOICES), "Which face of a photograph.")
    flags.DEFINE_enum("no_face", "skip", ["skip", "middle"], "A photograph without a face is left out, or its middle is cut.")
    flags.DEFINE_enum("jpeg", "", ["", "ijg9"], "ijg9: decode as the original's Pillow did (needs requirements-legacy.txt).")


def _flags() -> None:
    define_flags()
    flags.DEFINE_string("input", None, "Folder of folders, zip, tar, CSV, .rec.")
    flags.DEFINE_string("output", None, "Directory of aligned faces to make.")
    flags.DEFINE_integer("size", 160, "Side of a crop in pixels.", lower_bound=8)
    flags.DEFINE_enum("form", "png", ["png", "jpeg"], "How crops are stored.")
    flags.DEFINE_integer("draw", 0, "Also write so many photographs with boxes and landmarks, into OUTPUT.drawn.", lower_bound=0)
    flags.DEFINE_integer("processes", 2, "Processes that decode and cut.", lower_bound=1)


def main(_: list[str]) -> None:
    """Command line."""
    if not FLAGS.input or not FLAGS.output:
        raise BadInput("--input and --output are needed")
    command_line.use_compilation_cache()
    if Path(FLAGS.input).resolve() in (Path(FLAGS.output).resolve(), *Path(FLAGS.output).resolve().parents):
        raise BadInput(f"{FLAGS.output} lies in {FLAGS.input}, and would be read as photographs the next time: choose another --output")
    listed = photographs(Path(FLAGS.input), FLAGS.layout)
    output, what, how = Path(FLAGS.output), detection_of_flags(), alignment_of_flags(FLAGS.size)
    problems = align(listed, output, what, how, form=FLAGS.form, middle=FLAGS.no_face == "middle", processes=FLAGS.processes)
    if FLAGS.draw:
        folder = output.with_name(f"{output.name}.drawn")
        known = read_journal(output / "faces.jsonl", what)
        for photograph in [p for p in listed if not known[p.key].problem][: FLAGS.draw]:
            path = folder / f"{photograph.key}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(images.encode(draw(images.open_photograph(read(photograph), what.jpeg), known[photograph.key])))
    for key, problem in problems.items():
        print(f"{key}: {problem}")
    print(json.dumps({"output": str(output), "photographs": len(listed), "rejected": len(problems)}))


if __name__ == "__main__":
    _flags()
    command_line.run(main)
