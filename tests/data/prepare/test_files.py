"""Check which files a path, glob, folder or URL names, and that files are opened, hashed and decompressed."""

import bz2
import functools
import gzip
import hashlib
import http.server
import io
import lzma
import threading

import fsspec
import pytest
from backports import zstd
from refusals import error_of

from ttt_jax.config import ConfigError
from ttt_jax.data.prepare import files, listing
from ttt_jax.data.prepare.files import InputFile

EXPECTED = ".jsonl, .ndjson, .json, .txt, .parquet, or these but the last with .zst, .zstd, .gz, .xz or .bz2"
NAMES = """
b.jsonl a.txt c.jsonl.zst d.jsonl.gz e.json f.json.zst g.json.gz h.txt.zst i.txt.gz j.parquet
sub/z.jsonl sub/deep/y.txt .hidden.jsonl .git/x.jsonl sub/.cache/w.txt
notes.md k.parquet.gz l.zst m.jsonl.lz4 jsonl
""".split()
READABLE = sorted(NAMES[:12])


@pytest.fixture
def folder(tmp_path):
    """Make files; file i has i bytes."""
    for size, name in enumerate(NAMES):
        path = tmp_path / "text" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)
    return tmp_path / "text"


def found(*patterns):
    return listing.find("train", [str(pattern) for pattern in patterns])


def refused(*patterns):
    return error_of(ConfigError, found, *patterns)


def test_a_folder_stands_for_its_visible_files_of_known_kinds_by_name(folder):
    expected = [InputFile("train", str(folder / name), NAMES.index(name)) for name in READABLE]
    assert found(folder) == expected
    assert found(f"{folder}/") == expected


def test_a_hidden_folder_can_be_named(folder):
    assert [file.location for file in found(folder / ".git")] == [str(folder / ".git/x.jsonl")]


def test_kinds_follow_from_endings(folder):
    kinds = [files.InputFile("train", name, 0).kind for name in READABLE]
    assert kinds == [name.removesuffix(".zst").removesuffix(".gz").rsplit(".", 1)[1] for name in READABLE]


def test_a_glob_is_sorted_and_patterns_keep_their_order(folder):
    def names(*patterns):
        return [file.location.removeprefix(f"{folder}/") for file in found(*(folder / p for p in patterns))]

    assert names("[a-d].jsonl*") == ["b.jsonl", "c.jsonl.zst", "d.jsonl.gz"]
    assert names("[ce].j*", "a.txt", "sub") == ["c.jsonl.zst", "e.json", "a.txt", "sub/deep/y.txt", "sub/z.jsonl"]
    assert names("*/d*/*.txt", "**/y.txt") == 2 * ["sub/deep/y.txt"]
    assert names("s*/z.jsonl", "b.jsonl", "b.jsonl") == ["sub/z.jsonl", "b.jsonl", "b.jsonl"]


def test_a_file_has_its_split_and_opens_without_decompression(folder):
    (file,) = listing.find("validation", [str(folder / "d.jsonl.gz")])
    assert (file.split, file.size, file.kind) == ("validation", 3, "jsonl")
    with file.open() as raw:
        assert raw.read() == b"xxx"


def test_a_relative_path_starts_at_the_working_directory(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert found("b.jsonl") == [InputFile("train", str(folder / "b.jsonl"), 0)]


def test_an_existing_file_whose_name_has_brackets_is_no_glob(folder):
    path = folder / "part[1].jsonl"
    path.write_bytes(b"1")
    assert found(path) == [InputFile("train", str(path), 1)]


def test_memory_urls_are_read():
    memory = fsspec.filesystem("memory")
    for size, name in enumerate(NAMES):
        memory.pipe(f"/of-files/{name}", b"y" * size)
    expected = [InputFile("train", f"memory:///of-files/{name}", NAMES.index(name)) for name in READABLE]
    assert found("memory://of-files") == expected
    assert [file.size for file in found("memory://of-files/[a-d].jsonl*")] == [0, 2, 3]
    (file,) = found("memory://of-files/j.parquet")
    with file.open() as raw:
        assert raw.read() == b"y" * 9
    assert files.read("memory://of-files/c.jsonl.zst", "--tokenizer") == b"yy"
    assert files.exists("memory://of-files/notes.md")
    assert not files.exists("memory://of-files/gone.md")
    assert refused("memory://nowhere/a.jsonl").startswith("--train memory://nowhere/a.jsonl: no such file")


def test_file_urls_are_read(folder):
    assert [file.size for file in found(f"file://{folder}")] == [NAMES.index(name) for name in READABLE]
    (file,) = found(f"file://{folder}/sub/*.jsonl")
    assert (file.location, file.size) == (f"file://{folder}/sub/z.jsonl", 10)


def test_http_urls_are_read(folder):
    """Read from an HTTP server on this machine."""
    (folder / "c.jsonl.zst").write_bytes(b"0123456789")
    handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            (file,) = found(f"{url}/c.jsonl.zst")
            assert file == InputFile("train", f"{url}/c.jsonl.zst", 10)
            with file.open() as raw:
                assert raw.read() == b"0123456789"
            assert refused(f"{url}/gone.jsonl").startswith(f"--train {url}/gone.jsonl: no such file")
        finally:
            server.shutdown()
            thread.join()
    assert refused(f"{url}/c.jsonl.zst").startswith(f"--train {url}/c.jsonl.zst: ")  # the server is gone


def test_missing_files_are_refused(folder):
    for name in ("gone.jsonl", "gone*.jsonl", "gone", "a.txt/a.txt"):
        path = folder / name
        assert refused(folder, path) == f"--train {path}: no such file; expected files named {EXPECTED}"
    (folder / "empty").mkdir()
    assert refused(folder / "empty").startswith(f"--train {folder / 'empty'}: no such file")


@pytest.mark.parametrize("name", ["notes.md", "k.parquet.gz", "l.zst", "m.jsonl.lz4", "jsonl", "*.md"])
def test_unknown_endings_are_refused(folder, name):
    place = folder / name.replace("*", "notes")
    assert refused(folder / name) == f"--train {place}: cannot be read; expected a name that ends in {EXPECTED}"


def test_an_unknown_protocol_is_refused():
    assert refused("nofs://a/b.jsonl") == "--train nofs://a/b.jsonl: Protocol not known: nofs"
    with pytest.raises(ConfigError, match=r"^--tokenizer nofs://a/tokenizer\.json: Protocol not known: nofs$"):
        files.read("nofs://a/tokenizer.json", "--tokenizer")


def test_reading_a_missing_file_or_a_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError) as caught:
        files.read(str(tmp_path / "gone"), "--tokenizer")
    assert str(caught.value) == f"--tokenizer {tmp_path}/gone: no such file"
    with pytest.raises(ConfigError) as caught:
        files.read(str(tmp_path), "--tokenizer")
    assert str(caught.value) == f"--tokenizer {tmp_path}: Is a directory"


