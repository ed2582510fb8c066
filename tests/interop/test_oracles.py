"""Check this package against all numbers of the TTT authors' code in tests/oracles, and that wrong ones are found."""

import functools
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ttt_jax.interop import oracles
from ttt_jax.interop.oracles import Report, worst

ROOT = Path(__file__).resolve().parents[2]
ORACLES = ROOT / "tests" / "oracles"
FILES = sorted(ORACLES.glob("*.npz"))
SMALL_FILE = "model_self_attention.npz"  # the fastest one


def test_no_file_is_missing():
    kinds = [path.name.partition("_")[0] for path in FILES]
    assert {kind: kinds.count(kind) for kind in kinds} == {"generation": 4, "model": 11, "traj": 4}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.slow
def test_numbers_of_a_file_are_reproduced(path):
    report = oracles.check(path)
    assert report is not None
    assert report.passed, str(report)


@pytest.fixture
def main(load_script):
    return load_script("check_oracles").main


@functools.cache
def load(name):
    return oracles.load(ORACLES / name)


def perturbed(oracle, key, index):
    x = oracle[key].copy()
    x[index] += 1e-3
    return {**oracle, key: x}


def shaken(oracle, key):
    """Change every number of an array by 1e-3, up or down: the same change everywhere is removed by an LN."""
    x = oracle[key]
    signs = np.random.default_rng(0).choice(np.float32([-1, 1]), x.shape)
    return {**oracle, key: x + np.float32(1e-3) * signs}


def write(path, arrays):
    np.savez(path, **arrays)


LAYER = "params/model/h/{}/"
MIXER = LAYER + "seq_modeling_block/"
PERTURBATIONS = {
    "params/model/wte/embedding": (13, 40),
    "params/model/ln_f/kernel": (7,),
    LAYER.format(1) + "seq_norm/kernel": (63,),
    LAYER.format(0) + "conv/conv1/bias": (5,),
    LAYER.format(1) + "feed_forward/w2/kernel": (90, 2),
    MIXER.format(0) + "learnable_token_idx": (15,),
    MIXER.format(1) + "learnable_ttt_lr/kernel": (3, 20, 0),
    MIXER.format(1) + "learnable_ttt_lr/bias": (2, 0),
    MIXER.format(0) + "ttt_dense_0": (1, 4, 9),
    MIXER.format(1) + "ttt_bias_0": (2, 0, 11),
    MIXER.format(0) + "ttt_norm/scale": (0, 3),
    MIXER.format(0) + "conv_k/kernel": (0, 0, 33),
    MIXER.format(1) + "wg/kernel": (12, 50),
}


class TestSingleParameters:
    """Check that 1e-3 on one number of a tensor, and with random signs on all of them, exceeds the tolerances."""

    def test_the_file_itself_passes(self):
        assert oracles.check_model(load("model_ttt_linear.npz")).passed

    @pytest.mark.parametrize("key", PERTURBATIONS, ids=lambda key: key.removeprefix("params/model/"))
    def test_perturbed(self, key):
        oracle = load("model_ttt_linear.npz")
        one = oracles.check_model(perturbed(oracle, key, PERTURBATIONS[key]))
        assert not one.passed, str(one)
        assert not oracles.check_model(shaken(oracle, key)).passed

    @pytest.mark.parametrize("key", ["logits", "nll", "hidden_states/1", "ttt_stats/1/ttt_loss_mse_step_1"])
    def test_perturbed_expectation(self, key):
        oracle = load("model_ttt_linear.npz")
        assert not oracles.check_model(perturbed(oracle, key, (0,) * oracle[key].ndim)).passed


def test_report_passes_only_with_numbers_within_tolerance():
    tolerance = {"logits": 1e-5, "nll": 1e-5}
    assert Report({"logits": 1e-5}, tolerance).passed
    assert not Report({"logits": 1.01e-5, "nll": 0.0}, tolerance).passed
    assert not Report({"logits": float("nan")}, tolerance).passed
    assert not Report({}, tolerance).passed


@pytest.mark.parametrize("errors", [[1.0, float("nan")], [float("nan"), 1.0]])
def test_worst_error_is_nan_where_one_is(errors):
    assert np.isnan(worst(errors))


def test_script_passes_a_good_file(main, tmp_path, capsys):
    shutil.copy(ORACLES / SMALL_FILE, tmp_path)
    assert main([str(tmp_path)]) == 0
    assert "1 compared, 0 failed" in capsys.readouterr().out


def test_script_fails_for_one_perturbed_parameter(main, tmp_path, capsys):
    shutil.copy(ORACLES / SMALL_FILE, tmp_path)
    bad = perturbed(load(SMALL_FILE), MIXER.format(0) + "wk/kernel", (3, 4))
    write(tmp_path / "bad.npz", bad)
    assert main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "FAIL  bad.npz" in out
    assert f"ok    {SMALL_FILE}" in out


def test_script_fails_for_an_empty_folder(main, tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert "0 compared" in capsys.readouterr().out


def test_script_fails_for_files_that_hold_nothing_to_compare(main, tmp_path, capsys):
    write(tmp_path / "other.npz", {"x": np.zeros(3)})
    assert main([str(tmp_path)]) == 1
    assert "not compared" in capsys.readouterr().out


def test_script_rejects_a_missing_folder(main, tmp_path, capsys):
    assert main([str(tmp_path / "missing")]) == 2
    assert "not a folder" in capsys.readouterr().err


def with_broken_first_array(path):
    """Return the bytes of a file whose first array starts with a deflate block of a kind that does not exist."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        header = file.infolist()[0].header_offset
    name, extra = struct.unpack_from("<HH", content, header + 26)
    content[header + 30 + name + extra] = 0xFF
    return bytes(content)


@pytest.mark.parametrize("corruption", ["no zip file", "truncated", "flipped", "broken array", "empty"])
def test_script_fails_for_a_corrupt_file(main, tmp_path, capsys, corruption):
    content = (ORACLES / SMALL_FILE).read_bytes()
    middle = len(content) // 2
    corrupt = {
        "no zip file": b"x" * 1000,
        "truncated": content[:middle],
        "flipped": content[:middle] + bytes(b ^ 255 for b in content[middle : middle + 64]) + content[middle + 64 :],
        "broken array": with_broken_first_array(ORACLES / SMALL_FILE),
        "empty": b"",
    }
    (tmp_path / "bad.npz").write_bytes(corrupt[corruption])
    assert main([str(tmp_path)]) == 1
    assert "FAIL  bad.npz" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["params/model/h/1/seq_modeling_block/wq/kernel", "grads/model/ln_f/kernel", "nll"])
def test_script_fails_for_a_missing_array(main, tmp_path, capsys, key):
    oracle = load(SMALL_FILE)
    assert key in oracle
    write(tmp_path / "bad.npz", {k: x for k, x in oracle.items() if k != key})
    assert main([str(tmp_path)]) == 1
    assert "FAIL  bad.npz" in capsys.readouterr().out
