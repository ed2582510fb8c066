"""The train loop: from a config and a workdir to a trained model, stopped and resumed at will.

The workdir holds ``config.json``, ``metrics.jsonl`` and ``checkpoints/``. The same command continues where the newest
checkpoint stands, and ends with the same bits as a run that was never stopped; on another mesh or number of processes,
with the same batches. All processes of a run walk through here in step; process 0 alone tells of it.
"""

import hashlib
import os
import signal
import socket
import time
from pathlib import Path
from typing import NamedTuple

import jax
import ml_collections

import ttt_jax
from ttt_jax import config as config_lib
from ttt_jax.data import named_sources, pipeline, token_source
from ttt_jax.data.pipeline import Feed
from ttt_jax.distributed import chips, process_checks, sharding, startup
from ttt_jax.distributed.agreement import Agreement
from ttt_jax.distributed.watchdog import Watchdog
from ttt_jax.errors import CheckpointError, DataError, NonFiniteLossError
from ttt_jax.mixers import MIXERS
from ttt_jax.models import counts, pattern
from ttt_jax.storage import workdir as workdir_lib
from ttt_jax.storage.workdir import Workdir
from ttt_jax.storage.workdir_lock import LockLostError
from ttt_jax.terminal.stopping import StopSignals
from ttt_jax.training import (
    checkpoint,
    compiled_step,
    kernel_check,
    metrics,
    resume,
    run_config,
    validation,
)
from ttt_jax.training import start as start_lib
from ttt_jax.training.optimizer import schedule_change
from ttt_jax.training.profile import Profile
from ttt_jax.training.report import Goodput, Output, ProgressBar, Report

_NO_DATA = 1  # a wish to stop, beside the numbers of signals
_LOST = 1000  # the wish of a process whose workdir another command has taken over


class Outcome(NamedTuple):
    """How a call of :func:`train` ended."""

    step: int  # optimizer steps done
    total: int  # optimizer steps of the whole run
    loss: float | None  # of the last step; None when there was nothing left to do
    signal: signal.Signals | None  # what stopped the run, in this process or another, before its end


def train(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike, *, accept_changed_learner: bool = False
) -> Outcome:
    """Trains, or goes on training, until the run is complete or is told to stop.

    SIGINT or SIGTERM, to any process, saves a checkpoint after a step that all processes agree on, and returns; a
    second one interrupts at once.

    Args:
      workdir: a folder, or a place on gs://.
      accept_changed_learner: go on although the source of a learner of the user's own has changed since the run began;
        the run has the new one from then on.

    Raises:
      ConfigError: before anything is compiled, where the config cannot be run here or is not that of the workdir, or
        where processes are not the same.
      LockLostError: where another command has taken over the workdir; nothing is written from then on.
      DataError: at a batch that cannot be read, with the steps before it saved.
      NonFiniteLossError: with the checkpoints before it intact.
      CheckpointError: where no checkpoint can be restored, or none saved for a while.
    """
    # ---- What to run, and where
    workdir = workdir_lib.at(workdir)
    about = {"config": config.to_dict(), "workdir": str(workdir), "versions": checkpoint.versions(), "code": _code()}
    process_checks.check_same(about)
    if config_lib.own_functions(config):
        config = process_checks.on_all(lambda: resume.found(config, workdir, accept_changed_learner))
        process_checks.check_same({"model.ttt.learner_source": config.model.ttt.learner_source})
    prepared = process_checks.on_all(lambda: _prepare(config, workdir))
    with process_checks.locked(workdir, "ttt train") as lock:
        is_changed = process_checks.on_all(lambda: resume.check_same_run(config, workdir, accept_changed_learner))
        if is_changed:
            process_checks.say(
                f"model.ttt.learner={config.model.ttt.learner!r}: has changed since the run began; accepted"
            )
            if jax.process_index() == 0:
                resume.record(workdir, config.model.ttt.learner_source)
        return _train(config, workdir, lock, *prepared)


