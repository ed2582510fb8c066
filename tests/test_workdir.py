"""Places where a run may live, and what is told of those where it cannot."""

import importlib.util
from pathlib import Path

import pytest
from fake_gcs import FakeGCS, printed

from ttt_jax import workdir
from ttt_jax.config import ConfigError

needs_gcsfs = pytest.mark.skipif(importlib.util.find_spec("gcsfs") is None, reason="needs gcsfs: the extra gcs")


def test_local_folders_are_plain_paths(tmp_path):
    for location in ("runs/a", "runs/a/", Path("runs/a")):
        assert workdir.at(location) == Path("runs/a")
        assert type(workdir.at(location)) is type(tmp_path)
        assert workdir.is_local(workdir.at(location))
    workdir.make(workdir.at(tmp_path / "a" / "b"))
    assert (tmp_path / "a" / "b").is_dir()


@needs_gcsfs
def test_buckets_keep_their_names():
    for location in ("gs://bucket/a/run", "gs://bucket/a/run/", workdir.at("gs://bucket/a/run")):
        place = workdir.at(location)
        assert str(place / "metrics.jsonl") == "gs://bucket/a/run/metrics.jsonl"
        assert place.name == "run"
        assert not workdir.is_local(place)


@pytest.mark.parametrize("url", ["s3://bucket/run", "gs://", "gs:///", "https://storage.googleapis.com/bucket/run"])
def test_other_urls_are_refused(url):
    with pytest.raises(ConfigError, match=f"--workdir {url}: expected a folder, or gs://bucket/name"):
        workdir.at(url)


def test_a_missing_extra_is_named(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gcsfs" else real(name, *rest))
    with pytest.raises(ConfigError, match=r"--workdir gs://b/r: needs gcsfs; pip install 'ttt_jax\[gcs\]'"):
        workdir.at("gs://b/r")


MAKE = """
from ttt_jax import workdir
for bucket in ("there", "missing", "not-mine", "nobody"):
    try:
        print(workdir.make(workdir.at(f"gs://{bucket}/run")))
    except ValueError as error:
        print(error)
"""


@needs_gcsfs
def test_a_bucket_is_tried_before_anything_else():
    status = {"there": None, "missing": 404, "not-mine": 403, "nobody": 401}
    with FakeGCS() as gcs:
        gcs.fault = lambda request: status.get(request.target.split("/")[0])
        process = gcs.start("-c", MAKE)
        there, missing, *refused = printed(process).splitlines()
    assert there == "None"
    assert [request.target.partition(".trial")[0] for request in gcs.of("upload", "there")] == ["there/run/"]
    assert not gcs.objects
    assert missing == "--workdir gs://missing/run: no such bucket"
    for line, name, reason in zip(refused, ("not-mine", "nobody"), ("Permission denied", "401"), strict=True):
        assert line.startswith(f"--workdir gs://{name}/run: cannot be written: ")
        assert reason in line
        assert line.endswith("gcloud auth application-default login)")
