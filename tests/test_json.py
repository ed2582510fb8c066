"""Test that JSON files, and JSON that commands print, hold no bare NaN or Infinity."""

import ast
import json
import math
from pathlib import Path

import pytest

import ttt_jax
from ttt_jax.cli import plan
from ttt_jax.evaluation.probes.cells import Cells
from ttt_jax.storage import json_files

PACKAGE = Path(ttt_jax.__file__).parent
WRITERS = (
    *("evaluation", "sweep", "planning", "interop"),
    *("cli/plan.py", "cli/sweep_report.py", "cli/harness.py", "storage/json_files.py"),
)


def test_nan_in_the_cells_of_an_earlier_version_becomes_null(tmp_path):
    path = tmp_path / "probe" / "needle.json"
    path.parent.mkdir()
    path.write_text('{"cells": [{"step": 1, "share": NaN}]}')
    Cells(tmp_path, "needle", ["step"]).add({"step": 2, "share": math.inf}, {"model": "m"})
    json.loads(path.read_text(), parse_constant=pytest.fail)
    cells = [{"step": 1, "share": None}, {"step": 2, "share": None}]
    assert json_files.read_object(path) == {"model": "m", "cells": cells}


def test_infinite_numbers_of_a_plan_become_null():
    printed = plan._json({"hours": math.inf, "memory": {"total": 3}, "tried": [math.nan]})
    assert json.loads(printed, parse_constant=pytest.fail) == {"hours": None, "memory": {"total": 3}, "tried": [None]}


def test_writers_of_indented_json_refuse_nan():
    """Check every call that writes indented JSON: files for people and other programs are indented, hashes are not."""
    found = []
    for place in WRITERS:
        for path in sorted((PACKAGE / place).rglob("*.py")) if (PACKAGE / place).is_dir() else [PACKAGE / place]:
            for call in ast.walk(ast.parse(path.read_text())):
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "json.dumps":
                    options = {option.arg: ast.unparse(option.value) for option in call.keywords}
                    if "indent" in options:
                        found.append((path.name, options.get("allow_nan")))
    assert len(found) >= 4
    assert [name for name, allowed in found if allowed != "False"] == []
