"""The report: fixed names in summary.json, a page that loads nothing, and runs that are not finished."""

import json
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from fake_run import ANSWERS, POLICIES, PROMPTS, SECONDS, WIN_RATE, write_run
from rich.console import Console
from safetensors.torch import save_file

from pipeline.errors import NothingToDo, UserError
from pipeline.report import gather as report
from pipeline.report.page import markdown, page
from pipeline.report.plots import PALETTE, STYLE, draw_plots
from pipeline.runtime.arguments import ReportArguments
from pipeline.runtime.command_line import resolve
from stages import report as stage

PLOTS = [
    "gold",
    "pretrain-loss",
    "pretrain-bpb",
    "sft-loss",
    "reward-accuracy",
    "reward-loss",
    "reward-calibration",
    "ppo-reward",
    "ppo-gold",
    "ppo-kl",
    "ppo-length",
]


def make(run: Path) -> Path:
    stage.main(resolve(ReportArguments(run_dir=str(run))))
    return run / "report"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("runs") / "full")
    save_file({"a": torch.zeros(300, 1000), "b": torch.zeros(700_000)}, folder / "ppo" / "model.safetensors")
    make(folder)
    return folder


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return (run / "report/report.html").read_text()


def test_other_judges_are_shown_with_interval_and_difference(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    file = folder / "evaluate/scores.json"
    scores = json.loads(file.read_text())
    for i, figures in enumerate(scores["policies"].values()):
        figures |= {"judge_vader": i / 10 - 0.1, "judge_vader_ci95": [i / 10 - 0.2, i / 10]}
    scores["judges"] = {"vader": {"ppo_vs_sft": {"mean": 0.2, "standard_error": 0.0456, "n": 85}}}
    file.write_text(json.dumps(scores))
    found = report.read_run(folder)
    table = report.policy_table(found)
    assert table.columns[1:4] == ["Gold", "Judge vader", "Proxy"]
    assert [cells[2] for cells in table.rows.values()][:2] == ["−0.10 (−0.20–0.00)", "0.00 (−0.10–0.10)"]
    sentence = "Judge vader: PPO +0.200 ± 0.046 over SFT"
    assert report.summary(found)["judges"] == scores["judges"]
    assert sentence in page(found, [], 1) and sentence in markdown(found, [], 1)
    del scores["policies"]["ppo"]["judge_vader"]
    file.write_text(json.dumps(scores))
    with pytest.raises(UserError, match="lacks judge_vader"):
        report.read_run(folder)


def test_a_run_that_converted_its_model_misses_no_pretraining(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ("sft",))
    (folder / "convert").mkdir()
    record = json.loads((folder / "sft/stage.json").read_text())
    (folder / "convert/stage.json").write_text(json.dumps(record | {"stage": "convert"}))
    assert report.read_run(folder).missing == ["preferences", "reward", "ppo", "evaluate"]
    assert "convert" not in report.read_run(write_run(tmp_path / "other", ("sft",))).missing


# ---- summary.json ---------------------------------------------------------------------------------------------------


def test_summary_has_the_fixed_names_and_the_recorded_values(run: Path) -> None:
    summary = json.loads((run / "report/summary.json").read_text())
    assert list(summary) == ["preset", "seed", "total_seconds", "stages", "policies", "win_rate"]
    assert summary["preset"] == "stories" and summary["seed"] == 0
    assert summary["total_seconds"] == pytest.approx(sum(SECONDS.values()))
    stages = summary["stages"]
    assert list(stages) == ["tokenizer", "pretrain", "sft", "preferences", "reward", "ppo", "evaluate"]
    fixed = {name: list(figures) for name, figures in stages.items()}
    assert fixed["pretrain"][:4] == ["val_bpb", "bigram_bpb", "tokens_per_s", "seconds"]
    assert fixed["sft"][:2] == ["val_loss", "seconds"] and "eval_loss" not in fixed["sft"]
    assert fixed["reward"][:2] == ["accuracy", "seconds"]
    assert fixed["ppo"][:3] == ["episodes_per_s", "kl", "seconds"]
    assert fixed["evaluate"] == ["seconds"]
    assert stages["pretrain"]["val_bpb"] == 0.787 and stages["sft"]["val_loss"] == 1.734
    assert stages["reward"]["accuracy"] == 0.871 and stages["ppo"]["kl"] == 9.8 and stages["ppo"]["seconds"] == 216.3
    assert list(summary["policies"]) == ["pretrain", "sft", "best_of_16", "ppo"]
    for name, figures in summary["policies"].items():
        assert list(figures)[:5] == ["gold", "proxy", "kl", "length", "distinct_2"]
        assert figures == POLICIES[name]
    assert summary["win_rate"] == WIN_RATE


def test_summary_of_an_old_record_has_null_for_what_was_not_recorded(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ("pretrain",))
    file = folder / "pretrain/stage.json"
    record = json.loads(file.read_text())
    del record["metrics"]["bigram_bpb"]
    file.write_text(json.dumps(record))
    summary = report.summary(report.read_run(folder))
    assert summary["stages"]["pretrain"]["bigram_bpb"] is None
    assert summary["policies"] == {} == summary["win_rate"]


# ---- headline -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "title"),
    [
        ([0.77, 0.85], "PPO made the model better"),
        ([0.46, 0.58], "PPO made no clear difference"),
        ([0.20, 0.49], "PPO made the model worse"),
    ],
)
def test_headline_says_what_the_interval_allows(run: Path, interval: list[float], title: str) -> None:
    read = report.read_run(run)
    read.win_rate = {"ppo_vs_sft": {"mean": sum(interval) / 2, "ci95": interval, "n": 256}}
    said, sentence = report.headline(read)
    assert said == title
    assert "0.53 (0.49–0.57)" in sentence and "0.82 (0.79–0.85)" in sentence and "256 held-out prompts" in sentence
    assert f"{interval[0]:.0%} to {interval[1]:.0%}" in sentence


