"""The report's plots. Each is drawn once and kept twice: as PNG for report.md and as SVG for the page.

In the SVG the light palette's colours become CSS variables and the letters stay letters, so that a plot follows the
page into dark mode and uses its font.
"""

import io
import re
from dataclasses import dataclass
from math import log
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.report.gather import Run, number, policy_title

# Role → light colour; page.py has the dark ones under the same names.
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
STYLE = Path(__file__).with_name("plots.mplstyle")
DASHES = (0, (4, 3))
SMOOTHING = 0.75  # weight of the past in the running mean of noisy curves


@dataclass
class Plot:
    """A drawn plot: `group` is the stage it belongs to."""

    name: str
    group: str
    title: str
    svg: str
    png: bytes


@dataclass(frozen=True)
class Chart:
    """Curves of the stage that `name` begins with: label (with the last value where it has a format) → metric."""

    name: str
    title: str
    unit: str
    curves: dict[str, str]
    low: float | None = (
        None  # the lowest height shown, unless a curve goes below it; without it heights follow the data
    )
    high: float | None = None


CHARTS = (
    Chart("pretrain-loss", "Pretraining loss", "nats per token", {"training": "loss", "held out": "val_loss"}),
    Chart("pretrain-bpb", "Held-out bits per byte", "bits per byte", {"GPT {:.2f}": "val_bpb"}, low=0),
    Chart("sft-loss", "Fine-tuning loss on answers", "nats per token", {"training": "loss", "held out": "eval_loss"}),
    Chart(
        "reward-accuracy",
        "Reward model: pairs ranked right",
        "share of pairs, noisy labels",
        {"training": "accuracy", "held out": "eval_accuracy"},
        low=0.4,
        high=1,
    ),
    Chart(
        "reward-loss",
        "Reward model: loss",
        "−log σ(margin), nats",
        {"training": "loss", "held out": "eval_loss"},
        low=0,
    ),
    Chart(
        "ppo-reward",
        "Reward that PPO earns",
        "reward model's standard scores",
        {"score": "objective/scores", "less KL": "objective/rlhf_reward", "held out": "eval/proxy"},
    ),
    Chart("ppo-gold", "Gold during PPO, held-out prompts", "mean gold score", {"PPO": "eval/gold"}, low=0, high=1),
    Chart("ppo-kl", "KL from SFT", "nats per answer", {"training": "objective/kl", "held out": "eval/kl"}, low=0),
    Chart(
        "ppo-length", "Length of answers", "tokens", {"training": "response/length", "held out": "eval/length"}, low=0
    ),
)
# Label → role; in PPO, where training and held-out prompts are answered by the policy, its colour is the training's.
ROLES = {"training": "quiet"}
PPO_ROLES = {"held out": "ink", "less KL": "muted"}


def _levels(chart: str, run: Run) -> list[tuple[str, str, float | None]]:
    """What a chart's curves are to be compared with, as dashed lines: (label, role, height)."""
    if chart == "pretrain-bpb":
        bits = {kind: run.final("pretrain", f"{kind}_bpb") for kind in ("uniform", "bigram")}
        return [(f"{kind} {number(height, '.2f')}", "muted", height) for kind, height in bits.items()]
    if chart == "ppo-gold":
        roles = {name: "best" for name in run.policies if name.startswith("best_of_")} | {"sft": "sft"}
        return [(policy_title(name), role, run.policies.get(name, {}).get("gold")) for name, role in roles.items()]
    fixed = {"reward-accuracy": ("chance", "muted", 0.5), "reward-loss": ("coin, log 2", "muted", log(2))}
    return [fixed[chart]] if chart in fixed else []


def draw_plots(run: Run) -> list[Plot]:
    """Every plot that the run has data for, in the chain's order."""
    with matplotlib.rc_context(fname=STYLE):
        plots = [_gold_by_policy(run), *(_chart(chart, run) for chart in CHARTS), _calibration(run)]
    order = ["evaluate", "pretrain", "sft", "reward", "ppo"]
    return sorted((plot for plot in plots if plot), key=lambda plot: order.index(plot.group))


def _blank() -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE)
    figure.subplots_adjust(left=0.1, right=0.8, top=0.8, bottom=0.17)
    return figure, figure.add_subplot()


def _finished(figure: Figure, name: str, group: str, title: str, unit: str) -> Plot:
    """The plot as SVG and PNG. The unit stands under the title, where it is read without turning one's head."""
    figure.text(0.025, 0.92, title, color=PALETTE["ink"], fontsize=10.5, fontweight="bold")
    figure.text(0.025, 0.855, unit, color=PALETTE["muted"], fontsize=8.5)
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
    view = re.findall(r'viewBox="[^"]+"', body)[0]
    opening = f'<svg {view} role="img" aria-label="{title}">'
    return opening + body[body.index(">") + 1 :].strip()


# ---- drawing --------------------------------------------------------------------------------------------------------


