"""Write metrics to ``metrics.jsonl`` and, when asked for, to TensorBoard and Weights & Biases; trace some steps."""

import hashlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from ttt_jax import extras
from ttt_jax.errors import ConfigError
from ttt_jax.storage import json_files
from ttt_jax.storage.workdir import Workdir, explained, is_local
from ttt_jax.storage.writing import AppendedFile, BucketFile, set_aside, write_atomically


class MetricsWriter:
    """Append one JSON object per record to ``metrics.jsonl``, with a checksum of the line as its last key, ``crc``.

    Opening it for a run that resumes at ``step`` drops the records after that step, which are computed again and equal,
    and a last line that was cut short. Other lines that are damaged are named and left out, and the damaged file is set
    aside. In a bucket, the file is brought up to date from time to time, by :meth:`flush` and by :meth:`close`.
    """

    def __init__(self, workdir: Workdir, step: int, *, tensorboard: bool = False, wandb: dict[str, Any] | None = None):
        self._others: list[tuple[Callable, Callable]] = []  # the functions that write and close each
        if wandb:  # first, because its server may refuse: nothing has been written by then
            self._others.append(_wandb(workdir, wandb))
        if tensorboard:
            self._others.append(_tensorboard(workdir))
        self._file = _open(workdir / "metrics.jsonl", step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the record of one step."""
        self._file.write(json_files.line_with_checksum({"step": step, **values}))
        for write_other, _ in self._others:
            write_other(step, values)

    def flush(self) -> None:
        """Wait until all records would outlive the death of this process, for some seconds at most."""
        self._file.flush()

    def close(self) -> None:
        """Flush and close the file, TensorBoard and Weights & Biases."""
        self._file.close()
        for _, close_other in self._others:
            close_other()


def check_destinations(workdir: Workdir, *, tensorboard: bool, wandb: bool = False) -> None:
    """Raise :class:`ConfigError` where metrics cannot be written there, or a package for them is missing."""
    if tensorboard and not is_local(workdir):
        raise ConfigError(
            f"log.tensorboard=true: needs a local workdir, not {workdir}; expected false (metrics.jsonl is written "
            "anyway), or log.wandb_project"
        )
    if tensorboard:
        extras.check("tensorboard", "tensorboardX", "log.tensorboard=true")
    if wandb:
        extras.check("wandb", "wandb", "log.wandb_project")


def read(workdir: Workdir) -> list[dict[str, float]]:
    """Return all complete records of a run. Damaged lines are named on standard error and left out."""
    return json_files.read_lines(workdir / "metrics.jsonl").records


def _open(path: Workdir, step: int) -> AppendedFile | BucketFile:
    """Open the file to append to, without the records after ``step``. A file with damaged lines is set aside."""
    lines = json_files.read_lines(path, warn=False)
    kept = "".join(
        text + "\n" for text, record in zip(lines.texts, lines.records, strict=True) if record["step"] <= step
    )
    if damage := lines.describe_damage(path):
        json_files.warn_once(f"{damage}, and the file is kept as {set_aside(path)}")
    if not is_local(path):
        return BucketFile(path, kept)
    if kept or path.exists():
        write_atomically(path, kept)
    return AppendedFile(path)


def _tensorboard(workdir: Workdir):
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            f"log.tensorboard=true: needs tensorboardX; {extras.install_command('tensorboard')}"
        ) from error
    folder = workdir / "tensorboard"
    writer = SummaryWriter(str(folder))

    def write(step: int, values: Mapping[str, float]) -> None:
        with explained(folder):
            for name, value in values.items():
                writer.add_scalar(name, value, step)
            writer.flush()

    return write, writer.close


def _wandb(workdir: Workdir, settings: dict[str, Any]):
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(f"log.wandb_project: needs wandb; {extras.install_command('wandb')}") from error
    local = is_local(workdir)
    place = str(workdir.resolve() if local else workdir)
    identity = hashlib.blake2b(place.encode(), digest_size=8).hexdigest()  # the same for a resumed run
    folder = workdir if local else None  # wandb writes to local folders only; None is ./wandb
    try:
        run = wandb.init(dir=folder, name=workdir.name, id=identity, resume="allow", **settings)
    except Exception as error:  # whatever wandb or its server raises
        reason = " ".join(f"{error}".split())
        raise ConfigError(
            f"log.wandb_project={settings['project']}: {reason}; expected a login (wandb login), WANDB_MODE=offline or "
            "no project (metrics.jsonl is written anyway)"
        ) from error
    return (lambda step, values: run.log(dict(values), step=step)), run.finish


# ---- Traces


class Profile:
    """Trace some steps of process 0 for xprof or TensorBoard, with spans that are named after layers.

    Args:
      steps: the steps, counted from 1.
      folder: where the traces go. Traces for a bucket are written on local disk, and copied when they are complete.
    """

    def __init__(self, steps: range, folder: Workdir):
        self._steps = steps if jax.process_index() == 0 else range(0)
        self._folder = folder
        self._tracing = False

    def step(self, number: int) -> jax.profiler.StepTraceAnnotation:
        """Return a context in which to dispatch a step."""
        if number in self._steps and not self._tracing:
            self._local = self._folder if is_local(self._folder) else Path(tempfile.mkdtemp(prefix="ttt_jax_profile_"))
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # it traces every thread, and nothing of the device
            jax.profiler.start_trace(str(self._local), profiler_options=options)
            self._tracing = True
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def after(self, number: int, values: Any) -> None:
        """End the trace after its last step, once ``values``, which the step computes, are there."""
        if self._tracing and number == self._steps[-1]:
            jax.block_until_ready(values)
            self.close()

    def close(self) -> None:
        """End a trace that is still running."""
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
            if not is_local(self._folder):
                _move(self._local, self._folder)


def _move(source: Path, target: Workdir) -> None:
    """Copy all files of a local folder, and delete it. Where that fails, print where the files are."""
    try:
        with explained(target):
            for path in filter(Path.is_file, source.rglob("*")):
                with path.open("rb") as file, (target / path.relative_to(source)).open("wb") as copy:
                    shutil.copyfileobj(file, copy, 1 << 20)
    except OSError as error:
        print(f"cannot write {target}: {error}; the trace lies in {source}", file=sys.stderr)
        return
    shutil.rmtree(source)
