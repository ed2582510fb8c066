"""A second Ctrl-C ends a command whatever hangs in it."""

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

def hang():  # as a compiler does, which does not come back to Python
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
    """``start(run)``: a process that runs a line of Python."""
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
def test_a_second_ctrl_c_ends_what_does_not_come_back_to_python(start):
    process = start("hang()")
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    assert process.poll() is None  # the first one may wait
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert 0.9 < time.monotonic() - began < 3
    assert process.returncode == 130
    assert err == "\nttt train: interrupted; all is well\n"


@pytest.mark.slow
def test_a_second_ctrl_c_counts_where_a_script_had_it_ignored(start):
    process = start("with StopSignals(): hang()", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130


def test_threads_that_an_exit_waits_for_do_not_keep_it(start):
    process = start("ThreadPoolExecutor(1).submit(hang).result()")
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130


def test_what_ends_by_itself_after_a_second_one_is_let_end(start):
    process = start("signal.signal(2, lambda *which: None); time.sleep(0.4); sys.exit(7)")
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    assert process.wait(timeout=10) == 7


def test_without_a_signal_all_is_as_before():
    before = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(before)
    with SecondCtrlC(str):
        pass
    assert signal.set_wakeup_fd(before) == before
