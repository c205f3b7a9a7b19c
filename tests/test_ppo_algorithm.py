"""The mathematics of PPO against numbers computed by hand, exact expectations and naive loops."""

import math
import threading

import pytest
import torch
import torch.nn.functional as F

from pipeline.model import logprobs
from pipeline.model.logprobs import logprobs_from_hidden
from pipeline.ppo import algorithm as A


def close(value, expected, tolerance=1e-6):
    torch.testing.assert_close(torch.as_tensor(value), torch.as_tensor(expected), atol=tolerance, rtol=0)


# --- GAE --------------------------------------------------------------------------------------------------------------


def test_gae_by_hand():
    rewards = torch.tensor([[0.0, 0.0, 1.0], [2.0, 9.0, 9.0]])
    values = torch.tensor([[0.5, 0.6, 0.7], [0.5, 9.0, 9.0]])  # row 1 has one token: the 9s are padding
    found = A.gae(rewards, values, torch.tensor([3, 1]), gamma=1.0, lam=0.95)
    # δ = 0.1, 0.1, 0.3;  A_2 = 0.3, A_1 = 0.1 + 0.95·0.3, A_0 = 0.1 + 0.95·A_1
    close(found, [[0.46575, 0.385, 0.3], [1.5, 0.0, 0.0]])


def test_gae_with_discount_by_hand():
    found = A.gae(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 0.25]]), torch.tensor([2]), gamma=0.9, lam=0.5)
    # δ_1 = 2 − 0.25 = 1.75;  δ_0 = 1 + 0.9·0.25 − 0.5 = 0.725;  A_0 = 0.725 + 0.45·1.75
    close(found, [[1.5125, 1.75]])


def test_gae_is_without_discount_and_with_lambda_095_where_nothing_else_is_said():
    rewards, values, lengths = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.6]]), torch.tensor([2])
    close(A.gae(rewards, values, lengths), [[0.1 + 0.95 * 0.4, 0.4]])


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_gae_lambda_one_is_monte_carlo_and_lambda_zero_is_td(gamma):
    torch.manual_seed(0)
    rewards, values, lengths = torch.randn(5, 7), torch.randn(5, 7), torch.tensor([7, 1, 3, 5, 2])
    one, zero = (A.gae(rewards, values, lengths, gamma, lam) for lam in (1.0, 0.0))
    for i, n in enumerate(lengths.tolist()):
        for t in range(n):
            monte_carlo = sum(gamma ** (s - t) * rewards[i, s] for s in range(t, n))
            following = values[i, t + 1] if t + 1 < n else 0.0
            close(one[i, t], monte_carlo - values[i, t], 1e-5)
            close(zero[i, t], rewards[i, t] + gamma * following - values[i, t], 1e-5)
        assert (one[i, n:] == 0).all() and (zero[i, n:] == 0).all()


# --- rewards and KL ---------------------------------------------------------------------------------------------------


def test_score_sits_on_the_last_real_token():
    kl = torch.tensor([[0.1, 0.2, 0.3], [0.4, 7.0, 7.0]])
    found = A.place_rewards(torch.tensor([5.0, -1.0]), kl, torch.tensor([3, 1]), kl_coef=0.5)
    close(found, [[-0.05, -0.1, 4.85], [-1.2, 0.0, 0.0]])


def test_scores_of_a_judge_in_fp64_are_taken():
    found = A.place_rewards(torch.tensor([5.0]).double(), torch.zeros(1, 2), torch.tensor([2]), kl_coef=0.5)
    assert found.dtype == torch.float32 and found.tolist() == [[0.0, 5.0]]


def test_kl_estimators_by_hand():
    logprobs, ref = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    close(A.kl_k1(logprobs, ref), [math.log(2)])
    close(A.kl_k3(logprobs, ref), [0.5 - 1 + math.log(2)])
    assert A.kl_k1(logprobs, logprobs).item() == 0.0 and A.kl_k3(logprobs, logprobs).item() == 0.0


def test_kl_estimators_have_the_kl_as_their_expectation():
    torch.manual_seed(0)
    policy, ref = torch.randn(9).log_softmax(0), torch.randn(9).log_softmax(0)
    exact = F.kl_div(ref, policy, log_target=True, reduction="sum")
    close((policy.exp() * A.kl_k1(policy, ref)).sum(), exact)
    close((policy.exp() * A.kl_k3(policy, ref)).sum(), exact)
    assert (A.kl_k3(policy, ref) >= 0).all()


# --- statistics -------------------------------------------------------------------------------------------------------


