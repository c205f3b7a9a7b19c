"""Where a run begins: what goes on, what is refused, what is moved aside; nothing that was there is ever deleted."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline import checkpoint
from pipeline.checkpoint import save_checkpoint, seal
from pipeline.errors import NothingToDo, UserError
from pipeline.identity import differences, may_change
from pipeline.lock import release
from pipeline.runtime.arguments import EvaluateArguments, PretrainArguments, SFTArguments
from pipeline.runtime.command_line import resolve
from pipeline.runtime.console import run as run_stage
from pipeline.runtime.ppo_arguments import PPOArguments
from pipeline.runtime.record import Stage


def arguments(tmp_path: Path, **fields: object) -> SFTArguments:
    return resolve(SFTArguments(run_dir=str(tmp_path), mixed_precision="no", **fields))


def write(folder: Path) -> None:
    (folder / "state").write_text("x")


def begun(tmp_path: Path, inputs: dict[str, str | None] | None = None, **fields: object) -> Stage:
    """A run of sft that was killed after its checkpoint of step 1 and its line of step 2."""
    stage = Stage(arguments(tmp_path, **fields), "sft", inputs or {})
    stage.log({"step": 1, "loss": 3.0})
    save_checkpoint(stage.checkpoints, 1, write)
    stage.log({"step": 2, "loss": 2.0})
    return stage


def finished(tmp_path: Path, **fields: object) -> Stage:
    stage = begun(tmp_path, **fields)
    (stage.output_dir / "model.safetensors").write_text("weights")
    stage.finish({"eval_loss": 1.0}, tokens=1)
    return stage


def contents(folder: Path) -> dict[str, bytes]:
    """What is in every file but locks, by its name."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---- what goes on ---------------------------------------------------------------------------------------------------


def test_what_may_change_is_said_in_one_place() -> None:
    for stage in ("pretrain", "sft", "reward", "ppo"):
        for field in (
            "output_dir",
            "run_dir",
            "preset",
            "logging_steps",
            "save_steps",
            "gradient_checkpointing",
            "fresh",
        ):
            assert may_change(field, stage)
        for field in ("seed", "learning_rate", "eval_steps", "max_steps", "total_episodes", "batch_size"):
            assert not may_change(field, stage)
    assert [s for s in ("pretrain", "sft", "reward", "ppo") if may_change("per_device_train_batch_size", s)] == ["ppo"]
    assert may_change("eval_batch_size", "evaluate") and not may_change("batch_size", "evaluate")


def test_differences_name_each_field_and_each_input() -> None:
    then = {"config": {"a": 1, "b": None, "gone": 2}, "inputs": {"model": "x", "dataset": "y"}, "processes": 1}
    now = {"config": {"a": 1, "b": "c", "new": True}, "inputs": {"model": "z", "dataset": "y"}, "processes": 2}
    expected = [
        "b: none → c",
        "new: not there → True",
        "gone: 2 → not there",
        "model: other content",
        "processes: 1 → 2",
    ]
    assert differences(then, now) == expected and differences(now, now) == []


def test_a_run_goes_on_and_its_metrics_with_it(tmp_path: Path) -> None:
    begun(tmp_path)
    (tmp_path / "sft/metrics.jsonl").open("a").write('{"step": 3, "lo')  # cut off by the kill
    again = Stage(arguments(tmp_path, logging_steps=3, save_steps=7, preset="mine"), "sft", {})
    assert again.resume_from == again.checkpoints / "step-00000001" and again.seconds_before >= 0
    assert (tmp_path / "sft/metrics.jsonl").read_text().endswith('"lo'), "nothing changes before all has been checked"
    again.begin()
    assert steps(tmp_path / "sft") == [1], "the lines after the checkpoint are written again"


