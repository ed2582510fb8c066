"""Describe the dataset that a command asks for, and check that a folder is of the same request.

Two requests are the same if their options and the contents of their files are.
"""

import hashlib
import itertools
from typing import Any

from ttt_jax import __version__
from ttt_jax.data import dataset
from ttt_jax.data.prepare import records
from ttt_jax.data.prepare.files import InputFile
from ttt_jax.data.prepare.records import Position, Unit
from ttt_jax.data.prepare.tokenize_units import Job
from ttt_jax.errors import ConfigError
from ttt_jax.storage.store import Store
from ttt_jax.terminal.console import counted


def describe(job: Job, files: list[InputFile], trained: dict[str, int] | None) -> dict[str, Any]:
    """Return the part of ``dataset.json`` that is known before the dataset is made: all that its content depends on.

    Args:
      trained: how the tokenizer was trained; None if it was not.
    """
    tokenizer = job.tokenizer
    by_hash = job.validation_fraction + job.test_fraction > 0
    fractions = {"validation_fraction": job.validation_fraction, "test_fraction": job.test_fraction}
    seeded = {**fractions, "seed": job.split_seed, "hash": "blake2b-64 of the text, salted with the seed"}
    return {
        "format": dataset.FORMAT,
        "version": dataset.VERSION,
        "ttt_jax": __version__,
        "tokenizer": {
            "kind": tokenizer.kind,
            "name": tokenizer.name,
            "sha256": tokenizer.sha256,
            "file": dataset.tokenizer_file(tokenizer.kind),
            **({"trained": trained} if trained else {}),
        },
        "vocab_size": tokenizer.vocab_size,
        "bos": job.bos,
        "eos": job.eos,
        "dtype": job.dtype,
        "text_key": job.text_key,
        "split_rule": {"by": "hash of each document", **seeded} if by_hash else {"by": "files"},
        "files": [[file.split, file.location.rsplit("/", 1)[-1], file.size] for file in files],
        "contents": [file.digest for file in files],
    }


def check_same(plan: dict[str, Any], earlier: dict[str, Any], read: int, output: Store, files: list[InputFile]) -> None:
    """Raise if a folder is of another request.

    Args:
      plan, earlier: the descriptions (:func:`describe`) of this request and of the one in the folder.
      read: number of files that have been read to their end; the others may have changed since.
      files: of this request.

    Raises:
      ConfigError: with the option or the file that differs.
    """

    def compared(description: dict[str, Any]) -> dict[str, Any]:
        kept = {key: description.get(key) for key in plan if key not in ("files", "contents", "ttt_jax")}
        sizes = [file if i < read else file[:2] for i, file in enumerate(description.get("files", []))]
        return {**kept, "files": sizes}

    ours, theirs = compared(plan), compared(earlier)
    for key in ours:
        if ours[key] != theirs[key]:
            here, there = ours[key], theirs[key]
            if key == "files":
                pairs = enumerate(itertools.zip_longest(here, there), 1)
                number, (here, there) = next((i, (a, b)) for i, (a, b) in pairs if a != b)
                key, here, there = f"file {number}", _in_words(here), _in_words(there)
            raise ConfigError(
                f"--output {output.location}: holds tokens of another request ({key}: {there} there, {here} here); "
                "expected the same request, or a new folder"
            )
    index = first_changed(plan["contents"][:read], earlier.get("contents", []))
    if index is not None:
        raise ConfigError(
            f"--output {output.location}: holds tokens of another {files[index].location}, of the same name and size "
            f"({earlier['contents'][index]} there, {plan['contents'][index]} here); expected the same content, or a "
            "new folder"
        )


def _in_words(file: list[Any] | None) -> str:
    """Return the split, name and, if it is compared, size of a file in words."""
    if file is None:
        return "none"
    split, name, *size = file
    return f"--{split} {name}" + (f" of {counted(size[0], 'byte')}" if size else "")


def first_changed(digests: list[str], earlier: list[str]) -> int | None:
    """Return the index of the first file whose content is known to have changed; None if none is.

    Digests of different kinds (the checksum of a bucket, the SHA-256 of a local copy) cannot be compared, nor can a
    dataset of an earlier version, which has no digests.
    """
    for index, (here, there) in enumerate(zip(digests, earlier, strict=False)):
        if here != there and here.partition(":")[0] == there.partition(":")[0]:
            return index
    return None


class PrefixHash:
    """The hash of the part of the current file that has been read; it does not depend on the size of units.

    Args:
      position: where a run continues; its file is read again up to there.
    """

    def __init__(self, files: list[InputFile], position: Position, unit_bytes: int, text_key: str):
        self._hash = hashlib.sha256()
        left = position.offset if position.records else 0
        if left:
            for _, unit, _ in records.units([files[position.file]], Position(), unit_bytes, text_key):
                part = unit.content[:left]
                self._update(part)
                left -= len(part)
                if not left:
                    break

    @property
    def digest(self) -> str:
        """Return the hash so far."""
        return self._hash.hexdigest()

    def add(self, unit: Unit) -> None:
        """Add the next unit. The last unit of a file resets the hash for the next file."""
        if unit.end.records:
            self._update(unit.content)
        else:
            self._hash = hashlib.sha256()

    def _update(self, content: bytes | list[Any]) -> None:
        self._hash.update(content if isinstance(content, bytes) else "".join(f"{x!r}\n" for x in content).encode())


def check_prefix(
    prefix: PrefixHash, earlier: str | None, files: list[InputFile], position: Position, output: Store
) -> None:
    """Raise :class:`ConfigError` if a file has changed before the position at which a run would continue."""
    if earlier is not None and prefix.digest != earlier:
        raise ConfigError(
            f"{files[position.file].location}: has changed before record {position.records + 1}, up to which its "
            f"tokens are in {output.location}; expected the same records up to there, or a new folder"
        )
