"""Softmax cross-entropy over identities, plain or on the sphere with an additive cosine margin."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from facenet_jax.errors import BadInput
from facenet_jax.layers import l2_normalize

Array = jax.Array


@dataclass(frozen=True)
class Softmax:
    """classes: people of the training set. scale 0: logits are prelogits @ kernel + bias (the original code's). scale > 0:
    logits are scale * (cosine - margin at the true class), without bias (CosFace; margin 0 is NormFace)."""

    classes: int
    scale: float = 0.0
    margin: float = 0.0
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise BadInput(f"softmax needs at least 2 classes, not {self.classes}")
        for name in ("scale", "margin"):
            # Also refuses NaN.
            if not getattr(self, name) >= 0:
                raise BadInput(f"softmax.{name}={getattr(self, name)}: it must not be negative")
        if not 0 <= self.smoothing < 1:
            raise BadInput(f"softmax.smoothing={self.smoothing}: it must be at least 0 and below 1")
        if self.margin and not self.scale:
            raise BadInput("a softmax margin needs a scale (try 30): margins are of cosines")


def initialise(key: Array, embedding_size: int, settings: Softmax) -> dict[str, Array]:
    """The head's parameters: kernel [d, classes], and bias [classes] where the logits are plain."""
    kernel = jax.random.truncated_normal(key, -2, 2, (embedding_size, settings.classes)) * 0.1
    return {"kernel": kernel} if settings.scale else {"kernel": kernel, "bias": jnp.zeros((settings.classes,))}


def softmax_loss(head: dict[str, Array], prelogits: Array, labels: Array, mask: Array, settings: Softmax) -> tuple[Array, dict[str, Array]]:
    """Mean cross-entropy over the rows of the mask, float32, and the share classified right.

    prelogits [n, d], labels [n] int in 0..classes-1, mask [n] bool.
    """
    x = prelogits.astype(jnp.float32)
    true_class = jax.nn.one_hot(labels, settings.classes)
    if settings.scale:
        cosine = jnp.dot(l2_normalize(x), l2_normalize(head["kernel"].T).T, precision=lax.Precision.HIGHEST)
        logits, guess = settings.scale * (cosine - settings.margin * true_class), cosine.argmax(-1)
    else:
        logits = jnp.dot(x, head["kernel"], precision=lax.Precision.HIGHEST) + head["bias"]
        guess = logits.argmax(-1)
    target = true_class * (1 - settings.smoothing) + settings.smoothing / settings.classes
    losses = -(target * jax.nn.log_softmax(logits)).sum(-1)
    rows = jnp.maximum(mask.sum(), 1)
    right = jnp.where(mask, guess == labels, False)
    return jnp.where(mask, losses, 0).sum() / rows, {"classified": right.sum() / rows}
