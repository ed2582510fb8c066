"""Check the inner loop against the LaCT authors' numbers in tests/oracles/lact, and that mistakes are found."""

import dataclasses
import functools
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.interop import lact_oracles, oracles
from ttt_jax.interop.oracles import largest
from ttt_jax.ttt import scan, update
from ttt_jax.ttt.objective import squared_error
from ttt_jax.ttt.update import Momentum, Muon, Renormalise

FOLDER = Path(__file__).parents[1] / "oracles" / "lact"
FILES = sorted(FOLDER.glob("op_*.npz"))


@functools.cache
def load(name):
    return oracles.load(FOLDER / f"op_{name}.npz")


def config(oracle):
    return json.loads(str(oracle["config"]))


def with_config(oracle, **changes):
    return {**oracle, "config": np.array(json.dumps({**config(oracle), **changes}))}


def test_no_file_is_missing():
    assert len(FILES) == 7


CASES = [pytest.param(f, id=f.stem, marks=[pytest.mark.slow] * (f.stem != "op_sgd")) for f in FILES]


@pytest.mark.parametrize("path", CASES)
def test_numbers_of_a_file_are_reproduced(path):
    report = lact_oracles.check(path)
    assert report is not None
    assert report.passed, str(report)
    assert ("momentum" in report.errors) == ("momentum" in path.stem)


@pytest.fixture
def error_of_outputs(quick_jit):
    def error(oracle, **changes):
        loop = dataclasses.replace(lact_oracles.inner_loop(oracle, config(oracle)), **changes)
        inputs = {name: jnp.asarray(oracle[name]) for name in lact_oracles.input_names(oracle, config(oracle))}
        parameters, tokens = lact_oracles.arguments(inputs, config(oracle)["chunk"])
        run = quick_jit(functools.partial(scan.run, loop))
        return largest(run(parameters, tokens).z.swapaxes(1, 2), oracle["o"])

    return error


MISTAKES = {
    "squared error": ("sgd", {"objective": squared_error}),
    "no renormalisation": ("sgd", {"update": ()}),
    "renormalised after use": ("prenorm_momentum", {"update": (Momentum(), Renormalise())}),
    "memory of the last token": ("momentum", {"update": (Momentum(average=False), Renormalise())}),
    "orthogonalised before the momentum": ("momentum_muon", {"update": (Muon(), Momentum(), Renormalise())}),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_another_inner_loop_has_large_errors(error_of_outputs, mistake):
    name, changes = MISTAKES[mistake]
    assert error_of_outputs(load(name), **changes) > 0.05


def test_swapped_rates_have_large_errors(error_of_outputs):
    oracle = load("sgd")
    assert error_of_outputs(oracle) < lact_oracles.TOLERANCE["o"]
    assert error_of_outputs({**oracle, "lr1": oracle["lr2"], "lr2": oracle["lr1"]}) > 0.05


@pytest.mark.slow
def test_four_iterations_of_newton_schulz_have_large_errors(error_of_outputs, monkeypatch):
    monkeypatch.setattr(update, "_NEWTON_SCHULZ_COEFFICIENTS", update._NEWTON_SCHULZ_COEFFICIENTS[:-1])
    assert error_of_outputs(load("momentum_muon")) > 0.05


@pytest.mark.parametrize("key", ["o", "o_T17", "w2_after", "grad/lr1"])
def test_one_wrong_number_fails(tmp_path, key):
    oracle = load("sgd")
    wrong = oracle[key].copy()
    wrong[(-1,) * wrong.ndim] += 1e-4 * np.linalg.norm(wrong)
    np.savez(tmp_path / "op_wrong.npz", **{**oracle, key: wrong})
    assert not lact_oracles.check(tmp_path / "op_wrong.npz").passed


@pytest.mark.parametrize("key", ["w2_after", "grad/lr1"])
def test_a_missing_array_is_named(key):
    oracle = {name: x for name, x in load("sgd").items() if name != key}
    with pytest.raises(KeyError, match=key):
        lact_oracles.check_operation(oracle, config(oracle))


@pytest.mark.parametrize(
    ("key", "x", "message"),
    [
        (
            "lr2",
            np.zeros((2, 2, 28, 16), np.float32),
            r"lr2: shape \(2, 2, 28, 16\) of float32, expected \(2, 2, 28\) of",
        ),
        ("w2", np.zeros((2, 2, 16, 16), np.float32), r"w2: .* expected \(2, 24, 16\) or \(2, 2, 24, 16\) of"),
        ("k", np.zeros((2, 2, 28, 16), "U3"), "k: .* of <U3, expected .* floating point numbers"),
        ("q", np.zeros(3, np.float32), r"q: shape \(3,\), expected 4 axes"),
    ],
    ids=["lr2", "w2", "k", "q"],
)
def test_an_array_of_another_kind_is_named(key, x, message):
    with pytest.raises(ValueError, match=message):
        lact_oracles.check_operation({**load("momentum"), key: x}, config(load("momentum")))


def test_low_rank_factors_that_do_not_fit_are_named():
    oracle = load("lowrank_momentum")
    with pytest.raises(ValueError, match=r"w0_right: .* expected \(4, 4, 16\) of"):
        lact_oracles.check_operation({**oracle, "w0_right": oracle["w0_right"][:, :, :5]}, config(oracle))


def test_too_few_updates_are_named():
    oracle = load("sgd")
    with pytest.raises(ValueError, match="w0_after: 2 updates in the file, expected 3"):
        lact_oracles.check_operation({**oracle, "w0_after": oracle["w0_after"][:2]}, config(oracle))


def test_the_fused_variant_is_not_compared(tmp_path):
    np.savez(tmp_path / "op_fused.npz", **with_config(load("sgd"), variant="fusedpost"))
    assert lact_oracles.check(tmp_path / "op_fused.npz") is None


def test_an_unknown_variant_is_refused():
    oracle = with_config(load("sgd"), variant="sideways")
    with pytest.raises(ValueError, match="variant 'sideways': expected one of post, pre, fusedpost"):
        lact_oracles.check_operation(oracle, config(oracle))
