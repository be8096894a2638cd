"""Many hosts, for real: processes of this machine that know of each other only by the network, against one process with as many devices."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from data_pipelines import images, records, synthetic
from experiments import reporting, train
from facenet_jax import parallel
from facenet_jax.errors import BadInput
from facenet_jax.training import loop
from facenet_jax.training.checkpoints import saved_steps
from tests.one_device import ONE_DEVICE

ROOT = Path(__file__).resolve().parents[2]
STEPS, EVERY = 24, 4
# Drawing the report takes longer than the run, and is tested elsewhere.
CONFIG = f"""
from experiments import reporting
from experiments.configs import base

reporting.write = lambda *_, **__: None


def get_config(arg=""):
    config = base.get_config(arg)
    config.steps = {STEPS}
    config.model.update(size=32, embedding_size=16, stem=4, widths=(4,), depths=(1,))
    config.data.update(records=__import__("os").environ["RECORDS"], workers=0)
    config.batch.update(people=8, images_per_person=2)
    config.transforms.update(shift=2, rotation=5.0)
    config.softmax.update(weight=0.5, scale=16.0)
    config.optimizer.update(name="momentum", learning_rate=1e-2, moving_average=0.9, weight_decay=1e-4)
    config.log_every = 1
    config.checkpoint_every = {EVERY}
    return config
