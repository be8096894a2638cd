"""Cartoon people that do not exist: a face data set without a download.

A person is a set of `Traits` (shape, colours, features, marks) drawn from `(seed, identity)`. A photograph of that person adds a `Shot`
(pose, expression, light, occlusion, background) drawn from `(seed, identity, image)`. A shot changes the pixels much more than a change
of person does, so comparing raw pixels is close to guessing, yet the traits stay visible, so a network can learn them.

Shapes live in face coordinates: the origin is the middle of the head, y points down, and 1 is about half a head's height.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np

Colour = np.ndarray  # float [3], RGB in 0..255; OpenCV clips what lies outside.

# Antialiased polygons bleed over their edge by half a pixel; drawing at twice the size halves that and smooths thin lines.
SUPERSAMPLE = 2
# Corners are handed to OpenCV as fixed-point integers, so that a shift of a fraction of a pixel moves the drawing by that fraction.
FRACTION_BITS = 4
# Half the picture is 1 / UNITS_TO_CANVAS face units: a head fills about two thirds of the height.
UNITS_TO_CANVAS = 0.7

FACE, NOSE, FLAT = 0.6, 0.85, 0.0  # How far a shape stands out towards the camera, in face units: what a turned head displaces.

SKINS = np.array([[250, 221, 200], [238, 192, 160], [214, 160, 118], [172, 116, 78], [122, 78, 54], [78, 50, 38]], float)
HAIRS = np.array(
    [[28, 24, 28], [72, 46, 32], [122, 76, 42], [176, 84, 40], [216, 170, 92], [240, 220, 160], [196, 196, 200], [110, 110, 118]], float
)
IRISES = np.array([[60, 36, 22], [120, 78, 36], [110, 130, 60], [70, 150, 110], [80, 150, 200], [130, 150, 170]], float)
LIPS = np.array([[150, 60, 66], [206, 92, 96], [226, 130, 120], [170, 84, 70]], float)
FRAMES = np.array([[24, 24, 30], [120, 60, 30], [170, 40, 50], [50, 90, 150], [200, 170, 80]], float)
INK, WHITE = np.array([30.0, 20, 24]), np.array([248.0, 246, 242])

CIRCLE = np.array([(np.cos(angle), np.sin(angle)) for angle in np.linspace(0, 2 * np.pi, 25)])
AROUND_HEAD = np.linspace(0, 2 * np.pi, 49)
AROUND_JAW, AROUND_CROWN = AROUND_HEAD[:25], AROUND_HEAD[24:]
ACROSS = np.linspace(-1, 1, 13)  # Left to right, for curves such as brows, lips and the hairline.

HAIR_WAVES = {  # How much farther than smooth hair the points over the crown reach.
    "smooth": np.ones(25),
    "curls": 1 + 0.12 * np.abs(np.sin(AROUND_CROWN * 6)),
    "spikes": np.where(np.arange(25) % 3 == 1, 1.14, 1.0),
}


@dataclass(frozen=True)
class Traits:
    """What makes a person: the same in every image. Lengths in face units, angles in radians, colours RGB in 0..255."""

    skin: Colour
    hair: Colour
    iris: Colour
    lips: Colour
    width: float
    crown: float
    chin: float
    jaw: float  # Below 1 a square jaw, above 1 a pointed one.
    ear_size: float
    ear_height: float
    eye_distance: float
    eye_height: float
    eye_size: float
    eye_aspect: float
    eye_tilt: float
    iris_size: float
    brow_height: float
    brow_thickness: float
    brow_tilt: float
    brow_arch: float
    brow_darkness: float
    nose_length: float
    nose_width: float
    mouth_height: float
    mouth_width: float
    upper_lip: float
    lower_lip: float
    blush: float
    bald: bool
    hair_texture: str  # smooth, curls or spikes
    hair_volume: float
    hair_length: float  # How far down the hair behind the head hangs; negative is above the ears.
    hair_flare: float
    forehead: float
    parting: float
    parting_depth: float
    bun: float  # Radius of a bun on the crown, 0 for none.
    beard: str  # none, moustache, goatee or full
    beard_density: float
    glasses: str  # none, round or square
    glasses_size: float  # Relative to the eyes' distance from the middle, so that the lenses never meet.
    glasses_colour: Colour
    earrings: bool
    moles: np.ndarray  # [n, 2] positions
    freckles: np.ndarray  # [n, 2] positions


@dataclass(frozen=True)
class Shot:
    """What one photograph adds to a person. Lengths in face units, angles in radians."""

    shift: np.ndarray  # [2]
    roll: float
    yaw: float
    pitch: float
    scale: float
    smile: float
    mouth_open: float
    brow_raise: float
    eye_opening: float
    gaze: np.ndarray  # [2]
    clothes: Colour
    backdrop: np.ndarray  # float32 [3, 3, 3] coarse colours, smoothed to the size of the picture
    blobs: np.ndarray  # [n, 6]: centre x and y, radius, colour
    occlusion: str  # none, patch, hand or hat
    occlusion_place: np.ndarray  # [2]
    occlusion_colour: Colour
    gain: np.ndarray  # [3] colour cast
    contrast: float
    brightness: float
    shading: np.ndarray  # [2] relative change of light from the middle to the right and lower edge
    blur: float  # Standard deviation as a fraction of the picture's side
    noise: float  # Standard deviation, of 255


def draw(identity: int, image: int, size: int = 64, seed: int = 0) -> np.ndarray:
    """Draws photograph number `image` of person number `identity`.

    The same arguments always give the same bytes, and images need no order: each has random numbers of its own. Another `seed` is another
    population. Another `size` (pixels) is the same scene at another resolution, apart from the sensor noise.

    Returns:
        uint8 [size, size, 3], RGB.
    """
    traits = _traits(np.random.default_rng(np.random.SeedSequence([seed, identity])))
    # A seed sequence reads missing words as 0, so image 0 would repeat the person's own numbers.
    rng = np.random.default_rng(np.random.SeedSequence([seed, identity, image + 1]))
    shot = _shot(rng)
    canvas = _background(shot, size * SUPERSAMPLE)
    pen = _Pen()
    _draw_person(pen, traits, shot)
    pen.paint(canvas, shot)
    return _photograph(cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA), shot, rng)


def _traits(rng: np.random.Generator) -> Traits:
    between = rng.uniform
    skin = _pick_between(SKINS, rng)
    return Traits(
        skin=skin,
        hair=_pick_between(HAIRS, rng),
        iris=_pick_between(IRISES, rng),
        lips=_mix(skin, _pick_between(LIPS, rng), between(0.45, 1.0)),
        width=between(0.68, 0.92),
        crown=between(0.85, 1.05),
        chin=between(0.85, 1.12),
        jaw=between(0.55, 1.2),
        ear_size=between(0.12, 0.26),
        ear_height=between(-0.12, 0.15),
        eye_distance=between(0.25, 0.43),
        eye_height=between(-0.2, 0.05),
        eye_size=between(0.12, 0.21),
        eye_aspect=between(0.5, 0.95),
        eye_tilt=between(-0.3, 0.3),
        iris_size=between(0.5, 0.75),
        brow_height=between(0.1, 0.2),
        brow_thickness=between(0.02, 0.085),
        brow_tilt=between(-0.35, 0.3),
        brow_arch=between(0.0, 0.1),
        brow_darkness=between(0.1, 0.6),
        nose_length=between(0.22, 0.45),
        nose_width=between(0.08, 0.22),
        mouth_height=between(0.5, 0.66),
        mouth_width=between(0.18, 0.38),
        upper_lip=between(0.02, 0.08),
        lower_lip=between(0.03, 0.11),
        blush=between(0.0, 0.35),
        bald=rng.random() < 0.08,
        hair_texture=str(rng.choice(["smooth", "curls", "spikes"], p=[0.5, 0.3, 0.2])),
        hair_volume=between(1.04, 1.3),
        hair_length=between(0.3, 1.3) if rng.random() < 0.5 else -1.0,
        hair_flare=between(0.95, 1.3),
        forehead=between(0.3, 0.75),
        parting=between(-0.7, 0.7),
        parting_depth=between(-0.2, 0.3),
        bun=between(0.2, 0.4) if rng.random() < 0.15 else 0.0,
        beard=str(rng.choice(["none", "moustache", "goatee", "full"], p=[0.64, 0.12, 0.1, 0.14])),
        beard_density=between(0.4, 1.0),
        glasses=str(rng.choice(["none", "round", "square"], p=[0.7, 0.15, 0.15])),
        glasses_size=between(0.65, 0.92),
        glasses_colour=_pick_between(FRAMES, rng),
        earrings=rng.random() < 0.2,
        moles=between([-0.55, 0.05], [0.55, 0.75], (rng.integers(0, 3), 2)),
        freckles=between([-0.5, 0.08], [0.5, 0.35], (14 if rng.random() < 0.2 else 0, 2)),
    )


def _shot(rng: np.random.Generator) -> Shot:
    between = rng.uniform
    return Shot(
        shift=between(-0.15, 0.15, 2),
        roll=np.radians(between(-12, 12)),
        yaw=np.radians(between(-20, 20)),
        pitch=np.radians(between(-10, 10)),
        scale=between(0.86, 1.14),
        smile=between(-0.06, 0.14),
        mouth_open=max(0.0, between(-0.12, 0.14)),
        brow_raise=between(-0.02, 0.08),
        eye_opening=between(0.15, 0.4) if rng.random() < 0.12 else between(0.7, 1.1),
        gaze=between(-0.3, 0.3, 2),
        clothes=between(20, 240, 3),
        backdrop=(between(0, 255, 3) + between(-70, 70, (3, 3, 3))).astype(np.float32),
        blobs=between([-1.5, -1.5, 0.1, 0, 0, 0], [1.5, 1.5, 0.6, 255, 255, 255], (rng.integers(0, 6), 6)),
        occlusion=str(rng.choice(["none", "patch", "hand", "hat"], p=[0.76, 0.08, 0.08, 0.08])),
        occlusion_place=between(-0.8, 0.8, 2),
        occlusion_colour=between(20, 240, 3),
        gain=np.exp(rng.normal(0, 0.16, 3)),
        contrast=between(0.6, 1.15),
        brightness=between(-40, 40),
        shading=between(-0.45, 0.45, 2),
        blur=between(0.0, 0.012),
        noise=between(1, 8),
    )


def _pick_between(palette: np.ndarray, rng: np.random.Generator) -> Colour:
    """A colour between two neighbours of the palette, a little off, so that hardly two people share one."""
    low = rng.integers(len(palette) - 1)
    return _mix(palette[low], palette[low + 1], rng.random()) + rng.normal(0, 6, 3)


def _mix(first: Colour, second: Colour, share: float) -> Colour:
    return first + (second - first) * share


class _Pen:
    """Collects shapes given in face coordinates, and puts them on a canvas in the pose of a shot.

    Most shapes have a dozen corners, so posing them all at once costs a fraction of posing one after the other.
    """

    def __init__(self) -> None:
        self.shapes: list[np.ndarray] = []
        self.reliefs: list[np.ndarray] = []
        self.styles: list[tuple[Colour, float]] = []  # The width of a line, or 0 for a filled shape.

    def fill(self, points: np.ndarray, colour: Colour, relief: float | np.ndarray = FACE) -> None:
        self.line(points, colour, 0.0, relief)

    def line(self, points: np.ndarray, colour: Colour, width: float, relief: float | np.ndarray = FACE) -> None:
        self.shapes.append(points)
        self.reliefs.append(np.full(len(points), relief))
        self.styles.append((colour, width))

    def paint(self, canvas: np.ndarray, shot: Shot) -> None:
        """Paints the shapes on uint8 [side, side, 3], the first at the back."""
        half = canvas.shape[0] / 2
        unit = half * UNITS_TO_CANVAS * shot.scale  # pixels
        cos, sin = math.cos(shot.roll), math.sin(shot.roll)
        roll = np.array([[cos, sin], [-sin, cos]])
        points = np.concatenate(self.shapes)
        # A head is round, so what stands out flattens towards its sides.
        depth = np.concatenate(self.reliefs) * (1 - points[:, 0] ** 2)
        turned = points * np.cos([shot.yaw, shot.pitch]) + depth[:, None] * np.sin([shot.yaw, shot.pitch])
        pixels = (turned @ roll + shot.shift) * unit + half - 0.5
        corners = np.rint(pixels * 2**FRACTION_BITS).astype(np.int32)
        start = 0
        for shape, (colour, width) in zip(self.shapes, self.styles, strict=True):
            posed = [corners[start : start + len(shape)]]
            start += len(shape)
            if width:
                cv2.polylines(canvas, posed, False, colour.tolist(), max(1, round(width * unit)), cv2.LINE_AA, FRACTION_BITS)
            else:
                cv2.fillPoly(canvas, posed, colour.tolist(), cv2.LINE_AA, FRACTION_BITS)


def _ellipse(x: float, y: float, radius_x: float, radius_y: float, tilt: float = 0.0) -> np.ndarray:
    cos, sin = math.cos(tilt), math.sin(tilt)
    return CIRCLE @ np.array([[cos * radius_x, sin * radius_x], [-sin * radius_y, cos * radius_y]]) + (x, y)


def _curve(x: np.ndarray, y: np.ndarray | float) -> np.ndarray:
    points = np.empty((len(x), 2))
    points[:, 0], points[:, 1] = x, y
    return points


def _outline(traits: Traits, angle: np.ndarray) -> np.ndarray:
    """Points of the head's outline by angle, from the right-hand side (0) over the chin (pi / 2) round to the crown (3 pi / 2)."""
    cos, sin = np.cos(angle), np.sin(angle)
    x = traits.width * np.sign(cos) * np.abs(cos) ** np.where(sin > 0, traits.jaw, 0.9)
    return _curve(x, np.where(sin > 0, traits.chin, traits.crown) * sin)


