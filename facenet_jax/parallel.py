"""Mesh, shardings, multi-host start-up: the only file that knows about devices."""

import collections
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from facenet_jax.errors import BadInput, one_line_errors, say_error

DATA = "data"


# The first host may write reports for long while the others have finished: only a dead one ends that wait.
_SHUTDOWN_S = 86_400
# The others lose their coordinator with the first process: it lets them say first what they have to say.
_GRACE_S = 3.0
_GONE = (
    "another process of this run is gone, or this one was killed (the lines above say which): start the same command on every host again, "
    "with as many processes as there are hosts then; it goes on from the last checkpoint"
)
_ALONE = "the processes did not join within {} s: start the same command on every host, each with its own --process_index, and see that {} is free and reachable"


def _last_word(text: str) -> subprocess.Popen:
    """A child that says one line unless it hears a farewell. JAX ends a process from within when another one dies, by abort() and a stack trace; no Python
    runs then."""
    script = ["sh", "-c", 'read farewell || printf "error: %s\\n" "$0" >&2', text]
    return subprocess.Popen(script, stdin=subprocess.PIPE, start_new_session=True)


@contextlib.contextmanager
def joined(
    coordinator: str = "", process_count: int = 0, process_index: int = -1, timeout_s: int = 300, heartbeat_s: int = 100
) -> Iterator[None]:
    """The part of a run that many hosts do together. Without arguments it does nothing on one host and asks the TPU environment on a pod.

    At its end it waits for the others. An error ends this process at once, without waiting for hosts that wait for it: bad input in one line and
    exit code 2, as on one host, and so a connection that broke. A process of which nothing was heard for `heartbeat_s` seconds is dead, and the
    others end. Exit code 2 where the hosts do not join within `timeout_s`, or have different numbers of devices.
    """
    if not coordinator and not os.environ.get("TPU_WORKER_HOSTNAMES", "").count(","):
        yield
        return
    if coordinator and (":" not in coordinator or not 0 <= process_index < process_count):
        raise BadInput(f"process {process_index} of {process_count} at {coordinator!r}: give address:port and an index below the count")
    last_word, leader, code, gone = None, process_index == 0, 0, False
    try:
        with one_line_errors():
            _join(coordinator, process_count, process_index, timeout_s, heartbeat_s)
            leader = is_first_process()
            last_word = _last_word(_GONE)
            _meet()
            yield
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else int(done.code is not None)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    # All of them: whatever it is, this process must end without waiting for hosts that wait for it.
    except Exception as error:
        code = 2
        if any(word in str(error) for word in ("Gloo", "NCCL", "coordination service", "UNAVAILABLE")):
            print(str(error).splitlines()[0], file=sys.stderr)
            gone = True
        else:
            traceback.print_exc()
            code = 1
    if code == 0:
        jax.distributed.shutdown()
    if last_word and not gone:
        last_word.communicate(b"farewell\n")
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(_GRACE_S if leader else 0)
        os._exit(code)


def _join(coordinator: str, process_count: int, process_index: int, timeout_s: int, heartbeat_s: int) -> None:
    join = partial(jax.distributed.initialize, coordinator, process_count, process_index) if coordinator else jax.distributed.initialize
    alone = _ALONE.format(timeout_s, coordinator or "the coordinator")

    def give_up() -> None:
        code = say_error(alone)
        time.sleep(_GRACE_S if process_index == 0 else 0)
        os._exit(code)

    # JAX would wait as long and then abort the process from within.
    patience = threading.Timer(timeout_s, give_up)
    patience.daemon = True
    patience.start()
    try:
        join(initialization_timeout=timeout_s + 60, heartbeat_timeout_seconds=heartbeat_s, shutdown_timeout_seconds=_SHUTDOWN_S)
    except (RuntimeError, ValueError) as error:
        raise BadInput(f"{alone} ({str(error).splitlines()[0][:200]})") from None
    finally:
        patience.cancel()
    # JAX has set a handler of its own that would swallow the signal; the training loop sets its own, and before that a signal ends the process.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _meet() -> None:
    # Before the first collective, because a pod that waits for a missing host is otherwise silent.
    print(f"process {jax.process_index()} of {jax.process_count()}, {jax.local_device_count()} devices here", flush=True)
    devices = collections.Counter(device.process_index for device in jax.devices())
    if len(set(devices.values())) > 1:
        each = ", ".join(f"{count} on process {process}" for process, count in sorted(devices.items()))
        raise BadInput(f"the hosts have different numbers of devices ({each}), but each takes an equal share of a batch: make them alike")
    # On CPU the first collective over a set of devices fails where one host comes to it 30 s after another (its compilation took longer, say):
    # the sets that a run uses meet here, while all are at the same place.
    gather("")
    bool(any_process(make_mesh(), False))


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """All devices on one axis, `data`; by default host by host, so that the hosts' rows lie in the batch in order of index."""
    if devices is None:
        devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.asarray(devices), (DATA,))


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


