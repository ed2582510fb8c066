"""Kill processes of a run at random moments, restart it, and compare its result with an undisturbed run.

    python scripts/kill_test.py                                   # 2 processes, 10 kills: a few minutes
    python scripts/kill_test.py --processes 4 --kills 100 --steps 3000

The processes run on CPU devices of this machine. A random process gets SIGKILL or SIGTERM; after SIGKILL the others
are killed too, as launchers do. Parameters, optimizer state and all recorded losses must equal those of the undisturbed
run, bit for bit.
"""

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from ttt_jax import config as config_lib
from ttt_jax.distributed import sharding
from ttt_jax.terminal.stopping import DONE, RESTART
from ttt_jax.training import metrics
from ttt_jax.training.checkpoint import Checkpoints
from ttt_jax.training.step import build_program

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 300  # seconds that any wait may take


def main() -> None:
    """Run the test, and exit with a message where the runs differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=1, help="devices of each process")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--checkpoint-every", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--ttt", default="-m ttt_jax", metavar="PROGRAM", help="the program that Python runs for ttt")
    options = parser.parse_args()
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        workdir, undisturbed = Path(folder) / "killed", Path(folder) / "undisturbed"
        finish(start(undisturbed, options))
        for kill in range(options.kills):
            disturb(workdir, options, moments, kill)
        finish(start(workdir, options))
        compare(workdir, undisturbed)
    print(f"{options.kills} kills of {options.processes} processes: the same bits as an undisturbed run")


def start(workdir: Path, options: argparse.Namespace) -> list[subprocess.Popen]:
    """Start the processes of a run."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    rows = options.processes * options.devices
    values = {
        "model.width": 32,
        "model.num_layers": 1,
        "model.num_heads": 2,
        "model.mlp_width": 48,
        "data.sequence_length": 64,
        "data.batch_size": rows,
        "training.duration": f"{options.steps} steps",
        "checkpoint.every": f"{options.checkpoint_every} steps",
    }
    command = [sys.executable, *options.ttt.split(), "train", "--config", str(ROOT / "configs/quickstart.py")]
    command += ["--workdir", str(workdir), *(f"--config.{key}={value}" for key, value in values.items())]
    command += ["--coordinator", f"localhost:{port}", "--processes", str(options.processes), "--process"]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        # Every start compiles, which takes most of the time: use little optimisation.
        "XLA_FLAGS": " ".join(
            [
                os.environ.get("XLA_FLAGS", ""),
                f"--xla_force_host_platform_device_count={options.devices}",
                "--xla_backend_optimization_level=0",
            ]
        ).strip(),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return [
        subprocess.Popen(
            [*command, str(i)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        for i in range(options.processes)
    ]


def disturb(workdir: Path, options: argparse.Namespace, moments: random.Random, kill: int) -> None:
    """Start the run, and kill it at start-up or after some steps."""
    processes = start(workdir, options)
    victim = moments.randrange(options.processes)
    number = moments.choice([signal.SIGKILL, signal.SIGTERM])
    before = recorded(workdir)
    most = (options.steps - before) // (options.kills - kill + 1)
    if moments.random() < 0.3:
        time.sleep(moments.uniform(0, 10))
    else:
        wanted = before + moments.randint(1, max(1, most))
        wait(lambda: recorded(workdir) >= wanted or any(p.poll() is not None for p in processes))
        time.sleep(moments.uniform(0, 0.1))
    processes[victim].send_signal(number)
    if number == signal.SIGTERM:
        # Before training has begun there is nothing to save, and SIGTERM ends the process at once.
        time.sleep(2)
        while any(p.poll() is None for p in processes) and not any(p.poll() == -signal.SIGTERM for p in processes):
            time.sleep(0.1)
    for process in processes:
        if process.poll() is None:
            process.kill()
    statuses = []
    for process in processes:
        _, err = process.communicate()
        statuses.append(process.returncode)
        if process.returncode not in (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGABRT, RESTART):
            sys.exit(f"process {len(statuses) - 1} ended with status {process.returncode}:\n{err}")
    step = recorded(workdir)
    print(f"{kill + 1}: {number.name} to process {victim} at step {step}; statuses {statuses}", flush=True)


def recorded(workdir: Path) -> int:
    """Return the last step in the metrics; 0 without metrics."""
    records = metrics.read(workdir)
    return int(records[-1]["step"]) if records else 0


def wait(condition) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"nothing has happened for {PATIENCE} s")
        time.sleep(0.002)


def finish(processes: list[subprocess.Popen]) -> None:
    """Wait until all processes have ended with status 0."""
    for process in processes:
        _, err = process.communicate(timeout=PATIENCE)
        if process.returncode != DONE:
            sys.exit(f"ended with status {process.returncode}:\n{err}")


def compare(workdir: Path, undisturbed: Path) -> None:
    """Check that two runs have the same bits in their last checkpoint and in their recorded losses."""
    (step, state), (expected_step, expected) = final_state(workdir), final_state(undisturbed)
    assert step == expected_step, (step, expected_step)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    curves = [[(r["step"], r["loss"], r["grad_norm"]) for r in metrics.read(run)] for run in (workdir, undisturbed)]
    assert curves[0] == curves[1], "the records differ"
    assert [number for number, _, _ in curves[0]] == list(range(1, step + 1))


def final_state(workdir: Path):
    """Return step and state of the newest checkpoint, on the host."""
    config = config_lib.from_json(workdir / "config.json")
    run = build_program(config, sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1]))
    checkpoints = Checkpoints(workdir, read_only=True)
    step = checkpoints.latest_step()
    assert step is not None, f"{workdir}: no checkpoint"
    state = jax.device_get(checkpoints.restore(step, run.abstract_state))
    checkpoints.close()
    return step, state


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