"""
GONE = "another process of this run is gone"


@pytest.fixture(scope="module")
def place(people, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "small.py").write_text(CONFIG)
    return folder


@pytest.fixture
def start(people, place, tmp_path):
    """start(workdir, count, devices=..., more=...) -> the processes of a run; `more` and `environment` by process."""
    running = []

    def make(workdir, count, devices=1, more=None, environment=None, only=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = []
        for index in range(count) if only is None else [only]:
            variables = {
                **os.environ,
                "RECORDS": str(people),
                "XLA_FLAGS": f"{ONE_DEVICE} --xla_force_host_platform_device_count={devices}",
                "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
                **(environment or {}).get(index, {}),
            }
            command = [sys.executable, "-m", "experiments.train", f"--config={place / 'small.py'}", f"--workdir={workdir}"]
            command += [f"--coordinator=127.0.0.1:{port}", f"--process_count={count}", f"--process_index={index}"]
            command += (more or {}).get(index, [])
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            started.append(subprocess.Popen(command, cwd=ROOT, env=variables, **pipes))
        running.extend(started)
        return started

    yield make
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def one_process(people, place):
    """In this process: run(workdir, devices, stop=None) with the same settings."""

    def run(workdir, devices, stop=None):
        found = {}
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(reporting, "write", None)  # set anew by the configuration
            patched.setenv("RECORDS", str(people))
            exec(CONFIG, found)
            config = found["get_config"]()
            patched.setattr(parallel, "make_mesh", lambda _=None: parallel.Mesh(np.asarray(jax.devices()[:devices]), ("data",)))
            if stop:
                patched.setattr(loop.Stop, "requested", property(lambda self: stop_at(self, stop), lambda self, value: None), raising=False)
            return train.run(config, workdir, place)

    def stop_at(asked, stop):
        asked.looks = getattr(asked, "looks", 0) + 1
        return asked.looks >= stop

    return run


@pytest.fixture(scope="module")
def whole(one_process, place):
    """The run that nothing stopped, on four simulated devices."""
    one_process(place / "whole", 4)
    return lines(place / "whole")


def lines(workdir):
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == "train"]


def finish(processes, seconds=600):
    """(exit codes, what each said on stderr)."""
    said = [process.communicate(timeout=seconds)[1] for process in processes]
    return [process.returncode for process in processes], said


def wait_until(what, processes):
    while not what():
        assert all(process.poll() is None for process in processes), finish(processes)
        time.sleep(0.01)


def same_losses(workdir, whole, count=STEPS):
    """To 1e-5 at first; later steps of a training run amplify what rounding differs by, since sums over processes are taken in another order."""
    found = lines(workdir)
    assert [line["step"] for line in found] == list(range(1, count + 1))
    for name in ("loss", "softmax_loss", "gradient_norm", "weight_norm", "positive"):
        ours, theirs = ([line[name] for line in run[:count]] for run in (found, whole))
        np.testing.assert_allclose(ours[:6], theirs[:6], rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, err_msg=name)


def test_a_signal_to_one_process_saves_all_and_more_processes_go_on(start, whole, tmp_path):
    two = start(tmp_path / "run", 2, devices=2)
    wait_until(lambda: (tmp_path / "run" / "metrics.jsonl").exists() and len(lines(tmp_path / "run")) >= 3, two)
    two[1].send_signal(signal.SIGTERM)
    codes, said = finish(two)
    assert codes == [0, 0], said
    assert loop.SAVED in said[0] and loop.SAVED not in said[1], said
    stopped = len(lines(tmp_path / "run"))
    assert stopped < STEPS and saved_steps(tmp_path / "run" / "checkpoints")[-1] == stopped
    same_losses(tmp_path / "run", whole, stopped)

    four = start(tmp_path / "run", 4)
    codes, said = finish(four)
    assert codes == [0, 0, 0, 0], said
    same_losses(tmp_path / "run", whole)
    # One process writes metrics: each step once, one TensorBoard file a run, one report.
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 2
    assert (tmp_path / "run" / "weights.safetensors").exists()


@pytest.mark.parametrize("killed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_process_ends_the_others_and_one_process_goes_on(start, whole, one_process, tmp_path, killed):
    two = start(tmp_path / "run", 2, devices=2)
    wait_until(lambda: saved_steps(tmp_path / "run" / "checkpoints"), two)
    two[killed].kill()
    codes, said = finish(two, 300)
    assert codes[killed] == -signal.SIGKILL and codes[1 - killed] not in (0, None), said
    assert said[1 - killed].rstrip().splitlines()[-1].startswith(f"error: {GONE}"), said
    saved = saved_steps(tmp_path / "run" / "checkpoints")[-1]
    assert 0 < saved < STEPS and saved % EVERY == 0
    assert one_process(tmp_path / "run", 4)["pairs"] == 6000
    same_losses(tmp_path / "run", whole)


def test_one_process_and_then_two(start, whole, one_process, tmp_path):
    assert one_process(tmp_path / "run", 4, stop=5) is None
    codes, said = finish(start(tmp_path / "run", 2, devices=2))
    assert codes == [0, 0], said
    same_losses(tmp_path / "run", whole)


def differing(people, folder):
    """The same people, one picture drawn anew."""
    directory = folder / "other" / "people"
    with records.Writer(directory, "people", {"train": 2, "validation": 1}) as writer:
        for split in ("train", "validation"):
            for r in records.iterate(people, split):
                image = images.encode(synthetic.draw(99, 0, 32)) if r["key"] == "p00/0" else r["image"]
                writer.add(split, image, r["label"], r["identity"], r["key"])
        writer.finish(json.loads((people / "metadata.json").read_text()) | {"content_sha256": "another"})
    return directory


@pytest.mark.parametrize("what", ["records", "missing records", "config", "devices"])
def test_hosts_that_differ_all_say_so(start, people, tmp_path, what):
    second = {
        "records": {"environment": {1: {"RECORDS": str(people)}}},
        "missing records": {"environment": {1: {"RECORDS": str(tmp_path / "nowhere")}}},
        "config": {"more": {1: ["--config.triplet.margin=0.3"]}},
        "devices": {"environment": {1: {"XLA_FLAGS": f"{ONE_DEVICE} --xla_force_host_platform_device_count=2"}}},
    }[what]
    if what == "records":
        # At the same path as on the other host, as on two machines: only the content tells.
        shutil.copytree(people, tmp_path / "a" / "people")
        other = differing(people, tmp_path)
        more = {i: [f"--data_dir={tmp_path / name}", "--config.data.records=people"] for i, name in enumerate(("a", other.parent.name))}
        second = {"more": more}
    words = {
        "records": "the hosts differ: content_sha256 of data.records is",
        "missing records": "nowhere: no such directory of records",
        "config": "the hosts differ: triplet.margin is 0.2 on process 0, 0.3 on process 1",
        "devices": "different numbers of devices (1 on process 0, 2 on process 1)",
    }[what]
    codes, said = finish(start(tmp_path / "run", 2, **second))
    assert codes == [2, 2], said
    for text in said:
        assert [words in line for line in text.splitlines() if line.startswith("error: ")] == [True], said


@pytest.mark.parametrize("index", [0, 1])
def test_a_host_that_never_comes(start, tmp_path, index):
    alone = start(tmp_path / "run", 2, more={index: ["--start_timeout=3"]}, only=index)
    codes, said = finish(alone)
    assert codes == [2]
    last = said[0].rstrip().splitlines()[-1]
    assert last.startswith("error: the processes did not join within 3 s: start the same command on every host"), said


def test_a_value_of_every_process_on_one():
    assert parallel.gather({"a": [1, "é"]}) == [{"a": [1, "é"]}]
    parallel.check_alike({"a": 1})
    with pytest.raises(BadInput, match="as it was"), parallel.failing_together():
        raise BadInput("as it was")