def _background(shot: Shot, side: int) -> np.ndarray:
    backdrop = np.clip(cv2.resize(shot.backdrop, (side, side), interpolation=cv2.INTER_CUBIC), 0, 255)
    canvas = backdrop.astype(np.uint8)
    for x, y, radius, *colour in shot.blobs:
        centre = [round((place + 1) * side / 2 * 2**FRACTION_BITS) for place in (x, y)]
        cv2.circle(canvas, centre, round(radius * side / 2 * 2**FRACTION_BITS), colour, cv2.FILLED, cv2.LINE_AA, FRACTION_BITS)
    return canvas


def _draw_person(pen: _Pen, traits: Traits, shot: Shot) -> None:
    """Draws from the back to the front."""
    _draw_behind(pen, traits, shot)
    _draw_head(pen, traits)
    _draw_beard(pen, traits, shot)
    _draw_mouth(pen, traits, shot)
    _draw_nose(pen, traits)
    for side in (-1, 1):
        _draw_eye(pen, traits, shot, side)
    _draw_fringe(pen, traits)
    if traits.glasses != "none":
        _draw_glasses(pen, traits)
    _draw_occlusion(pen, traits, shot)


def _draw_behind(pen: _Pen, traits: Traits, shot: Shot) -> None:
    shade = _mix(traits.hair, INK, 0.3)
    if traits.bun and not traits.bald:
        pen.fill(_ellipse(0, -traits.crown * traits.hair_volume - traits.bun * 0.4, traits.bun, traits.bun * 0.9), shade, FLAT)
    if traits.hair_length > 0 and not traits.bald:
        top = _outline(traits, AROUND_CROWN) * traits.hair_volume
        bottom = _curve(ACROSS[::-1] * traits.width * traits.hair_volume * traits.hair_flare, traits.hair_length - 0.15 * ACROSS**2)
        pen.fill(np.concatenate([top, bottom]), shade, FLAT)
    neck = traits.width * 0.5
    pen.fill(np.array([[-neck, 0.4], [neck, 0.4], [neck * 1.1, 1.6], [-neck * 1.1, 1.6]]), _mix(traits.skin, INK, 0.25), FLAT)
    pen.fill(_ellipse(0, 2.3, 1.5, 1.05), shot.clothes, FLAT)


