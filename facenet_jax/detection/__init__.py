"""Face detectors behind one interface: photographs in, boxes (and landmarks, where a detector has them) out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from facenet_jax.errors import BadInput

# What a detector's five landmarks are, left and right as one sees them: centres of the eyes, nose, corners of the mouth; or corners of the eyes
# (left outer, left inner, right inner, right outer) and the place below the nose.
CENTRES, CORNERS = "centres", "corners"


@dataclass(frozen=True)
class Faces:
    """What was found on one photograph, in its pixels, best first.

    boxes [n, 4] float32 (x1, y1, x2, y2); scores [n] float32; points [n, 5, 2] float32 (x, y), or None; landmarks says which: CENTRES or CORNERS.
    """

    boxes: np.ndarray
    scores: np.ndarray
    points: np.ndarray | None = None
    landmarks: str = CENTRES

    def __len__(self) -> int:
        return len(self.boxes)


class Detector(Protocol):
    """uint8 RGB photographs [h, w, 3] of any sizes -> what is on each."""

    def __call__(self, photographs: Sequence[np.ndarray]) -> list[Faces]: ...


DETECTORS = ("mtcnn", "haar", "dlib_hog")


def create(name: str, **settings: Any) -> Detector:
    """A detector by name; unknown names are errors that list the known ones."""
    if name == "mtcnn":
        from facenet_jax.detection.mtcnn import Mtcnn

        return Mtcnn(**settings)
    if name == "haar":
        from facenet_jax.detection.haar import Haar

        return Haar(**settings)
    if name == "dlib_hog":
        from facenet_jax.detection.dlib_hog import DlibHog

        return DlibHog(**settings)
    raise BadInput(f"no detector named {name!r}; there are {', '.join(DETECTORS)}")
