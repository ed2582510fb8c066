"""Check the recipes of ``configs/``: their values, parameter counts and meshes, and tiny runs of them."""

import difflib
import json

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from recipes import GOLDEN, PAPER, all_recipes, dump, get, paper_recipes, text

from ttt_jax import config as config_lib
from ttt_jax.config import ConfigError
from ttt_jax.distributed import sharding
from ttt_jax.mixers import ttt_loop
from ttt_jax.models.language_model import build_model
from ttt_jax.training import loop, metrics
from ttt_jax.training import optimizer as optimizer_lib
from ttt_jax.training.step import build_program

# Table 3 of the paper, written down once more: blocks, width, heads, steps, peak learning rate, tokens.
TABLE_3 = {
    "125m": (12, 768, 12, 4800, 3e-3, 2.5e9),
    "350m": (24, 1024, 16, 13500, 1.5e-3, 7e9),
    "760m": (24, 1536, 16, 29000, 1.25e-3, 15e9),
    "1.3b": (24, 2048, 32, 50000, 1e-3, 26e9),
}
NAMED = {"125m": 125e6, "350m": 350e6, "760m": 760e6, "1.3b": 1.3e9}


def chips(recipe):
    """Return the number of chips that the docstring names."""
    _, size, _, context = recipe.split("-")
    return {("125m", "16k"): 128, ("125m", "32k"): 64}.get((size, context), 256)


def test_all_recipes_are_as_remembered():
    """Check that no default and no recipe has changed since they were written down.

    If a change is meant, run ``python tests/configs/recipes.py`` and review the difference. This also adds new mixers.
    """
    before = GOLDEN.read_text()
    now = text(dump(json.loads(before)["mixers"]))
    difference = difflib.unified_diff(before.splitlines(), now.splitlines(), "remembered", "now", lineterm="", n=0)
    assert now == before, "\n".join(difference)
    assert len(json.loads(now)["recipes"]) > 200


@pytest.mark.parametrize("size", TABLE_3)
def test_sizes_are_those_of_table_3(size):
    for recipe in (r for r in paper_recipes() if f"-{size}-" in r and "finetune" not in r):
        c = get(f"paper.py:{recipe}")
        steps = config_lib.steps(c, "training.duration")
        found = (c.model.num_layers, c.model.width, c.model.num_heads, steps, c.optimizer.peak_lr)
        assert found == TABLE_3[size][:5]
        assert c.data.batch_size * c.data.sequence_length == 2**19
        assert steps * 2**19 == pytest.approx(TABLE_3[size][5], rel=0.02)
        assert config_lib.steps(c, "optimizer.warmup") == steps // 10
        optimizer = (c.optimizer.beta1, c.optimizer.beta2, c.optimizer.weight_decay, c.optimizer.clip_norm)
        assert (*optimizer, c.optimizer.end_lr) == (0.9, 0.95, 0.1, 1.0, 1e-5)
        assert c.model.ttt.mini_batch == 16


@pytest.mark.parametrize("mixer", PAPER["MIXERS"])
def test_contexts_data_and_backbones(mixer):
    for recipe in (r for r in paper_recipes() if r.startswith(f"{mixer}-")):
        c = get(f"paper.py:{recipe}")
        _, _, dataset, context = recipe.split("-")
        assert c.data.source == f"data/{dataset}"
        assert c.data.sequence_length == 1024 * int(context[:-1])
        if mixer.startswith("ttt"):
            assert c.model.mixer == mixer.removesuffix("_t")
            assert c.model.ttt.backbone == ("transformer" if mixer.endswith("_t") else "mamba")
        else:
            assert c.model.mixer == "attention"
        long_transformer = mixer == "transformer_finetune" or (
            mixer == "transformer" and dataset == "books" and context not in ("1k", "2k")
        )
        assert c.model.rope_theta == (500_000 if long_transformer else 10_000)


def test_inner_rates_are_the_papers():
    """Check 1.0 for Linear, and 0.1 for MLP, warmed up from 0.01 over the outer warm-up."""
    for mixer, start, peak in (("ttt_linear", 1.0, 1.0), ("ttt_mlp", 0.01, 0.1)):
        config = get(f"paper.py:{mixer}-125m-pile-2k")
        assert ttt_loop.base_lr_start(config.model) == pytest.approx(start)
        assert ttt_loop.base_lr(config.model) == peak
        _, warmup = optimizer_lib.schedules(config)
        np.testing.assert_allclose([float(warmup(step)) for step in (0, 240, 480, 4800)], [0, 0.5, 1, 1], rtol=1e-6)


