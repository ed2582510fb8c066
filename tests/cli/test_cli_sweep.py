"""Test ``ttt sweep`` as typed: commands that are refused before anything starts, and real runs with their results."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_gcs import FakeGCS, printed

from ttt_jax import cli
from ttt_jax.training import metrics

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = str(ROOT / "configs" / "quickstart.py")
SWEEP = f"sweep --config {QUICKSTART} --workdir new"
REFUSED = {
    "sweep --workdir new": "--config: missing; expected a config file, such as --config configs/quickstart.py",
    f"sweep --config {QUICKSTART}": "error: the following arguments are required: --workdir",
    "sweep --config no.py --workdir new": "point no.py: --config no.py: no such file; expected a Python file with",
    f"{SWEEP} --grid seed": "--grid seed: expected KEY=VALUE,VALUE,... such as optimizer.peak_lr=1e-3,3e-3",
    f"{SWEEP} --grid seed=0,1 --config.seed=3": "--grid seed: is set by --config.seed already; expected each key in",
    f"{SWEEP} --config.seed=3 --config.seed=4": "--config.seed=4: seed is set already; expected each key in one place",
    f"{SWEEP} --config.seed": "seed: missing value; expected --config.seed=VALUE",
    f"{SWEEP} --zip seed=0,1 log.every=5": "--zip: 2 of seed, 1 of log.every; expected as many values of each key",
    f"{SWEEP} --grid seed=0,zero": f"point {QUICKSTART}, seed=zero: seed=zero: expected an integer",
    f"{SWEEP} --grid model.num_heads=2,3": f"point {QUICKSTART}, model.num_heads=3: model.num_heads=3: does not divide",
    f"{SWEEP} --grid optimizer.peak_lr=1e-3,0.001": "points peak_lr=0.001 and peak_lr=0.001: are the same run",
    f"{SWEEP} --grid model.ttt.norm_residual=true,false": f"point {QUICKSTART}, model.ttt.norm_residual=true: model."
    "ttt.norm_residual: is now model.ttt.output and model.ttt.bias; expected --config.model.ttt.output=residual_norm ",
    f"{SWEEP} --jobs 0": "error: argument --jobs: '0': expected 1 or more",
    f"{SWEEP} --restarts -1": "error: argument --restarts: '-1': expected 0 or more",
    f"{SWEEP} -- train": "-- train: expected -- launch TARGET, and options of it",
    f"{SWEEP} -- launch tpu --detach": "-- launch tpu --detach: --detach is not for sweeps, which follow their points",
    f"{SWEEP} -- launch sky --name=a": "-- launch sky --name=a: --name=a is not for sweeps, whose points have names",
    f"{SWEEP} --asha loss": "--asha: expected --engine ray too",
    f"{SWEEP} --engine ray --asha validation-2048": "--asha validation-2048: expected a number of metrics.jsonl, such",
    f"{SWEEP} --engine ray --resources CPU": "--resources CPU: expected NAME=N, such as CPU=4 GPU=1",
    f"{SWEEP} --engine ray --asha loss --reduction 1": "--reduction 1.0: expected a number above 1",
    f"{SWEEP} --engine ray -- launch tpu": "--engine ray: is a launcher itself; expected nothing behind --",
    f"sweep --config {QUICKSTART} --workdir s3://b/x": "--workdir s3://b/x: expected a folder, or gs://bucket/name",
    "sweep status new": "new: holds no sweep.json; expected the --workdir of a ttt sweep",
    "sweep results new": "new: holds no sweep.json; expected the --workdir of a ttt sweep",
    "sweep results new --x seed": "--x, --lines: are of a picture; expected --plot FILE too",
    "train --workdir new -- launch": "error: unexpected argument: --",
}


@pytest.fixture(scope="module")
def answers(in_one_process):
    return in_one_process(
        ["sweep --help", "sweep status --help", "sweep results --help", *REFUSED],
        unwanted=("matplotlib", "orbax", "grain"),
    )


def test_help(answers):
    status, out, _ = answers["sweep --help"]
    assert status == 0
    for text in ("--grid", "--zip", "log:LOW:HIGH:N", "pow2:1:2048", "-- launch tpu", "ttt sweep status", "--asha"):
        assert text in out
    assert "--watch" in answers["sweep status --help"][1]
    for text in ("--metric", "--csv", "--plot", "--lines", "last 5 %", "validation-2048/perplexity"):
        assert text in answers["sweep results --help"][1]


@pytest.mark.parametrize("command", list(REFUSED))
def test_refused(answers, command):
    status, out, err = answers[command]
    assert (status, out) == (2, "")
    message = err.splitlines()[-1].removeprefix("ttt ")
    verb, _, said = message.partition(": ")
    assert verb == " ".join(command.split()[: 2 if "status" in command or "results" in command else 1])
    assert said.startswith(REFUSED[command])
    if "error:" not in err:
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--grid model.ttt.learner=linear,lab_nowhere:f", "model.ttt.learner='lab_nowhere:f': no module lab"),
        ("--config.model.ttt.learner=json:dumps --engine ray --ray-address auto", "model.ttt.learner='json:dumps'"),
    ],
)
def test_learners_that_cannot_be_found_are_refused(capsys, tmp_path, options, message):
    command = ["sweep", "--config", QUICKSTART, "--workdir", str(tmp_path / "new"), "--config.model.mixer=ttt"]
    assert cli.main([*command, *options.split()]) == 2
    assert capsys.readouterr().err.startswith(f"ttt sweep: {message}")


def test_a_dry_run_prints_the_commands(capsys, tmp_path):
    folder = tmp_path / "new"
    line = ["sweep", "--config", QUICKSTART, "--workdir", str(folder), "--dry-run", "--config.data.source=it's here"]
    line += ["--grid", "training.duration=2 steps,1M tokens"]
    assert cli.main([*line, "--", "launch", "slurm", "--gpus-per-node=8", "--partition", "a b"]) == 0
    out = capsys.readouterr().out
    assert [each for each in out.splitlines() if each.startswith("ttt")] == [
        f"ttt launch slurm --gpus-per-node=8 --partition 'a b' -- train --config {QUICKSTART} "
        f"'--config.data.source=it'\"'\"'s here' "
        f"'--config.training.duration={duration}' --workdir {folder}/duration={name}"
        for duration, name in (("2 steps", "2-steps"), ("1M tokens", "1M-tokens"))
    ]
    table = [each.split() for each in out.splitlines()]
    assert ["duration=2-steps", "2", "steps", "2"] in table
    assert ["duration=1M-tokens", "1M", "tokens", "977"] in table
    assert not folder.exists()


def test_a_value_with_spaces_after_a_list_is_set_for_all_points(capsys, tmp_path):
    """Check that a value with spaces is not taken for one more entry of the list, as argparse does."""
    lists = ["--grid", "seed=0,1", "--config.training.duration=20 steps"]
    lists += ["--zip", "log.every=1 step,2 steps", "--config.checkpoint.every=10 steps"]
    assert cli.main(["sweep", "--config", QUICKSTART, "--workdir", str(tmp_path / "new"), *lists, "--dry-run"]) == 0
    commands = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ttt train")]
    assert len(commands) == 4
    assert all("'--config.training.duration=20 steps'" in line for line in commands)
    assert all("'--config.checkpoint.every=10 steps'" in line for line in commands)


# ---- Real runs

TINY = [
    *("--config", f"{QUICKSTART}:attention"),
    *"--config.model.width=16 --config.model.num_heads=2 --config.model.num_layers=1".split(),
    *"--config.model.mlp_width=8 --config.data.sequence_length=32 --config.data.batch_size=2".split(),
]


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def cache_environment(folder):
    """Return where logs and locks of sweeps in buckets are, and compiled programs as in :func:`environment`."""
    programs = {name: value for name, value in environment().items() if name.startswith(("JAX_", "XLA_"))}
    return {"XDG_CACHE_HOME": str(folder), **programs}


def ttt(*arguments):
    """Run a command and return its exit status, stdout and stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "ttt_jax", *map(str, arguments)], env=environment(), capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_a_sweep_with_a_point_that_fails(tmp_path):
    """Check two real runs, one of which diverges, their results, and the command without the failed point."""
    folder = tmp_path / "sweep"
    line = ["sweep", *TINY, "--config.training.duration=20", "--workdir", folder, "--zip", "seed=3", "--jobs", 2]
    status, out, err = ttt(*line, "--grid", "optimizer.peak_lr=1e-2,1e7")
    assert status == 1, err
    assert out.startswith(f"{folder}: 2 points: 1 done, 1 failed\n  peak_lr=10000000,seed=3: ttt train: ")
    assert " at step " in out
    good = folder / "peak_lr=0.01,seed=3"
    assert [each["step"] for each in metrics.read(good)] == list(range(1, 21))
    config = json.loads((good / "config.json").read_text())
    assert (config["optimizer"]["peak_lr"], config["seed"], config["model"]["width"]) == (0.01, 3, 16)

    status, out, err = ttt("sweep", "results", folder, "--json", "--plot", folder / "a.png", "--x", "optimizer.peak_lr")
    rows = json.loads(out)
    assert status == 0
    assert [(row["rank"], row["state"]) for row in rows] == [(1, "done"), (None, "failed")]
    assert rows[0]["loss"] == metrics.read(good)[-1]["loss"]  # of 20 steps the last twentieth is the last
    assert (folder / "a.png").read_bytes().startswith(b"\x89PNG")

    before = (good / "output.log").read_bytes()
    status, out, err = ttt(*line, "--grid", "optimizer.peak_lr=0.01")
    assert (status, out) == (0, f"{folder}: 1 points: 1 done\n")
    assert "1 points, 1 of them done already; 1 of earlier commands are left as they are; to watch:" in err
    assert (good / "output.log").read_bytes() == before


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_its_run_saved(tmp_path):
    folder = tmp_path / "sweep"
    steps = ["--config.training.duration=400", "--config.checkpoint.every=300", "--config.log.every=1"]
    line = [sys.executable, "-m", "ttt_jax", "sweep", *TINY, *steps, "--grid", "seed=1", "--workdir", str(folder)]
    process = subprocess.Popen(line, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / "seed=1/metrics.jsonl").exists() or len(metrics.read(folder / "seed=1")) < 5:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    log = (folder / "seed=1/output.log").read_text()
    saved = re.search(r"stopped by SIGTERM; saved at step (\d+) of 400", log)
    assert saved is not None
    assert f"continuing at step {saved[1]}" in log
    assert [each["step"] for each in metrics.read(folder / "seed=1")] == list(range(1, 401))


