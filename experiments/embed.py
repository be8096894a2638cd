"""Embeddings of records: `python -m experiments.embed --weights=W --records=data/lfw --split=test --output=E.npz`."""

import sys
from pathlib import Path

from absl import flags

from data_pipelines import sources
from data_pipelines.embeddings import Embeddings, write_embeddings
from experiments import embedding
from facenet_jax import command_line
from facenet_jax.errors import BadInput
from facenet_jax.inference import Embedder

FLAGS = flags.FLAGS


def main(_: list[str]) -> None:
    """Command line."""
    command_line.use_compilation_cache()
    if not FLAGS.weights or not FLAGS.records:
        raise BadInput("--weights and --records are needed")
    source = sources.open_source(FLAGS.records, FLAGS.split)
    embedder = embedding.open_embedder(FLAGS.weights)
    if isinstance(embedder, Embedder):
        embedding.check_alignment(embedder.weights.provenance, source, FLAGS.force)
    found = embedding.embed(embedder, source, crop=FLAGS.crop, flip=FLAGS.flip)
    output = Path(FLAGS.output)
    write_embeddings(output, Embeddings(found.embeddings, found.keys, found.identities, embedder.fingerprint, FLAGS.flip))
    print(f"{output}: {len(found.keys)} x {found.embeddings.shape[1]}, {len(found.keys) / found.seconds:.0f} images/s", file=sys.stderr)


def _flags() -> None:
    flags.DEFINE_string("weights", "", "A weights file, a name that facenet_jax.apps.pretrained knows, or 'pixels'.")
    flags.DEFINE_string("records", "", "Directory of records or tfds:name.")
    flags.DEFINE_string("split", "test", "Split of the records.")
    flags.DEFINE_string("output", "embeddings.npz", "File to write.")
    flags.DEFINE_integer("crop", 0, "Cut so many central pixels of each record; 0 takes it whole.", lower_bound=0)
    flags.DEFINE_bool("flip", False, "Put the mirror image's embedding beside the image's.")
    flags.DEFINE_bool("force", False, "Embed although the records are aligned in another way than the training data.")


if __name__ == "__main__":
    _flags()
    command_line.run(main)
