"""The report's plots. Each is drawn once and kept twice: as PNG for report.md and as SVG for the page.

In the SVG the light palette's colours become CSS variables and the letters stay letters, so that a plot follows the
page into dark mode and uses its font.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.report.gather import Run, policy_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Role → light colour; report_html.py has the dark ones under the same names.
PALETTE = {
    "ink": "#1d2024",
    "muted": "#6c717a",
    "grid": "#e6e4dd",
    "quiet": "#a9adb4",
    "sft": "#b5562e",
    "best": "#bf9020",
    "ppo": "#0c6f70",
}
SIZE = (4.7, 2.9)  # inches
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.family": "sans-serif",
    "font.size": 9,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": PALETTE["quiet"],
    "axes.labelcolor": PALETTE["muted"],
    "axes.labelsize": 8.5,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": PALETTE["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": PALETTE["muted"],
    "xtick.labelsize": 8,
    "xtick.major.size": 3,
    "ytick.color": PALETTE["muted"],
    "ytick.labelsize": 8,
    "ytick.major.size": 0,
}
SMOOTHING = 0.75  # weight of the past in the running mean of noisy curves


@dataclass
class Plot:
    """A drawn plot: `group` is the stage it belongs to."""

    name: str
    group: str
    title: str
    svg: str
    png: bytes


def draw_plots(run: Run) -> list[Plot]:
    """Every plot that the run has data for, in the chain's order."""
    import matplotlib

    matplotlib.use("Agg")
    makers: list[tuple[str, str, str, Callable[[Axes, Run], bool]]] = [
        ("gold", "evaluate", "Gold on held-out prompts", _gold_by_policy),
        ("pretrain-loss", "pretrain", "Pretraining loss", _pretrain_loss),
        ("pretrain-bpb", "pretrain", "Held-out bits per byte", _pretrain_bpb),
        ("sft-loss", "sft", "Fine-tuning loss on answers", _sft_loss),
        ("reward-accuracy", "reward", "Reward model: pairs ranked right", _reward_accuracy),
        ("reward-loss", "reward", "Reward model: loss", _reward_loss),
        ("reward-calibration", "reward", "Reward model: calibration", _calibration),
        ("ppo-reward", "ppo", "Reward that PPO earns", _ppo_reward),
        ("ppo-gold", "ppo", "Gold during PPO, held-out prompts", _ppo_gold),
        ("ppo-kl", "ppo", "KL from SFT", _ppo_kl),
        ("ppo-length", "ppo", "Length of answers", _ppo_length),
    ]
    plots = []
    with matplotlib.rc_context(STYLE):
        for name, group, title, draw in makers:
            plot = _make(name, group, title, draw, run)
            plots += [plot] if plot else []
    return plots


def _make(name: str, group: str, title: str, draw: Callable[["Axes", Run], bool], run: Run) -> Plot | None:
    """Draw one plot; None where `draw` says that the run has nothing to draw."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE)
    figure.subplots_adjust(left=0.1, right=0.8, top=0.8, bottom=0.17)
    axes = figure.add_subplot()
    if not draw(axes, run):
        return None
    # The unit of the y axis stands under the title, where it is read without turning one's head
    figure.text(0.025, 0.92, title, color=PALETTE["ink"], fontsize=10.5, fontweight="bold")
    figure.text(0.025, 0.855, axes.get_ylabel(), color=PALETTE["muted"], fontsize=8.5)
    axes.set_ylabel("")
    svg, png = io.StringIO(), io.BytesIO()
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    figure.savefig(png, format="png", dpi=160, facecolor="white")
    return Plot(name, group, title, themed_svg(svg.getvalue(), name, title), png.getvalue())


def themed_svg(svg: str, name: str, title: str) -> str:
    """Make matplotlib's SVG a part of the page: CSS variables for colours, the page's font, own ids, no links."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.S)
    for role, colour in PALETTE.items():
        body = body.replace(colour, f"var(--{role})")
    body = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", body)
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", body)
    body = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', body)
    view = re.search(r'viewBox="([^"]+)"', body)[1]
    opening = f'<svg viewBox="{view}" role="img" aria-label="{title}">'
    return opening + body[body.index(">") + 1 :].strip()


# ---- drawing --------------------------------------------------------------------------------------------------------


Curve = tuple[str, str, tuple[list[float], list[float]], bool]  # label, role, (xs, ys), whether it is noisy
Level = tuple[str, str, float | None]  # label, role, height


