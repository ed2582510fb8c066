"""Check Llama models against numbers of the transformers library, and that mistakes are found."""

import json
from pathlib import Path

import numpy as np
import pytest

from ttt_jax.interop import llama, oracles

FILE = Path(__file__).parents[1] / "oracles" / "baselines" / "hf_llama.npz"


@pytest.fixture(scope="module")
def oracle():
    return oracles.load(FILE)


@pytest.fixture(scope="module")
def config(oracle):
    return json.loads(str(oracle["config_json"]))


def test_the_numbers_of_the_file_are_reproduced():
    report = llama.check(FILE)
    assert report is not None
    assert report.errors.keys() == llama.TOLERANCE.keys()
    assert report.passed, str(report)


def test_files_of_other_formats_are_left_alone():
    assert llama.check(FILE.parents[1] / "model_self_attention.npz") is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"logits", "nll", "loss", "grad"}),
        ({"rms_norm_eps": 1e-2}, {"logits", "nll", "loss", "grad"}),
    ],
    ids=["base of positions", "epsilon"],
)
def test_other_settings_give_other_numbers(oracle, config, changes, wrong):
    report = llama.check_model(oracle, {**config, **changes})
    assert {kind for kind, error in report.errors.items() if error > report.tolerance[kind]} == wrong


def test_parameters_are_converted_there_and_back(oracle):
    theirs = {name.removeprefix("param/"): x for name, x in oracle.items() if name.startswith("param/")}
    back = llama.PARAMETERS.to_theirs(llama.PARAMETERS.to_ours(theirs))
    assert back.keys() == theirs.keys()
    assert all((back[name] == x).all() for name, x in theirs.items())
    del theirs["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"missing in some layers: \['model.layers.0.mlp.up_proj.weight'\]"):
        llama.PARAMETERS.to_ours(theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias True: expected False"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu': expected 'silu'"),
        ({"head_dim": 16}, "head_dim 16: expected hidden_size / num_attention_heads, 12"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope_type 'llama3': expected 'default'"),
        ({"rope_scaling": {"type": "linear"}, "rope_parameters": None}, "rope_type 'linear': expected 'default'"),
    ],
)
def test_models_without_a_counterpart_are_refused(config, changes, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        llama.model_config({**config, **changes})


def test_the_head_must_be_as_the_config_says(oracle, config):
    with pytest.raises(ValueError, match=r"^lm_head.weight: differs from the embedding; expected them equal"):
        llama.check_model(oracle, {**config, "tie_word_embeddings": True})
    without = {name: x for name, x in oracle.items() if name != "param/lm_head.weight"}
    with pytest.raises(ValueError, match=r"^lm_head.weight: missing; expected it where tie_word_embeddings is false"):
        llama.check_model(without, config)


def test_the_config_of_older_versions_is_read(config):
    older = {key: value for key, value in config.items() if key not in ("rope_parameters", "head_dim")}
    model = llama.model_config({**older, "rope_theta": 5e5, "num_key_value_heads": config["num_attention_heads"]})
    assert (model.rope_theta, model.attention.num_kv_heads, model.attention.rope_pairs) == (5e5, None, "half_split")
    assert np.isclose(model.norm_epsilon, config["rms_norm_eps"])
