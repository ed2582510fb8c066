#!/usr/bin/env python3
"""Time training steps and inner loops on the GPU of this machine; write a JSON file and print a table.

    scripts/bench_gpu.sh                       # installs what is missing first
    python scripts/bench_gpu.py --output gpu.json --limit 450 --only ttt_linear

Measures the Transformer, TTT-Linear and TTT-MLP of the paper at 125M and 1.3B, in bfloat16, with 2k to 32k tokens of
context and 32k tokens per step; and the inner loop alone, forward and backward, in the structure of the authors' code
and by the scan with several groups and unrollings. Each measurement runs in a process of its own, so that one that runs
out of memory does not end the others. Measurements for which the time is too short are listed. On a machine without a
GPU, --tiny shows that the script works.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax

from ttt_jax.benchmark import inner_loop
from ttt_jax.distributed import chips

STEP_TOKENS = 32 * 1024
SCANS = ((1, 1), (4, 4), (8, 8))  # remat_group, unroll
COLUMNS = ("what", "seconds", "tokens_per_second", "mfu", "memory_gb", "compile_seconds", "note")


def measurements(tiny: bool) -> list[list[str]]:
    """Return the arguments of each measurement, the most important first."""
    inner = [
        ["inner", kind, heads, path]
        for heads, kind in itertools.product(("12", "32"), ("linear", "mlp"))
        for path in ("official", *(f"scan,{group},{unroll}" for group, unroll in SCANS))
    ]
    if tiny:
        return [["inner", "linear", "1", "scan,1,1"], ["step", "ttt_linear", "smoke", "2k"]]
    mixers = ("transformer", "ttt_linear", "ttt_mlp")
    steps = [
        ["step", mixer, size, context]
        for size, context in (("125m", "2k"), ("1.3b", "2k"), ("125m", "32k"), ("125m", "8k"), ("1.3b", "32k"))
        for mixer in mixers
    ]
    return steps[:3] + inner[:8] + steps[3:] + inner[8:]


def measure_inner(kind: str, heads: str, path: str) -> dict[str, Any]:
    """Time the inner loop alone, forward and backward: one layer, one sequence of 2048 tokens (64 for one head)."""
    way, *scan = path.split(",")
    options: dict[str, Any] = dict(zip(("remat_group", "unroll"), map(int, scan), strict=False))
    tokens = 64 if heads == "1" else 2048
    function, shapes = inner_loop.build(kind=kind, heads=int(heads), tokens=tokens, backward=True, path=way, **options)
    arguments = jax.tree.map(lambda x: jax.numpy.full(x.shape, 0.01, x.dtype), shapes)
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    compile_seconds = time.perf_counter() - start
    times = []
    for _ in range(12):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[2:])
    return {"seconds": seconds, "tokens_per_second": tokens / seconds, "compile_seconds": compile_seconds}


def measure_step(mixer: str, size: str, context: str) -> dict[str, Any]:
    """Time a training step by ``ttt bench step``."""
    tokens = int(context.removesuffix("k")) * 1024
    recipe = f"configs/paper.py:{mixer}-125m-pile-2k:smoke" if size == "smoke" else None
    recipe = recipe or f"configs/paper.py:{mixer}-{size}-pile-{context}"
    command = [sys.executable, "-m", "ttt_jax", "bench", "step", "--json", "--repeats", "5", "--config", recipe]
    if size != "smoke":
        command.append(f"--config.data.batch_size={STEP_TOKENS // tokens}")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"status {done.returncode}")
    found = json.loads(done.stdout)
    chip = chips.of_device(jax.devices()[0])
    return {
        "seconds": found["step_seconds"],
        "tokens_per_second": found["tokens_per_second"],
        "mfu": found["model_flops_per_second"] / chip.peak_flops if chip else None,
        "memory_gb": found["peak_memory_bytes"] / 1e9,
        "compile_seconds": found["compile_seconds"],
    }


def in_a_process(arguments: list[str], limit: float) -> dict[str, Any]:
    """Return the results of one measurement, or a note where it failed or took too long."""
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--one", *arguments], capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return {"note": "stopped: no time left"}
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        memory = next((line for line in lines if "RESOURCE_EXHAUSTED" in line or "out of memory" in line.lower()), None)
        return {"note": (memory or (lines[-1] if lines else f"status {done.returncode}"))[:120]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("bench_gpu.json"), metavar="FILE")
    parser.add_argument(
        "--limit", type=float, default=450, metavar="SECONDS", help="begin no measurement later (default: 450)"
    )
    parser.add_argument("--only", metavar="TEXT", help="only measurements whose name contains TEXT")
    parser.add_argument("--tiny", action="store_true", help="two small measurements, on any device")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        what, *arguments = options.one
        print(json.dumps({"inner": measure_inner, "step": measure_step}[what](*arguments)))
        return
    device = jax.devices()[0]
    if device.platform != "gpu" and not options.tiny:
        sys.exit(f"bench_gpu: the device of this machine is a {device.platform}; expected a GPU, or --tiny")
    about = {"device": device.device_kind, "jax": jax.__version__, "date": time.strftime("%Y-%m-%d")}
    begin, rows, left = time.monotonic(), [], []
    for arguments in measurements(options.tiny):
        name = " ".join(arguments)
        if options.only and options.only not in name:
            continue
        remaining = options.limit - (time.monotonic() - begin)
        if remaining < 10:
            left.append(name)
            continue
        rows.append({"what": name, **in_a_process(arguments, remaining)})
        options.output.write_text(json.dumps({**about, "measurements": rows, "not_measured": left}, indent=2) + "\n")
        print("  ".join(f"{key} {_shown(value)}" for key, value in rows[-1].items()), flush=True)
    options.output.write_text(json.dumps({**about, "measurements": rows, "not_measured": left}, indent=2) + "\n")
    print(f"\n{about['device']}, jax {about['jax']}, {about['date']}\n\n| " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS))
    for row in rows:
        print("| " + " | ".join(_shown(row.get(column, "")) for column in COLUMNS) + " |")
    if left:
        print(f"\nnot measured, for lack of time: {'; '.join(left)}")


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str("" if value is None else value)


if __name__ == "__main__":
    main()
