"""The LFW protocol from PAPER.md's words, by loops over every threshold that could matter."""

import itertools
import math

import numpy as np


def distance(a, b, kind):
    if kind == "squared":
        return sum((float(x) - float(y)) ** 2 for x, y in zip(a, b, strict=True))
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    norm = math.sqrt(sum(float(x) ** 2 for x in a)) * math.sqrt(sum(float(x) ** 2 for x in b))
    return math.acos(max(-1.0, min(1.0, dot / norm))) / math.pi


def protocol(first, second, same, fold, kind, subtract_mean, far_target):
    """(accuracies, vals, fars) by fold. Threshold: between two neighbouring training distances, the lowest of the most accurate.

    VAL: share of same pairs of the test fold below the largest threshold at which the training folds' FAR is within the target.
    """
    accuracies, vals, fars = [], [], []
    for k in sorted(set(fold)):
        train = [i for i in range(len(same)) if fold[i] != k]
        test = [i for i in range(len(same)) if fold[i] == k]
        mean = 0.0
        if subtract_mean:
            mean = np.concatenate([first[train], second[train]]).astype(np.float64).mean(0)
        d = [distance(first[i].astype(np.float64) - mean, second[i].astype(np.float64) - mean, kind) for i in range(len(same))]
        values = sorted({d[i] for i in train})
        candidates = [values[0] - 1e-6] + [(x + y) / 2 for x, y in itertools.pairwise(values)] + [values[-1] + 1e-6]
        right = [sum((d[i] < t) == same[i] for i in train) for t in candidates]
        best = candidates[right.index(max(right))]
        accuracies.append(sum((d[i] < best) == same[i] for i in test) / len(test))
        different = [d[i] for i in train if not same[i]]
        allowed = [t for t in [*sorted(different), math.inf] if sum(x < t for x in different) / len(different) <= far_target + 1e-12]
        limit = max(allowed)
        mine = [i for i in test if same[i]]
        others = [i for i in test if not same[i]]
        vals.append(sum(d[i] < limit for i in mine) / len(mine))
        fars.append(sum(d[i] < limit for i in others) / len(others))
    return accuracies, vals, fars
