"""The LFW protocol on 6,000 pairs of 512-d embeddings: `python -m experiments.benchmarks.evaluator`."""

import numpy as np
from absl import flags

from experiments.benchmarks import timing
from facenet_jax import command_line
from facenet_jax.evaluation import pairs

FLAGS = flags.FLAGS


def main(_: list[str]) -> None:
    """Command line."""
    rng = np.random.default_rng(0)
    same = np.tile(np.repeat([True, False], 300), 10)
    first = rng.normal(size=(6000, 512)).astype(np.float32)
    second = np.where(same[:, None], first + 1.2 * rng.normal(size=first.shape), rng.normal(size=first.shape)).astype(np.float32)
    fold = np.repeat(np.arange(10), 600)
    runs = {
        f"{distance}, {'mean subtracted' if mean else 'plain'}, {mode}": (
            lambda d=distance, m=mean, o=mode: pairs.verify(first, second, same, fold, distance=d, mean_subtraction=m, mode=o)
        )
        for distance in ("squared", "cosine")
        for mean in (False, True)
        for mode in ("exact", "original")
    }
    medians = timing.interleaved(runs, FLAGS.repeats)
    cases = [timing.Case(name, value, None, "", "s", None, FLAGS.repeats) for name, value in medians.items()]
    timing.write(FLAGS.output, "evaluator", cases, ("numpy",))


if __name__ == "__main__":
    flags.DEFINE_integer("repeats", 5, "Runs of each case.", lower_bound=1)
    flags.DEFINE_string("output", "", "Where to write the JSON.")
    command_line.run(main)
