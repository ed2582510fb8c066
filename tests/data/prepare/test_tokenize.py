"""Compare datasets with reading the files and calling the tokenizer by hand."""

import hashlib
import json

import corpus
import numpy as np
import pytest
import tokenizers
from refusals import error_of
from tokenizers import models, pre_tokenizers

from ttt_jax.config import ConfigError
from ttt_jax.data import dataset
from ttt_jax.data.prepare import records, tokenizer
from ttt_jax.data.prepare.tokenize import tokenize
from ttt_jax.data.prepare.tokenize_units import Job
from ttt_jax.errors import DataError
from ttt_jax.storage import json_files
from ttt_jax.storage.store import Store

BYTE = tokenizer.byte()
SMALL = {"shard": 512, "chunk": 64, "unit_bytes": 900}
TRAIN, VALIDATION = corpus.documents(60), corpus.documents(7, seed=1)


@pytest.fixture
def files(tmp_path):
    """Return two train files and a validation file, of different formats."""
    return [
        corpus.input_file(tmp_path / "a.jsonl.zst", corpus.frames(corpus.jsonl(TRAIN[:35]))),
        corpus.input_file(tmp_path / "b.parquet", corpus.parquet_file(TRAIN[35:])),
        corpus.input_file(tmp_path / "c.jsonl", corpus.jsonl(VALIDATION), "validation"),
    ]


def make(folder, files, job=None, **options):
    return tokenize(files, job or Job(BYTE, 256, 257), Store(folder), corpus.in_this_process, **{**SMALL, **options})


def check_split(folder, split, rows):
    """Check that the arrays of a split hold these rows of tokens, and that dataset.json says so."""
    about = json_files.read_object(folder / "dataset.json")
    tokens, starts = corpus.stored(folder / split), corpus.stored(folder / about["splits"][split]["document_offsets"])
    np.testing.assert_array_equal(tokens, np.array([token for row in rows for token in row], np.uint32))
    np.testing.assert_array_equal(starts, np.cumsum([0, *map(len, rows)])[:-1])
    assert (tokens.dtype, starts.dtype) == (about["dtype"], np.int64)
    counts = about["splits"][split]
    assert (counts["tokens"], counts["documents"]) == (len(tokens), len(rows))


def as_bytes(texts):
    return [[256, *text.encode(), 257] for text in texts]


def refused(error, *arguments, **options):
    return error_of(error, make, *arguments, **options)


