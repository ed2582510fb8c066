"""Define one optimizer step, as a pure function that is compiled once.

Shapes: B batch (over all devices), T tokens.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ttt_jax.distributed.sharding import constrain
from ttt_jax.mixers.mixer import Context
from ttt_jax.models.language_model import LanguageModel
from ttt_jax.training import optimizer as optimizer_lib
from ttt_jax.training.loss import Batch, mean_over_rows, token_nll
from ttt_jax.training.optimizer import Schedule


class TrainState(NamedTuple):
    """The state that an optimizer step changes, in float32."""

    step: jax.Array  # optimizer steps taken, int32 scalar
    params: Any
    opt_state: Any
    guard: optimizer_lib.GuardState


Metrics = dict[str, jax.Array]


def train_step(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    learning_rate: Schedule,
    inner_lr_warmup: Schedule,
    accumulation: int = 1,
    spike_factor: float = 0.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Return the function ``(state, batch) -> (state, metrics)``.

    ``learning_rate`` must be the optimizer's own; here it is only reported. With ``accumulation`` the batch is read
    in that many micro-batches, and the mean of their gradients is one step. With ``spike_factor`` an update may be left
    out: see :func:`ttt_jax.training.optimizer.judge_update`.

    Metrics: ``loss`` before the update, ``grad_norm`` before clipping, ``learning_rate`` and ``inner_lr_warmup`` of
    this step; with ``spike_factor`` also ``skipped`` and ``skipped_in_a_row``, updates left out.
    """

    def loss_fn(params, batch, warmup):
        logits, _ = model.apply({"params": params}, batch["inputs"], None, Context(inner_lr_warmup=warmup))
        return mean_over_rows(token_nll(logits, batch["targets"]), batch["mask"])

    def loss_and_gradient(params, batch, warmup):
        if accumulation == 1:
            return jax.value_and_grad(loss_fn)(params, batch, warmup)

        def micro_batch(total, rows):
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_fn)(params, rows, warmup)), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        parts = jax.tree.map(lambda x: constrain(x.reshape(accumulation, -1, x.shape[1]), None, "batch", None), batch)
        total, _ = jax.lax.scan(micro_batch, zero, parts)
        return jax.tree.map(lambda x: x / accumulation, total)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        warmup = inner_lr_warmup(state.step)
        loss, gradient = loss_and_gradient(state.params, batch, warmup)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        norm = optax.tree.norm(gradient)
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": learning_rate(state.step),
            "inner_lr_warmup": jnp.asarray(warmup, jnp.float32),
        }
        allowed, guard = optimizer_lib.judge_update(state.guard, norm, spike_factor)
        if spike_factor:
            metrics.update(skipped=guard.skipped, skipped_in_a_row=guard.in_a_row)
            params, opt_state = optimizer_lib.select_update(
                allowed, (params, opt_state), (state.params, state.opt_state)
            )
        return TrainState(state.step + 1, params, opt_state, guard), metrics

    return step


def initial_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """Return the state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), optimizer_lib.initial_guard())
