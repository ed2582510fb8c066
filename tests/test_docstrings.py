"""Check that docstrings are sentences that begin with a verb in the imperative, or for classes also with a noun."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

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


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the docstring of a module and of each of its functions and methods."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef) and (found := ast.get_docstring(node)):
            yield getattr(node, "lineno", 1), found


@pytest.mark.parametrize("folder", ["ttt_jax", "configs", "scripts", "tests"])
def test_docstrings_begin_with_a_verb_and_end_as_sentences(folder):
    wrong = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for line, text in docstrings(path):
            first = text.split("\n\n")[0].rstrip()
            if not begins_with_a_verb(text) or first[-1] not in ".:!?`":
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {first.splitlines()[0]}")
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
    wrong = []
    for path in sorted((ROOT / "ttt_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and (text := ast.get_docstring(node)) and not says_what_it_is(text):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {text.splitlines()[0]}")
    assert not wrong, "\n".join(wrong)
