"""The reward stage: one text for training and for scores, exact figures, pairs that are too long; and what it has in
common with pretrain and sft: figures that are equal on two processes, the precision that the field asks for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from conftest import ROOT
from datasets import Dataset
from test_sft import CHATML, base_tokenizer
from tiny_models import tiny_config, tiny_policy, tiny_tokenizer, write_models

from pipeline.errors import UserError
from pipeline.model.gpt import GPTForSequenceClassification
from pipeline.rewards import RewardModel
from pipeline.runtime.arguments import PretrainArguments, RewardArguments, SFTArguments
from pipeline.runtime.command_line import resolve
from pipeline.runtime.record import Stage
from pipeline.text.data import Loaded
from stages import pretrain, reward, sft

USER = {"role": "user", "content": "Write about Ben."}


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def loaded(rows: list[dict]) -> Loaded:
    return Loaded(Dataset.from_list(rows), [f"pairs.jsonl, line {i}" for i in range(2, len(rows) + 2)])


def text_pairs(count: int = 7) -> list[dict]:
    """Of unlike lengths, so that batches differ."""
    return [{"prompt": f"Say {i}:", "chosen": " Ben ran." * (1 + i), "rejected": " He was sad."} for i in range(count)]


@pytest.mark.parametrize("form", ["text", "text with its end", "turns", "several turns"])
def test_training_reads_the_very_ids_that_are_scored(tmp_path: Path, form: str) -> None:
    tokenizer = base_tokenizer(CHATML, "<|im_start|>", "<|im_end|>")
    rows = {
        "text": text_pairs(2),
        "text with its end": [{"prompt": "Say:", "chosen": " Ben ran.<|endoftext|>", "rejected": " He was sad."}],
        "turns": [{"prompt": [USER], "chosen": said("Ben ran."), "rejected": said("He was sad.")}],
        "several turns": [{"prompt": [USER], "chosen": [*said("Ben."), USER, *said("He.")], "rejected": said("Ann.")}],
    }[form]
    GPTForSequenceClassification(tiny_config(vocab_size=len(tokenizer))).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = RewardModel(str(tmp_path), mixed_precision="no")
    made = reward.prepare(resolve(RewardArguments()), tokenizer, loaded(rows), "pairs")
    for side in ("chosen", "rejected"):
        scored = model._encode([row["prompt"] for row in rows], [row[side] for row in rows])
        assert made.tokens[f"{side}_ids"][:] == scored
    assert all(ids.count(tokenizer.eos_token_id) == (form[:4] == "text") for ids in made.tokens["chosen_ids"])
    if form == "several turns":  # each turn stands where it was said
        assert tokenizer.decode(made.tokens["chosen_ids"][0]).count("<|im_start|>") == 4


def test_pairs_that_are_too_long_are_dropped_or_refused() -> None:
    args, tokenizer = resolve(RewardArguments(max_length=30)), tiny_tokenizer()
    made = reward.prepare(args, tokenizer, loaded(text_pairs()), "train pairs")
    lengths = made.view.fit.lengths
    kept = sum(length <= 30 for length in lengths)
    assert 0 < kept < 7 and made.rows.num_rows == made.tokens.num_rows == kept
    assert made.rows["prompt"][:] == [f"Say {i}:" for i in range(kept)]
    first, args.overlong = next(i for i, length in enumerate(lengths) if length > 30), "refuse"
    with pytest.raises(UserError, match=rf"reward: pairs\.jsonl, line {first + 2} has {lengths[first]} tokens, more"):
        reward.prepare(args, tokenizer, loaded(text_pairs()), "train pairs")


def test_held_out_figures_are_means_over_pairs(tmp_path: Path) -> None:
    """Seven pairs in batches of two: a mean of batches would be another number."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    model = GPTForSequenceClassification(tiny_config()).train()
    args = resolve(RewardArguments(run_dir=str(tmp_path), per_device_train_batch_size=1, mixed_precision="no"))
    pairs = reward.prepare(args, tokenizer, loaded(text_pairs()), "pairs").tokens
    trainer = reward.build_trainer(args, Stage(args, "reward", {}), model, tokenizer, pairs, pairs)
    scores = [
        [model(torch.tensor([row[f"{side}_ids"]])).logits.item() for side in ("chosen", "rejected")] for row in pairs
    ]
    chosen, rejected = torch.tensor(scores, dtype=torch.float64).T
    figures = trainer.evaluate()
    assert figures["eval_accuracy"] == pytest.approx((chosen > rejected).double().mean().item(), abs=1e-12)
    assert figures["eval_margin"] == pytest.approx((chosen - rejected).mean().item(), abs=1e-5)
    assert figures["eval_loss"] == pytest.approx(F.softplus(rejected - chosen).mean().item(), abs=1e-5)
    assert figures["eval_mean_reward"] == pytest.approx(torch.cat([chosen, rejected]).mean().item(), abs=1e-5)


