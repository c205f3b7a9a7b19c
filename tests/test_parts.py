"""preferences and evaluate, stopped at any place and started again: no part is done twice, no file differs."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny_models

from pipeline.runtime import parts, signals
from pipeline.runtime.arguments import EvaluateArguments, PreferencesArguments
from pipeline.runtime.command_line import resolve
from reward_data.formats import text_of
from stages import evaluate, preferences

SAMPLING = {"max_new_tokens": 8, "batch_size": 8, "mixed_precision": "no"}
asked: list[int] = []
signalled: list[bool] = []
asked_before_the_signal = [2]


def letters(prompts: list, completions: list, **columns: list) -> list[float]:
    """A judge that notes that it was asked."""
    asked.append(len(prompts))
    return [sum(c.isalpha() for c in text) / max(1, len(text)) for text in map(text_of, completions)]


def die_later(prompts: list, completions: list, **columns: list) -> list[float]:
    """A judge that is signalled the third time, or as `asked_before_the_signal` says, once."""
    if len(asked) == asked_before_the_signal[0] and not signalled:
        signalled.append(True)
        os.kill(os.getpid(), signal.SIGINT)
    return letters(prompts, completions)


def go(run: Path, stage: str, output: Path, judge: str = "letters") -> None:
    asked.clear()
    where = {"run_dir": str(run), "output_dir": str(output), **SAMPLING}
    judge = f"test_parts:{judge}"
    if stage == "preferences":
        size = {"dataset_size": 7, "test_size": 3, "num_generations": 4}  # 4 parts and 2
        preferences.main(resolve(PreferencesArguments(**where, labeller=judge, **size)))
    else:
        evaluate.main(resolve(EvaluateArguments(**where, gold=judge, num_prompts=5, best_of=3)))


def left_by(output: Path) -> dict[str, Any]:
    def without_time(content: dict) -> dict:
        return {name: value for name, value in content.items() if name != "time"}

    lines = [without_time(json.loads(line)) for line in (output / "metrics.jsonl").read_text().splitlines()]
    files = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    record = json.loads(files.pop("stage.json"))
    del files["metrics.jsonl"]
    folders = sorted(path.name for path in (output / "checkpoints").iterdir() if not path.name.startswith("unused-"))
    return files | {"lines": lines, "metrics": record["metrics"], "folders": folders}


PARTS = {"preferences": 6, "evaluate": 4}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tiny_models.write_models(tmp_path_factory.mktemp("run"))
    for stage in PARTS:
        go(run, stage, run / "whole" / stage)
        assert len(asked) == PARTS[stage]
    return run


class Killed(BaseException):
    """What a test kills a stage with."""


@pytest.mark.parametrize(("stage", "at"), [("preferences", 1), ("preferences", 5), ("evaluate", 1), ("evaluate", 3)])
def test_killed_after_a_part(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, at: int) -> None:
    save = parts.save_checkpoint

    def and_killed(folder: Path, step: int, *args: Any, **kwargs: Any) -> None:
        save(folder, step, *args, **kwargs)
        if step == at:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(parts, "save_checkpoint", and_killed)
        with pytest.raises(Killed):
            go(run, stage, tmp_path)
    go(run, stage, tmp_path)
    assert len(asked) == PARTS[stage] - at
    assert left_by(tmp_path) == left_by(run / "whole" / stage)


@pytest.mark.parametrize("stage", PARTS)
def test_killed_before_the_record(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.runtime.record.Stage.finish", killed)
        with pytest.raises(Killed):
            go(run, stage, tmp_path)
    go(run, stage, tmp_path)
    assert not asked
    assert left_by(tmp_path) == left_by(run / "whole" / stage)


@pytest.mark.parametrize("stage", PARTS)
def test_ctrl_c_within_a_part(run: Path, tmp_path: Path, stage: str) -> None:
    signalled.clear()
    with signals.watching(), pytest.raises(signals.Stopped) as stop:
        go(run, stage, tmp_path, "die_later")
    assert stop.value.code == 130 and len(list(tmp_path.glob("checkpoints/step-*"))) == 2
    assert not (tmp_path / "stage.json").exists()
    go(run, stage, tmp_path, "die_later")
    assert len(asked) == PARTS[stage] - 2


@pytest.mark.parametrize("stage", PARTS)
def test_a_stop_says_how_much_is_done(run: Path, tmp_path: Path, stage: str) -> None:
    """Stopped in the first part, then in the third, gone on, and in the last."""
    parts = PARTS[stage]
    done = {"preferences": ("4 of 10 prompts are", "9 of 10 prompts are")}
    done["evaluate"] = ("10 of 30 answers are", "25 of 30 answers are")
    try:
        for asked_before, kept in ((0, 0), (2, 2), (parts - 3, parts - 1)):
            signalled.clear()
            asked_before_the_signal[0] = asked_before
            with signals.watching(), pytest.raises(signals.Stopped) as stop:
                go(run, stage, tmp_path, "die_later")
            said = "the same command goes on from the last checkpoint, if there is one"
            if kept:
                told = f"{done[stage][kept > 2]} done, saved {tmp_path}/checkpoints/step-{kept:08d}"
                said = f"{told}; the same command goes on from there"
            assert str(stop.value) == f"stopped by SIGINT; {said}"
    finally:
        asked_before_the_signal[0] = 2


@pytest.mark.parametrize("stage", PARTS)
def test_what_follows_a_damaged_part_is_made_again(run: Path, tmp_path: Path, stage: str) -> None:
    shutil.copytree(run / "whole" / stage, tmp_path / "out")
    (tmp_path / "out" / "stage.json").unlink()
    (tmp_path / "out/checkpoints/step-00000002/part.json").write_text("{}")
    go(run, stage, tmp_path / "out")
    assert len(asked) == PARTS[stage] - 1
    assert left_by(tmp_path / "out") == left_by(run / "whole" / stage)


def test_training_pairs_never_stand_beside_test_pairs_of_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at every renaming in turn."""
    rows = {split: [{"of": "the new run"}] for split in ("train", "test")}
    replace = Path.replace
    at, done = 0, False
    while not done:
        at, calls = at + 1, []
        for split in rows:
            (tmp_path / f"{split}.jsonl").write_text('{"of": "an earlier run"}\n')

        def and_killed(self: Path, target: Path, at: int = at, calls: list = calls) -> None:
            calls.append(target)
            if len(calls) == at:
                raise Killed
            replace(self, target)

        monkeypatch.setattr(Path, "replace", and_killed)
        try:
            preferences.write_pairs(tmp_path, rows)
            done = True
        except Killed:
            pass
        there = {file.stem: json.loads(file.read_text())["of"] for file in tmp_path.glob("*.jsonl")}
        assert "train" not in there or (len(set(there.values())) == 1 and len(there) == 2)
    assert at >= 3 and there == {"train": "the new run", "test": "the new run"}