def test_finetuning_takes_a_fifth_of_the_steps():
    steps, rates = zip(
        *(
            (config_lib.steps(c, "training.duration"), c.optimizer.peak_lr)
            for c in (get(f"paper.py:transformer_finetune-{size}-books-8k") for size in TABLE_3)
        ),
        strict=True,
    )
    assert steps == (960, 2700, 5800, 10000)
    assert rates == (1e-4, 1e-5, 1e-5, 1e-5)
    assert get("paper.py:transformer_finetune-350m-books-8k").training.start_from == "runs/transformer-350m-books-2k"


def test_the_suffix_m_of_the_mamba_backbone_is_accepted():
    assert get("paper.py:ttt_mlp_m-350m-books-4k") == get("paper.py:ttt_mlp-350m-books-4k")


@pytest.mark.parametrize("mixer", PAPER["MIXERS"])
def test_meshes_divide_models_and_batches(mixer):
    for recipe in (r for r in paper_recipes() if r.startswith(f"{mixer}-")):
        c = get(f"paper.py:{recipe}")
        shape = config_lib.mesh_shape(c, chips(recipe))
        rows = c.data.batch_size // (shape["data"] * shape["fsdp"])
        assert rows == (2 if recipe.endswith("-1k") else 1)  # a row for each chip, or for the chips that share it
        assert shape["fsdp"] * shape["tensor"] == 16 or "-125m-" in recipe  # parts of the parameters


SIZES = ("width", "num_layers", "num_heads", "mlp_width", "vocab_size")


def parameters(c):
    module = build_model(c.model)
    return jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), np.int32))["params"]


def count(c):
    return sum(x.size for x in jax.tree.leaves(parameters(c)))


def count_by_hand(c):
    """Return the sum of embedding, final norm, and for each block two norms, SwiGLU and a mixer."""
    d, heads, kind, ttt = c.model.width, c.model.num_heads, c.model.mixer, c.model.ttt
    head_dim = d // heads
    block = 2 * d + 3 * d * c.model.mlp_width + 2 * d * d  # q and o
    block += 2 * d * head_dim * (c.model.attention.num_kv_heads or heads)  # k (or, with convolutions, the gate) and v
    if kind not in ("attention", "sliding", "sliding*5 + attention"):
        block += 2 * d  # post_norm
    if kind.startswith("ttt"):
        if ttt.learned_eta:
            block += heads * d + heads + ttt.mini_batch  # w, c and tau
        biases = 0
        if ttt.output == "residual_norm":
            block += 2 * d  # the learner's LN
            biases = 5 * head_dim if kind == "ttt_mlp" else head_dim
        if ttt.learned_w0:
            weights = 8 * head_dim**2 if kind == "ttt_mlp" else head_dim**2
            block += heads * (weights + biases)
        if ttt.backbone == "mamba":
            block += 2 * 5 * d  # convolutions of 4 taps and a bias, of q and of k
    if c.model.pre_conv or (c.model.pre_conv is None and kind.startswith("ttt") and ttt.backbone == "mamba"):
        block += 5 * d + d  # one before the mixer, with its norm
    return c.model.vocab_size * d + d + c.model.num_layers * block


@pytest.mark.slow
def test_parameter_counts_of_every_recipe():
    """Count by a formula, which is compared with two sizes of every kind of model."""
    models, kinds = {}, {}
    for name in all_recipes(json.loads(GOLDEN.read_text())["mixers"]):
        c = get(name)
        model = c.model.to_dict() | {"rope_theta": 0, "remat": "", "dtype": ""}  # which change no shape
        key = json.dumps(model, sort_keys=True)
        if key not in models:
            models[key] = count_by_hand(c)
            kind = json.dumps({key: value for key, value in model.items() if key not in SIZES}, sort_keys=True)
            kinds[kind] = kinds.get(kind, 0) + 1
            if kinds[kind] <= 2:
                assert count(c) == models[key], name
        if name.startswith("paper.py") and "smoke" not in name:
            assert models[key] == pytest.approx(NAMED[name.split("-")[1]], rel=0.15), name
    # Sizes and mixers; rungs, the last of which is one of these; small recipes.
    assert len(models) >= 4 * 5 + 7 + 7 + 4 * 4 - 2


