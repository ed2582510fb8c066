"""Check that imports follow the table of docs/design.md, and that modules import each other in no circle."""

import ast
import functools
import graphlib
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest

import ttt_jax

PACKAGE = Path(ttt_jax.__file__).parent
DESIGN = PACKAGE.parent / "docs" / "design.md"
ALL = "all"
LIMIT = 350  # lines of a file


def _table() -> dict[str, set[str]]:
    """Return the rooms of the table, in its order, with those that each may import."""
    section = DESIGN.read_text().partition("## Rooms and imports")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|.*\|([^|]*)\|$", section, re.MULTILINE)
    names = [name for name, _ in rows]
    return {name: set(names) - {name} if ALL in text else set(re.findall(r"\w+", text)) for name, text in rows}


TABLE = _table()


def _files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem in TABLE)


class Import(NamedTuple):
    """An import statement, or a part of one."""

    line: int
    name: str  # dotted, of a module or of a name in one
    for_types: bool  # below ``if TYPE_CHECKING``: left out when the program runs


@functools.cache
def _imports(path: Path) -> list[Import]:
    """Return all imports of a file, also those inside functions."""
    found: list[Import] = []
    waiting: list[tuple[ast.AST, bool]] = [(ast.parse(path.read_text()), False)]
    while waiting:
        node, for_types = waiting.pop()
        if isinstance(node, ast.Import):
            found += [Import(node.lineno, alias.name, for_types) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            found += [Import(node.lineno, f"{node.module}.{alias.name}", for_types) for alias in node.names]
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += [(each, True) for each in node.body] + [(each, for_types) for each in node.orelse]
        elif not isinstance(node, ast.expr):
            waiting += [(each, for_types) for each in ast.iter_child_nodes(node)]
    return found


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def _module(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def test_table_lists_every_room():
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert set(TABLE) == found - {"__init__", "__main__"}


def test_imports_follow_the_table():
    wrong, used = [], defaultdict(set)
    for path in _files():
        for line, name, _ in _imports(path):
            if name.startswith("ttt_jax.") and (other := name.split(".")[1]) in TABLE and other != _room(path):
                used[_room(path)].add(other)
                if other not in TABLE[_room(path)]:
                    wrong.append(f"{path.relative_to(PACKAGE.parent)}:{line}: {_room(path)} imports {other}")
    assert not wrong, "\n".join(wrong)
    unused = {room: TABLE[room] - used[room] for room in TABLE if room != "cli" and TABLE[room] - used[room]}
    assert not unused, f"docs/design.md allows imports that no file needs: {unused}"


def test_table_has_no_circle():
    order = list(graphlib.TopologicalSorter(TABLE).static_order())
    assert set(order) == set(TABLE)


def test_modules_do_not_import_each_other_in_a_circle():
    names = {_module(path): path for path in _files()}
    graph: dict[str, set[str]] = {name: set() for name in names}
    for name, path in names.items():
        for each in _imports(path):
            if each.for_types:
                continue
            parts = each.name.split(".")
            prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))  # a module, or a name in a module
            graph[name] |= {next((prefix for prefix in prefixes if prefix in names), name)} - {name}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_rows_come_after_the_rooms_that_they_import():
    known: set[str] = set()
    for room, others in TABLE.items():
        assert others <= known, f"{room} comes before {sorted(others - known)}"
        known.add(room)


@pytest.mark.parametrize(
    ("module", "rooms"),
    [
        ("matplotlib", {"figures"}),
        ("ray", {"data", "ray_cluster", "sweep"}),
        ("jax._src", {"distributed"}),  # its file says with which versions it was tested
    ],
)
def test_who_imports_a_package(module, rooms):
    found = {
        _room(path)
        for path in _files()
        for each in _imports(path)
        if each.name == module or each.name.startswith(f"{module}.")
    }
    assert found <= rooms


def test_one_file_of_the_tests_uses_private_parts_of_jax():
    root = PACKAGE.parent
    paths = [path for folder in ("tests", "scripts") for path in (root / folder).rglob("*.py")]
    named = [path for path in paths if "jax._src" in path.read_text()]
    found = [path for path in named if any(each.name.startswith("jax._src") for each in _imports(path))]
    assert found == [root / "tests" / "ttt_process.py"]


def test_the_inner_loop_depends_on_jax_alone():
    allowed = {"jax", "numpy", "ttt_jax", "collections", "dataclasses", "functools", "math", "operator", "re", "typing"}
    found = {each.name.split(".")[0] for path in (PACKAGE / "ttt").glob("*.py") for each in _imports(path)}
    assert found <= allowed


def test_no_file_is_long():
    root = PACKAGE.parent
    paths = [*_files(), *(path for folder in ("tests", "scripts", "configs") for path in (root / folder).rglob("*.py"))]
    lines = {str(path.relative_to(root)): path.read_text().count("\n") for path in paths}
    assert {path: n for path, n in lines.items() if n > LIMIT} == {}
