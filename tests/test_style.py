"""The house rules that a program can check."""

import ast
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

FOLDERS = ("pipeline", "stages", "reward_data", "benchmarks")
ALLOWED = {"stages": {"stages", "pipeline", "reward_data"}, "pipeline": {"pipeline", "reward_data"}, "reward_data": set()}


def sources() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


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


def test_every_function_says_what_it_returns() -> None:
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name not in ("__init__", "forward"):
                assert node.returns is not None, f"{path.relative_to(ROOT)}: {node.name} has no return type"


def test_no_pickles_and_no_remote_code() -> None:
    for path in sources():
        text = path.read_text()
        assert "trust_remote_code=True" not in text and "import pickle" not in text and "weights_only=False" not in text
