"""Finding faces beside the `mtcnn` package (TensorFlow): `python -m experiments.benchmarks.detect --photographs=lfw.tar --cores=1 [--output=F.json]`.

The same decoded photographs, thresholds and smallest face; ours as `detection.create("mtcnn")` takes them, the package one by one and in batches of
--batch (which it needs of one size). --also=tests.references.mtcnn_in_sessions:create adds the original's way, a photograph at a time. Boxes are compared first: unequal work is not timed. `pip install -r requirements-benchmarks.txt mtcnn lz4`.
"""

import importlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import flags

from data_pipelines import images
from data_pipelines.importers.folders import folders
from experiments.benchmarks import timing
from facenet_jax import command_line, detection
from facenet_jax.apps import pretrained
from facenet_jax.errors import BadInput

FLAGS = flags.FLAGS
# As davidsandberg/facenet; the package's own defaults are 0.6, 0.7, 0.8.
_THRESHOLDS = {"threshold_pnet": 0.6, "threshold_rnet": 0.7, "threshold_onet": 0.7}


def package() -> Callable[[list[np.ndarray], int], list[list[dict]]]:
    """The peer: (photographs, batch) -> its findings for each."""
    timing.require("tensorflow", "mtcnn")
    from mtcnn import MTCNN

    tensorflow = importlib.import_module("tensorflow")
    tensorflow.config.threading.set_intra_op_parallelism_threads(timing.cores())
    tensorflow.config.threading.set_inter_op_parallelism_threads(1)
    peer = MTCNN(device="CPU:0")

    def run(photographs: list[np.ndarray], batch: int) -> list[list[dict]]:
        if batch == 1:
            return [peer.detect_faces(photograph, **_THRESHOLDS) for photograph in photographs]
        parts = [photographs[start : start + batch] for start in range(0, len(photographs), batch)]
        return [found for part in parts for found in peer.detect_faces(part, batch_stack_justification="center", **_THRESHOLDS)]

    return run


def also(name: str) -> Callable[[list[np.ndarray]], list[list[dict]]]:
    """Another peer, made by module:function (cores) -> (photograph -> (boxes [n, 5], points)): photographs -> its findings, as the package's."""
    module, _, function = name.partition(":")
    timing.require("tensorflow")
    detect = getattr(importlib.import_module(module), function)(timing.cores())
    return lambda photographs: [[{"confidence": box[4]} for box in detect(photograph)[0]] for photograph in photographs]


def agree(ours: list[detection.Faces], theirs: list[list[dict]]) -> float:
    """Share of the photographs on which both find as many faces with a score over 0.95."""
    same = [int((a.scores > 0.95).sum()) == sum(b["confidence"] > 0.95 for b in found) for a, found in zip(ours, theirs, strict=True)]
    return float(np.mean(same))


def main(_: list[str]) -> None:
    """Command line."""
    if not FLAGS.photographs:
        raise BadInput("--photographs is needed: a folder of folders, zip or tar")
    timing.use_cores(FLAGS.cores)
    pretrained.fetch("mtcnn")
    listed = folders(Path(FLAGS.photographs))
    step = max(len(listed) // FLAGS.images, 1)
    photographs = [images.open_photograph(p.read()) for p in listed[::step][: FLAGS.images]]
    ours = detection.create("mtcnn")
    peers: dict[str, Callable[[], list[list[dict]]]] = {}
    if FLAGS.peer:
        peer = package()
        peers["mtcnn package, one by one"] = lambda: peer(photographs, 1)
        if len({p.shape for p in photographs}) == 1:
            peers[f"mtcnn package, batches of {FLAGS.batch}"] = lambda: peer(photographs, FLAGS.batch)
    if FLAGS.also:
        other = also(FLAGS.also)
        peers[FLAGS.also.partition(":")[0].rpartition(".")[2]] = lambda: other(photographs)
    for how, find in peers.items():
        share = agree(ours(photographs), find())
        print(f"ours and {how} find as many faces on {share:.1%} of {len(photographs)} photographs", flush=True)
        if share < 0.9:
            raise BadInput("findings differ on more than a tenth of the photographs; unequal work is not timed")
    functions: dict[str, Callable[[], object]] = {"ours": lambda: ours(photographs), **peers}
    times = timing.interleaved(functions, FLAGS.repeats)
    mine = times.pop("ours")
    name, count = Path(FLAGS.photographs).name, len(photographs)
    cases = [
        timing.rate(f"{count} of {name}", count, mine, seconds, how, "photographs/s", FLAGS.repeats) for how, seconds in times.items()
    ] or [timing.rate(f"{count} of {name}", count, mine, None, "", "photographs/s", FLAGS.repeats)]
    timing.write(FLAGS.output, "detect", cases, ("jax", "mtcnn", "tensorflow-cpu", "numpy"))


if __name__ == "__main__":
    flags.DEFINE_string("photographs", "", "Folder of folders, zip or tar.")
    flags.DEFINE_integer("images", 128, "How many, evenly spaced.", lower_bound=1)
    flags.DEFINE_integer("batch", 16, "The package's batch.", lower_bound=2)
    flags.DEFINE_bool("peer", True, "Also the mtcnn package.")
    flags.DEFINE_string("also", "", "Another peer, module:function.")
    timing.define_flags(repeats=3)
    command_line.run(main)
