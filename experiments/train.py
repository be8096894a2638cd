"""Train an embedding network: `python -m experiments.train [--config=experiments/configs/NAME.py] [--workdir=runs/NAME]`.

Without flags: draws people that do not exist, trains on them with triplets, verifies on others, writes a report. The same command again goes
on where it stopped.
"""

import contextlib
import dataclasses
import hashlib
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
from experiments import building
from experiments.verifying import Evaluator, find_records, publish
from facenet_jax import command_line, models, parallel
from facenet_jax.errors import BadInput
from facenet_jax.training import loop, step
from facenet_jax.training.checkpoints import Checkpoints, saved_steps
from facenet_jax.weights.cache import find_weights
from facenet_jax.weights.portable import load_weights

FLAGS = flags.FLAGS
# Settings that change how a run is watched, not what it computes: they may differ when it goes on.
_FREE = {"log_every", "checkpoint_every", "evaluate_every", "data.workers"}


def check_same_run(workdir: Path, config: ConfigDict) -> None:
    """Compares with the run that left a checkpoint here, if one did; BadInput names the first setting that differs. Writes config.json."""
    path = workdir / "config.json"
    now = json.loads(config.to_json())
    if path.exists() and saved_steps(workdir / "checkpoints"):
        then = command_line.flatten(json.loads(path.read_text()))
        for key, value in command_line.flatten(now).items():
            if key not in _FREE and then.get(key) != value:
                raise BadInput(
                    f"{workdir} holds a run with {key}={then.get(key)!r}, not {value!r}: choose another --workdir or set it back"
                )
        return
    if parallel.is_first_process():
        workdir.mkdir(parents=True, exist_ok=True)
        command_line.write_json(path, now)


def check_hosts(config: ConfigDict, workdir: Path, train: sources.Source, evaluation: sources.Source) -> None:
    """BadInput on every host where they do not work on one run: other data, settings, first weights, or a --workdir that they do not share."""
    with parallel.failing_together():
        if not (workdir / "config.json").exists():
            raise BadInput(f"{workdir}: process 0 writes another directory of that name: --workdir must lie on a disk that all hosts share")
        here = {
            "the version of jax": jax.__version__,
            "the length of the training split": len(train.labels),
            "content_sha256 of data.records": train.metadata.get("content_sha256", ""),
            "the length of the evaluation split": len(evaluation.labels),
            "content_sha256 of the evaluation records": evaluation.metadata.get("content_sha256", ""),
            "the file init": hashlib.sha256(find_weights(config.init).read_bytes()).hexdigest() if config.init else "",
            "the list of checkpoints": saved_steps(workdir / "checkpoints"),
            **command_line.flatten(json.loads(config.to_json())),
        }
    parallel.check_alike(here)


def make_sampler(config: ConfigDict, labels: np.ndarray) -> loader.Sampler:
    """P x K people, or shuffled images in batches of as many rows."""
    batch = config.batch
    if config.data.sampler == "people":
        return sampling.PeopleSampler(labels, batch.people, batch.images_per_person, batch.minimum_images, config.seed)
    if config.data.sampler == "shuffle":
        return sampling.ShuffledSampler(labels, batch.people * batch.images_per_person, config.seed)
    raise BadInput(f"no sampler named {config.data.sampler!r}; there are people, shuffle")


def preflight(labels: np.ndarray, sampler: loader.Sampler, rows: int) -> None:
    """Says what the data hold, and warns where they are too few to learn an embedding from."""
    counts = np.bincount(labels)
    say(
        f"data: {len(labels)} images of {len(counts)} people, {counts.min()} to {counts.max()} each (median {int(np.median(counts))}); "
        f"batches of {rows}"
    )
    if len(counts) < 100:
        say(f"warning: {len(counts)} people are too few to learn faces from scratch; start from trained weights (init=...)")


def say(line: str) -> None:
    """A line to people, from one host."""
    if parallel.is_first_process():
        print(line, flush=True)


