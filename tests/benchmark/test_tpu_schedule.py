"""Compare schedules by the real TPU compiler, which needs no TPU, with known programs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax import config as config_lib
from ttt_jax.benchmark import inner_loop
from ttt_jax.benchmark.tpu_schedule import compile, report
from ttt_jax.benchmark.tpu_schedule.compile import Function, Step
from ttt_jax.benchmark.tpu_schedule.listing import ScheduleError
from ttt_jax.benchmark.tpu_schedule.schedule import CLOCKED, measure
from ttt_jax.config import ConfigError

pytestmark = pytest.mark.usefixtures("for_libtpu")
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KNOWN, KERNEL, BROKEN = (f"{HERE / 'scheduled.py'}:{name}" for name in ("known", "kernel", "broken"))
COPIED = 2 * 16384 * 4096 * 2  # bytes, read and written


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """Return the schedule of the known program, and the folder with the files of the compiler."""
    folder = tmp_path_factory.mktemp("schedule") / "kept"
    return measure(Function(KNOWN), "v5e:1x1", keep=folder), folder


def cycles_of(schedule, scope: str) -> int:
    """Return the cycles of the operations in a named scope, without the cycles between operations."""
    return sum(o.cycles - o.control_cycles for o in schedule.operations if f"/{scope}/" in o.operation.op_name)


@pytest.mark.slow
@pytest.mark.tpu_compiler
def test_a_matrix_product_takes_the_time_of_the_matrix_units(known):
    """Check 4096^3 multiply-adds at 4 x 128 x 128 per cycle: at least 1,048,576 cycles."""
    cycles = cycles_of(known[0], "product")
    assert 1 <= cycles / (4096**3 / (4 * 128 * 128)) < 1.05
    product = max(known[0].operations, key=lambda o: o.cycles)
    assert product.utilization("MATMUL") == pytest.approx(4096**3 / (4 * 128 * 128) / cycles, rel=0.01)
    assert product.counts.empty / product.counts.cycles == pytest.approx(
        0.2251, abs=0.005
    )  # the compiler: 2519 of 11191
    assert product.seconds == pytest.approx(4096**3 * 2 / 197e12, rel=0.05)


@pytest.mark.tpu_compiler
def test_a_loop_takes_the_time_of_its_turns(known):
    assert dict(known[0].loops) == {"jit(run)/short/while": 50, "jit(run)/long/while": 200}
    assert cycles_of(known[0], "long") / cycles_of(known[0], "short") == pytest.approx(4, rel=0.01)
    around = {
        turns: sum(o.control_cycles for o in known[0].operations if o.operation.times == turns) for turns in (50, 200)
    }
    assert around[200] / around[50] == pytest.approx(4, rel=0.05)


@pytest.mark.tpu_compiler
def test_an_array_that_is_read_and_written_takes_the_time_of_its_bytes(known):
    (copied,) = (o for o in known[0].operations if o.operation.op_name == "jit(run)/copied/add")
    assert copied.hbm_bytes == COPIED
    assert copied.seconds == copied.memory_seconds == COPIED / 819e9
    assert copied.compute_seconds < copied.seconds / 2


@pytest.mark.tpu_compiler
def test_totals_of_a_schedule(known):
    schedule = known[0]
    assert schedule.cycles == sum(o.cycles for o in schedule.operations) + schedule.other_cycles
    assert schedule.compute_seconds < schedule.seconds
    assert schedule.memory_seconds < schedule.seconds < schedule.compute_seconds + schedule.memory_seconds
    product = 3 * 4096**2 * 2
    assert schedule.hbm_bytes == pytest.approx(product + COPIED, rel=0.05)  # and little for the loops
    assert schedule.compiled.arguments == pytest.approx((2 * product) / 3 + COPIED / 2, rel=0.05)
    assert (schedule.without_schedule, schedule.unmatched) == ([], [])
    empty = sum(o.operation.times * o.counts.empty for o in schedule.operations if o.counts)
    assert schedule.waiting == empty / schedule.cycles
    assert (schedule.unknown_loops, schedule.uncertain_cycles, schedule.conditionals) == (0, 0, 0)


@pytest.mark.tpu_compiler
def test_kept_files(known):
    folder = known[1]
    assert "HloModule" in (folder / "program.hlo.txt").read_text()
    assert list((folder / "schedule").glob("*-packed-bundles-post-ra.txt"))
    with pytest.raises(ConfigError, match=rf"--keep {folder}: is not empty; expected a new folder"):
        measure(Function(KNOWN), keep=folder)


@pytest.mark.tpu_compiler
def test_reports(known):
    text = report.text(known[0], top=2).splitlines()
    assert text[0].startswith(f"program     {KNOWN}, on v5e:1x1; compiled in ")
    assert f"{known[0].seconds * 1e6:,.1f} us, at 1.50 GHz and 819 GB/s" in text[1]
    table = text.index(next(line for line in text if "bound by" in line))
    assert [line.split()[2] for line in text[table + 1 : table + 3]] == ["compute", "HBM"]
    assert text[table + 3] == ""
    assert "not modelled: waits for DMAs" in text[-1]
    numbers = json.loads(json.dumps(report.as_dict(known[0])))
    assert numbers["cycles"] == known[0].cycles
    assert sum(o["hbm_bytes"] for o in numbers["operations"]) <= numbers["hbm_bytes"] == known[0].hbm_bytes
    compared = report.comparison({"a": known[0], "b": known[0]})
    assert [line.split()[2] for line in compared.splitlines() if line[:1] in ("a", "b")] == ["1.00x", "1.00x"]


@pytest.mark.slow
@pytest.mark.tpu_compiler
def test_the_first_turn_of_a_kernel_counts_once():
    """Check that what a Pallas kernel does in its first turn only costs the same in grids of 4 and of 24."""
    cycles = {
        (turns, first): next(
            o.cycles - o.control_cycles
            for o in measure(Function(KERNEL, {"turns": turns, "first": first})).operations
            if o.operation.opcode == "custom-call"
        )
        for turns in (4, 24)
        for first in (True, False)
    }
    extra = {turns: cycles[turns, True] - cycles[turns, False] for turns in (4, 24)}
    assert extra[4] > 300
    assert extra[24] - extra[4] < 20 * 10  # a branch each turn
    assert cycles[24, False] / cycles[4, False] == pytest.approx(6, rel=0.25)


@pytest.mark.tpu_compiler
@pytest.mark.slow
def test_schedules_of_other_chips():
    """Check v6e, which takes twice the rows per cycle and unit, and v5p, whose two cores share the work."""
    for topology, products in (("v6e:1x1", 2 * 2 * 256 * 256), ("v5p:1x1x1", 2 * 4 * 128 * 128)):
        schedule = measure(Function(KNOWN), topology)
        assert 1 <= cycles_of(schedule, "product") / (4096**3 / products) < 1.05
        assert CLOCKED[topology[:3]].clock == pytest.approx(1.75e9, rel=0.01)
        assert schedule.hbm_bytes > COPIED


@pytest.mark.tpu_compiler
def test_temporary_files_are_removed(tmp_path, monkeypatch):
    """Check that files are removed after errors too, and that the message of a function becomes one line."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with pytest.raises(ScheduleError, match=r"RuntimeError: the message of the function$"):
        measure(Function(BROKEN))
    assert list(tmp_path.iterdir()) == []


