"""The house rules that a program can check."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

FOLDERS = ("pipeline", "stages", "reward_data", "benchmarks")
ALLOWED = {"stages": {"pipeline", "reward_data"}, "pipeline": {"reward_data"}, "reward_data": set()}


def sources(folders: tuple[str, ...] = FOLDERS) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_ruff_is_clean() -> None:
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def imported(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            files = {name for name in whole if (ROOT / name.replace(".", "/")).with_suffix(".py").exists()}
            names |= files or {node.module}
    return names


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_imports_go_one_way() -> None:
    for path in sources():
        folder = path.relative_to(ROOT).parts[0]
        for name in imported(path):
            top = name.split(".")[0]
            if folder in ALLOWED and top in ALLOWED and top != folder:
                assert top in ALLOWED[folder], f"{path.relative_to(ROOT)} imports {name}"


# Inside pipeline/: what the files of each folder may import; a file directly in it stands under its own name
ROOMS = {
    "text": {"errors", "trackers"},
    "model": {"errors", "text"},
    "rewards": {"errors", "text", "model"},
    "judging": {"errors", "text", "model"},
    "checkpoint": {"errors", "identity"},
    "ppo": {"errors", "bounds", "identity", "checkpoint", "lock", "trackers", "text", "model", "rewards", "judging"},
    "report": {"errors", "chain", "judging"},
    "export": {"errors", "checkpoint", "text", "model", "report"},
    "runtime": {"errors", "bounds", "identity", "checkpoint", "lock", "trackers", "chain", "text", "model", "ppo"},
}


def test_rooms_of_the_pipeline_open_one_way() -> None:
    for path in sources(("pipeline",)):
        room = path.relative_to(ROOT / "pipeline").with_suffix("").parts[0]
        for name in imported(path):
            other = name.split(".")[1] if name.startswith("pipeline.") else room
            assert other == room or other in ROOMS.get(room, {"errors"}), f"{path.relative_to(ROOT)} imports {name}"


def test_there_is_no_circle_of_imports() -> None:
    """Not of types either: an import for an annotation alone counts as any other."""
    modules = {module_of(path): imported(path) for path in sources(("pipeline", "stages", "reward_data"))}
    arrows = {name: {other for other in there if other in modules} for name, there in modules.items()}
    done: set[str] = set()

    def walk(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " → ".join((*way, name))
        if name not in done:
            for other in arrows[name]:
                walk(other, (*way, name))
            done.add(name)

    for name in arrows:
        walk(name, ())
    assert not any("TYPE_CHECKING" in path.read_text() for path in sources())


@pytest.mark.slow
def test_ppo_loads_no_more_than_it_computes_with() -> None:
    """`import pipeline.ppo`, from a script of somebody's own, loads neither the stages' machinery nor what it needs.

    The libraries that PPO stands on come first: accelerate itself loads yaml.
    """
    script = (
        "import sys, torch, transformers, accelerate, accelerate.utils, datasets\n"
        "before = set(sys.modules)\n"
        "import pipeline.ppo\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    unwanted = ("pipeline.runtime", "pipeline.report", "rich", "tyro", "yaml", "matplotlib")
    loaded = done.stdout.split()
    assert "pipeline.ppo.trainer" in loaded
    assert [name for name in loaded if name.startswith(unwanted)] == []


def test_functions_fit_a_screen() -> None:
    for path in sources(("pipeline", "stages")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= 50, f"{path.relative_to(ROOT)}: {node.name} has {lines} lines"


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


def test_no_opener_of_transformers_may_ask_for_remote_code() -> None:
    """`trust_remote_code=False`, or it asks y/N on a terminal, and runs the code on y."""
    for path in sources(("pipeline", "stages", "reward_data")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if node.func.attr == "from_pretrained" and ast.unparse(node.func.value).startswith("Auto"):
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert given.get("trust_remote_code") == "False", f"{path.name}, line {node.lineno}"
    assert '"trust_remote_code": False' in (ROOT / "pipeline/model/load.py").read_text()
