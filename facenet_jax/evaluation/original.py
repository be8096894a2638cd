"""Quirks of the original code's evaluation, kept so that its published figures can be reproduced digit by digit."""

from collections.abc import Sequence

import numpy as np

# NumPy's introsort leaves runs of 16 or fewer to insertion sort.
_SMALL = 15


def unstable_order(values: Sequence[float]) -> np.ndarray:
    """The permutation that NumPy's scalar quicksort (argsort before SIMD) gives, ties in its own order.

    The original interpolates its VAL threshold with scipy 1.2's interp1d, which sorts the FAR curve by this sort. The curve is a staircase, so the
    thresholds of one step come back shuffled, and which of them is used decides the last digits of VAL.
    """
    order = list(range(len(values)))
    pending: list[tuple[int, int]] = []
    low, high = 0, len(values) - 1

    def swap(i: int, j: int) -> None:
        order[i], order[j] = order[j], order[i]

    def less(i: int, j: int) -> bool:
        return values[order[i]] < values[order[j]]

    while True:
        while high - low > _SMALL:
            middle = low + ((high - low) >> 1)
            for i, j in ((middle, low), (high, middle), (middle, low)):
                if less(i, j):
                    swap(i, j)
            pivot = values[order[middle]]
            i, j = low, high - 1
            swap(middle, j)
            while True:
                i += 1
                while values[order[i]] < pivot:
                    i += 1
                j -= 1
                while pivot < values[order[j]]:
                    j -= 1
                if i >= j:
                    break
                swap(i, j)
            swap(i, high - 1)
            larger, smaller = ((i + 1, high), (low, i - 1)) if i - low < high - i else ((low, i - 1), (i + 1, high))
            pending.append(larger)
            low, high = smaller
        order[low : high + 1] = sorted(order[low : high + 1], key=lambda position: values[position])
        if not pending:
            return np.asarray(order)
        low, high = pending.pop()


def interpolated_threshold(far: np.ndarray, grid: np.ndarray, target: float) -> float:
    """The threshold where the FAR curve [t] over the grid [t] meets the target, by straight lines; 0 where it never does."""
    if far.max() < target:
        return 0.0
    order = unstable_order(far.tolist())
    x, y = far[order], grid[order]
    high = int(np.searchsorted(x, target, side="right"))
    if high == len(x):
        return float(y[np.searchsorted(x, x[-1], side="left")])
    low = high - 1
    return float(y[low] + (target - x[low]) / (x[high] - x[low]) * (y[high] - y[low]))
