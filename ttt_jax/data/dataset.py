"""The layout of a tokenized dataset.

dataset.json          what it is; there only when all the rest is
tokenizer.json        what made it (or .model; none for bytes)
train/                a zarr3 array [tokens]: documents one after another; also validation/, test/
train_documents/      a zarr3 array [documents], int64: where in it each document begins
zarr.json             so that zarr opens the folder as a group
problems.jsonl        records that were left out, where there are some
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
UNFINISHED = "_unfinished"  # a folder in the dataset, with what a run that was stopped goes on from
GROUP = {"zarr_format": 3, "node_type": "group", "attributes": {}}
_EXPECTED: dict[str, Any] = {  # what every description has, those of earlier versions included
    "tokenizer": dict,
    "vocab_size": int,
    "bos": int | None,
    "eos": int | None,
    "dtype": str,
    "splits": dict,
}
_KEPT_AS = {"huggingface": "tokenizer.json", "sentencepiece": "tokenizer.model", "byte": None}
_OF_TOKENIZER = {"kind": str, "name": str}
_OF_SPLIT = {"tokens": int, "documents": int, "text_bytes": int, "fingerprint": str}


def documents_of(split: str) -> str:
    """Name of the array of document offsets."""
    return f"{split}_documents"


def tokenizer_file(kind: str) -> str | None:
    """Return the name under which the tokenizer is kept with its dataset; None where it has no file."""
    return _KEPT_AS[kind]


def read_description(store: Store) -> dict[str, Any] | None:
    """Return the ``dataset.json`` of a folder; None where there is none.

    Raises:
      DataError: where it is not one that this version reads, or lacks something.
    """
    found = store.read_json(DESCRIPTION)
    if found is None:
        return None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise DataError(f"{store.path(DESCRIPTION)}: describes no dataset; expected what ttt tokenize has written")
    if found.get("version") != VERSION:
        raise DataError(f"{store.path(DESCRIPTION)}: version {found.get('version')}; this ttt_jax reads {VERSION}")
    _check(found, _EXPECTED, store, "")
    _check(found["tokenizer"], _OF_TOKENIZER, store, "tokenizer.")
    if found["tokenizer"]["kind"] not in _KEPT_AS:
        raise DataError(f"{store.path(DESCRIPTION)}: damaged: tokenizer.kind is {found['tokenizer']['kind']!r}")
    for split, about in found["splits"].items():
        _check(about, _OF_SPLIT, store, f"splits.{split}.")
    return found


def _check(about: Any, expected: dict[str, Any], store: Store, inside: str) -> None:
    """Raise :class:`DataError` where a part of a description lacks a key, or has something else there."""
    for key, kind in expected.items():
        has_it = isinstance(about, dict) and key in about
        if not (has_it and isinstance(about[key], kind)):
            what = f"{inside}{key} is {about[key]!r}" if has_it else f"no {inside}{key}"
            raise DataError(f"{store.path(DESCRIPTION)}: damaged: {what}; expected what ttt tokenize has written")


def read_tokenizer(store: Store, description: dict[str, Any]) -> bytes | None:
    """Return the file of the tokenizer that is kept with a dataset; None where it needs none.

    Raises:
      DataError: where it is gone, or not the one that the tokens are of.
    """
    name = tokenizer_file(description["tokenizer"]["kind"])
    if name is None:
        return None
    content = store.read(name)
    if content is None:
        raise DataError(f"{store.path(name)}: is gone; expected the file that ttt tokenize has written")
    expected, found = description["tokenizer"].get("sha256"), hashlib.sha256(content).hexdigest()
    if expected not in (None, found):  # early datasets have none
        raise DataError(
            f"{store.path(name)}: damaged, or another tokenizer: its SHA-256 is {found[:12]}..., that of the tokenizer "
            f"which made the tokens {expected[:12]}...; expected the file that ttt tokenize has written"
        )
    return content


def open_split(store: Store, description: dict[str, Any], split: str) -> tuple[Array, Array]:
    """Tokens and document offsets of a split.

    Raises:
      ConfigError: where the dataset has no such split.
      DataError: where the arrays are not what the description says.
    """
    if split not in description["splits"]:
        raise ConfigError(f"split {split}: {store.location} has only {', '.join(description['splits'])}")
    about = description["splits"][split]
    arrays = []
    for name, dtype, length in (
        (split, description["dtype"], about["tokens"]),
        (documents_of(split), "int64", about["documents"]),
    ):
        array = Array({"driver": "zarr3", "kvstore": store.spec(name)}, store.path(name))
        if (array.dtype.name, len(array)) != (dtype, length):
            raise DataError(
                f"{store.path(name)}: is {len(array)} {array.dtype.name}, but {DESCRIPTION} says {length} {dtype}"
            )
        arrays.append(array)
    return arrays[0], arrays[1]
