"""Train a model: the loop from a config and a workdir to a trained model, which can be stopped and resumed at any step.

The workdir holds ``config.json``, ``metrics.jsonl`` and ``checkpoints/``. The same command continues from the newest
checkpoint and ends with the same bits as a run that was never stopped; on another mesh or number of processes, it
reads the same batches. All processes of a run go through the loop together; process 0 alone writes and prints.
"""

import os
import signal
import socket
import time
from typing import NamedTuple

import jax
import ml_collections

from ttt_jax import config as config_lib
from ttt_jax.data import pipeline
from ttt_jax.distributed import agreement, sharding, startup
from ttt_jax.errors import CheckpointError, DataError, NonFiniteLossError
from ttt_jax.storage import workdir as workdir_lib
from ttt_jax.storage.workdir import Workdir
from ttt_jax.storage.workdir_lock import LockLostError
from ttt_jax.terminal.stopping import StopSignals
from ttt_jax.training import checkpoint, report, run_config, validation
from ttt_jax.training import start as start_lib
from ttt_jax.training.metrics import Profile
from ttt_jax.training.step import with_checked_kernels

# Reasons to stop, beside the numbers of signals; processes agree on the largest.
_NO_DATA = 1  # the next batch cannot be read
_LOCK_LOST = 1000  # another command has taken over the workdir


class Outcome(NamedTuple):
    """The result of a call of :func:`train`."""

    step: int  # optimizer steps done
    total: int  # optimizer steps of the whole run
    loss: float | None  # of the last step; None when there was nothing left to do
    signal: signal.Signals | None  # what stopped the run, in this process or another, before its end


def train(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike, *, accept_changed_learner: bool = False
) -> Outcome:
    """Train, or continue training, until the run is complete or is told to stop.

    On SIGINT or SIGTERM to any process, all processes save a checkpoint after the same step and return; a second
    signal interrupts at once.

    Args:
      workdir: a folder, or a place on gs://.
      accept_changed_learner: continue although the source of a learner of the user's own has changed since the run
        began. The run uses the new source from then on.

    Raises:
      ConfigError: before anything is compiled, where the config cannot be run here or is not that of the workdir, or
        where processes differ.
      LockLostError: where another command has taken over the workdir; nothing is written from then on.
      DataError: at a batch that cannot be read, with the steps before it saved.
      NonFiniteLossError: where the loss or its gradient is not finite; earlier checkpoints are intact.
      CheckpointError: where no checkpoint can be restored, or none could be saved for a while.
    """
    workdir = workdir_lib.at(workdir)
    start_lib.check_processes(config, workdir)
    config = run_config.with_learner_of_run(config, workdir, accept_changed_learner)
    prepared = agreement.on_all(lambda: start_lib.prepare(config, workdir))
    with agreement.locked(workdir, "ttt train") as lock:
        run_config.check_run(config, workdir, accept_changed_learner)
        return _train(config, workdir, lock, prepared)


