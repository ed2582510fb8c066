"""Run points as trials of Ray Tune: on a cluster, and with bad points stopped early.

A trial is the same ``ttt train`` process in the same folder as elsewhere; it reports to Tune what stands in its
``metrics.jsonl``. Tune never ends a trial, which would not save: the trial is asked to stop, saves, and ends itself.
"""

import logging
import math
import os
import signal
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from ttt_jax import extras, ray_cluster
from ttt_jax.errors import ConfigError, DataError
from ttt_jax.sweep import files, metric
from ttt_jax.sweep.metric import Early
from ttt_jax.sweep.runner import PointRun, say
from ttt_jax.terminal.stopping import StopSignals

try:
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler, TrialScheduler
except ImportError as error:
    raise ConfigError(f"--engine ray: needs Ray Tune ({error}); {extras.install_command('ray')}") from error

_POLL = 0.5  # seconds
_POLLS = 6  # before a trial reports even without news, so that the scheduler can stop it
_NODE_FAILURES = 10  # of a trial: it continues elsewhere
_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # metrics.jsonl has all that they would write
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a run that compiles has none yet
    "RAY_AIR_NEW_OUTPUT": "0",
}


def run(
    runs: Mapping[str, PointRun],
    *,
    address: str | None,
    resources: Mapping[str, float],
    jobs: int | None,
    early: Early | None,
) -> signal.Signals | None:
    """Run points, by name, as trials; return the signal that stopped the sweep, if one did.

    Args:
      runs: paths in them are absolute; points that have ended already are only compared with.
      address: of a cluster, ``auto`` for the one of this machine; None starts one here, for as long as this takes.
      resources: of a trial, such as ``{"CPU": 4, "GPU": 1}``.
      jobs: how many run at a time; None is as many as there are resources for.

    Raises:
      ConfigError, DataError: where there is no such cluster, or it is lost.
    """
    os.environ.update(_SETTINGS)
    for name in ("ray", "ray.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        ray_cluster.connect(address)
        _check_resources(resources)
        with StopSignals() as stop, tempfile.TemporaryDirectory(prefix="ttt-sweep-") as folder:
            requests = ray.remote(num_cpus=0)(_StopRequests).remote()
            scheduler = _Scheduler(runs, early, requests, stop)
            trainable = tune.with_parameters(_Trainable, runs=runs, requests=requests, early=early)
            tune.Tuner(
                tune.with_resources(trainable, tune.PlacementGroupFactory([dict(resources)])),
                param_space={"point": tune.grid_search(list(runs))},
                tune_config=tune.TuneConfig(scheduler=scheduler, max_concurrent_trials=jobs, reuse_actors=False),
                run_config=tune.RunConfig(
                    name="sweep",
                    storage_path=folder,  # for Tune's own records, which are not needed: points have theirs
                    verbose=0,
                    stop=scheduler,
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                    failure_config=tune.FailureConfig(max_failures=_NODE_FAILURES),
                ),
            ).fit()
            return stop.received
    except (ray.exceptions.RayError, tune.TuneError) as error:
        raise DataError(f"--engine ray: {ray_cluster.last_line(error)}; the same command continues") from error
    finally:
        ray.shutdown()


class _StopRequests:
    """An actor that keeps the states of points after their trials have stopped, for those that are asked to stop."""

    def __init__(self) -> None:
        self._states: dict[str, str] = {}

    def add(self, name: str, state: str) -> None:
        self._states.setdefault(name, state)

    def get(self, name: str) -> str | None:
        return self._states.get(name)


class _Trainable(tune.Trainable):
    """A trial: the process of a point, and what it records."""

    def setup(self, config: dict[str, Any], runs: Any = None, requests: Any = None, early: Any = None) -> None:
        self._run: PointRun = runs[config["point"]]
        self._is_new = self._run.ended is None
        self._requests, self._early, self._step = requests, early, 0
        self._rungs = early.rungs(self._run.point.steps) if early else []

    def step(self) -> dict[str, Any]:
        for _ in range(_POLLS):
            if not self._run.stopped_as and (state := ray.get(self._requests.get.remote(self._run.point.name))):
                self._run.stop(signal.SIGTERM, state)
            record = self._run.poll()
            if reached := self._next_rung():
                return reached
            if record is not None:
                return {"done": True, **({"state": record.state, "said": record.said} if self._is_new else {})}
            time.sleep(_POLL)
        return {}

    def cleanup(self) -> None:
        """Let the run save where Tune ends the trial after all."""
        if self._run.ended is None:
            self._run.stop()
            while self._run.poll() is None:
                time.sleep(_POLL)

    def _next_rung(self) -> dict[str, Any]:
        """Return step and metric where the run has come to another rung."""
        rung = next((rung for rung in self._rungs if rung > self._step), math.inf)
        newest = files.records(self._run.workdir, newest=True) if self._rungs else []
        if not newest or newest[-1]["step"] < rung:
            return {}
        found = metric.at_step(files.records(self._run.workdir), self._early.metric, rung)
        if found is None:  # a run that goes back to a checkpoint drops records
            return {}
        self._step, number = found
        return {"step": self._step, **({} if number is None else {self._early.metric: number})}


class _Scheduler(ASHAScheduler, tune.Stopper):
    """ASHA, if at all, which asks a trial to stop where Tune's own would end it."""

    def __init__(self, runs: Mapping[str, PointRun], early: Early | None, requests: Any, stop: StopSignals):
        self._steps = {name: each.point.steps for name, each in runs.items()}
        self._early, self._requests, self._stop = early, requests, stop
        self._asked: set[str] = set()
        self._running: set[str] = set()  # trials that have reported, and have not ended
        longest = max(self._steps.values())
        super().__init__(
            time_attr="step",
            metric=early.metric if early else "loss",
            mode="max" if early and early.highest else "min",
            max_t=longest,
            grace_period=min(early.grace, longest) if early else longest,
            reduction_factor=early.factor if early else 4,
        )

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        """Return whether Tune may end, as all trials that were asked to stop have done so."""
        return self._stop.received is not None and not self._running

    def on_trial_result(self, tune_controller, trial, result) -> str:
        name = trial.config["point"]
        self._running.add(name)
        comparable = self._early is not None and name not in self._asked and result.get("step", 0) < self._steps[name]
        if self._stop.received is not None:
            for each in self._steps:  # a trial that Tune begins after this starts no process
                self._ask(each, files.STOPPED)
        elif comparable and super().on_trial_result(tune_controller, trial, result) == TrialScheduler.STOP:
            self._ask(name, files.STOPPED_EARLY)
            value = f"{self._metric} {result[self._metric]:.6g}"
            say(f"{name}: to be stopped early, {value} at step {result['step']}")
        return TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller, trial, result) -> None:
        self._running.discard(trial.config["point"])
        if result.get("state"):
            say(": ".join(filter(None, (trial.config["point"], result["state"], result["said"]))))

    def on_trial_error(self, tune_controller, trial) -> None:
        self._running.discard(trial.config["point"])
        say(f"{trial.config['point']}: its trial failed: {str(trial.error_file and trial.get_error())[-200:]}")

    def choose_trial_to_run(self, tune_controller):
        return None if self._stop.received is not None else super().choose_trial_to_run(tune_controller)

    def _ask(self, name: str, state: str) -> None:
        if name not in self._asked:
            self._asked.add(name)
            ray.get(self._requests.add.remote(name, state))


def _check_resources(resources: Mapping[str, float]) -> None:
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(machine.get(name, 0) >= need for name, need in resources.items()) for machine in machines):
        wanted = " ".join(f"{name}={need:g}" for name, need in resources.items())
        say(f"--resources {wanted}: no machine of the cluster has them; waits for one")
