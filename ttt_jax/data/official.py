"""Read the authors' own datasets as they are.

- ttt-lm-jax: ``train.npy``, ``validation.npy`` and ``test.npy``, tokens in one dimension, in the folder itself or in a
  folder inside that is named after the tokenizer: ``tokenizer_name-meta-llama/Llama-2-7b-hf-val_ratio-...``.
- TTT-E2E: a zarr group, version 2 or 3, with the arrays ``train`` and ``val``.
"""

import io
import json
import re
from typing import Any

import numpy as np

from ttt_jax.data.dataset import Array, check_layout
from ttt_jax.data.token_source import TokenSource
from ttt_jax.errors import ConfigError, DataError
from ttt_jax.storage.store import Store

_LLAMA_2, _LLAMA_2_VOCAB_SIZE, _LLAMA_2_BOS = "meta-llama/Llama-2-7b-hf", 32000, 1  # of what ttt-lm-jax publishes
_LLAMA_3_BOS = 128000  # of what TTT-E2E publishes
_UNKNOWN_VOCAB_SIZE = 1 << 31


class NpyTokens:
    """The integers in a ``.npy`` file, read by byte ranges.

    Raises:
      DataError: if it is no such file, is cut short, or does not hold integers in one dimension.
    """

    def __init__(self, store: Store, name: str):
        self._store, self._name, path = store, name, store.path(name)
        try:
            start = store.read(name, 0, 12) or b""
            first = start[6:7] == b"\1"  # version 1 of the format: two bytes of length, else four
            begin = 10 if first else 12
            header = io.BytesIO(store.read(name, 0, begin + int.from_bytes(start[8:begin], "little")) or b"")
            np.lib.format.read_magic(header)
            read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
            shape, _, self.dtype = read(header)
        except (ValueError, DataError) as error:
            raise DataError(f"{path}: not a .npy file: {' '.join(str(error).split())}") from error
        check_layout(self.dtype.name, shape, path)
        self._length, self._start = shape[0], header.tell()
        try:
            self[max(0, self._length - 1) : self._length]
        except DataError as error:
            raise DataError(f"{path}: is cut short; expected {self._length} tokens ({error})") from error

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: slice, /) -> np.ndarray:
        start, stop, _ = index.indices(self._length)
        if start >= stop:
            return np.empty(0, self.dtype)
        first, last = (self._start + place * self.dtype.itemsize for place in (start, stop))
        content = self._store.read(self._name, first, last)
        if content is None:
            raise DataError(f"{self._store.path(self._name)}: is gone; it was being read at offset {start}")
        return np.frombuffer(content, self.dtype)


def npy_source(store: Store, split: str, vocab_size: int | None, bos: int | None) -> TokenSource | None:
    """Return a split of a folder of ttt-lm-jax; None if the folder has no ``.npy`` file of the split.

    If no folder names the tokenizer, BOS is Llama-2's, which is no target, as in the authors' code.

    Raises:
      ConfigError: if the folder holds datasets of several tokenizers.
      DataError: as :class:`NpyTokens` does.
    """
    names = [f"{split}.npy"] if store.exists(f"{split}.npy") else []
    names += [name for name in store.names("tokenizer_name-") if name.endswith(f"/{split}.npy")]
    if not names:
        return None
    if len(names) > 1:
        folders = ", ".join(store.path(name.rpartition("/")[0]) for name in names)
        raise ConfigError(f"data.source={store.location!r}: holds several datasets; expected one of {folders}")
    location = store.path(names[0])
    found = re.search(r"tokenizer_name-(.+?)-val_ratio-", location)
    tokenizer = found[1] if found else ""
    default_bos = _LLAMA_2_BOS if tokenizer in ("", _LLAMA_2) else None
    return TokenSource(
        location,
        NpyTokens(store, names[0]),
        _LLAMA_2_VOCAB_SIZE if tokenizer == _LLAMA_2 else vocab_size or _UNKNOWN_VOCAB_SIZE,
        default_bos if bos is None else bos,
        tokenizer=(tokenizer,) if tokenizer else (),
    )


def zarr_source(store: Store, split: str, vocab_size: int | None, bos: int | None) -> TokenSource | None:
    """Return a split of a zarr group of TTT-E2E; None if the folder has no zarr array of the split.

    Raises:
      DataError: if the array cannot be read.
    """
    name = "val" if split == "validation" else split
    path = store.path(name)
    if store.exists(f"{name}/zarr.json"):
        tokens = Array({"driver": "zarr3", "kvstore": store.spec(name)}, path)
    elif store.exists(f"{name}/.zarray"):
        metadata = {".zarray": _without_typesize(store.read_json(f"{name}/.zarray"))}
        tokens = Array({"driver": "zarr", "kvstore": store.spec(name)}, path, overrides=metadata)
    else:
        return None
    bos = _LLAMA_3_BOS if bos is None else bos
    return TokenSource(path, tokens, vocab_size or _UNKNOWN_VOCAB_SIZE, bos)


def _without_typesize(metadata: Any) -> bytes:
    """Return the metadata of a zarr 2 array without a key that zarr-python writes and TensorStore refuses."""
    if isinstance(metadata, dict) and isinstance(metadata.get("compressor"), dict):
        metadata["compressor"].pop("typesize", None)
    return json.dumps(metadata).encode()
