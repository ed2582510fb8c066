"""Define one optimizer step, and the program of a run: the step compiled for a config and a mesh.

A fused kernel is compared with the scan before a program is compiled with it.

Shapes: B batch (over all devices), T tokens.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypedDict

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ttt_jax.distributed import agreement, sharding
from ttt_jax.distributed.agreement import Exchange, describe
from ttt_jax.kernels import run as kernels
from ttt_jax.kernels.self_check import Check
from ttt_jax.mixers import MIXERS
from ttt_jax.mixers.mixer import Context
from ttt_jax.models import language_model, pattern
from ttt_jax.models.language_model import LanguageModel
from ttt_jax.training import loss as loss_lib
from ttt_jax.training import optimizer as optimizer_lib
from ttt_jax.training.optimizer import Schedule

_CHECK_LIMIT = 900.0  # seconds in which the slowest process must have checked its kernels

Metrics = dict[str, jax.Array]


# ---- Step


class Batch(TypedDict):
    """A batch of windows."""

    inputs: Any  # [B, T] integers
    targets: Any  # [B, T] integers: the inputs one token later
    mask: Any  # [B, T] 1 where the target counts, 0 where it is BOS or padding


class TrainState(NamedTuple):
    """The state that an optimizer step changes, in float32."""

    step: jax.Array  # optimizer steps taken, int32 scalar
    params: Any
    opt_state: Any
    guard: optimizer_lib.GuardState


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
        read_out = partial(loss_lib.of_hidden_states, targets=batch["targets"], mask=batch["mask"], dtype=model.dtype)
        return model.apply({"params": params}, batch["inputs"], None, Context(inner_lr_warmup=warmup), read_out)[0]

    def loss_and_gradient(params, batch, warmup):
        if accumulation == 1:
            return jax.value_and_grad(loss_fn)(params, batch, warmup)

        def micro_batch(total, rows):
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_fn)(params, rows, warmup)), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        parts = jax.tree.map(
            lambda x: sharding.constrain(x.reshape(accumulation, -1, x.shape[1]), None, "batch", None), batch
        )
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


# ---- Program


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
        draw = jax.jit(partial(_drawn_state, self.model, self.optimizer), out_shardings=self.state_sharding)
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


def build_program(config: ml_collections.ConfigDict, mesh: Mesh) -> Program:
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
        boxed = jax.eval_shape(partial(_drawn_state, model, optimizer), jax.random.key(0))
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


def _drawn_state(model: LanguageModel, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """Return the first state. Parameters and moments whose axes have names are in boxes that carry the names."""
    params = model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
    return initial_state(params, optimizer)


# ---- Check of fused kernels


def with_checked_kernels(run: Program) -> Program:
    """Return a program whose kernels have been checked on its devices, some of which belong to this process.

    Each process has the kernels of :func:`kernels_to_check` compared with plain forms on one of its devices, once for
    all programs of the same shapes (:mod:`ttt_jax.kernels.self_check`). If one is wrong on any process, all processes
    print a line on standard error that names the array that differs most, and get a program that uses the plain form.
    Its ``config`` is not changed.

    All processes make this call alike.
    """
    by_key: dict[tuple[str, str], list[Check]] = {}
    for check in kernels_to_check(run.config.model, run.mesh):
        by_key.setdefault(check.key, []).append(check)
    config = run.config.copy_and_resolve_references()
    for (section, key), checks in by_key.items():
        if _is_wrong(checks, run.mesh):
            config.model[section][key] = checks[0].instead
    if config.model == run.config.model:
        return run
    return build_program(config, run.mesh)._replace(config=run.config)


def kernels_to_check(model: ml_collections.ConfigDict, mesh: Mesh) -> list[Check]:
    """Return the checks of the kernels of a model on a mesh, one for each kind of block that uses one.

    There are none where kernels are interpreted, or where a config leaves the check out.
    """
    device, sharing = mesh.devices.flat[0].device_kind, mesh.shape["tensor"]
    if kernels.interpreted(device):
        return []
    found = [MIXERS[kind.model.mixer].kernel_check(kind.model, sharing, device) for kind in pattern.kinds(model)]
    return list(dict.fromkeys(check for check in found if check is not None))


def _is_wrong(checks: list[Check], mesh: Mesh) -> bool:
    """Return whether one of the checks finds a kernel wrong on any process, and say so."""
    device = next(device for device in mesh.devices.flat if device.process_index == jax.process_index())
    kernel, plain, report = checks[0].kernel, checks[0].plain, checks[0].report
    known = report.cache_info().misses
    wrong = "; ".join(filter(None, (_problem(check, device) for check in checks)))
    problem = Exchange(f"check of {kernel}").first_problem(wrong, _CHECK_LIMIT)
    if problem is None:
        if report.cache_info().misses > known:
            for check in checks:
                found = report(check.family, device)
                agreement.print_once(
                    f"{kernel} was checked against {plain} in {found.seconds:.1f} s: differs by {found}"
                )
        return False
    agreement.print_once(
        f"WARNING: {kernel} is wrong on {device.device_kind}: {problem}. {plain.capitalize()} is used instead, which "
        f"is slower; please report this. {checks[0].otherwise}"
    )
    return True


def _problem(check: Check, device: jax.Device) -> str:
    """Return what is wrong with a kernel; an empty text where nothing is."""
    try:
        report = check.report(check.family, device)
    except Exception as error:  # whatever the compiler or the device raises
        return f"it does not run, {describe(error)}"
    return f"it differs from {check.plain} by {report}" if report.wrong else ""
