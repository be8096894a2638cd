"""Weights to other runtimes: `python -m facenet_jax.apps.export FORMAT --weights=FILE_OR_NAME --output=FILE`.

  onnx             .onnx: ONNX Runtime and others; any batch
  stablehlo        .stablehlo: JAX without this project, on CPU, CUDA and TPU; any batch
  tf_npz           .npz: davidsandberg/facenet's variables by their TensorFlow names
  facenet_pytorch  .pt, .pth or .safetensors: the state dict of facenet-pytorch's InceptionResnetV1

The first two take [n, size, size, 3] images, float32 standardised as the weights want it or, with --preprocessing, uint8 RGB, and give float32
embeddings [n, d], of unit length where the weights say so. --fold puts BatchNorm into the layers before it.
"""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import facenet_jax
from facenet_jax import command_line, folding, models
from facenet_jax.errors import BadInput
from facenet_jax.files import written
from facenet_jax.layers import l2_normalize
from facenet_jax.preprocessing import Preprocessing
from facenet_jax.weights.portable import Weights
from facenet_jax.weights.tensorflow import to_tensorflow
from facenet_jax.weights.torch import encode_state_dict, to_torch

FLAGS = flags.FLAGS
PLATFORMS = ("cpu", "cuda", "tpu")

_Function = Callable[[Any, jax.Array], jax.Array]


def computation(weights: Weights, fold: bool, preprocessing: bool) -> tuple[dict[str, Any], _Function, jax.ShapeDtypeStruct]:
    """(variables, function, images): function(variables, images [batch, s, s, 3]) -> float32 embeddings [batch, d], batch symbolic."""
    arguments = {name: value for name, value in weights.arguments.items() if name != "dtype"}
    variables, apply = folding.network(replace(weights, arguments=arguments), fold)
    standardise = Preprocessing(**weights.preprocessing)

    def function(variables: Any, images: jax.Array) -> jax.Array:
        prelogits = apply(variables, standardise(images) if preprocessing else images)
        return l2_normalize(prelogits) if weights.normalise else prelogits

    (batch,) = jax.export.symbolic_shape("batch")
    shape = (batch, standardise.size, standardise.size, 3)
    return variables, function, jax.ShapeDtypeStruct(shape, jnp.uint8 if preprocessing else jnp.float32)


def metadata(weights: Weights, fold: bool, preprocessing: bool) -> dict[str, str]:
    """The portable file's metadata (docs/formats.md), each a JSON text, and what was done on the way."""
    described = {f.name: getattr(weights, f.name) for f in fields(weights) if f.name != "variables"}
    done = {"fingerprint": weights.fingerprint, "folded": fold, "preprocessing_included": preprocessing}
    return {name: json.dumps(value) for name, value in (described | done).items()}


def _onnx(weights: Weights, suffix: str, fold: bool = False, preprocessing: bool = False) -> bytes:
    try:
        from facenet_jax.weights.onnx import to_onnx
    except ImportError:
        raise BadInput("ONNX files need the package onnx: pip install -r requirements-onnx.txt") from None
    variables, function, images = computation(weights, fold, preprocessing)
    return to_onnx(function, variables, images, metadata(weights, fold, preprocessing))


def _stablehlo(weights: Weights, suffix: str, fold: bool = False, preprocessing: bool = False) -> bytes:
    variables, function, images = computation(weights, fold, preprocessing)

    def embed(images: jax.Array) -> jax.Array:
        return function(variables, images)

    # The one word about itself that the format keeps.
    embed.__name__ = f"{weights.network}_{weights.fingerprint}"
    return bytes(jax.export.export(jax.jit(embed), platforms=PLATFORMS)(images).serialize())


def _inception(weights: Weights, form: str) -> None:
    """Both other projects have this one network, and this one epsilon."""
    usual = models.create("inception_resnet_v1")
    if weights.network != "inception_resnet_v1":
        raise BadInput(f"{form} carries inception_resnet_v1 only, not {weights.network}; onnx and stablehlo carry every network")
    if (epsilon := weights.arguments.get("bn_epsilon", usual.bn_epsilon)) != usual.bn_epsilon:
        raise BadInput(f"{form} has a BatchNorm epsilon of {usual.bn_epsilon}, these weights were trained with {epsilon}")


