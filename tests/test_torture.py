"""`make torture`: what it calls equal, where its kills land, and a short run of it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from benchmarks import torture
from benchmarks.torture_cases import ALL, CONFIGURATIONS, Case
from benchmarks.torture_compare import compare
from pipeline.checkpoint import seal, write_json, write_jsonl


def write_result(folder: Path, seconds: float = 1.0, loss: float = 0.1, weight: float = 1.0) -> Path:
    """A stage's folder with one checkpoint."""
    checkpoint = folder / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    torch.save({"state": {"seconds": seconds}, "w": torch.tensor([weight])}, checkpoint / "state.pt")
    seal(checkpoint)
    write_json(folder / "stage.json", {"seconds": seconds, "metrics": {"loss": loss, "mfu": seconds}})
    write_jsonl(folder / "metrics.jsonl", [{"step": 1, "loss": 4.0}, {"step": 2, "loss": loss, "time/sample": seconds}])
    (folder / "weights.safetensors").write_bytes(b"abc")
    return folder


def test_times_may_differ_and_nothing_else(tmp_path: Path) -> None:
    expected = write_result(tmp_path / "a")
    assert compare(expected, write_result(tmp_path / "b", seconds=2.0)) == (5, [])
    next_number = 0.1 + 2**-56
    assert compare(expected, write_result(tmp_path / "c", loss=next_number))[1] == [
        "metrics.jsonl 2 loss: 0.1 became 0.10000000000000002",
        "stage.json metrics loss: 0.1 became 0.10000000000000002",
    ]
    found = write_result(tmp_path / "d", weight=1.0 + 2**-23)
    assert compare(expected, found)[1] == ["checkpoints/step-00000002/state.pt w: another tensor"]


def test_a_file_that_is_missing_left_over_cut_or_damaged_is_seen(tmp_path: Path) -> None:
    expected, found = write_result(tmp_path / "a"), write_result(tmp_path / "b")
    (found / "stage.json").unlink()
    (found / "best.partial").mkdir()
    (found / "best.partial" / "config.json").write_text("{}")
    (found / "weights.safetensors").write_bytes(b"ab")
    (found / "metrics.jsonl").write_text('{"step": 1, "loss": 4.0}\n')
    (found / ".lock").write_text("17")
    manifest = found / "checkpoints" / "step-00000002" / "manifest.json"
    manifest.write_text(json.dumps({"state.pt": "0" * 64}))
    assert compare(expected, found) == (
        5,
        [
            "metrics.jsonl: 2 entries became 1",
            "weights.safetensors: other bytes",
            "checkpoints/step-00000002/manifest.json 2: None became 'state.pt is damaged'",
            "stage.json is missing",
            "best.partial/config.json is left over",
        ],
    )


def write_two_files(folder: Path, stop: torture.Stop | None, calls: object) -> None:
    """What a stage does, in small: a file, one beside it that takes its place, and one elsewhere."""
    sys.addaudithook(torture.file_operations(folder, stop, calls))
    (folder.parent / "elsewhere").write_text("not counted")
    (folder / "a").write_text("new")
    write_json(folder / "b", {})


@pytest.mark.parametrize(
    "at, left",
    [
        (1, {"a": "old"}),  # before it is opened
        (2, {"a": ""}),  # opened and emptied
        (3, {"a": "new"}),  # before b.partial is opened
        (4, {"a": "new", "b.partial": ""}),
        (5, {"a": "new", "b.partial": "{}\n"}),  # before it is renamed
        (6, {"a": "new", "b": "{}\n"}),  # not reached
    ],
)
def test_a_kill_at_a_file_operation_leaves_what_was_there_then(tmp_path: Path, at: int, left: dict[str, str]) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "a").write_text("old")
    calls = torture.FORK.Value("i", 0, lock=False)
    child = torture.FORK.Process(target=write_two_files, args=(folder, torture.Stop("call", at), calls))
    child.start()
    child.join()
    assert child.exitcode == (0 if at == 6 else -signal.SIGKILL)
    assert {path.name: path.read_text() for path in folder.iterdir()} == left


def test_the_cases_kill_every_stage_and_name_each_option_once(tmp_path: Path) -> None:
    assert set(CONFIGURATIONS["stories"].changes) == set(ALL)
    for name, configuration in CONFIGURATIONS.items():
        for stage in configuration.changes:
            words = Case(name, stage, tmp_path).words
            options = [word for word in words if word.startswith("--")]
            assert len(options) == len(set(options)) and (ROOT / words[1]).is_file(), (name, stage)


@pytest.mark.slow
def test_killed_stages_leave_what_they_leave_unkilled(tmp_path: Path) -> None:
    """Every stage under its preset; `make torture` has the other configurations and more kills."""
    words = ["-m", "benchmarks.torture", "--kills", "2", "--configurations", "stories", "--work", str(tmp_path)]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert f"{2 * len(ALL)} kills, 0 of {len(ALL)} cases differ" in done.stdout
    assert os.listdir(tmp_path / "stories")
