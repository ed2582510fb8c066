"""Compare the embedded corpus with the standard library as ``os.walk`` finds it."""

import collections
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ttt_jax.data import named_sources

ROOT = Path(os.__file__).parent
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def library() -> dict[str, bytes]:
    """Return every .py file of the standard library, by its path."""
    found = {}
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [f for f in folders if f not in ("site-packages", "dist-packages", "__pycache__")]
        for name in names:
            if name.endswith(".py"):
                path = Path(folder, name)
                found[path.relative_to(ROOT).as_posix()] = path.read_bytes()
    return found


def documents(split) -> list[bytes]:
    """Return the bytes between each BOS and the next."""
    tokens = named_sources.embedded_tokens(split)
    starts = np.flatnonzero(tokens == named_sources.EMBEDDED_BOS)
    return [part.astype(np.uint8).tobytes() for part in (x[1:] for x in np.split(tokens, starts[1:]))]


def test_the_splits_hold_every_file_once(library):
    found = collections.Counter(document for split in SPLITS for document in documents(split))
    assert found == collections.Counter(library.values())


def test_each_file_begins_with_bos_and_all_else_is_bytes():
    for split in SPLITS:
        tokens = named_sources.embedded_tokens(split)
        assert tokens.dtype == np.uint16
        assert tokens[0] == named_sources.EMBEDDED_BOS == 256
        assert tokens.max() == 256 < named_sources.EMBEDDED_VOCAB_SIZE
        assert len(tokens) == sum(len(document) + 1 for document in documents(split))


def test_files_keep_the_order_of_their_paths(library):
    places = {content: path for path, content in library.items()}
    unique = {c for c, n in collections.Counter(library.values()).items() if n == 1}
    for split in SPLITS:
        paths = [Path(places[document]) for document in documents(split) if document in unique]
        assert len(paths) > 10
        assert paths == sorted(paths)


def test_a_known_file_is_contained_byte_for_byte():
    content = (ROOT / "argparse.py").read_bytes()
    assert sum(document == content for split in SPLITS for document in documents(split)) == 1


def test_each_held_out_split_is_a_few_percent():
    sizes = {split: len(named_sources.embedded_tokens(split)) for split in SPLITS}
    assert sizes["train"] > 5_000_000
    for split in ("validation", "test"):
        assert 0.01 < sizes[split] / sum(sizes.values()) < 0.12  # 5 percent of the files, which differ in length


def test_the_split_of_a_file_does_not_depend_on_other_files(monkeypatch):
    def contents(files):
        monkeypatch.setattr(named_sources, "_library_files", lambda: files)
        return {split: set(documents_of(split)) for split in SPLITS}

    def documents_of(split):
        tokens = named_sources.embedded_tokens.__wrapped__(split)
        return bytes(np.minimum(tokens, 255).astype(np.uint8)).split(b"\xff")[1:]

    files = [(f"{i}.py", b"file %d" % i) for i in range(400)]
    all_of_them, half = contents(files), contents(files[::2])
    for split in SPLITS:
        assert half[split] == all_of_them[split] & {content for _, content in files[::2]}
    assert {split: len(found) > 5 for split, found in all_of_them.items()} == dict.fromkeys(SPLITS, True)


def test_another_process_reads_the_same_tokens():
    program = (
        "import hashlib; from ttt_jax.data import named_sources;"
        "print(hashlib.sha256(named_sources.embedded_tokens('validation').tobytes()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == hashlib.sha256(named_sources.embedded_tokens("validation").tobytes()).hexdigest()


def test_a_python_without_source_files_is_refused(monkeypatch, tmp_path):
    (tmp_path / "os.py").write_text("# all there is\n")
    monkeypatch.setattr(named_sources.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: hardly any .py files"):
        named_sources.embedded_tokens.__wrapped__("train")
