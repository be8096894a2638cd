"""Verification of pairs by the LFW protocol: the threshold chosen on nine folds, tested on the tenth.

NumPy in, plain dataclasses out. Two modes. "exact" (default): thresholds are the observed distances themselves, VAL comes from the true step function.
"original": davidsandberg/facenet's grids and interpolation (src/facenet.py, src/lfw.py), to compare with its published figures.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from facenet_jax.errors import BadInput
from facenet_jax.evaluation.original import interpolated_threshold

ACCURACY_GRID = np.arange(0, 4, 0.01)
VAL_GRID = np.arange(0, 4, 0.001)


@dataclass(frozen=True)
class Pairs:
    """first, second: keys of images [p]; same: [p] bool; fold: [p] int, 0..folds-1."""

    first: np.ndarray
    second: np.ndarray
    same: np.ndarray
    fold: np.ndarray

    def __len__(self) -> int:
        return len(self.same)

    @property
    def folds(self) -> int:
        """Number of folds."""
        return int(self.fold.max()) + 1 if len(self) else 0


def read_pairs(path: Path) -> Pairs:
    """LFW's pairs.txt: "10 300", then per fold 300 lines `name i j` and 300 lines `name i other j`.

    Keys are `name/name_0001`. BadInput names the line that is not of this form, or a wrong count.
    """
    try:
        lines = [(number, line.split()) for number, line in enumerate(path.read_text().splitlines(), 1) if line.strip()]
    except UnicodeDecodeError:
        raise BadInput(f"{path}: not a text file") from None
    try:
        folds, count = (int(word) for word in lines[0][1])
    except (ValueError, IndexError):
        raise BadInput(f"{path}: the first line must be 'folds pairs', as in LFW's pairs.txt: '10 300'") from None
    if folds < 2 or count < 1:
        raise BadInput(f"{path}: its first line promises {folds} folds of {count} pairs of each kind; at least 2 of 1 are needed")
    first, second, same = [], [], []
    for number, words in lines[1:]:
        try:
            name, i, other, j = words if len(words) != 3 else (words[0], words[1], words[0], words[2])
            first.append(f"{name}/{name}_{int(i):04d}")
            second.append(f"{other}/{other}_{int(j):04d}")
        except (ValueError, IndexError):
            raise BadInput(f"{path}: line {number} is neither 'name i j' nor 'name i other j'") from None
        same.append(len(words) == 3)
    if len(same) != folds * count * 2:
        raise BadInput(
            f"{path}: {len(same)} pairs, but its first line promises {folds} x 2 x {count}; a missing pair would shift every later fold"
        )
    return Pairs(np.asarray(first), np.asarray(second), np.asarray(same), np.repeat(np.arange(folds), 2 * count))


# Of a fold that pairs are drawn from: 32 million pairs to choose from.
_MOST_IMAGES = 8192


def draw_pairs(keys: np.ndarray, labels: np.ndarray, folds: int = 10, per_fold: int = 300, seed: int = 0) -> Pairs:
    """Pairs of an own set of people by LFW's rule: people are cut into folds, each with `per_fold` same and as many different pairs.

    No pair comes twice, unless a fold has fewer than it needs.
    """
    rng = np.random.default_rng(seed)
    chosen, same = [], []
    people = rng.permutation(np.unique(labels))
    for fold in np.array_split(people, folds):
        rows = np.flatnonzero(np.isin(labels, fold))
        if len(rows) > _MOST_IMAGES:
            # All pairs are listed below; whole people, so that same pairs stay.
            counts = np.cumsum([(labels == person).sum() for person in fold])
            rows = np.flatnonzero(np.isin(labels, fold[: max(2, int((counts <= _MOST_IMAGES).sum()))]))
        one, other = (rows[side] for side in np.triu_indices(len(rows), 1))
        for alike in (True, False):
            candidates = np.flatnonzero((labels[one] == labels[other]) == alike)
            if not len(candidates):
                raise BadInput(f"{len(people)} people are too few for {folds} folds of pairs: each fold needs 2 people, one with 2 images")
            picked = rng.choice(candidates, per_fold, replace=len(candidates) < per_fold)
            chosen.append(np.stack([one[picked], other[picked]], 1))
            same += [alike] * per_fold
    first, second = np.concatenate(chosen).T
    return Pairs(keys[first], keys[second], np.asarray(same), np.repeat(np.arange(folds), 2 * per_fold))


def distances(a: np.ndarray, b: np.ndarray, distance: str) -> np.ndarray:
    """Of rows: "squared" L2, or "cosine": the angle over pi, in 0..1. Zero rows are at 1/2 from everything."""
    if distance == "squared":
        return np.square(a - b).sum(1)
    if distance != "cosine":
        raise BadInput(f"no distance named {distance!r}; there are squared, cosine")
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = (a * b).sum(1) / np.where(norms > 0, norms, 1)
    return np.arccos(np.clip(cosine, -1, 1)) / math.pi


def _mean(first: np.ndarray, second: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return np.concatenate([first[rows], second[rows]]).mean(0)


def tested_distances(
    first: np.ndarray, second: np.ndarray, fold: np.ndarray, *, distance: str, mean_subtraction: bool, present: np.ndarray
) -> np.ndarray:
    """Each pair's distance [p] as it is when its own fold is tested: the one that its fold's threshold belongs to."""
    first, second = first.astype(np.float64), second.astype(np.float64)
    if not mean_subtraction:
        return distances(first, second, distance)
    tested = np.empty(len(fold))
    for k in range(int(fold.max()) + 1):
        mean, test = _mean(first, second, (fold != k) & present), fold == k
        tested[test] = distances(first[test] - mean, second[test] - mean, distance)
    return tested


@dataclass(frozen=True)
class Verification:
    """What the protocol says. Rates in 0..1; std is the population's over folds, sem the standard error of the mean (std / sqrt(folds - 1),
    which is the sample deviation over sqrt(folds)); missing counts pairs that lack an image and were scored as wrong."""

    pairs: int
    folds: int
    missing: int
    mode: str
    distance: str
    mean_subtraction: bool
    accuracy: float
    accuracy_std: float
    accuracy_sem: float
    fold_accuracies: list[float]
    fold_thresholds: list[float]
    val: float
    val_std: float
    far: float
    far_target: float
    fold_val_thresholds: list[float]
    auc: float
    eer: float

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return asdict(self)


def _best_threshold(d: np.ndarray, same: np.ndarray, mode: str) -> float:
    """The threshold of highest accuracy, accepting d < threshold; the lowest at a tie."""
    order = np.argsort(d, kind="stable")
    ordered, ordered_same = d[order], same[order]
    accepted_same = np.concatenate([[0], np.cumsum(ordered_same)])
    accepted_different = np.concatenate([[0], np.cumsum(~ordered_same)])
    right = accepted_same + ((~same).sum() - accepted_different)
    if mode == "original":
        below = np.searchsorted(ordered, ACCURACY_GRID, side="left")
        return float(ACCURACY_GRID[np.argmax(right[below])])
    # A cut between equal distances cannot be made: only the first of each run of equals is a threshold.
    possible = np.concatenate([[True], ordered[1:] > ordered[:-1], [True]])
    cut = int(np.argmax(np.where(possible, right, -1)))
    low = ordered[cut - 1] if cut else ordered[0] - 1e-6
    high = ordered[cut] if cut < len(ordered) else ordered[-1] + 1e-6
    # Half-way, so that a rounding error on either side changes nothing.
    return float((low + high) / 2) if low < (low + high) / 2 else float(high)


def _val_threshold(d: np.ndarray, same: np.ndarray, target: float, mode: str) -> float:
    """Exact: the largest threshold whose FAR (share of different pairs with d < threshold) is at most the target."""
    different = np.sort(d[~same])
    if mode == "exact":
        allowed = math.floor(target * len(different) + 1e-9)
        return float(different[allowed]) if allowed < len(different) else math.inf
    far = np.searchsorted(different, VAL_GRID, side="left") / len(different)
    return interpolated_threshold(far, VAL_GRID, target)


def roc(d: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(false-accept rate, true-accept rate) at every distinct distance, from (0, 0) to (1, 1)."""
    order = np.argsort(d, kind="stable")
    last = np.concatenate([d[order][1:] > d[order][:-1], [True]])
    true = np.cumsum(same[order])[last] / max(same.sum(), 1)
    false = np.cumsum(~same[order])[last] / max((~same).sum(), 1)
    return np.concatenate([[0.0], false]), np.concatenate([[0.0], true])


