"""Convert parameters and config keys of the TTT authors' JAX code (test-time-training/ttt-lm-jax) to and from ours.

Their parameters are flat keys ``model/h/<layer>/...``; ours are a tree with layers stacked on the first axis.
"""

from collections.abc import Callable, Mapping
from typing import Any

import ml_collections
import numpy as np

from ttt_jax import config as config_lib
from ttt_jax.interop.parameter_names import Entry, Names
from ttt_jax.mixers import MIXERS


def _axis(index: int) -> tuple[Callable, Callable]:
    """Return the conversions that remove and add an axis of length 1, which only their arrays have."""
    return (lambda x: x.squeeze(index)), (lambda x: np.expand_dims(x, index))


def _reverse(entry: tuple[Callable, Callable]) -> tuple[Callable, Callable]:
    return entry[1], entry[0]


_TOP = [
    Entry("model/wte/embedding", "embedding"),
    Entry("model/ln_f/kernel", "final_norm/scale"),
    Entry("lm_head/kernel", "head"),
]
_MIXER = "seq_modeling_block/"
_MIXERS = {
    "self_attention": "attention",
    "ttt_linear": "ttt_linear",
    "ttt_mlp": "ttt_mlp",
}  # from their names, without _base
_LAYER = [
    Entry("seq_norm/kernel", "mixer_norm/scale"),
    Entry("ffn_norm/kernel", "mlp_norm/scale"),
    Entry("feed_forward/w1/kernel", "mlp/gate/kernel"),
    Entry("feed_forward/w3/kernel", "mlp/up/kernel"),
    Entry("feed_forward/w2/kernel", "mlp/down/kernel"),
    Entry("conv/conv_norm/kernel", "conv_norm/scale"),
    Entry("conv/conv1/kernel", "conv/kernel", *_axis(1)),
    Entry("conv/conv1/bias", "conv/bias"),
    *(Entry(f"{_MIXER}{name}/kernel", f"mixer/{name}/kernel") for name in ("wq", "wk", "wv", "wo", "wg")),
    Entry(f"{_MIXER}conv_q/kernel", "mixer/conv_q/kernel", *_axis(1)),
    Entry(f"{_MIXER}conv_q/bias", "mixer/conv_q/bias"),
    Entry(f"{_MIXER}conv_k/kernel", "mixer/conv_k/kernel", *_axis(1)),
    Entry(f"{_MIXER}conv_k/bias", "mixer/conv_k/bias"),
    Entry(f"{_MIXER}post_norm/scale", "mixer/post_norm/scale"),
    Entry(f"{_MIXER}post_norm/bias", "mixer/post_norm/bias"),
    Entry(f"{_MIXER}learnable_token_idx", "mixer/tau"),
    Entry(
        f"{_MIXER}learnable_ttt_lr/kernel", "mixer/eta_kernel", lambda x: x[..., 0].T, lambda x: x.T[..., None]
    ),  # [H, D, 1] and [D, H]
    Entry(f"{_MIXER}learnable_ttt_lr/bias", "mixer/eta_bias", *_axis(1)),
    Entry(f"{_MIXER}ttt_norm/scale", "mixer/inner_norm_scale", *_reverse(_axis(1))),
    Entry(f"{_MIXER}ttt_norm/bias", "mixer/inner_norm_bias", *_reverse(_axis(1))),
    *(Entry(f"{_MIXER}ttt_dense_{i}", f"mixer/inner_kernel_{i}") for i in range(2)),
    *(Entry(f"{_MIXER}ttt_bias_{i}", f"mixer/inner_bias_{i}") for i in range(2)),
]


_NAMES = Names("the TTT authors' models", "model/h/{}/", _TOP, _LAYER)


def params_to_ours(theirs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Convert their flat parameters (or gradients), whose keys have no leading ``params/``, to our parameter tree.

    Raises:
      ValueError: for keys that are not parameters of their models.
    """
    return _NAMES.to_ours(theirs)


def params_to_theirs(ours: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Convert our parameter tree (or gradients) to their flat keys, with one array per layer."""
    return _NAMES.to_theirs(ours)


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
