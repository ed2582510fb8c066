"""Check how functions are found, hashed and imported by import path, and what is refused before any of it runs."""

import hashlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from refusals import error_of

from ttt_jax import import_path
from ttt_jax.errors import ConfigError

KEY = "model.ttt.learner"
GATED = "def gated(dense, x):\n    return dense(x, 4)\n\n\nwidth = 3\n"


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """Return a function that makes a package ``lab`` on ``PYTHONPATH`` from {module: text} and returns its folder.

    Each module, and the package itself, leaves a mark in a file when it is imported.
    """
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.chdir(tmp_path.parent)

    def make(modules):
        folder = tmp_path / "lab"
        folder.mkdir()
        marker = f"open({str(tmp_path / 'imported')!r}, 'a').write(__name__ + ' ')\n"
        for name, text in {"__init__": "", **modules}.items():
            (folder / f"{name}.py").write_text(marker + text)
        return folder

    yield make
    for name in [name for name in sys.modules if name.partition(".")[0] == "lab"]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("mylab.learners:gated", True),
        ("learners:f", True),
        ("linear", False),
        ("", False),
        (":f", False),
        ("mylab:", False),
        ("mylab.:f", False),
        ("my-lab:f", False),
        ("mylab:f()", False),
        ("mylab:a.b", False),
        ("mylab:f:g", False),
        ("/tmp/mylab.py:f", False),
        ("mylab: f", False),
    ],
)
def test_import_paths_are_recognised(text, is_one):
    assert import_path.is_import_path(text) == is_one
    if not is_one:
        for function in (import_path.load, import_path.source_hash):
            assert error_of(ConfigError, function, text, KEY) == (
                f"{KEY}={text!r}: not an import path; expected MODULE:NAME, such as mylab.learners:gated"
            )


def test_a_function_is_imported_and_its_source_hashed(lab):
    folder = lab({"learners": GATED})
    assert import_path.source_file("lab.learners:gated", KEY) == (folder / "learners.py").resolve()
    expected = hashlib.sha256((folder / "learners.py").read_bytes()).hexdigest()
    assert import_path.source_hash("lab.learners:gated", KEY) == expected
    assert (
        import_path.source_hash("lab:anything", KEY)
        == hashlib.sha256((folder / "__init__.py").read_bytes()).hexdigest()
    )
    assert not (folder.parent / "imported").exists()  # so far nothing has run
    found = import_path.load("lab.learners:gated", KEY, expected)
    assert found is sys.modules["lab.learners"].gated
    assert (folder.parent / "imported").read_text() == "lab lab.learners "


def test_a_changed_source_is_refused_before_it_runs(lab):
    folder = lab({"learners": GATED})
    there = import_path.source_hash("lab.learners:gated", KEY)
    (folder / "learners.py").write_text((folder / "learners.py").read_text() + "# a comment\n")
    here = import_path.source_hash("lab.learners:gated", KEY)
    message = error_of(ConfigError, import_path.load, "lab.learners:gated", KEY, there)
    assert message == (
        f"{KEY}='lab.learners:gated': {folder / 'learners.py'} has changed since the run began (its SHA-256 was "
        f"{there[:12]}..., it is {here[:12]}...); expected the file as it was, a new run, or "
        "ttt train --accept-changed-learner to continue this run with the changed file"
    )
    assert not (folder.parent / "imported").exists()


