"""Faces with known faults, in memory, and what a brute-force search needs."""

import io
from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.cleaning.faces import Faces

SIZE = 64


def picture(seed, **options):
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), np.uint8)
    Image.fromarray(pixels).save(out, "PNG", **options)
    return out.getvalue()


@dataclass
class Pictures:
    """Records in memory."""

    labels: np.ndarray
    keys: np.ndarray
    identities: np.ndarray
    data: list[bytes]
    metadata: dict = field(default_factory=dict)

    def image(self, index):
        return self.data[index]


def normalised(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def make(counts, seed=0, noise=0.5, prefix="p"):
    """Unrelated people of so many images each: two of one person about 0.4 apart, of two people about 2."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    people = normalised(rng.normal(size=(len(counts), SIZE)))
    x = normalised(people[labels] + noise * normalised(rng.normal(size=(len(labels), SIZE))))
    names = np.asarray([f"{prefix}{i}" for i in range(len(counts))], "<U40")
    keys = np.asarray([f"{names[label]}/{row}" for row, label in enumerate(labels)], "<U40")
    return Faces(Pictures(labels, keys, names, [picture((seed, row)) for row in range(len(labels))]), x, "weights")


def planted_overlap():
    faces, others = make([4, 3, 5, 2]), make([2, 3, 1], seed=7, prefix="q")
    others.embeddings[0] = faces.embeddings[5]  # a picture of p1
    others.embeddings[5] = normalised(faces.embeddings[7:12].mean(0, keepdims=True))[0]  # a face like p2's
    faces.source.identities[3], others.source.identities[1] = "Bjørk Guðmund", "guðmund, BJØRK"
    return faces, others


def all_distances(x, y):
    return ((x.astype(np.float64)[:, None] - y.astype(np.float64)[None]) ** 2).sum(-1)


@st.composite
def rows(draw, least=0, most=50):
    """Unit rows, some of them copies and near copies of others."""
    n, d = draw(st.integers(least, most)), draw(st.sampled_from([1, 2, 7, 32]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.normal(size=(n, d)) + 1e-3
    if n:
        copies = rng.random(n) < 0.3
        x[copies] = x[rng.integers(n, size=copies.sum())] + rng.choice([0, 1e-3, 0.1], size=(copies.sum(), 1)) * rng.normal(
            size=(copies.sum(), d)
        )
    return normalised(x) if n else x.astype(np.float32)
