"""Report the progress of a run: a line on the terminal, records of metrics, and the time spent waiting."""

import math
import time

import jax
import ml_collections
import numpy as np

from ttt_jax import config as config_lib
from ttt_jax.distributed import agreement, chips, sharding
from ttt_jax.errors import NonFiniteLossError
from ttt_jax.mixers import MIXERS
from ttt_jax.models import counts, pattern
from ttt_jax.storage.json_files import DamagedFile, read_object, warn_once, write_object
from ttt_jax.storage.workdir import Workdir
from ttt_jax.storage.writing import set_aside
from ttt_jax.terminal.console import StatusLine, duration
from ttt_jax.training import metrics, run_config
from ttt_jax.training.step import Program

_STARTED = "started.json"
_MOST_SKIPPED = 10  # updates in a row without a finite gradient, after which it is no spike


class Reporter:
    """Report the metrics of each step while the next one runs, so that the device never waits for the host.

    Args:
      output: where to report; None on all processes but process 0.
      tokens: tokens of one global batch.
      flops: model FLOPs of a step.
      chips: number of chips.
      peak: FLOP/s of one chip; None where that is not known.
      step: the step that the run begins with.

    Attributes:
      step: the last step that was reported.
      loss: its loss.
      seconds: the time it took.
    """

    def __init__(
        self,
        output: "Output | None",
        *,
        tokens: int,
        flops: float,
        chips: int,
        peak: float | None,
        step: int = 0,
    ):
        self._output, self._tokens, self._flops, self._chips, self._peak = output, tokens, flops, chips, peak
        self._pending: tuple[int, dict[str, jax.Array]] | None = None  # the step that was dispatched last
        self._waits: dict[str, float] = {}  # seconds since the last record, by what the run waited for
        self._waited_within_step = 0.0
        self._validation: dict[str, float] = {}
        self._unwritten: tuple[int, dict[str, float]] | None = None  # the record of the last step, if not written
        self.step = step
        self.loss: float | None = None
        self.seconds = 0.0

    @classmethod
    def of_run(cls, config: ml_collections.ConfigDict, output: "Output | None", start: int) -> "Reporter":
        """Return the reporter of a run on the devices of this job."""
        batch_size, sequence_length = config.data.batch_size, config.data.sequence_length
        chip = chips.of_device(jax.devices()[0])
        return cls(
            output,
            tokens=batch_size * sequence_length,
            flops=counts.flops_per_step(config.model, sequence_length, batch_size),
            chips=jax.device_count(),
            peak=chip.peak_flops if chip else None,
            step=start,
        )

    def start(self) -> None:
        """Start the clock."""
        self._clock = time.monotonic()

    def waited(self, name: str, seconds: float, *, within_step: bool = True) -> None:
        """Add time that was not spent computing to the next record."""
        self._waits[name] = self._waits.get(name, 0.0) + seconds
        self._waited_within_step += seconds if within_step else 0.0

    def add_step(self, step: int, values: dict[str, jax.Array]) -> None:
        """Take the metrics of a step that has been dispatched, and report those of the step before it."""
        self._report()
        self._pending = (step, values)

    def add_validation(self, values: dict[str, float], seconds: float) -> None:
        """Add validation losses to the record of the last step; the seconds do not count for that step."""
        self._validation = {**values, "evaluation_seconds": seconds}
        self._clock += seconds

    def flush(self) -> None:
        """Wait for the last step and report it. All records are then where a resumed run finds them.

        Raises:
          NonFiniteLossError: where its loss or gradient is not finite, unless the guard left the update out.
        """
        self._report()
        if self._output is not None:
            self._output.writer.flush()

    def finish(self) -> None:
        """Report the last step of a run, or of a part of it, and record it whatever ``log.every`` is.

        Raises:
          NonFiniteLossError: as :meth:`flush`.
        """
        self._report()
        if self._output is not None and self._unwritten is not None:
            self._write(self._output)
        self.flush()

    def _report(self) -> None:
        if self._pending is None:
            return
        (step, values), self._pending = self._pending, None
        numbers = {name: float(np.asarray(x)) for name, x in values.items()}
        now = time.monotonic()
        self.seconds, self._clock = now - self._clock, now
        self.step, self.loss = step, numbers["loss"]
        bad = [name for name in ("loss", "grad_norm") if not math.isfinite(numbers[name])]
        if 0 < numbers.get("skipped_in_a_row", 0) < _MOST_SKIPPED:
            bad = []
        if self._output is not None:
            self._add_record(self._output, step, numbers, bool(bad))
        self._waited_within_step = 0.0
        if bad:
            raise NonFiniteLossError(f"{bad[0]} is {numbers[bad[0]]} at step {step}")

    def _add_record(self, output: "Output", step: int, numbers: dict[str, float], bad: bool) -> None:
        output.goodput.add(max(self.seconds - self._waited_within_step, 0.0))
        validation, self._validation = self._validation, {}
        rate = self._tokens / self.seconds
        timing = {
            "seconds_per_step": self.seconds,
            "tokens_per_second": rate,
            "tokens_per_second_per_chip": rate / self._chips,
            "goodput": output.goodput.share(),
            **self._waits,
        }
        if self._peak is not None:
            timing["model_flop_utilisation"] = self._flops / self.seconds / (self._chips * self._peak)
        self._unwritten = (step, {**numbers, **validation, "tokens": step * self._tokens, **timing})
        if step % output.log_every == 0 or bad or validation:
            self._write(output)
        if not bad:
            output.bar.update(step, numbers["loss"], self.seconds)

    def _write(self, output: "Output") -> None:
        assert self._unwritten is not None
        output.writer.write(*self._unwritten)
        self._unwritten, self._waits = None, {}


