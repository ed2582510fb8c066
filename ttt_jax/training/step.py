"""One optimizer step, as a pure function to be compiled once.

Shapes: B batch (over all devices), T tokens.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ttt_jax.models.language_model import LanguageModel
from ttt_jax.training.loss import Batch, mean_over_rows, token_nll
from ttt_jax.training.optimizer import Schedule


class TrainState(NamedTuple):
    """Everything that an optimizer step changes; float32."""

    step: jax.Array  # optimizer steps taken, int32 scalar
    params: Any
    opt_state: Any


Metrics = dict[str, jax.Array]


def train_step(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    learning_rate: Schedule,
    inner_lr_scale: Schedule,
    accumulation: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Builds ``(state, batch) -> (state, metrics)``.

    ``learning_rate`` must be the optimizer's own; here it is only reported. With ``accumulation`` the batch is read
    in that many micro-batches of consecutive rows, and the mean of their gradients is one step.

    Metrics: ``loss`` before the update, ``grad_norm`` before clipping, ``learning_rate`` and ``inner_lr_scale`` of
    this step.
    """

    def loss_fn(params, batch, scale):
        logits, _ = model.apply({"params": params}, batch["inputs"], None, scale)
        return mean_over_rows(token_nll(logits, batch["targets"]), batch["mask"])

    def loss_and_gradient(params, batch, scale):
        if accumulation == 1:
            return jax.value_and_grad(loss_fn)(params, batch, scale)

        def micro_batch(total, rows):
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_fn)(params, rows, scale)), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        parts = jax.tree.map(lambda x: x.reshape(accumulation, -1, *x.shape[1:]), batch)
        total, _ = jax.lax.scan(micro_batch, zero, parts)
        return jax.tree.map(lambda x: x / accumulation, total)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        scale = inner_lr_scale(state.step)
        loss, gradient = loss_and_gradient(state.params, batch, scale)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(gradient),
            "learning_rate": learning_rate(state.step),
            "inner_lr_scale": jnp.asarray(scale, jnp.float32),
        }
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), metrics

    return step


def initial_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
