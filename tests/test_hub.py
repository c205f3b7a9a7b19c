"""The recipes for the hub: their checker, their prompts, and each to its end on a tiny model and local files."""

import importlib
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from ppo_tools import policy, prompts, trainer
from test_arguments import STAGE_ARGUMENTS
from test_sft import CHATML, base_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers import trainers as tokenizer_trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from benchmarks.check import check, check_all
from pipeline.errors import UserError
from pipeline.model.load import load_critic
from pipeline.model.sampler import generate
from pipeline.report.gather import Run, read_run
from pipeline.rewards import load_rewards
from pipeline.runtime.command_line import parse
from pipeline.text.data import load_instructions, load_prompts
from reward_data.gsm8k import final_number, strict

ASKED = ' Let\'s think step by step and output the final answer after "####".'


# ---- the checker ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("6 * 7 = <<6*7=42>>42\n#### 42", "42"),
        ("#### -3", "-3"),
        ("####-3", "-3"),
        ("#### −3", "-3"),  # the sign of typesetting
        ("#### +3", "3"),
        ("#### 1,234,567", "1234567"),
        ("#### $18", "18"),
        ("#### -$5", "-5"),
        ("#### $-5", "-5"),
        ("#### \\$18", "18"),
        ("#### 18 dollars", "18"),
        ("#### 18%", "18"),
        ("#### 18kg.", "18"),
        ("#### 18.", "18"),
        ("#### 18.50", "18.5"),
        ("#### $1,234.50 a year", "1234.5"),
        ("#### .5", "0.5"),
        ("#### 007", "7"),
        ("#### **18**", "18"),
        ("**#### 18**", "18"),
        ("####\n18", "18"),
        ("#### 18\nSo she has 20 left.", "18"),
        ("#### 18 ... no, wait.\n#### 20", "20"),  # the last one counts
        ("#### 18\n####", None),  # and there it says nothing
        ("##### 18", "18"),  # the last four signs are the mark
        ("The answer is 18.", None),
        ("\\boxed{18}", None),
        ("", None),
        ("####", None),
        ("#### eighteen", None),
        ("#### x = 18", None),
        ("#### 1/2", None),
        ("#### 3 + 4 = 7", None),
        ("#### 5 or 6", None),
        ("#### 10:30", None),
        ("#### 12,34", None),
        ("#### 1 000", None),
        ("#### --5", None),
    ],
)
def test_the_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


