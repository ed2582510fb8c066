"""``ttt sweep``: many runs from one command; where they stand, and how they compare."""

import argparse
import itertools
import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ttt_jax import config as config_lib
from ttt_jax import extras, import_path
from ttt_jax.cli import launch
from ttt_jax.errors import ConfigError
from ttt_jax.storage import workdir as workdir_lib
from ttt_jax.storage.workdir import Workdir, cache_folder
from ttt_jax.storage.workdir_lock import WorkdirLock
from ttt_jax.terminal.stopping import DONE, FAILED, INTERRUPTED, RESTART

DESCRIPTION = """\
Trains a model for each point of a sweep: the product of all --grid and --zip, for each --config. All configs are
checked before the first run starts. Each point lives in a folder of its own, DIR/POINT, and is a ttt train command.

The same command again skips points that are done, goes on with those that are not, and tries failed ones once more;
other values add points. Ctrl-C lets the points save first; a second Ctrl-C does not wait.
"""
EPILOG = """\
values:
  VALUE,VALUE,...      a list; what holds a comma stands in quotes: "A, B"
  log:LOW:HIGH:N       N numbers with equal ratios
  linear:LOW:HIGH:N    N numbers with equal steps
  pow2:LOW:HIGH        powers of two

examples:
  ttt sweep --config configs/quickstart.py --grid optimizer.peak_lr=log:1e-3:1e-2:5 seed=0,1,2 --workdir sweeps/lr
  ttt sweep --config configs/quickstart.py:ttt_linear --config configs/quickstart.py:attention \\
      --zip model.width=64,128 model.num_heads=2,4 --workdir sweeps/width --jobs 2
  ttt sweep --config configs/paper.py:ttt_linear-125m-pile-2k --grid model.ttt.mini_batch=pow2:1:2048 \\
      --workdir gs://bucket/mini-batch -- launch tpu --accelerator v5litepod-16 --spot
  ttt sweep status sweeps/lr --watch
  ttt sweep results sweeps/lr --plot lr.png --x optimizer.peak_lr

exit status:
  0 all points are done, 1 some failed, 2 the command or a config cannot be run, 75 stopped by SIGTERM, 130 by Ctrl-C
"""
USAGE = """\
ttt sweep --config FILE[:ARG] [--config FILE[:ARG] ...] [--config.KEY=VALUE ...]
                 [--grid KEY=VALUES ...] [--zip KEY=VALUES KEY=VALUES ...] --workdir DIR [options]
                 [-- launch TARGET ...]
       ttt sweep status DIR [--watch]
       ttt sweep results DIR [--metric NAME] [--csv FILE] [--json] [--plot FILE --x KEY [--lines KEY]]"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    add = parser.add_argument
    add("--grid", nargs="+", action="extend", default=[], metavar="KEY=VALUES", help="a key, and what it takes")
    add("--zip", nargs="+", action="append", default=[], metavar="KEY=VALUES", help="keys that advance together")
    add("--workdir", required=True, metavar="DIR", help="where the sweep lives: a folder, or gs://bucket/name")
    add("--jobs", type=int, metavar="N", help="points at a time (default: 1; all, where they are launched elsewhere)")
    add("--restarts", type=int, default=10, metavar="N", help="of a point that ends with status 75 (default: 10)")
    add("--dry-run", action="store_true", help="print the points and their commands; run nothing")
    ray = parser.add_argument_group("Ray Tune, with the extra [ray]")
    ray.add_argument("--engine", choices=["processes", "ray"], default="processes", help="(default: processes)")
    ray.add_argument("--ray-address", metavar="ADDRESS", help="of a cluster, or auto (default: one of this machine)")
    ray.add_argument("--resources", nargs="+", default=["CPU=1"], metavar="NAME=N", help="of a point (default: CPU=1)")
    ray.add_argument("--asha", metavar="METRIC", help="stop points early that are worse than others by this metric")
    ray.add_argument("--grace", type=int, metavar="STEPS", help="that each point may take (default: 10%% of its run)")
    ray.add_argument(
        "--reduction", type=float, default=3.0, metavar="R", help="the best of R go on, then to R times as many steps"
    )


def run(options: argparse.Namespace, rest: Sequence[str], parse: Callable[[Sequence[str]], tuple]) -> int:
    """``ttt sweep``; returns its exit status. What stands behind ``--`` is the launcher; ``parse`` is that of ttt."""
    from ttt_jax.sweep import axes as axes_lib
    from ttt_jax.sweep import command, points, sweep_file
    from ttt_jax.sweep.sweep_file import Sweep
    from ttt_jax.training import metrics

    _at_least("--jobs", options.jobs, 1)
    _at_least("--restarts", options.restarts, 0)
    launcher = options.command
    if launcher:
        command.check_launcher(launcher)
    _check_engine(options)
    directory = workdir_lib.at(options.workdir)
    # argparse takes --config.KEY=VALUE for a value of --grid or --zip before it where VALUE has a space.
    swallowed = [text for text in (*options.grid, *itertools.chain(*options.zip)) if text.startswith("-")]
    grid, *zips = [[text for text in group if text not in swallowed] for group in (options.grid, *options.zip)]
    recipes, constant = _split([*rest, *swallowed])
    axes = axes_lib.from_options(grid, zips, constant)
    there = sweep_file.read(directory)
    made = points.make(recipes, constant, axes_lib.product(axes), there.points if there else ())
    sweep = sweep_file.merged(directory, there, Sweep(made.base, axes, made.points))
    if there is not None:
        sweep_file.check_started(directory, made.points, made.configs)

    _check_learners(made.configs, elsewhere=options.ray_address is not None)
    if not launcher and options.engine != "ray":  # else other machines have what they need
        for config in made.configs:
            wandb = bool(config.log.wandb_project)
            metrics.check_destinations(directory, tensorboard=config.log.tensorboard, wandb=wandb)

    def arguments(point: points.Point) -> list[str]:
        return command.of(point, made.base, directory / point.name, launcher)

    if launcher:
        for point in made.points:  # a point that its machines could not run is refused before any is launched
            launch.checked_job(parse(arguments(point))[0], parse)
    if options.dry_run:
        _print_points(made.points, sweep.keys, [command.shown(arguments(point)) for point in made.points])
        return DONE
    return _run(options, directory, there, sweep, made.points, arguments, launched=bool(launcher))


def _run(options, directory: Workdir, there, sweep, wanted, arguments, *, launched: bool) -> int:
    from ttt_jax.sweep import command, gpus, record, runner, sweep_file
    from ttt_jax.sweep.files import on_each
    from ttt_jax.sweep.point_run import PointRun

    jobs = options.jobs or (len(wanted) if launched else 1)
    environments = [{}] * jobs if launched or options.engine == "ray" else gpus.split(jobs)
    workdir_lib.make(directory)
    local = _local(directory)
    with WorkdirLock(directory, "ttt sweep"):
        if sweep_file.read(directory) != there:
            raise ConfigError(f"--workdir {directory}: another command has just changed the sweep; run this one again")
        sweep_file.write(directory, sweep)
        known = on_each(lambda point: record.read(directory / point.name), wanted)
        early = options.asha is not None
        left = [
            point
            for point, before in zip(wanted, known, strict=True)
            if before is None or not before.is_final(point.steps, stopping_early=early)
        ]
        others = len(sweep.points) - len(wanted)
        _tell(
            f"{directory}: {len(wanted)} points, {len(wanted) - len(left)} of them done already"
            + (f"; {others} of earlier commands are left as they are" if others else "")
            + f"; to watch: ttt sweep status {shlex.quote(str(directory))} --watch"
        )

        def make(point, environment) -> PointRun:
            line = [*command.PROGRAM, *arguments(point)]
            about = {"environment": environment, "restarts": options.restarts, "tell": _tell}
            return PointRun(point, directory, local, line, **about)

        if options.engine == "ray":
            received = _run_on_ray(options, directory, local, wanted, left, arguments)
        else:
            received = runner.run(left, make, environments, _tell)
    return _summary(directory, wanted, received)


def _run_on_ray(options, directory: Workdir, local: Path, wanted, left, arguments) -> signal.Signals | None:
    from ttt_jax.sweep import command, metric, ray_tune

    steps = max(point.steps for point in wanted)
    early = None
    if options.asha is not None:
        grace = options.grace or max(1, steps // 10)
        early = ray_tune.Early(options.asha, grace, options.reduction, metric.higher_is_better(options.asha))
    cwd, place = str(Path.cwd()), str(directory.resolve() if workdir_lib.is_local(directory) else directory)
    ended = [point for point in wanted if point not in left] if early else []  # they are compared with
    trials = [
        ray_tune.Trial(
            point,
            [*command.PROGRAM, *arguments(point)] if point in left else None,
            directory=place,
            local=str(local.resolve()),
            cwd=cwd,
            restarts=options.restarts,
        )
        for point in [*ended, *left]
    ]
    if not left:
        return None
    resources = _resources(options.resources)
    return ray_tune.run(
        trials, address=options.ray_address, resources=resources, jobs=options.jobs, early=early, tell=_tell
    )


def _summary(directory: Workdir, wanted, received: signal.Signals | None) -> int:
    from ttt_jax.sweep import record, status
    from ttt_jax.sweep.files import on_each

    standings = on_each(lambda point: status.of_point(directory / point.name, point, False), wanted)
    print(f"{directory}: {status.in_short(standings)}")
    for each in standings:
        if each.state == record.FAILED:
            print(f"  {each.point.name}: {each.note}")
    if received is not None:
        print("to go on: the same command")
        return {signal.SIGTERM: RESTART, signal.SIGINT: INTERRUPTED}[received]
    final = (record.DONE, record.STOPPED_EARLY)
    return DONE if all(each.state in final for each in standings) else FAILED


def _split(rest: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The recipes, and the keys that are set for all points."""
    recipes: list[str] = []
    constant: dict[str, str] = {}
    left = list(rest)
    while left:
        first = left.pop(0)
        if re.fullmatch("--?config(=.*)?", first):
            recipes.append(first.partition("=")[2] if "=" in first else (left.pop(0) if left else ""))
        elif match := re.fullmatch(r"--?config[.]([\w.]+)=(.*)", first, re.DOTALL):
            if match[1] in constant:
                raise ConfigError(f"{first}: {match[1]} is set already; expected each key in one place")
            constant[match[1]] = match[2]
        else:
            raise ConfigError(f"{first!r}: unexpected argument; expected --config.KEY=VALUE")
    if not recipes:
        raise ConfigError("--config: missing; expected a config file, such as --config configs/quickstart.py")
    return recipes, constant


