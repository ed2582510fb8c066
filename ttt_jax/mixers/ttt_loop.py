"""From the section ``model.ttt`` of a config to an inner loop and its learning rate."""

from collections.abc import Collection, Mapping
from typing import Any

from ttt_jax import import_path
from ttt_jax.errors import ConfigError
from ttt_jax.mixers.mixer import Model
from ttt_jax.ttt import learners, rules, update
from ttt_jax.ttt.inner_loop import READINGS, InnerLoop
from ttt_jax.ttt.learner import Function, Learner
from ttt_jax.ttt.learners import LEARNERS, ResidualNorm
from ttt_jax.ttt.objective import OBJECTIVES
from ttt_jax.ttt.rate import POSITION_RATES, TOKEN_RATES, Rate

LEARNER = "model.ttt.learner"
SETTLED = {"ttt_linear": "linear", "ttt_mlp": "mlp"}  # mixers whose inner loop is settled, and their learners
LEARNER_OF = {**SETTLED, "ttt": "linear"}  # unless model.ttt.learner is set

_BASE_LR = {"mlp": 0.1}  # the paper's by learner, where it is not 1
_SOFTPLUS_BASE_LR = 0.001  # LaCT's


def loop(model: Model) -> InnerLoop:
    """Return the inner loop that ``config.model`` describes: of TTT-Linear and TTT-MLP, or any other.

    Raises:
      ConfigError: where a choice is not among those that exist, or does not go with the others.
    """
    ttt, f = model.ttt, learner_function(model)
    objective = _named("model.ttt.objective", ttt.objective, OBJECTIVES)
    rate = Rate(
        _name("model.ttt.rate", ttt.rate, TOKEN_RATES),
        _name("model.ttt.position_rate", ttt.position_rate, POSITION_RATES),
        ttt.rate_per_matrix,
    )
    learner = Learner(ResidualNorm(f) if ttt.output == "residual_norm" else f, model.width // model.num_heads)
    reading = _name("model.ttt.reading", ttt.reading, READINGS)
    chosen = ttt["update"]  # ttt.update is a method
    try:
        return InnerLoop(learner, objective, rate, update.parse(chosen), reading)
    except ValueError as error:
        raise ConfigError(f"model.ttt.update={chosen!r}: {error}") from error


def check_names(model: Model) -> None:
    """Raise :class:`ConfigError` where a choice does not exist or go with the others.

    A learner of the user's own is neither imported nor looked for: pictures of a run do not need it.
    """
    named = model.ttt.learner
    if named is not None and import_path.is_import_path(named):
        model = model.copy_and_resolve_references().unlock()
        model.ttt.learner = None
    loop(model)


def learner_name(model: Model) -> str:
    """Return the name of the learner, which the mixer has where none is set."""
    return model.ttt.learner or LEARNER_OF[model.mixer]


def learner_function(model: Model) -> Function:
    """Return the learner's function, imported where it is one of the user's own."""
    ttt, named = model.ttt, learner_name(model)
    if import_path.is_import_path(named):
        return import_path.load(named, LEARNER, ttt.learner_source)
    if named == "mlp" and ttt.mlp_depth == 1:
        named = "linear"  # the same function, by the name that kernels know
    kind = _named(LEARNER, named, LEARNERS, f", or {import_path.FORM}")
    options = {"depth": ttt.mlp_depth, "width_factor": ttt.mlp_width_factor, "bias": ttt.bias}
    return learners.make(kind, options)


def base_lr(model: Model) -> float:
    """Return the peak inner learning rate: as configured, else the paper's for this learner."""
    if model.ttt.base_lr is not None:
        return model.ttt.base_lr
    return _SOFTPLUS_BASE_LR if model.ttt.rate == "softplus" else _BASE_LR.get(learner_name(model), 1.0)


def base_lr_start(model: Model) -> float:
    """Return the inner learning rate that its warm-up starts with: a tenth of the peak for the learner of TTT-MLP,
    unless it is configured."""
    if model.ttt.base_lr_start is not None:
        return model.ttt.base_lr_start
    return base_lr(model) / 10 if learner_name(model) == "mlp" else base_lr(model)


def check_learner(model: Model, found: InnerLoop) -> None:
    """Raise :class:`ConfigError` for a learner that breaks the rules, and for one that cannot learn."""
    named = learner_name(model)
    is_own, f, features = import_path.is_import_path(named), found.learner.f, found.learner.features
    alone = Learner(f.f if isinstance(f, ResidualNorm) else f, features)
    try:
        matrices = alone.structure.matrices  # messages name the function, not the residual around it
        features_out = found.learner.structure.features_out
        if is_own:
            rules.check(found.learner)
    except ValueError as error:
        raise ConfigError(f"{LEARNER}={named!r}: {error}") from error
    except Exception as error:
        if not is_own:
            raise
        where = import_path.describe_error(error, import_path.source_file(named, LEARNER))
        raise ConfigError(f"{LEARNER}={named!r}: fails: {where}") from error
    if features_out != features:
        raise ConfigError(
            f"{LEARNER}={named!r}: makes {features_out} features of {features}; "
            "expected as many as it is given, which is the width of a head"
        )
    if len(matrices) > 1 and not model.ttt.learned_w0:
        raise ConfigError(
            f"model.ttt.learned_w0=False: the learner {named} has {len(matrices)} weight matrices, and with "
            "two or more of zeros all gradients are zero; expected true, or the learner linear"
        )


def _name(key: str, name: str, known: Collection[str], more: str = "") -> str:
    if name not in known:
        raise ConfigError(f"{key}={name!r}: expected one of {', '.join(known)}{more}")
    return name


def _named(key: str, name: str, known: Mapping[str, Any], more: str = "") -> Any:
    return known[_name(key, name, known, more)]