def _draw_head(pen: _Pen, traits: Traits) -> None:
    contour = _mix(traits.skin, INK, 0.35)
    for side in (-1, 1):
        ear = _ellipse(side * traits.width, traits.ear_height, traits.ear_size * 0.75, traits.ear_size, side * 0.2)
        pen.fill(ear, traits.skin, -0.2)
        pen.line(ear, contour, 0.03, -0.2)
        if traits.earrings:
            pen.fill(_ellipse(side * traits.width * 1.05, traits.ear_height + traits.ear_size, 0.06, 0.07), FRAMES[-1], -0.2)
    head = _outline(traits, AROUND_HEAD)
    pen.fill(head, traits.skin, FLAT)
    pen.line(head, contour, 0.03, FLAT)
    for side in (-1, 1):
        cheek = _ellipse(side * traits.width * 0.6, traits.eye_height + 0.4, 0.16, 0.12)
        pen.fill(cheek, _mix(traits.skin, LIPS[1], traits.blush))
    for x, y in traits.freckles:
        pen.fill(_ellipse(x, y, 0.022, 0.022), _mix(traits.skin, INK, 0.35))
    for x, y in traits.moles:
        pen.fill(_ellipse(x, y, 0.04, 0.04), _mix(traits.skin, INK, 0.7))


