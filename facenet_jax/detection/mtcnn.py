"""MTCNN, all three stages on the device: photographs of many sizes on canvases of a few, boxes, scores and five points out.

The arithmetic is davidsandberg/facenet's (src/align/detect_face.py): the same pyramid, resampling, rounding and suppression. Buffers have fixed
sizes by canvas: a pyramid level gives at most `proposals` windows, a photograph at most `candidates` boxes, the best scored; nothing recompiles per
photograph.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from facenet_jax import compiling
from facenet_jax.detection import Faces, boxes, resample
from facenet_jax.detection.networks import ONet, PNet, RNet
from facenet_jax.errors import BadInput
from facenet_jax.weights.cache import find_weights
from facenet_jax.weights.portable import load_weights

Array = jax.Array
_CELL, _STRIDE = 12, 2
# Sides of canvases: a photograph lies on the smallest that holds it.
_SIDES = (128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
# Pixels of one batch of canvases.
_BATCH_PIXELS = 1 << 20
_BATCH = 16


@dataclass(frozen=True)
class Settings:
    """minimum: the smallest face in pixels; thresholds: least score of each stage; factor: from one pyramid level to the next; buffers as above,
    which grow with large canvases."""

    minimum: int = 20
    thresholds: tuple[float, float, float] = (0.6, 0.7, 0.7)
    factor: float = 0.709
    proposals: int = 256
    candidates: int = 512
    refined: int = 128

    def __post_init__(self) -> None:
        if self.minimum < 4 or not 0 < self.factor < 1 or not all(0 < t < 1 for t in self.thresholds):
            raise BadInput("mtcnn: minimum must be at least 4 pixels, the factor and the thresholds between 0 and 1")

    def on_canvas(self, pixels: int) -> "Settings":
        """With the buffers for so many pixels. Photographs of crowds and leaves were seen to fill three quarters of these."""
        room = pixels // 512
        return replace(
            self, proposals=max(self.proposals, room), candidates=max(self.candidates, room), refined=max(self.refined, room // 8)
        )


def pyramid(height: int, width: int, settings: Settings) -> list[float]:
    """Scales at which a photograph is looked at, largest first; none for one smaller than the smallest face."""
    scales: list[float] = []
    side = min(height, width) * _CELL / settings.minimum
    while side >= _CELL:
        scales.append(_CELL / settings.minimum * settings.factor ** len(scales))
        side *= settings.factor
    return scales


def _fix(x: Array) -> Array:
    return jnp.trunc(x)


def _standardise(x: Array) -> Array:
    return (x - 127.5) * 0.0078125


def _best(scores: Array, count: int) -> tuple[Array, Array]:
    """(scores, places) [b, count] of the highest; of equals the last, which is what sorting upwards and taking from the end gives."""
    found, places = lax.top_k(scores[:, ::-1], min(count, scores.shape[1]))
    return found, scores.shape[1] - 1 - places


def _take(values: Array, places: Array) -> Array:
    return jnp.take_along_axis(values, places[..., None], 1)


def _layout(sizes: list[tuple[int, int]]) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Where pyramid levels, largest first, lie in one picture (top, left each), and its size. With the usual factor a tenth of it stays empty: the first
    level, the second over all small ones, the third over the fourth."""
    count, places, left, height = len(sizes), dict[int, tuple[int, int]](), 0, 0
    for column in ([range(1)], [range(1, 2), range(4, count)], [range(2, 3), range(3, 4)]):
        top = width = 0
        for shelf in ([level for level in levels if level < count] for levels in column):
            at = left
            for level in shelf:
                places[level] = (top, at)
                at += sizes[level][1]
            top, width = top + max((sizes[level][0] for level in shelf), default=0), max(width, at - left)
        left, height = left + width, max(height, top)
    return [places[level] for level in range(count)], (height, left)


def _mosaic(parts: list[Array], places: list[tuple[int, int]], size: tuple[int, int]) -> Array:
    """Pyramid levels [h, w, ...] in one array [*size, ...]."""
    picture = jnp.zeros((*size, *parts[0].shape[2:]), parts[0].dtype)
    for part, place in zip(parts, places, strict=True):
        picture = lax.dynamic_update_slice(picture, part, (*place, *[0] * (part.ndim - 2)))
    return picture


