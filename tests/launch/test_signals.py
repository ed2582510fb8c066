"""Real signals to real processes of ``ttt launch tpu``."""

import signal
import subprocess
import sys
import time

import pytest
from clouds import JOB, TRAIN

pytestmark = pytest.mark.slow


@pytest.fixture
def started(cloud):
    """``started(*options)``: a process that runs, and its command on the host too."""
    processes = []

    def start(*options) -> subprocess.Popen:
        command = [sys.executable, "-m", "ttt_jax", "launch", "tpu", "--accelerator", "v5litepod-8", "--zone", "z"]
        command += ["--poll", "0.1", *options, "--", *TRAIN]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def until(something, what: str) -> None:
    deadline = time.monotonic() + 60
    while not something():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def log_of(cloud) -> str:
    return "".join(path.read_text() for path in cloud.folder.glob("machines/1/*/0/ttt-launch/*/runs/*/log"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_an_interrupt_saves_and_deletes(cloud, started, number, status):
    cloud.write(runs=["wait"])
    process = started()
    until(lambda: "start 0" in log_of(cloud), "the command does not start")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert log_of(cloud).endswith("saved\n")
    assert cloud.verbs() == ["create", "scp", "install", "start", "stop", "delete"]
    assert cloud.resource is None
    assert "stops the command, which saves, and deletes the machines" in err
    assert "Traceback" not in err


def test_an_interrupt_in_the_queue(cloud, started):
    cloud.write(lives=[["WAITING_FOR_RESOURCES"]])
    process = started()
    until(lambda: cloud.resource, "nothing is asked for")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert cloud.verbs() == ["create", "delete"]


def test_a_second_interrupt_leaves_at_once_and_says_what_is_left(cloud, started):
    cloud.write(runs=["hang"])
    process = started()
    until(lambda: "start 0" in log_of(cloud), "the command does not start")
    process.send_signal(signal.SIGINT)
    until(lambda: "stop" in cloud.verbs(), "nothing is stopped")
    time.sleep(0.3)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 7
    assert process.returncode == 130
    assert f"{JOB}: may still exist, and cost; to delete it:\n" in err
    assert err.splitlines()[-1].strip() == f"gcloud compute tpus queued-resources delete {JOB} --zone=z --force --quiet"
    assert cloud.resource is not None
    assert "delete" not in cloud.verbs()


def test_killed_and_followed_again(cloud, started):
    """A laptop that is closed does not end the training, and the same command finds it again."""
    cloud.write(seconds=5)
    process = started()
    until(lambda: "start 0" in log_of(cloud), "the command does not start")
    process.kill()
    process.communicate()
    out, err = started().communicate(timeout=60)
    assert "runs already; here is its log" in err
    assert out == "start 0 on host 0 in source-\nline of host 0: leaves with 0\n"
    assert cloud.verbs() == ["create", "scp", "install", "start", "delete"]
