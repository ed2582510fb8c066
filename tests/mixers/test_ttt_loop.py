"""Check the inner loop that a config describes."""

import pytest

from ttt_jax import config as config_lib
from ttt_jax.mixers import ttt_loop
from ttt_jax.ttt.inner_loop import ttt_linear, ttt_mlp


def config(**ttt):
    c = config_lib.default()
    c.model.mixer = ttt.pop("mixer", "ttt")
    for key, value in ttt.items():
        c.model.ttt[key] = value
    config_lib.validate(c)
    return c


@pytest.mark.parametrize(
    ("mixer", "loop", "base_lr", "first"),
    [("ttt_linear", ttt_linear(64), 1.0, 1.0), ("ttt_mlp", ttt_mlp(64), 0.1, 0.1)],
)
def test_ttt_linear_and_ttt_mlp_are_choices_of_ttt(mixer, loop, base_lr, first):
    """Compare inner loop, rate and warm-up with those of model.mixer=ttt with their learner."""
    for c in (config(mixer=mixer), config(learner=mixer.removeprefix("ttt_"))):
        assert ttt_loop.loop(c.model) == loop
        assert ttt_loop.base_lr(c.model) == base_lr
        assert ttt_loop.base_lr_start(c.model) == pytest.approx(first * base_lr)


def test_the_softplus_rate_has_the_base_rate_of_lact():
    assert ttt_loop.base_lr(config(rate="softplus", learner="mlp").model) == 0.001
    assert ttt_loop.base_lr(config(rate="softplus", base_lr=0.5).model) == 0.5


def test_an_mlp_of_one_layer_is_linear():
    assert ttt_loop.loop(config(mixer="ttt_mlp", mlp_depth=1).model) == ttt_linear(64)
