"""The PPO trainer: every known defect of TRL's last one is absent, and wrong input is said in a sentence."""

import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from ppo_tools import (
    config,
    count_t7,
    critic,
    end_alike,
    gradients_of,
    policy,
    prompts,
    rolled,
    same,
    tokenizer,
    trainer,
    weights,
)
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from pipeline.errors import UserError
from pipeline.model.gpt import GPTForSequenceClassification
from pipeline.ppo import algorithm as A


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps one precision a process; the tests want both."""
    AcceleratorState._reset_state(reset_partial_state=True)


def short_critic():
    return GPTForSequenceClassification(config(num_labels=1, max_position_embeddings=14))


def steps_of(optimizer):
    return {int(state["step"]) for state in optimizer.state_dict()["state"].values()}


# --- before the first step --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_ratio_is_one_and_kl_zero_to_the_bit_before_the_first_step(tmp_path, precision):
    made = trainer(tmp_path, mixed_precision=precision, total_episodes=8)
    made.train()
    assert made.rows[0]["val/ratio_first"] == 1.0
    assert made.rows[0]["objective/kl"] == 0.0 and made.rows[0]["objective/kl_k3"] == 0.0


def test_dropout_is_off_and_gpt2_is_a_policy(tmp_path):
    torch.manual_seed(0)
    shape = GPT2Config(
        vocab_size=16, n_embd=32, n_layer=1, n_head=2, n_positions=48, pad_token_id=0, eos_token_id=1, num_labels=1
    )
    models = GPT2LMHeadModel(shape), GPT2ForSequenceClassification(shape)
    assert shape.resid_pdrop == 0.1
    made = trainer(tmp_path, models=models, total_episodes=16)
    made.train()
    assert made.rows[0]["val/ratio_first"] == 1.0 and made.rows[0]["objective/kl"] == 0.0
    assert made.rows[1]["objective/kl_k3"] > 0


def test_logprobs_are_taken_at_the_sampling_temperature(tmp_path):
    made = trainer(tmp_path, temperature=2.0)
    rollout, _ = rolled(made)
    for i in range(8):
        p, r = int(rollout.prompt_lengths[i]), int(rollout.response_lengths[i])
        row = rollout.sequences[i : i + 1, : p + r]
        plain = (made.models.policy(row).logits[0, p - 1 : -1] / 2.0).log_softmax(-1)
        expected = plain.gather(-1, row[0, p:, None])[:, 0]
        torch.testing.assert_close(rollout.logprobs[i, :r], expected, atol=1e-5, rtol=0)
        entropy = -(plain.exp() * plain).sum(-1)
        torch.testing.assert_close(rollout.entropy[i, :r], entropy, atol=1e-5, rtol=0)
        values = made.models.critic.score(made.models.critic.model(row).last_hidden_state)[0, p - 1 : -1, 0]
        torch.testing.assert_close(rollout.values[i, :r], values, atol=1e-5, rtol=0)


def test_sampler_and_trainer_agree_on_logprobs(tmp_path):
    _, metrics = rolled(trainer(tmp_path, temperature=0.7))
    assert metrics["val/sampler_gap"] < 1e-5


def test_bf16_is_not_ignored(tmp_path):
    made = trainer(tmp_path, mixed_precision="bf16", total_episodes=8)
    seen = set()
    for model in (made.models.policy, made.models.critic):
        model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *call: seen.add(call[2].dtype))
    made.train()
    assert seen == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in made.models.policy.parameters())


def test_no_logits_but_those_of_response_tokens_exist(tmp_path):
    made = trainer(tmp_path, per_device_train_batch_size=4)
    rollout, _ = made.sample(0)
    shapes = []
    made.models.policy.lm_head.register_forward_hook(lambda *call: shapes.append(tuple(call[2].shape)))
    made.learner.estimate(rollout, 0, made.state.kl_coef)
    made.learner.update(rollout, 0)
    tokens = int(rollout.response_lengths.sum())
    assert all(len(shape) == 2 for shape in shapes)
    assert sum(rows for rows, _ in shapes) == 3 * tokens  # old log-probs and two epochs


# --- where the score goes ---------------------------------------------------------------------------------------------


def test_score_is_credited_to_the_last_token_and_a_missing_end_costs_its_penalty(tmp_path):
    made = trainer(
        tmp_path,
        rewards=lambda prompts, completions, number: [float(n) for n in number],
        missing_eos_penalty=100.0,
        response_length=4,
    )
    rollout, metrics = rolled(made)
    indices = made.prompts.order(0, 8, seed=0)
    expected = torch.tensor(indices).float() - 100.0 * ~rollout.ended
    assert rollout.ended.any() and not rollout.ended.all()
    torch.testing.assert_close(rollout.scores, expected)
    # No KL yet and λ of the critic is 1: the return of every real token is the score, of padding 0.
    torch.testing.assert_close(rollout.returns, expected[:, None] * rollout.mask)
    for i in range(8):
        last = rollout.sequences[i, int(rollout.lengths[i]) - 1]
        assert (last == 1) == bool(rollout.ended[i])
    assert metrics["response/without_eos"] == pytest.approx(float((~rollout.ended).float().mean()))
    assert metrics["objective/scores"] == pytest.approx(expected.mean().item(), rel=1e-5)


def test_kl_penalty_is_paid_token_by_token(tmp_path):
    made = trainer(tmp_path, reference=policy(seed=9), kl_coef=0.5, gamma=1.0)
    rollout, metrics = rolled(made)
    kl = (rollout.logprobs - rollout.ref_logprobs) * rollout.mask
    left = kl.flip(1).cumsum(1).flip(1)
    expected = (rollout.scores[:, None] - 0.5 * left) * rollout.mask
    torch.testing.assert_close(rollout.returns, expected, atol=1e-4, rtol=0)
    assert metrics["objective/kl"] == pytest.approx(kl.sum(1).mean().item(), rel=1e-4)
    assert metrics["objective/non_score_reward"] == pytest.approx(-0.5 * metrics["objective/kl"])
    assert metrics["objective/rlhf_reward"] == pytest.approx(
        metrics["objective/scores"] + metrics["objective/non_score_reward"]
    )


def test_policy_and_critic_have_their_own_lambda(tmp_path):
    made = trainer(tmp_path, lam=0.5, lam_value=0.0, gamma=0.9)
    rollout, _ = rolled(made)
    rewards = A.place_rewards(rollout.scores, torch.zeros_like(rollout.values), rollout.response_lengths, 0.0)
    lengths, values = rollout.response_lengths, rollout.values
    torch.testing.assert_close(rollout.returns, A.gae(rewards, values, lengths, 0.9, 0.0) + values * rollout.mask)
    advantages = A.masked_whiten(A.gae(rewards, values, lengths, 0.9, 0.5), rollout.mask)
    torch.testing.assert_close(rollout.advantages, advantages)
    assert abs(rollout.advantages[rollout.mask].mean()) < 1e-5
    assert abs(rollout.advantages[rollout.mask].std() - 1) < 1e-3


# --- masks and padding ------------------------------------------------------------------------------------------------


def test_a_pad_token_that_is_the_end_token_changes_nothing(tmp_path):
    one, two = (trainer(tmp_path, words=tokenizer(pad=pad)) for pad in ("<pad>", "<end>"))
    one.train(), two.train()
    assert (one.answerer.pad_token, two.answerer.pad_token) == (0, 1)
    assert end_alike(one, two)


def test_loss_is_the_mean_over_the_tokens_of_the_mini_batch(tmp_path):
    made = trainer(tmp_path, num_mini_batches=1, num_ppo_epochs=1)
    rollout, _ = rolled(made)
    rollout.advantages = rollout.advantages + 3.0  # whitened ones have a mean of 0, which hides a wrong weight
    _, metrics = gradients_of(made, rollout=rollout)
    tokens = rollout.mask
    assert metrics["loss/policy_avg"] == pytest.approx(-rollout.advantages[tokens].mean().item(), rel=1e-5)
    expected = 0.5 * ((rollout.values - rollout.returns)[tokens] ** 2).mean().item()
    assert metrics["loss/value_avg"] == pytest.approx(expected, rel=1e-5)


# --- optimizer steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mini_batches", "epochs", "micro"), [(1, 1, 2), (4, 1, 1), (2, 3, 2), (1, 2, 8)])
def test_mini_batches_and_epochs_make_the_optimizer_steps(tmp_path, mini_batches, epochs, micro):
    made = trainer(
        tmp_path,
        num_mini_batches=mini_batches,
        num_ppo_epochs=epochs,
        total_episodes=16,
        per_device_train_batch_size=micro,
    )
    made.train()
    expected = {2 * mini_batches * epochs}
    assert steps_of(made.learner.policy.optimizer) == steps_of(made.learner.critic.optimizer) == expected


def test_gradients_are_clipped_apart_and_their_norms_logged(tmp_path):
    made = trainer(tmp_path, max_grad_norm=1e-3, total_episodes=8, num_mini_batches=1, num_ppo_epochs=1)
    norms = {}
    for name, model, optimizer in (
        ("policy", made.models.policy, made.learner.policy.optimizer),
        ("critic", made.models.critic, made.learner.critic.optimizer),
    ):
        step = optimizer.step

        def measured(model=model, name=name, step=step):
            norms[name] = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
            return step()

        optimizer.step = measured
    made.train()
    for name in ("policy", "critic"):
        assert made.rows[0][f"{name}/grad_norm"] > 1e-2
        assert norms[name] == pytest.approx(1e-3, rel=1e-3)


def test_critic_warms_up_before_the_policy_moves(tmp_path):
    made = trainer(tmp_path, critic_warmup_updates=2, total_episodes=24)
    start, moved = weights(made.models.policy), []
    critics = [weights(made.models.critic)]
    made.callbacks.append(lambda t, metrics: moved.append(not same(start, weights(t.models.policy))))
    made.callbacks.append(lambda t, metrics: critics.append(weights(t.models.critic)))
    made.train()
    assert moved == [False, False, True]
    assert not same(critics[0], critics[1]) and not same(critics[1], critics[2])
    assert "policy/grad_norm" not in made.rows[1] and "policy/grad_norm" in made.rows[2]


def test_learning_rates_are_apart_and_follow_the_schedule(tmp_path):
    rates = {}
    for kind in ("linear", "constant"):
        made = trainer(
            tmp_path,
            total_episodes=80,
            learning_rate=1.0,
            critic_learning_rate=10.0,
            warmup_steps=4,
            lr_scheduler_type=kind,
        )
        found = []
        for update in (0, 3, 5, 9):
            made.learner.set_learning_rates(update)
            found.append(
                (
                    made.learner.policy.optimizer.param_groups[0]["lr"],
                    made.learner.critic.optimizer.param_groups[-1]["lr"],
                )
            )
        rates[kind] = found
    assert [r[0] for r in rates["constant"]] == [0.25, 1.0, 1.0, 1.0]
    assert [r[0] for r in rates["linear"]] == pytest.approx([0.25, 0.7, 0.5, 0.1])
    assert all(c == pytest.approx(10 * p) for found in rates.values() for p, c in found)


def test_policy_stops_at_the_target_kl_and_the_critic_goes_on(tmp_path):
    free = trainer(tmp_path, learning_rate=0.05, total_episodes=8, num_ppo_epochs=4)
    free.train()
    assert steps_of(free.learner.policy.optimizer) == {8} and free.rows[0]["policy/approxkl_avg"] > 0.01
    made = trainer(tmp_path, learning_rate=0.05, total_episodes=8, num_ppo_epochs=4, target_kl=0.01)
    made.train()
    assert steps_of(made.learner.policy.optimizer) == {1} and steps_of(made.learner.critic.optimizer) == {8}


def test_adam_settings_reach_both_optimizers(tmp_path):
    made = trainer(tmp_path, adam_beta1=0.5, adam_beta2=0.6, adam_epsilon=1e-3, weight_decay=0.25)
    for optimizer, model in (
        (made.learner.policy.optimizer, made.models.policy),
        (made.learner.critic.optimizer, made.models.critic),
    ):
        decayed, plain = optimizer.param_groups
        assert decayed["betas"] == plain["betas"] == (0.5, 0.6) and decayed["eps"] == 1e-3
        assert (decayed["weight_decay"], plain["weight_decay"]) == (0.25, 0.0)
        assert all(p.ndim == 1 for p in plain["params"])
        covered = sum(p.numel() for group in (decayed, plain) for p in group["params"])
        assert covered == sum(p.numel() for p in model.parameters())


# --- what is seen -----------------------------------------------------------------------------------------------------

KEYS = set(
    """objective/kl objective/scores objective/rlhf_reward objective/non_score_reward objective/entropy
