"""What the benchmarks compute from seconds, and that the course's models are what their names say."""

import json

import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks import course, memory, ppo
from benchmarks.common import compare


def test_compare_by_hand():
    seconds = {
        ("ours", "fp32"): [1.0, 1.0, 2.0],
        ("ours", "bf16"): [0.5, 0.4, 1.0],
        ("qwen3", "fp32"): [2.0, 3.0, 4.0],
        ("gpt2", "fp32"): [3.0, 3.0, 6.0],
        ("qwen3", "bf16 compiled"): [1.0, 1.2, 2.5],
    }
    result = compare(seconds, tokens=600)
    assert result["best"] == "ours bf16" and result["best_peer"] == "qwen3 bf16 compiled"
    assert result["ratio"] == 2.5  # the median of 2, 3 and 2.5: within a round, not of medians
    assert result["ratio_fp32"] == 2.0  # of 2, 3 and 2, against Qwen3, the faster peer in fp32
    assert "ratio_bf16" not in result  # no peer ran it
    assert result["ours_bf16_tokens_per_s"] == 1200


def test_a_model_of_the_course_without_mlp_is_attention_alone():
    ids = torch.randint(1, course.VOCABULARY, (2, 16))
    model = course.gpt(1, mlp=False)
    block = model.model.layers[0]
    x = torch.randn(2, 16, course.WIDTH)
    assert not block.mlp(x).any()
    course.loss_of(model, course.masked(list(ids))).backward()
    assert block.mlp.up_proj.weight.grad is None and block.self_attn.v_proj.weight.grad.any()


def test_without_its_mask_attention_sees_the_token_it_is_asked_for():
    ids = torch.randint(1, course.VOCABULARY, (1, 16))
    changed = ids.clone()
    changed[0, -1] = ids[0, -1] % 7 + 1
    model = course.gpt(1)
    everything = torch.zeros(1, 1, 16, 16)

    def first(ids, mask):
        return model(ids, attention_mask=mask).logits[0, 0]

    with torch.no_grad():
        assert torch.equal(first(ids, None), first(changed, None))
        assert not torch.allclose(first(ids, everything), first(changed, everything))


@pytest.mark.slow
def test_course_runs_and_ends_in_a_json_line(capsys):
    line = course.main(["--quick"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == line
    figures = line["bits_per_byte"]
    assert list(figures) == ["uniform", "bigram, counted", *(course.STEPS | course.INSTRUCTION_STEPS)]
    assert figures["GPT: four blocks"][0] < figures["embedding and head"][0] < figures["uniform"][0]


def test_one_table_of_all(capsys):
    figures = {"ratio": 1.234, "ratio_fp32": 1.1}
    benchmarks.show(
        {
            "train": {"shapes": {"wide": figures, "narrow": figures}},
            "sample": {"shapes": {"one": figures}},
            "ppo": figures | {"ratio_one_trunk": 3.21},
            "nanogpt": {"ratio": 1.18},
        }
    )
    shown = capsys.readouterr().out
    assert all(part in shown for part in ("wide", "narrow", "1.23", "1.10", "one trunk", "3.21", "1.18"))


@pytest.mark.slow
def test_flat_reports_every_tenth(capsys):
    line = ppo.main(["--flat", "--updates", "3"])
    assert line["updates"] == len(line["seconds"]) == len(line["memory_mb"]) == 3
    assert line["ratio"] == round(line["seconds"][2] / line["seconds"][1], 3)
    assert line["memory_ratio"] == round(line["memory_mb"][2] / line["memory_mb"][1], 3)
    assert "tenth  3" in capsys.readouterr().out


@pytest.mark.slow
def test_memory_is_that_of_each_way_alone(capsys):
    line = memory.main(["--quick"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == line
    peaks = {way: figures["peak_mb"] for way, figures in line["ways"].items()}
    assert list(peaks) == list(memory.WAYS) and line["ratio"] == round(peaks["shared"] / peaks["whole"], 3)
    scores = {round(figures["scores"], 4) for figures in line["ways"].values()}
    assert len(scores) == 1 and all(abs(figures["kl"]) < 1e-5 for figures in line["ways"].values())
