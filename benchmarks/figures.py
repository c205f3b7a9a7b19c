"""The README's table and picture, from runs' files alone: `python -m benchmarks.figures --runs runs/stories …`.

Prints the narrow table of the README and the full one of docs/results.md as Markdown, draws the first held-out prompt
of the first run with the answers of SFT and PPO, and ends with what `benchmarks.check` says of every run.
"""

import argparse
import sys
from pathlib import Path
from textwrap import wrap
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from benchmarks.check import check_all, show
from pipeline.errors import UserError
from pipeline.report.gather import Run, number, policy_title, read_run, sample_groups
from pipeline.report.plots import PALETTE

# ---- tables ---------------------------------------------------------------------------------------------------------


def row_of(run: Run) -> dict[str, str]:
    """One seed: everything that the thresholds and the text speak of, by column."""
    best = next(name for name in run.policies if name.startswith("best_of_"))
    pretrain, sft, ppo = (run.policies[name] for name in ("pretrain", "sft", "ppo"))
    pairs = len(run.calibration.get("margins", []))

    def both(figure: str, form: str) -> str:
        return f"{number(sft[figure], form)} → {number(ppo[figure], form)}"

    return {
        "seed": str(run.seed),
        "pretrained gold": number(pretrain["gold"], ".3f"),
        "SFT gold": number(sft["gold"], ".3f"),
        "reward model's accuracy (pairs)": f"{number(run.final('reward', 'accuracy'), '.3f')} ({pairs:,})",
        f"{policy_title(best).lower()} gold": number(run.policies[best]["gold"], ".3f"),
        "PPO gold (95 %)": "**{}** ({}–{})".format(*(number(x, ".3f") for x in (ppo["gold"], *_interval(ppo)))),
        "KL": number(ppo["kl"], ".1f"),
        "distinct-2, SFT → PPO": both("distinct_2", ".2f"),
        "length, SFT → PPO": both("length", ".0f"),
    }


NARROW = ("seed", "SFT gold", "best-of", "PPO gold", "KL")  # the beginnings of the README's columns


def narrow(row: dict[str, str]) -> dict[str, str]:
    """The five columns that the README shows."""
    return {column: cell for column, cell in row.items() if column.startswith(NARROW)}


def _interval(figures: dict[str, Any]) -> list[float | None]:
    return figures["gold_ci95"] or [None, None]


def markdown_table(rows: list[dict[str, str]]) -> str:
    """Rows with the same columns as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ---- picture --------------------------------------------------------------------------------------------------------

WIDTH, MARGIN, GAP = 700, 14, 14  # in CSS pixels, as at the picture's natural size; a phone shows it at half of that
LINE, LETTERS = 29, 32  # height of a line of an answer, and letters that fit one


def draw_before_after(run: Run, file: Path) -> None:
    """The first held-out prompt with the answers of SFT and PPO side by side and their gold scores.

    Raises UserError if the run has no such answers. The picture has a light card of its own, so that it reads the same
    on a light and on a dark page.
    """
    groups = sample_groups(run, 1)
    if not groups or not {"sft", "ppo"} <= groups[0][1].keys():
        raise UserError(f"{run.folder}/evaluate/samples.jsonl has no answers of sft and ppo")
    prompt, answers = groups[0]
    texts = {name: _lines(answers[name]["completion"], LETTERS) for name in ("sft", "ppo")}
    asked = _lines(prompt, 60)
    top = 50 + 27 * len(asked)
    height = top + 93 + LINE * max(map(len, texts.values()))
    figure = Figure(figsize=(WIDTH / 100, height / 100), dpi=200)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
    axes.axis("off")
    _card(axes, (2, 2), (WIDTH - 4, height - 4), "#fbfaf6")
    _text(axes, MARGIN + 8, 32, "The first held-out prompt, not a chosen one", PALETTE["muted"], 13)
    for i, line in enumerate(asked):
        _text(axes, MARGIN + 8, 62 + 27 * i, line, PALETTE["ink"], 17, fontweight="bold")
    width = (WIDTH - 2 * MARGIN - GAP) / 2
    for place, (name, lines) in enumerate(texts.items()):
        left, gold = MARGIN + place * (width + GAP), answers[name]["gold"]
        _card(axes, (left, top + MARGIN), (width, height - top - 2 * MARGIN), "#ffffff")
        title = {"sft": "SFT, before PPO", "ppo": "After PPO"}[name]
        _text(axes, left + 14, top + 48, title, PALETTE[name], 17, fontweight="bold")
        if gold is not None:
            _text(axes, left + width - 14, top + 48, f"gold {gold:.2f}", PALETTE[name], 17, ha="right")
        for i, line in enumerate(lines):
            _text(axes, left + 14, top + 86 + LINE * i, line, PALETTE["ink"], 20, fontfamily="STIXGeneral")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, transparent=True)


def _lines(text: str, letters: int) -> list[str]:
    return [line for part in text.strip().splitlines() for line in wrap(part, letters)] or ["(nothing)"]


def _card(axes: Any, corner: tuple[float, float], size: tuple[float, float], colour: str) -> None:
    style = "round,pad=0,rounding_size=9"
    axes.add_patch(FancyBboxPatch(corner, *size, boxstyle=style, facecolor=colour, edgecolor=PALETTE["grid"]))


def _text(axes: Any, x: float, y: float, words: str, colour: str, pixels: float, **options: Any) -> None:
    axes.text(x, y, words, color=colour, fontsize=pixels * 0.72, va="baseline", parse_math=False, **options)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", required=True, help="folders of finished runs, one a seed")
    parser.add_argument("--picture", type=Path, default=Path("docs/before_after.png"))
    options = parser.parse_args(arguments)
    try:
        runs = [read_run(run) for run in options.runs]
        if unfinished := [str(run.folder) for run in runs if not run.policies]:
            raise UserError(f"{', '.join(unfinished)}: not judged yet; run `make evaluate`")
        rows = [row_of(run) for run in runs]
        print(f"README.md:\n\n{markdown_table([narrow(row) for row in rows])}\n")
        print(f"docs/results.md:\n\n{markdown_table(rows)}\n")
        draw_before_after(runs[0], options.picture)
        print(f"→ {options.picture}\n")
        findings = check_all(runs)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    show(findings)
    sys.exit(not all(finding.holds for finding in findings))


if __name__ == "__main__":
    main()
