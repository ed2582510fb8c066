"""Checkpoints in one process: what is damaged is passed over, and what fails is done again."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from ttt_jax import cli
from ttt_jax.config import ConfigError
from ttt_jax.errors import CheckpointError
from ttt_jax.training import checkpoint, checkpoint_writer, checksums
from ttt_jax.training.checkpoint import Checkpoints

ROOT = Path(__file__).resolve().parents[2]

# Of reads that fail together, Orbax collects one.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def state(seed, shape=(64, 32)):
    rng = np.random.default_rng(seed)
    params = {"kernel": rng.standard_normal(shape), "bias": rng.standard_normal(shape[1])}
    arrays = {"params": params, "step": np.array(seed)}
    return jax.tree.map(lambda x: jax.device_put(x.astype(np.int32 if x.ndim == 0 else np.float32)), arrays)


def abstract(shape=(64, 32)):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0, shape))


def meta(step):
    return {"data": {"next_batch": step}, "config": {"seed": 10}}


def check_restored(restored, step):
    assert restored is not None
    assert restored.step == step
    assert restored.meta == meta(step)
    jax.tree.map(np.testing.assert_array_equal, restored.state, state(step))


def names(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(workdir, keep_last=2)
    for step in (1, 2, 3):
        checkpoints.save(step, state(step), meta(step))
    checkpoints.close()
    assert names(workdir) == ["2", "3"]
    return workdir


@pytest.fixture
def workdir(tmp_path, saved):
    """Holds checkpoints of the steps 2 and 3."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(checkpoint, "_READ_AGAIN_AFTER", (0.0, 0.0))


# ---- Damage


def arrays(folder):
    """The file that holds the numbers."""
    return max((folder / "state" / "ocdbt.process_0" / "d").iterdir(), key=lambda path: path.stat().st_size)


def index(folder):
    """The file that tells where the numbers are."""
    (path,) = (folder / "state" / "d").iterdir()
    return path


FILES = {
    "arrays": arrays,
    "index": index,
    "manifest": lambda folder: folder / "state" / "manifest.ocdbt",
    "structure": lambda folder: folder / "state" / "_METADATA",
    "meta": lambda folder: folder / "meta" / "metadata",
}


def delete(path):
    path.unlink()


def halve(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)


def flip_a_digit(path):
    path.write_bytes(path.read_bytes().replace(b"10", b"11"))


def check_passed_over(workdir, capfd):
    """That the step before is restored, the damaged one is kept, and both steps can be saved again."""
    damaged = workdir / "checkpoints" / "3"
    before = {path.relative_to(damaged): path.read_bytes() for path in damaged.rglob("*") if path.is_file()}
    checkpoints = Checkpoints(workdir, keep_last=2)
    capfd.readouterr()
    check_restored(checkpoints.restore_newest(abstract()), 2)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith(str(workdir))]
    (line,) = lines
    assert line.startswith(f"{damaged} is damaged (")
    assert line.endswith(f"kept as damaged-3; going on with {workdir}/checkpoints/2")
    assert names(workdir) == ["2", "damaged-3"]
    aside = workdir / "checkpoints" / "damaged-3"
    assert {path.relative_to(aside): path.read_bytes() for path in aside.rglob("*") if path.is_file()} == before
    checkpoints.save(3, state(3), meta(3))
    check_restored(checkpoints.restore_newest(abstract()), 3)
    checkpoints.close()
    return line


@pytest.mark.parametrize("damage", [delete, halve, empty, flip_a_bit])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file(workdir, capfd, file, damage):
    path = FILES[file](workdir / "checkpoints" / "3")
    damage(path)
    line = check_passed_over(workdir, capfd)
    assert str(path.relative_to(workdir / "checkpoints" / "3")) in line
    assert {delete: "missing", flip_a_bit: "checksum"}.get(damage, "bytes instead of") in line


@pytest.mark.parametrize("damage", [delete, halve, empty])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_of_a_checkpoint_without_checksums(workdir, capfd, file, damage):
    folder = workdir / "checkpoints" / "3"
    (folder / checksums.NAME).unlink()
    damage(FILES[file](folder))
    if (file, damage) == ("structure", delete):  # Orbax does without
        check_restored(Checkpoints(workdir).restore_newest(abstract()), 3)
    else:
        check_passed_over(workdir, capfd)


def test_meta_that_is_still_json(workdir, capfd):
    flip_a_digit(workdir / "checkpoints" / "3" / "meta" / "metadata")
    assert "meta/metadata" in check_passed_over(workdir, capfd)


@pytest.mark.parametrize("lost", ["state", "meta", "state/d", "state/ocdbt.process_0", "."])
def test_a_lost_folder(workdir, capfd, lost):
    folder = workdir / "checkpoints" / "3" / lost
    shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)
    check_passed_over(workdir, capfd)


