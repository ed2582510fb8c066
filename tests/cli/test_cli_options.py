"""Check that files that cannot be written are refused before any work."""

import json
import os

import pytest

from ttt_jax import cli
from ttt_jax.cli.options import check_file
from ttt_jax.config import ConfigError, default


def test_files_in_new_folders_are_accepted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("x.csv", "a/b/x.csv", tmp_path / "c" / "x.csv"):
        check_file(tmp_path / name, "--csv")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (".", "is a folder; expected a file"),
        ("file/x.csv", "{}/file is not a folder that can be written to; expected one"),
        ("locked/a/x.csv", "{}/locked is not a folder that can be written to; expected one"),
    ],
)
def test_files_that_cannot_be_written_are_refused(tmp_path, monkeypatch, name, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "locked").mkdir()
    real = os.access  # root may write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "locked" and real(path, mode))
    with pytest.raises(ConfigError, match=f"^--csv {tmp_path / name}: {message.format(tmp_path)}$"):
        check_file(tmp_path / name, "--csv")


def test_commands_check_files_before_they_compute(tmp_path, capsys):
    config = tmp_path / "run" / "config.json"
    config.parent.mkdir()
    config.write_text(json.dumps(default().to_dict()))
    (tmp_path / "run" / "inspect").write_text("")
    for verb, *more in (["eval", "--csv", f"{tmp_path}"], ["inspect"], ["probe needle", "--plot", f"{config}/x.svg"]):
        assert cli.main([*verb.split(), "--workdir", f"{config.parent}", *more]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.endswith(("is a folder; expected a file", "is not a folder that can be written to; expected one"))