policy/approxkl_avg policy/clipfrac_avg policy/grad_norm critic/grad_norm loss/policy_avg loss/value_avg
val/clipfrac_avg val/ratio val/ratio_var val/explained_variance response/length response/without_eos lr episodes_per_s
time/sample time/score time/update objective/kl_k3 objective/kl_std objective/kl_coef critic/lr val/sampler_gap
val/ratio_first val/ratio_first_var time/logprobs time/reference time/critic seconds_left""".split()  # noqa: SIM905
)


def test_every_metric_is_logged_and_finite(tmp_path):
    made = trainer(tmp_path, total_episodes=16)
    final = made.train()
    for row in made.rows:
        assert set(row) >= KEYS and all(math.isfinite(v) for v in row.values())
    assert final["episodes"] == 16 and final["kl"] == made.rows[-1]["objective/kl"]
    assert 1 <= made.rows[0]["response/length"] <= 6 and 0 < made.rows[0]["objective/entropy"] <= math.log(16)


def test_logging_steps_thin_out_the_log(tmp_path):
    made = trainer(tmp_path, total_episodes=40, logging_steps=2, num_ppo_epochs=1)
    made.train()
    assert [row["step"] for row in made.rows] == [2, 4, 5]


def test_held_out_evaluation_runs_before_during_and_after(tmp_path):
    made = trainer(
        tmp_path,
        total_episodes=24,
        eval_steps=2,
        eval_rows=prompts(5),
        gold=lambda prompts, completions, number: [10.0 * n for n in number],
    )
    made.train()
    found = [row for row in made.rows if "eval/proxy" in row]
    assert [row["step"] for row in found] == [0, 2, 3]
    assert found[0]["eval/kl"] == 0.0 and found[1]["eval/kl"] != 0.0
    assert all(row["eval/gold"] == 20.0 for row in found) and 1 <= found[0]["eval/length"] <= 6
    assert made.evaluate() == made.evaluate()


def test_prompts_come_in_seeded_epochs(tmp_path):
    seen = []

    def record(prompts, completions, number):
        seen.append(number)
        return [0.0] * len(prompts)

    made = trainer(tmp_path, rewards=record, rows=prompts(12), total_episodes=24, num_ppo_epochs=1)
    made.train()
    flat = [n for batch in seen for n in batch]
    assert sorted(flat[:12]) == sorted(flat[12:]) == list(range(12)) and flat[:12] != flat[12:]
    again = made.prompts.order(0, 24, seed=0)
    assert flat == again and made.prompts.order(0, 24, seed=1) != again


def test_conversations_are_rendered_and_answered_in_messages(tmp_path):
    seen = []

    def reward(prompts, completions, **columns):
        seen.extend(zip(prompts, completions, strict=True))
        return [float(len(c[0]["content"].split())) for c in completions]

    rows = [{"prompt": [{"role": "user", "content": f"t{i} t{i + 1}"}]} for i in range(6, 14)]
    made = trainer(tmp_path, rewards=reward, rows=rows, total_episodes=8)
    assert made.prompts.ids[0] == [3, 6, 7, 5, 4]
    made.train()
    assert all(p[0]["role"] == "user" and c[0]["role"] == "assistant" for p, c in seen)
    assert not any("<end>" in c[0]["content"] for _, c in seen)


def test_several_rewards_add_up(tmp_path):
    made = trainer(tmp_path, rewards=[count_t7, lambda p, c, **k: [1.0] * len(p)])
    one, two = rolled(made)[0].scores, rolled(trainer(tmp_path))[0].scores
    torch.testing.assert_close(one, two + 1.0)


def test_a_precision_that_the_process_has_is_followed_or_named(tmp_path):
    Accelerator(cpu=True, mixed_precision="bf16")
    assert trainer(tmp_path, mixed_precision="auto").accelerator.mixed_precision == "bf16"
    with pytest.raises(UserError, match="has set this process to 'bf16', which cannot be 'no' too"):
        trainer(tmp_path, mixed_precision="no")


def test_an_end_token_beyond_the_vocabulary_is_passed_over_or_told(tmp_path, capsys):
    actor = policy()
    actor.generation_config.eos_token_id = [50256, 1]
    assert trainer(tmp_path, models=(actor, critic())).answerer.end_tokens == [1]
    actor.generation_config.eos_token_id = 50256
    assert trainer(tmp_path, models=(actor, critic())).answerer.end_tokens == [50256]
    assert "warning: the policy's end token 50256 lies beyond its 16 embeddings" in capsys.readouterr().out


def test_a_reference_on_the_policys_own_weights_is_refused(tmp_path):
    actor = policy()
    other = policy()
    other.model.layers = actor.model.layers
    with pytest.raises(UserError, match="the reference shares weights with the policy"):
        trainer(tmp_path, models=(actor, critic()), reference=other)


def test_a_critic_on_the_policys_own_weights_is_refused(tmp_path):
    actor, judge = policy(), critic()
    judge.model.embed_tokens.weight = actor.model.embed_tokens.weight
    with pytest.raises(UserError, match="the critic shares weights with the policy"):
        trainer(tmp_path, models=(actor, judge))


# --- wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rows": [{"prompt": "t6 " * 43}]}, r"row 0: a prompt of 43 tokens and an answer of 6 .* context of 48"),
        ({"rows": [{"question": "t6"}]}, "no column 'prompt' but 'question'"),
        ({"rows": [{"prompt": ""}]}, "row 0: the prompt is empty"),
        ({"eval_rows": []}, "eval_dataset has no rows"),
        ({"batch_size": 9}, "batch_size 9 must be a multiple"),
        ({"temperature": 0.0}, "temperature: 0.0 must be above 0"),
        ({"lam": 1.5}, "lam: 1.5 must be at least 0 and at most 1"),
        ({"kl_coef": -0.1}, "kl_coef: -0.1 must be at least 0"),
        ({"critic_warmup_updates": 4}, "critic_warmup_updates 4 leaves no update of 8 episodes"),
        ({"num_ppo_epochs": 0}, "num_ppo_epochs: 0 must be at least 1"),
        ({"rewards": []}, "no reward is given"),
        ({"rows": iter(prompts())}, "train_dataset is a list_iterator; give a list of rows"),
        (
            {"rows": [{"prompt": "t6", "completions": "t7"}]},
            "the column 'completions' has the name of what rewards are",
        ),
        ({"words": tokenizer(17)}, "the tokenizer has 17 entries but the policy has 16 embeddings"),
        ({"models": (policy(), critic(size=8))}, "the tokenizer has 16 entries but the critic has 8 embeddings"),
        ({"models": (policy(), short_critic())}, r"row 8: a prompt of 9 tokens and an answer of 6 .* context of 14"),
        ({"models": (policy(), policy())}, "critic must be a sequence classifier"),
    ],
)
def test_wrong_input_is_one_sentence_before_any_work(tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        trainer(tmp_path, **changes)


def test_a_reward_that_fails_stops_the_run(tmp_path):
    with pytest.raises(UserError, match=r"reward broken returned nan on row 1"):

        def broken(prompts, completions, **columns):
            return [0.0, float("nan")] + [0.0] * 6

        trainer(tmp_path, rewards=broken).train()


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    made = trainer(tmp_path, save_steps=1)
    with torch.no_grad():
        made.models.critic.score.weight[:] = float("nan")
    with pytest.raises(UserError) as caught:
        made.train()
    assert str(caught.value) == (
        "ppo: a loss or gradient of update 1 is not a finite number; lower learning_rate or critic_learning_rate and "
        "begin anew, in another output_dir if this run's checkpoints are to stay"
    )
    assert not list((tmp_path / "checkpoints").glob("step-*"))