@pytest.mark.slow
def test_a_sweep_in_a_bucket(tmp_path):
    steps = ["--config.training.duration=3", "--grid", "seed=1", "--workdir", "gs://bucket/sweeps/a"]
    with FakeGCS() as gcs:
        process = subprocess.Popen(
            [sys.executable, "-m", "ttt_jax", "sweep", *TINY, *steps],
            env={**environment(), **gcs.environment(), **cache_environment(tmp_path), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert printed(process) == "gs://bucket/sweeps/a: 1 points: 1 done\n"
        there = gcs.files("bucket/sweeps/a")
        assert {"sweep.json", "seed=1/point.json", "seed=1/metrics.jsonl", "seed=1/output.log"} <= there.keys()
        assert "running.json" not in there
        assert json.loads(there["seed=1/point.json"])["state"] == "done"
        assert b"3 steps done" in there["seed=1/output.log"]
        code = "from ttt_jax import cli; cli.main(['sweep', 'results', 'gs://bucket/sweeps/a', '--json']); "
        code += "cli.main(['sweep', 'status', 'gs://bucket/sweeps/a'])"
        out = printed(gcs.start("-c", code))
    assert sorted(row["point"] for row in json.loads(out[: out.index("\n]") + 2])) == ["seed=1"]
    assert "1 points: 1 done" in out
    local = tmp_path / "ttt_jax/sweeps/bucket/sweeps/a"
    assert (local / "seed=1" / "output.log").read_bytes() == there["seed=1/output.log"]
