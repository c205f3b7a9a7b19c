"""What a stage reads is what the stage before it left there, or it is said which file is not."""

import json
import re
import shutil
from pathlib import Path

import pytest

from pipeline.checkpoint import save_checkpoint, sha256_of
from pipeline.errors import NothingToDo, UserError
from pipeline.runtime import inputs
from pipeline.runtime.arguments import PretrainArguments, SFTArguments
from pipeline.runtime.command_line import resolve
from pipeline.runtime.ppo_arguments import PPOArguments
from pipeline.runtime.record import Stage


def open_sft(run: Path, key: str = "model", place: str = "pretrain") -> Stage:
    return Stage(resolve(SFTArguments(run_dir=str(run), output_dir=f"{run}/sft")), "sft", {key: str(run / place)})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a finished stage pretrain."""
    stage = Stage(resolve(PretrainArguments(run_dir=str(tmp_path))), "pretrain", {})
    stage.log({"step": 1, "loss": 1.0})
    save_checkpoint(stage.checkpoints, 1, lambda folder: (folder / "model.bin").write_text("x"))
    for name in ("config.json", "generation_config.json", "model.safetensors", "best/config.json"):
        (stage.output_dir / name).parent.mkdir(exist_ok=True)
        (stage.output_dir / name).write_text('{"reward_mean": 1}')
    stage.finish({})
    return tmp_path


def test_a_stage_records_what_it_leaves(run: Path) -> None:
    outputs = json.loads((run / "pretrain/stage.json").read_text())["outputs"]
    names = ["best/config.json", "config.json", "generation_config.json", "model.safetensors"]
    assert outputs == {name: sha256_of(run / "pretrain" / name) for name in names}


@pytest.mark.parametrize("name", ["model.safetensors", "generation_config.json", "config.json"])
@pytest.mark.parametrize("damage", ["a bit", "cut", "gone"])
def test_a_file_that_is_not_as_it_was_left_is_named(run: Path, name: str, damage: str) -> None:
    file = run / "pretrain" / name
    content = file.read_bytes()
    file.unlink()
    if damage != "gone":
        file.write_bytes(bytes([content[0] ^ 1]) + content[1:] if damage == "a bit" else content[:-1])
    expected = (
        rf"sft: model .*/{re.escape(name)} is not as stages.pretrain left it; make it anew \(`--fresh True`\), or"
    )
    with pytest.raises(UserError, match=expected):
        open_sft(run)
    assert not (run / "sft").exists(), "before anything is written"


def test_a_change_on_purpose_is_taken_as_the_sentence_says(run: Path) -> None:
    (run / "pretrain/generation_config.json").write_text('{"eos_token_id": [7]}')
    record = json.loads((run / "pretrain/stage.json").read_text())
    del record["outputs"]["generation_config.json"]
    (run / "pretrain/stage.json").write_text(json.dumps(record))
    assert open_sft(run).inputs["model"]["sha256"]


def test_parts_of_a_folder_are_held_to_its_record(run: Path) -> None:
    assert open_sft(run, place="pretrain/best").inputs["model"]["path"].endswith("best")
    (run / "pretrain/best/config.json").write_text("{}")
    with pytest.raises(UserError, match=r"best/config.json is not as stages.pretrain left it"):
        open_sft(run, place="pretrain/best")
    open_sft(run)  # which does not read it
    (run / "pretrain/config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config.json is not as"):
        open_sft(run, key="dataset", place="pretrain/config.json")


def test_a_checkpoint_is_held_to_its_manifest(run: Path) -> None:
    place = "pretrain/checkpoints/step-00000001"
    open_sft(run, place=place)
    (run / place / "model.bin").write_text("y")
    with pytest.raises(
        UserError, match=r"step-00000001 is a damaged checkpoint: model.bin is damaged; give another one"
    ):
        open_sft(run, place=place)


def test_the_report_holds_the_figures_beside_a_record_to_it(run: Path) -> None:
    open_sft(run, place="pretrain/stage.json")
    (run / "pretrain/generation_config.json").write_text('{"reward_mean": 2}')
    with pytest.raises(UserError, match=r"generation_config.json is not as stages.pretrain left it"):
        open_sft(run, place="pretrain/stage.json")


@pytest.mark.parametrize("record", ['{"stage": "pretrain"}', '{"stage": "pretrain", "outputs": 3}', None])
def test_a_folder_without_sums_is_taken_as_it_is(run: Path, record: str | None) -> None:
    file = run / "pretrain/stage.json"
    file.unlink()
    if record:
        file.write_text(record)
    else:
        shutil.rmtree(run / "pretrain/checkpoints")
    assert len(open_sft(run).inputs["model"]["sha256"]) == 64


def test_an_empty_record_does_not_switch_the_check_off(run: Path) -> None:
    (run / "pretrain/stage.json").write_text("{}")
    with pytest.raises(UserError, match=r"stage\.json is no record of a stage; make the folder anew"):
        open_sft(run)


def test_a_damaged_record_is_a_sentence(run: Path) -> None:
    (run / "pretrain/stage.json").write_text('{"stage": ')
    with pytest.raises(UserError, match=r"pretrain/stage.json is damaged; make the folder anew \(`--fresh True`\)"):
        open_sft(run)


def test_a_folder_that_another_run_has_begun_is_not_read(run: Path, tmp_path: Path) -> None:
    (run / "pretrain/stage.json").unlink()
    elsewhere = SFTArguments(run_dir=str(tmp_path / "other"))
    with pytest.raises(UserError, match="pretrain is not complete; let the stage that writes it end first"):
        Stage(resolve(elsewhere), "sft", {"model": str(run / "pretrain")})


def test_what_does_not_change_what_it_is_does_not_change_the_fingerprint(run: Path) -> None:
    one = open_sft(run, key="dataset").inputs["dataset"]["sha256"]
    for name in (".probe-1", ".cache/x.json", "train.log", "a.json.partial", "README.md", "metrics.jsonl", ".lock"):
        (run / "pretrain" / name).parent.mkdir(exist_ok=True)
        (run / "pretrain" / name).write_text("else")
    (run / "pretrain/checkpoints/identity.json").write_text("{}")
    assert open_sft(run, key="dataset").inputs["dataset"]["sha256"] == one
    (run / "pretrain/more.json").write_text("{}")
    assert open_sft(run, key="dataset").inputs["dataset"]["sha256"] != one


def test_a_folder_that_is_read_for_two_things_is_hashed_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    monkeypatch.setattr(inputs, "sha256_of", lambda file: hashed.append(file.name) or sha256_of(file))
    both = {"model": str(run / "pretrain"), "critic": str(run / "pretrain")}
    stage = Stage(resolve(SFTArguments(run_dir=str(run))), "sft", both)
    assert hashed == ["config.json", "generation_config.json", "model.safetensors"]
    assert stage.inputs["model"] == stage.inputs["critic"]


def test_a_file_too_large_to_read_each_time_is_only_looked_for(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "HASHED_WHOLE", 3)
    assert set(inputs.outputs_of(run / "pretrain").values()) == {None}


def test_an_unreadable_file_is_a_sentence(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(file: Path) -> str:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(inputs, "sha256_of", refuses)
    with pytest.raises(UserError, match=r"pretrain/config.json cannot be read \(Permission denied\)"):
        open_sft(run)


def test_the_code_of_a_reward_is_an_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on, or is called finished, with another reward under the old name would be of neither."""
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "my_reward_code.py"
    file.write_text("def score(prompts, completions): ...")

    def stage() -> Stage:
        args = PPOArguments(
            run_dir=str(tmp_path / "run"), reward=["my_reward_code:score"], gold="reward_data.stories:gold"
        )
        return Stage(resolve(args), "ppo", {})

    first = stage()
    first.finish({})
    assert list(first.inputs) == ["my_reward_code:score", "reward_data.stories:gold"]
    assert all(len(read["sha256"]) == 64 for read in first.inputs.values())
    with pytest.raises(NothingToDo):
        stage()
    file.write_text("def score(prompts, completions): return 1")
    assert stage().resume_from is None
    (tmp_path / "run/ppo/stage.json").unlink()
    with pytest.raises(UserError, match="my_reward_code:score: other content"):
        stage()
    assert (
        inputs.code_of({"dataset": "nowhere_module:config", "lr": 1, "model": "a/b:c", "x": "no such.module:f"}) == {}
    )