def _draw_beard(pen: _Pen, traits: Traits, shot: Shot) -> None:
    colour = _mix(traits.skin, _mix(traits.hair, INK, 0.15), traits.beard_density)
    lip = traits.mouth_height
    if traits.beard == "full":
        jaw = _outline(traits, AROUND_JAW)
        cheeks = _curve(ACROSS * traits.width, lip - 0.14 - 0.45 * ACROSS**6)
        # The beard's lower edge is the head's outline, its upper edge lies on the face.
        pen.fill(np.concatenate([jaw, cheeks]), colour, np.repeat([FLAT, FACE], [len(jaw), len(cheeks)]))
    if traits.beard == "goatee":
        pen.fill(_ellipse(0, (lip + traits.chin) / 2 + 0.08, traits.mouth_width * 0.8, (traits.chin - lip) / 2), colour)
    if traits.beard in ("moustache", "goatee"):
        upper = lip - 0.16 + 0.1 * ACROSS**2
        reach = ACROSS * traits.mouth_width * 1.15
        lower = lip - 0.04 + 0.08 * ACROSS**2 - shot.smile * ACROSS**2
        pen.fill(np.concatenate([_curve(reach, upper), _curve(reach, lower)[::-1]]), colour)


def _draw_mouth(pen: _Pen, traits: Traits, shot: Shot) -> None:
    x = ACROSS * traits.mouth_width * (1 + shot.smile)
    bow = 1 - ACROSS**2
    # A smile lifts the corners, an open mouth lets the lower lip drop.
    middle = traits.mouth_height - shot.smile * ACROSS**2
    opening = middle + shot.mouth_open * bow
    top = middle - traits.upper_lip * bow * (1 + 0.4 * np.cos(ACROSS * 2 * np.pi - np.pi))
    bottom = opening + traits.lower_lip * bow
    pen.fill(np.concatenate([_curve(x, top), _curve(x, bottom)[::-1]]), traits.lips)
    if shot.mouth_open > 0.03:
        pen.fill(np.concatenate([_curve(x, middle), _curve(x, opening)[::-1]]), _mix(INK, LIPS[0], 0.3))
        teeth = middle + np.minimum(0.05, shot.mouth_open * 0.6) * bow
        pen.fill(np.concatenate([_curve(x * 0.85, middle), _curve(x * 0.85, teeth)[::-1]]), WHITE)
    else:
        pen.line(_curve(x, middle), _mix(traits.lips, INK, 0.6), 0.03)


