"""Test runs that start with the parameters of another run."""

import json
import shutil

import jax
import numpy as np
import pytest

from ttt_jax.config import ConfigError
from ttt_jax.distributed import sharding
from ttt_jax.training import loop, metrics, start
from ttt_jax.training.checkpoint import Checkpoints
from ttt_jax.training.step import build_program

RUN = {  # compiled once
    "training.duration": "4 steps",
    "checkpoint.every": "1 step",
    "checkpoint.keep_last": 4,
    "optimizer.peak_lr": 0.005,
}


@pytest.fixture(scope="module")
def first(tmp_path_factory, tiny_config):
    """Return the workdir of a run of 4 steps with a checkpoint after each."""
    workdir = tmp_path_factory.mktemp("first")
    loop.train(tiny_config(RUN), workdir)
    return workdir


@pytest.fixture(scope="module")
def abstract_state(tiny_config):
    return build_program(tiny_config(RUN), sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})).abstract_state


def saved(workdir, step, abstract_state):
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        return checkpoints.restore(step, abstract_state)
    finally:
        checkpoints.close()


@pytest.mark.slow
def test_a_run_starts_with_the_parameters_alone(first, abstract_state, tmp_path, tiny_config, capsys):
    """Compare parameters after the first update, which has rate 0 and so leaves them as they were loaded."""
    loop.train(tiny_config({**RUN, "training.start_from": str(first), "seed": 7}), tmp_path)
    assert f"; with the parameters of {first}, step 4" in capsys.readouterr().err
    old, new = saved(first, 4, abstract_state), saved(tmp_path, 1, abstract_state)
    jax.tree.map(np.testing.assert_array_equal, new.params, old.params)
    assert (int(old.step), int(new.step)) == (4, 1)
    assert {int(x) for x in jax.tree.leaves(new.opt_state) if x.dtype == np.int32} == {1}  # the optimizer's own count


@pytest.mark.slow
def test_a_run_starts_from_a_chosen_checkpoint(first, abstract_state, tiny_config):
    config = tiny_config({"training.start_from": f"{first}/checkpoints/2/"})
    params, origin = start.load_parameters(config, abstract_state.params)
    assert origin == f"{first}, step 2"
    jax.tree.map(np.testing.assert_array_equal, params, saved(first, 2, abstract_state).params)


@pytest.mark.slow
def test_a_run_that_has_begun_no_longer_needs_the_other_run(first, tmp_path, tiny_config):
    copy = tmp_path / "copy"
    shutil.copytree(first, copy)
    config = tiny_config({**RUN, "training.start_from": str(copy)})
    loop.train(config, tmp_path / "run")
    shutil.rmtree(copy)
    for step in (3, 4):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    assert loop.train(config, tmp_path / "run").step == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "changes", "message"),
    [
        ("", {"model.width": 64}, r"has parameters of other shapes \(model.width 32 there, 64 here\)"),
        ("", {"model.mixer": "attention"}, r"\(model.mixer 'ttt_linear' there, 'attention' here\)"),
        ("/checkpoints/7", {}, "/checkpoints/7: no such checkpoint; expected one of 1, 2, 3, 4"),
        ("/nowhere", {}, "training.start_from: .*/nowhere/config.json: not found; expected the workdir of a run"),
    ],
)
def test_a_run_that_cannot_be_started_from_is_refused(first, tmp_path, tiny_config, place, changes, message):
    config = tiny_config({**changes, "training.start_from": f"{first}{place}"})
    with pytest.raises(ConfigError, match=message):
        loop.train(config, tmp_path)


def test_a_run_without_checkpoints_cannot_be_started_from(tmp_path, abstract_state, tiny_config):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config().to_dict()))
    config = tiny_config({"training.start_from": str(tmp_path)})
    with pytest.raises(ConfigError, match="no such checkpoint; expected a run that has saved a checkpoint"):
        start.load_parameters(config, abstract_state.params)


@pytest.mark.slow
def test_two_processes_start_from_the_same_parameters(first, tmp_path, tiny_config, start_processes, finish):
    loop.train(tiny_config({"training.start_from": str(first)}), tmp_path / "one")
    processes = start_processes(tmp_path / "two", 2, {"training.start_from": first})
    assert f"; with the parameters of {first}, step 4" in finish(*processes)
    one, two = ([record["loss"] for record in metrics.read(tmp_path / name)] for name in ("one", "two"))
    assert len(one) == 24
    np.testing.assert_allclose(two, one, rtol=1e-6)
    assert one[0] < metrics.read(first)[0]["loss"] - 0.1
