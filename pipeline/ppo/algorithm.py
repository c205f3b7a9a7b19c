"""The mathematics of PPO for language models: pure functions on tensors.

Names: B answers, R response tokens (padded), N real tokens of a micro-batch laid end to end, V vocabulary, D width.
A *mask* is a bool tensor that is True on real tokens; it comes from lengths, never from comparing ids with a pad id,
so a pad token that is also the end token does no harm. Sums run over real tokens only.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Sum of a tensor over all processes."""


def alone(values: Tensor) -> Tensor:
    """The Reduce of one process: the values as they are."""
    return values


def length_mask(lengths: Tensor, width: int) -> Tensor:
    """(B,) lengths → (B, width) bool, True on the first `lengths[i]` places of row i."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def masked_mean(values: Tensor, mask: Tensor, reduce: Reduce = alone) -> Tensor:
    """Mean of `values` where `mask` is True, over all processes; 0 where nothing is."""
    sums = torch.stack([values[mask].sum(), mask.sum().to(values.dtype)])
    total, count = reduce(sums)
    return total / count.clamp(min=1)


def masked_whiten(values: Tensor, mask: Tensor, reduce: Reduce = alone, shift_mean: bool = True) -> Tensor:
    """Shift and scale to mean 0 and (unbiased) variance 1 over real tokens of all processes; 0 elsewhere.

    Two passes, mean first, so that a large common offset costs no precision. Without `shift_mean` the mean stays.
    """
    mean = masked_mean(values, mask, reduce)
    squares = torch.stack([((values - mean)[mask] ** 2).sum(), mask.sum().to(values.dtype)])
    total, count = reduce(squares)
    variance = total / (count - 1).clamp(min=1)
    scaled = (values - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, scaled if shift_mean else scaled + mean, 0.0)


# --- places ------------------------------------------------------------------------------------------------


def response_positions(prompt_lengths: Tensor, response_lengths: Tensor, width: int) -> Tensor:
    """(B, width) bool: the places whose hidden state predicts a response token.

    Row i holds prompt, response, padding; the token at place p is predicted at p − 1, so the mask covers
    [P_i − 1, P_i + R_i − 1). The hidden state there is also the state s_t whose value V(s_t) the critic tells.
    """
    place = torch.arange(width, device=prompt_lengths.device)
    start = prompt_lengths[:, None] - 1
    return (place >= start) & (place < start + response_lengths[:, None])


# --- scores ----------------------------------------------------------------------------------------------------------


def add_to_moments(moments: Sequence[float], scores: Tensor, reduce: Reduce = alone) -> list[float]:
    """Count, mean and Σ(x − mean)² of all scores so far and those of a further batch, over all processes.

    Chan, Golub and LeVeque's update: exact for any split into batches, and no difference of large sums.
    """
    count, mean, squares = moments
    scores = scores.double()
    sums = torch.stack([torch.tensor(float(len(scores)), device=scores.device).double(), scores.sum()])
    new_count, total = reduce(sums).tolist()
    new_mean = total / new_count
    spread = ((scores - new_mean) ** 2).sum()
    new_squares = float(reduce(spread))
    both, gap = count + new_count, new_mean - mean
    return [both, mean + gap * new_count / both, squares + new_squares + gap**2 * count * new_count / both]


def standard_deviation(moments: Sequence[float]) -> float:
    """Of all scores so far, from their count, mean and Σ(x − mean)²; 1 where they are equal, or there are none."""
    count, _, squares = moments
    std = math.sqrt(squares / max(1.0, count - 1))
    return std if std > 1e-8 else 1.0


def scale_scores(scores: Tensor, moments: Sequence[float] | None, clip: float | None) -> Tensor:
    """(score − mean)/standard deviation by `moments`, if given, then clipped to ±clip, if given."""
    if moments is not None:
        scores = (scores - moments[1]) / standard_deviation(moments)
    return scores if clip is None else scores.clamp(-clip, clip)


# --- KL, rewards, advantages ------------------------------------------------------------------------------------------


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log π − log π_ref of the sampled token: unbiased for KL(π‖π_ref), may be negative (joschu.net/blog/kl-approx)."""
    return logprobs - ref_logprobs


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(r − 1) − log r with r = π_ref/π: unbiased as well, never negative, less spread."""
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def place_rewards(scores: Tensor, kl: Tensor, lengths: Tensor, kl_coef: float) -> Tensor:
    """r_t = −β·KL_t, and the score on the last real token: the end token, or the last one of a truncated answer.

    `scores` (B,), `kl` (B, R), `lengths` (B,) ≥ 1 → (B, R), 0 on padding.
    """
    mask = length_mask(lengths, kl.shape[1])
    rewards = torch.where(mask, -kl_coef * kl, 0.0)
    last = (lengths - 1)[:, None]
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def gae(rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float = 1.0, lam: float = 0.95) -> Tensor:
    """Generalised advantage estimation (arXiv 1506.02438), an episode ending at its last real token.

        δ_t = r_t + γ·V_{t+1} − V_t        A_t = δ_t + γλ·A_{t+1}        V, A = 0 after the end

    `rewards`, `values` (B, R), `lengths` (B,) → (B, R), 0 on padding. λ = 1: Monte-Carlo return − V; λ = 0: δ_t.
    """
    mask = length_mask(lengths, rewards.shape[1])
    values = torch.where(mask, values, 0.0)
    following = F.pad(values[:, 1:], (0, 1))
    deltas = torch.where(mask, rewards + gamma * following - values, 0.0)
    advantages = torch.empty_like(deltas)
    running = torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        running = deltas[:, t] + gamma * lam * running
        advantages[:, t] = running
    return advantages


def leave_one_out(returns: Tensor, num_generations: int) -> Tensor:
    """RLOO's advantage (arXiv 2402.14740, eq. 8): an answer's return less the mean return of its prompt's others.

        A_i = R_i − 1/(k−1)·Σ_{j≠i} R_j

    `returns` (B,), the k = `num_generations` ≥ 2 answers to one prompt one after the other → (B,).
    """
    groups = returns.view(-1, num_generations)
    others = (groups.sum(1, keepdim=True) - groups) / (num_generations - 1)
    return (groups - others).flatten()


# --- losses -----------------------------------------------------------------------------------------------------------


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    cliprange: float,
    cliprange_high: float | None = None,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate of PPO (arXiv 1707.06347), eq. 7, **summed** over tokens.

        max(−A·ρ, −A·clip(ρ, 1−ε, 1+ε)),   ρ = π/π_old

    `cliprange_high` is the ε of the upper side alone (clip-higher, arXiv 2503.14476). `dual_clip` c bounds the loss of
    a token with A < 0 by c·|A|, so that a huge ρ does not rule the gradient (arXiv 1912.09729). `weights` multiply the
    tokens' losses (`importance_weights`). All tensors (N,). The caller divides by the token count of the whole
    mini-batch on all processes, so neither the micro-batch size nor the number of processes changes the gradient. Also
    returns sums for the log, where approxkl is ½(log ρ)² and ratio_var the mean square of ρ − 1.
    """
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    upper = cliprange if cliprange_high is None else cliprange_high
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + upper)
    losses = torch.maximum(plain, clipped)
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)
    if weights is not None:
        losses = weights * losses
    with torch.no_grad():
        sums = {
            "policy/approxkl_avg": 0.5 * (log_ratio**2).sum(),
            "policy/clipfrac_avg": (clipped > plain).float().sum(),
            "val/ratio": ratio.sum(),
            "val/ratio_var": ((ratio - 1) ** 2).sum(),
        }
    return losses.sum(), sums


