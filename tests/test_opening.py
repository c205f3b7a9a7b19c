"""Folders that are not plain models: adapters with a head of their own, and models that bring Python code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from peft import LoraConfig, PeftModel, get_peft_model
from ppo_tools import config, critic, policy, tokenizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
)

from pipeline.errors import UserError
from pipeline.model.gpt import GPTForSequenceClassification
from pipeline.model.load import load_critic, load_policy, load_reward
from pipeline.model.lora import add_lora
from pipeline.rewards import RewardModel, load_function, load_rewards
from pipeline.text.tokenizer import load_tokenizer

TALK = [[{"role": "user", "content": text}] for text in ("t6 t7", "t8")]
IDS = torch.tensor([[3, 6, 7, 5, 4, 10, 5]])
SMALL = {"vocab_size": 16, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 48, "pad_token_id": 0}


def stir(model: torch.nn.Module) -> None:
    """Trained weights that are neither zero nor the base model's."""
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


def adapter_of_a_reward(tmp_path: Path, base: torch.nn.Module, classifier: torch.nn.Module) -> torch.Tensor:
    """`base` in a folder, an adapter with its own head beside it; returns the scores of IDS."""
    base.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    trunk = {name: value for name, value in base.state_dict().items() if not name.startswith(("score", "lm_head"))}
    classifier.load_state_dict(trunk, strict=False)
    settings = LoraConfig(
        r=2, lora_alpha=8, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"]
    )
    settings.base_model_name_or_path = str(tmp_path / "base")
    lora = get_peft_model(classifier.eval(), settings).eval()
    lora.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    stir(lora)
    lora.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with torch.no_grad():
        return lora(input_ids=IDS).logits[0, 0]


BASES = {
    "our language model": (policy, lambda: GPTForSequenceClassification(config(num_labels=1))),
    "our reward model": (lambda: critic(seed=4), lambda: critic(seed=5)),
    "gpt2": (
        lambda: GPT2LMHeadModel(GPT2Config(**SMALL)),
        lambda: GPT2ForSequenceClassification(GPT2Config(**SMALL, num_labels=1)),
    ),
}


@pytest.mark.parametrize("name", BASES)
def test_an_adapter_brings_the_head_of_a_reward_model(tmp_path: Path, name: str) -> None:
    base, classifier = (make() for make in BASES[name])
    base.config.reward_mean, base.config.reward_std = 5.0, 2.0  # of the base's head, which the adapter replaces
    expected = adapter_of_a_reward(tmp_path, base, classifier)
    path = str(tmp_path / "adapter")
    with torch.no_grad():
        opened = load_reward(path)
        torch.testing.assert_close(opened(input_ids=IDS).logits[0, 0], expected, atol=1e-5, rtol=1e-5)
        assert not isinstance(opened, PeftModel) and opened.score.weight.shape == (1, 32)
    reward = RewardModel(path, mixed_precision="no")  # with the base's tokenizer, as the adapter has none
    assert reward(TALK[:1], ["t10"]) == pytest.approx([expected.item()], abs=1e-5)
    value = load_critic(path)
    assert isinstance(value.score, torch.nn.Linear) and not torch.equal(value.score.weight, opened.score.weight)
    ours, theirs = value.base_model.state_dict(), opened.base_model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_an_adapter_of_a_policy_opens_with_the_bases_tokenizer(tmp_path: Path) -> None:
    policy().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    lora = add_lora(load_policy(str(tmp_path / "base")), r=2, alpha=4, target_modules=["all-linear"])
    stir(lora)
    lora.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        found, expected = load_policy(str(tmp_path / "adapter"))(IDS).logits, lora(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert load_tokenizer(str(tmp_path / "adapter")).get_vocab() == tokenizer().get_vocab()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"base_model_name_or_path": None}, "does not say which model it belongs to"),
        ({"base_model_name_or_path": "/no/such/base"}, "/no/such/base is no model folder"),
        ({"base_model_name_or_path": "adapter"}, "names itself as its model"),
        ({"peft_type": "NEW"}, "no adapter can be opened from"),
        ({"r": 3}, "no adapter can be opened from"),
        (None, "adapter_config.json is damaged"),
    ],
)
def test_an_adapter_that_cannot_be_opened_is_a_sentence(tmp_path: Path, monkeypatch, change, sentence) -> None:
    adapter_of_a_reward(tmp_path, policy(), critic())
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text("[" if change is None else json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=sentence) as error:
        load_reward("adapter")
    assert "\n" not in str(error.value)


