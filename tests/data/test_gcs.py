"""Write and read datasets under gs://, with a local stand-in for Google's server (fake_gcs.py).

TensorStore looks for credentials once in a process, so every test reads and writes buckets in processes of its own.
"""

import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import corpus
import numpy as np
import pytest
import tensorstore as ts
from fake_gcs import FakeGCS, files_in, printed

from ttt_jax.data.prepare import listing, tokenize, tokenizer
from ttt_jax.data.prepare.tokenize_units import Job
from ttt_jax.storage.store import Store

AUTHORS = Path(__file__).parents[1] / "oracles" / "e2e"
BOS, EOS = 256, 257
SHARD, CHUNK = 16384, 1024
INDEX = 16 * (SHARD // CHUNK) + 4  # bytes at the end of a shard: offset and size of each chunk, and a checksum
METADATA = "/computeMetadata/v1/instance/service-accounts/default/"  # asked on any machine

TOKENIZE = """
import sys
from ttt_jax.data.prepare import listing, tokenize, tokenize_units, tokenizer
from ttt_jax.storage.store import Store
def here(work, units):
    for split, unit in units:
        yield unit, tokenize_units.tokenize_unit(work, split, unit)
source, output, fraction, unit, shard, chunk = sys.argv[1:]
work = tokenize_units.Job(tokenizer.byte(), 256, 257, validation_fraction=float(fraction))
tokenize.tokenize(listing.find("train", [source]), work, Store(output), here, skip_problems=True,
                  unit_bytes=int(unit), shard=int(shard), chunk=int(chunk), save_seconds=0)
"""
# Each argument names a folder, an array in it, and the first and the last entry to read.
READ = """
import json, sys
from ttt_jax import errors
from ttt_jax.data import dataset
from ttt_jax.storage import store
for argument in sys.argv[1:]:
    location, name, start, stop = argument.split(" ")
    try:
        folder = store.Store(location)
        found = dataset.open_split(folder, dataset.read_description(folder), "train")
        array = dict(zip(["tokens", "documents"], found))[name]
        print(json.dumps([len(array), str(array.dtype), array[int(start) : int(stop)].tolist()]))
    except errors.DataError as error:
        print(error)
"""
# Each argument names a folder.
LOAD = """
import json, sys
from ttt_jax.data import named_sources
for folder in sys.argv[1:]:
    for split in ("train", "validation"):
        source = named_sources.load(folder, split, vocab_size=1000)
        windows = [source.window(i, 300) for i in range(source.windows(300))]
        row = [token for window in windows for token in window["inputs"].tolist()]
        print(json.dumps([source.name, source.vocab_size, source.bos, len(source.tokens), row, source.fingerprint()]))
"""


@pytest.fixture
def gcs():
    with FakeGCS() as server:
        yield server


def documents(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return ["".join(chr(draw.randrange(32, 127)) for _ in range(draw.randrange(400))) for _ in range(count)]


def jsonl(path: Path, texts: list[str], broken: int = 0) -> Path:
    """Write a file of documents; every ``broken``-th line is not JSON."""
    lines = [json.dumps({"text": text}) for text in texts]
    path.write_text("\n".join('{"tex' if broken and i % broken == 0 else line for i, line in enumerate(lines)))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a local dataset of several shards, and its tokens."""
    folder, texts = tmp_path_factory.mktemp("made"), documents(220)
    files, job = listing.find("train", [str(jsonl(folder / "source.jsonl", texts))]), Job(tokenizer.byte(), BOS, EOS)
    tokenize.tokenize(files, job, Store(folder / "dataset"), corpus.in_this_process, shard=SHARD, chunk=CHUNK)
    tokens = [token for text in texts for token in (BOS, *text.encode(), EOS)]
    assert 2 * SHARD + 900 < len(tokens) < 3 * SHARD
    return folder / "dataset", tokens


# ---- Writing


@pytest.mark.slow
def test_the_command_makes_the_same_files_in_a_bucket_as_in_a_folder(gcs, tmp_path):
    source, place = jsonl(tmp_path / "source.jsonl", documents(120)), "gs://bucket/data/a folder"
    gcs.page = 2  # names per page, so that TensorStore must ask for further pages
    options = ["--train", source, "--validation-fraction", 0.2, "--train-bpe", 300, "--workers", 1]
    local = gcs.start("-m", "ttt_jax", "tokenize", *options, "--output", tmp_path / "local")
    cloud = gcs.start("-m", "ttt_jax", "tokenize", *options, "--output", place)
    output = printed(local).replace(str(tmp_path / "local"), place)
    assert printed(cloud) == output
    expected = files_in(tmp_path / "local")
    assert {"dataset.json", "tokenizer.json", "train/zarr.json", "train/c/0", "validation/c/0"} < set(expected)
    assert gcs.files("bucket/data/a folder") == expected
    assert len(gcs.objects) == len(expected)  # and nothing elsewhere
    assert any("pageToken" in request.query for request in gcs.of("list"))
    assert {request.target for request in gcs.of("other")} == {METADATA}

    asked = len(gcs.requests)
    assert printed(gcs.start("-m", "ttt_jax", "tokenize", *options, "--output", place)) == output
    written = [request for request in gcs.requests[asked:] if request.verb not in ("other", "get", "list")]
    assert {request.verb for request in written} == {"upload", "delete"}  # only the lock is written
    assert all("running.json" in request.target for request in written)


@pytest.mark.slow
def test_runs_that_are_killed_end_with_the_same_bytes(gcs, tmp_path):
    source = jsonl(tmp_path / "source.jsonl", documents(60), broken=7)
    options = [0.2, 1500, 2048, 256]
    printed(gcs.start("-c", TOKENIZE, source, tmp_path / "local", *options))
    expected = files_in(tmp_path / "local")
    gcs.page = 2
    ends = [  # verb, end of the name, and whether the request is carried out although the process is dead
        ("upload", "_unfinished/problems/3", True),
        ("upload", "_unfinished/state.json", False),
        ("upload", "train/c/1", False),
        ("delete", "/train", False),
        ("upload", "validation/zarr.json", True),
        ("upload", "/dataset.json", True),
        ("delete", "_unfinished/state.json", False),
    ]
    whole, nothing = 0, gcs.fault
    for verb, end, done in ends:
        running = []

        def kills(request, verb=verb, end=end, running=running):
            if request.verb == verb and request.target.endswith(end):
                time.sleep(0.2)  # time in which a process that does not wait for the answer would continue
                os.kill(running[0].pid, signal.SIGKILL)
                return 503
            return None

        gcs.fault, gcs.lost = (nothing, kills) if done else (kills, nothing)
        running.append(gcs.start("-c", TOKENIZE, source, "gs://bucket/toy", *options))
        printed(running[0], -signal.SIGKILL)
        there = gcs.files("bucket/toy")
        assert any(name.startswith("_unfinished/") for name in there)
        if "dataset.json" in there:
            assert {name: x for name, x in there.items() if not name.startswith("_unfinished/")} == expected
            whole += 1
    assert whole == 2  # after the last two kills the dataset is complete

    gcs.fault, gcs.lost, asked = nothing, nothing, len(gcs.requests)
    printed(gcs.start("-c", TOKENIZE, source, "gs://bucket/toy", *options))
    assert gcs.files("bucket/toy") == expected
    assert "upload" not in {request.verb for request in gcs.requests[asked:]}


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_failed_requests_are_sent_again(gcs, tmp_path, made, times):
    """Run everything at once: TensorStore waits for seconds before it sends a request again, longer each time."""
    gcs.put(made[0], "bucket/made")
    source, asked = jsonl(tmp_path / "source.jsonl", documents(30)), Counter()
    failed = {("upload", "bucket/failed/train/c/1"), ("get", "bucket/made/train/c/1")}
    forgotten = {("upload", "bucket/forgotten/train_documents/c/0"), ("upload", "bucket/forgotten/train/zarr.json")}

    def fault(request):
        asked[request[:2]] += 1
        return 503 if request[:2] in failed and asked[request[:2]] <= times else None

    def lost(request):
        return request[:2] in forgotten and asked[request[:2]] == 1

    gcs.fault, gcs.lost = fault, lost
    options = [0, 1 << 20, 4096, 512]
    reading = gcs.start("-c", READ, f"gs://bucket/made tokens {SHARD} {SHARD + 5}")
    outputs = ["gs://bucket/failed", "gs://bucket/forgotten", tmp_path / "local"]
    writing = [gcs.start("-c", TOKENIZE, source, output, *options) for output in outputs]
    assert json.loads(printed(reading))[2] == made[1][SHARD : SHARD + 5]
    assert [printed(process) for process in writing] == [""] * 3
    assert gcs.files("bucket/failed") == gcs.files("bucket/forgotten") == files_in(tmp_path / "local")
    assert asked["upload", "bucket/failed/train/c/1"] == times + 1
    assert asked["get", "bucket/made/train/c/1"] == times + 2  # the index and a chunk
    assert min(asked[each] for each in forgotten) >= 2


@pytest.mark.parametrize(
    ("verb", "folder", "message"),
    [
        ("upload", "unwritable", "cannot lock gs://bucket/unwritable/running.json"),
        pytest.param("get", "unreadable", "cannot lock gs://bucket/unreadable/running.json", marks=pytest.mark.slow),
        pytest.param("upload", "some/train/c", "cannot write gs://bucket/some/train", marks=pytest.mark.slow),
    ],
)
def test_forbidden_requests_are_reported_in_one_line(gcs, tmp_path, verb, folder, message):
    source = jsonl(tmp_path / "source.jsonl", documents(30))
    gcs.fault = lambda request: 403 if request.verb == verb and f"/{folder}/" in request.target else None
    options = ["--train", source, "--tokenizer", "byte", "--workers", 1]
    process = gcs.start("-m", "ttt_jax", "tokenize", *options, "--output", f"gs://bucket/{folder.split('/')[0]}")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert "Traceback" not in err
    last = err.splitlines()[-1]  # the line before is TensorStore's, which finds no credentials
    assert last.startswith(f"ttt tokenize: {message}: PERMISSION_DENIED: ")
    assert "Permission denied" in last


# ---- Reading


def test_windows_are_read_by_byte_ranges(gcs, made):
    """Check that only the index of a shard and the needed chunks are read, and the values of a whole array."""
    folder, tokens = made
    windows = {  # tokens, and the first and the last of their chunks in each shard
        (3 * CHUNK + 7, 6 * CHUNK + 1): {0: (3, 6)},
        (SHARD, SHARD + 1): {1: (0, 0)},
        (2 * SHARD - 100, 2 * SHARD + 900): {1: (15, 15), 2: (0, 0)},
    }
    arguments = []
    for number, (start, stop) in enumerate(windows):
        gcs.put(folder, f"bucket/{number}")
        arguments.append(f"gs://bucket/{number} tokens {start} {stop}")
    gcs.put(folder, "bucket/made")
    starts = [i for i, token in enumerate(tokens) if token == BOS]
    whole = [f"gs://bucket/made tokens 0 {len(tokens)}", f"gs://bucket/made documents 0 {len(starts)}"]
    output = [json.loads(line) for line in printed(gcs.start("-c", READ, *arguments, *whole)).splitlines()]
    assert output == [
        *([len(tokens), "uint16", tokens[start:stop]] for start, stop in windows),
        [len(tokens), "uint16", tokens],
        [len(starts), "int64", starts],
    ]
    for number, chunks in enumerate(windows.values()):
        expected = []
        for shard, (first, last) in chunks.items():
            name = f"bucket/{number}/train/c/{shard}"
            index = np.frombuffer(gcs.objects[name][-INDEX:-4], "<u8").reshape(-1, 2)  # offset, size of each chunk
            expected += [(name, (-INDEX, None)), (name, (int(index[first, 0]), int(index[last].sum())))]
        read = [each for each in gcs.of("get", f"bucket/{number}/") if "/c/" in each.target]
        assert sorted((each.target, each.byte_range) for each in read) == expected


def test_lost_and_damaged_files_are_named(gcs, made):
    places = ["lost", "damaged", "cut"]
    for place in places:
        gcs.put(made[0], f"bucket/{place}")
    del gcs.objects["bucket/lost/train/c/1"], gcs.objects["bucket/cut/train/zarr.json"]
    shard = bytearray(gcs.objects["bucket/damaged/train/c/1"])
    shard[100] ^= 1
    gcs.objects["bucket/damaged/train/c/1"] = bytes(shard)
    arguments = [f"gs://bucket/{place} tokens {SHARD + 3} {SHARD + 9}" for place in places]
    lost, damaged, cut = printed(gcs.start("-c", READ, *arguments)).splitlines()
    assert lost.startswith(f"cannot read gs://bucket/lost/train at offset {SHARD + 3}: NOT_FOUND: ")
    assert "gs://bucket/lost/train/c/1 is missing" in lost
    assert damaged.startswith(f"cannot read gs://bucket/damaged/train at offset {SHARD + 3}: DATA_LOSS: ")
    assert "gs://bucket/damaged/train/c/1" in damaged
    assert cut.startswith("cannot read gs://bucket/cut/train: NOT_FOUND: ")


# ---- Other formats


def test_other_formats_are_read_as_from_a_folder(gcs, tmp_path):
    """Check the layouts of the authors' codes, and their own files, each in a folder of its own."""
    draw, tokens = np.random.default_rng(0), {}
    for layout in ("npy", "npy-of-a-tokenizer", "zarr3", "zarr"):
        folder = tmp_path / layout / ("tokenizer_name-toy-val_ratio-0.1" if "tokenizer" in layout else "")
        folder.mkdir(parents=True)
        for split, length in (("train", 5000), ("validation", 1300)):
            tokens[layout, split] = draw.integers(2, 999, length, np.uint32)
            if layout.startswith("npy"):
                np.save(folder / f"{split}.npy", tokens[layout, split])
                continue
            place = {"driver": "file", "path": str(folder / {"train": "train", "validation": "val"}[split])}
            spec = {"driver": layout, "kvstore": place, "create": True, "dtype": "uint32"}
            spec["schema"] = {"domain": {"shape": [length]}, "chunk_layout": {"chunk": {"shape": [700]}}}
            ts.open(spec).result()[:] = tokens[layout, split]
    for theirs in ("e2e_zarr", "e2e_zarr_v2"):
        shutil.copytree(AUTHORS / theirs, tmp_path / theirs)
    folders = [*dict.fromkeys(layout for layout, _ in tokens), "e2e_zarr", "e2e_zarr_v2"]
    gcs.put(tmp_path, "bucket/data")
    local, cloud = (
        gcs.start("-c", LOAD, *(f"{at}/{each}" for each in folders)) for at in (tmp_path, "gs://bucket/data")
    )
    output = printed(cloud)
    assert output == printed(local).replace(str(tmp_path), "gs://bucket/data")

    found = [json.loads(line) for line in output.splitlines()]
    for ((layout, _), row), (name, vocab_size, bos, length, read, _) in zip(tokens.items(), found, strict=False):
        assert name.startswith(f"gs://bucket/data/{layout}/")
        assert (vocab_size, length) == (1000, len(row))
        assert bos == {"npy": 1, "npy-of-a-tokenizer": None}.get(layout, 128000)
        assert read == row[: (len(row) - 1) // 300 * 300].tolist()
    names = [split[0].removeprefix("gs://bucket/data/") for split in found[len(tokens) :]]
    assert names == ["e2e_zarr/train", "e2e_zarr/val", "e2e_zarr_v2/train", "e2e_zarr_v2/val"]
    windows = [each for each in gcs.of("get") if each.target in gcs.objects and each.target.endswith(".npy")]
    assert windows
    assert all(each.byte_range for each in windows)  # never a whole file
