"""The train step compiled for 1 to many chips: `python -m experiments.benchmarks.scaling --topologies=v5e:1x1,v5e:4x4,v5e:16x16 --output=F.json --plot=F.png`.

The same rows a chip everywhere; nothing is run: predicted images/s from FLOPs, memory traffic and collectives of the compiled program and the chip's
public peaks (experiments/roofline.py). Efficiency is the predicted rate a chip, of the rate of the smallest topology. Needs requirements-aot.txt.
"""

from pathlib import Path
from typing import Any

from absl import flags

from experiments import aot_compile
from facenet_jax import command_line
from facenet_jax.errors import BadInput

FLAGS = flags.FLAGS


def efficiencies(found: list[dict[str, Any]]) -> list[float]:
    """Predicted images/s a chip, as a share of the first topology's; BadInput where there is no prediction."""
    if found[0]["predicted_images_per_s"] is None:
        raise BadInput(f"no efficiency without a prediction: {found[0]['not_counted'][0]}")
    first = found[0]["predicted_images_per_s"] / found[0]["chips"]
    return [entry["predicted_images_per_s"] / entry["chips"] / first for entry in found]


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Predicted images/s and efficiency against chips."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chips = [entry["chips"] for entry in found]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4))
    left.loglog(chips, [entry["predicted_images_per_s"] for entry in found], "o-", base=2)
    left.set(xlabel="chips", ylabel="predicted images/s", xticks=chips, xticklabels=chips)
    right.semilogx(chips, efficiencies(found), "o-", base=2)
    right.set(xlabel="chips", ylabel="efficiency", ylim=(0, 1.05), xticks=chips, xticklabels=chips)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(
        f"{found[0]['topology'].split(':')[0]}, {found[0]['global_batch'] // found[0]['chips']} images a chip: compiled, not run"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(_: list[str]) -> None:
    """Command line."""
    if not FLAGS.topologies:
        raise BadInput("--topologies is needed, e.g. v5e:1x1,v5e:2x2,v5e:4x4")
    settings = [f"--rows_per_device={FLAGS.rows_per_device}", *FLAGS.setting]
    found = aot_compile.compile_all(FLAGS.config, FLAGS.topologies, settings, FLAGS.output)
    found.sort(key=lambda entry: entry["chips"])
    for entry, efficiency in zip(found, efficiencies(found), strict=True):
        print(f"{entry['topology']}: {entry['chips']} chips, {entry['predicted_images_per_s']:.0f} images/s, efficiency {efficiency:.3f}")
    if FLAGS.plot:
        plot(found, Path(FLAGS.plot))


if __name__ == "__main__":
    flags.DEFINE_string("config", "experiments/configs/facenet.py", "Config file.")
    flags.DEFINE_list("topologies", [], "E.g. v5e:1x1,v5e:2x2,v5e:4x4,v5e:8x8,v5e:16x16.")
    flags.DEFINE_multi_string("setting", [], "Passed on, e.g. --setting=--config.model.dtype=float32.")
    flags.DEFINE_integer("rows_per_device", 120, "Images a device.", lower_bound=1)
    flags.DEFINE_string("output", "", "Where to write the JSON.")
    flags.DEFINE_string("plot", "", "Where to write the plot.")
    command_line.run(main)
