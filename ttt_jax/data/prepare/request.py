"""Whether a folder holds tokens of the same request: the same options, and files of the same content."""

import hashlib
import itertools
from typing import Any

from ttt_jax import __version__
from ttt_jax.data import dataset
from ttt_jax.data.prepare import records
from ttt_jax.data.prepare.files import InputFile
from ttt_jax.data.prepare.job import Job
from ttt_jax.data.prepare.records import Position, Unit
from ttt_jax.errors import ConfigError
from ttt_jax.storage.store import Store
from ttt_jax.terminal.console import counted


def describe(job: Job, files: list[InputFile], trained: dict[str, int] | None) -> dict[str, Any]:
    """What is known of a dataset before it is made: all that its content depends on."""
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


def check_same(plan: dict[str, Any], there: dict[str, Any], begun: int, output: Store, files: list[InputFile]) -> None:
    """Raise where the folder is of another request.

    Args:
      plan, there: what :func:`describe` says of this request and of the one in the folder.
      begun: files that have been read to their end; the others may have changed since.
      files: of this request.

    Raises:
      ConfigError: in a line that names the option or the file that differs.
    """

    def compared(description: dict[str, Any]) -> dict[str, Any]:
        kept = {key: description.get(key) for key in plan if key not in ("files", "contents", "ttt_jax")}
        sizes = [file if i < begun else file[:2] for i, file in enumerate(description.get("files", []))]
        return {**kept, "files": sizes}

    ours, theirs = compared(plan), compared(there)
    for key in ours:
        if ours[key] != theirs[key]:
            here, other = ours[key], theirs[key]
            if key == "files":
                pairs = enumerate(itertools.zip_longest(here, other), 1)
                number, (here, other) = next((i, (a, b)) for i, (a, b) in pairs if a != b)
                key, here, other = f"file {number}", _in_words(here), _in_words(other)
            raise ConfigError(
                f"--output {output.location}: holds tokens of another request ({key}: {other} there, {here} here); "
                "expected the same request, or a new folder"
            )
    index = other_content(plan["contents"][:begun], there.get("contents", []))
    if index is not None:
        raise ConfigError(
            f"--output {output.location}: holds tokens of another {files[index].location}, of the same name and size "
            f"({there['contents'][index]} there, {plan['contents'][index]} here); expected the same content, or a new "
            "folder"
        )


def _in_words(file: list[Any] | None) -> str:
    """Return a file as it is known by name: split, name, and size where it matters."""
    if file is None:
        return "none"
    split, name, *size = file
    return f"--{split} {name}" + (f" of {counted(size[0], 'byte')}" if size else "")


def other_content(contents: list[str], earlier: list[str]) -> int | None:
    """Return the index of the first file whose content is known to be another than it was; None where there is none.

    Contents that are not of one kind (the checksum of a bucket, the SHA-256 of a local copy) cannot be compared, nor
    can those of a dataset that was made before contents were kept.
    """
    for index, (here, there) in enumerate(zip(contents, earlier, strict=False)):
        if here != there and here.partition(":")[0] == there.partition(":")[0]:
            return index
    return None


class PartRead:
    """The hash of what has been read of the file that is being read, whatever units it was read in.

    Args:
      position: where a run goes on; what is before it in its file is read again.
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
        """The hash so far."""
        return self._hash.hexdigest()

    def add(self, unit: Unit) -> None:
        """Add the next unit of the file; the last one of a file begins the next."""
        if unit.end.records:
            self._update(unit.content)
        else:
            self._hash = hashlib.sha256()

    def _update(self, content: bytes | list[Any]) -> None:
        self._hash.update(content if isinstance(content, bytes) else "".join(f"{x!r}\n" for x in content).encode())


def check_part_read(
    found: PartRead, earlier: str | None, files: list[InputFile], position: Position, output: Store
) -> None:
    """Raise :class:`ConfigError` where a file has changed before the position from which a run would go on."""
    if earlier is not None and found.digest != earlier:
        raise ConfigError(
            f"{files[position.file].location}: has changed before record {position.records + 1}, up to which its "
            f"tokens are in {output.location}; expected the same records up to there, or a new folder"
        )