def _train(
    config: ml_collections.ConfigDict,
    workdir: Workdir,
    lock: process_checks.JobLock,
    run: compiled_step.Program,
    data: token_source.TokenSource,
    held_out: token_source.TokenSource | None,
) -> Outcome:
    """Train with a workdir that no other command changes meanwhile."""
    versions = checkpoint.versions()
    total = config_lib.steps(config, "training.duration")
    save_every = config_lib.steps(config, "checkpoint.every")
    validate_every = config_lib.steps(config, "evaluation.every")
    batch_size, sequence_length = config.data.batch_size, config.data.sequence_length
    fingerprint = data.fingerprint()
    process_checks.check_same({"data": {data.name: fingerprint}})

    # ---- Where it stands
    process_checks.check_shared(workdir)
    began = time.monotonic()
    best = validation.KeepBest()
    checkpoints = checkpoint.Checkpoints(
        workdir,
        keep_last=config.checkpoint.keep_last,
        keep=best,
        milestone_every=config_lib.steps(config, "checkpoint.milestone_every"),
    )
    restored = checkpoints.restore_newest(run.abstract_state)
    start, useful = 0, 0.0
    if restored is not None:
        start, useful = restored.step, restored.meta["useful_seconds"]
        resume.check_same_data(restored.meta["data"], fingerprint, data.name)
        if start < total and (change := schedule_change(config, restored.meta.get("config"), start, workdir)):
            process_checks.say(change)
        best.losses = validation.read_losses(workdir, start)
        if best.losses and (change := validation.other_tokens(restored.meta.get("config"), config)):
            process_checks.say(change)
    if start >= total:
        checkpoints.close()
        return Outcome(start, total, None, None)
    process_checks.on_all(lambda: checkpoint.check_folder(workdir))
    first_params, origin = None, ""
    if restored is None and config.training.start_from:
        first_params, origin = start_lib.parameters(config, run.abstract_state.params)
    restore_seconds = time.monotonic() - began

    # ---- What tells of it
    device = jax.devices()[0]
    chip = chips.of_device(device)
    tokens = batch_size * sequence_length
    parameters = sum(x.size for x in jax.tree.leaves(run.abstract_state.params))
    process_checks.say(
        f"{pattern.describe(config.model)}, {parameters / 1e6:.1f} M parameters, {total} steps of {tokens:,} tokens on "
        f"{jax.device_count()} x {device.device_kind}"
        + (f" of {jax.process_count()} processes" if jax.process_count() > 1 else "")
        + (f"; going on at step {start}" if start else "")
        + (f"; with the parameters of {origin}" if origin else "")
    )
    process_checks.say(f"parameters: {counts.parameters_in_words(run.abstract_state.params)}")
    with sharding.on_mesh(run.mesh, run.rules):
        for way in dict.fromkeys(MIXERS[kind.model.mixer].computed(kind.model) for kind in pattern.kinds(config.model)):
            if way:
                process_checks.say(f"inner loop: {way}")
    first = jax.process_index() == 0
    output = process_checks.on_all(lambda: _output(config, workdir, start, useful) if first else None)
    report = Report(
        output,
        tokens=tokens,
        flops=counts.flops_per_step(config.model, sequence_length, batch_size),
        chips=jax.device_count(),
        peak=chip.peak_flops if chip else None,
        step=start,
    )
    step = start
    watchdog = Watchdog(config.training.stall_limit, lambda seconds: _stalled(report.step + 1, seconds), armed=False)
    profile = Profile(config_lib.profiled_steps(config), workdir / "profile")
    agreement = Agreement(run.mesh)
    batches = None

    def meta(step):
        position = {"next_batch": step, "source": data.name, "fingerprint": fingerprint}
        spent = output.goodput.useful if output else 0.0
        return {"data": position, "useful_seconds": spent, "config": config.to_dict(), "versions": versions}

    with StopSignals() as stop:
        try:
            # ---- Compile
            began = time.monotonic()
            run = kernel_check.checked(run)
            if output is not None:
                output.bar.compiling()
            if restored is None:
                train_step, state = run.compiled_step_and_initial_state()
            else:
                train_step, state = run.compiled_step(), restored.state
            compile_seconds = time.monotonic() - began
            if output is not None:
                output.bar.compiled(compile_seconds)
            report.waited("compile_seconds", compile_seconds, within_step=False)
            report.waited("restore_seconds", restore_seconds, within_step=False)
            if first_params is not None:
                state = state._replace(params=first_params)
            restored = first_params = None  # the state is donated to the first step

            # ---- Data, from where the run stands
            rows = sharding.rows_here(run.batch_sharding, batch_size)
            batches = pipeline.train_batches(
                data,
                sequence_length=sequence_length,
                batch_size=batch_size,
                seed=config.seed,
                start=start,
                rows=rows,
                worker_processes=config.data.worker_processes,
            )
            feed = Feed(batches)
            validate = validation.Validation(run, held_out, config.evaluation.windows) if held_out else None

            # ---- Train
            def wish() -> int:
                return (_LOST if lock.lost else int(stop.received or 0)) or (_NO_DATA if feed.problem else 0)

            verdict = agreement.cast(wish)
            report.start()
            while step < total and not verdict():
                feed.waited = 0.0
                batch = sharding.global_batch(feed.take(), rows, batch_size, run.batch_sharding)
                verdict = agreement.cast(wish)
                with profile.step(step + 1):
                    state, values = train_step(state, batch)
                step += 1
                report(step, values)
                report.waited("data_wait_seconds", feed.waited)
                watchdog.heard(report.seconds)
                profile.after(step, values)
                best_so_far = False
                if validate is not None and (step % validate_every == 0 or step == total):
                    watchdog.rest()
                    jax.block_until_ready(values)
                    began = time.monotonic()
                    held_out_loss = validate(state.params)
                    report.also(held_out_loss, time.monotonic() - began)
                    report.flush()
                    watchdog.heard()
                    best_so_far = best.add(step, held_out_loss)
                    if bad := validation.not_finite(step, held_out_loss):
                        process_checks.say(bad)
                if step % save_every == 0 or step == total or best_so_far or checkpoints.wants_save(step):
                    lock.check()
                    # A state is saved only once its step is known to be finite.
                    report.finish() if step == total else report.flush()
                    watchdog.rest()  # slow storage is no stall
                    began = time.monotonic()
                    checkpoints.save(step, state, meta(step))
                    report.waited("checkpoint_seconds", time.monotonic() - began)
                    watchdog.heard()
            lock.check()
            report.finish()
            watchdog.close()
            if step > start:
                checkpoints.finish(step, state, meta(step))
                lock.check()
            if step < total and verdict() == _NO_DATA:
                problem = feed.problem or "a process cannot read its next batch (it says which)"
                raise DataError(f"{problem}; the run stands at step {step}, saved, and goes on once that can be read")
        except NonFiniteLossError as error:
            checkpoints.wait()
            raise NonFiniteLossError(_advice(error, checkpoints)) from error
        except (DataError, CheckpointError, LockLostError):  # by all processes alike
            raise
        except BaseException as error:
            if jax.process_count() > 1:
                startup.leave(error)  # the others are not coming, and must not be waited for
            raise
        finally:
            watchdog.close()
            profile.close()
            if batches is not None:
                batches.close()
            if output is not None and not lock.lost:
                output.close()
            checkpoints.close()
    return Outcome(step, total, report.loss, signal.Signals(verdict()) if step < total else None)


