"""The networks of a run: what policy, reference and critic must be, and how they stand beside each other."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from pipeline.errors import UserError
from pipeline.model.load import keep_products_in_bf16
from pipeline.model.lora import is_lora, without_wrapper
from pipeline.ppo.advantages import ESTIMATORS
from pipeline.ppo.algorithm import length_mask
from pipeline.ppo.config import PPOConfig
from pipeline.ppo.forward import ReferenceLogprobs, TokenLogprobs, TokenLogprobsAndValues, TokenValues, value_head
from pipeline.text.lengths import positions_of
from pipeline.text.tokenizer import check_fits, stop_ids

COMPARED = 32  # tokens of a prompt on which a model's logits are compared with its head's


@dataclass
class Models:
    """The networks of a run on their device, each with the forward pass that PPO needs of it.

    `critic` is a sequence classifier, with `share_trunk` the head on the policy's trunk, and None where the advantage
    estimator needs none. `critic_forward` is None in both of the latter cases: no network of its own learns values.
    """

    policy: nn.Module
    critic: nn.Module | None
    policy_forward: TokenLogprobs
    reference_forward: TokenLogprobs
    critic_forward: TokenValues | None

    @property
    def reference(self) -> nn.Module:
        """The model that answers as the reference."""
        return self.reference_forward.model


def build_models(
    policy: nn.Module, reference: nn.Module | None, critic: nn.Module | None, args: PPOConfig, device: torch.device
) -> Models:
    """Put the networks on `device`, and make the reference and the value head that were not given."""
    policy = policy.to(device)
    if reference is not None and reference is not policy:
        reference_forward = TokenLogprobs(reference.to(device).requires_grad_(False), args.temperature)
    elif is_lora(policy):
        reference_forward = ReferenceLogprobs(policy, args.temperature)
    else:
        reference_forward = TokenLogprobs(copy.deepcopy(policy).requires_grad_(False), args.temperature)
    if args.share_trunk:
        head = value_head(policy).to(device)
        both = TokenLogprobsAndValues(policy, head, args.temperature, args.gradient_checkpointing)
        return Models(policy, head, both, reference_forward, None)
    policy_forward = TokenLogprobs(policy, args.temperature, args.gradient_checkpointing)
    if critic is None:
        return Models(policy, None, policy_forward, reference_forward, None)
    critic = critic.to(device)
    critic_forward = TokenValues(critic, args.gradient_checkpointing)
    return Models(policy, critic, policy_forward, reference_forward, critic_forward)


def follow_models(models: Models, prompts: list[list[int]], device: torch.device) -> list[str]:
    """See on the beginning of some prompts (token ids) whether PPO's log-probabilities are those of the models.

    Where a model's head is not the last step to its logits, they are taken from its forward pass from now on; returns a
    sentence about it.
    """
    rows = [torch.tensor([*ids[:COMPARED], ids[0]]) for ids in prompts]  # the last one is a token to predict
    ids = pad_sequence(rows, batch_first=True).to(device)
    lengths = torch.tensor([len(row) - 1 for row in rows], device=device)
    forwards = {"policy": models.policy_forward, "reference": models.reference_forward}
    gaps = {name: forward.follow(ids, length_mask(lengths, ids.shape[1])) for name, forward in forwards.items()}
    names = [name for name, forward in forwards.items() if forward.own_logits]
    if not names:
        return []
    return [
        f"the logits of {' and '.join(names)} are not those of the head alone: log-probabilities would be off by "
        f"{max(gaps[name] for name in names):.2g} nats a token, so they are taken from the model's own forward pass, "
        "which takes more time and memory"
    ]


def halve_reference(models: Models, args: PPOConfig) -> None:
    """Keep the reference's matrices in bf16, in which autocast reads them, where it is a copy that stays as it is."""
    if not args.ref_sync_updates and not is_lora(models.policy):
        keep_products_in_bf16(models.reference)


def check_models(
    policy: nn.Module,
    reference: nn.Module | None,
    critic: nn.Module | None,
    args: PPOConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> int | None:
    """Raise UserError where models, settings and tokenizer do not fit together; returns the tokens that all models can
    read, None where there is no limit."""
    for name, model in (("policy", policy), ("reference", reference)):
        if model is not None:
            _check_speaks(name, without_wrapper(model))
    _check_critic(critic, args)
    given = {"policy": policy, "reference": reference, "critic": critic}
    models = {name: without_wrapper(model) for name, model in given.items() if model is not None}
    for name, model in models.items():
        check_fits(tokenizer, embedding_count(model), f"the {name}")
    own = {id(p) for p in policy.parameters() if p.requires_grad}  # a frozen base may be shared (model/shared.py)
    if critic is not None and any(id(p) in own for p in critic.parameters()):
        raise UserError("the critic shares weights with the policy; give it weights of its own, or set share_trunk")
    if reference is not None and reference is not policy and any(id(p) in own for p in reference.parameters()):
        raise UserError(
            "the reference shares weights with the policy, which will be trained; pass None for a copy of the "
            "policy as it is now, or with LoRA for the policy with its adapter switched off"
        )
    if args.ref_sync_updates:
        if is_lora(policy):
            raise UserError(
                "ref_sync_updates: a policy with LoRA cannot hand its weights to a reference; set it to 0, or merge "
                "the adapter first"
            )
        if [p.shape for p in models.get("reference", policy).parameters()] != [p.shape for p in policy.parameters()]:
            raise UserError("ref_sync_updates: the reference has other shapes than the policy; set it to 0")
    contexts = [positions_of(model) for model in models.values()]
    return min((context for context in contexts if context is not None), default=None)


def _check_speaks(name: str, model: nn.Module) -> None:
    """Refuse what is no causal language model of transformers or ours."""
    if not hasattr(model, "get_input_embeddings") or not hasattr(model, "generate"):
        raise UserError(f"the {name} is a {type(model).__name__}; pass a causal language model of transformers")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"the {name} {type(model).__name__} has an encoder; pass a causal language model")


def _check_critic(critic: nn.Module | None, args: PPOConfig) -> None:
    name = args.advantage_estimator
    if not ESTIMATORS[name].needs_critic:
        if critic is not None:
            raise UserError(f"advantage_estimator {name} has no critic; pass none, or take gae")
    elif (critic is None) != args.share_trunk:
        raise UserError("pass a critic, or set share_trunk for a head on the policy's own trunk: one of the two")


def embedding_count(model: nn.Module) -> int:
    """Token ids that a model can read."""
    table: Any = without_wrapper(model).get_input_embeddings()
    return table.num_embeddings


def end_tokens_of(policy: nn.Module, tokenizer: Any, chat: bool) -> tuple[list[int], str | None]:
    """Ids that end an answer, those that the policy can say first; a warning if it can say none of them. `chat`: the
    prompts are conversations."""
    size = embedding_count(policy)
    ends = stop_ids(policy, tokenizer, chat)
    known = [token for token in ends if 0 <= token < size]
    if known:
        return known, None
    return ends, (
        f"the policy's end token {ends[0]} lies beyond its {size} embeddings, so no answer can end; set "
        "generation_config.eos_token_id"
    )
