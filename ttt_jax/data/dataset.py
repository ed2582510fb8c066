"""Read tokenized datasets, and write and read their arrays. A dataset is a folder of this layout.

dataset.json          the description, written last: a folder without it is unfinished
tokenizer.json        the tokenizer (or tokenizer.model; no file for bytes)
train/                zarr3 array [tokens]: documents one after another; also validation/, test/
train_documents/      zarr3 array [documents], int64: the offset at which each document begins
zarr.json             makes the folder a zarr group
problems.jsonl        records that were left out, if there are any
"""

import hashlib
from typing import Any

import numpy as np
import tensorstore as ts

from ttt_jax.errors import ConfigError, DataError
from ttt_jax.storage.store import Store, explained

FORMAT = "ttt_jax tokens"
VERSION = 1
SPLITS = ("train", "validation", "test")
DESCRIPTION = "dataset.json"
PROBLEMS = "problems.jsonl"
UNFINISHED = "_unfinished"  # a folder in the dataset with the state of a run that was stopped
GROUP = {"zarr_format": 3, "node_type": "group", "attributes": {}}
CHUNK = 1 << 14  # entries that are read and decompressed together
SHARD = 1 << 24  # entries in a file
_UNKNOWN_LENGTH = 1 << 60
_CACHE = 1 << 26  # bytes, for each open array
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


# ---- Arrays
#
# Zarr3 arrays of one dimension: sharded, compressed, with a checksum on every chunk. An array gets its metadata when it
# is complete, so that an unfinished array cannot be opened by mistake. Shards are written in order, and writing a shard
# again gives the same bytes.


class ArrayWriter:
    """Writes an array from its beginning to its end. A new writer can continue where an earlier one stopped.

    Args:
      shards, digest, rest: the state of the earlier writer; see :meth:`state`.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        dtype: str,
        *,
        shard: int = SHARD,
        chunk: int = CHUNK,
        shards: int = 0,
        digest: str = "",
        rest: bytes = b"",
    ):
        self._store, self._name, self._dtype = store, name, np.dtype(dtype)
        self._shard, self._chunk = shard, min(chunk, shard)
        self._shards, self._digest = shards, digest
        self._rest = [np.frombuffer(rest, self._dtype)]  # values that do not fill a shard yet
        self._rest_length = len(self._rest[0])
        self._array = self._open(_UNKNOWN_LENGTH, assume_metadata=True)
        self._writing: Any = None

    def __len__(self) -> int:
        return self._shards * self._shard + self._rest_length

    def append(self, values: np.ndarray) -> None:
        """Add values at the end.

        Raises:
          DataError: if they cannot be written.
        """
        self._rest.append(values.astype(self._dtype, copy=False))
        self._rest_length += len(values)
        if self._rest_length >= self._shard:
            everything = np.concatenate(self._rest)
            for start in range(0, len(everything) - self._shard + 1, self._shard):
                self._write(everything[start : start + self._shard])
                self._shards += 1
            self._rest = [everything[len(everything) // self._shard * self._shard :].copy()]
            self._rest_length = len(self._rest[0])

    def state(self) -> tuple[dict[str, Any], bytes]:
        """Wait until all full shards are on disk, and return what a new writer needs to continue."""
        self._wait()
        self._rest = [np.concatenate(self._rest)]
        return {"shards": self._shards, "digest": self._digest}, self._rest[0].tobytes()

    def finish(self) -> str:
        """Write the last shard and the metadata; return a hash of all values. May be called again."""
        rest = np.concatenate(self._rest)
        self._wait()
        for name in list(self._store.names(f"{self._name}/c/")):
            # An earlier run may have written more, from other text: its chunks would stay in the last shard.
            number = name.rsplit("/", 1)[1]
            if number.isdecimal() and int(number) >= self._shards:
                self._store.delete_file(name)
        before = digest = self._digest
        if len(rest):
            self._write(rest)
            digest, self._digest = self._digest, before
        self._wait()
        with self._explained():
            self._open(len(self), open=True, create=True)
        return digest

    def _write(self, values: np.ndarray) -> None:
        self._wait()
        start = self._shards * self._shard
        with self._explained():
            self._writing = self._array[start : start + len(values)].write(values)
        self._digest = hashlib.blake2b(self._digest.encode() + values.tobytes(), digest_size=16).hexdigest()

    def _wait(self) -> None:
        if self._writing is not None:
            with self._explained():
                self._writing.result()
            self._writing = None

    def _open(self, length: int, **how):
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        sharding = {
            "chunk_shape": [self._chunk],
            "codecs": [little, {"name": "zstd", "configuration": {"level": 3}}, {"name": "crc32c"}],
            "index_codecs": [little, {"name": "crc32c"}],
        }
        metadata = {
            "shape": [length],
            "data_type": self._dtype.name,
            "fill_value": 0,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [self._shard]}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        }
        spec = {
            "driver": "zarr3",
            "kvstore": self._store.spec(self._name),
            "metadata": metadata,
            "store_data_equal_to_fill_value": True,  # so that a missing chunk is a lost one
        }
        return ts.open(spec, **how).result()

    def _explained(self):
        return explained(f"cannot write {self._store.path(self._name)}")


class Array:
    """A stored array of integers in one dimension, read by slices as a NumPy array is.

    Args:
      spec: the TensorStore spec of a zarr or zarr3 array.
      name: the array in messages.
      overrides: contents that replace files of the array, by their names.

    Raises:
      DataError: if there is no such array, or it has another type or more dimensions.
    """

    def __init__(self, spec: dict[str, Any], name: str, overrides: dict[str, bytes] | None = None):
        self._arguments, self._name = (spec, name, overrides), name
        context, kvstore = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE}}), spec["kvstore"]
        with explained(f"cannot read {name}"):
            if overrides:
                memory = ts.KvStore.open({"driver": "memory"}, context=context).result()
                for file, content in overrides.items():
                    memory.write(file, content).result()
                layers = [{"exact": file, "base": {"driver": "memory", "path": file}} for file in overrides]
                kvstore = {"driver": "kvstack", "layers": [{"base": kvstore}, *layers]}
            # An open array does not change, so the index of a shard need not be read again for every window.
            unchanging = {"recheck_cached_data": "open", "recheck_cached_metadata": "open"}
            full = {**spec, **unchanging, "kvstore": kvstore, "fill_missing_data_reads": False}
            self._array = ts.open(full, read=True, open=True, context=context).result()
        check_layout(self._array.dtype.name, self._array.shape, name)

    def __reduce__(self):
        return Array, self._arguments

    def __len__(self) -> int:
        return self._array.shape[0]

    @property
    def dtype(self) -> np.dtype:
        """Return the type of the values."""
        return self._array.dtype.numpy_dtype

    def __getitem__(self, index: slice) -> np.ndarray:
        start, stop, _ = index.indices(len(self))
        with explained(f"cannot read {self._name} at offset {start}"):
            return self._array[start : max(start, stop)].read().result()


def check_layout(dtype: str, shape: tuple[int, ...], name: str) -> None:
    """Raise :class:`DataError` if an array is not one of integers in one dimension."""
    if dtype not in ("uint8", "uint16", "uint32", "int32", "int64", "uint64"):
        raise DataError(f"{name}: holds {dtype}; expected integers")
    if len(shape) != 1:
        raise DataError(f"{name}: has shape {list(shape)}; expected one dimension")


# ---- Datasets


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
