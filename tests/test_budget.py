"""`--dry_run`: what a stage will take, said before it is spent; and the longest rows first."""

import json
import os
import random
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_preview
import torch
from conftest import ROOT, make
from ppo_tools import end_alike
from ppo_tools import trainer as ppo_trainer
from tiny_models import tiny_config, tiny_policy, tiny_tokenizer
from torch import nn

from pipeline.errors import UserError
from pipeline.model.gpt import GPTForSequenceClassification
from pipeline.model.lora import add_lora
from pipeline.model.memory import (
    Line,
    Passed,
    gradient_bytes,
    is_out_of_memory,
    make_moments,
    measured,
    moment_bytes,
    peak_of,
    stand_ins,
    trained_count,
    weight_bytes,
)
from pipeline.model.optim import MuonFactory
from pipeline.model.sampler import generate
from pipeline.ppo.longest import longest_rollout
from pipeline.runtime import longest, trainer_budget
from pipeline.runtime.arguments import (
    EvaluateArguments,
    PreferencesArguments,
    PretrainArguments,
    ReportArguments,
    RewardArguments,
    SFTArguments,
    TokenizerArguments,
)
from pipeline.runtime.budget import Machine, Memory, fitting, forward_flops, proposal, training_flops
from pipeline.runtime.command_line import parse, resolve
from pipeline.runtime.longest import lengths_of, longest_rows, smaller
from pipeline.runtime.ppo_arguments import PPOArguments
from pipeline.runtime.sampling_budget import cache_bytes, sampling_lines
from stages import evaluate, ppo, preferences, pretrain, reward, sft, tokenizer

MB = 10**6
ready = test_preview.run  # a fixture: models, and a data set for each stage
# ---- what is counted ------------------------------------------------------------------------------------------------


def test_weights_gradients_and_moments_by_hand() -> None:
    """tiny_config: a table of 300 × 16, tied; a block of 3 norms of 16 and 8 … counted one by one."""
    model = tiny_policy(0)
    attention = 16 * (2 * 8) + 2 * 16 * 8 + (2 * 8) * 16  # q, k and v of one group, o
    parameters = 300 * 16 + attention + 3 * 16 * 32 + 2 * 16 + 2 * 8 + 16  # table, SwiGLU, norms, of q and k, the last
    assert trained_count(model) == parameters == 7168
    assert weight_bytes(model) - sum(b.numel() * b.element_size() for b in model.buffers()) == 4 * parameters
    assert weight_bytes(model, model) == weight_bytes(model)  # what is shared counts once
    assert gradient_bytes(model) == 4 * parameters
    assert moment_bytes(torch.optim.AdamW(model.parameters())) == 8 * parameters
    muon = MuonFactory()(model, muon_learning_rate=0.01, learning_rate=0.01, weight_decay=0.0, adam_beta2=0.95)
    assert moment_bytes(muon) == 8 * parameters - 4 * (attention + 3 * 16 * 32)  # one moment of the matrices inside
    with_lora = add_lora(tiny_policy(0), r=2)
    matrices = [(16, 16), (16, 8), (16, 8), (16, 16), (16, 32), (16, 32), (32, 16)]
    assert gradient_bytes(with_lora) == 4 * sum(2 * (a + b) for a, b in matrices)


@pytest.mark.parametrize("muon", [False, True])
def test_moments_are_those_that_the_optimizer_makes(muon: bool) -> None:
    model = tiny_policy(0)
    rates = {"muon_learning_rate": 0.01, "learning_rate": 0.01, "weight_decay": 0.0, "adam_beta2": 0.95}
    optimizer = MuonFactory()(model, **rates) if muon else torch.optim.AdamW(model.parameters())
    model(input_ids=torch.ones(1, 8, dtype=torch.long), labels=torch.ones(1, 8, dtype=torch.long)).loss.backward()
    optimizer.step()
    kept = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.ndim]
    assert moment_bytes(optimizer) == sum(t.numel() * t.element_size() for t in kept)


def test_the_peak_of_a_sequence_of_allocations_by_hand() -> None:
    def work() -> None:
        a = torch.ones(1000)  # 4,000 bytes
        b = a * 2  # 8,000
        del a  # 4,000
        c = torch.cat([b, b])  # 12,000
        del b, c
        torch.ones(500)

    assert 12_000 <= peak_of(work, torch.device("cpu")) <= 12_000 + 3 * 64  # each is rounded up


