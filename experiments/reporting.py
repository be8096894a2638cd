"""From an evaluation to report.html: finds the worst pairs' pictures and the people for the map."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines import loader
from data_pipelines.sources import Source
from facenet_jax import command_line
from facenet_jax.evaluation.pairs import Pairs, Verification, tested_distances
from facenet_jax.report import page

_SHOWN = ("flip", "weights_fingerprint", "records_hash", "seconds")


def read_metrics(path: Path | None) -> tuple[dict[str, Any], ...]:
    """The lines of metrics.jsonl that are whole; none without a file."""
    if path is None or not path.exists():
        return ()
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return tuple(lines)


def write(
    path: Path,
    title: str,
    found: Verification,
    source: Source | None,
    embeddings: np.ndarray,
    pairs: Pairs,
    first: np.ndarray,
    second: np.ndarray,
    *,
    present: np.ndarray | None = None,
    identities: np.ndarray | None = None,
    metrics: Path | None = None,
    details: dict[str, Any] | None = None,
) -> None:
    """Writes the page. embeddings [n, d]; first, second [p] rows of them; without a source the mistakes have no pictures and are left out."""
    present = np.ones(len(pairs), bool) if present is None else present
    d = tested_distances(
        embeddings[first], embeddings[second], pairs.fold, distance=found.distance, mean_subtraction=found.mean_subtraction, present=present
    )
    mistakes = []
    if source is not None:
        where = np.flatnonzero(present)
        for group in page.worst_pairs(d[where], pairs.same[where], pairs.fold[where], found.fold_thresholds):
            for i in where[group]:
                pictures = (loader.load_pixels(source, int(first[i])), loader.load_pixels(source, int(second[i])))
                threshold = found.fold_thresholds[pairs.fold[i]]
                mistakes.append(
                    page.Mistake(*pictures, bool(pairs.same[i]), float(d[i]), threshold, f"{pairs.first[i]}, {pairs.second[i]}")
                )
    rows = np.unique(np.concatenate([first[present], second[present]]))
    names = identities if source is None else source.identities[source.labels]
    people = np.asarray([], np.str_) if names is None else names[rows]
    shown = {name: f"{value:.0f}" if isinstance(value, float) else str(value) for name, value in (details or {}).items() if name in _SHOWN}
    page.write(
        path,
        page.Report(
            title,
            found,
            d[present],
            pairs.same[present],
            tuple(mistakes),
            read_metrics(metrics),
            embeddings[rows] if len(people) else embeddings[:0],
            people,
            command_line.command(),
            shown,
        ),
    )
