"""What command lines share, where no command's own test shows it."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, threading
import numpy as np
from facenet_jax import command_line

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(25 << 20, np.float32)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if {keep}:
    command_line.keep_freed_memory()
# XLA runs a step in a thread of its own.
for _ in range(3):
    found = []
    thread = threading.Thread(target=lambda: found.append(faults()))
    thread.start()
    thread.join()
print(found[0])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_freed_memory_is_kept():
    again = {
        keep: int(subprocess.run([sys.executable, "-c", FAULTS.format(keep=keep)], capture_output=True, text=True, check=True).stdout)
        for keep in (False, True)
    }
    # 100 MiB: 25,600 pages, or 50 huge ones where the system gives those.
    assert again[False] >= 50 and again[True] < 10, again
