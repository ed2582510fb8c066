"""Test that runs that are killed and started again give the bits of an undisturbed run."""

import signal
import time

import jax
import numpy as np
import pytest

from ttt_jax.training import loop, metrics

pytestmark = pytest.mark.slow

# Large enough for a save to take so long that a kill can hit it.
BIG_STATE = {"model.vocab_size": 40000}


def _curves(workdir):
    """Return the recorded values, without times."""
    names = ("step", "loss", "grad_norm", "learning_rate", "inner_lr_warmup", "tokens")
    return [[record[name] for name in names] for record in metrics.read(workdir)]


def _wait_for(process, condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.0005)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_config):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    loop.train(tiny_config(BIG_STATE), workdir)
    return workdir


def _half_written(workdir):
    """Return whether a checkpoint is being written now."""
    folder = workdir / "checkpoints"
    return folder.exists() and any("tmp" in path.name for path in folder.iterdir())


def test_a_killed_run_ends_with_the_bits_of_an_undisturbed_one(
    tmp_path, start_training, tiny_config, undisturbed, final_state
):
    workdir = tmp_path / "run"
    lines = workdir / "metrics.jsonl"

    def recorded(steps):
        return lambda: lines.exists() and lines.read_text().count("\n") >= steps

    def stop(moment, number):
        process = start_training(workdir, BIG_STATE)
        _wait_for(process, moment)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        return out, err, process.returncode

    # Killed before the first checkpoint, and while one is written.
    *_, status = stop(recorded(2), signal.SIGKILL)
    assert status == -signal.SIGKILL
    *_, status = stop(lambda: (workdir / "checkpoints" / "6").exists() and _half_written(workdir), signal.SIGKILL)
    assert status == -signal.SIGKILL
    assert _half_written(workdir), "the second kill did not hit a save"

    # Ctrl-C saves, and prints the command that continues the run.
    before = lines.read_text().count("\n")
    out, err, status = stop(recorded(before + 1), signal.SIGINT)
    assert status == 130, err
    stopped, _ = final_state(workdir)
    assert before < stopped < 24
    assert f"saved at step {stopped} of 24" in out
    assert "python -m ttt_jax train --config" in out
    assert f"--workdir {workdir}" in out
    assert "Traceback" not in err

    # Killed between two checkpoints.
    *_, status = stop(recorded(21), signal.SIGKILL)
    assert status == -signal.SIGKILL
    loop.train(tiny_config(BIG_STATE), workdir)

    step, state = final_state(workdir)
    expected_step, expected = final_state(undisturbed)
    assert step == expected_step == 24
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert _curves(workdir) == _curves(undisturbed)
    assert [record["step"] for record in metrics.read(workdir)] == list(range(1, 25))
    assert not _half_written(workdir)


def test_a_finished_run_is_not_changed(start_training, undisturbed):
    before = (undisturbed / "metrics.jsonl").read_bytes()
    process = start_training(undisturbed, BIG_STATE)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "all 24 steps are done already" in out
    assert (undisturbed / "metrics.jsonl").read_bytes() == before
