"""Check that other machines get the source tree as it is here, and the versions that are installed here."""

import importlib.metadata
import subprocess
import tarfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ttt_jax.config import ConfigError
from ttt_jax.launch import versions

PACKAGE = {"setup.py", "ttt_jax/a.py", "launch/run.sh"}
OTHERS = {"tests/test_a.py", "name with 'quotes' ü.txt", "runs/checkpoint"}


@pytest.fixture
def tree(tmp_path):
    for name in PACKAGE | OTHERS:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text(name)
    (tmp_path / "tree/launch/run.sh").chmod(0o755)
    return tmp_path / "tree"


def packed(tree, **extra) -> tuple[str, bytes]:
    """Return the hash of an archive of a tree, and its bytes."""
    versions.files.cache_clear()
    path = tree.parent / "packed/a.tar.gz"
    return versions.archive(tree, extra, path), path.read_bytes()


def test_versions_are_those_installed_here(monkeypatch):
    found = dict(line.split("==") for line in versions.constraints(("gcs",)).splitlines())
    assert all(importlib.metadata.version(name).partition("+")[0] == version for name, version in found.items())
    direct = [Requirement(line) for line in importlib.metadata.requires("ttt_jax")]
    assert found.keys() >= {
        canonicalize_name(each.name) for each in direct if each.marker is None or 'extra == "gcs"' in str(each.marker)
    }
    assert {"jaxlib", "orbax-checkpoint", "aiohttp"} <= found.keys()  # requirements of requirements, too
    assert not {"ttt-jax", "pytest", "ruff", "ray", "wandb"} & found.keys()
    assert "wandb==" in versions.constraints(("wandb",))
    # pip could not install a version that others do not allow.
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1" if name == "optax" else real(name))
    assert "optax==" not in versions.constraints()


def test_the_working_tree_is_sent_with_its_changes(tree):
    git = ["git", "-C", str(tree), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tree / ".gitignore").write_text("runs/\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    for name in ("ttt_jax/new.py", "ttt_jax/a.py"):
        (tree / name).write_text("changed")
    (tree / "setup.py").unlink()
    packed(tree)
    versions.unpack(tree.parent / "packed/a.tar.gz", tree.parent / "unpacked")
    sent = {str(path.relative_to(tree.parent / "unpacked")): path for path in (tree.parent / "unpacked").rglob("*")}
    assert {name for name, path in sent.items() if path.is_file()} == {
        *("ttt_jax/a.py", "ttt_jax/new.py", "launch/run.sh", "name with 'quotes' ü.txt", ".gitignore")
    }
    assert sent["ttt_jax/a.py"].read_text() == "changed"
    assert sent["launch/run.sh"].stat().st_mode & 0o111


def test_the_package_is_sent_without_git(tree):
    packed(tree)
    with tarfile.open(tree.parent / "packed/a.tar.gz") as tar:
        assert {*tar.getnames()} == PACKAGE


def test_archives_are_equal_for_equal_trees(tree):
    first = packed(tree, text="x")
    (tree / "ttt_jax/a.py").touch()
    assert packed(tree, text="x") == first
    assert packed(tree, text="y")[0] != first[0]
    (tree / "ttt_jax/a.py").write_text("other")
    assert packed(tree, text="x")[0] != first[0]


def test_a_large_tree_is_refused(tree, monkeypatch):
    monkeypatch.setattr(versions, "_MOST_BYTES", 10)
    with pytest.raises(ConfigError, match=r"launch/run\.sh \(0 MB\)"):
        packed(tree)
