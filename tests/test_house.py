"""The house: which folder may import which, no import inside a function, and nothing that the project does not have."""
import ast
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = ["cameras", "metrics", "eft", "vae", "unet", "vldm", "sparsefusion", "hashgrid", "ngp", "volume",
            "distillation", "presets"]
COMMANDS = ["distill", "evaluate", "train", "check", "render"]
# What stands left imports nothing from its right; a set is one place, whose members do not know each other.
ORDER = ["common", "gpu", *CHAPTERS, "datasets", "photographs", "checkpoints", "export", {"reconstruction", "training"},
         "evaluation", {*COMMANDS}, {"experiments", "sample"}]
PACKAGES = {"torch", "numpy", "PIL", "tqdm"}
FILES = [path for path in sorted(ROOT.glob("*.py")) + sorted(ROOT.glob("[a-z]*/**/*.py"))
         if path.relative_to(ROOT).parts[0] not in ("tests", "output")]
TREES = {path: ast.parse(path.read_text()) for path in FILES}


def place(name: str) -> int:
    """Where a folder or a module of the root stands in the order."""
    return next(i for i, one in enumerate(ORDER) if name == one or isinstance(one, set) and name in one)


def imports(tree: ast.AST) -> list[tuple[int, str]]:
    """Line and first name of everything that is imported, anywhere in a file."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name.split(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.lineno, node.module.split(".")[0]))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    """Only the project's packages, nothing from the right in `ORDER`, nothing inside a function."""
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    ours = {name for one in ORDER for name in ([one] if isinstance(one, str) else one)}
    for line, name in imports(TREES[path]):
        assert name in ours | PACKAGES | set(sys.stdlib_module_names), f"{path}, line {line}: {name} is not installed"
        if name in ours and name != room:
            assert place(name) < place(room), f"{path}, line {line}: {room} imports {name}"
    for node in ast.walk(TREES[path]):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            assert not imports(node), f"{path}, line {node.lineno}: an import inside a function"


def test_streams_of_random_numbers_have_names_of_their_own():
    """Every seed is a `stream_seed`, but the permutation of frames, which is the released one, and the bench's."""
    names = []
    for path in FILES:
        if path.relative_to(ROOT).parts[0] in ("sample", "experiments") or path.name == "protocol.py":
            continue
        for line in path.read_text().splitlines():
            if "manual_seed(" in line:
                assert "manual_seed(stream_seed(" in line, f"{path}: {line}"
                names.append(re.sub(r".*stream_seed\([\w.]+, (.*?)\)+(\.to.*)?$", r"\1", line))
    assert len(names) == len(set(names)) >= 9, names


def test_the_root_is_the_paper():
    """Chapters and commands, each of them in the order, and no kernels."""
    assert {path.stem for path in ROOT.glob("*.py")} == {*CHAPTERS, *COMMANDS, "reconstruction"}
    assert not list(ROOT.glob("*.cu"))


def test_folders_hide_no_package_and_are_hidden_by_none():
    for folder in {path.parent for path in FILES} - {ROOT}:
        assert (folder / "__init__.py").read_text() == "", folder


@pytest.mark.parametrize("line, status", [("assert True", 0), ("assert False", 1), ("os.abort()", 6)])
def test_files_of_tests_are_shared_out(line, status):
    """Each is run by one of the processes, and the status is the worst of theirs."""
    with tempfile.TemporaryDirectory(dir=ROOT / "tests") as folder:
        for n, text in enumerate(("assert True", "assert True", line)):
            lines = ["import os, time", "", "def test_it():", "    time.sleep(1)", f"    {text}", ""]
            (Path(folder) / f"test_{n}.py").write_text("\n".join(lines))
        command = [sys.executable, "-m", "tests", "-p", "no:cacheprovider", folder]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    count = Counter()
    for number, outcome in re.findall(r"(\d+) (passed|failed)", ran.stdout):
        count[outcome] += int(number)
    assert ran.returncode == status, ran.stdout
    if status < 2:
        assert count == Counter(passed=3 - status, failed=status), ran.stdout
