"""Work over many files by several processes."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any

from facenet_jax.errors import BadInput


def end_with_parent() -> None:
    """For a worker, at its start: those of a killed process would wait for work forever."""

    def wait() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


def in_processes(work: Callable[[Any], Any], things: list[Any], processes: int, chunk: int = 8, ahead: int = 16) -> Iterator[Any]:
    """`work` over all, in order, `ahead` chunks of each process (even) ahead of who asks; `work` and `things` must pickle.

    BadInput where a process was killed.
    """
    if processes <= 1:
        yield from map(work, things)
        return
    try:
        # Fresh processes: one that forks after JAX has started its threads may hang.
        with ProcessPoolExecutor(processes, get_context("spawn"), end_with_parent) as pool:
            # In windows: submitting everything at once would hold every result in memory.
            window = ahead // 2 * chunk * processes
            parts = [things[start : start + window] for start in range(0, len(things), window)]
            pending = [pool.map(work, part, chunksize=chunk) for part in parts[:2]]
            for index in range(len(parts)):
                yield from pending.pop(0)
                if index + 2 < len(parts):
                    pending.append(pool.map(work, parts[index + 2], chunksize=chunk))
    except BrokenProcessPool:
        raise BadInput("a worker process was killed, mostly for lack of memory: run again with fewer --processes") from None
