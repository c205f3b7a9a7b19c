"""A Trainer stage that was killed or stopped at any place ends with the files of one that ran through, to the bit."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from tiny_models import tiny_tokenizer, write_models
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline.checkpoint import fault_of, latest_checkpoint, sha256_of
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
    "stream": (pretrain.main, PretrainArguments),
    "sft": (sft.main, SFTArguments),
    "reward": (reward.main, RewardArguments),
    "sft-lora": (sft.main, SFTArguments),
    "reward-lora": (reward.main, RewardArguments),
}
LORA = {"use_peft": True, "lora_r": 2, "lora_dropout": 0.1}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models, and data of each kind."""
    run = write_models(tmp_path_factory.mktemp("run"))
    (run / "sft").rename(run / "base")
    # With dropout, so that a random number drawn or left out shows
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=1, n_head=2))
    model.save_pretrained(run / "dropout")
    tiny_tokenizer().save_pretrained(run / "dropout")
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
    stage, _, lora = stage.partition("-")
    data = "pretrain" if stage == "stream" else stage
    fields = {"run_dir": str(run), "dataset": str(run / f"{data}.jsonl"), "output_dir": str(output)}
    if stage == "stream":
        changes |= {"streaming": True, "shuffle_buffer_size": 20}
    if stage in ("pretrain", "stream"):
        fields |= {"model_name_or_path": str(run / "pretrain"), "tokenizer_name_or_path": str(run / "pretrain")}
        changes |= {"block_size": 16, "max_bytes": None, "validation_bytes": None}
    else:
        fields["model_name_or_path"] = str(run / ("dropout" if stage == "sft" else "base"))
        changes |= {"max_length": 64} if stage == "reward" else {"max_length": 64, "validation_size": 7}
    main(resolve(kind(**fields | STEPS | (LORA if lora else {}) | changes)))


def without_times(content: Any) -> Any:
    return {name: value for name, value in content.items() if name not in TIMES}


