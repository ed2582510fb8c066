"""Traces of some steps, for xprof or TensorBoard; spans are named after layers."""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax

from ttt_jax.storage.workdir import Workdir, explained, is_local


class Profile:
    """Traces ``steps`` of process 0 into a folder.

    Args:
      steps: counted from 1.
      folder: where the traces go; to a bucket they are copied when they are complete.
    """

    def __init__(self, steps: range, folder: Workdir):
        self._steps = steps if jax.process_index() == 0 else range(0)
        self._folder = folder
        self._tracing = False

    def step(self, number: int) -> jax.profiler.StepTraceAnnotation:
        """A context for dispatching a step."""
        if number in self._steps and not self._tracing:
            self._here = self._folder if is_local(self._folder) else Path(tempfile.mkdtemp(prefix="ttt_jax_profile_"))
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # it follows every thread, storage's too, and says nothing of the device
            jax.profiler.start_trace(str(self._here), profiler_options=options)
            self._tracing = True
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def after(self, number: int, values: Any) -> None:
        """To be called with what the step computed; waits for it where the trace ends."""
        if self._tracing and number == self._steps[-1]:
            jax.block_until_ready(values)
            self.close()

    def close(self) -> None:
        """Ends a trace that is still going on."""
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
            if not is_local(self._folder):
                _move(self._here, self._folder)


def _move(source: Path, target: Workdir) -> None:
    """Copies all files of a local folder, and deletes it; where that fails, tells where they lie."""
    try:
        with explained(target):
            for path in filter(Path.is_file, source.rglob("*")):
                with path.open("rb") as here, (target / path.relative_to(source)).open("wb") as there:
                    shutil.copyfileobj(here, there, 1 << 20)
    except OSError as error:
        print(f"cannot write {target}: {error}; the trace lies in {source}", file=sys.stderr)
        return
    shutil.rmtree(source)
