"""Test how points are run: which points run again, how they end, and which processes end together."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from ttt_jax import config as config_lib
from ttt_jax.config import ConfigError
from ttt_jax.storage.lock_file import process_start
from ttt_jax.sweep import files, runner

QUICKSTART = str(Path(__file__).resolve().parents[2] / "configs" / "quickstart.py")
HANG = {f"seed={seed}": ["hang"] for seed in range(3)}


def is_alive(pid):
    return process_start(pid) is not None


def test_one_failure_does_not_end_the_sweep_and_is_tried_again(sweep, folder, capsys):
    grid = "--grid seed=0,1,2"
    assert sweep.run(grid, do={"seed=1": [3]}) == 1
    assert sweep.states() == ["done", "failed", "done"]
    out, err = capsys.readouterr()
    assert out == f"{folder}: 3 points: 2 done, 1 failed\n  seed=1: ttt train: status 3\n"
    assert "seed=1: failed, exit status 3: ttt train: status 3\n" in err
    failed = files.read_record(folder / "seed=1")
    assert (failed.status, failed.said, failed.starts, failed.steps) == (3, "ttt train: status 3", 1, 250)
    assert (folder / "seed=1" / "output.log").read_text() == "some output\nttt train: status 3\nwarnings of others\n"

    assert sweep.run(grid) == 0
    assert sweep.starts(3) == [1, 2, 1]
    assert sweep.states() == ["done"] * 3
    assert "3 points, 2 of them done already;" in capsys.readouterr().err
    assert not (folder / "running.json").exists()

    shutil.rmtree(folder / "seed=1")  # to begin again
    assert sweep.states() == ["done", "waiting", "done"]
    assert sweep.run(grid) == 0
    assert sweep.starts(3) == [1, 1, 1]


def test_the_command_of_a_point(sweep, folder):
    assert sweep.run("--config.log.every=5 --accept-changed-learner --zip model.width=64,32 model.num_heads=2,1") == 0
    assert [call["arguments"] for call in sweep.calls("num_heads=1,width=32")] == [
        f"train --config {QUICKSTART} --config.log.every=5 --config.model.width=32 --config.model.num_heads=1 "
        f"--workdir {folder}/num_heads=1,width=32 --accept-changed-learner".split()
    ]


@pytest.mark.slow
def test_points_are_added_and_a_longer_run_goes_on(sweep):
    for arguments, exit_status, expected in (
        ("--grid seed=0", 0, [1, 0, 0]),
        ("--grid seed=0,1", 0, [1, 1, 0]),
        ("--grid seed=0,1 --config.training.duration=350", 0, [2, 2, 0]),
        ("--grid seed=2 --config.training.duration=450", 2, [2, 2, 0]),
        ("--grid seed=2 --config.training.duration=350", 0, [2, 2, 1]),
    ):
        assert sweep.run(arguments) == exit_status
        assert sweep.starts(3) == expected


def test_runs_of_another_config_are_found_before_anything_starts(sweep, folder, capsys):
    assert sweep.run("--grid seed=0") == 0
    other = config_lib.from_arguments(["--config", QUICKSTART, "--config.seed=1", "--config.model.width=64"])
    (folder / "seed=1").mkdir()
    (folder / "seed=1" / "config.json").write_text(json.dumps(other.to_dict()))
    assert sweep.run("--grid seed=1,2") == 2
    said = f"ttt sweep: --workdir {folder}/seed=1: holds a run of another config (model.width 64 there, 128 here)"
    assert said in capsys.readouterr().err
    assert sweep.starts(3) == [1, 0, 0]


@pytest.mark.slow
def test_status_75_is_started_again_but_not_for_ever(sweep, capsys):
    assert sweep.run("--grid seed=0,1 --restarts 1 --jobs 2", do={"seed=0": [75, 0], "seed=1": [75, 75]}) == 1
    assert sweep.states() == ["done", "failed"]
    assert sweep.starts(2) == [2, 2]
    assert "seed=0: started (start 2); " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("number", "exit_status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_lets_points_save_and_the_same_command_goes_on(sweep, folder, number, exit_status):
    process = sweep.start("--grid seed=0,1,2 --jobs 2", HANG)
    sweep.wait_for(lambda: all((folder / f"seed={seed}/ready").exists() for seed in range(2)))
    assert sweep.states() == ["running", "running", "waiting"]
    os.killpg(process.pid, number)  # as a terminal does it
    out, _ = process.communicate(timeout=20)
    assert process.returncode == exit_status
    assert out == f"{folder}: 3 points: 2 stopped, 1 waiting\nto continue: the same command\n"
    for seed in range(2):
        assert (folder / f"seed={seed}/output.log").read_text() == f"stopped by {number.name}\n"
        assert not is_alive(sweep.calls(f"seed={seed}")[0]["pid"])
    assert sweep.starts(3) == [1, 1, 0]
    assert sweep.start("--grid seed=0,1,2", {**HANG, "seed=2": []}).wait(timeout=20) == 0
    assert sweep.starts(3) == [2, 2, 1]


@pytest.mark.slow
def test_a_second_signal_does_not_wait(sweep, folder):
    process = sweep.start_hanging(1, action="hang hard")
    process.send_signal(signal.SIGINT)
    sweep.wait_for(lambda: "stopped by SIGINT" in (folder / "seed=0/output.log").read_text())
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=5)
    assert process.returncode == 130
    assert err.endswith("ttt sweep: interrupted\n")
    sweep.wait_for(lambda: not is_alive(sweep.calls("seed=0")[0]["pid"]))
    assert sweep.states() == ["stopped"]


@pytest.mark.slow
def test_points_of_a_killed_sweep_save_and_the_next_sweep_waits_for_them(sweep, folder):
    first = sweep.start_hanging(1, STAND_IN_SAVES="6")
    first.kill()
    first.wait()
    saving = sweep.calls("seed=0")[0]["pid"]
    second = sweep.start("--grid seed=0", HANG)
    sweep.wait_for(lambda: sweep.starts(1) == [2] or not is_alive(saving))
    assert not is_alive(saving), "two processes at the same time"
    assert (folder / "seed=0/output.log").read_text() == "stopped by SIGTERM\n"  # once, or it would not have saved
    _, err = second.communicate(timeout=20)
    assert second.returncode == 0
    assert "seed=0: waits for the end of process " in err
    assert (sweep.states(), sweep.starts(1)) == (["done"], [2])


def test_a_killed_program_is_told_and_that_of_a_killed_supervisor_saves(sweep, folder):
    process = sweep.start_hanging(2, "--jobs 2")
    os.kill(sweep.calls("seed=0")[0]["pid"], signal.SIGKILL)
    supervised = int((folder / "seed=1/process.lock").read_text().split()[1])
    os.kill(supervised, signal.SIGKILL)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    assert out.count("killed by SIGKILL") == 2
    sweep.wait_for(lambda: not is_alive(sweep.calls("seed=1")[0]["pid"]))
    assert (folder / "seed=1/output.log").read_text() == "stopped by SIGTERM\n"


def test_launched_points_run_all_at_once_and_a_second_sweep_is_refused(sweep, folder, capsys):
    process = sweep.start_hanging(3, "-- launch slurm --gpus-per-node=8")
    before = (folder / "sweep.json").read_bytes()
    assert sweep.run("--grid seed=1") == 2
    said = f"ttt sweep: --workdir {folder}: ttt sweep (process {process.pid} on "
    assert capsys.readouterr().err.startswith(said)
    assert (folder / "sweep.json").read_bytes() == before
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130


def test_gpus_are_shared_out(sweep, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7,9")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert runner.gpu_shares(3) == [{}, {}, {}]
    monkeypatch.delenv("JAX_PLATFORMS")
    assert runner.gpu_shares(1) == [{}]
    with pytest.raises(ConfigError, match="--jobs 6: this machine has 5 GPUs; expected at most 5"):
        runner.gpu_shares(6)
    assert sweep.run("--grid seed=0,1 --jobs 2") == 0
    assert [sweep.calls(f"seed={seed}")[0]["gpus"] for seed in range(2)] == ["3,5", "6,7"]
