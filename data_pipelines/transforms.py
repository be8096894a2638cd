"""Pixels of a record to pixels of a batch: crop, flip, rotation, brightness and contrast, JPEG quality, erasing.

Each function of chance draws from a generator seeded by (run seed, place in the stream), so a picture's treatment
depends on nothing but that.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg

from facenet_jax.errors import BadInput


@dataclass(frozen=True)
class Transforms:
    """size: output side. crop: side of the square cut from the middle of the record before resizing, 0 for the whole; shift: the most
    pixels (of the record) by which the cut moves at random, each way; zoom: the most by which its side varies, as a share; flip: mirror
    half of the images; rotation: degrees, each way; brightness: share of 255, each way; contrast: share, each way; grey: share of images made grey;
    jpeg_quality: lowest quality to re-encode at, 0 for never; erase: share of images that lose a rectangle."""

    size: int
    crop: int = 0
    shift: int = 0
    zoom: float = 0.0
    flip: bool = False
    rotation: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    grey: float = 0.0
    jpeg_quality: int = 0
    erase: float = 0.0

    def __post_init__(self) -> None:
        if self.size < 1 or self.crop < 0 or self.shift < 0:
            raise BadInput("transforms: size must be positive, crop and shift not negative")
        if not 0 <= self.rotation <= 10:
            raise BadInput(f"transforms.rotation={self.rotation}: faces turn by 0 to 10 degrees")
        if not 0 <= self.jpeg_quality <= 100:
            raise BadInput(f"transforms.jpeg_quality={self.jpeg_quality}: it must be in 0..100")
        if not 0 <= self.zoom < 1:
            raise BadInput(f"transforms.zoom={self.zoom}: it must be at least 0 and below 1")
        # A contrast above 1 would turn some pictures into their negatives.
        for name in ("brightness", "contrast", "grey", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadInput(f"transforms.{name}={getattr(self, name)}: it must be in 0..1")

    def without_chance(self) -> "Transforms":
        """The same cut and size, nothing random: for evaluation."""
        return Transforms(self.size, self.crop)


def _cut(pixels: np.ndarray, settings: Transforms, rng: np.random.Generator) -> np.ndarray:
    """Crop, shift, zoom, rotation, flip and resize, as one resampling of the source."""
    height, width = pixels.shape[:2]
    cut_h, cut_w = (settings.crop, settings.crop) if settings.crop else (height, width)
    scale = 1 + rng.uniform(-settings.zoom, settings.zoom) if settings.zoom else 1.0
    dx, dy = rng.uniform(-settings.shift, settings.shift, 2) if settings.shift else (0.0, 0.0)
    angle = rng.uniform(-settings.rotation, settings.rotation) if settings.rotation else 0.0
    flip = settings.flip and rng.random() < 0.5
    if angle == 0 and scale == 1 and float(dx).is_integer() and float(dy).is_integer():
        top, left = (height - cut_h) // 2, (width - cut_w) // 2
        if top < 0 or left < 0:
            raise BadInput(f"transforms.crop={settings.crop}, but a record has only {width}x{height} pixels")
        out = pixels[top : top + cut_h, left : left + cut_w]
        if out.shape[:2] != (settings.size, settings.size):
            shrinks = settings.size < out.shape[0]
            out = cv2.resize(out, (settings.size, settings.size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    else:
        # Source position of an output pixel: centre + rotation @ (output - centre) * step + shift.
        radians = np.deg2rad(angle)
        step_x, step_y = cut_w * scale / settings.size, cut_h * scale / settings.size
        cos, sin = np.cos(radians), np.sin(radians)
        matrix = np.array([[cos * step_x, -sin * step_y, 0], [sin * step_x, cos * step_y, 0]])
        middle = (settings.size - 1) / 2
        matrix[:, 2] = [(width - 1) / 2 + dx, (height - 1) / 2 + dy] - matrix[:, :2] @ [middle, middle]
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        if max(step_x, step_y) > 1.2:
            # Bilinear sampling of a picture that shrinks aliases: soften it first by the pixel it will become.
            pixels = cv2.blur(pixels, (2, 2)) if step_x < 2 else cv2.blur(pixels, (int(step_x) + 1,) * 2)
        out = cv2.warpAffine(pixels, matrix, (settings.size, settings.size), flags=flags, borderMode=cv2.BORDER_REFLECT_101)
    return out[:, ::-1] if flip else out


def apply(pixels: np.ndarray, settings: Transforms, rng: np.random.Generator) -> np.ndarray:
    """uint8 RGB [h, w, 3] -> uint8 RGB [size, size, 3]."""
    out = np.ascontiguousarray(_cut(pixels, settings, rng))
    if settings.brightness or settings.contrast:
        gain = 1 + rng.uniform(-settings.contrast, settings.contrast)
        offset = 255 * rng.uniform(-settings.brightness, settings.brightness)
        middle = float(out.mean())
        table = np.clip((np.arange(256) - middle) * gain + middle + offset, 0, 255).astype(np.uint8)
        out = cv2.LUT(out, table)
    if settings.grey and rng.random() < settings.grey:
        out = cv2.cvtColor(cv2.cvtColor(out, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    if settings.jpeg_quality:
        quality = int(rng.integers(settings.jpeg_quality, 101))
        out = simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(np.ascontiguousarray(out), quality, "RGB", "420"), "RGB")
    if settings.erase and rng.random() < settings.erase:
        height, width = (rng.uniform(0.15, 0.45, 2) * settings.size).astype(int)
        top, left = int(rng.integers(0, settings.size - height + 1)), int(rng.integers(0, settings.size - width + 1))
        out = out.copy()
        out[top : top + height, left : left + width] = rng.integers(0, 256, 3)
    return out
