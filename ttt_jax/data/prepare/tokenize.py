"""Make a dataset of tokens from files of text.

An engine tokenizes units of records in any number of processes; this process writes the tokens in the order of the
units. From time to time it saves the position in the input, the counts so far and the tokens that do not fill a shard
yet in ``_unfinished/``, from where a run that was killed continues. The dataset depends on the input alone, not on the
engine, the number of workers or interruptions.
"""

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ttt_jax.data import dataset
from ttt_jax.data.prepare import records, request
from ttt_jax.data.prepare.files import InputFile, check_unchanged, with_digests
from ttt_jax.data.prepare.records import Position
from ttt_jax.data.prepare.tokenize_units import Engine, Job, Piece
from ttt_jax.errors import ConfigError, DataError
from ttt_jax.storage import json_files, workdir_lock
from ttt_jax.storage.store import Store

UNFINISHED = dataset.UNFINISHED
_STATE = f"{UNFINISHED}/state.json"
_DOCUMENTS_SHARD = 1 << 22  # offsets
_STATE_KEYS = {"plan", "position", "generation", "splits", "skipped", "problems"}


@dataclasses.dataclass
class Progress:
    """Counts of what a run has read and written so far.

    Attributes:
      read, total: bytes of the input, before decompression.
      text_bytes, documents, tokens: written so far, by this run and the runs that it continues.
      skipped: records that were left out.
      started: ``text_bytes`` when this run began.
    """

    read: int = 0
    total: int = 0
    text_bytes: int = 0
    documents: int = 0
    tokens: int = 0
    skipped: int = 0
    started: int = 0


def tokenize(
    files: list[InputFile],
    job: Job,
    output: Store,
    engine: Engine,
    *,
    skip_problems: bool = False,
    trained: dict[str, int] | None = None,
    progress: Callable[[Progress], None] = lambda progress: None,
    warn: Callable[[str], None] = lambda message: None,
    stop: Callable[[], object] = lambda: False,
    check: Callable[[], None] = lambda: None,
    unit_bytes: int = 1 << 20,
    shard: int = dataset.SHARD,
    chunk: int = dataset.CHUNK,
    save_seconds: float = 30.0,
) -> dict[str, Any] | None:
    """Make a dataset, or continue making it; return its ``dataset.json``, or None if it was stopped.

    Args:
      skip_problems: leave out, count and list records that cannot be read, rather than stop at the first.
      trained: how the tokenizer was trained; None if it was not.
      warn: called with a line for each file whose rest cannot be read.
      stop: called at every unit; if it returns true, the run saves its state and returns None.
      check: called before the state is saved; raises if this process must not write any more.
      unit_bytes: of text, given to one process at a time. Does not change what is written.
      shard, chunk: tokens in a file, and tokens that are decompressed together.
      save_seconds: time between two saves of the state.

    Raises:
      ConfigError: if the folder holds something else.
      DataError: if a record cannot be read, or something cannot be written.
    """
    files = with_digests(files)
    plan = {**request.describe(job, files, trained), "shard": shard, "chunk": chunk}
    done = dataset.read_description(output)
    if done is not None:
        request.check_same(plan, done, len(files), output, files)
        output.delete(UNFINISHED)
        return done
    state = _read_state(output, plan)
    plan = {**plan, "ttt_jax": state["plan"]["ttt_jax"]}  # the version that began the dataset
    request.check_same(plan, state["plan"], state["position"]["file"], output, files)
    state["plan"] = plan

    position = Position(**state["position"])
    prefix = request.PrefixHash(files, position, unit_bytes, job.text_key)
    request.check_prefix(prefix, state.get("part_read"), files, position, output)
    splits = {split: _Split(output, split, job, shard, chunk, state) for split in _splits(job, files)}
    sizes = [file.size for file in files]
    now = Progress(total=sum(sizes), skipped=state["skipped"])
    problems: list[str] = []
    saved = time.monotonic()

    def save() -> None:
        nonlocal saved
        check()
        state.update(generation=state["generation"] + 1, position=dataclasses.asdict(position), skipped=now.skipped)
        state["part_read"] = prefix.digest
        folder = f"{UNFINISHED}/{state['generation']}"
        before = state.get("hashes", {})
        hashes = state["hashes"] = {name: before[name] for name in map(_problems, state["problems"]) if name in before}
        for split in splits.values():
            state["splits"][split.name] = split.save(output, folder, hashes)
        if problems:
            _write_hashed(output, _problems(state["generation"]), "".join(problems).encode(), hashes)
            state["problems"].append(state["generation"])
            problems.clear()
        output.write_json(_STATE, json_files.with_hash(state))
        output.delete(f"{UNFINISHED}/{state['generation'] - 1}")
        saved = time.monotonic()

    def report(read: int) -> None:
        now.read = read
        now.text_bytes = sum(split.text_bytes for split in splits.values())
        now.tokens = sum(len(split.tokens) for split in splits.values())
        now.documents = sum(len(split.documents) for split in splits.values())
        progress(now)

    report(sum(sizes[: position.file]))
    now.started = now.text_bytes
    save()
    read_to: dict[Position, int] = {}  # bytes that have been read of the file, by the position after a unit
    units = _with_splits(files, position, unit_bytes, job.text_key, read_to)
    with contextlib.closing(engine(job, units)) as parts:
        for unit, part in parts:
            if stop():
                save()
                return None
            if part.problems and not skip_problems:
                save()
                raise DataError(_located(files[position.file], part.problems))
            for problem in part.problems:
                file = files[position.file].location
                problems.append(json.dumps({"file": file, "record": problem.record, "problem": problem.what}) + "\n")
            if unit.problem and unit.problem.what != records.NOTHING:
                rest = f"record {unit.problem.record}: {unit.problem.what}"
                warn(f"{files[position.file].location}, {rest}; the rest of this file is left out")
            now.skipped += len(part.problems)
            for name, piece in part.pieces.items():
                splits[name].append(piece)
            if unit.end.file > position.file:
                check_unchanged(files[position.file])
            position = unit.end
            prefix.add(unit)
            report(sum(sizes[: position.file]) + read_to.pop(unit.end))
            if time.monotonic() - saved > save_seconds:
                save()
    save()
    return _finish(output, plan, splits, job, state)


