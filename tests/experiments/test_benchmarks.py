"""Benchmarks at tiny sizes: what they write, that they refuse to time unequal work, and that the peers do compute the same."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import facenet_jax
from experiments.benchmarks import embed, mining, timing, train_step
from facenet_jax import models
from facenet_jax.errors import BadInput
from facenet_jax.weights.portable import Weights, save_weights
from tests.one_device import ONE_DEVICE

ROOT = Path(__file__).resolve().parents[2]
TINY = {"stem": 4, "widths": (4, 8), "depths": (1, 1), "embedding_size": 16}
KEYS = {"case", "ours", "peer", "peer_name", "unit", "ratio", "repeats"}
installed = lambda *modules: all(importlib.util.find_spec(module) for module in modules)
needs_torch = pytest.mark.skipif(not installed("torch"), reason="the peer: requirements-benchmarks.txt")


@pytest.fixture
def checked(monkeypatch):
    """What was compared before the clock started; comparisons after it fail the test."""
    seen, started = [], []
    check, interleaved = timing.check_equal, timing.interleaved

    def watched(what, ours, peer, tolerance):
        assert not started, f"{what} was compared after the timing"
        check(what, ours, peer, tolerance)
        seen.append(what)

    def begun(functions, *rest, **named):
        if "peer" in functions:
            started.append(True)
        return interleaved(functions, *rest, **named)

    monkeypatch.setattr(timing, "check_equal", watched)
    monkeypatch.setattr(timing, "interleaved", begun)
    return seen


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    """A small_resnet of a few thousand values whose BatchNorms have statistics, scales and biases of their own."""
    rng = np.random.default_rng(0)
    variables = jax.device_get(models.initialise(models.create("small_resnet", **TINY), jax.random.key(0), 32))
    vary = lambda leaf: leaf if leaf.ndim > 1 else (leaf + rng.uniform(0.1, 0.5, leaf.shape)).astype(np.float32)
    preprocessing = {"size": 32, "standardisation": "fixed"}
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(path, Weights(jax.tree.map(vary, variables), "small_resnet", TINY, preprocessing, TINY["embedding_size"]))
    return path


def written(cases, tmp_path):
    """The cases of the JSON that a benchmark writes."""
    timing.write(str(tmp_path / "b.json"), "name", cases, ("jax", "absent-package"))
    content = json.loads((tmp_path / "b.json").read_text())
    assert set(content) == {"name", "device", "versions", "cases"}
    assert content["versions"]["jax"] == jax.__version__ and content["versions"]["absent-package"] == "not installed"
    assert "cores" in content["device"]
    for case in content["cases"]:
        assert set(case) == KEYS and case["ours"] > 0 and (case["peer"] is None) == (case["ratio"] is None)
    return content["cases"]


@pytest.mark.parametrize(
    ("ours", "peer"), [(1.02, 1.0), (np.nan, 1.0), (1.0, np.nan), (np.ones(3), np.ones(2)), (np.eye(2), np.eye(2)[::-1])]
)
def test_unequal_work_is_refused(ours, peer):
    with pytest.raises(BadInput, match="loss: ours and the peer's differ"):
        timing.check_equal("loss", ours, peer, 1e-2)


def test_equal_work_passes():
    timing.check_equal("gradient", np.full(4, 1.005), np.ones(4), 1e-2)


def test_ratios_above_one_are_better():
    assert timing.lower("memory", 2.0, 6.0, "peer", "MB", 1).ratio == 3
    fast = timing.rate("images", 10, 2.0, 5.0, "peer", "images/s", 1)
    assert (fast.ours, fast.peer, fast.ratio) == (5.0, 2.0, 2.5)


def test_turns_are_taken():
    order = []
    timing.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=2, warmup=1)
    assert "".join(order) == "ababab"


def test_more_cores_than_there_are():
    with pytest.raises(BadInput, match="--cores=100000"):
        timing.use_cores(100000)


def test_a_missing_peer_is_named():
    with pytest.raises(BadInput, match=r"no_such_peer is not installed: pip install -r requirements-benchmarks\.txt"):
        timing.require("json", "no_such_peer")


def test_arithmetic_by_hand():
    images = jnp.zeros((2, 8, 8, 3))
    model = models.create("small_resnet", stem=4, widths=(5,), depths=(1,), embedding_size=6)
    # 4x4x4 and 2x2x5 of the stem, two 2x2x5 of the block, the dense layer; a product and a sum each.
    by_hand = 2 * 2 * (16 * 4 * 27 + 4 * 5 * 36 + 2 * 4 * 5 * 45 + 20 * 6)
    variables = model.init(jax.random.key(0), images, train=False)
    forward = jax.make_jaxpr(lambda v, x: model.apply(v, x, train=False))(variables, images)
    assert train_step.arithmetic(forward.jaxpr) == by_hand
    repeated = jax.make_jaxpr(lambda a: jax.lax.scan(lambda c, _: (c @ a, None), a, None, length=7)[0])(jnp.zeros((3, 3)))
    assert train_step.arithmetic(repeated.jaxpr) == 7 * 2 * 27


@needs_torch
def test_train_step_beside_torch(checked, tmp_path):
    setup = train_step.Setup("small_resnet", 32, 8, variant=TINY)
    cases = written(train_step.measure(setup, True, 1, side=32, megabytes=1), tmp_path)
    assert [what.split(" (")[0] for what in checked] == [
        f"{name} of the {step} step" for step in ("first", "second") for name in ("loss", "gradient norm")
    ]
    assert cases[0]["unit"] == "images/s" and cases[0]["peer_name"] == "torch" and cases[0]["ratio"]
    assert {"GFLOP/s", "GB/s"} <= {case["unit"] for case in cases}


@needs_torch
def test_train_step_refuses_another_network():
    """Two of PyTorch's, one with a kernel turned: what the check must notice."""
    setup = train_step.Setup("small_resnet", 32, 8, variant=TINY)
    variables = jax.device_get(models.initialise(models.create("small_resnet", **TINY), jax.random.key(0), 32))
    plain = train_step.make_torch(setup, variables)
    variables["params"]["stem1"]["kernel"] = variables["params"]["stem1"]["kernel"][::-1]
    with pytest.raises(BadInput, match="of the first step"):
        train_step.check_equal(setup, plain, train_step.make_torch(setup, variables))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 10}, "a batch of 10"),
        ({"batch": 4}, "two or more people"),
        ({"dtype": "float16"}, "--dtype"),
        ({"size": 20}, "at least 75"),
    ],
)
def test_impossible_steps(settings, message):
    with pytest.raises(BadInput, match=message):
        train_step.Setup(**settings)


