"""Pictures of evaluations: what is read, what is smoothed, and what a figure says."""

import json
import re

import numpy as np
import pytest
from matplotlib import colors, image

from ttt_jax.config import ConfigError
from ttt_jax.evaluation import evaluations, plot, statistics

LINEAR, MLP, TRANSFORMER = "TTT-Linear (Mamba backbone)", "TTT-MLP (Mamba backbone)", "Transformer"


@pytest.fixture
def evaluated(tmp_path):
    """``evaluated(name, model, ...)``: the workdir of a run that has been evaluated; its loss falls to ``end``."""

    def make(name, model=LINEAR, *, context=64, split="validation", end=1.5, **about):
        rng = np.random.default_rng(len(name))
        curve = end + 2 / np.sqrt(np.arange(1, context + 1))
        nll = curve + rng.normal(0, 0.2, (6, context))
        mask = np.ones_like(nll)
        mask[:, 10] = 0  # a position without loss
        nll = np.where(mask, nll, np.nan)
        found = statistics.summarise([statistics.Segment(i, 0, row) for i, row in enumerate(nll)], context)
        result = evaluations.from_summary({}, found)
        known = {
            "workdir": name,
            "model": model,
            "parameters": 1_234_567,
            "source": f"embedded/{split}",
            "fingerprint": "f1",
            "split": split,
            "of": "windows",
            "context": context,
            "training_context": 64,
            "windows": 6,
            "loss": float(found.all.mean),
        }
        result.about.update({**known, **about})
        evaluations.save(result, tmp_path / name / "eval", f"{split}-{context}")
        return tmp_path / name

    return make


def words(path) -> list[str]:
    """The texts of a drawing, which Matplotlib leaves as comments beside the outlines of their letters."""
    return re.findall(r"<!-- (.*?) -->", path.read_text())


# ---- Reading


def test_read(evaluated):
    workdir = evaluated("a", context=64)
    evaluated("a", context=128)
    evaluated("a", context=256, split="test")
    for context, length in ((None, 128), (64, 64)):
        found = plot.read(workdir, "validation", context)
        assert found.about == json.loads((workdir / f"eval/validation-{length}.json").read_text())
        np.testing.assert_array_equal(found.position, np.arange(1, length + 1))
        with np.load(workdir / f"eval/validation-{length}.npz") as file:
            np.testing.assert_array_equal(found.loss, file["loss"])
            np.testing.assert_array_equal(found.standard_error, file["standard_error"])
    assert plot.read(workdir, "test", None).about["context"] == 256


@pytest.mark.parametrize(
    ("split", "context", "said"),
    [
        ("test", None, "no evaluation of the test split; run: ttt eval --workdir {} --split test --context 2048"),
        (
            "validation",
            32,
            "no evaluation of the validation split with context 32; "
            "run: ttt eval --workdir {} --split validation --context 32",
        ),
    ],
)
def test_read_what_has_not_been_evaluated(evaluated, split, context, said):
    workdir = evaluated("a", context=64)
    with pytest.raises(ConfigError) as caught:
        plot.read(workdir, split, context)
    assert str(caught.value) == f"{workdir}: " + said.format(workdir)


# ---- Smoothing


def test_smoothing_is_a_mean_over_a_constant_ratio():
    position = np.arange(1, 301)
    loss = np.random.default_rng(0).normal(size=300)
    loss[[0, 40, 41, 200]] = np.nan
    smoothed = plot.smooth(position, loss, 1.15)
    for i, p in enumerate(position):
        near = [x for q, x in zip(position, loss, strict=True) if p / 1.15 <= q <= p * 1.15 and np.isfinite(x)]
        assert smoothed[i] == pytest.approx(np.mean(near), rel=1e-9) if near else np.isnan(smoothed[i])
    assert np.isnan(smoothed[0])  # nothing but NaN is near


def test_smoothing_keeps_constants_and_the_first_points():
    position = np.arange(1, 101)
    np.testing.assert_allclose(plot.smooth(position, np.full(100, 2.5)), 2.5, rtol=1e-12)
    smoothed = plot.smooth(position, position.astype(float))
    np.testing.assert_array_equal(smoothed[:6], position[:6])  # 7 / 1.15 > 6: alone in their windows
    assert smoothed[49] == np.mean(np.arange(44, 58))  # from 43.5 to 57.5


