"""The network of a run, verified while it trains and published at its end."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from data_pipelines import sources
from experiments import embedding, reporting
from experiments.building import model_arguments
from facenet_jax import command_line
from facenet_jax.evaluation import pairs as verification
from facenet_jax.inference import Embedder
from facenet_jax.preprocessing import Preprocessing
from facenet_jax.training import loop, step
from facenet_jax.weights.portable import Weights, save_weights


def find_records(name: str, data_dir: Path) -> str:
    """A path as given, or inside --data_dir."""
    if name.startswith("tfds:") or Path(name).is_absolute() or ((data_dir / name).exists() is False and Path(name).exists()):
        return name
    return str(data_dir / name)


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


class Evaluator:
    """Verification of the validation people, the same pairs every time. BadInput where they are aligned in another way, unless forced."""

    def __init__(self, config: ConfigDict, data_dir: Path, train: sources.Source, force: bool = False) -> None:
        settings = config.evaluation
        self._config, self._train = config, train
        self.source = sources.open_source(find_records(settings.records or config.data.records, data_dir), settings.split)
        embedding.check_alignment(train.metadata, self.source, force)
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
            crop=self._config.evaluation.crop if self._config.evaluation.records else self._config.transforms.crop,
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
    # Those of embeddings with the mirror image's beside them would mislead whoever embeds images plainly.
    plain = not (config.evaluation.flip or config.evaluation.mean_subtraction)
    weights = dataclasses.replace(current_weights(config, state, source), thresholds={found.distance: threshold} if plain else {})
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
