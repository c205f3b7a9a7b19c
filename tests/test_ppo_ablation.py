"""The ablation of PPO: its arithmetic by hand, its contenders' options, and one run of it from its own record."""

import itertools
import json
import statistics

import pytest

from benchmarks import ppo_ablation
from pipeline.runtime.command_line import parse
from pipeline.runtime.ppo_arguments import PPOArguments


def test_expected_best_is_the_mean_over_all_draws():
    proxy, gold = [0.3, -1.0, 2.0, 0.5, 1.1], [1.0, 2.0, 3.0, 4.0, 5.0]
    for n in range(1, 6):
        draws = itertools.combinations(range(5), n)
        expected = statistics.mean(gold[max(draw, key=lambda i: proxy[i])] for draw in draws)
        assert ppo_ablation.expected_best(proxy, gold, n) == pytest.approx(expected)


def test_every_contender_is_a_configuration_of_the_preset():
    base = parse(PPOArguments, ["--config", "configs/stories/ppo.yaml"])
    for name, options in ppo_ablation.CHANGES.items():
        made = parse(PPOArguments, ["--config", "configs/stories/ppo.yaml", *options])
        changed = [field for field in vars(made) if getattr(made, field) != getattr(base, field)]
        assert len(changed) == len(options) // 2, f"{name}: {options} change {changed}"


def rows(gold_before, gold_after, kl=4.0):
    return [
        {"eval/gold": gold, "eval/kl": kl, "eval/length": 40.0, "eval/distinct_2": 0.5}
        for gold in (gold_before, gold_after)
    ]


def test_differences_are_paired_by_seed(capsys):
    found = {
        "base": {"a": rows(0.5, 0.6), "b": rows(0.4, 0.8)},
        "no KL penalty": {"a": rows(0.5, 0.5), "b": rows(0.4, 0.5)},
    }
    entry = ppo_ablation.report(found)["no KL penalty"]
    assert entry["difference"] == pytest.approx(-0.2) and entry["error"] == pytest.approx(0.1)
    assert entry["gain"] == pytest.approx(0.05) and entry["gold"] == [0.5, 0.5]
    assert "-0.200 ± 0.100" in capsys.readouterr().out


def test_runs_on_record_are_not_made_again_and_drawn(tmp_path, capsys):
    for run, seed in (("one", 0), ("two", 1)):
        (tmp_path / run / "sft").mkdir(parents=True)
        (tmp_path / run / "sft" / "stage.json").write_text(json.dumps({"seed": seed}))
        for name in ("base", "no-KL-penalty"):
            folder = tmp_path / "out" / name / run
            folder.mkdir(parents=True)
            (folder / "stage.json").write_text("{}")
            lines = [{"step": 0} | row | {"eval/proxy": 0.1} for row in rows(0.5, 0.6)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (tmp_path / "out" / "best-of-n").mkdir(exist_ok=True)
        points = [{"n": 1, "eval/kl": 0.0, "eval/gold": 0.5, "eval/proxy": 0.0}]
        (tmp_path / "out" / "best-of-n" / f"{run}.json").write_text(json.dumps(points))
    picture = tmp_path / "curve.png"
    line = ppo_ablation.main(
        [
            "--runs",
            str(tmp_path / "one"),
            str(tmp_path / "two"),
            "--only",
            "no KL penalty",
            "--output",
            str(tmp_path / "out"),
            "--curve",
            str(picture),
        ]
    )
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == line
    assert line["ratio"] == 1.2 and picture.stat().st_size > 5000


def test_a_run_without_a_model_is_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="has no SFT model"):
        ppo_ablation.main(["--runs", str(tmp_path)])
