"""What must hold for any input: packing, masks, advantages, losses, filters, formats, splits and checkpoints.

Hypothesis looks for an input that breaks each statement. The examples are the same in every run (tests/conftest.py);
`pytest tests/test_properties.py --hypothesis-profile search` looks through many more, other ones each time. References
are loops over plain Python numbers, written from the definition and not from the code.
"""

import csv
import json
import math
import statistics
import tempfile
from pathlib import Path

import ppo_tools
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from test_ppo_algorithm import in_two_processes

from pipeline import checkpoint
from pipeline.errors import UserError
from pipeline.model.sampler import Sampling
from pipeline.ppo import algorithm as A
from pipeline.ppo.advantages import ESTIMATORS
from pipeline.ppo.metrics import MetricSums
from pipeline.ppo.rollout import GivenRows, PretrainingText, Prompts, Rollout, plan_epoch, seeded
from pipeline.text import data, packing
from pipeline.text.tokenizer import train_tokenizer
from reward_data import formats

NUMBERS = st.floats(-8, 8)
SHARES = st.floats(0, 1)
JUNK = st.sampled_from([0.0, -3.5, 1e6, math.inf, math.nan])  # what padding may hold
TEXTS = st.text(max_size=20)
LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=6)
FEWER = settings(max_examples=settings.default.max_examples // 3)  # where an example writes files or makes a Dataset


def close(found, expected, tolerance=1e-9):
    """Equal numbers, of any nesting, in fp64."""
    found = torch.as_tensor(found, dtype=torch.double)
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.double), atol=tolerance, rtol=tolerance)


def table(rows, junk=0.0, wider=0):
    """Rows of any lengths as an fp64 tensor (B, R + wider), with `junk` after each."""
    width = max(map(len, rows)) + wider
    return torch.tensor([[*row, *[junk] * (width - len(row))] for row in rows], dtype=torch.double)


@st.composite
def answers(draw, tables=2):
    """`tables` numbers for each token of some answers: as many lists of rows, all of the same lengths."""
    lengths = draw(LENGTHS)
    return [[draw(st.lists(NUMBERS, min_size=n, max_size=n)) for n in lengths] for _ in range(tables)]


def lengths_of(rows):
    return torch.tensor([len(row) for row in rows])


# --- packing ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat and the dog ran to the park " * 20, "ü 漢字 🙂"], 300)


@settings(FEWER)
@given(texts=st.lists(TEXTS, max_size=8), block_size=st.integers(2, 9))
def test_packing_predicts_every_token_but_the_first_once(tokenizer, texts, block_size):
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    documents = [tokenizer(text, split_special_tokens=True)["input_ids"] for text in texts]
    line = [token for ids in documents for token in [*ids, end]][:-1]
    if len(line) < 2:
        with pytest.raises(UserError, match="nothing to predict"):
            packing.pack(texts, tokenizer, block_size)
        return
    packed = packing.pack(texts, tokenizer, block_size)
    rows = packed.rows["input_ids"][:]
    assert packed.ids.tolist() == line == [line[0]] + [token for row in rows for token in row[1:]]
    assert [row[0] for row in rows[1:]] == [row[-1] for row in rows[:-1]]
    assert {len(row) for row in rows[:-1]} <= {block_size} and 2 <= len(rows[-1]) <= block_size
    assert packed.tokens == len(line) - 1 and packed.rows["row"][:] == list(range(len(rows)))
    first = 0 if line[0] == end else len(tokenizer.convert_ids_to_tokens(line[0]))
    if line[0] != end:
        assert packed.bytes == sum(len(text.encode()) for text in texts) - first
    assert [tokenizer.decode(ids) for ids in documents] == texts, "any text comes back"


@given(texts=st.lists(TEXTS, max_size=8), times=st.integers(1, 30), block_size=st.integers(2, 9))
def test_streamed_rows_are_packed_rows_wherever_the_stream_is_cut(tokenizer, texts, times, block_size):
    texts = texts * times  # more than the stream tokenizes at once
    stream = packing.StreamedRows(texts, tokenizer, block_size)
    streamed = list(stream)
    line = [token for text in texts for token in [*tokenizer(text, split_special_tokens=True)["input_ids"], 1]]
    step = block_size - 1
    expected = [line[start : start + block_size] for start in range(0, len(line), step)]
    expected = [row for row in expected if len(row) == block_size]
    assert streamed == [{"input_ids": row, "row": i} for i, row in enumerate(expected)] == list(stream)
    assert stream.tokens == step * len(streamed) and stream.bytes == sum(len(text.encode()) for text in texts)


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=5))
def test_collated_rows_come_back_by_their_labels(rows):
    batch = packing.collate([{"input_ids": row, "row": i} for i, row in enumerate(rows)])
    assert [[token for token in row if token != -100] for row in batch["labels"].tolist()] == rows
    real = batch["labels"] != -100
    assert torch.equal(batch["input_ids"], torch.where(real, batch["labels"], 0))
    assert real.sum(1).tolist() == list(map(len, rows)) and batch["row"].tolist() == list(range(len(rows)))


