"""Check the files of evaluations: their names, what they hold, how they are found again, and paired differences."""

import csv
import dataclasses

import numpy as np
import pytest

from ttt_jax.config import ConfigError
from ttt_jax.evaluation import catalogue, evaluations, result_files, statistics
from ttt_jax.evaluation.statistics import Segment
from ttt_jax.storage import json_files


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
def test_names_are_found_again(evaluation, tmp_path, kind, expected):
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


def test_the_longest_context_is_read_by_default_and_all_are_listed(evaluation, tmp_path):
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
def test_a_missing_evaluation_names_the_command(tmp_path, arguments, kind, command):
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


def test_files_of_another_version_are_refused(evaluation, tmp_path):
    path = evaluations.save(evaluation, tmp_path / "eval", "test-6")
    path.with_suffix(".json").write_text('{"step": 4}')
    np.savez(path, allow_pickle=False, position=evaluation.position, loss=evaluation.loss)
    with pytest.raises(ConfigError, match=r"test-6.npz: not of this version of ttt_jax"):
        evaluations.read(tmp_path, "test", 6)


# ---- Several results of one name


def save(workdir, stem="texts-test-6", loss=1.0, **about):
    found = statistics.summarise([Segment(0, 0, np.full(6, loss), np.ones(6, bool))], 6)
    known = {"split": "test", "context": 6, "of": "windows", "windows": 4, "loss": loss, **about}
    return evaluations.save(evaluations.from_summary(known, found), workdir / "eval", stem)


def of(workdir, **kind):
    return evaluations.read(workdir, "test", 6, **kind).about["loss"]


def test_results_of_two_datasets_with_one_name_are_kept_and_found_by_path(tmp_path):
    for loss, place in enumerate("xyx", 1):
        save(tmp_path, loss=float(loss), source_path=f"/{place}/texts", fingerprint=place)
    assert len(list((tmp_path / "eval").glob("*.json"))) == 2  # the third is in place of the first
    assert (of(tmp_path, source="/x/texts"), of(tmp_path, source="/y/texts")) == (3.0, 2.0)
    with pytest.raises(ConfigError, match="no evaluation of the test split"):
        of(tmp_path, source="/z/others")


def test_results_with_two_numbers_of_windows_are_kept_and_one_must_be_chosen(tmp_path):
    for windows in (4, 2):
        path = save(tmp_path, "test-6", loss=float(windows), windows=windows, fingerprint="f")
    assert path.name != "test-6.npz"
    assert (of(tmp_path, windows=4), of(tmp_path, windows=2)) == (4.0, 2.0)
    with pytest.raises(ConfigError) as caught:
        of(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{tmp_path / 'eval'}: 2 results of the test split with context 6: test-6 (4 windows of ")


def test_files_of_earlier_versions_are_found(tmp_path):
    save(tmp_path, loss=5.0)
    assert of(tmp_path, source="/gone/texts") == 5.0


def test_replacing_the_result_of_an_earlier_step_warns(tmp_path, capsys):
    about = {"fingerprint": "f", "context": 8, "windows": 2, "step": 4}
    json_files.write_object(tmp_path / "test-8.json", about)
    assert catalogue.place(tmp_path, "test-8", about) == "test-8"
    assert capsys.readouterr().err == ""
    assert catalogue.place(tmp_path, "test-8", {**about, "step": 6}) == "test-8"
    said = f"{tmp_path / 'test-8'}.json: in place of the result of step 4; --step keeps one of each\n"
    assert capsys.readouterr().err == said


def test_known_results_are_listed(tmp_path):
    assert catalogue.known_results(tmp_path / "eval") == ""
    for count in (1, 2, 10):
        for i in range(count):
            folder = tmp_path / str(count)
            folder.mkdir(exist_ok=True)
            (folder / f"test-{i}.json").write_text("{}")
    assert catalogue.known_results(tmp_path / "1") == "; there is test-0"
    assert catalogue.known_results(tmp_path / "2") == "; there are test-0, test-1"
    eight = ", ".join(f"test-{i}" for i in range(8))
    assert catalogue.known_results(tmp_path / "10") == f"; there are {eight} and 2 more"


# ---- Paired differences: on the same documents, what is common to both models cancels

ABOUT = {"workdir": "a", "fingerprint": "f", "split": "test", "of": "documents", "context": 64}
RNG = np.random.default_rng(1)
LEVEL = RNG.normal(3, 1, (30, 1))  # of documents, the same for both models
LENGTHS = np.append(64, RNG.integers(5, 65, 29))
DIFFERENCE = RNG.normal(-0.05, 0.02, (30, 64))


def of_documents(nll, **about):
    segments = [Segment(i, 0, row[:n]) for i, (row, n) in enumerate(zip(nll, LENGTHS, strict=True))]
    known = {**ABOUT, "windows": len(segments), "tokens": int(sum(LENGTHS))}
    return evaluations.from_summary({**known, **about}, statistics.summarise(segments, 64))


BASE = LEVEL + RNG.normal(0, 0.5, (30, 64))
A, B = of_documents(BASE + DIFFERENCE), of_documents(BASE, workdir="b")


def test_the_difference_and_its_error_follow_from_differences_of_documents():
    found = evaluations.paired_difference(A, B)
    counted = np.arange(64) < LENGTHS[:, None]
    sums, counts = (DIFFERENCE * counted).sum(1), counted.sum(1)
    mean = sums.sum() / counts.sum()
    assert found.mean == pytest.approx(mean, rel=1e-9)
    error = np.sqrt(30 / 29 * ((sums - mean * counts) ** 2).sum()) / counts.sum()
    assert found.standard_error == pytest.approx(error, rel=1e-6)
    assert found.low < found.mean < found.high
    assert found.standard_error < 0.02 * float(statistics.estimate(A.document_sums.sum(1), counts).standard_error)
    for k, (first, last) in enumerate(zip(A.bin_first, A.bin_last, strict=True)):
        where = counted[:, first - 1 : last]
        expected = DIFFERENCE[:, first - 1 : last][where].mean()
        assert found.bins.mean[k] == pytest.approx(expected, abs=1e-9)
    assert evaluations.paired_difference(B, A).mean == pytest.approx(-mean, rel=1e-9)


def test_a_model_does_not_differ_from_itself():
    found = evaluations.paired_difference(A, A)
    assert (found.mean, found.standard_error, found.low, found.high) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("key", "value"), [("fingerprint", "g"), ("split", "train"), ("of", "windows"), ("context", 65), ("windows", 31)]
)
def test_evaluations_of_other_text_are_not_compared(key, value):
    other = dataclasses.replace(B, about={**B.about, key: value})
    with pytest.raises(ConfigError) as caught:
        evaluations.paired_difference(A, other)
    assert str(caught.value).startswith(f"a: its evaluation has {key} {A.about[key]}, that of b {value}; expected the")


def test_evaluations_of_other_tokens_are_not_compared():
    counts = B.document_counts.copy()
    counts[[0, 1]] = counts[[1, 0]]
    with pytest.raises(ConfigError, match="a: its evaluation counts other tokens than that of b"):
        evaluations.paired_difference(A, dataclasses.replace(B, document_counts=counts))
