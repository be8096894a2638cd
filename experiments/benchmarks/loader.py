"""Records to host batches beside simplejpeg alone on the same bytes: `python -m experiments.benchmarks.loader --records=data/celeba`."""

import os
import statistics
from concurrent.futures import ProcessPoolExecutor

import simplejpeg
from absl import flags

from data_pipelines import loader, sampling, sources
from data_pipelines.transforms import Transforms
from experiments.benchmarks import timing
from facenet_jax import command_line
from facenet_jax.errors import BadInput

FLAGS = flags.FLAGS


def _decode(pictures: list[bytes]) -> int:
    for picture in pictures:
        simplejpeg.decode_jpeg(picture, "RGB")
    return len(pictures)


def steady_rate(source: sources.Source, sampler: sampling.ShuffledSampler, settings: Transforms, count: int) -> float:
    """Images/s after the workers have started: the clock runs from the fourth batch a worker on, when what they made ahead is used up."""
    ahead = 4 * FLAGS.processes
    batches = loader.batches(source, sampler, settings, 0, stop=count + ahead, workers=FLAGS.processes)
    for _ in range(ahead):
        next(batches)
    return sampler.rows * count / timing.seconds(lambda: [None for _ in batches])


def main(arguments: list[str]) -> None:
    """Command line."""
    if not FLAGS.records:
        raise BadInput("--records is needed")
    source = sources.open_source(FLAGS.records, FLAGS.split)
    rows, count = 120, FLAGS.images // 120
    sampler = sampling.ShuffledSampler(source.labels, rows)
    size = int(simplejpeg.decode_jpeg_header(source.image(0))[0])
    pictures = [[source.image(int(i)) for i in sampler.batch(number)] for number in range(count)]
    augmented = Transforms(
        FLAGS.size, crop=FLAGS.crop, shift=5, zoom=0.08, flip=True, rotation=5.0, brightness=0.15, contrast=0.2, grey=0.1
    )

    with ProcessPoolExecutor(FLAGS.processes) as pool:
        alone = lambda: sum(pool.map(_decode, pictures))
        alone()
        cases = []
        for name, settings in (("whole pictures", Transforms(size)), ("as celeba_triplet trains", augmented)):
            ours, peer = [], []
            for _ in range(FLAGS.repeats):
                ours.append(steady_rate(source, sampler, settings, count))
                peer.append(rows * count / timing.seconds(alone))
            rate, alone_rate = statistics.median(ours), statistics.median(peer)
            case = f"{name}, {FLAGS.processes} processes"
            cases.append(timing.Case(case, rate, alone_rate, "simplejpeg alone", "images/s", rate / alone_rate, FLAGS.repeats))
    timing.write(FLAGS.output, "loader", cases, ("grain", "simplejpeg", "opencv-python-headless", "numpy"))


if __name__ == "__main__":
    flags.DEFINE_string("records", "", "Directory of records.")
    flags.DEFINE_string("split", "train", "Split of the records.")
    flags.DEFINE_integer("images", 12000, "Images a run.", lower_bound=1200)
    flags.DEFINE_integer("size", 48, "Side of the batches' images.")
    flags.DEFINE_integer("crop", 112, "Side of the cut.")
    flags.DEFINE_integer("processes", os.cpu_count() or 1, "Worker processes, the same number for both.")
    flags.DEFINE_integer("repeats", 3, "Runs of each case.", lower_bound=1)
    flags.DEFINE_string("output", "", "Where to write the JSON.")
    command_line.run(main)