def test_flags_of_the_user_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=98304")
    flags = compile._environment(tmp_path)["LIBTPU_INIT_ARGS"].split()
    assert flags[0] == "--xla_tpu_scoped_vmem_limit_kib=98304"
    assert f"--xla_jf_dump_to={tmp_path}" in flags[1:]
    assert os.environ["LIBTPU_INIT_ARGS"] == flags[0]


@pytest.mark.parametrize(
    ("function", "settings", "message"),
    [
        ("no_such_module:build", {}, "No module named 'no_such_module'; expected MODULE:NAME or FILE.py:NAME"),
        ("no/such.py:build", {}, "no such file; expected MODULE:NAME or FILE.py:NAME"),
        (KNOWN + "s", {}, "no such function; .*scheduled.py has known, kernel, broken$"),
        (
            KERNEL,
            {"turn": 1},
            r"unexpected keyword argument 'turn'; expected settings of kernel\(turns: int = 8",
        ),
        ("ttt_jax.benchmark.inner_loop:build", {"kind": "gru"}, "kind=gru: expected one of linear, mlp"),
        ("ttt_jax.benchmark.attention:build", {"path": "flash"}, "path=flash: expected xla or splash"),
    ],
)
def test_wrong_functions_are_refused(function, settings, message, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])  # the folder of a file is put into it
    with pytest.raises(ConfigError, match=message):
        compile._function(function, settings, [])


@pytest.mark.tpu_compiler
def test_a_refusal_by_the_process_that_compiles_is_an_error():
    with pytest.raises(ConfigError, match="kind=gru: expected one of linear, mlp"):
        measure(Function("ttt_jax.benchmark.inner_loop:build", {"kind": "gru"}))


def test_a_topology_without_a_schedule_is_refused():
    with pytest.raises(ConfigError, match="--topology cpu:1: has no schedule; expected one of v5e, v6e, v5p"):
        measure(Function(KNOWN), "cpu:1")


