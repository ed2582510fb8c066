"""Test sweeps on Ray Tune: a real local Ray, with stand-ins for ``ttt train``."""

import pytest

from ttt_jax.sweep import files, status

POINTS = "--grid seed=0,1,2 --config.training.duration=40"


@pytest.mark.slow
def test_bad_points_are_stopped_early_and_saved(folder, sweep):
    def run(arguments=""):
        process = sweep.start(f"{POINTS} {arguments}", do={f"seed={seed}": ["steps", "steps"] for seed in range(3)})
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        return out, err

    def lines(seed, name):
        return (folder / f"seed={seed}" / name).read_text().splitlines()

    asha = "--engine ray --jobs 1 --asha loss --grace 10 --reduction 2"
    out, err = run(asha)
    assert out == f"{folder}: 3 points: 1 done, 2 stopped early\n"
    assert "seed=1: to be stopped early, loss 5.9 at step 10\n" in err
    assert "Traceback" not in err
    assert lines(0, "output.log") == ["continuing at 0"]
    for seed in (1, 2):
        assert lines(seed, "output.log") == ["continuing at 0", "stopped by SIGTERM"]
        assert 10 <= len(lines(seed, "metrics.jsonl")) < 40
        assert files.read_record(folder / f"seed={seed}").state == "stopped early"

    before = {path: path.read_bytes() for path in folder.glob("*/*")}
    assert run(asha)[0] == out
    assert before == {path: path.read_bytes() for path in folder.glob("*/*")}

    saved = len(lines(1, "metrics.jsonl"))
    assert run()[0] == f"{folder}: 3 points: 3 done\n"  # elsewhere, and without comparisons: what was stopped continues
    assert lines(0, "output.log") == ["continuing at 0"]
    assert lines(1, "output.log")[-1] == f"continuing at {saved}"
    assert {each.state for each in status.of_sweep(folder)} == {"done"}
