"""The train loop: from a config and a workdir to a trained model, stopped and resumed at will.

The workdir holds ``config.json``, ``metrics.jsonl`` and ``checkpoints/``. The same command continues where the newest
checkpoint stands, and ends with the same bits as a run that was never stopped.
"""

import json
import math
import signal
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from ttt_jax import config as config_lib
from ttt_jax import config_file
from ttt_jax.config import ConfigError
from ttt_jax.data import pipeline, source, sources
from ttt_jax.data.errors import DataError
from ttt_jax.models import build
from ttt_jax.parallel import sharding
from ttt_jax.stop_signals import StopSignals
from ttt_jax.training import checkpoint, metrics, program
from ttt_jax.training.progress import ProgressBar

# What may differ between the parts of a run. None of it changes which numbers are computed, but for the duration
# (the schedule of the rest) and the mesh (the order of sums).
_MAY_CHANGE = (
    "training.duration",
    "checkpoint.",
    "data.source",  # a copy elsewhere; that it holds the same tokens is checked
    "data.tokenizer",
    "data.worker_processes",
    "log.",
    "mesh.",
    "model.remat",
    "model.ttt.remat_group",
    "model.ttt.unroll",
)


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient became infinite or not a number."""


class Outcome(NamedTuple):
    """How a call of :func:`train` ended."""

    step: int  # optimizer steps done
    total: int  # optimizer steps of the whole run
    loss: float | None  # of the last step; None when there was nothing left to do
    signal: signal.Signals | None  # what stopped the run before its end


def train(config: ml_collections.ConfigDict, workdir: Path) -> Outcome:
    """Trains, or goes on training, until the run is complete or is told to stop.

    SIGINT or SIGTERM saves a checkpoint after the step in progress and returns; a second one interrupts at once.

    Raises:
      ConfigError: before anything is compiled, where the config cannot be run here or is not that of the workdir.
      DataError: at a batch that cannot be read, with the steps before it saved.
      NonFiniteLossError: with the checkpoints before it intact.
      CheckpointError: where no checkpoint can be restored, or none saved for a while.
    """
    # ---- What to run, and where
    total = config_lib.steps(config, "training.duration")
    save_every = config_lib.steps(config, "checkpoint.every")
    log_every = config_lib.steps(config, "log.every")
    mesh = sharding.make_mesh(config_lib.mesh_shape(config, jax.device_count()))
    run = program.make(config, mesh)
    data = sources.from_config(config, "train")
    source.check(data, config.model.vocab_size, config.data.sequence_length, windows=config.data.batch_size)
    fingerprint = data.fingerprint()
    _check_same_run(config, workdir)

    # ---- Where it stands
    workdir.mkdir(parents=True, exist_ok=True)
    checkpoints = checkpoint.Checkpoints(
        workdir,
        keep_last=config.checkpoint.keep_last,
        milestone_every=config_lib.steps(config, "checkpoint.milestone_every"),
    )
    restored = checkpoints.restore_newest(run.abstract_state)
    start = restored.step if restored else 0
    if restored:
        _check_same_data(restored.meta["data"], fingerprint, data.name)
    if start >= total:
        checkpoints.close()
        return Outcome(start, total, None, None)
    wandb = {"project": config.log.wandb_project, "config": config.to_dict()} if config.log.wandb_project else None
    writer = metrics.MetricsWriter(workdir, start, tensorboard=config.log.tensorboard, wandb=wandb)
    metrics.write_atomically(workdir / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")

    def meta(step):
        position = {"next_batch": step, "source": data.name, "fingerprint": fingerprint}
        return {"data": position, "config": config.to_dict(), "versions": checkpoint.versions()}

    # ---- Compile, then start or restore
    tokens_per_step = config.data.batch_size * config.data.sequence_length
    parameters = sum(x.size for x in jax.tree.leaves(run.abstract_state.params))
    print(
        f"{build.describe(config.model)}, {parameters / 1e6:.1f} M parameters, {total} steps of {tokens_per_step:,} "
        f"tokens on {jax.device_count()} x {jax.devices()[0].device_kind}"
        + (f"; going on at step {start}" if start else ""),
        file=sys.stderr,
    )
    bar = ProgressBar(total, start, tokens_per_step)
    report = _LateReport(writer, bar, log_every, tokens_per_step)
    batches, step = None, start
    with StopSignals() as stop:
        try:
            train_step = run.compiled_step()
            state = restored.state if restored else run.initial_state()
            restored = None  # the state is donated to the first step
            batches = pipeline.train_batches(
                data,
                sequence_length=config.data.sequence_length,
                batch_size=config.data.batch_size,
                seed=config.seed,
                start=start,
                host=jax.process_index(),
                hosts=jax.process_count(),
                worker_processes=config.data.worker_processes,
            )

            # ---- Train
            report.start()
            while step < total and not stop.received:
                batch = sharding.global_batch(next(batches), run.batch_sharding)
                state, values = train_step(state, batch)
                step += 1
                report(step, values)
                if step % save_every == 0 or step == total or checkpoints.wants_save(step):
                    report.flush()  # a state is saved only once its step is known to be finite
                    checkpoints.save(step, state, meta(step))
            report.flush()
            if step > start:
                checkpoints.finish(step, state, meta(step))
        except DataError as error:
            report.flush()
            if step > start:
                checkpoints.finish(step, state, meta(step))
            raise DataError(
                f"{error}; the run stands at step {step}, saved, and goes on once that can be read"
            ) from error
        except NonFiniteLossError as error:
            checkpoints.wait()
            raise NonFiniteLossError(_advice(error, checkpoints, workdir)) from error
        finally:
            bar.close()
            if batches is not None:
                batches.close()
            writer.close()
            checkpoints.close()
    return Outcome(step, total, report.loss, stop.received if step < total else None)


class _LateReport:
    """Reports the metrics of each step while the next one runs, so that the device never waits for the host."""

    def __init__(self, writer: metrics.MetricsWriter, bar: ProgressBar, log_every: int, tokens_per_step: int):
        self._writer, self._bar, self._log_every, self._tokens = writer, bar, log_every, tokens_per_step
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self.loss: float | None = None

    def start(self) -> None:
        """Starts the clock."""
        self._clock = time.monotonic()

    def __call__(self, step: int, values: dict[str, jax.Array]) -> None:
        """Takes the metrics of a step that has been dispatched, and reports those of the step before it."""
        self.flush()
        self._pending = (step, values)

    def flush(self) -> None:
        """Waits for the step that was taken last, and reports it."""
        if self._pending is None:
            return
        (step, values), self._pending = self._pending, None
        numbers = {name: float(np.asarray(x)) for name, x in values.items()}
        now = time.monotonic()
        seconds, self._clock = now - self._clock, now
        self.loss = numbers["loss"]
        bad = [name for name in ("loss", "grad_norm") if not math.isfinite(numbers[name])]
        if step % self._log_every == 0 or bad:
            timing = {"seconds_per_step": seconds, "tokens_per_second": self._tokens / seconds}
            self._writer.write(step, {**numbers, "tokens": step * self._tokens, **timing})
        if bad:
            raise NonFiniteLossError(f"{bad[0]} is {numbers[bad[0]]} at step {step}")
        self._bar.update(step, self.loss, seconds)


def _check_same_run(config: ml_collections.ConfigDict, workdir: Path) -> None:
    if not (workdir / "config.json").exists():
        return
    there = config_file.from_json(workdir / "config.json")
    different = config_lib.differing_keys(there.to_dict(), config.to_dict())
    refused = {key: values for key, values in different.items() if not key.startswith(_MAY_CHANGE)}
    if refused:
        listed = ", ".join(f"{key} {there!r} there, {here!r} here" for key, (there, here) in refused.items())
        raise ConfigError(f"--workdir {workdir}: holds a run of another config ({listed}); expected a new workdir")


def _check_same_data(there: dict[str, Any], fingerprint: str, name: str) -> None:
    if there["fingerprint"] != fingerprint:
        raise ConfigError(
            f"data.source: {name} is not the data this run began with (fingerprint {there['fingerprint']}, "
            f"now {fingerprint}); expected the same data, or a new workdir"
        )


def _advice(error: NonFiniteLossError, checkpoints: checkpoint.Checkpoints, workdir: Path) -> str:
    last = checkpoints.latest_step()
    good = f"the last good checkpoint is {checkpoints.directory / str(last)}" if last else "no checkpoint was saved yet"
    return (
        f"{error}; {good}. Try a lower optimizer.peak_lr, a longer optimizer.warmup, a lower model.ttt.base_lr, or "
        "model.dtype=float32, in a new workdir"
    )
