"""Whole runs: stopped and resumed bit for bit, on one and eight devices, and every bad input in one line."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import train
from facenet_jax import models, parallel
from facenet_jax.errors import BadInput
from facenet_jax.training import loop
from facenet_jax.weights.portable import load_weights
from tests.one_device import ONE_DEVICE

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def tiny_network(monkeypatch):
    """small_resnet with a tenth of its width."""
    entry = models.NETWORKS["small_resnet"]

    class Tiny(entry.module):
        stem: int = 4
        widths: tuple[int, ...] = (4, 8, 8)
        depths: tuple[int, ...] = (1, 1, 1)

    monkeypatch.setitem(models.NETWORKS, "small_resnet", models.Network(Tiny, 64, 32, 16, "fixed"))
    use_devices(monkeypatch, 1)


def use_devices(monkeypatch, count):
    monkeypatch.setattr(parallel, "make_mesh", lambda devices=None: parallel.Mesh(np.asarray(jax.devices()[:count]), ("data",)))


def lines(workdir, kind="train"):
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("images_per_s", "data_wait", "elapsed_s")} for line in found if line["kind"] == kind
    ]


def equal(a, b):
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(load_weights(a).variables), jax.tree.leaves(load_weights(b).variables), strict=True
    ):
        np.testing.assert_array_equal(x, y, err_msg=str(path))


class StopAt(loop.Stop):
    """Asks to stop after so many looks: a signal at a known step."""

    left = 0

    @property
    def requested(self):
        type(self).left -= 1
        return type(self).left < 0

    @requested.setter
    def requested(self, value): ...


@pytest.mark.parametrize("stops", [(1,), (2, 3)])
def test_stopped_and_resumed_is_bit_equal(config, tmp_path, monkeypatch, stops):
    whole = train.run(config, tmp_path / "whole", tmp_path)
    assert whole["pairs"] == 6000
    for step in stops:
        StopAt.left = step - 1
        with monkeypatch.context() as patched:
            patched.setattr(loop, "Stop", StopAt)
            assert train.run(config, tmp_path / "parts", tmp_path) is None
    assert not (tmp_path / "parts" / "weights.safetensors").exists()
    config.log_every = 1
    parts = train.run(config, tmp_path / "parts", tmp_path)
    equal(tmp_path / "whole" / "weights.safetensors", tmp_path / "parts" / "weights.safetensors")
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")
    assert parts["weights_fingerprint"] == whole["weights_fingerprint"] and parts["accuracy"] == whole["accuracy"]
    page = (tmp_path / "parts" / "report.html").read_text()
    assert f"{100 * parts['accuracy']:.2f}" in page or f"{parts['accuracy']:.4f}" in page


def test_devices_do_not_change_the_run(config, tmp_path, monkeypatch):
    config.steps = 3
    config.model.dropout = 0.0
    losses = []
    for count in (1, 8):
        with monkeypatch.context() as patched:
            use_devices(patched, count)
            train.run(config, tmp_path / str(count), tmp_path)
        losses.append([line["loss"] for line in lines(tmp_path / str(count))])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_restored_on_another_number_of_devices(config, tmp_path, monkeypatch):
    config.model.dropout = 0.0
    whole = train.run(config, tmp_path / "whole", tmp_path)
    for first, second in ((1, 8), (8, 1)):
        workdir = tmp_path / f"{first}to{second}"
        for count, stop in ((first, 3), (second, None)):
            with monkeypatch.context() as patched:
                use_devices(patched, count)
                if stop:
                    StopAt.left = stop - 1
                    patched.setattr(loop, "Stop", StopAt)
                found = train.run(config, workdir, tmp_path)
        assert found["accuracy"] == pytest.approx(whole["accuracy"], abs=0.01)
        np.testing.assert_allclose([x["loss"] for x in lines(workdir)], [x["loss"] for x in lines(tmp_path / "whole")], rtol=1e-3)


def test_one_compilation(config, tmp_path, monkeypatch):
    made = []
    real = train.step.make_train_step
    monkeypatch.setattr(train.step, "make_train_step", lambda *a, **k: made.append(real(*a, **k)) or made[-1])
    train.run(config, tmp_path / "run", tmp_path)
    assert made[0]._cache_size() == 1


def test_another_config_is_refused(config, tmp_path):
    config.steps = 1
    train.run(config, tmp_path / "run", tmp_path)
    config.optimizer.learning_rate = 0.5
    with pytest.raises(BadInput, match=r"optimizer.learning_rate=0.001, not 0.5"):
        train.run(config, tmp_path / "run", tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("batch.people", 17, "only 16 of 16 people"),
        ("batch.people", 7, "14 images does not divide over 8 devices"),
        ("model.name", "resnet", "inception_resnet_v1"),
        ("model.size", 33, "multiple of 16"),
        ("triplet.rule", "hard", "semi_hard"),
        ("optimizer.name", "sgd", "adagrad"),
        ("optimizer.schedule", "steps", "cosine"),
        ("data.sampler", "random", "people, shuffle"),
        ("data.split", "tests", "train, validation"),
        ("transforms.rotation", 45.0, "10 degrees"),
        ("init", "nothing.safetensors", "no such weights file"),
        ("triplet.weight", -1.0, None),
    ],
)
def test_impossible_settings(config, tmp_path, monkeypatch, key, value, words):
    use_devices(monkeypatch, 8)
    config.update_from_flattened_dict({key: value})
    if words is None:
        config.softmax.weight, words = 0.0, "nothing to train"
    with pytest.raises(BadInput, match=words):
        train.run(config, tmp_path / "run", tmp_path)


def test_loss_that_stops_being_finite_names_the_records(config, tmp_path):
    config.optimizer.update(name="momentum", learning_rate=1e30)
    with pytest.raises(BadInput, match=r"not finite after step \d \(records \d+"):
        train.run(config, tmp_path / "run", tmp_path)


def test_collapse_is_recognised():
    assert loop.collapsed({"triplet_loss": 0.2001, "spread": 0.001}, 0.2)
    assert not loop.collapsed({"triplet_loss": 0.2001, "spread": 0.5}, 0.2)
    assert not loop.collapsed({"softmax_loss": 3.0, "spread": 0.0}, 0.0)


def test_starts_from_weights(config, tmp_path):
    config.steps = 2
    train.run(config, tmp_path / "first", tmp_path)
    config.init = str(tmp_path / "first" / "weights.safetensors")
    config.optimizer.learning_rate = 0.0
    config.optimizer.moving_average = 0.0
    train.run(config, tmp_path / "second", tmp_path)
    first, second = (load_weights(tmp_path / name / "weights.safetensors") for name in ("first", "second"))
    for a, b in zip(jax.tree.leaves(first.variables["params"]), jax.tree.leaves(second.variables["params"]), strict=True):
        np.testing.assert_array_equal(a, b)
    config.model.embedding_size = 8
    with pytest.raises(BadInput, match=r"is another small_resnet: .* has shape \(16,\) there, \(8,\) in this run"):
        train.run(config, tmp_path / "third", tmp_path)


TINY = """
from experiments.configs import base


