"""Wrong input stops before work starts: one sentence on stderr, exit code 2, nothing overwritten."""

import errno
import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from conftest import ROOT

from pipeline.runtime.arguments import PretrainArguments, RewardArguments, SFTArguments
from pipeline.runtime.console import run as run_stage
from pipeline.runtime.ppo_arguments import PPOArguments
from pipeline.text.tokenizer import train_tokenizer
from stages import ppo, pretrain, reward, sft

STAGES = {
    "pretrain": (pretrain.main, PretrainArguments),
    "sft": (sft.main, SFTArguments),
    "reward": (reward.main, RewardArguments),
    "ppo": (ppo.main, PPOArguments),
}


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path, smoke: Path):
    """Run a stage in this process and return the sentence with which it stops."""

    def run(stage: str, *words: str) -> str:
        base = [stage, "--config", str(ROOT / f"configs/smoke/{stage}.yaml"), "--run_dir", str(smoke)]
        if "--output_dir" not in words:
            base += ["--output_dir", str(tmp_path / "out")]
        monkeypatch.setattr("sys.argv", [*base, *words])
        with pytest.raises(SystemExit) as leaving:
            run_stage(*STAGES[stage])
        captured = capsys.readouterr()
        assert leaving.value.code == 2
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
        assert not (tmp_path / "out" / "model.safetensors").exists()
        return captured.err

    return run


def test_missing_and_empty_files(fails, tmp_path: Path) -> None:
    assert "nothing.txt" in fails("pretrain", "--dataset", str(tmp_path / "nothing.txt"))
    (tmp_path / "empty.txt").write_text("")
    assert "empty.txt" in fails("pretrain", "--dataset", str(tmp_path / "empty.txt"))
    (tmp_path / "short.txt").write_text("one\n")
    assert "short" in fails("pretrain", "--dataset", str(tmp_path / "short.txt"))


def test_wrong_columns(fails, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"a{i}", "reply": "b"}) + "\n" for i in range(50)))
    for stage in ("sft", "reward", "ppo"):
        sentence = fails(stage, "--dataset", str(rows))
        assert "rows.jsonl" in sentence and "question" in sentence


def test_bad_rows_are_named(fails, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n')
    sentence = fails("sft", "--dataset", str(rows))
    assert "rows.jsonl" in sentence and "2" in sentence


def test_unknown_key_and_wrong_type(fails) -> None:
    assert "did you mean 'max_steps'" in fails("sft", "--max_step", "3")
    assert "max_steps: 'few' is not of type int" in fails("sft", "--max_steps", "few")


def test_stage_before_the_one_it_needs(fails, tmp_path: Path) -> None:
    words = ("--run_dir", str(tmp_path / "fresh"), "--output_dir", str(tmp_path / "fresh/out"))
    assert "run `make tokenizer" in fails("pretrain", *words)
    assert "run `make pretrain" in fails("sft", *words)
    assert "run `make sft" in fails("reward", *words)
    assert "run `make sft" in fails("ppo", *words)
    half = tmp_path / "fresh" / "pretrain"  # killed before it was complete
    (half / "checkpoints").mkdir(parents=True)
    (half / "config.json").write_text("{}")
    assert "is not complete; run `make pretrain" in fails("sft", *words)


def test_tokenizer_that_does_not_fit(fails, smoke: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(smoke / "pretrain", other, ignore=shutil.ignore_patterns("stage.json", "checkpoints"))
    train_tokenizer(["a b c " * 50, "".join(map(chr, range(32, 2000)))] * 3, 1500).save_pretrained(other)
    sentence = fails("sft", "--model_name_or_path", str(other))
    assert "tokenizer has" in sentence and "1024 embeddings" in sentence


def test_prompt_longer_than_the_context(fails, tmp_path: Path) -> None:
    rows = tmp_path / "prompts.jsonl"
    prompts = [f"Write about {i}." if i % 3 else f"{i} " + "word " * 300 for i in range(30)]
    rows.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    sentence = fails("ppo", "--dataset", str(rows), "--overlong", "refuse")
    assert "prompts.jsonl, " in sentence and "do not fit the 160 tokens that the policy can read" in sentence


def test_pair_longer_than_max_length(fails) -> None:
    assert "raise max_length" in fails("reward", "--max_length", "20")
    assert "max_length 20 allows" in fails("reward", "--max_length", "20", "--overlong", "refuse")


def test_unwritable_folder_and_full_disk(fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "cannot be written" in fails("sft", "--output_dir", str(tmp_path / "file" / "out"))
    assert (tmp_path / "file").read_text() == "in the way"
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 1000))
    assert "make room" in fails("sft")


def test_disk_that_fills_while_running(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def main(_: SFTArguments) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x/model.safetensors")

    monkeypatch.setattr("sys.argv", ["sft"])
    with pytest.raises(SystemExit) as leaving:
        run_stage(main, SFTArguments)
    assert leaving.value.code == 2
    expected = "error: No space left on device: runs/x/model.safetensors; nothing more was written\n"
    assert capsys.readouterr().err == expected


def test_a_stage_writes_over_no_input_and_no_other_stage(fails, smoke: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in smoke.rglob("*")}
    sentence = fails("sft", "--output_dir", str(smoke / "pretrain"))
    assert "is its own input (model" in sentence and "choose another one" in sentence
    assert "is the folder of the stage ppo" in fails("reward", "--output_dir", str(smoke / "ppo"), "--fresh", "True")
    assert "holds its own input (tokenizer" in fails("pretrain", "--output_dir", str(smoke))
    assert {path: path.stat().st_mtime_ns for path in smoke.rglob("*")} == before


def test_an_input_that_was_changed_is_named(fails, smoke: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(smoke, run)
    config = json.loads((run / "reward/config.json").read_text())
    del config["reward_mean"], config["reward_std"]
    (run / "reward/config.json").write_text(json.dumps(config))
    sentence = fails("ppo", "--reward", str(run / "reward"), "--critic_name_or_path", str(run / "reward"))
    assert "reward/config.json is not as stages.reward left it" in sentence
    with (run / "sft/model.safetensors").open("r+b") as stream:
        stream.seek(5000)
        byte = stream.read(1)
        stream.seek(5000)
        stream.write(bytes([byte[0] ^ 1]))
    assert "sft/model.safetensors is not as stages.sft left it" in fails(
        "ppo", "--model_name_or_path", str(run / "sft")
    )
