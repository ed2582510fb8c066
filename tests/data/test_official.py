"""Check that the authors' datasets are read as they are.

The files of TTT-E2E are compared with the batches of its own code; folders have the layout that ttt-lm-jax writes."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from ttt_jax.config import ConfigError
from ttt_jax.data import named_sources, pipeline, sequences
from ttt_jax.errors import DataError

E2E = Path(__file__).parents[1] / "oracles" / "e2e"
LLAMA_2 = "tokenizer_name-meta-llama/Llama-2-7b-hf-val_ratio-0.0005-val_split_seed-2357-add_eos-True-detokenize-False"


@pytest.fixture(scope="module")
def expected():
    with np.load(E2E / "e2e_zarr_expected.npz") as file:
        return dict(file)


# ---- TTT-E2E


def e2e(version, split):
    return named_sources.load(str(E2E / version), split, vocab_size=97, bos=1)


@pytest.mark.parametrize("version", ["e2e_zarr", "e2e_zarr_v2"])
def test_e2e_tokens_are_read_as_they_are(version, expected):
    for split, name in (("train", "train_tokens"), ("validation", "val_tokens")):
        source = e2e(version, split)
        np.testing.assert_array_equal(source.tokens[0 : len(source.tokens)], expected[name])


@pytest.mark.parametrize("version", ["e2e_zarr", "e2e_zarr_v2"])
def test_e2e_validation_batches_equal_the_authors(version, expected):
    length, rows = int(expected["seq_len"]), int(expected["global_batch_size"])
    source = e2e(version, "validation")
    windows = sequences.windows(source, length, 10**9)
    found = [piece.batch for piece in sequences.pieces(source, windows, piece_length=length, batch_size=rows)]
    assert len(found) == expected["val_num_batches"]
    for name, theirs in (("inputs", "input_ids"), ("targets", "target_tokens"), ("mask", "loss_masks")):
        np.testing.assert_array_equal([batch[name] for batch in found[:2]], expected[f"val_{theirs}"])


def test_e2e_training_batches_equal_the_authors_in_order(expected):
    """Compare the windows of two epochs, row by row, with the authors' loader and seed 0."""
    length, order = int(expected["seq_len"]), expected["train_seed0_source_index_2epochs"]
    source = e2e("e2e_zarr", "train")
    assert source.windows(length) == expected["source_len"]
    batches = pipeline.train_batches(source, sequence_length=length, batch_size=4, seed=0)
    for indices, batch in zip(order, batches, strict=False):
        np.testing.assert_array_equal(batch["inputs"], [source.window(i, length)["inputs"] for i in indices])


def test_e2e_training_batches_of_two_hosts_equal_the_authors(expected):
    length = int(expected["seq_len"])
    source = e2e("e2e_zarr", "train")
    for host, order in enumerate(expected["train_seed0_shard_source_index"]):
        batches = pipeline.train_batches(
            source, sequence_length=length, batch_size=4, seed=0, rows=[2 * host, 2 * host + 1]
        )
        for indices, batch in zip(order, batches, strict=False):
            np.testing.assert_array_equal(batch["inputs"], [source.window(i, length)["inputs"] for i in indices])


def test_e2e_bos_is_llama_3s_unless_the_config_says_otherwise():
    assert named_sources.load(str(E2E / "e2e_zarr"), "train").bos == 128000
    assert named_sources.load(str(E2E / "e2e_zarr"), "train", bos=1).bos == 1


def test_a_token_outside_the_vocabulary_of_the_model_is_an_error(expected):
    source = named_sources.load(str(E2E / "e2e_zarr"), "train", vocab_size=90)
    place = int(np.flatnonzero(expected["train_tokens"] >= 90)[0])
    with pytest.raises(DataError, match=rf"e2e_zarr/train: token \d+ at offset {place}; expected ids below .* of 90"):
        source.window(0, len(expected["train_tokens"]) - 1)


@pytest.mark.parametrize(("version", "chunk"), [("e2e_zarr", "c/2"), ("e2e_zarr_v2", "2")])
def test_a_missing_chunk_is_an_error_where_it_is_read(tmp_path, version, chunk):
    shutil.copytree(E2E / version, tmp_path / version)
    (tmp_path / version / "train" / chunk).unlink()
    source = named_sources.load(str(tmp_path / version), "train", vocab_size=97)
    source.window(0, 8191)
    with pytest.raises(DataError, match=r"cannot read .*/train at offset 8192: .*missing"):
        source.window(1, 8192)


