"""Parity with TRL 1.12's PPO where it is right: its functions, and a whole update of its trainer (trl_fixture.py)."""

import json

import pytest
import torch
from ppo_tools import tokenizer
from transformers import Qwen3Config
from trl_fixture import FILE, PROMPT, RESPONSE, ROWS, SETTINGS, SHAPE, by_formula, masked_case

from pipeline.model.gpt import GPTForCausalLM, GPTForSequenceClassification
from pipeline.model.logprobs import logprobs_from_hidden
from pipeline.ppo import PPOConfig, PPOTrainer
from pipeline.ppo import algorithm as A

THEIRS = json.loads(FILE.read_text())


def test_functions():
    values, mask = masked_case()
    expected = THEIRS["functions"]
    assert A.masked_mean(values, mask).item() == pytest.approx(expected["masked_mean"], rel=1e-6)
    for name, shift in (("masked_whiten", True), ("masked_whiten_keep_mean", False)):
        assert A.masked_whiten(values, mask, shift_mean=shift)[mask].tolist() == pytest.approx(
            expected[name], rel=1e-5, abs=1e-6
        )
    logits = torch.cos(torch.arange(60.0)).view(12, 5) * 4
    found, _ = logprobs_from_hidden(logits, torch.arange(12) % 5, torch.nn.Identity(), 5)
    assert found.tolist() == pytest.approx([x for row in expected["selective_log_softmax"] for x in row], rel=1e-5)


def test_a_whole_update_gives_what_trl_logged(tmp_path):
    """Two passes: the figures of the second depend on the first's optimizer step, so gradients are compared as well.

    TRL has one optimizer, one λ and no clipping of gradients; the rest is left as it is. Its loss has the critic's part
    times 0.1, which Adam takes out again but for its ε.
    """
    policy, reference = (by_formula(GPTForCausalLM(Qwen3Config(**SHAPE)), phase) for phase in (0.0, 0.3))
    critic = by_formula(GPTForSequenceClassification(Qwen3Config(num_labels=1, **SHAPE)), 0.9)
    settings = {name: value for name, value in SETTINGS.items() if name != "num_mini_batches"}
    args = PPOConfig(
        output_dir=str(tmp_path),
        mixed_precision="no",
        total_episodes=ROWS,
        batch_size=ROWS,
        num_mini_batches=1,
        per_device_train_batch_size=ROWS,
        critic_warmup_updates=0,
        lam_value=SETTINGS["lam"],
        max_grad_norm=1e9,
        lr_scheduler_type="constant",
        save_steps=0,
        **settings,
    )
    rows = [{"prompt": "t3"}] * ROWS
    words = tokenizer(SHAPE["vocab_size"])
    trainer = PPOTrainer(
        policy, lambda prompts, completions, **_: [], args, rows, words, critic=critic, reference=reference
    )
    ids = THEIRS["rows"]
    assert len(ids) == ROWS and all(len(row) == PROMPT + RESPONSE for row in ids)
    found = trainer.step([row[:PROMPT] for row in ids], [row[PROMPT:] for row in ids], THEIRS["scores"])
    logged = THEIRS["logged"]
    for name in (
        "objective/kl",
        "objective/non_score_reward",
        "objective/rlhf_reward",
        "objective/scores",
        "loss/policy_avg",
        "loss/value_avg",
        "policy/approxkl_avg",
        "policy/clipfrac_avg",
        "val/clipfrac_avg",
        "val/ratio",
    ):
        assert found[name] == pytest.approx(logged[name], rel=2e-3, abs=1e-5), name
    assert abs(logged["val/ratio"] - 1) > 0.05 and logged["policy/approxkl_avg"] > 0.01  # the second pass has moved
