"""Check that no code outside of a mixer's file compares names of mixers."""

import ast
from pathlib import Path

import pytest

import ttt_jax
from ttt_jax.mixers import MIXERS

PACKAGE = Path(ttt_jax.__file__).parent


def comparisons_with_mixers(source):
    """Yield the lines that compare something called ``mixer``, or compare with a registered name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq | ast.NotEq | ast.In | ast.NotIn):
            operands = [node.left, *node.comparators]
        elif isinstance(node, ast.Match):
            operands = [node.subject]
        else:
            continue
        for operand in operands:
            if _is_called_mixer(operand) or any(
                isinstance(each, ast.Constant) and each.value in MIXERS for each in _elements(operand)
            ):
                yield node.lineno


def _elements(operand):
    return operand.elts if isinstance(operand, ast.Tuple | ast.List | ast.Set) else [operand]


def _is_called_mixer(operand):
    if isinstance(operand, ast.Subscript):
        return isinstance(operand.slice, ast.Constant) and operand.slice.value in ("mixer", "model.mixer")
    return getattr(operand, "attr", getattr(operand, "id", None)) == "mixer"


def test_no_mixer_is_compared_by_name():
    files = [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE / "mixers"]
    assert len(files) > 100
    found = [
        f"{path.relative_to(PACKAGE)}:{line}" for path in files for line in comparisons_with_mixers(path.read_text())
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "if model.mixer == 'mine': pass",
        "x = c['model']['mixer'] != other",
        "x = mixer in ('a', 'b')",
        "x = name in ('a', 'attention')",
        "x = 'ttt_linear' == name",
        "match model.mixer:\n  case 'a': pass",
    ],
)
def test_comparisons_are_reported(source):
    assert list(comparisons_with_mixers(source)) == [1]


def test_other_uses_of_names_are_not_reported():
    source = (
        "x = MIXERS[model.mixer].learns == y\nz = name in MIXERS\nw = {'model.mixer': 'ttt_linear'}\nv = mixer is None"
    )
    assert list(comparisons_with_mixers(source)) == []
