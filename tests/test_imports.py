"""Check that imports follow the table of docs/design.md, and that modules import each other in no circle."""

import ast
import graphlib
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

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


def _imports(path: Path, for_types: bool = True) -> Iterator[tuple[int, str]]:
    """Yield the line and the dotted name of every module that a file imports, also inside functions.

    Args:
      for_types: also those below ``if TYPE_CHECKING``, which are not imported when the program runs.
    """
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if not for_types and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


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
        for line, name in _imports(path):
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
        for _, imported in _imports(path, for_types=False):
            parts = imported.split(".")
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
        for _, name in _imports(path)
        if name == module or name.startswith(f"{module}.")
    }
    assert found <= rooms


def test_one_file_of_the_tests_uses_private_parts_of_jax():
    root = PACKAGE.parent
    paths = [path for folder in ("tests", "scripts") for path in (root / folder).rglob("*.py")]
    found = {str(path.relative_to(root)) for path in paths for _, name in _imports(path) if name.startswith("jax._src")}
    assert found == {"tests/ttt_process.py"}


def test_the_inner_loop_depends_on_jax_alone():
    allowed = {"jax", "numpy", "ttt_jax", "collections", "dataclasses", "functools", "math", "operator", "re", "typing"}
    found = {name.split(".")[0] for path in (PACKAGE / "ttt").glob("*.py") for _, name in _imports(path)}
    assert found <= allowed


def test_no_file_is_long():
    root = PACKAGE.parent
    paths = [*_files(), *(path for folder in ("tests", "scripts", "configs") for path in (root / folder).rglob("*.py"))]
    lines = {str(path.relative_to(root)): path.read_text().count("\n") for path in paths}
    assert {path: n for path, n in lines.items() if n > LIMIT} == {}
