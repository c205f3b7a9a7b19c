"""The README: what it names is there."""

import re

from conftest import ROOT, make

README = (ROOT / "README.md").read_text()


def test_links_and_named_files_exist() -> None:
    for path in re.findall(r"\]\(([^)#]+)\)", README):
        assert path.startswith("http") or (ROOT / path).exists(), path
    for path in re.findall(r"(?:configs|pipeline|stages|reward_data)/[\w./-]+\.(?:ya?ml|py|md)", README):
        assert (ROOT / path).exists(), path


def test_make_targets_exist_and_help_lists_them() -> None:
    text = make("help").stdout
    listed = set(re.findall(r"^  ([a-z-]+) ", text, re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z]+(?:-[a-z]+)*)\b", README, re.MULTILINE))
    assert named and named <= listed, named - listed


def test_no_placeholder_is_left() -> None:
    assert "<!--" not in README and "TODO" not in README
