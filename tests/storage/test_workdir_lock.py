"""Test the lock of a workdir: which commands are refused, which take over, and that the last holder notices."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time

import pytest
from fake_gcs import FakeGCS, printed

from ttt_jax.config import ConfigError
from ttt_jax.storage import lock_file, workdir_lock
from ttt_jax.storage.workdir_lock import LockLostError, WorkdirLock

HOLD = """
import os, sys, time
from ttt_jax.storage.workdir_lock import WorkdirLock
lock = WorkdirLock(sys.argv[1], "ttt train").acquire()
{then}
print(f"held {{os.getpid()}}\\n", end="", flush=True)  # in one write, with or without buffers
time.sleep(60)
"""


@pytest.fixture
def start():
    """Return ``start(folder, then)``: it starts a process that takes the lock of a folder and runs a line of Python."""
    started = []

    def run(folder, then="", environment=None):
        line = [sys.executable, "-c", HOLD.format(then=then), str(folder)]
        started.append(subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment))
        assert started[-1].stdout.readline().startswith("held")
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def no_locks(monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(workdir_lock, "_EVERY", 0.1)
    monkeypatch.setattr(workdir_lock, "_GRACE", 0.1)
    monkeypatch.setattr(lock_file, "_SETTLES", 0.02)


def elsewhere(**changes):
    """Return the record of a process on another machine."""
    about = {"command": "ttt train", "host": "elsewhere", "pid": 7, "machine": "another", "id": "x", "every": 0.1}
    return json.dumps({**about, "since": "2026-01-01 00:00:00 UTC", "time": time.time(), **changes})


def test_a_second_command_is_refused_until_the_first_has_ended(tmp_path, quick):
    folder = tmp_path / "run"
    with WorkdirLock(folder, "ttt train"):
        record = json.loads((folder / "running.json").read_text())
        who = f"ttt train (process {os.getpid()} on {record['host']}, since {record['since']}) is at work there"
        with pytest.raises(ConfigError) as refused:
            WorkdirLock(folder, "ttt eval").acquire()
        assert str(refused.value) == (
            f"--workdir {folder}: {who}; expected its end first. Once it has died, the same command takes over (from "
            "another machine after 0 s without a sign of life); to take over from one that hangs, delete "
            f"{folder / 'running.json'}"
        )
        with WorkdirLock(folder, "ttt eval", name=".other.running"):
            pass
    assert not folder.exists()  # it was made for the lock, and is empty


def test_a_killed_holder_is_replaced_at_once_although_its_child_lives(tmp_path, start):
    then = "child = os.fork()\nif child == 0: lock.release(); "
    then += "print('child\\n', end='', flush=True); time.sleep(30); os._exit(0)"
    line = [sys.executable, "-W", "ignore", "-c", HOLD.format(then=then), str(tmp_path)]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert {process.stdout.readline().split()[0], process.stdout.readline().split()[0]} == {"held", "child"}
        assert str(process.pid) in (tmp_path / "running.json").read_text()  # the child did not release it
        process.kill()
        process.wait()
        began = time.monotonic()
        with WorkdirLock(tmp_path, "ttt train"):
            assert time.monotonic() - began < 0.5
    finally:
        os.killpg(process.pid, 9)


def test_a_holder_on_another_machine_is_respected_while_it_gives_signs_of_life(tmp_path, quick, capsys):
    file, end = tmp_path / "running.json", threading.Event()

    def live():
        while not end.wait(0.05):
            file.write_text(elsewhere())

    file.write_text(elsewhere())
    thread = threading.Thread(target=live)
    thread.start()
    try:
        message = r"ttt train \(process 7 on elsewhere, since 2026-01-01 00:00:00 UTC\) is at work there"
        with pytest.raises(ConfigError, match=message):
            WorkdirLock(tmp_path, "ttt train").acquire()
    finally:
        end.set()
        thread.join()
    capsys.readouterr()
    began = time.monotonic()
    with WorkdirLock(tmp_path, "ttt train"):
        assert 0.3 <= time.monotonic() - began < 2
    who = "ttt train (process 7 on elsewhere, since 2026-01-01 00:00:00 UTC)"
    assert capsys.readouterr().err.splitlines() == [
        f"ttt train: {tmp_path}: waits up to 0 s for a sign of life of {who}",
        f"ttt train: {tmp_path}: takes over from {who}, which has given no sign of life",
    ]


@pytest.mark.parametrize("content", ["", "no JSON", "[1]", elsewhere(time=time.time() - 1000), elsewhere(time=0)])
def test_old_and_damaged_records_are_replaced_at_once(tmp_path, content):
    (tmp_path / "running.json").write_text(content)
    began = time.monotonic()
    with WorkdirLock(tmp_path, "ttt train"):
        assert time.monotonic() - began < 0.5


@pytest.mark.parametrize("damage", ["replaced", "deleted"])
def test_a_replaced_holder_notices_and_does_not_release_the_lock_of_the_other(tmp_path, quick, damage):
    file = tmp_path / "running.json"
    lock = WorkdirLock(tmp_path, "ttt train").acquire()
    lock.check()
    file.unlink()
    if damage == "replaced":
        file.write_text(elsewhere(command="ttt eval"))
    deadline = time.monotonic() + 5
    while not lock.lost:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    who = "ttt eval (process 7 on elsewhere, since 2026-01-01 00:00:00 UTC)" if damage == "replaced" else "another"
    with pytest.raises(LockLostError) as lost:
        lock.check()
    assert str(lost.value).startswith(f"--workdir {tmp_path}: {who}")
    assert str(lost.value).endswith("stopped without writing on")
    lock.release()
    assert file.exists() == (damage == "replaced")


def test_on_a_file_system_without_locks_the_record_alone_counts(tmp_path, quick, no_locks, start, capsys):
    process = start(tmp_path)
    with pytest.raises(ConfigError, match=rf"ttt train \(process {process.pid} on "):
        WorkdirLock(tmp_path, "ttt train").acquire()
    process.kill()
    process.wait()
    capsys.readouterr()
    began = time.monotonic()
    with WorkdirLock(tmp_path, "ttt sweep") as lock:
        assert time.monotonic() - began < 0.5
        lock.check()
    assert not (tmp_path / "running.json").exists()
    assert capsys.readouterr().err == (
        f"ttt sweep: {tmp_path}: its file system has no locks (No locks available); other commands know by the signs "
        "of life in running.json alone that this one works there\n"
    )


def test_one_of_two_commands_at_once_gets_a_lock_without_kernel_locks(tmp_path, quick, no_locks):
    locks = [WorkdirLock(tmp_path, f"ttt {i}") for i in range(2)]
    outcomes, gate = [], threading.Barrier(2)

    def run(lock):
        gate.wait()
        try:
            outcomes.append(lock.acquire())
        except ConfigError:
            outcomes.append(None)

    threads = [threading.Thread(target=run, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    held = [lock for lock in outcomes if lock is not None]
    assert len(held) == 1
    held[0].check()
    held[0].release()


def test_a_read_only_folder_is_used_without_a_lock(tmp_path, monkeypatch, capsys):
    def open_file(*arguments):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", open_file)
    with WorkdirLock(tmp_path, "ttt train") as lock:
        lock.check()
    message = f"ttt train: {tmp_path}: cannot be written to (Read-only file system); continues without a lock\n"
    assert capsys.readouterr().err == message


def test_a_lock_outlives_storage_that_fails_for_a_while(tmp_path, monkeypatch):
    with WorkdirLock(tmp_path, "ttt train") as lock:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", lambda *arguments: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
            lock.check()
            assert not lock.lost
        lock.check()


IN_A_BUCKET = """
import json, sys, time
from ttt_jax.storage import workdir_lock
from ttt_jax.config import ConfigError
from ttt_jax.storage.workdir_lock import LockLostError, WorkdirLock
workdir_lock._EVERY_BUCKET = 0.2
url = "gs://bucket/run"
lock = WorkdirLock(url, "ttt train")
"""


@pytest.mark.slow
def test_a_bucket_is_locked_by_the_generation_of_an_object():
    with FakeGCS() as gcs:
        held = IN_A_BUCKET + "lock.acquire(); lock.check(); print('held', flush=True); time.sleep(60)"
        first = gcs.start("-c", held)
        assert first.stdout.readline() == "held\n"
        uploads = gcs.of("upload")
        assert uploads[0].query["ifGenerationMatch"] == "0"  # created only if it does not exist
        assert uploads[1].query["ifGenerationMatch"] == "1001"
        second = gcs.start("-c", IN_A_BUCKET + "try: lock.acquire()\nexcept ConfigError as error: print(error)")
        assert f"--workdir gs://bucket/run: ttt train (process {first.pid} on " in printed(second)
        first.kill()
        first.communicate()
        record = json.loads(gcs.objects["bucket/run/running.json"])

        # A dead holder on this machine is replaced at once; a record of another machine is watched first.
        took = "began = time.monotonic(); lock.acquire(); lock.release(); print(time.monotonic() - began)"
        assert float(printed(gcs.start("-c", IN_A_BUCKET + took))) < 0.5
        assert not gcs.files("bucket/run")
        gcs.objects["bucket/run/running.json"] = json.dumps({**record, "machine": "another"}).encode()
        assert 0.5 < float(printed(gcs.start("-c", IN_A_BUCKET + took))) < 3
        assert not gcs.files("bucket/run")


@pytest.mark.slow
def test_in_a_bucket_a_replaced_holder_notices_and_a_lost_answer_does_no_harm():
    with FakeGCS() as gcs:
        lost = [True]
        gcs.lost = lambda request: (
            request.verb == "upload" and bool(lost) and lost.pop()
        )  # written, but answered with 503
        wait = "\nwhile not lock.lost: time.sleep(0.02)\n"
        check = "try: lock.check()\nexcept LockLostError as error: print(error)\nlock.release()"
        process = gcs.start(
            "-c", IN_A_BUCKET + "lock.acquire(); lock.check(); print('held', flush=True)" + wait + check
        )
        assert process.stdout.readline() == "held\n"
        assert not lost
        other = elsewhere(command="ttt train")
        gcs.objects["bucket/run/running.json"] = other.encode()
        gcs._generations["bucket/run/running.json"] += 5
        message = (
            "--workdir gs://bucket/run: ttt train (process 7 on elsewhere, since 2026-01-01 00:00:00 UTC) has taken it"
        )
        assert printed(process).startswith(message)
        assert gcs.files("bucket/run") == {"running.json": other.encode()}
