"""Provide a check for commands that must be refused."""

import jax
import pytest
from tiny_run import ttt


@pytest.fixture
def refused(capsys, monkeypatch):
    """Return ``refused(*arguments)``, which checks that a command is refused early and returns its line of error."""

    def must_not_compile(*args, **options):
        raise AssertionError("compiled before the config was refused")

    def run(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(jax.stages.Lowered, "compile", must_not_compile)
            assert ttt(*arguments) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        usage, _, message = printed.err.rpartition(f"ttt {arguments[0]}: " if arguments else "ttt: ")
        assert message.count("\n") == 1
        assert message.endswith("\n")
        assert "Traceback" not in printed.err
        assert usage == "" or usage.startswith("usage: ttt ")
        return message.strip()

    return run