def test_modules_in_packages_without_init_and_in_the_current_folder_are_found(tmp_path, monkeypatch):
    nested = tmp_path / "lab_ns" / "deep"
    nested.mkdir(parents=True)
    (nested / "learners.py").write_text(GATED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    assert import_path.source_file("lab_ns.deep.learners:gated", KEY) == (nested / "learners.py").resolve()
    assert callable(import_path.load("lab_ns.deep.learners:gated", KEY))
    assert sys.path[-1] == str(tmp_path)  # behind all others
    for name in ("lab_ns.deep.learners", "lab_ns.deep", "lab_ns"):
        del sys.modules[name]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nolab.learners:gated", "no module nolab.learners here; expected one that is installed, in a folder of"),
        ("lab.nowhere:gated", "no module lab.nowhere here; expected one"),
        ("lab.learners.deeper:gated", "no module lab.learners.deeper here; expected one"),
        ("lab.learners:gatd", "{lab}/learners.py defines no gatd; did you mean lab.learners:gated?"),
        ("lab.learners:zzz", "{lab}/learners.py defines no zzz; expected the name of a function in it"),
        ("lab.learners:width", "is of type int; expected a function"),
        ("lab.raises:f", "importing lab.raises fails: {lab}/raises.py, line 3: ZeroDivisionError: division by zero"),
        ("lab.ends:f", "importing lab.ends fails: {lab}/ends.py, line 2: SystemExit: 3"),
        ("lab.misspelt:f", "importing lab.misspelt fails: {lab}/misspelt.py, line 2: SyntaxError: "),
        ("lab.needs:f", "importing lab.needs fails: {lab}/needs.py, line 2: ModuleNotFoundError: No module named 'nob"),
    ],
)
def test_a_failed_import_is_described_in_one_line(lab, text, said):
    folder = lab(
        {
            "learners": GATED,
            "raises": "x = 1\n1 / 0\n",
            "ends": "raise SystemExit(3)\n",
            "misspelt": "def f(:\n",
            "needs": "import nobody_has_this\n",
        }
    )
    message = error_of(ConfigError, import_path.load, text, KEY)
    assert message.startswith(f"{KEY}={text!r}: {said.format(lab=folder)}"), message


def test_a_module_without_source_has_no_hash():
    message = error_of(ConfigError, import_path.source_hash, "math:sin", KEY)
    assert message == f"{KEY}='math:sin': module math has no source file; expected a module in a .py file"


def test_a_module_in_a_workdir_is_refused_without_importing_its_package(lab):
    folder = lab({"learners": GATED})
    root = folder.parent
    for workdir in (root, folder):
        message = error_of(ConfigError, import_path.check_outside, "lab.learners:gated", KEY, workdir)
        assert message.startswith(f"{KEY}='lab.learners:gated': {folder}/__init__.py is inside the workdir {workdir}, ")
    (root / "link").symlink_to(root)
    assert "inside the workdir" in error_of(
        ConfigError, import_path.check_outside, "lab.learners:gated", KEY, root / "link"
    )
    assert not (root / "imported").exists()
    import_path.check_outside("lab.learners:gated", KEY, root / "runs" / "a")
    import_path.check_outside("lab.missing:gated", KEY, root / "runs" / "a")
    import_path.check_outside("nowhere:gated", KEY, root)


def test_a_module_must_be_among_the_files_sent_to_other_machines(lab):
    folder = lab({"learners": GATED})
    root = folder.parent
    there = [Path("lab/__init__.py"), Path("lab/learners.py")]
    for sent in (None, there):
        import_path.check_sent("lab.learners:gated", KEY, root, sent)
        import_path.check_sent("lab:anything", KEY, root, sent)
    for other_root, sent in ((root.parent, None), (folder, None), (root, there[:1])):
        message = error_of(ConfigError, import_path.check_sent, "lab.learners:gated", KEY, other_root, sent)
        assert message.startswith(
            f"{KEY}='lab.learners:gated': {folder}/learners.py would be missing on other machines; expected the module "
            f"at {other_root}/lab/learners.py, which they get"
        )
    assert not (root / "imported").exists()


def test_the_example_of_the_docs_is_a_learner(lab):
    section = (
        (Path(__file__).resolve().parents[1] / "docs/recipes.md").read_text().partition("## A learner of your own")[2]
    )
    lab({"learners": re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]})
    gated = import_path.load(re.search(r"model\.ttt\.learner=my(lab[\w.:]+)", section)[1], KEY)
    widths = []

    def dense(x, features):
        widths.append((x.shape[-1], features))
        return np.ones((*x.shape[:-1], features))

    assert gated(dense, np.ones((3, 4))).shape == (3, 4)
    assert widths == [(4, 8), (4, 8), (8, 4)]
