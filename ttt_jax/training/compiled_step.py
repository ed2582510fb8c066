"""Build the compiled step of a run and its initial state from a config."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ttt_jax.distributed import sharding
from ttt_jax.models import language_model
from ttt_jax.models.language_model import LanguageModel
from ttt_jax.training import optimizer as optimizer_lib
from ttt_jax.training.step import TrainState, initial_state, train_step


class Program(NamedTuple):
    """The model and the optimizer of a config, laid out on a mesh, before anything is compiled or allocated."""

    config: ml_collections.ConfigDict
    model: LanguageModel
    optimizer: optax.GradientTransformation
    learning_rate: optimizer_lib.Schedule
    inner_lr_warmup: optimizer_lib.Schedule
    mesh: Mesh
    rules: sharding.ShardingRules
    state_sharding: Any
    batch_sharding: NamedSharding
    abstract_state: TrainState  # shapes, dtypes and shardings

    def initial_state(self) -> TrainState:
        """Return the state before the first step, drawn from ``config.seed``; the same on every mesh."""
        draw = jax.jit(partial(_initial_state, self.model, self.optimizer), out_shardings=self.state_sharding)
        return draw(jax.random.key(self.config.seed))

    def compiled_step(self) -> jax.stages.Compiled:
        """Compile ``(state, batch) -> (state, metrics)`` for the shapes of the config. The state is donated."""
        step = train_step(
            self.model,
            self.optimizer,
            self.learning_rate,
            self.inner_lr_warmup,
            self.config.training.accumulation,
            self.config.optimizer.spike_factor,
        )
        data = self.config.data
        shape = (data.batch_size, data.sequence_length)
        batch = {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=self.batch_sharding)
            for name, dtype in (("inputs", jnp.int32), ("targets", jnp.int32), ("mask", jnp.float32))
        }
        replicated = NamedSharding(self.mesh, PartitionSpec())
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(self.state_sharding, replicated))
        with sharding.on_mesh(self.mesh, self.rules):
            return jitted.lower(self.abstract_state, batch).compile()

    def compiled_step_and_initial_state(self) -> tuple[jax.stages.Compiled, TrainState]:
        """Return both. The state is drawn while the step compiles: its program takes a third as long to compile."""
        with ThreadPoolExecutor(1) as pool:
            state = pool.submit(self.initial_state)
            return self.compiled_step(), state.result()


def make(config: ml_collections.ConfigDict, mesh: Mesh) -> Program:
    """Build the program of a validated config.

    Raises:
      ConfigError: where parameters do not fit the mesh.
    """
    model = language_model.build_model(config.model)
    o = config.optimizer
    learning_rate, inner_lr_warmup = optimizer_lib.schedules(config)
    optimizer = optimizer_lib.adamw(
        learning_rate,
        beta1=o.beta1,
        beta2=o.beta2,
        epsilon=o.epsilon,
        weight_decay=o.weight_decay,
        clip_norm=o.clip_norm,
    )
    rules = sharding.ShardingRules()
    with sharding.axis_names(rules):
        boxed = jax.eval_shape(partial(_initial_state, model, optimizer), jax.random.key(0))
    state_sharding = sharding.state_sharding(boxed, mesh, rules)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), nn.meta.unbox(boxed), state_sharding
    )
    return Program(
        config,
        model,
        optimizer,
        learning_rate,
        inner_lr_warmup,
        mesh,
        rules,
        state_sharding,
        sharding.batch_sharding(mesh, rules),
        abstract,
    )


def _initial_state(model: LanguageModel, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """Return the first state. Parameters and moments whose axes have names are in boxes that carry the names."""
    params = model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
    return initial_state(params, optimizer)
