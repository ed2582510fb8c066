"""Check which files are listed: links, globs, unknown kinds, files with several names, and datasets of tokens."""

import os

import corpus
import fsspec
import pytest
from refusals import error_of

from ttt_jax.config import ConfigError
from ttt_jax.data.prepare import files, listing, tokenize, tokenizer
from ttt_jax.data.prepare.tokenize_units import Job
from ttt_jax.storage.store import Store

BYTES = Job(tokenizer.byte(), 256, 257)
EXPECTED = ".jsonl, .ndjson, .json, .txt, .parquet, or these but the last with .zst, .zstd, .gz, .xz or .bz2"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(*names):
    """Write files of one byte each."""
    for name in names:
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        with open(name, "wb") as file:
            file.write(b"x")


def found(*patterns, output=""):
    root = f"{os.getcwd()}/"
    return [file.location.removeprefix(root) for file in listing.find("train", list(patterns), output)]


def refused(*patterns):
    return error_of(ConfigError, found, *patterns)


# ---- Links


def test_links_to_folders_are_followed_once(here, capsys):
    put("in/a.jsonl", "other/b.jsonl")
    os.symlink(here / "other", "in/more")
    os.symlink(here / "in", "in/round")
    expected = ["in/a.jsonl", "in/more/b.jsonl"]
    for pattern in ("in", "in/**/*.jsonl", "in/**"):
        assert found(pattern) == expected
        said = capsys.readouterr().err
        assert said == f"{here}/in/round: left out; it leads to a folder that is read already, {here}/in\n"
    assert found("in/*/*.jsonl") == ["in/more/b.jsonl", "in/round/a.jsonl"]
    assert found("in/m*/b.jsonl") == ["in/more/b.jsonl"]


def test_a_folder_keeps_its_own_name_whatever_links_lead_to_it(here, capsys):
    put("in/z/deep/a.jsonl")
    os.makedirs("in/b")
    os.symlink(here / "in/z", "in/b/link")
    for pattern in ("in", "in/**/deep/*"):
        assert found(pattern) == ["in/z/deep/a.jsonl"]
        assert capsys.readouterr().err.startswith(f"{here}/in/b/link: left out; it leads to ")


def test_a_broken_link_is_named(here):
    put("in/a.jsonl")
    os.symlink("nowhere.jsonl", "in/x.jsonl")
    for pattern in ("in", "in/*", "in/**/*.jsonl", "in/x.jsonl"):
        assert refused(pattern) == f"--train {here}/in/x.jsonl: no such file"


def test_a_folder_that_may_not_be_listed_is_named(here, monkeypatch):
    put("in/a.jsonl", "in/closed/b.jsonl")
    scandir = os.scandir

    def closed(place):
        if str(place).endswith("closed"):
            raise PermissionError(13, "Permission denied", place)
        return scandir(place)

    monkeypatch.setattr(os, "scandir", closed)
    assert refused("in") == f"--train in: {here}/in/closed: Permission denied"


def test_a_pipe_is_refused(here):
    os.mkfifo("in.jsonl")
    assert refused("in.jsonl") == f"--train {here}/in.jsonl: is a pipe or a device; expected a file"


# ---- One file with several names


def test_a_file_with_several_names_is_listed_once(here, capsys):
    put("in/a.jsonl", "in/c.jsonl")
    os.symlink("a.jsonl", "in/b.jsonl")
    os.link("in/c.jsonl", "in/d.jsonl")
    listed = listing.find("train", ["in", "in/./a.jsonl", "in/c.jsonl"])
    assert [file.location for file in listing.without_duplicates(listed)] == [
        f"{here}/in/a.jsonl",
        f"{here}/in/c.jsonl",
    ]
    said = capsys.readouterr().err
    again = [f"b.jsonl (the same file as {here}/in/a.jsonl)", f"d.jsonl (the same file as {here}/in/c.jsonl)"]
    again += [f"./a.jsonl (the same file as {here}/in/a.jsonl)", "c.jsonl (named twice)"]
    assert said == f"4 files left out, read already: {', '.join(f'--train {here}/in/{each}' for each in again)}\n"


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_file_in_two_splits_is_refused_whatever_its_names(here, link):
    put("a.jsonl")
    link("a.jsonl", "v.jsonl")
    listed = listing.find("train", ["a.jsonl"]) + listing.find("validation", ["v.jsonl"])
    with pytest.raises(ConfigError) as caught:
        listing.without_duplicates(listed)
    assert str(caught.value) == f"--validation {here}/v.jsonl: is in --train already"


def test_copies_are_listed_and_reported(here, capsys):
    put("a.jsonl", "b.jsonl", "c.jsonl", "v.jsonl")
    (here / "c.jsonl").write_bytes(b"other")
    listed = listing.without_duplicates(
        listing.find("train", ["[abc].jsonl"]) + listing.find("validation", ["v.jsonl"])
    )
    assert len(listed) == 4
    assert capsys.readouterr().err == ""
    listing.report_copies(files.with_digests(listed))
    assert capsys.readouterr().err == (
        f"2 files with the same content as another: --train {here}/b.jsonl (same as --train {here}/a.jsonl), "
        f"--validation {here}/v.jsonl (same as --train {here}/a.jsonl)\n"
    )
    listing.report_copies(files.with_digests(listed[1:3]))
    assert capsys.readouterr().err == ""


# ---- Files that are not read


