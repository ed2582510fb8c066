"""The files of an evaluation: their names, what they hold, and how they are found again."""

import csv
import dataclasses

import numpy as np
import pytest

from ttt_jax.config import ConfigError
from ttt_jax.evaluation import evaluations, result_files, statistics
from ttt_jax.evaluation.statistics import Segment


@pytest.fixture(scope="module")
def evaluation():
    nll = np.random.default_rng(0).gamma(2.0, 1.0, (4, 6))
    nll[:, 1] = np.nan
    found = statistics.summarise([Segment(i, 0, row, np.isfinite(row)) for i, row in enumerate(nll)], 6)
    return evaluations.from_summary({"split": "test", "context": 6, "loss": float(found.all.mean)}, found)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ({}, "test-6"),
        ({"by_document": True}, "test-documents-6"),
        ({"by_document": True, "carried": True}, "test-documents-carried-6"),
        ({"step": 0}, "test-6-at-0"),
        ({"source": "gs://bucket/the pile/"}, "the_pile-test-6"),
        ({"source": "books", "by_document": True, "step": 300}, "books-test-documents-6-at-300"),
    ],
)
def test_names(evaluation, tmp_path, kind, expected):
    assert evaluations.name("test", 6, **kind) == expected
    evaluations.save(evaluation, tmp_path / "eval", expected)
    found = evaluations.read(tmp_path, "test", 6, **kind)
    assert found.about == evaluation.about
    longest = evaluations.read(tmp_path, "test", **kind)
    np.testing.assert_array_equal(longest.loss, evaluation.loss)
    others = [{}, {"by_document": True}, {"step": 300}, {"source": "books"}]
    for other in others:
        if evaluations.name("test", 6, **other) != expected:
            with pytest.raises(ConfigError):
                evaluations.read(tmp_path, "test", **other)


def test_files_hold_the_evaluation(evaluation, tmp_path):
    path = evaluations.save(evaluation, tmp_path / "new" / "eval", "test-6")
    assert path == tmp_path / "new" / "eval" / "test-6.npz"
    assert {p.name for p in path.parent.iterdir()} == {"test-6.npz", "test-6.csv", "test-6.json"}
    found = evaluations.read_file(path)
    for field in dataclasses.fields(evaluation)[1:]:
        np.testing.assert_array_equal(getattr(found, field.name), getattr(evaluation, field.name))
    with path.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name in ("position", "loss", "standard_error", "count"):
        np.testing.assert_array_equal([float(row[name]) for row in rows], getattr(evaluation, name))
    assert found.about == result_files.about(path.with_suffix(".json")) == evaluation.about
    assert evaluation.bin_first.tolist() == [1, 2, 3, 4, 5, 6]
    assert (evaluation.bin_last - evaluation.bin_first + 1).sum() == 6


def test_the_longest_context_and_all_there_are(evaluation, tmp_path):
    for context in (6, 48, 7):
        about = {**evaluation.about, "context": context}
        evaluations.save(dataclasses.replace(evaluation, about=about), tmp_path / "eval", f"test-{context}")
    assert evaluations.read(tmp_path, "test").about["context"] == 48
    assert evaluations.read(tmp_path, "test", 7).about["context"] == 7
    assert [about["context"] for about in evaluations.listed(tmp_path)] == [48, 6, 7]
    assert evaluations.listed(tmp_path / "elsewhere") == []


@pytest.mark.parametrize(
    ("arguments", "kind", "command"),
    [
        (("test", 6), {}, "--split test --context 6"),
        (("validation",), {"by_document": True}, "--split validation --context 2048 --by-document"),
        (
            ("test", 6),
            {"by_document": True, "carried": True, "step": 3},
            "--split test --context 6 --carry-state --step 3",
        ),
        (("test",), {"source": "books"}, "--split test --context 2048 --source books"),
    ],
)
def test_where_there_is_none_the_command_is_named(tmp_path, arguments, kind, command):
    with pytest.raises(ConfigError) as caught:
        evaluations.read(tmp_path, *arguments, **kind)
    assert str(caught.value).startswith(f"{tmp_path}: no evaluation of the {arguments[0]} split")
    assert str(caught.value).endswith(f"; run: ttt eval --workdir {tmp_path} {command}")


_DAMAGED = r"/test-6\.(npz|json): (missing or )?damaged.* (expected what ttt eval wrote|run ttt eval again)$"


@pytest.mark.parametrize("suffix", [".npz", ".json"])
@pytest.mark.parametrize("content", [b"", b"{", b"garbage", None])
def test_damaged_files_are_named(evaluation, tmp_path, suffix, content):
    path = evaluations.save(evaluation, tmp_path / "eval", "test-6")
    evaluations.read_file(path)
    path.with_suffix(suffix).unlink()
    if content is not None:
        path.with_suffix(suffix).write_bytes(content)
    with pytest.raises(ConfigError, match=_DAMAGED):
        evaluations.read_file(path)
    whole = evaluations.save(evaluation, tmp_path / "eval", "test-6").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=_DAMAGED):
        evaluations.read_file(path)


def test_files_of_another_version(evaluation, tmp_path):
    path = evaluations.save(evaluation, tmp_path / "eval", "test-6")
    path.with_suffix(".json").write_text('{"step": 4}')
    np.savez(path, allow_pickle=False, position=evaluation.position, loss=evaluation.loss)
    with pytest.raises(ConfigError, match=r"test-6.npz: not of this version of ttt_jax"):
        evaluations.read(tmp_path, "test", 6)
