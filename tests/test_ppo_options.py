"""Every option of PPO has exactly its effect: against numbers by hand, and gradients taken another way."""

import time

import pytest
import torch
from ppo_tools import config, critic, gradients_of, policy, prompts, rolled, same, trainer, weights

from pipeline.errors import UserError
from pipeline.model.gpt import GPTForCausalLM
from pipeline.model.sampler import Samples
from pipeline.ppo import algorithm as A
from pipeline.ppo.advantages import ESTIMATORS, Estimator
from pipeline.ppo.rollout import Rollout


def close(value, expected, tolerance=1e-6):
    torch.testing.assert_close(torch.as_tensor(value), torch.as_tensor(expected), atol=tolerance, rtol=0)


def policy_gradients(made, rollout, **changes):
    """The policy's gradients at each step; critic and policy take turns in `gradients_of`."""
    for name, value in changes.items():
        setattr(made.args, name, value)
    return gradients_of(made, rollout=rollout)[0][1::2]


def test_a_critic_without_a_rate_of_its_own_learns_at_the_policys(tmp_path):
    for given, rate in ((None, 3e-4), (5e-3, 5e-3)):
        made = trainer(tmp_path, learning_rate=3e-4, critic_learning_rate=given)
        made.learner.set_learning_rates(0)
        rates = {name: {g["rate"] for g in o.param_groups} for name, o in made.learner.optimizers.items()}
        assert rates == {"policy": {3e-4}, "critic": {rate}}


