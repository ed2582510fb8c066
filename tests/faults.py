"""Damage files as disks, networks and people do."""

import contextlib
import json
from pathlib import Path

import numpy as np

KINDS = ("flip", "cut", "empty", "delete", "foreign", "duplicate")
_FOREIGN = {
    ".json": json.dumps({"name": "package", "version": 2}).encode(),
    ".jsonl": b'{"event": "start", "when": 3}\n{"event": "end", "when": 4}\n',
    "": b"\x89PNG\r\n\x1a\n" + bytes(range(64)),
}


def files(folder: Path) -> list[Path]:
    """Return all files under a folder, in order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def damaged(content: bytes, kind: str, seed: int, suffix: str = "") -> bytes | None:
    """Return the content of a file after damage; None where the file is gone.

    Args:
      kind: ``flip`` one bit, ``cut`` the end off, ``empty``, ``delete``, ``foreign`` (put the file of another program
        in its place), or ``duplicate`` (repeat the content or one of its lines).
      seed: of the place of the damage.
      suffix: the suffix of the file's name.
    """
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    if kind == "flip" and content:
        flipped = bytearray(content)
        flipped[rng.integers(len(flipped))] ^= 1 << rng.integers(8)
        return bytes(flipped)
    if kind == "cut" and content:
        return content[: rng.integers(len(content))]
    if kind == "delete":
        return None
    if kind == "foreign":
        return _FOREIGN.get(suffix, _FOREIGN[""])
    if kind == "duplicate":
        lines = content.splitlines(keepends=True)
        if suffix != ".jsonl" or not lines:
            return content + content
        twice = int(rng.integers(len(lines)))
        return b"".join(lines[: twice + 1] + lines[twice:])
    return b""


@contextlib.contextmanager
def damage(path: Path, kind: str, seed: int):
    """Damage a file, and restore it in the end."""
    whole = path.read_bytes()
    left = damaged(whole, kind, seed, path.suffix)
    try:
        path.unlink() if left is None else path.write_bytes(left)
        yield
    finally:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(whole)
