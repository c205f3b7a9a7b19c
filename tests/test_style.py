"""The house rules that a program can check."""

import ast
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

FOLDERS = ("pipeline", "stages", "reward_data", "benchmarks")
ALLOWED = {"stages": {"pipeline", "reward_data"}, "pipeline": {"reward_data"}, "reward_data": set()}


def sources(folders: tuple[str, ...] = FOLDERS) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_ruff_is_clean() -> None:
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_imports_go_one_way() -> None:
    for path in sources():
        folder = path.relative_to(ROOT).parts[0]
        if folder not in ALLOWED:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                top = name.split(".")[0]
                if top in ("stages", "pipeline", "reward_data") and top != folder:
                    assert top in ALLOWED[folder], f"{path.relative_to(ROOT)} imports {name}"


def test_files_are_short() -> None:
    for path in sources():
        lines = len(path.read_text().splitlines())
        assert lines <= 450, f"{path.relative_to(ROOT)} has {lines} lines"


def test_functions_say_what_they_return() -> None:
    for path in sources(FOLDERS[:3]):
        tree = ast.parse(path.read_text())
        bodies = [tree.body, *(node.body for node in tree.body if isinstance(node, ast.ClassDef))]
        for node in (node for body in bodies for node in body if isinstance(node, ast.FunctionDef)):
            if node.name != "__init__":
                assert node.returns is not None, f"{path.relative_to(ROOT)}: {node.name} has no return type"


def test_no_pickles_and_no_remote_code() -> None:
    for path in sources():
        text = path.read_text()
        assert "trust_remote_code=True" not in text and "import pickle" not in text and "weights_only=False" not in text
