"""Plans for TPUs, by their own compiler: in processes of their own, for its environment is set before JAX loads."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from ttt_jax import config as config_lib
from ttt_jax.models import flops

ROOT = Path(__file__).resolve().parents[2]
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
TINY = [
    *("--config", str(ROOT / "configs/benchmark.py:attention")),
    *"--config.model.width=32 --config.model.num_heads=2 --config.model.num_layers=1".split(),
    *"--config.model.mlp_width=48 --config.model.vocab_size=64".split(),
    *"--config.data.sequence_length=32 --config.data.batch_size=8".split(),
]


def ttt_plan(*arguments):
    command = [sys.executable, "-m", "ttt_jax", "plan", *TINY, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def planned():
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("plans.py"))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# ---- A model of width 32, two heads of 16, three blocks, feed-forward width 48, vocabulary 64, on fsdp=2 x tensor=2


@needs_libtpu
@pytest.mark.slow
def test_the_total_is_what_the_compiler_says(planned):
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


@needs_libtpu
@pytest.mark.slow
def test_parameters_and_moments_by_arithmetic(planned):
    """Float32, each split over the axes of the mesh that the rules give it."""
    d, heads, mlp, vocab, b = 32, 2, 48, 64, 4
    on_both = 4 * d * d + d * heads + 3 * d * mlp  # q, v, gate and output; rates; feed-forward: fsdp x tensor
    on_tensor = heads * (16 * 16 + 3 * 16) + heads  # inner W0, bias, norm; bias of the rates
    on_fsdp = 2 * d + 3 * d  # post norm; norms of the block
    convolutions = 3 * 5 * d  # kernels of 4 and biases: fsdp
    block = on_both / 4 + on_tensor / 2 + (on_fsdp + convolutions) / 2 + b
    parameters = 4 * (vocab * d / 4 + d / 2 + 3 * block)
    memory = planned["plan"]["memory"]
    assert memory["parameters"] == parameters
    assert memory["moments"] == 2 * parameters + 2 * 4  # two counters
    assert memory["batch"] == 3 * 4 * (8 // 2) * 32
    assert memory["padding"] >= 4  # the step


@needs_libtpu
@pytest.mark.slow
def test_what_follows_from_the_estimate(planned):
    plan = planned["plan"]
    config = config_lib.default()
    config.model.update(vocab_size=64, width=32, num_heads=2, num_layers=3, mlp_width=48)
    config.model.ttt.mini_batch = 4
    assert plan["operations"] == flops.per_step(config.model, 32, 8)
    seconds = plan["step_time"]["total"]
    assert (
        seconds == max(plan["step_time"]["compute"], plan["step_time"]["memory"]) + plan["step_time"]["communication"]
    )
    assert plan["tokens_per_second"] == pytest.approx(8 * 32 / seconds)
    assert plan["chip_hours"] == pytest.approx(4 * 1000 * seconds / 3600)
    assert plan["price"] == pytest.approx(2 * plan["chip_hours"])
    assert plan["model_flop_utilization"] == pytest.approx(plan["operations"] / (4 * 197e12) / seconds)


@needs_libtpu
@pytest.mark.slow
def test_gradients_are_summed_over_data():
    """Parameters on every chip, rows split: what is summed are the gradients, each once, float32, and a few numbers."""
    done = ttt_plan("--topology", "v5e:2x2", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert set(plan["collectives"]) == {"all-reduce"}
    d, mlp, vocab = 32, 48, 64
    parameters = 4 * (4 * d * d + 3 * d * mlp + 2 * d + vocab * d + d)
    assert plan["memory"]["parameters"] == parameters
    # The embedding is summed as two parts, of its use as head and of its lookup, unless they are added before.
    summed = plan["collectives"]["all-reduce"]["bytes"]
    assert parameters <= summed <= parameters + 4 * vocab * d + 64


@needs_libtpu
@pytest.mark.slow
def test_a_model_that_is_too_large():
    """17 G parameters: with two moments 206 GB, of which a chip would hold a quarter."""
    too_large = ("--topology", "v5e:2x2", "--config.mesh.fsdp=4", "--config.model.width=65536")
    done = ttt_plan(*too_large, "--json")
    assert done.returncode == 1, done.stderr
    plan = json.loads(done.stdout)
    assert plan["fits"] is False
    d = 65536
    state = 12 * (4 * d * d + 3 * d * 48 + 64 * d) / 4
    assert state < plan["memory"]["total"] < 4 * state
    assert plan["memory"]["parameters"] + plan["memory"]["moments"] == pytest.approx(state, rel=1e-3)
    assert plan["available"] == int(15.75 * 2**30)
    assert plan["step_time"] is None
    done = ttt_plan(*too_large)
    too_much = (plan["memory"]["total"] - plan["available"]) / 2**30
    assert done.returncode == 1
    assert f"does not fit, {too_much:,.2f} GiB too much" in done.stdout


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "chips", "available"), [("v6e:2x2", 4, int(31.24 * 2**30)), ("v5p:2x2x1", 4, int(95.73 * 2**30))]
)
def test_other_chips(topology, chips, available):
    done = ttt_plan("--topology", topology, "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert (plan["topology"], plan["chips"], plan["available"]) == (topology, chips, available)


@needs_libtpu
@pytest.mark.slow
def test_two_slices():
    """Between them go gradients: of a chip's quarter of the parameters, those of the embedding in two parts."""
    done = ttt_plan("--topology", "v5e:2x2", "--slices", "2", "--config.mesh.fsdp=4", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    assert plan["chips"] == 8
    sent = plan["collectives"]["between slices"]["sent"]
    assert 1 < sent / plan["memory"]["parameters"] < 3


@pytest.mark.slow
def test_cpus():
    done = ttt_plan("--topology", "cpu:8", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert (plan["chips"], plan["mesh"]["data"], plan["fits"], plan["step_time"]) == (8, 8, None, None)
    assert plan["collectives"]["all-reduce"]["bytes"] >= plan["memory"]["parameters"]
    assert plan["memory"]["moments"] == 2 * plan["memory"]["parameters"] + 8


@needs_libtpu
@pytest.mark.slow
def test_search():
    done = ttt_plan("--topology", "v5e:2x2", "--search", "--most", "2", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["tried"]) == 2
    fastest = min(found["tried"], key=lambda one: one["plan"]["step_time"]["total"])
    mesh = " ".join(f"--config.mesh.{axis}={fastest[axis]}" for axis in ("data", "fsdp", "tensor"))
    assert found["best"].startswith(mesh)


@needs_libtpu
@pytest.mark.slow
def test_a_paper_size_on_a_pod():
    """125M parameters, 256 chips, a sequence each. Data parallel: 12 bytes a parameter on every chip."""
    command = [sys.executable, "-m", "ttt_jax", "plan", "--config", "configs/pile.py:ttt_linear,125m,2k"]
    command += ["--config.mesh.fsdp=1", "--topology", "v5e:16x16", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["mesh"] == {"data": 256, "fsdp": 1, "tensor": 1}
    assert 105e6 < plan["parameters"] < 130e6
    assert plan["memory"]["parameters"] == 4 * plan["parameters"]
    assert 12 * plan["parameters"] < plan["memory"]["total"] < 4 * 2**30
    assert plan["steps"] == round(2.5e9 / (256 * 2048))
    assert plan["collectives"]["all-reduce"]["bytes"] == pytest.approx(4 * plan["parameters"], rel=0.3)
