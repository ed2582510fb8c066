"""Compressed streams: all of them, or an error; and every place in them."""

import bz2
import gzip
import io
import lzma

import pytest
from backports import zstd

from ttt_jax.data.prepare import decompression

PACK = {"zst": zstd.compress, "zstd": zstd.compress, "gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}
CONTENT = bytes(range(256)) * 40


def opened(packed, ending):
    return decompression.decompressed(io.BytesIO(packed), ending)


@pytest.mark.parametrize("ending", decompression.ENDINGS)
def test_streams_one_after_another_are_one_and_every_place_can_be_gone_to(ending):
    packed = b"".join(PACK[ending](CONTENT[i : i + 3000]) for i in range(0, len(CONTENT), 3000))
    stream = opened(packed, ending)
    assert stream.read() == CONTENT
    for place in (0, 9000, 3001, 3000, 2999, len(CONTENT), 1):
        stream.seek(place)
        assert stream.tell() == place
        assert stream.read(4000) == CONTENT[place : place + 4000]


@pytest.mark.parametrize("ending", decompression.ENDINGS)
def test_no_part_of_two_streams_is_taken_for_the_whole(ending):
    """Cut anywhere but behind the first, or a bit wrong where the second begins."""
    one, two = PACK[ending](b"first"), PACK[ending](b"second")
    assert opened(one + two, ending).read() == b"firstsecond"
    for length in set(range(1, len(one + two))) - {len(one)}:
        with pytest.raises(decompression.CORRUPT):
            opened((one + two)[:length], ending).read()
    wrong = bytearray(one + two)
    wrong[len(one)] ^= 1
    with pytest.raises(decompression.CORRUPT):
        opened(bytes(wrong), ending).read()


def test_what_is_not_compressed_is_as_it_is():
    assert opened(CONTENT, "").read() == CONTENT


def test_errors_of_the_disk_are_no_damage(monkeypatch):
    class Failing(io.BytesIO):
        def read(self, size=-1):
            raise OSError(5, "Input/output error")

    for ending in decompression.ENDINGS:
        with pytest.raises(OSError, match="Input/output error") as caught:
            decompression.decompressed(Failing(), ending).read()
        assert not isinstance(caught.value, decompression.CORRUPT)
