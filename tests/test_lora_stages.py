"""LoRA in sft, reward and ppo: what is trained, what a folder holds, and all networks of PPO on one base in memory."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import write_models
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from pipeline.errors import UserError
from pipeline.model.load import load_critic, load_policy
from pipeline.model.lora import add_lora, merged
from pipeline.model.shared import critic_on, reward_on
from pipeline.ppo import PPOTrainer
from pipeline.rewards import RewardModel
from pipeline.runtime.arguments import RewardArguments, SFTArguments
from pipeline.runtime.command_line import resolve
from pipeline.runtime.ppo_arguments import PPOArguments
from stages import ppo, reward, sft

IDS = torch.tensor([[3, 40, 70, 90, 100]])
STEPS: dict[str, Any] = {
    "use_peft": True,
    "lora_r": 2,
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "lr_scheduler_type": "constant",
    "max_length": 64,
    "mixed_precision": "no",
}
# Of the tiny model: 16 wide, heads of 8, 2 for queries and 1 for keys and values, an MLP of 32, one block
PAIRS = [(16, 16), (16, 8), (16, 8), (16, 16), (16, 32), (16, 32), (32, 16)]
WHOLE = 300 * 16 + sum(a * b for a, b in PAIRS) + 3 * 16 + 2 * 8  # a tied head counts once
LORA = 2 * sum(a + b for a, b in PAIRS)


@pytest.fixture(autouse=True)
def fresh_accelerator() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models and rows; `sft-lora`, trained with LoRA on `pretrain`, and `reward-lora`, trained so on that."""
    run = write_models(tmp_path_factory.mktemp("run"))
    names = ["Ben", "Ann", "Tom", "Sue"]
    rows = {
        "sft": [{"prompt": f"Write {i}:", "completion": f" {names[i % 4]} found a kite."} for i in range(40)],
        "reward": [
            {"prompt": f"Write {i}:", "chosen": f" {names[i % 4]} was happy.", "rejected": " x" * (1 + i % 5)}
            for i in range(40)
        ],
        "ppo": [{"prompt": f"Write {i}:"} for i in range(40)],
    }
    for name, content in rows.items():
        (run / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    train_sft(run, run / "sft-lora")
    train_reward(run, run / "reward-lora")
    return run


def train_sft(run: Path, output: Path, **changes: Any) -> None:
    fields = {"model_name_or_path": str(run / "pretrain"), "dataset": str(run / "sft.jsonl"), "output_dir": str(output)}
    sft.main(resolve(SFTArguments(**STEPS | {"run_dir": str(run), "validation_size": 5} | fields | changes)))


def train_reward(run: Path, output: Path, **changes: Any) -> None:
    fields = {"model_name_or_path": str(run / "sft-lora"), "dataset": str(run / "reward.jsonl")}
    fields |= {"output_dir": str(output), "center_samples": 16}
    reward.main(resolve(RewardArguments(**STEPS | {"run_dir": str(run)} | fields | changes)))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def close(one: torch.Tensor, two: torch.Tensor) -> None:
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


# --- sft and reward ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "base", "kind", "more"),
    [
        ("sft-lora", "pretrain", AutoModelForCausalLM, 0),
        ("reward-lora", "sft-lora", AutoModelForSequenceClassification, 16),
    ],
)
def test_the_folder_is_merged_and_peft_opens_the_adapter(run: Path, name: str, base: str, kind: Any, more: int) -> None:
    whole = kind.from_pretrained(run / name)
    torch.manual_seed(0)
    options = {"num_labels": 1} if more else {}
    opened = PeftModel.from_pretrained(kind.from_pretrained(run / base, **options), str(run / name / "adapter"))
    close(logits(whole), logits(opened))
    adapter = load_file(run / name / "adapter" / "adapter_model.safetensors")
    assert sum(value.numel() for value in adapter.values()) == LORA + more
    before, after = (load_file(run / folder / "model.safetensors") for folder in (base, name))
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert {key.split(".")[-2] for key in moved} == {
        f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")
    }
    assert min((before[key] - after[key]).abs().max() for key in moved) > 1e-4
    assert (run / name / "tokenizer.json").exists() and not (run / name / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_the_opening_says_how_much_is_trained(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train_sft(run, tmp_path / "sft", max_steps=1)
    assert f"LoRA: {LORA:,} of {WHOLE + LORA:,} parameters are trained" in capsys.readouterr().out
    train_reward(run, tmp_path / "reward", max_steps=1)  # a critic has its head, and a copy that is not trained
    assert f"LoRA: {LORA + 16:,} of " in capsys.readouterr().out


def test_a_reward_is_standardised_as_the_merged_model_scores(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "reward.jsonl").read_text().splitlines()]
    judge = RewardModel(str(run / "reward-lora"), mixed_precision="no")
    shared = RewardModel(str(run / "reward-lora"), mixed_precision="no", base=load_policy(str(run / "sft-lora")))
    assert 0 < judge.std != 1 and (shared.mean, shared.std) == (judge.mean, judge.std)
    record = json.loads((run / "reward-lora" / "stage.json").read_text())["metrics"]
    assert (judge.mean, judge.std) == (record["reward_mean"], record["reward_std"])
    answers = [row["prompt"] for row in rows], [row["chosen"] for row in rows]
    assert shared(*answers) == pytest.approx(judge(*answers), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("train", [train_sft, train_reward])
def test_recomputed_blocks_change_no_weight(run: Path, tmp_path: Path, train: Any) -> None:
    for on in (False, True):
        train(run, tmp_path / str(on), gradient_checkpointing=on)
    plain, recomputed = (load_file(tmp_path / f"{on}/adapter/adapter_model.safetensors") for on in (False, True))
    assert all(torch.equal(plain[key], recomputed[key]) for key in plain)


# --- one base ---------------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "critic from the reward model": {"critic_name_or_path": "reward-lora"},
    "critic from the policy": {"critic_name_or_path": "sft-lora"},
    "no critic": {"advantage_estimator": "rloo", "num_generations": 2},
    "one trunk": {"share_trunk": True},
}


def arguments(run: Path, output: Path, **changes: Any) -> PPOArguments:
    fields: dict[str, Any] = {
        "run_dir": str(run),
        "output_dir": str(output),
        "dataset": str(run / "ppo.jsonl"),
        "model_name_or_path": "sft-lora",
        "critic_name_or_path": "reward-lora",
        "reward": ["reward-lora"],
        "use_peft": True,
        "lora_r": 3,
        "mixed_precision": "no",
        "total_episodes": 24,
        "batch_size": 8,
        "num_mini_batches": 2,
        "num_ppo_epochs": 2,
        "per_device_train_batch_size": 4,
        "response_length": 8,
        "learning_rate": 1e-3,
        "eval_steps": 2,
        "eval_size": 4,
        "save_steps": 1,
    }
    fields |= changes
    for name in ("model_name_or_path", "critic_name_or_path"):
        fields[name] = str(run / fields[name])
    fields["reward"] = [str(run / name) for name in fields["reward"]]
    return resolve(PPOArguments(**fields))


def optimise(run: Path, output: Path, **changes: Any) -> list[dict[str, Any]]:
    """Run the stage; returns its lines of metrics without times."""
    ppo.main(arguments(run, output, **changes))
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not any(s in k for s in ("time", "per_s", "seconds"))} for line in lines]