def _read_state(output: Store, plan: dict[str, Any]) -> dict[str, Any]:
    """Return the state of an unfinished run, or that of a new run if nothing has been written yet.

    A run that has written nothing may be followed by a command with other options.
    """
    state = output.read_json(_STATE)
    if state is None:
        check_empty(output)
    elif not set(state) >= _STATE_KEYS:
        raise DataError(
            f"{output.path(_STATE)}: was not written by ttt tokenize; delete {output.location} and begin anew"
        )
    if state is not None and any(split["text_bytes"] for split in state["splits"].values()):
        return state
    output.delete(f"{UNFINISHED}/problems")
    generation = (state or {}).get("generation", 0)
    new = {"plan": plan, "position": dataclasses.asdict(Position()), "generation": generation}
    return {**new, "splits": {}, "skipped": 0, "problems": []}


class _Split:
    """The arrays and counts of a split that is being written."""

    def __init__(self, output: Store, name: str, job: Job, shard: int, chunk: int, state: dict[str, Any]):
        earlier = state["splits"].get(name, {})
        arrays = {}
        for kind, dtype, entries in (("tokens", job.dtype, shard), ("documents", "int64", _DOCUMENTS_SHARD)):
            target = name if kind == "tokens" else dataset.documents_of(name)
            rest = _read_hashed(output, f"{UNFINISHED}/{state['generation']}/{target}", state) if earlier else b""
            arrays[kind] = dataset.ArrayWriter(
                output, target, dtype, shard=entries, chunk=chunk, rest=rest, **earlier.get(kind, {})
            )
        self.name, self.tokens, self.documents = name, arrays["tokens"], arrays["documents"]
        self.text_bytes: int = earlier.get("text_bytes", 0)
        self.unknown: int = earlier.get("unknown_tokens", 0)
        self.empty: int = earlier.get("empty_documents", 0)

    def append(self, piece: Piece) -> None:
        ends = len(self.tokens) + np.cumsum(piece.lengths)
        self.documents.append(ends - piece.lengths)
        self.tokens.append(piece.tokens)
        self.text_bytes += piece.text_bytes
        self.unknown += piece.unknown
        self.empty += piece.empty

    def save(self, output: Store, folder: str, hashes: dict[str, str]) -> dict[str, Any]:
        """Write what does not fill a shard, and add its hashes; return the rest of the state of this split."""
        tokens, tokens_rest = self.tokens.state()
        documents, documents_rest = self.documents.state()
        _write_hashed(output, f"{folder}/{self.name}", tokens_rest, hashes)
        _write_hashed(output, f"{folder}/{dataset.documents_of(self.name)}", documents_rest, hashes)
        counts = {"text_bytes": self.text_bytes, "unknown_tokens": self.unknown, "empty_documents": self.empty}
        return {"tokens": tokens, "documents": documents, **counts}

    def finish(self) -> dict[str, Any]:
        return {
            "tokens": len(self.tokens),
            "documents": len(self.documents),
            "text_bytes": self.text_bytes,
            **({"unknown_tokens": self.unknown} if self.unknown else {}),
            **({"empty_documents": self.empty} if self.empty else {}),
            "fingerprint": self.tokens.finish(),
            "document_offsets": dataset.documents_of(self.name),
            "document_offsets_fingerprint": self.documents.finish(),
        }


