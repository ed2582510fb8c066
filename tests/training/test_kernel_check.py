"""Test runs whose fused kernel is wrong: CPUs take the place of accelerators, and scans that of kernels."""

from types import SimpleNamespace

import jax
import kernel_by_scan
import pytest

from ttt_jax import config as config_lib
from ttt_jax.benchmark import step
from ttt_jax.distributed import sharding
from ttt_jax.evaluation import trained
from ttt_jax.kernels import run, self_check, splash_check
from ttt_jax.kernels.self_check import Family
from ttt_jax.terminal.stopping import DONE
from ttt_jax.training import loop, metrics
from ttt_jax.training.step import build_program, kernels_to_check, with_checked_kernels
from ttt_jax.ttt.inner_loop import ttt_linear, ttt_mlp

RUN = {"model.ttt.kernel": "pallas", "data.sequence_length": 32, "training.duration": "2 steps"}
ATTENTION = {"model.mixer": "attention", "model.dtype": "bfloat16", "model.width": 128}
WRONG = "WARNING: the fused kernel of the inner loop is wrong on cpu: it differs from the scan by "


@pytest.fixture
def use_kernel(monkeypatch):
    """Return ``use_kernel(function)``: it makes a function the fused kernel and returns a list of its calls."""
    self_check.of_family.cache_clear()

    def use(kernel):
        calls = []

        def counted(*arguments, **options):
            calls.append(arguments)
            return kernel(*arguments, **options)

        monkeypatch.setattr(run, "interpreted", lambda device: False)
        monkeypatch.setattr(run, "run", counted)
        return calls

    yield use
    self_check.of_family.cache_clear()


@pytest.fixture
def make(tiny_config):
    def of(changes=None):
        mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
        return build_program(tiny_config({**RUN, **(changes or {})}), mesh)

    return of


def losses(workdir):
    return [record["loss"] for record in metrics.read(workdir)]


@pytest.fixture(scope="module")
def by_scan(tmp_path_factory, tiny_config):
    """Return the losses of the run by the scan."""
    workdir = tmp_path_factory.mktemp("scan")
    loop.train(tiny_config({**RUN, "model.ttt.kernel": "scan"}), workdir)
    return losses(workdir)


@pytest.mark.slow
def test_a_run_whose_kernel_is_wrong_uses_the_scan(tmp_path, capsys, tiny_config, use_kernel, by_scan):
    use_kernel(kernel_by_scan.outputs_shifted)
    loop.train(tiny_config(RUN), tmp_path)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    assert line.startswith(WRONG)
    assert "of the largest entry of the outputs and of 1 other array (1e-04 is allowed)" in line
    assert losses(tmp_path) == by_scan
    assert config_lib.from_json(tmp_path / "config.json").model.ttt.kernel == "pallas"
    loaded = trained.load(tmp_path)
    assert capsys.readouterr().err.startswith(WRONG)
    assert loaded.config.model.ttt.kernel == "pallas"


@pytest.mark.slow
def test_a_benchmark_checks_too(capsys, tiny_config, use_kernel):
    use_kernel(kernel_by_scan.outputs_shifted)
    step.measure(tiny_config({**RUN, "training.duration": "1 step"}), repeats=1, warmup=0)
    assert capsys.readouterr().err.startswith(WRONG)


@pytest.mark.slow
def test_without_the_check_a_wrong_kernel_is_used(tmp_path, capsys, tiny_config, use_kernel, by_scan):
    """Continue in the same workdir: the key of the check may change within a run."""
    use_kernel(kernel_by_scan.outputs_shifted)
    loop.train(tiny_config({**RUN, "training.duration": "1 step"}), tmp_path)
    loop.train(tiny_config({**RUN, "model.ttt.kernel_check": False}), tmp_path)
    first, second = losses(tmp_path)
    assert first == by_scan[0]
    assert second != by_scan[1]  # by the scan it would have the same bits, as the first step has
    assert capsys.readouterr().err.count("WARNING") == 1


