"""The README's table and picture and the thresholds of a preset, from a run's files: by hand, and what fails."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, make
from fake_run import POLICIES, write_run
from matplotlib.image import imread

from benchmarks import check, figures
from pipeline.errors import UserError
from pipeline.report.gather import read_run

GOOD = {"kl": 7.5, "distinct_2": 0.45}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def change(run: Path, policy: str, **figures: float | None) -> None:
    file = run / "evaluate/scores.json"
    scores = json.loads(file.read_text())
    scores["policies"][policy] |= figures
    file.write_text(json.dumps(scores))


def give_gold(run: Path, **golds: list[float]) -> None:
    """Replace the samples by one prompt for each gold score."""
    rows = [
        {"index": i, "prompt": f"prompt {i}", "policy": policy, "completion": "a", "gold": gold, "proxy": 0.0}
        for policy, values in golds.items()
        for i, gold in enumerate(values)
    ]
    (run / "evaluate/samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def failing(run: Path) -> list[str]:
    return [finding.expected for finding in check.check_all([read_run(run)], ROOT / "configs") if not finding.holds]


# ---- thresholds -----------------------------------------------------------------------------------------------------


def test_paired_difference_by_hand(run: Path) -> None:
    give_gold(run, ppo=[0.9, 0.8, 1.0, 0.5], sft=[0.5, 0.8, 0.4, 0.5])
    difference, error = check.paired_difference(read_run(run), "ppo", "sft")
    assert difference == pytest.approx(0.25)  # of 0.4, 0, 0.6 and 0
    # Squared distances 0.0225 + 0.0625 + 0.1225 + 0.0625 = 0.27, over 3, over 4 prompts
    assert error == pytest.approx((0.27 / 3 / 4) ** 0.5) == pytest.approx(0.15)


def test_scores_that_do_not_pair_are_a_user_error(run: Path) -> None:
    give_gold(run, ppo=[0.9, 0.8], sft=[0.9, 0.8, 0.7])
    with pytest.raises(UserError, match="ppo and sft have no gold scores to be paired"):
        check.paired_difference(read_run(run), "ppo", "sft")


@pytest.mark.parametrize(
    ("figures", "fails"),
    [
        ({}, None),
        ({"gold": 0.739}, "policies.ppo.gold at least 0.74"),
        ({"kl": 8.01}, "policies.ppo.kl at most 8"),
        ({"distinct_2": 0.41}, "policies.ppo.distinct_2 at least 0.42"),
        ({"length": 1.21 * POLICIES["sft"]["length"]}, "policies.ppo.length within 20% of policies.sft.length"),
        ({"length": 0.79 * POLICIES["sft"]["length"]}, "policies.ppo.length within 20% of policies.sft.length"),
        ({"kl": None}, "policies.ppo.kl at_most 8"),
    ],
)
def test_each_threshold_of_stories_fails_alone(run: Path, figures: dict, fails: str | None) -> None:
    change(run, "ppo", **GOOD | figures)
    assert failing(run) == ([fails] if fails else [])


def test_a_gain_of_less_than_two_standard_errors_fails(run: Path) -> None:
    change(run, "ppo", **GOOD)
    give_gold(run, ppo=[0.9, 0.9, 0.9], pretrain=[0.5, 0.6, 0.7], best_of_16=[0.9, 0.9, 0.8])  # 0.033 ± 0.033
    assert failing(run) == ["PPO's gold above Best-of-16's by more than 2 standard errors"]


@pytest.mark.parametrize(
    ("name", "thresholds", "words", "found", "holds"),
    [
        ("policies.ppo.gold", {"at_least_plus": [0.2, "policies.sft.gold"]}, "+ 0.2 = 0.730", "0.800", True),
        ("policies.ppo.gold", {"at_least_plus": [0.3, "policies.sft.gold"]}, "+ 0.3 = 0.830", "0.800", False),
        ("policies.ppo.gold", {"at_least_times": [1.5, "policies.sft.gold"]}, "× 1.5 = 0.795", "0.800", True),
        ("policies.ppo.gold", {"at_least_times": [2, "policies.sft.gold"]}, "× 2 = 1.060", "0.800", False),
        ("policies.ppo.kl", {"at_most_times": [10, "policies.sft.gold"]}, "× 10 = 5.300", "5.200", True),
        ("policies.ppo.kl", {"at_most_times": [9, "policies.sft.gold"]}, "× 9 = 4.770", "5.200", False),
        ("policies.ppo.kl", {"at_most_times": [9, "policies.sft.nothing"]}, "= nan", "5.200", False),
    ],
)
def test_thresholds_made_of_another_figure(
    run: Path, name: str, thresholds: dict, words: str, found: str, holds: bool
) -> None:
    change(run, "ppo", gold=0.8, kl=5.2)
    change(run, "sft", gold=0.53)
    [finding] = check.check(read_run(run), {name: thresholds})
    assert finding.expected.endswith(words) and (finding.found, finding.holds) == (found, holds)


def test_a_gain_by_another_judge_is_paired_too(run: Path) -> None:
    give_gold(run, ppo=[0.9, 0.9], sft=[0.1, 0.1])
    rows = [json.loads(line) for line in (run / "evaluate/samples.jsonl").read_text().splitlines()]
    for row, score in zip(rows, (0.5, 0.7, 0.1, 0.1), strict=True):  # 0.4 and 0.6: 0.5 ± 0.1
        row["judge_vader"] = score
    (run / "evaluate/samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    change(run, "ppo", judge_vader=0.6)
    [finding] = check.check(read_run(run), {"policies.ppo.judge_vader": {"above": ["sft"]}})
    assert (finding.found, finding.holds) == ("+0.500 ± 0.100", True)
    assert finding.expected == "PPO's judge_vader above SFT's by more than 2 standard errors"


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*/expected.yaml")), ids=lambda file: file.parent.name)
def test_expected_figures_are_read_and_say_why(file: Path) -> None:
    for thresholds in yaml.safe_load(file.read_text()).values():
        assert thresholds and set(thresholds) <= set(check.KINDS)
    for line in file.read_text().splitlines():
        assert not line.startswith("  ") or "#" in line, line


def test_an_unknown_threshold_is_a_user_error(run: Path) -> None:
    with pytest.raises(UserError, match=r"policies.ppo.kl: no threshold is called below"):
        check.check(read_run(run), {"policies.ppo.kl": {"below": 8}})


def test_the_exit_code_says_whether_all_hold(run: Path, capsys: pytest.CaptureFixture) -> None:
    for values, code in ((GOOD, 0), ({"kl": 9.0}, 1)):
        change(run, "ppo", **values)
        with pytest.raises(SystemExit) as ended:
            check.main(["--runs", str(run)])
        assert ended.value.code == code and ("FAILS" in capsys.readouterr().out) == bool(code)
    for folder in (run / "ppo", run):
        (run / "sft/stage.json").write_text("{") if folder == run else None
        with pytest.raises(SystemExit) as ended:
            check.main(["--runs", str(folder)])
        assert ended.value.code == 2 and "error: report: " in capsys.readouterr().err


# ---- table and picture ----------------------------------------------------------------------------------------------


def test_tables_by_hand(run: Path) -> None:
    row = figures.row_of(read_run(run))
    assert figures.markdown_table([figures.narrow(row)] * 2).splitlines() == [
        "| seed | SFT gold | best-of-16 gold | PPO gold (95 %) | KL |",
        "| --- | --- | --- | --- | --- |",
        *["| 0 | 0.530 | 0.760 | **0.820** (0.790–0.850) | 9.8 |"] * 2,
    ]
    assert row["reward model's accuracy (pairs)"] == "0.871 (2)" and row["pretrained gold"] == "0.110"
    assert row["distinct-2, SFT → PPO"] == "0.36 → 0.29" and row["length, SFT → PPO"] == "45 → 49"


def test_a_run_without_gold_has_dashes(run: Path) -> None:
    change(run, "ppo", gold=None, gold_ci95=None)
    assert figures.row_of(read_run(run))["PPO gold (95 %)"] == "**–** (–––)"


def test_the_picture_grows_with_the_answers_and_stays_narrow(run: Path, tmp_path: Path) -> None:
    sizes = []
    for words in (5, 60):
        rows = [
            {"index": 0, "prompt": "Why $x_1$?", "policy": policy, "completion": "word " * words, "gold": 0.5}
            for policy in ("sft", "ppo")
        ]
        (run / "evaluate/samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        figures.draw_before_after(read_run(run), tmp_path / "picture.png")
        image = imread(tmp_path / "picture.png")
        assert image.shape[2] == 4 and image[0, 0, 3] == 0  # the corner outside the card is the page's
        assert image[image.shape[0] // 2, 20].tolist() == pytest.approx([0xFB / 255, 0xFA / 255, 0xF6 / 255, 1])
        sizes.append(image.shape[:2])
    assert [width for _, width in sizes] == [1400, 1400] and sizes[1][0] > sizes[0][0] + 300


def test_figures_from_the_command_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    picture = tmp_path / "docs/before_after.png"
    with pytest.raises(SystemExit) as ended:
        figures.main(["--runs", str(run), str(run), "--picture", str(picture)])
    said = capsys.readouterr().out
    assert ended.value.code == 1 and picture.is_file()  # the fake run's KL is 9.8
    assert said.count("**0.820**") == 4 and "policies.ppo.kl at most 8" in said
    part = write_run(tmp_path / "part", ("tokenizer", "pretrain"))
    with pytest.raises(SystemExit) as ended:
        figures.main(["--runs", str(run), str(part), "--picture", str(picture)])
    assert ended.value.code == 2 and "part: not judged yet; run `make evaluate`" in capsys.readouterr().err


def test_make_has_both() -> None:
    words = make("-n", "figures", "check", "RUNS=runs/a runs/b", "RUN=runs/c").stdout
    assert "benchmarks.figures --runs runs/a runs/b" in words and "benchmarks.check --runs runs/c" in words
