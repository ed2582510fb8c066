"""Run ``ttt probe needle`` and ``ttt probe task``: probe what a trained model remembers."""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_collections

from ttt_jax.cli.options import SPLITS, check_file
from ttt_jax.errors import ConfigError
from ttt_jax.storage import workdir as workdir_lib
from ttt_jax.terminal.console import StatusLine, at_least, counts, duration, not_negative, positive
from ttt_jax.terminal.stopping import DONE
from ttt_jax.training import run_config

if TYPE_CHECKING:
    from ttt_jax.evaluation.trained import Trained

NEEDLES = ("passkey", "number", "uuid")
DESCRIPTION = """\
Probes what a trained model remembers, without downloads. Two kinds of probes:

  ttt probe needle   a number or a UUID in a haystack of text, by context and depth
  ttt probe task     the synthetic task that the model was trained on, by number of items and context

Help on each kind: ttt probe needle --help
"""
NEEDLE = """\
Single needles of RULER (arXiv:2404.06654), by context and depth, with the tokenizer of the run's data:

  passkey   S-NIAH-1: a 7-digit number in five sentences, repeated
  number    S-NIAH-2: a 7-digit number in prose
  uuid      S-NIAH-3: a UUID in prose

Prose is text of the run's own data, or of --haystack. A cell of the tables is the share of examples whose answer greedy
decoding gives, token by token, and in brackets the share whose answer is likelier than --candidates - 1 other values,
which small models can do too. Examples are functions of seed, tokenizer and haystack.

Writes DIR/probe/needle-TASK.json and .csv, cell by cell; known cells are not computed again.
"""
TASK = """\
Accuracy on sequences of the synthetic task that a run was trained on (data.source=associative_recall or
selective_copying), by number of items and by context, which may be longer than that of training. A cell of the table is
the share of answers that are right, and in brackets the share of sequences with all answers right.

Writes DIR/probe/TASK.json and .csv, and TASK-by_distance.csv; known cells are not computed again.
"""


