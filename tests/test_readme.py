"""The README: its length, its order, its table of results. What every page must keep is in test_docs.py."""

import re

from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
LONGEST = 1300
RESULTS = "<!-- results -->", "<!-- /results -->"
SECTIONS = [
    "Quick start",
    "Result",
    "The chain",
    "Your data, your reward",
    "Presets",
    "Where to change what",
    "Limits",
    "More",
]


def test_it_is_short() -> None:
    assert len(README.split()) <= LONGEST, "as `wc -w` counts"


def test_its_sections_stand_in_order() -> None:
    assert re.findall(r"^## (.+)$", README, re.MULTILINE) == SECTIONS
    first_screen = README.split("## Quick start")[0]
    assert re.findall(r"!\[[^\]]{20,}\]\(([^)]+)\)", first_screen) == ["docs/before_after.png", "docs/gold_over_kl.png"]


def test_no_placeholder_is_left_but_the_marks_of_the_table() -> None:
    assert re.findall(r"<!--.*?-->", README) == list(RESULTS) and README.count("<!--") == 2
    assert "TODO" not in README and "…" not in README


def test_the_table_of_results_has_its_rows_and_columns() -> None:
    table = README.split(RESULTS[0])[1].split(RESULTS[1])[0].strip().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert rows[0] == ["seed", "SFT gold", "best-of-16 gold", "PPO gold (95 %)", "KL"]
    assert [row[0] for row in rows[2:]] == ["0", "1", "2", "3"] and {len(row) for row in rows} == {5}


def test_what_is_measured_is_defined_before_the_table() -> None:
    before, after = README.split(RESULTS[0])
    for name in ("*Gold* is ", "*KL* is "):
        assert before.count(name) == 1, name
    assert "bits per byte (" in after and "bits per byte" not in before