def test_what_a_pass_keeps_and_takes_by_hand() -> None:
    model = nn.Sequential(nn.Linear(64, 256, bias=False), nn.ReLU(), nn.Linear(256, 1, bias=False))
    x = torch.randn(100, 64)
    passed = measured(lambda: model(x).sum(), model)
    hidden = 4 * 100 * 256
    # Kept: the input, which was there before, and what comes out of ReLU; the first layer's result is gone by then
    assert passed.kept == x.numel() * 4 + hidden
    # At the most: what comes out of ReLU, its gradient, and the gradient of what goes in; the loss and its gradient
    assert passed.peak == 3 * hidden + 2 * 4
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pass_takes_memory_in_proportion_to_its_rows(checkpointing: bool) -> None:
    """So that one row and two tell of any number; also of what is computed again."""
    model = tiny_policy(0, hidden_size=64, num_hidden_layers=3, intermediate_size=128).train()
    if checkpointing:
        model.gradient_checkpointing_enable()

    def passed(rows: int):
        ids = torch.ones(rows, 64, dtype=torch.long)
        return measured(lambda: model(input_ids=ids, labels=ids).loss, model)

    one, two, many = passed(1), passed(2), passed(12)
    assert Line.through((1, one.kept), (2, two.kept))(12) == pytest.approx(many.kept, rel=0.02)
    assert Line.through((1, one.peak), (2, two.peak))(12) == pytest.approx(many.peak, rel=0.05)


