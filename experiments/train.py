"""Train an embedding network: `python -m experiments.train [--config=experiments/configs/NAME.py] [--workdir=runs/NAME]`.

Without flags: draws people that do not exist, trains on them with triplets, verifies on others, writes a report. The same command again goes
on where it stopped.
"""

import contextlib
import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from data_pipelines import loader, sampling, sources, synthetic_records
from data_pipelines.transforms import Transforms
from experiments import embedding, reporting
from facenet_jax import command_line, models, parallel
from facenet_jax.errors import BadInput
from facenet_jax.evaluation import pairs as verification
from facenet_jax.inference import Embedder
from facenet_jax.losses.classification import Softmax
from facenet_jax.losses.triplet import Triplet
from facenet_jax.preprocessing import Preprocessing
from facenet_jax.training import loop, optimizers, schedules, step
from facenet_jax.training.checkpoints import Checkpoints
from facenet_jax.weights.portable import Weights, load_weights, save_weights

FLAGS = flags.FLAGS
# Settings that change how a run is watched, not what it computes: they may differ when it goes on.
_FREE = {"log_every", "checkpoint_every", "evaluate_every", "data.workers"}


def find_records(name: str, data_dir: Path) -> str:
    """A path as given, or inside --data_dir."""
    if name.startswith("tfds:") or Path(name).is_absolute() or ((data_dir / name).exists() is False and Path(name).exists()):
        return name
    return str(data_dir / name)


def check_same_run(workdir: Path, config: ConfigDict) -> None:
    """Compares with the run that left a checkpoint here, if one did; BadInput names the first setting that differs. Writes config.json."""
    path = workdir / "config.json"
    now = json.loads(config.to_json())
    if path.exists() and any((workdir / "checkpoints").glob("[0-9]*")):
        then = command_line.flatten(json.loads(path.read_text()))
        for key, value in command_line.flatten(now).items():
            if key not in _FREE and then.get(key) != value:
                raise BadInput(
                    f"{workdir} holds a run with {key}={then.get(key)!r}, not {value!r}: choose another --workdir or set it back"
                )
        return
    if parallel.is_first_process():
        workdir.mkdir(parents=True, exist_ok=True)
        aside = workdir / ".config.json.writing"
        aside.write_text(json.dumps(now, indent=1) + "\n")
        aside.rename(path)


def make_sampler(config: ConfigDict, labels: np.ndarray) -> loader.Sampler:
    """P x K people, or shuffled images in batches of as many rows."""
    batch = config.batch
    if config.data.sampler == "people":
        return sampling.PeopleSampler(labels, batch.people, batch.images_per_person, batch.minimum_images, config.seed)
    if config.data.sampler == "shuffle":
        return sampling.ShuffledSampler(labels, batch.people * batch.images_per_person, config.seed)
    raise BadInput(f"no sampler named {config.data.sampler!r}; there are people, shuffle")


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


def preflight(labels: np.ndarray, sampler: loader.Sampler, rows: int) -> None:
    """Says what the data hold, and warns where they are too few to learn an embedding from."""
    counts = np.bincount(labels)
    print(
        f"data: {len(labels)} images of {len(counts)} people, {counts.min()} to {counts.max()} each (median {int(np.median(counts))}); "
        f"batches of {rows}",
        flush=True,
    )
    if len(counts) < 100:
        print(f"warning: {len(counts)} people are too few to learn faces from scratch; start from trained weights (init=...)", flush=True)


def current_weights(config: ConfigDict, state: step.State, source: sources.Source) -> Weights:
    """The network to evaluate and publish."""
    variables = jax.tree.map(np.asarray, jax.device_get(step.evaluated_variables(state)))
    provenance = {
        "trained_by": "facenet_jax experiments.train",
        "steps": int(state.step),
        "records": str(source.metadata.get("name", "")),
        "records_sha256": source.metadata.get("content_sha256", ""),
        "alignment": source.metadata.get("alignment", {}),
    }
    preprocessing = Preprocessing(config.model.size, config.model.standardisation).to_json()
    return Weights(variables, config.model.name, model_arguments(config), preprocessing, config.model.embedding_size, provenance=provenance)


def model_arguments(config: ConfigDict) -> dict[str, Any]:
    """What `models.create` takes from the config."""
    return {key: value for key, value in config.model.items() if key not in ("name", "size", "standardisation")}


