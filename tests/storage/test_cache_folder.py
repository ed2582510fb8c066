"""The user's cache folder, and users without a home."""

from pathlib import Path

import jax
import pytest

from ttt_jax import cli
from ttt_jax.config import ConfigError
from ttt_jax.distributed import startup
from ttt_jax.storage.workdir import cache_folder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def no_home(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)


def test_where_it_is(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_folder() == Path("/elsewhere/ttt_jax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/ttt_jax"


def test_without_a_home(no_home, monkeypatch, capsys):
    with pytest.raises(ConfigError, match=r"^no home folder to keep files in; expected XDG_CACHE_HOME"):
        cache_folder()
    monkeypatch.chdir(ROOT)
    line = "launch sky --cpus 2+ --dry-run -- train --config configs/quickstart.py --workdir gs://b/r"
    assert cli.main(line.split()) == 2
    assert capsys.readouterr().err.startswith("ttt launch: no home folder to keep files in;")


def test_compiling_needs_no_home(no_home):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        startup.use_compilation_cache()
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
