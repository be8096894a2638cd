"""Image bytes to pixels and back, with one rule for everything a camera or a collector may have left in a file."""

import io
import tempfile
import warnings

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from facenet_jax.errors import BadInput

MAX_PIXELS = 100_000_000


def decode(data: bytes) -> np.ndarray:
    """JPEG or PNG bytes of a record -> uint8 RGB [h, w, 3]; ValueError where they are damaged."""
    if data[:2] == b"\xff\xd8":
        return simplejpeg.decode_jpeg(data, "RGB")
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if pixels is None:
        raise ValueError("not a JPEG or PNG image")
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def decode_into(place: np.ndarray, data: bytes) -> bool:
    """Decodes a JPEG of the size of `place`, contiguous uint8 [h, w, 3], into it; False for what is no JPEG of that size."""
    if data[:2] != b"\xff\xd8" or simplejpeg.decode_jpeg_header(data)[:2] != place.shape[:2]:
        return False
    simplejpeg.decode_jpeg(data, "RGB", buffer=place.reshape(-1).data)
    return True


def open_photograph(data: bytes, jpeg: str = "") -> np.ndarray:
    """Bytes of any image file -> uint8 RGB [h, w, 3]. jpeg="ijg9" decodes JPEGs as libjpeg 9 of the Independent JPEG Group does.

    EXIF orientation is obeyed, the first frame of an animation taken, grey, CMYK, palette and 16-bit pixels converted, alpha laid over
    white. BadInput says what is wrong with a file that is not an image, is cut off, or has over 100 million pixels.
    """
    if not data:
        raise BadInput("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > MAX_PIXELS:
                raise BadInput(f"{image.width}x{image.height} pixels are too many (limit {MAX_PIXELS:,})")
            image.load()
            if jpeg and image.format == "JPEG" and image.mode == "RGB":
                return _to_rgb(ImageOps.exif_transpose(_ijg9(data, image)))
            return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise BadInput("not an image") from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"damaged image ({error})") from None


def _ijg9(data: bytes, image: Image.Image) -> Image.Image:
    """The same JPEG by libjpeg 9, which enlarges colour by cosine transforms: up to 9 levels of a pixel away from libjpeg-turbo's result.

    Pillow's wheels carried it until version 9, so davidsandberg/facenet saw these pixels.
    """
    try:
        import jpeglib
    except ImportError:
        raise BadInput("--jpeg=ijg9 needs jpeglib: pip install -r requirements-legacy.txt") from None
    with tempfile.NamedTemporaryFile(suffix=".jpg") as file, jpeglib.version("9d"):
        file.write(data)
        file.flush()
        pixels = Image.fromarray(np.ascontiguousarray(jpeglib.read_spatial(file.name).spatial))
    pixels.info["exif"] = image.info.get("exif", b"")
    return pixels


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, np.float64)
        # Pillow clips 16-bit grey to 8 bits where a photograph wants it scaled.
        grey = values / 257 if values.max(initial=0) > 255 else values
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.asarray(image.convert("RGB"))


def decodes(data: bytes) -> bool:
    """True where `decode`, which is stricter than Pillow, takes the bytes."""
    try:
        decode(data)
    except ValueError:
        return False
    return True


def is_plain(data: bytes) -> bool:
    """True for bytes that a record may carry as they are: a baseline RGB or grey JPEG or 8-bit PNG, upright, one frame."""
    image = Image.open(io.BytesIO(data))
    upright = image.getexif().get(0x0112, 1) == 1
    modes = {"JPEG": ("RGB", "L"), "PNG": ("RGB", "L")}.get(image.format or "", ())
    return upright and image.mode in modes and getattr(image, "n_frames", 1) == 1 and "transparency" not in image.info


def encode(pixels: np.ndarray, form: str = "jpeg") -> bytes:
    """uint8 RGB [h, w, 3] -> JPEG of quality 95 without chroma subsampling, or PNG."""
    if form == "png":
        ok, data = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
        assert ok
        return data.tobytes()
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 95, "RGB", "444")


def resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """Bilinear, antialiased when it shrinks (Pillow's, which is also what scipy.misc.imresize did) -> [size, size, 3]."""
    if pixels.shape[:2] == (size, size):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))