def any_process(mesh: Mesh, flag: bool) -> "jax.Array | bool":
    """True on every host where it is True on one; a collective, so all must ask. Not waited for until its truth is asked."""
    if jax.process_count() == 1:
        return flag
    here = np.full(len(mesh.local_devices), flag)
    return _any(mesh)(jax.make_array_from_process_local_data(batch_sharded(mesh), here))


@lru_cache(2)
def _any(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(jnp.any, out_shardings=replicated(mesh))


def gather(value: Any) -> list[Any]:
    """`value` (anything that JSON holds) of every process, in order; a collective."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.asarray(len(text)))
    rows = multihost_utils.process_allgather(np.pad(text, (0, int(lengths.max()) - len(text))))
    return [json.loads(bytes(row[:length])) for row, length in zip(rows, lengths, strict=True)]


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Bad input that one process meets inside becomes bad input of all, so that none waits for it; all leave it at the same time. No collective inside."""
    problem = ""
    try:
        yield
    except (BadInput, OSError) as error:
        problem = str(error)
        if jax.process_count() == 1:
            raise
    for process, said in enumerate(gather(problem)):
        if said:
            raise BadInput(problem or f"process {process} ends this run: {said}")


def check_alike(here: dict[str, Any]) -> None:
    """BadInput on every process where one has another value than the first for any of these; names the processes and both values."""
    first, *others = everywhere = gather(here)
    keys = sorted(set().union(*everywhere))
    for key in keys:
        differing = [i for i, there in enumerate(others, 1) if there.get(key) != first.get(key)]
        if differing:
            values = ", ".join(f"{others[i - 1].get(key)!r} on process {i}" for i in differing[:8])
            raise BadInput(f"the hosts differ: {key} is {first.get(key)!r} on process 0, {values}; give all of them the same")


def is_first_process() -> bool:
    """True on the one host that writes metrics and reports."""
    return jax.process_index() == 0


def on_mesh(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, for jit, with `summed_over_rows` inside it knowing over which devices the batch is cut."""

    @wraps(function)
    def known(*arguments: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return known


def summed_over_rows(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """`function(*arrays)`, a sum over rows (the arrays' first axis), as each device's sum over its own rows and one sum over devices.

    For loops over rows: before one that it cuts by itself, XLA brings all rows to every device, and each of them goes through all.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return function(*arrays)
    cut = tuple(PartitionSpec(DATA) for _ in arrays)
    local = lambda *own: lax.psum(function(*own), DATA)
    return jax.shard_map(local, in_specs=cut, out_specs=PartitionSpec(), check_vma=False)(*arrays)


# Sets of devices, by index.
Groups = list[list[int]]


def rounds_over(count: int) -> tuple[Groups, ...]:
    """Two rounds in which `count` devices reach each other, as rows and columns of the squarest table of them; one where there is no table."""
    width = next((n for n in range(math.isqrt(count), 1, -1) if count % n == 0), 0)
    if not width:
        return ([list(range(count))],)
    return [list(range(i, i + width)) for i in range(0, count, width)], [list(range(i, count, width)) for i in range(width)]


def gather_rows(rows: jax.Array, rounds: Sequence[Groups | None]) -> jax.Array:
    """Inside shard_map: the rows of all devices, in order."""
    for groups in rounds:
        rows = lax.all_gather(rows, DATA, axis_index_groups=groups, tiled=True)
    return rows


def scatter_rows(rows: jax.Array, rounds: Sequence[Groups | None]) -> jax.Array:
    """Inside shard_map: this device's rows of the sum of all devices' arrays."""
    for groups in reversed(rounds):
        rows = lax.psum_scatter(rows, DATA, scatter_dimension=0, axis_index_groups=groups, tiled=True)
    return rows


def map_rows(
    mesh: Mesh, function: Callable[..., tuple[Any, Any, jax.Array]], embeddings: jax.Array, *rest: jax.Array
) -> tuple[Any, jax.Array]:
    """Runs `function` on each device's rows against the rows of all devices; one gather, one scatter.

    `function(own [n, d], first_row, all [N, d], *rest)` returns (sums, gradient of own rows [n, d], gradient of all rows
    [N, d]): the sums are added over devices, and what it says of remote rows is added to their owners' gradients.
    `rest` is replicated. Returns (sums, gradient [N, d] cut like the embeddings).
    """

    # In one round XLA writes a scatter over a TPU's torus, and a gather over 64 chips and more, as a sum over all of them: twice the traffic.
    rounds = rounds_over(mesh.size) if mesh.devices.flat[0].platform == "tpu" else (None,)

    def local(own: jax.Array, *rest: jax.Array) -> tuple[Any, jax.Array]:
        everything = gather_rows(own, rounds)
        sums, own_gradient, all_gradient = function(own, lax.axis_index(DATA) * own.shape[0], everything, *rest)
        return lax.psum(sums, DATA), own_gradient + scatter_rows(all_gradient, rounds)

    cut, whole = PartitionSpec(DATA), PartitionSpec()
    run = partial(jax.shard_map, mesh=mesh, in_specs=(cut, *(whole for _ in rest)), out_specs=(whole, cut), check_vma=False)
    return run(local)(embeddings, *rest)
