"""Lengths: what models can read, what becomes of rows and prompts that are longer, and what a score is read of."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_policy, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLNetConfig,
    XLNetLMHeadModel,
)

from pipeline.errors import UserError
from pipeline.rewards import Ensemble, RewardModel, WeightedRewards, readers_of
from pipeline.text.counts import counted
from pipeline.text.lengths import Reader, check_positions, fit_prompts, fit_rows, percentiles, positions_of

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
PLACES = [f"rows.jsonl, line {i}" for i in range(1, 9)]


@pytest.mark.parametrize(
    ("model", "positions"),
    [
        (lambda: tiny_policy(0), 128),
        (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=4, n_layer=1, n_head=1, n_positions=64)), 64),
        (lambda: OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=8, word_embed_proj_dim=16, max_position_embeddings=32)), 32),
        (lambda: BertForSequenceClassification(BertConfig(**SMALL, max_position_embeddings=16)), 16),
        (lambda: RobertaForSequenceClassification(RobertaConfig(**SMALL, max_position_embeddings=18)), 16),
        (lambda: XLNetLMHeadModel(XLNetConfig(vocab_size=9, d_model=4, n_layer=1, n_head=1, d_inner=4)), None),
    ],
)
def test_positions_by_whatever_name_and_from_wherever_they_count(model, positions) -> None:
    model = model().eval()
    assert positions_of(model) == positions
    if positions:
        ids = torch.full((1, positions), 5)
        model(ids)  # and that many it can read
        check_positions("sft", "max_length", positions, model, "m")
        with pytest.raises(UserError, match=f"sft: max_length {positions + 1} is more than the {positions} tokens"):
            check_positions("sft", "max_length", positions + 1, model, "m")


def test_rows_are_kept_dropped_cut_or_refused() -> None:
    lengths, starts = [10, 20, 21, 35], [2, 2, 2, 30]
    fit = fit_rows("sft", "rows", lengths, 20, PLACES, "cut", starts)
    assert fit.kept == [0, 1, 2] and fit.cut == 1 and fit.dropped.total() == 1
    fit = fit_rows("reward", "pairs", lengths, 20, PLACES, "drop")
    assert fit.kept == [0, 1] and fit.sentence() == (
        "2 of 4 pairs are used, 2 of 4 are dropped: longer than max_length 20"
    )
    assert fit_rows("sft", "rows", lengths[:2], 20, PLACES, "refuse").sentence() == "all 2 rows are used"
    with pytest.raises(UserError, match=r"reward: rows\.jsonl, line 3 has 21 tokens.*overlong to drop$"):
        fit_rows("reward", "pairs", lengths, 20, PLACES, "refuse")
    with pytest.raises(
        UserError, match=r"none of the 2 pairs is left .*the shortest has 20 tokens \(rows.jsonl, line 2"
    ):
        fit_rows("reward", "pairs", [35, 20], 9, PLACES, "drop")


def test_counts_agree_with_their_words() -> None:
    assert [counted(n, "rows") for n in (0, 1, 2, 1200)] == ["0 rows", "1 row", "2 rows", "1,200 rows"]
    fit = fit_rows("reward", "pairs", [10, 30], 20, PLACES, "drop")
    assert fit.sentence() == "1 of 2 pairs is used, 1 of 2 is dropped: longer than max_length 20"
    assert fit_rows("reward", "train pairs", [10], 20, PLACES, "drop").sentence() == "1 of 1 train pair is used"
    fit = fit_rows("sft", "rows", [30], 20, PLACES, "cut", [2])
    assert fit.sentence() == "1 of 1 row is used, 1 of 1 answer loses its end at max_length 20"
    with pytest.raises(UserError, match=r"more than max_length 20 allows \(1 of 1 pair is longer\)"):
        fit_rows("reward", "pairs", [30], 20, PLACES, "refuse")


def test_percentiles_are_lengths_that_are_there() -> None:
    told = percentiles("tokens of rows", [1] * 50 + [7] * 40 + [30] * 9 + [1000])
    assert told == "tokens of rows: 50 % up to 1, 90 % up to 7, 99 % up to 30, the longest 1,000"


def reader(name: str, limit: int | None, more: int = 0) -> Reader:
    return Reader(name, limit, lambda prompts, places: [[7] * (len(prompt) + more) for prompt in prompts])


def test_prompts_leave_everybody_room() -> None:
    prompts = ["a" * length for length in (4, 8, 10, 11)]
    readers = [reader("the policy", 20), reader("the reward model r", 20, more=2), reader("endless", None)]
    fit, ids = fit_prompts("ppo", "prompts", prompts, PLACES[:4], readers, ("response_length", 10), "drop")
    assert fit.kept == [0, 1] and [len(row) for row in ids] == [4, 8, 10, 11]
    assert fit.sentence() == (
        "2 of 4 prompts are used, "
        "1 of 4 is dropped: longer, with response_length 10, than the 20 tokens that the reward model r can read, "
        "1 of 4 is dropped: longer, with response_length 10, than the 20 tokens that the policy can read"
    )
    with pytest.raises(
        UserError, match=r"ppo: rows\.jsonl, line 3: a prompt of 12 tokens and response_length 10 do not"
    ):
        fit_prompts("ppo", "prompts", prompts, PLACES[:4], readers, ("response_length", 10), "refuse")
    with pytest.raises(UserError, match="none of the 4 prompts is left: longer, with response_length 17, than"):
        fit_prompts("ppo", "prompts", prompts, PLACES[:4], readers, ("response_length", 17), "drop")


# ---- reward models --------------------------------------------------------------------------------------------------


def words(cls: str | None = "<s>", sep: str = "</s>") -> PreTrainedTokenizerFast:
    """Words w4 … w39, put between `<s>` and `</s>` as BERT's tokenizer and RoBERTa's do."""
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, 40)}
    backend = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if cls:
        backend.post_processor = processors.BertProcessing((sep, 2), (cls, 0))
    names = {"cls_token": cls, "sep_token": sep} if cls else {"eos_token": sep}
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", **names)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_classifier_keeps_the_token_where_its_score_is_read(tmp_path: Path, kind: str, caplog) -> None:
    torch.manual_seed(0)
    settings = SMALL | {"num_labels": 1, "pad_token_id": 1, "initializer_range": 0.5}
    if kind == "bert":
        model = BertForSequenceClassification(BertConfig(**settings, max_position_embeddings=16)).eval()
    else:  # 18 positions, of which the padding's and those before it are of no use
        model = RobertaForSequenceClassification(RobertaConfig(**settings, max_position_embeddings=18)).eval()
    model.save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    reward = RewardModel(str(tmp_path), mixed_precision="no")
    assert reward.context == 16
    prompt, answer = " ".join(f"w{i}" for i in range(5, 25)), " w30 w31 w32"
    row = [0, *range(14, 25), 30, 31, 32, 2]  # the beginning and the end, and of the prompt what is left
    assert len(row) == 16
    expected = model(torch.tensor([row])).logits.item()
    assert reward([prompt], [answer]) == pytest.approx([expected], abs=1e-5)
    assert reward.cut_rows == 1 and "longer rows (1 so far) were scored without the beginning" in caplog.text
    short = model(torch.tensor([[0, 5, 30, 2]])).logits.item()
    assert reward(["w5"], [" w30"]) == pytest.approx([short], abs=1e-5) and reward.cut_rows == 1


def test_the_tokenizers_own_limit_counts_too(tmp_path: Path) -> None:
    tokenizer = words()
    tokenizer.model_max_length = 12
    BertForSequenceClassification(BertConfig(**SMALL, num_labels=1, max_position_embeddings=16)).save_pretrained(
        tmp_path
    )
    tokenizer.save_pretrained(tmp_path)
    reward = RewardModel(str(tmp_path), mixed_precision="no")
    assert reward.context == 12
    mix = WeightedRewards([("a", Ensemble([reward, len, reward]), 1.0), ("b", len, 1.0)])
    assert [r.limit for r in readers_of(mix, None, reward)] == [12, 12, 12]
    assert [len(ids) for ids in readers_of(reward)[0].encode(["w5 w6", "w7"], PLACES[:2])] == [4, 3]


# ---- the stages -----------------------------------------------------------------------------------------------------


def test_learnt_positions_are_compared_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2 with 64 positions and rows of up to 128 tokens: an IndexError, once a long row came up."""
    from pipeline.runtime.arguments import PretrainArguments, RewardArguments, SFTArguments
    from pipeline.runtime.command_line import resolve
    from stages import pretrain, reward, sft

    tokenizer = tiny_tokenizer()
    shape = GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=1, n_positions=64)
    GPT2LMHeadModel(shape).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a", "completion": "b", "chosen": "b", "rejected": "c", "text": "a"}) + "\n")
    given = {"run_dir": str(tmp_path), "dataset": str(rows), "model_name_or_path": str(tmp_path / "m")}
    for stage, kind, name in ((sft, SFTArguments, "max_length"), (reward, RewardArguments, "max_length")):
        with pytest.raises(UserError, match=f"{name} 65 is more than the 64 tokens that .*/m can read; lower {name}"):
            stage.main(resolve(kind(**given, max_length=65)))
    given |= {"tokenizer_name_or_path": str(tmp_path / "m")}
    with pytest.raises(UserError, match=r"block_size 65 is more than the 64 tokens that .*/m can read"):
        pretrain.main(resolve(PretrainArguments(**given, block_size=65)))
    with pytest.raises(UserError, match="block_size 300 is more than the 256 tokens that the model can read"):
        pretrain.main(resolve(PretrainArguments(**given | {"model_name_or_path": None}, block_size=300)))
    assert np.array_equal(sorted(p.name for p in tmp_path.iterdir()), ["m", "pretrain", "reward", "rows.jsonl", "sft"])
