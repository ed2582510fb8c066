"""Check which runs a figure finds, and that their models and settings are read from files, not from names."""

import json
import math

import numpy as np
import pytest
from saved_runs import run

from ttt_jax.config import ConfigError
from ttt_jax.evaluation import evaluations
from ttt_jax.figures import points
from ttt_jax.sweep import files
from ttt_jax.sweep.points import Point


def sweep(folder, names):
    """Write a sweep.json with points of these names."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = [Point(name, "x.py", {"seed": i}, 10) for i, name in enumerate(names)]
    files.write_sweep(folder, files.Sweep({}, listed))


def test_runs_are_found_in_workdirs_sweeps_and_folders(tmp_path):
    a = run(tmp_path / "alone")
    sweep(tmp_path / "sweep", ["z", "not begun", "b"])
    z, b = (run(tmp_path / "sweep" / name) for name in "zb")
    run(tmp_path / "sweep" / "removed from the sweep")
    c = run(tmp_path / "folder" / "deeper" / "c")
    (tmp_path / "folder" / "notes.txt").write_text("")
    places = [str(tmp_path / name) for name in ("alone", "sweep", "folder", "alone")]
    assert points.runs(places) == [a, z, b, c]  # in the order of the sweep, each once


@pytest.mark.parametrize("place", ["nowhere", "empty"])
def test_a_place_without_runs_is_refused(tmp_path, place):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=f"{place}: holds no run; expected a workdir of ttt train, or of ttt sweep"):
        points.runs([str(tmp_path / place)])


def test_each_run_is_taken_at_its_own_context(tmp_path):
    for context in (32, 64):
        workdir = run(tmp_path / str(context), perplexity=context, context=context)
        about = json.loads((workdir / f"eval/validation-{context}.json").read_text())
        (workdir / "eval/validation-128.json").write_text(json.dumps({**about, "context": 128, "perplexity": 1.0}))
    found = points.of_places([str(tmp_path)], "validation")
    assert [round(point.about["perplexity"], 6) for point in found] == [32, 64]
    (chosen,) = points.of_places([str(tmp_path)], "validation", [64])
    assert chosen.about["context"] == 64
    with pytest.raises(ConfigError, match="--context 128: no run was trained at it; expected 32 or 64"):
        points.of_places([str(tmp_path)], "validation", [64, 128])


def test_a_run_that_was_not_evaluated_names_the_command(tmp_path):
    workdir = run(tmp_path / "a", context=32)
    with pytest.raises(ConfigError) as caught:
        points.of_places([str(workdir)], "test")
    assert str(caught.value) == (
        f"{workdir}: no evaluation of the test split with context 32; there is validation-32; run: "
        f"ttt eval --workdir {workdir} --split test --context 32"
    )


def test_a_line_passes_through_the_mean_loss_of_seeds(tmp_path):
    perplexities = {("a", 0): 8.0, ("a", 1): 12.0, ("b", 0): 5.0}
    for (name, seed), value in perplexities.items():
        flops = {"a": 1e12, "b": 4e12}[name]
        more = {"log__every": "5 steps", "mesh__fsdp": 2, "evaluation__windows": 9} if seed else {}
        run(tmp_path / f"{name}{seed}", perplexity=value, flops=flops, seed=seed, **more)
    found = points.of_places([str(tmp_path)], "validation")
    line = points.joined(found, lambda p: p.about["training_flops"])
    np.testing.assert_allclose(line, [(1e12, math.sqrt(8.0 * 12.0)), (4e12, 5.0)], rtol=1e-12)


def test_runs_that_differ_in_more_than_the_seed_are_refused(tmp_path):
    run(tmp_path / "a", optimizer__peak_lr=1e-3)
    run(tmp_path / "b", optimizer__peak_lr=2e-3, model__norm_epsilon=1e-5)
    found = points.of_places([str(tmp_path)], "validation")
    with pytest.raises(ConfigError) as caught:
        points.joined(found, lambda p: p.about["training_flops"])
    assert str(caught.value) == (
        f"{tmp_path}/a, {tmp_path}/b: would be one point of a line, and differ in model.norm_epsilon, "
        "optimizer.peak_lr; expected one of them, or runs that differ in the seed"
    )


def test_points_of_other_text_are_refused(tmp_path):
    run(tmp_path / "a")
    run(tmp_path / "b", about={"fingerprint": "f2", "source": "pile/validation"})
    with pytest.raises(ConfigError) as caught:
        points.check_same_text(points.of_places([str(tmp_path)], "validation"))
    assert str(caught.value) == (
        f"{tmp_path}/b: was evaluated on pile/validation f2, and {tmp_path}/a on books/validation f1; "
        "expected the same text"
    )


def test_names_of_models_and_sizes(tmp_path):
    run(tmp_path / "a", model__mixer="attention", parameters=124_600_000)
    run(tmp_path / "b", model__mixer="attention", training__start_from="runs/a", parameters=131_000_000)
    found = points.of_places([str(tmp_path)], "validation")
    assert [points.model_label(point.about) for point in found] == ["Transformer", "Transformer, fine-tuned"]
    assert points.size_name(found[:1]) == "125 M"
    assert points.size_name(found) == "125 M to 131 M"
    assert found[0].size == found[1].size == (12, 768)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": None}, "model is null; expected what ttt eval or ttt inspect writes"),
        ({"parameters": "x"}, 'parameters is "x"; expected what ttt eval or ttt inspect writes'),
        ({"step": True}, "step is true; expected what ttt eval or ttt inspect writes"),
        ({"config": []}, r"config is \[\]; expected what ttt eval or ttt inspect writes"),
        ("workdir", "has no workdir; expected the keys that ttt eval or ttt inspect writes"),
        ("training_flops", "has no training_flops; expected the keys that ttt eval or ttt inspect writes"),
    ],
)
def test_an_evaluation_with_wrong_content_is_named(tmp_path, change, said):
    workdir = run(tmp_path / "a")
    path = workdir / "eval/validation-64.json"
    about = json.loads(path.read_text())
    del about["sha256"]
    changed = {**about, **change} if isinstance(change, dict) else {k: x for k, x in about.items() if k != change}
    path.write_text(json.dumps(changed))
    with pytest.raises(ConfigError, match=f"^{path}: {said}"):
        points.of_places([str(workdir)], "validation")
    with pytest.raises(ConfigError, match=f"^{path}: {said}"):
        evaluations.read_all([workdir], "validation")