def flat_gradient(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


# --- the loss, by hand ------------------------------------------------------------------------------------------------

RATIO = torch.tensor([1.5, 1.5, 0.5, 0.5, 5.0])
ADVANTAGES = torch.tensor([1.0, -1.0, 1.0, -1.0, -2.0])


def loss_and_slope(**options):
    logprobs = RATIO.log().requires_grad_()
    loss, _ = A.policy_loss(logprobs, torch.zeros(5), ADVANTAGES, 0.2, **options)
    loss.backward()
    return loss.detach(), logprobs.grad


def test_clip_higher_moves_the_upper_side_alone():
    loss, slope = loss_and_slope(cliprange_high=0.28)
    close(loss, -1.28 + 1.5 - 0.5 + 0.8 + 10.0)  # the first alone is clipped elsewhere than at 1.2
    close(slope, [0.0, 1.5, -0.5, 0.0, 10.0])
    close(loss_and_slope(cliprange_high=0.6)[1], [-1.5, 1.5, -0.5, 0.0, 10.0])


def test_dual_clip_bounds_the_loss_of_a_bad_token_that_became_likely():
    loss, slope = loss_and_slope(dual_clip=3.0)
    close(loss, -1.2 + 1.5 - 0.5 + 0.8 + 6.0)  # min(2·5, 3·2)
    close(slope, [0.0, 1.5, -0.5, 0.0, 0.0])


def test_weights_multiply_the_tokens_losses():
    weights = A.importance_weights(torch.tensor([2.0, 0.5, 8.0, 1.0, 1.0]).log(), torch.zeros(5), cap=4.0)
    close(weights, [2.0, 0.5, 4.0, 1.0, 1.0], 1e-5)
    close(loss_and_slope(weights=weights)[0], -1.2 * 2 + 1.5 / 2 - 0.5 * 4 + 0.8 + 10.0, 1e-5)


def test_value_loss_without_clipping():
    values, old, returns = torch.tensor([1.0, 0.1]), torch.tensor([0.5, 0.0]), torch.tensor([1.5, 1.0])
    loss, sums = A.value_loss(values, old, returns, None)
    close(loss, 0.5 * (0.25 + 0.81))
    assert sums["val/clipfrac_avg"] == 0


def test_rewards_are_scaled_around_their_mean():
    values, mask = torch.tensor([[1.0, 3.0, 1e6], [5.0, -1e6, 1e6]]), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    close(A.masked_whiten(values, mask, shift_mean=False), [[2.0, 3.0, 0.0], [4.0, 0.0, 0.0]])  # mean 3, var. 4


# --- in the trainer ---------------------------------------------------------------------------------------------------


def test_clipping_options_reach_the_loss(tmp_path):
    """The advantages of -1 and old log-probs 2 below: ratio e² everywhere."""
    made = trainer(tmp_path, num_mini_batches=1, num_ppo_epochs=1)
    rollout, _ = rolled(made)
    rollout.logprobs = rollout.logprobs - 2.0
    rollout.advantages = -torch.ones_like(rollout.advantages)
    assert policy_gradients(made, rollout)[0].norm() > 0
    assert policy_gradients(made, rollout, dual_clip=3.0)[0].norm() == 0  # e² is above 3
    rollout.advantages = torch.ones_like(rollout.advantages)
    assert policy_gradients(made, rollout, dual_clip=None)[0].norm() == 0  # above 1.2
    assert policy_gradients(made, rollout, cliprange_high=7.0)[0].norm() > 0  # below 8
    rollout.values, rollout.returns = rollout.values - 5.0, rollout.values + 1.0  # clipped, and worse than unclipped
    critics = [gradients_of(made, rollout=rollout)[0][0] for made.args.cliprange_value in (0.2, None)]
    assert critics[0].norm() == 0 and critics[1].norm() > 0


def test_importance_weights_correct_for_another_sampler_up_to_the_cap(tmp_path):
    plain = trainer(tmp_path)
    rollout, _ = rolled(plain)
    expected, _ = gradients_of(plain, rollout=rollout)
    for cap, factor in ((4.0, 2.0), (1.5, 1.5)):
        made = trainer(tmp_path, sampler_weight_cap=cap)
        other, _ = made.sample(0)
        other.sampler_logprobs = rollout.logprobs - torch.tensor(2.0).log()  # half as likely
        metrics = made.learner.estimate(other, 0, made.state.kl_coef)
        found, _ = gradients_of(made, rollout=other)
        for i, (a, b) in enumerate(zip(expected, found, strict=True)):
            torch.testing.assert_close(a * (factor if i % 2 else 1.0), b, atol=1e-5, rtol=1e-4)
        assert metrics["val/sampler_gap"] == pytest.approx(0.6931, abs=1e-3)


def test_entropy_bonus_is_the_gradient_of_the_mean_entropy(tmp_path):
    made = trainer(tmp_path, num_mini_batches=1, num_ppo_epochs=1, entropy_coef=0.3)
    rollout, metrics = rolled(made)
    rollout.advantages = torch.zeros_like(rollout.advantages)
    (found, *_), figures = gradients_of(made, rollout=rollout)[0][1::2], gradients_of(made, rollout=rollout)[1]
    entropies = []
    for i in range(8):
        p, r = int(rollout.prompt_lengths[i]), int(rollout.response_lengths[i])
        logprobs = made.models.policy(rollout.sequences[i : i + 1, : p + r]).logits[0, p - 1 : -1].log_softmax(-1)
        entropies.append(-(logprobs.exp() * logprobs).sum(-1))
    mean = torch.cat(entropies).mean()
    close(found, flat_gradient(-0.3 * mean, made.models.policy), 1e-5)
    assert figures["policy/entropy_avg"] == pytest.approx(mean.item(), rel=1e-5)
    assert metrics["objective/entropy"] == pytest.approx(mean.item(), rel=1e-5)


def test_ptx_adds_the_gradient_of_the_pretraining_loss(tmp_path):
    changes = {"num_mini_batches": 1, "num_ppo_epochs": 1, "temperature": 2.0}  # the loss is at temperature 1
    mixed = {"ptx_coef": 5.0, "ptx_batch_size": 3, "ptx_max_length": 4}
    made = trainer(tmp_path, ptx_dataset=[{"text": "t7 t8 t9 t10 t11 t12"}], **changes, **mixed)
    rollout, _ = rolled(made)
    (critics, found), figures = gradients_of(made, rollout=rollout)
    plain = trainer(tmp_path, **changes)
    (same_critics, without), _ = gradients_of(plain, rollout=rollout)
    ids = torch.tensor([[1, 7, 8, 9, 10]])  # after a document's end, cut at 4 tokens
    loss = -made.models.policy(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).mean()
    close(found - without, 5.0 * flat_gradient(loss, made.models.policy), 2e-5)
    assert torch.equal(critics, same_critics)
    assert figures["loss/ptx_avg"] == pytest.approx(loss.item(), rel=1e-5)


def test_whitened_rewards_have_a_spread_of_one(tmp_path):
    one, two = (rolled(trainer(tmp_path, whiten_rewards=on))[0] for on in (False, True))
    rewards = A.place_rewards(one.scores, torch.zeros_like(one.values), one.response_lengths, 0.0)
    mean, spread = rewards[one.mask].mean(), rewards[one.mask].std()
    scaled = ((rewards - mean) / spread + mean) * one.mask
    close(two.returns, scaled.flip(1).cumsum(1).flip(1) * one.mask, 1e-5)


def test_adaptive_kl_follows_its_formula(tmp_path):
    close(A.adapted_kl_coef(0.1, kl=6.6, target=6.0, horizon=1000, episodes=50), 0.1 * (1 + 0.1 * 0.05))
    close(A.adapted_kl_coef(0.1, kl=60.0, target=6.0, horizon=1000, episodes=50), 0.1 * (1 + 0.2 * 0.05))
    close(A.adapted_kl_coef(0.1, kl=-9.0, target=6.0, horizon=1000, episodes=50), 0.1 * (1 - 0.2 * 0.05))
    made = trainer(tmp_path, adaptive_kl_target=0.1, adaptive_kl_horizon=16, critic_warmup_updates=1)
    made.train()
    expected = made.args.kl_coef
    for update, row in enumerate(made.rows):
        assert row["objective/kl_coef"] == pytest.approx(expected)
        assert row["objective/non_score_reward"] == pytest.approx(-expected * row["objective/kl"])
        if update >= 2:  # the policy first moves in update 1, and update 2 has the first KL of it
            expected *= 1 + min(0.2, max(-0.2, row["objective/kl"] / 0.1 - 1)) * 8 / 16
    assert made.state.kl_coef == pytest.approx(expected) and made.state.kl_coef != made.args.kl_coef


def test_reference_is_renewed(tmp_path):
    made = trainer(tmp_path, ref_sync_updates=2)
    made.train()
    assert [row["objective/kl_k3"] == 0.0 for row in made.rows] == [True, False, True, False]


def test_the_reference_is_renewed_after_the_evaluation_and_beta_waits_for_the_next(tmp_path):
    """Else the held-out KL would be 0 at each evaluation, and β would fall for no reason."""
    made = trainer(
        tmp_path,
        ref_sync_updates=2,
        eval_steps=2,
        eval_rows=prompts(4),
        adaptive_kl_target=0.1,
        adaptive_kl_horizon=100,
    )
    made.train()
    found = {row["step"]: row["eval/kl"] for row in made.rows if "eval/kl" in row}
    assert found[0] == 0.0 and found[2] != 0.0 and found[4] != 0.0
    beta = [row["objective/kl_coef"] for row in made.rows if "objective/kl_coef" in row]
    assert beta[0] == beta[1] and beta[2] == beta[3] != beta[1]  # none after updates 1 and 3, whose KL is 0


def test_a_reference_that_cannot_be_renewed_is_refused(tmp_path):
    deeper = GPTForCausalLM(config(num_hidden_layers=2))
    with pytest.raises(UserError, match="ref_sync_updates: the reference has other shapes"):
        trainer(tmp_path, reference=deeper, ref_sync_updates=1)


def test_the_reference_is_renewed_before_every_so_many_updates_but_the_first(tmp_path):
    learner = trainer(tmp_path).learner
    for every, expected in ((0, []), (1, [1, 2, 3, 4]), (3, [3])):
        learner.args.ref_sync_updates = every
        assert [update for update in range(5) if learner.renews_reference(update)] == expected


def test_the_target_kl_is_of_a_token_and_may_be_reached(tmp_path):
    learner, sums, tokens = trainer(tmp_path).learner, {"policy/approxkl_avg": torch.tensor(3.0)}, torch.tensor(2.0)
    for target, expected in ((None, False), (1.0, True), (1.5, False), (2.0, False)):
        learner.args.target_kl = target
        assert learner.past_target_kl(sums, tokens) is expected


def test_every_plan_is_another_and_the_same_again(tmp_path):
    """By seed, update, epoch and process."""
    learner = trainer(tmp_path, batch_size=64, num_mini_batches=1, per_device_train_batch_size=64).learner
    rollout = Rollout.of(Samples(None, torch.arange(64), torch.ones(64).long(), None, None), torch.zeros(64))

    def plan(seed=0, update=0, epoch=0, rank=0):
        learner.args.seed, learner.rank = seed, rank
        return [part.tolist() for mini_batch in learner.plan(rollout, update, epoch) for part in mini_batch]

    rollout.prompt_lengths = torch.ones(64).long()  # else they would be sorted by length
    plans = [plan(), plan(seed=1), plan(update=1), plan(epoch=1), plan(rank=1), plan(seed=1, update=1)]
    assert len(set(map(str, plans))) == 6 and plan() == plans[0] and sorted(plans[0][0]) == list(range(64))


def test_pretraining_text_is_drawn_by_seed_update_epoch_mini_batch_and_process_alone(tmp_path):
    made = trainer(tmp_path, ptx_coef=1.0, ptx_dataset=[f"t{i} t7" for i in range(3, 15)], ptx_batch_size=2)
    rollout, _ = rolled(made)
    learner, drawn, draw = made.learner, [], made.learner.ptx.draw

    def watched(count, random, device):
        seed, found = random.initial_seed(), draw(count, random, device)
        drawn.append((seed, found[0].tolist()))
        return found

    learner.ptx.draw = watched

    def draws(seed=0, update=0, rank=0):
        """Those of 2 epochs of 2 mini-batches each."""
        learner.args.seed, learner.rank = seed, rank
        drawn.clear()
        gradients_of(made, update, rollout)
        return list(drawn)

    found = [draws(), draws(seed=1), draws(update=1), draws(rank=1)]
    assert len({seed for four in found for seed, _ in four}) == 16
    torch.manual_seed(99)
    assert draws() == found[0]


def test_times_are_those_of_the_parts(tmp_path):
    made = trainer(tmp_path)
    rollout, _ = made.sample(0)
    begin = time.perf_counter()
    figures = made.learner.estimate(rollout, 0, 0.1)
    middle = time.perf_counter()
    update = made.learner.update(rollout, 0)["time/update"]
    parts = [figures[f"time/{name}"] for name in ("logprobs", "reference", "critic")]
    assert all(part > 0 for part in parts) and sum(parts) < middle - begin
    assert 0 < update < time.perf_counter() - middle


def test_an_estimator_must_set_what_the_losses_need(tmp_path, monkeypatch):
    def none(rollout, rewards, args, reduce):
        rollout.advantages = rewards

    made = trainer(tmp_path)
    rollout, _ = made.sample(0)
    monkeypatch.setitem(ESTIMATORS, "gae", Estimator(none, needs_critic=True))
    with pytest.raises(UserError) as caught:
        made.learner.estimate(rollout, 0, 0.1)
    shape = tuple(rollout.mask.shape)
    expected = f"advantage_estimator gae must set rollout.returns, a tensor of the shape {shape} (answers, tokens)"
    assert str(caught.value) == expected
    made = trainer(tmp_path, advantage_estimator="rloo", num_generations=2)
    monkeypatch.setitem(ESTIMATORS, "rloo", Estimator(none, needs_critic=False))
    made.learner.estimate(made.sample(0)[0], 0, 0.1)  # without a critic there are no returns


def test_weights_that_learn_are_in_fp32(tmp_path):
    with pytest.raises(UserError) as caught:
        trainer(tmp_path, models=(policy().bfloat16(), critic()))
    assert str(caught.value) == (
        "GPTForCausalLM: its trained weights are not in fp32, which rounds small steps away; load it with "
        "dtype=torch.float32 (mixed_precision computes in bf16 all the same)"
    )


def test_pretraining_text_is_cut_to_the_models_context(tmp_path):
    made = trainer(tmp_path, ptx_coef=1.0, ptx_dataset=["t6 " * 100, "t7"])
    assert [len(ids) for ids in made.learner.ptx.ids] == [48, 2]


def test_several_answers_to_a_prompt(tmp_path):
    made = trainer(tmp_path, num_generations=4)
    rollout, _ = made.sample(1)
    first, second = (made.prompts.ids[i] for i in made.prompts.order(2, 2, seed=0))
    for i in range(8):
        prompt = rollout.sequences[i, : int(rollout.prompt_lengths[i])].tolist()
        assert prompt == (first if i < 4 else second)
    assert len({tuple(row) for row in rollout.sequences.tolist()}) > 2


@pytest.mark.slow
def test_all_of_it_is_resumed_to_the_bit(tmp_path):
    options = {
        "ref_sync_updates": 2,
        "adaptive_kl_target": 0.1,
        "adaptive_kl_horizon": 100,
        "entropy_coef": 0.01,
        "num_generations": 2,
        "ptx_coef": 0.1,
        "ptx_dataset": ["t7 t8", "t9"],
        "save_steps": 1,
    }
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    first = trainer(tmp_path / "parts", **options)
    for _ in range(3):
        first.learn(*first.sample(first.state.updates_done), 0.0)
    second = trainer(tmp_path / "parts", models=(policy(7), critic(8)), **options)
    second.train()
    assert [row["step"] for row in second.rows] == [4]
    assert whole.state.kl_coef == second.state.kl_coef
    assert same(weights(whole.models.policy), weights(second.models.policy))
    one, two = (weights(made.models.reference) for made in (whole, second))
    assert same(one, two)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dual_clip": 1.0}, "dual_clip: 1.0 must be above 1, or none"),
        ({"cliprange_value": 0.0}, "cliprange_value: 0.0 must be above 0, or none"),
        ({"cliprange_high": -0.1}, "cliprange_high: -0.1 must be above 0"),
        ({"adaptive_kl_target": 4.0, "adaptive_kl_horizon": 7}, "adaptive_kl_horizon: 7 episodes are less than the 8"),
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type: 'cosine' is none of 'linear', 'constant'"),
        ({"mixed_precision": "fp16"}, "mixed_precision: 'fp16' is none of 'auto', 'bf16', 'no'"),
        ({"best_metric": "kl"}, "best_metric: 'kl' is none of 'none', 'rlhf_reward'"),
        ({"learning_rate": None}, "learning_rate: none is not possible here"),
        ({"learning_rate": "1e-3"}, "learning_rate: '1e-3' is not a number"),
        ({"batch_size": 8.0}, "batch_size: 8.0 is not a whole number"),
        ({"num_mini_batches": 0}, "num_mini_batches: 0 must be at least 1"),
        ({"eval_steps": 2}, "eval_steps is set but eval_dataset is missing"),
        ({"num_generations": 3}, "batch_size 8 must be a multiple of num_generations"),
        ({"ptx_coef": 1.0}, "ptx_dataset is missing or has no rows"),
        ({"ptx_coef": 1.0, "ptx_dataset": [{"words": "t7"}]}, "ptx_dataset has no column 'text' but 'words'"),
        ({"adaptive_kl_target": 6.0, "kl_coef": 0.0}, "a kl_coef of 0 stays 0"),
        ({"best_metric": "gold", "eval_steps": 1, "eval_rows": [{"prompt": "t6"}]}, "there is no gold judge"),
    ],
)
def test_values_that_make_no_sense(tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        trainer(tmp_path, **changes)
