"""Foreign weights into the portable file: `python -m facenet_jax.apps.convert FORMAT PATH OUTPUT.safetensors`.

  tf_checkpoint  davidsandberg/facenet: a TensorFlow 1 checkpoint (its prefix, a file of it, or the directory) or a frozen graph (.pb)
  torch          a state dict (.pt, .pth, .safetensors): facenet-pytorch's InceptionResnetV1, torchvision's ResNet-50, InsightFace's iResNet
  openface_csv   OpenFace's nn4.small2: the directory or archive of the Keras port's CSV files
  dlib           dlib_face_recognition_resnet_model_v1.dat

No file says how its pixels were standardised. Each network's usual rule is taken; for tf_checkpoint that is "fixed", right for the models of
2018. Those of 2017 (20170511-185253, 20170512-110547) need --standardisation=per_image.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from absl import flags

from facenet_jax import command_line, models
from facenet_jax.errors import BadInput
from facenet_jax.preprocessing import Preprocessing
from facenet_jax.weights import dlib, openface_csv
from facenet_jax.weights.portable import Weights, save_weights
from facenet_jax.weights.tensorflow import read_tensorflow
from facenet_jax.weights.torch import read_torch

FLAGS = flags.FLAGS
_SUFFIX = ".safetensors"
_MOST_NAMES = 6

# The weights, and the names of tensors that have no place in them.
_Read = tuple[Weights, tuple[str, ...]]


@dataclass(frozen=True)
class Format:
    """How files of a format are read: `read(path, **options)`, where `options` names the command line's flags that it understands."""

    read: Callable[..., _Read]
    options: tuple[str, ...] = ()


def _tf_checkpoint(path: Path, use_moving_average: bool = False) -> _Read:
    found = read_tensorflow(path, use_moving_average)
    arguments = {"embedding_size": found.embedding_size}
    classifier = ("Logits/weights", "Logits/biases") if found.logits else ()
    return _usual(found.variables, "inception_resnet_v1", arguments, found.embedding_size), (*classifier, *found.unused)


def _torch(path: Path, network: str = "") -> _Read:
    found = read_torch(path, network or None)
    classifier = ("logits.weight", "logits.bias") if found.logits else ()
    return _usual(found.variables, found.network, found.arguments, found.embedding_size, found.size), (*classifier, *found.unused)


def _usual(variables: dict[str, Any], network: str, arguments: dict[str, Any], embedding_size: int, size: int = 0) -> Weights:
    """Weights with the network's usual preprocessing."""
    usual = models.network(network)
    return Weights(variables, network, arguments, {"size": size or usual.size, "standardisation": usual.standardisation}, embedding_size)


def _whole(read: Callable[[Path], Weights]) -> Format:
    """A format whose reader uses every tensor and takes no options."""
    return Format(lambda path: (read(path), ()))


FORMATS = {
    "tf_checkpoint": Format(_tf_checkpoint, ("use_moving_average",)),
    "torch": Format(_torch, ("network",)),
    "openface_csv": _whole(openface_csv.read),
    "dlib": _whole(dlib.read),
}


def convert(form: str, path: Path, output: Path, standardisation: str = "", source: str = "", licence: str = "", **options: Any) -> _Read:
    """Reads `path` as a file of format `form`, writes the portable file, and returns the weights and the names of unused tensors.

    `options` are those of the format (`FORMATS`); empty ones are as if not given. What cannot be used is a `BadInput`; then nothing is written.
    """
    if form not in FORMATS:
        raise BadInput(f"no format named {form!r}; there are {', '.join(FORMATS)}")
    if output.suffix != _SUFFIX or output.resolve() == path.resolve():
        raise BadInput(f"{output}: the output must be another file, and end in {_SUFFIX}")
    if standardisation:
        Preprocessing(1, standardisation)
    given = {name: value for name, value in options.items() if value}
    if foreign := sorted(set(given) - set(FORMATS[form].options)):
        takers = [name for name, other in FORMATS.items() if foreign[0] in other.options]
        raise BadInput(f"--{foreign[0]} is not for {form} but for {', '.join(takers) or 'no format'}")
    weights, unused = FORMATS[form].read(path, **given)
    provenance = {**weights.provenance, "format": form, "source": source or path.name, "licence": licence or "not stated"}
    weights = replace(weights, provenance=provenance)
    if standardisation and standardisation != weights.preprocessing["standardisation"]:
        # Thresholds hold for the pixels that they were measured with.
        weights = replace(weights, preprocessing={**weights.preprocessing, "standardisation": standardisation}, thresholds={})
    save_weights(output, weights)
    return weights, unused


def describe(weights: Weights, unused: tuple[str, ...]) -> str:
    """What was made, a line each."""
    more = f" and {len(unused) - _MOST_NAMES} more" if len(unused) > _MOST_NAMES else ""
    lines = {
        "network": f"{weights.network} {json.dumps(weights.arguments)}",
        "embedding size": str(weights.embedding_size),
        "parameters": f"{models.parameter_count(weights.variables):,}",
        "images": f"{weights.preprocessing['size']} pixels, standardisation {weights.preprocessing['standardisation']}",
        "unused tensors": f"{len(unused)} ({', '.join(unused[:_MOST_NAMES])}{more})" if unused else "none",
        "fingerprint": weights.fingerprint,
    }
    return "\n".join(f"{name + ':':16}{value}" for name, value in lines.items())


def main(arguments: list[str]) -> None:
    """Command line."""
    if len(arguments) != 4:
        raise BadInput(f"expected FORMAT PATH OUTPUT{_SUFFIX}, FORMAT one of {', '.join(FORMATS)}; --help says more")
    form, path, output = arguments[1], Path(arguments[2]), Path(arguments[3])
    options: dict[str, Any] = {
        name: FLAGS[name].value for name in ("standardisation", "source", "licence", "network", "use_moving_average")
    }
    print(describe(*convert(form, path, output, **options)))
    print(output)


def _flags() -> None:
    flags.DEFINE_string("network", "", "torch: the network, where the names of its tensors should not decide.")
    flags.DEFINE_string(
        "standardisation", "", "What the network expects of pixels, by default its usual rule; 2017's TensorFlow models: per_image."
    )
    flags.DEFINE_bool("use_moving_average", False, "tf_checkpoint: the weights' moving averages instead of the weights.")
    flags.DEFINE_string("licence", "", "The terms the weights come under, kept with them.")
    flags.DEFINE_string("source", "", "Where the weights come from, kept with them; by default the name of the file.")


if __name__ == "__main__":
    _flags()
    command_line.run(main, positional=True)