@pytest.mark.slow
def test_a_run_without_a_gold_judge_is_reported(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    file = folder / "evaluate/scores.json"
    scores = json.loads(file.read_text())
    policies = {name: figures | {"gold": None, "gold_ci95": None} for name, figures in scores["policies"].items()}
    file.write_text(json.dumps(scores | {"policies": policies, "win_rate": {}}))
    samples = folder / "evaluate/samples.jsonl"
    rows = [json.loads(line) | {"gold": None} for line in samples.read_text().splitlines()]
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = (make(folder) / "report.md").read_text()
    assert text.startswith("# No gold judge") and "0.02 to 1.71" in text
    assert "gold" not in {plot.name for plot in draw_plots(report.read_run(folder))}


# ---- the page -------------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """Collects tags and attributes, and checks that every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attributes)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_loads_nothing(html: str) -> None:
    tags = Tags(html)
    assert tags.open == []
    names = {tag for tag, _ in tags.seen}
    assert not names & {"script", "link", "iframe", "object", "embed", "img", "base"}
    for _, attributes in tags.seen:
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in ("src", "action", "srcset", "data")
            assert not name.endswith("href") or value.startswith("#")
    assert "http://" not in html and "https://" not in html and "@import" not in html
    assert not re.search(r"url\((?!#)", html)


def test_page_is_for_phones_and_for_the_dark(html: str) -> None:
    assert 'name="viewport"' in html and "prefers-color-scheme: dark" in html
    body = html[html.index("<body>") :]
    assert not [colour for colour in PALETTE.values() if colour in body]  # plots follow the page's colours
    assert "DejaVu" not in body and "var(--ppo)" in body


def test_style_and_dark_page_know_the_palette(html: str) -> None:
    style = STYLE.read_text()
    colours = {f"#{colour}" for colour in re.findall(r": ([0-9a-f]{6})$", style, re.MULTILINE)}
    assert len(colours) == 3 and colours <= set(PALETTE.values())
    light, dark = (re.findall(r"--(\w+): #", part) for part in html.split("prefers-color-scheme: dark")[:2])
    assert set(light) == set(dark) == {*PALETTE, "page", "card"}


def test_what_the_report_needs_beside_its_code_is_packaged() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folder = ROOT / "pipeline/report"
    shipped = {path for pattern in patterns["pipeline.report"] for path in folder.glob(pattern)}
    assert shipped == {path for path in folder.iterdir() if path.is_file() and path.suffix != ".py"}


def test_page_shows_samples_and_escapes_them(html: str) -> None:
    assert "Use: &lt;b&gt;drum&lt;/b&gt;" in html and "<b>drum" not in html
    assert html.count('<div class="sample">') == 3  # of the four prompts in the file
    assert ANSWERS["sft"] in html and "&#34;Can I hold it?&#34;" in html and "cut off" in html
    assert PROMPTS[3] not in html


def test_page_has_ids_once_and_refers_to_ids_it_has(html: str) -> None:
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids)) > 50
    used = re.findall(r'href="#([^"]+)"', html) + re.findall(r"url\(#([^)]+)\)", html)
    assert used and set(used) <= set(ids)


