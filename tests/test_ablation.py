"""The ablation: contenders are what their names say, get equal time, and the arithmetic of the table is right."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import ablation
from benchmarks.ablation import BASE, TINY, Recipe, Text, build, lr_factor, make_optimizer, work

SMALL = Recipe(**TINY)


def test_schedules_at_points_worked_out_by_hand() -> None:
    for schedule in ("cosine", "wsd"):
        assert lr_factor(schedule, 0.01) == pytest.approx(0.25)  # a quarter of the warm-up's 4 %
        assert lr_factor(schedule, 0.04) == 1
        assert lr_factor(schedule, 1) == pytest.approx(0)
    assert lr_factor("cosine", 0.52) == pytest.approx(0.5)  # half of what the warm-up leaves
    assert lr_factor("wsd", 0.75) == 1
    assert lr_factor("wsd", 0.8125) == pytest.approx(0.5)  # 1 − √(a quarter of the decay)


def test_without_qk_norm_the_size_of_queries_matters() -> None:
    ids = torch.arange(8)[None]
    for qk_norm in (True, False):
        model = build(replace(SMALL, qk_norm=qk_norm), 0)
        assert any("q_norm" in name or "k_norm" in name for name, _ in model.named_parameters()) == qk_norm
        before = model(ids).logits
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.weight *= 30
        assert torch.allclose(model(ids).logits, before, atol=1e-4) == qk_norm


def test_an_untied_head_is_a_matrix_of_its_own_and_adamws() -> None:
    for tied in (True, False):
        model = build(replace(SMALL, tied=tied), 0)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        _, tables, _ = make_optimizer(SMALL, model).param_groups
        assert len(tables["params"]) == (1 if tied else 2) and not tables["use_muon"]


def test_adamw_alone_has_every_parameter_at_one_learning_rate() -> None:
    recipe = replace(SMALL, optimizer="adamw", lr=0.5)
    groups = make_optimizer(recipe, build(recipe, 0)).param_groups
    assert all(not g["use_muon"] and g["lr"] == 0.5 and g["betas"] == (0.9, 0.95) for g in groups)


def test_what_costs_the_same_gets_the_same_steps() -> None:
    assert work(BASE) == work(replace(BASE, muon_lr=0.04, lr=1.0, qk_norm=False, schedule="wsd", seconds=9.0))
    others = [replace(BASE, **change) for change in ({"optimizer": "adamw"}, {"rows": 8}, {"tied": False})]
    assert work(BASE) not in map(work, others)


def test_held_out_bits_of_a_model_that_knows_nothing() -> None:
    text, model = Text(100_000), build(SMALL, 0)
    torch.nn.init.zeros_(model.lm_head.weight)
    packed = text(SMALL.vocabulary, "validation")
    bits = math.log2(SMALL.vocabulary) * packed.tokens / packed.bytes
    assert ablation.held_out(model, text, SMALL.vocabulary) == pytest.approx(bits, rel=1e-3)


def test_quick_run_resumes_and_its_ratio_is_of_its_own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--quick", "--seeds", "0", "1", "--bytes", "1000000", "--output", str(tmp_path)]
    first = ablation.main(arguments)
    runs = [json.loads(line) for line in (tmp_path / "ablation.jsonl").read_text().splitlines()]
    assert [run["seed"] for run in runs] == [0] * 4 + [1] * 4
    base, adamw = (first["contenders"][name] for name in ("base", "adamw-3e-3"))
    assert base["difference"] == 0 and adamw["difference"] == pytest.approx(adamw["bpb"] - base["bpb"], abs=2e-4)
    assert first["ratio"] == pytest.approx(adamw["bpb"] / base["bpb"], abs=1e-3)
    monkeypatch.setattr(ablation, "train", None)  # a second call makes no run again
    assert ablation.main(arguments) == first
