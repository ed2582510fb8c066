"""Check that a trained tokenizer encodes every text, has seen only train documents, and is always the same."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import corpus
import hypothesis
import pytest
import tokenizers
from hypothesis import strategies as st

from ttt_jax.config import ConfigError
from ttt_jax.data.prepare import tokenize_units, tokenizer, train_bpe
from ttt_jax.data.prepare.files import InputFile
from ttt_jax.data.prepare.tokenize import tokenize
from ttt_jax.data.prepare.tokenize_units import Job
from ttt_jax.errors import DataError
from ttt_jax.storage import json_files
from ttt_jax.storage.store import Store

JOB = Job(tokenizer.byte(), None, None)
TEXTS = corpus.documents(80)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return corpus.input_file(tmp_path_factory.mktemp("text") / "a.jsonl", corpus.jsonl(TEXTS))


@pytest.fixture(scope="module")
def trained(file):
    return train_bpe.train([file], 300, JOB)


def vocabulary(content):
    return tokenizers.Tokenizer.from_buffer(content).get_vocab()


def spaced(words):
    """Return the content of a file of one document."""
    return corpus.jsonl([" ".join(words)])


@hypothesis.given(st.text())
@hypothesis.example("\x00\x7f\xa0\xff\u2028\U0010ffff <s> </s>\r\n")
def test_any_text_decodes_to_itself(trained, text):
    ours = tokenizer.from_huggingface(trained, "tokenizer.json", "<s>", "</s>")
    assert (ours.vocab_size, ours.bos, ours.eos) == (300, 0, 1)
    ids = ours.encoder()(text).tolist()
    assert all(2 <= token < 300 for token in ids)
    assert tokenizers.Tokenizer.from_buffer(trained).decode(ids, skip_special_tokens=False) == text


def test_common_words_become_tokens(trained):
    size = sum(len(text.encode()) for text in TEXTS)
    encode = tokenizer.from_huggingface(trained, "tokenizer.json", "<s>", "</s>").encoder()
    assert "Ġriver" in vocabulary(trained)
    assert sum(len(encode(text)) for text in TEXTS) < 0.6 * size


@pytest.mark.slow
def test_another_process_trains_the_same_tokenizer(trained, file):
    program = (
        "import sys; from ttt_jax.data.prepare import listing, tokenize_units, tokenizer, train_bpe\n"
        "found = listing.find('train', sys.argv[1:])\n"
        "sys.stdout.buffer.write(train_bpe.train(found, 300, tokenize_units.Job(tokenizer.byte(), None, None)))\n"
    )
    command, root = [sys.executable, "-c", program, file.location], Path(corpus.__file__).parents[2]
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=root, env=environment)
    assert done.stdout == trained


def test_only_documents_of_the_train_split_are_seen(tmp_path):
    """Repeat one word in each document, so that it becomes a token if the document is read."""
    words = [f"{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(200)]
    texts = [" ".join([word] * 9) for word in words]
    job = Job(tokenizer.byte(), None, None, validation_fraction=0.3, test_fraction=0.2, split_seed=4)
    sides = {word: job.split_of("train", text.encode()) for word, text in zip(words, texts, strict=True)}
    files = [
        corpus.input_file(tmp_path / "a.jsonl", corpus.jsonl(texts)),
        corpus.input_file(tmp_path / "v.jsonl", spaced(["zq"] * 99), "validation"),
    ]
    seen = vocabulary(train_bpe.train(files, 5000, job))
    assert {word for word in words if f"Ġ{word}" in seen} == {word for word, side in sides.items() if side == "train"}
    assert 60 < list(sides.values()).count("train") < 140
    assert "Ġzq" not in seen


def test_no_more_than_most_bytes_are_read(tmp_path, monkeypatch):
    """Check the bound with 300 bytes instead of a GiB; the document that reaches it is the last."""
    monkeypatch.setattr(train_bpe, "MOST_BYTES", 300)
    files = [
        corpus.input_file(tmp_path / "a.jsonl", corpus.jsonl(["ab " * 60, "cd " * 60, "ef " * 60])),
        corpus.input_file(tmp_path / "b.jsonl", b"junk"),
    ]
    seen = vocabulary(train_bpe.train(files, 400, JOB))
    assert {"Ġab", "Ġcd"} < seen.keys()
    assert "Ġef" not in seen


def test_bad_records_stop_training_unless_they_are_skipped(tmp_path):
    file = corpus.input_file(tmp_path / "a.jsonl", corpus.jsonl(["ab " * 9]) + b"junk\n" + corpus.jsonl(["cd " * 9]))
    with pytest.raises(DataError) as caught:
        train_bpe.train([file], 300, JOB)
    assert str(caught.value).startswith(f"{file.location}, record 2: not JSON: ")
    assert {"Ġab", "Ġcd"} < vocabulary(train_bpe.train([file], 300, JOB, skip_problems=True)).keys()


def test_small_vocabularies_and_missing_train_splits_are_refused(file):
    with pytest.raises(ConfigError, match=r"^--train-bpe 257: expected 258 or more: "):
        train_bpe.train([file], 257, JOB)
    assert len(vocabulary(train_bpe.train([file], 258, JOB))) == 258
    with pytest.raises(ConfigError, match=r"^--train-bpe: there is no --train to train it on$"):
        train_bpe.train([InputFile("validation", file.location, file.size)], 300, JOB)


def test_long_words_are_trained_on_in_bounded_parts():
    for text in ("", *TEXTS, "a " * 5000):
        assert list(train_bpe._bounded(text)) == [text]
    parts = list(train_bpe._bounded(f"ab {'x' * 9000} cd"))
    assert [len(part) for part in parts] == [3 + 4096, 4096, 9000 - 2 * 4096 + 3]
    assert "".join(parts) == f"ab {'x' * 9000} cd"


@pytest.mark.slow
def test_ctrl_c_does_not_wait_for_the_library(file, monkeypatch):
    """Replace training by hashing, which does not look at signals either."""
    read = []

    class Busy:
        def __init__(self, model):
            self.pre_tokenizer = self.decoder = None

        def train_from_iterator(self, texts, trainer):
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
            read.append(next(iter(texts)))
            hashlib.pbkdf2_hmac("sha256", b"", b"", 1_000_000)
            read.extend(texts)

    monkeypatch.setattr(tokenizers, "Tokenizer", Busy)
    monkeypatch.setattr(train_bpe, "_GRACE", 0.01)
    with pytest.raises(KeyboardInterrupt):
        train_bpe.train([file], 300, JOB)
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "train-bpe")  # still hashing
    assert thread.daemon  # the process ends without it
    thread.join()
    assert read == TEXTS[:1]  # and it reads no more


# ---- Saved with its dataset


def make(folder, files, vocab_size=300, **options):
    """Train and tokenize as ``ttt tokenize --train-bpe`` does."""
    chosen = train_bpe.load_or_train(Store(folder), files, vocab_size, JOB)
    job = Job(chosen, chosen.bos, chosen.eos)
    options = {"shard": 1024, "chunk": 256, "unit_bytes": 500, "save_seconds": -1, **options}
    return tokenize(files, job, Store(folder), corpus.in_this_process, trained={"vocab_size": vocab_size}, **options)


def never(*arguments, **options):
    raise AssertionError("trained again")


def test_a_saved_tokenizer_is_not_trained_again(tmp_path, file, monkeypatch):
    make(tmp_path / "expected", [file])
    kept = train_bpe.load_or_train(Store(tmp_path / "out"), [file], 300, JOB)  # a run killed before tokenizing
    monkeypatch.setattr(train_bpe, "train", never)
    assert train_bpe.load_or_train(Store(tmp_path / "out"), [file], 300, JOB) == kept
    make(tmp_path / "out", [file])
    assert corpus.contents(tmp_path / "out") == corpus.contents(tmp_path / "expected")
    assert (tmp_path / "out/tokenizer.json").read_bytes() == kept.content
    make(tmp_path / "out", [file])  # finished already
    assert json.loads((tmp_path / "out/dataset.json").read_text())["tokenizer"]["trained"] == {"vocab_size": 300}


def test_a_half_saved_tokenizer_is_trained_again(tmp_path, file):
    kept = train_bpe.load_or_train(Store(tmp_path / "out"), [file], 300, JOB)
    for path in (tmp_path / "out/_unfinished").iterdir():
        whole = path.read_bytes()
        path.unlink()
        assert train_bpe.load_or_train(Store(tmp_path / "out"), [file], 300, JOB) == kept
        assert path.read_bytes() == whole


def test_a_tokenizer_of_other_text_of_the_same_size_is_not_used(tmp_path):
    for text in ("ab " * 99, "cd " * 99):
        file = corpus.input_file(tmp_path / "a.jsonl", corpus.jsonl([text]))
        expected = train_bpe.train([file], 300, JOB)
        assert train_bpe.load_or_train(Store(tmp_path / "out"), [file], 300, JOB).content == expected


def test_a_tokenizer_saved_without_digests_is_still_used(tmp_path, file, monkeypatch):
    kept = train_bpe.load_or_train(Store(tmp_path / "out"), [file], 300, JOB)
    path = tmp_path / "out/_unfinished/tokenizer-made-for.json"
    made_for = json_files.read_object(path)
    del made_for["tokenizer_sha256"]
    assert made_for.pop("contents") == [f"sha256:{hashlib.sha256(Path(file.location).read_bytes()).hexdigest()}"]
    path.write_text(json.dumps(made_for))
    monkeypatch.setattr(train_bpe, "train", never)
    assert train_bpe.load_or_train(Store(tmp_path / "out"), [file], 300, JOB) == kept


def test_a_damaged_tokenizer_is_reported_and_trained_anew(tmp_path, file, capsys):
    kept = train_bpe.load_or_train(Store(tmp_path / "out"), [file], 300, JOB)
    path = tmp_path / "out/_unfinished/tokenizer.json"
    path.write_bytes(kept.content.replace(b'"</s>"', b'"</t>"', 1))
    capsys.readouterr()
    assert train_bpe.load_or_train(Store(tmp_path / "out"), [file], 300, JOB) == kept
    assert capsys.readouterr().err.splitlines()[0] == f"{path}: damaged; the tokenizer is trained anew"


def test_a_tokenizer_is_still_used_after_another_split_was_mended(tmp_path, file, monkeypatch):
    """Mend a validation file, which changes its size, after shards were written."""
    good = corpus.jsonl(["the river"])
    validation = corpus.input_file(tmp_path / "v.jsonl", good + b"junk\n", "validation")
    with pytest.raises(DataError, match=r"v.jsonl, record 2: not JSON"):
        make(tmp_path / "out", [file, validation])
    assert (tmp_path / "out/train/c/0").exists()
    validation = corpus.input_file(tmp_path / "v.jsonl", good + good, "validation")
    monkeypatch.setattr(train_bpe, "train", never)
    about = make(tmp_path / "out", [file, validation])
    assert about["splits"]["validation"]["documents"] == 2


@pytest.mark.parametrize("content", [None, b"{}"])
def test_a_lost_or_changed_tokenizer_of_a_finished_dataset_is_an_error(tmp_path, file, content):
    make(tmp_path / "out", [file])
    kept = tmp_path / "out/tokenizer.json"
    kept.unlink() if content is None else kept.write_bytes(content)
    with pytest.raises(DataError) as caught:
        make(tmp_path / "out", [file])
    assert str(caught.value).startswith(f"{kept}: {'is gone' if content is None else 'damaged, or another tokenizer'}")


@pytest.mark.parametrize("finished", [False, True])
def test_another_vocabulary_size_is_refused(tmp_path, file, finished):
    """Check a finished and an unfinished dataset, which has shards already."""
    other = corpus.input_file(tmp_path / "v.jsonl", b'{"text": "a"}\n' if finished else b"junk\n", "validation")
    with contextlib.nullcontext() if finished else pytest.raises(DataError, match=r"v.jsonl, record 1: not JSON"):
        make(tmp_path / "out", [file, other])
    before = corpus.contents(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"^--output .*: holds ") as caught:
        make(tmp_path / "out", [file, other], vocab_size=310)
    assert "\n" not in str(caught.value)
    assert corpus.contents(tmp_path / "out") == before


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, file, monkeypatch):
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.setattr(train_bpe, "train", never)
    with pytest.raises(ConfigError, match=r"holds .*; expected a new or empty folder$"):
        make(tmp_path, [file])
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.slow
def test_worker_processes_load_the_tokenizer(tmp_path, file):
    chosen = train_bpe.load_or_train(Store(tmp_path / "out"), [file], 300, JOB)
    job, options = Job(chosen, 0, 1), {"shard": 512, "chunk": 64, "unit_bytes": 500}
    tokenize([file], job, Store(tmp_path / "out"), tokenize_units.processes(1), **options)
    library = tokenizers.Tokenizer.from_buffer(chosen.content)
    library.encode_special_tokens = True
    expected = [token for text in TEXTS for token in (0, *library.encode(text, add_special_tokens=False).ids, 1)]
    assert corpus.stored(tmp_path / "out/train").tolist() == expected


def test_a_fixed_text_gives_a_fixed_tokenizer(tmp_path):
    """Guard against other tokens in a dataset that is made again, with text of all kinds that training tells apart."""
    text = "The river bent twice; the river bends 1024 times. straße Ωmega 水は流れる \U0001f989 don't\r\n\tx=1;"
    file = corpus.input_file(tmp_path / "a.jsonl", corpus.jsonl([text, text.upper(), "", "the the the"]))
    trained = train_bpe.train([file], 280, JOB)
    assert hashlib.sha256(trained).hexdigest() == "ca159a5f7d63a341a008fefb0b4321397ab0cd33a77ba994ca192a04ac375d74"
