"""The pretraining stage on a tiny corpus: its figures by hand, its guard, its resume, its options."""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from safetensors.torch import load_file
from tiny_models import tiny_policy, tiny_tokenizer
from transformers import AutoModelForCausalLM

from pipeline.checkpoint import fault_of, sha256_of
from pipeline.errors import UserError
from pipeline.judging import held_out_nats
from pipeline.model.flops import flops_per_token
from pipeline.model.gpt import GPTForCausalLM
from pipeline.runtime import hf_trainer, nan_guard
from pipeline.runtime.arguments import PretrainArguments
from pipeline.runtime.command_line import resolve
from pipeline.runtime.console import run as run_stage
from pipeline.text import data, packing
from stages import pretrain

TINY = {
    "mixed_precision": "no",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "head_dim": 16,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "block_size": 24,
    "max_position_embeddings": 32,
    "per_device_train_batch_size": 4,
    "max_steps": 12,
    "warmup_steps": 2,
    "logging_steps": 2,
    "eval_steps": 6,
    "save_steps": 4,
    "optimizer": "adamw",
    "lr_scheduler_type": "cosine",
    "learning_rate": 1e-3,
    "max_bytes": None,
    "validation_bytes": None,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a tokenizer, and a corpus of 600 documents beside it."""
    folder = tmp_path_factory.mktemp("run")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    rng = np.random.default_rng(0)
    words = ["Ben", "found", "a", "kite", "near", "the", "river", "He", "was", "happy", "naïve", "fox", "lost"]
    texts = [f"{i}: " + " ".join(rng.choice(words, size=rng.integers(3, 30))) for i in range(600)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def fields(run: Path, output: Path | str, **changes: object) -> dict:
    where = {"run_dir": str(run), "dataset": str(run / "corpus.jsonl"), "output_dir": str(output)}
    return {**TINY, **where, **changes}


def arguments(run: Path, output: Path | str, **changes: object) -> PretrainArguments:
    return resolve(PretrainArguments(**fields(run, output, **changes)))


def words(run: Path, output: Path, **changes: object) -> list[str]:
    return [w for name, value in fields(run, output, **changes).items() for w in (f"--{name}", str(value))]


def lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def metrics(output: Path) -> dict:
    return json.loads((output / "stage.json").read_text())["metrics"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def largest_difference(one: Path, other: Path) -> float:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture(scope="module")
def plain(run: Path) -> Path:
    """The folder of a run with no option set."""
    output = run / "plain"
    pretrain.main(arguments(run, output))
    return output


# ---- figures --------------------------------------------------------------------------------------------------------


def held_out_by_hand(model: torch.nn.Module, ids: list[int], block_size: int) -> float:
    """Nats of every token but the first, each given at most the block_size − 1 before it in its row; row by row."""
    total = 0.0
    for start in range(0, len(ids) - 1, block_size - 1):
        row = torch.tensor(ids[start : start + block_size])
        with torch.no_grad():
            total += F.cross_entropy(model(row[None]).logits[0, :-1].double(), row[1:], reduction="sum").item()
    return total


def test_held_out_loss_is_exact_whatever_the_batch_and_the_processes(run: Path) -> None:
    tokenizer, model = tiny_tokenizer(), tiny_policy(0)
    texts = data.load_texts(str(run / "corpus.jsonl"), split="validation")
    packed = packing.pack(texts, tokenizer, 24)
    assert len(packed.rows) % 7 and (len(packed.ids) - 1) % 23, "neither batches nor rows come out even"
    expected = held_out_by_hand(model, packed.ids.tolist(), 24)
    for batch_size in (1, 7, 1000):
        nats, tokens = held_out_nats(model, packed.rows, batch_size)
        assert tokens == packed.tokens == len(packed.ids) - 1
        assert nats / tokens == pytest.approx(expected / tokens, rel=1e-6)
    for processes in (2, 5, 100):
        parts = [held_out_nats(model, packed.rows, 3, process, processes) for process in range(processes)]
        assert sum(count for _, count in parts) == packed.tokens
        assert sum(nats for nats, _ in parts) == pytest.approx(expected, rel=1e-6)


def test_the_stages_figures_by_hand(run: Path, plain: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    texts, tokenizer = data.load_texts(str(run / "corpus.jsonl"), split="validation"), tiny_tokenizer()
    ids = packing.pack(texts, tokenizer, 24).ids.tolist()
    nats, found = held_out_by_hand(model, ids, 24), metrics(plain)
    first = len(tokenizer.decode(ids[:1]))
    assert found["val_loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
    text_bytes, characters = sum(len(t.encode()) for t in texts), sum(map(len, texts))
    assert text_bytes > characters and first == 1
    assert found["val_bpb"] == pytest.approx(nats / math.log(2) / (text_bytes - first), rel=1e-5)
    assert found["val_nats_per_char"] == pytest.approx(nats / (characters - first), rel=1e-5)
    assert (
        found["val_bpb"]
        < found["uniform_bpb"]
        == pytest.approx(math.log2(len(tokenizer)) * (len(ids) - 1) / (text_bytes - first))
    )


def test_the_step_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(pretrain, "matmul_peak", lambda device, dtype: 1e9 if dtype == torch.float32 else 0.0)
    pretrain.main(arguments(run, tmp_path, eval_steps=100))
    (first, *_, second, _), config = lines(tmp_path), GPTForCausalLM.config_class.from_pretrained(tmp_path)
    texts = data.load_texts(str(run / "corpus.jsonl"), split="train", seed=0)
    packed = packing.pack(texts, tiny_tokenizer(), 24)
    assert first["bpb"] == pytest.approx(first["loss"] / math.log(2) * packed.tokens / packed.bytes)
    assert first["mfu"] == pytest.approx(first["tokens_per_s"] * flops_per_token(config, 24) / 1e9, rel=0.01, abs=1e-4)
    assert first["grad_norm"] > 0 and first["learning_rate"] > 0 and 50 < first["memory_mb"] < 100_000
    assert first["seconds_left"] > second["seconds_left"] == 0
    shown = next(line for line in capsys.readouterr().out.splitlines() if "step 2" in line)
    for word in ("loss", "bpb", "grad", "tok/s", "% of peak", "MB", "left"):
        assert word in shown
    assert len(shown) <= 120


@pytest.mark.slow
def test_warmup_stable_decay(run: Path, tmp_path: Path) -> None:
    pretrain.main(
        arguments(
            run,
            tmp_path,
            max_steps=20,
            warmup_steps=4,
            lr_scheduler_type="warmup_stable_decay",
            decay_share=0.4,
            learning_rate=0.01,
            logging_steps=1,
            optimizer="muon",
            muon_learning_rate=0.02,
        )
    )
    rates = [line["learning_rate"] for line in lines(tmp_path) if "learning_rate" in line]
    rising, falling = [0, 0.25, 0.5, 0.75], [1 - math.sqrt(i / 8) for i in range(8)]
    scale = max(rates)  # Trainer shows the first group's rate: Muon's
    assert scale == 0.02 and [rate / scale for rate in rates] == pytest.approx([*rising, *[1] * 8, *falling])
    assert hf_trainer.schedule_kwargs(arguments(run, tmp_path)) is None
    for share, steps in ((0.4, 8), (0.9, 16), (0.001, 1)):  # the warm-up is never cut short
        args = arguments(
            run, tmp_path, max_steps=20, warmup_steps=4, decay_share=share, lr_scheduler_type="warmup_stable_decay"
        )
        assert hf_trainer.schedule_kwargs(args)["num_decay_steps"] == steps
    for share in (0.0, 1.5):
        with pytest.raises(UserError, match=f"decay_share: {share} must be above 0 and at most 1"):
            arguments(run, tmp_path, decay_share=share)


# ---- data -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_no_held_out_document_is_trained_on(run: Path, tmp_path: Path, streaming: bool) -> None:
    """Also where files named train and validation share some."""
    for name, numbers in (("train", range(100)), ("validation", range(90, 120))):
        rows = [{"story": f"Story  number {i}\n" if name == "train" else f"story number {i}"} for i in numbers]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = arguments(run, tmp_path / "out", dataset=str(tmp_path), text_column="story", streaming=streaming)
    training, held_out = pretrain.load(args, tiny_tokenizer())
    if streaming:
        rows = iter(training)
        ids = [token for _ in range(200) for token in next(rows)["input_ids"][:-1]]
    else:
        ids = training.ids.tolist()
    decode = partial(tiny_tokenizer().decode, skip_special_tokens=False)
    trained = set(decode(ids).split("<|endoftext|>")[:-1])
    assert len(trained) == 90 - (not streaming) and "Story  number 95\n" not in trained
    assert len(decode(held_out.ids.tolist()).split("<|endoftext|>")) == 30


def test_an_endless_generator_needs_a_size(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stories never ends; say how much of it is wanted"):
        pretrain.main(arguments(run, tmp_path, dataset="stories"))


# ---- options that must not change what is learned -------------------------------------------------------------------


@pytest.mark.slow
def test_accumulated_batches_are_one_batch(run: Path, tmp_path: Path, plain: Path) -> None:
    pretrain.main(arguments(run, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4))
    assert largest_difference(plain, tmp_path) < 1e-6
    assert max(w.abs().max() for w in weights(plain).values()) > 0.1


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_number_and_keeps_less(run: Path, tmp_path: Path, plain: Path) -> None:
    pretrain.main(arguments(run, tmp_path, gradient_checkpointing=True))
    assert largest_difference(plain, tmp_path) == 0
    model, ids = tiny_policy(0, num_hidden_layers=6).train(), torch.randint(6, 300, (4, 64))

    def bytes_kept() -> int:
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return sum(kept.values())

    without = bytes_kept()
    model.gradient_checkpointing_enable()
    assert bytes_kept() < 0.5 * without


@pytest.mark.slow
def test_a_compiled_model_is_saved_under_stock_names(
    run: Path, tmp_path: Path, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("BACKEND", "MODE"):  # the Trainer sets these for good
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "no" if name == "BACKEND" else "default")
    compiled, compile_model = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compiled.append(a) or compile_model(*a, **k))
    monkeypatch.setattr(hf_trainer, "why_not_compile", lambda: None)  # inductor takes minutes: the graph alone will do
    monkeypatch.setattr(
        pretrain, "TrainingArguments", partial(pretrain.TrainingArguments, torch_compile_backend="aot_eager")
    )
    pretrain.main(arguments(run, tmp_path, torch_compile=True))
    assert compiled and largest_difference(plain, tmp_path) < 1e-5
    assert AutoModelForCausalLM.from_pretrained(tmp_path) is not None
    assert largest_difference(plain / "checkpoints/checkpoint-12", tmp_path / "checkpoints/checkpoint-12") < 1e-5


@pytest.mark.slow
def test_without_a_compiler_it_says_so_and_goes_on(run: Path, tmp_path: Path, plain: Path) -> None:
    output, empty = tmp_path / "out", tmp_path / "bin"
    empty.mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX")} | {"PATH": str(empty)}
    command = [sys.executable, "-m", "stages.pretrain", *words(run, output, torch_compile=True)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "torch.compile does not work here (No working C++ compiler" in done.stdout.replace("\n", " ")
    assert largest_difference(plain, output) == 0


# ---- a loss that is no number ---------------------------------------------------------------------------------------


class Poisoned(GPTForCausalLM):
    """Its loss, or only its gradient, is NaN from the seventh training batch on."""

    how = "loss"
    seen: list = []  # noqa: RUF012

    def forward(self, *args: object, **kwargs: object):
        out = super().forward(*args, **kwargs)
        if self.training:
            self.seen.append(kwargs["input_ids"])
            if len(self.seen) >= 7:
                weight = self.lm_head.weight[0, 0]
                out.loss = out.loss * math.nan if self.how == "loss" else out.loss + (0 * weight).sqrt()
        return out


@pytest.mark.parametrize(
    ("how", "at_once"),
    [
        ("loss", True),
        *(
            pytest.param(h, a, marks=pytest.mark.slow)
            for h, a in (("gradient", True), ("loss", False), ("gradient", False))
        ),
    ],
)
def test_nan_stops_at_its_step_and_names_the_batch(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, how: str, at_once: bool
) -> None:
    monkeypatch.setattr(Poisoned, "how", how)
    monkeypatch.setattr(Poisoned, "seen", [])
    monkeypatch.setattr(pretrain, "GPTForCausalLM", Poisoned)
    changes = {"logging_steps": 100, "eval_steps": 100}
    if not at_once:  # as on a GPU
        monkeypatch.setattr(nan_guard, "looks_at_once", lambda device: False)
    monkeypatch.setattr("sys.argv", ["pretrain", *words(run, tmp_path, **changes)])
    with pytest.raises(SystemExit) as leaving:
        run_stage(pretrain.main, PretrainArguments)
    message = capsys.readouterr().err.replace("\n", " ")
    assert leaving.value.code == 2 and "Traceback" not in message
    what = "the loss is nan" if how == "loss" else "the norm of the gradient is nan"
    assert f"pretrain: {what} at step 7" in message
    assert len(Poisoned.seen) == (7 if at_once else 8), "at once, or before the next checkpoint"
    named = message.split("training rows ")[1].split(", its first")[0]
    rows = packing.pack(data.load_texts(str(run / "corpus.jsonl"), split="train"), tiny_tokenizer(), 24).rows
    assert [rows[int(i)]["input_ids"] for i in named.split(", ")] == Poisoned.seen[6].tolist()
    assert repr(tiny_tokenizer().decode(Poisoned.seen[6][0].tolist())[:30])[:-1] in message
    kept = tmp_path / "checkpoints" / "checkpoint-4"
    assert f"the last good checkpoint is {kept}" in message and fault_of(kept) is None
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("checkpoint-*")) == ["checkpoint-4"]
    assert all(tensor.isfinite().all() for tensor in weights(kept).values())
    # The sentence's advice works.
    monkeypatch.setattr(pretrain, "GPTForCausalLM", GPTForCausalLM)
    pretrain.main(arguments(run, tmp_path / "on", model_name_or_path=str(kept), learning_rate=1e-4, max_steps=2))
    assert math.isfinite(metrics(tmp_path / "on")["val_loss"])


@pytest.mark.slow
def test_a_full_disk_is_a_sentence_and_the_run_goes_on(
    run: Path, tmp_path: Path, plain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A file that may not grow fails as one on a full disk does: here from the second checkpoint on."""
    limits, seal = resource.getrlimit(resource.RLIMIT_FSIZE), hf_trainer.seal

    def seal_and_fill(folder: Path) -> None:
        seal(folder)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))

    monkeypatch.setattr("sys.argv", ["pretrain", *words(run, tmp_path)])
    monkeypatch.setattr(hf_trainer, "seal", seal_and_fill)
    try:
        with pytest.raises(SystemExit) as leaving:
            run_stage(pretrain.main, PretrainArguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert leaving.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    assert fault_of(tmp_path / "checkpoints/checkpoint-4") is None
    monkeypatch.setattr(hf_trainer, "seal", seal)
    run_stage(pretrain.main, PretrainArguments)
    out = capsys.readouterr().out
    assert "checkpoint-8 is not used: it was cut off while it was written" in out, out
    assert "going on from" in out and largest_difference(plain, tmp_path) == 0


# ---- resume and processes -------------------------------------------------------------------------------------------

MUON = {
    "optimizer": "muon",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 60,
    "save_steps": 10,
    "shuffle_buffer_size": 50,
}


@pytest.mark.slow
def test_a_stream_killed_and_started_again_gives_the_same_weights(run: Path, tmp_path: Path) -> None:
    """test_chain.py does it for every stage in memory."""
    changes = {**MUON, "streaming": True}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    pretrain.main(arguments(run, whole, **changes))
    command = [sys.executable, "-m", "stages.pretrain", *words(run, killed, **changes)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 300
    while not list(killed.glob("checkpoints/*/manifest.json")):
        assert process.poll() is None, process.stdout.read().decode()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "stage.json").exists()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "going on from" in done.stdout, done.stdout[-1000:] + done.stderr[-2000:]
    assert sha256_of(killed / "model.safetensors") == sha256_of(whole / "model.safetensors")
    assert [line["step"] for line in lines(killed)] == [line["step"] for line in lines(whole)]
    steps = [line["step"] for line in lines(whole) if "loss" in line]
    assert all(a < b for a, b in pairwise(steps))


@pytest.mark.slow
def test_two_processes_share_a_stream(run: Path, tmp_path: Path) -> None:
    changes = {"streaming": True, "shuffle_buffer_size": 50}
    pretrain.main(arguments(run, tmp_path / "one", **changes))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu-2.yaml"]
    command = ["-m", "stages.pretrain", *words(run, tmp_path / "two", **changes, per_device_train_batch_size=2)]
    done = subprocess.run([*launch, *command], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    # The same rows in each step: with a row twice, or another one, the losses would be far apart.
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 1e-5
    assert metrics(tmp_path / "two")["val_loss"] == pytest.approx(metrics(tmp_path / "one")["val_loss"], rel=1e-6)
    # Of two processes one decides for both, and says it.
    again = subprocess.run([*launch, *command], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert again.returncode == 0 and again.stdout.count("is finished already") == 1, again.stderr[-2000:]
    (tmp_path / "two/stage.json").unlink()
    other = [*command, "--learning_rate", "0.5"]
    refused = subprocess.run([*launch, *other], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert refused.returncode and "error: the run that was begun in" in refused.stderr
    assert "learning_rate: 0.001 → 0.5" in refused.stderr and "weights" not in refused.stderr
    assert (tmp_path / "two/model.safetensors").exists()


def test_compile_is_tried_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object):
        raise RuntimeError("backend='inductor' raised:\nno Triton\nmore lines")

    monkeypatch.setattr(torch, "compile", fails)
    assert "inductor" in hf_trainer.why_not_compile()
    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert hf_trainer.why_not_compile() is None
