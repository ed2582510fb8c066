"""The embedded corpus: the Python standard library of the running interpreter, byte by byte.

About 1 800 files and 30 MB of real text that every machine has; nothing is downloaded. It differs between Python
versions, so compare runs on the same one.
"""

import functools
import hashlib
import os
import sysconfig
from pathlib import Path

import numpy as np

BOS = 256  # begins each file; the other tokens are its bytes
VOCAB_SIZE = 257  # of the byte tokenizer but for EOS, so that models of before, without EOS, can read it
_LEAST_BYTES = 1_000_000
_HELD_OUT_PERCENT = {"validation": 5, "test": 5}


@functools.cache
def tokens(split: str) -> np.ndarray:
    """The files of a split, in order of their paths: uint16 [N].

    Raises:
      FileNotFoundError: where the standard library is not there as source files.
    """
    parts = []
    for name, content in _files():
        if _split_of(name) == split:
            parts += [np.array([BOS], np.uint16), np.frombuffer(content, np.uint8).astype(np.uint16)]
    return np.concatenate(parts)


def _files() -> list[tuple[str, bytes]]:
    root, paths = Path(sysconfig.get_path("stdlib")), []
    for folder, folders, names in os.walk(root):
        # Installed packages are many more folders than the library itself, so they are not walked through.
        folders[:] = [name for name in folders if name not in ("site-packages", "dist-packages", "__pycache__")]
        paths += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    paths = sorted((path for path in paths if os.path.isfile(path)), key=lambda path: path.split(os.sep))
    files = [(Path(path).relative_to(root).as_posix(), Path(path).read_bytes()) for path in paths]
    if sum(len(content) for _, content in files) < _LEAST_BYTES:
        raise FileNotFoundError(f"{root}: hardly any .py files of the standard library; use a full Python installation")
    return files


def _split_of(name: str) -> str:
    """By a hash of the path, so that a file stays in its split whatever others come or go."""
    place = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) % 100
    for split, percent in _HELD_OUT_PERCENT.items():
        if place < percent:
            return split
        place -= percent
    return "train"
