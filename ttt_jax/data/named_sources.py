"""Open what ``data.source`` names as a :class:`~ttt_jax.data.token_source.TokenSource`.

It is a folder of tokens, a synthetic source, or ``embedded``, text that every machine has.
"""

import dataclasses
import functools
import hashlib
import itertools
import os
import shlex
import sysconfig
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from ttt_jax.data import dataset, official, synthetic
from ttt_jax.data.dataset import UNFINISHED
from ttt_jax.data.prepare import files
from ttt_jax.data.prepare import tokenizer as tokenizer_lib
from ttt_jax.data.token_source import TokenSource
from ttt_jax.errors import ConfigError
from ttt_jax.storage.store import Store

EMBEDDED_BOS = 256  # begins each file; the other tokens are its bytes
EMBEDDED_VOCAB_SIZE = 257  # bytes and BOS without EOS, as models of earlier versions have it
_LEAST_BYTES = 1_000_000  # of a standard library
_HELD_OUT_PERCENT = {"validation": 5, "test": 5}
_SEARCHED = 1000  # files in a folder that is no dataset, for files of text
_EXPECTED = (
    "embedded, synthetic, associative_recall, selective_copying, or the path or URL of a folder made by ttt tokenize, "
    "of one with train.npy, or of a zarr group with train"
)


def from_config(config: ml_collections.ConfigDict, split: str) -> TokenSource:
    """Return a split of the dataset that ``config.data`` names. Raise as :func:`load` does."""
    data = config.data
    return load(
        data.source,
        split,
        vocab_size=config.model.vocab_size,
        bos=data.bos,
        tokenizer=data.tokenizer,
        sequence_length=data.sequence_length,
    )


def load(
    location: str,
    split: str,
    *,
    vocab_size: int | None = None,
    bos: int | None = None,
    tokenizer: str = "",
    sequence_length: int = 0,
    named_by: str = "data.source=",
) -> TokenSource:
    """Return a split of a dataset.

    Args:
      location: ``embedded``, ``synthetic``, a task (:func:`synthetic.task_source`), or a folder by its path or URL.
      vocab_size: of the model; limits the tokens of a dataset that does not say how large its vocabulary is.
      bos: the token that begins a document; None for what the dataset says.
      tokenizer: the tokenizer that must have made the tokens, by its kind, name, file or hash; empty for any.
      sequence_length: of a task's sequences; 0 is 64.
      named_by: the key or option that gave the location, for messages.

    Raises:
      ConfigError: if the dataset does not exist, or is of another tokenizer.
      DataError: if it exists and cannot be read.
    """
    if split not in dataset.SPLITS:
        raise ConfigError(f"split={split!r}: expected one of {', '.join(dataset.SPLITS)}")
    if location == "embedded":
        tokens = embedded_tokens(split)
        source = TokenSource(f"embedded/{split}", tokens, EMBEDDED_VOCAB_SIZE, EMBEDDED_BOS, tokenizer=("byte",))
    elif location == "synthetic":
        source = synthetic.random_source(split, vocab_size or synthetic.RANDOM_VOCAB_SIZE)
    elif synthetic.is_task(location):
        source = synthetic.task_source(
            location, split, vocab_size or synthetic.TASK_VOCAB_SIZE, sequence_length or synthetic.DEFAULT_LENGTH
        )
    else:
        source = _in_folder(location, split, vocab_size, bos, f"{named_by}{location!r}")
    _check_tokenizer(source, tokenizer)
    return source


def tokenizer_of(location: str) -> tokenizer_lib.Tokenizer:
    """Return the tokenizer that made a dataset: bytes for ``embedded``, else the tokenizer in its folder.

    Raises:
      ConfigError: if the dataset has no tokenizer.
      DataError: if the tokenizer in the folder is not the one that made the tokens.
    """
    if location == "embedded":
        return tokenizer_lib.byte()
    description = None
    if location != "synthetic" and not synthetic.is_task(location):
        if not _is_folder(location):
            raise ConfigError(f"data.source={location!r}: no such folder; expected the dataset of the run")
        description = dataset.read_description(Store(location))
    if description is None:
        raise ConfigError(f"data.source={location!r}: no tokenizer is kept with it; expected --tokenizer FILE, or byte")
    name = dataset.tokenizer_file(description["tokenizer"]["kind"])
    dataset.read_tokenizer(Store(location), description)
    found = tokenizer_lib.load(Store(location).path(name) if name else "byte")
    known = {key: description[key] for key in ("bos", "eos") if description[key] is not None}
    return dataclasses.replace(found, **known)


