"""The held-out evaluation while PPO runs: its figures by hand, and the best policy kept."""

import json

import pytest
import torch
from ppo_tools import count_t7, policy, prompts, same, trainer, weights
from transformers import AutoModelForCausalLM

from pipeline.ppo.evaluation import repetition
from pipeline.ppo.rollout import seeded


def test_repetition_by_hand():
    # a b a b: bigrams ab, ba, ab, one of three said before; a single word has none and does not count
    assert repetition(["a b a b", "a b c", "a"]) == pytest.approx((1 / 3 + 0) / 2)
    assert repetition(["a"]) == 0.0


def test_figures_by_hand(tmp_path):
    made = trainer(
        tmp_path,
        eval_rows=prompts(6),
        reference=policy(seed=4),
        missing_eos_penalty=0.5,
        kl_coef=0.1,
        gold=lambda p, c, number: [float(len(text.split()) % 3) for text in c],
    )
    found = made.evaluate()
    batch = made.evaluator.prompts.take(range(6))
    texts = {}
    for name, model in (("policy", made.models.policy), ("reference", made.models.reference)):
        made.answerer.sync(model)
        samples, texts[name] = made.answerer.answer(batch, seeded(0, 4, 0, 0))
        if name == "policy":
            ours = samples
    kl = 0.0
    for i in range(6):
        p, r = int(ours.prompt_lengths[i]), int(ours.response_lengths[i])
        row = ours.sequences[i : i + 1, : p + r]
        both = [m(row).logits[0, p - 1 : -1].log_softmax(-1) for m in (made.models.policy, made.models.reference)]
        kl += (both[0] - both[1]).gather(-1, row[0, p:, None]).sum().item() / 6
    proxy, without = sum(count_t7(None, texts["policy"])) / 6, (~ours.ended).float().mean().item()
    pairs = zip(*([len(t.split()) % 3 for t in texts[name]] for name in ("policy", "reference")), strict=True)
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs]
    assert found["eval/kl"] == pytest.approx(kl, abs=1e-4)
    assert found["eval/proxy"] == pytest.approx(proxy)
    assert found["eval/rlhf_reward"] == pytest.approx(proxy - 0.5 * without - 0.1 * kl, abs=1e-4)
    assert found["eval/win_rate"] == pytest.approx(sum(wins) / 6)
    assert found["eval/win_rate_low"] <= found["eval/win_rate"] <= found["eval/win_rate_high"]
    gold = torch.tensor([len(t.split()) % 3 for t in texts["policy"]]).double()
    assert found["eval/gold"] == pytest.approx(gold.mean().item())
    assert found["eval/gold_se"] == pytest.approx(gold.std().item() / 6**0.5)


def test_penalties_are_in_the_units_of_normalised_scores(tmp_path):
    """The reward that is optimised is score/σ − β·KL, so with raw scores β·KL counts σ times."""
    made = trainer(
        tmp_path,
        eval_rows=prompts(6),
        reference=policy(seed=4),
        kl_coef=0.1,
        normalize_scores=True,
        missing_eos_penalty=0.5,
    )
    made.state.score_moments = [10.0, 3.0, 9 * 50.0**2]
    found = made.evaluate()
    penalty = 0.5 * found["eval/without_eos"] + 0.1 * found["eval/kl"]
    assert penalty > 0 and found["eval/rlhf_reward"] == pytest.approx(found["eval/proxy"] - 50.0 * penalty)


@pytest.mark.parametrize("metric", ["proxy", "none"])
def test_the_best_policy_is_kept(tmp_path, metric):
    """The figure rises, then falls: what is kept is the policy of update 2, not the last one."""
    made = trainer(tmp_path, eval_rows=prompts(2), eval_steps=1, total_episodes=24, best_metric=metric)
    figures, seen = iter([0.0, 1.0, 3.0, 2.0]), []
    evaluate = made.evaluate
    made.evaluate = lambda: {**evaluate(), "eval/proxy": next(figures)}
    made.callbacks.append(lambda t, metrics: seen.append(weights(t.models.policy)))
    made.train()
    if metric == "none":
        assert not (tmp_path / "best").exists()
        return
    record = json.loads((tmp_path / "best" / "best.json").read_text())
    assert (record["metric"], record["step"], record["value"]) == ("eval/proxy", 2, 3.0)
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "best").state_dict()
    assert same(seen[1], {name: kept[name] for name in seen[1]}) and not same(seen[1], seen[2])
    assert (tmp_path / "best" / "critic" / "config.json").exists()


def test_the_opponent_stays_the_first_reference(tmp_path):
    made = trainer(tmp_path, eval_rows=prompts(4), eval_steps=1, ref_sync_updates=1, total_episodes=16)
    baselines = []
    made.callbacks.append(lambda t, metrics: baselines.append(list(t.state.baseline)))
    made.train()
    first = next(row for row in made.rows if "eval/win_rate" in row)
    assert first["eval/win_rate"] == first["eval/win_rate_low"] == first["eval/win_rate_high"] == 0.5
    assert baselines[0] == baselines[1] == made.state.baseline and len(made.state.baseline) == 4
