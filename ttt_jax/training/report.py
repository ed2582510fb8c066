"""Report progress, metrics and time spent waiting, one step late."""

import math
import time

import jax
import numpy as np

from ttt_jax.errors import NonFiniteLossError
from ttt_jax.storage.json_files import DamagedFile, read_object, warn_once, write_object
from ttt_jax.storage.workdir import Workdir
from ttt_jax.storage.writing import set_aside
from ttt_jax.terminal.console import duration
from ttt_jax.terminal.status_line import StatusLine
from ttt_jax.training import metrics

_NAME = "started.json"


class Goodput:
    """The clock of a run.

    Args:
      workdir: of the run; remembers when it was first started.
      useful: seconds of useful steps up to the checkpoint that the run goes on from; steps after it are done again, so
        their time was lost.
    """

    def __init__(self, workdir: Workdir, useful: float = 0.0):
        path = workdir / _NAME
        started = _read(path, useful)
        if not path.exists():
            write_object(path, {"unix_time": started})
        self._started = started
        self.useful = useful

    def add(self, seconds: float) -> None:
        """A step took so long, not counting what it waited for."""
        self.useful += seconds

    def share(self) -> float:
        """Useful seconds per second since the first start."""
        return self.useful / max(time.time() - self._started, self.useful, 1e-9)


def _read(path: Workdir, useful: float) -> float:
    """Return when the run was first started, as far as that is known. A damaged file is kept aside."""
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


class ProgressBar:
    """Step, loss, tokens per second, step time and time to the end.

    Args:
      total: steps of the whole run.
      start: steps done before this process.
      tokens_per_step: tokens of one global batch.
    """

    def __init__(self, total: int, start: int, tokens_per_step: int):
        self._total, self._tokens = total, tokens_per_step
        self._line = StatusLine(total, start, "compiling")

    def compiling(self) -> None:
        """Say that the training step is being compiled, which may take minutes."""
        self._line.note("compiling the training step ...")

    def compiled(self, seconds: float) -> None:
        """Say how long that took."""
        self._line.note(f"compiled in {seconds:.1f} s")

    def update(self, step: int, loss: float, seconds_per_step: float) -> None:
        """Shows where the run is."""
        left = duration(seconds_per_step * (self._total - step))
        self._line.show(
            step,
            f"step {step}/{self._total}  loss {loss:.4f}  {self._tokens / seconds_per_step:,.0f} tokens/s  "
            f"{seconds_per_step:.3f} s/step  {left} left",
        )

    def close(self) -> None:
        """Leaves the terminal as it was."""
        self._line.close()


_MOST_SKIPPED = 10  # updates without a finite gradient, one after the other: that is no spike


class Output:
    """Where process 0 tells of a run: files, a progress bar, and the clock."""

    def __init__(self, writer: metrics.MetricsWriter, bar: ProgressBar, goodput: Goodput, log_every: int):
        self.writer, self.bar, self.goodput, self.log_every = writer, bar, goodput, log_every

    def close(self) -> None:
        """Leaves terminal and files in order."""
        self.bar.close()
        self.writer.close()


class Report:
    """Reports the metrics of each step while the next one runs, so that the device never waits for the host.

    Args:
      output: None where another process tells.
      tokens: of one global batch.
      flops: model FLOPs of a step.
      chips: how many; ``peak``: FLOP/s of one, None where that is not known.
      step: that the run goes on from.

    Attributes:
      step: the last one that was reported; ``loss`` and ``seconds`` are its.
    """

    def __init__(
        self,
        output: Output | None,
        *,
        tokens: int,
        flops: float,
        chips: int,
        peak: float | None,
        step: int = 0,
    ):
        self._output, self._tokens, self._flops, self._chips, self._peak = output, tokens, flops, chips, peak
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._waits: dict[str, float] = {}  # seconds since the last record, by what for
        self._waited = 0.0  # since the last step
        self._also: dict[str, float] = {}
        self._unwritten: tuple[int, dict[str, float]] | None = None  # the record of the last step, if not written
        self.step = step
        self.loss: float | None = None
        self.seconds = 0.0

    def start(self) -> None:
        """Starts the clock."""
        self._clock = time.monotonic()

    def waited(self, name: str, seconds: float, *, within_step: bool = True) -> None:
        """Time that went into something else than computing; goes into the next record."""
        self._waits[name] = self._waits.get(name, 0.0) + seconds
        self._waited += seconds if within_step else 0.0

    def __call__(self, step: int, values: dict[str, jax.Array]) -> None:
        """Takes the metrics of a step that has been dispatched, and reports those of the step before it."""
        self._report()
        self._pending = (step, values)

    def also(self, numbers: dict[str, float], seconds: float) -> None:
        """Numbers for the record of the step that was taken last, which took so many seconds beside it."""
        self._also = {**numbers, "evaluation_seconds": seconds}
        self._clock += seconds

    def flush(self) -> None:
        """Waits for the step that was taken last, and reports it; all records are then where a resumed run finds them.

        Raises:
          NonFiniteLossError: where its loss or gradient is not finite, unless the guard left the update out.
        """
        self._report()
        if self._output is not None:
            self._output.writer.flush()

    def finish(self) -> None:
        """Report the last step of a run or of a part of it: it has a record, whatever ``log.every`` is. Raises as
        :meth:`flush`."""
        self._report()
        if self._output is not None and self._unwritten is not None:
            self._output.writer.write(*self._unwritten)
            self._unwritten, self._waits = None, {}
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
            self._tell(self._output, step, numbers, bool(bad))
        self._waited = 0.0
        if bad:
            raise NonFiniteLossError(f"{bad[0]} is {numbers[bad[0]]} at step {step}")

    def _tell(self, output: Output, step: int, numbers: dict[str, float], bad: bool) -> None:
        output.goodput.add(max(self.seconds - self._waited, 0.0))
        also, self._also = self._also, {}
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
        self._unwritten = (step, {**numbers, **also, "tokens": step * self._tokens, **timing})
        if step % output.log_every == 0 or bad or also:
            output.writer.write(*self._unwritten)
            self._unwritten, self._waits = None, {}
        if not bad:
            output.bar.update(step, numbers["loss"], self.seconds)