def test_files_of_unknown_kinds_are_counted_and_named(here, capsys):
    put("in/a.jsonl", *(f"in/{i}.lz4" for i in range(7)), "in/.h.jsonl", "in/sub/b.txt")
    assert found("in") == ["in/a.jsonl", "in/sub/b.txt"]
    assert capsys.readouterr().err == (
        "--train in: left out 8 files, hidden or with unknown endings: "
        ".h.jsonl, 0.lz4, 1.lz4, 2.lz4, 3.lz4 and 3 more\n"
    )
    assert found("in/[a-z5]*") == ["in/a.jsonl"]
    assert capsys.readouterr().err == (
        "--train in/[a-z5]*: left out 1 file, hidden or with unknown endings: 5.lz4\n"
        "--train in/[a-z5]*: left out 1 folder, read only if the glob ends in /**: sub\n"
    )
    assert found("in/[a-z5]*/**") == ["in/sub/b.txt"]
    assert capsys.readouterr().err == ""


def test_patterns_without_a_readable_file_are_refused(here):
    put("in/a.lz4", "in/b.md", "deep/er/a.txt")
    what = "nothing that can be read (2 files, hidden or with unknown endings: a.lz4, b.md)"
    for pattern in ("in", "in/*", "in/**"):
        assert refused(pattern) == f"--train {pattern}: {what}; expected files named {EXPECTED}"
    assert refused("in/*.md") == f"--train {here}/in/b.md: cannot be read; expected a name that ends in {EXPECTED}"
    assert refused("deep/*").startswith(
        "--train deep/*: nothing that can be read (1 folder, read only if the glob ends in /**: "
    )
    assert refused("in/*.txt") == f"--train in/*.txt: no such file; expected files named {EXPECTED}"


def test_an_empty_pattern_is_refused(here):
    put("a.jsonl")
    assert refused("a.jsonl", "") == "--train: an empty name; expected a path, a folder, a glob or a URL"


@pytest.mark.parametrize("name", ["part[1]", "~", "~user", "a b", "$HOME", "a::b", "{x}", "what?", "*", "ünï"])
def test_names_that_look_like_globs_or_variables_are_names(here, name):
    put(f"{name}/{name}.jsonl", "p/part1.jsonl")
    expected = [f"{name}/{name}.jsonl"]
    for pattern in (name, f"{name}/{name}.jsonl", f"{name}/*.jsonl", f"{name}/**/*.jsonl", f"{here}/{name}"):
        assert found(pattern) == expected


# ---- Datasets


def make(output):
    put("elsewhere.txt")
    tokenize.tokenize(listing.find("train", ["elsewhere.txt"]), BYTES, Store(output), corpus.in_this_process)


@pytest.mark.parametrize("pattern", ["in", "in/**/*.json*", "in/**", "./in/../in"])
def test_an_output_among_the_input_is_left_out_the_second_time_too(here, capsys, pattern):
    put("in/a.jsonl", "in/b.json")
    said = []
    for _ in range(2):
        listed = listing.find("train", [pattern], "in/tok")
        assert [(os.path.basename(file.location), file.size) for file in listed] == [("a.jsonl", 1), ("b.json", 1)]
        said.append(capsys.readouterr().err)
        make("in/tok")
        put("in/tok/problems.jsonl", "in/tok/more/c.jsonl")
    assert said[0] == said[1]
    assert said[0].startswith("--output in/tok: lies in ")
    assert said[0].count("\n") == 1


def test_every_dataset_among_the_input_is_left_out_and_named(here, capsys):
    put("in/a.jsonl", "in/begun/_unfinished/state.json", "in/begun/train/zarr.json", "in/mine/zarr.json")
    put("in/bpe/_unfinished/tokenizer.json", "in/bpe/running.json")
    make("in/tok")
    put("in/tok/problems.jsonl")
    what = "left out; it holds tokens that ttt tokenize made, not text"
    expected = [f"{here}/in/{name}: {what}" for name in ("begun", "bpe", "tok")]
    for pattern in ("in", "in/**/*.json*"):
        assert found(pattern) == ["in/a.jsonl", "in/mine/zarr.json"]
        assert capsys.readouterr().err.splitlines() == expected
    assert found("in/a.jsonl", "in/tok", "in/tok/problems.jsonl") == ["in/a.jsonl"]
    assert capsys.readouterr().err.splitlines() == 2 * expected[2:]
    assert found("in/*", output="in/tok") == ["in/a.jsonl"]
    assert refused("in/tok") == f"--train in/tok: holds tokens; expected files of text, named {EXPECTED}"


def test_datasets_on_other_file_systems_are_left_out(capsys):
    memory = fsspec.filesystem("memory")
    for name in ("a.jsonl", "tok/problems.jsonl", "old/problems.jsonl", "tok/running.json"):
        memory.pipe(f"/of-listing/{name}", b"x")
    memory.pipe("/of-listing/old/dataset.json", b'{"format": "ttt_jax tokens"}')
    for pattern in ("memory://of-listing", "memory://of-listing/**/*.json*"):
        listed = listing.find("train", [pattern], "memory://of-listing/tok")
        assert [file.location for file in listed] == ["memory:///of-listing/a.jsonl"]
        lines = capsys.readouterr().err.splitlines()
        assert lines[0].startswith("--output memory://of-listing/tok: lies in /of-listing")
        assert lines[1:] == ["/of-listing/old: left out; it holds tokens that ttt tokenize made, not text"]