def _check_engine(options: argparse.Namespace) -> None:
    if options.engine == "ray":
        if options.command:
            raise ConfigError("--engine ray: is a launcher itself; expected nothing behind --")
        from ttt_jax.sweep import metric

        extras.check("ray", "ray", "--engine ray")
        if options.asha is not None and metric.is_of_evaluation(options.asha):
            raise ConfigError(f"--asha {options.asha}: expected a number of metrics.jsonl, such as loss")
        if not 1 < options.reduction < 1e6:
            raise ConfigError(f"--reduction {options.reduction}: expected a number above 1")
        _at_least("--grace", options.grace, 1)
        _resources(options.resources)
        return
    for option in ("ray_address", "asha", "grace"):
        if getattr(options, option) is not None:
            raise ConfigError(f"--{option.replace('_', '-')}: expected --engine ray too")


def _check_learners(configs, *, elsewhere: bool) -> None:
    """Raise ConfigError where a learner of the user's own is missing here, or on the machines of a cluster."""
    for named in dict.fromkeys(config_lib.own_learner(config) for config in configs):
        if named is not None and elsewhere:
            import_path.check_sent(named, config_lib.LEARNER, Path.cwd())
        elif named is not None:
            import_path.source_file(named, config_lib.LEARNER)


def _resources(texts: Sequence[str]) -> dict[str, float]:
    found = {}
    for text in texts:
        match = re.fullmatch(r"([A-Za-z][\w.:-]*)=(\d+(?:\.\d+)?)", text)
        if match is None:
            raise ConfigError(f"--resources {text}: expected NAME=N, such as CPU=4 GPU=1")
        found[match[1]] = float(match[2])
    return found


def _print_points(points, keys: Sequence[str], commands: Sequence[str]) -> None:
    from ttt_jax.sweep import tables
    from ttt_jax.terminal import console

    console.output().print(tables.of_points(points, [key for key in keys if any(key in p.values for p in points)]))
    for line in commands:
        print(line)


def _local(directory: Workdir) -> Path:
    """Where logs and locks are: with the points, or in the user's cache folder where those are in a bucket."""
    if workdir_lib.is_local(directory):
        return directory
    return cache_folder() / "sweeps" / str(directory).removeprefix("gs://").strip("/")


def _at_least(option: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ConfigError(f"{option} {value}: expected {least} or more")


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
