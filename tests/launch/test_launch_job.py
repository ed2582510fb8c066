"""Test jobs: their names, and the commands that are refused before any program is started."""

import os
from pathlib import Path

import pytest
from stand_ins import ROOT

from ttt_jax import cli
from ttt_jax.config import ConfigError
from ttt_jax.launch import job as job_lib

CONFIG = str(ROOT / "configs" / "quickstart.py")
TRAIN = ("train", "--config", CONFIG, "--workdir", "gs://b/a")


def make(*command, **options):
    return job_lib.make(command, cli.parse, **options)


def test_the_config_is_named_by_its_path_in_the_tree_that_is_sent(monkeypatch):
    monkeypatch.chdir(ROOT / "docs")
    for given in (["--config", f"{CONFIG}:ttt_mlp"], ["--config=../configs/quickstart.py:ttt_mlp"]):
        job = make("train", *given, "--workdir", "gs://b/a", "--config.seed=7")
        assert " ".join(job.command).replace("=", " ") == (
            "train --config configs/quickstart.py:ttt_mlp --workdir gs://b/a --config.seed 7"
        )
        assert (job.checkout, job.workdir) == (ROOT, "gs://b/a")
        assert (job.config.model.mixer, job.config.seed) == ("ttt_mlp", 7)


def test_the_name_belongs_to_the_workdir():
    def name(workdir):
        return job_lib.default_name(workdir, ("train",))

    assert name("gs://b/runs/a") == name("gs://b/runs/a/") != name("gs://c/runs/a")
    names = {name(f"gs://{bucket}/{run}") for bucket in "ab" for run in ("lr=1e-3", "LR 2e-3", "ü", "x" * 80)}
    assert len(names) == 8
    for text in names:
        assert job_lib._checked(text) == text
    assert name("gs://a/lr=1e-3").startswith("ttt-lr-1e-3-")
    assert job_lib.default_name(None, ("bench", "step")).startswith("ttt-bench-")


def test_an_evaluation_of_several_runs_is_named_after_all_of_them():
    jobs = [make("eval", "--workdir", *workdirs) for workdirs in (["gs://b/a"], ["gs://b/a", "gs://b/c"], ["gs://b/c"])]
    assert len({job.name for job in jobs}) == 3
    assert jobs[1].workdir == "gs://b/a"
    assert make("eval", "--workdir", "gs://b/a", name="mine").name == "mine"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ((*TRAIN, "--config.optimizer.peak=5"), "did you mean optimizer."),
        (("launch", "tpu", "--", "train"), "ttt launch: runs here"),
        (("plot", "loss-by-position", "runs/a"), "ttt plot: runs here"),
        (("sweep", "status", "gs://b/s"), "ttt sweep status: runs here"),
    ],
)
def test_commands_that_cannot_run_are_refused(command, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make(*command)
    assert "\n" not in str(caught.value)


def test_a_config_outside_of_the_source_tree_is_refused(tmp_path):
    outside = tmp_path / "mine.py"
    outside.write_text(Path(CONFIG).read_text())
    with pytest.raises(ConfigError, match=r"mine\.py: expected a file of the source tree"):
        make("train", "--config", str(outside), "--workdir", "gs://b/a")


@pytest.mark.parametrize("name", ["A", "1a", "a_b", "a-", "a" * 41, "a b", "a;b", ""])
def test_invalid_names_are_refused(name):
    with pytest.raises(ConfigError, match="--name"):
        make(*TRAIN, name=name)


def test_variables_of_env(monkeypatch):
    monkeypatch.setenv("SECRET", "x=y z")
    monkeypatch.delenv("MISSING", raising=False)
    job = make(name="a", environment=["A=1", "B=", "C=d=e", "SECRET"])
    assert job.environment == {"A": "1", "B": "", "C": "d=e", "SECRET": os.environ["SECRET"]}
    for wrong in ("MISSING", "1A=2", "a b=c", "=c"):
        with pytest.raises(ConfigError, match="--env"):
            make(name="a", environment=[wrong])
