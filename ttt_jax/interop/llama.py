"""Convert Llama models of the transformers library to ours, and check numbers that were computed with them.

Files are ``hf_llama*.npz`` in the format that ``tests/oracles/baselines/README.md`` describes. Kernels are transposed:
theirs are [out, in].
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from ttt_jax import config as config_lib
from ttt_jax.interop.oracles import Oracle, Report, largest, load, worst
from ttt_jax.interop.parameter_names import Entry, Names
from ttt_jax.models.language_model import build_model
from ttt_jax.training.loss import token_nll

# Largest error allowed, by kind of number: absolute, but for gradients relative to the largest entry of each tensor.
TOLERANCE = {"logits": 5e-5, "nll": 5e-5, "loss": 3e-6, "grad": 1e-4}

_SAME = {"vocab_size": "vocab_size", "hidden_size": "width", "num_hidden_layers": "num_layers"}
_SAME |= {"num_attention_heads": "num_heads", "intermediate_size": "mlp_width", "rms_norm_eps": "norm_epsilon"}
_ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}  # the values that models here can have


def _kernel(theirs: str, ours: str) -> Entry:
    return Entry(f"{theirs}.weight", f"{ours}/kernel", lambda x: x.T, lambda x: x.T)


PARAMETERS = Names(
    "transformers' Llama models",
    "model.layers.{}.",
    [
        Entry("model.embed_tokens.weight", "embedding"),
        Entry("model.norm.weight", "final_norm/scale"),
        Entry("lm_head.weight", "head", lambda x: x.T, lambda x: x.T),
    ],
    [
        Entry("input_layernorm.weight", "mixer_norm/scale"),
        Entry("post_attention_layernorm.weight", "mlp_norm/scale"),
        *(_kernel(f"self_attn.{name}_proj", f"mixer/w{name}") for name in "qkvo"),
        *(_kernel(f"mlp.{name}_proj", f"mlp/{name}") for name in ("gate", "up", "down")),
    ],
)


def model_config(theirs: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """Convert the ``config.json`` of a model to our ``config.model``, in float32.

    Raises:
      ValueError: for a key whose value models here cannot have.
    """
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope_type {kind!r}: expected 'default'")
    for key, only in _ONLY.items():
        if theirs.get(key, only) != only:
            raise ValueError(f"{key} {theirs[key]!r}: expected {only!r}")
    width, heads = theirs["hidden_size"], theirs["num_attention_heads"]
    if (head_dim := theirs.get("head_dim") or width // heads) * heads != width:
        raise ValueError(f"head_dim {head_dim}: expected hidden_size / num_attention_heads, {width / heads:g}")
    model = config_lib.default().model
    model.update(
        {ours: theirs[key] for key, ours in _SAME.items()},
        mixer="attention",
        tie_embeddings=theirs.get("tie_word_embeddings", False),
        rope_theta=float(rope.get("rope_theta") or theirs.get("rope_theta") or 10000.0),
        init_stddev=theirs.get("initializer_range", 0.02),
    )
    groups = theirs.get("num_key_value_heads") or heads
    model.attention.update(num_kv_heads=None if groups == heads else groups, rope_pairs="half_split")
    return model


def check(path: Path) -> Report | None:
    """Compare everything in a file; return None where the file has another format or is of another model.

    Raises:
      ValueError: where parameters or config in the file have no counterpart here.
    """
    oracle = load(path)
    if "config_json" not in oracle or "logits" not in oracle:
        return None
    config = json.loads(str(oracle["config_json"]))
    return check_model(oracle, config) if config.get("model_type") == "llama" else None


def _without_tied_head(params: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters with a head where the config says that it is not the embedding, and only there."""
    head, tied = params.get("lm_head.weight"), config.get("tie_word_embeddings", False)
    if tied and head is not None and not (head == params["model.embed_tokens.weight"]).all():
        raise ValueError("lm_head.weight: differs from the embedding; expected them equal, as tie_word_embeddings says")
    if not tied and head is None:
        raise ValueError("lm_head.weight: missing; expected it where tie_word_embeddings is false")
    return {name: x for name, x in params.items() if not (tied and name == "lm_head.weight")}


def check_model(oracle: Oracle, config: Mapping[str, Any]) -> Report:
    """Compare logits, losses and gradients of one batch."""
    tokens = oracle["tokens"]
    lm = build_model(model_config(config))

    def loss(params):
        logits, _ = lm.apply({"params": params}, tokens)
        nll = token_nll(logits[:, :-1], tokens[:, 1:])
        return nll.mean(), (logits, nll)

    params = {name.removeprefix("param/"): x for name, x in oracle.items() if name.startswith("param/")}
    params = _without_tied_head(params, config)
    ours = jax.tree.map(jnp.asarray, PARAMETERS.to_ours(params))
    (mean, (logits, nll)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(ours)
    found = PARAMETERS.to_theirs(gradients)
    theirs = {name.removeprefix("grad/"): x for name, x in oracle.items() if name.startswith("grad/")}
    if extra := theirs.keys() - found.keys():
        raise ValueError(f"gradients of parameters that the model lacks: {sorted(extra)}")
    errors = {
        "logits": largest(logits, oracle["logits"]),
        "nll": largest(nll, oracle["token_nll"]),
        "loss": largest(mean, oracle["loss"]),
        "grad": worst(largest(found[name], x) / max(float(abs(x).max()), 1e-30) for name, x in theirs.items()),
    }
    return Report(errors, TOLERANCE)
