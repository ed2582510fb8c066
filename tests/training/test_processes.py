"""Test the numbers of runs of several real processes, which communicate by gloo on CPUs, and the ways they end."""

import functools
import signal
import socket
import time

import numpy as np
import pytest

from ttt_jax.data import named_sources, pipeline
from ttt_jax.terminal.stopping import FAILED, REFUSED, RESTART
from ttt_jax.training import loop, metrics

pytestmark = pytest.mark.slow

RUN = {
    "data.batch_size": 8,
    "data.sequence_length": 32,
    "model.mlp_width": 64,
    "model.vocab_size": 264,
    "training.duration": "20 steps",
    "checkpoint.every": "100%",
    # A learning rate that is large enough to show, and does not depend on the duration.
    "optimizer.peak_lr": 0.005,
    "optimizer.end_lr": 0.005,
    "optimizer.warmup": "4 steps",
}
FOREVER = {**RUN, "training.duration": "100000 steps", "checkpoint.every": "50 steps"}


def mesh(data, fsdp, tensor):
    return {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor}


def assert_same_curves(actual, desired, steps=20):
    """Check that two runs have the same losses, up to the order of sums in float32."""

    def curve(workdir, name):
        return np.array([record[name] for record in metrics.read(workdir)])

    assert list(curve(actual, "step")) == list(curve(desired, "step")) == list(range(1, steps + 1))
    loss = curve(desired, "loss")
    assert loss[0] - loss[-1] > 0.5  # the run has learned
    np.testing.assert_allclose(curve(actual, "loss"), loss, rtol=1e-5)
    np.testing.assert_allclose(curve(actual, "grad_norm"), curve(desired, "grad_norm"), rtol=2e-5)


def wait_for_steps(workdir, steps, *processes, seconds=120):
    deadline = time.monotonic() + seconds
    while not (workdir / "metrics.jsonl").exists() or len(metrics.read(workdir)) < steps:
        assert all(process.poll() is None for process in processes), [p.communicate() for p in processes]
        assert time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.01)


# ---- Numbers


@pytest.fixture(scope="module")
def one_device(tmp_path_factory, tiny_config):
    """Return ``one_device(mixer)``: the workdir of 20 steps on one device, in this process."""

    @functools.cache
    def train(mixer):
        workdir = tmp_path_factory.mktemp("one") / mixer
        loop.train(tiny_config({**RUN, "model.mixer": mixer}), workdir)
        return workdir

    return train


def test_two_processes_of_four_devices_give_the_losses_of_one_device(tmp_path, one_device, start_processes, finish):
    """Train TTT-MLP, of which every mesh axis splits something. The other mixers are in test_sharding.py."""
    changes = {**RUN, "model.mixer": "ttt_mlp", **mesh(2, 2, 2)}
    finish(*start_processes(tmp_path / "two", 2, changes, devices=4))
    assert_same_curves(tmp_path / "two", one_device("ttt_mlp"))


def test_resuming_on_any_mesh_and_number_of_processes(tmp_path, one_device, start_training, start_processes, finish):
    """Continue on 8 devices, 2 processes of 2 devices, and 4 devices: losses differ by the order of sums alone."""
    workdir = tmp_path / "moving"
    parts = [
        (6, lambda c: [start_training(workdir, {**c, **mesh(4, 2, 1)}, devices=8)]),
        (13, lambda c: start_processes(workdir, 2, {**c, **mesh(2, 1, 2)}, devices=2)),
        (20, lambda c: [start_training(workdir, {**c, **mesh(1, 4, 1)}, devices=4)]),
    ]
    for steps, start in parts:
        finish(*start({**RUN, "training.duration": f"{steps} steps"}))
        assert [record["step"] for record in metrics.read(workdir)] == list(range(1, steps + 1))
    assert_same_curves(workdir, one_device("ttt_linear"))


# ---- Ways to end


