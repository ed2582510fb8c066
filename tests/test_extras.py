"""Test that missing packages are named with the command that installs them, before anything is written."""

import importlib.metadata
import importlib.util
import re
from pathlib import Path

import pytest

from ttt_jax import cli, extras
from ttt_jax.config import ConfigError

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    *("--config", f"{ROOT}/configs/quickstart.py:attention"),
    *"--config.model.width=8 --config.model.num_heads=2 --config.model.num_layers=1 --config.model.mlp_width=8".split(),
    *"--config.data.sequence_length=32 --config.data.batch_size=2 --config.training.duration=4".split(),
]


@pytest.fixture
def without(monkeypatch):
    """Return ``without(module)``, which hides an installed module."""
    find = importlib.util.find_spec

    def hide(module):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: None if name == module else find(name, *rest)
        )

    return hide


@pytest.mark.parametrize(
    ("extra", "command"),
    [
        ("wandb", "pip install 'wandb>=0.19'"),
        ("tensorboard", "pip install 'tensorboardX>=2.6'"),
        ("ray", "pip install 'ray[tune]>=2.40'"),
        ("gcs", "pip install 'gcsfs>=2026.4'"),
    ],
)
def test_the_install_command_names_packages(extra, command):
    assert extras.install_command(extra) == command


def test_the_install_command_in_a_source_tree_names_the_extra(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    assert extras.install_command("wandb") == "pip install -e '.[wandb]' in the source tree of ttt_jax"


def test_a_missing_module_is_refused(without):
    extras.check("wandb", "json", "x")
    without("wandb")
    with pytest.raises(ConfigError, match=r"^log.wandb_project: needs wandb; pip install 'wandb>=0\.19'$"):
        extras.check("wandb", "wandb", "log.wandb_project")


@pytest.mark.parametrize(
    ("module", "setting"), [("wandb", "log.wandb_project=p"), ("tensorboardX", "log.tensorboard=true")]
)
def test_training_without_the_package_writes_nothing(capsys, without, tmp_path, module, setting):
    without(module)
    for verb, *more in (["train"], ["sweep", "--grid", "seed=0,1"]):
        assert cli.main([verb, *TINY, f"--config.{setting}", "--workdir", str(tmp_path / "run"), *more]) == 2
        said = rf"ttt {verb}: log\.\w+.*: needs {module}; pip install '{module}>=[\d.]+'\n"
        assert re.fullmatch(said, capsys.readouterr().err)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("module", "more"), [("pyarrow", []), ("ray", ["--engine", "ray"])])
def test_tokenizing_without_the_package_writes_nothing(capsys, without, tmp_path, module, more):
    text = tmp_path / "t.parquet"
    text.write_bytes(b"PAR1")
    without(module)
    line = ["tokenize", "--train", str(text), "--train-bpe", "300", "--output", str(tmp_path / "data"), *more]
    assert cli.main(line) == 2
    assert f"needs {module}; pip install '{module}" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_a_sweep_without_ray_writes_nothing(capsys, without, tmp_path):
    without("ray")
    assert cli.main(["sweep", *TINY, "--grid", "seed=0", "--engine", "ray", "--workdir", str(tmp_path / "s")]) == 2
    assert capsys.readouterr().err == "ttt sweep: --engine ray: needs ray; pip install 'ray[tune]>=2.40'\n"
    assert not (tmp_path / "s").exists()


def test_no_message_installs_ttt_jax_from_a_registry():
    for path in (ROOT / "ttt_jax").rglob("*.py"):
        assert "pip install 'ttt_jax[" not in path.read_text(), path