def _curves(axes: "Axes", curves: list[Curve], levels: Sequence[Level] = ()) -> bool:
    """Draw curves, noisy ones faint under their running mean, and dashed levels, each labelled at its right end."""
    ends = []
    for label, role, (xs, ys), noisy in curves:
        if not xs:
            continue
        colour = PALETTE[role]
        if noisy and len(ys) > 8:
            axes.plot(xs, ys, color=colour, alpha=0.25, linewidth=1)
            ys = _running_mean(ys)
        axes.plot(xs, ys, color=colour, marker="o" if len(xs) <= 12 else None, markersize=3)
        ends.append((ys[-1], label, colour))
    if not ends:
        return False
    for label, role, height in levels:
        if height is not None:
            axes.axhline(height, color=PALETTE[role], linewidth=1, linestyle=(0, (4, 3)))
            ends.append((height, label, PALETTE[role]))
    _count_axis(axes)
    _label_ends(axes, ends)
    return True


def _running_mean(ys: list[float]) -> list[float]:
    """Exponential running mean with the start's bias taken out (Adam's correction)."""
    total, weight, out = 0.0, 0.0, []
    for y in ys:
        total, weight = SMOOTHING * total + (1 - SMOOTHING) * y, SMOOTHING * weight + 1 - SMOOTHING
        out.append(total / weight)
    return out


def _label_ends(axes: "Axes", ends: list[tuple[float, str, str]], gap: float = 0.09) -> None:
    """Write (height, label, colour) right of the axes, pushed apart where they would touch."""
    axes.autoscale_view()
    low, high = axes.get_ylim()
    ends = sorted((min(1.0, max(0.0, (y - low) / (high - low))), label, colour) for y, label, colour in ends)
    heights: list[float] = []
    for wanted, _, _ in ends:
        heights.append(max(wanted, heights[-1] + gap) if heights else wanted)
    # A cluster that was pushed up past the top moves down, as far as the ones below leave room
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], 1.0 if i + 1 == len(heights) else heights[i + 1] - gap)
    for height, (_, label, colour) in zip(heights, ends, strict=True):
        axes.text(1.025, height, label, transform=axes.transAxes, color=colour, fontsize=8.5, va="center")


