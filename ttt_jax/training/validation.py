"""Measure the loss on held-out text during training, and keep the checkpoint with the lowest.

Shapes: B batch (over all devices), T tokens.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import checkpoint_managers

from ttt_jax import finite
from ttt_jax.data import sequences
from ttt_jax.data.token_source import TokenSource
from ttt_jax.distributed import sharding
from ttt_jax.distributed.agreement import Exchange
from ttt_jax.errors import ConfigError
from ttt_jax.storage.workdir import Workdir, explained
from ttt_jax.training import metrics
from ttt_jax.training.loss import token_nll
from ttt_jax.training.step import Program

LOSS = "validation_loss"  # in metrics.jsonl: mean over tokens, nats


class Validation:
    """Compute the mean loss over tokens of windows as long as those of training, the same windows every time.

    As in ``ttt eval``, the inner learning rate has its full size from the beginning. All processes make the same calls.

    Args:
      run: the program of the training run.
      source: the tokens of the split.
      windows: the largest number of windows, which are spread evenly over the split.

    Raises:
      ConfigError: where the windows hold no token to predict.
    """

    def __init__(self, run: Program, source: TokenSource, windows: int):
        self._run, self._source, self._windows = run, source, windows
        data, several = run.config.data, run.mesh.shape["data"] * run.mesh.shape["fsdp"]
        self._batch_size = math.ceil(data.batch_size / run.config.training.accumulation / several) * several

        chosen = sequences.windows(source, data.sequence_length, windows)
        if not any(sequences.counted(source, window).any() for window in chosen):
            raise ConfigError(
                f"evaluation.every={run.config.evaluation.every}: {source.name} has nothing to predict in "
                f"{len(chosen)} windows of {data.sequence_length} tokens; expected a split with text"
            )

        def total(params, inputs, targets, mask):
            nll = token_nll(run.model.apply({"params": params}, inputs)[0], targets)
            return jnp.where(mask > 0, nll, 0.0).sum(), mask.sum()

        self._total = jax.jit(total, out_shardings=NamedSharding(run.mesh, PartitionSpec()))

    def __call__(self, params: Any) -> dict[str, float]:
        """Return ``validation_loss`` and ``validation_perplexity``; not finite where the loss of a token is not."""
        batch_sharding = self._run.batch_sharding
        rows = sharding.rows_of_this_process(batch_sharding, self._batch_size)
        losses, tokens = [], []
        length = self._run.config.data.sequence_length
        windows = sequences.windows(self._source, length, self._windows)
        for piece in sequences.pieces(self._source, windows, piece_length=length, batch_size=self._batch_size):
            local = {key: x[rows] for key, x in piece.batch.items()}  # [rows of this process, T]
            arrays = sharding.global_batch(local, rows, self._batch_size, batch_sharding)  # [B, T]
            with sharding.on_mesh(self._run.mesh, self._run.rules):
                sums = self._total(params, arrays["inputs"], arrays["targets"], arrays["mask"])
            losses.append(float(np.asarray(sums[0])))
            tokens.append(float(np.asarray(sums[1])))
        mean = math.fsum(losses) / math.fsum(tokens)  # no loss is below 0: never both infinities
        return {LOSS: mean, "validation_perplexity": finite.exp(mean)}


def other_tokens(saved: Any, config: ml_collections.ConfigDict) -> str:
    """Return a line if validation losses so far are of other tokens than those from now on; else an empty text.

    Args:
      saved: the config in the checkpoint that a run continues from, as JSON; None where there is none.
    """
    before = (saved or {}).get("evaluation", {})
    keys = [key for key in ("split", "windows") if key in before and before[key] != config.evaluation[key]]
    listed = ", ".join(f"evaluation.{key} {before[key]!r} -> {config.evaluation[key]!r}" for key in keys)
    return (
        listed and f"{listed}: validation losses so far are of other tokens, and the best checkpoint is chosen of all"
    )


def not_finite(step: int, values: dict[str, float]) -> str:
    """Return a line if a validation loss is NaN or infinite; else an empty text."""
    if finite.is_finite(values[LOSS]):
        return ""
    return f"validation loss is {values[LOSS]} at step {step}: the checkpoint of this step is never the best one"


class KeepBest(checkpoint_managers.PreservationPolicy):
    """A policy that keeps the checkpoint with the lowest validation loss.

    Attributes:
      losses: validation losses by step.
    """

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def add(self, step: int, values: dict[str, float]) -> bool:
        """Add the loss of a step; return whether it is the lowest so far."""
        self.losses[step] = values[LOSS]
        return best_step(self.losses, list(self.losses)) == step

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: checkpoint_managers.PreservationContext
    ) -> Sequence[bool]:
        """Return for each checkpoint whether to keep it."""
        del context
        best = best_step(self.losses, [checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step == best for checkpoint in checkpoints]


def best_step(losses: dict[int, float], steps: Sequence[int]) -> int | None:
    """Return the step with the lowest finite loss, the earliest of several; None where no step has one."""
    known = [step for step in steps if finite.is_finite(losses.get(step))]
    return min(known, key=lambda step: (losses[step], step), default=None)


def read_losses(workdir: Workdir, last: int | None = None) -> dict[int, float]:
    """Return the validation losses of a run by step; NaN where they are not finite.

    Process 0 reads them for all processes.

    Args:
      last: the last step to return; None for all.
    """

    def read():
        with explained(workdir):
            records = metrics.read(workdir)
        return [[record["step"], record[LOSS]] for record in records if LOSS in record]

    records = Exchange("validation losses", OSError).on_first(read)
    known = {int(step): math.nan if loss is None else loss for step, loss in records}  # JSON has null for NaN
    return {step: loss for step, loss in known.items() if last is None or step <= last}