def _finish(
    output: Store, plan: dict[str, Any], splits: dict[str, _Split], job: Job, state: dict[str, Any]
) -> dict[str, Any]:
    """Write all that makes the folder a dataset, the description last."""
    if not any(len(split.documents) for split in splits.values()):
        raise DataError(f"{output.location}: no document could be read; {output.path(UNFINISHED)}/problems says why")
    description = {**plan, "skipped_records": state["skipped"], "splits": {}}
    for name, split in splits.items():
        description["splits"][name] = split.finish()
    if state["skipped"]:
        found = [_read_hashed(output, _problems(generation), state) for generation in state["problems"]]
        output.write(dataset.PROBLEMS, b"".join(found))
    tokenizer_file = plan["tokenizer"]["file"]
    if tokenizer_file:
        output.write(tokenizer_file, job.tokenizer.content)
    output.write_json("zarr.json", dataset.GROUP)
    output.write_json(dataset.DESCRIPTION, json_files.with_hash(description))
    output.delete(UNFINISHED)
    return description


def _problems(generation: int) -> str:
    """Return the name of a file that lists records that were left out."""
    return f"{UNFINISHED}/problems/{generation}"


def _write_hashed(output: Store, name: str, content: bytes, hashes: dict[str, str]) -> None:
    """Write a file that a later run needs to continue, and add its hash to ``hashes``."""
    output.write(name, content)
    hashes[name] = hashlib.sha256(content).hexdigest()


def _read_hashed(output: Store, name: str, state: dict[str, Any]) -> bytes:
    """Return what :func:`_write_hashed` wrote; raise DataError if it is gone or damaged."""
    content = output.read(name)
    expected = state.get("hashes", {}).get(name)  # earlier versions saved no hashes
    if content is None or expected not in (None, hashlib.sha256(content).hexdigest()):
        what = "is gone" if content is None else "damaged"
        raise DataError(f"{output.path(name)}: {what}; delete {output.location} and begin anew")
    return content


def _with_splits(
    files: list[InputFile], position: Position, unit_bytes: int, text_key: str, read_to: dict[Position, int]
) -> Iterator[tuple[str, records.Unit]]:
    for index, unit, raw_bytes in records.units(files, position, unit_bytes, text_key):
        read_to[unit.end] = raw_bytes if unit.end.file == index else 0
        yield files[index].split, unit


def _splits(job: Job, files: list[InputFile]) -> list[str]:
    wanted = {file.split for file in files}
    wanted |= {"validation"} if job.validation_fraction else set()
    wanted |= {"test"} if job.test_fraction else set()
    return [split for split in dataset.SPLITS if split in wanted]


def _located(file: InputFile, problems: list[records.Problem]) -> str:
    more = f" (and {len(problems) - 1} more near it)" if len(problems) > 1 else ""
    return (
        f"{file.location}, record {problems[0].record}: {problems[0].what}{more}. Mend it, or leave such records out "
        "with --on-error skip; either way the same command continues from here"
    )


def check_empty(output: Store) -> None:
    """Raise :class:`ConfigError` if a folder holds anything but an unfinished run."""
    for name in output.names():
        if not name.startswith(f"{UNFINISHED}/") and name != workdir_lock.NAME:
            raise ConfigError(f"--output {output.location}: holds {name}; expected a new or empty folder")
