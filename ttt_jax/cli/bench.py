"""Run ``ttt bench step``, which times a training step, and ``ttt bench tpu-schedule``, which counts its cycles."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from ttt_jax import config as config_lib
from ttt_jax import finite
from ttt_jax.cli.options import CONFIG_USAGE
from ttt_jax.errors import ConfigError
from ttt_jax.terminal.console import not_negative, positive
from ttt_jax.terminal.stopping import DONE, FAILED

if TYPE_CHECKING:
    from ttt_jax.benchmark.tpu_schedule.compile import Function, Step

DESCRIPTION = """\
Compiles the training step of a config and times it on random tokens: step time, tokens/s, model FLOP/s, peak memory,
and the ratio to plain matrix products of as many FLOPs, timed between the steps.

To count cycles on a TPU without one: ttt bench tpu-schedule --help
"""
USAGE = f"ttt bench step {CONFIG_USAGE} [--repeats N] [--warmup N] [--json]"
TPU_SCHEDULE = """\
Compiles a function or a whole training step for TPUs that need not be present, reads the schedule that their compiler
makes, and counts cycles and time per operation and in total, the use of each unit of a chip, and bytes to and from HBM.
Waits for memory and collectives between chips are not modelled: docs/tpu-schedule.md explains the numbers.
"""
TPU_SCHEDULE_USAGE = f"""\
ttt bench tpu-schedule {CONFIG_USAGE}
                              [--topology TOPOLOGY] [--compare KEY=VALUE[,...] ...] [--top N] [--json] [--keep DIR]
       ttt bench tpu-schedule --function MODULE:NAME [--set KEY=VALUE ...]
                              [--topology TOPOLOGY] [--compare KEY=VALUE[,...] ...] [--top N] [--json] [--keep DIR]"""
TPU_SCHEDULE_EPILOG = """\
examples:
  ttt bench tpu-schedule --function ttt_jax.benchmark.inner_loop:build --set heads=32 backward=true
  ttt bench tpu-schedule --function ttt_jax.benchmark.inner_loop:build --compare path=official path=scan,unroll=4
  ttt bench tpu-schedule --config configs/benchmark.py:ttt_mlp --config.model.dtype=bfloat16
  ttt bench tpu-schedule --config configs/benchmark.py --compare model.ttt.unroll=1 model.ttt.unroll=4
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``ttt bench step``."""
    parser.add_argument("kind", choices=["step"], metavar="step")
    parser.add_argument("--repeats", type=positive, default=7, metavar="N", help="number of timed steps (default: 7)")
    parser.add_argument(
        "--warmup", type=not_negative, default=2, metavar="N", help="number of steps before them (default: 2)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def step(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Run ``ttt bench step`` and return its exit status."""
    config = config_lib.from_arguments(rest)
    from ttt_jax.benchmark import step

    measurement = step.measure(config, repeats=options.repeats, warmup=options.warmup)
    print(json.dumps(finite.for_json(measurement.as_dict())[0], indent=2) if options.json else measurement)
    return DONE


def add_tpu_schedule_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``ttt bench tpu-schedule``."""
    add = parser.add_argument
    add(
        "--function",
        metavar="MODULE:NAME",
        help="compile a function instead of a training step: NAME(**settings), of an importable module or of FILE.py, "
        "returns it and a tuple of its arguments as jax.ShapeDtypeStruct",
    )
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the function: int, float, bool or str")
    add(
        "--topology",
        default="v5e:1x1",
        metavar="TOPOLOGY",
        help="v5e:2x2, v6e:1x1, v5p:1x1x1, ... (default: v5e:1x1); a step is split over all chips, a function runs "
        "on one",
    )
    add(
        "--compare",
        nargs="+",
        metavar="KEY=VALUE[,...]",
        help="measure several variants, each with these settings of the function or keys of the config, and print "
        "ratios to the first",
    )
    add("--top", type=not_negative, default=15, metavar="N", help="number of operations to list (default: 15)")
    add("--json", action="store_true", help="print JSON")
    add("--keep", type=Path, metavar="DIR", help="keep the program and the compiler's files in a new folder")


def tpu_schedule(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Run ``ttt bench tpu-schedule`` and return its exit status."""
    variants = options.compare or [""]
    if options.compare and len(options.compare) < 2:
        raise ConfigError("--compare: expected two or more of KEY=VALUE[,KEY=VALUE...]")
    if len(set(variants)) < len(variants):
        raise ConfigError(f"--compare {' '.join(variants)}: expected each once")
    targets = [target_of(options, list(rest), variant) for variant in variants]
    from ttt_jax.benchmark.tpu_schedule import report
    from ttt_jax.benchmark.tpu_schedule.listing import ScheduleError
    from ttt_jax.benchmark.tpu_schedule.schedule import measure

    measured, failed = {}, {}
    for number, (variant, target) in enumerate(zip(variants, targets, strict=True)):
        keep = options.keep / str(number) if options.keep and options.compare else options.keep
        try:
            measured[variant] = measure(target, options.topology, keep)
        except ScheduleError as error:  # continue with the other variants
            failed[variant] = str(error)
            print(f"ttt bench tpu-schedule: {target}: {error}", file=sys.stderr)
    if options.json:
        shown = {v: report.as_dict(measured[v]) if v in measured else {"error": failed[v]} for v in variants}
        print(json.dumps(shown if options.compare else shown[""], indent=2))
    elif options.compare and measured:
        print(report.comparison(measured))
    elif measured:
        print(report.text(measured[""], options.top))
    return FAILED if failed else DONE


def target_of(options: argparse.Namespace, rest: list[str], variant: str) -> "Function | Step":
    """Return what to compile, with the settings of a variant of ``--compare``."""
    from ttt_jax.benchmark.tpu_schedule.compile import Function, Step

    pairs = variant.split(",") if variant else []
    if options.function is None:
        if options.set:
            raise ConfigError("--set: expected --function too; keys of a config are set by --config.KEY=VALUE")
        if not rest:
            raise ConfigError("--config, --function: missing; expected --config FILE or --function MODULE:NAME")
        _settings("--compare", pairs)
        named = next((b for a, b in pairwise(rest) if re.fullmatch("--?config", a)), "")
        config = config_lib.from_arguments([*rest, *(f"--config.{pair}" for pair in pairs)])
        return Step(config, f"training step of {named or 'the config'}")
    if rest:
        raise ConfigError(
            f"{rest[0]!r}: unexpected argument; --function has no config, its settings are --set KEY=VALUE"
        )
    if not re.fullmatch(r"[^:]+:\w+", options.function):
        raise ConfigError(f"--function {options.function}: expected MODULE:NAME or FILE.py:NAME")
    return Function(options.function, _settings("--set", options.set) | _settings("--compare", pairs))


def _settings(option: str, pairs: Sequence[str]) -> dict[str, int | float | bool | str]:
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise ConfigError(f"{option} {pair}: expected KEY=VALUE")
        settings[key] = _typed(value)
    return settings


def _typed(text: str) -> int | float | bool | str:
    """Return text as a bool, an int or a float where it is one, else as it stands."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
