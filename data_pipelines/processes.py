"""Work over many files by several processes."""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any


def in_processes(work: Callable[[Any], Any], things: list[Any], processes: int, chunk: int = 8) -> Iterator[Any]:
    """`work` over all, in order, a little ahead of who asks; `work` and `things` must pickle."""
    if processes <= 1:
        yield from map(work, things)
        return
    # Fresh processes: one that forks after JAX has started its threads may hang.
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        # In windows: submitting everything at once would hold every result in memory.
        window = 8 * chunk * processes
        parts = [things[start : start + window] for start in range(0, len(things), window)]
        pending = [pool.map(work, part, chunksize=chunk) for part in parts[:2]]
        for index in range(len(parts)):
            yield from pending.pop(0)
            if index + 2 < len(parts):
                pending.append(pool.map(work, parts[index + 2], chunksize=chunk))
