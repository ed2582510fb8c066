"""How points are run: what ends how, what is done again, and who dies with whom."""

import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from ttt_jax.config import ConfigError
from ttt_jax.storage import workdir_lock
from ttt_jax.sweep import files, runner, status

GRID = "--grid", "seed=0,1,2"


QUICKSTART = str(Path(__file__).resolve().parents[2] / "configs" / "quickstart.py")


def states(folder):
    return {each.point.name: each.state for each in status.of_sweep(folder)}


def alive(pid):
    """Whether a process runs; not where it has ended and nobody has asked how."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_one_failure_does_not_end_the_sweep_and_is_tried_again(sweep, calls, tmp_path, capsys):
    assert sweep(*GRID, do={"seed=1": [3]}) == 1
    folder = tmp_path / "sweep"
    assert states(folder) == {"seed=0": "done", "seed=1": "failed", "seed=2": "done"}
    out, err = capsys.readouterr()
    assert out == f"{folder}: 3 points: 2 done, 1 failed\n  seed=1: ttt train: status 3\n"
    assert "seed=1: failed, exit status 3: ttt train: status 3\n" in err
    failed = files.read_record(folder / "seed=1")
    assert (failed.status, failed.said, failed.starts, failed.steps) == (3, "ttt train: status 3", 1, 250)
    assert (folder / "seed=1" / "output.log").read_text() == "some output\nttt train: status 3\nwarnings of others\n"

    assert sweep(*GRID) == 0
    assert [len(calls(f"seed={seed}")) for seed in range(3)] == [1, 2, 1]
    assert states(folder) == dict.fromkeys(["seed=0", "seed=1", "seed=2"], "done")
    assert "3 points, 2 of them done already;" in capsys.readouterr().err
    assert not (folder / "running.json").exists()


def test_the_command_of_a_point(sweep, calls, tmp_path):
    assert sweep("--config.log.every=5 --zip model.width=64,32 model.num_heads=2,1") == 0
    assert calls("num_heads=1,width=32")[0]["arguments"] == [
        *("train", "--config", QUICKSTART, "--config.log.every=5"),
        *("--config.model.width=32", "--config.model.num_heads=1"),
        *("--workdir", str(tmp_path / "sweep" / "num_heads=1,width=32")),
    ]


@pytest.mark.slow
def test_points_are_added_and_a_longer_run_is_gone_on_with(sweep, calls):
    assert sweep("--grid seed=0") == 0
    assert sweep("--grid seed=0,1") == 0
    assert [len(calls(f"seed={seed}")) for seed in range(2)] == [1, 1]
    assert sweep("--grid seed=0,1 --config.training.duration=350") == 0
    assert [len(calls(f"seed={seed}")) for seed in range(2)] == [2, 2]
    assert sweep("--grid seed=2 --config.training.duration=450") == 2
    assert sweep("--grid seed=2 --config.training.duration=350") == 0
    assert [len(calls(f"seed={seed}")) for seed in range(3)] == [2, 2, 1]


@pytest.mark.slow
def test_status_75_is_started_again_but_not_for_ever(sweep, calls, tmp_path, capsys):
    assert sweep("--grid seed=0,1 --restarts 1 --jobs 2", do={"seed=0": [75, 0], "seed=1": [75, 75]}) == 1
    assert states(tmp_path / "sweep") == {"seed=0": "done", "seed=1": "failed"}
    assert [len(calls(f"seed={seed}")) for seed in range(2)] == [2, 2]
    assert "seed=0: started (start 2); " in capsys.readouterr().err


def test_a_program_that_is_killed_says_so(start_sweep, wait_for, calls, tmp_path):
    process = start_sweep("--grid", "seed=0", do={"seed=0": ["hang"]})
    wait_for((tmp_path / "sweep/seed=0/ready").exists)
    os.kill(calls("seed=0")[0]["pid"], signal.SIGKILL)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "seed=0: killed by SIGKILL" in out


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel does this on Linux")
def test_who_supervises_can_be_killed_too(start_sweep, wait_for, calls, tmp_path):
    process = start_sweep("--grid", "seed=0", do={"seed=0": ["hang"]})
    wait_for((tmp_path / "sweep/seed=0/ready").exists)
    pid = calls("seed=0")[0]["pid"]
    supervisor = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    assert supervisor != process.pid
    os.kill(supervisor, signal.SIGKILL)
    wait_for(lambda: not alive(pid))
    assert (tmp_path / "sweep/seed=0/output.log").read_text() == "stopped by SIGTERM\n"
    assert process.wait(timeout=20) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("number", "ends"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_lets_points_save_and_the_same_command_goes_on(start_sweep, wait_for, calls, tmp_path, number, ends):
    folder = tmp_path / "sweep"
    do = {"seed=0": ["hang"], "seed=1": ["hang"]}
    process = start_sweep(*GRID, "--jobs", "2", do=do)
    wait_for(lambda: (folder / "seed=0/ready").exists() and (folder / "seed=1/ready").exists())
    assert states(folder) == {"seed=0": "running", "seed=1": "running", "seed=2": "waiting"}
    os.killpg(process.pid, number)  # as a terminal does it
    out, _ = process.communicate(timeout=20)
    assert process.returncode == ends
    assert out == f"{folder}: 3 points: 2 stopped, 1 waiting\nto go on: the same command\n"
    for seed in range(2):
        assert (folder / f"seed={seed}/output.log").read_text() == f"stopped by {signal.Signals(number).name}\n"
        assert not alive(calls(f"seed={seed}")[0]["pid"])
    assert not calls("seed=2")
    process = start_sweep(*GRID, do=do)
    assert process.wait(timeout=20) == 0
    assert [len(calls(f"seed={seed}")) for seed in range(3)] == [2, 2, 1]


def test_a_second_signal_does_not_wait(start_sweep, wait_for, calls, tmp_path):
    process = start_sweep("--grid", "seed=0", do={"seed=0": ["hang hard"]})
    log = tmp_path / "sweep/seed=0/output.log"
    wait_for((tmp_path / "sweep/seed=0/ready").exists)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: "stopped by SIGINT" in log.read_text())
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=5)
    assert process.returncode == 130
    assert err.endswith("ttt sweep: interrupted\n")
    wait_for(lambda: not alive(calls("seed=0")[0]["pid"]))
    assert states(tmp_path / "sweep") == {"seed=0": "stopped"}


@pytest.mark.slow
def test_a_killed_sweep_leaves_nobody_and_the_next_waits_for_who_still_saves(start_sweep, wait_for, calls, tmp_path):
    folder = tmp_path / "sweep"
    slow = {"STAND_IN_SAVES": "6"}
    first = start_sweep("--grid", "seed=0", do={"seed=0": ["hang"]}, environment=slow)
    wait_for((folder / "seed=0/ready").exists)
    first.kill()
    first.wait()
    saving = calls("seed=0")[0]["pid"]
    second = start_sweep("--grid", "seed=0", do={"seed=0": ["hang"]})
    wait_for(lambda: len(calls("seed=0")) == 2 or not alive(saving))
    assert not alive(saving), "two processes at the same time"
    assert (folder / "seed=0/output.log").read_text() == "stopped by SIGTERM\n"  # once, or it would not have saved
    _, err = second.communicate(timeout=20)
    assert second.returncode == 0
    assert "seed=0: waits for the end of process " in err
    assert states(folder) == {"seed=0": "done"}
    assert len(calls("seed=0")) == 2


@pytest.mark.slow
def test_of_two_sweeps_in_a_folder_the_second_is_refused(start_sweep, sweep, wait_for, tmp_path, capsys):
    folder = tmp_path / "sweep"
    process = start_sweep("--grid", "seed=0", do={"seed=0": ["hang"]})
    wait_for((folder / "seed=0/ready").exists)
    before = (folder / "sweep.json").read_bytes()
    assert sweep("--grid seed=1") == 2
    said = f"ttt sweep: --workdir {folder}: ttt sweep (process {process.pid} on "
    assert capsys.readouterr().err.startswith(said)
    assert (folder / "sweep.json").read_bytes() == before


@pytest.mark.slow
def test_another_machine_is_known_by_its_signs_of_life(sweep, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(workdir_lock, "_EVERY", 0.3)
    folder = tmp_path / "sweep"
    folder.mkdir()
    lives = threading.Event()

    def sign():
        text = json.dumps({"host": "elsewhere", "pid": 7, "time": time.time(), "every": 0.3})
        (folder / "running.tmp").write_text(text)
        (folder / "running.tmp").replace(folder / "running.json")

    def other():
        while not lives.wait(0.1):
            sign()

    thread = threading.Thread(target=other)
    sign()
    thread.start()
    assert sweep("--grid seed=0") == 2
    assert "another command (process 7 on elsewhere) is at work there; expected its end" in capsys.readouterr().err
    lives.set()
    thread.join()
    sign()
    began = time.monotonic()
    assert sweep("--grid seed=0") == 0  # after it has been silent for a while
    assert time.monotonic() - began > 0.8


def test_a_launcher_is_given_each_point(sweep, calls, tmp_path):
    assert sweep("--grid seed=0,1 -- launch slurm --gpus-per-node 8 --nodes=2") == 0
    for seed in range(2):
        workdir = str(tmp_path / "sweep" / f"seed={seed}")
        assert [call["arguments"] for call in calls(f"seed={seed}")] == [
            [
                *("launch", "slurm", "--gpus-per-node", "8", "--nodes=2", "--"),
                *("train", "--config", QUICKSTART, f"--config.seed={seed}", "--workdir", workdir),
            ]
        ]


def test_launched_points_go_all_at_once(start_sweep, wait_for, tmp_path):
    do = {f"seed={seed}": ["hang"] for seed in range(3)}
    process = start_sweep(*GRID, "--", "launch", "slurm", "--gpus-per-node=8", do=do)
    wait_for(lambda: all((tmp_path / "sweep" / point / "ready").exists() for point in do))
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130


@pytest.mark.slow
def test_a_folder_can_be_removed_to_begin_again(sweep, calls, tmp_path):
    assert sweep(*GRID) == 0
    shutil.rmtree(tmp_path / "sweep" / "seed=1")
    assert states(tmp_path / "sweep")["seed=1"] == "waiting"
    assert sweep(*GRID) == 0
    assert [len(calls(f"seed={seed}")) for seed in range(3)] == [1, 1, 1]


def test_gpus_are_shared_out(sweep, calls, monkeypatch, capsys):
    assert runner.gpu_shares(2, {"CUDA_VISIBLE_DEVICES": "3,5,6,7,9"}) == [
        {"CUDA_VISIBLE_DEVICES": "3,5"},
        {"CUDA_VISIBLE_DEVICES": "6,7"},
    ]
    assert runner.gpu_shares(3, {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "0"}) == [{}, {}, {}]
    assert runner.gpu_shares(1, {"CUDA_VISIBLE_DEVICES": "0,1"}) == [{}]
    with pytest.raises(ConfigError, match="--jobs 3: this machine has 2 GPUs; expected at most 2"):
        runner.gpu_shares(3, {"CUDA_VISIBLE_DEVICES": "0,1"})
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert sweep("--grid seed=0,1 --jobs 2") == 0
    assert [calls(f"seed={seed}")[0]["gpus"] for seed in range(2)] == ["0", "1"]