def _prepare(
    config: ml_collections.ConfigDict, workdir: Workdir
) -> tuple[compiled_step.Program, token_source.TokenSource, token_source.TokenSource | None]:
    """What can go wrong in one process alone, before they do anything together."""
    mesh = sharding.make_mesh(config_lib.mesh_shape(config, jax.device_count()))
    run = compiled_step.make(config, mesh)
    data = named_sources.from_config(config, "train")
    token_source.check(data, config.model.vocab_size, config.data.sequence_length, windows=config.data.batch_size)
    held_out = None
    if config_lib.steps(config, "evaluation.every"):
        held_out = named_sources.from_config(config, config.evaluation.split)
        token_source.check(held_out, config.model.vocab_size, config.data.sequence_length)
    metrics.check_destinations(workdir, tensorboard=config.log.tensorboard, wandb=bool(config.log.wandb_project))
    workdir_lib.make(workdir)
    return run, data, held_out


def _output(config: ml_collections.ConfigDict, workdir: Workdir, start: int, useful: float) -> Output:
    wandb = {"project": config.log.wandb_project, "config": config.to_dict()} if config.log.wandb_project else None
    writer = metrics.MetricsWriter(workdir, start, tensorboard=config.log.tensorboard, wandb=wandb)
    run_config.write(workdir, config)
    total = config_lib.steps(config, "training.duration")
    bar = ProgressBar(total, start, config.data.batch_size * config.data.sequence_length)
    return Output(writer, bar, Goodput(workdir, useful), config_lib.steps(config, "log.every"))


def _code() -> str:
    """Return a hash of this package's source."""
    folder = Path(ttt_jax.__file__).parent
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.rglob("*.py")):
        digest.update(os.fspath(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _stalled(step: int, seconds: float) -> str:
    return (
        f"ttt train: process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()} has been in step "
        f"{step} for {seconds:.0f} s without an end; stopped, to be started again (training.stall_limit sets the limit)"
    )


def _advice(error: NonFiniteLossError, checkpoints: checkpoint.Checkpoints) -> str:
    last = checkpoints.latest_step()
    good = f"the last good checkpoint is {checkpoints.directory / str(last)}" if last else "no checkpoint was saved yet"
    return (
        f"{error}; {good}. Try a lower optimizer.peak_lr, a longer optimizer.warmup, a lower model.ttt.base_lr, "
        "model.dtype=float32, in a new workdir, or optimizer.spike_factor=10, in this one"
    )
