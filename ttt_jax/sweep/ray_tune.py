"""Points as trials of Ray Tune: on a cluster, and with bad ones stopped early.

A trial is the same ``ttt train`` process in the same folder as elsewhere; it tells Tune what stands in its
``metrics.jsonl``. Tune never ends a trial: it is asked to stop, saves, and ends by itself.
"""

import collections
import dataclasses
import logging
import os
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ttt_jax import extras
from ttt_jax.data.prepare import engines
from ttt_jax.errors import ConfigError, DataError
from ttt_jax.storage import workdir as workdir_lib
from ttt_jax.sweep import record
from ttt_jax.sweep.follow import Follower
from ttt_jax.sweep.point_run import PointRun
from ttt_jax.sweep.points import Point
from ttt_jax.terminal.stopping import StopSignals

try:
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler, TrialScheduler
except ImportError as error:
    raise ConfigError(f"--engine ray: needs Ray Tune ({error}); {extras.install_command('ray')}") from error

_POLL = 0.5  # seconds
_SILENCE = 3.0  # seconds; a trial without news says so, for an answer is when it hears that it should stop
_NODE_FAILURES = 10  # of a trial: it goes on elsewhere
_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # metrics.jsonl has all that they would write
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a run that compiles has none yet
    "RAY_AIR_NEW_OUTPUT": "0",
}


class Early(NamedTuple):
    """When points are stopped early: by asynchronous successive halving (ASHA, https://arxiv.org/abs/1810.05934).

    At each rung, ``grace * factor^k`` steps, a point goes on if it is among the best ``1 / factor`` of those that have
    come there so far.
    """

    metric: str
    grace: int
    factor: float
    highest: bool

    def rungs(self, steps: int) -> list[float]:
        """Steps of the rungs of a run of so many."""
        found, rung = [], float(self.grace)
        while rung < steps:
            found.append(rung)
            rung *= self.factor
        return found


class Trial(NamedTuple):
    """What the process of a trial has to know.

    Attributes:
      command: program and arguments; None where the point has ended already, and its records are only compared with.
      directory: of the sweep; ``local`` is a folder for log and lock, and ``cwd`` where the command runs.
    """

    point: Point
    command: list[str] | None
    directory: str
    local: str
    cwd: str
    restarts: int