def _count_axis(axes: "Axes") -> None:
    """Thousands as `2k`."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:g}k" if abs(x) >= 1000 else f"{x:g}"))
    axes.margins(x=0.02)


def _gold_by_policy(axes: "Axes", run: Run) -> bool:
    rows = [(name, figures) for name, figures in run.policies.items() if figures["gold"] is not None]
    roles = {"pretrain": "quiet", "sft": "sft", "ppo": "ppo"}
    for place, (name, figures) in enumerate(reversed(rows)):
        colour, (low, high) = PALETTE[roles.get(name, "best")], figures["gold_ci95"]
        axes.plot([low, high], [place, place], color=colour, linewidth=5, alpha=0.3)
        axes.plot([figures["gold"]], [place], "o", color=colour, markersize=8)
        axes.text(
            1.03,
            place,
            f"{figures['gold']:.2f}",
            transform=axes.get_yaxis_transform(),
            color=PALETTE["ink"],
            fontsize=10,
            fontweight="bold",
            va="center",
        )
    axes.set(xlim=(0, 1), ylim=(-0.6, len(rows) - 0.4), ylabel="mean score of the judge, 95% interval")
    titles = [policy_title(name) for name, _ in reversed(rows)]
    axes.set_yticks(range(len(rows)), titles, fontsize=9, color=PALETTE["ink"])
    axes.grid(axis="x", color=PALETTE["grid"])
    axes.figure.subplots_adjust(left=0.2, right=0.88, bottom=0.1)
    return bool(rows)


def _pretrain_loss(axes: "Axes", run: Run) -> bool:
    axes.set(xlabel="optimizer steps", ylabel="nats per token")
    return _curves(
        axes,
        [
            ("training", "quiet", run.series("pretrain", "loss"), False),
            ("held out", "ppo", run.series("pretrain", "val_loss"), False),
        ],
    )


def _pretrain_bpb(axes: "Axes", run: Run) -> bool:
    axes.set(xlabel="optimizer steps", ylabel="bits per byte")
    xs, ys = run.series("pretrain", "val_bpb")
    levels = [
        (f"{kind} {bits:.2f}", "muted", bits)
        for kind in ("uniform", "bigram")
        if (bits := run.final("pretrain", f"{kind}_bpb")) is not None
    ]
    axes.set_ylim(0, 1.1 * max([*ys, *(bits for _, _, bits in levels)], default=1))
    return _curves(axes, [(f"GPT {ys[-1]:.2f}" if ys else "", "ppo", (xs, ys), False)], levels)


def _sft_loss(axes: "Axes", run: Run) -> bool:
    axes.set(xlabel="optimizer steps", ylabel="nats per token")
    return _curves(
        axes,
        [
            ("training", "quiet", run.series("sft", "loss"), False),
            ("held out", "ppo", run.series("sft", "eval_loss"), False),
        ],
    )


def _reward_accuracy(axes: "Axes", run: Run) -> bool:
    axes.set(xlabel="optimizer steps", ylabel="share of pairs, noisy labels", ylim=(0.4, 1.0))
    return _curves(
        axes,
        [
            ("training", "quiet", run.series("reward", "accuracy"), False),
            ("held out", "ppo", run.series("reward", "eval_accuracy"), False),
        ],
        [("chance", "muted", 0.5)],
    )


def _reward_loss(axes: "Axes", run: Run) -> bool:
    axes.set(xlabel="optimizer steps", ylabel="−log σ(margin), nats")
    axes.set_ylim(0, 1.1 * max([0.75, *run.series("reward", "loss")[1]]))
    return _curves(
        axes,
        [
            ("training", "quiet", run.series("reward", "loss"), False),
            ("held out", "ppo", run.series("reward", "eval_loss"), False),
        ],
        [("coin, log 2", "muted", 0.6931)],
    )


def _calibration(axes: "Axes", run: Run) -> bool:
    bins = run.calibration.get("bins", [])
    low = 0.5 if all(b["predicted"] >= 0.5 for b in bins) else 0.0
    axes.plot([low, 1], [low, 1], color=PALETTE["muted"], linewidth=1, linestyle=(0, (4, 3)))
    most = max((b["n"] for b in bins), default=1)
    for x, y, n in ((b["predicted"], b["observed"], b["n"]) for b in bins):
        spread = 1.96 * (y * (1 - y) / n) ** 0.5
        axes.plot([x, x], [max(0.0, y - spread), min(1.0, y + spread)], color=PALETTE["ppo"], alpha=0.3, linewidth=2)
        axes.scatter(x, y, s=12 + 60 * n / most, color=PALETTE["ppo"], linewidths=0, zorder=3)
    axes.set(xlabel="predicted, σ(margin)", ylabel="share of pairs where the prediction held", xlim=(low - 0.02, 1.02))
    axes.set_ylim(max(0.0, min([low, *(b["observed"] for b in bins)]) - 0.08), 1.05)
    _label_ends(axes, [(1.0, "perfect", PALETTE["muted"])])
    axes.text(1.025, 0.0, "dot size:\npairs", transform=axes.transAxes, color=PALETTE["muted"], fontsize=8)
    return bool(bins)


def _ppo(run: Run, name: str) -> tuple[list[float], list[float]]:
    return run.series("ppo", name, x="episode")


def _ppo_reward(axes: "Axes", run: Run) -> bool:
    axes.set(xlabel="episodes", ylabel="reward model's standard scores")
    return _curves(
        axes,
        [
            ("score", "ppo", _ppo(run, "objective/scores"), True),
            ("less KL", "muted", _ppo(run, "objective/rlhf_reward"), True),
            ("held out", "ink", _ppo(run, "eval/proxy"), False),
        ],
    )


def _ppo_gold(axes: "Axes", run: Run) -> bool:
    axes.set(xlabel="episodes", ylabel="mean gold score", ylim=(0, 1))
    roles = {name: "best" for name in run.policies if name.startswith("best_of_")} | {"sft": "sft"}
    levels = [(policy_title(name), role, run.policies.get(name, {}).get("gold")) for name, role in roles.items()]
    return _curves(axes, [("PPO", "ppo", _ppo(run, "eval/gold"), False)], levels)


def _ppo_kl(axes: "Axes", run: Run) -> bool:
    axes.set(xlabel="episodes", ylabel="nats per answer")
    training, held_out = _ppo(run, "objective/kl"), _ppo(run, "eval/kl")
    heights = [0.0, *training[1], *held_out[1]]
    axes.set_ylim(1.05 * min(heights), 1.1 * max(heights) or 1.0)
    return _curves(axes, [("training", "ppo", training, True), ("held out", "ink", held_out, False)])


def _ppo_length(axes: "Axes", run: Run) -> bool:
    axes.set(xlabel="episodes", ylabel="tokens")
    training, held_out = _ppo(run, "response/length"), _ppo(run, "eval/length")
    axes.set_ylim(0, 1.15 * max([*training[1], *held_out[1]], default=1))
    return _curves(axes, [("training", "ppo", training, True), ("held out", "ink", held_out, False)])