def test_a_dataset_of_bytes_equals_the_texts(tmp_path, files):
    folder = tmp_path / "out"
    about = make(folder, files)
    check_split(folder, "train", as_bytes(TRAIN))
    check_split(folder, "validation", as_bytes(VALIDATION))
    assert about == json_files.read_object(folder / "dataset.json")
    assert about["splits"].keys() == {"train", "validation"}
    assert about["splits"]["train"]["text_bytes"] == sum(len(text.encode()) for text in TRAIN)
    expected = {"format": "ttt_jax tokens", "version": 1, "vocab_size": 258, "bos": 256, "eos": 257, "dtype": "uint16"}
    assert about.items() >= {**expected, "skipped_records": 0, "text_key": "text"}.items()
    assert about["tokenizer"]["kind"] == "byte"
    assert about["files"] == [[file.split, file.location.rsplit("/", 1)[1], file.size] for file in files]
    shards = -(-sum(map(len, as_bytes(TRAIN))) // 512)
    assert shards > 5
    assert corpus.contents(folder).keys() == {
        *("dataset.json", "zarr.json", "train/zarr.json", "train_documents/zarr.json", "train_documents/c/0"),
        *(f"train/c/{i}" for i in range(shards)),
        *("validation/zarr.json", "validation_documents/zarr.json", "validation_documents/c/0"),
        *(f"validation/c/{i}" for i in range(-(-sum(map(len, as_bytes(VALIDATION))) // 512))),
    }
    assert json.loads((folder / "zarr.json").read_text())["node_type"] == "group"


@pytest.mark.parametrize(("highest", "dtype"), [(65_535, np.uint16), (65_536, np.uint32)])
def test_a_dataset_of_another_tokenizer_equals_what_the_library_gives(tmp_path, files, highest, dtype):
    vocabulary = {"the": 0, "river": highest, "[UNK]": 9, "<s>": 3, "</s>": highest - 1}
    words = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    chosen = tokenizer.load(str(tmp_path / "tokenizer.json"))
    folder = tmp_path / "out"
    about = make(folder, files, Job(chosen, chosen.bos, chosen.eos))
    assert (chosen.bos, chosen.eos, about["vocab_size"], about["dtype"]) == (
        3,
        highest - 1,
        highest + 1,
        dtype.__name__,
    )
    check_split(folder, "train", [[3, *words.encode(text).ids, highest - 1] for text in TRAIN])
    assert corpus.stored(folder / "train").max() == highest
    assert (folder / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    assert about["tokenizer"]["sha256"] == hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()


def test_the_size_of_units_does_not_change_a_byte(tmp_path, files):
    for unit_bytes in (1, 333, 1 << 22):
        make(tmp_path / f"{unit_bytes}", files, unit_bytes=unit_bytes, save_seconds=-1 if unit_bytes == 333 else 99)
    expected = corpus.contents(tmp_path / "333")
    assert corpus.contents(tmp_path / "1") == expected == corpus.contents(tmp_path / f"{1 << 22}")


def test_the_shards_do_not_change_the_tokens(tmp_path, files):
    for shard, chunk in ((64, 8), (102_400, 1024)):
        make(tmp_path / f"{shard}", files, shard=shard, chunk=chunk)
        check_split(tmp_path / f"{shard}", "train", as_bytes(TRAIN))
    fingerprints = [json.loads((tmp_path / s / "dataset.json").read_text())["splits"] for s in ("64", "102400")]
    assert fingerprints[0]["train"]["tokens"] == fingerprints[1]["train"]["tokens"]


def test_splits_by_hash_hold_every_document_once_and_copies_on_one_side(tmp_path):
    texts = [f"document {i % 300}" for i in range(600)]
    file = corpus.input_file(tmp_path / "a.jsonl", corpus.jsonl(texts))
    fractions = {"validation_fraction": 0.2, "test_fraction": 0.1}
    about = make(tmp_path / "out", [file], Job(BYTE, 256, 257, **fractions, split_seed=5))
    found = {}
    for split in ("train", "validation", "test"):
        tokens, starts = (corpus.stored(tmp_path / "out" / name) for name in (split, f"{split}_documents"))
        found[split] = [bytes(row[1:-1].astype(np.uint8)).decode() for row in np.split(tokens, starts[1:])]
        check_split(tmp_path / "out", split, as_bytes(found[split]))
        assert found[split] == [text for text in texts if text in set(found[split])]  # in order, with copies
    assert sorted(text for split in found.values() for text in split) == sorted(texts)
    assert 60 < len(found["validation"]) < 180
    assert 20 < len(found["test"]) < 100
    rule = {"by": "hash of each document", "seed": 5, "hash": "blake2b-64 of the text, salted with the seed"}
    assert about["split_rule"] == {**rule, **fractions}


def test_a_split_without_documents_is_an_empty_array(tmp_path):
    file = corpus.input_file(tmp_path / "a.jsonl", corpus.jsonl(["a", "b"]))
    about = make(tmp_path / "out", [file], Job(BYTE, 256, None, validation_fraction=1e-9))
    assert about["splits"]["validation"]["documents"] == 0
    check_split(tmp_path / "out", "validation", [])
    store = Store(tmp_path / "out")
    tokens, documents = dataset.open_split(store, dataset.read_description(store), "validation")
    assert (len(tokens), len(documents)) == (0, 0)


def test_progress_is_reported_up_to_the_totals(tmp_path, files):
    seen = []
    make(
        tmp_path / "out",
        files,
        progress=lambda now: seen.append((now.read, now.documents, now.tokens, now.text_bytes)),
    )
    assert seen == sorted(seen)
    assert len(seen) > 10
    total = sum(file.size for file in files)
    everything = TRAIN + VALIDATION
    size = sum(len(text.encode()) for text in everything)
    assert seen[-1] == (total, len(everything), size + 2 * len(everything), size)
    assert all(read <= total for read, *_ in seen)


def test_missing_and_misdescribed_splits_are_refused(tmp_path, files):
    make(tmp_path / "out", files)
    store = Store(tmp_path / "out")
    about = dataset.read_description(store)
    with pytest.raises(ConfigError, match=r"split test: .* has only train, validation$"):
        dataset.open_split(store, about, "test")
    about["splits"]["train"]["documents"] += 1
    with pytest.raises(DataError, match=r"train_documents: holds 60 int64, but dataset.json says 61 int64$"):
        dataset.open_split(store, about, "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "damaged: it is not JSON: "),
        ("[]", "describes no dataset; expected what ttt tokenize wrote"),
        ('{"format": "ttt_jax tokens", "version": 9}', "version 9; "),
    ],
)
def test_a_description_that_cannot_be_read_is_refused_and_kept(tmp_path, files, content, message):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/dataset.json").write_text(content)
    assert refused(DataError, tmp_path / "out", files).startswith(f"{tmp_path}/out/dataset.json: {message}")
    assert corpus.contents(tmp_path / "out") == {"dataset.json": content.encode()}


def test_input_without_a_readable_document_is_refused(tmp_path):
    file = corpus.input_file(tmp_path / "a.jsonl", b'{"text": 1}\n')
    for _ in range(2):
        message = refused(DataError, tmp_path / "out", [file], skip_problems=True)
        assert message.startswith(f"{tmp_path}/out: no document could be read; ")
        (problems,) = (tmp_path / "out/_unfinished/problems").iterdir()
        assert json.loads(problems.read_text())["problem"] == "'text' is a number; expected a string"


def test_units_are_read_lazily(tmp_path, files, monkeypatch):
    """Check that memory stays bounded: a unit is read only after the one before it was taken."""
    events = []
    read = records.units

    def noted(*arguments):
        for found in read(*arguments):
            events.append("read")
            yield found

    def one_at_a_time(job, units):
        for unit, part in corpus.in_this_process(job, units):
            events.append("taken")
            yield unit, part

    monkeypatch.setattr(records, "units", noted)
    tokenize(files, Job(BYTE, 256, 257), Store(tmp_path / "out"), one_at_a_time, **SMALL)
    assert len(events) > 20
    assert events == ["read", "taken"] * (len(events) // 2)
