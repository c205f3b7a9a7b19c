"""The held-out accuracy of a reward model is said with its interval, and where guessing would do as well, that too."""

import pytest
import torch
from datasets import Dataset

from stages.reward import accuracies, accuracy_sentence


class Scores:
    """A reward that likes long answers."""

    def __call__(self, prompts: list, completions: list) -> list[float]:
        return [float(len(text)) for text in completions]


def rows(right: int, wrong: int) -> Dataset:
    pairs = [("aa", "a")] * right + [("a", "aa")] * wrong
    return Dataset.from_list([{"prompt": "p", "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs])


@pytest.mark.parametrize(
    ("right", "wrong", "warns"),
    [(321, 299, True), (434, 186, False), (299, 321, True), (100, 520, True), (6, 1, True), (7, 0, False)],
)
def test_accuracy_comes_with_its_interval_and_number(tmp_path, right: int, wrong: int, warns: bool) -> None:
    torch.manual_seed(0)
    metrics = accuracies(Scores(), rows(right, wrong), tmp_path)
    low, high = metrics["accuracy_ci95"]
    assert metrics["accuracy"] == pytest.approx(right / (right + wrong)) and metrics["accuracy_n"] == right + wrong
    assert low < metrics["accuracy"] <= high + 1e-9 and (low <= 0.5) == warns
    said = accuracy_sentence(metrics)
    assert said.startswith("warning: ") == warns
    assert ("cannot be told from guessing" in said) == (warns and high >= 0.5)
    assert ("worse than guessing; see whether chosen and rejected are exchanged" in said) == (high < 0.5)
    assert f"95% interval {low:.3f} to {high:.3f}, n {right + wrong}" in said
