"""PRESET=shakespeare on a tiny text: characters, the whole held-out tenth, pretraining only; and its benchmark."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import make
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import nanogpt
from pipeline.errors import UserError
from pipeline.runtime.arguments import TokenizerArguments
from pipeline.runtime.command_line import parse
from stages import tokenizer

pytestmark = pytest.mark.slow

TINY = [
    "--max_steps",
    "40",
    "--eval_steps",
    "40",
    "--hidden_size",
    "32",
    "--num_hidden_layers",
    "1",
    "--num_attention_heads",
    "1",
    "--num_key_value_heads",
    "1",
    "--head_dim",
    "32",
    "--intermediate_size",
    "64",
    "--block_size",
    "32",
    "--warmup_steps",
    "4",
    "--mixed_precision",
    "no",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8,000 characters of which the last tenth has one, ß, that the rest lacks."""
    rng, file = random.Random(0), tmp_path_factory.mktemp("text") / "play.txt"
    words = ["speak", "Citizen:\n", "no\n\n", "we are", "Rome", "– é,", "gods."]
    body = " ".join(rng.choices(words, k=4000))[:7999]
    file.write_text(body + "ß", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "shakespeare"
    done = make("pretrain", "PRESET=shakespeare", f"TEXT={text}", f"RUN={run}", f"ARGS={' '.join(TINY)}")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return run


def test_one_token_a_character_and_a_stock_folder(run: Path, text: Path) -> None:
    whole = text.read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(run / "pretrain")
    assert len(tokenizer) == 6 + len(set(whole))
    ids = tokenizer(whole)["input_ids"]
    assert len(ids) == len(whole) and tokenizer.decode(ids) == whole


def test_the_loss_is_that_of_every_held_out_character_but_the_first(run: Path, text: Path) -> None:
    metrics = json.loads((run / "pretrain" / "stage.json").read_text())["metrics"]
    whole = text.read_text(encoding="utf-8")
    held_out = whole[int(len(whole) * 0.9) :]
    tokenizer = AutoTokenizer.from_pretrained(run / "pretrain")
    model = AutoModelForCausalLM.from_pretrained(run / "pretrain", dtype=torch.float32).eval()
    ids, total = torch.tensor(tokenizer(held_out)["input_ids"]), 0.0
    for start in range(0, len(ids) - 1, 31):  # rows of 32 tokens predict 31; each begins where the last one ended
        row = ids[None, start : start + 32]
        with torch.no_grad():
            total += F.cross_entropy(model(row).logits[0, :-1], row[0, 1:], reduction="sum").item()
    assert metrics["val_nats_per_char"] == pytest.approx(total / 799, rel=1e-4)
    assert metrics["val_nats_per_char"] < math.log(len(set(whole)))


def test_make_ends_after_pretraining_and_remembers_the_text(run: Path, text: Path) -> None:
    dry = make("-n", "PRESET=shakespeare", f"RUN={run}", "pretrain", f"ARGS={' '.join(TINY)}")
    assert "stages." not in dry.stdout, dry.stdout  # nothing to do, though TEXT is not given again
    text.touch()
    dry = make("-n", "PRESET=shakespeare", f"RUN={run}")
    stages = [line.split("stages.")[1].split()[0] for line in dry.stdout.splitlines() if "-m stages." in line]
    assert stages == ["tokenizer", "pretrain"] and dry.stdout.count(f"--dataset '{text}'") == 2
    assert "it is pretraining only" in dry.stdout
    chat = make("-n", "chat", "PRESET=shakespeare", f"RUN={run}")
    assert f"--model_name_or_path '{run}/pretrain'" in chat.stdout
    sft = make("sft", "PRESET=shakespeare", f"RUN={run}")
    assert sft.returncode and "PRESET=shakespeare has no stage sft; it ends with pretrain" in sft.stderr


def test_a_missing_text_is_said_with_what_to_do(tmp_path: Path) -> None:
    done = make("PRESET=shakespeare", f"RUN={tmp_path / 'run'}", f"TEXT={tmp_path}/none.txt")
    assert done.returncode and f"TEXT={tmp_path}/none.txt: there is no such file" in done.stderr
    words = ["--config", "configs/shakespeare/tokenizer.yaml", "--run_dir", str(tmp_path / "run")]
    with pytest.raises(UserError, match=r"tinyshakespeare.txt; save https://.* there, or .*TEXT=my.txt"):
        tokenizer.main(parse(TokenizerArguments, [*words, "--dataset", str(tmp_path / "tinyshakespeare.txt")]))


def test_the_stand_ins_loss_counts_every_character_once() -> None:
    for held_out in (2 * nanogpt.LENGTH + 1, 2 * nanogpt.LENGTH + 2, 3 * nanogpt.LENGTH):
        stand_in = nanogpt.StandIn("abcde" * (2 * held_out))
        for parameter in stand_in.model.parameters():
            torch.nn.init.zeros_(parameter)
        assert stand_in.loss() == pytest.approx(math.log(5), abs=1e-5)


def test_the_benchmark_runs(text: Path, capsys: pytest.CaptureFixture) -> None:
    line = nanogpt.main(["--text", str(text), "--quick"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == line
    (run,) = line["runs"]
    assert line["ratio"] == pytest.approx(line["budget_seconds"] / run["seconds"], rel=0.05)
    alphabet = len(set(text.read_text(encoding="utf-8")))
    assert line["target"] < run["nats_per_char"] < 2 * math.log(alphabet)
    assert line["passed"] is False  # four steps are not enough, and it says so
    with pytest.raises(SystemExit, match="there is no text file"):
        nanogpt.main(["--text", "nothing.txt"])
