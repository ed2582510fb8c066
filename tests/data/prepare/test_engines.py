"""Check that worker processes give what this process gives, and that all of them end."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import corpus
import numpy as np
import pytest

from ttt_jax.data.prepare import records, tokenize_units, tokenizer
from ttt_jax.data.prepare.tokenize import tokenize
from ttt_jax.data.prepare.tokenize_units import Job
from ttt_jax.errors import DataError
from ttt_jax.storage.store import Store

JOB = Job(tokenizer.byte(), 256, 257, validation_fraction=0.3, split_seed=1)
TEXTS = corpus.documents(60)


def units(file, unit_bytes=700):
    return [("train", unit) for _, unit, _ in records.units([file], records.Position(), unit_bytes, "text")]


def alive(pid):
    """Return whether a process runs and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children(pid):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            pass
    return found


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never became true"
        time.sleep(0.01)


@pytest.fixture
def file(tmp_path):
    return corpus.input_file(tmp_path / "a.jsonl", corpus.jsonl(TEXTS))


def test_parts_come_back_in_the_order_of_the_units_however_long_each_takes(file):
    """Check the order, and how many units are submitted at a time, with parts that are made by hand."""
    waiting, most, answered = [], [], []

    def submit(split, unit):
        waiting.append(unit)
        most.append(len(waiting))
        return unit

    def result(unit):
        waiting.remove(unit)
        answered.append(unit)
        return ("part of", unit)

    given = units(file)
    found = list(tokenize_units._in_order(iter(given), submit, result, 2))
    assert found == [(unit, ("part of", unit)) for _, unit in given]
    assert max(most) <= 5  # two for each of two workers, and the one that is being submitted


def test_processes_give_what_this_process_gives_and_end(tmp_path, file):
    before = set(children(os.getpid()))
    files = [file, corpus.input_file(tmp_path / "b.parquet", corpus.parquet_file(TEXTS[:20]))]
    options = {"shard": 512, "chunk": 64, "unit_bytes": 300}
    tokenize(files, JOB, Store(tmp_path / "here"), corpus.in_this_process, **options)
    tokenize(files, JOB, Store(tmp_path / "two"), tokenize_units.processes(2), **options)
    expected = corpus.contents(tmp_path / "here")
    assert corpus.contents(tmp_path / "two") == expected
    assert len(expected) > 10
    found = [corpus.stored(tmp_path / "two" / split) for split in ("train", "validation")]
    assert sum(map(len, found)) == sum(len(text.encode()) + 2 for text in TEXTS + TEXTS[:20])
    # The resource tracker of multiprocessing lives as long as this process.
    assert len(set(children(os.getpid())) - before) <= 1


def test_a_consumer_that_stops_early_stops_the_workers(file):
    before = set(children(os.getpid()))
    running = tokenize_units.processes(1)(JOB, units(file))
    first, part = next(running)
    assert first == units(file)[0][1]
    np.testing.assert_array_equal(part.pieces["train"].tokens[:1], [256])
    running.close()
    assert len(set(children(os.getpid())) - before) <= 1


def test_a_killed_worker_is_one_clear_line(file):
    """Kill a worker as the kernel does when memory runs out."""
    before = set(children(os.getpid()))
    running = tokenize_units.processes(1)(JOB, [*units(file)] * 50)
    next(running)
    spawned = [pid for pid in set(children(os.getpid())) - before if b"spawn_main" in _command(pid)]
    killer = threading.Timer(0.0, lambda: [os.kill(pid, signal.SIGKILL) for pid in spawned])
    killer.start()
    with pytest.raises(DataError) as caught:
        list(running)
    killer.join()
    assert len(spawned) == 1
    assert str(caught.value).startswith(
        "a worker process was killed, perhaps because memory ran out; the same command continues"
    )
    assert "\n" not in str(caught.value)


def _command(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes()


PARENT = """
import sys
sys.path.insert(0, sys.argv[1])
import itertools
from ttt_jax.data.prepare import records, tokenize_units, tokenizer
from ttt_jax.data.prepare.tokenize_units import Job
unit = records.Unit("values", ["a"], 1, None, records.Position(1))
for _ in tokenize_units.processes(2)(Job(tokenizer.byte(), 256, 257), itertools.repeat(("train", unit))):
    print("working", flush=True)
"""


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed():
    command = [sys.executable, "-c", PARENT, str(Path(corpus.__file__).parents[2])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "working\n"
        wait_for(lambda: sum(b"spawn_main" in _command(pid) for pid in children(parent.pid)) == 2)
        workers = children(parent.pid)
        parent.kill()
    assert all(pid != os.getpid() for pid in workers)
    wait_for(lambda: not any(alive(pid) for pid in workers), seconds=20)
