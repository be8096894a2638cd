"""The one jitted training step: standardise, forward, mine over the global batch, loss, gradients, update."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from facenet_jax import models, parallel
from facenet_jax.errors import BadInput
from facenet_jax.layers import l2_normalize
from facenet_jax.losses import classification
from facenet_jax.losses.classification import Softmax
from facenet_jax.losses.triplet import Triplet, mined_triplet_loss
from facenet_jax.preprocessing import Preprocessing
from facenet_jax.training.optimizers import Optimizer, global_norm

Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class State:
    """All that training changes. `average` is the moving average of (params, batch_stats), or None."""

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    average: Any


@dataclass(frozen=True)
class Objective:
    """A weighted sum of losses; None or weight 0 leaves one out."""

    triplet: Triplet | None = None
    softmax: Softmax | None = None
    triplet_weight: float = 1.0
    softmax_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.triplet is None and self.softmax is None:
            raise BadInput("nothing to train: set triplet.weight or softmax.weight above 0")


def initial_state(
    model: nn.Module, objective: Objective, optimizer: optax.GradientTransformation, settings: Optimizer, size: int, seed: int
) -> State:
    """Fresh state; the same for the same seed on any mesh."""
    network_key, head_key = jax.random.split(jax.random.key(seed))
    variables = models.initialise(model, network_key, size)
    params = {"network": variables["params"]}
    if objective.softmax:
        embedding_size: int = model.embedding_size
        params["softmax"] = classification.initialise(head_key, embedding_size, objective.softmax)
    batch_stats = variables.get("batch_stats", {})
    # A copy: the step gives the state's buffers away, and one buffer can be given only once.
    average = jax.tree.map(jnp.copy, (params, batch_stats)) if settings.moving_average else None
    return State(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params), average)


def objective_value(
    objective: Objective, params: Any, prelogits: jax.Array, labels: jax.Array, key: jax.Array, mesh: Mesh
) -> tuple[jax.Array, Metrics]:
    """The weighted loss of a global batch of prelogits [N, d], and what to watch."""
    mask = jnp.ones(labels.shape, bool)
    embeddings = l2_normalize(prelogits)
    total = jnp.zeros(())
    metrics: Metrics = {}
    if objective.triplet:
        draw = jax.random.bits(key, (), jnp.uint32)
        loss, found = mined_triplet_loss(embeddings, labels, mask, draw, mesh, objective.triplet)
        total += objective.triplet_weight * loss
        metrics |= {"triplet_loss": loss, **found}
    if objective.softmax:
        loss, found = classification.softmax_loss(params["softmax"], prelogits, labels, mask, objective.softmax)
        total += objective.softmax_weight * loss
        metrics |= {"softmax_loss": loss, **found}
    # Mean variance of the embedding over the batch: 1 when directions are spread evenly, 0 when all are one.
    metrics["spread"] = 1 - jnp.sum(jnp.square(jax.lax.stop_gradient(embeddings).mean(0)))
    return total, metrics


def make_train_step(
    model: nn.Module,
    preprocessing: Preprocessing,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    settings: Optimizer,
    schedule: Callable[[Any], jax.Array],
    mesh: Mesh,
    seed: int,
) -> Callable[[State, dict[str, jax.Array]], tuple[State, Metrics]]:
    """A jitted (state, batch) -> (state, metrics); batch: image [N, s, s, 3] uint8, label [N] int32, cut over the mesh.

    The state is donated. Randomness follows from (seed, step).
    """

    def step(state: State, batch: dict[str, jax.Array]) -> tuple[State, Metrics]:
        dropout_key, mining_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))

        def loss(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params["network"], "batch_stats": state.batch_stats}
            images = preprocessing(batch["image"])
            prelogits, updated = model.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": dropout_key})
            value, metrics = objective_value(objective, params, prelogits, batch["label"], mining_key, mesh)
            return value, (metrics, updated.get("batch_stats", state.batch_stats))

        (value, (metrics, batch_stats)), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if average is not None:
            # A young average follows closely, or the first thousands of steps would be mostly the random start.
            decay = jnp.minimum(settings.moving_average, (1 + state.step) / (10 + state.step))
            average = jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, average, (params, batch_stats))
        metrics |= {
            "loss": value,
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "gradient_norm": global_norm(gradients),
            "update_norm": global_norm(updates),
            "weight_norm": global_norm(params),
        }
        return State(state.step + 1, params, batch_stats, opt_state, average), metrics

    whole, cut = parallel.replicated(mesh), parallel.batch_sharded(mesh)
    return jax.jit(step, donate_argnums=0, in_shardings=(whole, cut), out_shardings=(whole, whole))


def evaluated_variables(state: State) -> dict[str, Any]:
    """Network variables to evaluate and publish: the moving average where there is one."""
    params, batch_stats = (state.params, state.batch_stats) if state.average is None else state.average
    return {"params": params["network"], "batch_stats": batch_stats}
