"""The stage's record: metrics, resume point, fingerprints, one sentence for an error."""

import json
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from pipeline.checkpoint import save_checkpoint, write_json, write_jsonl
from pipeline.errors import UserError
from pipeline.model import hardware
from pipeline.runtime import console, inputs, signals
from pipeline.runtime.arguments import SFTArguments
from pipeline.runtime.command_line import resolve
from pipeline.runtime.console import run as run_stage
from pipeline.runtime.record import Stage


def arguments(tmp_path: Path, **fields: object) -> SFTArguments:
    return resolve(SFTArguments(run_dir=str(tmp_path), mixed_precision="no", **fields))


def test_metrics_and_record(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    stage = Stage(arguments(tmp_path), "sft", {"dataset": "stories", "none": None})
    stage.log({"step": 1, "loss": 2.5, "note": "text is kept, not shown"})
    stage.finish({"eval_loss": 1.5}, tokens=10)
    (line,) = (tmp_path / "sft/metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["loss"] == 2.5 and json.loads(line)["time"] >= 0
    record = json.loads((tmp_path / "sft/stage.json").read_text())
    assert record["inputs"] == {} and record["metrics"] == {"eval_loss": 1.5} and record["tokens"] == 10
    assert record["config"]["learning_rate"] == 1e-3 and record["processes"] == 1
    assert "step 1  loss 2.5" in capsys.readouterr().out


def test_fingerprints_follow_content_and_name_what_is_missing(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    with pytest.raises(UserError, match="is an empty folder"):
        Stage(arguments(tmp_path), "sft", {"model": str(model)})
    (model / "config.json").write_text("{}")
    one = Stage(arguments(tmp_path), "sft", {"model": str(model)}).inputs["model"]["sha256"]
    (model / "stage.json").write_text('{"stage": "sft"}')  # when it was made does not change what it is
    assert Stage(arguments(tmp_path), "sft", {"model": str(model)}).inputs["model"]["sha256"] == one
    (model / "config.json").write_text("{ }")
    assert Stage(arguments(tmp_path), "sft", {"model": str(model)}).inputs["model"]["sha256"] != one
    with pytest.raises(UserError, match=r"run `make pretrain"):
        Stage(arguments(tmp_path), "sft", {"model": str(tmp_path / "pretrain")})
    hub = Stage(arguments(tmp_path), "sft", {"model": "owner/name"}).inputs["model"]
    assert hub == {"path": "owner/name", "sha256": "hub"}


def test_the_fingerprint_of_a_data_set_has_its_folders_and_of_a_large_file_its_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fingerprint() -> str:
        return Stage(arguments(tmp_path), "sft", {"dataset": str(tmp_path / "rows")}).inputs["dataset"]["sha256"]

    file = tmp_path / "rows" / "data" / "train.parquet"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"a" * 5_000_000)
    first = fingerprint()
    file.write_bytes(b"a" * 2_500_000 + b"b" + b"a" * 2_499_999)
    assert fingerprint() != first, "every byte counts"
    monkeypatch.setattr(inputs, "HASHED_WHOLE", 4_000_000)
    sampled = fingerprint()
    assert fingerprint() == sampled and len(sampled) == 64
    os.utime(file, (1, 1))
    assert fingerprint() != sampled, "of a file too large to read, its time counts"
    other = fingerprint()
    file.write_bytes(b"a" * 4_999_999 + b"b")
    os.utime(file, (1, 1))
    assert fingerprint() != other, "and its end"


def test_a_machine_without_git_finishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    Stage(arguments(tmp_path), "sft", {}).finish({})
    assert json.loads((tmp_path / "sft/stage.json").read_text())["git_commit"] is None


def test_a_line_shows_figures_short(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    stage = Stage(arguments(tmp_path), "sft", {})
    stage.log(
        {
            "step": 1200,
            "loss": 2.34567,
            "bpb": 1.234567,
            "grad_norm": 0.51234,
            "learning_rate": 0.003,
            "tokens_per_s": 18234,
            "mfu": 0.3123,
            "memory_mb": 1512,
            "seconds_left": 3725.4,
        }
    )
    shown = "step 1,200  loss 2.346  bpb 1.235  grad 0.512  18,234 tok/s  31% of peak  1,512 MB  1:02:05 left"
    assert capsys.readouterr().out == f"sft  {shown}\n"
    assert json.loads((tmp_path / "sft/metrics.jsonl").read_text())["learning_rate"] == 0.003


def test_seed_sets_torch(tmp_path: Path) -> None:
    Stage(arguments(tmp_path, seed=5), "sft", {})
    one = torch.rand(3)
    Stage(arguments(tmp_path, seed=5), "sft", {})
    assert torch.equal(one, torch.rand(3))


def test_precision_is_what_was_asked(tmp_path: Path) -> None:
    assert hardware.use_bf16("bf16") and not hardware.use_bf16("no")
    assert hardware.use_bf16("auto") == hardware.bf16_in_hardware()
    x = torch.randn(4, 4)
    with Stage(arguments(tmp_path), "sft", {}).dtype_autocast():
        assert (x @ x).dtype == torch.float32
    args = arguments(tmp_path)
    args.mixed_precision = "bf16"
    with Stage(args, "sft", {}).dtype_autocast():
        assert (x @ x).dtype == torch.bfloat16


def test_interrupt_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def main(_: SFTArguments) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["sft"])
    with pytest.raises(SystemExit) as leaving:
        run_stage(main, SFTArguments)
    assert leaving.value.code == 130 and "goes on from the last checkpoint" in capsys.readouterr().err


def tokenizers_save(folder: Path) -> None:
    words = {f"a-word-of-some-length-{i}": i for i in range(9000)}
    Tokenizer(models.WordLevel(words, unk_token="a-word-of-some-length-0")).save(str(folder / "tokenizer.json"))


WRITERS = {
    "torch": lambda folder: torch.save(torch.zeros(100_000), folder / "state.pt"),
    "safetensors": lambda folder: save_file({"a": torch.zeros(100_000)}, folder / "model.safetensors"),
    "json": lambda folder: write_json(folder / "scores.json", "x" * 400_000),
    "jsonl": lambda folder: write_jsonl(folder / "samples.jsonl", ["x" * 400_000]),
    "tokenizers": tokenizers_save,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_that_cannot_be_written_is_a_sentence_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, writer: str
) -> None:
    """A file that may not grow fails as one on a full disk does, in every library."""

    def main(_: SFTArguments) -> None:
        save_checkpoint(tmp_path, 1, WRITERS[writer])

    monkeypatch.setattr("sys.argv", ["sft"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(SystemExit) as leaving:
            run_stage(main, SFTArguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert leaving.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("how", ["at once", "saved", "an error on the way"])
def test_a_signal_is_a_sentence_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, number: signal.Signals, code: int, how: str
) -> None:
    def main(_: SFTArguments) -> None:
        if how == "at once":
            os.kill(os.getpid(), number)
            time.sleep(60)
        with signals.deferred():
            os.kill(os.getpid(), number)
            if how == "saved":
                raise signals.Stopped(signals.asked(), Path("run/checkpoints/checkpoint-7"))
            raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr("sys.argv", ["sft"])
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as leaving:
        run_stage(main, SFTArguments)
    said = {
        "at once": "the same command goes on from the last checkpoint, if there is one",
        "saved": "saved run/checkpoints/checkpoint-7; the same command goes on from there",
        "an error on the way": "the same command goes on from the last checkpoint, if there is one "
        "(on the way: RuntimeError: Connection closed by peer)",
    }[how]
    assert leaving.value.code == code and capsys.readouterr().err == f"stopped by {number.name}; {said}\n"
    assert signal.getsignal(number) == before, "and all is as it was"


def test_an_interactive_program_has_its_own_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    def main(_: SFTArguments) -> None:
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    monkeypatch.setattr("sys.argv", ["chat"])
    before = signal.getsignal(signal.SIGINT)
    try:
        run_stage(main, SFTArguments, interactive=True)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("name", "value", "launched"),
    [
        ("TORCHELASTIC_RUN_ID", "none", True),
        ("ACCELERATE_DYNAMO_USE_DYNAMIC", "False", True),
        ("WORLD_SIZE", "2", True),
        ("WORLD_SIZE", "1", False),
    ],
)
def test_who_has_a_launcher(monkeypatch: pytest.MonkeyPatch, name: str, value: str, launched: bool) -> None:
    for variable in ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_USE_DYNAMIC", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, value)
    assert console.has_a_launcher() is launched