# --- masks and layout -------------------------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6), width=st.integers(1, 9))
def test_a_length_mask_is_true_on_the_first_places(lengths, width):
    expected = [[place < length for place in range(width)] for length in lengths]
    assert A.length_mask(torch.tensor(lengths), width).tolist() == expected


@st.composite
def given_rows(draw, most=6):
    """Prompts and completions of token ids from 2 to 9."""
    ids = st.lists(st.integers(2, 9), min_size=1, max_size=5)
    pairs = draw(st.lists(st.tuples(ids, ids), min_size=1, max_size=most))
    return GivenRows([p for p, _ in pairs], [c for _, c in pairs], [0.0] * len(pairs), None)


@given(rows=given_rows(), pad=st.integers(0, 9), wider=st.integers(0, 3))
def test_response_positions_predict_the_response_and_nothing_else(rows, pad, wider):
    rollout = rows.rollout([1], pad, torch.device("cpu"))
    width = rollout.sequences.shape[1] + wider
    places = A.response_positions(rollout.prompt_lengths, rollout.response_lengths, width)
    for i, (prompt, completion) in enumerate(zip(rows.prompts, rows.completions, strict=True)):
        found = places[i].nonzero()[:, 0].tolist()
        assert found == list(range(len(prompt) - 1, len(prompt) + len(completion) - 1))
        assert rollout.sequences[i, [place + 1 for place in found]].tolist() == completion
    assert rollout.mask.sum(1).tolist() == list(map(len, rows.completions)), "whatever token pads"


@given(rows=given_rows(), mini_batches=st.integers(1, 4), size=st.integers(1, 4), seed=st.integers(0, 99))
def test_a_plan_holds_each_row_once_and_results_come_back_to_their_tokens(rows, mini_batches, size, seed):
    rollout = rows.rollout([1], 0, torch.device("cpu"))
    plan = plan_epoch(rollout.lengths, mini_batches, size, seeded(seed))
    micro_batches = [part for mini_batch in plan for part in mini_batch]
    assert sorted(torch.cat(micro_batches).tolist()) == list(range(len(rows.prompts))) and len(plan) <= mini_batches
    assert all(len(part) <= size for part in micro_batches)
    for mini_batch in plan:
        lengths = rollout.lengths[torch.cat(mini_batch)].tolist()
        assert lengths == sorted(lengths, reverse=True)

    def forward(ids, predicts):
        """Each predicted token, and its place in the row."""
        targets, places = torch.roll(ids, -1, 1), torch.arange(ids.shape[1]).expand(ids.shape)
        return targets[predicts].float(), places[predicts].float()

    tokens, places = rollout.per_token(forward, plan, 2)
    for i, (prompt, completion) in enumerate(zip(rows.prompts, rows.completions, strict=True)):
        n, start = len(completion), len(prompt) - 1
        assert tokens[i].tolist() == completion + [0] * (tokens.shape[1] - n)
        assert places[i, :n].tolist() == list(range(start, start + n))
    for part in micro_batches:
        assert rollout.flat(tokens, part).tolist() == [t for i in part.tolist() for t in rows.completions[i]]


@given(rows=given_rows(most=3), context=st.integers(1, 10))
def test_rows_are_refused_exactly_where_they_do_not_fit(rows, context):
    fit = all(len(p) + len(c) <= context for p, c in zip(rows.prompts, rows.completions, strict=True))
    if fit:
        rows.check(len(rows.prompts), 1, context, 10)
    else:
        with pytest.raises(UserError, match=f"context of {context}"):
            rows.check(len(rows.prompts), 1, context, 10)


@given(size=st.integers(1, 7), start=st.integers(0, 20), count=st.integers(0, 20), seed=st.integers(0, 9))
def test_the_order_of_prompts_is_one_sequence_of_shuffled_epochs(size, start, count, seed):
    made = Prompts(ppo_tools.prompts(size), ppo_tools.tokenizer(), 1, None, "rows")
    whole = made.order(0, start + count, seed)
    assert made.order(start, count, seed) == whole[start:]
    for begin in range(0, len(whole) - size + 1, size):
        assert sorted(whole[begin : begin + size]) == list(range(size))


