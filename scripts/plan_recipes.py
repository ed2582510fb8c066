#!/usr/bin/env python3
"""Plan the recipes of configs/paper.py and attention.py on TPU v5e, and print the tables of the documentation.

    python scripts/plan_recipes.py plans.jsonl                     # all recipes, two at a time
    python scripts/plan_recipes.py plans.jsonl --only 1.3b-pile-2k # recipes whose names contain this
    python scripts/plan_recipes.py plans.jsonl --jobs 0            # print the tables of the plans in the file

Each plan is one line of the file, added when it is finished; recipes with a plan in the file are not planned again. The
script needs the extra [plan], but no TPU. Exit status 1 means that a plan could not be made; a run that does not fit
has a plan, too.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOPOLOGIES = {  # few heads split a row in few parts: see configs/paper.py and attention.py
    "gqa-1.3b-pile-32k": "v5e:8x16",
    "125m-pile-16k": "v5e:8x16",
    "125m-pile-32k": "v5e:8x8",
}
MIXERS = {"ttt_linear": "TTT-Linear", "ttt_mlp": "TTT-MLP", "transformer": "Transformer"}
SIZES = ("125m", "350m", "760m", "1.3b")
CONTEXTS = ("2k", "8k", "32k")
RECIPES = [f"{mixer}-{size}-pile-{context}" for context in CONTEXTS for mixer in MIXERS for size in SIZES]
VARIANTS = [
    "ttt_linear_t-1.3b-pile-2k",
    "ttt_linear-125m-pile-16k",
    "ttt_linear-125m-pile-2k mesh.fsdp=16",
    "ttt_linear-350m-pile-2k mesh.fsdp=1",
    "ttt_linear-760m-pile-2k model.remat=none",
    "ttt_mlp-760m-pile-2k model.remat=none",
    "transformer-760m-pile-2k model.remat=none",
    "ttt_linear-1.3b-pile-2k model.ttt.kernel=scan",
    "ttt_linear-1.3b-pile-2k model.remat=none",
    "ttt_linear_t-1.3b-pile-2k model.remat=none",
    "ttt_mlp-1.3b-pile-2k model.remat=none",
    "transformer-1.3b-pile-2k model.remat=none",
    "ttt_linear-1.3b-pile-2k mesh.fsdp=256",
    "ttt_linear-1.3b-pile-2k mesh.fsdp=8 mesh.tensor=2 model.remat=none training.accumulation=2",
    "ttt_linear-125m-pile-2k model.ttt.mini_batch=1",
    "ttt_linear-125m-pile-2k model.ttt.mini_batch=1 model.ttt.remat_group=16",
    "ttt_linear-125m-pile-2k model.ttt.mini_batch=2048",
    "attention.py:sliding-1.3b-pile-32k",
    "attention.py:hybrid-1.3b-pile-32k",
    "attention.py:hybrid_gqa-1.3b-pile-32k",
]


def command(name: str) -> list[str]:
    """Return the command that plans a recipe; the name may begin with another file, and set further keys."""
    recipe, *overrides = name.split(" ")
    file = recipe if recipe.startswith("attention.py:") else f"paper.py:{recipe}"
    topology = next((where for what, where in TOPOLOGIES.items() if what in recipe), "v5e:16x16")
    config = ["--config", f"configs/{file}", *(f"--config.{override}" for override in overrides)]
    return [sys.executable, "-m", "ttt_jax", "plan", *config, "--topology", topology, "--json"]


def plan(name: str, file: Path) -> bool:
    """Plan a recipe, add the plan to the file, and return whether that succeeded."""
    done = subprocess.run(command(name), cwd=ROOT, capture_output=True, text=True)
    try:
        found = json.loads(done.stdout)
    except json.JSONDecodeError:
        print(f"{name}: status {done.returncode}: {done.stderr.strip()[-500:]}", file=sys.stderr, flush=True)
        return False
    with open(file, "a") as out:
        out.write(json.dumps({"name": name, **found}) + "\n")
    print(f"{name}: {gib(found['memory']['total'])} GiB, compiled in {found['compile_seconds']:.0f} s", flush=True)
    return True


def gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def seconds(p: dict) -> str:
    return f"{p['step_time']['total']:.3f} s" if p["step_time"] else ""


def duration(p: dict) -> str:
    minutes = (p["hours"] or 0) * 60
    return f"{minutes:.0f} min" if minutes < 55 else f"{minutes / 60:.1f} h"


def brief(p: dict) -> str:
    """Return a cell of the table in docs/recipes.md."""
    memory = f"{p['memory']['total'] / 2**30:.1f} GiB"
    return f"{memory}, {p['step_time']['total']:.2g} s, {duration(p)}" if p["step_time"] else f"{memory}: too much"


def in_full(name: str, p: dict) -> str:
    """Return a row of the table in docs/benchmarks.md."""
    state = p["memory"]["parameters"] + p["memory"]["moments"]
    total = p["memory"]["total"]
    traffic = p["collectives"].values()
    cells = [
        f"{name} ({p['chips']} chips)",
        " x ".join(str(size) for size in p["mesh"].values()),
        f"{p['compile_seconds']:.0f} s",
        f"{gib(state)} GiB",
        f"{gib(total - state)} GiB",
        f"{gib(total)} GiB, {'yes' if p['fits'] else 'no'}",
        f"{gib(sum(t['sent'] for t in traffic))} GiB" if p["fits"] else "",
        f"{sum(t['count'] for t in traffic)}" if p["fits"] else "",
        seconds(p),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE", help="file of plans, a line of JSON each")
    parser.add_argument("--only", default="", metavar="TEXT", help="plan recipes whose names contain TEXT")
    parser.add_argument(
        "--jobs", type=int, default=2, metavar="N", help="plans to make at a time (default: 2); 0: none"
    )
    options = parser.parse_args()

    def plans() -> dict[str, dict]:
        lines = options.file.read_text().splitlines() if options.file.exists() else []
        return {p["name"]: p for p in map(json.loads, lines)}

    planned = plans()
    missing = [name for name in [*RECIPES, *VARIANTS] if options.only in name and name not in planned]
    succeeded = True
    if options.jobs > 0:
        with ThreadPoolExecutor(options.jobs) as threads:
            succeeded = all(list(threads.map(lambda name: plan(name, options.file), missing)))
    planned = plans()
    print(f"\n| | {' | '.join(CONTEXTS)} |\n|---|{'---|' * len(CONTEXTS)}")
    for mixer, title in MIXERS.items():
        for size in SIZES:
            cells = [planned.get(f"{mixer}-{size}-pile-{context}") for context in CONTEXTS]
            print(f"| {title}, {size} | {' | '.join(brief(p) if p else '' for p in cells)} |")
    print("\n| | data x fsdp x tensor | compile | parameters, moments | the rest | total, fits? ", end="")
    print(f"| sent | collectives | step, estimated |\n{'|---' * 9}|")
    for name in [*RECIPES, *VARIANTS]:
        if name in planned:
            print(in_full(name, planned[name]))
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
