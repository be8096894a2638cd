"""Rates and updates against the arithmetic of their sources."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from facenet_jax.errors import BadInput
from facenet_jax.training import optimizers, schedules


def test_shapes_and_warmup():
    cosine = schedules.create("cosine", 0.1, 100, warmup=10)
    assert [round(float(cosine(s)), 5) for s in (0, 9, 10, 55, 100)] == [0.01, 0.1, 0.1, 0.05, 0.0]
    assert float(schedules.create("linear", 1.0, 10)(5)) == 0.5
    assert float(schedules.create("constant", 0.3, 10)(5)) == pytest.approx(0.3)


def test_original_schedule_files(shared):
    folder = shared / "data" / "schedules"
    casia = schedules.create(str(folder / "learning_rate_schedule_classifier_casia.txt"), 9.0, 0, epoch_steps=10)
    assert [round(float(casia(s)), 6) for s in (0, 599, 600, 799, 800, 909, 910)] == [0.05, 0.05, 0.005, 0.005, 0.0005, 0.0005, 0.0]
    text = schedules.read_text(folder / "learning_rate_schedule_classifier_casia.txt")
    assert (text.epochs[-1], text.rates[-1]) == (91, -1.0)
    assert schedules.read_text(folder / "learning_rate_retrain_tripletloss.txt").rates[0] == pytest.approx(0.1)
    for path in folder.iterdir():
        schedules.read_text(path)


def test_broken_schedule_files(tmp_path):
    path = tmp_path / "schedule.txt"
    for text, words in (("", "start at 0"), ("5: 0.1", "start at 0"), ("0: 0.1\n0: 0.2", "start at 0"), ("0: fast", "line 1")):
        path.write_text(text)
        with pytest.raises(BadInput, match=words):
            schedules.read_text(path)
    with pytest.raises(BadInput, match="constant, linear, cosine"):
        schedules.create("step", 0.1, 10)


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("learning_rate", {"rate": -0.1}),
        ("learning_rate", {"rate": float("nan")}),
        ("learning_rate", {"rate": float("inf")}),
        ("warmup", {"warmup": -1}),
        ("epoch_steps", {"epoch_steps": 0}),
    ],
)
def test_impossible_rates(setting, values):
    with pytest.raises(BadInput, match=rf"^optimizer\.{setting}="):
        schedules.create("constant", **{"rate": 0.1, "steps": 10, **values})


def test_a_rate_of_zero_is_no_mistake():
    assert float(schedules.create("cosine", 0.0, 10, warmup=2)(1)) == 0


def steps(name, gradients, rate=0.1, **settings):
    optimizer = optimizers.create(optimizers.Optimizer(name, **settings), lambda _: rate)
    params = {"kernel": jnp.asarray(1.0), "bias": jnp.asarray(1.0)}
    state = optimizer.init(params)
    for g in gradients:
        updates, state = optimizer.update({"kernel": jnp.asarray(g), "bias": jnp.asarray(g)}, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return {k: float(v) for k, v in params.items()}


def reference(name, gradients, rate=0.1):
    """The update rules with the original code's constants, one number, float64 (Adam's as in its paper; TensorFlow 1 put epsilon elsewhere)."""
    x, a, b, moment = 1.0, 0.0, 0.0, 0.0
    if name == "adagrad":
        a = 0.1
    if name == "rmsprop":
        a = 1.0
    for t, g in enumerate(gradients, 1):
        if name == "adagrad":
            a += g * g
            x -= rate * g / np.sqrt(a)
        elif name == "adam":
            moment, a = 0.9 * moment + 0.1 * g, 0.999 * a + 0.001 * g * g
            x -= rate * (moment / (1 - 0.9**t)) / (np.sqrt(a / (1 - 0.999**t)) + 0.1)
        elif name == "rmsprop":
            a = 0.9 * a + 0.1 * g * g
            moment = 0.9 * moment + rate * g / np.sqrt(a + 1.0)
            x -= moment
        elif name == "adadelta":
            a = 0.9 * a + 0.1 * g * g
            update = np.sqrt(b + 1e-6) / np.sqrt(a + 1e-6) * g
            b = 0.9 * b + 0.1 * update * update
            x -= rate * update
        elif name == "momentum":
            moment = 0.9 * moment + g
            x -= rate * (g + 0.9 * moment)
    return x


@pytest.mark.parametrize("name", ["adagrad", "adam", "rmsprop", "adadelta", "momentum"])
def test_optimizers_equal_their_rules(name):
    gradients = [0.5, -0.2, 0.9, 0.05]
    assert steps(name, gradients)["kernel"] == pytest.approx(reference(name, gradients), abs=1e-5)


def test_weight_decay_is_on_kernels_only_and_clipping_is_global():
    moved = steps("momentum", [0.0], weight_decay=0.5)
    assert moved["bias"] == 1.0 and moved["kernel"] == pytest.approx(1 - 0.1 * 1.9 * 0.5)
    assert steps("momentum", [30.0], clip=1.0)["bias"] == pytest.approx(1 - 0.1 * 1.9 / np.sqrt(2), rel=1e-4)


def test_bad_settings():
    with pytest.raises(BadInput, match="adagrad, adam"):
        optimizers.Optimizer("sgd")
    with pytest.raises(BadInput, match="moving_average"):
        optimizers.Optimizer(moving_average=1.0)
