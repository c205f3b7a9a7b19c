"""The sampler: greedy equals transformers, log-probs equal the training forward's, draws follow the distribution."""

import json

import pytest
import torch
from sampler_tools import END, PAD, VOCABULARY, gpt, prompts, responses, seeded
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, Qwen3ForCausalLM

from pipeline.errors import UserError
from pipeline.model.decoder import Decoder
from pipeline.model.gpt import GPTForCausalLM
from pipeline.model.sampler import Sampling, generate, stream


@pytest.fixture(scope="module")
def model() -> GPTForCausalLM:
    return gpt()


@pytest.mark.parametrize(
    "changes", [{}, {"num_key_value_heads": 4, "tie_word_embeddings": False}, {"attention_bias": True}]
)
def test_greedy_equals_transformers_token_for_token(changes):
    ours = gpt(**changes)
    stock = Qwen3ForCausalLM(ours.config).eval()
    stock.load_state_dict(ours.state_dict())
    settings = {"max_new_tokens": 40, "temperature": 0, "pad_token_id": PAD}
    endless = responses(generate(ours, prompts(), eos_token_id=END, **settings))
    ends = [END, endless[0][6]]  # a token that the model does say
    samples = generate(ours, prompts(), eos_token_id=ends, **settings)
    for prompt, response, ended in zip(prompts(), responses(samples), samples.ended, strict=True):
        output = stock.generate(
            torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=ends, pad_token_id=PAD
        )
        assert response == output[0, len(prompt) :].tolist()
        assert bool(ended) == (response[-1] in ends)
    assert samples.ended.any()


def test_layout_of_the_result(model):
    samples = generate(
        model, prompts(), max_new_tokens=10, eos_token_id=[END, 5, 6, 7], pad_token_id=PAD, generator=seeded()
    )
    longest = int(samples.response_lengths.max())
    assert samples.logprobs.shape == (12, longest)
    assert samples.sequences.shape == (12, max(map(len, prompts())) + longest)
    assert samples.prompt_lengths.tolist() == [len(prompt) for prompt in prompts()]
    for i, (prompt, response) in enumerate(zip(prompts(), responses(samples), strict=True)):
        length = len(response)
        row = samples.sequences[i]
        assert row[: len(prompt)].tolist() == prompt
        assert (row[len(prompt) + length :] == PAD).all()  # nothing after the end token
        assert not any(token in (END, 5, 6, 7) for token in response[:-1])
        assert bool(samples.ended[i]) == (response[-1] in (END, 5, 6, 7))
        assert samples.ended[i] or length == 10
        assert (samples.logprobs[i, :length] < 0).all()
        assert (samples.logprobs[i, length:] == 0).all()
    assert samples.ended.any()
    assert samples.answers(with_end=True) == responses(samples)
    without = [row[:-1] if ended else row for row, ended in zip(responses(samples), samples.ended, strict=True)]
    assert samples.answers() == without


@pytest.mark.parametrize(
    ("temperature", "precision", "tolerance"),
    [(1.0, torch.float32, 1e-5), (0.7, torch.float32, 1e-5), (1.0, torch.bfloat16, 0.1)],  # bf16: about 3 digits a step
)
def test_logprobs_equal_the_training_forward(model, temperature, precision, tolerance):
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        samples = generate(
            model,
            prompts(),
            max_new_tokens=40,
            temperature=temperature,
            top_k=8,
            eos_token_id=END,
            pad_token_id=PAD,
            generator=seeded(),
        )
        logits = model(samples.sequences).logits  # right padding needs no mask
    logprobs = (logits.float() / temperature).log_softmax(-1)
    for i in range(len(samples.sequences)):
        start, length = int(samples.prompt_lengths[i]), int(samples.response_lengths[i])
        tokens = samples.sequences[i, start : start + length]
        expected = logprobs[i, start - 1 : start + length - 1].gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(samples.logprobs[i, :length], expected.detach(), rtol=0, atol=tolerance)
        assert (samples.logprobs[i, :length] - expected).abs().mean() < tolerance / 5


def test_the_result_is_usable_in_autograd(model):
    with torch.inference_mode():
        samples = generate(model, prompts(), max_new_tokens=4, eos_token_id=END, pad_token_id=PAD)
    loss = (model(samples.sequences).logits.logsumexp(-1)[:, :1] * samples.logprobs[:, :1]).sum()
    loss.backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0
    model.zero_grad()


