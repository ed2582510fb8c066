"""Test the words for numbers and lists in messages, and the whole numbers of the command line."""

import argparse

import pytest

from ttt_jax.terminal.console import at_least, count, counted, counts, duration, first_few


def test_nouns_have_a_plural_except_after_one():
    assert [counted(n, "file") for n in (0, 1, 2, 1234)] == ["0 files", "1 file", "2 files", "1,234 files"]


def test_names_beyond_the_first_few_are_counted():
    assert first_few(["a", "b"], 2) == "a, b"
    assert first_few(["a", "b", "c"], 2) == "a, b and 1 more"


def test_durations_have_hours_where_there_are_some():
    assert [duration(seconds) for seconds in (0, 7.4, 59.6, 3723, 36000)] == [
        "0:00",
        "0:07",
        "1:00",
        "1:02:03",
        "10:00:00",
    ]


def test_whole_numbers_are_parsed():
    assert (at_least(0)("0"), at_least(2)(" 12 ")) == (0, 12)
    assert counts("2048, 8k") == [2048, 8192]
    assert count("2k") == 2048


@pytest.mark.parametrize(
    ("parse", "text", "expected"),
    [
        (at_least(1), "0", "'0': expected 1 or more"),
        (at_least(0), "-1", "'-1': expected 0 or more"),
        (at_least(0), "1.5", "'1.5': expected 0 or more"),
        (counts, "8,,9", "'': expected integers from 1, such as 2048 or 2k,8k"),
        (counts, "0k", "'0k': expected integers from 1"),
        (counts, "k", "'k': expected integers from 1"),
        (count, "1,2", "'1,2': expected one integer from 1, such as 2048 or 2k"),
    ],
)
def test_other_texts_are_refused(parse, text, expected):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        parse(text)
    assert str(error.value).startswith(expected)