def importance_weights(logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> Tensor:
    """min(π/π_sampler, cap) token by token, for answers whose sampler is not quite the policy (truncated importance
    sampling, Ionides 2008)."""
    return (logprobs - sampler_logprobs).exp().clamp(max=cap)


def adapted_kl_coef(kl_coef: float, kl: float, target: float, horizon: float, episodes: int) -> float:
    """The next β after an update of `episodes` answers with a mean KL of `kl` nats (Ziegler et al. 2019, section 2.2).

    β·(1 + clip(KL/target − 1, ±0.2)·episodes/horizon)
    """
    return kl_coef * (1 + min(0.2, max(-0.2, kl / target - 1)) * episodes / horizon)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, cliprange_value: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """½·max((V − G)², (clip(V, V_old ± ε) − G)²), **summed** over tokens; all tensors (N,). ε None: ½·(V − G)²."""
    plain_loss = (values - returns) ** 2
    if cliprange_value is None:
        return 0.5 * plain_loss.sum(), {"val/clipfrac_avg": torch.zeros((), device=values.device)}
    clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    clipped_loss = (clipped - returns) ** 2
    sums = {"val/clipfrac_avg": (clipped_loss > plain_loss).float().sum().detach()}
    return 0.5 * torch.maximum(plain_loss, clipped_loss).sum(), sums


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, reduce: Reduce = alone) -> Tensor:
    """1 − Var(G − V)/Var(G) over real tokens of all processes; 1 is a perfect critic, 0 a constant, 0 if Var(G) = 0."""
    error, mean = returns - values, masked_mean(returns, mask, reduce)
    spread = masked_mean((returns - mean) ** 2, mask, reduce)
    left = masked_mean((error - masked_mean(error, mask, reduce)) ** 2, mask, reduce)
    rounding = 8 * torch.finfo(mean.dtype).eps * mean  # by which the mean of equal numbers may miss them
    return torch.where(spread > rounding**2, 1 - left / spread, 0.0)
