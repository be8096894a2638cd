"""A config's network, losses and optimiser: what a train step is made of, the same for training here and for compiling ahead of time."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import optax
from ml_collections import ConfigDict

from facenet_jax import models
from facenet_jax.errors import BadInput
from facenet_jax.losses.classification import Softmax
from facenet_jax.losses.triplet import Triplet
from facenet_jax.preprocessing import Preprocessing
from facenet_jax.training import optimizers, schedules, step


@dataclass(frozen=True)
class Parts:
    """Everything of a run but its data and devices."""

    config: ConfigDict
    model: nn.Module
    objective: step.Objective
    optimizer_settings: optimizers.Optimizer
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation

    def initial_state(self) -> step.State:
        """Fresh weights from the config's seed."""
        size, seed = self.config.model.size, self.config.seed
        return step.initial_state(self.model, self.objective, self.optimizer, self.optimizer_settings, size, seed)

    def train_step(self, mesh: jax.sharding.Mesh) -> Any:
        """The jitted step: (state, batch) -> (state, metrics)."""
        return step.make_train_step(
            self.model,
            Preprocessing(self.config.model.size, self.config.model.standardisation),
            self.objective,
            self.optimizer,
            self.optimizer_settings,
            self.schedule,
            mesh,
            self.config.seed,
            self.config.batch.microbatches,
            self.config.batch.remat,
        )

    def abstract_state(self, sharding: jax.sharding.Sharding) -> step.State:
        """The state as shapes, laid out so."""
        shaped = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
        return jax.tree.map(shaped, jax.eval_shape(self.initial_state))


def model_arguments(config: ConfigDict) -> dict[str, Any]:
    """What `models.create` takes from the config."""
    return {key: value for key, value in config.model.items() if key not in ("name", "size", "standardisation")}


def make_objective(config: ConfigDict, classes: int) -> step.Objective:
    """Losses with weight above 0."""
    triplet = softmax = None
    if config.triplet.weight > 0:
        if config.data.sampler != "people":
            raise BadInput("triplets need data.sampler=people: a shuffled batch has hardly a pair of one person")
        settings = {key: value for key, value in config.triplet.items() if key != "weight"}
        triplet = Triplet(max_images=config.batch.images_per_person, **settings)
    if config.softmax.weight > 0:
        softmax = Softmax(classes, **{key: value for key, value in config.softmax.items() if key != "weight"})
    return step.Objective(triplet, softmax, config.triplet.weight, config.softmax.weight)


def build(config: ConfigDict, classes: int) -> Parts:
    """The parts of a config for `classes` people; BadInput where its values are impossible."""
    models.check_size(config.model.name, config.model.size)
    settings = optimizers.Optimizer(**{key: config.optimizer[key] for key in ("name", "weight_decay", "clip", "moving_average")})
    schedule = schedules.create(
        config.optimizer.schedule,
        config.optimizer.learning_rate,
        config.steps,
        warmup=config.optimizer.warmup,
        epoch_steps=config.optimizer.epoch_steps,
    )
    model = models.create(config.model.name, **model_arguments(config))
    return Parts(config, model, make_objective(config, classes), settings, schedule, optimizers.create(settings, schedule))