def _draw_nose(pen: _Pen, traits: Traits) -> None:
    tip = traits.eye_height + traits.nose_length + 0.05
    side = _mix(traits.skin, INK, 0.13)
    bridge = np.array([[-0.05, traits.eye_height], [0.05, traits.eye_height]])
    base = np.array([[traits.nose_width, tip], [0, tip + 0.06], [-traits.nose_width, tip]])
    pen.fill(np.concatenate([bridge, base]), side, np.array([FACE, FACE, FACE, NOSE, FACE]))
    pen.line(_curve(ACROSS * traits.nose_width, tip + 0.07 - 0.07 * ACROSS**4), _mix(traits.skin, INK, 0.5), 0.035, NOSE)


def _draw_eye(pen: _Pen, traits: Traits, shot: Shot, side: int) -> None:
    x, y, radius = side * traits.eye_distance, traits.eye_height, traits.eye_size
    height = radius * traits.eye_aspect * shot.eye_opening
    tilt = side * traits.eye_tilt
    pen.fill(_ellipse(x, y, radius, height, tilt), WHITE)
    iris = radius * traits.iris_size
    look_x, look_y = x + shot.gaze[0] * radius, y + shot.gaze[1] * height * 0.3
    pen.fill(_ellipse(look_x, look_y, iris, min(iris, height)), traits.iris)
    pen.fill(_ellipse(look_x, look_y, iris * 0.5, min(iris * 0.5, height)), INK)
    pen.fill(_ellipse(look_x - iris * 0.3, look_y - min(iris, height) * 0.3, iris * 0.2, min(iris, height) * 0.2), WHITE)
    lid = _ellipse(x, y, radius * 1.08, height * 1.08, tilt)
    pen.line(lid[12:], _mix(traits.skin, INK, 0.8), 0.05)

    brow_height = y - radius * traits.eye_aspect - traits.brow_height - shot.brow_raise
    brow = brow_height + side * ACROSS * traits.brow_tilt * radius - traits.brow_arch * (1 - ACROSS**2)
    brow_x = x + ACROSS * radius * 1.2
    half = traits.brow_thickness * (1 - 0.4 * ACROSS**2)
    hair = _mix(traits.hair, INK, traits.brow_darkness)
    pen.fill(np.concatenate([_curve(brow_x, brow - half), _curve(brow_x, brow + half)[::-1]]), hair)


