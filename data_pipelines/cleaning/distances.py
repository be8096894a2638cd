"""Squared distances between many embeddings, block by block: 65,738 x 512 against themselves in a few tens of megabytes.

Blocks are float32 matrix products; what they find is measured again in float64, so that a pair is found by its distance alone, whatever the block.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_pipelines.embeddings import read_embeddings
from facenet_jax.errors import BadInput

BLOCK = 2048
MOST_PAIRS = 2_000_000
# Above what float32 sums lose on unit rows of some thousand values.
_SLACK = 1e-3
_ROWS = 8192


def read_directions(path: Path) -> tuple[np.ndarray, np.ndarray, str]:
    """(embeddings [n, d] float32 of unit length, keys [n], weights fingerprint) of a file by `experiments.embed`; BadInput where one has no direction."""
    found = read_embeddings(path)
    embeddings, keys = found.embeddings, found.keys
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    unusable = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if len(unusable):
        raise BadInput(f"{path}: {len(unusable)} embeddings have no direction (zero or not finite), the first is {keys[unusable[0]]}")
    return (embeddings / lengths).astype(np.float32), keys, found.fingerprint


def between(x: np.ndarray, first: np.ndarray, y: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Squared distances [p] float64 of x[first[i]] and y[second[i]]; x [n, d], y [m, d]."""
    starts = range(0, len(first), _ROWS)
    parts = [((x[first[s : s + _ROWS]].astype(np.float64) - y[second[s : s + _ROWS]]) ** 2).sum(1) for s in starts]
    return np.concatenate(parts) if parts else np.zeros(0)


def centres(x: np.ndarray, rows: Sequence[np.ndarray]) -> np.ndarray:
    """Mean embeddings [p, d] float64 of groups of rows; not of unit length."""
    return np.stack([x[group].mean(0, dtype=np.float64) for group in rows])


def unit(x: np.ndarray) -> np.ndarray:
    """Rows [n, d] float32 of unit length; a row of zeros stays one."""
    return (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def close_pairs(x: np.ndarray, threshold: float, block: int = BLOCK, most: int = MOST_PAIRS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs of rows closer than the threshold: (first [p] < second [p], squared distance [p] float64), ordered by first, then second.

    x [n, d] float32 of unit length. BadInput where there are more than `most`.
    """
    found: list[tuple[np.ndarray, np.ndarray]] = []
    count, least = 0, 1 - (threshold + _SLACK) / 2
    for i in tqdm(range(0, len(x), block), desc="compare", unit="block", mininterval=2, disable=len(x) <= 4 * block):
        for j in range(i, len(x), block):
            first, second = np.nonzero(x[i : i + block] @ x[j : j + block].T > least)
            upper = first + i < second + j
            found.append((first[upper] + i, second[upper] + j))
            count += int(upper.sum())
            if count > most:
                raise BadInput(f"more than {most:,} pairs are closer than a threshold of {threshold:g}: give a lower one")
    first, second = (np.concatenate([pair[side] for pair in found] or [np.zeros(0, np.int64)]) for side in (0, 1))
    distance = between(x, first, x, second)
    near = np.flatnonzero(distance < threshold)
    near = near[np.lexsort((second[near], first[near]))]
    return first[near], second[near], distance[near]


def nearest(x: np.ndarray, y: np.ndarray, block: int = BLOCK, but_itself: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """For every row of x [n, d] the closest of y [m, d], m > 0: (row [n] int64, squared distance [n] float64). Rows are float32 of unit length.

    `but_itself` is for y that is x: no row is its own closest (m > 1).
    """
    best = np.full(len(x), -np.inf, np.float32)
    row = np.zeros(len(x), np.int64)
    for i in tqdm(range(0, len(x), block), desc="compare", unit="block", mininterval=2, disable=len(x) <= 4 * block):
        part = slice(i, i + block)
        for j in range(0, len(y), block):
            dots = x[part] @ y[j : j + block].T
            if but_itself and i == j:
                np.fill_diagonal(dots, -np.inf)
            at = dots.argmax(1)
            value = dots[np.arange(len(dots)), at]
            better = value > best[part]
            best[part][better] = value[better]
            row[part][better] = at[better] + j
    return row, between(x, np.arange(len(x)), y, row)


def thin(order: Iterable[int], pairs: Iterable[tuple[int, int, float]]) -> dict[int, tuple[int, float]]:
    """Keeps, in the given order, whatever has no pair (one, other, distance) with one that is kept: {dropped: (its nearest kept one, distance)}."""
    partners: dict[int, list[tuple[float, int]]] = {}
    for one, other, apart in pairs:
        partners.setdefault(one, []).append((apart, other))
        partners.setdefault(other, []).append((apart, one))
    kept: set[int] = set()
    dropped: dict[int, tuple[int, float]] = {}
    for item in order:
        twins = [partner for partner in partners.get(item, ()) if partner[1] in kept]
        if twins:
            dropped[item] = min(twins)[::-1]
        else:
            kept.add(item)
    return dropped