def left_by(output: Path) -> dict[str, Any]:
    """What a stage left, without times."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    record = json.loads((output / "stage.json").read_text())
    found = (path for place in (output, output / "adapter") for path in place.glob("*") if path.is_file())
    files = {str(path.relative_to(output)): sha256_of(path) for path in found}
    return {
        **{name: sums for name, sums in files.items() if name not in ("metrics.jsonl", "stage.json")},
        "lines": [without_times(json.loads(line)) for line in lines],
        "metrics": without_times(record["metrics"]),
        "speed": "tokens_per_s" in record["metrics"],
        "tokens": record["tokens"],
        "checkpoints": sorted(path.name for path in output.glob("checkpoints/*-*")),
    }


# One of them shows the kind, in a second.
pytestmark = pytest.mark.slow  # each trains and trains again
ALL = ["pretrain", *(pytest.param(name, marks=pytest.mark.slow) for name in STAGES if name != "pretrain")]


class Killed(BaseException):
    """What a test kills a stage with."""


def killed_after(step: int) -> Callable[[Path], None]:
    """A `seal` after which the stage dies, once the checkpoint of `step` is whole."""
    seal = hf_trainer.seal

    def and_killed(checkpoint: Path) -> None:
        seal(checkpoint)
        if checkpoint.name == f"checkpoint-{step}":
            raise Killed

    return and_killed


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


@pytest.mark.parametrize("stage", ALL)
@pytest.mark.parametrize("at", [6, 12])
def test_killed_after_a_checkpoint(
    run: Path, tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch, stage: str, at: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(hf_trainer, "seal", killed_after(at))
        with pytest.raises(Killed):
            go(run, stage, tmp_path)
    go(run, stage, tmp_path)
    assert left_by(tmp_path) == whole(stage)


def signalled(run: Path, stage: str, output: Path) -> signals.Stopped:
    """Run a stage that is to be stopped by SIGTERM."""
    with signals.watching(), pytest.raises(signals.Stopped) as stop:
        go(run, stage, output)
    return stop.value


@pytest.mark.parametrize("at", [7, 8, 12])
@pytest.mark.parametrize("stage", ALL)
def test_sigterm_saves_the_step_and_puts_an_evaluation_off(
    run: Path, tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch, stage: str, at: int
) -> None:
    on_step_end = hf_trainer.StageCallback.on_step_end

    def and_signalled(self: Any, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == at:
            os.kill(os.getpid(), signal.SIGTERM)
        on_step_end(self, args, state, control, **others)

    with monkeypatch.context() as patch:
        patch.setattr(hf_trainer.StageCallback, "on_step_end", and_signalled)
        stop = signalled(run, stage, tmp_path)
    kept = tmp_path / "checkpoints" / f"checkpoint-{at}"
    assert str(stop) == f"stopped by SIGTERM; saved {kept}; the same command goes on from there" and stop.code == 143
    assert fault_of(kept) is None and not (tmp_path / "stage.json").exists()
    go(run, stage, tmp_path)
    assert left_by(tmp_path) == whole(stage)


@pytest.mark.parametrize("during", [2, 3, 4])
def test_a_signal_breaks_an_evaluation_off(
    run: Path, tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch, during: int
) -> None:
    """Of the evaluations after step 4, 8, 12, and the one after training."""
    held_out_nats, calls = pretrain.held_out_nats, []

    def and_signalled(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == during:
            os.kill(os.getpid(), signal.SIGTERM)
        return held_out_nats(*args, **kwargs)

    monkeypatch.setattr(pretrain, "held_out_nats", and_signalled)
    stop = signalled(run, "pretrain", tmp_path)
    kept = tmp_path / "checkpoints" / f"checkpoint-{min(12, 4 * during)}"
    assert stop.kept == (kept if during < 4 else None) and fault_of(kept) is None
    go(run, "pretrain", tmp_path)
    assert left_by(tmp_path) == whole("pretrain")
    assert len(calls) == 4 + 1


def test_lines_and_checkpoints_of_the_second_part_come_as_it_asks(run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(hf_trainer, "seal", killed_after(6))
        with pytest.raises(Killed):
            go(run, "pretrain", tmp_path)
    go(run, "pretrain", tmp_path, logging_steps=2, save_steps=5)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [5, 8, 10, 12]
    assert sorted(path.name for path in tmp_path.glob("checkpoints/*-*")) == ["checkpoint-10", "checkpoint-12"]


def test_a_damaged_later_checkpoint_takes_no_room(run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The Trainer keeps two. If a damaged one counts, the whole one goes before the next is whole."""
    with monkeypatch.context() as patch:
        patch.setattr(hf_trainer, "seal", killed_after(6))
        with pytest.raises(Killed):
            go(run, "pretrain", tmp_path)
    (tmp_path / "checkpoints/checkpoint-6/optimizer.pt").write_bytes(b"damaged")
    (tmp_path / "checkpoints/checkpoint-6").rename(tmp_path / "checkpoints/checkpoint-11")

    def killed(checkpoint: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(hf_trainer, "seal", killed)
        with pytest.raises(Killed):
            go(run, "pretrain", tmp_path)
    assert latest_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints/checkpoint-3"


@pytest.mark.slow
def test_two_processes_stop_together_go_on_alike_and_log_what_one_does(run: Path, tmp_path: Path) -> None:
    corpus = [{"text": f"{i} " + "Ben found a kite near the river. " * (1 + i % 3)} for i in range(1200)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    launch = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu-2.yaml"]

    def started(output: Path, batch: int, launcher: list[str]) -> subprocess.Popen[str]:
        fields = {
            **STEPS,
            "run_dir": run,
            "dataset": tmp_path / "corpus.jsonl",
            "output_dir": output,
            "model_name_or_path": run / "pretrain",
            "tokenizer_name_or_path": run / "pretrain",
            "block_size": 16,
            "max_bytes": "none",
            "max_steps": 250,
            "logging_steps": 20,
            "eval_steps": 70,
            "save_steps": 1000,
            "per_device_train_batch_size": batch,
        }
        words = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen([sys.executable, *launcher, "-m", "stages.pretrain", *words], cwd=ROOT, **pipes)

    def finished(output: Path, batch: int, launcher: list[str]) -> dict[str, Any]:
        process = started(output, batch, launcher)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said[-9000:]
        return left_by(output)

    one, two = finished(tmp_path / "one", 4, []), finished(tmp_path / "two", 2, launch)
    stopped = started(tmp_path / "stopped", 2, launch)
    assert stopped.stdout is not None
    next(line for line in stopped.stdout if "step 40" in line)
    stopped.send_signal(signal.SIGTERM)
    said = stopped.communicate(timeout=60)[0]
    kept = re.search(r"stopped by SIGTERM; saved (\S+); the same command goes on from there", said)
    assert kept and fault_of(Path(kept[1])) is None and said.count("stopped by") == 1
    assert not (tmp_path / "stopped/stage.json").exists()
    assert finished(tmp_path / "stopped", 2, launch) | {"checkpoints": 0} == two | {"checkpoints": 0}
    # The same rows make each step. The first loss differs in its last bit, and each step makes more of that: on an AMD
    # CPU the mean of the first line is within 3e-5, on an Intel one with AMX 2e-4 was seen.
    for name in ("loss", "val_loss"):
        losses = [[line[name] for line in left["lines"] if name in line] for left in (one, two)]
        assert losses[0][0] == pytest.approx(losses[1][0], rel=5e-4)
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