def _draw_fringe(pen: _Pen, traits: Traits) -> None:
    if traits.bald:
        return
    outer = _outline(traits, AROUND_CROWN) * traits.hair_volume * HAIR_WAVES[traits.hair_texture][:, None]
    rise = traits.forehead * traits.crown + traits.parting_depth * np.exp(-(((ACROSS - traits.parting) / 0.35) ** 2))
    hairline = _curve(ACROSS[::-1] * traits.width, (-rise * (1 - ACROSS**6))[::-1])
    # The scalp is the head's outline, the hairline lies on the face.
    relief = np.repeat([FLAT, FACE], [len(outer), len(hairline)])
    pen.fill(np.concatenate([outer, hairline]), traits.hair, relief)
    pen.line(hairline, _mix(traits.hair, INK, 0.4), 0.03)


def _draw_glasses(pen: _Pen, traits: Traits) -> None:
    size, y = traits.glasses_size * traits.eye_distance, traits.eye_height + 0.02
    inner, outer = traits.eye_distance - size, traits.eye_distance + size
    for side in (-1, 1):
        if traits.glasses == "round":
            lens = _ellipse(side * traits.eye_distance, y, size, size)
        else:
            top, bottom = y - size * 0.7, y + size * 0.7
            lens = np.array([[inner, top], [outer, top], [outer, bottom], [inner, bottom], [inner, top]]) * (side, 1)
        pen.line(lens, traits.glasses_colour, 0.055)
        pen.line(np.array([[side * outer, y], [side * traits.width, y - 0.05]]), traits.glasses_colour, 0.05, FLAT)
    pen.line(np.array([[-inner, y], [inner, y]]), traits.glasses_colour, 0.05)


def _draw_occlusion(pen: _Pen, traits: Traits, shot: Shot) -> None:
    x, y = shot.occlusion_place
    if shot.occlusion == "patch":
        pen.fill(np.array([[x - 0.3, y - 0.2], [x + 0.3, y - 0.25], [x + 0.28, y + 0.2], [x - 0.32, y + 0.22]]), shot.occlusion_colour)
    if shot.occlusion == "hand":
        side = np.sign(x) * (0.45 + 0.5 * abs(x))
        for finger in range(4):
            knuckle = _ellipse(side, 0.6 + 0.17 * finger, 0.38, 0.1, np.sign(x) * 0.3)
            pen.fill(knuckle, traits.skin, FACE)
            pen.line(knuckle, _mix(traits.skin, INK, 0.35), 0.03)
    if shot.occlusion == "hat":
        brim = -0.5 * traits.crown
        crown = _outline(traits, AROUND_CROWN) * (1.15, 1.3) + (0, brim * 0.4)
        pen.fill(crown, shot.occlusion_colour, FLAT)
        pen.fill(_ellipse(0, brim, traits.width * 1.45, 0.16), _mix(shot.occlusion_colour, INK, 0.3), 0.2)


def _photograph(scene: np.ndarray, shot: Shot, rng: np.random.Generator) -> np.ndarray:
    """Lights a painted scene uint8 [size, size, 3] and adds what a cheap camera does to it; returns uint8 of the same shape."""
    size = scene.shape[0]
    if shot.blur * size > 0.3:  # Below that, the kernel has no neighbour to mix in.
        scene = cv2.GaussianBlur(scene, (0, 0), shot.blur * size)
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    light = 1 + shot.shading[0] * ramp + shot.shading[1] * ramp[:, None]
    lit = scene * light.astype(np.float32)[..., None] * shot.gain.astype(np.float32)
    lit = (lit - 128) * np.float32(shot.contrast) + np.float32(128 + shot.brightness)
    lit += rng.standard_normal(lit.shape, dtype=np.float32) * np.float32(shot.noise)
    return np.clip(lit, 0, 255).astype(np.uint8)