class Output:
    """The outputs to which process 0 reports a run: files of metrics, a progress bar, and the clock of goodput."""

    def __init__(self, writer: metrics.MetricsWriter, bar: "ProgressBar", goodput: "Goodput", log_every: int):
        self.writer, self.bar, self.goodput, self.log_every = writer, bar, goodput, log_every

    def close(self) -> None:
        """Close the files, and leave the terminal as it was."""
        self.bar.close()
        self.writer.close()


def open_output(config: ml_collections.ConfigDict, workdir: Workdir, start: int, useful: float) -> Output | None:
    """Write ``config.json`` and open what process 0 reports to; return None on all other processes.

    Args:
      start: the step that the run begins with.
      useful: seconds of useful steps up to there.
    """
    if jax.process_index() > 0:
        return None
    wandb = {"project": config.log.wandb_project, "config": config.to_dict()} if config.log.wandb_project else None
    writer = metrics.MetricsWriter(workdir, start, tensorboard=config.log.tensorboard, wandb=wandb)
    run_config.write(workdir, config)
    total = config_lib.steps(config, "training.duration")
    bar = ProgressBar(total, start, config.data.batch_size * config.data.sequence_length)
    return Output(writer, bar, Goodput(workdir, useful), config_lib.steps(config, "log.every"))


def describe(config: ml_collections.ConfigDict, run: Program, *, start: int, origin: str) -> None:
    """Print what is going to be trained, and how.

    Args:
      start: the step that the run begins with.
      origin: where its first parameters are from; empty where they are drawn.
    """
    parameters = sum(x.size for x in jax.tree.leaves(run.abstract_state.params))
    total, tokens = config_lib.steps(config, "training.duration"), config.data.batch_size * config.data.sequence_length
    agreement.print_once(
        f"{pattern.describe(config.model)}, {parameters / 1e6:.1f} M parameters, {total} steps of {tokens:,} tokens on "
        f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        + (f" of {jax.process_count()} processes" if jax.process_count() > 1 else "")
        + (f"; continuing at step {start}" if start else "")
        + (f"; with the parameters of {origin}" if origin else "")
    )
    agreement.print_once(f"parameters: {counts.parameters_in_words(run.abstract_state.params)}")
    with sharding.on_mesh(run.mesh, run.rules):
        ways = [MIXERS[kind.model.mixer].computed(kind.model) for kind in pattern.kinds(config.model)]
    for way in filter(None, dict.fromkeys(ways)):
        agreement.print_once(f"inner loop: {way}")


class ProgressBar:
    """Show step, loss, tokens per second, step time and time to the end on the terminal.

    Args:
      total: steps of the whole run.
      start: the step that the run begins with.
      tokens_per_step: tokens of one global batch.
    """

    def __init__(self, total: int, start: int, tokens_per_step: int):
        self._total, self._tokens = total, tokens_per_step
        self._line = StatusLine(total, start, "compiling")

    def compiling(self) -> None:
        """Say that the training step is being compiled, which may take minutes."""
        self._line.note("compiling the training step ...")

    def compiled(self, seconds: float) -> None:
        """Say how long compiling took."""
        self._line.note(f"compiled in {seconds:.1f} s")

    def update(self, step: int, loss: float, seconds_per_step: float) -> None:
        """Show the last step."""
        left = duration(seconds_per_step * (self._total - step))
        self._line.show(
            step,
            f"step {step}/{self._total}  loss {loss:.4f}  {self._tokens / seconds_per_step:,.0f} tokens/s  "
            f"{seconds_per_step:.3f} s/step  {left} left",
        )

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._line.close()


class Goodput:
    """Measure the share of a run's time that went into steps that count, since its first start.

    Restarts, and steps that were lost with them, count as time but not as useful.

    Args:
      workdir: the workdir of the run, which remembers when the run was first started.
      useful: seconds of useful steps up to the checkpoint that the run continues from. The steps after it are done
        again, so their time was lost.
    """

    def __init__(self, workdir: Workdir, useful: float = 0.0):
        path = workdir / _STARTED
        self._started = _first_start(path, useful)
        if not path.exists():
            write_object(path, {"unix_time": self._started})
        self.useful = useful

    def add(self, seconds: float) -> None:
        """Add the time of a step, without what it waited for."""
        self.useful += seconds

    def share(self) -> float:
        """Return useful seconds per second since the first start."""
        return self.useful / max(time.time() - self._started, self.useful, 1e-9)


def _first_start(path: Workdir, useful: float) -> float:
    """Return when the run was first started, as far as that is known. A damaged file is set aside."""
    try:
        started = read_object(path).get("unix_time")
        if isinstance(started, int | float) and 0 < started < math.inf:
            return float(started)
        problem = f"{path}: damaged: it holds no unix_time"
    except (FileNotFoundError, NotADirectoryError):
        return time.time()
    except DamagedFile as error:
        problem = str(error)
    warn_once(f"{problem}; kept as {set_aside(path)}, goodput counts the useful time and from now on")
    return time.time() - useful
