"""One mining pass, forward and backward, beside pytorch-metric-learning: `python -m experiments.benchmarks.mining --cores=1 [--output=F.json]`.

Both sides get the same unit rows, 40 a person, and take every semi-hard triplet (d(a, p) < d(a, n) < d(a, p) + 0.2, squared distances; the peer cannot
choose the nearest negative of each pair), the mean over them and its gradient, taking turns in one process. Loss and gradient must agree before
anything is timed. The paper's rule (each pair with its nearest semi-hard negative), which training uses, is timed alone beside it. Memory is the
highest resident size over what a fresh process held before its first pass, compilation included. The last line is the exponent of N that our
times grow with. The peer stops at --peer_limit rows (it needs 6 GB for 1,800); --nopeer leaves it out.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments.benchmarks import timing
from facenet_jax import command_line
from facenet_jax.errors import BadInput

FLAGS = flags.FLAGS
MARGIN, IMAGES, DIMENSIONS = 0.2, 40, 128
EVERY, NEAREST = "every_semi_hard", "semi_hard"
TOLERANCE = 1e-4

Pass = Callable[[], tuple[Any, Any]]


def data(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows [count, 128] float32 and labels: 40 a person, the last one fewer, in no order. A person's rows lie a little together."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(count) // IMAGES)
    rows = rng.normal(size=(labels.max() + 1, DIMENSIONS))[labels] + 2.0 * rng.normal(size=(count, DIMENSIONS))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), labels.astype(np.int32)


def make_ours(count: int, rule: str, block: int) -> Pass:
    """Our pass: (loss, gradient [count, 128])."""
    import jax
    import jax.numpy as jnp

    from facenet_jax import parallel
    from facenet_jax.losses.triplet import Triplet, mined_triplet_loss

    rows, labels = data(count)
    mesh = parallel.make_mesh(jax.devices()[:1])
    settings = Triplet(rule, MARGIN, block, IMAGES)
    mask = jnp.ones(count, bool)
    step = jax.jit(jax.value_and_grad(lambda e: mined_triplet_loss(e, jnp.asarray(labels), mask, jnp.uint32(0), mesh, settings)[0]))
    embeddings = jax.block_until_ready(jnp.asarray(rows))
    return lambda: jax.block_until_ready(step(embeddings))


def make_peer(count: int) -> Pass:
    """The peer's pass over the same rows."""
    import torch
    from pytorch_metric_learning import distances, losses, miners

    torch.set_num_threads(timing.cores())
    # Squared, and of the rows as they are: its own defaults take the root, and normalise once more.
    squared = distances.LpDistance(normalize_embeddings=False, p=2, power=2)
    miner = miners.TripletMarginMiner(margin=MARGIN, type_of_triplets="semihard", distance=squared)
    loss = losses.TripletMarginLoss(margin=MARGIN, distance=squared)
    rows, labels = (torch.tensor(array) for array in data(count))

    def run() -> tuple[Any, Any]:
        embeddings = rows.clone().requires_grad_(True)
        value = loss(embeddings, labels, miner(embeddings, labels))
        value.backward()
        return value.detach(), embeddings.grad

    return run


def check_equal(count: int, ours: Pass, peer: Pass) -> None:
    """The same loss and the same gradient."""
    for name, mine, other in zip(("loss", "gradient"), ours(), peer(), strict=True):
        timing.check_equal(f"{name} of {count} rows", mine, other, TOLERANCE)


def _resident(field: str) -> float:
    """MB, out of Linux's own account of this process: VmRSS now, VmHWM at the highest."""
    found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else float("nan")


def growth(make: Callable[[], Pass]) -> float:
    """MB that the first pass took, at the highest, over what the process held before it. Only a fresh process tells."""
    run = make()
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def measured_apart(who: str, count: int, block: int) -> float:
    """`growth` in a process of its own."""
    command = [sys.executable, "-m", "experiments.benchmarks.mining", f"--memory_of={who}", f"--sizes={count}", f"--block={block}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BadInput(f"memory of {who} at {count} rows could not be measured: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
    return float(json.loads(done.stdout.splitlines()[-1])["megabytes"])


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """Slope of log seconds over log rows, least squares."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def measure(sizes: list[int], peer_limit: int, block: int, repeats: int, memory: bool = True) -> list[timing.Case]:
    """Seconds and MB for every number of rows, then the exponent over the rows from 900 on (fewer are mostly overhead)."""
    cases, took = [], {}
    for count in sizes:
        functions = {NEAREST: make_ours(count, NEAREST, block), EVERY: make_ours(count, EVERY, block)}
        with_peer = count <= peer_limit
        if with_peer:
            functions["peer"] = make_peer(count)
            check_equal(count, functions[EVERY], functions["peer"])
            # Compiles it, as that compiled the other: large sizes have no round to warm up.
            functions[NEAREST]()
        found = timing.interleaved(functions, repeats, warmup=0 if with_peer and count > 1000 else 1)
        took[count] = found[NEAREST]
        name = f"N={count}, K={IMAGES}, {timing.cores()} cores"
        library = "pytorch-metric-learning"
        cases.append(timing.lower(f"{name}, every semi-hard triplet", found[EVERY], found.get("peer"), library, "s", repeats))
        cases.append(timing.lower(f"{name}, nearest semi-hard", found[NEAREST], None, "", "s", repeats))
        if memory:
            peer = measured_apart("peer", count, block) if with_peer else None
            cases.append(timing.lower(f"{name}, memory", measured_apart("ours", count, block), peer, library, "MB", 1))
    large = [count for count in took if count >= 900]
    if len(large) > 1:
        value = exponent(large, [took[count] for count in large])
        cases.append(timing.Case(f"exponent of N, {large[0]} to {large[-1]}", value, None, "", "1", None, repeats))
    return cases


def main(_: list[str]) -> None:
    """Command line."""
    timing.use_cores(FLAGS.cores)
    sizes = [int(text) for text in FLAGS.sizes if text.isdecimal()]
    if len(sizes) < len(FLAGS.sizes) or min(sizes, default=0) <= IMAGES:
        raise BadInput(f"--sizes={','.join(FLAGS.sizes)}: numbers above {IMAGES}, so that there is more than one person")
    if FLAGS.memory_of:
        make = (lambda: make_ours(sizes[0], EVERY, FLAGS.block)) if FLAGS.memory_of == "ours" else (lambda: make_peer(sizes[0]))
        print(json.dumps({"megabytes": growth(make)}))
        return
    if FLAGS.peer:
        timing.require("torch", "pytorch_metric_learning")
    cases = measure(sizes, FLAGS.peer_limit if FLAGS.peer else 0, FLAGS.block, FLAGS.repeats, FLAGS.memory)
    timing.write(FLAGS.output, "mining", cases, ("jax", "jaxlib", "torch", "pytorch-metric-learning"))


if __name__ == "__main__":
    flags.DEFINE_list("sizes", ["450", "900", "1800", "4096", "8192", "16384"], "Rows of the batches.")
    flags.DEFINE_integer("block", 256, "Anchors at a time.", lower_bound=1)
    flags.DEFINE_bool("peer", True, "Time pytorch-metric-learning too.")
    flags.DEFINE_integer("peer_limit", 1800, "The most rows the peer gets.", lower_bound=0)
    flags.DEFINE_bool("memory", True, "Measure memory too, in processes of its own.")
    flags.DEFINE_enum("memory_of", "", ["", "ours", "peer"], "Only print the memory of one pass of --sizes rows.")
    timing.define_flags(repeats=3)
    command_line.run(main)
