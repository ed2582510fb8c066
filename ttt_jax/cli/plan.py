"""Run ``ttt plan``: predict whether a run fits its machines, how long it takes and what it costs."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from ttt_jax import config as config_lib
from ttt_jax import finite
from ttt_jax.cli.options import CONFIG_USAGE
from ttt_jax.errors import ConfigError
from ttt_jax.terminal.console import positive
from ttt_jax.terminal.stopping import DONE, FAILED

DESCRIPTION = """\
Compiles the training step of a config for chips that need not be present, with their own compiler. Prints the memory
that each chip needs, what the chips send to each other, and an estimate of time and price with its assumptions.

Exit status 1 means that the run does not fit.
"""
EPILOG = """\
examples:
  ttt plan --config configs/paper.py:ttt_linear-1.3b-pile-2k --topology v5e:16x16 --price 1.20
  ttt plan --config configs/paper.py:ttt_mlp-350m-pile-8k --topology v5p:4x4x4 --search
"""
USAGE = f"""\
ttt plan {CONFIG_USAGE} --topology TOPOLOGY [--slices N]
                [--price USD] [--search [--most N]] [--json]"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``ttt plan``."""
    add = parser.add_argument
    add(
        "--topology",
        required=True,
        metavar="TOPOLOGY",
        help="chips of a slice: v5e:16x16, v6e:8x8, v5p:4x4x4, ...; cpu:N for CPU devices",
    )
    slices = "number of slices, joined by a data center network (default: 1)"
    add("--slices", type=positive, default=1, metavar="N", help=slices)
    add("--price", type=float, metavar="USD", help="price of a chip for an hour")
    add("--search", action="store_true", help="try meshes, model.remat and training.accumulation; print the best")
    most = "end a search after N programs that fit (default: 6)"
    add("--most", type=positive, default=6, metavar="N", help=most)
    add("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Run ``ttt plan`` and return its exit status."""
    if options.price is not None and not 0 <= options.price < 1e6:
        raise ConfigError(f"--price {options.price}: expected USD per chip-hour")
    from ttt_jax.planning import topology as topology_lib

    topology = topology_lib.parse(options.topology, options.slices)
    config = config_lib.from_arguments(rest)
    topology_lib.prepare(topology)
    from ttt_jax.planning import plan as plan_lib
    from ttt_jax.planning import report

    devices = topology_lib.devices(topology)
    if options.search:
        return _search(options, config, str(topology), devices)
    try:
        plan = plan_lib.plan(config, str(topology), devices)
    except plan_lib.CompilerError as error:
        print(f"ttt plan: {error}", file=sys.stderr)
        return FAILED
    print(_json(report.as_dict(plan, options.price)) if options.json else report.text(plan, options.price))
    return FAILED if plan.fits is False else DONE


def _search(options: argparse.Namespace, config, topology: str, devices: list) -> int:
    from ttt_jax.planning import report, search

    if not options.json:
        print(report.search_header())
    tried = search.search(
        config,
        topology,
        devices,
        options.most,
        progress=lambda one: None if options.json else print(report.search_line(one), flush=True),
    )
    if not tried:
        raise ConfigError(f"--search: no mesh of {len(devices)} devices splits this model and batch")
    best = search.best(tried)
    if options.json:
        results = [
            {**one.choice._asdict(), "plan": None if one.plan is None else report.as_dict(one.plan, options.price)}
            for one in tried
        ]
        print(_json({"best": None if best is None else best[0].overrides(), "tried": results}))
    elif best is None:
        print("none of these fits")
    else:
        choice, plan = best
        print(f"\nbest:\n  {choice.overrides()}\n\n{report.text(plan, options.price)}")
    return FAILED if best is None else DONE


def _json(numbers: dict[str, Any]) -> str:
    return json.dumps(finite.for_json(numbers)[0], indent=2, allow_nan=False)
