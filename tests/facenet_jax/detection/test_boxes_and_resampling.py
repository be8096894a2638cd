"""Boxes and resampling against NumPy and OpenCV."""

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facenet_jax.detection import boxes, resample
from tests.references import mtcnn_one_by_one as reference

some = settings(max_examples=25, deadline=None)
suppress = jax.jit(boxes.suppress, static_argnums=(2, 3))


@some
@given(st.integers(0, 2**32 - 1), st.integers(0, 24), st.booleans())
def test_suppression_keeps_what_a_loop_keeps(seed, count, of_smaller):
    rng = np.random.default_rng(seed)
    corner = rng.integers(0, 40, (24, 2))
    box = np.concatenate([corner, corner + rng.integers(1, 30, (24, 2))], 1).astype(np.float32)
    score = np.arange(24, 0, -1).astype(np.float32) / 24
    score[count:] = -np.inf
    kept = np.asarray(suppress(box[None], score[None], 0.5, of_smaller))[0]
    expected = reference.suppress(np.concatenate([box[:count], score[:count, None]], 1), 0.5, of_smaller)
    assert sorted(np.flatnonzero(kept)) == sorted(expected)


def test_rows_of_a_batch_do_not_disturb_each_other():
    rng = np.random.default_rng(0)
    corner = rng.integers(0, 30, (5, 16, 2))
    box = np.concatenate([corner, corner + rng.integers(5, 30, (5, 16, 2))], -1).astype(np.float32)
    score = -np.sort(-rng.random((5, 16)).astype(np.float32))
    score[2] = -np.inf  # a photograph without boxes goes through the same loop
    together = np.asarray(suppress(box, score, 0.5, False))
    for row in range(5):
        np.testing.assert_array_equal(together[row], np.asarray(suppress(box[row : row + 1], score[row : row + 1], 0.5, False))[0])
    assert not together[2].any()


def test_square_and_regress():
    rng = np.random.default_rng(0)
    box = rng.integers(1, 50, (20, 4)).astype(np.float32)
    box[:, 2:] += box[:, :2]
    shift = rng.normal(size=(20, 4)).astype(np.float32)
    np.testing.assert_allclose(boxes.square(box), reference.squared(box), rtol=1e-6)
    for plus in (0, 1):
        np.testing.assert_allclose(boxes.regress(box, shift, inclusive=bool(plus)), reference.moved(box, shift, plus), rtol=1e-5)


@pytest.mark.parametrize("size", [(50, 64), (64, 41), (33, 33), (20, 500)])
@pytest.mark.parametrize("scale", [0.6, 0.4254, 0.31, 1.0, 1.7])
def test_pyramid_levels_are_opencvs(size, scale):
    """Bytes equal to OpenCV's but for a few that round the other way."""
    rng = np.random.default_rng(1)
    photograph = rng.integers(0, 256, (*size, 3), np.uint8)
    canvas = np.zeros((64, max(64, size[1] + 9), 3), np.uint8)
    canvas[: size[0], : size[1]] = photograph
    out = int(np.ceil(size[0] * scale)), int(np.ceil(size[1] * scale))
    columns, _ = resample.running_sums(canvas[None])
    room = (out[0] + 5, out[1] + 3)
    level = np.asarray(jax.jit(resample.shrink, static_argnums=(3, 4))(columns[:, 0], jnp.asarray(size), jnp.asarray(out), room, scale))[
        : out[0], : out[1]
    ]
    expected = cv2.resize(photograph, out[::-1], interpolation=cv2.INTER_AREA).astype(int)
    assert np.abs(level - expected).max() <= 1
    # Enlarging, OpenCV rounds its weights to 11 bits.
    assert (level != expected).mean() < (0.005 if scale <= 1 else 0.1)


def by_columns(photographs, owner, box, side):
    columns, _ = resample.running_sums(photographs)
    return resample.crops_by_columns(columns, owner, box, side)


def by_sums(photographs, owner, box, side):
    _, corners = resample.running_sums(photographs)
    return jax.vmap(lambda owner, box: resample.crop_by_sums(photographs, corners, owner, box, side))(owner, box)


WAYS = {"columns": jax.jit(by_columns, static_argnums=3), "sums": jax.jit(by_sums, static_argnums=3)}


@pytest.mark.parametrize("way", WAYS)
@some
@given(st.integers(0, 2**32 - 1), st.sampled_from([24, 48]))
def test_crops_are_opencvs_with_black_outside(way, seed, side):
    rng = np.random.default_rng(seed)
    photographs = rng.integers(0, 256, (2, 60, 80, 3), np.uint8)
    corner = rng.integers(-20, 50, (6, 2))
    extent = rng.integers(8, 90, (6, 1))
    box = np.concatenate([corner, corner + extent + rng.integers(0, 2, (6, 2))], 1).astype(np.int32)
    # A box that misses its photograph comes up in the original as an error.
    box[:, :2] = np.minimum(box[:, :2], [79, 59])
    box[:, 2:] = np.maximum(np.maximum(box[:, 2:], 2), box[:, :2] + 1)
    owner = rng.integers(0, 2, 6).astype(np.int32)
    found = np.asarray(WAYS[way](photographs, owner, box, side))
    for index in range(6):
        expected = reference.cut(photographs[owner[index]], box[index], side)
        np.testing.assert_allclose(found[index], expected, atol=0.005)


@pytest.mark.parametrize("way", WAYS)
def test_sums_that_pass_two_to_the_31(way):
    """A white photograph of 3,000 x 3,000: the sum over it does not fit an int32, boxes of it are white all the same."""
    photographs = np.full((1, 3000, 3000, 3), 255, np.uint8)
    box = np.asarray([[2000, 2000, 2999, 2999], [1, 1, 3000, 3000]], np.int32)
    found = np.asarray(WAYS[way](photographs, np.zeros(2, np.int32), box, 24))
    np.testing.assert_allclose(found, 255, atol=0.01)
