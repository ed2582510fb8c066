"""List the perplexities that the text of the paper states (arXiv 2407.04620), none of them read off a figure.

Perplexities are of the Pile with tokens of Llama's tokenizer, at a context of 2048, of models of 125M parameters that
were trained by the recipe of section 3.1 and appendix C.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

CONTEXT = 2048
WHERE = "125M, Pile"  # model size and data of all perplexities
_STEPS, _TOKENS_PER_STEP = 4800, 1 << 19  # appendix C: "0.5M tokens"


class Stated(NamedTuple):
    """A perplexity that the paper states.

    Attributes:
      name: of the model, as in its Table 1.
      perplexity: on the Pile at :data:`CONTEXT` tokens.
      section: where the paper states it.
      config: the config keys and values that identify the model.
    """

    name: str
    perplexity: float
    section: str
    config: Mapping[str, Any]


_ATTENTION = {"model.mixer": "linear_attention"}
_BATCH = {"model.mixer": "ttt_linear", "model.ttt.backbone": "transformer", "model.ttt.learned_eta": False}
_PLAIN = {"model.ttt.output": "none", "model.ttt.bias": False}
_LN_AND_RESIDUAL = {"model.ttt.output": "residual_norm", "model.ttt.bias": True}
_MINI_BATCH = {"model.ttt.learned_w0": True, **_LN_AND_RESIDUAL, "model.ttt.mini_batch": 16}

# The first row of Table 1, 15.91, is linear attention with a normalizer and a feature expansion, which has no mixer.
TABLE_1 = (
    Stated("Linear attn. improved", 15.23, "Table 1", _ATTENTION),
    Stated(
        "TTT equivalence",
        15.23,
        "Table 1",
        {**_BATCH, "model.ttt.learned_w0": False, **_PLAIN, "model.ttt.mini_batch": None},
    ),
    Stated(
        "+ learnable W0",
        15.27,
        "Table 1",
        {**_BATCH, "model.ttt.learned_w0": True, **_PLAIN, "model.ttt.mini_batch": None},
    ),
    Stated(
        "+ LN and residual in f",
        14.05,
        "Table 1",
        {**_BATCH, "model.ttt.learned_w0": True, **_LN_AND_RESIDUAL, "model.ttt.mini_batch": None},
    ),
    Stated("+ mini-batch TTT", 12.35, "Table 1", {**_BATCH, **_MINI_BATCH}),
    Stated("+ learnable eta", 11.99, "Table 1", {**_BATCH, **_MINI_BATCH, "model.ttt.learned_eta": True}),
    Stated(
        "+ Mamba backbone",
        11.09,
        "Table 1, Figures 7 and 10",
        {**_BATCH, **_MINI_BATCH, "model.ttt.learned_eta": True, "model.ttt.backbone": "mamba"},
    ),
)
TTT_LINEAR = TABLE_1[-1]


def of(config: Mapping[str, Any]) -> Stated | None:
    """Return what the paper states about a model of Table 1, of any size; None for all other models.

    Args:
      config: of a run, by dotted keys.
    """
    for stated in TABLE_1:
        if all(config[key] == _value(config, value) for key, value in stated.config.items()):
            return stated
    return None


def training_flops(stated: Stated) -> float:
    """Return the training FLOPs of a model of Table 1 with the recipe for 125M parameters."""
    from ttt_jax import config as config_lib
    from ttt_jax.models import counts

    config = config_lib.default()
    model = {"num_layers": 12, "width": 768, "num_heads": 12, "mlp_width": 2048, "vocab_size": 32_000}
    settings = {f"model.{key}": value for key, value in model.items()} | {"data.sequence_length": CONTEXT}
    for key, value in (settings | dict(stated.config)).items():
        config_lib.set_value(config, key, CONTEXT if value is None else value)
    return _STEPS * counts.flops_per_step(config.model, CONTEXT, _TOKENS_PER_STEP // CONTEXT)


def _value(config: Mapping[str, Any], value: Any) -> Any:
    """Return a value of ``Stated.config``; None stands for a mini-batch of the whole sequence."""
    return config["data.sequence_length"] if value is None else value
