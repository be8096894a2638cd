"""One mining pass, forward and backward, beside pytorch-metric-learning: `taskset -c 0 python -m experiments.benchmarks.mining`.

Same embeddings, rule and margin, taking turns in one process. The peer needs `pip install pytorch-metric-learning torch`; --nopeer leaves it out.
"""

import resource

import numpy as np
from absl import flags

from experiments.benchmarks import timing
from facenet_jax import command_line
from facenet_jax.errors import BadInput

FLAGS = flags.FLAGS


def _ours(rows: np.ndarray, labels: np.ndarray, images: int):
    import jax
    import jax.numpy as jnp

    from facenet_jax import parallel
    from facenet_jax.losses.triplet import Triplet, mined_triplet_loss

    mesh = parallel.make_mesh()
    settings = Triplet("semi_hard", 0.2, FLAGS.block, images)
    mask = jnp.ones(len(labels), bool)
    step = jax.jit(jax.value_and_grad(lambda e: mined_triplet_loss(e, jnp.asarray(labels), mask, jnp.uint32(0), mesh, settings)[0]))
    embeddings = jnp.asarray(rows)
    return lambda: jax.block_until_ready(step(embeddings))


def _peer(rows: np.ndarray, labels: np.ndarray):
    try:
        import torch
        from pytorch_metric_learning import losses, miners
    except ImportError as error:
        raise BadInput(f"{error}: pip install torch pytorch-metric-learning, or --nopeer") from None
    torch.set_num_threads(1)
    miner = miners.TripletMarginMiner(margin=0.2, type_of_triplets="semihard")
    loss = losses.TripletMarginLoss(margin=0.2)

    def run() -> None:
        embeddings = torch.tensor(rows, requires_grad=True)
        target = torch.tensor(labels)
        loss(embeddings, target, miner(embeddings, target)).backward()

    return run


def main(_: list[str]) -> None:
    """Command line."""
    cases = []
    for text in FLAGS.sizes:
        n = int(text)
        images = 40 if n % 40 == 0 else 30 if n % 30 == 0 else 32
        rng = np.random.default_rng(0)
        rows = rng.normal(size=(n, 128)).astype(np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        labels = np.tile(np.arange(n // images), images)
        functions = {"ours": _ours(rows, labels, images)}
        if FLAGS.peer and n <= 1800:
            functions["peer"] = _peer(rows, labels)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        functions["ours"]()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        found = timing.interleaved(functions, FLAGS.repeats)
        peer = found.get("peer")
        name = f"N={n} K={images}, {grown:.0f} MB more at the first call"
        cases.append(
            timing.Case(name, found["ours"], peer, "pytorch-metric-learning", "s", peer / found["ours"] if peer else None, FLAGS.repeats)
        )
    timing.write(FLAGS.output, "mining", cases, ("jax", "torch", "pytorch-metric-learning"))


if __name__ == "__main__":
    flags.DEFINE_list("sizes", ["450", "900", "1800", "4096", "8192", "16384"], "Rows of the batches.")
    flags.DEFINE_integer("block", 256, "Anchors at a time.", lower_bound=1)
    flags.DEFINE_bool("peer", True, "Time pytorch-metric-learning too, up to 1,800 rows.")
    flags.DEFINE_integer("repeats", 3, "Runs of each case.", lower_bound=1)
    flags.DEFINE_string("output", "", "Where to write the JSON.")
    command_line.run(main)
