"""The weights file: one .safetensors with tensors by parameter path, and all that is needed to use them in its metadata (docs/formats.md)."""

import hashlib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from facenet_jax.errors import BadInput
from facenet_jax.files import written

FORMAT = "facenet_jax/1"


@dataclass(frozen=True)
class Weights:
    """A trained network.

    variables: {"params": ..., "batch_stats": ...}, float32 NumPy leaves; network, arguments: for `models.create`; preprocessing: for
    `Preprocessing(**...)`; thresholds: by distance, then by what they are for ("accuracy", "far_0.001", "stated"), of embeddings without flip and mean subtraction; provenance: free text fields (source, licence, training data, alignment).
    """

    variables: dict[str, Any]
    network: str
    arguments: dict[str, Any]
    preprocessing: dict[str, Any]
    embedding_size: int
    normalise: bool = True
    thresholds: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits over the tensors, the network and the preprocessing: embeddings are equal where it is."""
        digest = hashlib.sha256(json.dumps([self.network, self.arguments, self.preprocessing, self.normalise], sort_keys=True).encode())
        for path, leaf in sorted(flatten_dict(self.variables, sep="/").items()):
            digest.update(path.encode() + str(np.shape(leaf)).encode() + np.ascontiguousarray(leaf, np.float32).tobytes())
        return digest.hexdigest()[:16]


def save_weights(path: Path, weights: Weights) -> str:
    """Writes the file (aside, then renamed) and returns the fingerprint."""
    tensors = {name: np.ascontiguousarray(leaf, np.float32) for name, leaf in flatten_dict(weights.variables, sep="/").items()}
    # Not dataclasses.asdict, which would copy every tensor.
    described = {f.name: getattr(weights, f.name) for f in fields(weights) if f.name != "variables"} | {"fingerprint": weights.fingerprint}
    metadata = {"format": FORMAT, **{key: json.dumps(value) for key, value in described.items()}}
    with written(path) as aside:
        save_file(tensors, aside, metadata)
    return weights.fingerprint


def load_weights(path: Path) -> Weights:
    """Reads a weights file; BadInput says what is wrong with one that cannot be used. Nothing in it is executed."""
    if not path.is_file():
        raise BadInput(f"{path}: no such weights file")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    # What its reader raises for types that NumPy lacks is no ValueError.
    except (SafetensorError, ValueError, OSError, AttributeError, TypeError) as error:
        raise BadInput(f"{path}: not a whole safetensors file ({error})") from None
    if metadata.get("format") != FORMAT:
        raise BadInput(
            f"{path}: format {metadata.get('format')!r} is not {FORMAT!r}; foreign weights come in by `python -m facenet_jax.apps.convert`"
        )
    try:
        described = {key: json.loads(value) for key, value in metadata.items() if key != "format"}
        fingerprint = described.pop("fingerprint")
        weights = Weights(variables=unflatten_dict(tensors, sep="/"), **described)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise BadInput(f"{path}: its metadata or the names of its tensors are broken ({error})") from None
    if weights.fingerprint != fingerprint:
        raise BadInput(f"{path}: its tensors are not the ones it was written with (fingerprint {weights.fingerprint}, not {fingerprint})")
    return weights
