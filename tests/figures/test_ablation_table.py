"""Check ``ttt plot table``: rows, differences with their errors, and files."""

import csv
import io
import math

import numpy as np
import pytest
from rich.console import Console
from saved_runs import run

from ttt_jax.config import ConfigError
from ttt_jax.evaluation import evaluations
from ttt_jax.figures import ablation

LADDER = [  # what changes from row to row, and the perplexity of each
    ({"model__mixer": "linear_attention"}, 15.0),
    ({"model__mixer": "ttt_linear"}, 15.0),
    ({"model__ttt__learned_w0": True}, 15.2),
    ({"model__ttt__output": "residual_norm", "model__ttt__bias": True}, 14.0),
    ({"model__ttt__mini_batch": 16}, 12.0),
    ({"model__ttt__learned_eta": True}, 11.9),
    ({"model__ttt__backbone": "mamba"}, 11.0),
]


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    """Return the workdirs of the rungs of Table 1, in its order."""
    folder = tmp_path_factory.mktemp("ladder")
    settings = {
        "model__ttt__backbone": "transformer",
        "model__ttt__learned_eta": False,
        "model__ttt__mini_batch": 64,
        "model__ttt__output": "none",
        "model__ttt__bias": False,
        "model__ttt__learned_w0": False,
    }
    places = []
    for i, (change, perplexity) in enumerate(LADDER):
        settings |= change
        # Names in another order than rows; every row with noise of its own.
        places.append(str(run(folder / f"{9 - i}", perplexity=perplexity, noise=i, **settings)))
    return places


def test_rows(ladder):
    rows = ablation.rows(ladder, published=True)
    assert [row.name for row in rows] == [
        "Linear attention",
        "TTT equivalence",
        "+ learnable W0",
        "+ LN and residual in f",
        "+ mini-batch TTT, b = 16",
        "+ learnable eta",
        "+ Mamba backbone",
    ]
    perplexities = [perplexity for _, perplexity in LADDER]
    np.testing.assert_allclose([row.perplexity for row in rows], perplexities, rtol=1e-12)
    assert rows[0].difference is rows[0].standard_error is rows[0].loss_difference is None
    np.testing.assert_allclose([row.difference for row in rows[1:]], np.diff(perplexities), atol=1e-12)
    np.testing.assert_allclose([row.loss_difference for row in rows[1:]], np.diff(np.log(perplexities)), atol=1e-12)
    assert [row.published for row in rows] == [15.23, 15.23, 15.27, 14.05, 12.35, 11.99, 11.09]


def test_errors_match_the_jackknife(tmp_path):
    """Compare with the jackknife error of a difference of exponentials of two means over the same documents."""
    pair = [run(tmp_path / name, perplexity=p, noise=i) for i, (name, p) in enumerate({"a": 9.0, "b": 8.0}.items())]
    row = ablation.rows([str(workdir) for workdir in pair])[1]
    sums, counts = [], []
    for workdir in pair:
        found = evaluations.read(workdir, "validation", 64)
        sums.append(found.document_sums.sum(1))
        counts.append(found.document_counts.sum(1))

    def jackknife(of_means):
        n, both = len(sums[0]), list(zip(sums, counts, strict=True))
        left_out = [of_means(*((s.sum() - s[i]) / (c.sum() - c[i]) for s, c in both)) for i in range(n)]
        return math.sqrt((n - 1) / n * np.sum((np.array(left_out) - np.mean(left_out)) ** 2))

    assert row.loss_standard_error == pytest.approx(jackknife(lambda a, b: b - a), rel=1e-6)
    assert row.standard_error == pytest.approx(jackknife(lambda a, b: math.exp(b) - math.exp(a)), rel=0.02)
    assert row.standard_error > 0.05


def test_rows_that_cannot_be_paired_have_no_error(tmp_path):
    run(tmp_path / "a", perplexity=9.0)
    run(tmp_path / "b", perplexity=8.0, about={"windows": 5})
    row = ablation.rows([str(tmp_path)])[1]
    assert (row.standard_error, row.loss_standard_error) == (None, None)
    assert row.difference == pytest.approx(-1.0)


