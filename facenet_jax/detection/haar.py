"""OpenCV's cascade of Haar features for frontal faces (Viola and Jones 2001): boxes without landmarks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from facenet_jax.detection import Faces
from facenet_jax.errors import BadInput

_CASCADE = "haarcascade_frontalface_default.xml"


@dataclass(frozen=True)
class Settings:
    """minimum: the smallest face in pixels; scale_factor: from one size of face to the next; neighbours: windows that must agree on a face.

    cascade: a file of OpenCV's; "" takes the one for frontal faces that OpenCV ships.
    """

    minimum: int = 20
    scale_factor: float = 1.1
    neighbours: int = 5
    cascade: str = ""

    def __post_init__(self) -> None:
        if self.minimum < 1 or self.scale_factor <= 1 or self.neighbours < 1:
            raise BadInput("haar: minimum and neighbours must be at least 1, the scale factor over 1")


def _shipped() -> Path:
    """OpenCV's own cascade; BadInput for a build without them."""
    folder = getattr(getattr(cv2, "data", None), "haarcascades", "")
    path = Path(folder) / _CASCADE
    if not folder or not path.is_file():
        raise BadInput(
            f"OpenCV {cv2.__version__} comes without {_CASCADE}: pip install 'opencv-python-headless<5', or name a file as cascade"
        )
    return path


class Haar:
    """The detector. Scores are the weights of the cascade's last stage: they order faces, and are no probabilities."""

    def __init__(self, minimum: int = 20, scale_factor: float = 1.1, neighbours: int = 5, cascade: str | Path = "") -> None:
        self.settings = Settings(minimum, scale_factor, neighbours, str(cascade))
        path = Path(cascade) if cascade else _shipped()
        if not path.is_file():
            raise BadInput(f"{path}: no such cascade file")
        try:
            self._cascade = cv2.CascadeClassifier(str(path))
        except (cv2.error, SystemError) as error:
            raise BadInput(f"{path}: not a cascade of OpenCV ({str(error).splitlines()[0]})") from None
        if self._cascade.empty():
            raise BadInput(f"{path}: not a cascade of OpenCV")

    def __call__(self, photographs: Sequence[np.ndarray]) -> list[Faces]:
        """uint8 RGB [h, w, 3] each -> faces in the order of the photographs, without points."""
        return [self._one(photograph) for photograph in photographs]

    def _one(self, photograph: np.ndarray) -> Faces:
        if photograph.dtype != np.uint8 or photograph.ndim != 3 or photograph.shape[-1] != 3:
            raise BadInput(f"photographs must be uint8 RGB [h, w, 3], not {photograph.dtype} {list(photograph.shape)}")
        none = Faces(np.zeros((0, 4), np.float32), np.zeros(0, np.float32))
        if min(photograph.shape[:2]) < self.settings.minimum:
            return none
        boxes, _, weights = self._cascade.detectMultiScale3(
            cv2.cvtColor(photograph, cv2.COLOR_RGB2GRAY),
            scaleFactor=self.settings.scale_factor,
            minNeighbors=self.settings.neighbours,
            minSize=(self.settings.minimum, self.settings.minimum),
            outputRejectLevels=True,
        )
        if not len(boxes):
            return none
        found, scores = np.asarray(boxes, np.float32), np.ravel(weights).astype(np.float32)
        # Threads find boxes in any order.
        order = np.lexsort((*found.T, -scores))
        return Faces(np.concatenate([found[:, :2], found[:, :2] + found[:, 2:]], 1)[order], scores[order])
