"""Check the files of inspections: what they hold, how they are found again, and the table of layers."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from rich.console import Console

from ttt_jax.cli import inspect
from ttt_jax.config import ConfigError
from ttt_jax.evaluation import inspections

RNG = np.random.default_rng(0)


def arrays_of(found):
    return {field.name: getattr(found, field.name) for field in dataclasses.fields(found)[1:]}


def made_up(context=9, step=7, matrices=None):
    """Return an inspection of random numbers: two layers, three heads, mini-batches of four.

    With a number of ``matrices``, it has a rate for each weight matrix and no spread of targets.
    """
    shapes = dict.fromkeys(("loss_at_w0", "loss_before", "loss_after", "target_spread"), (2, context))
    shapes |= {"weight_change": (2, 3)}
    shapes |= {f"{name}_standard_error": shape for name, shape in shapes.items()}
    shapes |= {"weight_distance": (2, 3, 3), "w0_norm": (2, 3), "eta": (2, 3, context), "position_eta": (2, 4)}
    shapes |= {"eta_standard_error": (2, context)}
    if matrices is not None:
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith("target_spread")}
        shapes |= {"eta": (2, 3, matrices, context), "eta_standard_error": (2, matrices, context)}
    arrays = {name: RNG.random(shape) for name, shape in shapes.items()}
    places = {"position": np.arange(1, context + 1), "weight_position": np.array([4, 8, 9])}
    return inspections.Inspection({"step": step, "context": context}, **places, **arrays)


def test_a_layer_in_a_line():
    found = made_up()  # the last quarter of nine positions begins at the seventh
    for i, line in enumerate(inspections.summary(found)):
        assert line.loss_at_w0 == pytest.approx(found.loss_at_w0[i, 6:].mean())
        assert line.loss_after == pytest.approx(found.loss_after[i, 6:].mean())
        assert line.explained == pytest.approx(1 - found.loss_before[i, 6:].sum() / found.target_spread[i, 6:].sum())
        assert line.weight_change == found.weight_change[i, -1]
        heads = found.eta[i].mean(1)
        assert (line.eta, line.eta_min, line.eta_max) == pytest.approx((heads.mean(), heads.min(), heads.max()))


def test_rates_by_matrix_no_spread_of_targets_and_a_w0_of_zero(tmp_path):
    found = made_up(matrices=4)
    found.weight_change[0], found.w0_norm[0] = np.nan, 0
    path = inspections.save(found, tmp_path, "validation-9")
    back = inspections.read(tmp_path, "validation")
    assert back.target_spread is None
    np.testing.assert_array_equal(back.eta, found.eta)
    with np.load(path, allow_pickle=False) as file:
        assert not [name for name in file if "target_spread" in name]
    first, second = json.loads(path.with_suffix(".json").read_text())["layers"]
    assert (first["explained"], second["explained"], first["weight_change"]) == (None, None, None)
    rates = found.eta.mean(-1)
    assert [second[key] for key in ("eta", "eta_min", "eta_max")] == pytest.approx(
        [rates[1].mean(), rates[1].min(), rates[1].max()]
    )
    with path.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert not [row for row in rows if row["quantity"] in ("eta", "target_spread") or "nan" in row.values()]
    third = [row for row in rows if (row["quantity"], row["layer"]) == ("eta_3", "1")]
    means, heads = [row for row in third if not row["head"]], [row for row in third if row["head"]]
    np.testing.assert_allclose([float(row["value"]) for row in means], found.eta[1, :, 3].mean(0))
    np.testing.assert_allclose([float(row["standard_error"]) for row in means], found.eta_standard_error[1, 3])
    np.testing.assert_allclose([float(row["value"]) for row in heads], found.eta[1, :, 3].mean(1))
    table = Console(width=120, record=True)
    table.print(inspect._table(found.blocks, inspections.summary(found), per_matrix=True))
    text = table.export_text()
    assert "explained" not in text
    assert "nan" not in text
    assert text.count("W0 = 0") == 1
    assert "of heads and weight matrices" in text


def test_files_hold_the_inspection(tmp_path):
    found = made_up()
    found.weight_change[1] = found.loss_after_standard_error[0] = np.nan
    path = inspections.save(found, tmp_path, "validation-9")
    assert path == tmp_path / "inspect" / "validation-9.npz"
    with np.load(path, allow_pickle=False) as file:
        assert file.keys() == arrays_of(found).keys()
    back = inspections.read(tmp_path, "validation")
    for name, value in arrays_of(found).items():
        np.testing.assert_array_equal(getattr(back, name), value)
    layers = back.about.pop("layers")
    assert back.about.pop("not_finite") == 0
    assert back.about == found.about
    assert layers[0] == inspections.summary(found)[0]._asdict()
    assert layers[1]["weight_change"] is None
    json.loads(path.with_suffix(".json").read_text(), parse_constant=pytest.fail)

    with path.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))

    def column(quantity, layer, key="value", by_head=False):
        chosen = [row for row in rows if (row["quantity"], row["layer"]) == (quantity, str(layer))]
        return [float(row[key] or "nan") for row in chosen if bool(row["head"]) is by_head]

    for name in ("loss_at_w0", "loss_before", "loss_after", "target_spread", "weight_change"):
        for layer in (0, 1):
            np.testing.assert_array_equal(column(name, layer), getattr(found, name)[layer])
            errors = getattr(found, f"{name}_standard_error")[layer]
            np.testing.assert_array_equal(
                column(name, layer, "standard_error"), np.where(np.isnan(errors), np.nan, errors)
            )
    np.testing.assert_array_equal(column("weight_change", 0, "position"), [4, 8, 9])
    np.testing.assert_allclose(column("eta", 1), found.eta[1].mean(0))
    np.testing.assert_allclose(column("eta", 1, by_head=True), found.eta[1].mean(1))
    np.testing.assert_allclose(column("weight_distance", 1), found.weight_distance[1].mean(0))
    np.testing.assert_array_equal(column("w0_norm", 0, by_head=True), found.w0_norm[0])
    np.testing.assert_array_equal(column("position_eta", 0), found.position_eta[0])
    np.testing.assert_array_equal(column("position_eta", 0, "position"), [1, 2, 3, 4])


def test_the_longest_context_is_read_by_default(tmp_path):
    for context in (9, 17, 12):
        inspections.save(made_up(context), tmp_path, inspections.name("test", context))
    inspections.save(made_up(30), tmp_path, inspections.name("test", 30, by_document=True))
    inspections.save(made_up(40, step=3), tmp_path, inspections.name("test", 40, step=3))

    def read(*arguments, **kind):
        about = inspections.read(tmp_path, "test", *arguments, **kind).about
        return about["context"], about["step"]

    assert read() == (17, 7)
    assert read(12) == (12, 7)
    assert read(by_document=True) == (30, 7)
    assert read(step=3) == (40, 3)
    for arguments, kind, asked in (
        (
            (13,),
            {},
            "with context 13; there are .*test-9, test-documents-30; run: ttt inspect .* --split test --context 13$",
        ),
        ((), {"step": 4}, "of the test split; there are .*; run: ttt inspect .* --split test --context 2048 --step 4$"),
        ((9,), {"by_document": True}, "--context 9 --by-document$"),
    ):
        with pytest.raises(ConfigError, match=asked):
            read(*arguments, **kind)


def test_losses_that_are_not_finite_show(tmp_path):
    found = made_up()
    found.loss_before[1, 7], found.loss_after[1, 7], found.loss_at_w0[0, 0] = np.nan, np.inf, np.inf
    path = inspections.save(found, tmp_path, "validation-9")
    about = json.loads(path.with_suffix(".json").read_text(), parse_constant=pytest.fail)
    assert about["not_finite"] == inspections.not_finite(found) == 2  # positions of layers
    assert [layer["loss_before"] is None for layer in about["layers"]] == [False, True]
    assert (about["layers"][1]["loss_after"], about["layers"][1]["explained"]) == (None, None)
    lines = path.with_suffix(".csv").read_text().splitlines()
    assert [line for line in lines if line.startswith("loss_before,1,,8,nan")]
    table = Console(width=120, record=True)
    table.print(inspect._table(found.blocks, inspections.summary(found)))
    assert table.export_text().count("not finite") == 3  # and the share that is explained
