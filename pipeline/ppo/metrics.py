"""Sums over the tokens of an update's mini-batches, turned into means over all processes at the end."""

import torch
from torch import Tensor

from pipeline.ppo.algorithm import Reduce


class MetricSums:
    """Collects without waiting for the device: everything stays a tensor until `means`."""

    def __init__(self) -> None:
        self.open: dict[str, Tensor] = {}
        self.shares: dict[str, list[Tensor]] = {}
        self.norms: dict[str, list[Tensor]] = {}

    def add(self, sums: dict[str, Tensor]) -> None:
        """Add a micro-batch's sums to those of the mini-batch that is open."""
        for name, value in sums.items():
            self.open[name] = self.open[name] + value if name in self.open else value

    def close(self, tokens: Tensor, norms: dict[str, Tensor]) -> None:
        """End a mini-batch of `tokens` tokens over all processes; gradient norms are the same on every process."""
        for name, value in self.open.items():
            self.shares.setdefault(name, []).append(value / tokens)
        for name, value in norms.items():
            self.norms.setdefault(name, []).append(value)
        self.open = {}

    def means(self, reduce: Reduce | None) -> dict[str, float]:
        """Mean over mini-batches of the mean over tokens; `val/ratio_first` is of the first mini-batch alone."""
        rows = {name: torch.stack(values).mean() for name, values in self.shares.items()}
        if "val/ratio" in self.shares:
            rows["val/ratio_first"] = self.shares["val/ratio"][0]
        table = torch.stack(list(rows.values()))
        values = dict(zip(rows, (reduce(table) if reduce else table).tolist(), strict=True))
        if "val/ratio" in values:
            values["val/ratio_var"] = max(0.0, values["val/ratio_var"] - (values["val/ratio"] - 1) ** 2)
        return values | {name: torch.stack(norms).mean().item() for name, norms in self.norms.items()}