def test_page_says_what_was_run_from_which_inputs(html: str) -> None:
    assert "python -m stages.ppo --config configs/stories/ppo.yaml" in html
    assert "abababab" in html and "ab" * 6 not in html  # the beginning of the sha256 is enough
    assert "0123456789ab-dirty" in html and "torch 2.13.0" in html
    assert "9 min 20 s" in html and "2,457,600 tokens" in html and "1.00 M" in html


# ---- plots ----------------------------------------------------------------------------------------------------------


def test_every_plot_is_drawn_twice(run: Path) -> None:
    plots = draw_plots(report.read_run(run))
    assert [plot.name for plot in plots] == PLOTS
    for plot in plots:
        assert plot.svg.startswith("<svg viewBox=") and plot.svg.endswith("</svg>") and plot.title in plot.svg
        assert plot.png.startswith(b"\x89PNG") and (run / f"report/plots/{plot.name}.png").read_bytes() == plot.png


def test_markdown_names_plots_that_exist(run: Path) -> None:
    text = (run / "report/report.md").read_text()
    paths = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert len(paths) == len(PLOTS) and all((run / "report" / path).is_file() for path in paths)
    assert "| PPO | 0.82 (0.79–0.85) | 1.71 | 9.8 | 49.3 | 0.29 | 0.95 | 0% |" in text
    assert "\\<b\\>drum" in text


# ---- what may be missing or damaged ---------------------------------------------------------------------------------


def test_a_pretraining_run_is_reported_as_far_as_it_went(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ("tokenizer", "pretrain"))
    made = make(folder)
    html, text = (made / "report.html").read_text(), (made / "report.md").read_text()
    Tags(html)
    for page_text in (html, text):
        assert "No verdict yet" in page_text and "sft, preferences, reward, ppo, evaluate" in page_text
        assert "Held-out bits per byte" in page_text and "Policies" not in page_text
    assert sorted(p.name for p in (made / "plots").iterdir()) == ["pretrain-bpb.png", "pretrain-loss.png"]


