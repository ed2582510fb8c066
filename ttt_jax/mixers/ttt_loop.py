"""Make the inner loop and its learning rate from the section ``model.ttt`` of a config."""

from collections.abc import Collection, Mapping
from typing import Any

from ttt_jax import import_path
from ttt_jax.errors import ConfigError
from ttt_jax.mixers.mixer import Model
from ttt_jax.ttt import learner as learner_lib
from ttt_jax.ttt import learners, update
from ttt_jax.ttt.inner_loop import READINGS, InnerLoop
from ttt_jax.ttt.learner import Function, Learner
from ttt_jax.ttt.learners import LEARNERS, ResidualNorm
from ttt_jax.ttt.objective import OBJECTIVES
from ttt_jax.ttt.rate import POSITION_RATES, TOKEN_RATES, Rate

LEARNER = "model.ttt.learner"
FIXED_LEARNERS = {"ttt_linear": "linear", "ttt_mlp": "mlp"}  # of the mixers whose inner loop is fixed
DEFAULT_LEARNERS = {**FIXED_LEARNERS, "ttt": "linear"}

_BASE_LR = {"mlp": 0.1}  # the paper's, by learner; 1 for others
_SOFTPLUS_BASE_LR = 0.001  # that of LaCT


def loop(model: Model) -> InnerLoop:
    """Return the inner loop that ``config.model`` describes.

    Raises:
      ConfigError: for a choice that does not exist, or does not go with the others.
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
    """Raise :class:`ConfigError` for a choice that does not exist, or does not go with the others.

    A learner of the user's own is neither imported nor looked for: figures of a run do not need it.
    """
    named = model.ttt.learner
    if named is not None and import_path.is_import_path(named):
        model = model.copy_and_resolve_references().unlock()
        model.ttt.learner = None
    loop(model)


def learner_name(model: Model) -> str:
    """Return the name of the learner: ``model.ttt.learner``, or the mixer's where that is unset."""
    return model.ttt.learner or DEFAULT_LEARNERS[model.mixer]


def learner_function(model: Model) -> Function:
    """Return the learner's function, which is imported if it is the user's own."""
    ttt, named = model.ttt, learner_name(model)
    if import_path.is_import_path(named):
        return import_path.load(named, LEARNER, ttt.learner_source)
    if named == "mlp" and ttt.mlp_depth == 1:
        named = "linear"  # the same function, by the name for which kernels exist
    kind = _named(LEARNER, named, LEARNERS, f", or {import_path.FORM}")
    options = {"depth": ttt.mlp_depth, "width_factor": ttt.mlp_width_factor, "bias": ttt.bias}
    return learners.make(kind, options)


def base_lr(model: Model) -> float:
    """Return the peak inner learning rate: the configured one, else the paper's for this learner."""
    if model.ttt.base_lr is not None:
        return model.ttt.base_lr
    return _SOFTPLUS_BASE_LR if model.ttt.rate == "softplus" else _BASE_LR.get(learner_name(model), 1.0)


def base_lr_start(model: Model) -> float:
    """Return the inner learning rate at the start of its warm-up.

    Unless it is configured, it is a tenth of the peak for the learner of TTT-MLP, and the peak for others.
    """
    if model.ttt.base_lr_start is not None:
        return model.ttt.base_lr_start
    return base_lr(model) / 10 if learner_name(model) == "mlp" else base_lr(model)


def check_learner(model: Model, found: InnerLoop) -> None:
    """Raise :class:`ConfigError` for a learner that breaks the rules of learners, or cannot learn."""
    named = learner_name(model)
    is_own, f, features = import_path.is_import_path(named), found.learner.f, found.learner.features
    alone = Learner(f.f if isinstance(f, ResidualNorm) else f, features)
    try:
        matrices = alone.structure.matrices  # messages name the function, not the residual around it
        features_out = found.learner.structure.features_out
        if is_own:
            learner_lib.check(found.learner)
    except ValueError as error:
        raise ConfigError(f"{LEARNER}={named!r}: {error}") from error
    except Exception as error:
        if not is_own:
            raise
        where = import_path.describe_error(error, import_path.source_file(named, LEARNER))
        raise ConfigError(f"{LEARNER}={named!r}: fails: {where}") from error
    if features_out != features:
        raise ConfigError(
            f"{LEARNER}={named!r}: returns {features_out} features for {features}; "
            "expected as many as it is given, which is the width of a head"
        )
    if len(matrices) > 1 and not model.ttt.learned_w0:
        raise ConfigError(
            f"model.ttt.learned_w0=False: the learner {named} has {len(matrices)} weight matrices, and two or more "
            "of zeros have zero gradients; expected true, or the learner linear"
        )


def _name(key: str, name: str, known: Collection[str], more: str = "") -> str:
    if name not in known:
        raise ConfigError(f"{key}={name!r}: expected one of {', '.join(known)}{more}")
    return name


def _named(key: str, name: str, known: Mapping[str, Any], more: str = "") -> Any:
    return known[_name(key, name, known, more)]
