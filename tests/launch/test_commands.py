"""Commands of others: run, repeated, printed."""

import shlex
import subprocess
import sys
import time

import pytest

from ttt_jax.config import ConfigError
from ttt_jax.launch import commands as commands_lib
from ttt_jax.launch.commands import CommandError, Commands, Retry

NASTY = ["a b", "c'd\"e", "$(exit 3)", ";", "\n", "ü", "", "*"]
ARGV = [sys.executable, "-c", "import sys, json; print(json.dumps(sys.argv[1:]))"]


@pytest.fixture
def flaky(tmp_path):
    """``flaky(n, text)``: a command that says ``text`` and fails n times, and then succeeds."""

    def make(times, text):
        program = f"n=$(cat {tmp_path}/n 2>/dev/null || echo 0); echo $((n + 1)) > {tmp_path}/n; "
        program += f'if [ "$n" -lt {times} ]; then echo {shlex.quote(text)} >&2; exit 4; fi; echo done'
        return ["sh", "-c", program]

    return make


def test_a_fault_that_passes(flaky, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    assert Commands().run(flaky(3, "ERROR: 503"), retry=Retry("503", attempts=4)) == "done\n"
    assert waits == [5, 10, 20]
    (tmp_path / "n").unlink()
    with pytest.raises(CommandError, match="exit status 4: ERROR: 503") as caught:
        Commands().run(flaky(9, "some\nERROR: 503\nmore"), retry=Retry("503", attempts=4))
    assert (tmp_path / "n").read_text() == "4\n"
    assert caught.value.printed == "some\nERROR: 503\nmore\n"


@pytest.mark.parametrize("retry", [commands_lib.NEVER, Retry("404"), Retry("503", but_not="limit")])
def test_a_fault_that_does_not(flaky, tmp_path, retry):
    with pytest.raises(CommandError):
        Commands().output(flaky(9, "503 limit"), retry=retry)
    assert (tmp_path / "n").read_text() == "1\n"


def test_no_shell_reads_the_arguments(capfd):
    import json

    assert json.loads(Commands().run([*ARGV, *NASTY])) == NASTY
    assert Commands().run(["cat"], input="ü $(x)\n") == "ü $(x)\n"
    dry = Commands(dry_run=True)
    assert dry.run([*ARGV, *NASTY]) == ""
    assert dry.run(["cat"], input="$HOME") == ""
    dry.output(["nothing", "that exists"])
    with dry.follow(["true"]) as process:
        assert process is None
    printed = capfd.readouterr().out
    by_hand = subprocess.run(["bash", "-e"], input=printed, capture_output=True, text=True, check=True).stdout
    assert json.loads(by_hand.splitlines()[0]) == NASTY
    assert by_hand.splitlines()[1:] == ["$HOME"]


def test_a_program_that_is_not_there(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=r"gcloud: is not installed; https://cloud\.google\.com/sdk"):
        Commands().run(["gcloud", "version"])


def test_what_is_followed_ends_with_it():
    began = time.monotonic()
    with Commands().follow(["sh", "-c", "echo first; sleep 60"]) as process:
        assert process.stdout.readline() == b"first\n"
    assert process.returncode == -15
    assert time.monotonic() - began < 5