def equal_error_rate(far: np.ndarray, tar: np.ndarray) -> float:
    """Where false accepts equal false rejects, on the line between the two nearest points of the curve."""
    gap = far - (1 - tar)
    high = int(np.argmax(gap >= 0))
    if high == 0:
        return float(far[0])
    share = -gap[high - 1] / (gap[high] - gap[high - 1])
    return float(far[high - 1] + share * (far[high] - far[high - 1]))


def verify(
    first: np.ndarray,
    second: np.ndarray,
    same: np.ndarray,
    fold: np.ndarray,
    *,
    distance: str = "squared",
    mean_subtraction: bool = False,
    far_target: float = 1e-3,
    mode: str = "exact",
    present: np.ndarray | None = None,
) -> Verification:
    """Runs the protocol.

    Args:
        first, second: [p, d] embeddings of the two images of each pair.
        same: [p] bool; fold: [p] int.
        mean_subtraction: subtract the mean embedding of the training folds before measuring.
        present: [p] bool, False where an image is missing: such a pair takes no part in choosing thresholds and counts as wrong.
    """
    if mode not in ("exact", "original"):
        raise BadInput(f"no mode named {mode!r}; there are exact, original")
    if mode == "exact":
        first, second = first.astype(np.float64), second.astype(np.float64)
    present = np.ones(len(same), bool) if present is None else present
    if not np.isfinite(first[present]).all() or not np.isfinite(second[present]).all():
        raise BadInput("embeddings hold NaN or infinity")
    folds = int(fold.max()) + 1
    if folds < 2:
        raise BadInput("the protocol needs at least 2 folds")
    if not 0 <= far_target < 1:
        raise BadInput(f"the FAR target must be in [0, 1), not {far_target:g}")
    for k in range(folds):
        if not (same & (fold == k)).any() or not (~same & (fold == k) & present).any():
            raise BadInput(f"fold {k} has no same pair, or no different pair whose images are there")
    plain = distances(first, second, distance)
    rows: list[tuple[float, float, float, float, float]] = []
    for k in range(folds):
        train, test = (fold != k) & present, fold == k
        d = plain
        if mean_subtraction:
            mean = _mean(first, second, train)
            d = distances(first - mean, second - mean, distance)
        if same[train].all() or not same[train].any():
            raise BadInput(f"the folds other than {k} have only one kind of pair")
        threshold = _best_threshold(d[train], same[train], mode)
        right = present[test] & ((d[test] < threshold) == same[test])
        val_threshold = _val_threshold(d[train], same[train], far_target, mode)
        accepted = (d < val_threshold) & present
        here_different = test & present & ~same
        rows.append(
            (float(right.mean()), threshold, float(accepted[test & same].mean()), float(accepted[here_different].mean()), val_threshold)
        )
    accuracies, thresholds, vals, fars, val_thresholds = (list(column) for column in zip(*rows, strict=True))
    curve = roc(plain[present], same[present])
    return Verification(
        pairs=len(same),
        folds=folds,
        missing=int((~present).sum()),
        mode=mode,
        distance=distance,
        mean_subtraction=mean_subtraction,
        accuracy=float(np.mean(accuracies)),
        accuracy_std=float(np.std(accuracies)),
        accuracy_sem=float(np.std(accuracies) / math.sqrt(folds - 1)),
        fold_accuracies=accuracies,
        fold_thresholds=thresholds,
        val=float(np.mean(vals)),
        val_std=float(np.std(vals)),
        far=float(np.mean(fars)),
        far_target=far_target,
        fold_val_thresholds=val_thresholds,
        auc=float(np.trapezoid(curve[1], curve[0])),
        eer=equal_error_rate(*curve),
    )


def original_curves(
    first: np.ndarray, second: np.ndarray, same: np.ndarray, fold: np.ndarray, *, distance: str, mean_subtraction: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The original code's mean true- and false-positive rate at each point of its accuracy grid, [400] each."""
    rates = []
    for k in range(int(fold.max()) + 1):
        train, test = fold != k, fold == k
        mean = _mean(first, second, train) if mean_subtraction else 0
        d = distances(first[test] - mean, second[test] - mean, distance)
        accepted = d[:, None] < ACCURACY_GRID
        rates.append((accepted[same[test]].mean(0), accepted[~same[test]].mean(0)))
    true, false = np.mean(rates, 0)
    return true, false