def take_initial(path_or_name: str, config: ConfigDict, state: step.State) -> step.State:
    """The state with the network of a weights file; BadInput where it is another network."""
    weights = load_weights(find_weights(path_or_name))
    shapes = lambda tree: {jax.tree_util.keystr(p): leaf.shape for p, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    here = shapes({"params": state.params["network"], "batch_stats": state.batch_stats})
    if weights.network != config.model.name:
        raise BadInput(f"init={path_or_name} is a {weights.network}, this run's network is a {config.model.name}")
    there = shapes(weights.variables)
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            raise BadInput(
                f"init={path_or_name} is another {weights.network}: {name} has shape {there.get(name, 'none')} there, {here.get(name, 'none')} in "
                f"this run; the file's settings are {weights.arguments}, this run's --config.model"
            )
    if weights.preprocessing["standardisation"] != config.model.standardisation:
        raise BadInput(f"init={path_or_name} was trained with model.standardisation={weights.preprocessing['standardisation']}")
    params = {**state.params, "network": weights.variables["params"]}
    stats = weights.variables.get("batch_stats", {})
    return dataclasses.replace(
        state, params=params, batch_stats=stats, average=None if state.average is None else jax.tree.map(np.copy, (params, stats))
    )


def run(config: ConfigDict, workdir: Path, data_dir: Path, force: bool = False) -> dict[str, Any] | None:
    """Trains (or goes on), evaluates, writes weights and report; returns the evaluation, or None when asked to stop before the end and on all
    hosts but the first. force: evaluate although those records are aligned in another way."""
    started = time.perf_counter()
    records = find_records(config.data.records, data_dir)
    if not config.data.records:
        raise BadInput("data.records is not set: --config.data.records=DIRECTORY, made by `python -m data_pipelines.prepare`")
    if config.seed < 0:
        raise BadInput(f"seed={config.seed}: it must not be negative")
    with parallel.failing_together():
        if config.data.synthetic_people and parallel.is_first_process():
            synthetic_records.ensure(Path(records), config.data.synthetic_people, config.model.size)
    with parallel.failing_together():
        source = sources.open_source(records, config.data.split)
        sampler = make_sampler(config, source.labels)
        mesh = parallel.make_mesh()
        parallel.check_divides(mesh, sampler.rows, config.batch.microbatches)
        parts = building.build(config, int(source.labels.max()) + 1)
        transforms = Transforms(config.model.size, **config.transforms)
        plan = loop.Plan(
            config.steps,
            config.log_every,
            config.checkpoint_every,
            config.evaluate_every,
            parts.objective.triplet.margin if parts.objective.triplet else 0.0,
        )
        evaluate = Evaluator(config, data_dir, source, force)
        check_same_run(workdir, config)
    check_hosts(config, workdir, source, evaluate.source)
    preflight(source.labels, sampler, sampler.rows)

    checkpoints = Checkpoints(workdir / "checkpoints")
    whole = parallel.replicated(mesh)
    position = 0
    if checkpoints.latest is not None:
        state, saved = checkpoints.restore(parts.abstract_state(whole))
        position = saved["batches"]
        if saved["records"] != source.metadata.get("content_sha256", ""):
            raise BadInput(
                f"{workdir} was trained on other records than {records} holds now: give it the former --data_dir, or choose another --workdir"
            )
        say(f"goes on from step {position}")
    else:
        state = parts.initial_state()
        if config.init:
            state = take_initial(config.init, config, state)
        state = jax.device_put(state, whole)
        say(f"{config.model.name}: {models.parameter_count({'params': state.params['network']}):,} trainable values")

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
        say(f"before training: accuracy {before['accuracy']:.4f}")
    with contextlib.closing(batches), contextlib.closing(checkpoints):
        data = {"records": source.metadata.get("content_sha256", "")}
        state, finished = loop.fit(state, parts.train_step(mesh), batches, mesh, plan, workdir, checkpoints, evaluate, data)
    if not finished or not parallel.is_first_process():
        return None
    return publish(config, workdir, state, source, evaluate, time.perf_counter() - started)


def main(_: list[str]) -> None:
    """Command line."""
    command_line.use_compilation_cache()
    command_line.keep_freed_memory()
    config = FLAGS.config
    name = Path(config_flags.get_config_filename(FLAGS["config"])).stem
    with parallel.joined(FLAGS.coordinator, FLAGS.process_count, FLAGS.process_index, FLAGS.start_timeout, FLAGS.heartbeat_timeout):
        run(config, Path(FLAGS.workdir or f"runs/{name}"), Path(FLAGS.data_dir), FLAGS.force)


def _flags() -> None:
    config_flags.DEFINE_config_file(
        "config", str(Path(__file__).parent / "configs" / "synthetic.py"), "Configuration file; --config.key=value changes a setting."
    )
    flags.DEFINE_string("workdir", "", "Run directory; runs/<config name> by default.")
    flags.DEFINE_string("data_dir", os.environ.get("FACENET_JAX_DATA", "data"), "Where directories of records lie.")
    flags.DEFINE_string("coordinator", "", "Many hosts: address:port of process 0.")
    flags.DEFINE_integer("process_count", 1, "Many hosts: how many processes.")
    flags.DEFINE_integer("process_index", 0, "Many hosts: which one this is.")
    flags.DEFINE_integer("start_timeout", 300, "Many hosts: seconds to wait for the others.", lower_bound=1)
    flags.DEFINE_integer("heartbeat_timeout", 100, "Many hosts: seconds of silence after which one counts as dead and the run ends.", 1)
    flags.DEFINE_bool("force", False, "Evaluate although those records are aligned in another way than the training data.")


if __name__ == "__main__":
    command_line.run(main, define_flags=_flags)