@pytest.mark.parametrize("damage", [halve, empty, flip_a_bit])
def test_damaged_checksums(workdir, capfd, damage):
    damage(workdir / "checkpoints" / "3" / checksums.NAME)
    check_passed_over(workdir, capfd)


@pytest.mark.parametrize("name", [checksums.NAME, "commit_success.txt", "_CHECKPOINT_METADATA"])
def test_files_that_a_checkpoint_can_do_without(workdir, name):
    (workdir / "checkpoints" / "3" / name).unlink()
    check_restored(Checkpoints(workdir).restore_newest(abstract()), 3)
    assert names(workdir) == ["2", "3"]


def test_what_was_kept_before_stays(workdir, capfd):
    for _ in range(2):
        checkpoints = Checkpoints(workdir, keep_last=2)
        flip_a_bit(arrays(workdir / "checkpoints" / "3"))
        check_restored(checkpoints.restore_newest(abstract()), 2)
        checkpoints.save(3, state(3), meta(3))
        checkpoints.close()
    assert names(workdir) == ["2", "3", "damaged-3", "damaged-3-2"]


def test_a_reader_changes_nothing(workdir, capfd):
    flip_a_bit(arrays(workdir / "checkpoints" / "3"))
    checkpoints = Checkpoints(workdir, read_only=True)
    check_restored(checkpoints.restore_newest(abstract()), 2)
    assert "3 is damaged (" in capfd.readouterr().err
    assert names(workdir) == ["2", "3"]
    with pytest.raises(CheckpointError, match=r"checkpoints/3: cannot be restored: state/.* is damaged"):
        checkpoints.restore_params(3, abstract()["params"])
    with pytest.raises(CheckpointError, match=r"checkpoints/3: cannot be restored"):
        checkpoints.restore(3, abstract())
    params = checkpoints.restore_params(2, abstract()["params"])
    jax.tree.map(np.testing.assert_array_equal, params, state(2)["params"])
    assert checkpoints.meta(2) == meta(2)


def test_all_damaged_is_one_error_and_nothing_is_moved(workdir):
    flip_a_bit(arrays(workdir / "checkpoints" / "2"))
    delete(FILES["meta"](workdir / "checkpoints" / "3"))
    with pytest.raises(CheckpointError) as error:
        Checkpoints(workdir).restore_newest(abstract())
    message = str(error.value)
    assert message.startswith(f"{workdir}/checkpoints: no checkpoint can be restored (3: meta/metadata is missing; 2: ")
    assert message.endswith("Bring back a good copy of one of them, or begin again in a new workdir")
    assert names(workdir) == ["2", "3"]


def test_a_run_whose_checkpoints_are_all_damaged_exits_with_1(tmp_path, capsys):
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    command = ["train", "--config", str(ROOT / "configs/quickstart.py"), "--workdir", str(tmp_path)]
    assert cli.main(command) == 1
    assert capsys.readouterr().err.startswith(f"ttt train: {tmp_path}/checkpoints: no checkpoint can be restored (5: ")


def test_no_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new")
    assert checkpoints.restore_newest(abstract()) is None
    assert checkpoints.latest_step() is None
    assert not (tmp_path / "new").exists()


def test_a_state_of_other_shapes_is_no_damage(workdir):
    with pytest.raises(CheckpointError, match=r"checkpoints/3: cannot be restored: ValueError: .*\(32, 32\)"):
        Checkpoints(workdir).restore_newest(abstract((32, 32)))
    assert names(workdir) == ["2", "3"]


@pytest.mark.parametrize(("failures", "step"), [(2, 3), (3, 2)])
def test_reading_that_fails_is_tried_again(workdir, monkeypatch, failures, step):
    check, calls = checksums.first_difference, []

    def fail_at_first(folder, *share):
        calls.append(folder)
        if len(calls) <= failures:
            raise OSError(errno.EIO, "Input/output error")
        return check(folder, *share)

    monkeypatch.setattr(checksums, "first_difference", fail_at_first)
    check_restored(Checkpoints(workdir).restore_newest(abstract()), step)


# ---- Saves that fail


@pytest.fixture
def broken_storage(monkeypatch):
    """``broken_storage(n)``: the next n checkpoints cannot be written to their end."""
    write, left = checksums.write, [0]

    def fail(*arguments):
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        write(*arguments)

    monkeypatch.setattr(checksums, "write", fail)
    return lambda n: left.__setitem__(0, n)


def until_save_is_wanted(checkpoints, step, seconds=20):
    deadline = time.monotonic() + seconds
    while not checkpoints.wants_save(step):
        assert time.monotonic() < deadline, "no save was ever wanted"
        time.sleep(0.001)
        step += 1
    return step


