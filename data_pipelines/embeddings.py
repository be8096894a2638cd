"""Embeddings as a file (.npz): `embeddings` [n, d] float32, `keys` and `identities` [n], `weights_fingerprint`, `flip`."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from facenet_jax.errors import NPZ_ERRORS, BadInput
from facenet_jax.files import written


@dataclass(frozen=True)
class Embeddings:
    """embeddings [n, d] float32, keys [n], identities [n] of images; fingerprint: of the weights; flip: with the mirror
    image's beside the image's."""

    embeddings: np.ndarray
    keys: np.ndarray
    identities: np.ndarray
    fingerprint: str
    flip: bool = False


def read_embeddings(path: Path) -> Embeddings:
    """BadInput where it is not such a file."""
    try:
        with np.load(path, allow_pickle=False) as data:
            flip = bool(data["flip"]) if "flip" in data else False
            found = Embeddings(data["embeddings"], data["keys"], data["identities"], str(data["weights_fingerprint"]), flip)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such embeddings file (make it with `python -m experiments.embed`)") from None
    except (*NPZ_ERRORS, KeyError) as error:
        raise BadInput(f"{path}: not an embeddings file ({error})") from None
    shapes = found.embeddings.shape, found.keys.shape, found.identities.shape
    if len(shapes[0]) != 2 or shapes[1:] != (shapes[0][:1],) * 2:
        raise BadInput(f"{path}: embeddings {shapes[0]}, keys {shapes[1]} and identities {shapes[2]} do not belong together")
    return found


def write_embeddings(path: Path, found: Embeddings) -> None:
    """Aside, then renamed."""
    with written(path) as aside, aside.open("wb") as file:
        np.savez(
            file,
            embeddings=found.embeddings,
            keys=found.keys,
            identities=found.identities,
            weights_fingerprint=np.asarray(found.fingerprint),
            flip=np.asarray(found.flip),
        )
