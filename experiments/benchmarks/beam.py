"""Beam's direct runner with two workers beside one: `python -m experiments.benchmarks.beam --input=photographs [--images=300] [--output=F.json]`.

`data_pipelines.prepare_beam --align` on the first photographs of --input, from the command to the finished records, so starting workers and compiling
count; programs are in the compilation cache before the clock starts. Workers compute on one thread each. Both must write the same content.
Needs `pip install -r requirements-beam.txt` and as many free cores as workers.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from absl import flags

from data_pipelines.importers.layouts import photographs
from experiments.benchmarks import timing
from facenet_jax import command_line
from facenet_jax.errors import BadInput

FLAGS = flags.FLAGS


def copy(source: Path, folder: Path, count: int) -> int:
    """The first photographs of a collection as a folder per person; how many there are."""
    wanted = photographs(source)[:count]
    for photograph in wanted:
        path = folder / f"{photograph.key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photograph.read())
    return len(wanted)


def prepared(source: Path, output: Path, workers: int) -> str:
    """Prepares records with so many workers; the hash of their content."""
    command = [sys.executable, "-m", "data_pipelines.prepare_beam", "--align", f"--input={source}", f"--output={output}"]
    done = subprocess.run([*command, f"--processes={workers}", "--reject_limit=1"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BadInput(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
    return json.loads((output / "metadata.json").read_text())["content_sha256"]


def main(_: list[str]) -> None:
    """Command line."""
    if not FLAGS.input:
        raise BadInput("--input is needed: photographs in any layout of docs/data.md")
    timing.use_cores(FLAGS.cores)
    if FLAGS.workers > timing.cores():
        raise BadInput(f"{FLAGS.workers} workers need as many cores; {timing.cores()} are to be had")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        count = copy(Path(FLAGS.input), folder / "photographs", FLAGS.images)
        hashes: list[str] = []

        def run(workers: int) -> None:
            hashes.append(prepared(folder / "photographs", folder / f"records{len(hashes)}", workers))

        times = timing.interleaved({"ours": lambda: run(FLAGS.workers), "one": lambda: run(1)}, FLAGS.repeats)
    if len(set(hashes)) > 1:
        raise BadInput("one and more workers wrote different records: unequal work is not timed")
    case = f"prepare_beam --align, {count} photographs, {FLAGS.workers} workers"
    cases = [timing.rate(case, count, times["ours"], times["one"], "one worker", "images/s", FLAGS.repeats)]
    timing.write(FLAGS.output, "beam", cases, ("apache-beam", "jax", "jaxlib", "opencv-python-headless", "numpy"))


if __name__ == "__main__":
    flags.DEFINE_string("input", "", "Photographs in any layout of docs/data.md.")
    flags.DEFINE_integer("images", 300, "Photographs a run.", lower_bound=1)
    flags.DEFINE_integer("workers", 2, "Workers beside one.", lower_bound=2)
    timing.define_flags(repeats=3)
    command_line.run(main)
