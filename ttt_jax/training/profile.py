"""Trace some steps for xprof or TensorBoard, with spans that are named after layers."""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax

from ttt_jax.storage.workdir import Workdir, explained, is_local


class Profile:
    """Trace some steps of process 0.

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
        """End a trace that is still going on."""
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
