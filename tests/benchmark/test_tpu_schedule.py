"""Compare schedules by the real TPU compiler, which needs no TPU, with known programs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from ttt_jax import config as config_lib
from ttt_jax.benchmark.tpu_schedule import compile, report
from ttt_jax.benchmark.tpu_schedule.compile import Function, Step
from ttt_jax.benchmark.tpu_schedule.listing import ScheduleError
from ttt_jax.benchmark.tpu_schedule.schedule import CLOCKED, measure
from ttt_jax.config import ConfigError

pytestmark = pytest.mark.usefixtures("for_libtpu")
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KNOWN, KERNEL, MASKED, LAYERS, BROKEN = (
    f"{HERE / 'scheduled.py'}:{name}" for name in ("known", "kernel", "masked", "layers", "broken")
)
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


def regions(schedule) -> list[tuple[str, int, int, bool]]:
    return [(o.name.partition(".")[0], r.passes, r.reached, r.known) for o, r in schedule.regions]


@pytest.mark.slow
@pytest.mark.tpu_compiler
def test_turns_that_a_constant_mask_skips_do_not_count():
    """Check 16 turns, of which a mask that is a constant of the program computes 4 or 12."""
    few, many, argument = (
        measure(Function(MASKED, settings))
        for settings in ({"computed": 4, "dtype": "int8"}, {"computed": 12, "dtype": "int8"}, {"static": False})
    )
    assert [regions(each) for each in (few, many, argument)] == [
        [("masked", 4, 16, True)],
        [("masked", 12, 16, True)],
        [("masked", 16, 16, False)],
    ]
    turn = few.regions[0][1].cycles
    assert turn > 200  # 128 rows times 256 x 256, of which each matrix unit takes its quarter in 128 cycles and more
    assert many.cycles - few.cycles == 8 * turn
    assert few.raw_cycles == many.raw_cycles == few.cycles + 12 * turn
    assert (few.uncertain_cycles, many.uncertain_cycles) == (0, 0)
    assert argument.uncertain_cycles == 16 * argument.regions[0][1].cycles
    assert (argument.raw_cycles, argument.raw_seconds) == (argument.cycles, argument.seconds)
    assert f"by a constant of the program: masked.1: 12 of 16 passes of {turn} cycles" in report.text(few)
    assert f"masked.1: 16 passes of {argument.regions[0][1].cycles} cycles" in report.text(argument)
    assert [r["known"] for r in report.as_dict(few)["regions"]] == [True]


@pytest.mark.slow
@pytest.mark.tpu_compiler
def test_splash_attention_counts_the_blocks_that_it_computes():
    """Check 12 heads of 2048 tokens in blocks of 1024, of which the forward kernel computes 3 of 4."""
    schedule = measure(Function("ttt_jax.benchmark.attention:build", {"path": "splash"}))
    assert ("splash_mha_fwd_residuals", 12 * 3, 12 * 4, True) in regions(schedule)
    assert all(region.known for _, region in schedule.regions)
    skipped = sum((region.reached - region.passes) * region.cycles for _, region in schedule.regions)
    assert schedule.raw_cycles - schedule.cycles == skipped > 12 * 4000
    assert schedule.seconds < 0.95 * schedule.raw_seconds


@pytest.mark.slow
@pytest.mark.tpu_compiler
@pytest.mark.parametrize(("chips", "topology"), [(1, "v5e:1x1"), (4, "v5e:2x2"), (8, "v5e:2x4")])
def test_products_of_scanned_layers_take_the_time_of_their_operations(chips, topology):
    """Check 6 layers with 3 products of 2048^3 on each chip: forward, and backward by inputs and weights.

    Eight chips exchange parts of the weights beside the products, in loops whose counter advances by 2.
    """
    schedule = measure(Function(LAYERS, {"chips": chips, "tokens": 2048 * chips}), topology)
    products = [o for o in schedule.operations if o.utilization("MATMUL") > 0.5]
    used = sum(o.operation.times * o.counts.slots["MATMUL"] for o in products) / 4
    assert used == pytest.approx(6 * 3 * 2048**3 / (4 * 128 * 128), rel=0.01)
    assert sum(o.cycles for o in products) == pytest.approx(used, rel=0.1)
    assert sorted(trips for _, trips in schedule.loops) == [2, 2] * (chips == 8) + [6, 6]
    assert schedule.unknown_loops == 0


def test_a_function_for_another_number_of_chips_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(ConfigError, match=r"--topology: has 1 chips; .*:layers expects 4"):
        compile._function(LAYERS, {"chips": 4}, jax.devices()[:1])


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


@pytest.mark.parametrize(
    ("text", "short"),
    [("a/bb/cc", "a/bb/cc"), ("a/bb/ccc/dddd", ".../dddd"), ("a/b/c/d/e/f", "a/b/.../f"), ("abcdefghij", "abcdef...")],
)
def test_long_names_are_shortened(text, short):
    assert report._shortened(text, 9) == short


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
        (KNOWN + "s", {}, "no such function; .*scheduled.py has known, kernel, masked, layers, broken$"),
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