def test_sigterm_to_any_process_saves_at_a_step_that_all_agree_on(
    tmp_path, start_processes, tiny_config, finish, final_state
):
    workdir = tmp_path / "run"
    processes = start_processes(workdir, 2, FOREVER)
    wait_for_steps(workdir, 10, *processes)
    processes[1].send_signal(signal.SIGTERM)
    printed = finish(*processes, status=RESTART, seconds=60)
    step, _ = final_state(workdir)
    assert f"stopped by SIGTERM; saved at step {step} of 100000" in printed
    assert metrics.read(workdir)[-1]["step"] == step

    # The run continues there, on one device.
    loop.train(tiny_config({**FOREVER, "training.duration": f"{step + 5} steps"}), workdir)
    assert [record["step"] for record in metrics.read(workdir)] == list(range(1, step + 6))


def test_processes_with_other_configs_are_refused(tmp_path, start_processes, finish):
    of_process = {0: {"seed": 7}, 1: {"optimizer.peak_lr": 0.5}}
    processes = start_processes(tmp_path / "run", 2, RUN, of_process=of_process)
    printed = finish(*processes, status=REFUSED, seconds=60)
    listed = "config.optimizer.peak_lr 0.005 there, 0.5 here, config.seed 7 there, 0 here"
    assert printed.count(f"differs from process 0 on {socket.gethostname()}: {listed}; expected the same") == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_whose_peer_does_not_come_reports_it_and_ends(tmp_path, start_processes, finish, index):
    processes = start_processes(tmp_path / "run", 2, RUN, options=["--start-limit", "3"])
    processes[1 - index].kill()
    processes[1 - index].communicate()
    began = time.monotonic()
    printed = finish(processes[index], status=RESTART, seconds=60)
    assert time.monotonic() - began < 30
    assert f"ttt: process {index} of 2 on " in printed
    assert "not all processes came to localhost:" in printed
    assert "within 3 s" in printed


def test_a_stalled_step_is_reported_and_ended(tmp_path, start_processes):
    workdir = tmp_path / "run"
    processes = start_processes(workdir, 2, {**FOREVER, "training.stall_limit": 4})
    wait_for_steps(workdir, 10, *processes)
    processes[1].send_signal(signal.SIGSTOP)
    _, err = processes[0].communicate(timeout=60)
    processes[1].kill()
    processes[1].communicate()
    assert processes[0].returncode == RESTART
    assert "ttt train: process 0 of 2 on " in err
    last = metrics.read(workdir)[-1]["step"]
    assert f"has been in step {last + 1} for 4 s" in err
    assert "s; stopped, and to be started again (training.stall_limit sets the limit)" in err
    assert "loop.py" in err  # the traceback shows where it hung


def test_a_batch_that_one_process_cannot_read_stops_all_at_one_step(tmp_path, start_processes, finish, final_state):
    """Put a bad token into a row that process 1 alone reads."""
    tokens = np.random.default_rng(0).integers(1, 256, 32 * 400 + 1).astype(np.uint16)
    folder = tmp_path / "data"
    folder.mkdir()
    np.save(folder / "train.npy", tokens)
    batches = pipeline.train_batches(
        named_sources.load(str(folder), "train", vocab_size=264), sequence_length=32, batch_size=8, seed=0
    )
    window = [next(batches) for _ in range(7)][6]["inputs"][6]
    place = next(i for i in range(0, len(tokens), 32) if np.array_equal(tokens[i : i + 32], window)) + 5
    tokens[place] = 999
    np.save(folder / "train.npy", tokens)

    processes = start_processes(tmp_path / "run", 2, {**FOREVER, "data.source": folder})
    printed = finish(*processes, status=FAILED, seconds=120)
    assert printed.count("the run is saved at step 6: run the same command once this is mended") == 2
    assert f"token 999 at offset {place}" in printed
    assert final_state(tmp_path / "run")[0] == 6
