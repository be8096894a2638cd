"""Faces and what was found about them: the shape that every mode takes and gives."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.cleaning import distances
from data_pipelines.cleaning.exclusions import Exclusions
from data_pipelines.sources import Source, open_source
from facenet_jax.errors import BadInput

TYPICAL = 3


@dataclass(frozen=True)
class Faces:
    """Records and their embeddings [n, d] float32 of unit length, in the same order; fingerprint: of the weights that made them."""

    source: Source
    embeddings: np.ndarray
    fingerprint: str = ""

    @cached_property
    def rows(self) -> list[np.ndarray]:
        """Rows of each person, by label."""
        labels = self.source.labels
        return np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1])

    @cached_property
    def centres(self) -> np.ndarray:
        """Mean embedding [p, d] of each person, not of unit length."""
        return distances.centres(self.embeddings, self.rows)

    def key(self, row: int | np.integer) -> str:
        """Key of an image."""
        return str(self.source.keys[row])

    def person(self, label: int) -> str:
        """Name of a person."""
        return str(self.source.identities[label])

    def person_of(self, row: int | np.integer) -> str:
        """Name of the person whose image it is."""
        return self.person(int(self.source.labels[row]))

    def typical(self, rows: np.ndarray, *before: int) -> list[int]:
        """A few of the rows to show: those `before`, then those nearest to the centre of all."""
        centre = self.embeddings[rows].mean(0, dtype=np.float64, keepdims=True)
        nearness = distances.between(self.embeddings, rows, centre, np.zeros(len(rows), np.int64))
        ordered = rows[np.argsort(nearness, kind="stable")].tolist()
        return [*before, *(row for row in ordered if row not in before)][:TYPICAL]


def open_faces(records: str, split: str, embeddings: Path) -> Faces:
    """Records with the embeddings that `experiments.embed` made of them; BadInput where the two do not belong together."""
    source = open_source(records, split)
    x, keys, fingerprint = distances.read_directions(embeddings)
    _belong_together(source, keys, str(embeddings))
    return Faces(source, x, fingerprint)


def _belong_together(source: Source, keys: np.ndarray, what: str) -> None:
    """BadInput where embeddings are not of these records, in this order."""
    if len(keys) != len(source.keys):
        raise BadInput(f"{what}: {len(keys)} embeddings, but {len(source.keys)} records: embed these records, of this split, anew")
    different = np.flatnonzero(np.asarray(keys, np.str_) != np.asarray(source.keys, np.str_))
    if len(different):
        at = different[0]
        raise BadInput(
            f"{what}: embedding {at} is of {keys[at]}, but record {at} is {source.keys[at]}: embed these records, of this split, anew"
        )


@dataclass(frozen=True)
class Finding:
    """One thing found. facts: for report.json; caption: what the page says of it; pictures: lines of (records, row) to show."""

    distance: float
    facts: dict[str, Any]
    caption: str
    pictures: tuple[tuple[tuple[Source, int], ...], ...]


@dataclass(frozen=True)
class Section:
    """Findings of one kind, the clearest first. name: in report.json; title, note: on the page."""

    name: str
    title: str
    note: str
    findings: list[Finding]


@dataclass(frozen=True)
class Findings:
    """All that one mode found.

    Attributes:
        numbers: counts by name.
        histograms: (title, distances, threshold).
        table: its header and rows; may be empty.
        records: more for report.json, by name.
    """

    numbers: dict[str, float]
    sections: list[Section]
    histograms: list[tuple[str, np.ndarray, float]]
    exclusions: Exclusions
    table: list[tuple[str, ...]] = field(default_factory=list)
    records: dict[str, Any] = field(default_factory=dict)


def closest_images(faces: Faces, person: int, others: Faces, other: int) -> tuple[int, int, float]:
    """The closest images of two people: (row of faces, row of others, distance)."""
    ours, theirs = faces.rows[person], others.rows[other]
    partner, distance = distances.nearest(faces.embeddings[ours], others.embeddings[theirs])
    best = int(distance.argmin())
    return int(ours[best]), int(theirs[partner[best]]), float(distance[best])


def shown(faces: Faces, *lines: Iterable[int]) -> tuple[tuple[tuple[Source, int], ...], ...]:
    """Rows as a finding's pictures."""
    return tuple(tuple((faces.source, int(row)) for row in line) for line in lines)