@given(texts=st.lists(st.lists(st.integers(3, 9), max_size=5), min_size=1, max_size=4), longest=st.integers(1, 6))
def test_pretraining_text_is_cut_and_predicted_from_the_documents_end(texts, longest):
    assume(any(texts))
    made = PretrainingText([" ".join(f"t{i}" for i in ids) for ids in texts], ppo_tools.tokenizer(), longest)
    assert made.ids == [[1, *ids[:longest]] for ids in texts if ids]
    ids, predicts = made.draw(5, seeded(0), torch.device("cpu"))
    for row, places in zip(ids.tolist(), predicts.tolist(), strict=True):
        length = sum(places) + 1
        assert row[:length] in made.ids and not any(row[length:])
        assert places == [place < length - 1 for place in range(len(row))]


# --- advantages -------------------------------------------------------------------------------------------------------


def slow_gae(rewards, values, gamma, lam):
    """One answer by the definition: A_t = Σ_k (γλ)^k δ_{t+k}, the value after the end 0."""
    following = [*values[1:], 0.0]
    deltas = [r + gamma * after - v for r, v, after in zip(rewards, values, following, strict=True)]
    return [sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(deltas))]


@given(both=answers(), gamma=SHARES, lam=SHARES, junk=JUNK, wider=st.integers(0, 3))
def test_gae_is_its_definition_whatever_padding_holds(both, gamma, lam, junk, wider):
    rewards, values = both
    found = A.gae(table(rewards, junk, wider), table(values, junk, wider), lengths_of(rewards), gamma, lam)
    rows = [slow_gae(r, v, gamma, lam) for r, v in zip(rewards, values, strict=True)]
    close(found, table(rows, 0.0, wider))


@given(both=answers(), gamma=SHARES, lam=SHARES, random=st.randoms(use_true_random=False))
def test_gae_of_a_row_depends_on_no_other_row(both, gamma, lam, random):
    rewards, values, lengths = table(both[0]), table(both[1]), lengths_of(both[0])
    order = random.sample(range(len(lengths)), len(lengths))
    found = A.gae(rewards, values, lengths, gamma, lam)
    assert torch.equal(A.gae(rewards[order], values[order], lengths[order], gamma, lam), found[order])


@given(both=answers(), scores=st.lists(NUMBERS, min_size=6, max_size=6), kl_coef=SHARES, shift=NUMBERS)
def test_without_discount_advantages_are_returns_less_values(both, scores, kl_coef, shift):
    """γ = λ = 1: what is still to come less the value, and a point more of score is a point more of each advantage."""
    kl, values = both
    lengths, scores = lengths_of(kl), torch.tensor(scores[: len(kl)], dtype=torch.double)
    rewards = A.place_rewards(scores, table(kl, 9.0), lengths, kl_coef)
    close(rewards.sum(1), [score - kl_coef * sum(row) for score, row in zip(scores.tolist(), kl, strict=True)])
    found = A.gae(rewards, table(values), lengths, 1.0, 1.0)
    for i, row in enumerate(kl):
        for t in range(len(row)):
            close(found[i, t], scores[i] - kl_coef * sum(row[t:]) - values[i][t])
    moved = A.gae(A.place_rewards(scores + shift, table(kl), lengths, kl_coef), table(values), lengths, 1.0, 1.0)
    close(moved, torch.where(A.length_mask(lengths, found.shape[1]), found + shift, 0.0))


@st.composite
def groups(draw):
    """Returns of some prompts' answers, k to each."""
    k = draw(st.integers(2, 5))
    return draw(st.lists(st.lists(NUMBERS, min_size=k, max_size=k), min_size=1, max_size=4))


@given(groups=groups(), shifts=st.lists(NUMBERS, min_size=4, max_size=4), random=st.randoms(use_true_random=False))
def test_leave_one_out_is_its_definition_and_knows_no_level(groups, shifts, random):
    k = len(groups[0])
    flat = torch.tensor(groups, dtype=torch.double).flatten()
    found = A.leave_one_out(flat, k).view(-1, k)
    close(found, [[r - statistics.fmean(row[:i] + row[i + 1 :]) for i, r in enumerate(row)] for row in groups])
    close(found.sum(1), [0.0] * len(groups))
    level = torch.tensor(shifts[: len(groups)], dtype=torch.double)  # a prompt that pays more for each answer
    close(A.leave_one_out((flat.view(-1, k) + level[:, None]).flatten(), k).view(-1, k), found)
    order = random.sample(range(k), k)
    close(A.leave_one_out(flat.view(-1, k)[:, order].flatten(), k).view(-1, k), found[:, order])


