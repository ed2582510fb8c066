"""Test that saves that fail are tried again, and what happens when they keep failing."""

import errno
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from small_checkpoints import abstract, check_restored, meta, names, state

from ttt_jax.config import ConfigError
from ttt_jax.errors import CheckpointError
from ttt_jax.storage import checksums
from ttt_jax.training import checkpoint, checkpoint_files
from ttt_jax.training.checkpoint import Checkpoints

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def broken_storage(monkeypatch):
    """Return ``broken_storage(n)``, after which the next n checkpoints cannot be completed."""
    write, left = checksums.write, [0]

    def fail(*arguments):
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        write(*arguments)

    monkeypatch.setattr(checksums, "write", fail)
    return lambda n: left.__setitem__(0, n)


def wait_until_save_is_wanted(checkpoints, step, seconds=20):
    deadline = time.monotonic() + seconds
    while not checkpoints.wants_save(step):
        assert time.monotonic() < deadline, "no save was wanted"
        time.sleep(0.001)
        step += 1
    return step


@pytest.mark.slow
def test_a_failed_save_is_tried_again_with_the_newer_state(tmp_path, broken_storage, capfd):
    checkpoints = Checkpoints(tmp_path, save_again_after=(0.2, 1.5, 9))
    checkpoints.finish(1, state(1), meta(1))
    broken_storage(2)
    began = time.monotonic()
    checkpoints.save(2, state(2), meta(2))
    step = wait_until_save_is_wanted(checkpoints, 3)
    assert 0.2 <= time.monotonic() - began < 1.5
    assert names(tmp_path) == ["1"]
    checkpoints.save(step, state(step), meta(step))
    checkpoints.wait()
    checkpoints.save(step + 1, state(step + 1), meta(step + 1))  # too early: does nothing
    checkpoints.wait()
    assert checkpoints.all_steps() == [1]
    step = wait_until_save_is_wanted(checkpoints, step + 2)
    assert time.monotonic() - began >= 1.7
    checkpoints.save(step, state(step), meta(step))
    checkpoints.wait()
    assert not checkpoints.wants_save(step + 1)
    assert names(tmp_path) == [str(step)]
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("cannot save")]
    assert lines[0] == (
        f"cannot save {tmp_path}/checkpoints/2: OSError: [Errno 5] Input/output error; trying again in 0.2 s"
    )
    assert [line.rsplit(" ", 2)[1] for line in lines] == ["0.2", "1.5"]
    check_restored(checkpoints.restore_newest(abstract()), step)
    checkpoints.close()


def test_the_last_save_is_tried_until_it_succeeds(tmp_path, broken_storage):
    checkpoints = Checkpoints(tmp_path, save_again_after=(0.01,))
    for step in (1, 2):  # each step has its own attempts
        broken_storage(1)
        checkpoints.finish(step, state(step), meta(step))
        assert names(tmp_path) == [str(step)]
    checkpoints.close()
    check_restored(Checkpoints(tmp_path).restore_newest(abstract()), 2)


@pytest.mark.slow
def test_the_final_error_names_the_newest_complete_checkpoint(tmp_path, broken_storage):
    checkpoints = Checkpoints(tmp_path, save_again_after=(0.01, 0.01))
    broken_storage(3)
    with pytest.raises(
        CheckpointError, match=r"gave up after 3 attempts. The newest complete checkpoint is none. Make"
    ):
        checkpoints.finish(1, state(1), meta(1))
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, save_again_after=(0.01, 0.01))
    checkpoints.finish(1, state(1), meta(1))
    broken_storage(3)
    with pytest.raises(CheckpointError) as error:
        checkpoints.finish(2, state(2), meta(2))
    assert str(error.value) == (
        f"cannot save {tmp_path}/checkpoints/2: OSError: [Errno 5] Input/output error; gave up after 3 attempts. The "
        f"newest complete checkpoint is {tmp_path}/checkpoints/1. Make room, or repair the storage, and run the same "
        "command again"
    )
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    check_restored(checkpoints.restore_newest(abstract()), 1)
    checkpoints.finish(2, state(2), meta(2))  # half-written files do not prevent it
    checkpoints.close()
    assert names(tmp_path) == ["2"]


def test_late_files_of_a_failed_save_are_removed(tmp_path, broken_storage, monkeypatch):
    late = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp" / "late"
    times = []

    def sleep(seconds):  # between two removals
        if len(times) < 2:
            assert not late.parent.exists()
            late.parent.mkdir()
            late.write_text("")
        times.append(seconds)

    monkeypatch.setattr(checkpoint_files, "time", types.SimpleNamespace(sleep=sleep))
    checkpoints = Checkpoints(tmp_path, save_again_after=())
    checkpoints.finish(1, state(1), meta(1))
    broken_storage(1)
    with pytest.raises(CheckpointError):
        checkpoints.finish(2, state(2), meta(2))
    assert len(times) == 3
    checkpoints.close()
    assert names(tmp_path) == ["1"]


