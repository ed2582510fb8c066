"""The files of ``ttt harness``: a result of each task, where results of other options stand beside one another."""

import json
import re
from typing import Any

from ttt_jax.storage.json_files import DamagedFile, read_object, write_object
from ttt_jax.storage.workdir import Workdir, explained, is_local

_OF_OLD_FILES = ("task", "max_length", "num_fewshot")  # what files without an identity say of their options


def save(folder: Workdir, name: str, about: dict[str, Any]) -> str:
    """Write the result of a task to ``NAME.json``, in the place of an earlier one of the same options.

    Where that file is of other options, texts or another tokenizer, both are kept: the new one is
    ``NAME-IDENTITY.json``.

    Returns:
      The path, and in brackets what a reader of it should know.
    """
    if is_local(folder):
        folder.mkdir(parents=True, exist_ok=True)
    path, note = folder / f"{name}.json", ""
    there = _read(path)
    if there is not None and not _same(there, about):
        note = f" (beside {path.name}, which is {'of other options or texts' if there else 'damaged'})"
        path = folder / f"{name}-{about['identity']}.json"
        there = _read(path)
    if there and there.get("model_step", about["model_step"]) != about["model_step"]:
        note += f" (in place of the result of step {there['model_step']})"
    with explained(path):
        write_object(path, json.loads(json.dumps(about, default=str)))
    return f"{path}{note}"


def name_of(
    task: str,
    *,
    step: int | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    max_length: int | None = None,
    prefix_token: int | None = None,
    tokenizer: str | None = None,
) -> str:
    """Return the name of the file of a task, without ``.json``: the task, and every option that was given.

    Args:
      tokenizer: the hash of the one that was given.
    """
    name = re.sub(r"[^\w.-]+", "_", task)
    name += "" if step is None else f"-at-{step}"
    name += "" if limit is None else f"-first-{limit}"
    name += "" if num_fewshot is None else f"-{num_fewshot}-shot"
    name += "" if max_length is None else f"-windows-{max_length}"
    name += "" if prefix_token is None else f"-prefix-{prefix_token}"
    return name + ("" if tokenizer is None else f"-tokenizer-{tokenizer[:8]}")


def _read(path: Workdir) -> dict[str, Any] | None:
    """Return what a file says; {} where it is no result of a task, None where there is none."""
    try:
        return read_object(path)
    except FileNotFoundError:
        return None
    except DamagedFile:
        return {}


def _same(there: dict[str, Any], about: dict[str, Any]) -> bool:
    alike = all(key in there and there[key] == about[key] for key in _OF_OLD_FILES)
    return alike and there.get("identity", about["identity"]) == about["identity"]
