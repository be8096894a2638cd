"""Softmax losses against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from facenet_jax.errors import BadInput
from facenet_jax.losses.classification import Softmax, initialise, softmax_loss


@pytest.mark.parametrize("settings", [Softmax(5), Softmax(5, 20.0, 0.0), Softmax(5, 20.0, 0.3, 0.1)])
def test_equals_reference(settings):
    rng = np.random.default_rng(0)
    x, labels, mask = rng.normal(size=(7, 4)), rng.integers(0, 5, 7), np.arange(7) < 6
    head = {k: np.asarray(v) for k, v in initialise(jax.random.key(0), 4, settings).items()}
    losses, right = [], []
    for row, label in zip(x, labels, strict=True):
        if settings.scale:
            cosine = [row @ head["kernel"][:, c] / np.linalg.norm(row) / np.linalg.norm(head["kernel"][:, c]) for c in range(5)]
            logits = np.asarray([settings.scale * (c - settings.margin * (i == label)) for i, c in enumerate(cosine)])
            right.append(np.argmax(cosine) == label)
        else:
            logits = row @ head["kernel"] + head["bias"]
            right.append(np.argmax(logits) == label)
        logp = logits - np.log(np.exp(logits).sum())
        target = np.full(5, settings.smoothing / 5)
        target[label] += 1 - settings.smoothing
        losses.append(-(target * logp).sum())
    value, metrics = softmax_loss(
        {k: jnp.asarray(v) for k, v in head.items()}, jnp.asarray(x, jnp.float32), jnp.asarray(labels), jnp.asarray(mask), settings
    )
    assert float(value) == pytest.approx(np.mean(losses[:6]), rel=1e-5)
    assert float(metrics["classified"]) == pytest.approx(np.mean(right[:6]))


def test_impossible_settings():
    with pytest.raises(BadInput, match="at least 2 classes"):
        Softmax(1)
    with pytest.raises(BadInput, match="scale"):
        Softmax(5, margin=0.3)
    for name, wrong in (("scale", (-1.0, float("nan"))), ("margin", (-0.1,)), ("smoothing", (-0.1, 1.0, float("nan")))):
        for value in wrong:
            with pytest.raises(BadInput, match=rf"^softmax\.{name}={value}"):
                Softmax(5, **{"scale": 30.0, name: value})
