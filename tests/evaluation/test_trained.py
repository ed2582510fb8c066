"""Check which checkpoints are read of a run that is still being trained."""

import pytest

from ttt_jax.config import ConfigError
from ttt_jax.errors import CheckpointError
from ttt_jax.evaluation import trained


@pytest.fixture
def reading(monkeypatch):
    """Return ``reading(there, later)``, which sets the checkpoints at first, and when the first one is restored."""

    def begin(there, later):
        known = list(there)

        def steps(workdir, wanted):
            if wanted in ("newest", "all"):
                return known[-1:] if wanted == "newest" else list(known)
            return [int(wanted)]

        def load(workdir, step, fsdp, tensor):
            known[:] = later
            if step not in known:
                raise CheckpointError(f"{step} cannot be restored")
            return step

        monkeypatch.setattr(trained, "steps", steps)
        monkeypatch.setattr(trained, "_all_steps", lambda workdir: known)
        monkeypatch.setattr(trained, "_load", load)

    return begin


@pytest.mark.parametrize(
    ("there", "later", "wanted", "found", "removed"),
    [
        ([3, 6], [6, 9], "newest", [6], []),
        ([3, 6], [9], "newest", [9], []),
        ([3, 6], [6, 9], "all", [6], [3]),
        ([3, 6], [9, 12], "all", [9, 12], [3, 6]),
    ],
)
def test_checkpoints_that_a_training_removes(reading, capsys, there, later, wanted, found, removed):
    reading(there, later)
    assert list(trained.loaded("a", wanted)) == found
    said = [f"a: the checkpoint of step {step} was removed; left out" for step in removed]
    assert capsys.readouterr().err.splitlines() == said


def test_a_missing_step_that_was_asked_for_is_an_error(reading):
    reading([3, 6], [9])
    with pytest.raises(CheckpointError, match=r"^3 cannot be restored$"):
        trained.load("a", 3)
    assert trained.load("a") == 9


def test_damaged_checkpoints_are_not_taken_for_removed_ones(reading, monkeypatch):
    reading([3, 6], [3, 6])
    for error in (CheckpointError("damaged"), ConfigError("of another shape")):
        monkeypatch.setattr(trained, "_load", lambda *arguments, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(type(error), match=f"^{error}$"):
            list(trained.loaded("a", "newest"))