def test_an_adapter_without_a_head_is_no_reward_model(tmp_path: Path) -> None:
    policy().save_pretrained(tmp_path / "base")
    add_lora(load_policy(str(tmp_path / "base"))).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"is no trained reward model: it has no weights for score\.weight"):
        load_reward(str(tmp_path / "adapter"))
    assert load_critic(str(tmp_path / "adapter")).score.weight.shape == (1, 32)


def test_an_adapter_of_a_reward_model_is_no_policy(tmp_path: Path) -> None:
    adapter_of_a_reward(tmp_path, policy(), critic())
    with pytest.raises(
        UserError, match=r"no adapter .* it has weights for score\.weight, which GPTForCausalLM has not"
    ):
        load_policy(str(tmp_path / "adapter"))


# --- lora_target_modules ----------------------------------------------------------------------------------------------


def test_all_linear_and_regular_expressions_as_peft_takes_them() -> None:
    def adapted(given: object) -> set[str]:
        names = (name for name, _ in add_lora(policy(), target_modules=given).named_parameters() if "lora_A" in name)
        return {name.split(".")[-4] for name in names}

    blocks = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert adapted(None) == adapted("all-linear") == adapted(["all-linear"]) == blocks
    assert adapted(["q_proj", "v_proj"]) == adapted(r".*\.(q|v)_proj") == {"q_proj", "v_proj"}
    with pytest.raises(UserError, match="all-linear stands for every matrix of the blocks; give it alone"):
        add_lora(policy(), target_modules=["all-linear", "q_proj"])


# --- code that a model brings -----------------------------------------------------------------------------------------

CODE = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
class MineConfig(PreTrainedConfig):
    model_type = "mine"
class Mine(PreTrainedModel):
    config_class = MineConfig
class MineTokenizer(PreTrainedTokenizerFast):
    pass