def _in_folder(location: str, split: str, vocab_size: int | None, bos: int | None, named: str) -> TokenSource:
    if not _is_folder(location):
        if os.path.isfile(location):
            raise ConfigError(f"{named}: is a file; {_run_tokenize(location)}")
        raise ConfigError(f"{named}: no such folder; expected {_EXPECTED}")
    store = Store(location)
    description = dataset.read_description(store)
    if description is not None:
        tokens, documents = dataset.open_split(store, description, split)
        made_by = description["tokenizer"]
        if bos is not None and bos == description["eos"] != description["bos"]:
            raise ConfigError(
                f"data.bos={bos}: is the token that ends the documents of {location}, so that the ends would be no "
                "targets; expected data.bos unset"
            )
        return TokenSource(
            store.path(split),
            tokens,
            _vocab_size(description),
            description["bos"] if bos is None else bos,
            documents,
            tuple(made_by[key] for key in ("kind", "name", "sha256") if key in made_by),  # early datasets have no hash
            description["splits"][split]["fingerprint"],
        )
    if store.exists(f"{UNFINISHED}/state.json"):
        raise ConfigError(f"{named}: is not finished; run the same ttt tokenize command again")
    found = official.npy_source(store, split, vocab_size, bos) or official.zarr_source(store, split, vocab_size, bos)
    if found is None:
        if _holds_text(location):
            raise ConfigError(f"{named}: holds files of text; {_run_tokenize(location)}")
        raise ConfigError(f"{named}: no {split} tokens there; expected {_EXPECTED}")
    return found


def _vocab_size(description: dict[str, Any]) -> int:
    """Return the vocabulary size of a dataset. Bytes without EOS fit models of 257 tokens, too."""
    size, bos, eos = (description[key] for key in ("vocab_size", "bos", "eos"))
    if description["tokenizer"]["kind"] == "byte" and eos is None and (bos is None or bos < size - 1):
        return size - 1
    return size


def _holds_text(folder: str) -> bool:
    """Return whether a file of text is among the first files in a local folder."""
    names = (name for _, _, names in os.walk(folder) for name in names)
    kinds = (files.InputFile("train", name, 0).kind for name in itertools.islice(names, _SEARCHED))
    return any(kind in ("txt", "jsonl", "parquet") for kind in kinds)  # .json may be metadata of another format


def _run_tokenize(location: str) -> str:
    return f"run ttt tokenize --train {shlex.quote(location)} --tokenizer byte --output DIR, and give DIR here"


def _is_folder(location: str) -> bool:
    """Return whether a location can be a folder. Whether a URL is one is only known when it is read."""
    return "://" in location or os.path.isdir(location)


def _check_tokenizer(source: TokenSource, wanted: str) -> None:
    if not wanted or wanted in source.tokenizer:
        return
    if not source.tokenizer:
        raise ConfigError(
            f"data.tokenizer={wanted!r}: {source.name} does not say what made it; expected data.tokenizer unset"
        )
    hashes = [name for name in source.tokenizer if len(name) == 64]
    if hashes and len(wanted) >= 8 and hashes[0].startswith(wanted):
        return
    if hashes and wanted.endswith((".json", ".model")) and files.exists(wanted):
        if hashlib.sha256(files.read(wanted, "data.tokenizer")).hexdigest() == hashes[0]:
            return
        wanted = f"{wanted} (of another hash)"
    raise ConfigError(f"data.tokenizer={wanted!r}: {source.name} was made by {' '.join(source.tokenizer)}")


# ---- The embedded corpus


@functools.cache
def embedded_tokens(split: str) -> np.ndarray:
    """Return the tokens of a split of ``embedded``: its files in order of their paths, byte by byte, uint16 [N].

    The files are the Python standard library of the running interpreter: about 1 800 files and 30 MB of real text that
    every machine has. They differ between Python versions, so compare only runs on the same version.

    Raises:
      FileNotFoundError: if this Python has no standard library as source files.
    """
    parts = []
    for name, content in _library_files():
        if _split_of(name) == split:
            parts += [np.array([EMBEDDED_BOS], np.uint16), np.frombuffer(content, np.uint8).astype(np.uint16)]
    return np.concatenate(parts)


def _library_files() -> list[tuple[str, bytes]]:
    """Return the paths, below the library, and contents of its files."""
    root, paths = Path(sysconfig.get_path("stdlib")), []
    for folder, folders, names in os.walk(root):
        # Installed packages have many more folders than the library itself.
        folders[:] = [name for name in folders if name not in ("site-packages", "dist-packages", "__pycache__")]
        paths += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    paths = sorted((path for path in paths if os.path.isfile(path)), key=lambda path: path.split(os.sep))
    files = [(Path(path).relative_to(root).as_posix(), Path(path).read_bytes()) for path in paths]
    if sum(len(content) for _, content in files) < _LEAST_BYTES:
        raise FileNotFoundError(f"{root}: hardly any .py files of the standard library; use a full Python installation")
    return files


def _split_of(name: str) -> str:
    """Return the split of a file by a hash of its path, so that it stays there whatever files come or go."""
    hundredth = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) % 100
    for split, percent in _HELD_OUT_PERCENT.items():
        if hundredth < percent:
            return split
        hundredth -= percent
    return "train"
