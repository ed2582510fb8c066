"""Check that stored arrays have exact values, do not depend on interruptions, and show any damage."""

import json

import corpus
import hypothesis
import numpy as np
import pytest
import tensorstore as ts
from hypothesis import strategies as st
from refusals import error_of

from ttt_jax.data.dataset import Array, ArrayWriter, check_layout
from ttt_jax.errors import DataError
from ttt_jax.storage.store import Store

SHARD, CHUNK = 64, 16


def values(length, dtype="uint16", seed=0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, length, dtype, endpoint=True)


def writer(folder, dtype="uint16", **where):
    return ArrayWriter(Store(folder), "train", dtype, shard=SHARD, chunk=CHUNK, **where)


def write(folder, array, pieces=1):
    """Write an array in pieces, and return its hash."""
    whole = writer(folder, array.dtype.name)
    for piece in np.array_split(array, pieces):
        whole.append(piece)
    return whole.finish()


def opened(folder):
    return Array({"driver": "zarr3", "kvstore": Store(folder).spec("train")}, "train")


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int64"])
@pytest.mark.parametrize("length", [0, 1, 16, 63, 64, 65, 128, 1000])
def test_another_reader_finds_the_values_and_the_layout(tmp_path, dtype, length):
    array = values(length, dtype)
    write(tmp_path, array, pieces=7)
    found = corpus.stored(tmp_path / "train")
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, array)

    shards = -(-length // SHARD)
    assert corpus.contents(tmp_path).keys() == {"train/zarr.json", *(f"train/c/{i}" for i in range(shards))}
    about = json.loads((tmp_path / "train/zarr.json").read_text())
    assert (about["zarr_format"], about["node_type"], about["shape"]) == (3, "array", [length])
    assert about["data_type"] == dtype
    assert about["chunk_grid"]["configuration"] == {"chunk_shape": [SHARD]}
    (sharding,) = about["codecs"]
    assert sharding["name"] == "sharding_indexed"
    assert sharding["configuration"]["chunk_shape"] == [CHUNK]
    assert [codec["name"] for codec in sharding["configuration"]["codecs"]] == ["bytes", "zstd", "crc32c"]
    assert [codec["name"] for codec in sharding["configuration"]["index_codecs"]] == ["bytes", "crc32c"]


def test_zeros_are_stored(tmp_path):
    """Check that zeros are written, so that a missing chunk is known to be lost."""
    write(tmp_path, np.zeros(100, np.uint16))
    assert {"train/c/0", "train/c/1"} < corpus.contents(tmp_path).keys()
    np.testing.assert_array_equal(opened(tmp_path)[0:100], np.zeros(100))


@hypothesis.given(
    pieces=st.lists(st.integers(0, 150), min_size=1, max_size=8),
    stops=st.sets(st.integers(0, 8)),
    lost=st.integers(0, 200),
)
@hypothesis.settings(max_examples=25)
def test_a_writer_that_was_stopped_anywhere_writes_the_same_bytes(new_folder, pieces, stops, lost):
    """Check a writer that is stopped after values beyond its last save, which are written again."""
    array = values(sum(pieces))
    expected, folder = new_folder(), new_folder()
    digest = write(expected, array)
    current, start = writer(folder), 0
    for i, size in enumerate(pieces):
        if i in stops:
            state, rest = current.state()
            current.append(array[start : start + lost])  # lost, as if it were killed here
            current._wait()
            current = writer(folder, rest=rest, **json.loads(json.dumps(state)))
            assert len(current) == start
        current.append(array[start : start + size])
        start += size
        assert len(current) == start
    assert current.finish() == digest
    assert corpus.contents(folder) == corpus.contents(expected)


def test_finishing_again_changes_nothing(tmp_path):
    """Check a run that was killed while it finished."""
    array = values(200)
    whole = writer(tmp_path)
    whole.append(array)
    state, rest = whole.state()
    digest = whole.finish()
    before = corpus.contents(tmp_path)
    assert whole.finish() == digest
    assert writer(tmp_path, rest=rest, **state).finish() == digest
    assert corpus.contents(tmp_path) == before


def test_shards_of_an_earlier_run_with_other_values_are_replaced(tmp_path):
    """Check a run that was killed after its last save, and whose remaining input was then mended."""
    other, array = tmp_path / "other", values(70)
    other.mkdir()
    write(other, array)
    leftover = writer(tmp_path)
    leftover.append(values(300, seed=1))
    leftover.state()
    write(tmp_path, array)
    assert corpus.contents(tmp_path / "train") == corpus.contents(other / "train")


def test_the_hash_depends_on_every_value(new_folder):
    array = values(130)
    hashes = {write(new_folder(), array)}
    for i in (0, 63, 64, 127, 128, 129):
        changed = array.copy()
        changed[i] ^= 1
        hashes.add(write(new_folder(), changed))
    hashes |= {write(new_folder(), array[:129]), write(new_folder(), array[:128]), write(new_folder(), array[::-1])}
    assert len(hashes) == 10
    assert write(new_folder(), array, pieces=9) == write(new_folder(), array)


def test_an_unfinished_array_cannot_be_opened(tmp_path):
    whole = writer(tmp_path)
    whole.append(values(300))
    whole.state()
    assert corpus.contents(tmp_path).keys() == {f"train/c/{i}" for i in range(4)}
    assert error_of(DataError, opened, tmp_path).startswith("cannot read train: ")
    whole.finish()
    np.testing.assert_array_equal(opened(tmp_path)[0:300], values(300))


def test_slices_return_the_values(tmp_path):
    array = values(300, "uint32")
    write(tmp_path, array)
    ours = opened(tmp_path)
    assert (len(ours), ours.dtype) == (300, np.uint32)
    for start, stop in ((0, 300), (5, 9), (60, 70), (299, 300), (7, 7)):
        np.testing.assert_array_equal(ours[start:stop], array[start:stop])


def test_reading_a_lost_shard_names_it(tmp_path):
    write(tmp_path, values(300))
    (tmp_path / "train/c/2").unlink()
    ours = opened(tmp_path)
    np.testing.assert_array_equal(ours[0:128], values(300)[:128])
    message = error_of(DataError, lambda: ours[100:200])
    assert message.startswith("cannot read train at offset 100: ")
    assert f"{tmp_path}/train/c/2" in message


def test_a_changed_byte_anywhere_in_a_file_is_detected(tmp_path):
    write(tmp_path, values(40))
    path = tmp_path / "train/c/0"
    content = path.read_bytes()
    for i in range(len(content)):
        path.write_bytes(content[:i] + bytes([content[i] ^ 0x10]) + content[i + 1 :])
        ours = opened(tmp_path)
        message = error_of(DataError, lambda ours=ours: ours[0:40])
        assert message.startswith("cannot read train at offset 0: ")
        assert str(path) in message
    for size in (0, 3, len(content) - 1):
        path.write_bytes(content[:size])
        ours = opened(tmp_path)
        assert str(path) in error_of(DataError, lambda ours=ours: ours[0:40])


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "train").write_text("mine")
    whole = writer(tmp_path)
    whole.append(values(64))
    message = error_of(DataError, whole.state)
    assert message.startswith(f"cannot write {tmp_path}/train: ")
    assert "Not a directory" in message


def test_only_integers_in_one_dimension_are_accepted(tmp_path):
    for dtype in ("uint8", "uint16", "uint32", "uint64", "int32", "int64"):
        check_layout(dtype, (3,), "x")
    assert error_of(DataError, check_layout, "float32", (3,), "x") == "x: holds float32; expected integers"
    assert error_of(DataError, check_layout, "uint16", (3, 1), "x") == "x: has shape [3, 1]; expected one dimension"
    kvstore = {"driver": "file", "path": f"{tmp_path}/train/"}
    ts.open({"driver": "zarr3", "kvstore": kvstore}, dtype=ts.float32, shape=[3], create=True).result()
    assert error_of(DataError, opened, tmp_path) == "train: holds float32; expected integers"