def test_a_missing_split_is_refused():
    with pytest.raises(ConfigError, match="no test tokens there"):
        named_sources.load(str(E2E / "e2e_zarr"), "test")


# ---- ttt-lm-jax


@pytest.fixture
def npy(tmp_path):
    """Return ``npy(folder, **splits)``, which writes .npy files as the authors' code does, and returns their root."""

    def make(folder="", **splits):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for split, tokens in splits.items():
            np.save(tmp_path / folder / f"{split}.npy", tokens)
        return str(tmp_path)

    return make


@pytest.mark.parametrize("folder", ["", LLAMA_2])
@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_npy_files_are_read_as_they_are(npy, folder, dtype):
    rng = np.random.default_rng(0)
    splits = {split: rng.integers(0, 32000, 1000).astype(dtype) for split in ("train", "validation", "test")}
    splits["train"][[0, 5, 40]] = 1
    path = npy(folder, **splits)
    for split, tokens in splits.items():
        source = named_sources.load(path, split, vocab_size=32000)
        assert (len(source.tokens), source.vocab_size, source.bos) == (1000, 32000, 1)
        np.testing.assert_array_equal(source.tokens[0:1000], tokens)
        np.testing.assert_array_equal(source.tokens[990:2000], tokens[990:])
        window = source.window(1, 20)
        np.testing.assert_array_equal(window["inputs"], tokens[20:40])
        np.testing.assert_array_equal(window["targets"], tokens[21:41])
        np.testing.assert_array_equal(window["mask"], tokens[21:41] != 1)


def test_the_nested_folder_names_the_tokenizer(npy):
    path = npy(LLAMA_2, train=np.zeros(9, np.uint16))
    assert named_sources.load(path, "train", tokenizer="meta-llama/Llama-2-7b-hf").tokenizer == (
        "meta-llama/Llama-2-7b-hf",
    )
    with pytest.raises(ConfigError, match=r"data.tokenizer='byte': .*/train.npy was made by meta-llama/Llama-2-7b-hf"):
        named_sources.load(path, "train", tokenizer="byte")


def test_a_nested_folder_of_another_tokenizer_has_no_bos(npy):
    path = npy(LLAMA_2.replace("meta-llama/Llama-2-7b-hf", "gpt2"), train=np.full(9, 50256, np.uint16))
    source = named_sources.load(path, "train", vocab_size=50257)
    assert (source.vocab_size, source.bos, source.tokenizer) == (50257, None, ("gpt2",))
    assert source.window(0, 4)["mask"].all()  # no BOS, so every target counts, as in the authors' code
    assert named_sources.load(path, "train", vocab_size=50257, bos=50256).window(0, 4)["mask"].tolist() == [0] * 4


def test_folders_of_several_tokenizers_are_refused(npy):
    npy(LLAMA_2, train=np.zeros(9, np.uint16))
    path = npy(LLAMA_2.replace("meta-llama/Llama-2-7b-hf", "gpt2"), train=np.zeros(9, np.uint16))
    with pytest.raises(ConfigError, match=r"holds several datasets; expected one of .*gpt2.*"):
        named_sources.load(path, "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((3, 3), np.uint16), r"train.npy: has shape \[3, 3\]; expected one dimension"),
        (np.zeros(9, np.float32), "train.npy: holds float32; expected integers"),
        (np.array(["a"]), "train.npy: holds str32; expected integers"),
        (np.array([{}]), "train.npy: holds object; expected integers"),
    ],
)
def test_arrays_that_are_no_tokens_are_refused(npy, content, message):
    with pytest.raises(DataError, match=message):
        named_sources.load(npy(train=content), "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-1], "train.npy: is cut short; expected 500 tokens"),
        (lambda content: content[:40], "train.npy: not a .npy file: "),
        (lambda content: b"", "train.npy: not a .npy file: "),
        (lambda content: b"PK" + content, "train.npy: not a .npy file: "),
    ],
)
def test_a_damaged_npy_file_is_refused(npy, tmp_path, change, message):
    path = npy(train=np.arange(500, dtype=np.uint16))
    content = (tmp_path / "train.npy").read_bytes()
    (tmp_path / "train.npy").write_bytes(change(content))
    with pytest.raises(DataError, match=message):
        named_sources.load(path, "train")


def test_negative_tokens_are_an_error(npy):
    source = named_sources.load(npy(train=np.array([3, 4, -1, 5], np.int32)), "train")
    with pytest.raises(DataError, match="token -1 at offset 2"):
        source.window(0, 3)
