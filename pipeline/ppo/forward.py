"""The two forward passes of PPO, as modules that DistributedDataParallel can wrap.

Both read right-padded rows under plain causal attention: padding comes after every real token, so none can see it and
no attention mask is needed. Both look only at the places that predict a response token, laid end to end, so nothing of
shape batch × length × vocabulary ever exists.
"""

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.ppo.algorithm import logprobs_from_hidden

# Steps between head and softmax that some architectures take (Gemma 2, Cohere, Granite).
LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0, so that two forward passes with equal weights agree in any mode."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.eval()


class TokenLogprobs(nn.Module):
    """log π(response token | what came before) of a causal language model, at the sampling temperature."""

    def __init__(self, model: nn.Module, temperature: float) -> None:
        super().__init__()
        for name in LOGIT_TRANSFORMS:
            if getattr(model.config, name, None) not in (None, 1, 1.0):
                raise UserError(f"the policy's config has {name}, which PPO does not apply; take another model")
        disable_dropout(model)
        self.model, self.temperature = model, temperature

    def forward(self, ids: Tensor, predicts: Tensor, entropy: bool = False) -> tuple[Tensor, Tensor | None]:
        """`ids` (b, t) long, `predicts` (b, t) bool as `response_positions` gives it → (N,) float32, row by row."""
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        targets = ids[:, 1:][predicts[:, :-1]]
        head = self.model.get_output_embeddings()
        return logprobs_from_hidden(hidden[predicts], targets, head, head.weight.shape[0], self.temperature, entropy)


class TokenValues(nn.Module):
    """V(s_t) for every response token: the scalar head `score` of a sequence classifier, before the token is read."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not isinstance(getattr(model, "score", None), nn.Linear) or model.score.out_features != 1:
            raise UserError("the critic must be a sequence classifier with one label and a linear head named `score`")
        disable_dropout(model)
        self.model = model

    def forward(self, ids: Tensor, predicts: Tensor) -> Tensor:
        """`ids` (b, t) long, `predicts` (b, t) bool → (N,) float32 in the order of TokenLogprobs."""
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[predicts]
        # The head is one row: fp32 costs nothing, and bf16 would round returns near 1 to steps of 0.008.
        with torch.autocast(hidden.device.type, enabled=False):
            return self.model.score(hidden.float()).squeeze(-1)
