"""Test checkpoints of two real processes, which must agree on what happened."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import checkpoint_process
import jax
import numpy as np
import pytest

from ttt_jax.storage import checksums
from ttt_jax.training.checkpoint import Checkpoints

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("checkpoint_process.py")


def run(scenario, workdir, before=((), ())):
    """Return what the scenario returned in each of two processes, and the lines on the standard error of each.

    ``before`` holds, for each process, the first words of its command.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pipe, devices = subprocess.PIPE, f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    processes = [
        subprocess.Popen(
            [*start, sys.executable, str(SCRIPT), str(index), "2", str(port), scenario, str(workdir)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": devices},
            stdout=pipe,
            stderr=pipe,
            text=True,
        )
        for index, start in enumerate(before)
    ]
    try:
        ended = [process.communicate(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(err for _, err in ended)
    ours = ("cannot save", str(workdir))
    errors = [[line for line in err.splitlines() if line.startswith(ours)] for _, err in ended]
    return [json.loads(out.splitlines()[-1]) for out, _ in ended], errors


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("saved") / "run"
    assert run("save", workdir) == ([[2, 3], [2, 3]], [[], []])
    return workdir


@pytest.fixture
def workdir(tmp_path, saved):
    return Path(shutil.copytree(saved, tmp_path / "run"))


def names(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def arrays_of_process_1(workdir):
    """Return the file that process 1 has written: the rows that lie on its devices."""
    files = (workdir / "checkpoints" / "3" / "state" / "ocdbt.process_1" / "d").iterdir()
    return max(files, key=lambda path: path.stat().st_size)


def test_one_process_restores_what_two_saved(workdir):
    numbers = checkpoint_process.numbers(3)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.device_put(0).sharding), numbers
    )
    restored = Checkpoints(workdir).restore_newest(abstract)
    assert (restored.step, restored.meta) == (3, {"next_batch": 3})
    jax.tree.map(np.testing.assert_array_equal, restored.state, numbers)


def test_two_processes_restore_what_two_saved_in_any_layout(workdir):
    assert run("restore", workdir) == ([[3, 3, 3]] * 2, [[], []])


def test_two_processes_restore_what_one_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.finish(3, jax.tree.map(jax.device_put, checkpoint_process.numbers(3)), {"next_batch": 3})
    checkpoints.close()
    assert run("restore", tmp_path) == ([[3, 3, 3]] * 2, [[], []])


@pytest.mark.parametrize("with_checksums", [True, False])
def test_damage_found_by_one_process_is_damage_for_both(workdir, with_checksums):
    """Check it without checksums too, where process 1 alone reads the file and fails."""
    path = arrays_of_process_1(workdir)
    if with_checksums:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        (workdir / "checkpoints" / "3" / checksums.NAME).unlink()
        path.unlink()
    steps, errors = run("restore", workdir)
    assert steps == [[2, 2, 3]] * 2
    assert names(workdir) == ["2", "3", "damaged-3"]
    (line,) = errors[0]
    assert line.startswith(f"{workdir}/checkpoints/3 is damaged (")
    assert line.endswith(f"kept as damaged-3; continuing with {workdir}/checkpoints/2")
    assert ("(process 1)" in line) or with_checksums
    assert errors[1] == []


def test_all_checkpoints_damaged_is_the_same_error_on_both(workdir):
    arrays_of_process_1(workdir).unlink()
    (workdir / "checkpoints" / "2" / "meta" / "metadata").write_text("{")
    messages, _ = run("restore_none", workdir)
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"{workdir}/checkpoints: no checkpoint can be restored (3: state/ocdbt.process_1/d/")
    assert "2: meta/metadata has 1 bytes instead of" in messages[0]
    assert names(workdir) == ["2", "3"]


def test_a_save_that_fails_on_one_process_fails_on_both(tmp_path, mount_namespace):
    workdir = tmp_path / "run"
    workdir.mkdir()
    mounted = [*mount_namespace, "sh", "-c", f'mount --bind "{workdir}" "{workdir}" && exec "$@"', "sh"]
    outcomes, errors = run("storage_fails_for_process_1", workdir, before=((), mounted))
    assert outcomes[0] == outcomes[1]
    (wanted,), steps, restored, message = outcomes[0]
    assert steps == [wanted]
    assert restored == wanted
    assert message.startswith(f"cannot save {workdir}/checkpoints/{10 * wanted}: ")
    assert (
        f"(process 1); gave up after 3 attempts. The newest complete checkpoint is {workdir}/checkpoints/{wanted}."
        in message
    )
    assert "Read-only file system" in message
    assert [line.split(": ")[0].rsplit("/", 1)[1] for line in errors[0]] == ["2"] + 2 * [str(10 * wanted)]
    assert errors[1] == []
    assert names(workdir) == [str(wanted)]
