"""What of a text a tokenizer loses: texts that differ in it get the same tokens."""

import numpy as np

from ttt_jax.data.prepare.tokenizer import Tokenizer

_WITH_AND_WITHOUT = {
    "line ends": ("a\nb", "a b"),
    "repeated spaces": ("a  b", "a b"),
    "spaces at the end": ("a ", "a"),
    "control characters": ("a\x01b", "ab"),
    "capitals": ("Ab", "ab"),
    "accents": ("ä", "a"),
    "compatibility characters": ("ﬁ", "fi"),
}


def lost(tokenizer: Tokenizer) -> list[str]:
    """Return what a tokenizer loses, in words. Characters without a token are no part of it: they are counted."""
    if tokenizer.kind == "byte":
        return []
    encode, found = tokenizer.encoder(), []
    for what, texts in _WITH_AND_WITHOUT.items():
        try:
            first, second = map(encode, texts)
        except ValueError:  # no token for some of them, which is said of the documents that have them
            continue
        if np.array_equal(first, second) and tokenizer.unknown not in first:
            found.append(what)
    return found
