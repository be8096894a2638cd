"""The loop by itself: what is saved, evaluated and written down when things end badly."""

import contextlib
import itertools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from data_pipelines import records
from facenet_jax import parallel
from facenet_jax.errors import BadInput
from facenet_jax.training import loop

BATCH = {"image": np.zeros((1, 2, 2, 3), np.uint8), "label": np.zeros(1, np.int32), "index": np.zeros(1, np.int32)}


class Saved(list):
    """Checkpoints: the steps that were saved."""

    def save(self, step, state, data, wait=False):
        self.append(step)


def fit(workdir, plan, first=0, infinite=(), batches=None, evaluate=None, saved=None):
    """A step that only counts, without finite weights after the steps named; returns (the steps saved, whether it finished)."""
    saved, mesh = Saved() if saved is None else saved, parallel.make_mesh(jax.devices()[:1])

    def step(state, _):
        done = state.step + 1
        return SimpleNamespace(step=done), {
            "finite": jnp.asarray(done not in infinite),
            "loss": jnp.float32(done),
            "spread": jnp.float32(1),
        }

    workdir.mkdir(exist_ok=True)
    _, finished = loop.fit(SimpleNamespace(step=first), step, batches or itertools.repeat(BATCH), mesh, plan, workdir, saved, evaluate)
    return saved, finished


@pytest.mark.parametrize("name", ["steps", "log_every", "checkpoint_every", "evaluate_every"])
def test_impossible_plans(name):
    for value in (-1, 0) if name in ("steps", "log_every") else (-1,):
        with pytest.raises(BadInput, match=rf"^{name}={value}"):
            loop.Plan(**{"steps": 5, name: value})


def test_zero_is_never(tmp_path):
    seen = []
    saved, finished = fit(tmp_path / "run", loop.Plan(4, checkpoint_every=0), evaluate=lambda state: seen.append(state.step) or {})
    assert saved == [4] and seen == [4] and finished


def test_weights_that_are_not_finite_are_not_evaluated(tmp_path):
    seen = []
    plan = loop.Plan(9, checkpoint_every=0, evaluate_every=2)
    with pytest.raises(BadInput, match="not finite after step 3"):
        fit(tmp_path / "run", plan, infinite={4}, evaluate=lambda state: seen.append(state.step) or {})
    assert seen == [2]


@pytest.mark.parametrize("infinite", [(), (3,)])
def test_weights_that_are_not_finite_are_not_saved_when_workers_ended(tmp_path, monkeypatch, infinite):
    """A signal to the whole process group: the loader fails, and the loop saves what it has."""
    stop = SimpleNamespace(requested=False)
    monkeypatch.setattr(loop, "Stop", lambda: contextlib.nullcontext(stop))

    def batches():
        yield from [BATCH] * 3
        stop.requested = True
        raise BadInput("a process that makes batches died")

    saved = Saved()
    outcome = pytest.raises(BadInput, match="not finite after step 2") if infinite else contextlib.nullcontext()
    with outcome:
        _, finished = fit(tmp_path / "run", loop.Plan(9), infinite=infinite, batches=batches(), saved=saved)
        assert not finished
    assert saved == ([] if infinite else [3])


def events(folder):
    """The events of one run's file."""
    (path,) = folder.iterdir()
    data = path.read_bytes()
    return [Event.FromString(records.unframe(data[a:b], str(path))) for a, b in itertools.pairwise(records.scan(path))]


def test_going_on_hides_the_steps_after_the_checkpoint_alone(tmp_path):
    fit(tmp_path / "run", loop.Plan(4, log_every=1))
    # Files of the same second have the same name.
    before = events((tmp_path / "run" / "tensorboard").rename(tmp_path / "before"))
    fit(tmp_path / "run", loop.Plan(6, log_every=1), first=2)
    after = events(tmp_path / "run" / "tensorboard")
    lines = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    # TensorBoard's rule: a file that starts at a step hides the events of earlier files from that step on.
    (start,) = [event.step for event in after if event.session_log.status == SessionLog.START]
    steps = lambda those: [event.step for event in those if event.HasField("summary") and event.summary.value[0].tag == "train/loss"]
    assert [step for step in steps(before) if step < start] + steps(after) == lines == [1, 2, 3, 4, 5, 6]


def test_the_log_is_closed_after_a_failure(tmp_path):
    with pytest.raises(BadInput, match="not finite after step 2"):
        fit(tmp_path / "run", loop.Plan(9, log_every=1, checkpoint_every=0), infinite={3})
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    # Without closing, TensorBoard's writer would keep it in memory.
    assert last >= 3 and max(event.step for event in events(tmp_path / "run" / "tensorboard")) == last
