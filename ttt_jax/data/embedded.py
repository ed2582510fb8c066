"""Read the embedded corpus: the Python standard library of the running interpreter, byte by byte.

These are about 1 800 files and 30 MB of real text that every machine has; nothing is downloaded. They differ between
Python versions, so compare only runs on the same version.
"""

import functools
import hashlib
import os
import sysconfig
from pathlib import Path

import numpy as np

BOS = 256  # begins each file; the other tokens are its bytes
VOCAB_SIZE = 257  # the byte tokenizer without EOS, so that models of earlier versions, without EOS, can read it
_LEAST_BYTES = 1_000_000
_HELD_OUT_PERCENT = {"validation": 5, "test": 5}


@functools.cache
def tokens(split: str) -> np.ndarray:
    """Return the files of a split, in order of their paths: uint16 [N].

    Raises:
      FileNotFoundError: if this Python has no standard library as source files.
    """
    parts = []
    for name, content in _files():
        if _split_of(name) == split:
            parts += [np.array([BOS], np.uint16), np.frombuffer(content, np.uint8).astype(np.uint16)]
    return np.concatenate(parts)


def _files() -> list[tuple[str, bytes]]:
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