"""


def with_code(tmp_path: Path, model_type: str) -> Path:
    """A model folder with auto_map everywhere, whose code would leave a marker."""
    folder = tmp_path / "model"
    policy().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "mine.py").write_text(CODE.format(marker=str(tmp_path / "marker")))
    settings = json.loads((folder / "config.json").read_text()) | {"model_type": model_type}
    names = ("AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModel")
    settings["auto_map"] = {"AutoConfig": "mine.MineConfig", **dict.fromkeys(names, "mine.Mine")}
    (folder / "config.json").write_text(json.dumps(settings))
    words = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "MineTokenizer"}
    words["auto_map"] = {"AutoTokenizer": [None, "mine.MineTokenizer"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    (folder / "generation_config.json").write_text(json.dumps({"custom_generate": "mine"}))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE.format(marker=str(tmp_path / "marker")))
    return folder


@pytest.mark.parametrize("opener", [load_policy, load_reward, load_critic, load_tokenizer])
def test_code_that_a_model_brings_is_never_run(tmp_path: Path, monkeypatch, opener) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("it asks")

    monkeypatch.setattr("builtins.input", asked)
    with pytest.raises(UserError, match=r"brings Python code of its own \(auto_map\), which is never run"):
        opener(str(with_code(tmp_path, "mine")))
    assert not (tmp_path / "marker").exists()


def test_an_architecture_that_transformers_knows_opens_without_its_code(tmp_path: Path, caplog) -> None:
    folder = with_code(tmp_path, "qwen3")
    assert type(load_policy(str(folder))).__name__ == "GPTForCausalLM"
    assert "brings Python code of its own (auto_map), which is not run" in caplog.text
    assert not (tmp_path / "marker").exists()


@pytest.mark.slow
def test_chat_asks_nothing_and_says_why(tmp_path: Path) -> None:
    words = ["-m", "stages.chat", "--model_name_or_path", str(with_code(tmp_path, "mine"))]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, input="y\ny\ny\n", capture_output=True, text=True)
    assert done.returncode == 2 and "which is never run here" in done.stderr and "y/N" not in done.stdout + done.stderr
    assert not (tmp_path / "marker").exists() and "Traceback" not in done.stderr


# --- folders that cannot be opened ------------------------------------------------------------------------------------


def changed(folder: Path, file: str, content: object) -> None:
    """Put a text in place of a file, or change keys of its JSON; None removes it."""
    if isinstance(content, dict):
        content = json.dumps(json.loads((folder / file).read_text()) | content)
    (folder / file).unlink() if content is None else (folder / file).write_text(str(content))


ENDS = "must be the number of a token, or a list of them"
DAMAGED = [
    (load_policy, "config.json", "{", "no model can be opened"),
    (load_policy, "config.json", "[]", "no model can be opened"),
    (load_policy, "config.json", {"hidden_size": "x"}, "no model can be opened"),
    (load_policy, "config.json", {"num_attention_heads": 0}, "no model can be opened"),
    (load_policy, "config.json", {"hidden_size": 64}, "its weights have other shapes than its config.json says"),
    (load_policy, "config.json", {"model_type": "zzz"}, "no model can be opened"),
    (load_policy, "config.json", {"model_type": "t5"}, "no model can be opened"),
    (load_policy, "config.json", {"num_hidden_layers": 9}, "no model can be opened"),
    (load_policy, "config.json", None, "is no model folder"),
    (load_policy, "model.safetensors", "cut", "no model can be opened"),
    (load_policy, "model.safetensors", None, "no model can be opened"),
    (load_policy, "generation_config.json", "{", "generation_config.json is damaged"),
    (load_policy, "generation_config.json", "[]", "no model can be opened"),
    (load_policy, "generation_config.json", {"eos_token_id": "x"}, ENDS),
    (load_policy, "generation_config.json", {"eos_token_id": []}, ENDS),
    (load_policy, "generation_config.json", {"eos_token_id": [1, None]}, ENDS),
    (load_policy, "generation_config.json", {"eos_token_id": -1}, ENDS),
    (load_tokenizer, "tokenizer.json", "{", "no tokenizer can be opened"),
    (load_tokenizer, "tokenizer.json", "[]", "no tokenizer can be opened"),
    (load_tokenizer, "tokenizer_config.json", "[]", "no tokenizer can be opened"),
]


@pytest.mark.parametrize(("opener", "file", "content", "sentence"), DAMAGED)
def test_a_damaged_folder_is_a_sentence(tmp_path: Path, opener, file: str, content, sentence: str) -> None:
    model = policy()
    model.generation_config.eos_token_id = 1
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    changed(tmp_path, file, content)
    with pytest.raises(UserError, match=sentence) as error:
        opener(str(tmp_path))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_model_of_another_kind_is_a_sentence(tmp_path: Path) -> None:
    shape = BertConfig(vocab_size=16, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=1)
    for name, model in (
        ("reward", critic()),
        ("two", GPTForSequenceClassification(config(num_labels=2))),
        ("bert", BertForSequenceClassification(shape)),
    ):
        model.save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    for opener, name, sentence in (
        (load_policy, "reward", r"is a classifier \(score.weight\), such as a reward model, and no language model"),
        (load_reward, "two", "it is a classifier with 2 labels, and a reward needs one"),
        (load_critic, "two", "no model can be opened .* it is a classifier with 2 labels"),
        (load_critic, "bert", "opens as BertForSequenceClassification, which has no linear head `score`"),
    ):
        with pytest.raises(UserError, match=sentence):
            opener(str(tmp_path / name))
    for changes in ({"reward_std": 0}, {"reward_std": -1.0}, {"reward_mean": "x"}, {"reward_mean": float("nan")}):
        changed(tmp_path / "reward", "config.json", {"reward_mean": 0.0, "reward_std": 1.0} | changes)
        with pytest.raises(UserError, match="must be finite numbers, the second above 0"):
            RewardModel(str(tmp_path / "reward"))


@pytest.mark.parametrize("name", [",", "m:", ":f", "m:f:g", "m:f g"])
def test_a_name_that_is_no_reward_is_a_sentence(name: str) -> None:
    with pytest.raises(UserError, match=r"names no reward model|a function is named module:function"):
        load_rewards([name])
    with pytest.raises(UserError, match=r"is no function; write module:function|importing|no function"):
        load_function(name)
