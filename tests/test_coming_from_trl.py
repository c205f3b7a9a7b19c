"""The page "Coming from TRL": its script runs and learns, and the names it gives exist."""

import dataclasses
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM

from pipeline.ppo import PPOConfig
from pipeline.runtime.arguments import RewardArguments, SFTArguments
from pipeline.runtime.ppo_arguments import PPOArguments

PAGE = (ROOT / "docs" / "coming_from_trl.md").read_text(encoding="utf-8")
SCRIPT = (ROOT / "examples" / "ppo_gpt2.py").read_text(encoding="utf-8")


def column(section: str, number: int) -> set[str]:
    """The names in one column of a section's table, hints about their values left out."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("|")][2:]
    cells = [re.sub(r"\(`[^)]*\)", "", row[number]) for row in rows]
    return {name for cell in cells for name in re.findall(r"`([a-z0-9_/]+)`", cell)}


def test_the_page_shows_the_script_as_it_is() -> None:
    assert f"```python\n{SCRIPT}```\n" in PAGE
    assert len(SCRIPT.splitlines()) < 50


def test_fields_on_the_page_exist() -> None:
    ours = column("PPOConfig", 1)
    # "the same" stands for the names beside it.
    lines = [line.split(" | ") for line in PAGE.split("\n## PPOConfig\n")[1].split("\n## ")[0].splitlines()]
    same = [cells[0] for cells in lines if len(cells) > 1 and cells[1] == "the same"]
    ours |= {name for cell in same for name in re.findall(r"`([a-z0-9_]+)`", cell)}
    assert len(ours) > 30
    assert ours <= {field.name for field in dataclasses.fields(PPOConfig)}
    options = set(re.findall(r"--([a-z_]+)", PAGE)) - {"help", "config"}
    stages = (SFTArguments, RewardArguments, PPOArguments)
    assert options <= {field.name for stage in stages for field in dataclasses.fields(stage)}


@pytest.mark.slow
def test_the_script_learns_and_logs_what_the_page_names(tmp_path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    script = ROOT / "examples" / "ppo_gpt2.py"
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    rows = [dict(part.rsplit(" ", 1) for part in line.split("  ")) for line in lines]
    scores = [float(row["objective/scores"]) for row in rows]
    moved = next(row for row in rows if "val/ratio_first" in row)  # the first update with the critic warmed up
    assert len(rows) == 16 and float(moved["val/ratio_first"]) == 1.0 and float(moved["objective/kl"]) == 0.0
    assert scores[0] < 0.2 and scores[-1] > 0.6, scores
    metrics = column("Metrics", 1) | (column("Metrics", 0) - {"eps", "val/num_eos_tokens"})
    assert metrics <= set(rows[-1]), metrics - set(rows[-1])
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "ppo_gpt2").eval()
    with torch.no_grad():
        likeliest = policy(torch.tensor([[3, 7, 9]])).logits[0, -1].argmax()  # the film was …
    assert likeliest == 5  # good


def test_every_test_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    code = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").glob("test_*.py"))
    written = set(re.findall(r"def (test_\w+)", code))
    assert len(named) >= 14 and not named - written - {"test_ppo_trl"}, named - written
