"""Test how programs of others are run, repeated and printed, and words for their shells."""

import re
import subprocess
import time

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from ttt_jax.launch import commands as commands_lib
from ttt_jax.launch.commands import CommandError, Commands, Retry, quoted

WORDS = st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), max_size=20)


@pytest.fixture
def flaky(tmp_path):
    """Give ``flaky(n, text)``: a command that prints ``text`` and fails n times, and then succeeds."""
    program = f"n=$(cat {tmp_path}/n 2>/dev/null || echo 0); echo $((n + 1)) > {tmp_path}/n; "
    program += 'if [ "$n" -lt "$0" ]; then echo "$1" >&2; exit 4; fi; echo done'
    return lambda times, text: ["sh", "-c", program, str(times), text]


def test_a_transient_fault_is_tried_again_with_growing_waits(flaky, tmp_path, monkeypatch):
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
def test_a_final_fault_is_raised_at_once(flaky, tmp_path, retry):
    with pytest.raises(CommandError):
        Commands().output(flaky(9, "503 limit"), retry=retry)
    assert (tmp_path / "n").read_text() == "1\n"


@given(WORDS)
@example(
    ["$(HOME)", "$$(HOME)", "it's", "a\nb", "\\n", "é\t", "{}", '"', "#", "$'x'", "-n", "", " ", "\x7f\x1b", "`id`"]
)
def test_a_word_survives_yaml_kubernetes_and_bash(words):
    line = " ".join(map(quoted, words))
    assert re.fullmatch("[ -~]*", line)
    manifest = f"command:\n- bash\n- -c\n- |\n  echo;\n  (printf '%s\\0' {line}) && true\n"
    command = yaml.safe_load(manifest)["command"][2]
    # As Kubernetes does with the command of a container.
    script = re.sub(r"\$\$|\$\((\w+)\)", lambda m: "$" if m[0] == "$$" else {"HOME": "pwned"}.get(m[1], m[0]), command)
    printed = subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout
    assert printed == b"\n" + "".join(f"{word}\0" for word in words or [""]).encode()


def test_the_log_of_an_ended_job_has_longer_to_begin_than_to_go_on(monkeypatch, capfd):
    began = time.monotonic()
    monkeypatch.setattr(commands_lib, "LAST_WORDS", 0.1)
    late = ["sh", "-c", "sleep 0.4; echo first; sleep 60; echo too late"]
    size, _ = commands_lib.show(Commands(), late, over=lambda: True, poll=0.01)
    assert size == len("first\n")
    assert capfd.readouterr().out == "first\n"
    monkeypatch.setattr(commands_lib, "FIRST_WORDS", 0.1)
    assert commands_lib.show(Commands(), late, over=lambda: True, poll=0.01)[0] == 0
    assert time.monotonic() - began < 5  # the command was ended, too
