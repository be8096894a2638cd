"""Boxes and landmarks to crops: cut by the box as davidsandberg/facenet does (src/align/align_dataset_mtcnn.py), or warped by landmarks onto a template."""

from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from facenet_jax.detection import CENTRES, CORNERS, Faces
from facenet_jax.errors import BadInput

CHOICES = ("largest_central", "largest", "confident", "central", "all")

# InsightFace's 112x112 (python-package/insightface/utils/face_align.py): eyes, nose, corners of the mouth.
_INSIGHTFACE = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))
# dlib's mean face of five points in the unit square (dlib/image_transforms/interpolation.h): the image's left eye (outer, inner corner), the right
# one (inner, outer), below the nose.
_DLIB = (
    (0.1205750620789, 0.2137274526848),
    (0.3340850613712, 0.2290642403242),
    (0.6460604764104, 0.2289674387677),
    (0.8595674595992, 0.2134981538014),
    (0.4901123135679, 0.6277975316475),
)
# OpenFace's mean face (openface/align_dlib.py) at the outer corners of the eyes and below the nose, stretched to the unit square.
_OPENFACE = ((0.194158, 0.169268), (0.788866, 0.158172), (0.494951, 0.514419))


@dataclass(frozen=True)
class Template:
    """Where landmarks go in a square of side 1: points [k, 2] (x, y), which of a detector's five they are, and the kind of map: a similarity fitted to
    the template, an affine map through three points, or dlib's."""

    points: tuple[tuple[float, float], ...]
    landmarks: str
    take: tuple[int, ...]
    kind: str = "similarity"


TEMPLATES = {
    "insightface": Template(tuple((x / 112, y / 112) for x, y in _INSIGHTFACE), CENTRES, (0, 1, 2, 3, 4)),
    # A quarter of the face's size is left around it.
    "dlib": Template(tuple(((0.25 + x) / 1.5, (0.25 + y) / 1.5) for x, y in _DLIB), CORNERS, (0, 1, 2, 3, 4), "dlib"),
    "openface": Template(_OPENFACE, CORNERS, (0, 3, 4), "affine"),
}


@dataclass(frozen=True)
class Alignment:
    """How faces are cut.

    size: side of the crop in pixels. template: "" cuts by the box, a name of TEMPLATES warps by landmarks. margin: pixels added to the box's width and
    height; of the photograph as the original has it, or of the crop where `margin_of` is "crop" (facenet-pytorch). choose: one of CHOICES.
    """

    size: int = 160
    margin: int = 32
    margin_of: str = "photograph"
    template: str = ""
    choose: str = "largest_central"
    detector: str = "mtcnn"

    def __post_init__(self) -> None:
        if self.template and self.template not in TEMPLATES:
            raise BadInput(f"no template named {self.template!r}; there are {', '.join(TEMPLATES)}")
        if self.choose not in CHOICES:
            raise BadInput(f"no choice of face named {self.choose!r}; there are {', '.join(CHOICES)}")
        if self.margin_of not in ("photograph", "crop"):
            raise BadInput(f"the margin is of the photograph or of the crop, not of {self.margin_of!r}")
        if self.size < 8 or self.margin < 0 or (self.margin_of == "crop" and self.margin >= self.size):
            raise BadInput(
                "a crop's side must be at least 8 pixels, its margin not negative and, as pixels of the crop, smaller than the side"
            )

    @property
    def method(self) -> str:
        """In words, for the records' metadata and the check before evaluation."""
        how = f"{self.template} template" if self.template else f"margin {self.margin}{' of the crop' if self.margin_of == 'crop' else ''}"
        return f"{self.detector} {how} at {self.size}"


def choose(faces: Faces, size: tuple[int, int], rule: str) -> list[int]:
    """Places of the faces to cut on a photograph of `size` (height, width): one, all of them, or none where there is no face.

    largest_central is the original's: the largest area less twice the squared distance of the box's centre from the photograph's.
    """
    if not len(faces) or rule == "all":
        return list(range(len(faces)))
    x1, y1, x2, y2 = faces.boxes.T
    area = (x2 - x1) * (y2 - y1)
    off_centre = ((x1 + x2) / 2 - size[1] / 2) ** 2 + ((y1 + y2) / 2 - size[0] / 2) ** 2
    value = {"largest_central": area - 2 * off_centre, "largest": area, "confident": faces.scores, "central": -off_centre}[rule]
    return [int(np.argmax(value))]


