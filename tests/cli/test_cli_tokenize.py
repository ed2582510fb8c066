"""Check what ``ttt tokenize`` writes and prints, for good and for wrong commands."""

import contextlib
import gzip
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tensorstore as ts
import tiny_run
import tokenizers
from tokenizers import models

from ttt_jax import cli
from ttt_jax.data.prepare import tokenize_units

TEXTS = ["It was a bright cold day in April.", "", "straße 🦉\r\n", *(f"document {i}" for i in range(200))]
SIZE = sum(len(text.encode()) for text in TEXTS)


def ttt(*arguments) -> int:
    return tiny_run.ttt("tokenize", *arguments)


def write(path, texts=TEXTS):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def stored(folder):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/"}}
    return ts.open(spec, read=True, open=True).result().read().result()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Make a working directory with some files."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl")
    write(tmp_path / "v.jsonl", ["validation"])
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\njunk\n')
    (tmp_path / "null.jsonl").write_text('{"text": null}\n')
    (tmp_path / "empty.txt").touch()
    (tmp_path / "notes.md").touch()
    (tmp_path / "junk.json").write_text("{}")
    (tmp_path / "junk.model").write_text("junk")
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0}))
    words.save(str(tmp_path / "no-unk.json"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    return tmp_path


@pytest.fixture
def in_this_process(monkeypatch):
    """Tokenize in this process, because another takes a third of a second to start."""

    def run(job, units):
        for split, unit in units:
            yield unit, tokenize_units.tokenize_unit(job, split, unit)

    monkeypatch.setattr(tokenize_units, "processes", lambda workers: run)


def test_a_command_writes_the_dataset_and_reports_it(here, capsys):
    command = "--train a.jsonl --validation v.jsonl --tokenizer byte --output out --workers 1".split()
    assert ttt(*command) == 0
    printed = capsys.readouterr()
    documents = len(TEXTS)
    report = (
        "out: byte, 258 tokens in the vocabulary; bos 256; eos 257\n"
        f"  train: {documents} documents, {SIZE + 2 * documents:,} tokens, {SIZE:,} bytes of text\n"
        "    1 of the documents has no tokens of its own\n"
        "  validation: 1 document, 12 tokens, 10 bytes of text\n"
    )
    assert printed.out == report
    assert printed.err.startswith(f"{documents + 1} documents  {SIZE + 2 * documents + 12:,} tokens  ")
    assert "Traceback" not in printed.err
    tokens = [token for text in TEXTS for token in (256, *text.encode(), 257)]
    np.testing.assert_array_equal(stored(here / "out/train"), tokens)

    before = {path: path.stat().st_mtime_ns for path in (here / "out").rglob("*")}
    assert ttt(*command) == 0
    assert capsys.readouterr().out == report
    assert {path: path.stat().st_mtime_ns for path in (here / "out").rglob("*")} == before


@pytest.mark.usefixtures("in_this_process")
def test_options_reach_the_dataset(here, capsys):
    """Use SentencePiece without BOS, another EOS, another key, a folder of files, fractions and a seed."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=58, user_defined_symbols=["<end>"], minloglevel=2
    )
    (here / "a.model").write_bytes(model.getvalue())
    (here / "texts").mkdir()
    lines = [json.dumps({"body": text, "text": 0}) + "\n" for text in TEXTS]
    (here / "texts/a.jsonl").write_text("".join(lines))
    options = "--train texts --tokenizer a.model --no-bos --eos-token <end> --text-key body --workers 1 --output out"
    assert ttt(*options.split(), "--validation-fraction", "0.4", "--split-seed", "7") == 0
    about = json.loads((here / "out/dataset.json").read_text())
    assert (about["bos"], about["eos"], about["text_key"]) == (None, 3, "body")
    assert (about["split_rule"]["seed"], about["split_rule"]["validation_fraction"]) == (7, 0.4)
    library = sentencepiece.SentencePieceProcessor(model_file="a.model")
    for split in ("train", "validation"):
        found = stored(here / "out" / split)
        rows = [row.tolist() for row in np.split(found, np.flatnonzero(found == 3) + 1)][:-1]
        texts = [[*library.encode(text), 3] for text in TEXTS]
        assert rows == [row for row in texts if row in rows]
        assert len(rows) == about["splits"][split]["documents"] > 50
    assert "; bos none; eos 3\n" in capsys.readouterr().out


@pytest.mark.usefixtures("in_this_process")
def test_train_bpe_trains_a_tokenizer_once(here, capsys):
    command = ["--train", "a.jsonl", "--train-bpe", 300, "--no-eos", "--output", "out", "--workers", 1]
    assert ttt(*command) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("training a BPE tokenizer of 300 tokens\n")
    assert printed.out.startswith("out: tokenizer.json, 300 tokens in the vocabulary; bos 0; eos none\n")
    library = tokenizers.Tokenizer.from_file("out/tokenizer.json")
    assert stored(here / "out/train").tolist() == [token for text in TEXTS for token in (0, *library.encode(text).ids)]
    assert ttt(*command) == 0
    assert "training" not in capsys.readouterr().err


@pytest.mark.usefixtures("in_this_process")
def test_skipped_records_are_counted_and_listed(here, capsys):
    command = ["--train", "bad.jsonl", "null.jsonl", "--tokenizer", "byte", "--output", "out", "--on-error", "skip"]
    assert ttt(*command, "--workers", 1) == 0
    assert capsys.readouterr().out.endswith("  left out: 2 records, listed in out/problems.jsonl\n")
    problems = [json.loads(line) for line in (here / "out/problems.jsonl").read_text().splitlines()]
    skipped = [(problem["file"], problem["record"]) for problem in problems]
    assert skipped == [(f"{here}/bad.jsonl", 2), (f"{here}/null.jsonl", 1)]


@pytest.mark.usefixtures("in_this_process")
def test_json_lines_and_arrays_of_the_same_records_give_the_same_tokens(here, capsys):
    """Check that bad records are counted the same, and that the loss of an array that breaks off is reported."""
    records = [json.dumps({"text": text}) for text in TEXTS[:5]] + ['{"text": 5}', '{"text": "a" 1}', '{"no": 1}', "7"]
    records += ['{"text": "behind", "n": NaN}', '{"text": ""}']
    lines, array = "\n".join(records).encode(), f"[{', '.join(records)}]".encode()
    tokens = [token for text in [*TEXTS[:5], "behind", ""] for token in (256, *text.encode(), 257)]
    for i, (name, content) in enumerate((("l.jsonl", lines), ("a.json", array), ("l.jsonl.gz", gzip.compress(lines)))):
        (here / name).write_bytes(content)
        command = ["--train", name, "--tokenizer", "byte", "--output", f"{i}", "--workers", 1, "--on-error", "skip"]
        assert ttt(*command) == 0
        printed = capsys.readouterr()
        assert f"  left out: 4 records, listed in {i}/problems.jsonl" in printed.out
        assert "the rest" not in printed.err
        assert stored(here / f"{i}/train").tolist() == tokens
        problems = [json.loads(line) for line in (here / f"{i}/problems.jsonl").read_text().splitlines()]
        assert [problem["record"] for problem in problems] == [6, 7, 8, 9]
    (here / "b.json").write_text(f"[{', '.join(records[:2])} 3, {records[2]}]")
    broken = f"{here}/b.json, record 3: not JSON from here on: expected ',' or ']', found '3': line 1 column 63"
    command = ["--train", "b.json", "--tokenizer", "byte", "--output", "b", "--workers", 1]
    assert ttt(*command) == 1
    assert f"ttt tokenize: {broken}. Mend it, or leave such records out with " in capsys.readouterr().err
    assert ttt(*command, "--on-error", "skip") == 0
    assert f"{broken}; the rest of this file is left out\n" in capsys.readouterr().err


@pytest.mark.usefixtures("in_this_process")
def test_what_a_tokenizer_loses_is_reported(here, capsys):
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "?": 1, "ab": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.save("words.json")
    write(here / "w.jsonl", ["a  a", "ab\n", "é", "", " "])
    assert ttt("--train", "w.jsonl", "--tokenizer", "words.json", "--output", "out", "--workers", 1) == 0
    printed = capsys.readouterr()
    assert printed.err.splitlines()[0] == (
        "--tokenizer words.json: loses spaces at the end: texts that differ in them alone get the same tokens"
    )
    assert printed.out.splitlines()[1:] == [
        "  train: 5 documents, 4 tokens, 10 bytes of text",
        "    2 of the documents have no tokens of their own",
        "    1 of the tokens stands for characters that the tokenizer does not know",
    ]


@pytest.mark.usefixtures("in_this_process")
def test_a_file_with_two_names_is_read_once_and_one_is_counted_in_the_singular(here, capsys):
    (here / "one.txt").write_text("a")
    os.symlink("one.txt", "two.txt")
    (here / "bad.jsonl").write_text("junk\n")
    command = ["--train", "one.txt", "two.txt", "one.txt", "bad.jsonl", "--on-error", "skip", "--no-bos", "--no-eos"]
    assert ttt(*command, "--tokenizer", "byte", "--output", "out", "--workers", 1) == 0
    printed = capsys.readouterr()
    assert printed.err.splitlines()[0] == (
        f"2 files left out, read already: --train {here}/two.txt (the same file as {here}/one.txt), "
        f"--train {here}/one.txt (named twice)"
    )
    assert printed.err.splitlines()[-1].startswith("1 document  1 token  1 left out  ")
    assert printed.out.splitlines()[1:] == [
        "  train: 1 document, 1 token, 1 byte of text",
        "  left out: 1 record, listed in out/problems.jsonl",
    ]


GOOD = "--train a.jsonl --tokenizer byte --output out"
WRONG = [
    # Commands that cannot run: exit status 2.
    ("--tokenizer byte --output out", 2, "--train, --validation, --test: expected one of them at least"),
    ("--train a.jsonl --tokenizer byte", 2, "error: the following arguments are required: --output"),
    ("--train a.jsonl --output out", 2, "error: one of the arguments --tokenizer --train-bpe is required"),
    (f"{GOOD} --train-bpe 300", 2, "error: argument --train-bpe: not allowed with argument --tokenizer"),
    (f"{GOOD} stray", 2, "error: unexpected argument: stray"),
    (f"{GOOD} --bogus", 2, "error: unexpected argument: --bogus"),
    (f"{GOOD} --workers 0", 2, "error: argument --workers: '0': expected 1 or more"),
    (f"{GOOD} --workers many", 2, "error: argument --workers: 'many': expected 1 or more"),
    (f"{GOOD} --engine spark", 2, "error: argument --engine: invalid choice: 'spark'"),
    (f"{GOOD} --on-error ignore", 2, "error: argument --on-error: invalid choice: 'ignore'"),
    (f"{GOOD} --validation-fraction 1", 2, "--validation-fraction 1.0: expected a number from 0 to below 1"),
    (f"{GOOD} --test-fraction -0.1", 2, "--test-fraction -0.1: expected a number from 0 to below 1"),
    (f"{GOOD} --test-fraction nan", 2, "--test-fraction nan: expected a number from 0 to below 1"),
    (
        f"{GOOD} --validation-fraction 0.5 --test-fraction 0.5",
        2,
        "--validation-fraction, --test-fraction: expected a sum",
    ),
    (f"{GOOD} --validation v.jsonl --validation-fraction 0.1", 2, "--validation-fraction: is taken from --train; "),
    ("--test a.jsonl --test-fraction 0.1 --tokenizer byte --output out", 2, "--test-fraction: is taken from --train; "),
    (f"{GOOD} --split-seed -1", 2, "--split-seed -1: expected an integer from 0 to 2^64 - 1"),
    (f"{GOOD} --split-seed {1 << 64}", 2, f"--split-seed {1 << 64}: expected an integer from 0 to 2^64 - 1"),
    (f"{GOOD} --bos-token <s>", 2, "--bos-token, --eos-token: the byte tokenizer has no names for them"),
    (f"{GOOD} --bos-token <s> --no-bos", 2, "--bos-token: cannot be given with --no-bos"),
    ("--train a.jsonl --train-bpe 300 --eos-token a --output out", 2, "--eos-token: cannot be given with --train-bpe"),
    ("--train a.jsonl --train-bpe 100 --output out", 2, "--train-bpe 100: expected 258 or more"),
    ("--validation a.jsonl --train-bpe 300 --output out", 2, "--train-bpe: there is no --train to train it on"),
    ("--train gone.jsonl --tokenizer byte --output out", 2, "--train gone.jsonl: no such file"),
    ("--train *.xyz --tokenizer byte --output out", 2, "--train *.xyz: no such file"),
    ("--train notes.md --tokenizer byte --output out", 2, "--train {here}/notes.md: cannot be read; expected a name"),
    ("--train nofs://a/b.jsonl --tokenizer byte --output out", 2, "--train nofs://a/b.jsonl: Protocol not known: nofs"),
    (f"{GOOD} --validation a.jsonl", 2, "--validation {here}/a.jsonl: is in --train already"),
    (f"{GOOD} --validation ./full/../a.jsonl", 2, "--validation {here}/full/../a.jsonl: is in --train already"),
    (f"{GOOD} --test file://{{here}}/a.jsonl", 2, "--test file://{here}/a.jsonl: is in --train already"),
    ("--train a.jsonl --tokenizer gpt2 --output out", 2, "--tokenizer gpt2: expected byte, a SentencePiece .model or"),
    ("--train a.jsonl --tokenizer a.pkl --output out", 2, "--tokenizer a.pkl: expected byte, "),
    ("--train a.jsonl --tokenizer gone.json --output out", 2, "--tokenizer gone.json: no such file"),
    ("--train a.jsonl --tokenizer junk.json --output out", 2, "junk.json: not a Hugging Face tokenizer: "),
    ("--train a.jsonl --tokenizer junk.model --output out", 2, "junk.model: not a SentencePiece model"),
    (
        "--train a.jsonl --tokenizer byte --output full",
        2,
        "--output full: holds notes.txt; expected a new or empty folder",
    ),
    (
        "--train a.jsonl --train-bpe 300 --output full",
        2,
        "--output full: holds notes.txt; expected a new or empty folder",
    ),
    ("--train a.jsonl --tokenizer byte --output nofs://a", 2, "cannot open nofs://a: "),
    # Bad data, or an output that cannot be written: exit status 1.
    ("--train bad.jsonl --tokenizer byte --output out", 1, "{here}/bad.jsonl, record 2: not JSON: Expecting value"),
    ("--train bad.jsonl --train-bpe 300 --output out", 1, "{here}/bad.jsonl, record 2: not JSON: Expecting value"),
    ("--train null.jsonl --tokenizer byte --output out", 1, "{here}/null.jsonl, record 1: 'text' is null; expected"),
    ("--train empty.txt --tokenizer byte --output out", 1, "{here}/empty.txt, record 1: no records. Mend it, or"),
    ("--train null.jsonl --on-error skip --tokenizer byte --output out", 1, "out: no document could be read; "),
    (f"{GOOD} --text-key body", 1, "{here}/a.jsonl, record 1: no key 'body'; it has 'text'"),
    ("--train a.jsonl --tokenizer byte --output notes.md", 2, "--output notes.md: is not a folder"),
    ("--train a.jsonl --tokenizer no-unk.json --output out", 1, "{here}/a.jsonl, record 1: the tokenizer failed: "),
]


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(("command", "status", "message"), WRONG)
def test_a_wrong_command_is_one_line(here, capsys, command, status, message):
    assert ttt(*command.format(here=here).split(), *([] if "--workers" in command else ["--workers", 1])) == status
    printed = capsys.readouterr()
    assert printed.out == ""
    other = ("training a BPE ", "usage: ", " ", "0 documents")
    lines = [line for line in printed.err.splitlines() if not line.startswith(other)]
    assert len(lines) == 1
    assert lines[0].startswith(f"ttt tokenize: {message.format(here=here)}")
    assert "Traceback" not in printed.err
    assert (here / "full/notes.txt").read_text() == "mine"
    assert not (here / "out/dataset.json").exists()


def test_an_empty_output_is_refused(here, capsys):
    assert ttt("--train", "a.jsonl", "--tokenizer", "byte", "--output", "", "--workers", 1) == 2
    assert capsys.readouterr().err.startswith("ttt tokenize: an empty name of a folder; ")


@pytest.mark.usefixtures("in_this_process")
def test_another_request_for_the_same_folder_is_refused(here, capsys):
    assert ttt(*GOOD.split(), "--workers", 1) == 0
    capsys.readouterr()
    for option, what in (("--no-bos", "bos: 256 there, None here"), ("--text-key=x", "text_key: text there, x here")):
        assert ttt(*GOOD.split(), "--workers", 1, option) == 2
        message = f"holds tokens of another request ({what}); expected the same request, or a new folder"
        assert capsys.readouterr().err == f"ttt tokenize: --output out: {message}\n"
    assert ttt(*GOOD.replace("--tokenizer byte", "--train-bpe 300").split(), "--workers", 1) == 2
    assert capsys.readouterr().err.startswith("ttt tokenize: --output out: holds ")


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_a_command_that_wrote_nothing_may_be_followed_by_another(here, capsys):
    command = ["--train", "a.jsonl", "--tokenizer", "byte", "--output", "out", "--workers", 1]
    assert ttt(*command, "--text-key", "body") == 1
    assert ttt(*command, "--no-bos", "--on-error", "skip", "--text-key", "body") == 1
    assert "no document could be read" in capsys.readouterr().err
    assert ttt(*command) == 0
    assert ttt(*command[:-4], "--output", "other", "--workers", 1) == 0
    files = {
        name: {p.relative_to(here / name): p.read_bytes() for p in (here / name).rglob("*") if p.is_file()}
        for name in ("out", "other")
    }
    assert files["out"] == files["other"]


@pytest.mark.slow
def test_a_command_that_was_stopped_continues_when_run_again(here):
    """Interrupt the workers, too, also while they start; check that only one line is printed."""
    write(here / "long.jsonl", TEXTS * 1000)  # seconds of work even on a fast machine
    command = [sys.executable, "-m", "ttt_jax", "tokenize", "--train", "long.jsonl", "--tokenizer", "byte"]
    command += ["--output", "out", "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    for pause, stop, status in ((0.0, signal.SIGINT, 130), (0.05, signal.SIGINT, 130), (0.2, signal.SIGTERM, 75)):
        process = subprocess.Popen(command, env=environment, **pipes, start_new_session=True)
        while not children(process.pid):
            assert process.poll() is None
            time.sleep(0.005)
        time.sleep(pause)
        (os.killpg if stop == signal.SIGINT else os.kill)(process.pid, stop)
        out, err = process.communicate(timeout=60)
        message = f"ttt tokenize: stopped by {stop.name}; the same command continues here\n"
        assert (process.returncode, out, err) == (status, "", message)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(stored(here / "out/train")) == 1000 * (SIZE + 2 * len(TEXTS))


def children(pid):
    """Return the processes that a process has started."""
    found = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended meanwhile
            found += Path(f"/proc/{pid}/task/{task}/children").read_text().split()
    return found