# ---- Figures


def test_a_figure_of_three_models(evaluated, tmp_path):
    runs = [
        evaluated("a", LINEAR, end=1.0),
        evaluated("b", MLP, end=1.5, parameters=123_456_789),
        evaluated("c", TRANSFORMER, end=2.0),
    ]
    means = [json.loads((run / "eval/validation-64.json").read_text())["loss"] for run in runs]
    plot.loss_by_position(runs, tmp_path / "abc.png")
    pixels = image.imread(tmp_path / "abc.png")[..., :3]
    assert pixels.shape == (736, 1152, 3)
    places = []
    for color in ("#0072B2", "#D55E00", "#000000"):
        drawn = np.abs(pixels - np.array(colors.to_rgb(color))).max(-1) < 0.02
        inside = drawn[160:650, 650:1100]  # within the axes, below the legend
        assert 300 < inside.sum() < 5000, color
        places.append(np.nonzero(inside)[0].mean())
    assert places[0] > places[1] > places[2]  # a lower loss is further down

    plot.loss_by_position(runs, tmp_path / "abc.svg")
    said = words(tmp_path / "abc.svg")
    for text in (
        "token index in the sequence (log scale)",
        "loss (nats per token)",
        "Loss by token index, embedded/validation, 6 windows of 64 tokens",
        f"{LINEAR}, 1.2 M parameters: mean {means[0]:.3f}",
        f"{MLP}, 123 M parameters: mean {means[1]:.3f}",
        f"{TRANSFORMER}, 1.2 M parameters: mean {means[2]:.3f}",
    ):
        assert text in said
    assert {"1", "2", "4", "8", "16", "32", "64"} < set(said)  # ticks

    plot.loss_by_position(runs, tmp_path / "abc.pdf")
    assert (tmp_path / "abc.pdf").read_bytes().startswith(b"%PDF-")


def test_runs_of_one_model_are_told_apart_by_name(evaluated, tmp_path):
    runs = [evaluated("first"), evaluated("second", end=2.0), evaluated("third", TRANSFORMER)]
    plot.loss_by_position(runs, tmp_path / "x.svg")
    labels = [text for text in words(tmp_path / "x.svg") if "parameters" in text]
    assert [label.rpartition(": mean")[0] for label in labels] == [
        f"{LINEAR}, 1.2 M parameters, first",
        f"{LINEAR}, 1.2 M parameters, second",
        f"{TRANSFORMER}, 1.2 M parameters",
    ]
    drawing = (tmp_path / "x.svg").read_text().lower()
    assert "#0072b2" in drawing
    assert "#009e73" in drawing  # the second of its kind has a colour of its own


def test_the_end_of_the_training_context_is_marked_where_it_is_passed(evaluated, tmp_path):
    for context, marked in ((64, False), (128, True)):
        plot.loss_by_position([evaluated("a"), evaluated("a", context=128)], tmp_path / "x.svg", context=context)
        assert ("trained on 64" in words(tmp_path / "x.svg")) == marked


@pytest.mark.parametrize(("key", "value"), [("fingerprint", "f2"), ("windows", 7), ("context", 65)])
def test_evaluations_of_other_text_are_not_compared(evaluated, tmp_path, key, value):
    runs = [evaluated("a"), evaluated("b"), evaluated("c", **{key: value})]
    with pytest.raises(ConfigError) as caught:
        plot.loss_by_position(runs, tmp_path / "x.png")
    message = str(caught.value)
    assert message.startswith(f"{runs[2]}: its evaluation has {key} {value}, that of {runs[0]} ")
    assert "expected the same data, context and windows" in message
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("name", ["x.txt", "x", "x.jpeg"])
def test_other_kinds_of_pictures(evaluated, tmp_path, name):
    with pytest.raises(ConfigError) as caught:
        plot.loss_by_position([evaluated("a")], tmp_path / name)
    assert str(caught.value) == f"--output {tmp_path / name}: expected a name that ends in .png, .pdf or .svg"