def add_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Add ``ttt probe`` and its kinds."""

    def misplaced(options: argparse.Namespace, rest: Sequence[str]) -> int:
        raise ConfigError(f"expected {options.kind} right after probe")

    kinds = verb("probe", misplaced, DESCRIPTION)
    kinds.add_argument("kind", choices=["needle", "task"], metavar="needle|task")
    add_needle_arguments(verb("probe needle", lambda options, rest: needle(options), NEEDLE))
    add_task_arguments(verb("probe task", lambda options, rest: task(options), TASK))


def add_needle_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``ttt probe needle``."""
    add = parser.add_argument
    _add_common(parser, samples=20)
    add("--task", type=_names, default=NEEDLES, metavar="NAME,...", help=f"some of {', '.join(NEEDLES)} (default: all)")
    add("--context", type=_numbers, default=[1024, 2048], metavar="T,...", help="tokens (default: 1024,2048)")
    add("--depths", type=positive, default=5, metavar="N", help="number of depths from 0 to 100 %% (default: 5)")
    add("--candidates", type=at_least(2), default=8, metavar="N", help="values to rank; chance is 1 in N (default: 8)")
    add("--seed", type=not_negative, default=0, metavar="N", help="of the examples (default: 0)")
    add("--haystack", metavar="FILE", help="prose: a text file (default: the data of the run)")
    add("--split", default="validation", choices=SPLITS, help="of the data, for its prose (default: validation)")
    add("--tokenizer", metavar="FILE", help="byte, .model or tokenizer.json (default: the tokenizer of the data)")
    show = "what --plot shows (default: accuracy)"
    add("--show", default="accuracy", choices=["accuracy", "ranked_first"], help=show)


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``ttt probe task``."""
    add = parser.add_argument
    _add_common(parser, samples=256)
    add("--context", type=_numbers, metavar="T,...", help="tokens (default: as in training, twice, four times that)")
    add("--items", type=_numbers, metavar="N,...", help="pairs or symbols (default: as in training)")
    add("--split", default="validation", choices=SPLITS, help="(default: validation)")


def _add_common(parser: argparse.ArgumentParser, samples: int) -> None:
    add = parser.add_argument
    add("--workdir", required=True, nargs="+", metavar="DIR", help="workdirs of runs")
    add("--samples", type=positive, default=samples, metavar="N", help=f"examples per cell (default: {samples})")
    add("--step", type=not_negative, metavar="N", help="which checkpoint (default: the newest)")
    add("--batch-size", type=positive, metavar="B", help="examples at a time (default: as in training)")
    add("--plot", type=Path, metavar="FILE", help="also draw heat maps: .png, .pdf, .svg")


class _Run(NamedTuple):
    """A run to probe, with a name that tells it apart from the others."""

    workdir: workdir_lib.Workdir
    name: str
    config: ml_collections.ConfigDict


def _runs(options: argparse.Namespace) -> list[_Run]:
    """Return the runs to probe. Raise ConfigError for one without a config, and where --plot cannot be written."""
    workdirs = [workdir_lib.at(workdir) for workdir in options.workdir]
    configs = [run_config.load(workdir) for workdir in workdirs]
    if options.plot:
        from ttt_jax.figures import style

        style.check_output(options.plot, option="--plot")
        check_file(options.plot, "--plot")
    return list(map(_Run, workdirs, workdir_lib.names(workdirs), configs))


def needle(options: argparse.Namespace) -> int:
    """Run ``ttt probe needle``."""
    runs = _runs(options)
    from ttt_jax.evaluation.probes import cells as cells_lib
    from ttt_jax.evaluation.probes import needle_probe, prompt
    from ttt_jax.evaluation.probes.needle import TASKS
    from ttt_jax.figures import heat_map

    chosen = {"tokenizer": options.tokenizer, "haystack": options.haystack, "split": options.split}
    prepared = [prompt.texts_of_run(run.config, options.task, **chosen) for run in runs]
    n = options.depths
    panels: dict[str, list[heat_map.Panel]] = {task: [] for task in options.task}
    asked: dict[str, Any] = {
        "contexts": options.context,
        "depths": [100 * i / (n - 1) for i in range(n)] if n > 1 else [50.0],
        **{name: getattr(options, name) for name in ("samples", "candidates", "seed")},
    }
    for run, text in zip(runs, prepared, strict=True):
        trained = _load(run.workdir, options.step)
        length = trained.config.data.sequence_length
        total = sum(needle_probe.tokens_to_read(trained, task, text, **asked) for task in options.task)
        with closing(_Progress(trained.name, total)) as line:
            for task in options.task:
                cells = needle_probe.probe(
                    trained,
                    task,
                    text,
                    batch_size=options.batch_size,
                    progress=line.show,
                    scored=line.add,
                    **asked,
                )
                title = f"{run.name}: {_in_words(trained)}; {task} ({TASKS[task].name})"
                caption = (
                    f"depth by context: share right (share likelier than {options.candidates - 1} other answers); "
                    f"{options.samples} samples, {text.haystacks[task].name}"
                )
                cells_lib.show(cells, title, "depth", _percent, ("accuracy", "ranked_first"), caption)
                panel = heat_map.panel(cells, f"{run.name}: {task}", "depth", _percent, options.show, length)
                panels[task].append(panel)
    if options.plot:
        words = {"accuracy": "share right", "ranked_first": f"share ranked first of {options.candidates}"}
        rows = list(panels.values()) if len(runs) > 1 else [[panel for line in panels.values() for panel in line]]
        heat_map.save(rows, options.plot, words[options.show])
        print(options.plot)
    return DONE


def task(options: argparse.Namespace) -> int:
    """Run ``ttt probe task``."""
    runs = _runs(options)
    from ttt_jax.data.synthetic import TASKS
    from ttt_jax.evaluation.probes import cells as cells_lib
    from ttt_jax.evaluation.probes import task_probe
    from ttt_jax.figures import heat_map

    for run in runs:  # raises for a run without a task before any is loaded
        task_probe.task_of(run.config)
    panels = []
    for run in runs:
        (name, items), length = task_probe.task_of(run.config), run.config.data.sequence_length
        numbers, contexts = options.items or [items], options.context or [length, 2 * length, 4 * length]
        with _loaded(run.workdir, options.step, len(numbers) * len(contexts)) as (trained, progress):
            cells = task_probe.probe(
                trained,
                items=numbers,
                contexts=contexts,
                samples=options.samples,
                split=options.split,
                batch_size=options.batch_size,
                progress=progress,
            )
            of = TASKS[name].items
            title = f"{run.name}: {_in_words(trained)}; {name}, trained on {items} {of} in {length} tokens"
            caption = f"{of} by context: share of answers right (of sequences all right); {options.samples} sequences"
            cells_lib.show(cells, title, "items", str, ("accuracy", "whole"), caption)
            panel = heat_map.panel(cells, f"{run.name}: {name}", "items", str, "accuracy", length)
            panels.append(panel._replace(row_title=of))
    if options.plot:
        heat_map.save([panels], options.plot, "share of answers right")
        print(options.plot)
    return DONE


class _Progress:
    """A line on standard error that shows how much of a probe is done, and how long the rest will take.

    Args:
      name: of the run.
      total: tokens of all prompts to read.
    """

    def __init__(self, name: str, total: int):
        self._name, self._total, self._done, self._text = name, total, 0, ""
        self._began = time.monotonic()
        self._line = StatusLine(total, text=name)

    def show(self, text: str) -> None:
        """Show a description of the current work."""
        self._text = text
        self._line.show(self._done, f"{self._name}: {text}{self._left()}")

    def add(self, tokens: int) -> None:
        """Count prompts that have been read; after the first ones, print how long all of them will take."""
        first, self._done = not self._done, self._done + tokens
        if first and self._done < self._total:
            print(f"{self._name}: {self._total:,} tokens of prompts to read{self._left()}", file=sys.stderr, flush=True)
        self._line.show(self._done, f"{self._name}: {self._text}{self._left()}")

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._line.close()

    def _left(self) -> str:
        if not 0 < self._done < self._total:
            return ""
        seconds = (time.monotonic() - self._began) * (self._total - self._done) / self._done
        return f", about {duration(seconds)} left"


@contextmanager
def _loaded(workdir: workdir_lib.Workdir, step: int | None, steps: int) -> Iterator[tuple["Trained", Callable]]:
    """Yield a trained model, and a function that shows which of so many steps is being done with it."""
    found = _load(workdir, step)
    line = StatusLine(steps, text=found.name)
    done = itertools.count()
    try:
        yield found, lambda text: line.show(next(done), f"{found.name}: {text}")
    finally:
        line.close()


def _load(workdir: workdir_lib.Workdir, step: int | None) -> "Trained":
    from ttt_jax.distributed import startup
    from ttt_jax.evaluation import trained

    startup.use_compilation_cache()
    startup.keep_freed_memory()
    return trained.load(workdir, step)


def _in_words(trained: "Trained") -> str:
    from ttt_jax.models import pattern

    return f"{pattern.describe(trained.config.model)}, step {trained.step}"


def _percent(depth: float) -> str:
    return f"{depth:g} %"


def _numbers(text: str) -> list[int]:
    """Parse positive integers with commas between them; return them sorted, each once."""
    return sorted(set(counts(text)))


def _names(text: str) -> Sequence[str]:
    names = text.split(",")
    for name in names:
        if name not in NEEDLES:
            raise argparse.ArgumentTypeError(f"{name!r}: expected some of {', '.join(NEEDLES)}")
    return tuple(dict.fromkeys(names))
