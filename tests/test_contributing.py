"""Apply the changes that CONTRIBUTING.md shows to a copy of the package, and test the copy."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DIFFS = re.findall(r"```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
MOST_LINES = {
    "ttt_jax/ttt/learners.py": 10,
    "ttt_jax/ttt/objective.py": 6,
    "ttt_jax/ttt/update.py": 15,
    "ttt_jax/mixers/__init__.py": 1,
    "ttt_jax/mixers/gated_average.py": 115,
}


def test_each_changes_a_few_lines_of_one_file():
    changed = {}
    for diff in DIFFS:
        (path,) = re.findall(r"^\+\+\+ b/(.*)$", diff, re.MULTILINE)
        changed[path] = len(re.findall(r"^[+-](?!\+\+ |-- )", diff, re.MULTILINE))
    assert changed.keys() == MOST_LINES.keys()
    assert all(0 < changed[path] <= most for path, most in MOST_LINES.items()), changed


@pytest.mark.slow
def test_they_work_by_their_config_names(tmp_path):
    """Check that the tests of registered choices, run in the copy, find the new names and pass."""
    parts = ["ttt_jax", "configs", "pyproject.toml", "tests/ttt", "tests/mixers", "tests/configs"]
    for name in [*parts, *(f"tests/{path.name}" for path in (ROOT / "tests").glob("*.py"))]:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (tmp_path / name).parent.mkdir(exist_ok=True)
        copy(ROOT / name, tmp_path / name)
    outside = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent), "PYTHONPATH": str(tmp_path)}
    for diff in DIFFS:
        subprocess.run(["git", "apply", "-"], input=diff, cwd=tmp_path, env=outside, text=True, check=True)
    tests = ["tests/ttt/test_choices.py", "tests/ttt/test_learner.py", "tests/mixers", "tests/configs"]
    tests += ["-k", "bilinear or huber or -normalise or gated_average or remembered"]
    command = [sys.executable, "-m", "pytest", "-n", "0", "-rA", *tests]
    done = subprocess.run(command, cwd=tmp_path, env=outside, capture_output=True, text=True)
    passed = re.findall(r"^PASSED .*::(test_\w+)\[(.*)\]$", done.stdout, re.MULTILINE)
    assert done.returncode == 0, done.stdout
    assert ("test_registered_learners_keep_the_rules", "bilinear") in passed
    assert len([names for _, names in passed if "gated_average" in names]) > 20
    assert "test_all_recipes_are_as_remembered" in done.stdout
    for name in ("bilinear-", "-huber-", "-normalise"):
        assert any(test.startswith("test_registered_choices") and name in f"{names}" for test, names in passed), passed
