"""Test a run in a bucket, where files cannot be appended to or renamed: train, kill, resume and evaluate it."""

import json

import numpy as np
import pytest
from fake_gcs import FakeGCS
from matplotlib import image

from ttt_jax import cli
from ttt_jax.training import loop, metrics

pytestmark = pytest.mark.slow

PLACE = "bucket/runs/a"


def records(gcs):
    return [json.loads(line) for line in gcs.objects[f"{PLACE}/metrics.jsonl"].decode().splitlines()]


def curves(records):
    """Return the recorded values, without times."""
    return [[record[name] for name in ("step", "loss", "grad_norm", "learning_rate", "tokens")] for record in records]


@pytest.fixture(scope="module")
def local(tmp_path_factory, tiny_config):
    """Return the workdir of the same run in a local folder, never stopped."""
    workdir = tmp_path_factory.mktemp("local") / "a"
    loop.train(tiny_config(), workdir)
    return workdir


@pytest.fixture
def ttt(monkeypatch, capsys):
    """Return ``ttt(gcs, *arguments)``: it runs a command with gs:// on that server, and returns its output."""
    import gcsfs

    def run(gcs, *arguments):
        with monkeypatch.context() as patch:
            for name, value in gcs.environment().items():
                patch.setenv(name, value)
            gcsfs.GCSFileSystem.clear_instance_cache()
            assert cli.main([str(argument) for argument in arguments]) == 0
            gcsfs.GCSFileSystem.clear_instance_cache()
        return capsys.readouterr().out

    return run


def test_a_run_in_a_bucket_can_be_killed_resumed_and_evaluated(tmp_path, local, ttt, start_training, finish):
    url = f"gs://{PLACE}"
    expected = curves(metrics.read(local))

    with FakeGCS() as gcs:
        # Killed when it writes the first file of the checkpoint at step 18: all earlier records are in the bucket.
        def kill(request):
            if request.verb == "upload" and request.target.startswith(f"{PLACE}/checkpoints/18"):
                process.kill()
                return 503

        gcs.fault = kill
        process = start_training(url, environment=gcs.environment())
        _, err = process.communicate(timeout=120)
        assert process.returncode == -9, err
        assert f"{PLACE}/checkpoints/12/commit_success.txt" in gcs.objects
        assert curves(records(gcs)) == expected[:18]

        # Resumed; the first writes of records fail, and some steps are traced.
        failures = [503, 503]

        def fail(request):
            wanted = (request.verb, request.target) == ("upload", f"{PLACE}/metrics.jsonl")
            return failures.pop() if wanted and failures else None

        gcs.fault = fail
        printed = finish(start_training(url, {"profile.steps": "20:21"}, environment=gcs.environment()))
        assert failures == []
        assert "continuing at step 12" in printed
        assert "24 steps done" in printed
        assert "Traceback" not in printed
        assert curves(records(gcs)) == expected
        assert {name.split("/")[0] for name in gcs.files(PLACE)} == {
            "checkpoints",
            "config.json",
            "metrics.jsonl",
            "profile",
            "started.json",
        }
        (trace,) = [name for name in gcs.files(f"{PLACE}/profile") if name.endswith(".xplane.pb")]
        assert trace.startswith("plugins/profile/")

        options = ["--context", "32", "--max-windows", "4"]
        assert cli.main(["eval", "--workdir", str(local), *options]) == 0
        assert f"{url}/eval/validation-32.npz" in ttt(gcs, "eval", "--workdir", url, *options)
        assert gcs.objects[f"{PLACE}/eval/validation-32.csv"] == (local / "eval/validation-32.csv").read_bytes()
        picture = tmp_path / "both.png"
        ttt(gcs, "plot", "loss-by-position", local, url, "--output", picture)
        assert np.asarray(image.imread(picture)).std() > 0.01


def test_several_processes_share_a_bucket(local, start_processes, finish):
    with FakeGCS() as gcs:
        changes = {"checkpoint.every": "12 steps", "checkpoint.keep_last": 1}
        finish(*start_processes(f"gs://{PLACE}", 2, changes, environment=gcs.environment()))
        losses = [record["loss"] for record in records(gcs)]
        assert {name.split("/")[0] for name in gcs.files(f"{PLACE}/checkpoints")} == {"24"}
    np.testing.assert_allclose(losses, [record["loss"] for record in metrics.read(local)], rtol=1e-5)
