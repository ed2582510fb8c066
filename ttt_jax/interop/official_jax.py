"""Convert parameters and config keys of the TTT authors' JAX code (test-time-training/ttt-lm-jax) to and from ours.

Their parameters are flat keys ``model/h/<layer>/...``; ours are a tree with layers stacked on the first axis.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.traverse_util
import ml_collections
import numpy as np

from ttt_jax import config as config_lib
from ttt_jax.mixers import MIXERS


class _Entry(NamedTuple):
    theirs: str
    ours: str
    to_ours: Callable[[np.ndarray], np.ndarray] = lambda x: x
    to_theirs: Callable[[np.ndarray], np.ndarray] = lambda x: x


def _axis(index: int) -> tuple[Callable, Callable]:
    """Return the conversions that remove and add an axis of length 1, which only their arrays have."""
    return (lambda x: x.squeeze(index)), (lambda x: np.expand_dims(x, index))


def _reverse(entry: tuple[Callable, Callable]) -> tuple[Callable, Callable]:
    return entry[1], entry[0]


_TOP = [
    _Entry("model/wte/embedding", "embedding"),
    _Entry("model/ln_f/kernel", "final_norm/scale"),
    _Entry("lm_head/kernel", "head"),
]
_MIXER = "seq_modeling_block/"
_MIXERS = {
    "self_attention": "attention",
    "ttt_linear": "ttt_linear",
    "ttt_mlp": "ttt_mlp",
}  # from their names, without _base
_LAYER = [
    _Entry("seq_norm/kernel", "mixer_norm/scale"),
    _Entry("ffn_norm/kernel", "mlp_norm/scale"),
    _Entry("feed_forward/w1/kernel", "mlp/gate/kernel"),
    _Entry("feed_forward/w3/kernel", "mlp/up/kernel"),
    _Entry("feed_forward/w2/kernel", "mlp/down/kernel"),
    _Entry("conv/conv_norm/kernel", "conv_norm/scale"),
    _Entry("conv/conv1/kernel", "conv/kernel", *_axis(1)),
    _Entry("conv/conv1/bias", "conv/bias"),
    *(_Entry(f"{_MIXER}{name}/kernel", f"mixer/{name}/kernel") for name in ("wq", "wk", "wv", "wo", "wg")),
    _Entry(f"{_MIXER}conv_q/kernel", "mixer/conv_q/kernel", *_axis(1)),
    _Entry(f"{_MIXER}conv_q/bias", "mixer/conv_q/bias"),
    _Entry(f"{_MIXER}conv_k/kernel", "mixer/conv_k/kernel", *_axis(1)),
    _Entry(f"{_MIXER}conv_k/bias", "mixer/conv_k/bias"),
    _Entry(f"{_MIXER}post_norm/scale", "mixer/post_norm/scale"),
    _Entry(f"{_MIXER}post_norm/bias", "mixer/post_norm/bias"),
    _Entry(f"{_MIXER}learnable_token_idx", "mixer/tau"),
    _Entry(
        f"{_MIXER}learnable_ttt_lr/kernel", "mixer/eta_kernel", lambda x: x[..., 0].T, lambda x: x.T[..., None]
    ),  # [H, D, 1] and [D, H]
    _Entry(f"{_MIXER}learnable_ttt_lr/bias", "mixer/eta_bias", *_axis(1)),
    _Entry(f"{_MIXER}ttt_norm/scale", "mixer/inner_norm_scale", *_reverse(_axis(1))),
    _Entry(f"{_MIXER}ttt_norm/bias", "mixer/inner_norm_bias", *_reverse(_axis(1))),
    *(_Entry(f"{_MIXER}ttt_dense_{i}", f"mixer/inner_kernel_{i}") for i in range(2)),
    *(_Entry(f"{_MIXER}ttt_bias_{i}", f"mixer/inner_bias_{i}") for i in range(2)),
]


def params_to_ours(theirs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Convert their flat parameters (or gradients), whose keys have no leading ``params/``, to our parameter tree.

    Raises:
      ValueError: for keys that are not parameters of their models.
    """
    theirs = dict(theirs)
    layers = 1 + max((int(key.split("/")[2]) for key in theirs if key.startswith("model/h/")), default=-1)
    flat = {e.ours: e.to_ours(theirs.pop(e.theirs)) for e in _TOP if e.theirs in theirs}
    for e in _LAYER:
        keys = [f"model/h/{i}/{e.theirs}" for i in range(layers)]
        if keys and all(key in theirs for key in keys):
            flat[f"layers/{e.ours}"] = np.stack([e.to_ours(theirs.pop(key)) for key in keys])
    if theirs:
        raise ValueError(f"not parameters of the TTT authors' models, or missing in some layers: {sorted(theirs)}")
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def params_to_theirs(ours: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Convert our parameter tree (or gradients) to their flat keys, with one array per layer."""
    flat = {key: np.asarray(x) for key, x in flax.traverse_util.flatten_dict(dict(ours), sep="/").items()}
    theirs = {e.theirs: e.to_theirs(flat[e.ours]) for e in _TOP if e.ours in flat}
    for e in _LAYER:
        for i, x in enumerate(flat.get(f"layers/{e.ours}", ())):
            theirs[f"model/h/{i}/{e.theirs}"] = e.to_theirs(x)
    return theirs


def model_config(theirs: Mapping[str, Any], dtype: str = "float32") -> ml_collections.ConfigDict:
    """Convert keyword arguments of their ``ModelConfig`` to our ``config.model``.

    Raises:
      ValueError: for a ``seq_modeling_block`` that has no counterpart here.
    """
    block = theirs["seq_modeling_block"]
    mixer = _MIXERS.get(block.removesuffix("_base"))
    if mixer is None:
        raise ValueError(f"seq_modeling_block={block!r}: expected self_attention, ttt_linear[_base] or ttt_mlp[_base]")
    model = config_lib.default().model
    model.update(
        mixer=mixer,
        dtype=dtype,
        vocab_size=theirs["vocab_size"],
        width=theirs["hidden_size"],
        num_layers=theirs["num_hidden_layers"],
        num_heads=theirs["num_attention_heads"],
        mlp_width=theirs["intermediate_size"],
        pre_conv=theirs.get("pre_conv", False),
        tie_embeddings=theirs.get("tie_word_embeddings", True),
        rope_theta=theirs.get("rope_theta", 10000.0),
        norm_epsilon=theirs.get("rms_norm_eps", 1e-6),
        init_stddev=theirs.get("initializer_range", 0.02),
        conv_width=theirs.get("conv_width", 4),
    )
    if MIXERS[mixer].learns:
        model.ttt.update(
            backbone="transformer" if block.endswith("_base") else "mamba",
            mini_batch=theirs["mini_batch_size"],
            base_lr=float(theirs["ttt_base_lr"]),
            base_lr_start=0.0,  # so that Context.inner_lr_warmup is their ttt_lr_mult
            remat_group=theirs.get("remat_mini_batch_group_size", 0),
        )
    return model
