"""What a person sees of a run."""

from ttt_jax.terminal.status_line import StatusLine, duration


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
