"""Interleaved timing: ours and the peer take turns in one process, so that a busy machine is busy for both."""

import importlib.util
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from facenet_jax import command_line
from facenet_jax.errors import BadInput

# What ran before may keep its threads spinning for a moment, ready for more work.
_REST_S = 0.02


@dataclass(frozen=True)
class Case:
    """Medians of interleaved runs, in `unit`; ratio is peer / ours for seconds and MB, ours / peer for rates: above 1 is better."""

    case: str
    ours: float
    peer: float | None
    peer_name: str
    unit: str
    ratio: float | None
    repeats: int


def lower(case: str, ours: float, peer: float | None, peer_name: str, unit: str, repeats: int) -> Case:
    """A case of which less is better: seconds, MB."""
    return Case(case, ours, peer, peer_name, unit, peer / ours if peer is not None and ours > 0 else None, repeats)


def rate(case: str, count: float, ours_s: float, peer_s: float | None, peer_name: str, unit: str, repeats: int) -> Case:
    """A case of `count` things in so many seconds, as things a second."""
    peer = None if peer_s is None else count / peer_s
    return Case(case, count / ours_s, peer, peer_name, unit, None if peer_s is None else peer_s / ours_s, repeats)


def cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_cores(count: int) -> None:
    """Binds this process to `count` cores; 0 leaves it as it is. BadInput where there are fewer.

    The command is started anew in its own place, because libraries count the cores, and start their threads, when they are loaded.
    """
    if count in (0, cores()):
        return
    if count > cores() or not hasattr(os, "sched_setaffinity"):
        raise BadInput(f"--cores={count}: this process may run on {cores()}, and can be bound to fewer on Linux only")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-count:])
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def require(*modules: str) -> None:
    """BadInput, with the line that installs it, where a module cannot be found."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise BadInput(f"{module} is not installed: pip install -r requirements-benchmarks.txt, or leave that peer out")


def check_equal(what: str, ours: Any, peer: Any, tolerance: float) -> None:
    """BadInput where two arrays differ by more than `tolerance` of the peer's Euclidean norm: unequal work is not timed."""
    a, b = (np.asarray(values, np.float64) for values in (ours, peer))
    difference = float(np.linalg.norm(a - b)) / max(float(np.linalg.norm(b)), 1e-30) if a.shape == b.shape else np.inf
    if not difference <= tolerance:
        raise BadInput(
            f"{what}: ours and the peer's differ by {difference:.2g} of the norm, {tolerance:g} is allowed; unequal work is not timed"
        )


def seconds(function: Callable[[], Any]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def interleaved(functions: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[str, float]:
    """Median seconds of each function; they take turns, each after a short rest."""
    for _ in range(warmup):
        for function in functions.values():
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            time.sleep(_REST_S)
            times[name].append(seconds(function))
    return {name: statistics.median(values) for name, values in times.items()}


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of packages and of Python."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _device(packages: tuple[str, ...]) -> str:
    """The processor and how many of its cores were used; the accelerator too where JAX had one."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    text = f"{platform.machine()} {model}, {cores()} of {os.cpu_count()} cores"
    if "jax" in packages:
        import jax

        if jax.default_backend() != "cpu":
            text = f"{jax.devices()[0].device_kind}, {text}"
    return text


def define_flags(repeats: int) -> None:
    """--cores (or --threads), --repeats and --output, which benchmarks beside a peer share."""
    flags.DEFINE_integer("cores", 0, "Bind to so many cores, and every peer to as many threads; 0: all.", lower_bound=0)
    flags.DEFINE_alias("threads", "cores")
    flags.DEFINE_integer("repeats", repeats, "Runs of each case.", lower_bound=1)
    flags.DEFINE_string("output", "", "Where to write the JSON.")


def write(path: str, name: str, cases: list[Case], packages: tuple[str, ...]) -> None:
    """Prints a table and, with a path, writes the benchmark JSON."""
    for case in cases:
        peer = "" if case.peer is None else f"  {case.peer_name} {case.peer:.4g}"
        print(f"{case.case}: ours {case.ours:.4g} {case.unit}{peer}{'' if case.ratio is None else f'  ratio {case.ratio:.2f}'}")
    if path:
        content = {"name": name, "device": _device(packages), "versions": versions(*packages), "cases": [asdict(case) for case in cases]}
        command_line.write_json(Path(path), content)
