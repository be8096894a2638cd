"""Verify a network, or embeddings made by any, by the LFW protocol.

python -m experiments.evaluate --weights=runs/a/weights.safetensors --records=data/lfw --pairs=data/pairs.txt --output=runs/a/lfw
python -m experiments.evaluate --embeddings=E.npz --pairs=data/pairs.txt --output=lfw
python -m experiments.evaluate --weights=pixels --records=data/lfw --pairs=data/pairs.txt --output=pixels
"""

import sys
from pathlib import Path

import numpy as np
from absl import flags

from data_pipelines import sources
from data_pipelines.embeddings import read_embeddings
from experiments import embedding, reporting
from facenet_jax import command_line
from facenet_jax.errors import BadInput
from facenet_jax.evaluation import pairs as verification
from facenet_jax.inference import Embedder

FLAGS = flags.FLAGS


def main(_: list[str]) -> None:
    """Command line."""
    command_line.use_compilation_cache()
    if bool(FLAGS.weights) == bool(FLAGS.embeddings) or not FLAGS.pairs:
        raise BadInput("give --pairs and either --weights with --records, or --embeddings")
    pairs = verification.read_pairs(Path(FLAGS.pairs))
    source = sources.open_source(FLAGS.records, FLAGS.split) if FLAGS.records else None
    flip = FLAGS.flip
    seconds = 0.0
    if FLAGS.embeddings:
        read = read_embeddings(Path(FLAGS.embeddings))
        embeddings, keys, identities, fingerprint, made_flipped = read.embeddings, read.keys, read.identities, read.fingerprint, read.flip
        if flip:
            raise BadInput("--flip needs --weights: embeddings are made already")
        flip = made_flipped
        first, second, present = embedding.rows_of_pairs(pairs, keys, FLAGS.allow_missing)
        if source is not None and not np.array_equal(source.keys, keys):
            raise BadInput(f"--records={FLAGS.records} holds other images than --embeddings, or in another order")
    else:
        if source is None:
            raise BadInput("--weights needs --records")
        first, second, present = embedding.rows_of_pairs(pairs, source.keys, FLAGS.allow_missing)
        embedder = embedding.open_embedder(FLAGS.weights)
        if isinstance(embedder, Embedder):
            embedding.check_alignment(embedder.weights.provenance, source, FLAGS.force)
        needed = np.unique(np.concatenate([first[present], second[present]]))
        found = embedding.embed(embedder, source, indices=needed, crop=FLAGS.crop, flip=flip)
        embeddings = np.zeros((len(source.keys), found.embeddings.shape[1]), np.float32)
        embeddings[needed] = found.embeddings
        identities, fingerprint, seconds = None, embedder.fingerprint, found.seconds
        print(f"{len(needed)} images in {seconds:.0f} s, {len(needed) / seconds:.0f} images/s", file=sys.stderr)
    result = verification.verify(
        embeddings[first],
        embeddings[second],
        pairs.same,
        pairs.fold,
        distance=FLAGS.distance,
        mean_subtraction=FLAGS.mean_subtraction,
        far_target=FLAGS.far_target,
        mode=FLAGS.mode,
        present=present,
    )
    records_hash = source.metadata.get("content_sha256", "") if source is not None else ""
    described = {
        **result.to_json(),
        "flip": flip,
        "weights_fingerprint": fingerprint,
        "records_hash": records_hash,
        "seconds": seconds,
        "command": command_line.command(),
    }
    output = Path(FLAGS.output)
    output.mkdir(parents=True, exist_ok=True)
    command_line.write_json(output / "evaluation.json", described)
    reporting.write(
        output / "report.html",
        f"{FLAGS.weights or FLAGS.embeddings} on {FLAGS.pairs}",
        result,
        source,
        embeddings,
        pairs,
        first,
        second,
        present=present,
        identities=identities,
        details=described,
    )
    missing = f", {result.missing} pairs missing and counted as wrong" if result.missing else ""
    print(
        f"accuracy {result.accuracy:.4f} ± {result.accuracy_sem:.4f} (standard error; std {result.accuracy_std:.4f}), "
        f"VAL {result.val:.4f} ± {result.val_std:.4f} (std) at FAR {result.far:.5f}, AUC {result.auc:.4f}, EER {result.eer:.4f}{missing}"
    )


def _flags() -> None:
    flags.DEFINE_string("weights", "", "A weights file, a name that facenet_jax.apps.pretrained knows, or 'pixels' for raw pixels.")
    flags.DEFINE_string("embeddings", "", "Instead: an .npz made by experiments.embed.")
    flags.DEFINE_string("records", "", "Directory of records with the images of the pairs.")
    flags.DEFINE_string("split", "test", "Split of the records.")
    flags.DEFINE_string("pairs", "", "LFW's pairs.txt or a file like it.")
    flags.DEFINE_string("output", "evaluation", "Directory for evaluation.json and report.html.")
    flags.DEFINE_enum("distance", "squared", ["squared", "cosine"], "Squared L2, or the angle over pi.")
    flags.DEFINE_bool("mean_subtraction", False, "Subtract the mean embedding of the training folds.")
    flags.DEFINE_bool("flip", False, "Put the mirror image's embedding beside the image's.")
    flags.DEFINE_integer("crop", 0, "Cut so many central pixels of each record; 0 takes it whole.", lower_bound=0)
    flags.DEFINE_float("far_target", 1e-3, "False-accept rate at which VAL is measured.", 0, 1)
    flags.DEFINE_enum(
        "mode", "exact", ["exact", "original"], "Thresholds from the data, or davidsandberg/facenet's grids and interpolation."
    )
    flags.DEFINE_bool("allow_missing", False, "Count pairs with a missing image as wrong instead of refusing.")
    flags.DEFINE_bool("force", False, "Measure although the records are aligned in another way than the training data.")


if __name__ == "__main__":
    _flags()
    command_line.run(main)