def test_the_strict_score_compares_numbers_not_texts() -> None:
    said = ["#### 1000.0", "#### 1,000", "1000", "#### 1001", "#### 999 #### 1000", "#### 1000 #### 999"]
    expected = [1.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    assert strict(["q"] * 6, said, answer=["so many\n#### 1,000"] * 6) == expected
    talk = [{"role": "assistant", "content": "#### -3"}]
    assert strict([[]], [talk], answer=["#### -3"], question=["?"]) == [1.0]
    with pytest.raises(ValueError, match="the column 'answer' has no number after ####"):
        strict(["q"], ["#### 3"], answer=["3"])


# ---- prompts --------------------------------------------------------------------------------------------------------


def gsm8k_rows(count: int, start: int = 0) -> list[dict]:
    return [
        {"question": f"Ann has {i} kites and finds 2. How many?", "answer": f"{i}+2=<<{i}+2={i + 2}>>\n#### {i + 2}"}
        for i in range(start, start + count)
    ]


def write(folder: Path, **splits: list[dict]) -> str:
    """A data set as the hub gives it: a file a split."""
    folder.mkdir(parents=True)
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_a_question_is_asked_with_its_instruction_and_its_answer_goes_to_the_reward(tmp_path: Path) -> None:
    where = write(tmp_path / "gsm8k", train=gsm8k_rows(8), test=gsm8k_rows(4, 100))
    loaded = load_prompts(where, split="ppo", suffix=ASKED)
    assert loaded.rows.column_names == ["prompt", "answer"] and len(loaded.rows) == 8
    row = min(loaded.rows, key=lambda row: row["answer"])
    assert row["prompt"] == [{"role": "user", "content": gsm8k_rows(1)[0]["question"] + ASKED}]
    assert row["answer"] == gsm8k_rows(1)[0]["answer"]
    assert f"each prompt ends with {ASKED!r}" in loaded.notes
    reward = load_rewards(["reward_data.gsm8k:strict"])
    right = [[{"role": "assistant", "content": row["answer"]}] for row in loaded.rows]
    assert reward(loaded.rows["prompt"], right, answer=loaded.rows["answer"]) == [1.0] * 8
    assert len(load_prompts(where, split="validation").rows) == 4  # test stands in, as there is no other
    assert load_prompts(where, split="test", suffix=None).rows[0]["prompt"][0]["content"].endswith("How many?")
    taught = load_instructions(where, split="train").rows[0]
    assert taught["completion"][0]["content"].rpartition("#### ")[2].isdigit()


# ---- options that the recipes needed --------------------------------------------------------------------------------


def test_a_critic_that_starts_at_zero(tmp_path: Path) -> None:
    policy().save_pretrained(tmp_path)
    ids = torch.arange(6, 12)[None]
    zero, normal = (load_critic(str(tmp_path), head=head)(ids).logits for head in ("zero", "normal"))
    assert torch.equal(zero, torch.zeros_like(zero)) and normal.abs().sum() > 0


def test_held_out_answers_are_greedy_where_that_is_asked_for(tmp_path: Path) -> None:
    made = trainer(tmp_path, eval_steps=4, eval_temperature=0.0, eval_rows=prompts(6))
    evaluator = made.evaluator
    answers = evaluator.answers_of(made.models.policy, with_kl=False)
    batch = evaluator.prompts.take(range(6))
    ends, pad = made.answerer.end_tokens, made.answerer.pad_token
    likeliest = generate(
        made.models.policy, batch.ids, max_new_tokens=6, temperature=0.0, eos_token_id=ends, pad_token_id=pad
    )
    assert [answer.length for answer in answers] == likeliest.response_lengths.tolist()
    sampled = trainer(tmp_path, eval_steps=4, eval_rows=prompts(6)).evaluator
    assert [a.text for a in sampled.answers_of(made.models.policy, with_kl=False)] != [a.text for a in answers]


def test_a_threshold_on_a_step_of_metrics_jsonl() -> None:
    stage = {"preset": "x", "seed": 0, "seconds": 1.0, "metrics": {}}
    lines = [{"step": 110, "loss": 1.0}, {"step": 110, "eval/gold": 0.52}, {"step": 220, "eval/gold": 0.1}]
    run = Run(Path("x"), stages={"ppo": stage}, metrics={"ppo": lines})
    expected = {f"ppo.eval/gold@{step}": {"at_least": 0.5} for step in (110, 220, 330)}
    findings = check(run, expected)
    assert [(f.found, f.holds) for f in findings] == [("0.520", True), ("0.100", False), ("not recorded", False)]


# ---- each recipe to its end -----------------------------------------------------------------------------------------


def tiny_qwen2(folder: Path) -> str:
    """A folder as Qwen2.5's on the hub: ChatML, `<|im_end|>` ends a turn, biases on q, k and v."""
    tokenizer = base_tokenizer(CHATML, "<|im_start|>", "<|im_end|>")
    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        bos_token_id=None,
    )
    Qwen2ForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def tiny_pythia(folder: Path) -> str:
    """A folder as Pythia's on the hub: GPT-NeoX, `<|endoftext|>` for everything, no pad token, no chat template."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(
        ["the cat sat on the mat"], tokenizer_trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet)
    )
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token=end, eos_token=end, unk_token=end)
    assert tokenizer.pad_token_id is None
    torch.manual_seed(0)
    shape = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPTNeoXForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


SMALL = {
    "sft": "--max_steps 3 --dataset_size 12 --validation_size 4 --max_length 128 --eval_steps 2 --save_steps 2",
    "reward": "--max_steps 3 --max_length 160 --eval_steps 2 --save_steps 2 --warmup_steps 1",
    "ppo": "--dataset_size 8 --eval_size 4 --total_episodes 32 --batch_size 16 --response_length 8 --eval_steps 1",
    "evaluate": "--num_prompts 4 --max_new_tokens 8",
    "report": "",
}
SMALL = {stage: f"{words} --mixed_precision no" if words else words for stage, words in SMALL.items()}
SMALL["sft"] += " --warmup_steps 1 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --logging_steps 1"
SMALL["reward"] += " --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --logging_steps 1"


def run_recipe(name: str, run: Path, changes: dict[str, list[str]]) -> None:
    """Every stage that the recipe has, from its own YAML; only models, data and sizes are others."""
    for stage in ("sft", "reward", "ppo", "evaluate", "report"):
        file = ROOT / "configs" / "hub" / name / f"{stage}.yaml"
        if not file.exists():
            continue
        words = ["--config", str(file), "--run_dir", str(run), *SMALL[stage].split(), *changes.get(stage, [])]
        importlib.import_module(f"stages.{stage}").main(parse(STAGE_ARGUMENTS[stage], words))


def ended(run: Path, stages: str) -> dict[str, Any]:
    """The run's records, and that it has just these stages and a report."""
    found = read_run(run)
    assert list(found.stages) == stages.split() and found.preset.startswith("hub/")
    assert (run / "report" / "report.html").exists()
    return found.stages


