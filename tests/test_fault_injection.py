"""Damage every file of a run, a dataset, an evaluation and a sweep, and check what its readers return or raise.

After damage a reader must return the same value as before; or an older or smaller one, with one line on standard error
that names the file (an older checkpoint, fewer records, a point to run again); or raise one line that names it.
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from faults import KINDS, damage, files
from files_of_all_kinds import (
    BYTES,
    IDENTITY,
    LENGTHS,
    SMALL,
    UNFINISHED,
    config_of,
    inputs,
    make,
    make_without_training,
    tokenize_job,
)

from ttt_jax import config as config_lib
from ttt_jax.config import ConfigError
from ttt_jax.data import named_sources
from ttt_jax.data.prepare import tokenize_units, train_bpe
from ttt_jax.data.prepare.tokenize import tokenize
from ttt_jax.distributed import sharding
from ttt_jax.errors import CheckpointError, DataError
from ttt_jax.evaluation import evaluations, inspections
from ttt_jax.evaluation.probes.cells import Cells
from ttt_jax.evaluation.result_files import PartialResults
from ttt_jax.storage import json_files
from ttt_jax.storage.store import Store
from ttt_jax.sweep import files as sweep_files
from ttt_jax.training import metrics, run_config, validation
from ttt_jax.training.checkpoint import Checkpoints
from ttt_jax.training.report import Goodput
from ttt_jax.training.step import build_program

SEEDS = {"flip": 6, "cut": 4, "empty": 1, "delete": 1, "foreign": 1, "duplicate": 2}
REPORTED = (ConfigError, DataError, CheckpointError, OSError)  # errors that commands report in one line


class Reader(NamedTuple):
    """A reader of files.

    Attributes:
      files: a pattern of the files, in the folder of :func:`made`.
      read: a function that reads the files in such a folder.
      fewer: a function of the value after and before the damage: whether the first may be what is left of the second.
      seeds: a factor to the numbers in ``SEEDS``.
    """

    files: str
    read: Callable[[Path], Any]
    fewer: Callable[[Any, Any], bool] = lambda found, whole: False
    seeds: float = 1


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("made")
    make(root)
    return root


@pytest.fixture(scope="module")
def made_without_training(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("made-without-training")
    make_without_training(root)
    return root


# ---- Readers


def _partial_results(root: Path) -> list[np.ndarray]:
    """Restore partial results from a copy, as the reader removes damaged files."""
    with _copy(root, UNFINISHED) as copy:
        return PartialResults(copy, IDENTITY, LENGTHS).restore()


def _newest_checkpoint(root: Path) -> Any:
    checkpoints = Checkpoints(root / "sweep" / "a", read_only=True)
    try:
        return checkpoints.restore_newest(_abstract(root))
    finally:
        checkpoints.close()


_abstract_states: dict[Path, Any] = {}


def _abstract(root: Path) -> Any:
    if root not in _abstract_states:
        config = config_of(root)
        mesh = sharding.make_mesh(config_lib.mesh_shape(config, 1), jax.devices()[:1])
        _abstract_states[root] = build_program(config, mesh).abstract_state
    return _abstract_states[root]


def _data(folder: Path) -> Any:
    found = {"tokenizer": named_sources.tokenizer_of(str(folder)).content}
    for split in ("train", "validation"):
        source = named_sources.load(str(folder), split)
        documents = source.documents
        assert documents is not None
        found[split] = (
            source.piece(0, len(source.tokens) - 1),
            documents[0 : len(documents)],
            (source.bos, source.vocab_size, source.tokenizer[0], source.tokenizer[2], source.fingerprint()),
        )
    return found


def _kept_tokenizer(root: Path) -> bytes:
    with _copy(root, "begun") as copy:
        return train_bpe.load_or_train(Store(copy), inputs(root), 300, BYTES).content


def _finished_dataset(root: Path) -> Any:
    """Finish a copy of the unfinished dataset, and read it."""
    with _copy(root, "unfinished") as copy:
        tokenize(inputs(root), tokenize_job(root), Store(copy), tokenize_units.processes(1), **SMALL)
        return _data(copy)


def _records_of_resumed_run(root: Path) -> Any:
    with _copy(root, "sweep/a/metrics.jsonl") as copy:
        writer = metrics.MetricsWriter(copy.parent, 3)
        writer.close()
        return metrics.read(copy.parent)


def _first_start(root: Path) -> float:
    with _copy(root, "sweep/a/started.json") as copy:
        return Goodput(copy.parent, 1.0)._started


@contextlib.contextmanager
def _copy(root: Path, name: str):
    """Copy a file or folder, if it exists, to the same name in another folder."""
    folder = root.parent / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    path, copy = root / name, folder / name
    copy.parent.mkdir(parents=True)
    try:
        if path.is_dir():
            shutil.copytree(path, copy)
        elif path.exists():
            shutil.copy(path, copy)
        yield copy
    finally:
        shutil.rmtree(folder)


def _some_in_order(found: list, whole: list) -> bool:
    """Return whether the elements of one list are elements of another, in the same order."""
    rest = iter(whole)
    return all(any(_equal(one, other) for other in rest) for one in found)


READERS = {
    "config": Reader("sweep/a/config.json", lambda root: run_config.load(root / "sweep" / "a").to_dict(), seeds=4),
    "config of checkpoints": Reader(
        "sweep/a/checkpoints/*/*", lambda root: run_config.load(root / "sweep" / "a").to_dict()
    ),
    "checkpoints": Reader("sweep/a/checkpoints", _newest_checkpoint, lambda found, whole: found.step == 2, 0.34),
    "metrics": Reader("sweep/a/metrics.jsonl", lambda root: metrics.read(root / "sweep" / "a"), _some_in_order, 8),
    "metrics of a resumed run": Reader("sweep/a/metrics.jsonl", _records_of_resumed_run, _some_in_order, 4),
    "losses": Reader(
        "sweep/a/metrics.jsonl",
        lambda root: validation.read_losses(root / "sweep" / "a"),
        lambda found, whole: found.items() <= whole.items(),
        4,
    ),
    "start": Reader("sweep/a/started.json", _first_start, lambda found, whole: found > whole, 4),
    "dataset": Reader("dataset", lambda root: _data(root / "dataset")),
    "unfinished dataset": Reader("unfinished", _finished_dataset),
    "tokenizer of an unfinished dataset": Reader("begun", _kept_tokenizer),
    "evaluation": Reader("sweep/a/eval/*", lambda root: evaluations.read(root / "sweep" / "a", "validation"), seeds=2),
    "evaluations": Reader(
        "sweep/a/eval/*", lambda root: evaluations.listed(root / "sweep" / "a"), lambda found, _: found == []
    ),
    "unfinished evaluation": Reader(
        f"{UNFINISHED}/*",
        _partial_results,
        lambda found, whole: _equal(found, whole[: len(found)]),
        2,
    ),
    "inspection": Reader(
        "sweep/a/inspect/*", lambda root: inspections.read(root / "sweep" / "a", "validation"), seeds=2
    ),
    "probe": Reader(
        "sweep/a/probe/*",
        lambda root: Cells(root / "sweep" / "a", "needle", ["context", "depth"]).read(),
        lambda found, _: found == {"cells": []},
    ),
    "sweep": Reader("sweep/sweep.json", lambda root: sweep_files.read_sweep(root / "sweep"), seeds=4),
    "point": Reader(
        "sweep/a/point.json",
        lambda root: sweep_files.read_record(root / "sweep" / "a"),
        lambda found, _: found is None,
        4,
    ),
}
_SILENT = ("cut", "empty", "delete")  # a file that ends early may have been cut short while it was written


def _faults(root: Path, reader: Reader) -> list[tuple[Path, str, int]]:
    found = sorted(root.glob(reader.files))
    paths = [path for each in found for path in (files(each) if each.is_dir() else [each])]
    assert paths
    return [
        (path, kind, seed)
        for path in paths
        for kind in KINDS
        for seed in range(max(1, int(SEEDS[kind] * (reader.seeds if SEEDS[kind] > 1 else 1))))
    ]


# Few faults of files that are quick to make and read; the others are slow.
_QUICK = (
    "dataset",
    "tokenizer of an unfinished dataset",
    "evaluation",
    "unfinished evaluation",
    "probe",
    "sweep",
    "point",
)


@pytest.mark.parametrize("name", _QUICK)
def test_a_reader_of_a_file_with_one_fault_of_each_kind(made_without_training, name, capfd):
    _check(READERS[name]._replace(seeds=0), made_without_training, capfd)


@pytest.mark.slow
def test_at_least_a_thousand_faults_are_tried(made):
    count = sum(len(_faults(made, reader)) for reader in READERS.values())
    assert count >= 1000


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_a_reader_returns_the_right_value_or_names_the_file(made, name, capfd):
    _check(READERS[name], made, capfd)


def _check(reader: Reader, made: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = reader.read(made)
    wrong = []
    for path, kind, seed in _faults(made, reader):
        json_files._warned.clear()
        capfd.readouterr()
        with damage(path, kind, seed):
            try:
                found = reader.read(made)
            except REPORTED as error:
                problem = _unclear(str(error), path, made)
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                printed = capfd.readouterr().err
                problem = _difference(found, whole, reader, kind, printed, path, made)
        if problem:
            wrong.append(f"{path.relative_to(made)} {kind} {seed}: {problem}")
    assert not wrong, f"{len(wrong)} of {len(_faults(made, reader))}:\n" + "\n".join(wrong[:40])
    assert _equal(reader.read(made), whole)  # the damage was undone


def _difference(found: Any, whole: Any, reader: Reader, kind: str, printed: str, path: Path, root: Path) -> str:
    if _equal(found, whole):
        return ""
    if not reader.fewer(found, whole):
        return f"another value: {found} instead of {whole}"[:300]
    return "" if kind in _SILENT else _unclear(printed, path, root)


def _unclear(message: str, path: Path, root: Path) -> str:
    """Return what is wrong with a message that should be one line and name the file or a folder around it."""
    if "\n" in message.strip():
        return f"more than one line: {message!r}"
    relative = path.relative_to(root)  # the reader may have read a copy
    places = [relative, *list(relative.parents)[:-1]]
    return "" if any(f"/{place}" in message for place in places) else f"names no file: {message!r}"


def _equal(found: Any, whole: Any) -> bool:
    """Return whether two values are the same, bit for bit. A dict may have new keys."""
    if dataclasses.is_dataclass(whole):
        return type(found) is type(whole) and _equal(vars(found), vars(whole))
    if isinstance(whole, dict):
        return isinstance(found, dict) and all(key in found and _equal(found[key], whole[key]) for key in whole)
    if isinstance(whole, (list, tuple)):
        return type(found) is type(whole) and len(found) == len(whole) and all(map(_equal, found, whole))
    if isinstance(whole, (np.ndarray, np.generic, jax.Array)):
        left, right = np.asarray(found), np.asarray(whole)
        return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    return bool(type(found) is type(whole) and (found == whole or found != found))
