"""Run ``ttt sweep``: many trainings from one command."""

import argparse
import re
import shlex
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ttt_jax import config as config_lib
from ttt_jax import extras, import_path
from ttt_jax.cli import launch
from ttt_jax.errors import ConfigError
from ttt_jax.storage import workdir as workdir_lib
from ttt_jax.storage.workdir import Workdir, cache_folder
from ttt_jax.storage.workdir_lock import WorkdirLock
from ttt_jax.terminal.console import not_negative, positive
from ttt_jax.terminal.stopping import DONE, FAILED, INTERRUPTED, RESTART

DESCRIPTION = """\
Trains a model for each point of a sweep: the product of all --grid and --zip, for each --config. All configs are
checked before the first run starts. Each point is a ttt train command with a workdir of its own, DIR/POINT.

Running the same command again skips points that are done, continues those that are not, and tries failed points once
more; other values add points. Ctrl-C lets the points save first; a second Ctrl-C does not wait.
"""
EPILOG = """\
values:
  VALUE,VALUE,...      a list; a value with a comma is quoted: "A, B"
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

_REFUSED_OF_LAUNCH = {
    "--detach": "which follow their points",
    "--dry-run": "which have one themselves, before --",
    "--name": "whose points have names of their own",
    "--status": "which have ttt sweep status",
    "--stop": "which are stopped by Ctrl-C",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    add = parser.add_argument
    add("--grid", nargs="+", action="extend", default=[], metavar="KEY=VALUES", help="a key, and the values it takes")
    add("--zip", nargs="+", action="append", default=[], metavar="KEY=VALUES", help="keys that advance together")
    add("--workdir", required=True, metavar="DIR", help="where the sweep lives: a folder, or gs://bucket/name")
    add(
        "--jobs",
        type=positive,
        metavar="N",
        help="points at a time (default: 1; all, where they are launched elsewhere)",
    )
    add(
        "--restarts",
        type=not_negative,
        default=10,
        metavar="N",
        help="how often a point that ends with status 75 is started again (default: 10)",
    )
    add("--dry-run", action="store_true", help="print the points and their commands; run nothing")
    add("--accept-changed-learner", action="store_true", help="passed on to the ttt train of each point")
    ray = parser.add_argument_group("Ray Tune, with the extra [ray]")
    ray.add_argument("--engine", choices=["processes", "ray"], default="processes", help="(default: processes)")
    ray.add_argument("--ray-address", metavar="ADDRESS", help="a cluster, or auto (default: start one on this machine)")
    ray.add_argument(
        "--resources", nargs="+", default=["CPU=1"], metavar="NAME=N", help="that a point takes (default: CPU=1)"
    )
    ray.add_argument("--asha", metavar="METRIC", help="stop points early that are worse than others by this metric")
    ray.add_argument(
        "--grace", type=positive, metavar="STEPS", help="that each point takes at least (default: 10%% of its run)"
    )
    ray.add_argument(
        "--reduction", type=float, default=3.0, metavar="R", help="of R points the best continues, to R times the steps"
    )


def run(options: argparse.Namespace, rest: Sequence[str], parse: Callable[[Sequence[str]], tuple]) -> int:
    """Run the command and return its exit status.

    Args:
      options: its own; ``options.command`` is the launcher, behind ``--``.
      rest: arguments of the config.
      parse: the parser of ``ttt``.
    """
    from ttt_jax.sweep import files, points
    from ttt_jax.training import metrics, run_config

    launcher = options.command
    if launcher:
        _check_launcher(launcher)
    _check_engine(options)
    directory = workdir_lib.at(options.workdir)
    (grid, *zips), recipes, constant = _split([options.grid, *options.zip], rest)
    overrides = points.combinations(grid, zips, constant, len(recipes))
    old = files.find_sweep(directory)
    wanted, configs = zip(*points.make(recipes, constant, overrides, old.points if old else ()), strict=True)
    base = {key: config_lib.value_of(configs[0], key) for key in constant}
    sweep = files.merged(directory, old, files.Sweep(base, list(wanted)))
    workdirs = [directory / point.name for point in wanted]
    accept = options.accept_changed_learner
    if old is not None:
        files.on_each(lambda pair: run_config.check_same_run(*pair, accept), zip(configs, workdirs, strict=True))
    _check_learners(configs, elsewhere=options.ray_address is not None)
    if not launcher and options.engine != "ray":  # else other machines have what they need
        for config in configs:
            wandb = bool(config.log.wandb_project)
            metrics.check_destinations(directory, tensorboard=config.log.tensorboard, wandb=wandb)
    flags = ["--accept-changed-learner"] * accept
    commands = {
        point.name: points.command(point, base, workdir, launcher, flags)
        for point, workdir in zip(wanted, workdirs, strict=True)
    }
    if launcher:
        for command in commands.values():  # a point that its machines could not run is refused before any is launched
            launch.checked_job(parse(command)[0], parse)
    if options.dry_run:
        _print_points(wanted, sweep.keys, commands)
        return DONE
    return _run(options, directory, old, sweep, wanted, commands)


def _run(options, directory: Workdir, old, sweep, wanted, commands) -> int:
    from ttt_jax.sweep import files, runner

    jobs = options.jobs or (len(wanted) if options.command else 1)
    elsewhere = options.command or options.engine == "ray"
    environments = [{}] * jobs if elsewhere else runner.gpu_shares(jobs)
    workdir_lib.make(directory)
    place, local = directory, _local(directory)
    if options.engine == "ray":  # whose processes have other working directories
        place, local = (directory.resolve() if workdir_lib.is_local(directory) else directory), local.resolve()
    with WorkdirLock(directory, "ttt sweep"):
        if files.find_sweep(directory) != old:
            raise ConfigError(f"--workdir {directory}: another command has just changed the sweep; run this one again")
        files.write_sweep(directory, sweep)
        known = files.on_each(lambda point: files.read_record(directory / point.name), wanted)
        is_early = options.asha is not None
        runs = [
            runner.PointRun(
                point,
                place / point.name,
                local / point.name,
                [*runner.PROGRAM, *commands[point.name]],
                restarts=options.restarts,
                cwd=Path.cwd(),
                ended=record if record is not None and record.is_final(point.steps, stopping_early=is_early) else None,
            )
            for point, record in zip(wanted, known, strict=True)
        ]
        left = [each for each in runs if each.ended is None]
        others = len(sweep.points) - len(wanted)
        runner.say(
            f"{directory}: {len(wanted)} points, {len(wanted) - len(left)} of them done already"
            + (f"; {others} of earlier commands are left as they are" if others else "")
            + f"; to watch: ttt sweep status {shlex.quote(str(directory))} --watch"
        )
        received = _run_on_ray(options, runs) if left and options.engine == "ray" else runner.run(left, environments)
    return _summary(directory, wanted, received)


def _run_on_ray(options, runs) -> signal.Signals | None:
    from ttt_jax.sweep import metric, ray_tune

    early = None
    if options.asha is not None:
        grace = options.grace or max(1, max(each.point.steps for each in runs) // 10)
        early = metric.Early(options.asha, grace, options.reduction, metric.higher_is_better(options.asha))
    # Those that have ended are compared with, and have to come first.
    ordered = sorted((each for each in runs if early or each.ended is None), key=lambda each: each.ended is None)
    return ray_tune.run(
        {each.point.name: each for each in ordered},
        address=options.ray_address,
        resources=_resources(options.resources),
        jobs=options.jobs,
        early=early,
    )


def _summary(directory: Workdir, wanted, received: signal.Signals | None) -> int:
    from ttt_jax.sweep import files, status

    standings = files.on_each(lambda point: status.of_point(directory / point.name, point, False), wanted)
    print(f"{directory}: {status.summary(standings)}")
    for each in standings:
        if each.state == files.FAILED:
            print(f"  {each.point.name}: {each.note}")
    if received is not None:
        print("to continue: the same command")
        return {signal.SIGTERM: RESTART, signal.SIGINT: INTERRUPTED}[received]
    return DONE if all(each.state in (files.DONE, files.STOPPED_EARLY) for each in standings) else FAILED


def _split(lists: list[list[str]], rest: Sequence[str]) -> tuple[list[list[str]], list[str], dict[str, str]]:
    """Return the lists of --grid and --zip, the recipes, and the keys that are set for all points.

    argparse takes ``--config.KEY=VALUE`` for one more entry of a list before it where VALUE has a space.
    """
    swallowed = [text for texts in lists for text in texts if text.startswith("-")]
    recipes, values = config_lib.split_arguments([*rest, *swallowed])
    constant: dict[str, str] = {}
    for key, text in values:
        if key in constant:
            raise ConfigError(f"--config.{key}={text}: {key} is set already; expected each key in one place")
        constant[key] = text
    if not recipes:
        raise ConfigError("--config: missing; expected a config file, such as --config configs/quickstart.py")
    return [[text for text in texts if text not in swallowed] for texts in lists], list(recipes), constant


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
        _resources(options.resources)
        return
    for option in ("ray_address", "asha", "grace"):
        if getattr(options, option) is not None:
            raise ConfigError(f"--{option.replace('_', '-')}: expected --engine ray too")


def _check_launcher(launcher: Sequence[str]) -> None:
    """Raise ConfigError unless the text after ``--`` is a launcher that runs each point to its end."""
    if list(launcher[:1]) != ["launch"] or len(launcher) < 2 or "--" in launcher:
        raise ConfigError(f"-- {shlex.join(launcher)}: expected -- launch TARGET, and options of it")
    for option in launcher[2:]:
        if why := _REFUSED_OF_LAUNCH.get(option.partition("=")[0]):
            raise ConfigError(f"-- {shlex.join(launcher)}: {option} is not for sweeps, {why}")


def _check_learners(configs, *, elsewhere: bool) -> None:
    """Raise ConfigError where a learner of the user's own is missing here, or on the machines of a cluster."""
    for key, named in dict.fromkeys(item for config in configs for item in config_lib.own_functions(config).items()):
        if elsewhere:
            import_path.check_sent(named, key, Path.cwd())
        else:
            import_path.source_file(named, key)


def _resources(texts: Sequence[str]) -> dict[str, float]:
    found = {}
    for text in texts:
        match = re.fullmatch(r"([A-Za-z][\w.:-]*)=(\d+(?:\.\d+)?)", text)
        if match is None:
            raise ConfigError(f"--resources {text}: expected NAME=N, such as CPU=4 GPU=1")
        found[match[1]] = float(match[2])
    return found


def _print_points(points, keys: Sequence[str], commands: Mapping[str, Sequence[str]]) -> None:
    from ttt_jax.sweep import status
    from ttt_jax.terminal import console

    keys = [key for key in keys if any(key in point.values for point in points)]
    console.output().print(status.table_of_points(points, keys))
    for command in commands.values():
        print(shlex.join(["ttt", *command]))


def _local(directory: Workdir) -> Path:
    """Return where logs and locks are: with the points, or in the user's cache folder for points in a bucket."""
    if workdir_lib.is_local(directory):
        return directory
    return cache_folder() / "sweeps" / str(directory).removeprefix("gs://").strip("/")
