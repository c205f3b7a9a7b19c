"""Muon and AdamW behind one optimizer: each half moves as torch's own does, and resume is exact."""

import copy

import torch
from torch import nn
from transformers import Qwen3Config

from pipeline.model.gpt import GPTForCausalLM
from pipeline.model.optim import MuonFactory

SETTINGS = {"muon_learning_rate": 0.02, "learning_rate": 1e-3, "weight_decay": 0.1, "adam_beta2": 0.95}


def tiny() -> nn.Module:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    return GPTForCausalLM(config).train()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        ids = torch.randint(32, (4, 8), generator=torch.Generator().manual_seed(step))
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_every_parameter_is_in_one_half_and_hidden_matrices_are_muons() -> None:
    model = tiny()
    optimizer = MuonFactory()(model, **SETTINGS)
    muon = {id(p) for g in optimizer.param_groups if g["use_muon"] for p in g["params"]}
    all_of_them = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(all_of_them) == sorted(id(p) for p in model.parameters())
    names = {name for name, p in model.named_parameters() if id(p) in muon}
    assert names and all(name.endswith("proj.weight") for name in names)


def test_each_half_moves_as_torchs_own() -> None:
    ours, theirs = tiny(), tiny()
    optimizer = MuonFactory()(ours, **SETTINGS)
    hidden = [p for n, p in theirs.named_parameters() if n.endswith("proj.weight")]
    rest = [p for n, p in theirs.named_parameters() if not n.endswith("proj.weight")]
    muon = torch.optim.Muon(hidden, lr=0.02, weight_decay=0.1)
    adamw = torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    train(ours, optimizer, range(3))
    for step in range(3):
        ids = torch.randint(32, (4, 8), generator=torch.Generator().manual_seed(step))
        theirs(ids, labels=ids).loss.backward()
        for half in (muon, adamw):
            half.step()
            half.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_scheduler_reaches_both_halves() -> None:
    model = tiny()
    optimizer = MuonFactory()(model, **SETTINGS)
    before = copy.deepcopy(model.state_dict())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.0)
    train(model, optimizer, range(2))
    assert schedule.get_last_lr() == [0.0, 0.0, 0.0]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_resume_is_exact_to_the_bit() -> None:
    whole, halves = tiny(), tiny()
    train(whole, MuonFactory()(whole, **SETTINGS), range(6))
    first = MuonFactory()(halves, **SETTINGS)
    train(halves, first, range(3))
    saved = copy.deepcopy(first.state_dict())
    second = MuonFactory()(halves, **SETTINGS)
    second.load_state_dict(saved)
    train(halves, second, range(3, 6))
    for a, b in zip(whole.parameters(), halves.parameters(), strict=True):
        assert torch.equal(a, b)