def test_masked_mean_and_whitening_by_hand():
    values, mask = torch.tensor([[1.0, 3.0, 1e6], [5.0, -1e6, 1e6]]), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    close(A.masked_mean(values, mask), 3.0)
    close(A.masked_whiten(values, mask), [[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])  # mean 3, unbiased variance 4
    close(A.masked_mean(values, torch.zeros_like(mask)), 0.0)


def test_whitening_a_constant_gives_zero():
    found = A.masked_whiten(torch.full((2, 3), 0.7), torch.ones(2, 3, dtype=torch.bool))
    assert found.abs().max() < 1e-2


def in_two_processes(function, shards):
    """Run `function(shard, reduce)` for two shards in step; `reduce` sums over both, as a collective does."""
    barrier, posted, results = threading.Barrier(2), [None, None], [None, None]

    def work(rank):
        def reduce(tensor):
            posted[rank] = tensor
            barrier.wait()
            total = posted[0] + posted[1]
            barrier.wait()
            return total

        results[rank] = function(shards[rank], reduce)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_statistics_are_over_the_tokens_of_all_processes():
    torch.manual_seed(0)
    values, returns, mask = torch.randn(6, 5) * 3 + 2, torch.randn(6, 5), torch.rand(6, 5) > 0.4
    shards = [(values[:2], returns[:2], mask[:2]), (values[2:], returns[2:], mask[2:])]
    halves = in_two_processes(lambda s, reduce: A.masked_whiten(s[0], s[2], reduce), shards)
    close(torch.cat(halves), A.masked_whiten(values, mask), 1e-5)
    for half in in_two_processes(lambda s, reduce: A.explained_variance(*s, reduce), shards):
        close(half, A.explained_variance(values, returns, mask), 1e-5)


def test_explained_variance_by_hand():
    returns, mask = torch.tensor([[1.0, 2.0, 3.0, 99.0]]), torch.tensor([[1, 1, 1, 0]]).bool()
    close(A.explained_variance(returns, returns, mask), 1.0)
    close(A.explained_variance(torch.full((1, 4), 2.0), returns, mask), 0.0)
    close(A.explained_variance(torch.tensor([[1.5, 2.0, 2.5, 0.0]]), returns, mask), 0.75)  # half the error's spread
    close(A.explained_variance(returns, torch.ones(1, 4), mask), 0.0)
    far = torch.tensor([[9999.9, 10000.0, 10000.1, 0.0]])  # a small spread around a large mean is no rounding
    close(A.explained_variance(far, far, mask), 1.0)


def test_what_is_made_beside_a_tensor_is_made_on_its_device():
    """On meta, which computes nothing but refuses two devices in one operation: a GPU would."""
    lengths, table = torch.tensor([2, 1], device="meta"), torch.zeros(2, 3, device="meta")
    made = [
        A.length_mask(lengths, 3),
        A.response_positions(lengths, lengths, 3),
        A.place_rewards(lengths.float(), table, lengths, 0.1),
        A.gae(table, table, lengths),
        A.value_loss(table, table, table, None)[1]["val/clipfrac_avg"],
    ]
    assert [tensor.device.type for tensor in made] == ["meta"] * 5


# --- losses -----------------------------------------------------------------------------------------------------------


def test_policy_loss_by_hand():
    old = torch.zeros(5)
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0])
    loss, sums = A.policy_loss(ratio.log(), old, advantages, cliprange=0.2)
    # −1·1.2 (clipped), +1·1.5, −1·0.5, +1·0.8 (clipped), −2·1.1
    close(loss, -1.2 + 1.5 - 0.5 + 0.8 - 2.2)
    close(sums["policy/clipfrac_avg"], 2.0)
    close(sums["val/ratio"], 5.1)
    close(sums["policy/approxkl_avg"], 0.5 * (ratio.log() ** 2).sum())


def test_clipped_tokens_have_no_gradient():
    logprobs = torch.tensor([1.5, 1.5, 0.5, 0.5]).log().requires_grad_()
    loss, _ = A.policy_loss(logprobs, torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0]), cliprange=0.2)
    loss.backward()
    close(logprobs.grad, [0.0, 1.5, -0.5, 0.0])


def test_gradient_at_ratio_one_is_reinforce():
    torch.manual_seed(0)
    logits, tokens, advantages = torch.randn(12, 6, requires_grad=True), torch.randint(6, (12,)), torch.randn(12)
    logprobs = logits.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    loss, _ = A.policy_loss(logprobs, logprobs.detach(), advantages, cliprange=0.2)
    (ppo,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (reinforce,) = torch.autograd.grad(-(advantages * logprobs).sum(), logits)
    close(ppo, reinforce)


def test_value_loss_by_hand():
    values = torch.tensor([1.0, 1.0, 0.1], requires_grad=True)
    old, returns = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([1.0, 2.0, 1.0])
    loss, sums = A.value_loss(values, old, returns, cliprange_value=0.2)
    # clipped values 0.7, 0.7, 0.1: ½·(max(0, 0.09) + max(1, 1.69) + 0.81)
    close(loss, 0.5 * (0.09 + 1.69 + 0.81))
    close(sums["val/clipfrac_avg"], 2.0)
    loss.backward()
    close(values.grad, [0.0, 0.0, -0.9])


# --- log-probabilities ------------------------------------------------------------------------------------------------


def test_response_positions_end_before_the_last_token():
    found = A.response_positions(torch.tensor([2, 1]), torch.tensor([3, 1]), width=6)
    assert found.int().tolist() == [[0, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("chunk_elements", [1, 7 * 5, 10**6])
def test_chunked_logprobs_equal_plain_ones_with_gradients(chunk_elements, monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", chunk_elements)
    torch.manual_seed(0)
    head, targets, weights = torch.nn.Linear(4, 7), torch.randint(7, (23,)), torch.randn(23)
    hidden = torch.randn(23, 4, requires_grad=True)
    rows = []
    head.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    found, entropy = logprobs_from_hidden(hidden, targets, head, 7, 0.7, True)
    gradients = torch.autograd.grad((found * weights).sum(), [hidden, *head.parameters()])
    assert max(rows) <= max(1, chunk_elements // 7)
    distribution = torch.distributions.Categorical(logits=F.linear(hidden, head.weight, head.bias) / 0.7)
    expected = distribution.log_prob(targets)
    close(found, expected)
    close(entropy, distribution.entropy())
    for ours, plain in zip(
        gradients, torch.autograd.grad((expected * weights).sum(), [hidden, *head.parameters()]), strict=True
    ):
        close(ours, plain, 1e-5)
