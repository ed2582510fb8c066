"""Check that a stopped run ends with the same bytes, and that no other command touches its folder.

A run dies in this process, at every single change of its folder; test_tokenize_killed.py kills processes.
"""

import itertools
import json
import shutil

import corpus
import pytest
from refusals import error_of

from ttt_jax.config import ConfigError
from ttt_jax.data.prepare import tokenizer
from ttt_jax.data.prepare.tokenize import tokenize
from ttt_jax.data.prepare.tokenize_units import Job
from ttt_jax.errors import DataError
from ttt_jax.storage.store import Store

JOB = Job(tokenizer.byte(), 256, 257)
GOOD = corpus.documents(24)
BAD_LINES = {3: b"junk\n", 11: b'{"text": null}\n', 12: b'{"txt": 1}\n', 19: b'{"text": "\\ud800"}\n'}


class KilledError(BaseException):
    """A kill: no Exception, so that no handler cleans up."""


class Dying(Store):
    """A folder that fails after ``steps`` changes; a deletion that fails is half done."""

    def __init__(self, location, steps):
        super().__init__(location)
        self._steps = steps

    def _step(self):
        self._steps -= 1
        if self._steps < 0:
            raise KilledError

    def write(self, name, content):
        self._step()
        super().write(name, content)

    def delete_file(self, name):
        self._step()
        super().delete_file(name)

    def delete(self, folder):
        if self._steps == 0:
            for name in sorted(self.names(f"{folder}/"))[::2]:
                super().delete_file(name)
        self._step()
        super().delete(folder)