@pytest.mark.parametrize(
    "filters", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 5, "top_p": 0.8}]
)
def test_draws_follow_the_distribution(filters):
    """Chi-square of 20,000 draws against the distribution written down by hand."""
    logits = torch.tensor([2.0, 1.5, 1.0, 0.0, -0.5, -1.0, -3.0])
    p = (logits / filters.get("temperature", 1.0)).softmax(-1)
    allowed = torch.ones(7, dtype=torch.bool)  # the logits are in falling order
    if "top_k" in filters:
        allowed[filters["top_k"] :] = False
    if "top_p" in filters:
        kept = p * allowed / (p * allowed).sum()
        allowed &= (kept.cumsum(0) - kept) < filters["top_p"]
    if "min_p" in filters:
        allowed &= p >= filters["min_p"] * p.max()
    expected = p * allowed / (p * allowed).sum()
    draws = 20_000
    token, logprob = Sampling(**filters).draw(logits.expand(draws, -1), torch.rand(draws, generator=seeded(3)))
    counts = torch.bincount(token, minlength=7).float()
    assert (counts[~allowed] == 0).all()
    statistic = ((counts - draws * expected) ** 2 / (draws * expected))[allowed].sum().item()
    # 0.999 quantiles of chi-square with 1 to 6 degrees of freedom
    assert statistic < [10.8, 13.8, 16.3, 18.5, 20.5, 22.5][int(allowed.sum()) - 2]
    torch.testing.assert_close(logprob, p.log()[token])  # before the filters


def test_a_uniform_next_to_one_never_draws_a_token_of_probability_zero():
    logits = torch.tensor([[0.3, 0.1, 0.2, float("-inf"), float("-inf")]]).expand(1000, -1) * torch.rand(1000, 1)
    for uniform in (0.0, 1 - 2**-24):
        token, _ = Sampling().draw(logits, torch.full((1000,), uniform))
        assert (token == (0 if uniform == 0 else 2)).all()


def test_draws_of_the_whole_loop_follow_the_model(model):
    prompt, draws = [3, 9, 4], 4000
    samples = generate(
        model, [prompt] * draws, max_new_tokens=2, eos_token_id=END, pad_token_id=PAD, generator=seeded(5)
    )
    first = samples.sequences[:, 3]
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1].softmax(-1) * draws
        likely = int(expected.argmax())
        second = samples.sequences[first == likely, 4]
        expected_second = model(torch.tensor([[*prompt, likely]])).logits[0, -1].softmax(-1) * len(second)
    for drawn, expectation in ((first, expected), (second, expected_second)):
        counts = torch.bincount(drawn, minlength=VOCABULARY).float()
        frequent = expectation > 5
        statistic = ((counts - expectation) ** 2 / expectation)[frequent].sum().item()
        freedom = int(frequent.sum())
        assert statistic < freedom + 4 * (2 * freedom) ** 0.5


def test_same_seed_same_result_whatever_the_batches(model):
    def run(seed, **settings):
        return generate(
            model,
            prompts(),
            max_new_tokens=12,
            eos_token_id=[END, 5],
            pad_token_id=PAD,
            generator=seeded(seed),
            **settings,
        )

    first = run(0)
    for again in (run(0), run(0, batch_size=5), run(0, batch_size=1)):
        assert torch.equal(first.sequences, again.sequences)
        torch.testing.assert_close(first.logprobs, again.logprobs, rtol=0, atol=1e-5)
    assert responses(run(1)) != responses(first)
    torch.manual_seed(4)
    unseeded = generate(model, prompts(), max_new_tokens=12, eos_token_id=END, pad_token_id=PAD)
    torch.manual_seed(4)
    again = generate(model, prompts(), max_new_tokens=12, eos_token_id=END, pad_token_id=PAD)
    assert torch.equal(unseeded.sequences, again.sequences)


def test_the_other_rows_of_a_batch_change_no_greedy_answer(model):
    settings = {"max_new_tokens": 15, "temperature": 0, "eos_token_id": [END, 5, 7], "pad_token_id": PAD}
    together = responses(generate(model, prompts(), **settings))
    for prompt, expected in zip(prompts(), together, strict=True):
        assert responses(generate(model, [prompt], **settings)) == [expected]
    assert responses(generate(model, prompts()[::-1], **settings)) == together[::-1]


def test_finished_rows_leave_the_batch(model, monkeypatch):
    sizes = []
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self, tokens: sizes.append(len(tokens)) or step(self, tokens))
    ends = list(range(1, 8))
    samples = generate(model, prompts(40), max_new_tokens=50, eos_token_id=ends, pad_token_id=PAD, generator=seeded())
    assert samples.ended.all()
    assert 1 + len(sizes) == samples.response_lengths.max() < 50  # the first token comes of the prompt
    for number, size in enumerate(sizes, start=1):
        running = int((samples.response_lengths > number).sum())
        assert running <= size < max(2 * running, 2) + 1


def test_stream_yields_what_generate_returns(model):
    for temperature in (0.0, 1.0):
        settings = {"max_new_tokens": 20, "temperature": temperature, "eos_token_id": [END, 5]}
        for prompt in prompts(4):
            expected = responses(generate(model, [prompt], pad_token_id=PAD, generator=seeded(2), **settings))[0]
            assert list(stream(model, prompt, generator=seeded(2), **settings)) == expected


