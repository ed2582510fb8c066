"""Traces of some steps, for xprof or TensorBoard; spans are named after layers."""

from pathlib import Path
from typing import Any

import jax


class Profile:
    """Traces ``steps`` of process 0 into a folder.

    Args:
      steps: counted from 1.
    """

    def __init__(self, steps: range, folder: Path):
        self._steps = steps if jax.process_index() == 0 else range(0)
        self._folder = folder
        self._tracing = False

    def step(self, number: int) -> jax.profiler.StepTraceAnnotation:
        """A context for dispatching a step."""
        if number in self._steps and not self._tracing:
            jax.profiler.start_trace(str(self._folder))
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
