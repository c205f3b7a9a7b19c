"""SFT: what the loss is on, token by token, what ends an answer, and what becomes of rows that are too long."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import TEXTS, tiny_policy, tiny_tokenizer
from transformers import PreTrainedTokenizerBase

from pipeline.errors import UserError
from pipeline.model.load import load_policy
from pipeline.model.sampler import generate
from pipeline.runtime.arguments import SFTArguments
from pipeline.runtime.command_line import resolve
from pipeline.runtime.record import Stage
from pipeline.text.data import Loaded, load_instructions
from pipeline.text.tokenizer import load_tokenizer, prompt_ids, stop_ids
from stages import sft

USER, ANSWER = {"role": "user", "content": "Write about Ben."}, {"role": "assistant", "content": "Ben ran home."}
OTHER = {"role": "assistant", "content": "Ben found a kite near the river."}

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% set content = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content"
    " + '<|eot_id|>' %}{{ bos_token + content if loop.first else content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
BARE = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"


def base_tokenizer(template: str, *special: str) -> PreTrainedTokenizerBase:
    """A base model's tokenizer: its texts end with `<|endoftext|>`, its template ends a turn in its own way."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(special), "bos_token": "<bos>"})
    tokenizer.chat_template = template
    return tokenizer


def loaded(rows: list[dict]) -> Loaded:
    from datasets import Dataset

    return Loaded(Dataset.from_list(rows), [f"rows.jsonl, line {10 * i}" for i in range(1, len(rows) + 1)])


def prepared(rows: list[dict], tokenizer: PreTrainedTokenizerBase, **settings: object) -> sft.Prepared:
    return sft.prepare(resolve(SFTArguments(**settings)), tokenizer, loaded(rows), "training rows")


