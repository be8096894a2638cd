"""Interleaved timing: ours and the peer take turns in one process, so that a busy machine is busy for both."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Case:
    """Medians of interleaved runs, in `unit`; ratio is peer / ours for seconds, ours / peer for rates: above 1 is better."""

    case: str
    ours: float
    peer: float | None
    peer_name: str
    unit: str
    ratio: float | None
    repeats: int


def seconds(function: Callable[[], Any]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def interleaved(functions: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[str, float]:
    """Median seconds of each function; they take turns."""
    for _ in range(warmup):
        for function in functions.values():
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
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


def write(path: str, name: str, cases: list[Case], packages: tuple[str, ...]) -> None:
    """Prints a table and, with a path, writes the benchmark JSON."""
    for case in cases:
        peer = "" if case.peer is None else f"  {case.peer_name} {case.peer:.4g}  ratio {case.ratio:.2f}"
        print(f"{case.case}: ours {case.ours:.4g} {case.unit}{peer}")
    if path:
        device = f"{platform.machine()}, {os.cpu_count()} cores"
        content = {"name": name, "device": device, "versions": versions(*packages), "cases": [asdict(case) for case in cases]}
        Path(path).write_text(json.dumps(content, indent=1) + "\n")
