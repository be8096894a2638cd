"""`data_pipelines.prepare` as an Apache Beam pipeline: `python -m data_pipelines.prepare_beam --align --input=photographs --output=records/faces`.

The flags of `prepare`, the same records, byte for byte. Beam's own options come after `--`: `-- --runner=FlinkRunner --flink_master=...`; without them
Beam's direct runner starts --processes workers on this machine, each on one core's worth of threads. Needs `pip install -r requirements-beam.txt`.
"""

import os
from importlib.util import find_spec
from pathlib import Path

from absl import flags

from data_pipelines import prepare, records
from facenet_jax import command_line
from facenet_jax.errors import BadInput

FLAGS = flags.FLAGS
# Workers that share a machine must not each start threads for all of its cores: JAX's, OpenCV's, NumPy's.
_ONE_THREAD = {"PJRT_NPROC": "1", "OPENCV_FOR_THREADS_NUM": "1", "OMP_NUM_THREADS": "1"}


def direct(workers: int) -> list[str]:
    """Options of Beam's direct runner with so many processes."""
    return ["--runner=FnApiRunner", "--direct_running_mode=multi_processing", f"--direct_num_workers={workers}"]


def main(arguments: list[str]) -> None:
    """Command line."""
    if find_spec("apache_beam") is None:
        raise BadInput("prepare_beam needs Apache Beam: pip install -r requirements-beam.txt")
    from apache_beam.options.pipeline_options import PipelineOptions

    from data_pipelines import beam_steps

    options = arguments[1:]
    if strays := [option for option in options if not option.startswith("-")]:
        raise BadInput(f"{strays[0]!r} is not a flag; Beam's options are --name=value, after --")
    if not any(option.startswith(("--runner", "--direct_")) for option in options):
        os.environ.update(_ONE_THREAD | os.environ)
        options = [*direct(FLAGS.processes), *options]
    job = prepare.job_of_flags()
    _, split_of = prepare.splits_of(job.found, FLAGS.validation_people, FLAGS.split)
    steps = beam_steps.Job(
        input=str(Path(FLAGS.input).resolve()),
        layout=FLAGS.layout,
        exclude=tuple(str(Path(path).resolve()) for path in FLAGS.exclude),
        listing=beam_steps.listing_of(job.found),
        settings=job.settings,
        detection=job.detection,
        crops=(str(Path(FLAGS.crops).resolve()), FLAGS.crops_key) if FLAGS.crops else None,
        split=FLAGS.split,
        held_out=FLAGS.validation_people,
        shards=tuple(prepare.shards_of(job.found, split_of, FLAGS.images_per_shard).items()),
        aside=str(records.working_folder(job.output.resolve())),
        name=job.output.name,
    )
    metadata, counters = beam_steps.run(steps, job.output, PipelineOptions(options), FLAGS.reject_limit, job.alignment)
    prepare.tell(metadata, counters=counters)


if __name__ == "__main__":
    prepare.define_flags()
    command_line.run(main, positional=True)
