"""Plan for TPUs with their own compiler, in separate processes, because its environment is set before JAX loads."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from ttt_jax import config as config_lib
from ttt_jax.models import counts
from ttt_jax.planning import plan
from ttt_jax.planning.plan import TooLarge

pytestmark = pytest.mark.usefixtures("for_libtpu")
ROOT = Path(__file__).resolve().parents[2]
TINY = [
    *("--config", str(ROOT / "configs/benchmark.py:attention")),
    *"--config.model.width=32 --config.model.num_heads=2 --config.model.num_layers=1".split(),
    *"--config.model.mlp_width=48 --config.model.vocab_size=64".split(),
    *"--config.data.sequence_length=32 --config.data.batch_size=8".split(),
]
COMMANDS = {
    "data": [],
    "too large": ["--config.mesh.fsdp=4", "--config.model.width=65536"],
    "search": ["--search", "--most", "2"],
}


TOO_LARGE = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (24.97G) exceeds available HBM (15.75G). HLO module: jit_step."
)
TOO_LARGE_LATE = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 16.59G of 15.75G "
    "hbm. Exceeded hbm capacity by 858.62M."
)


def ttt_plan(*arguments):
    command = [sys.executable, "-m", "ttt_jax", "plan", *TINY, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def planned():
    """Return what plans.py prints: its plan, and status and JSON of COMMANDS, all from one process."""
    commands = {name: ["plan", *TINY, "--topology", "v5e:2x2", *more, "--json"] for name, more in COMMANDS.items()}
    program = [sys.executable, str(Path(__file__).with_name("plans.py")), json.dumps(commands)]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_errors_of_the_compiler():
    """Check that an error becomes one line, and a lack of memory a size in place of an error."""

    def fails(message):
        def compiled_step():
            raise jax.errors.JaxRuntimeError(message)

        return SimpleNamespace(compiled_step=compiled_step)

    with pytest.raises(plan.CompilerError) as caught:
        plan._compile(fails("INTERNAL: no\troute\n\nin\nmany lines"))
    assert str(caught.value) == "the compiler fails at this program: INTERNAL: no route"
    too_large = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 3.00G of 2.00G hbm."
    assert plan._compile(fails(too_large)) == TooLarge(3 * 2**30, 2 * 2**30)


@pytest.mark.parametrize(("message", "needed"), [(TOO_LARGE, 24.97), (TOO_LARGE_LATE, 16.59)])
def test_needed_and_available_bytes_are_read(message, needed):
    found = plan.read_too_large(message)
    assert found.needed == round(needed * 2**30)
    assert found.available == round(15.75 * 2**30)


def test_units_of_memory_are_read():
    found = plan.read_too_large("Used 1.5T of 512.00M hbm.")
    assert (found.needed, found.available) == (3 * 2**39, 2**29)
    assert plan.read_too_large("Used 17 of 16 hbm.") == plan.TooLarge(17, 16)


def test_other_messages_are_not_read():
    assert plan.read_too_large("INTERNAL: Mosaic failed to compile") is None
    assert (
        plan.read_too_large("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20M of 16M vmem.") is None
    )


# ---- A model of width 32, two heads of 16, three blocks, feed-forward width 48, vocabulary 64, on fsdp=2 x tensor=2


@pytest.mark.tpu_compiler
@pytest.mark.slow
def test_total_memory_equals_the_analysis_of_the_compiler(planned):
    memory, analysis = planned["plan"]["memory"], planned["analysis"]
    arguments = memory["parameters"] + memory["moments"] + memory["batch"] + memory["padding"]
    assert arguments == analysis["argument"]
    assert memory["temporaries"] == analysis["temp"]
    expected = (
        analysis["argument"] + analysis["temp"] + analysis["output"] - analysis["alias"] + analysis["generated_code"]
    )
    assert memory["total"] == expected
    assert planned["plan"]["fits"] is True
    assert planned["plan"]["available"] == int(15.75 * 2**30)


@pytest.mark.tpu_compiler
@pytest.mark.slow
def test_bytes_of_parameters_and_moments(planned):
    """Compare with arithmetic: float32 arrays, each split over the axes of the mesh that the rules give it."""
    d, heads, mlp, vocab, b = 32, 2, 48, 64, 4
    on_both = 4 * d * d + 3 * d * mlp  # q, v, gate and output; feed-forward: fsdp x tensor
    on_tensor = heads * (16 * 16 + 3 * 16) + (d + 1) * heads  # inner W0, bias, norm; rates and their bias
    whole = 5 * d + 3 * 5 * d + b  # post norm and norms of the block; three convolutions of width 4, biases; tau
    block = on_both / 4 + on_tensor / 2 + whole
    parameters = 4 * (vocab * d / 4 + d + 3 * block)
    memory = planned["plan"]["memory"]
    assert memory["parameters"] == parameters
    assert memory["moments"] == 2 * parameters + 2 * 4  # two counters
    assert memory["batch"] == 3 * 4 * (8 // 2) * 32
    assert memory["padding"] >= 4  # the step


@pytest.mark.tpu_compiler
@pytest.mark.slow
def test_numbers_derived_from_the_estimate(planned):
    found = planned["plan"]
    config = config_lib.default()
    config.model.update(vocab_size=64, width=32, num_heads=2, num_layers=3, mlp_width=48)
    config.model.ttt.mini_batch = 4
    assert found["operations"] == counts.flops_per_step(config.model, 32, 8)
    seconds = found["step_time"]["total"]
    assert (
        seconds
        == max(found["step_time"]["compute"], found["step_time"]["memory"]) + found["step_time"]["communication"]
    )
    assert found["tokens_per_second"] == pytest.approx(8 * 32 / seconds)
    assert found["chip_hours"] == pytest.approx(4 * 1000 * seconds / 3600)
    assert found["price"] == pytest.approx(2 * found["chip_hours"])
    assert found["model_flop_utilization"] == pytest.approx(found["operations"] / (4 * 197e12) / seconds)


@pytest.mark.tpu_compiler
@pytest.mark.slow
def test_gradients_are_summed_over_data(planned):
    """Check that with parameters on every chip, float32 gradients are summed once, and little else."""
    status, found = planned["commands"]["data"]
    assert status == 0
    assert set(found["collectives"]) == {"all-reduce"}
    d, mlp, vocab = 32, 48, 64
    parameters = 4 * (4 * d * d + 3 * d * mlp + 2 * d + vocab * d + d)
    assert found["memory"]["parameters"] == parameters
    # The embedding is summed as two parts, of its use as head and of its lookup, unless they are added before.
    summed = found["collectives"]["all-reduce"]["bytes"]
    assert parameters <= summed <= parameters + 4 * vocab * d + 64


@pytest.mark.tpu_compiler
@pytest.mark.slow
def test_a_model_that_is_too_large(planned):
    """Check a plan of 17 G parameters: 206 GB with two moments, a quarter of it per chip."""
    status, found = planned["commands"]["too large"]
    assert status == 1
    assert found["fits"] is False
    d = 65536
    state = 12 * (4 * d * d + 3 * d * 48 + 64 * d) / 4
    assert state < found["memory"]["total"] < 4 * state
    assert found["memory"]["parameters"] + found["memory"]["moments"] == pytest.approx(state, rel=1e-3)
    assert found["available"] == int(15.75 * 2**30)
    assert found["step_time"] is None


@pytest.mark.tpu_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "chips", "available"), [("v6e:2x2", 4, int(31.24 * 2**30)), ("v5p:2x2x1", 4, int(95.73 * 2**30))]
)
def test_plans_for_other_chips(topology, chips, available):
    done = ttt_plan("--topology", topology, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["topology"], found["chips"], found["available"]) == (topology, chips, available)


@pytest.mark.tpu_compiler
@pytest.mark.slow
def test_gradients_go_between_slices():
    """Check the bytes: gradients of the parameters that a chip holds, those of the embedding in two parts."""
    d, mlp, vocab = 256, 512, 512
    size = (f"--config.model.width={d}", f"--config.model.mlp_width={mlp}", f"--config.model.vocab_size={vocab}")
    done = ttt_plan("--topology", "v5e:2x2", "--slices", "2", "--config.mesh.fsdp=4", *size, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    assert found["chips"] == 8
    sent = found["collectives"]["between slices"]["sent"]
    matrices = 4 * (4 * d * d + 3 * d * mlp + 2 * vocab * d) / 4
    assert matrices < sent < matrices + 2 * 4 * 3 * d  # norms, which every chip holds, and padding of them


@pytest.mark.slow
def test_a_plan_for_cpus():
    done = ttt_plan("--topology", "cpu:8", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["chips"], found["mesh"]["data"], found["fits"], found["step_time"]) == (8, 8, None, None)
    assert found["collectives"]["all-reduce"]["bytes"] >= found["memory"]["parameters"]
    assert found["memory"]["moments"] == 2 * found["memory"]["parameters"] + 8


@pytest.mark.tpu_compiler
@pytest.mark.slow
def test_search_finds_the_fastest_choice(planned):
    status, found = planned["commands"]["search"]
    assert status == 0
    assert len(found["tried"]) == 2
    fastest = min(found["tried"], key=lambda one: one["plan"]["step_time"]["total"])
    mesh = " ".join(f"--config.mesh.{axis}={fastest[axis]}" for axis in ("data", "fsdp", "tensor"))
    assert found["best"].startswith(mesh)


@pytest.mark.tpu_compiler
@pytest.mark.slow
def test_a_paper_size_on_a_pod():
    """Check 125M parameters on 256 chips, data parallel: 12 bytes per parameter on every chip.

    Short sequences without the kernel compile faster.
    """
    command = [sys.executable, "-m", "ttt_jax", "plan", "--config", "configs/paper.py:ttt_linear-125m-pile-2k"]
    command += ["--config.data.sequence_length=32", "--config.model.ttt.kernel=scan"]
    command += ["--topology", "v5e:16x16", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["mesh"] == {"data": 256, "fsdp": 1, "tensor": 1}
    assert 105e6 < found["parameters"] < 130e6
    assert found["memory"]["parameters"] == 4 * found["parameters"]
    assert 12 * found["parameters"] < found["memory"]["total"] < 4 * 2**30
    assert found["steps"] == 4800
    assert found["collectives"]["all-reduce"]["bytes"] == pytest.approx(4 * found["parameters"], rel=0.3)