def test_mini_batches_of_figure_7_change_only_tau():
    """Check that b from 1 to 2048 changes tau, of length b, and no other parameter."""
    for b in (2**i for i in range(12)):
        c = get("paper.py:ttt_linear-125m-pile-2k", f"--config.model.ttt.mini_batch={b}")
        assert count_by_hand(c) == 110_424_144 + 12 * (b - 16)
        if b in (1, 2048):
            assert count(c) == count_by_hand(c)


@pytest.mark.parametrize("recipe", ["ttt_linear-1.3b-pile-2k", "ttt_mlp-125m-books-32k", "transformer-760m-books-16k"])
def test_parameters_divide_over_the_mesh(recipe):
    c = get(f"paper.py:{recipe}")
    shape = config_lib.mesh_shape(c, chips(recipe))
    mesh = AbstractMesh(tuple(shape.values()), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    total = sum(x.size for x in jax.tree.leaves(parameters(c)))
    lying = jax.tree.leaves(build_program(c, mesh).abstract_state.params)
    assert sum(x.size for x in lying) == total
    here = sum(np.prod(x.sharding.shard_shape(x.shape)) for x in lying)
    assert here < 1.1 * total / (shape["fsdp"] * shape["tensor"])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("lstm-125m-pile-2k", "expected MIXER-SIZE-DATASET-CONTEXT, one each of ttt_linear, ttt_linear_t, "),
        ("ttt_linear-2b-pile-2k", "; 125m, 350m, 760m, 1.3b; pile, books; 1k, 2k, 4k, 8k, 16k, 32k"),
        ("ttt_linear-125m-pile-3k", "expected MIXER-SIZE-DATASET-CONTEXT"),
        ("ttt_linear-125m-pile-2k-x", "expected MIXER-SIZE-DATASET-CONTEXT"),
        ("ttt_linear,125m,2k", "expected MIXER-SIZE-DATASET-CONTEXT"),
        ("ttt_linear-125m-pile-2k:tiny", "expected :smoke, or nothing, after the recipe"),
        (
            "transformer_finetune-125m-books-2k",
            "continues from a model of 2k; expected a context of 4k, 8k",
        ),
    ],
)
def test_unknown_recipes_are_refused(argument, message):
    with pytest.raises(ConfigError) as error:
        get(f"paper.py:{argument}")
    assert str(error.value).startswith("paper.py:")
    assert message in str(error.value)


def run(argument, workdir, *overrides):
    """Train a recipe and return the losses of its steps."""
    config = get(argument, *overrides)
    outcome = loop.train(config, workdir)
    losses = [record["loss"] for record in metrics.read(workdir)]
    assert outcome.step == outcome.total == len(losses) == 10
    return losses


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        *(f"paper.py:{mixer}-1.3b-books-2k" for mixer in ("ttt_linear", "ttt_linear_t", "ttt_mlp", "ttt_mlp_t")),
        *(f"attention.py:{mixer}-1.3b-books-32k" for mixer in ("sliding", "hybrid_gqa")),
    ],
)
def test_smoke_variants_learn(recipe, tmp_path):
    """Train a few steps of each TTT mixer in each of its backbones, and of attention with windows."""
    losses = run(f"{recipe}:smoke", tmp_path)
    assert losses[0] == pytest.approx(np.log(258), abs=0.15)
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.slow
@pytest.mark.parametrize(("file", "shared"), [("paper.py", ""), ("attention.py", "_gqa")])
def test_smoke_variants_of_the_transformer_and_its_finetuning_learn(file, shared, tmp_path):
    first = run(f"{file}:transformer{shared}-125m-books-2k:smoke", tmp_path / "first")
    start = f"--config.training.start_from={tmp_path / 'first'}"
    second = run(f"{file}:transformer_finetune{shared}-125m-books-8k:smoke", tmp_path / "second", start)
    assert first[0] == pytest.approx(np.log(258), abs=0.15)
    assert first[-1] < first[0] - 0.5
    assert second[0] == pytest.approx(
        first[-1], abs=0.2
    )  # continues from the end of the first, with another base of RoPE
    assert second[-1] < second[0]
