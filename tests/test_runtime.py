"""The stage's record: metrics, resume point, fingerprints, one sentence for an error."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint import save_checkpoint
from pipeline.errors import UserError
from pipeline.model import hardware
from pipeline.runtime import console, resume, signals
from pipeline.runtime.arguments import SFTArguments
from pipeline.runtime.command_line import resolve
from pipeline.runtime.console import run as run_stage
from pipeline.runtime.record import Stage


def arguments(tmp_path: Path, **fields: object) -> SFTArguments:
    return resolve(SFTArguments(run_dir=str(tmp_path), mixed_precision="no", **fields))


def write(folder: Path) -> None:
    (folder / "state").write_text("x")


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


def test_same_settings_go_on_other_settings_start_anew(tmp_path: Path) -> None:
    first = Stage(arguments(tmp_path), "sft", {})
    first.log({"step": 1, "loss": 3.0})
    first.log({"step": 2, "loss": 2.0})
    save_checkpoint(first.checkpoints, 1, write)
    again = Stage(arguments(tmp_path, logging_steps=3), "sft", {})  # what is shown may change
    assert again.resume_from == again.checkpoints / "step-00000001"
    steps = [json.loads(s)["step"] for s in (tmp_path / "sft/metrics.jsonl").read_text().splitlines()]
    assert steps == [1], "the line after the checkpoint will be written again"
    other = Stage(arguments(tmp_path, learning_rate=1e-4), "sft", {})
    assert other.resume_from is None
    assert list(other.checkpoints.glob("step-*")), "nothing goes before everything has been checked"
    other.begin()
    assert not list(other.checkpoints.glob("step-*")) and (tmp_path / "sft/metrics.jsonl").read_text() == ""


def test_a_refused_command_removes_nothing(tmp_path: Path) -> None:
    stage = Stage(arguments(tmp_path), "sft", {})
    stage.log({"step": 1, "loss": 3.0})
    save_checkpoint(stage.checkpoints, 1, write)
    stage.finish({})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    Stage(arguments(tmp_path, learning_rate=1e-4), "sft", {})  # and then some check fails
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["checkpoints/my_weights.pt", "metrics.jsonl"])
def test_what_no_stage_wrote_is_left_alone(tmp_path: Path, name: str) -> None:
    file = tmp_path / "sft" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(UserError, match=r"no stage wrote, and sft would remove them; choose another output_dir"):
        Stage(arguments(tmp_path), "sft", {})
    assert file.read_text() == "mine"


@pytest.mark.parametrize("call", ["write_json", "rmtree"])
def test_a_kill_while_making_room_leaves_the_folder_ours(tmp_path: Path, monkeypatch, call: str) -> None:
    stage = Stage(arguments(tmp_path), "sft", {})
    stage.log({"step": 1, "loss": 3.0})
    save_checkpoint(stage.checkpoints, 1, write)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(resume, "write_json", killed) if call == "write_json" else patch.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            Stage(arguments(tmp_path, learning_rate=1e-4), "sft", {}).begin()
    assert Stage(arguments(tmp_path, learning_rate=1e-4), "sft", {}).resume_from is None


def test_a_renamed_run_goes_on(tmp_path: Path) -> None:
    model = tmp_path / "one" / "pretrain"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    first = Stage(arguments(tmp_path / "one"), "sft", {"model": str(model)})
    first.begin()
    save_checkpoint(first.checkpoints, 1, write)
    (tmp_path / "one").rename(tmp_path / "two")
    moved = Stage(arguments(tmp_path / "two"), "sft", {"model": str(tmp_path / "two" / "pretrain")})
    assert moved.resume_from == tmp_path / "two/sft/checkpoints/step-00000001"


def test_what_an_earlier_run_left_goes_with_it(tmp_path: Path) -> None:
    stage = Stage(arguments(tmp_path), "sft", {})
    for name in ("best", "ema"):
        (stage.output_dir / name).mkdir()
    stage.begin()
    assert (stage.output_dir / "best").exists(), "in a folder that is new to us they are the user's"
    stage.finish({})
    Stage(arguments(tmp_path), "sft", {}).begin()
    assert not (stage.output_dir / "best").exists() and not (stage.output_dir / "ema").exists()


def test_changed_input_starts_anew(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("1")
    first = Stage(arguments(tmp_path), "sft", {"dataset": str(data)})
    first.begin()
    save_checkpoint(first.checkpoints, 1, write)
    assert Stage(arguments(tmp_path), "sft", {"dataset": str(data)}).resume_from is not None
    data.write_text("2")
    assert Stage(arguments(tmp_path), "sft", {"dataset": str(data)}).resume_from is None


def test_a_finished_stage_starts_anew(tmp_path: Path) -> None:
    stage = Stage(arguments(tmp_path), "sft", {})
    stage.begin()
    save_checkpoint(stage.checkpoints, 1, write)
    stage.finish({})
    again = Stage(arguments(tmp_path), "sft", {})
    assert again.resume_from is None and (tmp_path / "sft/stage.json").exists()
    again.begin()
    assert not (tmp_path / "sft/stage.json").exists()


def test_fingerprints_follow_content_and_name_what_is_missing(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    with pytest.raises(UserError, match="is an empty folder"):
        Stage(arguments(tmp_path), "sft", {"model": str(model)})
    (model / "config.json").write_text("{}")
    one = Stage(arguments(tmp_path), "sft", {"model": str(model)}).inputs["model"]["sha256"]
    (model / "stage.json").write_text("{}")  # when it was made does not change what it is
    assert Stage(arguments(tmp_path), "sft", {"model": str(model)}).inputs["model"]["sha256"] == one
    (model / "config.json").write_text("{ }")
    assert Stage(arguments(tmp_path), "sft", {"model": str(model)}).inputs["model"]["sha256"] != one
    with pytest.raises(UserError, match=r"run `make pretrain` first"):
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
    monkeypatch.setattr(resume, "HASHED_WHOLE", 4_000_000)
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
        assert signal.getsignal(signal.SIGINT) == before

    monkeypatch.setattr("sys.argv", ["chat"])
    before = signal.getsignal(signal.SIGINT)
    run_stage(main, SFTArguments, interactive=True)


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
