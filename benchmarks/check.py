"""Compare finished runs with what their preset expects: `python -m benchmarks.check --runs runs/stories …`.

The thresholds stand in configs/<preset>/expected.yaml: a figure by its place in summary.json, or one of a stage's
metrics.jsonl at a step (`ppo.eval/gold@110`), and under it any of `at_least` and `at_most` (a number), `at_least_plus:
[number, other figure]` (their sum), `at_least_times` and `at_most_times: [factor, other figure]` (their product),
`within: [share, other figure]` and, for a policy's gold or judge, `above: [policies]` (by more than two standard errors
of the mean difference, paired over the held-out prompts). The exit code is 1 if a threshold does not hold, 2 if there
is nothing to compare.
"""

import argparse
import sys
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from pipeline.errors import UserError
from pipeline.report.gather import Run, number, policy_title, read_run, summary

STANDARD_ERRORS = 2
KINDS = ("at_least", "at_most", "at_least_plus", "at_least_times", "at_most_times", "within", "above")


@dataclass(frozen=True)
class Finding:
    """One threshold, what the run has, and whether it holds."""

    run: str
    expected: str
    found: str
    holds: bool


def paired_difference(run: Run, ours: str, theirs: str, judge: str = "gold") -> tuple[float, float]:
    """Mean and standard error of the difference in gold, or in another judge's score (`judge_<name>`), between two
    policies' answers to the same prompts.

    Raises UserError if a policy has no answers with such scores, or not as many as the other.
    """
    gold = {
        name: {row["index"]: row.get(judge) for row in run.samples if row["policy"] == name} for name in (ours, theirs)
    }
    if len(gold[ours]) < 2 or gold[ours].keys() != gold[theirs].keys() or None in gold[ours].values():
        raise UserError(f"{run.folder}/evaluate/samples.jsonl: {ours} and {theirs} have no {judge} scores to be paired")
    differences = [gold[ours][index] - gold[theirs][index] for index in gold[ours]]
    return mean(differences), stdev(differences) / sqrt(len(differences))


def check(run: Run, expected: dict[str, dict[str, Any]]) -> list[Finding]:
    """Every threshold of `expected` beside what the run has. Raises UserError for a threshold that is not known."""
    figures, findings = summary(run), []

    def add(words: str, found: str, holds: bool) -> None:
        findings.append(Finding(run.folder.name, words, found, holds))

    for name, thresholds in expected.items():
        value = _logged(run, name) if "@" in name else _figure(figures, name)
        for kind, bound in thresholds.items():
            if kind not in KINDS:
                raise UserError(f"{name}: no threshold is called {kind}; there are {', '.join(KINDS)}")
            if kind == "above":
                _, ours, judge = name.split(".")
                findings += [_above(run, ours, other, judge) for other in bound]
            elif value is None:
                add(f"{name} {kind} {bound}", "not recorded", False)
            elif kind == "within":
                ratio = value / (_figure(figures, bound[1]) or float("nan"))
                add(f"{name} within {bound[0]:.0%} of {bound[1]}", f"{ratio - 1:+.1%}", abs(ratio - 1) <= bound[0])
            else:
                least = kind.startswith("at_least")
                limit, words = _limit(figures, kind, bound)
                holds = value >= limit if least else value <= limit
                add(f"{name} at {'least' if least else 'most'} {words}", number(value, ".3f"), holds)
    return findings


def _figure(figures: Any, name: str) -> float | None:
    for key in name.split("."):
        figures = figures.get(key) if isinstance(figures, dict) else None
    return figures


def _logged(run: Run, name: str) -> float | None:
    """The figure `stage.name@step` in the last line of the stage's metrics.jsonl that has it at that step."""
    stage, _, rest = name.partition(".")
    figure, _, step = rest.rpartition("@")
    rows = (row for row in run.metrics.get(stage, []) if str(row.get("step")) == step)
    return next((row[figure] for row in reversed(list(rows)) if row.get(figure) is not None), None)


def _limit(figures: Any, kind: str, bound: Any) -> tuple[float, str]:
    """The number that a threshold comes to, NaN where the figure that it is made of was not recorded, and its words."""
    if kind in ("at_least", "at_most"):
        return bound, str(bound)
    amount, name = bound
    other = _figure(figures, name)
    other = float("nan") if other is None else other
    plus = kind.endswith("plus")
    limit = other + amount if plus else other * amount
    return limit, f"{name} {'+' if plus else '×'} {amount} = {number(limit, '.3f')}"


def _above(run: Run, ours: str, theirs: str, judge: str) -> Finding:
    difference, error = paired_difference(run, ours, theirs, judge)
    words = (
        f"{policy_title(ours)}'s {judge} above {policy_title(theirs)}'s by more than {STANDARD_ERRORS} standard errors"
    )
    return Finding(run.folder.name, words, f"{difference:+.3f} ± {error:.3f}", difference > STANDARD_ERRORS * error)


def check_all(runs: list[Run], configs: Path = Path("configs")) -> list[Finding]:
    """The findings of all runs, each by its own preset's thresholds. Raises UserError for a preset that has none."""
    findings = []
    for run in runs:
        file = configs / run.preset / "expected.yaml"
        if not file.is_file():
            raise UserError(f"{run.folder}: PRESET={run.preset} expects nothing: there is no {file}")
        findings += check(run, yaml.safe_load(file.read_text(encoding="utf-8")))
    return findings


def show(findings: list[Finding]) -> None:
    """The findings as a table, those that do not hold in red."""
    table = Table("run", "expected", "found", "")
    for finding in findings:
        row = (finding.run, finding.expected, finding.found, "holds" if finding.holds else "FAILS")
        table.add_row(*row, style=None if finding.holds else "red")
    Console(width=140 if not sys.stdout.isatty() else None).print(table)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", required=True, help="folders of finished runs")
    options = parser.parse_args(arguments)
    try:
        findings = check_all([read_run(run) for run in options.runs])
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    show(findings)
    sys.exit(not all(finding.holds for finding in findings))


if __name__ == "__main__":
    main()