def _tf_npz(weights: Weights, suffix: str) -> bytes:
    _inception(weights, "tf_npz")
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **to_tensorflow(weights.variables))
    return content.getvalue()


def _facenet_pytorch(weights: Weights, suffix: str) -> bytes:
    _inception(weights, "facenet_pytorch")
    return encode_state_dict(to_torch(weights.variables, weights.network), suffix)


@dataclass(frozen=True)
class Format:
    """How a format is made, `encode(weights, suffix, **options)`, how its files may end, and which of the command line's options it takes."""

    encode: Callable[..., bytes]
    suffixes: tuple[str, ...]
    options: tuple[str, ...] = ()


FORMATS = {
    "onnx": Format(_onnx, (".onnx",), ("fold", "preprocessing")),
    "stablehlo": Format(_stablehlo, (".stablehlo",), ("fold", "preprocessing")),
    "tf_npz": Format(_tf_npz, (".npz",)),
    "facenet_pytorch": Format(_facenet_pytorch, (".pt", ".pth", ".safetensors")),
}


def export(form: str, source: str | Path, output: Path, **options: bool) -> Weights:
    """Writes the weights file or published network `source` as format `form` to `output`, aside and then renamed, and returns the weights.

    `options` are those of the format (`FORMATS`); false ones are as if not given. What cannot be used or carried is a `BadInput`; then nothing is written.
    """
    if form not in FORMATS:
        raise BadInput(f"no format named {form!r}; there are {', '.join(FORMATS)}")
    given = {name: True for name, value in options.items() if value}
    if foreign := sorted(set(given) - set(FORMATS[form].options)):
        takers = [name for name, other in FORMATS.items() if foreign[0] in other.options]
        raise BadInput(f"--{foreign[0]} is not for {form} but for {', '.join(takers) or 'no format'}")
    if output.suffix not in FORMATS[form].suffixes or output.resolve() == Path(source).resolve():
        raise BadInput(f"{output}: the output must be another file, and end in {' or '.join(FORMATS[form].suffixes)}")
    weights = facenet_jax.load(source).weights
    content = FORMATS[form].encode(weights, output.suffix, **given)
    with written(output) as aside:
        aside.write_bytes(content)
    return weights


def main(arguments: list[str]) -> None:
    """Command line."""
    if len(arguments) != 2 or not FLAGS.weights or not FLAGS.output:
        raise BadInput(f"expected FORMAT --weights=FILE_OR_NAME --output=FILE, FORMAT one of {', '.join(FORMATS)}; --help says more")
    output = Path(FLAGS.output)
    weights = export(arguments[1], FLAGS.weights, output, fold=FLAGS.fold, preprocessing=FLAGS.preprocessing)
    size, standardisation = weights.preprocessing["size"], weights.preprocessing["standardisation"]
    print(f"{weights.network}, {weights.embedding_size}-d, fingerprint {weights.fingerprint}")
    print(f"images: [n, {size}, {size}, 3] RGB, " + ("uint8" if FLAGS.preprocessing else f"standardised by the caller: {standardisation}"))
    print(f"{output} ({output.stat().st_size / 1e6:.1f} MB)")


def _flags() -> None:
    flags.DEFINE_string("weights", "", "A weights file, or the name of a network that facenet_jax.apps.pretrained has fetched.")
    flags.DEFINE_string("output", "", "The file to write; its ending says what it is.")
    flags.DEFINE_bool("fold", False, "onnx, stablehlo: BatchNorm folded into the layers before it.")
    flags.DEFINE_bool("preprocessing", False, "onnx, stablehlo: uint8 images in, standardised inside.")


if __name__ == "__main__":
    _flags()
    command_line.run(main, positional=True)
