"""Embedding and evaluating from the command line, on drawn people."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data_pipelines import records
from data_pipelines.sources import open_source
from experiments import embedding
from experiments.verifying import Evaluator
from facenet_jax import models
from facenet_jax.errors import BadInput
from facenet_jax.evaluation import pairs as verification
from facenet_jax.inference import Embedder
from facenet_jax.weights.portable import Weights, load_weights, save_weights
from tests.one_device import ONE_DEVICE

ROOT = Path(__file__).resolve().parents[2]


def call(module, *arguments):
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": ONE_DEVICE},
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    import jax

    arguments = {"embedding_size": 16, "stem": 4, "widths": [4, 8, 8], "depths": [1, 1, 1]}
    variables = jax.tree.map(np.asarray, models.initialise(models.create("small_resnet", **arguments), jax.random.key(0), 32))
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    provenance = {"alignment": {"method": "drawn"}}
    save_weights(path, Weights(variables, "small_resnet", arguments, {"size": 32, "standardisation": "fixed"}, 16, provenance=provenance))
    return path


@pytest.fixture(scope="module")
def lfw_like(people, tmp_path_factory):
    """A pairs file in LFW's form, and records of its images."""
    folder = tmp_path_factory.mktemp("lfw")
    with records.Writer(folder / "records", "toy", {"test": 1}) as writer:
        for r in records.iterate(people, "validation"):
            name, number = r["key"].split("/")
            writer.add("test", r["image"], r["label"], name, f"{name}/{name}_{int(number) + 1:04d}")
        writer.finish({"identities": [f"p{i:02d}" for i in range(36)], "alignment": {"method": "drawn"}})
    rows = ["4 5"]
    for fold in range(4):
        names = [f"p{16 + 5 * fold + i}" for i in range(5)]
        rows += [f"{name}\t1\t2" for name in names] + [f"{a}\t1\t{b}\t2" for a, b in zip(names, names[1:] + names[:1], strict=True)]
    (folder / "pairs.txt").write_text("\n".join(rows) + "\n")
    return folder


def test_weights_and_their_embeddings_agree(weights, lfw_like, tmp_path):
    common = [f"--pairs={lfw_like / 'pairs.txt'}", f"--records={lfw_like / 'records'}"]
    done = call("experiments.evaluate", f"--weights={weights}", *common, f"--output={tmp_path / 'a'}", "--flip")
    assert done.returncode == 0, done.stderr
    done = call(
        "experiments.embed", f"--weights={weights}", f"--records={lfw_like / 'records'}", "--flip", f"--output={tmp_path / 'e.npz'}"
    )
    assert done.returncode == 0, done.stderr
    done = call(
        "experiments.evaluate", f"--embeddings={tmp_path / 'e.npz'}", f"--pairs={lfw_like / 'pairs.txt'}", f"--output={tmp_path / 'b'}"
    )
    assert done.returncode == 0 and "accuracy" in done.stdout, done.stderr
    a, b = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in "ab")
    assert (
        a["fold_accuracies"] == b["fold_accuracies"]
        and a["weights_fingerprint"] == b["weights_fingerprint"] == load_weights(weights).fingerprint
    )
    assert a["flip"] and len(a["records_hash"]) == 64 and a["pairs"] == 40
    assert (tmp_path / "a" / "report.html").stat().st_size > 10_000
    source = open_source(str(lfw_like / "records"), "test")
    with np.load(tmp_path / "e.npz", allow_pickle=False) as data:
        found = embedding.embed(Embedder(load_weights(weights)), source, flip=True, progress=False)
        np.testing.assert_allclose(data["embeddings"], found.embeddings, atol=1e-6)
        assert data["keys"].tolist() == source.keys.tolist()


def test_bad_input_is_one_line(weights, lfw_like, tmp_path):
    records_flag, pairs = f"--records={lfw_like / 'records'}", f"--pairs={lfw_like / 'pairs.txt'}"
    (tmp_path / "broken.npz").write_bytes(b"PK nothing")
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:-10])
    more = tmp_path / "more.txt"
    more.write_text((lfw_like / "pairs.txt").read_text().replace("p16\t1\t2", "p16\t1\t9", 1))
    for arguments, words in (
        ([pairs], "either --weights"),
        ([f"--weights={tmp_path / 'none'}", records_flag, pairs], "no such weights file"),
        ([f"--weights={tmp_path / 'cut.safetensors'}", records_flag, pairs], "not a whole safetensors file"),
        ([f"--embeddings={tmp_path / 'broken.npz'}", pairs], "not an embeddings file"),
        ([f"--weights={weights}", records_flag, f"--pairs={more}"], "p16/p16_0009; --allow_missing"),
    ):
        done = call("experiments.evaluate", *arguments, f"--output={tmp_path / 'out'}")
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    done = call(
        "experiments.evaluate", "--weights=pixels", records_flag, f"--pairs={more}", "--allow_missing", f"--output={tmp_path / 'out'}"
    )
    assert done.returncode == 0 and "1 pairs missing and counted as wrong" in done.stdout, done.stderr


def test_another_alignment_is_refused(weights, lfw_like, people, config, tmp_path):
    trained, photographs = load_weights(weights).provenance, SimpleNamespace(metadata={"alignment": {"method": "mtcnn margin 32 at 160"}})
    with pytest.raises(BadInput, match="'drawn', these records by 'mtcnn"):
        embedding.check_alignment(trained, photographs, force=False)
    embedding.check_alignment(trained, photographs, force=True)
    embedding.check_alignment({}, photographs, force=False)

    other = tmp_path / "records"
    shutil.copytree(lfw_like / "records", other)
    described = json.loads((other / "metadata.json").read_text()) | {"alignment": {"method": "mtcnn margin 32 at 160"}}
    (other / "metadata.json").write_text(json.dumps(described))
    for module, more in (("embed", []), ("evaluate", [f"--pairs={lfw_like / 'pairs.txt'}"])):
        done = call(f"experiments.{module}", f"--weights={weights}", f"--records={other}", f"--output={tmp_path / module}", *more)
        assert done.returncode == 2 and "--force measures anyway" in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    config.evaluation.update(records=str(other), split="test")
    with pytest.raises(BadInput, match="'drawn', these records by 'mtcnn"):
        Evaluator(config, tmp_path, open_source(str(people), "train"))
    Evaluator(config, tmp_path, open_source(str(people), "train"), force=True)


def test_pixels_know_little(people):
    source = open_source(str(people), "validation")
    pairs = verification.draw_pairs(source.keys, source.labels, folds=4, per_fold=50)
    first, second, _ = embedding.rows_of_pairs(pairs, source.keys, allow_missing=False)
    e = embedding.embed(embedding.Pixels(), source, progress=False).embeddings
    assert verification.verify(e[first], e[second], pairs.same, pairs.fold).accuracy < 0.75