def _propose(params: Any, columns: Array, size: Array, level_sizes: Array, scales: tuple[float, ...], settings: Settings) -> tuple:
    """The first stage of one photograph: (boxes [k, 4], corrections [k, 4], scores [k], -inf where suppressed), level after level."""
    even = lambda side, scale: -(-int(np.ceil(side * scale)) // 2) * 2
    canvases = [(even(columns.shape[0] - 1, scale), even(columns.shape[1], scale)) for scale in scales]
    levels = [resample.shrink(columns, size, out, canvas, scale) for out, canvas, scale in zip(level_sizes, canvases, scales, strict=True)]
    places, size_of_all = _layout(canvases)
    picture = _mosaic(levels, places, size_of_all)
    inside = _mosaic([_before(canvas, out - 2) for canvas, out in zip(canvases, level_sizes)], places, size_of_all)
    maps: Any = PNet().apply({"params": params}, _standardise(picture)[None], inside[None])
    # x before y, as the original lists them: it decides among equal scores.
    scores, corrections = (a[0].swapaxes(0, 1) for a in maps)
    found = [
        _windows(scores, corrections, place, canvas, out, scale, settings)
        for place, canvas, out, scale in zip(places, canvases, level_sizes, scales, strict=True)
    ]
    box, correction, score = (jnp.stack(parts) for parts in zip(*found, strict=True))
    score = jnp.where(boxes.suppress(box, score, 0.5, False), score, -jnp.inf)
    return box.reshape(-1, 4), correction.reshape(-1, 4), score.reshape(-1)


def _windows(
    scores: Array, corrections: Array, place: tuple[int, int], canvas: tuple[int, int], out: Array, scale: float, settings: Settings
) -> tuple[Array, Array, Array]:
    """The best windows of the level at `place` in a mosaic's maps [x, y]: boxes [k, 4], corrections [k, 4], scores [k], k = settings.proposals."""
    high, wide = (side // _STRIDE - 5 for side in canvas)
    top, left = (side // _STRIDE for side in place)
    score, correction = (a[left : left + wide, top : top + high] for a in (scores, corrections))
    # Of odd sides the last pool is half empty.
    filled = ((out - _CELL + 1) // _STRIDE + 1)[::-1]
    there = _before((wide, high), filled) & (out >= _CELL).all()
    score, cell = _best(jnp.where(there & (score >= settings.thresholds[0]), score, -jnp.inf).reshape(1, -1), settings.proposals)
    x, y = jnp.divmod(cell[0], high)
    # From tables in float64: a quotient that should be whole decides which pixel is meant.
    edge = lambda cells: jnp.asarray(np.trunc((_STRIDE * np.arange(max(wide, high)) + cells) / scale), jnp.float32)
    begin, end = edge(1), edge(_CELL)
    box = jnp.stack([begin[x], begin[y], end[x], end[y]], -1)
    # The original turns the corrections of a level with a single candidate over (generateBoundingBox): 1.2% of LFW's boxes follow from it.
    x = jnp.where(jnp.isfinite(score[0]).sum() == 1, filled[0] - 1 - x, x)
    fill = (0, settings.proposals - len(box))
    return (
        jnp.pad(box, (fill, (0, 0))),
        jnp.pad(correction[x, y], (fill, (0, 0))),
        jnp.pad(score[0], fill, constant_values=-jnp.inf),
    )


def _before(canvas: tuple[int, ...], size: Array) -> Array:
    """[*canvas] bool: the places within `size` [2]."""
    return (jnp.arange(canvas[0]) < size[0])[:, None] & (jnp.arange(canvas[1]) < size[1])[None]


def _in_chunks(function: Any, owner: Array, box: Array, valid: Array, chunk: int, outputs: int) -> Array:
    """function(owner [chunk], box [chunk, 4]) -> [chunk, outputs] over the valid rows of [n, ...] only, packed together -> [n, outputs]."""
    total = len(valid)
    order = jnp.argsort(~valid)
    order = jnp.pad(order, (0, -total % chunk))
    owner, box = owner[order], box[order]

    def step(state: tuple[Array, Array]) -> tuple[Array, Array]:
        at, results = state
        part = lambda a: lax.dynamic_slice_in_dim(a, at, chunk)
        return at + chunk, lax.dynamic_update_slice_in_dim(results, function(part(owner), part(box)), at, 0)

    count = valid.sum()
    start = (jnp.zeros((), jnp.int32), jnp.zeros((len(order), outputs), jnp.float32))
    packed = lax.while_loop(lambda state: state[0] < count, step, start)[1]
    return packed[jnp.cumsum(valid) - 1]


def _detect(params: Any, photographs: Array, sizes: Array, level_sizes: Array, scales: tuple[float, ...], settings: Settings) -> tuple:
    """photographs uint8 [b, h, w, 3] on black canvases, sizes [b, 2], level_sizes [b, levels, 2] (0: no such level) -> boxes, scores, points, valid."""
    count = photographs.shape[0]
    settings = settings.on_canvas(photographs.shape[1] * photographs.shape[2])
    on_cpu = jax.default_backend() == "cpu"
    # Crops that go through R- and O-Net together: a CPU's cache holds the maps of so many.
    chunks = (16, 4) if on_cpu else (64, 16)
    columns, corners = resample.running_sums(photographs)
    propose = lambda one: _propose(params["pnet"], one[0], one[1], one[2], scales, settings)
    if on_cpu:
        # One after another, whose maps stay in the cache; places of a batch without a photograph cost nothing.
        windows = len(scales) * settings.proposals
        nothing = lambda one: (jnp.zeros((windows, 4)), jnp.zeros((windows, 4)), jnp.full(windows, -jnp.inf))
        found = lax.map(
            lambda one: lax.cond(one[1].min() > 0, propose, nothing, (columns[:, one[0]], *one[1:])),
            (jnp.arange(count), sizes, level_sizes),
        )
    else:
        found = jax.vmap(propose, ((1, 0, 0),))((columns, sizes, level_sizes))
    box, correction, score = found

    # Of equal scores the original's sort takes the later one.
    score, places = _best(score, settings.candidates)
    box, correction = _take(box, places), _take(correction, places)
    score = jnp.where(boxes.suppress(box, score, 0.7, False), score, -jnp.inf)
    box = _fix(boxes.square(boxes.regress(box, correction, inclusive=False))).astype(jnp.int32)

    owner = lambda b: jnp.repeat(jnp.arange(count), b.shape[1])

    def stage(network: Any, name: str, side: int, chunk: int, box: Array, score: Array, outputs: int) -> Array:
        def run(owner: Array, box: Array) -> Array:
            crops = resample.crops(photographs, columns, corners, owner, box, side)
            found, *rest = network.apply({"params": params[name]}, _standardise(crops))
            return jnp.concatenate([found[:, None], *rest], -1)

        valid = jnp.isfinite(score).reshape(-1)
        results = _in_chunks(run, owner(box), box.reshape(-1, 4), valid, chunk, outputs)
        return results.reshape(count, -1, outputs)

    results = stage(RNet(), "rnet", 24, chunks[0], box, score, 5)
    score = jnp.where(jnp.isfinite(score) & (results[..., 0] > settings.thresholds[1]), results[..., 0], -jnp.inf)
    score, places = _best(score, settings.refined)
    box, correction = _take(box, places).astype(jnp.float32), _take(results[..., 1:], places)
    score = jnp.where(boxes.suppress(box, score, 0.7, False), score, -jnp.inf)
    box = _fix(boxes.square(boxes.regress(box, correction))).astype(jnp.int32)

    results = stage(ONet(), "onet", 48, chunks[1], box, score, 15)
    score = jnp.where(jnp.isfinite(score) & (results[..., 0] > settings.thresholds[2]), results[..., 0], -jnp.inf)
    box = box.astype(jnp.float32)
    extent = box[..., 2:] - box[..., :2] + 1
    points = jnp.stack([results[..., 5:10], results[..., 10:15]], -1) * extent[..., None, :] + box[..., None, :2] - 1
    box = boxes.regress(box, results[..., 1:5])
    score, places = _best(score, score.shape[1])
    box, points = _take(box, places), jnp.take_along_axis(points, places[..., None, None], 1)
    return box, score, points, boxes.suppress(box, score, 0.7, True)


@lru_cache
def _compiled() -> Any:
    return jax.jit(_detect, static_argnames=("scales", "settings"), compiler_options=compiling.options())


class Mtcnn:
    """The detector with its weights on the device.

    Photographs whose longer side is over 4,096 pixels are shrunk to that first, and their faces reported in their own pixels.
    """

    def __init__(self, weights: str | Path = "mtcnn", **settings: Any) -> None:
        self.settings = Settings(**settings)
        path = find_weights(weights)
        found = load_weights(path)
        if found.network != "mtcnn":
            raise BadInput(f"{path}: weights of {found.network}, not of mtcnn")
        self._params = jax.device_put(found.variables["params"])

    def __call__(self, photographs: Sequence[np.ndarray]) -> list[Faces]:
        """uint8 RGB [h, w, 3] each -> faces in the order of the photographs."""
        results: list[Faces] = [Faces(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros((0, 5, 2), np.float32))] * len(
            photographs
        )
        groups: dict[tuple[int, int], list[int]] = {}
        for index, photograph in enumerate(photographs):
            if photograph.dtype != np.uint8 or photograph.ndim != 3 or photograph.shape[-1] != 3:
                raise BadInput(f"photographs must be uint8 RGB [h, w, 3], not {photograph.dtype} {list(photograph.shape)}")
            if pyramid(*_fitted(photograph.shape[:2]), self.settings):
                groups.setdefault(_canvas(_fitted(photograph.shape[:2])), []).append(index)
        for canvas, members in groups.items():
            batch = max(1, min(_BATCH, _BATCH_PIXELS // (canvas[0] * canvas[1])))
            for start in range(0, len(members), batch):
                part = members[start : start + batch]
                for index, faces in zip(part, self._batch([photographs[i] for i in part], canvas, batch), strict=True):
                    results[index] = faces
        return results

    def _batch(self, photographs: list[np.ndarray], canvas: tuple[int, int], batch: int) -> list[Faces]:
        scales = tuple(pyramid(*canvas, self.settings))
        images = np.zeros((batch, *canvas, 3), np.uint8)
        sizes = np.zeros((batch, 2), np.int32)
        level_sizes = np.zeros((batch, len(scales), 2), np.int32)
        shrunk = []
        for row, photograph in enumerate(photographs):
            fitted = _shrunk(photograph)
            height, width = sizes[row] = fitted.shape[:2]
            shrunk.append(np.asarray([photograph.shape[1] / width, photograph.shape[0] / height], np.float32))
            images[row, :height, :width] = fitted
            for level, scale in enumerate(pyramid(height, width, self.settings)):
                level_sizes[row, level] = int(np.ceil(height * scale)), int(np.ceil(width * scale))
        found = _compiled()(self._params, images, sizes, level_sizes, scales, self.settings)
        box, score, points, valid = (np.asarray(a) for a in found)
        return [
            Faces(box[row][keep] * np.tile(ratio, 2), score[row][keep], points[row][keep] * ratio)
            for row, (keep, ratio) in enumerate(zip(valid, shrunk, strict=False))
        ]


def _fitted(size: tuple[int, ...]) -> tuple[int, int]:
    """Height and width after shrinking to the largest canvas."""
    ratio = max(max(size) / _SIDES[-1], 1)
    return max(int(size[0] / ratio), 1), max(int(size[1] / ratio), 1)


def _shrunk(photograph: np.ndarray) -> np.ndarray:
    height, width = _fitted(photograph.shape[:2])
    if (height, width) == photograph.shape[:2]:
        return photograph
    import cv2

    return cv2.resize(photograph, (width, height), interpolation=cv2.INTER_AREA)


def _canvas(size: tuple[int, int]) -> tuple[int, int]:
    """The smallest canvas, by height and by width, that holds a photograph."""
    height, width = (next(side for side in _SIDES if side >= n) for n in size)
    return height, width
