"""Real runs, really killed: what comes out is what an undisturbed run gives, bit for bit."""

import signal
import time

import jax
import numpy as np
import pytest

from ttt_jax.training import metrics

pytestmark = pytest.mark.slow

# Large enough that a save takes a while, so that it can be hit.
BIG_STATE = {"model.vocab_size": 40000}


def _curves(workdir):
    """All that was recorded but the times."""
    names = ("step", "loss", "grad_norm", "learning_rate", "inner_lr_scale", "tokens")
    return [[record[name] for name in names] for record in metrics.read(workdir)]


def _wait_for(process, condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run never got there"
        time.sleep(0.0005)


def _finish(process):
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, start_training):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    _finish(start_training(workdir, BIG_STATE))
    return workdir


def _half_written(workdir):
    """Whether a checkpoint is being written at this moment."""
    folder = workdir / "checkpoints"
    return folder.exists() and any("tmp" in path.name for path in folder.iterdir())


def test_killed_runs_end_with_the_bits_of_an_undisturbed_one(tmp_path, start_training, undisturbed, final_state):
    workdir = tmp_path / "run"
    lines = workdir / "metrics.jsonl"

    def recorded(steps):
        return lambda: lines.exists() and lines.read_text().count("\n") >= steps

    # Before the first checkpoint; while one is written; between two.
    kills = [
        recorded(2),
        lambda: (workdir / "checkpoints" / "6").exists() and _half_written(workdir),
        recorded(21),
    ]
    half_written = []
    for moment in kills:
        process = start_training(workdir, BIG_STATE)
        _wait_for(process, moment)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        half_written.append(_half_written(workdir))
    assert half_written[1], "the second kill was meant to hit a save"
    _finish(start_training(workdir, BIG_STATE))

    step, state = final_state(workdir)
    expected_step, expected = final_state(undisturbed)
    assert step == expected_step == 24
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert _curves(workdir) == _curves(undisturbed)
    assert [record["step"] for record in metrics.read(workdir)] == list(range(1, 25))
    assert not _half_written(workdir)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, start_training, undisturbed, final_state):
    workdir = tmp_path / "run"
    process = start_training(workdir, BIG_STATE)
    _wait_for(process, lambda: (workdir / "metrics.jsonl").exists() and metrics.read(workdir))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    stopped, _ = final_state(workdir)
    assert 1 <= stopped < 24
    assert f"saved at step {stopped} of 24" in out
    assert "python -m ttt_jax train --config" in out
    assert f"--workdir {workdir}" in out
    assert "Traceback" not in err

    _finish(start_training(workdir, BIG_STATE))
    jax.tree.map(np.testing.assert_array_equal, final_state(workdir)[1], final_state(undisturbed)[1])


def test_finished_run_is_left_alone(start_training, undisturbed):
    before = (undisturbed / "metrics.jsonl").read_bytes()
    assert "all 24 steps are done already" in _finish(start_training(undisturbed, BIG_STATE))
    assert (undisturbed / "metrics.jsonl").read_bytes() == before
