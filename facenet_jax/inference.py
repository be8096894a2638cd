"""Embedder: uint8 RGB images in, embeddings out. No mode flag, no guessed preprocessing, one compilation per batch shape."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

from facenet_jax import compiling, folding, models
from facenet_jax.errors import BadInput
from facenet_jax.layers import l2_normalize
from facenet_jax.preprocessing import Preprocessing
from facenet_jax.weights.cache import find_weights
from facenet_jax.weights.portable import Weights, load_weights

BATCHES = (1, 4, 16, 64, 256)


def check_variables(weights: Weights) -> None:
    """BadInput names the first tensor that the network expects and the weights lack, or that has another shape."""
    model = models.create(weights.network, **weights.arguments)
    if "size" not in weights.preprocessing:
        raise BadInput(f"{weights.network}: these weights do not say how pixels are preprocessed; not a network that embeds images")
    _, expected = folding.traced(model, weights.preprocessing["size"])
    wanted = {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(expected)}
    there = {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(weights.variables)}
    for name in sorted(set(wanted) | set(there)):
        if wanted.get(name) != there.get(name):
            raise BadInput(
                f"{weights.network}: tensor {name} has shape {there.get(name, 'none (missing)')}, expected {wanted.get(name, 'none (unknown)')}"
            )


@lru_cache(16)
def _forward(network: str, arguments: str, preprocessing: Preprocessing, normalise: bool) -> Callable[[Any, np.ndarray], jax.Array]:
    """(folded variables, uint8 images) -> embeddings; one for all weights of an architecture, so that none of them compiles it again."""
    model = models.create(network, **json.loads(arguments))

    def forward(variables: Any, images: jax.Array) -> jax.Array:
        prelogits = folding.apply_folded(model, preprocessing.size, variables, preprocessing(images))
        return l2_normalize(prelogits) if normalise else prelogits

    return jax.jit(forward, compiler_options=compiling.options())


@dataclass
class Embedder:
    """A network ready for use. `embedder(images)` takes uint8 RGB [n, h, w, 3] of any square-able size and gives float32 [n, d]."""

    weights: Weights
    preprocessing: Preprocessing = field(init=False)

    def __post_init__(self) -> None:
        weights = self.weights
        check_variables(weights)
        self.preprocessing = Preprocessing(**weights.preprocessing)
        model = models.create(weights.network, **weights.arguments)
        self._variables = jax.device_put(folding.fold(model, self.preprocessing.size, weights.variables))
        self._forward = _forward(weights.network, json.dumps(weights.arguments, sort_keys=True), self.preprocessing, weights.normalise)

    @property
    def fingerprint(self) -> str:
        """Of the weights: embeddings are equal where it is."""
        return self.weights.fingerprint

    @property
    def size(self) -> int:
        """Side of the images the network sees, in pixels."""
        return self.preprocessing.size

    def __call__(self, images: np.ndarray, flip: bool = False) -> np.ndarray:
        """Embeds uint8 RGB [n, h, w, 3] -> float32 [n, d], unit rows (unless the network's are not).

        Images of another size are resized. flip: [n, 2d], the image's and its mirror image's side by side (squared distances then span 0..8).
        """
        images = self._checked(images)
        plain = self._embed(images)
        return np.concatenate([plain, self._embed(images[:, :, ::-1])], 1) if flip else plain

    def _checked(self, images: np.ndarray) -> np.ndarray:
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise BadInput(f"images must be uint8 RGB [n, h, w, 3], not {images.dtype} {list(images.shape)}")
        if images.shape[1:3] == (self.size, self.size):
            return images
        import cv2

        area = cv2.INTER_AREA if min(images.shape[1:3]) > self.size else cv2.INTER_LINEAR
        return (
            np.stack([cv2.resize(image, (self.size, self.size), interpolation=area) for image in images])
            if len(images)
            else np.zeros((0, self.size, self.size, 3), np.uint8)
        )

    def _embed(self, images: np.ndarray) -> np.ndarray:
        # A CPU gains nothing from more (Inception-ResNet-v1 on one core: 27 images/s by 4, 26 by 16); an accelerator wants to be full.
        largest = 4 if jax.default_backend() == "cpu" else BATCHES[-1]
        parts = []
        for start in range(0, len(images), largest):
            part = images[start : start + largest]
            rows = next(size for size in BATCHES if size >= len(part))
            padded = np.concatenate([part, np.zeros((rows - len(part), *part.shape[1:]), np.uint8)])
            parts.append(np.asarray(self._forward(self._variables, padded))[: len(part)])
        return np.concatenate(parts) if parts else np.zeros((0, self.weights.embedding_size), np.float32)


def load(path_or_name: str | Path) -> Embedder:
    """An `Embedder` from a weights file, or from a name that `facenet_jax.apps.pretrained` has fetched."""
    return Embedder(load_weights(find_weights(path_or_name)))