def test_a_save_that_cannot_begin_is_reported(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where a folder should be")
    checkpoints = Checkpoints(tmp_path, save_again_after=(0.01,))
    with pytest.raises(CheckpointError, match=r"FileExistsError.*gave up after 2 attempts"):
        checkpoints.finish(1, state(1), meta(1))


@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_a_workdir_without_room_for_a_checkpoint_folder_is_refused(tmp_path, kind):
    folder = tmp_path / "checkpoints"
    checkpoint.check_folder(tmp_path)
    folder.write_text("") if kind == "file" else folder.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=f"^--workdir {tmp_path}: {folder} is not a folder that can be written to"):
        checkpoint.check_folder(tmp_path)


@pytest.fixture
def workdir(tmp_path):
    """Return a workdir with a checkpoint of step 3."""
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.finish(3, state(3), meta(3))
    checkpoints.close()
    return tmp_path / "run"


def test_an_existing_checkpoint_is_not_saved_again(workdir):
    checkpoints = Checkpoints(workdir)
    before = (workdir / "checkpoints" / "3").stat().st_ino
    checkpoints.finish(3, state(30), meta(30))
    checkpoints.close()
    assert (workdir / "checkpoints" / "3").stat().st_ino == before
    check_restored(Checkpoints(workdir).restore_newest(abstract()), 3)


FULL_DISK = """
import json, os, sys, time
import jax
jax.config.update("jax_platforms", "cpu")
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from small_checkpoints import abstract, meta, names, state
from ttt_jax.errors import CheckpointError
from ttt_jax.training.checkpoint import Checkpoints

disk = Path(sys.argv[1])
shape = (256, 256)

def fill():
    with open(disk / "filler", "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass

def large(seed):
    return state(seed, shape)

checkpoints = Checkpoints(disk, save_again_after=(0.05, 0.1, 0.1))
checkpoints.finish(1, large(1), meta(1))
fill()
checkpoints.save(2, large(2), meta(2))
step = 2
while not checkpoints.wants_save(step):
    time.sleep(0.001)
    step += 1
assert names(disk) == ["1"], names(disk)
os.remove(disk / "filler")
checkpoints.save(step, large(step), meta(step))
checkpoints.wait()
assert checkpoints.all_steps() == [step]
fill()
try:
    checkpoints.finish(step + 1, large(step + 1), meta(step + 1))
except CheckpointError as error:
    print(error)
checkpoints.close()
restored = Checkpoints(disk).restore_newest(abstract(shape))
assert restored.step == step and restored.meta == meta(step)
assert all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), restored.state, large(step))))
print(step, json.dumps(names(disk)))
"""


@pytest.mark.slow
def test_saves_on_a_full_disk_are_tried_again_and_reported(tmp_path, mount_namespace):
    """Save checkpoints of 250 kB on a disk of 700 kB."""
    (tmp_path / "disk").mkdir()
    script = 'mount -t tmpfs -o size=700k tmpfs "$1" && exec "$2" -c "$3" "$1" "$4"'
    arguments = [str(tmp_path / "disk"), sys.executable, FULL_DISK, str(Path(__file__).parent)]
    command = [*mount_namespace, "sh", "-c", script, "sh", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    gave_up, last = done.stdout.splitlines()
    step, left = last.split(" ", 1)
    assert "No space left on device" in gave_up
    assert f"The newest complete checkpoint is {tmp_path}/disk/checkpoints/{step}. Make room" in gave_up
    assert json.loads(left) == [step]
    reported = done.stderr.splitlines()
    assert len(reported) == 1 + 3
    assert all(line.startswith("cannot save") and "No space left on device" in line for line in reported)


LATE_FUTURE = """
import asyncio
import sys

import tensorstore as ts
from ttt_jax.training.checkpoint import Checkpoints

checkpoints = Checkpoints(sys.argv[1])
promise, future = ts.Promise.new()

async def wait():
    await future

async def main():
    asyncio.ensure_future(wait())
    await asyncio.sleep(0)

loop = asyncio.new_event_loop()
loop.run_until_complete(main())
loop.close()
promise.set_result(3)

class Bad:
    def __del__(self):
        raise RuntimeError("something else")

Bad()
"""


@pytest.mark.slow
def test_only_closed_event_loops_are_left_out_of_unraisable_errors(tmp_path):
    done = subprocess.run([sys.executable, "-c", LATE_FUTURE, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Event loop is closed" not in done.stderr
    assert "RuntimeError: something else" in done.stderr


def test_files_of_an_unknown_user_are_restored_and_deleted(tmp_path, workdir):
    try:
        for path in workdir.rglob("*"):
            os.chown(path, 54321, 54321)
    except PermissionError:
        pytest.skip("no right to give files to another user")
    checkpoints = Checkpoints(workdir)
    check_restored(checkpoints.restore_newest(abstract()), 3)
    checkpoints.finish(4, state(4), meta(4))
    checkpoints.close()
    assert names(workdir) == ["4"]
