"""Run tasks of EleutherAI's lm-evaluation-harness on a trained model, and write a file for each result."""

import itertools
import json
import math
import os
import re
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ttt_jax import finite
from ttt_jax.errors import ConfigError, DataError
from ttt_jax.interop.harness import NO_GENERATION, TTTModel
from ttt_jax.storage.json_files import DamagedFile, read_object, write_object
from ttt_jax.storage.workdir import Workdir, explained, is_local

_RESAMPLES = 1000  # bootstrap resamples for the standard errors of metrics that are not means


def evaluate(
    model: TTTModel, tasks: Sequence[str], *, include_path: str | os.PathLike | None = None, **options: Any
) -> dict[str, Any]:
    """Run tasks of the harness and return its results. A perplexity that overflows is infinity.

    Args:
      tasks: names of tasks, groups or tags.
      include_path: a folder with more tasks.
      options: further options of :func:`lm_eval.simple_evaluate`.

    Raises:
      ConfigError: where a task does not exist, or asks for generated text.
      DataError: where a task or its data cannot be loaded.
      NonFiniteLossError: where the model gives NaN or infinity.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    if include_path is not None and not os.path.isdir(include_path):
        raise ConfigError(f"--include-path {include_path}: no such folder; expected one with YAML files of tasks")
    manager = TaskManager(include_path=include_path, include_defaults=False) if include_path else None
    if manager is None or not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=include_path)  # slow: it reads thousands of files
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        raise ConfigError(f"--tasks {','.join(unknown)}: no such task; lm_eval ls tasks shows all of them")
    try:
        loaded = manager.load(list(tasks))
    except Exception as error:  # the harness, datasets and the Hub have errors of many types
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"--tasks {','.join(tasks)}: cannot be loaded: {reason}") from error
    generating = sorted(name for name, task in loaded["tasks"].items() if task.OUTPUT_TYPE == "generate_until")
    if generating:
        raise ConfigError(f"--tasks {','.join(generating)}: {NO_GENERATION}")
    within = set(itertools.chain(*loaded["group_map"].values()))
    roots = [x for kind in ("groups", "tasks") for name, x in loaded[kind].items() if name not in within]
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # forks for bootstraps may deadlock with JAX
    model.forget_requests()
    with _overflow_is_infinite():
        results = simple_evaluate(model, tasks=roots, task_manager=manager, bootstrap_iters=_RESAMPLES, **options)
    assert results is not None  # of the only process
    return results


def by_task(results: dict[str, Any], model: TTTModel) -> dict[str, dict[str, Any]]:
    """Return the results of :func:`evaluate` by task and group.

    Returns:
      For each task ``metrics``, and what they depend on: ``num_fewshot``, ``version`` and ``documents`` of the task,
      ``identity``, ``model_step`` and others. A metric has ``value`` and ``standard_error``, which are None where the
      harness gives none, or NaN or infinity; ``not_finite`` then spells the value out.
    """
    keys = {"num_fewshot": "n-shot", "version": "versions", "documents": "n-samples"}
    tasks = {}
    for task, values in results["results"].items():
        metrics = {}
        for key, value in values.items():
            name, _, kept = key.partition(",")  # the metric, and the harness's filter of answers
            if kept and not name.endswith("_stderr"):
                error = values.get(f"{name}_stderr,{kept}")
                name += "" if kept == "none" else f",{kept}"
                metrics[name] = _metric(value, error)
        within = results.get("group_subtasks", {}).get(task) or [task]
        tasks[task] = {
            "task": task,
            "metrics": metrics,
            **{key: results.get(theirs, {}).get(task) for key, theirs in keys.items()},
            "lm_eval": results.get("lm_eval_version"),
            "identity": model.identity(within),
            **model.get_model_info(),
        }
    return tasks


def _metric(value: Any, error: Any) -> dict[str, Any]:
    finite = not isinstance(value, float) or math.isfinite(value)
    known = isinstance(error, float) and math.isfinite(error)
    metric = {"value": value if finite else None, "standard_error": error if known else None}
    return metric if finite else {**metric, "not_finite": str(value)}


@contextmanager
def _overflow_is_infinite() -> Iterator[None]:
    """Let perplexities of the harness be infinity where ``math.exp`` would raise an OverflowError."""
    from lm_eval.api import metrics as lm_eval_metrics

    theirs = lm_eval_metrics.math
    lm_eval_metrics.math = types.SimpleNamespace(**{**vars(math), "exp": finite.exp})
    try:
        yield
    finally:
        lm_eval_metrics.math = theirs


_OPTIONS = ("task", "max_length", "num_fewshot")  # in all files; those of earlier versions have no identity


def save(folder: Workdir, name: str, about: dict[str, Any]) -> str:
    """Write the result of a task to ``NAME.json``, in place of an earlier result with the same options.

    Where that file has other options, other texts or another tokenizer, both are kept: the new one is
    ``NAME-IDENTITY.json``.

    Returns:
      The path, with a note in brackets where another file was kept or replaced.
    """
    if is_local(folder):
        folder.mkdir(parents=True, exist_ok=True)
    path, note = folder / f"{name}.json", ""
    earlier = _read(path)
    if earlier is not None and not _same(earlier, about):
        note = f" (beside {path.name}, which {'has other options or texts' if earlier else 'is damaged'})"
        path = folder / f"{name}-{about['identity']}.json"
        earlier = _read(path)
    if earlier and earlier.get("model_step", about["model_step"]) != about["model_step"]:
        note += f" (in place of the result of step {earlier['model_step']})"
    with explained(path):
        write_object(path, json.loads(json.dumps(about, default=str)))
    return f"{path}{note}"


def file_name(
    task: str,
    *,
    step: int | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    max_length: int | None = None,
    prefix_token: int | None = None,
    tokenizer: str | None = None,
) -> str:
    """Return the name of a task's file, without ``.json``: the task and every option that was given.

    Args:
      tokenizer: the hash of a tokenizer that was given.
    """
    name = re.sub(r"[^\w.-]+", "_", task)
    name += "" if step is None else f"-at-{step}"
    name += "" if limit is None else f"-first-{limit}"
    name += "" if num_fewshot is None else f"-{num_fewshot}-shot"
    name += "" if max_length is None else f"-windows-{max_length}"
    name += "" if prefix_token is None else f"-prefix-{prefix_token}"
    return name + ("" if tokenizer is None else f"-tokenizer-{tokenizer[:8]}")


def _read(path: Workdir) -> dict[str, Any] | None:
    """Return the content of a file; {} where it is damaged, None where it does not exist."""
    try:
        return read_object(path)
    except FileNotFoundError:
        return None
    except DamagedFile:
        return {}


def _same(earlier: dict[str, Any], about: dict[str, Any]) -> bool:
    """Return whether two results have the same options, texts and tokenizer."""
    alike = all(key in earlier and earlier[key] == about[key] for key in _OPTIONS)
    return alike and earlier.get("identity", about["identity"]) == about["identity"]
