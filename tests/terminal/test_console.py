"""Test the words for numbers and lists in messages."""

from ttt_jax.terminal.console import counted, first_few


def test_nouns_have_a_plural_except_after_one():
    assert [counted(n, "file") for n in (0, 1, 2, 1234)] == ["0 files", "1 file", "2 files", "1,234 files"]


def test_names_beyond_the_first_few_are_counted():
    assert first_few(["a", "b"], 2) == "a, b"
    assert first_few(["a", "b", "c"], 2) == "a, b and 1 more"