# ---- Digests


def test_the_digest_is_the_hash_of_the_file(folder):
    """Check that the hash is of the bytes of the file, compressed or not."""
    contents = {file.location.removeprefix(f"{folder}/"): file.digest for file in files.with_digests(found(folder))}
    assert list(contents) == READABLE
    for name, content in contents.items():
        assert content == f"sha256:{hashlib.sha256(b'x' * NAMES.index(name)).hexdigest()}"
    known = [InputFile("train", str(folder / "gone.jsonl"), 1, "sha256:known")]
    assert files.with_digests(known) == known


def test_the_digest_is_the_checksum_of_the_bucket(monkeypatch):
    memory = fsspec.filesystem("memory")
    memory.pipe("/of-contents/a.jsonl", b"y")
    (file,) = found("memory://of-contents/a.jsonl")
    assert files.with_digests([file])[0].digest == f"sha256:{hashlib.sha256(b'y').hexdigest()}"
    monkeypatch.setattr(type(memory), "info", lambda self, path, **_: {"size": 1, "md5Hash": "mO8Q=", "etag": "x"})
    assert files.with_digests([file])[0].digest == "md5Hash:mO8Q="


def test_a_file_that_is_gone_when_it_is_hashed_is_refused(folder):
    listed = found(folder)
    (folder / "b.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"^--train .*/b\.jsonl: no such file$"):
        files.with_digests(listed)


SPELLED = [
    ("A.JSONL", "jsonl"),
    ("a.NdJson.Zstd", "jsonl"),
    ("b.TXT.GZ", "txt"),
    ("c.Json.XZ", "json"),
    ("d.txt.BZ2", "txt"),
]


@pytest.mark.parametrize(("name", "kind"), SPELLED)
def test_other_spellings_of_endings_are_read(tmp_path, name, kind):
    (tmp_path / name).write_bytes(b"x")
    (file,) = found(tmp_path)
    assert (file.kind, file.compressed) == (kind, name.count(".") == 2)


# ---- Compressed files

PACK = {"zst": zstd.compress, "zstd": zstd.compress, "gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}
CONTENT = bytes(range(256)) * 40


def opened(packed, ending):
    return files.decompressed(io.BytesIO(packed), ending)


@pytest.mark.parametrize("ending", files.COMPRESSIONS)
def test_consecutive_streams_are_one_seekable_stream(ending):
    packed = b"".join(PACK[ending](CONTENT[i : i + 3000]) for i in range(0, len(CONTENT), 3000))
    stream = opened(packed, ending)
    assert stream.read() == CONTENT
    for place in (0, 9000, 3001, 3000, 2999, len(CONTENT), 1):
        stream.seek(place)
        assert stream.tell() == place
        assert stream.read(4000) == CONTENT[place : place + 4000]


@pytest.mark.parametrize("ending", files.COMPRESSIONS)
def test_a_part_of_two_streams_is_an_error(ending):
    """Cut the file anywhere but after the first stream, or change a bit where the second begins."""
    one, two = PACK[ending](b"first"), PACK[ending](b"second")
    assert opened(one + two, ending).read() == b"firstsecond"
    for length in set(range(1, len(one + two))) - {len(one)}:
        with pytest.raises(files.CORRUPT):
            opened((one + two)[:length], ending).read()
    wrong = bytearray(one + two)
    wrong[len(one)] ^= 1
    with pytest.raises(files.CORRUPT):
        opened(bytes(wrong), ending).read()


def test_an_uncompressed_file_is_unchanged():
    assert opened(CONTENT, "").read() == CONTENT


def test_disk_errors_are_not_taken_for_damage(monkeypatch):
    class Failing(io.BytesIO):
        def read(self, size=-1):
            raise OSError(5, "Input/output error")

    for ending in files.COMPRESSIONS:
        with pytest.raises(OSError, match="Input/output error") as caught:
            files.decompressed(Failing(), ending).read()
        assert not isinstance(caught.value, files.CORRUPT)
