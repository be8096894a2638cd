"""Mesh, shardings, multi-host start-up: the only file that knows about devices."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from facenet_jax.errors import BadInput

DATA = "data"


def start_distributed(coordinator: str = "", process_count: int = 0, process_index: int = -1, timeout_s: int = 300) -> None:
    """Joins the hosts of a run. Without arguments it does nothing on one host and asks the TPU environment on a pod.

    Prints who joined before the first collective, because a pod that waits for a missing host is otherwise silent.
    """
    if coordinator:
        jax.distributed.initialize(coordinator, process_count, process_index, initialization_timeout=timeout_s)
    elif os.environ.get("TPU_WORKER_HOSTNAMES", "").count(","):
        jax.distributed.initialize(initialization_timeout=timeout_s)
    if jax.process_count() > 1:
        print(f"process {jax.process_index()} of {jax.process_count()}, {jax.local_device_count()} devices here", flush=True)


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """All devices on one axis, `data`."""
    return Mesh(np.asarray(jax.devices() if devices is None else devices), (DATA,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """The first axis cut over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def check_divides(mesh: Mesh, batch: int, pieces: int = 1) -> None:
    """Raises where a global batch cannot be cut evenly over the devices, each device's rows into `pieces` micro-batches."""
    if pieces < 1 or batch % (mesh.size * pieces):
        micro = f" in {pieces} micro-batches" if pieces != 1 else ""
        raise BadInput(f"a batch of {batch} images does not divide over {mesh.size} devices{micro}: change people x images_per_person")


def to_global(mesh: Mesh, host_batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This host's rows (the same number on every host) as arrays cut over the whole mesh, hosts in order of index."""
    sharding = batch_sharded(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in host_batch.items()}


def any_process(flag: bool) -> bool:
    """True on every host where it is True on one; a collective, so all must ask."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def wait_for_all(what: str) -> None:
    """Returns when every host has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def is_first_process() -> bool:
    """True on the one host that writes metrics and reports."""
    return jax.process_index() == 0


def map_rows(
    mesh: Mesh, function: Callable[..., tuple[Any, Any, jax.Array]], embeddings: jax.Array, *rest: jax.Array
) -> tuple[Any, jax.Array]:
    """Runs `function` on each device's rows against the rows of all devices; one gather, one scatter.

    `function(own [n, d], first_row, all [N, d], *rest)` returns (sums, gradient of own rows [n, d], gradient of all rows
    [N, d]): the sums are added over devices, and what it says of remote rows is added to their owners' gradients.
    `rest` is replicated. Returns (sums, gradient [N, d] cut like the embeddings).
    """

    def local(own: jax.Array, *rest: jax.Array) -> tuple[Any, jax.Array]:
        everything = lax.all_gather(own, DATA, tiled=True)
        sums, own_gradient, all_gradient = function(own, lax.axis_index(DATA) * own.shape[0], everything, *rest)
        scattered = lax.psum_scatter(all_gradient, DATA, scatter_dimension=0, tiled=True)
        return lax.psum(sums, DATA), own_gradient + scattered

    cut, whole = PartitionSpec(DATA), PartitionSpec()
    run = partial(jax.shard_map, mesh=mesh, in_specs=(cut, *(whole for _ in rest)), out_specs=(whole, cut), check_vma=False)
    return run(local)(embeddings, *rest)
