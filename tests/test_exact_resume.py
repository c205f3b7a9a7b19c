"""A Trainer stage that was killed or stopped at any place ends with the files of one that ran through, to the bit."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import write_models

from pipeline.checkpoint import sha256_of
from pipeline.runtime import hf_trainer, signals
from pipeline.runtime.arguments import PretrainArguments, RewardArguments, SFTArguments
from pipeline.runtime.command_line import resolve
from stages import pretrain, reward, sft

# Neither checkpoints nor evaluations fall on the grid of the lines; nothing forgives a step too many.
STEPS: dict[str, Any] = {
    "max_steps": 12,
    "logging_steps": 5,
    "eval_steps": 4,
    "save_steps": 3,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "mixed_precision": "no",
}
TIMES = ("time", "tokens_per_s", "mfu", "memory_mb", "seconds_left")
STAGES: dict[str, tuple[Callable[[Any], None], type]] = {
    "pretrain": (pretrain.main, PretrainArguments),
    "sft": (sft.main, SFTArguments),
    "reward": (reward.main, RewardArguments),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models, and data of each kind."""
    run = write_models(tmp_path_factory.mktemp("run"))
    write_models(run)
    (run / "sft").rename(run / "base")
    rng = np.random.default_rng(0)
    words = ["Ben", "found", "a", "kite", "near", "the", "river.", "He", "was", "happy."]

    def text() -> str:
        return " ".join(rng.choice(words, size=rng.integers(3, 12)))

    rows = {
        "pretrain": [{"text": f"{i} {text()}"} for i in range(200)],
        "sft": [{"prompt": f"Write {i}:", "completion": " " + text()} for i in range(60)],
        "reward": [{"prompt": f"Write {i}:", "chosen": " " + text(), "rejected": " x" + text()} for i in range(60)],
    }
    for name, content in rows.items():
        (run / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return run


def go(run: Path, stage: str, output: Path, **changes: Any) -> None:
    main, kind = STAGES[stage]
    fields = {"run_dir": str(run), "dataset": str(run / f"{stage}.jsonl"), "output_dir": str(output)}
    if stage == "pretrain":
        fields |= {"model_name_or_path": str(run / "pretrain"), "tokenizer_name_or_path": str(run / "pretrain")}
        changes |= {"block_size": 16, "max_bytes": None, "validation_bytes": None}
    else:
        fields["model_name_or_path"] = str(run / "base")
        changes |= {"max_length": 64} if stage == "reward" else {"max_length": 64, "validation_size": 7}
    main(resolve(kind(**fields | STEPS | changes)))


def without_times(content: Any) -> Any:
    return {name: value for name, value in content.items() if name not in TIMES}


def left_by(output: Path) -> dict[str, Any]:
    """What a stage left, without times."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    record = json.loads((output / "stage.json").read_text())
    files = {path.name: sha256_of(path) for path in output.iterdir() if path.is_file()}
    return {
        **{name: sums for name, sums in files.items() if name not in ("metrics.jsonl", "stage.json")},
        "lines": [without_times(json.loads(line)) for line in lines],
        "metrics": without_times(record["metrics"]),
        "speed": "tokens_per_s" in record["metrics"],
        "tokens": record["tokens"],
        "checkpoints": sorted(path.name for path in output.glob("checkpoints/*-*")),
    }


class Killed(BaseException):
    """What a test kills a stage with."""


@pytest.fixture(scope="module")
def whole(run: Path) -> Callable[[str], dict[str, Any]]:
    """What a stage leaves that runs through."""
    left: dict[str, Any] = {}

    def of(stage: str) -> dict[str, Any]:
        if stage not in left:
            go(run, stage, run / "whole" / stage)
            left[stage] = left_by(run / "whole" / stage)
        return left[stage]

    return of


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("at", [6, 12])
def test_killed_after_a_checkpoint(
    run: Path, tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch, stage: str, at: int
) -> None:
    seal = hf_trainer.seal

    def and_killed(checkpoint: Path) -> None:
        seal(checkpoint)
        if checkpoint.name == f"checkpoint-{at}":
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(hf_trainer, "seal", and_killed)
        with pytest.raises(Killed):
            go(run, stage, tmp_path)
    go(run, stage, tmp_path)
    assert left_by(tmp_path) == whole(stage)
