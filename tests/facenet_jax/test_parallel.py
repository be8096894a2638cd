"""Rows gathered and scattered in rounds, as over a TPU's torus, against one round over all devices."""

from itertools import chain

import jax
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from facenet_jax import parallel


@pytest.mark.parametrize(("devices", "rounds"), [(1, 1), (3, 1), (4, 2), (6, 2), (8, 2)])
def test_rounds_bring_the_rows_of_one_round(devices, rounds):
    mesh = parallel.make_mesh(jax.devices()[:devices])
    found_rounds = parallel.rounds_over(devices)
    assert len(found_rounds) == rounds
    cut = PartitionSpec(parallel.DATA)
    run = lambda function, x: jax.jit(jax.shard_map(function, mesh=mesh, in_specs=cut, out_specs=cut, check_vma=False))(x)
    # Each device holds 5 rows to gather, and 5 for every device to scatter; whole numbers, whose sums no order changes.
    own = np.random.default_rng(0).integers(-99, 99, (5 * devices, 3)).astype(np.float32)
    given = np.random.default_rng(1).integers(-99, 99, (5 * devices * devices, 3)).astype(np.float32)
    np.testing.assert_array_equal(run(lambda x: parallel.gather_rows(x, found_rounds), own), np.tile(own, (devices, 1)))
    found = run(lambda x: parallel.scatter_rows(x, found_rounds), given)
    np.testing.assert_array_equal(found, given.reshape(devices, 5 * devices, 3).sum(0))
    np.testing.assert_array_equal(found, run(lambda x: lax.psum_scatter(x, parallel.DATA, tiled=True), given))


def test_rounds_are_the_rows_and_columns_of_a_table():
    rows, columns = parallel.rounds_over(32)
    assert [len(rows), len(columns)] == [8, 4]
    assert sorted(chain(*rows)) == sorted(chain(*columns)) == list(range(32))
    assert all(len(set(row) & set(column)) == 1 for row in rows for column in columns)
