"""The recipes of synthetic tasks: that small models learn them, in a shortened run."""

import pytest
from recipes import get

from ttt_jax.config import ConfigError
from ttt_jax.evaluation import trained
from ttt_jax.evaluation.probes import task_probe
from ttt_jax.training import loop


@pytest.mark.parametrize("argument", ["sorting", "associative_recall,lstm", "ttt_linear", "associative_recall:4"])
def test_what_there_is_not(argument):
    with pytest.raises(ConfigError) as error:
        get(f"tasks.py:{argument}")
    mixers = "ttt_linear, ttt_mlp, attention"
    said = f"expected associative_recall or selective_copying, then nothing or ,MIXER, one of {mixers}"
    assert str(error.value) == f"tasks.py:{argument}: {said}"


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["ttt_linear", "attention"])
def test_recall_is_learned(mixer, tmp_path):
    """On half of the length: pairs are recalled from sequences that were never seen. Guessing is right once in 15."""
    short = ("--config.data.sequence_length=32", f"--config.training.duration={200 if mixer == 'ttt_linear' else 100}")
    config = get(f"tasks.py:associative_recall,{mixer}", *short)
    loop.train(config, tmp_path)
    (cell,) = task_probe.probe(trained.load(tmp_path), items=[4], contexts=[32], samples=200)
    assert cell["accuracy"] > 0.9
    assert cell["whole"] > 0.7
