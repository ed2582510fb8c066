"""Check that a syntax error in a JSON file is located and costs as few values as possible."""

import io
import json
import math

import hypothesis
import pytest
from hypothesis import strategies as st

from ttt_jax.data.prepare import json_values
from ttt_jax.data.prepare.json_values import Malformed, RestError


def read(content, block=1 << 16):
    """Return all values, and the error of the rest if it cannot be read."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_values, "_BLOCK", block)
        try:
            found.extend(json_values.values(io.BytesIO(content.encode())))
        except RestError as error:
            found.append(str(error))
    return found


def bad(what, line, column, end=None):
    up_to = f"; left out up to line {end[0]} column {end[1]}" if end else ""
    return Malformed(f"not JSON: {what}: line {line} column {column}{up_to}")


DELIMITER, COLON, VALUE = "Expecting ',' delimiter", "Expecting ':' delimiter", "Expecting value"
NAME = "Expecting property name enclosed in double quotes"
RECORDS = st.dictionaries(st.text(max_size=5), st.text(max_size=9) | st.integers() | st.none(), max_size=3)
TABLE = [
    ('[1, {"a": 1 "b"}, 3]', [1, bad(DELIMITER, 1, 13, (1, 17)), 3]),
    ('[1,\n {"a": 1\n "b"},\n 3]', [1, bad(DELIMITER, 3, 2, (3, 6)), 3]),
    (
        '[{"a" 1},\n{"b" 2},\n\n {"c" 3}, 4]',
        [bad(COLON, 1, 7, (1, 9)), bad(COLON, 2, 6, (2, 8)), bad(COLON, 4, 7, (4, 9)), 4],
    ),
    ('[{"a": [1}, 2]', [bad(DELIMITER, 1, 10, (1, 11)), 2]),
    ("[{'a': \"}\"}, 2]", [bad(NAME, 1, 3, (1, 12)), 2]),
    ('[{"a": "\\"}]"; 1}, 2]', [bad(DELIMITER, 1, 14, (1, 18)), 2]),
    ('[1, {"a": "x\ty"}, 3]', [1, bad("Invalid control character at", 1, 13, (1, 17)), 3]),
    ("[1, undefined, 'x', 3]", [1, bad(VALUE, 1, 5, (1, 14)), bad(VALUE, 1, 16, (1, 19)), 3]),
    ('[1, "\\x", 3]', [1, bad("Invalid \\escape", 1, 6, (1, 9)), 3]),
    ("[1,, 2,]", [1, bad("no value before ','", 1, 4), 2, bad("no value before ']'", 1, 8)]),
    ('[{"a": 1} {"a": 2}]', [{"a": 1}, bad("expected ',' or ']', found '{'", 1, 11), {"a": 2}]),
    ('{"a": 1} {"a" 2} {"a": 3}', [{"a": 1}, bad(COLON, 1, 15, (1, 17)), {"a": 3}]),
    # If the end of a bad value is unknown, the rest of the file is left out.
    ('[1, {"a": "b}, 3]', [1, "Unterminated string starting at: line 1 column 11"]),
    ("[1, {", [1, f"{NAME}: line 1 column 6"]),
    ("[1, 2", [1, 2, "the array does not end: line 1 column 6"]),
    ("[1, 2\n\n", [1, 2, "the array does not end: line 3 column 1"]),
    ("[1 2]", [1, "expected ',' or ']', found '2': line 1 column 4"]),
    ("[1] 2", [1, "expected the end of the file, found '2': line 1 column 5"]),
    ("1 junk 2", [1, f"{VALUE}: line 1 column 3"]),
    ('[{"a": 1, {"b": 2}]', [bad(NAME, 1, 11, (1, 19))]),
    ("[]", []),
    ("", []),
    ("[1, 23, 4.5e3, NaN]", [1, 23, 4500, pytest.approx(float("nan"), nan_ok=True)]),
]  # fmt: skip


@pytest.mark.parametrize(("content", "expected"), TABLE)
@pytest.mark.parametrize("block", [1, 3, 1 << 16])
def test_bad_values_are_located_and_the_others_are_read(content, expected, block):
    assert read(content, block) == expected


@hypothesis.given(st.lists(RECORDS, max_size=6), st.sampled_from([None, 2]), st.integers(1, 50))
@hypothesis.settings(max_examples=30)
def test_valid_json_is_read_as_the_library_reads_it(values, indent, block):
    assert read(json.dumps(values, indent=indent), block) == values
    assert read(" ".join(json.dumps(value, indent=indent) for value in values), block) == values


def test_a_syntax_error_costs_one_value_wherever_it_is():
    """Replace any character of one record by a quote or a bracket: no other record changes its text."""
    texts = [f"t{i}, {{" for i in range(5)]
    content = json.dumps([{"text": text, "meta": {"n": [1, 2]}} for text in texts], indent=1)
    begin, end = content.index('{\n  "text": "t2'), content.index('{\n  "text": "t3')
    whole = 0
    for place in range(begin, end):
        for wrong in '"{}[],:':
            values = read(content[:place] + wrong + content[place + 1 :], block=64)
            found = [value["text"] for value in values if isinstance(value, dict) and "text" in value]
            assert found[:2] == texts[:2]
            assert {text for text in found[2:] if text not in texts} <= {found[2]} if len(found) > 2 else True
            whole += found[-2:] == texts[3:]
    assert whole == 240  # of 490; if a bracket does not close, the rest is left out


def test_integers_of_any_length_are_numbers():
    assert read(f'[{{"n": {"7" * 5000}}}, {"7" * 5000}, 3]') == [{"n": math.inf}, math.inf, 3]


def test_a_value_without_an_end_is_read_up_to_a_bound(monkeypatch):
    monkeypatch.setattr(json_values, "_LONGEST", 500)
    content = json.dumps([1, "x" * 400, "y" * 2000, 3])
    assert read(content, 64)[:2] == [1, "x" * 400]
    assert read(content, 64)[2].startswith("Unterminated string starting at: line 1 column ")
    assert len(read(content, 64)) == 3
