"""Check that small models learn the recipes of synthetic tasks, in a shortened run."""

import pytest
from recipes import get

from ttt_jax.config import ConfigError
from ttt_jax.evaluation import trained
from ttt_jax.evaluation.probes import task_probe
from ttt_jax.training import loop


@pytest.mark.parametrize("argument", ["sorting", "associative_recall,lstm", "ttt_linear", "associative_recall:4"])
def test_unknown_tasks_are_refused(argument):
    with pytest.raises(ConfigError) as error:
        get(f"tasks.py:{argument}")
    mixers = "ttt_linear, ttt_mlp, attention"
    said = f"expected associative_recall or selective_copying, then nothing or ,MIXER, one of {mixers}"
    assert str(error.value) == f"tasks.py:{argument}: {said}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mixer", "pairs", "length", "width", "steps"), [("ttt_linear", 2, 16, 32, 180), ("attention", 4, 32, 64, 100)]
)
def test_recall_is_learned(mixer, pairs, length, width, steps, tmp_path):
    """Check recall of pairs in unseen sequences, shorter than the recipe's, against guessing among the values."""
    short = {
        "data.source": f"associative_recall:{pairs}",
        "data.sequence_length": length,
        "model.vocab_size": 8 * pairs,
        "model.width": width,
        "model.mlp_width": 2 * width,
    }
    overrides = [f"--config.{key}={value}" for key, value in {**short, "training.duration": f"{steps} steps"}.items()]
    loop.train(get(f"tasks.py:associative_recall,{mixer}", *overrides), tmp_path)
    (cell,) = task_probe.probe(trained.load(tmp_path), items=[pairs], contexts=[length], samples=300)
    assert cell["accuracy"] > 0.85
    assert cell["whole"] > 0.7
    assert cell["loss"] < 0.5