def run(
    trials: Sequence[Trial],
    *,
    address: str | None,
    resources: Mapping[str, float],
    jobs: int | None,
    early: Early | None,
    tell: Callable[[str], None],
) -> signal.Signals | None:
    """Runs all trials; returns the signal that stopped it, if one did.

    Args:
      address: of a cluster, ``auto`` for the one of this machine; None starts one here, for as long as this takes.
      resources: that a trial takes, such as ``{"CPU": 4, "GPU": 1}``.
      jobs: at most so many at a time; None is as many as there are resources for.
      tell: is given a line of text now and then.

    Raises:
      ConfigError: where there is no such cluster.
      DataError: where the cluster is lost.
    """
    os.environ.update(_SETTINGS)
    for name in ("ray", "ray.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        engines.connect(address)
        _check_resources(resources, tell)
        with StopSignals() as stop, tempfile.TemporaryDirectory(prefix="ttt-sweep-") as folder:
            wishes = ray.remote(num_cpus=0)(_Wishes).remote()
            scheduler = _Scheduler(trials, early, wishes, stop, tell)
            trainable = tune.with_parameters(_Trainable, wishes=wishes, early=early)
            tune.Tuner(
                tune.with_resources(trainable, tune.PlacementGroupFactory([dict(resources)])),
                param_space={"trial": tune.grid_search([_packed(trial) for trial in trials])},
                tune_config=tune.TuneConfig(scheduler=scheduler, max_concurrent_trials=jobs, reuse_actors=False),
                run_config=tune.RunConfig(
                    name="sweep",
                    storage_path=folder,  # of Tune's own books, which nobody needs: a point knows where it stands
                    verbose=0,
                    stop=_Stopper(scheduler),
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                    failure_config=tune.FailureConfig(max_failures=_NODE_FAILURES),
                ),
            ).fit()
            return stop.received
    except (ray.exceptions.RayError, tune.TuneError) as error:
        raise DataError(f"--engine ray: {engines.last_line(error)}; the same command goes on") from error
    finally:
        ray.shutdown()


class _Wishes:
    """An actor that trials ask whether they should stop; and as what."""

    def __init__(self) -> None:
        self._of: dict[str, str] = {}

    def ask(self, name: str, state: str) -> None:
        self._of.setdefault(name, state)

    def of(self, name: str) -> str | None:
        return self._of.get(name)


class _Trainable(tune.Trainable):
    """A trial: the process of a point, and what it records."""

    def setup(self, config: dict[str, Any], wishes: Any = None, early: Early | None = None) -> None:
        trial = _unpacked(config["trial"])
        directory = workdir_lib.at(trial.directory)
        self._name, self._wishes, self._asked, self._ended = trial.point.name, wishes, False, False
        rungs = early.rungs(trial.point.steps) if early else []
        path = directory / self._name / "metrics.jsonl"
        self._follower = Follower(path, early.metric if early else "loss", rungs)
        self._news: collections.deque[dict[str, Any]] = collections.deque()
        self._run = None
        if trial.command is not None:
            cwd = Path(trial.cwd) if Path(trial.cwd).is_dir() else None
            local, restarts = Path(trial.local), trial.restarts
            self._run = PointRun(trial.point, directory, local, trial.command, cwd=cwd, restarts=restarts)

    def step(self) -> dict[str, Any]:
        deadline = time.monotonic() + _SILENCE
        while not self._news:
            if self._ended:
                state = {} if self._run is None or self._run.ended is None else dataclasses.asdict(self._run.ended)
                return {"done": True, **state}
            self._listen()
            self._ended = self._run is None or self._run.poll() is not None
            self._news.extend(self._follower.news())
            if not self._news and not self._ended:
                if time.monotonic() > deadline:
                    return {}
                time.sleep(_POLL)
        return self._news.popleft()

    def cleanup(self) -> None:
        """Where Tune ends the trial after all."""
        if self._run is not None and self._run.ended is None:
            self._run.stop()
            while self._run.poll() is None:
                time.sleep(_POLL)

    def _listen(self) -> None:
        if self._run is not None and not self._asked:
            wish = ray.get(self._wishes.of.remote(self._name))
            if wish is not None:
                self._asked = True
                self._run.stop(signal.SIGTERM, wish)


class _Scheduler(ASHAScheduler):
    """ASHA, if at all, that asks where Tune's own would end a trial, which then would not save.

    Attributes:
      interrupted: whether all trials are asked to stop, and none is begun.
      running: trials that have said something, and have not ended.
    """

    def __init__(self, trials, early: Early | None, wishes, stop: StopSignals, tell: Callable[[str], None]):
        self._names = [trial.point.name for trial in trials]
        self._steps = {trial.point.name: trial.point.steps for trial in trials}
        self._early, self._wishes, self._stop, self._tell_line = early, wishes, stop, tell
        self._asked: set[str] = set()
        self.running: set[str] = set()
        longest = max(self._steps.values())
        super().__init__(
            time_attr="step",
            metric=early.metric if early else "loss",
            mode="max" if early and early.highest else "min",
            max_t=longest,
            grace_period=min(early.grace, longest) if early else longest,
            reduction_factor=early.factor if early else 4,
        )

    @property
    def interrupted(self) -> bool:
        return self._stop.received is not None

    def on_trial_result(self, tune_controller, trial, result) -> str:
        name = _name(trial)
        self.running.add(name)
        if self.interrupted:
            for each in self._names:  # of those that Tune begins yet, none starts its process
                self._ask(each, record.STOPPED)
        elif self._early is not None and name not in self._asked and result.get("step", 0) < self._steps[name]:
            decision = super().on_trial_result(tune_controller, trial, result)
            if decision == TrialScheduler.STOP:
                self._ask(name, record.STOPPED_EARLY)
                value = f"{self._early.metric} {result[self._early.metric]:.6g}"
                self._tell_line(f"{name}: to be stopped early, {value} at step {result['step']}")
        return TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller, trial, result) -> None:
        name = _name(trial)
        self.running.discard(name)
        state = result.get("state")
        if state:
            self._tell_line(f"{name}: {state}{': ' * bool(result.get('said'))}{result.get('said', '')}")

    def on_trial_error(self, tune_controller, trial) -> None:
        name = _name(trial)
        self.running.discard(name)
        self._tell_line(f"{name}: its trial failed: {str(trial.error_file and trial.get_error())[-200:]}")

    def choose_trial_to_run(self, tune_controller):
        return None if self.interrupted else super().choose_trial_to_run(tune_controller)

    def _ask(self, name: str, state: str) -> None:
        if name not in self._asked:
            self._asked.add(name)
            ray.get(self._wishes.ask.remote(name, state))


class _Stopper(tune.Stopper):
    """Ends Tune's loop once all trials that were asked to stop have done so."""

    def __init__(self, scheduler: _Scheduler):
        self._scheduler = scheduler

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._scheduler.interrupted and not self._scheduler.running


def _name(trial) -> str:
    return trial.config["trial"]["point"]["name"]


def _packed(trial: Trial) -> dict[str, Any]:
    """As Tune keeps configs: of dicts and lists."""
    return {**trial._asdict(), "point": trial.point._asdict()}


def _unpacked(packed: dict[str, Any]) -> Trial:
    return Trial(**{**packed, "point": Point(**packed["point"])})


def _check_resources(resources: Mapping[str, float], tell: Callable[[str], None]) -> None:
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(machine.get(name, 0) >= need for name, need in resources.items()) for machine in machines):
        wanted = " ".join(f"{name}={need:g}" for name, need in resources.items())
        tell(f"--resources {wanted}: no machine of the cluster has them; waits for one")
