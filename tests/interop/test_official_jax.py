"""Convert parameters and config keys of the TTT authors' JAX code."""

from pathlib import Path

import flax.traverse_util
import jax
import numpy as np
import pytest

from ttt_jax.interop import official_jax, oracles

ORACLES = Path(__file__).parents[1] / "oracles"
FILES = ["model_self_attention", "model_ttt_linear_untied", "model_ttt_linear_base", "model_ttt_mlp"]


def their_params(name):
    oracle = oracles.load(ORACLES / f"{name}.npz")
    return {k.removeprefix("params/"): x for k, x in oracle.items() if k.startswith("params/")}


@pytest.mark.parametrize("name", FILES)
def test_conversions_are_inverse(name):
    theirs = their_params(name)
    ours = official_jax.params_to_ours(theirs)
    back = official_jax.params_to_theirs(ours)
    assert back.keys() == theirs.keys()
    for key, x in theirs.items():
        np.testing.assert_array_equal(back[key], x, err_msg=key)
    jax.tree.map(np.testing.assert_array_equal, official_jax.params_to_ours(back), ours)


@pytest.mark.parametrize("name", FILES)
def test_converted_parameters_have_the_shapes_of_our_model(name):
    model = oracles.model(oracles.load(ORACLES / f"{name}.npz"))
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    ours = official_jax.params_to_ours(their_params(name))
    assert jax.tree.map(np.shape, ours) == jax.tree.map(np.shape, shapes)


def test_layout_of_single_tensors():
    """Check single numbers: layers are stacked, [H, D, 1] becomes [D, H], axes of length 1 move."""
    theirs = their_params("model_ttt_linear_untied")
    ours = flax.traverse_util.flatten_dict(official_jax.params_to_ours(theirs), sep="/")
    layer, mixer = "model/h/1/", "model/h/1/seq_modeling_block/"
    assert ours["layers/mixer/eta_kernel"][1, 20, 3] == theirs[mixer + "learnable_ttt_lr/kernel"][3, 20, 0]
    assert ours["layers/mixer/eta_bias"][1, 2] == theirs[mixer + "learnable_ttt_lr/bias"][2, 0]
    assert ours["layers/mixer/conv_q/kernel"][1, 0, 9] == theirs[mixer + "conv_q/kernel"][0, 0, 9]
    assert ours["layers/mixer/inner_norm_scale"][1, 3, 0, 5] == theirs[mixer + "ttt_norm/scale"][3, 5]
    assert ours["layers/mlp/up/kernel"][1, 7, 8] == theirs[layer + "feed_forward/w3/kernel"][7, 8]
    assert ours["head"][7, 8] == theirs["lm_head/kernel"][7, 8]


@pytest.mark.parametrize("key", ["model/h/0/unknown/kernel", "unknown", "model/wpe/embedding"])
def test_unknown_keys_are_named(key):
    theirs = {**their_params("model_self_attention"), key: np.zeros(3)}
    with pytest.raises(ValueError, match=key):
        official_jax.params_to_ours(theirs)


def test_a_parameter_missing_in_one_layer_is_an_error():
    theirs = their_params("model_self_attention")
    del theirs["model/h/0/ffn_norm/kernel"]
    with pytest.raises(ValueError, match="model/h/1/ffn_norm/kernel"):
        official_jax.params_to_ours(theirs)


def test_config_keys_are_converted():
    theirs = {
        "seq_modeling_block": "ttt_mlp_base",
        "vocab_size": 97,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "mini_batch_size": 8,
        "ttt_base_lr": 0.25,
        "remat_mini_batch_group_size": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500.0,
        "tie_word_embeddings": False,
    }
    model = official_jax.model_config(theirs, "bfloat16")
    assert (model.mixer, model.ttt.backbone, model.pre_conv) == ("ttt_mlp", "transformer", False)
    assert (model.vocab_size, model.width, model.num_layers, model.num_heads, model.mlp_width) == (97, 64, 3, 4, 96)
    assert (model.ttt.mini_batch, model.ttt.base_lr, model.ttt.remat_group) == (8, 0.25, 2)
    assert (model.norm_epsilon, model.rope_theta, model.tie_embeddings, model.dtype) == (1e-5, 500.0, False, "bfloat16")
    mamba = official_jax.model_config({**theirs, "seq_modeling_block": "ttt_linear", "pre_conv": True})
    assert (mamba.mixer, mamba.ttt.backbone, mamba.pre_conv) == ("ttt_linear", "mamba", True)


@pytest.mark.parametrize("block", ["ttt_conv", "ttt"])  # ttt is a mixer here, but none of their blocks
def test_unknown_mixers_are_refused(block):
    with pytest.raises(ValueError, match=f"seq_modeling_block='{block}'"):
        official_jax.model_config({"seq_modeling_block": block})