def left_by(output: Path) -> dict[str, torch.Tensor]:
    """The weights in the folder, in `best` and in the newest checkpoint, by file and name."""
    files = [*output.glob("*.safetensors"), *output.glob("*/*.safetensors"), *output.glob("*/adapter/*.safetensors")]
    files += output.glob("checkpoints/step-00000003/*.safetensors")
    return {f"{f.relative_to(output)} {name}": value for f in files for name, value in load_file(f).items()}


FIRST, *OTHERS = KINDS  # one of them shows the kind


@pytest.mark.parametrize("kind", [FIRST, *(pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS)])
def test_one_base_gives_what_separate_bases_give(run: Path, tmp_path: Path, kind: str) -> None:
    """The same command but for share_base: metrics of three updates and two evaluations, and every weight left."""
    apart, together = (optimise(run, tmp_path / str(on), share_base=on, **KINDS[kind]) for on in (False, True))
    assert len(apart) == len(together) == 3 + 3
    for one, two in zip(apart, together, strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert two[name] == (pytest.approx(value, abs=1e-5, rel=1e-5) if isinstance(value, float) else value), name
    assert apart[1]["val/ratio_first"] == together[1]["val/ratio_first"] == 1.0 and together[1]["objective/kl"] == 0.0
    one, two = left_by(tmp_path / "False"), left_by(tmp_path / "True")
    assert one.keys() == two.keys() and any("best/" in key for key in one)
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=1e-5, rtol=0, msg=key)
    start = load_file(run / "sft-lora" / "model.safetensors")
    moved = max(
        (value - start[key]).abs().max() for key, value in load_file(tmp_path / "True/model.safetensors").items()
    )
    assert moved > 1e-3


