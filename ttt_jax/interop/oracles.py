"""Measure how far our numbers are from those that other code computed, and check those of the TTT authors' own code.

Files are ``.npz`` in the format that ``tests/oracles/README.md`` describes: ``model_*`` (one forward and backward
pass), ``traj_*`` (ten AdamW steps) and ``generation_*`` (prefill and decoding), told apart by their keys.
:mod:`ttt_jax.interop.lact_oracles` checks the files of the LaCT authors' operation.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict, FrozenConfigDict

from ttt_jax.interop import official_jax
from ttt_jax.mixers.mixer import Context
from ttt_jax.models.language_model import LanguageModel, build_model
from ttt_jax.training import optimizer as optimizer_lib
from ttt_jax.training.loss import mean_over_rows, token_nll
from ttt_jax.training.step import initial_state, train_step

Oracle = Mapping[str, Any]  # name to array

# Largest error allowed, by kind of number. The functions that compute an error say what it is relative to.
TOLERANCE = {
    "logits": 5e-5,
    "nll": 5e-5,
    "hidden": 5e-5,
    "loss": 3e-6,
    "accuracy": 1e-6,
    "grad": 5e-5,
    "grad_norm": 1e-5,
    "statistics": 1e-4,
    "step_loss": 5e-6,
    "params_5": 1e-5,
    "params_10": 1e-5,
    "learning_rate": 1e-6,
    "bf16_logits": 1.0,
}
_STATISTICS = {
    "ssl_tgt_from_mean_mse": "target_spread",
    "ttt_loss_mse_init": "loss_at_w0",
    "ttt_loss_mse_step_0": "loss_before",
    "ttt_loss_mse_step_1": "loss_after",
}


@dataclasses.dataclass(frozen=True)
class Report:
    """The largest error of each kind of number in a file.

    Attributes:
      errors: from kind to error.
      tolerance: from kind to the largest error allowed.
    """

    errors: dict[str, float]
    tolerance: Mapping[str, float]

    @property
    def passed(self) -> bool:
        """Return whether something was compared and every error is within tolerance; NaN is not."""
        return bool(self.errors) and all(error <= self.tolerance[kind] for kind, error in self.errors.items())

    def __str__(self) -> str:
        return "  ".join(
            f"{kind} {error:.1e}" + ("" if error <= self.tolerance[kind] else f" (beyond {self.tolerance[kind]:.0e}!)")
            for kind, error in self.errors.items()
        )


def load(path: Path) -> dict[str, np.ndarray]:
    """Return all arrays of a file."""
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def largest(ours: Any, theirs: Any) -> float:
    """Return the largest absolute difference."""
    return float(np.abs(_difference(ours, theirs)).max(initial=0.0))


def relative(ours: Any, theirs: Any) -> float:
    """Return the largest difference of two numbers, relative to theirs."""
    size = np.maximum(np.abs(np.asarray(theirs, np.float64)), 1e-30)
    return largest(ours / size, theirs / size)


def relative_norm(ours: Any, theirs: Any) -> float:
    """Return the norm of the difference, relative to the norm of their array."""
    size = float(np.linalg.norm(np.asarray(theirs, np.float64)))
    return float(np.linalg.norm(_difference(ours, theirs))) / max(size, 1e-30)


def worst(errors: Iterable[float]) -> float:
    """Return the largest error, NaN where one is NaN (which Python's max may pass over), 0 of none."""
    return float(np.max(list(errors), initial=0.0))


def check(path: Path) -> Report | None:
    """Compare everything in a file of the TTT authors' code; return None where the file has another format.

    Raises:
      ValueError: where parameters or config in the file have no counterpart here.
    """
    oracle = load(path)
    if "config" not in oracle or oracle["config"].dtype.kind != "U":
        return None
    if "logits" in oracle and "input_tokens" in oracle:
        return check_model(oracle)
    if "learning_rate_applied" in oracle:
        return check_trajectory(oracle)
    if "decode_logits" in oracle:
        return check_generation(oracle, load(path.with_name(Path(str(oracle["params_file"])).name)))
    return None


def params(oracle: Oracle, prefix: str = "params/") -> dict[str, Any]:
    """Return the parameters (or gradients) under a prefix as our tree."""
    flat = {k.removeprefix(prefix): x for k, x in oracle.items() if k.startswith(prefix)}
    return jax.tree.map(jnp.asarray, official_jax.params_to_ours(flat))


def model_config(oracle: Oracle, dtype: str | None = None) -> ConfigDict:
    """Return ``config.model`` for the config in a file, with another dtype if one is given."""
    config = json.loads(str(oracle["config"]))
    return official_jax.model_config(config, dtype or config["_run"]["dtype"])


def model(oracle: Oracle) -> LanguageModel:
    """Return our model for the config in a file."""
    return build_model(model_config(oracle))


def check_model(oracle: Oracle) -> Report:
    """Compare logits, losses, hidden states, statistics and gradients of one batch.

    For a bfloat16 file the reference is the float32 logits of the same parameters, and our logits must be closer to it
    than the authors' are: the error is the ratio of the two root mean square distances.
    """
    if json.loads(str(oracle["config"]))["_run"]["dtype"] == "bfloat16":
        return _check_bf16(oracle)
    ours = _evaluate(oracle)
    errors = {
        "logits": largest(ours["logits"], oracle["logits"]),
        "nll": largest(ours["nll"], oracle["nll"]),
        "loss": largest(ours["loss"], oracle["loss"]),
        "accuracy": largest(ours["accuracy"], oracle["accuracy"]),
        "grad_norm": relative(ours["grad_norm"], oracle["grad_norm"]),
    }
    gradients = {k.removeprefix("grads/"): g for k, g in oracle.items() if k.startswith("grads/")}
    if gradients:
        _same_keys(ours["grads"], gradients)
        errors["grad"] = worst(largest(ours["grads"][k], g) / max(np.abs(g).max(), 1e-30) for k, g in gradients.items())
    hidden = [oracle[f"hidden_states/{i}"] for i in range(sum(k.startswith("hidden_states/") for k in oracle))]
    if hidden:  # embedding, outputs of all blocks but the last, final norm
        states = ours["hidden_states"]
        mine = [states["embedding"], *states["layers"]["h"][:-1], states["final"]]
        errors["hidden"] = worst(largest(a, b) for a, b in zip(mine, hidden, strict=True))
    if any(k.startswith("ttt_stats/") for k in oracle):
        errors["statistics"] = _statistics_error(oracle, ours["statistics"]["layers"]["mixer"])
    if "logits_with_bf16_mult" in oracle:
        scale = np.asarray(oracle["ttt_lr_mult"], jnp.bfloat16).astype(np.float32)
        rounded = _evaluate({**oracle, "ttt_lr_mult": scale})
        errors["logits"] = worst([errors["logits"], largest(rounded["logits"], oracle["logits_with_bf16_mult"])])
    return Report(errors, TOLERANCE)


def _check_bf16(oracle: Oracle) -> Report:
    exact = _evaluate(oracle, "float32")
    ours = _evaluate(oracle)

    def distance(logits):
        return float(np.sqrt(np.mean((np.asarray(logits, np.float64) - exact["logits"]) ** 2)))

    return Report({"bf16_logits": distance(ours["logits"]) / distance(oracle["logits"])}, TOLERANCE)


def check_trajectory(oracle: Oracle) -> Report:
    """Compare loss and gradient norm of ten AdamW steps, and the parameters after five and ten."""
    config, options = json.loads(str(oracle["config"])), json.loads(str(oracle["optimizer"]))
    schedule = optimizer_lib.learning_rate(
        options["lr"], options["end_lr"], options["lr_warmup_steps"], options["lr_decay_steps"]
    )
    optimizer = optimizer_lib.adamw(
        schedule,
        beta1=options["b1"],
        beta2=options["b2"],
        epsilon=options["eps"],
        weight_decay=options["weight_decay"],
        clip_norm=options["clip_gradient"],
    )
    scales = jnp.asarray(oracle["ttt_lr_mult"])
    accumulation = config["_run"].get("accum", 1)
    step = jax.jit(train_step(model(oracle), optimizer, schedule, lambda i: scales[i], accumulation))
    state = initial_state(params(oracle), optimizer)
    errors = {"step_loss": 0.0, "grad_norm": 0.0, "learning_rate": 0.0}
    for i in range(len(oracle["loss"])):
        batch = {
            "inputs": oracle["input_tokens"][i],
            "targets": oracle["target_tokens"][i],
            "mask": oracle["loss_masks"][i],
        }
        state, metrics = step(state, batch)
        errors["step_loss"] = worst([errors["step_loss"], largest(metrics["loss"], oracle["loss"][i])])
        errors["grad_norm"] = worst([errors["grad_norm"], relative(metrics["grad_norm"], oracle["grad_norm"][i])])
        lr_error = largest(metrics["learning_rate"], oracle["learning_rate_applied"][i]) / options["lr"]
        errors["learning_rate"] = worst([errors["learning_rate"], lr_error])
        if i == 4:
            errors["params_5"] = _params_error(oracle, state.params, "params_after_5/")
    errors["params_10"] = _params_error(oracle, state.params, "final_params/")
    return Report(errors, TOLERANCE)


def check_generation(oracle: Oracle, params_oracle: Oracle) -> Report:
    """Compare the prefill of a prompt that ends inside a mini-batch, decoding by token, and reading all at once."""
    lm, tree = model(oracle), {"params": params(params_oracle)}
    context = Context(inner_lr_warmup=json.loads(str(oracle["config"]))["_run"].get("ttt_lr_mult", 1.0))
    apply = functools.partial(jax.jit(lambda tree, tokens, state: lm.apply(tree, tokens, state, context)), tree)
    tokens, prompt = oracle["tokens"], int(oracle["prompt_len"])

    def decode(state, columns):
        logits = []
        for column in columns.T:
            y, state = apply(column[:, None], state)
            logits.append(y[:, 0])
        return np.stack(logits, axis=1)

    prefill, state = apply(tokens[:, :prompt], lm.initial_state(len(tokens), tokens.shape[1]))
    greedy = decode(state, oracle["greedy_tokens"])
    errors = [
        largest(prefill, oracle["prefill_logits"]),
        largest(decode(state, tokens[:, prompt:]), oracle["decode_logits"]),
        largest(apply(tokens, None)[0], oracle["full_forward_logits_no_cache"]),
        largest(np.concatenate([prefill[:, -1:], greedy], axis=1), oracle["greedy_logits"]),
    ]
    return Report({"logits": worst(errors)}, TOLERANCE)


def _evaluate(oracle: Oracle, dtype: str | None = None) -> dict[str, Any]:
    """Compute everything that a ``model_*`` file may hold, with our code, in one compilation."""
    tokens, targets, mask = oracle["input_tokens"], oracle["target_tokens"], oracle["loss_masks"]
    scale = np.asarray(oracle["ttt_lr_mult"], np.float32).reshape(-1)[0]
    run = _computation(FrozenConfigDict(model_config(oracle, dtype)))
    result = jax.device_get(run(params(oracle), tokens, targets, mask, scale))
    return {**result, "grads": official_jax.params_to_theirs(result["grads"])}


@functools.cache
def _computation(config: FrozenConfigDict) -> Callable[..., dict[str, Any]]:
    """Return the function for :func:`_evaluate`, compiled once for all files of a model."""
    lm = build_model(config)

    def run(tree, tokens, targets, mask, scale):
        def loss_fn(tree):
            collections = ["statistics", "hidden_states"]
            context = Context(inner_lr_warmup=scale)
            (logits, _), extra = lm.apply({"params": tree}, tokens, None, context, mutable=collections)
            nll = token_nll(logits, targets)
            accuracy = mean_over_rows((logits.argmax(-1) == targets).astype(jnp.float32), mask)
            return mean_over_rows(nll, mask), {"logits": logits, "nll": nll, "accuracy": accuracy, **extra}

        (loss, extra), grads = jax.value_and_grad(loss_fn, has_aux=True)(tree)
        return {"loss": loss, "grads": grads, "grad_norm": optax.tree.norm(grads), **extra}

    return jax.jit(run)


def _statistics_error(oracle: Oracle, ours: Mapping[str, np.ndarray]) -> float:
    """Return the largest relative error of the statistics of the inner loop.

    Theirs are means over batch and heads, and of squares over d without the factor 1/2, at the last token of each
    mini-batch; the spread of the targets is at the first token.
    """
    config = json.loads(str(oracle["config"]))
    b = config["mini_batch_size"]
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    errors = []
    for key, theirs in oracle.items():
        if key.startswith("ttt_stats/"):
            _, layer, name = key.split("/")
            token = 0 if name == "ssl_tgt_from_mean_mse" else b - 1
            mine = 2 / head_dim * ours[_STATISTICS[name]][int(layer)].mean((0, 2))[token::b]
            errors.append(relative(mine, theirs))
    return worst(errors)


def _params_error(oracle: Oracle, tree: Any, prefix: str) -> float:
    mine = official_jax.params_to_theirs(tree)
    theirs = {k.removeprefix(prefix): x for k, x in oracle.items() if k.startswith(prefix)}
    _same_keys(mine, theirs)
    return worst(largest(mine[k], x) for k, x in theirs.items())


def _same_keys(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    if ours.keys() != theirs.keys():
        raise ValueError(f"parameters on one side only: {sorted(ours.keys() ^ theirs.keys())}")


def _difference(ours: Any, theirs: Any) -> np.ndarray:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f"shape {ours.shape} here, {theirs.shape} in the file")
    return ours - theirs