def test_the_cache_by_hand_and_as_it_is_taken() -> None:
    """Keys and values in fp32, of 5 layers with 2 groups of 16: 5 · 2 · 2 · 16 · 4 bytes a token."""
    shape = {"num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    model = tiny_policy(0, max_position_embeddings=1024, **shape)
    assert cache_bytes(model, 100) == 5 * 2 * 2 * 16 * 4 * 100
    prompts = [[3] * 40]
    cache, taken = sampling_lines(model, prompts, 120, partial(generate, model))
    assert cache(8) == cache_bytes(model, 8 * 160)
    options = {"max_new_tokens": 120, "eos_token_id": [-1], "pad_token_id": 0}
    seen = peak_of(lambda: generate(model, prompts * 8, **options), torch.device("cpu"))
    assert taken(8) == pytest.approx(seen, rel=0.2)


def test_flops_of_frozen_weights_are_less() -> None:
    model = tiny_policy(0)
    forward = forward_flops(model, 10, head=True)
    assert training_flops(model, 10, head=True) == 3 * forward
    with_lora = add_lora(tiny_policy(0), r=1)
    assert 2 * forward < training_flops(with_lora, 10, head=True) < 2.1 * forward
    assert forward - forward_flops(model, 10, head=False) == 2 * 300 * 16


# ---- what is proposed -----------------------------------------------------------------------------------------------


def test_the_proposal_by_hand() -> None:
    """100 MB that stay, 10 MB a row."""
    memory = Memory(8, {"weights": 100 * MB}, Line(row=4 * MB), Line(row=10 * MB), gaps=0.0)
    assert memory.peak(8, False) == 180 * MB
    assert fitting(memory, 300 * MB, 32) == 16  # 0.9 of it are 270: 17 rows would fit, 16 divide 32
    assert fitting(memory, 300 * MB, 30) == 15
    assert fitting(memory, 120 * MB, 32) is None
    said = proposal(memory, Machine(2, 300 * MB, "300 MB"), 64)  # 32 rows for each of two
    assert "8 rows take 180 MB, which fits in 300 MB" in said
    assert "per_device_train_batch_size 16 with gradient_accumulation_steps 2 (260 MB)" in said
    assert "Not even one row" in proposal(memory, Machine(1, 115 * MB, "115 MB"), 64)
    assert "fits barely" in proposal(memory, Machine(1, 190 * MB, ""), 64)
    assert "does not fit" in proposal(memory, Machine(1, 170 * MB, ""), 64)


def test_a_larger_micro_batch_is_counted_in_a_pass_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 rows take less than the line said, so 32 are tried, which do not fit; neither is tried twice."""
    memory = Memory(8, {"weights": 100 * MB}, Line(row=4 * MB), Line(row=10 * MB), seen=180 * MB)
    sizes, tried = {16: Passed(50 * MB, 100 * MB), 32: Passed(60 * MB, 190 * MB)}, list[int]()

    def passed(_: object, rows: int) -> Passed:
        tried.append(rows)
        return sizes[rows]

    monkeypatch.setattr(trainer_budget, "passed", passed)
    trainer = SimpleNamespace(args=SimpleNamespace(device=torch.device("cpu")))
    trainer_budget.count_what_is_proposed(trainer, memory, Machine(1, 300 * MB, ""), 32)
    assert tried == [16, 32] and fitting(memory, 300 * MB, 32) == 16
    assert memory.peak(8, True) == 180 * MB and memory.peak(32, False) == pytest.approx(290 * MB)
    trainer_budget.count_what_is_proposed(trainer, memory, Machine(1, 10**18, ""), 10**6)  # no room here for so many
    assert tried == [16, 32]


def test_what_was_seen_counts_and_its_gaps_stay() -> None:
    memory = Memory(8, {"weights": 100 * MB}, Line(row=4 * MB), Line(row=10 * MB), seen=220 * MB)
    assert memory.peak(8, False) == 220 * MB and memory.peak(16, False) == pytest.approx((100 + 160 + 40) * MB)
    memory.buckets = 50 * MB  # of more processes, which were not there when it was seen
    assert memory.peak(8, False) == 270 * MB
    shown = [float(line.split()[-1].replace(",", "")) for line in memory.lines(8, False)]
    assert sum(shown[:-1]) == shown[-1] == 270  # the parts add up
    memory.buckets, memory.seen = 0, 170 * MB  # less than the parts, as gradients come while activations go
    assert memory.peak(8, False) == 170 * MB and memory.peak(4, True) == 140 * MB  # but not between micro-batches


def test_how_to_lower_a_micro_batch() -> None:
    args = SFTArguments(per_device_train_batch_size=9, gradient_accumulation_steps=2)
    assert "from 9 to 3 with gradient_accumulation_steps 6" in smaller(args)
    assert smaller(SFTArguments(per_device_train_batch_size=1)) == ""


# ---- every stage ----------------------------------------------------------------------------------------------------

STAGES = [
    (sft, SFTArguments, "answers", {"max_length": 100, "max_steps": 7}),
    (reward, RewardArguments, "pairs", {"max_length": 100, "max_steps": 7, "per_device_train_batch_size": 4}),
    (pretrain, PretrainArguments, "texts", {"block_size": 40, "hidden_size": 32, "num_hidden_layers": 1}),
    (preferences, PreferencesArguments, "prompts", {"max_new_tokens": 20, "labeller": "test_budget:judge"}),
    (evaluate, EvaluateArguments, "prompts", {"max_new_tokens": 20, "gold": None, "best_of": 2}),
    (
        ppo,
        PPOArguments,
        "prompts",
        {"response_length": 20, "batch_size": 8, "total_episodes": 64, "per_device_train_batch_size": 1},
    ),
]


def judge(prompts, completions, **columns):
    return [float(len(str(completion))) for completion in completions]


def dry(ready: Path, stage, kind, data: str, capsys: pytest.CaptureFixture, **settings: object) -> str:
    """What `--dry_run` prints, and that it leaves nothing behind."""
    before = {path: path.stat().st_mtime_ns for path in ready.rglob("*")}
    given = {"run_dir": str(ready), "output_dir": str(ready / "new"), "dataset": str(ready / f"{data}.jsonl")}
    given |= {"dry_run": True, "mixed_precision": "no"}
    capsys.readouterr()
    stage.main(resolve(kind(**given | settings)))
    assert {path: path.stat().st_mtime_ns for path in ready.rglob("*")} == before
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("stage", "kind", "data", "settings"), STAGES, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_dry_run_says_memory_work_and_time_and_writes_nothing(ready, stage, kind, data, settings, capsys) -> None:
    out = dry(ready, stage, kind, data, capsys, **settings)
    assert "nothing is written" in out and "FLOPs" in out and " parameters" in out
    assert re.search(r"about \d+:\d\d:\d\d", out) and "tokens" in out
    table = re.findall(r"^  (\S.*?)  +(-?[\d,]+)$", out, re.M)
    sizes = {name: float(size.replace(",", "")) for name, size in table}
    peak = next(size for name, size in sizes.items() if name.startswith("peak"))
    assert abs(sum(sizes.values()) - 2 * peak) <= len(sizes) / 2 + 0.5  # of rounded numbers
    assert sizes["Python, libraries and data"] > 100 and "batch_size" in out


def test_processes_and_memory_of_another_machine(ready, capsys) -> None:
    settings = {"max_length": 100, "max_steps": 7, "processes": 2, "memory_gb": 100.0}
    out = dry(ready, sft, SFTArguments, "answers", capsys, **settings)
    assert "2 processes share the rows" in out and "in the 100 GB of --memory_gb" in out
    assert "per_device_train_batch_size 16 with gradient_accumulation_steps 1" in out  # half of the 32 rows of a step
    assert "with 16 rows of up to 100 tokens at a time" in out
    out = dry(ready, sft, SFTArguments, "answers", capsys, **settings | {"memory_gb": 0.01})
    assert "does not fit in the 0.01 GB" in out and "Not even one row" in out
    with pytest.raises(UserError, match="processes: the 32 rows of a step cannot be shared evenly among 5"):
        dry(ready, sft, SFTArguments, "answers", capsys, **settings | {"processes": 5})
    with pytest.raises(UserError, match="batch_size 8 must be a multiple of num_mini_batches × processes = 4 × 3"):
        dry(ready, ppo, PPOArguments, "prompts", capsys, response_length=20, batch_size=8, processes=3)


def test_what_does_not_fit_here_is_counted_and_not_run(ready, capsys, monkeypatch) -> None:
    monkeypatch.setattr("pipeline.runtime.trainer_budget.available", lambda device: 0)
    out = dry(ready, sft, SFTArguments, "answers", capsys, max_length=100, max_steps=7)
    assert "peak, counted, not run" in out and "a step does not fit this machine" in out


def test_the_stages_without_a_model(ready, capsys) -> None:
    given = {"run_dir": str(ready), "output_dir": str(ready / "new"), "dry_run": True}
    before = sorted(ready.rglob("*"))
    tokenizer.main(resolve(TokenizerArguments(**given, dataset=str(ready / "texts.jsonl"))))
    out = capsys.readouterr().out
    size = (ready / "texts.jsonl").stat().st_size / MB
    assert f"1 files are read, {size:,.1f} MB; about 0:00:01 to learn, by 5 of 54 documents" in out
    human = {"dataset": str(ready / "pairs.jsonl"), "labeller": "human"}
    preferences.main(resolve(PreferencesArguments(**given, **human)))
    assert "no answer is sampled" in capsys.readouterr().out
    assert sorted(ready.rglob("*")) == before


def test_settings_of_a_dry_run_without_one(ready) -> None:
    given = {"run_dir": str(ready), "output_dir": str(ready / "new"), "dataset": str(ready / "answers.jsonl")}
    for settings, words in (
        ({"processes": 2}, "processes: it says what a dry run speaks of"),
        ({"memory_gb": 2.0}, "memory_gb: it says"),
        ({"dry_run": True, "show": 3}, "give one of them"),
    ):
        with pytest.raises(UserError, match=words):
            sft.main(resolve(SFTArguments(**given | settings)))
    assert not (ready / "new").exists()


def test_dry_run_needs_no_value_on_the_command_line() -> None:
    assert parse(ReportArguments, ["--dry_run"]).dry_run
    assert parse(ReportArguments, ["--dry_run", "--seed", "1"]).dry_run
    assert not parse(ReportArguments, ["--dry_run", "False"]).dry_run


# ---- the longest rows first -----------------------------------------------------------------------------------------


def test_the_longest_rows_of_a_data_set() -> None:
    from datasets import Dataset

    rows = Dataset.from_dict({"input_ids": [[1], [1, 2, 3], [1, 2]], "labels": [[0], [0] * 3, [0] * 2]})
    assert lengths_of(rows).tolist() == [1, 3, 2] and lengths_of(rows.select([2, 0])).tolist() == [2, 1]
    assert [len(row["input_ids"]) for row in longest_rows(rows, 4)] == [3, 2, 1, 3]
    pairs = Dataset.from_dict({"chosen_ids": [[1], [1]], "rejected_ids": [[1, 2], [1]]})
    assert lengths_of(pairs).tolist() == [2, 1]
    assert lengths_of(iter([])) is None


@pytest.mark.parametrize("stage", [sft, reward])
def test_the_rehearsal_leaves_no_trace(ready, stage, tmp_path, monkeypatch) -> None:
    """A run with it and one without end with the same files, to the bit."""
    kind, data = (SFTArguments, "answers") if stage is sft else (RewardArguments, "pairs")
    given = {"run_dir": str(ready), "dataset": str(ready / f"{data}.jsonl"), "max_length": 100, "max_steps": 3}
    given |= {"logging_steps": 1, "mixed_precision": "no", "per_device_train_batch_size": 4}
    seen = []
    whole = longest.pass_over
    monkeypatch.setattr(longest, "pass_over", lambda *a, **k: seen.append(a[1]) or whole(*a, **k))
    stage.main(resolve(kind(**given, output_dir=str(tmp_path / "with"))))
    assert len(seen) == 1 and len(seen[0]) == 4
    lengths = [max(len(ids) for name, ids in row.items() if name.endswith("ids")) for row in seen[0]]
    assert min(lengths) >= (100 if stage is sft else 24)
    monkeypatch.setattr(longest, "rehearse", lambda *a: None)
    stage.main(resolve(kind(**given, output_dir=str(tmp_path / "without"))))
    read = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("with", "without")]
    assert read[0] == read[1]
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("with", "without")]
    strip = [re.sub(r'"(time|seconds_left|memory_mb)": [\d.]+', "", text) for text in lines]
    assert strip[0] == strip[1]


@pytest.mark.parametrize("kind", ["fused", "plain", "muon"])
def test_moments_made_early_are_those_of_the_first_step(kind: str) -> None:
    """Weights and the whole state after three steps, to the bit; what cannot be made early has stand-ins."""

    def optimizer_of(model: Any) -> Any:
        if kind == "muon":
            return MuonFactory()(model, muon_learning_rate=0.1, learning_rate=0.01, weight_decay=0.1, adam_beta2=0.99)
        return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, fused=kind == "fused")

    ended = []
    for early in (True, False):
        model = tiny_policy(0)
        optimizer = optimizer_of(model)
        if early:
            make_moments(optimizer)
            left = sum(tensor.numel() for tensor in stand_ins(optimizer))
            hidden = sum(p.numel() for g in optimizer.param_groups if g.get("use_muon") for p in g["params"])
            assert left == hidden and (hidden > 0) == (kind == "muon")
            whole = sum(p.numel() for p in model.parameters())
            assert sum(tensor.numel() for tensor in stand_ins(optimizer, copies=1)) == left + whole
        for step in range(3):
            ids = torch.arange(5)[None] + step
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ended.append((dict(model.named_parameters()), optimizer.state_dict()["state"]))
    (weights, states), (other_weights, other_states) = ended
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    assert states.keys() == other_states.keys()
    for number, state in states.items():
        assert list(state) == list(other_states[number])
        for name, value in state.items():
            expected = other_states[number][name]
            assert value.dtype == expected.dtype and value.device == expected.device and torch.equal(value, expected)


def test_the_rehearsal_draws_no_random_number_of_the_training() -> None:
    """As dropout would."""
    trainer = SimpleNamespace(model=nn.Linear(1, 1).eval())
    before = torch.get_rng_state()
    with longest._no_trace(trainer, []):
        assert trainer.model.training
        trainer.model(torch.rand(1)).backward()
    assert torch.equal(torch.get_rng_state(), before)
    assert not trainer.model.training and trainer.model.weight.grad is None


def test_the_rehearsal_of_ppo_has_the_longest_rows_and_leaves_no_trace(tmp_path, monkeypatch) -> None:
    made = ppo_trainer(tmp_path, total_episodes=16)
    rollout = longest_rollout(made.learner, made.prompts, 2)
    assert rollout.lengths.tolist() == [9 + 6, 9 + 6]
    made.train()
    monkeypatch.setattr("pipeline.ppo.trainer.rehearse", lambda *a: None)
    other = ppo_trainer(tmp_path / "other", total_episodes=16)
    other.train()
    assert end_alike(made, other)
    assert [row["objective/scores"] for row in made.rows] == [row["objective/scores"] for row in other.rows]


def test_full_memory_becomes_a_sentence_of_what_to_lower(ready, tmp_path, monkeypatch) -> None:
    given = {"run_dir": str(ready), "dataset": str(ready / "answers.jsonl"), "max_length": 100, "mixed_precision": "no"}

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("pipeline.runtime.longest.pass_over", full)
    words = (
        r"sft: out of memory before the first step, with micro-batches of 32 rows: lower per_device_train_batch_size "
        r"from 32 to 16 with gradient_accumulation_steps 2, which makes the same steps, or lower max_length \(100\), "
        "or set gradient_checkpointing to True; nothing was trained or lost"
    )
    with pytest.raises(UserError, match=words):
        sft.main(resolve(SFTArguments(**given, output_dir=str(tmp_path / "sft"), max_steps=2)))
    monkeypatch.undo()  # the command with other settings can follow
    less = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2}
    sft.main(resolve(SFTArguments(**given, **less, output_dir=str(tmp_path / "sft"), max_steps=2)))
    monkeypatch.setattr("pipeline.ppo.trainer.rehearse", full)
    with pytest.raises(
        UserError, match=r"ppo: out of memory in update 1: lower per_device_train_batch_size from 2 to 1"
    ):
        ppo_trainer(tmp_path / "ppo").train()
    assert is_out_of_memory(MemoryError()) and not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))


# ---- beside real runs -----------------------------------------------------------------------------------------------

SHAPES = {
    "tiny": {},
    "ten": {
        "vocab_size": 4096,
        "hidden_size": 320,
        "intermediate_size": 864,
        "num_hidden_layers": 6,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
    },
    "smollm2": {  # SmolLM2-135M's
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of each shape, instructions, most of them short, and prompts."""
    folder, rng = tmp_path_factory.mktemp("shapes"), random.Random(0)
    for name, shape in SHAPES.items():
        large = {} if name == "tiny" else {"head_dim": 64, "initializer_range": 0.02}
        tiny_policy(0, **shape | large).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    texts = [" ".join(rng.choices(test_preview.WORDS, k=60 if i % 10 == 9 else 6)) for i in range(120)]
    rows = {"answers": [{"prompt": f"Say {i}:", "completion": f" {text}"} for i, text in enumerate(texts)]}
    rows["prompts"] = [{"prompt": f"Say {i}:"} for i in range(120)]
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return folder


SCRIPT = """
{before}
import atexit, runpy, sys
atexit.register(lambda: print("HIGHEST", open("/proc/self/status").read().split("VmHWM:")[1].split()[0], flush=True))
sys.argv[0] = "-m"
runpy.run_module("stages.{stage}", run_name="__main__")
"""


def stage_process(stage: str, *words: object, before: str = "") -> tuple[str, int, float]:
    """What a stage prints in a process of its own, its exit code, and its peak memory in MB."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT.format(stage=stage, before=before), *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    out = done.stdout + done.stderr
    return out, done.returncode, int(re.search(r"^HIGHEST (\d+)", out, re.M)[1]) * 1024 / MB


def foretold(out: str) -> float:
    return float(re.search(r"^  peak, .*? ([\d,]+)$", out, re.M)[1].replace(",", ""))


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "rows"), [("tiny", 16), ("ten", 16), ("smollm2", 4)])
def test_sft_takes_what_the_dry_run_said(shapes: Path, shape: str, rows: int, tmp_path: Path) -> None:
    """Within 20 % of the peak of a run in a fresh process; so does twice the micro-batch, which was not run."""
    data = (
        "--model_name_or_path",
        shapes / shape,
        "--dataset",
        shapes / "answers.jsonl",
        "--output_dir",
        tmp_path / "x",
    )
    words = (*data, "--max_length", 100, "--max_steps", 6, "--gradient_accumulation_steps", 1)
    out, code, _ = stage_process("sft", *words, "--per_device_train_batch_size", rows, "--dry_run")
    assert code == 0, out[-2000:]
    assert not (tmp_path / "x").exists()
    said, code, real = stage_process("sft", *words, "--per_device_train_batch_size", rows)
    assert code == 0, said[-2000:]
    assert foretold(out) == pytest.approx(real, rel=0.2)
    print(f"{shape}, {rows} rows: {foretold(out):,.0f} MB foretold, {real:,.0f} MB real")


@pytest.mark.slow
def test_ppo_takes_what_the_dry_run_said(shapes: Path, tmp_path: Path) -> None:
    shape = "ten"
    torch.manual_seed(0)
    GPTForSequenceClassification(tiny_config(**SHAPES[shape], head_dim=64, initializer_range=0.02)).save_pretrained(
        tmp_path / "rm"
    )
    tiny_tokenizer().save_pretrained(tmp_path / "rm")
    models = (
        "--model_name_or_path",
        shapes / shape,
        "--reward",
        tmp_path / "rm",
        "--critic_name_or_path",
        tmp_path / "rm",
    )
    words = (*models, "--dataset", shapes / "prompts.jsonl", "--output_dir", tmp_path / "x", "--response_length", 24)
    words += ("--batch_size", 8, "--num_mini_batches", 2, "--per_device_train_batch_size", 4, "--total_episodes", 16)
    words += ("--num_ppo_epochs", 1, "--save_steps", 0)
    out, code, _ = stage_process("ppo", *words, "--dry_run")
    assert code == 0, out[-2000:]
    said, code, real = stage_process("ppo", *words)
    assert code == 0, said[-2000:]
    assert foretold(out) == pytest.approx(real, rel=0.2)
    print(f"{shape}: {foretold(out):,.0f} MB foretold, {real:,.0f} MB real")


@pytest.mark.slow
def test_another_micro_batch_is_foretold_from_what_was_seen(shapes: Path, tmp_path: Path) -> None:
    """Four times the rows that the dry run had, as its proposal has them for enough memory."""
    data = (
        "--model_name_or_path",
        shapes / "ten",
        "--dataset",
        shapes / "answers.jsonl",
        "--output_dir",
        tmp_path / "x",
    )
    words = (*data, "--max_length", 100, "--max_steps", 6)
    few = ("--per_device_train_batch_size", 8, "--gradient_accumulation_steps", 4)
    out, code, _ = stage_process("sft", *words, *few, "--dry_run", "--memory_gb", 100)
    found = re.search(r"per_device_train_batch_size 32 with gradient_accumulation_steps 1 \(([\d,]+) MB\)", out)
    assert code == 0 and found, out[-2000:]
    said, code, real = stage_process("sft", *words, "--per_device_train_batch_size", 32)
    assert code == 0, said[-2000:]
    assert float(found[1].replace(",", "")) == pytest.approx(real, rel=0.2)
    print(f"ten, 32 rows from 8: {found[1]} MB foretold, {real:,.0f} MB real")


LIMITED = """
import resource, psutil
{place}
rehearse = place.rehearse
def limited(*args):
    has = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (has + 300 * 2**20, resource.RLIM_INFINITY))
    return rehearse(*args)
