"""The decoder under the sampler: recorded steps, a cache that grows, weights that change."""

import pytest
import torch
from sampler_tools import END, PAD, VOCABULARY, gpt, prompts, responses, seeded
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from pipeline.model import decoder as decoding
from pipeline.model.decoder import BLOCK, KEPT, Decoder, prepacked
from pipeline.model.gpt import GPTForCausalLM
from pipeline.model.sampler import generate, stream


@pytest.fixture(scope="module")
def model() -> GPTForCausalLM:
    return gpt()


class Recording(TorchDispatchMode):
    """A CUDA graph on CPU: the operations of one step, with their numbers frozen and their tensors where they were."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.calls.append((operation, args, kwargs or {}, result))
        return result

    def replay(self):
        made = {}  # id of a tensor made while recording: the one made now

        def now(tensor: torch.Tensor) -> torch.Tensor:
            return made.get(id(tensor), tensor)

        for operation, args, kwargs, recorded in self.calls:
            args, kwargs = tree_map_only(torch.Tensor, now, (args, kwargs))
            result = operation(*args, **kwargs)
            made |= {id(old): new for old, new in zip(tree_leaves(recorded), tree_leaves(result), strict=True)}
        recorded.copy_(result)  # the logits


@pytest.fixture
def recorded(monkeypatch) -> list[Decoder]:
    """Decoders behave as on CUDA, but for the graph; the list holds those that recorded a step."""
    decoders = []

    def capture(self: Decoder) -> None:
        self.tokens = torch.zeros_like(self.starts)
        self._step(self.tokens)
        with Recording() as self.graph:
            self.logits = self._step(self.tokens)
        decoders.append(self)

    monkeypatch.setattr(decoding, "captures", lambda device: True)
    monkeypatch.setattr(Decoder, "capture", capture)
    return decoders


SHORT, LONG = prompts(), prompts(seed=2) + prompts(seed=3)


def test_a_recorded_step_serves_every_step(model, recorded, monkeypatch):
    """As on CUDA: one recording, fixed shapes, looks at what has ended only now and then; the same samples."""

    def run(texts, **settings):
        settings = {"max_new_tokens": 40, "eos_token_id": [END, 5], "pad_token_id": PAD} | settings
        return generate(model, texts, generator=seeded(), **settings)

    calls = [(SHORT, {}), (SHORT[::-1], {"temperature": 0}), (LONG, {"top_p": 0.9}), (LONG, {"eos_token_id": END})]
    captured = [run(texts, **settings) for texts, settings in calls]
    assert [len(decoder.starts) for decoder in recorded] == [12, 24]  # a shape seen before is not recorded again
    monkeypatch.undo()
    for (texts, settings), samples in zip(calls, captured, strict=True):
        expected = run(texts, **settings)
        assert torch.equal(samples.sequences, expected.sequences)
        torch.testing.assert_close(samples.logprobs, expected.logprobs, rtol=0, atol=1e-5)


def test_a_kept_decoder_takes_over_new_weights(recorded, monkeypatch):
    model, settings = gpt(), {"max_new_tokens": 10, "temperature": 0, "eos_token_id": END, "pad_token_id": PAD}
    before = responses(generate(model, prompts(), **settings))
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-1)
        model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.flip(1)
    after = responses(generate(model, prompts(), **settings))
    assert list(stream(model, prompts()[0], max_new_tokens=10, temperature=0, eos_token_id=END)) == after[0]
    assert len(recorded) == 2  # of 12 rows and of one
    for rows in range(2, KEPT + 3):
        generate(model, prompts(rows), **settings)
    assert len(decoding._kept[model]) == KEPT
    monkeypatch.undo()
    assert after == responses(generate(model, prompts(), **settings)) != before


def test_logits_of_every_step_equal_the_training_forward(model):
    """Rows of different lengths, a cache that grows twice, rows that leave."""
    lengths, total = [3, 9, 1, 7], 60
    texts = torch.randint(2, VOCABULARY, (4, total), generator=seeded(4))
    longest = max(lengths)
    starts = torch.tensor([longest - length for length in lengths])
    padded = torch.stack([text.roll(int(start))[:longest] for text, start in zip(texts, starts, strict=True)])
    rows = torch.arange(4)
    with torch.inference_mode():
        expected = model(texts).logits
        decoder = Decoder(model, rows=4, slots=total)
        logits = decoder.prefill(padded, starts)
        for step in range(total - longest):
            at = torch.tensor(lengths)[rows] + step
            torch.testing.assert_close(logits, expected[rows, at - 1], rtol=0, atol=2e-5)
            if step == 30:
                leave = torch.tensor([True, False, True, True])
                decoder.keep(leave)
                rows, at = rows[leave], at[leave]
            logits = decoder.step(texts[rows, at])
    assert decoder.filled == total and total > BLOCK


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
def test_the_same_samples_where_weights_cannot_be_prepacked(model, monkeypatch):
    settings = {"max_new_tokens": 12, "eos_token_id": END, "pad_token_id": PAD}
    assert prepacked(torch.zeros(4, 4), rows=2).is_mkldnn
    assert not prepacked(torch.zeros(4, 4), rows=1).is_mkldnn
    assert not prepacked(torch.zeros(4, 4, dtype=torch.float64), rows=2).is_mkldnn
    assert not prepacked(torch.zeros(4), rows=2).is_mkldnn
    expected = responses(generate(model, prompts(), generator=seeded(), **settings))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not prepacked(torch.zeros(4, 4), rows=2).is_mkldnn
    assert responses(generate(model, prompts(), generator=seeded(), **settings)) == expected


def test_slots_that_a_cache_has_grown_by_are_zero(model):
    """They are hidden, but 0 · NaN would be NaN."""
    texts = torch.randint(2, VOCABULARY, (2, BLOCK + 4), generator=seeded(4))
    with torch.inference_mode():
        decoder = Decoder(model, rows=2, slots=BLOCK + 4)
        decoder.prefill(texts[:, :3], torch.zeros(2, dtype=torch.long))
        for step in range(3, BLOCK + 4):
            for cache in (*decoder.keys, *decoder.values):
                assert cache[:, :step].abs().sum() > 0 and not cache[:, step:].any()
            logits = decoder.step(texts[:, step])
        assert decoder.keys[0].shape[1] == 2 * BLOCK
        torch.testing.assert_close(logits, model(texts).logits[:, -1], rtol=0, atol=2e-5)