def take_initial(path: Path, config: ConfigDict, state: step.State) -> step.State:
    """The state with the network of a weights file; BadInput where it is another network."""
    weights = load_weights(path)
    shapes = lambda tree: {jax.tree_util.keystr(p): leaf.shape for p, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    here = shapes({"params": state.params["network"], "batch_stats": state.batch_stats})
    if weights.network != config.model.name or shapes(weights.variables) != here:
        raise BadInput(
            f"init={path} is a {weights.network} of {weights.embedding_size} numbers, this run's is a {config.model.name} of {config.model.embedding_size}"
        )
    if weights.preprocessing["standardisation"] != config.model.standardisation:
        raise BadInput(f"init={path} was trained with model.standardisation={weights.preprocessing['standardisation']}")
    params = {**state.params, "network": weights.variables["params"]}
    stats = weights.variables.get("batch_stats", {})
    return dataclasses.replace(
        state, params=params, batch_stats=stats, average=None if state.average is None else jax.tree.map(np.copy, (params, stats))
    )


def run(config: ConfigDict, workdir: Path, data_dir: Path) -> dict[str, Any] | None:
    """Trains (or goes on), evaluates, writes weights and report; returns the evaluation, or None when asked to stop before the end."""
    started = time.perf_counter()
    models.check_size(config.model.name, config.model.size)
    records = find_records(config.data.records, data_dir)
    if not config.data.records:
        raise BadInput("data.records is not set: --config.data.records=DIRECTORY, made by `python -m data_pipelines.prepare`")
    if config.seed < 0:
        raise BadInput(f"seed={config.seed}: it must not be negative")
    if config.data.synthetic_people:
        if parallel.is_first_process():
            synthetic_records.ensure(Path(records), config.data.synthetic_people, config.model.size)
        parallel.wait_for_all("drawn people")
    source = sources.open_source(records, config.data.split)
    sampler = make_sampler(config, source.labels)
    mesh = parallel.make_mesh()
    parallel.check_divides(mesh, sampler.rows, config.batch.microbatches)
    objective = make_objective(config, int(source.labels.max()) + 1)
    transforms = Transforms(config.model.size, **config.transforms)
    optimizer_settings = optimizers.Optimizer(**{key: config.optimizer[key] for key in ("name", "weight_decay", "clip", "moving_average")})
    schedule = schedules.create(
        config.optimizer.schedule,
        config.optimizer.learning_rate,
        config.steps,
        warmup=config.optimizer.warmup,
        epoch_steps=config.optimizer.epoch_steps,
    )
    plan = loop.Plan(
        config.steps,
        config.log_every,
        config.checkpoint_every,
        config.evaluate_every,
        objective.triplet.margin if objective.triplet else 0.0,
    )
    model = models.create(config.model.name, **model_arguments(config))
    optimizer = optimizers.create(optimizer_settings, schedule)
    evaluate = Evaluator(config, data_dir, source)
    check_same_run(workdir, config)
    preflight(source.labels, sampler, sampler.rows)

    make = lambda: step.initial_state(model, objective, optimizer, optimizer_settings, config.model.size, config.seed)
    checkpoints = Checkpoints(workdir / "checkpoints")
    whole = parallel.replicated(mesh)
    position = 0
    if checkpoints.latest is not None:
        like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), jax.eval_shape(make))
        state, saved = checkpoints.restore(like)
        position = saved["batches"]
        if saved["records"] != source.metadata.get("content_sha256", ""):
            raise BadInput(
                f"{workdir} was trained on other records than {records} holds now: give it the former --data_dir, or choose another --workdir"
            )
        print(f"goes on from step {position}", flush=True)
    else:
        state = make()
        if config.init:
            state = take_initial(Path(config.init), config, state)
        state = jax.device_put(state, whole)
        print(f"{config.model.name}: {models.parameter_count({'params': state.params['network']}):,} trainable values", flush=True)

    train_step = step.make_train_step(
        model,
        Preprocessing(config.model.size, config.model.standardisation),
        objective,
        optimizer,
        optimizer_settings,
        schedule,
        mesh,
        config.seed,
        config.batch.microbatches,
    )
    batches = loader.batches(
        source,
        sampler,
        transforms,
        config.seed,
        start=position,
        stop=config.steps,
        workers=config.data.workers,
        host=jax.process_index(),
        hosts=jax.process_count(),
    )
    if position == 0:
        before = evaluate(state)
        print(f"before training: accuracy {before['accuracy']:.4f}", flush=True)
    with contextlib.closing(batches), contextlib.closing(checkpoints):
        data = {"records": source.metadata.get("content_sha256", "")}
        state, finished = loop.fit(state, train_step, batches, mesh, plan, workdir, checkpoints, evaluate, data)
    if not finished or not parallel.is_first_process():
        return None
    return publish(config, workdir, state, source, evaluate, time.perf_counter() - started)


