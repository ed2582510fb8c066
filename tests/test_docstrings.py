"""Check that docstrings are sentences that begin with a verb in the imperative, or for classes also with a noun."""

import ast
import functools
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
OTHER_WORDS = frozenset(  # first words that are no verbs
    """a all also always an and any as at both but by each every few for four from here how if in it its less many more
    most never no nobody nor not nothing of on once one only or same so some still such than that the there these this
    those three to two what when where whether which who why with yet""".split()
)
QUESTION_WORDS = frozenset("how what when where whether which who why".split())
VERBS_IN_S = frozenset("access address compress decompress discuss express focus guess miss pass press process".split())


def begins_with_a_verb(docstring: str) -> bool:
    """Return whether the first word may be a verb in the imperative."""
    word = re.split(r"[\s,:;.]", docstring.strip(), maxsplit=1)[0].lower()
    return word.isalpha() and word not in OTHER_WORDS and (not word.endswith("s") or word in VERBS_IN_S)


def says_what_it_is(docstring: str) -> bool:
    """Return whether the docstring of a class begins with a noun or a verb, not with a question word."""
    word = re.split(r"[\s,:;.]", docstring.strip(), maxsplit=1)[0].lower()
    return word not in QUESTION_WORDS


class Docstring(NamedTuple):
    """A docstring, and where it is."""

    place: str
    of_class: bool
    text: str


@functools.cache
def docstrings(folder: str) -> list[Docstring]:
    """Return the docstrings of all modules, classes, functions and methods in a folder."""
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"
                text = ast.get_docstring(node)
                found += [Docstring(place, isinstance(node, ast.ClassDef), text)] if text else []
    return found


@pytest.mark.parametrize("folder", ["ttt_jax", "configs", "scripts", "tests"])
def test_docstrings_begin_with_a_verb_and_end_as_sentences(folder):
    wrong = []
    for place, _, text in (each for each in docstrings(folder) if not each.of_class):
        first = text.split("\n\n")[0].rstrip()
        if not begins_with_a_verb(text) or first[-1] not in ".:!?`":
            wrong.append(f"{place}: {first.splitlines()[0]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Return the run's name: the name of its folder.", True),
        ("Whether there is one.", False),
        ("Returns nothing.", False),
        ("``W`` after a step.", False),
        ("Process one file.", True),
    ],
)
def test_what_counts_as_a_verb(docstring, expected):
    assert begins_with_a_verb(docstring) == expected


def test_docstrings_of_classes_say_what_they_are():
    of_classes = [each for each in docstrings("ttt_jax") if each.of_class]
    wrong = [f"{each.place}: {each.text.splitlines()[0]}" for each in of_classes if not says_what_it_is(each.text)]
    assert of_classes
    assert not wrong, "\n".join(wrong)