def test_names_of_other_changes(tmp_path):
    run(tmp_path / "a")
    run(tmp_path / "b", model__num_layers=3, optimizer__warmup="5%")
    run(tmp_path / "c", model__num_layers=3, optimizer__warmup="5%", seed=2)
    run(tmp_path / "d", model__num_layers=3, optimizer__warmup="5%", seed=2, checkpoint__keep_last=5)
    assert [row.name for row in ablation.rows([str(tmp_path)])] == [
        "TTT-Linear (Mamba backbone)",
        "+ num_layers=3, warmup=5%",
        "seed=2",
        "the same again",
    ]


def test_another_learner_is_named_without_the_hash_of_its_file(tmp_path):
    for i, (learner, source) in enumerate((("lab:a", "0" * 64), ("lab:b", "1" * 64), ("lab:b", "2" * 64))):
        run(tmp_path / str(i), model__mixer="ttt", model__ttt__learner=learner, model__ttt__learner_source=source)
    first, *others = (row.name for row in ablation.rows([str(tmp_path)]))
    assert first == "TTT (lab:a, Mamba backbone)"
    assert others == ["+ learner=lab:b", f"+ learner_source={'2' * 64}"]


def test_text(ladder):
    rows = ablation.rows(ladder, published=True)
    console = Console(width=80, file=io.StringIO())
    console.print(ablation.as_table(rows))
    printed = console.file.getvalue()
    table = [line.split() for line in printed.splitlines()]
    assert ["configuration", "perplexity", "difference", "paper"] in table
    assert ["Linear", "attention", "15.000", "-", "15.23"] in table
    last = [*"+ Mamba backbone 11.000 -0.900 ±".split(), f"{rows[-1].standard_error:.3f}", "11.09"]
    assert last in table
    assert ablation.as_text(rows, ".txt").split() == printed.split()
    without = ablation.as_text(ablation.rows(ladder), ".txt")
    assert "paper" not in without


def test_latex(ladder):
    rows = ablation.rows(ladder, published=True)
    lines = ablation.as_text(rows, ".tex").splitlines()
    assert lines[1].startswith(r"\begin{tabular}{l")
    assert lines[-1] == r"\end{tabular}"
    assert r"Linear attention & 15.000 & -- & 15.23 \\" in lines
    assert rf"+ learnable $\eta$ & 11.900 & $-0.100 \pm {rows[5].standard_error:.3f}$ & 11.99 \\" in lines
    assert any(line.startswith("+ learnable $W_0$ &") for line in lines)
    body = [line for line in lines if line.endswith(r"\\")]
    assert {line.count("&") for line in body} == {3}
    assert ablation.as_latex([rows[0]._replace(name="a_b & 5%", published=None)]).count(r"a\_b \& 5\% & 15.000") == 1


def test_csv(ladder):
    rows = ablation.rows(ladder)
    read = list(csv.DictReader(io.StringIO(ablation.as_text(rows, ".csv"), newline="")))
    assert [row["name"] for row in read] == [row.name for row in rows]
    assert read[0]["difference"] == read[0]["published"] == ""
    for written, row in zip(read[1:], rows[1:], strict=True):
        for key in ("perplexity", "difference", "standard_error", "loss_difference", "loss_standard_error"):
            assert float(written[key]) == pytest.approx(getattr(row, key), rel=1e-5, abs=1e-12)


@pytest.mark.parametrize(
    ("other", "published", "said"),
    [
        ({"context": 32}, False, "runs of contexts 32, 64; expected one"),
        ({"about": {"fingerprint": "f2"}}, False, "expected the same text"),
        ({"model__mixer": "attention"}, True, "--published: the paper states the perplexities of the models of its"),
    ],
)
def test_refused(tmp_path, other, published, said):
    run(tmp_path / "a", model__mixer="attention")
    run(tmp_path / "b", **other)
    with pytest.raises(ConfigError, match=said):
        ablation.rows([str(tmp_path)], published=published)