class Evaluator:
    """Verification of the validation people, the same pairs every time."""

    def __init__(self, config: ConfigDict, data_dir: Path, train: sources.Source) -> None:
        settings = config.evaluation
        self._config, self._train = config, train
        self.source = sources.open_source(find_records(settings.records or config.data.records, data_dir), settings.split)
        if settings.pairs:
            self.pairs = verification.read_pairs(Path(find_records(settings.pairs, data_dir)))
        else:
            self.pairs = verification.draw_pairs(self.source.keys, self.source.labels)
        self.first, self.second, _ = embedding.rows_of_pairs(self.pairs, self.source.keys, allow_missing=False)
        self._needed = np.unique(np.concatenate([self.first, self.second]))

    def embed(self, state: step.State) -> np.ndarray:
        """[n, d] by record; rows that no pair needs are zero."""
        embedder = Embedder(current_weights(self._config, state, self._train))
        found = embedding.embed(
            embedder,
            self.source,
            indices=self._needed,
            crop=self._config.transforms.crop,
            flip=self._config.evaluation.flip,
            progress=False,
        )
        embeddings = np.zeros((len(self.source.labels), found.embeddings.shape[1]), np.float32)
        embeddings[self._needed] = found.embeddings
        return embeddings

    def verify(self, embeddings: np.ndarray) -> verification.Verification:
        """The protocol on those embeddings."""
        settings = self._config.evaluation
        return verification.verify(
            embeddings[self.first],
            embeddings[self.second],
            self.pairs.same,
            self.pairs.fold,
            distance=settings.distance,
            mean_subtraction=settings.mean_subtraction,
        )

    def __call__(self, state: step.State) -> dict[str, Any]:
        found = self.verify(self.embed(state))
        return {
            "accuracy": found.accuracy,
            "accuracy_sem": found.accuracy_sem,
            "val": found.val,
            "far": found.far,
            "auc": found.auc,
            "eer": found.eer,
        }


def publish(
    config: ConfigDict, workdir: Path, state: step.State, source: sources.Source, evaluate: Evaluator, seconds: float
) -> dict[str, Any]:
    """weights.safetensors, evaluation.json and report.html of a finished run."""
    embeddings = evaluate.embed(state)
    found = evaluate.verify(embeddings)
    threshold = {
        "accuracy": float(np.median(found.fold_thresholds)),
        f"far_{found.far_target:g}": float(np.median(found.fold_val_thresholds)),
    }
    weights = dataclasses.replace(current_weights(config, state, source), thresholds={found.distance: threshold})
    fingerprint = save_weights(workdir / "weights.safetensors", weights)
    result = {
        **found.to_json(),
        "flip": config.evaluation.flip,
        "weights_fingerprint": fingerprint,
        "records_hash": evaluate.source.metadata.get("content_sha256", ""),
        "seconds": seconds,
        "command": command_line.command(),
    }
    command_line.write_json(workdir / "evaluation.json", result)
    reporting.write(
        workdir / "report.html",
        f"{config.model.name} after {int(state.step)} steps",
        found,
        evaluate.source,
        embeddings,
        evaluate.pairs,
        evaluate.first,
        evaluate.second,
        metrics=workdir / "metrics.jsonl",
        details=result,
    )
    print(
        f"accuracy {found.accuracy:.4f} ± {found.accuracy_sem:.4f} (standard error), VAL {found.val:.4f} at FAR {found.far:.4f}, {loop.duration(seconds)}"
    )
    print(f"{workdir}: weights.safetensors evaluation.json report.html")
    return result


def main(_: list[str]) -> None:
    """Command line."""
    command_line.use_compilation_cache()
    parallel.start_distributed(FLAGS.coordinator, FLAGS.process_count, FLAGS.process_index, FLAGS.start_timeout)
    config = FLAGS.config
    name = Path(config_flags.get_config_filename(FLAGS["config"])).stem
    run(config, Path(FLAGS.workdir or f"runs/{name}"), Path(FLAGS.data_dir))


def _flags() -> None:
    config_flags.DEFINE_config_file(
        "config", str(Path(__file__).parent / "configs" / "synthetic.py"), "Configuration file; --config.key=value changes a setting."
    )
    flags.DEFINE_string("workdir", "", "Run directory; runs/<config name> by default.")
    flags.DEFINE_string("data_dir", os.environ.get("FACENET_JAX_DATA", "data"), "Where directories of records lie.")
    flags.DEFINE_string("coordinator", "", "Many hosts: address:port of process 0.")
    flags.DEFINE_integer("process_count", 1, "Many hosts: how many processes.")
    flags.DEFINE_integer("process_index", 0, "Many hosts: which one this is.")
    flags.DEFINE_integer("start_timeout", 300, "Many hosts: seconds to wait for the others.")


if __name__ == "__main__":
    try:
        _flags()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # The default config is read, --config.key=value included, when its flag is defined.
        raise SystemExit(command_line.fail(str(error))) from None
    command_line.run(main)
