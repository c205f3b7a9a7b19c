"""The encoder-decoder of "Attention Is All You Need" (1706.03762), with the parts of gpt.py, which is to be read first.

The paper's model translates: an encoder reads the source, a decoder writes the target token by token. Here the source
is an instruction and the target a story. Three kinds of attention (section 3.2.3), one formula, softmax(q·kᵀ/√K)·v:

    encoder      q, k, v from the source; nothing is masked but padding: the source is known as a whole
    decoder      q, k, v from the target; masked: a token sees itself and those before it
    cross        q from the target, k and v from the encoder's output; nothing is masked but the source's padding

A GPT is the decoder alone: it reads the instruction as the beginning of its own text, so it needs no cross-attention.
As in gpt.py, RMSNorm stands before each part, the MLP is SwiGLU, and rotary positions replace the paper's sinusoids.

Shapes: B batch, S source tokens, T target tokens, D hidden, H heads, K head size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3Config
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import Seq2SeqLMOutput

from pipeline.model.gpt import IGNORED, MLP, Attention, Block, GPTPreTrainedModel, RMSNorm, residual_std, rotary_angles


class CrossAttention(nn.Module):
    """softmax(q·kᵀ/√K)·v with q = W_q x of the decoder, k = W_k m and v = W_v m of the encoder's output m (eq. 1).

    Queries and keys are not rotated: positions in two different texts have no distance.
    """

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.head_dim = config.head_dim
        size = config.num_attention_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(config.hidden_size, size, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(size, config.hidden_size, bias=False)
        self.o_proj.init_std = residual_std(config)  # type: ignore[assignment]

    def forward(self, x: Tensor, memory: Tensor, bias: Tensor) -> Tensor:
        """x (B, T, D) and the encoder's output `memory` (B, S, D) → (B, T, D); `bias` as from padding_bias."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, T, K)
        k = self.k_proj(memory).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, S, K)
        v = self.v_proj(memory).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, S, K)
        scores = q @ k.transpose(-1, -2) / self.head_dim**0.5 + bias  # (B, H, T, S)
        weights = scores.softmax(dim=-1)  # of each target token over the source: S numbers that add up to 1
        out = weights.to(v.dtype) @ v  # (B, H, T, K)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class DecoderBlock(GradientCheckpointingLayer):
    """Self-attention, cross-attention and MLP, each x + part(norm(x))."""

    def __init__(self, config: Qwen3Config, layer: int):
        super().__init__()
        self.self_attn, self.cross_attn, self.mlp = Attention(config, layer), CrossAttention(config), MLP(config)
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_norm, self.cross_norm, self.mlp_norm = (RMSNorm(size, eps) for _ in range(3))

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], memory: Tensor, bias: Tensor) -> Tensor:
        """x (B, T, D), the encoder's output (B, S, D) → (B, T, D); `bias` hides the source's padding."""
        x = x + self.self_attn(self.self_norm(x), angles, bias=None)  # no bias: masked, as in the GPT
        x = x + self.cross_attn(self.cross_norm(x), memory, bias)
        return x + self.mlp(self.mlp_norm(x))


def padding_bias(attention_mask: Tensor) -> Tensor:
    """(B, S) with 1 for real tokens → (B, 1, 1, S) of 0 and −inf, to be added to the scores of all heads and queries.

    Every row needs a real token: a softmax over nothing is NaN.
    """
    bias = torch.zeros(attention_mask.shape, device=attention_mask.device)
    return bias.masked_fill_(attention_mask == 0, float("-inf"))[:, None, None]


class EncoderDecoder(GPTPreTrainedModel):
    """p(next target token | source, target so far) = softmax(E·hidden).

    `config.num_hidden_layers` is the number of the encoder's blocks and of the decoder's. One table E (V, D) embeds
    source and target and is the head too (section 3.4).
    """

    stock_architecture = "EncoderDecoder"  # no stock class has these parts

    def __init__(self, config: Qwen3Config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.encoder = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.decoder = nn.ModuleList(DecoderBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.encoder_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def embed(self, ids: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Token ids (B, T) → their embeddings (B, T, D) and the angles of positions 0, 1, 2, …"""
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        return self.embed_tokens(ids), rotary_angles(positions, self.config)

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Source tokens (B, S) long → their states (B, S, D). A bias that hides only padding lets all see all."""
        x, angles = self.embed(input_ids)
        for block in self.encoder:
            x = block(x, angles, padding_bias(attention_mask))
        return self.encoder_norm(x)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor, labels: Tensor | None = None
    ) -> Seq2SeqLMOutput:
        """Source (B, S) with its mask and target (B, T), both padded on the right → logits (B, T, V).

        With labels (B, T) (−100 = ignored) also the mean cross-entropy of labels[:, t + 1] under logits[:, t].
        """
        memory = self.encode(input_ids, attention_mask)
        x, angles = self.embed(decoder_input_ids)
        for block in self.decoder:
            x = block(x, angles, memory, padding_bias(attention_mask))
        logits, loss = F.linear(self.norm(x), self.embed_tokens.weight), None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED)
        return Seq2SeqLMOutput(loss=loss, logits=logits, encoder_last_hidden_state=memory)