def test_a_missing_compiler_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['libtpu'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"--topology v5e:1x1: needs the compiler of TPUs; pip install 'libtpu>="):
        measure(Function(KNOWN))


def test_missing_schedules_are_an_error(tmp_path):
    from ttt_jax.benchmark.tpu_schedule import schedule

    with pytest.raises(ScheduleError, match="left 0 schedules and none of the program that calls them"):
        schedule.read("f", "v5e:1x1", compile.Compiled("", 0, 0, 0, 0), tmp_path)


def test_a_compiler_that_dies_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ScheduleError, match="the compiler ended with status 1: without a message"):
        measure(Function(KNOWN))


@pytest.mark.tpu_compiler
@pytest.mark.slow
def test_a_training_step():
    """Find, on four chips, parts of the model, collectives, and a turn of the loops for each layer and mini-batch."""
    config = config_lib.default()
    config.model.update(vocab_size=256, width=64, num_heads=2, num_layers=3, mlp_width=128, dtype="bfloat16")
    config.model.ttt.update(kernel="scan", remat_group=1, unroll=1)
    config.data.update(sequence_length=128, batch_size=4)
    config.mesh.fsdp = 4
    config_lib.validate(config)
    schedule = measure(Step(config), "v5e:2x2")
    numbers = report.as_dict(schedule)
    assert set(numbers["parts"]) >= {"inner loop", "rest of the mixer", "feed-forward", "optimizer"}
    assert numbers["parts"]["inner loop"] > 0.5 * numbers["seconds"]
    assert sum(numbers["parts"].values()) <= numbers["seconds"]
    assert "all-gather" in numbers["collectives"]
    assert schedule.without_schedule == []  # also of operations whose schedule has the name of an equal one
    trips = sorted(trips for name, trips in schedule.loops if "_inner_loop" in name)
    assert set(trips) == {128 // 16}
    assert max(o.operation.times for o in schedule.operations) == 3 * 128 // 16


SMALL = {"heads": 2, "head_dim": 4, "tokens": 16, "batch": 2, "mini_batch": 4, "remat_group": 2}


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_the_baseline_computes_the_same_as_the_scan(kind, assert_close, quick_jit):
    found = []
    for path in ("official", "scan"):
        run, shapes = inner_loop.build(kind=kind, path=path, dtype="f32", **SMALL)
        rng = np.random.default_rng(0)
        arguments = jax.tree.map(lambda s, rng=rng: jnp.asarray(0.3 * rng.standard_normal(s.shape), s.dtype), shapes)
        found.append(quick_jit(run)(*arguments))
    assert found[0].shape == (2, 16, 2 * 4)
    assert_close(*found)


def test_any_registered_learner_is_scanned():
    run, arguments = inner_loop.build(kind="swiglu", **SMALL)
    assert len(arguments[5]) == 3  # matrices of W0
    assert jax.eval_shape(run, *arguments).shape == (2, 16, 2 * 4)
    for path, message in (
        ("official", "official: has no swiglu; expected kind=linear or mlp"),
        ("pallas", "pallas: no kernel"),
    ):
        with pytest.raises(ConfigError, match=f"path={message}"):
            inner_loop.build(kind="swiglu", path=path, **SMALL)
    with pytest.raises(ConfigError, match="restarts=true: expected path=pallas, not path=scan"):
        inner_loop.build(kind="swiglu", restarts=True, **SMALL)


@pytest.mark.parametrize("path", ["official", "scan"])
def test_backward_gives_gradients_of_everything(path):
    run, (gradient, *arguments) = inner_loop.build(kind="mlp", path=path, backward=True, **SMALL)
    z, gradients = jax.eval_shape(run, gradient, *arguments)
    assert (z.shape, z.dtype) == (gradient.shape, gradient.dtype) == ((2, 16, 8), jnp.bfloat16)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), gradients) == jax.tree.map(
        lambda x: (x.shape, x.dtype), tuple(arguments)
    )


@pytest.mark.tpu_compiler
@pytest.mark.slow
def test_the_command_compares():
    settings = ["tokens=64", "heads=2", "head_dim=8"]
    command = [sys.executable, "-m", "ttt_jax", "bench", "tpu-schedule", "--json", "--set", *settings]
    function = ["--function", "ttt_jax.benchmark.inner_loop:build", "--compare", "path=official", "path=scan,unroll=2"]
    done = subprocess.run([*command, *function], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == ["path=official", "path=scan,unroll=2"]
    assert found["path=scan,unroll=2"]["target"].endswith("tokens=64 heads=2 head_dim=8 path=scan unroll=2")
