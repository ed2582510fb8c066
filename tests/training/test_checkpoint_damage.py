"""Test that damaged checkpoints are passed over and kept."""

import errno
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from small_checkpoints import abstract, check_restored, meta, names, state

from ttt_jax import cli
from ttt_jax.errors import CheckpointError
from ttt_jax.storage import checksums
from ttt_jax.training import checkpoint_files
from ttt_jax.training.checkpoint import Checkpoints

ROOT = Path(__file__).resolve().parents[2]

# Where several reads fail together, Orbax awaits only one of them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


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
    """Return a workdir with checkpoints of steps 2 and 3."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(checkpoint_files, "_READ_AGAIN_AFTER", (0.0, 0.0))


def arrays(folder):
    """Return the file that holds the numbers."""
    return max((folder / "state" / "ocdbt.process_0" / "d").iterdir(), key=lambda path: path.stat().st_size)


def index(folder):
    """Return the file that says where the numbers are."""
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
    """Check that step 2 is restored, step 3 is kept under another name, and step 3 can be saved again."""
    damaged = workdir / "checkpoints" / "3"
    before = {path.relative_to(damaged): path.read_bytes() for path in damaged.rglob("*") if path.is_file()}
    checkpoints = Checkpoints(workdir, keep_last=2)
    capfd.readouterr()
    check_restored(checkpoints.restore_newest(abstract()), 2)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith(str(workdir))]
    (line,) = lines
    assert line.startswith(f"{damaged} is damaged (")
    assert line.endswith(f"kept as damaged-3; continuing with {workdir}/checkpoints/2")
    assert names(workdir) == ["2", "damaged-3"]
    aside = workdir / "checkpoints" / "damaged-3"
    assert {path.relative_to(aside): path.read_bytes() for path in aside.rglob("*") if path.is_file()} == before
    checkpoints.save(3, state(3), meta(3))
    check_restored(checkpoints.restore_newest(abstract()), 3)
    checkpoints.close()
    return line


@pytest.mark.parametrize(
    "damage", [delete, flip_a_bit, *(pytest.param(each, marks=pytest.mark.slow) for each in (halve, empty))]
)
@pytest.mark.parametrize("file", FILES)
def test_a_checkpoint_with_a_damaged_file_is_passed_over(workdir, capfd, file, damage):
    path = FILES[file](workdir / "checkpoints" / "3")
    damage(path)
    line = check_passed_over(workdir, capfd)
    assert str(path.relative_to(workdir / "checkpoints" / "3")) in line
    assert {delete: "missing", flip_a_bit: "checksum"}.get(damage, "bytes instead of") in line


@pytest.mark.slow
@pytest.mark.parametrize("damage", [delete, halve, empty])
@pytest.mark.parametrize("file", FILES)
def test_damage_is_found_without_checksums(workdir, capfd, file, damage):
    folder = workdir / "checkpoints" / "3"
    (folder / checksums.NAME).unlink()
    damage(FILES[file](folder))
    if (file, damage) == ("structure", delete):  # Orbax does not need it
        check_restored(Checkpoints(workdir).restore_newest(abstract()), 3)
    else:
        check_passed_over(workdir, capfd)


def test_damaged_meta_that_is_still_json_is_passed_over(workdir, capfd):
    flip_a_digit(workdir / "checkpoints" / "3" / "meta" / "metadata")
    assert "meta/metadata" in check_passed_over(workdir, capfd)


@pytest.mark.parametrize(
    "lost",
    [
        "state",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("meta", "state/d", "state/ocdbt.process_0", ".")),
    ],
)
def test_a_checkpoint_with_a_lost_folder_is_passed_over(workdir, capfd, lost):
    folder = workdir / "checkpoints" / "3" / lost
    shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)
    check_passed_over(workdir, capfd)


@pytest.mark.parametrize("damage", [halve, empty, flip_a_bit])
def test_a_checkpoint_with_damaged_checksums_is_passed_over(workdir, capfd, damage):
    damage(workdir / "checkpoints" / "3" / checksums.NAME)
    check_passed_over(workdir, capfd)


@pytest.mark.parametrize("name", [checksums.NAME, "commit_success.txt", "_CHECKPOINT_METADATA"])
def test_a_checkpoint_is_restored_without_files_that_it_does_not_need(workdir, name):
    (workdir / "checkpoints" / "3" / name).unlink()
    check_restored(Checkpoints(workdir).restore_newest(abstract()), 3)
    assert names(workdir) == ["2", "3"]


def test_an_earlier_damaged_checkpoint_is_not_replaced(workdir, capfd):
    for _ in range(2):
        checkpoints = Checkpoints(workdir, keep_last=2)
        flip_a_bit(arrays(workdir / "checkpoints" / "3"))
        check_restored(checkpoints.restore_newest(abstract()), 2)
        checkpoints.save(3, state(3), meta(3))
        checkpoints.close()
    assert names(workdir) == ["2", "3", "damaged-3", "damaged-3-2"]


def test_read_only_restoring_changes_no_files(workdir, capfd):
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


def test_all_checkpoints_damaged_is_one_error_and_none_is_renamed(workdir):
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
    small = ["--config.model.num_layers=1", "--config.model.width=8", "--config.model.num_heads=2"]
    command = ["train", "--config", f"{ROOT}/configs/quickstart.py:attention", *small, "--workdir", str(tmp_path)]
    assert cli.main(command) == 1
    assert capsys.readouterr().err.startswith(f"ttt train: {tmp_path}/checkpoints: no checkpoint can be restored (5: ")


def test_restoring_without_checkpoints_returns_none(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new")
    assert checkpoints.restore_newest(abstract()) is None
    assert checkpoints.latest_step() is None
    assert not (tmp_path / "new").exists()


def test_a_state_of_other_shapes_is_not_damage(workdir):
    with pytest.raises(CheckpointError, match=r"checkpoints/3: cannot be restored: ValueError: .*\(32, 32\)"):
        Checkpoints(workdir).restore_newest(abstract((32, 32)))
    assert names(workdir) == ["2", "3"]


@pytest.mark.parametrize(("failures", "step"), [(2, 3), (3, 2)])
def test_failed_reads_are_tried_again(workdir, monkeypatch, failures, step):
    check, calls = checksums.first_difference, []

    def fail_at_first(folder, *share):
        calls.append(folder)
        if len(calls) <= failures:
            raise OSError(errno.EIO, "Input/output error")
        return check(folder, *share)

    monkeypatch.setattr(checksums, "first_difference", fail_at_first)
    check_restored(Checkpoints(workdir).restore_newest(abstract()), step)
