"""Test that a second Ctrl-C ends a command, whatever hangs in it."""

import signal
import subprocess
import sys
import time

import pytest

from ttt_jax.terminal.stopping import SecondCtrlC

PROGRAM = """
import hashlib, signal, sys, time
from concurrent.futures import ThreadPoolExecutor
from ttt_jax.terminal.stopping import SecondCtrlC, StopSignals

def hang():  # as a compiler that does not return to Python
    hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 29)

with SecondCtrlC(lambda: "ttt train: interrupted; all is well"):
    print("ready", flush=True)
    try:
        {run}
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.fixture
def start():
    """Return ``start(run)``, which starts a process that runs a line of Python."""
    started = []

    def start_one(run, **options):
        pipe = subprocess.PIPE
        line = [sys.executable, "-c", PROGRAM.format(run=run)]
        started.append(subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, **options))
        assert started[-1].stdout.readline() == "ready\n"
        time.sleep(0.1)
        return started[-1]

    yield start_one
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_second_ctrl_c_ends_code_that_does_not_return_to_python(start):
    process = start("hang()")
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    assert process.poll() is None  # the first one is not handled yet
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert 0.9 < time.monotonic() - began < 3
    assert process.returncode == 130
    assert err == "\nttt train: interrupted; all is well\n"


@pytest.mark.slow
def test_a_second_ctrl_c_counts_in_a_command_that_ignores_the_first(start):
    process = start("with StopSignals(): hang()", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130


def test_a_second_ctrl_c_does_not_wait_for_threads(start):
    process = start("ThreadPoolExecutor(1).submit(hang).result()")
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130


def test_a_command_that_ends_by_itself_keeps_its_status(start):
    process = start("signal.signal(2, lambda *which: None); time.sleep(0.4); sys.exit(7)")
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    assert process.wait(timeout=10) == 7


def test_the_wakeup_descriptor_is_restored():
    before = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(before)
    with SecondCtrlC(str):
        pass
    assert signal.set_wakeup_fd(before) == before