@pytest.fixture
def with_bad_lines(tmp_path):
    """Return a file of 24 documents and bad lines, a file that is cut short, and a validation file."""
    lines = corpus.jsonl(GOOD).splitlines(keepends=True)
    for number, line in BAD_LINES.items():
        lines.insert(number - 1, line)
    broken = corpus.frames(corpus.jsonl(GOOD[:6]), 200)
    return [
        corpus.input_file(tmp_path / "a.jsonl", b"".join(lines)),
        corpus.input_file(tmp_path / "b.jsonl.zst", broken[: len(broken) * 2 // 3]),
        corpus.input_file(tmp_path / "c.jsonl", corpus.jsonl(GOOD[:3]), "validation"),
    ]


@pytest.fixture
def good(tmp_path):
    return [corpus.input_file(tmp_path / f"{i}.jsonl", corpus.jsonl(GOOD[i::2])) for i in range(2)]


def run(folder, files, job=JOB, store=Store, **options):
    options = {"shard": 256, "chunk": 64, "unit_bytes": 1500, "save_seconds": -1, **options}
    return tokenize(files, job, store(folder), corpus.in_this_process, **options)


def run_until(folder, files, steps, **options):
    """Run until the folder fails; return whether the run ended before."""
    try:
        run(folder, files, store=lambda location: Dying(location, steps), **options)
    except KilledError:
        return False
    return True


def refused(error, *arguments, **options):
    return error_of(error, run, *arguments, **options)


def states(folder):
    """Return the content and the time of the last change of every file."""
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_problems_are_listed_with_file_and_record(tmp_path, with_bad_lines):
    about = run(tmp_path / "out", with_bad_lines, skip_problems=True)
    lines = [json.loads(line) for line in (tmp_path / "out/problems.jsonl").read_text().splitlines()]
    assert about["skipped_records"] == len(lines) == 5
    found = [(line["file"], line["record"]) for line in lines[:4]]
    assert found == [(with_bad_lines[0].location, number) for number in BAD_LINES]
    whats = ["not JSON: ", "'text' is null", "no key 'text'", "not valid Unicode"]
    assert all(line["problem"].startswith(what) for line, what in zip(lines, whats, strict=False))
    assert lines[4]["file"] == with_bad_lines[1].location
    assert lines[4]["problem"].startswith("Compressed file ended")
    assert about["splits"]["train"]["documents"] == 24 + lines[4]["record"] - 1
    assert about["splits"]["validation"]["documents"] == 3


@pytest.mark.slow
def test_a_run_that_dies_at_any_moment_ends_with_the_same_bytes(tmp_path, with_bad_lines):
    """Run with problems, which must be listed once each."""
    run(tmp_path / "expected", with_bad_lines, skip_problems=True, unit_bytes=600)
    expected = corpus.contents(tmp_path / "expected")
    for steps in itertools.count():
        ended = run_until(tmp_path / "out", with_bad_lines, steps, skip_problems=True, unit_bytes=2500)
        run(tmp_path / "out", with_bad_lines, skip_problems=True, save_seconds=99)
        assert corpus.contents(tmp_path / "out") == expected, steps
        shutil.rmtree(tmp_path / "out")
        if ended:
            break
    assert steps > 40


@pytest.mark.parametrize("steps", [15, 23])
def test_a_run_that_dies_many_times_still_ends(tmp_path, with_bad_lines, steps):
    run(tmp_path / "expected", with_bad_lines, skip_problems=True)
    for _died in range(60):
        if run_until(tmp_path / "out", with_bad_lines, steps, skip_problems=True, unit_bytes=400):
            break
    assert _died > 3
    assert corpus.contents(tmp_path / "out") == corpus.contents(tmp_path / "expected")


def test_files_of_a_killed_write_are_ignored(tmp_path, with_bad_lines):
    """Leave files NAME.__lock, as a kill does before TensorStore renames them."""
    run(tmp_path / "expected", with_bad_lines, skip_problems=True)
    assert not run_until(tmp_path / "out", with_bad_lines, 30, skip_problems=True)
    unfinished = tmp_path / "out/_unfinished"
    assert list((unfinished / "problems").iterdir())
    for name in ("problems/99", "problems/2", "state.json", "9/train"):
        (unfinished / f"{name}.__lock").parent.mkdir(exist_ok=True)
        (unfinished / f"{name}.__lock").write_bytes(b"half")
    run(tmp_path / "out", with_bad_lines, skip_problems=True)
    assert corpus.contents(tmp_path / "out") == corpus.contents(tmp_path / "expected")


def test_a_run_stopped_by_a_bad_record_continues_once_it_is_mended(tmp_path, with_bad_lines):
    """Mend one bad record after another, the last in a second file."""
    lines, broken, _ = with_bad_lines
    content = (tmp_path / "a.jsonl").read_bytes()
    for number, bad in BAD_LINES.items():
        message = refused(DataError, tmp_path / "out", with_bad_lines)
        assert message.startswith(f"{lines.location}, record {number}: ")
        assert message.endswith("either way the same command continues from here")
        assert not (tmp_path / "out/dataset.json").exists()
        content = content.replace(bad, json.dumps({"text": f"mended {number}"}).encode() + b"\n")
        with_bad_lines[0] = corpus.input_file(tmp_path / "a.jsonl", content)
    assert refused(DataError, tmp_path / "out", with_bad_lines).startswith(f"{broken.location}, record ")
    with_bad_lines[1] = corpus.input_file(tmp_path / "b.jsonl.zst", corpus.frames(corpus.jsonl(GOOD[:6]), 200))
    about = run(tmp_path / "out", with_bad_lines)
    assert about["skipped_records"] == 0
    assert about["splits"]["train"]["documents"] == 24 + 4 + 6

    run(tmp_path / "expected", with_bad_lines)
    assert corpus.contents(tmp_path / "out") == corpus.contents(tmp_path / "expected")


def test_a_run_stopped_by_a_bad_record_continues_with_skip_problems(tmp_path, with_bad_lines):
    refused(DataError, tmp_path / "out", with_bad_lines)
    run(tmp_path / "out", with_bad_lines, skip_problems=True)
    run(tmp_path / "expected", with_bad_lines, skip_problems=True)
    assert corpus.contents(tmp_path / "out") == corpus.contents(tmp_path / "expected")


def test_a_run_that_stops_at_a_bad_record_has_saved_all_before_it(tmp_path, with_bad_lines):
    """Use a unit per line, such that the two lines before the bad one are saved."""
    refused(DataError, tmp_path / "out", with_bad_lines, unit_bytes=1, save_seconds=99)
    state = json.loads((tmp_path / "out/_unfinished/state.json").read_text())
    offset = sum(map(len, corpus.jsonl(GOOD[:2]).splitlines(keepends=True)))
    assert state["position"] == {"file": 0, "offset": offset, "records": 2, "found": True}


def test_several_bad_records_of_a_unit_are_counted(tmp_path, with_bad_lines):
    message = refused(DataError, tmp_path / "out", with_bad_lines, unit_bytes=1 << 20)
    assert "record 3: not JSON" in message
    assert "(and 3 more near it)" in message


def test_a_finished_dataset_is_left_alone(tmp_path, good):
    about = run(tmp_path / "out", good)
    before = states(tmp_path / "out")
    assert run(tmp_path / "out", good, unit_bytes=7, save_seconds=0) == about
    assert states(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["notes.txt", "train/c/0", "_unfinished.txt", ".hidden"])
def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, good, name):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    before = states(tmp_path / "out")
    message = refused(ConfigError, tmp_path / "out", good)
    assert message == f"--output {tmp_path}/out: holds {name}; expected a new or empty folder"
    assert states(tmp_path / "out") == before
    assert {p.name for p in (tmp_path / "out").iterdir()} == {name.split("/")[0]}


OTHERS = [
    ({"job": Job(JOB.tokenizer, None, 257)}, "bos: 256 there, None here"),
    ({"job": Job(JOB.tokenizer, 256, 257, text_key="content")}, "text_key: text there, content here"),
    ({"job": Job(JOB.tokenizer, 256, 257, test_fraction=0.1)}, "split_rule: {'by': 'files'} there, "),
    ({"shard": 512}, "shard: 256 there, 512 here"),
    ({"trained": {"vocab_size": 300}}, "tokenizer: "),
]


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(("change", "what"), OTHERS)
def test_another_request_is_refused_with_what_differs(tmp_path, good, finished, change, what):
    folder = tmp_path / "out"
    assert run_until(folder, good, 999 if finished else 15) == finished
    before = states(folder)
    message = refused(ConfigError, folder, good, **change)
    assert message.startswith(f"--output {folder}: holds tokens of another request ({what}")
    assert message.endswith("; expected the same request, or a new folder")
    assert states(folder) == before


@pytest.mark.parametrize("finished", [False, True])
def test_other_files_are_another_request(tmp_path, good, finished):
    folder = tmp_path / "out"
    assert run_until(folder, good, 999 if finished else 20) == finished
    before = states(folder)
    third = corpus.input_file(tmp_path / "third.jsonl", b'{"text": "a"}\n')
    longer = corpus.input_file(tmp_path / "0.jsonl", b'{"text": "a"}\n')
    for files, what in (
        (good[::-1], "file 1: --train 0.jsonl of "),
        (good[:1], f"file 2: --train 1.jsonl{'' if finished else f' of {good[1].size:,} bytes'} there, none here"),
        ([*good, third], "file 3: none there, --train third.jsonl"),
        (
            [longer, good[1]],
            f"file 1: --train 0.jsonl of {good[0].size:,} bytes there, --train 0.jsonl of 14 bytes here",
        ),
    ):
        message = refused(ConfigError, folder, files)
        assert message.startswith(f"--output {folder}: holds tokens of another request ({what}")
    assert states(folder) == before


def test_a_dataset_and_its_files_may_move(tmp_path, good):
    run(tmp_path / "out", good)
    (tmp_path / "elsewhere").mkdir()
    moved = [corpus.input_file(tmp_path / "elsewhere" / f"{i}.jsonl", corpus.jsonl(GOOD[i::2])) for i in range(2)]
    shutil.move(tmp_path / "out", tmp_path / "new")
    before = states(tmp_path / "new")
    run(tmp_path / "new", moved)
    assert states(tmp_path / "new") == before


def test_lost_tokens_of_an_unfinished_run_are_an_error(tmp_path, good):
    assert not run_until(tmp_path / "out", good, 20)
    (path,) = (tmp_path / "out/_unfinished").rglob("train")
    path.unlink()
    assert refused(DataError, tmp_path / "out", good) == f"{path}: is gone; delete {tmp_path}/out and begin anew"


def test_lost_problems_of_an_unfinished_run_are_an_error(tmp_path, with_bad_lines):
    assert not run_until(tmp_path / "out", with_bad_lines, 30, skip_problems=True)
    path = min((tmp_path / "out/_unfinished/problems").iterdir())
    path.unlink()
    message = refused(DataError, tmp_path / "out", with_bad_lines, skip_problems=True)
    assert message == f"{path}: is gone; delete {tmp_path}/out and begin anew"
