"""The GPT, written out from scratch: embedding, rotary attention, SwiGLU, blocks, head.

The architecture is that of the Llama family: the decoder of "Attention Is All You Need" (arXiv 1706.03762) with RMSNorm
(1910.07467) before each part instead of LayerNorm after it, rotary positions (RoFormer, 2104.09864), grouped key/value
heads (GQA, 2305.13245) and a gated MLP (SwiGLU, 2002.05202). Its members differ in two things, which the config says:
Qwen2 (2407.10671) adds biases to queries, keys and values, Qwen3 (2505.09388) RMSNorm on queries and keys (QK-norm,
2302.05442); Llama (2302.13971), SmolLM2 and Mistral have neither. A GPT from random weights is a Qwen3. Configs and
names are stock, so a folder saved here *is* a stock checkpoint and a stock one opens here (tests/test_family.py).

Shapes: B batch, T tokens, D hidden, H query heads, G key/value heads (H a multiple of G), K head size, V vocabulary.
"""

import json
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers import modeling_outputs as outputs
from transformers.modeling_layers import GradientCheckpointingLayer

from pipeline.model import fast_cpu
from pipeline.model.family import FAMILY, biases, has_qk_norm, head_size, why_not_ours
from pipeline.model.logprobs import logprobs_from_hidden

IGNORED = -100  # a label that is not trained on, as everywhere in PyTorch


# ---- the parts -------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / √(mean(x²) + ε) ⊙ w over the last dimension, computed in fp32 (1910.07467, eq. 4)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # All in fp32: F.rms_norm warns of mixed types under bf16 autocast and leaves its fast path
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(self.weight.dtype)


