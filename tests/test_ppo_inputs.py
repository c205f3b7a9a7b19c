"""What PPOTrainer takes from Python: rows in every usual shape, and a sentence for each thing that cannot be meant."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset, DatasetDict
from ppo_tools import config, count_t7, critic, policy, settings, tokenizer, trainer
from torch import nn
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from pipeline.errors import UserError
from pipeline.ppo import PPOConfig, PPOTrainer
from pipeline.rewards import Ensemble

TEXTS = ["t6 t7", "t8", "t9 t10 t11"]
ROWS = [{"prompt": text, "number": i} for i, text in enumerate(TEXTS)]
COLUMNS = {"prompt": TEXTS, "number": [0, 1, 2]}
TALK = [[{"role": "user", "content": text}] for text in TEXTS]


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


def given(tmp_path, rows, **others):
    made = trainer(tmp_path, rows=rows, **others)
    return [dict(row) for row in made.prompts.rows], made.prompts.ids


@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        tuple(ROWS),
        COLUMNS,
        {name: np.array(values) for name, values in COLUMNS.items()},
        pd.DataFrame(COLUMNS),
        pd.DataFrame(COLUMNS, index=[7, 8, 9]),
        pa.table(COLUMNS),
        Dataset.from_dict(COLUMNS),
        DatasetDict(train=Dataset.from_dict(COLUMNS)),
        {"train": pd.DataFrame(COLUMNS)},
    ],
    ids=lambda rows: type(rows).__name__,
)
def test_rows_in_every_usual_shape_are_the_same_rows(tmp_path, rows):
    found, ids = given(tmp_path, rows)
    assert found == ROWS and ids == [[6, 7], [8], [9, 10, 11]]


@pytest.mark.parametrize(
    "rows", [TEXTS, tuple(TEXTS), np.array(TEXTS), pd.Series(TEXTS)], ids=lambda r: type(r).__name__
)
def test_texts_are_prompts(tmp_path, rows):
    assert given(tmp_path, rows)[0] == [{"prompt": text} for text in TEXTS]


def test_conversations_are_prompts(tmp_path):
    assert given(tmp_path, TALK)[0] == [{"prompt": talk} for talk in TALK]


def test_a_column_that_some_rows_lack_is_none_there(tmp_path):
    seen = []

    def reward(prompts, completions, answer):
        seen.extend(answer)
        return [0.0] * len(prompts)

    rows = [{"prompt": "t6"}, {"prompt": "t7", "answer": "t8"}, {"prompt": "t9"}, {"prompt": "t10", "answer": None}]
    frame = pd.DataFrame({"prompt": ["t6", "t7"], "answer": [None, "t8"]})
    trainer(tmp_path, rows=rows, rewards=reward, batch_size=4, total_episodes=4).train()
    assert sorted(seen, key=str) == [None, None, None, "t8"]
    assert given(tmp_path / "b", frame)[0][0]["answer"] is None


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (None, "train_dataset is missing"),
        ([], "train_dataset has no rows"),
        ({}, "train_dataset is an empty dict"),
        (pd.DataFrame(), "train_dataset has no rows"),
        ("prompts.jsonl", "train_dataset is a str"),
        (5, "train_dataset is a int"),
        ((row for row in ROWS), "train_dataset is a generator"),
        (set(TEXTS), "train_dataset is a set"),
        (Dataset.from_dict(COLUMNS).to_iterable_dataset(), "train_dataset is a IterableDataset"),
        (
            DatasetDict(train=Dataset.from_dict(COLUMNS), test=Dataset.from_dict(COLUMNS)),
            r"has the splits 'train', 'test'; pass one of them, such as data\['train'\]",
        ),
        ({"prompt": TEXTS, "number": [1]}, "'number' has 1 entries and 'prompt' has 3"),
        ({"prompt": "t6"}, "'prompt' is a str; give a list for each column"),
        ({"text": TEXTS}, "has no column 'prompt' but 'text'"),
        (pd.DataFrame({"question": TEXTS}), "has no column 'prompt' but 'question'"),
        (pd.DataFrame({"prompt": TEXTS, 0: TEXTS}), "a column called 0, which is no text"),
        ([*ROWS, "t6"], "mixes dictionaries and strs"),
        ([5, 6], "row 0: the prompt is 5; give text or a list of messages"),
        ([{"prompt": None}], "row 0: the prompt is None"),
        ([{"prompt": "t6"}, {"answer": "t6"}], "row 1: some prompts are text and some are messages"),
        ([{"prompt": "t6"}, {"prompt": TALK[0]}], "row 1: some prompts are text and some are messages"),
        ([{"prompt": []}], r"row 0: the prompt is \[\]"),
        ([{"prompt": ["t6"]}], "row 0: 't6' is no message"),
        ([{"prompt": [{"role": "user"}]}], "is no message; give it a role and a content"),
        ([{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}], "the content .* is not text"),
        (["t6", "t7 \ud83d"], r"row 1: '\\ud83d' is half of a character"),
        ([{"prompt": "t6", "prompts": 1}], "the column 'prompts' has the name of what rewards are given"),
    ],
)
def test_rows_that_cannot_be_meant_are_a_sentence(tmp_path, rows, sentence):
    args = settings(tmp_path)
    for name, others in (("train_dataset", {}), ("eval_dataset", {"eval_dataset": rows})):
        if name == "eval_dataset" and rows is None:
            continue  # none is possible there
        with pytest.raises(UserError, match=sentence.replace("train_dataset", name)):
            train = ROWS if others else rows
            PPOTrainer(policy(), count_t7, args, train, tokenizer(), critic=critic(), **others)


@pytest.mark.parametrize(
    "texts",
    [TEXTS, [{"text": t} for t in TEXTS], {"text": TEXTS}, pd.DataFrame({"text": TEXTS}), pd.Series(TEXTS)],
    ids=lambda rows: type(rows).__name__,
)
def test_pretraining_text_in_every_usual_shape(tmp_path, texts):
    made = trainer(tmp_path, ptx_dataset=texts, ptx_coef=0.1)
    assert made.learner.ptx.ids == [[1, 6, 7], [1, 8], [1, 9, 10, 11]]


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        ([], "ptx_dataset is missing or has no rows"),
        ("corpus.txt", "ptx_dataset is a str"),
        ({"prompt": TEXTS}, "ptx_dataset has no column 'text' but 'prompt'"),
        ([None, "t6"], "ptx_dataset, row 0: the text is a NoneType"),
        ([["t6"]], "ptx_dataset, row 0: the text is a list"),
    ],
)
def test_pretraining_text_that_cannot_be_meant_is_a_sentence(tmp_path, texts, sentence):
    with pytest.raises(UserError, match=sentence):
        trainer(tmp_path, ptx_dataset=texts, ptx_coef=0.1)


def bert():
    return BertModel(BertConfig(vocab_size=16, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))


def t5():
    return T5ForConditionalGeneration(T5Config(vocab_size=16, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"policy": "runs/sft"}, "policy is a str; pass a model .*load_policy"),
        ({"policy": None}, "policy is a None"),
        ({"policy": type(policy())}, "policy is a GPTForCausalLM; pass a model"),
        ({"policy": nn.Linear(2, 2)}, "the policy is a Linear; pass a causal language model"),
        ({"policy": critic()}, "the policy is a GPTForSequenceClassification; pass a causal"),
        ({"policy": bert()}, "the policy is a BertModel; pass a causal"),
        ({"policy": t5()}, "T5ForConditionalGeneration has an encoder"),
        ({"policy": policy().requires_grad_(False)}, "no weight of it learns"),
        ({"critic": "runs/reward"}, "critic is a str; pass a model .*load_critic"),
        ({"critic": policy()}, "the critic must be a sequence classifier"),
        ({"reference": "runs/sft"}, "reference is a str"),
        ({"reference": critic()}, "the reference is a GPTForSequenceClassification; pass a causal"),
        ({"processing_class": "gpt2"}, "processing_class is a str; pass the policy's tokenizer"),
        ({"processing_class": None}, "processing_class is missing"),
        ({"args": {"batch_size": 8}}, r"args is a dict; pass PPOConfig\(\*\*args\)"),
        ({"args": None}, "args is a None; pass a PPOConfig"),
        ({"args": PPOConfig}, "args is a PPOConfig"),
        ({"rewards": "m:f"}, "rewards: pass a function"),
        ({"rewards": ["runs/reward"]}, "rewards: pass a function"),
        ({"rewards": None}, "rewards: pass a function"),
        ({"rewards": []}, "no reward is given"),
        ({"gold": "m:f"}, "gold is a str; pass a function"),
        ({"callbacks": "log"}, "callbacks: pass functions"),
        ({"callbacks": [5]}, "callbacks: pass functions"),
        ({"sampler": "vllm"}, "sampler: pass an object"),
    ],
)
def test_an_argument_of_another_kind_is_a_sentence(tmp_path, changes, sentence):
    parts = {
        "policy": policy(),
        "rewards": count_t7,
        "args": settings(tmp_path),
        "train_dataset": ROWS,
        "processing_class": tokenizer(),
        "critic": critic(),
    }
    with pytest.raises(UserError, match=sentence) as error:
        PPOTrainer(**parts | changes)
    assert "\n" not in str(error.value)


async def later(prompts, completions, **columns):
    return [0.0] * len(prompts)


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (lambda prompts, completions: [], r"got an unexpected keyword argument 'number'\); give it the parameters"),
        (lambda prompts: [], "too many positional arguments"),
        (lambda prompts, completions, answer, **columns: [], "missing a required argument: 'answer'"),
        (later, "is an async function"),
    ],
)
def test_a_reward_that_cannot_be_called_is_refused_before_any_work(tmp_path, function, sentence):
    ensemble = Ensemble([count_t7, function])
    for changes in (
        {"rewards": function},
        {"rewards": [count_t7, function]},
        {"rewards": ensemble},
        {"gold": function, "eval_rows": ROWS},
        {"rows": TEXTS, "eval_rows": ROWS, "rewards": function} if "answer" not in sentence else {"rewards": function},
    ):
        with pytest.raises(UserError, match=sentence):
            trainer(tmp_path, **{"rows": ROWS} | changes).train()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batch_size": "8"}, "batch_size: '8' is not a whole number"),
        ({"batch_size": 8.0}, "batch_size: 8.0 is not a whole number"),
        ({"learning_rate": None}, "learning_rate: none is not possible"),
        ({"learning_rate": float("inf")}, "learning_rate: inf must be finite"),
        ({"kl_coef": float("nan")}, "kl_coef: nan must be"),
        ({"share_trunk": "no"}, "share_trunk: 'no' is not true or false"),
        ({"output_dir": None}, "output_dir: None is not a text"),
    ],
)
def test_a_setting_of_another_kind_is_a_sentence(tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        PPOTrainer(policy(), count_t7, PPOConfig(**changes), ROWS, tokenizer(), critic=critic())


def test_one_callback_and_a_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    seen = []
    trainer(tmp_path, callbacks=lambda made, metrics: seen.append(metrics), total_episodes=8).train()
    assert len(seen) == 1
    assert PPOConfig(output_dir="~/x").output_dir == PPOConfig(output_dir=tmp_path / "x").output_dir == f"{tmp_path}/x"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompts": "t6"}, "step: prompts is a str"),
        ({"completions": None}, "step: completions is a None"),
        ({"scores": [1.0, "high"]}, "step, row 1: 'high' in scores is not a number"),
        ({"scores": {0: 1.0, 1: 1.0}}, "step: scores is a dict"),
        ({"prompts": [[6], None]}, "step, row 1: give token ids, text or messages"),
        ({"prompts": [[6], ["a"]]}, "step, row 1: give token ids, text or messages"),
    ],
)
def test_what_step_cannot_learn_from_is_a_sentence(tmp_path, changes, sentence):
    made = trainer(tmp_path, batch_size=2, num_mini_batches=1)
    given = {"prompts": [[6], [7]], "completions": [[8, 1], [9, 1]], "scores": torch.tensor([0.0, 1.0])}
    with pytest.raises(UserError, match=sentence):
        made.step(**given | changes)
    assert made.step(**given)["val/ratio_first"] == 1.0


def test_a_subclass_of_the_config_is_taken(tmp_path):
    class Mine(PPOConfig):
        pass

    assert PPOTrainer(policy(), count_t7, Mine(**vars(settings(tmp_path))), ROWS, tokenizer(), critic=critic())
    assert config().vocab_size == 16
