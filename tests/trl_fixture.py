"""Figures of TRL 1.12's PPO, the last there was, at a tiny shape; `python tests/trl_fixture.py` writes them.

It runs TRL's own trainer for one update of two passes (installed under .cache/ by benchmarks/ppo.py) and keeps the
answers, the scores and what it logged; test_ppo_trl.py gives ours the same answers. All answers have their full length:
with shorter ones TRL credits the score to the slot after the end (its issue 3750). Weights follow a formula, so that no
random number of a later torch matters.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import Qwen3Config

FILE = Path(__file__).with_suffix(".json")
ROWS, PROMPT, RESPONSE = 8, 4, 6
SHAPE = {
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 48,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
SETTINGS = {
    "num_ppo_epochs": 2,
    "num_mini_batches": 1,
    "kl_coef": 0.1,
    "cliprange": 0.1,
    "cliprange_value": 0.1,
    "gamma": 0.98,
    "lam": 0.9,
    "learning_rate": 5e-3,
    "temperature": 0.8,
    "response_length": RESPONSE,
}


@torch.no_grad()
def by_formula(model: torch.nn.Module, phase: float) -> torch.nn.Module:
    """Give a model weights that are waves over its parameters, in the order of their names."""
    for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
        places = torch.arange(parameter.numel(), dtype=torch.float64)
        wave = torch.sin(places * 1.618 + number + phase) * torch.cos(places * 0.37 + 2 * phase)
        center, size = (1.0, 0.1) if parameter.ndim == 1 else (0.0, 0.35)
        parameter.copy_((center + size * wave).view_as(parameter))
    return model.eval()


def masked_case() -> tuple[torch.Tensor, torch.Tensor]:
    """Values and a mask of real tokens for the functions by themselves."""
    values = torch.sin(torch.arange(24.0)).view(4, 6) * 3 + 1
    return values, torch.arange(6) < torch.tensor([6, 3, 1, 4])[:, None]


def make() -> None:
    """Run TRL's trainer and write the file; to be run with TRL 1.12 on the path."""
    os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM, Qwen3ForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer
    from trl.trainer.utils import selective_log_softmax

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(SHAPE["vocab_size"])}, unk_token="w2"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1", padding_side="left")
    prompts = [[3 + (5 * row + 7 * place) % 21 for place in range(PROMPT)] for row in range(ROWS)]
    kept: dict = {}
    generate, score = ppo_trainer.batch_generation, ppo_trainer.get_reward

    def keep_answers(*arguments, **options):
        kept["rows"], logits = generate(*arguments, **options)
        return kept["rows"], logits

    def keep_scores(model, *arguments):
        found = score(model, *arguments)
        if model is kept["reward"]:
            kept["scores"] = found[1].tolist()
        return found

    ppo_trainer.batch_generation, ppo_trainer.get_reward = keep_answers, keep_scores
    for seed in range(100):  # until no answer has a pad token in it
        policy, reference = (by_formula(Qwen3ForCausalLM(Qwen3Config(**SHAPE)), phase) for phase in (0.0, 0.3))
        classifier = Qwen3Config(num_labels=1, **SHAPE)
        kept["reward"], critic = (by_formula(Qwen3ForSequenceClassification(classifier), p) for p in (0.6, 0.9))
        args = PPOConfig(
            output_dir=tempfile.mkdtemp(),
            total_episodes=ROWS,
            per_device_train_batch_size=ROWS,
            use_cpu=True,
            bf16=False,
            num_sample_generations=0,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=seed,
            lr_scheduler_type="constant",
            **SETTINGS,
        )
        data = Dataset.from_dict({"input_ids": prompts})
        trainer = PPOTrainer(args, tokenizer, policy, reference, kept["reward"], data, critic, eval_dataset=data)
        logged: dict = {}
        trainer.log = lambda metrics, **_: logged.update(metrics)  # noqa: B023
        trainer.train()
        if bool((kept["rows"] != 0).all()):
            break
    values, mask = masked_case()
    logits = torch.cos(torch.arange(60.0)).view(3, 4, 5) * 4
    index = torch.arange(12).view(3, 4) % 5
    functions = {
        "masked_mean": ppo_trainer.masked_mean(values, mask).item(),
        "masked_whiten": ppo_trainer.masked_whiten(values, mask)[mask].tolist(),
        "masked_whiten_keep_mean": ppo_trainer.masked_whiten(values, mask, shift_mean=False)[mask].tolist(),
        "selective_log_softmax": selective_log_softmax(logits, index).tolist(),
    }
    logged = {name: value for name, value in logged.items() if "/" in name}
    rows = kept["rows"].tolist()
    FILE.write_text(
        json.dumps(
            {"trl": trl.__version__, "rows": rows, "scores": kept["scores"], "logged": logged, "functions": functions},
            indent=1,
        )
        + "\n"
    )
    print(f"seed {seed} → {FILE}")


if __name__ == "__main__":
    if "--make" in sys.argv:
        make()
    else:
        sys.path.insert(0, str(FILE.parent.parent))
        from benchmarks.ppo import install_peer

        subprocess.run(
            [sys.executable, __file__, "--make"], env=os.environ | {"PYTHONPATH": str(install_peer())}, check=True
        )
