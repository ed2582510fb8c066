"""One-dimensional zarr3 arrays: sharded, compressed, with a checksum on every chunk.

While an array is being written it has no metadata, so nobody takes it for a whole one; its shards are written one after
another, and a shard that is written again has the same bytes.
"""

import hashlib
from typing import Any

import numpy as np
import tensorstore as ts

from ttt_jax.errors import DataError
from ttt_jax.storage.store import Store, explained

CHUNK = 1 << 14  # entries: what is read and decompressed at a time
SHARD = 1 << 24  # entries: a file
_UNKNOWN_LENGTH = 1 << 60
_CACHE = 1 << 26  # bytes, for each array that is read


class ArrayWriter:
    """Writes an array from its beginning to its end, and can be stopped and made again in between.

    Args:
      shards, digest, rest: where an earlier writer stood; see :meth:`state`.
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
        self._rest = [np.frombuffer(rest, self._dtype)]
        self._resting = len(self._rest[0])
        self._array = self._open(_UNKNOWN_LENGTH, assume_metadata=True)
        self._writing: Any = None

    def __len__(self) -> int:
        return self._shards * self._shard + self._resting

    def append(self, values: np.ndarray) -> None:
        """Adds values at the end. Raises :class:`DataError` where they cannot be stored."""
        self._rest.append(values.astype(self._dtype, copy=False))
        self._resting += len(values)
        if self._resting >= self._shard:
            everything = np.concatenate(self._rest)
            for start in range(0, len(everything) - self._shard + 1, self._shard):
                self._write(everything[start : start + self._shard])
                self._shards += 1
            self._rest = [everything[len(everything) // self._shard * self._shard :].copy()]
            self._resting = len(self._rest[0])

    def state(self) -> tuple[dict[str, Any], bytes]:
        """What a new writer needs to go on; all shards before it are on disk."""
        self._wait()
        self._rest = [np.concatenate(self._rest)]
        return {"shards": self._shards, "digest": self._digest}, self._rest[0].tobytes()

    def finish(self) -> str:
        """Writes what is left, and the metadata; returns a hash of all values. May be done again."""
        rest = np.concatenate(self._rest)
        self._wait()
        for name in list(self._store.names(f"{self._name}/c/")):
            # An earlier run may have been further, in other text: its chunks would stay in the last shard.
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
            "store_data_equal_to_fill_value": True,  # so that a chunk that is not there is one that was lost
        }
        return ts.open(spec, **how).result()

    def _explained(self):
        return explained(f"cannot write {self._store.path(self._name)}")


class Array:
    """A stored array; read by slices, as a NumPy array is.

    Args:
      spec: TensorStore's, of a zarr or zarr3 array.
      name: of the array, for messages.
      instead: contents to be taken instead of those of files of the array.

    Raises:
      DataError: where there is none, or it is not one of integers in one dimension.
    """

    def __init__(self, spec: dict[str, Any], name: str, instead: dict[str, bytes] | None = None):
        self._arguments, self._name = (spec, name, instead), name
        context, kvstore = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE}}), spec["kvstore"]
        with explained(f"cannot read {name}"):
            if instead:
                memory = ts.KvStore.open({"driver": "memory"}, context=context).result()
                for file, content in instead.items():
                    memory.write(file, content).result()
                layers = [{"exact": file, "base": {"driver": "memory", "path": file}} for file in instead]
                kvstore = {"driver": "kvstack", "layers": [{"base": kvstore}, *layers]}
            # What is open does not change, so that the index of a shard need not be read for every window.
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
        """Of the values."""
        return self._array.dtype.numpy_dtype

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, _ = where.indices(len(self))
        with explained(f"cannot read {self._name} at offset {start}"):
            return self._array[start : max(start, stop)].read().result()


def check_layout(dtype: str, shape: tuple[int, ...], name: str) -> None:
    """Raises :class:`DataError` where an array cannot be one of tokens."""
    if dtype not in ("uint8", "uint16", "uint32", "int32", "int64", "uint64"):
        raise DataError(f"{name}: holds {dtype}; expected integers")
    if len(shape) != 1:
        raise DataError(f"{name}: has shape {list(shape)}; expected one dimension")
