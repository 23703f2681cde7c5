"""The house: its rooms import one way, as docs/reading.md draws them, and nothing that the project does not have."""
import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = [*sorted(ROOT.glob("*.py")), *sorted((ROOT / "sample").glob("*.py"))]
ROOMS = {path.stem: ast.parse(path.read_text()) for path in sorted(ROOT.glob("*.py"))}
ALLOWED = set(sys.stdlib_module_names) | {"torch", "numpy", "PIL", "tqdm"}


def imported(tree):
    """Names of the modules that a file imports, anywhere in it, with the lines' columns."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0], node


def arrows():
    """Room -> the rooms that it imports."""
    return {room: {name for name, _ in imported(tree)} & set(ROOMS) for room, tree in ROOMS.items()}


def drawing():
    """Room -> the rooms that it imports, in the drawing's order."""
    section = (ROOT / "docs" / "reading.md").read_text().split("## Who imports whom")[1]
    lines = re.search(r"```\w*\n(.*?)```", section, re.S).group(1).splitlines()
    drawn = {}
    for line in lines:
        if ":" in line:  # else the line goes on with the room before
            room, _, line = line.partition(":")
            drawn[room] = set()
        drawn[room] |= {name.strip() for name in line.split(",") if name.strip()}
    return drawn


def test_the_arrows_are_drawn_as_they_are():
    assert drawing() == arrows()


def test_imports_go_one_way():
    """Every room imports only rooms that stand above it in the drawing: so there is no circle."""
    above = set()
    for room, names in drawing().items():
        assert names <= above, f"{room}.py imports {names - above}, which do not stand above it"
        above.add(room)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_stand_at_the_top(room):
    tree = ROOMS[room]
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    functions = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    for function in functions:
        assert not list(imported(function)), f"{room}.py, line {function.lineno}: an import inside a function"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_only_the_projects_packages(path):
    ours = {*ROOMS, "sample"} | {p.stem for p in (ROOT / "sample").glob("*.py")}
    names = {name for name, _ in imported(ast.parse(path.read_text()))}
    assert names <= ALLOWED | ours


def test_test_modules_import_no_test_module():
    for path in (ROOT / "tests").glob("test_*.py"):
        names = {name for name, _ in imported(ast.parse(path.read_text()))}
        assert not [name for name in names if name.startswith("test_")], path.name


def test_every_room_is_packed():
    text = (ROOT / "pyproject.toml").read_text()
    modules = re.search(r"py-modules = \[(.*?)\]", text, re.S).group(1)
    assert set(re.findall(r'"(\w+)"', modules)) == set(ROOMS)
