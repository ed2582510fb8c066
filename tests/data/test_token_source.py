"""Check the windows of a row of tokens."""

import numpy as np
import pytest

from ttt_jax.config import ConfigError
from ttt_jax.data import token_source
from ttt_jax.data.token_source import TokenSource

BOS = 9
TOKENS = np.array([9, 1, 2, 3, 9, 4, 5, 9, 9, 6, 7, 8, 1], np.uint16)


def of(tokens) -> TokenSource:
    return TokenSource("toy/train", tokens, vocab_size=10, bos=BOS)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 11, 12, 13, 100])
def test_windows_hold_each_target_once(length):
    toy = of(TOKENS)
    assert toy.windows(length) == (13 - 1) // length
    windows = [toy.window(i, length) for i in range(toy.windows(length))]
    for window in windows:
        assert [x.shape for x in window.values()] == [(length,)] * 3
    used = toy.windows(length) * length
    for name, row in (("inputs", TOKENS[:used]), ("targets", TOKENS[1 : used + 1])):
        assert [x for window in windows for x in window[name]] == row.tolist()
    mask = [x for window in windows for x in window["mask"]]
    assert mask == [float(target != BOS) for target in TOKENS[1 : used + 1]]


def test_a_window_shifts_targets_and_masks_bos():
    window = of(TOKENS).window(1, 4)
    np.testing.assert_array_equal(window["inputs"], [9, 4, 5, 9])
    np.testing.assert_array_equal(window["targets"], [4, 5, 9, 9])
    np.testing.assert_array_equal(window["mask"], [1, 1, 0, 0])
    assert {name: x.dtype for name, x in window.items()} == {
        "inputs": np.int32,
        "targets": np.int32,
        "mask": np.float32,
    }


def test_the_fingerprint_depends_on_every_token():
    prints = {of(TOKENS).fingerprint()}
    for i in range(len(TOKENS)):
        changed = TOKENS.copy()
        changed[i] += 1
        prints.add(of(changed).fingerprint())
    prints |= {of(TOKENS[:-1]).fingerprint(), of(TOKENS[::-1]).fingerprint()}
    assert len(prints) == 1 + len(TOKENS) + 2
    assert of(TOKENS.copy()).fingerprint() == of(TOKENS).fingerprint()


def test_check_refuses_small_vocabularies_and_short_sources():
    toy = of(TOKENS)
    token_source.check(toy, vocab_size=10, sequence_length=12)
    token_source.check(toy, vocab_size=11, sequence_length=4, windows=3)
    with pytest.raises(ConfigError) as caught:
        token_source.check(toy, vocab_size=9, sequence_length=12)
    assert str(caught.value) == "model.vocab_size=9: toy/train has 10 tokens; expected 10 or more"
    for length, windows, has in ((13, 1, 0), (4, 4, 3)):
        with pytest.raises(ConfigError) as caught:
            token_source.check(toy, vocab_size=10, sequence_length=length, windows=windows)
        message = f"data.sequence_length={length}: toy/train has 13 tokens, which is {has} windows; expected at least "
        assert str(caught.value) == f"{message}{windows}"