def rectangle(box: np.ndarray, size: tuple[int, int], alignment: Alignment) -> tuple[int, int, int, int]:
    """(x1, y1, x2, y2) of the pixels to cut around a box [4] on a photograph of `size` (height, width), within it."""
    box = np.asarray(box, np.float64)
    extra = np.full(2, alignment.margin / 2)
    if alignment.margin_of == "crop":
        extra = alignment.margin * (box[2:] - box[:2]) / (alignment.size - alignment.margin) / 2
    low = np.maximum(box[:2] - extra, 0).astype(int)
    high = np.minimum(box[2:] + extra, size[::-1]).astype(int)
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])


def similarity(points: np.ndarray, onto: np.ndarray) -> np.ndarray:
    """[2, 3] least-squares rotation, scale and shift that takes points [k, 2] onto others (Umeyama 1991); never a reflection."""
    mean, mean_onto = points.mean(0), onto.mean(0)
    centred, centred_onto = points - mean, onto - mean_onto
    u, s, vt = np.linalg.svd(centred_onto.T @ centred / len(points))
    sign = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt)) or 1.0])
    rotation = u @ np.diag(sign) @ vt
    scale = (s * sign).sum() / max(centred.var(0).sum(), 1e-12)
    return np.column_stack([scale * rotation, mean_onto - scale * rotation @ mean])


def onto_template(points: np.ndarray, template: Template, size: int) -> np.ndarray:
    """[2, 3] map from a photograph's pixels to those of the crop, from five landmarks [5, 2]."""
    points = np.asarray(points, np.float64)[list(template.take)]
    goal = np.asarray(template.points) * size
    if template.kind == "affine":
        return cv2.getAffineTransform(points.astype(np.float32), goal.astype(np.float32))
    return _dlib_chip(points, goal, size) if template.kind == "dlib" else similarity(points, goal)


def _dlib_chip(points: np.ndarray, goal: np.ndarray, size: int) -> np.ndarray:
    """dlib's map (get_face_chip_details, extract_image_chip): the template is fitted onto the photograph, which gives another scale than the reverse,
    and the rectangle found is spread over the chip from the middle of its first pixel to that of its last."""
    back = similarity(goal, points)
    scale = np.hypot(*back[:, 0])
    linear = back[:, :2] * (size * scale - 1) / ((size - 1) * scale)
    centre = back @ [size / 2, size / 2, 1]
    return cv2.invertAffineTransform(np.column_stack([linear, centre - linear @ np.full(2, (size - 1) / 2)]))


def crop(photograph: np.ndarray, faces: Faces, which: int, alignment: Alignment) -> np.ndarray:
    """Face number `which` of a photograph uint8 [h, w, 3], as uint8 [size, size, 3]; BadInput where the box holds no pixels."""
    if alignment.template:
        template = TEMPLATES[alignment.template]
        if faces.points is None or faces.landmarks != template.landmarks:
            raise BadInput(
                f"the {alignment.template} template needs landmarks at the {template.landmarks} of eyes, which {alignment.detector} has not"
            )
        matrix = onto_template(faces.points[which], template, alignment.size)
        return cv2.warpAffine(photograph, matrix, (alignment.size, alignment.size), flags=cv2.INTER_LINEAR)
    x1, y1, x2, y2 = rectangle(faces.boxes[which], photograph.shape[:2], alignment)
    if x2 <= x1 or y2 <= y1:
        raise BadInput("the face lies outside the photograph")
    # Pillow's bilinear filter, which scipy.misc.imresize used.
    cut = Image.fromarray(np.ascontiguousarray(photograph[y1:y2, x1:x2]))
    return np.asarray(cut.resize((alignment.size, alignment.size), Image.Resampling.BILINEAR))
