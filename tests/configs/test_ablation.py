"""Check ``configs/ablation.py``: one step per rung, equal numbers on the first two, and TTT-Linear at the end."""

from itertools import pairwise

import numpy as np
import pytest
from recipes import ABLATION, get

from ttt_jax import config as config_lib
from ttt_jax.config import ConfigError
from ttt_jax.training import loop, metrics

RUNGS = {  # what each changes, and to what
    "equivalence": {"model.mixer": "ttt_linear"},
    "learned_w0": {"model.ttt.learned_w0": True},
    "norm_residual": {"model.ttt.output": "residual_norm", "model.ttt.bias": True},
    "mini_batch": {"model.ttt.mini_batch": 16},
    "learned_eta": {"model.ttt.learned_eta": True},
    "mamba_backbone": {"model.ttt.backbone": "mamba"},
}


@pytest.mark.parametrize("variant", ["", ":smoke"])
def test_each_rung_differs_from_the_previous_by_one_step(variant):
    assert ABLATION["RUNGS"] == ("linear_attention", *RUNGS)
    for lower, upper in pairwise(ABLATION["RUNGS"]):
        a, b = (get(f"ablation.py:{rung}{variant}").to_dict() for rung in (lower, upper))
        differing = config_lib.differing_keys(a, b)
        assert {key: after for key, (_, after) in differing.items()} == RUNGS[upper]


def test_the_last_rung_is_the_papers_ttt_linear():
    assert get("ablation.py:mamba_backbone") == get("paper.py:ttt_linear-125m-pile-2k")
    assert get("ablation.py:mamba_backbone:smoke") == get("paper.py:ttt_linear-125m-pile-2k:smoke")


def test_rungs_before_mini_batches_have_one_for_the_whole_sequence():
    assert get("ablation.py:norm_residual").model.ttt.mini_batch == 2048
    assert get("ablation.py:norm_residual:smoke").model.ttt.mini_batch == 64


@pytest.mark.parametrize("argument", ["mini-batch", "mini_batch:tiny", ""])
def test_unknown_rungs_are_refused(argument):
    with pytest.raises(ConfigError, match=r"^ablation.py:.*expected one of linear_attention, equivalence, "):
        get(f"ablation.py:{argument}")


@pytest.mark.slow
def test_all_rungs_learn_and_only_the_first_two_are_equal(tmp_path):
    """Check that the first two rungs are the same run up to rounding, and that all others differ."""
    losses = {}
    for rung in ABLATION["RUNGS"]:
        loop.train(get(f"ablation.py:{rung}:smoke"), tmp_path / rung)
        losses[rung] = np.array([record["loss"] for record in metrics.read(tmp_path / rung)])
        assert losses[rung][-1] < losses[rung][0] - 0.5, rung
    first, second = losses["linear_attention"], losses["equivalence"]
    np.testing.assert_allclose(second[:6], first[:6], rtol=1e-6)  # then Adam makes more of what rounding left
    for lower, upper in pairwise(list(RUNGS)):
        assert np.abs(losses[upper] - losses[lower]).max() > 1e-4, upper
