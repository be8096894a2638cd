"""The training loop: batches in, metrics out, saved on the way. Knows nothing of data sets or command lines."""

import collections
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from facenet_jax import parallel
from facenet_jax.errors import BadInput
from facenet_jax.files import written
from facenet_jax.training.checkpoints import Checkpoints
from facenet_jax.training.step import State


@dataclass(frozen=True)
class Plan:
    """steps: where the run ends; the others: every so many steps, 0 for never (but log_every is at least 1). margin: the triplet margin, for the
    collapse alarm; 0 without."""

    steps: int
    log_every: int = 50
    checkpoint_every: int = 1000
    evaluate_every: int = 0
    margin: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("log_every", 1), ("checkpoint_every", 0), ("evaluate_every", 0)):
            if getattr(self, name) < least:
                raise BadInput(f"{name}={getattr(self, name)}: it must be at least {least}")


class Stop:
    """Turns SIGTERM and the first Ctrl-C into a request to save and end; only the main thread can listen."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._request) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, _: Any) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


class Log:
    """metrics.jsonl, TensorBoard and the terminal (a line that renews itself) or a file (a line each time). Only the first process writes."""

    def __init__(self, workdir: Path, steps: int, first_step: int) -> None:
        self._steps = steps
        self._first = parallel.is_first_process()
        self._terminal = sys.stderr.isatty()
        if not self._first:
            return
        from tensorboardX import SummaryWriter

        path = workdir / "metrics.jsonl"
        if path.exists():
            # Lines after the restored step come again; those of a half-written line never were.
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= first_step]
            with written(path) as aside:
                aside.write_text("".join(line + "\n" for line in kept))
        self._file = path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One object a line: {"kind": "train" or "evaluation", "step": ..., values}."""
        if not self._first:
            return
        try:
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            raise BadInput(
                f"{self._file.name}: cannot be written ({error.strerror}); the same command goes on when that is mended"
            ) from None
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def show(self, step: int, text: str, keep: bool = False) -> None:
        """Progress for people."""
        if not self._first:
            return
        line = f"{step:>{len(str(self._steps))}}/{self._steps} {text}"
        if self._terminal and not keep:
            width = os.get_terminal_size(sys.stderr.fileno()).columns - 1
            print(f"\r\033[K{line[:width]}", end="", file=sys.stderr, flush=True)
        else:
            print(f"\r\033[K{line}" if self._terminal else line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Flushes. Where the disk is full `write` has said so, or TensorBoard alone loses its last lines."""
        if self._first:
            for file in (self._file, self._board):
                with contextlib.suppress(OSError):
                    file.close()


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return sys.maxsize


def duration(seconds: float) -> str:
    """1h02m, 3m05s or 7s."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m:02d}m" if hours else f"{m}m{s:02d}s" if m else f"{s}s"


def collapsed(metrics: dict[str, float], margin: float) -> bool:
    """Loss at the margin and no spread: every face gets nearly the same embedding."""
    return margin > 0 and abs(metrics.get("triplet_loss", 0.0) - margin) < 0.02 * margin and metrics["spread"] < 0.01


SAVED = "asked to stop: saved; the same command goes on from here"
COLLAPSE = (
    "collapsed: the loss stands at the margin and all embeddings are nearly one point. Lower optimizer.learning_rate or add "
    "optimizer.warmup, use triplet.rule=semi_hard, or start from a network trained with softmax (init=weights.safetensors)."
)


def fit(
    state: State,
    step_function: Callable[[State, dict[str, jax.Array]], tuple[State, dict[str, jax.Array]]],
    batches: Iterator[dict[str, np.ndarray]],
    mesh: Mesh,
    plan: Plan,
    workdir: Path,
    checkpoints: Checkpoints,
    evaluate: Callable[[State], dict[str, Any]] | None = None,
    data: dict[str, Any] | None = None,
) -> tuple[State, bool]:
    """Trains until plan.steps or a request to stop; returns the state and whether it finished.

    Batches hold image, label and index [rows of this host]; only image and label go to the devices. The state is saved with the number of
    batches taken and `data`, which says of what. BadInput where the loss stops being finite, naming the records of that batch.
    """
    first = int(state.step)
    log = Log(workdir, plan.steps, first)
    recent: collections.deque[tuple[int, jax.Array, np.ndarray]] = collections.deque()
    asking: collections.deque[jax.Array | bool] = collections.deque()
    started = last_time = time.perf_counter()
    waited, last_step, alarms, paused = 0.0, first, 0, 0.0
    finished = first >= plan.steps

    def check_finite(limit: int) -> None:
        # A step is looked at two steps later, so that the host never waits for the step it has just sent.
        while len(recent) > limit:
            step, finite, indices = recent.popleft()
            if not bool(finite):
                raise BadInput(
                    f"the loss or the weights are not finite after step {step} (records {', '.join(map(str, indices[:8]))}, ...): lower "
                    "optimizer.learning_rate, set optimizer.clip, or look at those records; the last checkpoint is from before it"
                )

    # Closed after a failure too, for hosts that end without Python's own end.
    with contextlib.closing(log), Stop() as stop:
        for step in range(first, plan.steps):
            before = time.perf_counter()
            try:
                host_batch = next(batches)
            except BadInput:
                if not stop.requested or jax.process_count() > 1:
                    raise
                # A signal to the whole process group ended the loader's workers as well, before they could ignore it.
                check_finite(0)
                checkpoints.save(step, state, {"batches": step, **(data or {})}, wait=True)
                log.show(step, SAVED, keep=True)
                break
            waited += time.perf_counter() - before
            indices = host_batch["index"]
            batch = parallel.to_global(mesh, {"image": host_batch["image"], "label": host_batch["label"]})
            state, metrics = step_function(state, batch)
            recent.append((step, metrics["finite"], indices))
            check_finite(2)
            done = step + 1
            finished = done == plan.steps
            # Looked at once a step: a signal that comes later ends a later step, which then saves. The answers of other hosts are looked at two steps
            # later, by all of them in the same step: no host waits for the step it has just sent.
            asking.append(parallel.any_process(mesh, stop.requested))
            asked = len(asking) > (2 if jax.process_count() > 1 else 0) and bool(asking.popleft()) and not finished
            ending = finished or asked
            if done % plan.log_every == 0 or ending:
                values = {name: float(value) for name, value in metrics.items() if name != "finite"}
                now = time.perf_counter()
                seconds = max(now - last_time - paused, 1e-9)
                rows = len(indices) * jax.process_count()
                values["images_per_s"] = rows * (done - last_step) / seconds
                values["data_wait"] = waited / seconds
                values["elapsed_s"] = now - started
                log.write("train", done, values)
                remaining = (plan.steps - done) * seconds / max(done - last_step, 1)
                shown = " ".join(
                    f"{name}={values[name]:.4g}"
                    for name in ("loss", "active", "classified", "positive", "negative", "spread")
                    if name in values
                )
                log.show(done, f"{shown} {values['images_per_s']:.0f} images/s wait={values['data_wait']:.1%} ETA {duration(remaining)}")
                alarms = alarms + 1 if collapsed(values, plan.margin) else 0
                if alarms == 3:
                    log.show(done, COLLAPSE, keep=True)
                last_time, last_step, waited, paused = now, done, 0.0, 0.0
            pause = time.perf_counter()
            if (plan.checkpoint_every and done % plan.checkpoint_every == 0) or ending:
                check_finite(0)
                checkpoints.save(done, state, {"batches": done, **(data or {})}, wait=ending)
            if evaluate and (finished or (plan.evaluate_every and done % plan.evaluate_every == 0)):
                check_finite(0)
                values = evaluate(state)
                log.write("evaluation", done, values)
                log.show(done, " ".join(f"{name}={value:.4g}" for name, value in values.items() if isinstance(value, float)), keep=True)
            paused += time.perf_counter() - pause
            if asked:
                log.show(done, SAVED, keep=True)
                break
    return state, finished