def test_embed_beside_what_is_installed(checked, weights_file, tmp_path, capsys):
    embedder = facenet_jax.load(weights_file)
    wanted = [name for name, needed in (("torch", ["torch"]), ("onnxruntime", ["onnxruntime", "onnx"])) if installed(*needed)]
    peers = embed.engines(embedder, weights_file, [*wanted, "tensorflow"], "", "", "none", tmp_path)
    assert list(peers) == wanted and "tensorflow" in capsys.readouterr().out
    cases = written(embed.measure(embedder, peers, [1, 3], 1), tmp_path)
    assert [case["peer_name"] for case in cases] == (wanted or [""]) * 2
    assert checked == [f"embeddings of {name}, batch {batch}" for batch in (1, 3) for name in wanted]
    other = {"other": lambda images: embedder(images[:, :, ::-1])}
    with pytest.raises(BadInput, match="embeddings of other, batch 2"):
        embed.measure(embedder, other, [2], 1)


def test_embed_unknown_engine(weights_file, tmp_path):
    with pytest.raises(BadInput, match="no engine named 'caffe'"):
        embed.engines(facenet_jax.load(weights_file), weights_file, ["caffe"], "", "", "none", tmp_path)


def test_mining_beside_its_peer(checked, tmp_path):
    with_peer = installed("torch", "pytorch_metric_learning")
    cases = written(mining.measure([100, 130], 100 if with_peer else 0, 64, 1, memory=False), tmp_path)
    assert checked == (["loss of 100 rows", "gradient of 100 rows"] if with_peer else [])
    assert [case["ratio"] is not None for case in cases] == [with_peer, False, False, False]


def test_mining_refuses_another_margin(monkeypatch):
    ours = mining.make_ours(100, mining.EVERY, 64)
    monkeypatch.setattr(mining, "MARGIN", 0.25)
    with pytest.raises(BadInput, match="loss of 100 rows"):
        mining.check_equal(100, ours, mining.make_ours(100, mining.EVERY, 64))


def test_exponent():
    sizes = [900, 1800, 4096]
    assert mining.exponent(sizes, [3e-8 * n**2.25 for n in sizes]) == pytest.approx(2.25)


def test_mining_as_a_command(tmp_path):
    """On one core, memory in a process of its own, JSON to a file."""
    output = tmp_path / "m.json"
    command = [
        sys.executable,
        "-m",
        "experiments.benchmarks.mining",
        "--nopeer",
        "--sizes=80",
        "--cores=1",
        "--repeats=1",
        f"--output={output}",
    ]
    environment = {**os.environ, "XLA_FLAGS": ONE_DEVICE}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    content = json.loads(output.read_text())
    assert " 1 of " in content["device"] and content["name"] == "mining"
    memory = [case for case in content["cases"] if case["unit"] == "MB"]
    assert len(memory) == 1 and 0 < memory[0]["ours"] < 1000


def test_bad_flags_are_one_line():
    command = [sys.executable, "-m", "experiments.benchmarks.mining", "--sizes=40"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: --sizes=40") and done.stderr.count("\n") == 1
