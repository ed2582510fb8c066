"""Words of messages."""

from ttt_jax.terminal.console import counted, first_few


def test_one_is_not_many():
    assert [counted(n, "file") for n in (0, 1, 2, 1234)] == ["0 files", "1 file", "2 files", "1,234 files"]


def test_names_beyond_the_first_few_are_counted():
    assert first_few(["a", "b"], 2) == "a, b"
    assert first_few(["a", "b", "c"], 2) == "a, b and 1 more"
