"""Check which mixer a pattern puts into which block, the keys of an entry, and patterns that are refused."""

import pytest

from ttt_jax import config as config_lib
from ttt_jax.config import ConfigError
from ttt_jax.models import counts, pattern


def model(mixer, blocks=6, **options):
    config = config_lib.default()
    config.model.update(mixer=mixer, num_layers=blocks, width=16, num_heads=2, mlp_width=24, **options)
    config_lib.validate(config)
    return config.model


def names(model):
    """Return the entry of each block, in order."""
    return [run.text for run in pattern.blocks(model)]


@pytest.mark.parametrize(
    ("mixer", "blocks", "expected", "segments"),
    [
        ("attention", 3, "aaa", [(1, 1)]),
        ("attention*2", 3, "aaa", [(1, 1)]),
        ("attention + attention", 4, "aaaa", [(1, 1)]),
        ("ttt_linear*5 + attention", 12, "tttttattttta", [(2, 2)]),
        ("ttt_linear*5+attention", 8, "tttttatt", [(2, 1), (1, 1)]),
        ("ttt_linear*2 + attention + ttt_linear", 8, "ttatttat", [(3, 2)]),
        ("attention + ttt_linear + linear_attention", 5, "atlat", [(3, 1), (2, 1)]),
        (" attention*3 +ttt_linear * 2 ", 5, "aaatt", [(2, 1)]),
    ],
)
def test_the_pattern_is_repeated_and_its_last_repetition_cut(mixer, blocks, expected, segments):
    found = model(mixer, blocks)
    assert "".join(name[0] for name in names(found)) == expected
    assert [(len(segment.runs), segment.repeats) for segment in pattern.segments(found)] == segments
    assert sum(kind.blocks for kind in pattern.kinds(found)) == blocks


def test_the_number_of_runs_does_not_grow_with_depth():
    shallow, deep = (list(pattern.each_run(model("ttt_linear*5 + attention", blocks))) for blocks in (12, 96))
    assert len(shallow) == len(deep) == 2


def test_entries_may_have_their_own_keys():
    found = model(
        "ttt_linear(mini_batch=4, backbone=transformer)*2 + ttt_mlp(channel=swiglu + swiglu, mlp_width=8, "
        "pre_conv=false) + attention(norms=pre_post,rope_theta=5e5)"
    )
    linear, mlp, attention = (kind.model for kind in pattern.kinds(found))
    assert (linear.mixer, linear.ttt.mini_batch, linear.ttt.backbone, linear.mlp_width) == (
        "ttt_linear",
        4,
        "transformer",
        24,
    )
    assert (mlp.mixer, mlp.ttt.mini_batch, mlp.channel, mlp.mlp_width, mlp.pre_conv) == (
        "ttt_mlp",
        16,
        "swiglu + swiglu",
        8,
        False,
    )
    assert (attention.mixer, attention.norms, attention.rope_theta) == ("attention", "pre_post", 500_000.0)
    assert found.ttt.mini_batch == 16


def test_labels_name_the_mixer_or_the_hybrid():
    assert pattern.describe(model("attention*2")) == "Transformer"
    assert pattern.describe(model("ttt_linear*5 + attention")) == "Hybrid 5 ttt_linear : 1 attention"
    text = "attention + attention(channel=none)*2"
    assert pattern.describe(model(text)) == "Hybrid 1 attention : 2 attention(channel=none)"


def test_operations_are_the_sum_over_blocks():
    of_blocks = {name: counts.flops_per_token(model(name, 1), 32) for name in ("ttt_linear", "attention")}
    head = 2 * 16 * model("attention").vocab_size
    hybrid = counts.flops_per_token(model("ttt_linear*5 + attention", 7), 32)
    assert hybrid == head + 6 * (of_blocks["ttt_linear"] - head) + (of_blocks["attention"] - head)
    inner = counts.inner_flops_per_token(model("ttt_linear*5 + attention", 7), 32)
    assert inner == counts.inner_flops_per_token(model("ttt_linear", 6), 32) > 0
    bare, double = (counts.flops_per_token(model("attention", 1, channel=c), 32) for c in ("none", "swiglu + swiglu"))
    assert (double - of_blocks["attention"], of_blocks["attention"] - bare) == (6 * 16 * 24, 6 * 16 * 24)


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        ("mamba9", "model.mixer='mamba9': expected one of "),
        ("attention + mamba9", "model.mixer='attention + mamba9': 'mamba9': expected one of "),
        ("", "model.mixer='': expected one of "),
        ("attention +", "model.mixer='attention +': ends with +; expected a pattern"),
        ("attention*0", "model.mixer='attention*0': attention*0: expected a count of 1 or more"),
        ("attention**2", "expected one of "),
        (
            "attention*4 + ttt_linear*4",
            "model.num_layers=6: fewer blocks than the 8 of model.mixer='attention*4",
        ),
        ("ttt_linear(mini_batch=0)", "ttt_linear: mini_batch=0: expected 1 or more"),
        ("ttt_linear(mini_batch=x)", "ttt_linear(mini_batch=x): expected an integer"),
        ("ttt_linear(mini=4)", "ttt_linear(mini=4): unknown key; expected one of backbone, mini_batch, "),
        ("ttt_linear(kernel=scan)", "ttt_linear(kernel=scan): unknown key; expected one of backbone, mini_batch, "),
        ("ttt(learner=a:b)", "expected the name of a function of this package; yours is set by model.ttt.learner"),
        ("ttt_linear(update=muon)", "model.ttt.update='muon': is fixed for model.mixer=ttt_linear"),
        ("attention(window=3)", "attention(window=3): unknown key; expected one of num_kv_heads, qk_norm, "),
        ("attention(channel=relu)", "model.channel='relu': expected none, or one or more of swiglu joined by +"),
        ("attention(norms=post)", "model.norms='post': expected one of pre, pre_post"),
        ("attention(pre_conv=3)", "attention(pre_conv=3): expected true or false"),
    ],
)
def test_bad_patterns_are_refused(mixer, message):
    with pytest.raises(ConfigError) as refusal:
        model(mixer)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
