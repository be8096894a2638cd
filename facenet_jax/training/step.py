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

from facenet_jax import compiling, models, parallel
from facenet_jax.errors import BadInput
from facenet_jax.layers import KEPT, l2_normalize
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


def cached_gradient(
    forward: Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, Any]],
    value_of: Callable[[Any, jax.Array], tuple[jax.Array, Metrics]],
    params: Any,
    images: jax.Array,
    key: jax.Array,
    pieces: int,
) -> tuple[jax.Array, Metrics, Any, Any]:
    """Loss and gradient of a batch whose activations do not fit: (loss, metrics, gradients by params, batch statistics).

    Embeds `pieces` micro-batches keeping no activations, takes the loss once over all rows and its gradient by the prelogits, then embeds each
    micro-batch again and pulls its rows' gradient back. Micro-batch i is rows i, i + pieces, ...: a share of every device's rows, whatever the
    mesh. Both passes use the same key for a micro-batch. BatchNorm normalises each by its own statistics; the running ones average over them.

    forward(params, images [n, s, s, 3], key) gives (prelogits [n, d], batch statistics); value_of(params, prelogits [N, d]) the loss and metrics.
    """
    split = lambda x: x.reshape(x.shape[0] // pieces, pieces, *x.shape[1:]).swapaxes(0, 1)
    merge = lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
    parts, keys = split(images), jax.random.split(key, pieces)
    prelogits, statistics = jax.lax.map(lambda part: forward(params, *part), (parts, keys))
    (value, metrics), (direct, by_prelogits) = jax.value_and_grad(value_of, argnums=(0, 1), has_aux=True)(params, merge(prelogits))

    def pull_back(total: Any, part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Any, None]:
        rows, row_key, cotangent = part
        _, pull = jax.vjp(lambda p: forward(p, rows, row_key)[0], params)
        return jax.tree.map(jnp.add, total, pull(cotangent)[0]), None

    gradients, _ = jax.lax.scan(pull_back, direct, (parts, keys, split(by_prelogits)))
    return value, metrics, gradients, jax.tree.map(lambda a: a.mean(0), statistics)


def make_train_step(
    model: nn.Module,
    preprocessing: Preprocessing,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    settings: Optimizer,
    schedule: Callable[[Any], jax.Array],
    mesh: Mesh,
    seed: int,
    microbatches: int = 1,
    remat: bool = False,
) -> Callable[[State, dict[str, jax.Array]], tuple[State, Metrics]]:
    """A jitted (state, batch) -> (state, metrics); batch: image [N, s, s, 3] uint8, label [N] int32, cut over the mesh.

    The state is donated. Randomness follows from (seed, step). With more than one micro-batch, see `cached_gradient`. With `remat` only the outputs of
    convolutions and residual blocks are kept for the backward pass; the rest is made again from them, by the same arithmetic.
    """

    def step(state: State, batch: dict[str, jax.Array]) -> tuple[State, Metrics]:
        dropout_key, mining_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))

        def forward(params: Any, images: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
            variables = {"params": params["network"], "batch_stats": state.batch_stats}
            prelogits, updated = model.apply(variables, preprocessing(images), train=True, mutable=["batch_stats"], rngs={"dropout": key})
            return jnp.asarray(prelogits, jnp.float32), updated.get("batch_stats", state.batch_stats)

        if remat:
            forward = jax.checkpoint(forward, policy=jax.checkpoint_policies.save_only_these_names(KEPT))

        def value_of(params: Any, prelogits: jax.Array) -> tuple[jax.Array, Metrics]:
            return objective_value(objective, params, prelogits, batch["label"], mining_key, mesh)

        def loss(params: Any) -> tuple[jax.Array, Any]:
            prelogits, batch_stats = forward(params, batch["image"], dropout_key)
            value, metrics = value_of(params, prelogits)
            return value, (metrics, batch_stats)

        if microbatches == 1:
            (value, (metrics, batch_stats)), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        else:
            value, metrics, gradients, batch_stats = cached_gradient(
                forward, value_of, state.params, batch["image"], dropout_key, microbatches
            )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if average is not None:
            # A young average follows closely, or the first thousands of steps would be mostly the random start.
            decay = jnp.minimum(settings.moving_average, (1 + state.step) / (10 + state.step))
            average = jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, average, (params, batch_stats))
        # Of the state that comes out, statistics too: one that is not finite must not be saved.
        finite = jnp.isfinite(value) & jnp.isfinite(global_norm((params, batch_stats)))
        metrics |= {
            "finite": finite,
            "loss": value,
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "gradient_norm": global_norm(gradients),
            "update_norm": global_norm(updates),
            "weight_norm": global_norm(params),
        }
        return State(state.step + 1, params, batch_stats, opt_state, average), metrics

    whole, cut = parallel.replicated(mesh), parallel.batch_sharded(mesh)
    platform = mesh.devices.flat[0].platform
    return jax.jit(
        parallel.on_mesh(mesh, step),
        donate_argnums=0,
        in_shardings=(whole, cut),
        out_shardings=(whole, whole),
        compiler_options=compiling.options(platform),
    )


def evaluated_variables(state: State) -> dict[str, Any]:
    """Network variables to evaluate and publish: the moving average where there is one."""
    params, batch_stats = (state.params, state.batch_stats) if state.average is None else state.average
    return {"params": params["network"], "batch_stats": batch_stats}
