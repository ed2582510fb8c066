"""Check durations in steps, in tokens and in percent of the run."""

import pytest
from parsing import error_of

from ttt_jax import config as config_lib


@pytest.fixture
def config():
    """Return a config of 2000 steps of 10 x 100 tokens."""
    config = config_lib.default()
    config.data.update(batch_size=10, sequence_length=100)
    config.training.duration = "2000 steps"
    return config


DURATIONS = {
    "300": 300,
    "300 steps": 300,
    "1 step": 1,
    "  7  ": 7,
    "2.5e3": 2500,
    "1e+2 steps": 100,
    "1.5k": 1500,
    "2k steps": 2000,
    "3M": 3_000_000,
    "1B": 1_000_000_000,
    "1000 tokens": 1,
    "5000 tokens": 5,
    "2.5e6 tokens": 2500,
    "2.5M tokens": 2500,
    "1 B tokens": 1_000_000,
    "1499 tokens": 1,
    "1501 tokens": 2,
    "1 token": 1,  # never less than one step
    "0.2": 1,
    "10%": 200,
    "10 %": 200,
    "0.5%": 10,
    "0.001%": 1,
    "100%": 2000,
}


@pytest.mark.parametrize("text", DURATIONS)
def test_durations_in_steps(config, text):
    config.checkpoint.every = text
    assert config_lib.steps(config, "checkpoint.every") == DURATIONS[text]
    if "%" not in text:
        config.training.duration = text
        assert config_lib.steps(config, "training.duration") == DURATIONS[text]


def test_percentages_are_of_the_run_in_any_unit(config):
    config.training.duration, config.checkpoint.every = "500k tokens", "10%"
    assert config_lib.steps(config, "training.duration") == 500
    assert config_lib.steps(config, "checkpoint.every") == 50


def test_only_durations_with_an_empty_default_may_be_empty(config):
    assert config_lib.steps(config, "checkpoint.milestone_every") == 0
    config.checkpoint.every = ""
    assert "checkpoint.every=''" in error_of(config_lib.steps, config, "checkpoint.every")


@pytest.mark.parametrize(
    "text", ["0", "-5", "5 epochs", "ten", "10%%", "100.1%", "1e400", "nan", "inf", "1.2.3", "1,000", "1K", "0 tokens"]
)
def test_bad_durations_are_refused(config, text):
    for key in ("checkpoint.every", "training.duration"):
        with config.unlocked():
            config_lib.set_value(config, key, text)
        assert error_of(config_lib.steps, config, key).startswith(f"{key}={text!r}: expected a duration")
