"""Run in real processes that are killed at any moment, or run out of disk space."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import corpus
import pytest

ROOT = Path(corpus.__file__).parents[2]
# Tokenize as ``ttt tokenize`` does, with units so small that a few kB are hundreds of them, and a save after each.
PROGRAM = """
import sys
from ttt_jax.data.prepare import listing, tokenize_units, tokenizer
from ttt_jax.errors import DataError
from ttt_jax.data.prepare.tokenize_units import Job
from ttt_jax.storage.store import Store
from ttt_jax.data.prepare.tokenize import tokenize

output, fraction, *patterns = sys.argv[1:]
job = Job(tokenizer.byte(), 256, 257, validation_fraction=float(fraction), split_seed=1)
options = dict(skip_problems=True, unit_bytes=400, save_seconds=-1.0, shard=2048, chunk=256)
try:
    tokenize(listing.find("train", patterns), job, Store(output), tokenize_units.processes(2), **options)
except DataError as error:
    sys.exit(f"ttt tokenize: {error}")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder of three files with bad records, of three formats."""
    folder = tmp_path_factory.mktemp("input")
    lines = corpus.jsonl(corpus.documents(300)).splitlines(keepends=True)
    for i in range(0, 300, 17):
        lines.insert(i, b'{"text": null}\n')
    corpus.input_file(folder / "a.jsonl.zst", corpus.frames(b"".join(lines), 3000))
    texts = [*corpus.documents(100, seed=1), None, *corpus.documents(20, seed=2)]
    corpus.input_file(folder / "b.parquet", corpus.parquet_file(texts))
    corpus.input_file(folder / "c.json", json.dumps([{"text": text} for text in texts]).encode())
    return folder


def start(output, folder, fraction=0.2):
    command = [sys.executable, "-c", PROGRAM, str(output), str(fraction), str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err


def saves(output):
    """Return how often the run has saved its state."""
    try:
        return json.loads((output / "_unfinished/state.json").read_text())["generation"]
    except FileNotFoundError:
        return 0


@pytest.mark.slow
def test_a_run_killed_many_times_ends_with_the_bytes_of_an_undisturbed_run(tmp_path, folder):
    rng, output, begun = random.Random(0), tmp_path / "out", []
    while True:
        process = start(output, folder)
        before = saves(output)
        begun.append(before)
        wanted, pause = before + rng.randrange(1, 30), rng.random() * 0.01
        while process.poll() is None and saves(output) < wanted:
            time.sleep(0.001)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
    assert len(begun) > 4  # runs
    assert begun == sorted(set(begun)), "every run continued where the one before it was"
    undisturbed = tmp_path / "undisturbed"
    finish(start(undisturbed, folder))
    assert corpus.contents(output) == corpus.contents(undisturbed)
    check_problems(corpus.contents(output))


def check_problems(undisturbed):
    """Check that the problems of the files are listed once each."""
    problems = [json.loads(line) for line in undisturbed["problems.jsonl"].splitlines()]
    found = [(problem["file"].rsplit("/", 1)[1], problem["record"]) for problem in problems]
    expected = [("a.jsonl.zst", i + 1) for i in range(0, 300, 17)] + [("b.parquet", 101), ("c.json", 101)]
    assert found == expected
    about = json.loads(undisturbed["dataset.json"])
    assert about["skipped_records"] == len(expected)
    assert sum(split["documents"] for split in about["splits"].values()) == 300 + 2 * 120


# ---- A full disk

SMALL_DISK = """
set -e
mount -t tmpfs -o size=128k tmpfs "$1"
status=0
python -c "$3" "$1/out" 0 "$2" || status=$?
test $status = 1
echo "left" $1/out/* >&2
mount -o remount,size=16m "$1"
python -c "$3" "$1/out" 0 "$2"
cp -r "$1/out" "$4"
"""


@pytest.mark.slow
def test_a_full_disk_is_one_clear_line_and_the_run_continues_with_more_space(tmp_path, folder, mount_namespace):
    """Run on a disk of 128 kB, which grows."""
    (tmp_path / "disk").mkdir()
    places = [str(tmp_path / "disk"), str(folder), PROGRAM, str(tmp_path / "copy")]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [*mount_namespace, "sh", "-c", SMALL_DISK, "sh", *places]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    message, left, *others = done.stderr.splitlines()
    assert message.startswith(f"ttt tokenize: cannot write {tmp_path}/disk/out/")
    assert "No space left on device" in message
    assert message.endswith("; free some space and run the same command again")
    assert "_unfinished" in left
    assert "dataset.json" not in left
    assert others == []

    finish(start(tmp_path / "expected", folder, fraction=0))
    assert corpus.contents(tmp_path / "copy") == corpus.contents(tmp_path / "expected")
