"""Check that a command continues or accepts a folder only for files of the same content."""

import gzip
import json

import corpus
import pytest
from refusals import error_of

from ttt_jax.config import ConfigError
from ttt_jax.data.prepare import tokenizer
from ttt_jax.data.prepare.files import InputFile
from ttt_jax.data.prepare.tokenize import tokenize
from ttt_jax.data.prepare.tokenize_units import Job
from ttt_jax.errors import DataError
from ttt_jax.storage.store import Store

JOB = Job(tokenizer.byte(), 256, 257)
TEXTS = [f"document {i:02} of the first" for i in range(20)]
OTHER = [text.replace("first", "other") for text in TEXTS]


def run(folder, files, **options):
    options = {"shard": 64, "chunk": 64, "unit_bytes": 100, "save_seconds": -1, **options}
    return tokenize(files, JOB, Store(folder), corpus.in_this_process, **options)


def run_a_part(folder, files, units):
    asked = iter(range(units))
    assert run(folder, files, unit_bytes=30, stop=lambda: next(asked, None) is None) is None


def refused(folder, files, **options):
    before = corpus.contents(folder)
    message = error_of(ConfigError, run, folder, files, **options)
    assert corpus.contents(folder) == before
    return message


@pytest.mark.parametrize("finished", [False, True])
def test_other_content_of_the_same_name_and_size_is_refused(tmp_path, finished):
    """Change the second of three files; the dataset holds all of them, or the first two."""
    files = [corpus.input_file(tmp_path / f"{i}.jsonl", corpus.jsonl(TEXTS)) for i in range(3)]
    if finished:
        run(tmp_path / "out", files)
    else:
        run_a_part(tmp_path / "out", files, 42)
        assert json.loads((tmp_path / "out/_unfinished/state.json").read_text())["position"]["file"] == 2
    corpus.input_file(tmp_path / "1.jsonl", corpus.jsonl(OTHER))
    message = refused(tmp_path / "out", files)
    assert message.startswith(
        f"--output {tmp_path}/out: holds tokens of another {files[1].location}, of the same name and size (sha256:"
    )
    assert message.endswith(" here); expected the same content, or a new folder")
    assert "\n" not in message
    corpus.input_file(tmp_path / "1.jsonl", corpus.jsonl(TEXTS))
    about = run(tmp_path / "out", files)
    assert [content.partition(":")[0] for content in about["contents"]] == 3 * ["sha256"]


def test_files_that_changed_after_the_dataset_was_finished_are_refused(tmp_path):
    """Check a file that has grown, a new file, a missing file, and a file of another name."""
    a = corpus.input_file(tmp_path / "a.txt", b"abc")
    b = corpus.input_file(tmp_path / "b.txt", b"x")
    run(tmp_path / "out", [a])
    begin = f"--output {tmp_path}/out: holds tokens of another request"
    end = "; expected the same request, or a new folder"
    new, old = "--train b.txt of 1 byte", "--train a.txt of 3 bytes"
    assert refused(tmp_path / "out", [a, b]) == f"{begin} (file 2: none there, {new} here){end}"
    assert refused(tmp_path / "out", [b]) == f"{begin} (file 1: {old} there, {new} here){end}"
    grown = corpus.input_file(tmp_path / "a.txt", b"abcd")
    assert refused(tmp_path / "out", [grown]) == f"{begin} (file 1: {old} there, --train a.txt of 4 bytes here){end}"
    run(tmp_path / "two", [grown, b])
    assert refused(tmp_path / "two", [grown]).endswith(f"(file 2: --train b.txt there, none here){end}")


def test_a_file_that_grows_while_it_is_read_stops_the_run_until_the_next_command(tmp_path):
    """Check that text after the part that was hashed is not written under that hash."""
    path = tmp_path / "a.jsonl"
    old = corpus.input_file(path, corpus.jsonl(TEXTS))

    def grow(job, units):
        for unit, part in corpus.in_this_process(job, units):
            if len(path.read_bytes()) == old.size:
                path.write_bytes(path.read_bytes() + corpus.jsonl(["more"]))
            yield unit, part

    options = {"shard": 64, "chunk": 64, "unit_bytes": 100, "save_seconds": -1}
    with pytest.raises(DataError) as caught:
        tokenize([old], JOB, Store(tmp_path / "out"), grow, **options)
    sizes = f"{old.size:,} bytes, now {path.stat().st_size:,}"
    advice = "the same command continues, once the file is complete"
    assert str(caught.value) == f"{path}: has changed while it was read ({sizes}); {advice}"
    new = InputFile("train", str(path), path.stat().st_size)
    assert run(tmp_path / "out", [new])["splits"]["train"]["documents"] == len(TEXTS) + 1
    run(tmp_path / "whole", [new])
    assert corpus.contents(tmp_path / "out") == corpus.contents(tmp_path / "whole")


def test_a_dataset_without_digests_is_recognised_by_name_and_size(tmp_path):
    files = [corpus.input_file(tmp_path / "a.jsonl", corpus.jsonl(TEXTS))]
    about = run(tmp_path / "out", files)
    path = tmp_path / "out/dataset.json"
    del about["contents"]
    path.write_text(json.dumps(about))
    assert run(tmp_path / "out", files) == about


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json"])
def test_a_file_that_changed_before_the_saved_position_is_refused(tmp_path, name):
    """Check also that the file may be mended after that position, and that the size of units does not matter."""

    def content(texts):
        whole = json.dumps([{"text": t} for t in texts]).encode() if name == "a.json" else corpus.jsonl(texts)
        return gzip.compress(whole, mtime=0) if name.endswith("gz") else whole

    def file(texts):
        return [corpus.input_file(tmp_path / name, content(texts))]

    mended = [*TEXTS[:15], *OTHER[15:]]
    run(tmp_path / "expected", file(mended))
    run_a_part(tmp_path / "out", file(TEXTS), 5)
    records = json.loads((tmp_path / "out/_unfinished/state.json").read_text())["position"]["records"]
    assert 4 < records < 15
    (changed,) = file([*TEXTS[:3], OTHER[3], *TEXTS[4:]])
    assert refused(tmp_path / "out", [changed]) == (
        f"{changed.location}: has changed before record {records + 1}, up to which its tokens are in "
        f"{tmp_path}/out; expected the same records up to there, or a new folder"
    )
    run(tmp_path / "out", file(mended), unit_bytes=333)
    assert corpus.contents(tmp_path / "out") == corpus.contents(tmp_path / "expected")