def estimated(name, rewards, values, k=1, junk=0.0, wider=0):
    """A rollout with the advantages of `name`."""
    lengths = lengths_of(rewards)
    ids = torch.zeros(len(rewards), int(lengths.max()) + 1, dtype=torch.long)
    rollout = Rollout(ids, torch.ones_like(lengths), lengths, lengths > 0, None, torch.zeros(len(rewards)))
    rollout.values = table(values, junk)
    args = ppo_tools.settings("runs", num_generations=k, advantage_estimator=name)
    ESTIMATORS[name].estimate(rollout, table(rewards), args, A.alone)
    return rollout


@given(both=answers(), k=st.integers(2, 3))
def test_every_token_of_an_answer_has_its_rloo_advantage(both, k):
    rewards = [row for row in both[0] for _ in range(k)]
    rewards = [[number + i % k for number in row] for i, row in enumerate(rewards)]
    found = estimated("rloo", rewards, rewards, k).advantages
    sums = [sum(row) for row in rewards]
    for i, row in enumerate(rewards):
        others = [sums[j] for j in range(len(sums)) if j // k == i // k and j != i]
        close(found[i, : len(row)], [sums[i] - statistics.fmean(others)] * len(row))
        assert not found[i, len(row) :].any()


@given(both=answers())
def test_whitened_gae_has_mean_0_and_variance_1_over_real_tokens(both):
    rewards, values = both
    rollout = estimated("gae", rewards, values)
    plain = [slow_gae(r, v, 1.0, 0.95) for r, v in zip(rewards, values, strict=True)]
    numbers = [number for row in plain for number in row]
    mean, spread = statistics.fmean(numbers), statistics.variance(numbers) if len(numbers) > 1 else 0.0
    close(rollout.advantages, table([[(n - mean) / math.sqrt(spread + 1e-8) for n in row] for row in plain]), 1e-6)
    targets = [[a + v for a, v in zip(slow_gae(r, v, 1.0, 1.0), v, strict=True)] for r, v in zip(*both, strict=True)]
    close(rollout.returns, table(targets))


# --- statistics -------------------------------------------------------------------------------------------------------


@given(rows=answers(1), cut=st.integers(0, 6), junk=JUNK, keep_mean=st.booleans())
def test_whitening_is_over_the_real_tokens_of_all_processes(rows, cut, junk, keep_mean):
    (rows,) = rows
    numbers = [number for row in rows for number in row]
    mean, spread = statistics.fmean(numbers), statistics.variance(numbers) if len(numbers) > 1 else 0.0
    scaled = [[(n - mean) / math.sqrt(spread + 1e-8) + (mean if keep_mean else 0.0) for n in row] for row in rows]
    values, mask = table(rows, junk), A.length_mask(lengths_of(rows), max(map(len, rows)))
    shards = [(values[:cut], mask[:cut]), (values[cut:], mask[cut:])]  # one of them may be empty
    halves = in_two_processes(lambda s, reduce: A.masked_whiten(*s, reduce, shift_mean=not keep_mean), shards)
    close(torch.cat(halves), table(scaled), 1e-6)
    assert [round(float(m), 9) for m in in_two_processes(lambda s, reduce: A.masked_mean(*s, reduce), shards)] == [
        pytest.approx(mean, abs=1e-8)
    ] * 2


@given(batches=st.lists(st.lists(NUMBERS, min_size=1, max_size=5), min_size=1, max_size=5))
def test_moments_are_those_of_all_scores_however_they_came(batches):
    moments = [0.0, 0.0, 0.0]
    for batch in batches:
        moments = A.add_to_moments(moments, torch.tensor(batch, dtype=torch.double))
    scores = [score for batch in batches for score in batch]
    mean = statistics.fmean(scores)
    close(moments, [len(scores), mean, sum((score - mean) ** 2 for score in scores)], 1e-8)
    spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
    assume(not 1e-10 < spread < 1e-6)
    close(A.standard_deviation(moments), spread if spread > 1e-8 else 1.0, 1e-6)
    scaled = A.scale_scores(torch.tensor(scores, dtype=torch.double), moments, 0.5)
    close(scaled, [max(-0.5, min(0.5, (s - mean) / (spread if spread > 1e-8 else 1.0))) for s in scores], 1e-5)


@given(both=answers(), junk=JUNK)
def test_explained_variance_is_its_definition(both, junk):
    values, returns = both
    flat, errors = ([n for row in part for n in row] for part in (returns, values))
    errors = [g - v for g, v in zip(flat, errors, strict=True)]
    spread = statistics.pvariance(flat)
    assume(spread == 0 or spread > 1e-3)  # in between rounding rules
    mask = A.length_mask(lengths_of(returns), max(map(len, returns)))
    found = A.explained_variance(table(values, junk), table(returns, junk), mask)
    close(found, 1 - statistics.pvariance(errors) / spread if spread else 0.0, 1e-6)


@given(value=NUMBERS, count=st.integers(1, 99))
def test_explained_variance_is_0_where_all_returns_are_equal(value, count):
    """In fp32, whose mean of equal numbers is often not that number."""
    returns, mask = torch.full((1, count), value), torch.ones(1, count, dtype=torch.bool)
    assert A.explained_variance(torch.zeros(1, count), returns, mask) == 0
    assert A.explained_variance(torch.arange(float(count))[None], returns, mask) == 0


# --- losses -----------------------------------------------------------------------------------------------------------

TOKENS = st.lists(st.tuples(st.floats(-2, 0), st.floats(-2, 0), NUMBERS), min_size=1, max_size=8)


@given(
    tokens=TOKENS,
    cliprange=st.floats(0.01, 0.9),
    high=st.none() | st.floats(0.01, 3),
    dual=st.none() | st.floats(1.01, 4),
    cap=st.none() | st.floats(0.1, 3),
)
def test_the_policy_loss_is_its_definition_token_by_token(tokens, cliprange, high, dual, cap):
    expected, clipped = 0.0, 0
    for new, old, advantage in tokens:
        ratio = math.exp(new - old)
        bounded = min(max(ratio, 1 - cliprange), 1 + (cliprange if high is None else high))
        gain = min(advantage * ratio, advantage * bounded)
        clipped += advantage * bounded < advantage * ratio
        if dual is not None and advantage < 0:
            gain = max(gain, dual * advantage)
        expected -= gain * (1.0 if cap is None else min(math.exp(new), cap))
    new, old, advantages = torch.tensor(tokens, dtype=torch.double).T
    weights = None if cap is None else A.importance_weights(new, torch.zeros_like(new), cap)
    found, sums = A.policy_loss(new, old, advantages, cliprange, high, dual, weights)
    close(found, expected, 1e-8)
    close(sums["policy/clipfrac_avg"], clipped)
    close(sums["policy/approxkl_avg"], sum((n - o) ** 2 / 2 for n, o, _ in tokens), 1e-8)
    close(sums["val/ratio"], sum(math.exp(n - o) for n, o, _ in tokens), 1e-8)
    close(sums["val/ratio_var"], sum((math.exp(n - o) - 1) ** 2 for n, o, _ in tokens), 1e-8)
    close(A.kl_k1(new, old), [n - o for n, o, _ in tokens])
    k3 = A.kl_k3(new, old)
    close(k3, [math.exp(o - n) - 1 - (o - n) for n, o, _ in tokens])
    assert (k3 >= 0).all()


@given(tokens=TOKENS, cliprange=st.none() | st.floats(0.01, 2))
def test_the_value_loss_is_its_definition_token_by_token(tokens, cliprange):
    expected, clipped = 0.0, 0
    for value, old, target in tokens:
        plain = worst = (value - target) ** 2
        if cliprange is not None:
            worst = max(plain, (old + min(max(value - old, -cliprange), cliprange) - target) ** 2)
        expected += worst / 2
        clipped += worst > plain
    found, sums = A.value_loss(*torch.tensor(tokens, dtype=torch.double).T, cliprange)
    close(found, expected, 1e-8)
    close(sums["val/clipfrac_avg"], clipped)


@given(tokens=TOKENS, cut=st.integers(0, 8))
def test_figures_are_the_same_however_a_mini_batch_is_cut(tokens, cut):
    def means(parts):
        log = MetricSums()
        for part in parts:
            log.add(A.policy_loss(*torch.tensor(part, dtype=torch.double).T, 0.2)[1])
        log.close(torch.tensor(float(len(tokens))), {})
        return log.means(A.alone)

    whole, cut_up = means([tokens]), means([part for part in (tokens[:cut], tokens[cut:]) if part])
    assert cut_up == pytest.approx(whole, rel=1e-9, abs=1e-9)
    assert whole["val/ratio"] == whole["val/ratio_first"]


@given(kl=st.floats(0, 50), more=st.floats(0, 50), target=st.floats(0.1, 20), episodes=st.integers(1, 64))
def test_an_adaptive_kl_coef_follows_the_kl_within_a_fifth_of_the_horizon(kl, more, target, episodes):
    one, two = (A.adapted_kl_coef(0.5, value, target, 64, episodes) for value in (kl, kl + more))
    assert 0.5 * (1 - 0.2 * episodes / 64) - 1e-12 <= one <= two <= 0.5 * (1 + 0.2 * episodes / 64) + 1e-12
    assert A.adapted_kl_coef(0.5, target, target, 64, episodes) == 0.5


# --- filters of the sampler -------------------------------------------------------------------------------------------

LOGITS = st.lists(st.floats(-6, 6), min_size=2, max_size=8)


def kept(logits, **options):
    """Log-probabilities, and which tokens are left; those that are left keep their log-probability."""
    logprobs = torch.tensor(logits).log_softmax(-1)
    filtered = Sampling(**options).filter(logprobs[None])[0]
    left = filtered > -math.inf
    assert torch.equal(filtered[left], logprobs[left])
    return logprobs, left


@given(logits=LOGITS, top_k=st.integers(0, 9), top_p=st.floats(0.05, 1), min_p=SHARES)
def test_filters_leave_the_likeliest_tokens(logits, top_k, top_p, min_p):
    logprobs, left = kept(logits, top_k=top_k, top_p=top_p, min_p=min_p)
    assert logprobs[left].max() == logprobs.max()
    assert left.all() or logprobs[left].min() >= logprobs[~left].max()


@given(logits=LOGITS, top_k=st.integers(1, 9), top_p=st.floats(0.05, 0.99), min_p=st.floats(0.01, 1))
def test_each_filter_leaves_what_its_definition_says(logits, top_k, top_p, min_p):
    logprobs, left = kept(logits, top_k=top_k)
    assert left.tolist() == [sum(other > one for other in logprobs.tolist()) < top_k for one in logprobs.tolist()]
    probabilities = logprobs.double().exp()
    _, left = kept(logits, top_p=top_p)
    mass = probabilities[left].sum()
    assert mass >= top_p - 1e-5 and (left.sum() == 1 or mass - probabilities[left].min() <= top_p + 1e-5)
    _, left = kept(logits, min_p=min_p)
    bound = min_p * probabilities.max()
    assert all(is_left == (p >= bound) or abs(p - bound) < 1e-6 for p, is_left in zip(probabilities, left, strict=True))


@given(
    logits=LOGITS,
    uniform=st.lists(st.floats(0, 1, exclude_max=True, width=32), min_size=1, max_size=5),
    top_k=st.integers(0, 4),
)
@example(logits=[0.0, 0.0], uniform=[1 - 2**-24], top_k=1)
def test_a_draw_is_the_token_whose_interval_holds_the_number(logits, uniform, top_k):
    logprobs, left = kept(logits, top_k=top_k)
    rows = torch.tensor(logits).expand(len(uniform), -1)
    tokens, found = Sampling(top_k=top_k).draw(rows, torch.tensor(uniform))
    ends = torch.where(left, logprobs.double().exp(), 0.0).cumsum(0)
    for u, token in zip(uniform, tokens.tolist(), strict=True):
        assert left[token]
        begin = float(ends[token - 1]) if token else 0.0
        assert begin - 1e-6 <= u * float(ends[-1]) <= float(ends[token]) + 1e-6
    assert torch.equal(found, logprobs[tokens])
    greedy, _ = Sampling(temperature=0.0).draw(rows, torch.tensor(uniform))
    assert (logprobs[greedy] == logprobs.max()).all()


# --- formats, files, splits -------------------------------------------------------------------------------------------

# Texts that no format cleans: without blanks around them and blank lines, which part a transcript's turns
CLEAN = TEXTS.map(str.strip).filter(lambda text: "\n\n" not in text)


def said(role, content):
    return [{"role": role, "content": content}]


def shapes(q, a, b):
    """For each format a row with question q and answers a and b: kind, row, and what it becomes."""
    asked, good, bad = said("user", q), said("assistant", a), said("assistant", b)
    told = {"prompt": asked, "completion": good}
    pair = {"prompt": asked, "chosen": good, "rejected": bad}
    human, gpt = ({"from": name, "value": text} for name, text in (("human", q), ("gpt", a)))
    turns = [f"\n\nHuman: {q}\n\nAssistant: {answer}" for answer in (a, b)]
    return {
        "alpaca": ("instructions", {"instruction": q, "input": "", "output": a}, told),
        "alpaca with input": (
            "instructions",
            {"instruction": q, "input": q, "output": a},
            {"prompt": said("user", f"{q}\n\n{q}"), "completion": good},
        ),
        "instruction preferences": ("preferences", {"instruction": q, "chosen": a, "rejected": b}, pair),
        "messages": ("instructions", {"messages": asked + good}, told),
        "sharegpt": ("instructions", {"conversations": [human, gpt]}, told),
        "sharegpt preferences": (
            "preferences",
            {"conversations": [human], "chosen": gpt, "rejected": {"from": "gpt", "value": b}},
            pair,
        ),
        "prompt and completion": ("instructions", {"prompt": q, "completion": a}, {"prompt": q, "completion": a}),
        "prompt and completion as messages": ("instructions", told, told),
        "text preferences": (
            "preferences",
            {"prompt": q, "chosen": a, "rejected": b},
            {"prompt": q, "chosen": a, "rejected": b},
        ),
        "message preferences": ("preferences", pair, pair),
        "whole conversations": ("preferences", {"prompt": q, "chosen": asked + good, "rejected": asked + bad}, pair),
        "hh-rlhf transcripts": ("preferences", dict(zip(("chosen", "rejected"), turns, strict=True)), pair),
        "llmbar": ("preferences", {"input": q, "output_1": b, "output_2": a, "label": 2}, pair),
        "tl;dr": (
            "instructions",
            {"prompt": f"{q} TL;DR:", "label": a},
            {"prompt": f"{q} TL;DR:", "completion": f" {a}"},
        ),
        "tl;dr comparisons": (
            "preferences",
            {"info": {"post": q}, "summaries": [{"text": b}, {"text": a}], "choice": 1},
            {"prompt": f"POST: {q}\n\nTL;DR:", "chosen": f" {a}", "rejected": f" {b}"},
        ),
        "prompt": ("prompts", {"prompt": q, "key": a}, {"prompt": q, "key": a}),
        "instruction": ("prompts", {"instruction": q}, {"prompt": asked}),
    }


@given(q=CLEAN, a=CLEAN, b=CLEAN)
def test_any_text_passes_through_every_format(q, a, b):
    """The letter before each text keeps it from being empty, and the three from being equal or another's beginning."""
    for name, (kind, row, expected) in shapes(f"Q{q}", f"A{a}", f"B{b}").items():
        before = json.dumps(row)
        adapted = formats.adapt([row], kind)
        assert adapted.rows == [expected], name
        assert not adapted.dropped and json.dumps(row) == before, name


@settings(FEWER)
@given(texts=st.lists(st.tuples(TEXTS, TEXTS), min_size=3, max_size=8), seed=st.integers(0, 9))
def test_any_text_comes_back_from_a_file(texts, seed):
    rows = [{"prompt": f"{i} {one}", "completion": f"A{two}"} for i, (one, two) in enumerate(texts)]
    whole = {(row["prompt"], row["completion"]) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        lines, sheet = Path(folder) / "rows.jsonl", Path(folder) / "rows.csv"
        checkpoint.write_jsonl(lines, rows)
        with sheet.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, quoting=csv.QUOTE_ALL)
            writer.writerows([["prompt", "completion"], *([row["prompt"], row["completion"]] for row in rows)])
        files = [lines] if any(char in str(whole) for char in ("\\r", "\\x00")) else [lines, sheet]
        for file in files:
            parts = [read(data.load_instructions, file, split, seed) for split in ("train", "validation", "test")]
            assert sum(map(len, parts)) == len(rows) and set().union(*parts) == whole, file.name


def read(load, file, split, seed):
    """The rows of a split as tuples of their texts, or none where the split has none."""
    try:
        return [tuple(row.values()) for row in load(str(file), split=split, seed=seed).rows]
    except UserError as error:
        assert "for the split" in str(error)
        return []


@settings(FEWER)
@given(prompts=st.lists(st.integers(0, 30), min_size=3, max_size=25), random=st.randoms(use_true_random=False))
def test_no_prompt_is_on_both_sides_whatever_order_and_seed(prompts, random):
    assume(len(set(prompts)) >= 3)
    rows = [{"prompt": f"p{p}", "completion": f"{i}"} for i, p in enumerate(prompts)]
    sides = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        for seed in range(2):
            checkpoint.write_jsonl(file, random.sample(rows, len(rows)))
            parts = {s: read(data.load_instructions, file, s, seed) for s in ("train", "validation", "test")}
            assert sorted(row for part in parts.values() for row in part) == sorted(
                (row["prompt"], row["completion"]) for row in rows
            )
            sides.append({split: {prompt for prompt, _ in part} for split, part in parts.items()})
    assert sides[0] == sides[1] and sum(map(len, sides[0].values())) == len(set(prompts))
    held_out = max(1, round(len(set(prompts)) * 0.05))
    assert len(sides[0]["test"]) == len(sides[0]["validation"]) == held_out


def documents(file, split, **options):
    """What load_texts gives, or nothing where the split is empty."""
    try:
        return data.load_texts(str(file), split=split, **options)
    except UserError as error:
        assert "for the split" in str(error)
        return []


@settings(FEWER)
@given(numbers=st.lists(st.integers(0, 400), min_size=3, max_size=60), random=st.randoms(use_true_random=False))
@pytest.mark.parametrize("streaming", [False, True])
def test_no_document_is_on_both_sides_read_whole_or_streamed(streaming, numbers, random):
    assume(len(set(numbers)) >= 3)
    texts = [random.choice(["Document  {}", "document {}\n"]).format(number) for number in numbers]
    keys = {data.document_key(text) for text in texts}
    assert len(keys) == len(set(numbers)), "case and spacing make no other document"
    sides = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "texts.jsonl"
        for seed in range(2):
            checkpoint.write_jsonl(file, [{"text": text} for text in random.sample(texts, len(texts))])
            parts = [documents(file, s, seed=seed, streaming=streaming) for s in ("train", "validation", "test")]
            sides.append([{data.document_key(text) for text in part} for part in parts])
            assert sum(map(len, parts)) == len(keys) == len(set.union(*sides[-1]))
    assert sides[0] == sides[1]


@settings(FEWER)
@given(texts=st.lists(TEXTS, min_size=3, max_size=12), limit=st.integers(1, 60), streaming=st.booleans())
def test_max_bytes_cuts_between_documents_and_never_within_a_character(texts, limit, streaming):
    texts = [f"{i} {text}" for i, text in enumerate(texts)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "texts.jsonl"
        checkpoint.write_jsonl(file, [{"text": text} for text in texts])
        whole = documents(file, "train", streaming=streaming)
        cut = documents(file, "train", streaming=streaming, max_bytes=limit)
    sizes = [len(text.encode()) for text in whole]
    if sizes and sizes[0] > limit:
        assert cut == [whole[0].encode()[:limit].decode(errors="ignore")]
    else:
        assert cut == whole[: len(cut)] and sum(sizes[: len(cut)]) <= limit
        assert len(cut) == len(whole) or sum(sizes[: len(cut) + 1]) > limit


@given(keys=st.lists(st.integers(0, 40) | st.integers(2**64 - 5, 2**64 - 1), max_size=60), merge_at=st.integers(1, 20))
def test_seen_keys_are_a_set(keys, merge_at):
    seen, reference = data.SeenKeys(merge_at), set()
    for key in keys:
        assert seen.add(key.to_bytes(8, "big")) == (key not in reference)
        reference.add(key)


# --- checkpoints ------------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@settings(FEWER)
@given(rows=st.lists(VALUES, max_size=4))
def test_any_value_comes_back_from_json(rows):
    with tempfile.TemporaryDirectory() as folder:
        one, many = Path(folder) / "one.json", Path(folder) / "many.jsonl"
        checkpoint.write_json(one, rows)
        checkpoint.write_jsonl(many, rows)
        assert json.loads(one.read_text(encoding="utf-8")) == rows
        assert [json.loads(line) for line in many.read_bytes().splitlines()] == rows, "one value a line"
        assert sorted(path.name for path in Path(folder).iterdir()) == ["many.jsonl", "one.json"]


@settings(FEWER)
@given(
    content=st.binary(min_size=1, max_size=40), place=st.integers(0, 39), flip=st.integers(1, 255), cut=st.booleans()
)
def test_any_changed_byte_of_a_checkpoint_is_seen(content, place, flip, cut):
    place %= len(content)
    with tempfile.TemporaryDirectory() as folder:
        made = checkpoint.save_checkpoint(Path(folder), 3, lambda path: (path / "state.bin").write_bytes(content))
        assert checkpoint.fault_of(made) is None
        changed = content[:place] if cut else content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :]
        (made / "state.bin").write_bytes(changed)
        assert "state.bin" in checkpoint.fault_of(made)
        assert checkpoint.latest_checkpoint(Path(folder), lambda sentence: None) is None


@settings(FEWER)
@given(steps=st.lists(st.integers(1, 12), min_size=1, max_size=7), keep=st.integers(1, 3))
def test_the_newest_checkpoints_are_kept_in_whatever_order_steps_come(steps, keep):
    """A step that comes after a later one means that the run began anew: then the later ones go."""
    expected: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        for step in steps:
            checkpoint.save_checkpoint(Path(folder), step, lambda path: (path / "a.bin").write_bytes(b""), keep=keep)
            expected = sorted({other for other in expected if other <= step} | {step})[-keep:]
            assert sorted(checkpoint.step_of(path) for path in Path(folder).glob("step-*")) == expected
            assert checkpoint.step_of(checkpoint.latest_checkpoint(Path(folder))) == step
