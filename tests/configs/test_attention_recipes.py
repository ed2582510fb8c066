"""Check the recipes of ``configs/attention.py``: windows and shared heads beside the Transformer of ``paper.py``."""

import collections

import numpy as np
import pytest
from recipes import ATTENTION, get

from ttt_jax import config as config_lib
from ttt_jax.config import ConfigError
from ttt_jax.models import counts, pattern

SIZES = {"125m": (12, 4), "350m": (16, 4), "760m": (16, 4), "1.3b": (32, 8)}  # heads, and of keys where shared


def difference(recipe):
    """Return the keys of the model and of training in which a recipe is not paper.py's Transformer."""
    mixer, *rest = recipe.split("-")
    finetunes = "_finetune" if "finetune" in mixer else ""
    of_paper = get("paper.py:" + "-".join([f"transformer{finetunes}", *rest]))
    found = config_lib.differing_keys(of_paper.to_dict(), get(f"attention.py:{recipe}").to_dict())
    return {key: now for key, (_, now) in found.items() if not key.startswith("mesh.")}


@pytest.mark.parametrize("size", SIZES)
def test_only_attention_differs_from_the_transformer_of_the_paper(size):
    window, shared = {"model.attention.window": 8192}, {"model.attention.num_kv_heads": SIZES[size][1]}
    hybrid = {"model.mixer": "sliding*5 + attention", **window}
    rest = f"{size}-books-32k"
    assert difference(f"transformer-{rest}") == difference(f"transformer_finetune-{rest}") == {}
    assert difference(f"transformer_gqa-{rest}") == shared
    assert difference(f"sliding-{rest}") == {"model.mixer": "sliding", **window}
    assert difference(f"hybrid-{rest}") == hybrid
    assert difference(f"hybrid_gqa-{rest}") == hybrid | shared
    start = {"training.start_from": f"runs/transformer_gqa-{size}-books-2k"}
    assert difference(f"transformer_finetune_gqa-{rest}") == shared | start


@pytest.mark.parametrize("size", SIZES)
def test_every_sixth_block_of_a_hybrid_sees_everything(size):
    mixers = [block.model.mixer for block in pattern.blocks(get(f"attention.py:hybrid-{size}-pile-8k").model)]
    assert mixers == (["sliding"] * 5 + ["attention"]) * (len(mixers) // 6)
    assert collections.Counter(mixers)["attention"] == (2 if size == "125m" else 4)


@pytest.mark.parametrize("context", ["8k", "16k", "32k"])
@pytest.mark.parametrize("size", SIZES)
def test_shared_heads_split_over_the_chips_that_the_docstring_names(size, context):
    chips = {"8k": 256, "16k": 128, "32k": 64}[context] * (2 if size == "1.3b" and context != "8k" else 1)
    for mixer in ATTENTION["MIXERS"]:
        c = get(f"attention.py:{mixer}_gqa-{size}-pile-{context}")
        shape = config_lib.mesh_shape(c, chips)
        assert c.data.batch_size == shape["data"] * shape["fsdp"]
        assert shape["fsdp"] * shape["tensor"] == 16 or size == "125m"
        assert c.model.num_heads == SIZES[size][0]


def test_operations_of_a_hybrid():
    """Count 24 blocks of width 2048 by hand: a token sees 8192 tokens, fewer at the start, or half of all."""
    c = get("attention.py:hybrid_gqa-1.3b-pile-32k")
    of_window = np.minimum(np.arange(1, 32_769), 8192).mean()
    dense = 24 * (2 * 2 * 2048**2 + 2 * 2 * 2048 * 8 * 64 + 6 * 2048 * 5504) + 2 * 2048 * 32_000
    seen = 4 * 2048 * (20 * of_window + 4 * 32_769 / 2)
    assert counts.flops_per_token(c.model, 32_768) == pytest.approx(dense + seen, rel=1e-12)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "hybrid-125m-pile-4k",
            "attention.py:hybrid-125m-pile-4k: the window is longer than the context; expected 8k,",
        ),
        ("full-125m-pile-8k", "attention.py:full-125m-pile-8k: expected MIXER-SIZE-DATASET-CONTEXT, MIXER one of tra"),
        ("hybrid-125m-pile-8k:tiny", "attention.py:hybrid-125m-pile-8k:tiny: expected MIXER-SIZE-DATASET-CONTEXT, "),
        ("hybrid_gqa-2b-pile-8k", "paper.py:transformer-2b-pile-8k: expected MIXER-SIZE-DATASET-CONTEXT"),
    ],
)
def test_unknown_recipes_are_refused(argument, message):
    with pytest.raises(ConfigError) as error:
        get(f"attention.py:{argument}")
    assert str(error.value).startswith(message)
