"""Pairs and neighbours, block by block, against all distances at once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.cleaning import distances
from facenet_jax.errors import BadInput
from tests.data_pipelines.cleaning.planted import all_distances, normalised, rows


@settings(max_examples=80, deadline=None)
@given(x=rows(), block=st.integers(1, 20), threshold=st.sampled_from([1e-6, 0.01, 0.3, 1.0, 4.0]))
def test_close_pairs(x, block, threshold):
    """Every pair below the threshold and no other, whatever the block."""
    expected = all_distances(x, x)
    first, second = np.nonzero(np.triu(expected < threshold, 1))
    found = distances.close_pairs(x, threshold, block)
    np.testing.assert_array_equal(found[0], first)
    np.testing.assert_array_equal(found[1], second)
    np.testing.assert_allclose(found[2], expected[first, second], rtol=1e-12, atol=1e-15)


def test_too_many_close_pairs():
    x = np.ones((40, 1), np.float32)
    assert len(distances.close_pairs(x, 0.1, 7, most=780)[0]) == 780
    with pytest.raises(BadInput, match=r"more than 779 pairs are closer than a threshold of 0\.1"):
        distances.close_pairs(x, 0.1, 7, most=779)


@settings(max_examples=60, deadline=None)
@given(x=rows(), y=rows(1), block=st.integers(1, 20))
def test_nearest(x, y, block):
    """The least distance; of rows that are equally near to float32's rounding any may be named."""
    y = np.resize(y, (len(y), x.shape[1])) if y.shape[1] != x.shape[1] else y
    y = normalised(y + 1e-3)
    expected = all_distances(x, y)
    row, distance = distances.nearest(x, y, block)
    np.testing.assert_allclose(distance, expected[np.arange(len(x)), row], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(distance, expected.min(1, initial=9), atol=2e-6)


@settings(max_examples=40, deadline=None)
@given(x=rows(2), block=st.integers(1, 20))
def test_nearest_other(x, block):
    expected = all_distances(x, x)
    np.fill_diagonal(expected, np.inf)
    row, distance = distances.nearest(x, x, block, but_itself=True)
    assert (row != np.arange(len(x))).all()
    np.testing.assert_allclose(distance, expected.min(1), atol=2e-6)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 15), seed=st.integers(0, 2**32 - 1), share=st.floats(0, 1))
def test_thin(n, seed, share):
    """No two that are kept are a pair; what goes has its nearest kept partner named; who comes first is kept before its partners."""
    rng = np.random.default_rng(seed)
    apart = np.triu(rng.random((n, n)), 1)
    first, second = np.nonzero((apart > 0) & (apart < share))
    order = rng.permutation(n).tolist()
    dropped = distances.thin(order, zip(first.tolist(), second.tolist(), apart[first, second].tolist()))
    both = apart + apart.T
    kept = []
    for item in order:
        twins = [(both[item, other], other) for other in kept if both[item, other] < share]
        assert (item in dropped) == bool(twins)
        if twins:
            assert dropped[item] == min(twins)[::-1]
        else:
            kept.append(item)
