"""What a run does when its disk is full, and when what it saved is damaged or of another run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from facenet_jax.errors import BadInput
from facenet_jax.training.checkpoints import Checkpoints, saved_steps
from tests.one_device import ONE_DEVICE

ROOT = Path(__file__).resolve().parents[2]
resource = pytest.importorskip("resource")
STATE = {"kernel": jnp.arange(1000.0), "optimizer": ({"mean": jnp.ones((3, 4))}, jnp.zeros((), jnp.int32), ())}


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = Checkpoints(directory)
    for step in (1, 2):
        checkpoints.save(step, STATE, {"batches": step})
    checkpoints.close()
    return directory


@pytest.mark.parametrize(
    ("like", "words"),
    [
        ({**STATE, "kernel": jnp.arange(999.0)}, r"kernel has shape \(1000,\) there, \(999,\) here"),
        ({**STATE, "bias": jnp.ones(2)}, r"bias has shape none there, \(2,\) here"),
        ({"kernel": STATE["kernel"]}, r"optimizer/0/mean has shape \(3, 4\) there, none here"),
    ],
)
def test_another_configuration_is_named(two_saved, like, words):
    with pytest.raises(BadInput, match=f"checkpoint 2 .* is not of this configuration: {words}"):
        Checkpoints(two_saved).restore(like)


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
@pytest.mark.parametrize("which", ["the arrays", "state/_METADATA", "state/manifest.ocdbt", "position/metadata"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(two_saved, tmp_path, which, damage):
    directory = tmp_path / "checkpoints"
    shutil.copytree(two_saved, directory)
    newest = directory / "2"
    file = largest(newest / "state" / "ocdbt.process_0" / "d") if which == "the arrays" else newest / which
    whole = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(whole[: len(whole) // 2] if damage == "cut" else bytes(byte ^ 255 for byte in whole))
    with pytest.raises(BadInput, match=f"{newest}: this checkpoint is damaged .*: delete that directory, and the same command goes on"):
        Checkpoints(directory).restore(STATE)
    shutil.rmtree(newest)
    state, position = Checkpoints(directory).restore(STATE)
    assert position == {"batches": 1}
    np.testing.assert_array_equal(state["kernel"], STATE["kernel"])


def test_a_write_that_the_system_refuses(tmp_path):
    """A limit on the size of files stands for the full disk: the same calls fail."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, STATE, {"batches": 1}, wait=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(BadInput, match=f"{tmp_path}: a checkpoint cannot be written .* of step 1, is kept"):
            noise = np.random.default_rng(0).random(200_000).astype(np.float32)
            checkpoints.save(2, {**STATE, "kernel": jnp.asarray(noise)}, {"batches": 2}, wait=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    checkpoints.close()
    again = Checkpoints(tmp_path)
    assert again.latest == 1
    again.save(3, STATE, {"batches": 3}, wait=True)
    assert again.latest == 3


CONFIG = """
from experiments import reporting
from experiments.configs import base

reporting.write = lambda *_, **__: None


def get_config(arg=""):
    config = base.get_config(arg)
    config.steps = 4
    config.model.update(size=32, embedding_size=256, stem=4, widths=(64,), depths=(1,))
    config.data.workers = 0
    config.batch.update(people=8, images_per_person=2)
    config.log_every = config.checkpoint_every = 1
    return config
"""


@pytest.fixture
def small_disk(tmp_path):
    """A disk for one checkpoint of 8 MB, but not for two."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(place)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this user may not mount a small disk: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(people, small_disk, tmp_path):
    (tmp_path / "wide.py").write_text(CONFIG)
    workdir = small_disk / "run"
    command = [sys.executable, "-m", "experiments.train", f"--config={tmp_path / 'wide.py'}", f"--workdir={workdir}"]
    command += [f"--config.data.records={people}"]
    environment = {**os.environ, "XLA_FLAGS": ONE_DEVICE, "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    words = f"error: {workdir}/checkpoints: a checkpoint cannot be written (No space left on device); the last whole checkpoint, of step 1, is kept"
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(words) and "Traceback" not in done.stderr, done.stderr
    assert saved_steps(workdir / "checkpoints") == [1]
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "goes on from step 1" in done.stdout, done.stderr
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["3", "4"]
    assert [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 4]
