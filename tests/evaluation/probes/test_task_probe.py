"""Compare probes of synthetic tasks with logits, with loops over distances, and with known answers."""

import csv
import json

import numpy as np
import pytest

from ttt_jax.config import ConfigError
from ttt_jax.data import synthetic
from ttt_jax.evaluation.probes import task_probe

OPTIONS = {"items": [2], "contexts": [20], "samples": 7}


@pytest.fixture(scope="module")
def run(made_run):
    return made_run("ttt_linear", vocab_size=12, source="associative_recall:2", sequence_length=20)


def test_accuracies_match_logits(run, plain_logits):
    (cell,) = task_probe.probe(run, **OPTIONS, batch_size=4)
    source = synthetic.task_source("associative_recall:2", "validation", 12, 20)
    right, losses, whole, by_distance = [], [], 0, {}
    for index in range(7):
        tokens, answers, sources = source.example(index)
        logits = plain_logits(run, tokens[None, :-1])[0]
        found = []
        for answer, repeated in zip(answers, sources, strict=True):
            here = logits[answer - 1]
            losses.append(np.log(np.exp(here).sum()) - here[tokens[answer]])
            found.append(here.argmax() == tokens[answer])
            by_distance.setdefault(int(np.ceil(np.log2(answer - repeated))), []).append(found[-1])
        right += found
        whole += all(found)
    assert (cell["answers"], cell["correct"], cell["accuracy"]) == (14, sum(right), sum(right) / 14)
    assert cell["whole"] == whole / 7
    assert cell["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert cell["low"] < cell["accuracy"] < cell["high"]
    found = {entry["last"]: (entry["answers"], entry["correct"]) for entry in cell["by_distance"]}
    assert found == {2**k: (len(rights), sum(rights)) for k, rights in by_distance.items()}
    assert all(entry["first"] == entry["last"] // 2 + 1 for entry in cell["by_distance"])
    assert {"items": 2, "context": 20, "split": "validation", "step": 3, "samples": 7}.items() <= cell.items()


def test_a_model_that_knows_all_and_one_that_knows_nothing(run, monkeypatch, tmp_path):
    """Replace the predictions of the model by the right answers, and by a constant."""
    run = run._replace(workdir=tmp_path / "r")

    def by_lookup(trained, read, examples, batch_size):
        tokens = np.stack([example.tokens for example in examples])
        return tokens[:, 1:], np.zeros(tokens[:, 1:].shape)

    def always(trained, read, examples, batch_size):
        shape = len(examples), len(examples[0].tokens) - 1
        return np.full(shape, 7), np.full(shape, 3.0)

    options = {"items": [2, 4], "contexts": [16, 40], "samples": 100}
    monkeypatch.setattr(task_probe, "_predictions", by_lookup)
    cells = task_probe.probe(run, **options)
    assert [(cell["items"], cell["context"]) for cell in cells] == [(2, 16), (2, 40), (4, 16), (4, 40)]
    assert {(cell["accuracy"], cell["whole"], cell["loss"]) for cell in cells} == {(1, 1, 0)}
    monkeypatch.setattr(task_probe, "_predictions", always)
    assert task_probe.probe(run, **options) == cells  # cells that are known are not computed again
    for cell in task_probe.probe(run, **options, split="test"):
        assert cell["accuracy"] == pytest.approx(1 / 6, abs=0.06)  # of six values
        assert cell["loss"] == 3


def test_answers_that_are_not_finite_show(run, monkeypatch, tmp_path):
    def predictions(trained, read, examples, batch_size):
        loss = np.zeros((len(examples), len(examples[0].tokens) - 1))
        loss[0] = np.nan
        return np.zeros_like(loss, int), loss

    monkeypatch.setattr(task_probe, "_predictions", predictions)
    run = run._replace(workdir=tmp_path / "r")
    [cell] = task_probe.probe(run, **OPTIONS)
    assert [cell[key] for key in ("correct", "accuracy", "whole", "loss", "low", "whole_high")] == [None] * 6
    assert (cell["not_finite"], cell["answers"]) == (2, 14)
    stored = (run.workdir / "probe" / "associative_recall.json").read_text()
    assert json.loads(stored, parse_constant=pytest.fail)["cells"] == [cell]


def test_longer_contexts_have_longer_distances(run, monkeypatch, tmp_path):
    monkeypatch.setattr(
        task_probe, "_predictions", lambda trained, read, examples, size: (np.zeros((50, 299)), np.zeros((50, 299)))
    )
    run = run._replace(workdir=tmp_path / "r")
    short, long = task_probe.probe(run, items=[4], contexts=[30, 300], samples=50)
    assert max(entry["last"] for entry in short["by_distance"]) == 32
    assert max(entry["last"] for entry in long["by_distance"]) == 512
    assert sum(entry["answers"] for entry in long["by_distance"]) == long["answers"] == 200
    folder = run.workdir / "probe"
    assert json.loads((folder / "associative_recall.json").read_text())["cells"] == [short, long]
    with (folder / "associative_recall-by_distance.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["last"]) for row in rows if row["context"] == "300"] == [e["last"] for e in long["by_distance"]]
    with (folder / "associative_recall.csv").open(newline="") as file:
        assert [row["context"] for row in csv.DictReader(file)] == ["30", "300"]


def test_runs_and_items_that_cannot_be_probed(run, loaded):
    with pytest.raises(ConfigError, match=r"data.source='embedded': is not a task to probe; expected a run on"):
        task_probe.task_of(loaded("ttt_linear").config)
    with pytest.raises(ConfigError, match=r"data.sequence_length=20: associative_recall of 8 pairs needs 32 or"):
        task_probe.probe(run._replace(config=wider(run.config)), **{**OPTIONS, "items": [2, 8]})
    with pytest.raises(ConfigError, match=r"model.vocab_size=12: associative_recall of 8 pairs needs 17 or"):
        task_probe.probe(run, **{**OPTIONS, "items": [8]})


def wider(config):
    config = config.copy_and_resolve_references()
    config.model.vocab_size = 40
    return config
