"""Test that records of metrics survive kills, damage and missing packages."""

import builtins
import json
import sys
import time
import types

import pytest

from ttt_jax.config import ConfigError
from ttt_jax.storage import workdir
from ttt_jax.training import metrics


def _write(workdir, steps, resume_at=0):
    writer = metrics.MetricsWriter(workdir, resume_at)
    for step in steps:
        writer.write(step, {"loss": 1 / step})
    writer.close()


def test_resuming_drops_what_will_be_computed_again(tmp_path):
    _write(tmp_path, [1, 2, 3, 4, 5])
    _write(tmp_path, [4, 5, 6], resume_at=3)
    assert [r["step"] for r in metrics.read(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', "{", '{"step": 3, "loss": 0.1}'])
def test_a_line_cut_short_is_dropped(tmp_path, torn):
    _write(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    assert [r["step"] for r in metrics.read(tmp_path)] == [1, 2]
    _write(tmp_path, [3], resume_at=2)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "extra"),
    [
        ({"tensorboard": True}, "pip install 'tensorboardX>=2.6'"),
        ({"wandb": {"project": "p"}}, "pip install 'wandb>=0.19'"),
    ],
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, options, extra):
    real_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name in ("tensorboardX", "wandb"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    for name in ("tensorboardX", "wandb"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=extra):
        metrics.MetricsWriter(tmp_path, 0, **options)


def test_tensorboard_needs_a_local_workdir(tmp_path):
    metrics.check_destinations(tmp_path, tensorboard=True)
    metrics.check_destinations(workdir.at("gs://bucket/run"), tensorboard=False)
    with pytest.raises(
        ConfigError, match=r"log\.tensorboard=true: needs a local workdir, not gs://bucket/run; expected"
    ):
        metrics.check_destinations(workdir.at("gs://bucket/run"), tensorboard=True)


def test_a_refusal_by_wandb_is_one_line_and_nothing_is_written(tmp_path, monkeypatch):
    def refuse(**options):
        raise RuntimeError("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=refuse))
    message = (
        r"^log.wandb_project=p: No API key configured. Use `wandb login` to log in.; expected a login \(wandb login\), "
    )
    with pytest.raises(ConfigError, match=message):
        metrics.MetricsWriter(tmp_path, 0, wandb={"project": "p"})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_place_of_the_records_is_set_aside(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").mkdir()
    assert metrics.read(tmp_path) == []
    assert capsys.readouterr().err == f"{tmp_path}/metrics.jsonl: is a folder; passed over\n"
    _write(tmp_path, [3], resume_at=2)
    message = f"{tmp_path}/metrics.jsonl: is a folder; passed over, and the file is kept as metrics.jsonl.damaged\n"
    assert capsys.readouterr().err == message
    assert [r["step"] for r in metrics.read(tmp_path)] == [3]
    assert (tmp_path / "metrics.jsonl.damaged").is_dir()


@pytest.mark.slow
def test_wandb_gets_every_record(tmp_path, monkeypatch):
    """Run the real library offline, where it writes what it would send into a folder."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    writer = metrics.MetricsWriter(tmp_path, 0, wandb={"project": "a project", "config": {"seed": 7}})
    writer.write(1, {"loss": 2.5})
    writer.write(2, {"loss": 1.5})
    writer.close()
    (log,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 60
    while b"1.5" not in (content := log.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.05)  # another process writes it, and may not have finished
    for text in (b"a project", b"loss", b"2.5", b"1.5", b"seed"):
        assert text in content
