"""Check that other machines get the source tree as it is here, and the versions that are installed here."""

import importlib.metadata
import subprocess

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ttt_jax.config import ConfigError
from ttt_jax.launch import versions


@pytest.fixture
def tree(tmp_path):
    for name in ("setup.py", "ttt_jax/a.py", "launch/run.sh", "tests/test_a.py", "runs/checkpoint", "'quoted' ü.txt"):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text(name)
    (tmp_path / "tree/launch/run.sh").chmod(0o755)
    return tmp_path / "tree"


def packed(tree, **extra) -> tuple[str, bytes, dict]:
    """Return the hash of an archive of a tree, its bytes, and its files by name."""
    versions.files.cache_clear()
    path, unpacked = tree.parent / "packed/a.tar.gz", tree.parent / "unpacked"
    contents = versions.archive(tree, extra, path)
    versions.unpack(path, unpacked)
    files = {str(file.relative_to(unpacked)): file for file in unpacked.rglob("*") if file.is_file()}
    return contents, path.read_bytes(), files


def test_versions_are_those_installed_here(monkeypatch):
    found = dict(line.split("==") for line in versions.constraints(("gcs",)).splitlines())
    assert all(importlib.metadata.version(name).partition("+")[0] == version for name, version in found.items())
    direct = [Requirement(line) for line in importlib.metadata.requires("ttt_jax")]
    needed = [each for each in direct if each.marker is None or 'extra == "gcs"' in str(each.marker)]
    assert found.keys() >= {canonicalize_name(each.name) for each in needed}
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
    files = packed(tree)[2]
    assert files.keys() == {"ttt_jax/a.py", "ttt_jax/new.py", "launch/run.sh", "'quoted' ü.txt", ".gitignore"}
    assert files["ttt_jax/a.py"].read_text() == "changed"
    assert files["launch/run.sh"].stat().st_mode & 0o111


def test_trees_without_git_make_equal_archives_where_they_are_equal(tree):
    *first, files = packed(tree, text="x")
    assert files.keys() == {"setup.py", "ttt_jax/a.py", "launch/run.sh", "text"}
    (tree / "ttt_jax/a.py").touch()
    assert [*packed(tree, text="x")[:2]] == first
    assert packed(tree, text="y")[0] != first[0]
    (tree / "ttt_jax/a.py").write_text("other")
    assert packed(tree, text="x")[0] != first[0]


def test_a_large_tree_is_refused(tree, monkeypatch):
    monkeypatch.setattr(versions, "_MOST_BYTES", 10)
    with pytest.raises(ConfigError, match=r"launch/run\.sh \(0 MB\)"):
        packed(tree)
