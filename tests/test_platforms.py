"""Other terminals and systems: a stdout that knows few characters, a Python without Unix's modules."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from ppo_tools import settings

from pipeline.ppo.recorder import Prints
from pipeline.runtime import console
from pipeline.runtime.arguments import ChatArguments, RunArguments
from pipeline.runtime.ppo_arguments import PPOArguments


def narrow_stdout(monkeypatch: pytest.MonkeyPatch) -> io.BytesIO:
    """What is printed from now on, on a stdout in latin-1 that raises for what it has no code for, as Python's does."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1", write_through=True))
    return written


def test_a_stage_prints_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = narrow_stdout(monkeypatch)

    def main(args: RunArguments) -> None:
        console.console.print("done → é −1 σ 🙂")
        with console.progress_bar(2, "steps", shown=True) as advance:
            advance(2, "→")
        print("β·KL \udcff")

    monkeypatch.setattr(sys, "argv", ["stage"])
    console.run(main, RunArguments)
    assert narrow.getvalue().decode("latin-1").splitlines() == ["done ? é ?1 ? ?", "?·KL ?"]


def test_help_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = narrow_stdout(monkeypatch)
    for kind in (PPOArguments, ChatArguments):
        monkeypatch.setattr(sys, "argv", ["stage", "--help"])
        with pytest.raises(SystemExit) as left:
            console.run(lambda args: None, kind)
        assert left.value.code == 0 and b"--run_dir" in narrow.getvalue()


def test_ppo_from_a_script_prints_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    narrow = narrow_stdout(monkeypatch)
    Prints(settings(tmp_path)).say("warning: log π − log π_ref is 0")
    assert narrow.getvalue() == b"warning: log ? ? log ?_ref is 0\n"


@pytest.mark.slow
def test_everything_imports_on_a_system_without_unixs_modules() -> None:
    script = (
        "import sys, torch, transformers, accelerate, datasets, trl, peft, matplotlib, rich, tyro\n"
        "sys.modules |= dict.fromkeys(('resource', 'fcntl', 'termios', 'readline', 'pwd', 'grp'))\n"
        "from pathlib import Path\n"
        "import importlib\n"
        "for file in [*Path('stages').glob('*.py'), *Path('pipeline').rglob('*.py')]:\n"
        "    importlib.import_module('.'.join(file.with_suffix('').parts).removesuffix('.__init__'))\n"
        "from pipeline.runtime.hf_trainer import peak_memory_mb\n"
        "assert torch.cuda.is_available() or peak_memory_mb() == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