def test_an_empty_run_and_damaged_files_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no stage has finished"):
        make(tmp_path)
    folder = write_run(tmp_path / "run")
    (folder / "ppo/metrics.jsonl").write_text('{"step": 1}\n{"st')
    with pytest.raises(
        UserError, match=r"ppo/metrics.jsonl has a line that is not JSON \(line 2\); run `make ppo RUN="
    ):
        make(folder)
    (folder / "ppo/metrics.jsonl").write_text("")
    (folder / "evaluate/scores.json").unlink()
    with pytest.raises(UserError, match=r"scores\.json is missing"):
        make(folder)


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("sft/stage.json", "{}", "lacks stage, or has something else there"),
        ("sft/stage.json", "", "is damaged"),
        ("sft/stage.json", "[]", r"has \[\] where an object should be"),
        ("sft/stage.json", {"seconds": "long"}, "lacks seconds"),
        ("sft/stage.json", {"inputs": {"model": None}}, "has null where an object should be"),
        ("sft/stage.json", {"metrics": None}, "lacks metrics"),
        ("ppo/metrics.jsonl", "123\n", "has 123 where an object should be"),
        ("reward/calibration.json", "{}", "lacks bins"),
        ("reward/calibration.json", '{"bins": [{"n": 1}]}', "lacks predicted"),
        ("evaluate/scores.json", "{}", "lacks policies"),
        ("evaluate/scores.json", {"policies": {}}, "lacks sft"),
        ("evaluate/scores.json", {"policies": {"sft": {}, "ppo": {"proxy": "x"}}}, "lacks proxy"),
        ("evaluate/scores.json", {"win_rate": {"ppo_vs_sft": {"mean": 1}}}, "lacks n"),
        (
            "evaluate/scores.json",
            {"win_rate": {"ppo_vs_sft": {"mean": 1, "n": 2, "ci95": [0]}}},
            "ci95 that is no inter",
        ),
        ("evaluate/samples.jsonl", '{"index": 0}\n', "lacks prompt"),
        ("evaluate/samples.jsonl", "[]\n", r"has \[\] where an object should be"),
    ],
)
def test_a_damaged_file_is_named_with_the_stage_to_run_again(
    tmp_path: Path, file: str, content: str | dict, sentence: str
) -> None:
    folder = write_run(tmp_path / "run")
    if isinstance(content, dict):
        content = json.dumps(json.loads((folder / file).read_text()) | content)
    (folder / file).write_text(content)
    with pytest.raises(UserError, match=rf"report: .*{file} .*{sentence}.*; run `make {file.split('/')[0]} RUN="):
        make(folder)


def test_a_line_separator_within_an_answer_ends_no_line(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    rows = [json.loads(line) for line in (folder / "evaluate/samples.jsonl").read_text().splitlines()]
    rows[0]["completion"] = "one\u2028two\u0085three\x0bfour"
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "evaluate/samples.jsonl").write_text(text, encoding="utf-8")
    assert report.read_run(folder).samples == rows
    make(folder)


def test_a_finished_report_is_shown_again_and_left(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write_run(tmp_path / "run", ("tokenizer", "pretrain"))
    page = (make(folder) / "report.html").read_bytes()
    with pytest.raises(NothingToDo, match="is finished already with these settings and inputs"):
        make(folder)
    assert capsys.readouterr().out.count("No verdict yet") == 2
    assert (folder / "report/report.html").read_bytes() == page


def test_a_stage_without_metrics_has_no_plots(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ("tokenizer", "pretrain", "sft"))
    (folder / "sft/metrics.jsonl").unlink()
    read = report.read_run(folder)
    assert [plot.group for plot in draw_plots(read)] == ["pretrain", "pretrain"]
    assert "Fine-tuning" not in page(read, [], 3)


def test_points_that_are_no_numbers_are_left_out(run: Path) -> None:
    read = report.read_run(run)
    read.metrics["sft"] = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": float("nan")},
        {"step": 3},
        {"loss": 1.0},
        {"step": 5, "loss": None},
        {"step": 6, "loss": 1.0},
    ]
    assert read.series("sft", "loss") == ([1, 6], [2.0, 1.0])


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.6, "8 s"), (59.7, "1 min 00 s"), (185, "3 min 05 s"), (7_810, "2 h 10 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text


# ---- the terminal ---------------------------------------------------------------------------------------------------


def test_the_end_of_the_run_is_shown(run: Path) -> None:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    stage.show(report.read_run(run), resolve(ReportArguments(run_dir=str(run))), console)
    shown = console.export_text()
    for words in (
        r"PPO +0\.82 \(0\.79–0\.85\) +9\.8 +49\.3",
        r"Best-of-16 +0\.76",
        r"SFT, gold 0\.53 +PPO, gold 0\.82",
        r"Tom & Ann\. Use: <b>drum</b>",
        r"report/report\.html",
        r"9 min 20 s in all",
    ):
        assert re.search(words, shown.replace("\n", " ")), words


def test_the_accuracy_stands_with_its_interval_and_number(run: Path) -> None:
    cells = report.stage_table(report.read_run(run)).rows["reward"]
    assert cells[-1] == "87.1% of held-out pairs right (95% interval 84.0% to 89.6%, n 551)"
    page = (run / "report" / "report.html").read_text(encoding="utf-8")
    assert "of held-out pairs right (95% interval 84.0% to 89.6%, n 551)" in " ".join(page.split())