def test_ppo_goes_on_with_another_batch_on_the_device(tmp_path: Path) -> None:
    """After an out-of-memory."""

    def stage(**fields: object) -> Stage:
        return Stage(resolve(PPOArguments(run_dir=str(tmp_path), mixed_precision="no", **fields)), "ppo", {})

    first = stage()
    first.begin()
    save_checkpoint(first.checkpoints, 6, write)
    assert stage(per_device_train_batch_size=4, gradient_checkpointing=True).resume_from is not None
    with pytest.raises(UserError, match=r"cannot go on, as it began otherwise: kl_coef: 0\.05 → 0\.2"):
        stage(per_device_train_batch_size=4, kl_coef=0.2)


def test_evaluate_goes_on_with_another_batch_of_scores(tmp_path: Path) -> None:
    def stage(size: int) -> Stage:
        return Stage(resolve(EvaluateArguments(run_dir=str(tmp_path), eval_batch_size=size)), "evaluate", {})

    first = stage(64)
    first.begin()
    save_checkpoint(first.checkpoints, 6, write)
    assert stage(8).resume_from is not None


def test_a_renamed_run_goes_on(tmp_path: Path) -> None:
    model = tmp_path / "one" / "pretrain"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    begun(tmp_path / "one", {"model": str(model)}, dataset="stories")
    (tmp_path / "one").rename(tmp_path / "two")
    inputs = {"model": str(tmp_path / "two" / "pretrain")}
    moved = Stage(arguments(tmp_path / "two", dataset="stories"), "sft", inputs)
    assert moved.resume_from == tmp_path / "two/sft/checkpoints/step-00000001"


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again_in_place(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    stage = Stage(arguments(tmp_path), "sft", {})
    stage.log({"step": 1, "loss": 3.0})
    for name in ("checkpoint-4", "partial-00000004"):
        (stage.checkpoints / name).mkdir()
        (stage.checkpoints / name / "model.safetensors").write_text("half")
    (tmp_path / "sft" / "scores.json.partial").write_text("{")
    capsys.readouterr()
    again = Stage(arguments(tmp_path), "sft", {})
    assert again.resume_from is None
    again.begin()
    folder = tmp_path / "sft/checkpoints"
    assert capsys.readouterr().out.splitlines() == [
        f"sft  checkpoint {folder}/checkpoint-4 is not used: it was cut off while it was written",
        f"sft  checkpoint {folder}/partial-00000004 is removed: it was cut off while it was written",
    ]
    assert steps(tmp_path / "sft") == [] and not (tmp_path / "sft.old-1").exists()
    assert sorted(contents(tmp_path / "sft")) == ["checkpoints/identity.json", "metrics.jsonl"], "halves are gone"


def test_a_model_that_was_cut_off_while_it_was_written_leaves_nothing(tmp_path: Path) -> None:
    """safetensors writes `.tmpQMqQc2` and renames it; killed in between, that file stays (a kill of make torture)."""

    def killed(folder: Path) -> None:
        (folder / "adapter").mkdir(parents=True)
        (folder / ".tmpQMqQc2").write_text("half")
        raise KeyboardInterrupt

    def whole(folder: Path) -> None:
        (folder / "adapter").mkdir(parents=True)
        for name in ("adapter/config.json", "config.json", "model.safetensors"):
            (folder / name).write_text("new")

    def write(by: Callable[[Path], None]) -> None:
        stage = Stage(arguments(tmp_path), "sft", {})
        stage.begin()
        stage.write_model(by)
        release(stage.output_dir)

    with pytest.raises(KeyboardInterrupt):
        write(killed)
    release(tmp_path / "sft")
    for _ in range(2):  # also over what a run that was killed before it said that it was finished has moved
        write(whole)
    names = ["adapter/config.json", "checkpoints/identity.json", "config.json", "metrics.jsonl", "model.safetensors"]
    assert sorted(contents(tmp_path / "sft")) == names


def test_what_only_shows_rows_neither_writes_nor_locks_nor_is_refused(tmp_path: Path) -> None:
    finished(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    args = arguments(tmp_path, learning_rate=0.5)
    args.show = 3
    assert Stage(args, "sft", {}).resume_from is None
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_a_run_of_other_settings_is_refused_with_what_differs_and_kept(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("1")
    begun(tmp_path, {"dataset": str(data)})
    before = contents(tmp_path / "sft")
    data.write_text("2")
    changes = {"learning_rate": 1e-4, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 2}
    with pytest.raises(UserError) as refused:
        Stage(arguments(tmp_path, **changes), "sft", {"dataset": str(data)})
    for words in (
        "learning_rate: 0.001 → 0.0001",
        "per_device_train_batch_size: 32 → 16",
        "gradient_accumulation_steps: 1 → 2",
        "dataset: other content",
        "Give it what it had, or choose another output_dir; `--fresh True` begins anew and moves what is there aside",
    ):
        assert words in str(refused.value)
    assert contents(tmp_path / "sft") == before and not list(tmp_path.glob("*old*"))


def test_another_number_of_processes_and_another_precision_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.runtime import record

    begun(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(record, "use_bf16", lambda precision: True)  # `auto` on another machine
        with pytest.raises(UserError, match="bf16: False → True"):
            Stage(arguments(tmp_path), "sft", {})
    monkeypatch.setattr(record, "processes", lambda: 2)
    monkeypatch.setattr(record, "broadcast_object_list", lambda found: found)
    with pytest.raises(UserError, match="processes: 1 → 2"):
        Stage(arguments(tmp_path), "sft", {})


@pytest.mark.parametrize("end", [begun, finished])
def test_another_stages_folder_is_refused(tmp_path: Path, end) -> None:
    end(tmp_path)
    before = contents(tmp_path)
    for fresh in (False, True):
        args = resolve(PretrainArguments(run_dir=str(tmp_path), output_dir=f"{tmp_path}/sft", fresh=fresh))
        with pytest.raises(
            UserError, match="sft is the folder of the stage sft; choose another output_dir for pretrain"
        ):
            Stage(args, "pretrain", {})
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("output", "how"),
    [("model", "is"), ("link", "is"), ("model/inside", "lies in"), ("", "holds"), ("x/../model", "is")],
)
def test_an_input_is_refused_as_output(tmp_path: Path, output: str, how: str) -> None:
    model = tmp_path / "run" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (tmp_path / "run" / "link").symlink_to(model)
    place = tmp_path / "run" / output
    with pytest.raises(UserError, match=rf"output_dir .* {how} its own input \(model .*choose another one"):
        Stage(arguments(tmp_path, output_dir=str(place), fresh=True), "sft", {"model": str(model)})
    assert {path.name for path in tmp_path.rglob("*")} == {"run", "model", "link", "config.json"}, "nothing is written"


@pytest.mark.parametrize("name", ["checkpoints/my_weights.pt", "metrics.jsonl", "config.json", "notes.txt", "best/x"])
@pytest.mark.parametrize("fresh", [False, True])
def test_what_no_stage_wrote_is_left_alone(tmp_path: Path, name: str, fresh: bool) -> None:
    file = tmp_path / "sft" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(
        UserError, match=rf"has files that no stage wrote \({name.split('/')[0]}\), which sft would mix"
    ):
        Stage(arguments(tmp_path, fresh=fresh), "sft", {})
    assert contents(tmp_path) == {f"sft/{name}": b"mine"}


def test_what_is_in_nobodys_way_stays(tmp_path: Path) -> None:
    (tmp_path / "sft" / "empty").mkdir(parents=True)
    for name in ("train.log", ".settings", "README.md"):
        (tmp_path / "sft" / name).write_text("mine")
    Stage(arguments(tmp_path), "sft", {}).finish({})
    assert (tmp_path / "sft/train.log").read_text() == "mine"
    outputs = json.loads((tmp_path / "sft/stage.json").read_text())["outputs"]
    assert outputs == {}, "neither logs nor records nor hidden files are what a stage leaves"


def test_a_stage_killed_at_its_first_file_begins_again(tmp_path: Path) -> None:
    """Between opening identity.json.partial and renaming it, nothing else says whose folder it is."""
    (tmp_path / "sft" / "checkpoints").mkdir(parents=True)
    (tmp_path / "sft" / "checkpoints" / "identity.json.partial").write_text('{"stage"')
    Stage(arguments(tmp_path), "sft", {}).finish({})
    assert not list((tmp_path / "sft").rglob("*.partial"))


def test_files_in_the_way_of_folders(tmp_path: Path) -> None:
    (tmp_path / "sft").write_text("mine")
    with pytest.raises(UserError, match="sft is a file where a folder is needed"):
        Stage(arguments(tmp_path), "sft", {})
    assert (tmp_path / "sft").read_text() == "mine"
    stage = finished(tmp_path / "other")
    shutil.rmtree(stage.checkpoints)
    stage.checkpoints.write_text("mine")
    with pytest.raises(UserError, match="checkpoints is a file where a folder is needed"):
        Stage(arguments(tmp_path / "other"), "sft", {})


# ---- what is moved aside --------------------------------------------------------------------------------------------


def test_fresh_moves_a_run_aside_as_often_as_it_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    begun(tmp_path)
    first = contents(tmp_path / "sft")
    stage = Stage(arguments(tmp_path, learning_rate=1e-4, fresh=True), "sft", {})
    assert stage.resume_from is None and contents(tmp_path / "sft") == first, "not before all has been checked"
    stage.begin()
    assert contents(tmp_path / "sft.old-1") == first
    assert f"{tmp_path}/sft begins anew, as --fresh says: it is kept as {tmp_path}/sft.old-1" in capsys.readouterr().out
    stage.log({"step": 1})
    second = contents(tmp_path / "sft")
    Stage(arguments(tmp_path, learning_rate=1e-5, fresh=True), "sft", {}).begin()
    assert contents(tmp_path / "sft.old-1") == first and contents(tmp_path / "sft.old-2") == second
    assert sorted(contents(tmp_path / "sft")) == ["checkpoints/fresh", "checkpoints/identity.json", "metrics.jsonl"]
    assert not (tmp_path / "sft.old-1/.lock").exists()
    # Fresh is no setting: the same command goes on without it, and with it too, as a batch system may give it again
    save_checkpoint(tmp_path / "sft/checkpoints", 1, write)
    for fresh in (False, True):
        assert Stage(arguments(tmp_path, learning_rate=1e-5, fresh=fresh), "sft", {}).resume_from is not None


def test_a_finished_run_of_the_same_settings_is_left_and_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    finished(tmp_path)
    before, record = contents(tmp_path), tmp_path / "sft/stage.json"
    os.utime(record, (1, 1))
    monkeypatch.setattr("sys.argv", ["sft"])
    run_stage(lambda args: Stage(arguments(tmp_path, logging_steps=5), "sft", {}), SFTArguments)  # and no exit
    assert "sft is finished already with these settings and inputs; `--fresh True`" in capsys.readouterr().out
    assert contents(tmp_path) == before and time.time() - record.stat().st_mtime < 100, "make is content"
    assert not (tmp_path / "sft/.lock").exists()


def test_a_finished_run_is_known_without_its_checkpoints_and_after_a_move(tmp_path: Path) -> None:
    shutil.rmtree(finished(tmp_path / "one").checkpoints)
    (tmp_path / "one").rename(tmp_path / "two")
    with pytest.raises(NothingToDo):
        Stage(arguments(tmp_path / "two"), "sft", {})


def test_a_finished_run_of_other_settings_makes_room(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    finished(tmp_path)
    before = contents(tmp_path / "sft")
    stage = Stage(arguments(tmp_path, learning_rate=1e-4), "sft", {})
    assert contents(tmp_path / "sft") == before
    stage.begin()
    said = "was finished with other settings or inputs (learning_rate: 0.001 → 0.0001): it is kept as"
    assert said in capsys.readouterr().out.replace("\n", " ")
    assert contents(tmp_path / "sft.old-1") == before and not (tmp_path / "sft/model.safetensors").exists()


def test_a_finished_run_that_lacks_a_file_is_not_called_finished(tmp_path: Path) -> None:
    model = finished(tmp_path).output_dir / "model.safetensors"
    for damage in (lambda: model.write_text("weighty"), model.unlink):
        damage()
        with pytest.raises(
            UserError, match=r"is finished, but model.safetensors is gone or not as it was left; `--fresh"
        ):
            Stage(arguments(tmp_path), "sft", {})


def test_a_link_leads_to_the_new_folder(tmp_path: Path) -> None:
    (tmp_path / "disk/out").mkdir(parents=True)
    (tmp_path / "sft").symlink_to(tmp_path / "disk/out")
    begun(tmp_path)
    Stage(arguments(tmp_path, fresh=True), "sft", {}).begin()
    assert (tmp_path / "sft").is_symlink() and (tmp_path / "disk/out/checkpoints/identity.json").exists()
    assert (tmp_path / "disk/out.old-1/checkpoints/step-00000001/state").read_text() == "x"


def test_a_folder_that_cannot_be_moved_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(tmp_path)
    before = contents(tmp_path)

    def busy(*_: object) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(UserError, match=r"cannot be moved aside \(Device or resource busy\); move it, or choose"):
        Stage(arguments(tmp_path, fresh=True), "sft", {}).begin()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("call", ["write_json", "hold"])
def test_a_kill_while_a_run_is_moved_aside_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    from pipeline.runtime import resume

    begun(tmp_path)
    before = contents(tmp_path / "sft")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(resume, call, killed)
        with pytest.raises(KeyboardInterrupt):
            Stage(arguments(tmp_path, fresh=True), "sft", {}).begin()
    assert contents(tmp_path / "sft.old-1") == before
    again = Stage(arguments(tmp_path), "sft", {})
    again.begin()
    assert again.resume_from is None and contents(tmp_path / "sft.old-1") == before


# ---- what is damaged ------------------------------------------------------------------------------------------------


def test_the_identity_is_in_each_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A checkpoint of other settings that could not be removed is not gone on from."""
    old = begun(tmp_path / "a", learning_rate=5e-4)
    stage = Stage(arguments(tmp_path), "sft", {})
    stage.begin()
    shutil.copytree(old.checkpoints / "step-00000001", stage.checkpoints / "step-00000001")
    before = contents(tmp_path / "sft")
    again = Stage(arguments(tmp_path), "sft", {})
    assert again.resume_from is None
    said = capsys.readouterr().out.replace("\n", " ")
    assert "is not used: it was written with other settings (learning_rate: 0.0005 → 0.001)" in said
    again.begin()
    assert contents(tmp_path / "sft.old-1") == before, "what cannot be used is kept all the same"


@pytest.mark.parametrize("content", ["", '{"stage": "sf', "[]", "123"])
def test_a_damaged_identity_is_no_end_where_a_checkpoint_has_it(tmp_path: Path, content: str) -> None:
    stage = begun(tmp_path)
    (stage.checkpoints / "identity.json").write_text(content)
    again = Stage(arguments(tmp_path), "sft", {})
    assert again.resume_from is not None
    with pytest.raises(UserError, match="learning_rate"):
        Stage(arguments(tmp_path, learning_rate=1e-4), "sft", {})
    again.begin()
    assert json.loads((stage.checkpoints / "identity.json").read_text())["stage"] == "sft"


def test_a_damaged_identity_alone_is_a_sentence(tmp_path: Path) -> None:
    stage = Stage(arguments(tmp_path), "sft", {})
    stage.log({"step": 1})
    (stage.checkpoints / "identity.json").write_text("")
    with pytest.raises(UserError, match="was begun by a run that does not say with which settings; `--fresh True`"):
        Stage(arguments(tmp_path), "sft", {})
    Stage(arguments(tmp_path, fresh=True), "sft", {}).begin()
    assert steps(tmp_path / "sft.old-1") == [1]


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"stage": "sft"}', '{"stage": "sft", "config": 3, "inputs": 1}'])
def test_a_damaged_record_is_a_sentence(tmp_path: Path, content: str) -> None:
    finished(tmp_path)
    (tmp_path / "sft/stage.json").write_text(content)
    with pytest.raises(UserError, match=r"stage.json is damaged; `--fresh True` begins anew"):
        Stage(arguments(tmp_path), "sft", {})
    Stage(arguments(tmp_path, fresh=True), "sft", {}).begin()
    assert (tmp_path / "sft.old-1/stage.json").read_text() == content


@pytest.mark.parametrize("damage", ["missing", "123\n", "not utf-8", "a folder"])
def test_damaged_metrics_come_back_from_the_checkpoint(tmp_path: Path, damage: str) -> None:
    begun(tmp_path)
    file = tmp_path / "sft/metrics.jsonl"
    file.unlink()
    if damage == "a folder":
        file.mkdir()
        with pytest.raises(UserError, match=r"metrics.jsonl is a folder where a file is needed"):
            Stage(arguments(tmp_path), "sft", {})
        return
    if damage != "missing":
        file.write_bytes(b"\xff\xfe" if damage == "not utf-8" else damage.encode())
    again = Stage(arguments(tmp_path), "sft", {})
    again.begin()
    assert again.resume_from is not None and steps(tmp_path / "sft") == [1]


def test_a_kill_while_metrics_are_written_anew_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(tmp_path)
    before = (tmp_path / "sft/metrics.jsonl").read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "fsync", killed)
        patch.setattr("pipeline.runtime.resume.write_json", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            Stage(arguments(tmp_path), "sft", {}).begin()
    assert (tmp_path / "sft/metrics.jsonl").read_bytes() == before


def test_only_damaged_checkpoints_are_moved_aside(tmp_path: Path) -> None:
    stage = begun(tmp_path)
    (stage.checkpoints / "step-00000001/state").write_text("torn")
    before = contents(tmp_path / "sft")
    again = Stage(arguments(tmp_path), "sft", {})
    again.begin()
    assert again.resume_from is None and contents(tmp_path / "sft.old-1") == before


def trainer_checkpoint(folder: Path, without: str = "") -> Path:
    """What transformers' Trainer leaves, without its model."""
    folder.mkdir(parents=True)
    files = {
        "optimizer.pt": {"state": {}, "param_groups": []},
        "scheduler.pt": {"last_epoch": 1},
        "rng_state.pth": {"python": 1, "numpy": 2, "cpu": torch.zeros(2)},
    }
    for name, content in files.items():
        torch.save(content, folder / name)
    (folder / "trainer_state.json").write_text('{"global_step": 1, "log_history": []}')
    if without:
        (folder / without).unlink()
    return folder


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_trainers_checkpoint_without_a_part_is_passed_over(tmp_path: Path, name: str) -> None:
    """The Trainer would go on without it, in silence, and end with other weights."""
    whole = trainer_checkpoint(tmp_path / "checkpoint-1")
    part = trainer_checkpoint(tmp_path / "checkpoint-2", without=name)
    rubbish = trainer_checkpoint(tmp_path / "checkpoint-3")
    (rubbish / name).write_bytes(b"rubbish")
    other = trainer_checkpoint(tmp_path / "checkpoint-4")
    torch.save({"else": 1}, other / name)
    for folder in (whole, part, rubbish, other):
        seal(folder)
    said: list[str] = []
    assert checkpoint.latest_checkpoint(tmp_path, said.append) == whole
    assert [name in said[0], name in said[1]] == [True, True] and name.split(".")[0] in said[2]
    assert not any("weights_only" in sentence for sentence in said)