def _train(
    config: ml_collections.ConfigDict, workdir: Workdir, lock: agreement.JobLock, prepared: start_lib.Prepared
) -> Outcome:
    """Train in a workdir that no other command changes meanwhile."""
    run, data, held_out = prepared
    total = config_lib.steps(config, "training.duration")
    save_every = config_lib.steps(config, "checkpoint.every")
    validate_every = config_lib.steps(config, "evaluation.every")
    batch_size, sequence_length = config.data.batch_size, config.data.sequence_length
    versions, fingerprint = start_lib.versions(), data.fingerprint()
    agreement.check_same({"data": {data.name: fingerprint}})
    agreement.check_shared(workdir)

    # ---- The step that the run begins with
    began = time.monotonic()
    best = validation.KeepBest()
    checkpoints = checkpoint.Checkpoints(
        workdir,
        keep_last=config.checkpoint.keep_last,
        keep=best,
        milestone_every=config_lib.steps(config, "checkpoint.milestone_every"),
    )
    restored = start_lib.restore(config, workdir, prepared, fingerprint, checkpoints, best)
    start = restored.step if restored else 0
    if start >= total:
        checkpoints.close()
        return Outcome(start, total, None, None)
    agreement.on_all(lambda: checkpoint.check_folder(workdir))
    loaded_params, origin = None, ""
    if restored is None and config.training.start_from:
        loaded_params, origin = start_lib.load_parameters(config, run.abstract_state.params)
    restore_seconds = time.monotonic() - began

    # ---- Reports, and what watches over the run
    report.describe(config, run, start=start, origin=origin)
    useful_seconds = restored.meta["useful_seconds"] if restored else 0.0
    output = agreement.on_all(lambda: report.open_output(config, workdir, start, useful_seconds))
    reporter = report.Reporter.of_run(config, output, start)
    watchdog = startup.Watchdog(
        config.training.stall_limit, lambda seconds: _stalled(reporter.step + 1, seconds), armed=False
    )
    profile = Profile(config_lib.profiled_steps(config), workdir / "profile")
    votes = agreement.Votes(run.mesh)
    batches = None

    def meta(step: int) -> dict:
        return {
            "data": {"next_batch": step, "source": data.name, "fingerprint": fingerprint},
            "useful_seconds": output.goodput.useful if output else 0.0,
            "config": config.to_dict(),
            "versions": versions,
        }

    step = start
    with StopSignals() as stop:
        try:
            # ---- Compile
            began = time.monotonic()
            run = with_checked_kernels(run)
            if output:
                output.bar.compiling()
            if restored is None:
                train_step, state = run.compiled_step_and_initial_state()
            else:
                train_step, state = run.compiled_step(), restored.state
            if loaded_params is not None:
                state = state._replace(params=loaded_params)
            restored = loaded_params = None  # free them: the state is donated to the first step
            compile_seconds = time.monotonic() - began
            if output:
                output.bar.compiled(compile_seconds)
            reporter.waited("compile_seconds", compile_seconds, within_step=False)
            reporter.waited("restore_seconds", restore_seconds, within_step=False)

            # ---- Read data from where the run stands
            rows = sharding.rows_of_this_process(run.batch_sharding, batch_size)
            batches = pipeline.train_batches(
                data,
                sequence_length=sequence_length,
                batch_size=batch_size,
                seed=config.seed,
                start=start,
                rows=rows,
                worker_processes=config.data.worker_processes,
            )
            feed = pipeline.Feed(batches)
            validate = validation.Validation(run, held_out, config.evaluation.windows) if held_out else None

            # ---- Train
            def reason_to_stop() -> int:
                if lock.lost:
                    return _LOCK_LOST
                return int(stop.received or 0) or (_NO_DATA if feed.problem else 0)

            agreed_to_stop = votes.cast(reason_to_stop)
            reporter.start()
            while step < total and not agreed_to_stop():
                feed.waited = 0.0
                batch = sharding.global_batch(feed.take(), rows, batch_size, run.batch_sharding)
                agreed_to_stop = votes.cast(reason_to_stop)
                with profile.step(step + 1):
                    state, values = train_step(state, batch)
                step += 1
                reporter.add_step(step, values)
                reporter.waited("data_wait_seconds", feed.waited)
                watchdog.heard(reporter.seconds)
                profile.after(step, values)

                is_best = False
                if validate and (step % validate_every == 0 or step == total):
                    watchdog.rest()
                    jax.block_until_ready(values)
                    began = time.monotonic()
                    validation_values = validate(state.params)
                    reporter.add_validation(validation_values, time.monotonic() - began)
                    reporter.flush()
                    watchdog.heard()
                    is_best = best.add(step, validation_values)
                    if warning := validation.not_finite(step, validation_values):
                        agreement.print_once(warning)

                if step % save_every == 0 or step == total or is_best or checkpoints.wants_save(step):
                    lock.check()
                    # A state is saved only once the loss of its step is known to be finite.
                    if step == total:
                        reporter.finish()
                    else:
                        reporter.flush()
                    watchdog.rest()  # slow storage is no stall
                    began = time.monotonic()
                    checkpoints.save(step, state, meta(step))
                    reporter.waited("checkpoint_seconds", time.monotonic() - began)
                    watchdog.heard()

            # ---- Save the last step
            lock.check()
            reporter.finish()
            watchdog.close()
            if step > start:
                checkpoints.finish(step, state, meta(step))
                lock.check()
            if step < total and agreed_to_stop() == _NO_DATA:
                problem = feed.problem or "a process cannot read its next batch (it says which)"
                raise DataError(f"{problem}; the run is saved at step {step}: run the same command once this is mended")
        except NonFiniteLossError as error:
            checkpoints.wait()
            raise NonFiniteLossError(_advice(error, checkpoints)) from error
        except (DataError, CheckpointError, LockLostError):  # raised by all processes alike
            raise
        except BaseException as error:
            if jax.process_count() > 1:
                startup.leave(error)  # ends this process: the others must not wait for it, nor it for them
            raise
        finally:
            watchdog.close()
            profile.close()
            if batches is not None:
                batches.close()
            if output and not lock.lost:
                output.close()
            checkpoints.close()
    return Outcome(step, total, reporter.loss, signal.Signals(agreed_to_stop()) if step < total else None)


def _stalled(step: int, seconds: float) -> str:
    return (
        f"ttt train: process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()} has been in step "
        f"{step} for {seconds:.0f} s; stopped, and to be started again (training.stall_limit sets the limit)"
    )


def _advice(error: NonFiniteLossError, checkpoints: checkpoint.Checkpoints) -> str:
    last = checkpoints.latest_step()
    good = f"the last good checkpoint is {checkpoints.directory / str(last)}" if last else "no checkpoint was saved yet"
    return (
        f"{error}; {good}. Try a lower optimizer.peak_lr, a longer optimizer.warmup, a lower model.ttt.base_lr, "
        "model.dtype=float32, in a new workdir, or optimizer.spike_factor=10, in this one"
    )