@pytest.mark.slow
def test_gsm8k_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = tiny_qwen2(tmp_path / "Qwen2.5-0.5B-Instruct")
    data = write(tmp_path / "gsm8k", train=gsm8k_rows(12), test=gsm8k_rows(6, 100))
    models = {"ppo": ["--model_name_or_path", model, "--critic_name_or_path", model]}
    models["evaluate"] = ["--pretrain_model", model, "--sft_model", model]
    run = tmp_path / "hub-gsm8k"
    run_recipe("gsm8k", run, {stage: ["--dataset", data, *words] for stage, words in models.items()})
    said = capsys.readouterr().out
    assert f"ppo  each prompt ends with {ASKED!r}" in said and f"evaluate  each prompt ends with {ASKED!r}" in said
    config = ended(run, "ppo evaluate")["ppo"]["config"]
    assert config["critic_head_init"] == "zero" and config["prompt_suffix"] == ASKED
    lines = [json.loads(line) for line in (run / "ppo/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval/gold" in line] == [0, 1, 2]
    first = next(line for line in lines if "val/ratio_first" in line)
    assert first["val/ratio_first"] == 1.0 and first["objective/kl"] == 0.0 and first["lr"] == 1e-6
    samples = [json.loads(line) for line in (run / "evaluate/samples.jsonl").read_text().splitlines()]
    assert all(ASKED in row["prompt"] and row["proxy"] == row["gold"] for row in samples)
    names = [finding.expected for finding in check_all([read_run(run)], ROOT / "configs")]
    assert names == ["ppo.eval/gold@110 at_least 0.5", "policies.ppo.gold at least 0.55"]


@pytest.mark.slow
def test_tldr_to_its_end(tmp_path: Path) -> None:
    model = tiny_pythia(tmp_path / "pythia-1b-deduped")
    posts = [f"SUBREDDIT: r/cats\n\nTITLE: {i}\n\nPOST: the cat sat on mat {i}\n\nTL;DR:" for i in range(30)]
    sizes = {"train": posts[:16], "validation": posts[16:22], "test": posts[22:]}
    shown = {s: [{"prompt": p, "completion": f" the cat sat {p[-12]}"} for p in part] for s, part in sizes.items()}
    pairs = {
        s: [{"prompt": p, "chosen": " the cat sat", "rejected": " on on on"} for p in sizes[s]]
        for s in ("train", "validation")
    }
    data, compared = write(tmp_path / "tldr", **shown), write(tmp_path / "tldr-preference", **pairs)
    run = tmp_path / "hub-tldr"
    changes = {
        "sft": ["--dataset", data, "--model_name_or_path", model],
        "reward": ["--dataset", compared],
        "ppo": ["--dataset", data],
        "evaluate": ["--dataset", data, "--pretrain_model", model],
    }
    run_recipe("tldr", run, changes)
    stages = ended(run, "sft reward ppo evaluate")
    assert stages["ppo"]["config"]["temperature"] == 0.7 and stages["ppo"]["metrics"]["episodes"] == 32
    assert stages["reward"]["metrics"]["pairs"] == 16 and stages["reward"]["metrics"]["accuracy_n"] == 6
    [finding] = check_all([read_run(run)], ROOT / "configs")
    assert finding.expected == "stages.reward.accuracy at least 0.62"


@pytest.mark.slow
def test_hh_to_its_end(tmp_path: Path) -> None:
    model = tiny_qwen2(tmp_path / "Qwen2.5-0.5B")

    def rows(start: int, count: int) -> list[dict]:
        said = "\n\nHuman: Hi {i}\n\nAssistant: Hello.\n\nHuman: And {i}?\n\nAssistant: {answer}"
        return [
            {name: said.format(i=i, answer=answer) for name, answer in (("chosen", "Fine."), ("rejected", "Go away."))}
            for i in range(start, start + count)
        ]

    data = write(tmp_path / "hh-rlhf", train=rows(0, 16), test=rows(100, 6))
    run = tmp_path / "hub-hh"
    changes = {stage: ["--dataset", data] for stage in ("sft", "reward", "ppo", "evaluate")}
    changes["sft"] += ["--model_name_or_path", model]
    changes["evaluate"] += ["--pretrain_model", model]
    run_recipe("hh", run, changes)
    stages = ended(run, "sft reward ppo evaluate")
    assert stages["reward"]["metrics"]["pairs"] == 16 and stages["sft"]["metrics"]["rows"] == 12
    samples = [json.loads(line) for line in (run / "evaluate/samples.jsonl").read_text().splitlines()]
    assert all("Hello." in row["prompt"] and "And 1" in row["prompt"] for row in samples)


def test_a_rule_that_is_not_there_is_said_before_models_are_opened() -> None:
    with pytest.raises(UserError, match=r"reward reward_data\.gsm8k:loose: the module .* has no function loose"):
        load_rewards(["reward_data.gsm8k:loose"])
