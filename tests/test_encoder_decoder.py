"""The encoder-decoder: its cross-attention against other computations, what sees what, and that it can copy."""

import pytest
import torch
import torch.nn.functional as F
from gpt_tools import assert_close, small_config
from torch import Tensor

from pipeline.model.encoder_decoder import CrossAttention, EncoderDecoder, padding_bias
from pipeline.model.gpt import IGNORED, GPTForCausalLM

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
ONES = torch.ones(2, 7, dtype=torch.long)


def model(**changes) -> EncoderDecoder:
    torch.manual_seed(0)
    return EncoderDecoder(small_config(num_key_value_heads=4, **changes)).eval()


def ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(1, 96, shape, generator=torch.Generator().manual_seed(seed))


def attended(**changes) -> tuple[CrossAttention, Tensor, Tensor, Tensor]:
    """A cross-attention, inputs of two rows, one of them padded, and what comes out."""
    torch.manual_seed(0)
    attention = CrossAttention(small_config(initializer_range=1.0, **changes))
    x, memory = torch.randn(2, 3, 48), torch.randn(2, 5, 48)
    return attention, x, memory, attention(x, memory, padding_bias(MASK))


# ---- cross-attention -------------------------------------------------------------------------------------------------


def test_cross_attention_of_four_heads_equals_pytorchs():
    attention, x, memory, ours = attended(head_dim=12)
    theirs, weights = F.multi_head_attention_forward(
        x.transpose(0, 1),
        memory.transpose(0, 1),
        memory.transpose(0, 1),
        embed_dim_to_check=48,
        num_heads=4,
        in_proj_weight=None,
        in_proj_bias=None,
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=attention.o_proj.weight,
        out_proj_bias=None,
        key_padding_mask=MASK == 0,
        use_separate_proj_weight=True,
        q_proj_weight=attention.q_proj.weight,
        k_proj_weight=attention.k_proj.weight,
        v_proj_weight=attention.v_proj.weight,
    )
    assert weights[1, :, 3:].eq(0).all() and weights[0].gt(0).all()
    assert_close(ours, theirs.transpose(0, 1))


def test_cross_attention_of_one_head_by_hand():
    attention, x, memory, ours = attended(num_attention_heads=1)
    for row, real in enumerate((5, 3)):
        for token in range(3):
            query = attention.q_proj.weight @ x[row, token]
            powers = [(query @ attention.k_proj.weight @ m / 16**0.5).exp() for m in memory[row, :real]]
            mixed = sum(p * (attention.v_proj.weight @ m) for p, m in zip(powers, memory[row, :real], strict=True))
            assert_close(ours[row, token], attention.o_proj.weight @ mixed / sum(powers))


# ---- what sees what --------------------------------------------------------------------------------------------------


def test_the_decoder_sees_no_later_token():
    source, target = ids(2, 7), ids(2, 9, seed=2)
    changed = target.clone()
    changed[:, 5] = changed[:, 5] % 95 + 1
    before, after = (model()(source, ONES, t).logits for t in (target, changed))
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(-1).all()


@pytest.mark.parametrize("place", [0, 6])
def test_the_encoder_sees_all_and_the_decoder_sees_the_encoder(place):
    source, target = ids(2, 7), ids(2, 9, seed=2)
    changed = source.clone()
    changed[:, place] = changed[:, place] % 95 + 1
    before, after = (model()(s, ONES, target) for s in (source, changed))
    # A part in 1,000 of the states' size, which no rounding is
    differences = (before.encoder_last_hidden_state - after.encoder_last_hidden_state).abs().amax(-1)
    assert (differences > 1e-3).all()
    assert ((before.logits - after.logits).abs().amax(-1) > 1e-3).all()


def test_padding_of_the_encoder_changes_nothing():
    target, lengths = ids(2, 9, seed=2), (7, 4)
    source, mask = ids(2, 7), torch.ones(2, 7, dtype=torch.long)
    source[1, 4:], mask[1, 4:] = 0, 0
    padded = model()(source, mask, target).logits
    for row, length in enumerate(lengths):
        alone = model()(source[row : row + 1, :length], mask[row : row + 1, :length], target[row : row + 1]).logits
        assert_close(padded[row], alone[0])
    unseen = source.masked_fill(mask == 0, 7)
    assert torch.equal(model()(unseen, mask, target).logits, padded)


# ---- learning --------------------------------------------------------------------------------------------------------


def test_loss_is_the_mean_over_labels_and_gradients_reach_every_part():
    source, target = ids(2, 7), ids(2, 9, seed=2)
    labels = target.clone()
    labels[0, :4] = labels[1, 7:] = IGNORED
    ours = model()
    found = ours(source, ONES, target, labels)
    logs = found.logits.log_softmax(-1)
    by_hand = [-logs[r, t, labels[r, t + 1]] for r in range(2) for t in range(8) if labels[r, t + 1] != IGNORED]
    assert len(by_hand) == 5 + 6 and torch.allclose(found.loss, sum(by_hand) / 11)
    found.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in ours.parameters())


def test_one_table_embeds_and_is_the_head_and_a_folder_opens_again(tmp_path):
    ours, source, target = model(), ids(2, 7), ids(2, 9, seed=2)
    assert sum(p.shape[0] == 96 for p in ours.parameters()) == 1
    ours.save_pretrained(tmp_path)
    again = EncoderDecoder.from_pretrained(tmp_path).eval()
    assert torch.equal(again(source, ONES, target).logits, ours(source, ONES, target).logits)


def copy_loss(see_the_source: bool, steps: int = 400) -> float:
    """Mean nats at the end of learning to copy 6 of 12 tokens, none twice, from the encoder.

    Without the encoder the best is the mean of log 12, log 11, …, log 7: 2.23.
    """
    torch.manual_seed(0)
    config = small_config(vocab_size=14, num_hidden_layers=1, num_key_value_heads=4, initializer_range=0.05)
    ours = EncoderDecoder(config)
    if not see_the_source:
        for block in ours.decoder:
            block.cross_attn.o_proj.requires_grad_(False).weight.zero_()
    optimizer = torch.optim.Adam(ours.parameters(), lr=5e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        source = torch.rand(32, 12).argsort(-1)[:, :6] + 2
        target = F.pad(source, (1, 0), value=1)
        loss = ours(source, torch.ones_like(source), target, target).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.slow
def test_copying_is_learned_through_cross_attention_and_not_without_it():
    assert copy_loss(see_the_source=True) < 0.1
    assert copy_loss(see_the_source=False) > 2.1


def test_a_gpt_of_the_same_blocks_is_the_decoder_without_cross_attention():
    """With cross-attention that adds nothing, the decoder is the GPT: same logits from the same weights."""
    ours, source, target = model(), ids(2, 7), ids(2, 9, seed=2)
    gpt = GPTForCausalLM(ours.config).eval()
    gpt.model.embed_tokens, gpt.model.norm, gpt.lm_head.weight = ours.embed_tokens, ours.norm, ours.embed_tokens.weight
    for block, theirs in zip(ours.decoder, gpt.model.layers, strict=True):
        torch.nn.init.zeros_(block.cross_attn.o_proj.weight)
        theirs.self_attn, theirs.mlp = block.self_attn, block.mlp
        theirs.input_layernorm, theirs.post_attention_layernorm = block.self_norm, block.mlp_norm
    assert_close(ours(source, ONES, target).logits, gpt(target).logits)
