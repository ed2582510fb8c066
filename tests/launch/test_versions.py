"""Test that the source tree is sent as it is here, with the versions that are installed here."""

import importlib.metadata
import subprocess
import tarfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from ttt_jax.config import ConfigError
from ttt_jax.launch import versions

ROOT = Path(__file__).resolve().parents[2]


def test_versions_are_those_installed_here():
    found = versions.installed(("gcs",))
    assert all(importlib.metadata.version(name).partition("+")[0] == version for name, version in found.items())
    direct = [Requirement(line) for line in importlib.metadata.requires("ttt_jax")]
    for requirement in direct:
        if requirement.marker is None or 'extra == "gcs"' in str(requirement.marker):
            assert requirement.name.lower().replace(".", "-").replace("_", "-") in found
    assert {"jaxlib", "orbax-checkpoint", "aiohttp"} <= found.keys()  # of others' requirements too
    assert not {"ttt-jax", "pytest", "ruff", "ray"} & found.keys()
    assert "wandb" not in found
    assert "wandb" in versions.installed(("wandb",))
    lines = versions.constraints(("gcs",)).splitlines()
    assert lines == [f"{name}=={version}" for name, version in found.items()]


def test_a_version_that_contradicts_another_package_is_left_out(monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1" if name == "optax" else real(name))
    assert "optax" not in versions.installed()


@pytest.fixture
def tree(tmp_path):
    tree = tmp_path / "tree"
    for name in ("setup.py", "ttt_jax/a.py", "tests/test_a.py", "launch/run.sh", "name with 'quotes' ü.txt"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(name)
    (tree / "launch" / "run.sh").chmod(0o755)
    return tree


def names(tree, tmp_path) -> set[str]:
    versions.files.cache_clear()
    versions.archive(tree, {}, tmp_path / "a.tar.gz")
    with tarfile.open(tmp_path / "a.tar.gz") as tar:
        return set(tar.getnames())


def test_the_working_tree_is_sent_with_its_changes(tree, tmp_path):
    def git(*command):
        subprocess.run(["git", "-C", tree, "-c", "user.name=a", "-c", "user.email=a@b", *command], check=True)

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "all")
    (tree / ".gitignore").write_text("runs/\n")
    for name in ("ttt_jax/new.py", "runs/checkpoint", "ttt_jax/a.py"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text("changed")
    (tree / "setup.py").unlink()
    sent = names(tree, tmp_path)
    assert sent == {"ttt_jax/a.py", "ttt_jax/new.py", "launch/run.sh", "name with 'quotes' ü.txt", ".gitignore"}
    with tarfile.open(tmp_path / "a.tar.gz") as tar:
        assert tar.extractfile("ttt_jax/a.py").read() == b"changed"
        assert tar.getmember("launch/run.sh").mode & 0o111


def test_without_git_the_package_is_sent(tree, tmp_path):
    (tree / "runs").mkdir()
    (tree / "runs" / "checkpoint").write_text("big")
    assert names(tree, tmp_path) == {"setup.py", "ttt_jax/a.py", "launch/run.sh"}


def test_the_same_tree_is_the_same_archive(tree, tmp_path):
    versions.files.cache_clear()
    a = versions.archive(tree, {"c.txt": "x"}, tmp_path / "a")
    (tree / "ttt_jax" / "a.py").touch()
    b = versions.archive(tree, {"c.txt": "x"}, tmp_path / "b")
    assert a == b
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert versions.archive(tree, {"c.txt": "y"}, tmp_path / "b") != a
    (tree / "ttt_jax" / "a.py").write_text("other")
    assert versions.archive(tree, {"c.txt": "x"}, tmp_path / "b") != a


def test_a_tree_that_is_too_large_is_refused(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(versions, "_MOST_BYTES", 10)
    versions.files.cache_clear()
    with pytest.raises(ConfigError, match=r"launch/run\.sh \(0 MB\)"):
        versions.archive(tree, {}, tmp_path / "a")