def test_bf16_autocast_on_cpu(model):
    settings = {"max_new_tokens": 8, "eos_token_id": END, "pad_token_id": PAD}
    full = generate(model, prompts(), generator=seeded(), **settings)
    with torch.autocast("cpu", torch.bfloat16):
        half = generate(model, prompts(), generator=seeded(), **settings)
    assert half.logprobs.dtype == torch.float32
    first = full.sequences.gather(1, full.prompt_lengths[:, None]) == half.sequences.gather(
        1, half.prompt_lengths[:, None]
    )
    assert first.float().mean() > 0.8
    torch.testing.assert_close(full.logprobs[:, 0][first[:, 0]], half.logprobs[:, 0][first[:, 0]], rtol=0, atol=0.1)


def test_a_single_prompt_on_cpu_runs_in_the_precision_of_the_weights(model):
    settings = {"max_new_tokens": 8, "eos_token_id": END}
    full = generate(model, prompts(1), pad_token_id=PAD, generator=seeded(), **settings)
    with torch.autocast("cpu", torch.bfloat16):
        half = generate(model, prompts(1), pad_token_id=PAD, generator=seeded(), **settings)
        streamed = list(stream(model, prompts(1)[0], generator=seeded(), **settings))
    assert torch.equal(full.logprobs, half.logprobs)
    assert responses(full)[0] == responses(half)[0] == streamed


def test_another_architecture_goes_through_transformers(model):
    torch.manual_seed(0)
    other = GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2)
    ).train()  # dropout must be off while sampling, and on again after it
    settings = {"max_new_tokens": 12, "eos_token_id": [END, 5], "pad_token_id": PAD}
    samples = generate(other, prompts(), generator=seeded(), **settings)
    assert other.training
    other.eval()
    assert torch.equal(
        samples.sequences, generate(other, prompts(), generator=seeded(), batch_size=5, **settings).sequences
    )
    logprobs = other(samples.sequences).logits.log_softmax(-1)
    for i, response in enumerate(responses(samples)):
        start = int(samples.prompt_lengths[i])
        expected = logprobs[i, start - 1 : start - 1 + len(response)].gather(1, torch.tensor(response)[:, None])[:, 0]
        torch.testing.assert_close(samples.logprobs[i, : len(response)], expected.detach(), rtol=0, atol=1e-4)
        assert (samples.sequences[i, start + len(response) :] == PAD).all()
    prompt = prompts()[0]
    greedy = generate(other, [prompt], temperature=0, **settings)
    del settings["pad_token_id"]
    assert list(stream(other, prompt, temperature=0, **settings)) == responses(greedy)[0]


@pytest.mark.parametrize(
    "ban",
    [
        {"suppress_tokens": [7, 8, 9]},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 9},
        {"bad_words_ids": [[6]]},
        {"repetition_penalty": 3.0},
    ],
)
def test_a_models_own_generation_config_changes_no_sample(model, ban):
    """What it bans or penalises would be sampled from another distribution than the log-probabilities are of."""
    stock = Qwen3ForCausalLM(model.config).eval()
    stock.load_state_dict(model.state_dict())
    settings = {"max_new_tokens": 12, "eos_token_id": [END, 5], "pad_token_id": PAD}
    plain = generate(stock, prompts(), generator=seeded(7), **settings)
    own = stock.generation_config = GenerationConfig(**ban)
    banned = generate(stock, prompts(), generator=seeded(7), **settings)
    assert torch.equal(plain.sequences, banned.sequences) and torch.equal(plain.logprobs, banned.logprobs)
    assert stock.generation_config is own


def test_both_ways_draw_the_same_samples(model):
    stock = Qwen3ForCausalLM(model.config).eval()
    stock.load_state_dict(model.state_dict())
    settings = {"max_new_tokens": 12, "top_p": 0.9, "eos_token_id": [END, 5], "pad_token_id": PAD}
    ours = generate(model, prompts(), generator=seeded(7), **settings)
    theirs = generate(stock, prompts(), generator=seeded(7), **settings)
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompts": [[3] * 60]}, "64 positions"),
        ({"prompts": [[3], []]}, "prompt 1 has no tokens"),
        ({"prompts": []}, "no prompts"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"top_p": 0.0}, "top_p"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_what_cannot_be_sampled_is_said(model, bad, message):
    settings = {"prompts": [[3, 4]], "max_new_tokens": 10, "eos_token_id": END, "pad_token_id": PAD} | bad
    with pytest.raises(UserError, match=message):
        generate(model, settings.pop("prompts"), **settings)


def test_benchmark_runs_and_ends_in_a_json_line(capsys):
    from benchmarks import sample

    result = sample.main(["--quick", "--rounds", "1"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert result["ratio"] > 0 and result["benchmark"] == "sample"
