"""Check what ``data.source`` can name, and that everything else is refused."""

import hashlib
import json
import shlex
import shutil

import corpus
import numpy as np
import pytest
import tokenizers

from ttt_jax import config as config_lib
from ttt_jax.config import ConfigError
from ttt_jax.data import named_sources
from ttt_jax.data.prepare import listing, tokenize, tokenizer
from ttt_jax.data.prepare.tokenize_units import Job
from ttt_jax.errors import DataError
from ttt_jax.storage import json_files
from ttt_jax.storage.store import Store

TEXTS = ["First document.", "The second, which is longer: äöü.", "3"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a dataset of bytes in several shards and chunks, and its tokens."""
    folder = tmp_path_factory.mktemp("made")
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    job = Job(tokenizer.byte(), 256, 257)
    found = listing.find("train", [str(path)])
    tokenize.tokenize(found, job, Store(folder / "dataset"), corpus.in_this_process, shard=16, chunk=4)
    tokens = [token for text in TEXTS for token in (256, *text.encode(), 257)]
    return folder / "dataset", np.array(tokens)


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made[0], tmp_path / "copy")
    return tmp_path / "copy"


def test_a_dataset_is_read_as_it_was_written(made):
    path, tokens = made
    source = named_sources.load(str(path), "train")
    assert (source.name, source.vocab_size, source.bos, len(source.tokens)) == (f"{path}/train", 258, 256, len(tokens))
    np.testing.assert_array_equal(source.tokens[0 : len(tokens)], tokens)
    for start in range(0, len(tokens) - 10):
        np.testing.assert_array_equal(source.tokens[start : start + 10], tokens[start : start + 10])
    np.testing.assert_array_equal(source.tokens[20 : 10**6], tokens[20:])
    np.testing.assert_array_equal(source.documents[0 : 1 << 20], np.flatnonzero(tokens == 256))


def test_the_fingerprint_does_not_depend_on_the_location(made, copy):
    assert (
        named_sources.load(str(copy), "train").fingerprint() == named_sources.load(str(made[0]), "train").fingerprint()
    )
    assert len(named_sources.load(str(copy), "train").fingerprint()) == 32


def test_a_source_that_is_sent_to_a_process_reads_the_same_tokens(made, sent_to_a_process):
    source = sent_to_a_process(named_sources.load(str(made[0]), "train"))
    np.testing.assert_array_equal(source.window(1, 20)["inputs"], made[1][20:40])


def test_the_config_chooses_source_and_bos(made):
    config = config_lib.default()
    config.data.update(source=str(made[0]), bos=65, tokenizer="byte")
    source = named_sources.from_config(config, "train")
    assert (source.name, source.bos) == (f"{made[0]}/train", 65)


def test_bos_that_ends_documents_is_refused(made):
    with pytest.raises(ConfigError, match=r"^data\.bos=257: is the token that ends the documents of "):
        named_sources.load(str(made[0]), "train", bos=257)


def test_an_old_dataset_whose_bos_is_its_eos_is_still_read(tmp_path, made):
    folder = tmp_path / "dataset"
    shutil.copytree(made[0], folder)
    description = json_files.read_object(folder / "dataset.json")
    (folder / "dataset.json").write_text(json.dumps({**description, "bos": 257}))
    assert named_sources.load(str(folder), "train").bos == named_sources.load(str(folder), "train", bos=257).bos == 257


def test_the_tokenizer_of_a_dataset_has_its_bos_and_eos(made):
    found = named_sources.tokenizer_of(str(made[0]))
    assert (found.bos, found.eos) == (256, 257)


def test_the_tokenizer_may_be_given_by_kind_or_hash(made):
    sha256 = hashlib.sha256(b"byte").hexdigest()
    for name in ("", "byte", sha256, sha256[:8]):
        named_sources.load(str(made[0]), "train", tokenizer=name)


@pytest.mark.parametrize("name", ["my book.txt", "texts/a/b.jsonl"])
def test_text_is_refused_with_the_command_that_tokenizes_it(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("text")
    for location, what in ((path, "is a file"), (path.parent, "holds files of text")):
        with pytest.raises(ConfigError) as caught:
            named_sources.load(str(location), "train")
        assert str(caught.value) == (
            f"data.source='{location}': {what}; run ttt tokenize --train {shlex.quote(str(location))} "
            "--tokenizer byte --output DIR, and give DIR here"
        )


@pytest.mark.parametrize(("bos", "eos", "expected"), [(256, 257, 258), (256, None, 257), (None, None, 257)])
def test_bytes_without_eos_fit_models_of_257_tokens(tmp_path, bos, eos, expected):
    (tmp_path / "a.txt").write_text("text")
    found, job = listing.find("train", [str(tmp_path / "a.txt")]), Job(tokenizer.byte(), bos, eos)
    tokenize.tokenize(found, job, Store(tmp_path / "out"), corpus.in_this_process)
    assert named_sources.load(str(tmp_path / "out"), "train").vocab_size == expected


@pytest.mark.parametrize("name", ["llama", "0123456789abcdef", hashlib.sha256(b"byte").hexdigest()[:7]])
def test_another_tokenizer_is_refused(made, name):
    with pytest.raises(ConfigError, match=f"data.tokenizer='{name}': .*/train was made by byte"):
        named_sources.load(str(made[0]), "train", tokenizer=name)


def test_the_tokenizer_may_be_given_by_file(tmp_path, made, copy):
    description = json_files.read_object(copy / "dataset.json")
    kept = tmp_path / "tokenizer.json"
    kept.write_text("{}")
    description["tokenizer"].update(kind="huggingface", sha256=hashlib.sha256(b"{}").hexdigest())
    (copy / "dataset.json").write_text(json.dumps(description))
    named_sources.load(str(copy), "train", tokenizer=str(kept))
    kept.write_text("[]")
    with pytest.raises(ConfigError, match="of another hash"):
        named_sources.load(str(copy), "train", tokenizer=str(kept))


def test_embedded_is_the_standard_library():
    source = named_sources.load("embedded", "validation")
    assert (source.name, source.vocab_size, source.bos) == ("embedded/validation", 257, 256)
    np.testing.assert_array_equal(source.tokens, named_sources.embedded_tokens("validation"))


# ---- What is refused


def test_an_unknown_split_is_refused():
    with pytest.raises(ConfigError, match="split='dev': expected one of train, validation, test"):
        named_sources.load("embedded", "dev")


@pytest.mark.parametrize("name", ["", "pile", "/nowhere/at/all"])
def test_a_missing_folder_is_refused(name):
    with pytest.raises(ConfigError, match=f"^data.source='{name}': no such folder; expected embedded, synthetic, asso"):
        named_sources.load(name, "train")


def test_a_folder_without_tokens_is_refused(tmp_path):
    (tmp_path / "notes.md").write_text("mine")
    with pytest.raises(ConfigError, match="no train tokens there; expected embedded"):
        named_sources.load(str(tmp_path), "train")


def test_a_missing_split_is_refused_with_those_that_exist(made):
    with pytest.raises(ConfigError, match=r"split test: .* has only train"):
        named_sources.load(str(made[0]), "test")


def test_an_unfinished_dataset_is_refused(copy):
    (copy / "dataset.json").unlink()
    (copy / "_unfinished").mkdir()
    (copy / "_unfinished" / "state.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not finished; run the same ttt tokenize command again"):
        named_sources.load(str(copy), "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "dataset.json: damaged: it is not JSON"),
        ("[]", "dataset.json: describes no dataset; expected what ttt tokenize wrote"),
        (
            '{"name": "package", "version": 1}',
            "dataset.json: describes no dataset; expected what ttt tokenize wrote",
        ),
        ('{"format": "ttt_jax tokens", "version": 2}', "dataset.json: version 2; this ttt_jax reads 1"),
        ('{"format": "ttt_jax tokens", "version": 1}', "dataset.json: damaged: no tokenizer; expected what ttt token"),
    ],
)
def test_a_file_that_is_no_description_is_refused(copy, content, message):
    (copy / "dataset.json").write_text(content)
    with pytest.raises(DataError, match=message):
        named_sources.load(str(copy), "train")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("splits",), None, "no splits"),
        (("splits",), [], "splits is []"),
        (("splits", "train"), 7, "no splits.train.tokens"),
        (("splits", "train", "documents"), None, "no splits.train.documents"),
        (("splits", "train", "tokens"), "5", "splits.train.tokens is '5'"),
        (("tokenizer", "kind"), "gpt", "tokenizer.kind is 'gpt'"),
        (("tokenizer", "name"), None, "no tokenizer.name"),
        (("vocab_size",), None, "no vocab_size"),
        (("bos",), "<s>", "bos is '<s>'"),
    ],
)
def test_a_damaged_description_is_refused_with_the_bad_key(copy, place, value, message):
    description = json_files.read_object(copy / "dataset.json")
    inner = description
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    if value is None:
        del inner[place[-1]]
    (copy / "dataset.json").write_text(json.dumps(description))
    for read in (lambda: named_sources.load(str(copy), "train"), lambda: named_sources.tokenizer_of(str(copy))):
        with pytest.raises(DataError) as caught:
            read()
        assert str(caught.value).startswith(f"{copy}/dataset.json: damaged: {message}")


def test_a_changed_tokenizer_of_a_dataset_is_refused(tmp_path):
    """Change one byte such that the file is still a tokenizer."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.save(str(tmp_path / "words.json"))
    (tmp_path / "a.txt").write_text("a")
    job = Job(tokenizer.load(str(tmp_path / "words.json")), None, None)
    found = listing.find("train", [str(tmp_path / "a.txt")])
    tokenize.tokenize(found, job, Store(tmp_path / "out"), corpus.in_this_process)
    kept = tmp_path / "out/tokenizer.json"
    assert named_sources.tokenizer_of(str(tmp_path / "out")).encoder()("b").tolist() == [1]

    content = kept.read_bytes()
    kept.write_bytes(content.replace(b'"b"', b'"c"'))
    hashes = [hashlib.sha256(each).hexdigest()[:12] for each in (kept.read_bytes(), content)]
    with pytest.raises(DataError) as caught:
        named_sources.tokenizer_of(str(tmp_path / "out"))
    assert str(caught.value) == (
        f"{kept}: damaged, or another tokenizer: its SHA-256 is {hashes[0]}..., but the tokens were made with "
        f"{hashes[1]}...; expected the file that ttt tokenize wrote"
    )
    description = json_files.read_object(tmp_path / "out/dataset.json")
    del description["tokenizer"]["sha256"]  # as in early datasets
    (tmp_path / "out/dataset.json").write_text(json.dumps(description))
    assert named_sources.tokenizer_of(str(tmp_path / "out")).encoder()("c").tolist() == [1]


def test_arrays_that_are_not_as_described_are_refused(copy):
    description = json_files.read_object(copy / "dataset.json")
    description["splits"]["train"]["tokens"] += 1
    (copy / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(DataError, match=r"/train: holds 5\d uint16, but dataset.json says 5\d uint16"):
        named_sources.load(str(copy), "train")


def test_a_missing_shard_is_an_error_where_it_is_read(copy):
    (copy / "train" / "c" / "1").unlink()
    source = named_sources.load(str(copy), "train")
    source.window(0, 15)
    with pytest.raises(DataError, match=r"cannot read .*/train at offset 16: .*missing"):
        source.window(1, 16)


def test_a_damaged_shard_is_an_error_where_it_is_read(copy):
    shard = copy / "train" / "c" / "0"
    content = bytearray(shard.read_bytes())
    content[3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read .*/train at offset 0: "):
        named_sources.load(str(copy), "train").window(0, 15)


def test_a_token_outside_the_vocabulary_of_the_dataset_is_an_error(copy):
    description = json_files.read_object(copy / "dataset.json")
    description["vocab_size"] = 257
    (copy / "dataset.json").write_text(json.dumps(description))
    place = len(TEXTS[0].encode()) + 1
    with pytest.raises(
        DataError, match=f"/train: token 257 at offset {place}; expected ids below the vocabulary of 257"
    ):
        named_sources.load(str(copy), "train").window(0, 30)
