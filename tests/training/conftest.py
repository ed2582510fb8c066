"""Provide a run that is small enough to start, kill and resume many times."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "model.width": 32,
    "model.num_layers": 1,
    "model.num_heads": 2,
    "model.mlp_width": 48,
    "data.sequence_length": 64,
    "data.batch_size": 2,
    "optimizer.peak_lr": 4e-3,
    "training.duration": "24 steps",
    "checkpoint.every": "6 steps",
}


@pytest.fixture(scope="session")
def tiny_config():
    """Return ``tiny_config({key: value})``, which makes the config of a tiny run with changes."""
    from ttt_jax import config as config_lib

    def make(changes=None):
        config = config_lib.default()
        for key, value in {**TINY, **(changes or {})}.items():
            config_lib.set_value(config, key, value)
        config_lib.validate(config)
        return config

    return make


@pytest.fixture(scope="session")
def start_training():
    """Return ``start_training(workdir, {key: value})``, which starts a ``ttt train`` process of the tiny run."""

    def start(workdir, changes=None, *, devices=1, options=(), environment=os.environ, ttt=("-m", "ttt_jax")):
        values = {**TINY, **(changes or {})}
        command = [sys.executable, *ttt, "train", "--config", str(ROOT / "configs/quickstart.py")]
        command += ["--workdir", str(workdir), *(f"--config.{key}={value}" for key, value in values.items()), *options]
        environment = {
            **environment,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        }
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return start


@pytest.fixture(scope="session")
def start_processes(start_training):
    """Return ``start_processes(workdir, n, {key: value}, devices=d)``: n processes of one run, with d devices each.

    ``of_process`` holds other changes of single processes: ``{1: {key: value}}``. ``ttt`` is the program in ``tests``.
    """

    def start(
        workdir,
        processes,
        changes=None,
        *,
        devices=1,
        of_process=None,
        options=(),
        environment=os.environ,
        ttt="ttt_process.py",
    ):
        with socket.socket() as listener:
            listener.bind(("localhost", 0))
            port = listener.getsockname()[1]
        several = ["--coordinator", f"localhost:{port}", "--processes", str(processes)]
        return [
            start_training(
                workdir,
                {**(changes or {}), **(of_process or {}).get(process, {})},
                devices=devices,
                options=[*several, "--process", str(process), *options],
                environment=environment,
                ttt=[str(ROOT / "tests" / ttt)],
            )
            for process in range(processes)
        ]

    return start


@pytest.fixture(scope="session")
def finish():
    """Return ``finish(*processes)``: it waits until they end with a status, and returns all that they printed."""

    def wait(*processes, status=0, seconds=240):
        outputs = []
        for process in processes:
            try:
                out, err = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                for other in processes:
                    other.kill()
                raise
            assert process.returncode == status, err[-3000:]
            outputs.append(out + err)
        return "".join(outputs)

    return wait


@pytest.fixture(scope="session")
def final_state(load_script):
    """Return ``final_state(workdir)``: it returns step and state of the newest checkpoint, on the host."""
    return load_script("kill_test").final_state