@pytest.mark.slow
def test_a_kernel_that_is_right_is_used_and_checked_once(capsys, make, use_kernel):
    calls = use_kernel(kernel_by_scan.right)
    made = make()
    assert with_checked_kernels(made) is made
    calls_of_check = len(calls)
    assert calls_of_check > 0
    assert "the fused kernel of the inner loop was checked against the scan in " in capsys.readouterr().err
    assert with_checked_kernels(made) is made
    assert len(calls) == calls_of_check
    assert not capsys.readouterr().err
    made.compiled_step()
    assert len(calls) > calls_of_check


@pytest.mark.slow
def test_a_kernel_that_does_not_compile_is_replaced_by_the_scan(capsys, make, use_kernel):
    def refused(*arguments, **options):
        raise NotImplementedError("no such operation")

    use_kernel(refused)
    made = make()
    checked = with_checked_kernels(made)
    assert "it does not run, NotImplementedError: no such operation. The scan is used" in capsys.readouterr().err
    assert checked.config is made.config
    tokens = jax.ShapeDtypeStruct((2, 32), "int32")
    jax.eval_shape(checked.model.apply, {"params": checked.abstract_state.params}, tokens)  # traces the scan


@pytest.mark.parametrize(
    ("changes", "device", "expected"),
    [
        ({}, "TPU v5 lite", [Family(ttt_linear(16), 16, 2, "float32")]),
        ({"mesh.tensor": 2}, "TPU v5 lite", [Family(ttt_linear(16), 16, 1, "float32")]),
        (
            {"model.mixer": "ttt_mlp", "model.dtype": "bfloat16", "model.ttt.remat_group": 8},
            "TPU v6 lite",
            [Family(ttt_mlp(16), 16, 2, "bfloat16", 8)],
        ),
        ({"model.ttt.kernel_check": False}, "TPU v5 lite", []),
        ({"model.ttt.kernel": "scan"}, "TPU v5 lite", []),
        ({"model.ttt.mini_batch": 12}, "TPU v5 lite", []),
        ({}, "TPU v4", []),
        ({}, "cpu", []),
        ({"model.ttt.kernel": "pallas"}, "cpu", []),
        ({"model.ttt.kernel": "pallas"}, "NVIDIA H200", []),
        ({"model.mixer": "attention"}, "TPU v5 lite", []),  # float32
        ({**ATTENTION, "model.attention.num_kv_heads": 1}, "TPU v5 lite", [splash_check.Family(2, 64, False)]),
        ({**ATTENTION, "model.attention.kernel": "xla"}, "TPU v5 lite", []),
        (ATTENTION, "cpu", []),
        (
            {**ATTENTION, "model.mixer": "sliding + attention", "model.num_layers": 2},
            "TPU v5 lite",
            [splash_check.Family(1, 64, True), splash_check.Family(1, 64, False)],
        ),
    ],
)
def test_kernels_that_a_run_would_use_are_checked(tiny_config, changes, device, expected):
    config = tiny_config(changes)
    devices = SimpleNamespace(flat=[SimpleNamespace(device_kind=device)])
    mesh = SimpleNamespace(devices=devices, shape={"tensor": config.mesh.tensor})
    assert [check.family for check in kernels_to_check(config.model, mesh)] == expected


@pytest.mark.slow
def test_all_processes_use_the_scan_where_one_finds_the_kernel_wrong(tmp_path, start_processes, finish, by_scan):
    changes = {**RUN, "mesh.data": 2}
    processes = start_processes(tmp_path, 2, changes, ttt="kernel_by_scan.py")
    printed = finish(*processes, status=DONE)
    (line,) = [line for line in printed.splitlines() if "WARNING" in line]
    assert line.startswith(WRONG)
    assert "(process 1)" in line
    assert losses(tmp_path) == pytest.approx(by_scan, rel=1e-5)