place.rehearse = limited
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_machine_without_enough_memory_is_told_in_the_first_minute(shapes: Path, stage: str, tmp_path: Path) -> None:
    """The system gives the process 300 MB more than it has when the longest rows come, and no more."""
    words = ["--model_name_or_path", shapes / "smollm2", "--output_dir", tmp_path / "x"]
    if stage == "sft":
        place = "import pipeline.runtime.longest as place"
        words += ["--dataset", shapes / "answers.jsonl", "--max_length", 100, "--per_device_train_batch_size", 8]
        said = "sft: out of memory before the first step, with micro-batches of 8 rows: lower per_device_train_batch"
    else:
        place = "import pipeline.ppo.trainer as place"
        words += ["--dataset", shapes / "prompts.jsonl", "--reward", "reward_data.reviews:gold", "--share_trunk", True]
        said = "ppo: out of memory in update 1: lower per_device_train_batch_size from 16 to 8"
    out, code, _ = stage_process(stage, *words, before=LIMITED.format(place=place))
    assert code == 2 and said in out and "Traceback" not in out, out[-2000:]
    assert not list((tmp_path / "x").glob("*.json*"))


@pytest.mark.slow
def test_make_dry_names_its_stage() -> None:
    done = make("-n", "dry", "STAGE=sft", "PRESET=smoke", "RUN=runs/x", "SEED=2")
    command = "-m stages.sft --config configs/smoke/sft.yaml --run_dir runs/x --seed 2"
    assert command in done.stdout.replace("'", "") and "--dry_run" in done.stdout
    done = make("dry", "PRESET=smoke")
    assert done.returncode == 2 and "STAGE" in done.stderr and "report" in done.stderr