# ---- on one and two processes ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_models(tmp_path_factory.mktemp("run"))
    rows = [row | {"completion": row["chosen"]} for row in text_pairs(11) * 12]
    rows = [row | {"prompt": f"Say {i}:"} for i, row in enumerate(rows)]
    (run / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_figures_are_the_same_on_one_and_two_processes(run: Path, stage: str) -> None:
    """Of training and of held-out rows, of which the last batch is a part of one."""
    words = {"run_dir": run, "dataset": run / "rows.jsonl", "max_steps": 12, "mixed_precision": "no", "warmup_steps": 2}
    words |= {"logging_steps": 5, "eval_steps": 6, "save_steps": 12, "learning_rate": 1e-3}
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for processes, program in {1: [], 2: two}.items():
        given = words | {"output_dir": run / f"{stage}{processes}", "per_device_train_batch_size": 8 // processes}
        options = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, *program, "-m", f"stages.{stage}", *options]
        command = [sys.executable, *program, "-m", f"stages.{stage}", *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = lines(run / f"{stage}1"), lines(run / f"{stage}2")
    assert [row["step"] for row in one] == [row["step"] for row in two] and len(one) >= 4
    exact = 0
    for here, there in zip(one, two, strict=True):
        for name in here.keys() & there.keys() - {"time", "seconds_left", "memory_mb", "tokens_per_s"}:
            assert there[name] == pytest.approx(here[name], rel=2e-4, abs=2e-5), (name, here, there)
            exact += name in ("eval_accuracy", "eval_token_accuracy") and here[name] == there[name]
    assert exact
    records = [json.loads((run / f"{stage}{n}" / "stage.json").read_text()) for n in (1, 2)]
    assert records[0]["tokens"] == records[1]["tokens"] and records[1]["processes"] == 2


# ---- precision ------------------------------------------------------------------------------------------------------


def trainer_of(name: str, run: Path, folder: Path, mixed_precision: str):
    given = {"run_dir": str(run), "output_dir": str(folder / name), "mixed_precision": mixed_precision}
    tokenizer = tiny_tokenizer()
    if name == "pretrain":
        args = resolve(PretrainArguments(**given))
        settings = pretrain.training_arguments(args, Stage(args, name, {}))
        rows = Dataset.from_list([{"input_ids": [7, 8, 9], "row": 0}])
        return pretrain.PretrainTrainer(model=tiny_policy(0), args=settings, train_dataset=rows, eval_dataset=rows)
    if name == "sft":
        args = resolve(SFTArguments(**given))
        rows = [{"prompt": "a", "completion": " b"}]
        data = sft.prepare(args, tokenizer, loaded(rows), "rows").rows
        return sft.build_trainer(args, Stage(args, name, {}), tiny_policy(0), tokenizer, data, data)
    args = resolve(RewardArguments(**given))
    data = reward.prepare(args, tokenizer, loaded(text_pairs()), "pairs").tokens
    model = GPTForSequenceClassification(tiny_config())
    return reward.build_trainer(args, Stage(args, name, {}), model, tokenizer, data, data)


@pytest.mark.parametrize("name", ["pretrain", "sft", "reward"])
@pytest.mark.parametrize(("launched", "field"), [("bf16", "no"), ("no", "bf16"), ("fp16", "no"), ("fp16", "bf16")])
def test_the_stages_own_precision_holds(run, tmp_path, monkeypatch, name: str, launched: str, field: str) -> None:
    """`accelerate launch --mixed_precision bf16` leaves a word in the environment."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    trainer = trainer_of(name, run, tmp_path, field)
    assert trainer.accelerator.mixed_precision == field
    with trainer.accelerator.autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if field == "bf16" else torch.float32)


@pytest.mark.parametrize(("launched", "field"), [("bf16", "no"), ("no", "bf16")])
def test_the_precision_of_a_stages_own_accelerator_holds(run, tmp_path, monkeypatch, launched: str, field: str) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    args = resolve(SFTArguments(run_dir=str(run), output_dir=str(tmp_path / "ppo"), mixed_precision=field))
    assert Stage(args, "ppo", {}).accelerator.mixed_precision == field