def rotary_angles(positions: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """cos and sin of position · θ^(−2i/K) (2104.09864, eq. 15): positions (1 or B, T) → two (1 or B, T, 1, K/2), fp32.

    Computed at each forward: a non-persistent buffer would hold garbage after `from_pretrained`.
    """
    size = head_size(config)
    exponents = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size
    angles = (positions[..., None].float() * config.rope_parameters["rope_theta"] ** -exponents)[:, :, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (x_i, x_{i+K/2}) of a (B, T, heads, K) tensor by its position's angle."""
    cos, sin = angles
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attention_bias(
    tokens: int, past: int, attention_mask: Tensor | None, position_ids: Tensor | None, device: torch.device
) -> Tensor | None:
    """What is added to the attention scores, (B, 1, T, past + T) of 0 and −inf; None if plain causal masking is exact.

    Plain causal masking serves no padding and padding on the right. Left padding and documents packed into one row
    (position_ids that start again, no attention_mask, as TRL packs them) need the explicit mask. `attention_mask` is
    (B, past + T) with 1 for real tokens, or a ready 4-D mask.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask
    keys = torch.arange(past + tokens, device=device)
    allowed = keys <= keys[past:, None]  # (T, past + T): a query sees itself and what came before
    if attention_mask is not None:
        real = attention_mask.bool()
        if past == 0 and bool((real[:, 1:] <= real[:, :-1]).all()):
            return None
        # A pad query may look at itself: a row with nothing allowed would give NaN
        allowed = allowed & (real[:, None, :] | (keys == keys[past:, None]))
    elif past == 0 and position_ids is not None:
        step = F.pad(position_ids.diff(dim=-1), (1, 0), value=1)
        document = (step != 1).cumsum(-1)  # (B, T): the number of the document a token belongs to
        if not bool(document.any()):
            return None
        allowed = allowed & (document[:, None, :] == document[:, :, None])
    elif past == 0 or tokens == 1:
        return None
    allowed = allowed if allowed.dim() == 3 else allowed[None]
    return torch.zeros(allowed.shape, device=device).masked_fill_(~allowed, float("-inf"))[:, None]


def residual_std(config: Any) -> float:
    """0.02/√(2·layers): 2·layers projections add to the residual stream, whose variance should not grow (GPT-2)."""
    return config.initializer_range / (2 * config.num_hidden_layers) ** 0.5


class Attention(nn.Module):
    """Masked multi-head self-attention, softmax(q·kᵀ/√K)·v, with grouped heads and rotary positions."""

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.layer, self.head_dim, self.dropout = layer, head_size(config), config.attention_dropout
        heads, groups = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
        self.grouped = heads != groups
        bias_in, bias_out, _ = biases(config)
        self.q_proj = nn.Linear(config.hidden_size, heads * self.head_dim, bias=bias_in)
        self.k_proj = nn.Linear(config.hidden_size, groups * self.head_dim, bias=bias_in)
        self.v_proj = nn.Linear(config.hidden_size, groups * self.head_dim, bias=bias_in)
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=bias_out)
        self.o_proj.init_std = residual_std(config)  # type: ignore[assignment]
        self.q_norm, self.k_norm = (
            RMSNorm(self.head_dim, config.rms_norm_eps) if has_qk_norm(config) else nn.Identity() for _ in range(2)
        )

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], bias: Tensor | None, cache=None) -> Tensor:
        """x (B, T, D) → (B, T, D); `bias` as from attention_bias; `cache` is a transformers Cache or None."""
        heads = (*x.shape[:-1], -1, self.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).view(heads)), angles)  # (B, T, H, K)
        k = rotate(self.k_norm(self.k_proj(x).view(heads)), angles)  # (B, T, G, K)
        v = self.v_proj(x).view(heads)  # (B, T, G, K)
        # PyTorch's attention is fastest in fp32 on CPU: leave autocast around it
        dtype = torch.float32 if x.device.type == "cpu" else v.dtype
        q, k, v = (part.transpose(1, 2).to(dtype) for part in (q, k, v))
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        causal, mask = bias is None and q.shape[2] > 1, None if bias is None else bias.to(dtype)
        dropout = self.dropout if self.training else 0.0
        with torch.autocast(x.device.type, enabled=False):  # softmax(q·kᵀ/√K + bias)·v
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=self.grouped)
        return self.o_proj(out.transpose(1, 2).flatten(2).to(x.dtype))


class MLP(nn.Module):
    """SwiGLU, W_down(silu(W_gate x) ⊙ W_up x) (2002.05202, eq. 6)."""

    def __init__(self, config: Any):
        super().__init__()
        bias = biases(config)[2]
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)
        self.down_proj.init_std = residual_std(config)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + mlp(norm(x)): the residual stream that every block reads and adds to."""

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor], bias: Tensor | None, past_key_values=None, keep=None
    ) -> Tensor:
        """x (B, T, D) → (B, T, D); with `keep` (B, T) bool → (1, N, D), those places alone: the MLP needs no others."""
        if bias is None and past_key_values is None and fast_cpu.can_run(self, x):
            return fast_cpu.run(self, x, angles, keep)  # what the next lines say, faster on CPU
        x = x + self.self_attn(self.input_layernorm(x), angles, bias, past_key_values)
        x = x if keep is None else x[keep][None]
        return x + self.mlp(self.post_attention_layernorm(x))


# ---- the models ------------------------------------------------------------------------------------------------------