@pytest.mark.parametrize("kind", [FIRST, pytest.param("critic from the policy", marks=pytest.mark.slow)])
def test_what_one_base_leaves_opens_with_peft(run: Path, tmp_path: Path, kind: str) -> None:
    optimise(run, tmp_path, share_base=True, total_episodes=8, **KINDS[kind])
    whole, base = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path, run / "sft-lora"))
    close(logits(whole), logits(PeftModel.from_pretrained(base, str(tmp_path / "adapter"))))
    kind_of_critic, named = AutoModelForSequenceClassification, run / KINDS[kind]["critic_name_or_path"]
    values = kind_of_critic.from_pretrained(tmp_path / "critic")
    config = json.loads((tmp_path / "critic/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(named) and config["r"] == 3
    trunk = kind_of_critic.from_pretrained(named, num_labels=1)
    close(logits(values), logits(PeftModel.from_pretrained(trunk, str(tmp_path / "critic/adapter"))))
    assert not hasattr(values.config, "reward_mean")


def test_there_is_one_base_in_memory(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[PPOTrainer] = []
    monkeypatch.setattr(PPOTrainer, "train", lambda self: made.append(self) or {"kl": 0.0})
    sizes = []
    for on in (False, True):
        ppo.main(arguments(run, tmp_path / str(on), share_base=on))
        models = made[-1].models
        judges = [source[1].model for source in made[-1].rewards.sources]  # type: ignore[attr-defined]
        networks = [models.policy, models.critic, *judges]
        assert all(isinstance(network, torch.nn.Module) for network in networks)
        tensors = {p.untyped_storage().data_ptr(): p.numel() for network in networks for p in network.parameters()}
        sizes.append(sum(tensors.values()))
        trained = {id(p) for network in networks for p in network.parameters() if p.requires_grad}
        owned = [id(p) for o in made[-1].learner.optimizers.values() for g in o.param_groups for p in g["params"]]
        assert len(owned) == len(set(owned)) and trained == set(owned)
    own = 2 * LORA * 3 // 2 + 2 * 16  # policy's and critic's updates, the head and peft's copy of it
    assert sizes[0] == 3 * WHOLE + own + 16
    assert (
        sizes[1] == WHOLE + own + 2 * LORA + 16
    )  # the reward model's update twice, as its own and as the critic's start


@pytest.mark.slow
def test_a_killed_run_on_one_base_ends_with_the_same_bits(run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    whole = optimise(run, tmp_path / "whole", share_base=True)
    learn = PPOTrainer.learn

    def killed(self: Any, *args: Any) -> Any:
        if self.state.updates_done == 2:
            raise KeyboardInterrupt
        return learn(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(PPOTrainer, "learn", killed)
        with pytest.raises(KeyboardInterrupt):
            optimise(run, tmp_path / "parts", share_base=True)
    kept = load_file(tmp_path / "parts/checkpoints/step-00000002/critic.safetensors")
    assert all(".default." in key for key in kept) and sum(v.numel() for v in kept.values()) == LORA * 3 // 2 + 16
    assert optimise(run, tmp_path / "parts", share_base=True) == whole
    one, two = left_by(tmp_path / "whole"), left_by(tmp_path / "parts")
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.slow
def test_two_processes_on_one_base_are_two_on_separate_bases(run: Path, tmp_path: Path) -> None:
    """DistributedDataParallel sees each network's own weights alone, so that the shared ones are nobody's to sum."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu-2.yaml"]
    left = []
    for on in (False, True):
        output = tmp_path / str(on)
        fields = vars(arguments(run, output, share_base=on)) | {"run_dir": run, "reward": run / "reward-lora"}
        words = [w for k, v in fields.items() for w in (f"--{k}", "none" if v is None else str(v))]
        done = subprocess.run(
            [*launch, "--main_process_port", "0", "-m", "stages.ppo", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert json.loads((output / "stage.json").read_text())["processes"] == 2
        left.append(left_by(output))
    one, two = left
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=1e-5, rtol=0, msg=key)


@pytest.mark.slow
def test_two_processes_tune_as_one(run: Path, tmp_path: Path) -> None:
    """The same rows in each step, so the same adapter but for rounding, and one merged folder."""
    launch = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu-2.yaml"]
    left = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        fields = STEPS | {"model_name_or_path": run / "pretrain", "dataset": run / "sft.jsonl", "output_dir": output}
        fields |= {"run_dir": run, "validation_size": 5, "per_device_train_batch_size": 4 // processes}
        words = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
        words = [*([*launch, "--main_process_port", "0"] if processes == 2 else []), "-m", "stages.sft", *words]
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert json.loads((output / "stage.json").read_text())["processes"] == processes
        left.append({name: value for name, value in left_by(output).items() if "checkpoints" not in name})
    one, two = left
    assert one.keys() == two.keys() and any("adapter/" in key for key in one)
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=1e-4, rtol=1e-3, msg=key)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_is_no_adapter_of_the_base_is_refused(run: Path, tmp_path: Path) -> None:
    base = load_policy(str(run / "sft-lora"))
    for path, sentence in (
        ("reward", "reward has no LoRA adapter; train it on .*sft-lora with use_peft, or set share_base to false"),
        ("sft", "sft has no LoRA adapter"),
    ):
        with pytest.raises(UserError, match=sentence):
            critic_on(base, str(run / path))
        with pytest.raises(UserError, match=sentence):
            reward_on(base, str(run / path))
    with pytest.raises(UserError, match=r"sft-lora is no trained reward model: its adapter brings no head"):
        reward_on(load_policy(str(run / "pretrain")), str(run / "sft-lora"))
    add_lora(load_policy(str(run / "sft-lora"))).save_pretrained(tmp_path / "no-head")
    with pytest.raises(UserError, match=r"no-head is no trained reward model: its adapter brings no head `score`"):
        reward_on(load_policy(str(run / "sft-lora")), str(tmp_path / "no-head"))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"no model can be opened from .*damaged"):
        critic_on(base, str(tmp_path / "damaged"))
    # Another model of the same shape: the base of the adapter is told apart by content
    other = load_policy(str(run / "pretrain"))
    with pytest.raises(
        UserError, match=r"reward-lora is no adapter of .*pretrain \(.* is not that of the base with the"
    ):
        reward_on(other, str(run / "reward-lora"))
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight[3, 5] += 1e-4
    with pytest.raises(UserError, match=r"\(model.layers.0.mlp.up_proj.weight is not that of the base with the"):
        critic_on(base, str(run / "reward-lora"))


def test_a_bare_adapter_is_taken_by_the_model_that_it_names(run: Path) -> None:
    path = str(run / "reward-lora" / "adapter")
    base = load_policy(str(run / "sft-lora"))
    close(
        logits(reward_on(base, path)), logits(AutoModelForSequenceClassification.from_pretrained(run / "reward-lora"))
    )
    with pytest.raises(UserError, match=r"is no adapter of .*pretrain \(it names .*sft-lora\)"):
        reward_on(load_policy(str(run / "pretrain")), path)


def test_a_merged_copy_leaves_the_model_as_it_was(run: Path) -> None:
    model = add_lora(load_critic(str(run / "reward-lora")), r=2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    whole = merged(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    close(logits(whole), logits(model))
    table = whole.get_input_embeddings().weight
    assert table.data_ptr() == model.get_input_embeddings().weight.data_ptr()  # what is not adapted is not copied


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_sharded_weights_cannot_be_merged(run: Path, tmp_path: Path, monkeypatch: Any, variable: str) -> None:
    monkeypatch.setenv(variable, "true")  # what the launcher sets
    with pytest.raises(UserError, match="sft: use_peft is not for FSDP or DeepSpeed, as the adapter is merged"):
        train_sft(run, tmp_path)
