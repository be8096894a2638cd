"""Triplet mining by loops over all triplets, float64."""

import numpy as np


def hash32(a: int, b: int) -> int:
    """The documented mix of two 32-bit numbers, in Python integers."""
    mask = 0xFFFFFFFF
    x = ((a * 0x9E3779B1) & mask) ^ b
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & mask
    return ((x ^ (x >> 13)) * 0xC2B2AE35) & mask


def select(embeddings: np.ndarray, labels: np.ndarray, mask: np.ndarray, rule: str, margin: float, draw: int) -> list[tuple[int, int, int]]:
    """The (anchor, positive, negative) that the rule takes, one by one."""
    n = len(labels)
    d = np.square(embeddings[:, None].astype(np.float64) - embeddings[None]).sum(-1)
    chosen: list[tuple[int, int, int]] = []
    for a in range(n):
        if not mask[a]:
            continue
        positives = [p for p in range(n) if p != a and mask[p] and labels[p] == labels[a]]
        negatives = [x for x in range(n) if mask[x] and labels[x] != labels[a]]
        if rule == "violating":
            positives = [p for p in positives if p > a]
        if rule == "batch_hard" and positives:
            positives = [max(positives, key=lambda p: (d[a, p], -p))]
        if rule == "easy_positive" and positives:
            positives = [min(positives, key=lambda p: (d[a, p], p))]
        for p in positives:
            if rule in ("semi_hard", "semi_hard_random", "every_semi_hard", "easy_positive"):
                allowed = [x for x in negatives if d[a, p] < d[a, x] < d[a, p] + margin]
            elif rule in ("violating", "batch_all"):
                allowed = [x for x in negatives if d[a, x] < d[a, p] + margin]
            else:
                allowed = negatives
            if not allowed:
                continue
            if rule in ("batch_all", "every_semi_hard"):
                chosen += [(a, p, x) for x in allowed]
            elif rule in ("semi_hard_random", "violating"):
                seed = hash32(draw ^ a, p)
                chosen.append((a, p, max(allowed, key=lambda x: (hash32(x, seed) | 1, -x))))
            else:
                chosen.append((a, p, min(allowed, key=lambda x: (d[a, x], x))))
    return chosen


def loss_and_gradient(embeddings: np.ndarray, triplets: list[tuple[int, int, int]], margin: float) -> tuple[float, np.ndarray]:
    """Mean hinge over the triplets and its gradient [n, d], float64; zeros where there are none."""
    e = embeddings.astype(np.float64)
    total, gradient = 0.0, np.zeros_like(e)
    for a, p, x in triplets:
        value = np.square(e[a] - e[p]).sum() - np.square(e[a] - e[x]).sum() + margin
        if value > 0:
            total += value
            gradient[a] += 2 * (e[x] - e[p])
            gradient[p] += 2 * (e[p] - e[a])
            gradient[x] += 2 * (e[a] - e[x])
    count = max(len(triplets), 1)
    return total / count, gradient / count
