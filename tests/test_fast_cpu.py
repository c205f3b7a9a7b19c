"""The hand-written halves of a block: values and gradients are those of the formulas in gpt.py."""

import pytest
import torch
import torch.nn.functional as F
from gpt_tools import VOCABULARY, assert_close, batch, pair, small_config
from transformers import Qwen3ForCausalLM

from pipeline.model import fast_cpu
from pipeline.model.gpt import GPTForCausalLM, rotary_angles


def test_hand_written_norm_equals_autograd():
    torch.manual_seed(0)
    for shape in ((3, 5, 48), (2, 7, 4, 16)):
        x, weight, grad = torch.randn(shape), torch.rand(shape[-1]), torch.randn(shape)
        weight[0] = 0  # nothing may divide by a weight
        x, weight = x.requires_grad_(), weight.requires_grad_()
        expected = weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        ours, r = fast_cpu.norm_forward(x.detach(), weight.detach(), 1e-6, x.dtype)
        assert_close(ours, expected)
        gradients = fast_cpu.norm_backward(grad, x.detach(), weight.detach(), r)
        for a, b in zip(gradients, torch.autograd.grad(expected, (x, weight), grad), strict=True):
            assert_close(a, b)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 150])
def test_hand_written_attention_equals_the_formula(tokens):
    """In fp64, so that what remains is an error of the formula."""
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(4, tokens, 8, dtype=torch.float64, requires_grad=True) for _ in range(4))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    ours, probabilities = fast_cpu.attention_forward(q.detach(), k.detach(), v.detach())
    torch.testing.assert_close(ours, expected)
    gradients = fast_cpu.attention_backward(grad.detach(), q.detach(), k.detach(), v.detach(), probabilities)
    for a, b in zip(gradients, torch.autograd.grad(expected, (q, k, v), grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("padding", ["full", "right"])
def test_hand_written_block_equals_the_plain_one(monkeypatch, groups, padding):
    """Every weight's gradient and the loss, hand-written halves against autograd on the formulas."""
    ours, _ = pair(GPTForCausalLM, Qwen3ForCausalLM, num_key_value_heads=groups)
    inputs = batch(padding)
    calls, run = [], fast_cpu.run
    monkeypatch.setattr(fast_cpu, "run", lambda *given: calls.append(1) or run(*given))
    by_hand = ours(**inputs).loss
    by_hand.backward()
    assert len(calls) == 3  # one a layer: the fast way was taken
    gradients = {name: p.grad.clone() for name, p in ours.named_parameters()}
    ours.zero_grad()
    monkeypatch.setattr(fast_cpu, "can_run", lambda *_: False)
    plain = ours(**inputs).loss
    plain.backward()
    assert_close(by_hand, plain)
    for name, parameter in ours.named_parameters():
        assert_close(gradients[name], parameter.grad, name)


def test_a_backward_under_autocast_gives_the_same_gradients():
    block, x = GPTForCausalLM(small_config()).model.layers[0], torch.randn(2, 9, 48)
    angles, gradients = rotary_angles(torch.arange(9)[None], small_config()), []
    for inside in (False, True):
        block.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = fast_cpu.run(block, x, angles)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            out.backward(torch.ones_like(out))
        gradients.append([p.grad for p in block.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("padding", ["right", "left"])  # the hand-written blocks, and the plain ones
def test_states_at_some_places_are_those_of_all(padding, layers):
    model, _ = pair(GPTForCausalLM, Qwen3ForCausalLM, num_hidden_layers=layers)
    ids = torch.randint(1, VOCABULARY, (3, 20))
    mask = torch.arange(20) < torch.tensor([20, 13, 17])[:, None]
    mask = mask if padding == "right" else mask.flip(1)
    keep = mask & (torch.rand(3, 20) < 0.4)
    results = []
    for asked in (None, keep):
        model.zero_grad()
        states = model.model(ids, mask.long(), keep=asked).last_hidden_state
        states = states[keep] if asked is None else states
        states.square().sum().backward()
        results.append([states.detach(), *(p.grad.clone() for p in model.model.parameters())])
    assert results[1][0].shape == (int(keep.sum()), 48)
    for every, some in zip(*results, strict=True):
        assert_close(some, every)


def test_the_hand_written_block_steps_aside_for_what_it_does_not_know():
    x = torch.randn(2, 5, 48)

    def block(**changes):
        return GPTForCausalLM(small_config(**changes)).train().model.layers[0]

    assert fast_cpu.can_run(block(), x)
    assert not fast_cpu.can_run(block(), x.bfloat16())
    assert not fast_cpu.can_run(block(), torch.randn(1, fast_cpu.LONGEST + 1, 48))
    assert not fast_cpu.can_run(block(attention_bias=True), x)
    assert not fast_cpu.can_run(block(attention_dropout=0.1), x)
    assert fast_cpu.can_run(block(attention_dropout=0.1).eval(), x)
    adapted, hooked, unnormed = block(), block(), block()
    adapted.mlp.up_proj = torch.nn.Sequential(adapted.mlp.up_proj)  # as LoRA wraps a projection
    hooked.self_attn.q_proj.register_forward_hook(lambda *_: None)
    unnormed.self_attn.q_norm = torch.nn.Identity()
    assert not any(fast_cpu.can_run(changed, x) for changed in (adapted, hooked, unnormed))
