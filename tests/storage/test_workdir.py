"""Test the folders of runs and of the cache, and the messages where they cannot be used."""

import importlib.util
from pathlib import Path

import jax
import pytest
from fake_gcs import FakeGCS, printed

from ttt_jax import cli
from ttt_jax.config import ConfigError
from ttt_jax.distributed import startup
from ttt_jax.storage import workdir
from ttt_jax.storage.workdir import cache_folder

ROOT = Path(__file__).resolve().parents[2]


def test_local_folders_are_plain_paths(tmp_path):
    for location in ("runs/a", "runs/a/", Path("runs/a")):
        assert workdir.at(location) == Path("runs/a")
        assert type(workdir.at(location)) is type(tmp_path)
        assert workdir.is_local(workdir.at(location))
    workdir.make(workdir.at(tmp_path / "a" / "b"))
    assert (tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize("location", ["", " "])
def test_empty_names_are_refused(location):
    with pytest.raises(ConfigError, match=f"--workdir '{location}': is empty; expected a folder"):
        workdir.at(location)


def test_names_that_are_not_text_are_refused():
    with pytest.raises(
        ConfigError, match=r"^--workdir 'a\\udcff': is not text in UTF-8; expected another name, or LC_ALL"
    ):
        workdir.at("a\udcff")


@pytest.mark.parametrize("below", ["", "/run"])
def test_a_file_in_the_place_of_a_folder_is_named(tmp_path, below):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=rf"--workdir {tmp_path}/file{below}: {tmp_path}/file.* is not a folder"):
        workdir.make(workdir.at(f"{tmp_path}/file{below}"))


def test_names_are_the_shortest_that_differ():
    folders = [Path(path) for path in ("/a/x/run", "/a/y/run", "/b/y/run", "/c/other", "/a/x/run", "run")]
    here = f"{Path.cwd().name}/run"
    assert workdir.names(folders) == ["x/run", "a/y/run", "b/y/run", "other", "x/run", here]
    assert workdir.names([Path("/x/run")]) == ["run"]
    assert workdir.names([Path("/run"), Path("/x/run")]) == ["/run", "x/run"]


def test_urls_of_buckets_are_kept():
    for location in ("gs://bucket/a/run", "gs://bucket/a/run/", workdir.at("gs://bucket/a/run")):
        place = workdir.at(location)
        assert str(place / "metrics.jsonl") == "gs://bucket/a/run/metrics.jsonl"
        assert place.name == "run"
        assert not workdir.is_local(place)


@pytest.mark.parametrize("url", ["s3://bucket/run", "gs://", "gs:///", "https://storage.googleapis.com/bucket/run"])
def test_other_urls_are_refused(url):
    with pytest.raises(ConfigError, match=f"--workdir {url}: expected a folder, or gs://bucket/name"):
        workdir.at(url)


def test_a_missing_package_is_named(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gcsfs" else real(name, *rest))
    with pytest.raises(ConfigError, match=r"--workdir gs://b/r: needs gcsfs; pip install 'gcsfs>="):
        workdir.at("gs://b/r")


USE = """
import sys
from ttt_jax import config as config_lib
from ttt_jax.storage import workdir
for bucket in sys.argv[1:]:
    place = workdir.at(f"gs://{bucket}/run")
    for use in (lambda: workdir.make(place), lambda: config_lib.from_json(place / "config.json")):
        try:
            print(use())
        except ValueError as error:
            print(error)
"""


@pytest.mark.slow
def test_a_bucket_that_cannot_be_written_is_refused_first():
    status = {"there": None, "missing": 404, "not-mine": 403, "nobody": 401}
    with FakeGCS() as gcs:
        gcs.fault = lambda request: status.get(request.target.split("/")[0])
        process = gcs.start("-c", USE, *status)
        made, no_config, missing, no_config_there, *refused = printed(process).splitlines()
    assert made == "None"
    assert no_config == "gs://there/run/config.json: not found; expected the workdir of a run, with its config.json"
    assert [request.target.partition(".trial")[0] for request in gcs.of("upload", "there")] == ["there/run/"]
    assert not gcs.objects
    assert missing == "--workdir gs://missing/run: no such bucket"
    assert no_config_there == no_config.replace("there", "missing")
    for name, reason in (("not-mine", "Permission denied"), ("nobody", "401")):
        not_written, not_read, *refused = refused
        assert not_written.startswith(f"--workdir gs://{name}/run: cannot be written: ")
        assert not_written.endswith("gcloud auth application-default login)")
        assert not_read.startswith(f"gs://{name}/run/config.json: cannot be read: ")
        assert reason in not_written
        assert reason in not_read
    assert not refused


@pytest.mark.parametrize(
    "verb", [["train", "--config", "a.py", "--workdir"], ["eval", "--workdir"], ["plot", "loss-by-position"]]
)
def test_commands_refuse_other_urls_in_one_line(capsys, verb):
    assert cli.main([*verb, "s3://bucket/run"]) == 2
    assert (
        capsys.readouterr().err == f"ttt {verb[0]}: --workdir s3://bucket/run: expected a folder, or gs://bucket/name\n"
    )


@pytest.fixture
def no_home(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)


def test_the_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_folder() == Path("/elsewhere/ttt_jax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/ttt_jax"


def test_a_user_without_a_home_is_asked_for_a_cache_folder(no_home, monkeypatch, capsys):
    with pytest.raises(ConfigError, match=r"^no home folder to keep files in; expected XDG_CACHE_HOME"):
        cache_folder()
    monkeypatch.chdir(ROOT)
    line = "launch sky --cpus 2+ --dry-run -- train --config configs/quickstart.py --workdir gs://b/r"
    assert cli.main(line.split()) == 2
    assert capsys.readouterr().err.startswith("ttt launch: no home folder to keep files in;")


def test_compiling_needs_no_home_folder(no_home):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        startup.use_compilation_cache()
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