class GPTPreTrainedModel(PreTrainedModel):
    """What the GPT's classes share: config, initialisation, saving under the stock names."""

    config_class = PreTrainedConfig
    config: Any
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["Block"]  # type: ignore[misc]
    _supports_sdpa = True
    stock_suffix = "Model"

    @property
    def stock_architecture(self) -> str:
        return FAMILY[self.config.model_type] + self.stock_suffix

    def __init__(self, config: PreTrainedConfig):
        if reason := why_not_ours(config):
            raise ValueError(f"this GPT does not compute {reason}; open the model through transformers' Auto classes")
        super().__init__(config)

    @classmethod
    def from_pretrained(cls, path: str | PathLike, *args, config: Any = None, **kwargs) -> Self:  # type: ignore[override]
        """As transformers opens a model; the folder's config says which member of the family it is."""
        if config is None:
            labels = {"num_labels": kwargs.pop("num_labels")} if "num_labels" in kwargs else {}
            config = AutoConfig.from_pretrained(path, trust_remote_code=False, **labels)
        return super().from_pretrained(path, *args, config=config, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """N(0, 0.02), except where a Linear carries its own `init_std`."""
        std = getattr(module, "init_std", None)
        if isinstance(module, nn.Linear) and std is not None:
            init.normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def save_pretrained(self, save_directory: str | PathLike, is_main_process: bool = True, *args, **kwargs) -> None:
        """As transformers saves, with the stock class under "architectures", so that any tool opens the folder."""
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        path = Path(save_directory) / "config.json"
        if is_main_process and path.exists():
            config = json.loads(path.read_text())
            path.write_text(json.dumps(config | {"architectures": [self.stock_architecture]}, indent=2) + "\n")


class GPTModel(GPTPreTrainedModel):
    """Tokens to hidden states: embedding, blocks, last norm."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        keep: Tensor | None = None,
        **_,
    ) -> outputs.BaseModelOutputWithPast:
        """input_ids (B, T) long → .last_hidden_state (B, T, D).

        attention_mask (B, T) is 1 for real tokens (None: all); position_ids (1 or B, T) default to 0, 1, 2, …
        `past_key_values` is a transformers Cache. Of `keep` (B, T) bool only those places are wanted:
        .last_hidden_state is then (N, D), row by row, and the last MLP runs on them alone.
        """
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        bias = attention_bias(x.shape[1], past, attention_mask, position_ids, x.device)
        if position_ids is None:
            position_ids = torch.arange(past, past + x.shape[1], device=x.device)[None]
        angles = rotary_angles(position_ids, self.config)
        for number, block in enumerate(self.layers, 1):
            last = number == len(self.layers)
            x = block(x, angles, bias, past_key_values=past_key_values, keep=keep if last else None)
        states = self.norm(x)
        states = states if keep is None else states[0] if self.layers else states[keep]
        return outputs.BaseModelOutputWithPast(last_hidden_state=states, past_key_values=past_key_values)


class GPTForCausalLM(GPTPreTrainedModel, GenerationMixin):
    """The language model: p(next token | tokens so far) = softmax(lm_head(hidden))."""

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}  # type: ignore[misc]
    stock_suffix = "ForCausalLM"

    def __init__(self, config: Any):
        super().__init__(config)
        self.model = GPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        logits_to_keep: int | Tensor = 0,
        **_,
    ) -> outputs.CausalLMOutputWithPast:
        """Logits (B, T, V), and the mean cross-entropy of labels (B, T) (−100 = ignored) where they are given.

        The loss is divided by `num_items_in_batch` (Trainer's count over accumulated batches), else by the number of
        labels. While training with labels, logits are None: the loss needs them only in chunks.
        """
        hidden = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds).last_hidden_state
        logits = loss = None
        if labels is not None:
            loss = self.loss(hidden, labels, attention_mask, num_items_in_batch)
        if labels is None or not self.training:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, keep])
        return outputs.CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def loss(
        self, hidden: Tensor, labels: Tensor, attention_mask: Tensor | None, num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        """Cross-entropy of labels[:, t + 1] under hidden[:, t], over the labels that count, in chunks of logits."""
        targets = labels[:, 1:]
        counts = targets != IGNORED
        if attention_mask is not None and attention_mask.dim() == 2:
            counts = counts & attention_mask[:, :-1].bool()  # under left padding a pad would predict the first token
        hidden, targets = hidden[:, :-1][counts], targets[counts]  # (N, D), (N,)
        logprobs, _ = logprobs_from_hidden(hidden, targets, self.lm_head, self.config.vocab_size)
        return -logprobs.sum() / (max(1, len(targets)) if num_items_in_batch is None else num_items_in_batch)


class GPTForSequenceClassification(GPTPreTrainedModel):
    """The reward model or critic: a linear head `score` read at the last token that is not padding."""

    stock_suffix = "ForSequenceClassification"

    def __init__(self, config: Any):
        super().__init__(config)
        self.num_labels = config.num_labels or 1
        self.model = GPTModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.score.init_std = (config.hidden_size + 1) ** -0.5  # the N+ implementation details, 2403.17031
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **_,
    ) -> outputs.SequenceClassifierOutputWithPast:
        """Logits (B, num_labels) at the rightmost token that is not config.pad_token_id, as the stock classes pool."""
        pad = self.config.pad_token_id
        if pad is None and len(input_ids) > 1:
            raise ValueError("config.pad_token_id is not set: the last token of each row cannot be told from padding")
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (positions * (input_ids != pad)).argmax(-1) if pad is not None else positions[-1:]
        keep = positions == last[:, None]  # (B, T): one place a row
        logits = self.score(self.model(input_ids, attention_mask, position_ids, keep=keep).last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return outputs.SequenceClassifierOutputWithPast(loss=loss, logits=logits)
