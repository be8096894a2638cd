"""Finds what is wrong with a set of faces: `python -m data_pipelines.clean MODE --records=DIR --embeddings=E.npz --output=DIR`.

  outliers    images far from their person's centre, as davidsandberg/facenet filters them
  duplicates  the same file, the same pixels, nearly the same picture; of one person and under two names
  identities  people whose images disagree, and two folders that are one person
  overlap     people who are in an evaluation set too (--other_records, --other_embeddings), by name and by face

Embeddings are those that `experiments.embed` makes of the records. Each mode writes report.html, report.json and exclude.txt, which
`data_pipelines.prepare --exclude=` takes. Distances are squared Euclidean ones of unit embeddings; defaults were chosen for `casia-webface`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags

from data_pipelines.cleaning import report
from data_pipelines.cleaning.duplicates import duplicates
from data_pipelines.cleaning.faces import Faces, Findings, open_faces
from data_pipelines.cleaning.identities import identities
from data_pipelines.cleaning.outliers import outliers
from data_pipelines.cleaning.overlap import overlap
from facenet_jax import command_line
from facenet_jax.errors import BadInput

FLAGS = flags.FLAGS


@dataclass(frozen=True)
class Mode:
    """find(faces, **options); defaults: its options, flags of the same names."""

    find: Callable[..., Findings]
    title: str
    defaults: dict[str, Any]


MODES = {
    "outliers": Mode(outliers, "Outliers of {}", {"threshold": 0.9, "percentile": 0.0, "minimum_images": 0}),
    "duplicates": Mode(duplicates, "Duplicates in {}", {"threshold": 0.07}),
    "identities": Mode(identities, "People of {}", {"threshold": 0.4, "closest": 0.5, "cut": 1.5, "piece_images": 2}),
    "overlap": Mode(overlap, "Who of {} is in {}", {"threshold": 0.6}),
}
_OPTIONS = sorted({name for mode in MODES.values() for name in mode.defaults})
_OTHERS = ("other_records", "other_embeddings")


def options(mode: str, given: dict[str, Any]) -> dict[str, Any]:
    """A mode's options, those given (not None) in place of the defaults; BadInput names one that is not the mode's."""
    if mode not in MODES:
        raise BadInput(f"no mode named {mode!r}; there are {', '.join(MODES)}")
    chosen = {name: value for name, value in given.items() if value is not None}
    if foreign := sorted(set(chosen) - set(MODES[mode].defaults)):
        takers = [name for name, other in MODES.items() if foreign[0] in other.defaults]
        raise BadInput(f"--{foreign[0]} is not for {mode} but for {', '.join(takers)}")
    if chosen.get("percentile") and "threshold" in chosen:
        raise BadInput("give --threshold or --percentile, not both")
    return {**MODES[mode].defaults, **chosen}


def _others(mode: str, faces: Faces) -> list[Faces]:
    """The other set, of the mode that takes one."""
    given = [name for name in _OTHERS if FLAGS[name].value]
    if mode != "overlap":
        if given:
            raise BadInput(f"--{given[0]} is not for {mode} but for overlap")
        return []
    if len(given) < len(_OTHERS):
        raise BadInput("overlap needs --other_records and --other_embeddings")
    others = open_faces(FLAGS.other_records, FLAGS.other_split, Path(FLAGS.other_embeddings))
    if others.fingerprint != faces.fingerprint or others.embeddings.shape[1] != faces.embeddings.shape[1]:
        raise BadInput(
            f"{FLAGS.embeddings} has {faces.embeddings.shape[1]} values by weights {faces.fingerprint}, {FLAGS.other_embeddings} "
            f"{others.embeddings.shape[1]} by {others.fingerprint}: embed both with the same weights and flags"
        )
    return [others]


def main(arguments: list[str]) -> None:
    """Command line."""
    if len(arguments) != 2:
        raise BadInput(f"expected one MODE of {', '.join(MODES)}; --help says more")
    mode = arguments[1]
    chosen = options(mode, {name: FLAGS[name].value for name in _OPTIONS})
    if not FLAGS.records or not FLAGS.embeddings or not FLAGS.output:
        raise BadInput("--records, --embeddings and --output are needed")
    faces = open_faces(FLAGS.records, FLAGS.split, Path(FLAGS.embeddings))
    others = _others(mode, faces)
    findings = MODES[mode].find(faces, *others, **chosen)
    details = {
        "mode": mode,
        **chosen,
        "weights_fingerprint": faces.fingerprint,
        "records_hash": [of.source.metadata.get("content_sha256", "") for of in (faces, *others)],
        "command": command_line.command(),
    }
    title = MODES[mode].title.format(FLAGS.records, FLAGS.other_records)
    report.write(Path(FLAGS.output), title, findings, details, FLAGS.pictures)
    print(json.dumps({"output": FLAGS.output, **findings.numbers}))


def _flags() -> None:
    flags.DEFINE_string("records", "", "Directory of records.")
    flags.DEFINE_string("split", "train", "Split of the records.")
    flags.DEFINE_string("embeddings", "", "The .npz that experiments.embed made of these records.")
    flags.DEFINE_string("output", "", "Directory for report.html, report.json and exclude.txt.")
    flags.DEFINE_integer("pictures", 60, "Findings of each kind that the page shows.", lower_bound=0)
    defaults = {name: ", ".join(f"{m} {mode.defaults[name]:g}" for m, mode in MODES.items() if name in mode.defaults) for name in _OPTIONS}
    flags.DEFINE_float(
        "threshold", None, f"Distance above which an image is an outlier, below which two are one; {defaults['threshold']}.", 0, 4
    )
    flags.DEFINE_float("percentile", None, "outliers: instead, the percentile of all distances to centres.", 0, 100)
    flags.DEFINE_integer("minimum_images", None, "outliers: people with fewer images left go too.", lower_bound=0)
    flags.DEFINE_float("closest", None, f"Distance below which the closest images of two people must be, too; {defaults['closest']}.", 0, 4)
    flags.DEFINE_float("cut", None, f"Mean distance up to which images join to one piece; {defaults['cut']}.", 0, 4)
    flags.DEFINE_integer("piece_images", None, f"Images that a piece must have to count; {defaults['piece_images']}.", lower_bound=1)
    flags.DEFINE_string("other_records", "", "overlap: directory of the evaluation set's records.")
    flags.DEFINE_string("other_split", "test", "overlap: their split.")
    flags.DEFINE_string("other_embeddings", "", "overlap: their embeddings, by the same weights.")


if __name__ == "__main__":
    _flags()
    command_line.run(main, positional=True)
