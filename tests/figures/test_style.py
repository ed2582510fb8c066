"""Check the look of figures: models are told apart, axes are labelled, files are whole or absent."""

import itertools

import numpy as np
import pytest
from matplotlib import pyplot as plt
from saved_runs import words

from ttt_jax import config as config_lib
from ttt_jax.config import ConfigError
from ttt_jax.figures import style
from ttt_jax.mixers import MIXERS
from ttt_jax.models import pattern


def every_model():
    named = [mixer for mixer in MIXERS if mixer != "ttt"]  # many inner loops, told apart within a figure
    for mixer, backbone in itertools.product(named, ("mamba", "transformer")):
        c = config_lib.default()
        c.model.mixer, c.model.ttt.backbone = mixer, backbone
        yield pattern.describe(c.model)


def test_each_model_has_a_colour_a_line_and_a_marker_of_its_own():
    models = {*every_model(), "Transformer, fine-tuned", "Mamba"}
    assert models == {*(label for mixer in MIXERS.values() for label in mixer.styles), "Mamba"}
    for part in zip(*(style.of_model(model) for model in models), strict=True):
        assert len(set(part)) == len(models)
    assert style.of_model("something new") not in [style.of_model(model) for model in models]
    for part in zip(*style.SERIES, strict=True):
        assert len(set(part)) == len(style.SERIES)


def test_an_inner_loop_is_named_by_its_choices():
    c = config_lib.default()
    c.model.update({"mixer": "ttt"})
    assert pattern.describe(c.model) == "TTT (linear, Mamba backbone)"
    c.model.ttt.update({"learner": "swiglu", "output": "none", "bias": False, "objective": "dot_product"})
    c.model.ttt.update({"rate": "softplus", "rate_per_matrix": True, "position_rate": "1", "reading": "previous"})
    c.model.ttt.update({"update": "momentum + muon", "backbone": "transformer"})
    assert pattern.describe(c.model) == (
        "TTT (swiglu, output none, no biases, dot_product, softplus rate, rates per matrix, position rate 1, "
        "momentum + muon, reading previous, Transformer backbone)"
    )


def test_lines_of_one_model_are_told_apart():
    found = style.distinct(["Transformer", "Transformer", "new", "Mamba", "Transformer"])
    assert len(set(found)) == 5
    assert found[0] == style.of_model("Transformer")
    assert found[3] == style.of_model("Mamba")


TOKENS = {512: "512", 1024: "1k", 32768: "32k", 1500: "1500"}
PARAMETERS = {3_210: "3.2 k", 32_100: "32 k", 99_600: "0.1 M", 568_000: "0.57 M", 9_960_000: "10 M"}
PARAMETERS |= {124_600_000: "125 M", 999_900_000: "1 B", 1_310_000_000: "1.3 B"}


def test_formats_of_numbers():
    assert {number: style.tokens(number) for number in TOKENS} == TOKENS
    assert {number: style.millions(number) for number in PARAMETERS} == PARAMETERS


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (9.5, 12.6, ["10", "11", "12"]),
        (9.9, 10.65, ["10", "10.2", "10.4", "10.6"]),
        (9.0, 180.0, ["10", "20", "50", "100"]),
        (1.7e18, 9e20, ["$10^{19}$", "$10^{20}$"]),
        (1.2e12, 2.6e12, [rf"${x} \times 10^{{12}}$" for x in (1.25, 1.5, 1.75, 2, 2.25, 2.5)]),
    ],
)
def test_ticks_of_log_axes(low, high, expected):
    figure, axes = plt.subplots()
    style.log_scale(axes.xaxis)
    axes.plot([low, high], [0, 0])
    axes.set_xlim(low, high)
    style.log_ticks(axes.xaxis)
    figure.canvas.draw()
    shown = [
        label.get_text()
        for label, at in zip(axes.get_xticklabels(), axes.get_xticks(), strict=True)
        if low <= at <= high
    ]
    plt.close(figure)
    assert shown == expected


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("numbers", "decades"),
    [
        ([10.0, 10.0], (1, 100)),
        ([10.0, 10.000000000000002], (1, 100)),
        ([10.000000000000002] * 2, (1, 100)),
        ([3.0], (1, 10)),
    ],
)
def test_a_log_axis_of_one_number_spans_decades(numbers, decades):
    figure, axes = plt.subplots()
    style.log_scale(axes.xaxis)
    style.log_scale(axes.yaxis)
    axes.plot([2.0] * len(numbers), numbers)
    style.log_ticks(axes.xaxis)
    style.log_ticks(axes.yaxis)
    plt.close(figure)
    low, high = decades
    margin = (high / low) ** 0.05
    assert axes.get_ylim() == pytest.approx((low / margin, high * margin))


def test_a_legend_lies_within_the_picture_and_has_each_label_once():
    figure, panels = style.panels(2)
    for axes in panels:
        for i in range(7):
            axes.plot([0, 1], [0, i], label=f"the {'long ' * 6}name of model {i}")
    style.legend_below(figure)
    figure.canvas.draw()
    (legend,) = figure.legends
    box, page = legend.get_window_extent(), figure.bbox
    assert page.x0 <= box.x0 < box.x1 <= page.x1
    assert page.y0 <= box.y0 < box.y1 <= min(axes.get_tightbbox().y0 for axes in panels)
    assert [text.get_text()[-1] for text in legend.get_texts()] == list("0123456")
    plt.close(figure)


def test_long_labels_are_wrapped_and_the_figure_grows():
    figure, (axes,) = style.panels(1)
    height = figure.get_figheight()
    for label in (f"TTT ({', '.join(['one choice'] * 14)})", "Transformer"):
        axes.plot([0, 1], [0, 1], label=label)
    style.legend_below(figure)
    figure.canvas.draw()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
    first, second = (text.get_text() for text in legend.get_texts())
    assert " ".join(first.split("\n")) == f"TTT ({', '.join(['one choice'] * 14)})"
    assert second == "Transformer"
    assert figure.get_figheight() == pytest.approx(height + 0.17 * first.count("\n"))
    assert first.count("\n") >= 2
    plt.close(figure)


def test_figures_are_saved_in_all_formats(tmp_path):
    figure, axes = plt.subplots()
    axes.set_title("what it is")
    outputs = [tmp_path / "new" / f"a{suffix}" for suffix in style.SUFFIXES]
    style.save(figure, *outputs)
    assert not plt.fignum_exists(figure.number)
    png, pdf, svg = outputs
    assert png.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert pdf.read_bytes().startswith(b"%PDF-")
    assert "what it is" in words(svg)
    assert np.ptp(plt.imread(png)) > 0.5


def test_a_figure_that_cannot_be_rendered_leaves_the_earlier_file(tmp_path):
    output = tmp_path / "a.png"
    output.write_text("the earlier file")
    figure, axes = plt.subplots()
    axes.set_title(r"$\unknown{$")
    with pytest.raises(ValueError, match="unknown"):
        style.save(figure, output)
    plt.close(figure)
    assert output.read_text() == "the earlier file"


def test_other_kinds_of_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--output .*/x.jpg: expected a name that ends in .png, .pdf or .svg"):
        style.check_output(tmp_path / "x.png", tmp_path / "x.jpg")