def get_config(arg=""):
    config = base.get_config(arg)
    config.steps = 40
    config.model.update(size=32, embedding_size=16, stem=4, widths=(4, 8, 8), depths=(1, 1, 1))
    config.batch.update(people=8, images_per_person=2)
    config.log_every = 1
    config.checkpoint_every = 0
    return config
"""


@pytest.fixture
def command(people, tmp_path):
    """A command line of a run on drawn people: command(workdir, more flags...)."""
    path = tmp_path / "tiny.py"
    path.write_text(TINY)

    def make(workdir, *more):
        return [
            sys.executable,
            "-m",
            "experiments.train",
            f"--config={path}",
            f"--workdir={workdir}",
            f"--config.data.records={people}",
            *more,
        ]

    return make


@pytest.fixture
def environment(tmp_path):
    return {**os.environ, "XLA_FLAGS": ONE_DEVICE, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}


def start_and_wait(command, environment, workdir, count):
    """The run, in a process group of its own, once it has written `count` lines of metrics more."""
    metrics = workdir / "metrics.jsonl"
    written = lambda: metrics.read_text().count("\n") if metrics.exists() else 0
    wanted = written() + count
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None and written() < wanted:
        time.sleep(0.02)
    return process


def children(pid):
    """Processes that it started and that make batches."""
    # A thread may have started them.
    found = [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]
    return [child for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_sigterm_saves_and_the_same_command_goes_on(command, environment, tmp_path):
    """First to the process alone, then to its whole group, workers included, as a terminal or a scheduler does it."""
    subprocess.run(command(tmp_path / "whole"), check=True, cwd=ROOT, env=environment, capture_output=True)
    for send in (os.kill, os.killpg):
        process = start_and_wait(command(tmp_path / "parts"), environment, tmp_path / "parts", 3)
        assert len(children(process.pid)) == 1
        send(process.pid, signal.SIGTERM)
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0 and "the same command goes on from here" in said, said
        assert not (tmp_path / "parts" / "weights.safetensors").exists()
    subprocess.run(command(tmp_path / "parts"), check=True, cwd=ROOT, env=environment, capture_output=True)
    equal(tmp_path / "whole" / "weights.safetensors", tmp_path / "parts" / "weights.safetensors")


def test_a_dead_worker_ends_the_run_and_a_dead_run_its_worker(command, environment, tmp_path):
    process = start_and_wait(command(tmp_path / "run", "--config.steps=2000"), environment, tmp_path / "run", 3)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert process.returncode == 2 and len(errors) == 1 and "a process that makes batches died" in errors[0], said
    assert "Traceback" not in said, said

    process = start_and_wait(command(tmp_path / "other", "--config.steps=2000"), environment, tmp_path / "other", 3)
    (worker,) = children(process.pid)
    process.kill()
    process.communicate()
    until = time.monotonic() + 60
    while Path(f"/proc/{worker}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()


def test_a_damaged_record_ends_the_run_by_name(command, people, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(people, damaged)
    shard = next(damaged.glob("*-train.tfrecord-00000-of-00002"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    command = [part for part in command(tmp_path / "run", f"--config.data.records={damaged}") if str(people) not in part]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": ONE_DEVICE})
    assert done.returncode == 2, done.stderr
    # The line of ours: Python may add a word of its own about the workers' memory.
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and re.search(r"people-train\.tfrecord-00000-of-00002: record \d+ is damaged", said[0]), done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.triplet.marign=0.3"], "marign"),
        (["--workdri=x"], "workdri"),
        (["--config.init=none.safetensors"], "none.safetensors"),
        (["--config.data.records=nowhere"], "nowhere"),
        (["extra"], "extra"),
    ],
)
def test_mistyped_command_lines(command, tmp_path, arguments, words):
    done = subprocess.run(
        command(tmp_path / "run", *arguments), cwd=ROOT, capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": ONE_DEVICE}
    )
    assert done.returncode == 2, done.stderr
    assert words in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