@pytest.mark.slow
def test_a_save_that_fails_is_repeated_with_the_state_of_then(tmp_path, broken_storage, capfd):
    checkpoints = Checkpoints(tmp_path, save_again_after=(0.2, 1.5, 9))
    checkpoints.finish(1, state(1), meta(1))
    broken_storage(2)
    began = time.monotonic()
    checkpoints.save(2, state(2), meta(2))
    step = until_save_is_wanted(checkpoints, 3)
    assert 0.2 <= time.monotonic() - began < 1.5
    assert names(tmp_path) == ["1"]
    checkpoints.save(step, state(step), meta(step))
    checkpoints.wait()
    checkpoints.save(step + 1, state(step + 1), meta(step + 1))  # too early: nothing happens
    checkpoints.wait()
    assert checkpoints.all_steps() == [1]
    step = until_save_is_wanted(checkpoints, step + 2)
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


def test_the_last_save_is_repeated_until_it_succeeds(tmp_path, broken_storage):
    checkpoints = Checkpoints(tmp_path, save_again_after=(0.01, 0.01))
    for step in (1, 2):  # failures are counted anew
        broken_storage(2)
        checkpoints.finish(step, state(step), meta(step))
        assert names(tmp_path) == [str(step)]
    checkpoints.close()
    check_restored(Checkpoints(tmp_path).restore_newest(abstract()), 2)


@pytest.mark.slow
def test_giving_up_names_the_last_good_checkpoint(tmp_path, broken_storage):
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
    checkpoints.finish(2, state(2), meta(2))  # what was left half written, if a thread still was at it, is no obstacle
    checkpoints.close()
    assert names(tmp_path) == ["2"]


def test_files_that_come_late_into_a_save_that_failed_are_removed_too(tmp_path, broken_storage, monkeypatch):
    late = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp" / "late"
    times = []

    def sleep(seconds):  # between one look and the next
        if len(times) < 2:
            assert not late.parent.exists()
            late.parent.mkdir()
            late.write_text("")
        times.append(seconds)

    monkeypatch.setattr(checkpoint_writer, "time", types.SimpleNamespace(sleep=sleep))
    checkpoints = Checkpoints(tmp_path, save_again_after=())
    checkpoints.finish(1, state(1), meta(1))
    broken_storage(1)
    with pytest.raises(CheckpointError):
        checkpoints.finish(2, state(2), meta(2))
    assert len(times) == 3
    checkpoints.close()
    assert names(tmp_path) == ["1"]


def test_a_save_that_cannot_even_begin(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where a folder should be")
    checkpoints = Checkpoints(tmp_path, save_again_after=(0.01,))
    with pytest.raises(CheckpointError, match=r"FileExistsError.*gave up after 2 attempts"):
        checkpoints.finish(1, state(1), meta(1))


@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_a_place_where_no_save_can_succeed_is_refused_at_once(tmp_path, kind):
    folder = tmp_path / "checkpoints"
    checkpoint.check_folder(tmp_path)
    folder.write_text("") if kind == "file" else folder.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=f"^--workdir {tmp_path}: {folder} is no folder that can be written to"):
        checkpoint.check_folder(tmp_path)


def test_what_is_there_is_not_saved_again(workdir):
    checkpoints = Checkpoints(workdir, keep_last=2)
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
from test_checkpoint import Checkpoints, CheckpointError, abstract, check_restored, meta, names, state
from pathlib import Path

disk = Path(sys.argv[1])
shape = (256, 256)

def fill():
    with open(disk / "filler", "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass

def there(seed):
    return state(seed, shape)

checkpoints = Checkpoints(disk, save_again_after=(0.05, 0.1, 0.1))
checkpoints.finish(1, there(1), meta(1))
fill()
checkpoints.save(2, there(2), meta(2))
step = 2
while not checkpoints.wants_save(step):
    time.sleep(0.001)
    step += 1
assert names(disk) == ["1"], names(disk)
os.remove(disk / "filler")
checkpoints.save(step, there(step), meta(step))
checkpoints.wait()
assert checkpoints.all_steps() == [step]
fill()
try:
    checkpoints.finish(step + 1, there(step + 1), meta(step + 1))
except CheckpointError as error:
    print(error)
checkpoints.close()
restored = Checkpoints(disk).restore_newest(abstract(shape))
assert restored.step == step and restored.meta == meta(step)
assert all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), restored.state, there(step))))
print(step, json.dumps(names(disk)))
"""


@pytest.mark.slow
def test_a_full_disk(tmp_path, mount_namespace):
    """A disk of 700 kB; a checkpoint is 250 kB."""
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
    told = done.stderr.splitlines()
    assert len(told) == 1 + 3
    assert all(line.startswith("cannot save") and "No space left on device" in line for line in told)


LATE = """
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


def test_files_that_end_after_the_save_has_failed_are_not_told_of(tmp_path):
    done = subprocess.run([sys.executable, "-c", LATE, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Event loop is closed" not in done.stderr
    assert "RuntimeError: something else" in done.stderr


def test_files_of_a_user_whom_this_machine_does_not_know(tmp_path, workdir):
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
