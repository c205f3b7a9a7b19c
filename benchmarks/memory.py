"""Peak memory of PPO with four networks and with adapters on one base: `python -m benchmarks.memory [--quick]`.

Policy, reference, critic and reward model have the shape of SmolLM2-135M (Llama) with random weights, in fp32. Four
ways to hold them, each in a process of its own, one after the other: all weights trained (`whole`); LoRA with four
bases (`lora four`), with the three that use_peft alone needs (`lora`), and with `share_base` (`shared`). Each opens its
folders, makes an update of 4 answers and writes what it has trained; the peak is of all of that.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
WAYS = ("whole", "lora four", "lora", "shared")
FULL = {"layers": 30, "width": 576, "heads": 9, "groups": 3, "mlp": 1536, "vocabulary": 49152}
QUICK = {"layers": 2, "width": 64, "heads": 4, "groups": 2, "mlp": 128, "vocabulary": 512}
ANSWERS, PROMPT, RESPONSE = 4, 32, 24


def write_models(folder: Path, shape: dict[str, int]) -> None:
    """`policy`, and `reward` trained with LoRA on it, as the stages leave them; random weights."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from pipeline.model.load import load_critic
    from pipeline.model.lora import add_lora, save_whole, trained_weights

    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(shape["vocabulary"])}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
    config = LlamaConfig(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["width"],
        intermediate_size=shape["mlp"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["groups"],
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "policy")
    reward = add_lora(load_critic(str(folder / "policy")))
    with torch.no_grad():
        for parameter in trained_weights(reward).values():
            parameter.add_(0.01 * torch.randn_like(parameter))
    save_whole(reward, folder / "reward")
    for name in ("policy", "reward"):
        tokenizer.save_pretrained(folder / name)


def one_update(way: str, folder: Path) -> dict[str, Any]:
    """Open the networks, make an update, save; returns the figures of this process."""
    from pipeline.model.load import load_critic, load_policy
    from pipeline.model.lora import add_lora
    from pipeline.model.shared import critic_on
    from pipeline.ppo import PPOConfig, PPOTrainer
    from pipeline.rewards import RewardModel
    from pipeline.text.tokenizer import load_tokenizer

    names = {name: str(folder / name) for name in ("policy", "reward")}
    policy: Any = load_policy(names["policy"])
    shared = way == "shared"
    critic: Any = critic_on(policy, names["reward"]) if shared else load_critic(names["reward"])
    reward = RewardModel(names["reward"], mixed_precision="no", base=policy if shared else None)
    reference = load_policy(names["policy"]) if way in ("whole", "lora four") else None
    if way != "whole":
        policy, critic = add_lora(policy), add_lora(critic)
    args = PPOConfig(
        output_dir=str(folder / "ppo"),
        mixed_precision="no",
        total_episodes=ANSWERS,
        batch_size=ANSWERS,
        num_mini_batches=1,
        num_ppo_epochs=1,
        per_device_train_batch_size=1,
        response_length=RESPONSE,
        save_steps=0,
    )
    rows = [{"prompt": " ".join(f"w{3 + (7 * i + j) % 400}" for j in range(PROMPT))} for i in range(ANSWERS)]
    tokenizer = load_tokenizer(names["policy"])
    trainer = PPOTrainer(policy, reward, args, rows, tokenizer, critic=critic, reference=reference)
    metrics = trainer.train()
    updated = peak_mb()
    trainer.save_model(folder / "out")
    parameters = sum(p.numel() for p in policy.parameters())
    return {"parameters": parameters, "updated_mb": updated, "peak_mb": peak_mb(), **metrics}


def peak_mb() -> int:
    """The most memory of this process so far. Not getrusage's: a child's begins with that of its parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1024


def compare(peaks: dict[str, int]) -> dict[str, float]:
    """What one base takes, as a share of what each other way takes."""
    return {f"over {way}": round(peaks["shared"] / peak, 3) for way, peak in peaks.items() if way != "shared"}


def main(arguments: list[str] | None = None) -> dict[str, Any] | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny shape, for tests; its ratios mean nothing")
    parser.add_argument("--way", choices=("models", *WAYS), help="this one alone, in this process, in --folder")
    parser.add_argument("--folder", type=Path, help="with --way: where the models are")
    options = parser.parse_args(arguments)
    if options.way == "models":
        write_models(options.folder, QUICK if options.quick else FULL)
        return None
    if options.way:
        print("\n" + json.dumps(one_update(options.way, options.folder)))
        return None
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for way in ("models", *WAYS):
            command = [sys.executable, "-m", "benchmarks.memory", "--way", way, "--folder", folder]
            command += ["--quick"] if options.quick else []
            done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"error: {' '.join(command)} failed:\n{done.stderr.strip()[-2000:]}")
            if way != "models":
                found[way] = json.loads(done.stdout.strip().splitlines()[-1])
                figures = found[way]
                print(
                    f"{way:10s} peak {figures['peak_mb']:6,} MB, before saving {figures['updated_mb']:6,} MB",
                    flush=True,
                )
    ratios = compare({way: figures["peak_mb"] for way, figures in found.items()})
    line = {"benchmark": "memory", "ratio": ratios["over whole"], "ratios": ratios, "ways": found}
    print("\n" + json.dumps(line))
    return line


if __name__ == "__main__":
    main()
