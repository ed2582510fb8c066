"""Read a tokenized dataset, which is a folder of this layout.

dataset.json          the description, written last: a folder without it is unfinished
tokenizer.json        the tokenizer (or tokenizer.model; no file for bytes)
train/                zarr3 array [tokens]: documents one after another; also validation/, test/
train_documents/      zarr3 array [documents], int64: the offset at which each document begins
zarr.json             makes the folder a zarr group
problems.jsonl        records that were left out, if there are any
"""

import hashlib
from typing import Any

from ttt_jax.data.array import Array
from ttt_jax.errors import ConfigError, DataError
from ttt_jax.storage.store import Store

FORMAT = "ttt_jax tokens"
VERSION = 1
SPLITS = ("train", "validation", "test")
DESCRIPTION = "dataset.json"
PROBLEMS = "problems.jsonl"
UNFINISHED = "_unfinished"  # a folder in the dataset with the state of a run that was stopped
GROUP = {"zarr_format": 3, "node_type": "group", "attributes": {}}
_REQUIRED: dict[str, Any] = {  # keys and types of every description, also of earlier versions
    "tokenizer": dict,
    "vocab_size": int,
    "bos": int | None,
    "eos": int | None,
    "dtype": str,
    "splits": dict,
}
_REQUIRED_OF_TOKENIZER = {"kind": str, "name": str}
_REQUIRED_OF_SPLIT = {"tokens": int, "documents": int, "text_bytes": int, "fingerprint": str}
_TOKENIZER_FILES = {"huggingface": "tokenizer.json", "sentencepiece": "tokenizer.model", "byte": None}


def documents_of(split: str) -> str:
    """Return the name of the array of document offsets."""
    return f"{split}_documents"


def tokenizer_file(kind: str) -> str | None:
    """Return the name of the file in a dataset that holds its tokenizer; None if this kind needs no file."""
    return _TOKENIZER_FILES[kind]


def read_description(store: Store) -> dict[str, Any] | None:
    """Return the ``dataset.json`` of a folder; None if it has none.

    Raises:
      DataError: if this version cannot read it, or it lacks a key.
    """
    found = store.read_json(DESCRIPTION)
    if found is None:
        return None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise DataError(f"{store.path(DESCRIPTION)}: describes no dataset; expected what ttt tokenize wrote")
    if found.get("version") != VERSION:
        raise DataError(f"{store.path(DESCRIPTION)}: version {found.get('version')}; this ttt_jax reads {VERSION}")
    _check(found, _REQUIRED, store, "")
    _check(found["tokenizer"], _REQUIRED_OF_TOKENIZER, store, "tokenizer.")
    if found["tokenizer"]["kind"] not in _TOKENIZER_FILES:
        raise DataError(f"{store.path(DESCRIPTION)}: damaged: tokenizer.kind is {found['tokenizer']['kind']!r}")
    for split, part in found["splits"].items():
        _check(part, _REQUIRED_OF_SPLIT, store, f"splits.{split}.")
    return found


def _check(part: Any, required: dict[str, Any], store: Store, prefix: str) -> None:
    """Raise :class:`DataError` if a part of a description lacks a required key, or its value has another type."""
    for key, kind in required.items():
        has_it = isinstance(part, dict) and key in part
        if not (has_it and isinstance(part[key], kind)):
            what = f"{prefix}{key} is {part[key]!r}" if has_it else f"no {prefix}{key}"
            raise DataError(f"{store.path(DESCRIPTION)}: damaged: {what}; expected what ttt tokenize wrote")


def read_tokenizer(store: Store, description: dict[str, Any]) -> bytes | None:
    """Return the content of the tokenizer file in a dataset; None if its kind needs no file.

    Raises:
      DataError: if the file is gone, or is not the tokenizer that made the tokens.
    """
    name = tokenizer_file(description["tokenizer"]["kind"])
    if name is None:
        return None
    content = store.read(name)
    if content is None:
        raise DataError(f"{store.path(name)}: is gone; expected the file that ttt tokenize wrote")
    expected, found = description["tokenizer"].get("sha256"), hashlib.sha256(content).hexdigest()
    if expected not in (None, found):  # early datasets have none
        raise DataError(
            f"{store.path(name)}: damaged, or another tokenizer: its SHA-256 is {found[:12]}..., but the tokens were "
            f"made with {expected[:12]}...; expected the file that ttt tokenize wrote"
        )
    return content


def open_split(store: Store, description: dict[str, Any], split: str) -> tuple[Array, Array]:
    """Return the arrays of tokens and of document offsets of a split.

    Raises:
      ConfigError: if the dataset has no such split.
      DataError: if the arrays do not match the description.
    """
    if split not in description["splits"]:
        raise ConfigError(f"split {split}: {store.location} has only {', '.join(description['splits'])}")
    counts = description["splits"][split]
    arrays = []
    for name, dtype, length in (
        (split, description["dtype"], counts["tokens"]),
        (documents_of(split), "int64", counts["documents"]),
    ):
        array = Array({"driver": "zarr3", "kvstore": store.spec(name)}, store.path(name))
        if (array.dtype.name, len(array)) != (dtype, length):
            raise DataError(
                f"{store.path(name)}: holds {len(array)} {array.dtype.name}, but {DESCRIPTION} says {length} {dtype}"
            )
        arrays.append(array)
    return arrays[0], arrays[1]
