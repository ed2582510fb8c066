"""Make documents and files of them, read arrays with TensorStore alone, and tokenize in this process."""

import gzip
import io
import json
import random
from pathlib import Path

import numpy as np
import pyarrow
import tensorstore as ts
from backports import zstd
from pyarrow import parquet

from ttt_jax.data.prepare import tokenize_units
from ttt_jax.data.prepare.files import InputFile


def documents(count: int, seed: int = 0) -> list[str]:
    """Return texts of up to 40 words with empty words, line ends, NUL, and letters of one to four bytes."""
    rng = random.Random(seed)
    words = "the river bent twice straße Ωmega 水は流れる 🦉 \r\n \n\n \x00 \u2028 <s> </s> <|endoftext|>".split(" ")
    return [" ".join(rng.choices(words, k=rng.randrange(40))) + f" {seed}.{i}" * (i != 1) for i in range(count)]


def jsonl(texts: list[str], key: str = "text", **about) -> bytes:
    """Return JSON lines in the layout of the Pile; every second line escapes what is not ASCII."""
    lines = [{key: text, "meta": {"pile_set_name": "Books3"}, **about} for text in texts]
    return b"".join(json.dumps(line, ensure_ascii=i % 2 == 0).encode() + b"\n" for i, line in enumerate(lines))


def frames(content: bytes, size: int = 1000) -> bytes:
    """Compress as Zstandard frames of ``size`` bytes each, cut anywhere."""
    return b"".join(zstd.compress(content[i : i + size]) for i in range(0, len(content), size))


def members(content: bytes, size: int = 1000, compress=gzip.compress) -> bytes:
    """Compress as gzip members, or streams of another compression, of ``size`` bytes each."""
    return b"".join(compress(content[i : i + size]) for i in range(0, len(content), size))


def parquet_file(values, row_group_size: int = 7, **types) -> bytes:
    """Return a Parquet file with a column ``text`` and another column."""
    table = pyarrow.table({"id": list(range(len(values))), "text": pyarrow.array(values, **types)})
    content = io.BytesIO()
    parquet.write_table(table, content, row_group_size=row_group_size)
    return content.getvalue()


def input_file(path: Path, content: bytes, split: str = "train") -> InputFile:
    """Write a file, and return it as :func:`ttt_jax.data.prepare.listing.find` would."""
    path.write_bytes(content)
    return InputFile(split, str(path), len(content))


def contents(folder: Path) -> dict[str, bytes]:
    """Return the contents of all files in a folder, at any depth."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def stored(folder: Path) -> np.ndarray:
    """Read a zarr3 array with TensorStore, by its zarr.json alone."""
    assert (folder / "zarr.json").exists()
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/"}}
    return ts.open(spec, read=True, open=True).result().read().result()


def in_this_process(job, units):
    """Tokenize one unit after another in this process; this is the simplest engine."""
    for split, unit in units:
        yield unit, tokenize_units.tokenize_unit(job, split, unit)