def _chart(chart: Chart, run: Run) -> Plot | None:
    """Curves, noisy ones faint under their running mean, and levels; None where the run has no point to draw."""
    (figure, axes), stage = _blank(), chart.name.partition("-")[0]
    x, roles = ("episode", PPO_ROLES) if stage == "ppo" else ("step", ROLES)
    ends, heights = [], []
    for label, metric in chart.curves.items():
        xs, ys = run.series(stage, metric, x)
        if not xs:
            continue
        heights += ys
        colour = PALETTE[roles.get(label, "ppo")]
        if stage == "ppo" and not metric.startswith("eval/") and len(ys) > 8:  # single updates are noisy
            axes.plot(xs, ys, color=colour, alpha=0.25, linewidth=1)
            ys = _running_mean(ys)
        axes.plot(xs, ys, color=colour, marker="o" if len(xs) <= 12 else None, markersize=3)
        ends.append((ys[-1], label.format(ys[-1]), colour))
    if not ends:
        return None
    for label, role, height in _levels(chart.name, run):
        if height is not None:
            heights.append(height)
            axes.axhline(height, color=PALETTE[role], linewidth=1, linestyle=DASHES)
            ends.append((height, label, PALETTE[role]))
    if chart.low is not None:
        axes.set_ylim(min(chart.low, 1.05 * min(heights)), chart.high or 1.1 * max(heights) or 1.0)
    axes.set_xlabel("episodes" if stage == "ppo" else "optimizer steps")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if abs(x) >= 1000 else f"{x:g}")
    axes.margins(x=0.02)
    _label_ends(axes, ends)
    return _finished(figure, chart.name, stage, chart.title, chart.unit)


def _running_mean(ys: list[float]) -> list[float]:
    """Exponential running mean with the start's bias taken out (Adam's correction)."""
    total, weight, out = 0.0, 0.0, []
    for y in ys:
        total, weight = SMOOTHING * total + (1 - SMOOTHING) * y, SMOOTHING * weight + 1 - SMOOTHING
        out.append(total / weight)
    return out


def _label_ends(axes: Axes, ends: list[tuple[float, str, str]], gap: float = 0.09) -> None:
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


def _gold_by_policy(run: Run) -> Plot | None:
    rows = [(name, p) for name, p in reversed(run.policies.items()) if p["gold"] is not None]
    if not rows:
        return None
    figure, axes = _blank()
    figure.subplots_adjust(left=0.2, right=0.88, bottom=0.1)
    roles = {"pretrain": "quiet", "sft": "sft", "ppo": "ppo"}
    for place, (name, p) in enumerate(rows):
        colour = PALETTE[roles.get(name, "best")]
        axes.plot(p["gold_ci95"], [place, place], color=colour, linewidth=5, alpha=0.3)
        axes.plot([p["gold"]], [place], "o", color=colour, markersize=8)
    axes.set(xlim=(0, 1), ylim=(-0.6, len(rows) - 0.4))
    axes.set_yticks(range(len(rows)), [policy_title(name) for name, _ in rows], fontsize=9, color=PALETTE["ink"])
    values = axes.secondary_yaxis("right")
    values.set_yticks(range(len(rows)), [f"{p['gold']:.2f}" for _, p in rows], fontsize=10, fontweight="bold")
    values.tick_params(labelcolor=PALETTE["ink"])
    values.spines["right"].set_visible(False)
    axes.grid(axis="x", color=PALETTE["grid"])
    unit = "mean score of the judge, 95% interval"
    return _finished(figure, "gold", "evaluate", "Gold on held-out prompts", unit)


def _calibration(run: Run) -> Plot | None:
    bins = run.calibration.get("bins", [])
    if not bins:
        return None
    figure, axes = _blank()
    low = 0.5 if all(b["predicted"] >= 0.5 for b in bins) else 0.0
    axes.plot([low, 1], [low, 1], color=PALETTE["muted"], linewidth=1, linestyle=DASHES)
    most = max(b["n"] for b in bins)
    for x, y, n in ((b["predicted"], b["observed"], b["n"]) for b in bins):
        spread = 1.96 * (y * (1 - y) / n) ** 0.5
        axes.plot([x, x], [max(0.0, y - spread), min(1.0, y + spread)], color=PALETTE["ppo"], alpha=0.3, linewidth=2)
        axes.scatter(x, y, s=12 + 60 * n / most, color=PALETTE["ppo"], linewidths=0, zorder=3)
    axes.set(xlabel="predicted, σ(margin)", xlim=(low - 0.02, 1.02))
    axes.set_ylim(max(0.0, min([low, *(b["observed"] for b in bins)]) - 0.08), 1.05)
    _label_ends(axes, [(1.0, "perfect", PALETTE["muted"])])
    axes.text(1.025, 0.0, "dot size:\npairs", transform=axes.transAxes, color=PALETTE["muted"], fontsize=8)
    unit = "share of pairs where the prediction held"
    return _finished(figure, "reward-calibration", "reward", "Reward model: calibration", unit)