def learned(row: dict, tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.decode([label for label in row["labels"] if label != -100])


# ---- what is learned ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["messages", "text"])
def test_the_loss_is_on_the_answer_and_its_end(tmp_path: Path, form: str) -> None:
    """As the trainer's own batches have it."""
    tokenizer = tiny_tokenizer()
    answers = [ANSWER["content"], OTHER["content"]]
    rows = {
        "messages": [{"prompt": [USER], "completion": [a]} for a in (ANSWER, OTHER)],
        "text": [{"prompt": "Write:", "completion": f" {a}"} for a in answers],
    }[form]
    model, args = tiny_policy(0).train(), resolve(SFTArguments(run_dir=str(tmp_path), per_device_train_batch_size=2))
    sft.set_ends(model, tokenizer, chat=form == "messages")
    data = sft.prepare(args, tokenizer, loaded(rows), "training rows").rows
    trainer = sft.build_trainer(args, Stage(args, "sft", {}), model, tokenizer, data, data)
    (batch,) = trainer.get_train_dataloader()
    texts = {tokenizer.decode(row[row != -100]) for row in batch["labels"]}
    assert {text.strip() for text in texts} == {f"{answer}<|end|>" for answer in answers}
    shown = {tokenizer.decode(row[row != 0]) for row in batch["input_ids"]}
    start = "Write:" if form == "text" else "<|user|>Write about Ben.<|end|><|assistant|>"
    assert shown == {start + text for text in texts}


def test_no_turn_but_the_last_is_learned() -> None:
    talk = [USER, ANSWER, {"role": "user", "content": "And the fox?"}]
    tokenizer = tiny_tokenizer()
    (row,) = prepared([{"prompt": talk, "completion": [OTHER]}], tokenizer).rows
    assert learned(row, tokenizer) == f"{OTHER['content']}<|end|>"
    several = [{"prompt": [USER], "completion": [ANSWER]}, {"prompt": [USER], "completion": [ANSWER, USER, OTHER]}]
    with pytest.raises(UserError, match=r"rows\.jsonl, line 20: an answer must be one message of the assistant"):
        prepared(several, tokenizer)


def test_what_is_trained_on_is_what_is_sampled_after() -> None:
    tokenizer = base_tokenizer(CHATML, "<|im_start|>", "<|im_end|>")
    rows = [{"prompt": [USER], "completion": [a]} for a in (ANSWER, OTHER)]
    for row in prepared(rows, tokenizer).rows:
        start = row["labels"].count(-100)
        assert row["input_ids"][:start] == prompt_ids(tokenizer, [[USER]])[0]


def test_prompts_that_are_tokens_of_another_kind_before_an_answer_are_told() -> None:
    """`a b ` and `c`: the space belongs to the prompt alone, and to the word after it."""
    rows = [{"prompt": "Ben found a", "completion": " kite"}, {"prompt": "He was ", "completion": "happy."}]
    (note,) = prepared(rows, tiny_tokenizer()).view.notes
    assert "in 1 of 2 training rows (first: rows.jsonl, line 20) the prompt's last tokens are others" in note


# ---- what ends an answer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "special", "end"),
    [
        (CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
        (GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
        (LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
        (LLAMA2, (), "<|endoftext|>"),
        (BARE, (), "<|endoftext|>"),  # the template has none
    ],
)
def test_the_template_says_what_ends_an_answer(template: str, special: tuple[str, ...], end: str) -> None:
    tokenizer, model = base_tokenizer(template, *special), tiny_policy(0, [1, 7])
    ends = sft.set_ends(model, tokenizer, chat=True)
    assert tokenizer.convert_ids_to_tokens(ends[0]) == end == tokenizer.eos_token
    assert {1, 7} <= set(ends) and len(ends) == len(set(ends))  # what ended texts before goes on doing so
    made = prepared([{"prompt": [USER], "completion": [a]} for a in (ANSWER, OTHER)], tokenizer)
    for row, said in zip(made.rows, (ANSWER, OTHER), strict=True):
        assert learned(row, tokenizer).replace(" ", "").endswith(said["content"].replace(" ", "") + end) or (
            template == BARE and learned(row, tokenizer).endswith(f"{said['content']}\n{end}")
        )
    assert [note for note in made.view.notes if "puts no token of its own" in note] == made.view.notes
    assert bool(made.view.notes) == (template == BARE)


def test_the_pad_token_never_becomes_the_end_of_an_answer() -> None:
    tokenizer = base_tokenizer(CHATML, "<|im_start|>", "<|im_end|>")
    tokenizer.pad_token = "<|im_end|>"
    sft.set_ends(tiny_policy(0), tokenizer, chat=True)
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|pad|>"


@pytest.fixture(scope="module")
def chatml_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with a ChatML template, fine-tuned on two answers until it knows them."""
    run = tmp_path_factory.mktemp("chatml")
    tokenizer = base_tokenizer(CHATML, "<|im_start|>", "<|im_end|>")
    tiny_policy(0, vocab_size=len(tokenizer), hidden_size=32, initializer_range=0.05).save_pretrained(run / "base")
    tokenizer.save_pretrained(run / "base")
    rows = [{"prompt": [{**USER, "content": f"Say {i}."}], "completion": [ANSWER]} for i in range(40)]
    (run / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"max_steps": 60, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 5}
    given = {"run_dir": str(run), "dataset": str(run / "rows.jsonl"), "model_name_or_path": str(run / "base")}
    sft.main(resolve(SFTArguments(**given, **settings, mixed_precision="no", eval_steps=60, save_steps=60)))
    return run


@pytest.mark.slow
def test_answers_of_a_base_model_end_after_sft(chatml_run: Path) -> None:
    model, tokenizer = load_policy(str(chatml_run / "sft")), load_tokenizer(str(chatml_run / "sft"))
    ends = stop_ids(model, tokenizer)
    assert [tokenizer.convert_ids_to_tokens(end) for end in ends] == ["<|im_end|>", "<|endoftext|>"]
    assert json.loads((chatml_run / "sft/generation_config.json").read_text())["eos_token_id"] == ends
    samples = generate(model, prompt_ids(tokenizer, [[USER]] * 8), max_new_tokens=40, eos_token_id=ends, pad_token_id=0)
    assert samples.ended.all()
    assert all(answer[-1] == ends[0] for answer in samples.answers(with_end=True))


@pytest.mark.slow
def test_tokens_are_those_of_the_rows_without_padding(chatml_run: Path) -> None:
    record = json.loads((chatml_run / "sft/stage.json").read_text())
    tokenizer = load_tokenizer(str(chatml_run / "sft"))
    rows = load_instructions(str(chatml_run / "rows.jsonl"), split="train").rows
    read = Loaded(rows, [""] * len(rows))
    lengths = [len(ids) for ids in sft.prepare(resolve(SFTArguments()), tokenizer, read, "rows").rows["input_ids"]]
    assert min(lengths) < max(lengths) and len(lengths) == 36  # there is padding; 60 steps of 8, and 4, are 12 epochs
    assert record["tokens"] == 12 * sum(lengths)


# ---- rows that are too long -----------------------------------------------------------------------------------------


LONG = {"prompt": "Write:", "completion": " " + "Ben found a kite. " * 9}
BEYOND = {"prompt": "Write " * 50, "completion": " x"}
SHORT = {"prompt": "Write:", "completion": " Ben ran"}


def test_cut_keeps_the_beginning_and_says_how_many_lose_their_end() -> None:
    made = prepared([SHORT, LONG, BEYOND, LONG], tiny_tokenizer(), max_length=20)
    assert [len(row) for row in made.rows["input_ids"]] == [len(made.rows[0]["input_ids"]), 20, 20]
    assert made.view.fit.kept == [0, 1, 3]
    assert made.view.fit.sentence() == (
        "3 of 4 training rows are used, 1 of 4 is dropped: the answer begins beyond max_length 20, "
        "2 of 4 answers lose their end at max_length 20"
    )


def test_drop_and_refuse() -> None:
    made = prepared([SHORT, LONG, BEYOND], tiny_tokenizer(), max_length=20, overlong="drop")
    assert made.view.fit.sentence() == "1 of 3 training rows is used, 2 of 3 are dropped: longer than max_length 20"
    sentence = r"sft: rows\.jsonl, line 20 has \d+ tokens, more than max_length 20 allows \(2 of 3 training rows are"
    with pytest.raises(UserError, match=sentence):
        prepared([SHORT, LONG, BEYOND], tiny_tokenizer(), max_length=20, overlong="refuse")
    with pytest.raises(UserError, match=r"none of the 1 training rows is left .* raise max_length"):
        prepared([BEYOND], tiny_tokenizer(), max_length=20)


def test_max_length_beyond_the_models_positions_is_refused(tmp_path: Path) -> None:
    tiny_policy(0).save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    (tmp_path / "rows.jsonl").write_text(json.dumps(SHORT) + "\n")
    settings = {"dataset": str(tmp_path / "rows.jsonl"), "model_name_or_path": str(tmp_path / "m"), "max_length": 129}
    with pytest.raises(UserError, match=r"sft: max_length 129 is more than the 128 tokens that .* can read; lower"):
        sft.main(resolve(SFTArguments(run_dir=str(tmp_path), **settings)))
    assert not (tmp_path / "sft" / "metrics.jsonl").exists()


# ---- the loss ------------------------------------------------------------------------------------------------------


def test_only_places_that_are_trained_on_reach_the_output_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CPU TRL gives it all of them; loss and gradients are the same."""
    tokenizer = tiny_tokenizer()
    args = resolve(SFTArguments(run_dir=str(tmp_path), mixed_precision="no"))
    rows = [{"prompt": [USER], "completion": [{**ANSWER, "content": text}]} for text in TEXTS[:3]]
    data = sft.prepare(args, tokenizer, loaded(rows), "training rows").rows
    stage, found, scored = Stage(args, "sft", {}), [], []
    function = sft.trl_utils._ChunkedLogProbFunction

    class Counted(function):
        @classmethod
        def apply(cls, hidden: torch.Tensor, *rest: object) -> object:
            scored.append(len(hidden))
            return function.apply(hidden, *rest)

    monkeypatch.setattr(sft.trl_utils, "_ChunkedLogProbFunction", Counted)
    for everywhere in (False, True):
        if everywhere:
            monkeypatch.setattr(sft.trl_utils, "_use_triton", lambda device: False)
        model = tiny_policy(0).train()
        trainer = sft.build_trainer(args, stage, model, tokenizer, data, data)
        batch = trainer.data_collator(list(data))
        loss = trainer.compute_loss(model, batch)
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    places = batch["labels"][:, 1:]
    assert scored == [int((places != -100).sum()), places.numel()]
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


# ---- figures --------------------------------------------------------------------------------------------------------


def test_held_out_figures_are_means_over_tokens(tmp_path: Path) -> None:
    """Rows of unlike lengths in batches of three: a mean of batches would be another number."""
    model, tokenizer = tiny_policy(0).train(), tiny_tokenizer()
    answers = [{**ANSWER, "content": text[: 3 + 9 * i]} for i, text in enumerate(TEXTS[:5])]
    rows = [{"prompt": [USER], "completion": [answer]} for answer in answers]
    args = resolve(SFTArguments(run_dir=str(tmp_path), per_device_train_batch_size=1, mixed_precision="no"))
    data = sft.prepare(args, tokenizer, loaded(rows), "held-out rows").rows
    trainer = sft.build_trainer(args, Stage(args, "sft", {}), model, tokenizer, data, data)
    nats, right, tokens = 0.0, 0, 0
    for row in data:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].double()
        for place, label in enumerate(row["labels"][1:]):
            if label != -100:
                nats -= logits[place].log_softmax(-1)[label].item()
                right += int(logits[place].argmax() == label)
                tokens += 1
    figures = trainer.evaluate()
    assert figures["eval_loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert figures["eval_mean_token_accuracy"] == pytest.approx(right / tokens, rel=1e-9)
