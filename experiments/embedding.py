"""Records through an `Embedder` to embeddings by key."""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from data_pipelines import loader
from data_pipelines.sources import Source
from data_pipelines.transforms import Transforms
from facenet_jax.errors import BadInput
from facenet_jax.evaluation.pairs import Pairs
from facenet_jax.inference import load


class EmbedsImages(Protocol):
    """uint8 RGB [n, size, size, 3] -> float32 [n, d]."""

    @property
    def size(self) -> int:
        """Side of the images in pixels."""
        ...

    @property
    def fingerprint(self) -> str:
        """What made the embeddings."""
        ...

    def __call__(self, images: np.ndarray, flip: bool = False) -> np.ndarray: ...


@dataclass(frozen=True)
class Pixels:
    """The floor of every table: the picture itself, 32 x 32, zero mean and unit length."""

    size: int = 32
    fingerprint: str = "pixels"

    def __call__(self, images: np.ndarray, flip: bool = False) -> np.ndarray:
        """uint8 [n, 32, 32, 3] -> [n, 3072] (twice as many with the mirror image's beside)."""

        def rows(x: np.ndarray) -> np.ndarray:
            flat = x.reshape(len(x), -1).astype(np.float32)
            flat -= flat.mean(1, keepdims=True)
            return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)

        return np.concatenate([rows(images), rows(images[:, :, ::-1])], 1) if flip else rows(images)


def open_embedder(name: str) -> EmbedsImages:
    """A weights file, a pretrained name, or "pixels"."""
    return Pixels() if name == "pixels" else load(name)


def alignment_family(method: str) -> str:
    """Of records: the template that faces are warped to, "insightface template"; else the detector whose box is cut, with any margin: "mtcnn margin 32 at
    160" and "crop_160_32 of lfw_mtcnn_original.npz" are one family, "mtcnn"; "" where the text names none."""
    found = re.search(r"\w+ template|mtcnn|haar|dlib|drawn", method.lower())
    return found.group() if found else ""


def check_alignment(trained_on: Mapping[str, Any], records: Source, force: bool) -> None:
    """Refuses records aligned in another way than the network's training data, where both say how they were; `trained_on` is a description of
    records or the provenance of weights."""
    trained, here = (d.get("alignment", {}).get("method", "") for d in (trained_on, records.metadata))
    known = {name: alignment_family(name) for name in (trained, here)}
    if all(known.values()) and known[trained] != known[here] and not force:
        raise BadInput(
            f"the network was trained on faces cut by {trained!r}, these records by {here!r}: scores would mislead; --force measures anyway"
        )


@dataclass(frozen=True)
class Embedded:
    """embeddings [n, d] float32, keys [n], identities [n], seconds it took."""

    embeddings: np.ndarray
    keys: np.ndarray
    identities: np.ndarray
    seconds: float


def embed(
    embedder: EmbedsImages,
    source: Source,
    *,
    indices: np.ndarray | None = None,
    crop: int = 0,
    flip: bool = False,
    rows: int = 128,
    progress: bool = True,
) -> Embedded:
    """Embeds the named records (all of them by default), whole or their central `crop` pixels."""
    indices = np.arange(len(source.labels)) if indices is None else indices
    transforms = Transforms(embedder.size, crop)
    started = time.perf_counter()
    parts = []
    with tqdm(total=len(indices), unit="image", desc="embed", mininterval=2, disable=not progress) as bar:
        for batch in loader.in_order(source, indices, transforms, rows):
            parts.append(embedder(batch, flip))
            bar.update(len(batch))
    if not parts:
        raise BadInput("no images to embed")
    embeddings = np.concatenate(parts)
    return Embedded(embeddings, source.keys[indices], source.identities[source.labels[indices]], time.perf_counter() - started)


def rows_of_pairs(pairs: Pairs, keys: np.ndarray, allow_missing: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(first [p], second [p] places in keys, present [p] bool); BadInput names the first missing image unless they are allowed."""
    place = {str(key): i for i, key in enumerate(keys)}
    first = np.asarray([place.get(str(key), -1) for key in pairs.first])
    second = np.asarray([place.get(str(key), -1) for key in pairs.second])
    present = (first >= 0) & (second >= 0)
    if not present.all() and not allow_missing:
        missing = sorted({str(k) for keys_, at in ((pairs.first, first), (pairs.second, second)) for k in keys_[at < 0]})
        raise BadInput(
            f"{len(missing)} images of the pairs are missing, the first is {missing[0]}; --allow_missing counts their pairs as wrong"
        )
    return np.maximum(first, 0), np.maximum(second, 0), present
