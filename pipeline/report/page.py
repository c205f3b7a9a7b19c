"""The report as one page: no script, no link, nothing to load; readable on a phone and in the dark."""

from html import escape

from pipeline.report.gather import (
    POLICY_COLUMNS,
    POLICY_NOTES,
    STAGE_COLUMNS,
    Run,
    duration,
    headline,
    inputs_of,
    number,
    policy_rows,
    policy_title,
    provenance,
    sample_groups,
    stage_rows,
)
from pipeline.report.plots import PALETTE, Plot

DARK = {
    "ink": "#e9e6df",
    "muted": "#9b9fa6",
    "grid": "#2d3136",
    "quiet": "#747982",
    "sft": "#e5936b",
    "best": "#d9b256",
    "ppo": "#56c4bd",
}
SHOWN = ("pretrain", "sft", "ppo")  # whose answers stand side by side

CSS = """
:root { color-scheme: light dark; --page: #fbfaf6; --card: #ffffff; LIGHT
  --sans: ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --serif: "Iowan Old Style", "Palatino Linotype", Palatino, "Book Antiqua", Georgia, serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
@media (prefers-color-scheme: dark) { :root { --page: #14161a; --card: #1b1e23; DARK } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 var(--sans); }
main { max-width: 66rem; margin: 0 auto; padding: clamp(1.5rem, 5vw, 4.5rem) clamp(1rem, 4vw, 2.5rem) 5rem; }
h1 { font: 500 clamp(2rem, 6vw, 3.3rem)/1.08 var(--serif); letter-spacing: -.015em; margin: .5rem 0 1rem;
  text-wrap: balance; }
h2 { font: 500 1.6rem/1.2 var(--serif); margin: 4rem 0 .35rem; padding-top: 1.1rem; border-top: 1px solid var(--grid); }
h3 { font: 600 1rem/1.3 var(--sans); margin: 2.2rem 0 .2rem; }
p { max-width: 44rem; margin: .35rem 0 1rem; }
.over, .note { color: var(--muted); font-size: .875rem; }
.over { letter-spacing: .02em; margin: 0; }
.lead { font-size: 1.15rem; line-height: 1.5; }
.warn { border-left: 3px solid var(--best); padding-left: .9rem; }
.figures { display: flex; flex-wrap: wrap; gap: 1.2rem 3rem; margin: 2.2rem 0 0; padding: 0; }
.figures div { display: flex; flex-direction: column-reverse; }
.figures dd { margin: 0; font: 500 2.1rem/1.15 var(--serif); font-variant-numeric: lining-nums tabular-nums; }
.figures dt { color: var(--muted); font-size: .85rem; }
.arrow { color: var(--muted); font-size: .75em; padding: 0 .12em; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem 1.1rem .5rem 0; text-align: left; border-bottom: 1px solid var(--grid); vertical-align: top; }
th { color: var(--muted); font-weight: 500; font-size: .82rem; white-space: nowrap; }
td:first-child { font-weight: 600; white-space: nowrap; }
.numbers td { white-space: nowrap; }
.stage td { min-width: 5rem; } .stage td:last-child { min-width: 12rem; }
.ppo td:first-child, .ppo h4 { color: var(--ppo); } .sft td:first-child, .sft h4 { color: var(--sft); }
.best td:first-child { color: var(--best); }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
.plots { margin: 1rem 0; align-items: center; }
figure, .answers section { background: var(--card); border: 1px solid var(--grid); border-radius: 10px; }
figure { margin: 0; padding: .6rem .5rem .3rem; }
figure svg { display: block; width: 100%; height: auto; }
.sample { margin: 1.4rem 0 2.4rem; }
.ask { font-weight: 600; margin-bottom: .7rem; }
.answers { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); }
.answers section { padding: .9rem 1.1rem 1rem; }
.answers h4 { display: flex; justify-content: space-between; margin: 0 0 .4rem; font-size: .875rem; }
.answers h4 span { color: var(--muted); font-weight: 400; }
.answers p { margin: 0; font: 1.02rem/1.5 var(--serif); white-space: pre-wrap; overflow-wrap: anywhere; }
.cut { color: var(--muted); font-style: italic; }
code { font: .82rem/1.5 var(--mono); overflow-wrap: anywhere; }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.4rem; margin: 1rem 0;
  font-size: .92rem; }
dl.facts dt { color: var(--muted); } dl.facts dd { margin: 0; overflow-wrap: anywhere; }
details { border-bottom: 1px solid var(--grid); padding: .55rem 0; }
summary { cursor: pointer; font-weight: 600; }
summary span { color: var(--muted); font-weight: 400; margin-left: .6rem; }
details p { max-width: none; margin: .5rem 0; }
@media print { body { background: #fff; } figure, .answers section { break-inside: avoid; } }
"""


def page(run: Run, plots: list[Plot], num_samples: int) -> str:
    """The whole page as HTML text."""
    title, sentence = headline(run)
    body = [
        f'<p class="over">{escape(_byline(run))}</p>',
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(sentence)}</p>',
        _missing(run),
        _figures(run),
        _policies(run, plots),
        _samples(run, num_samples),
        _training(run, plots),
        "<h2>Stages</h2>",
        _table(STAGE_COLUMNS, stage_rows(run), ["stage"] * len(run.stages)),
        _provenance(run),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)} · {escape(run.preset)}</title>\n<style>{_css()}</style>\n</head>\n"
        f"<body>\n<main>\n{chr(10).join(part for part in body if part)}\n</main>\n</body>\n</html>\n"
    )


def _css() -> str:
    def variables(palette: dict[str, str]) -> str:
        return " ".join(f"--{role}: {colour};" for role, colour in palette.items())

    return CSS.replace("LIGHT", variables(PALETTE)).replace("DARK", variables(DARK))


def _byline(run: Run) -> str:
    return f"{run.preset} · seed {run.seed} · {duration(run.seconds)} from text to report"


def _missing(run: Run) -> str:
    if not run.missing:
        return ""
    return f'<p class="warn">Not in this report, because they have not run: {escape(", ".join(run.missing))}.</p>'


def _figures(run: Run) -> str:
    """The few figures that a person remembers."""
    facts = []
    if run.policies and run.policies["sft"]["gold"] is not None:
        sft, ppo, arrow = run.policies["sft"], run.policies["ppo"], '<span class="arrow">→</span>'
        facts.append(("gold, SFT to PPO", f"{sft['gold']:.2f} {arrow} {ppo['gold']:.2f}"))
        facts.append(("wins against SFT", f"{run.win_rate['ppo_vs_sft']['mean']:.0%}"))
        facts.append(("KL to SFT, nats", number(ppo["kl"], ".1f")))
    accuracy, bpb = run.final("reward", "accuracy"), run.final("pretrain", "val_bpb")
    facts += [("reward model, held-out pairs", f"{accuracy:.0%}")] if accuracy is not None else []
    facts += [("pretrained, bits per byte", f"{bpb:.2f}")] if bpb is not None else []
    items = "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in facts)
    return f'<dl class="figures">{items}</dl>' if items else ""


def _policies(run: Run, plots: list[Plot]) -> str:
    if not run.policies:
        return ""
    kinds = ["best" if name.startswith("best_of") else name for name in run.policies]
    count = f" {run.num_prompts}" if run.num_prompts else ""
    figure = "".join(f"<figure>{p.svg}</figure>" for p in plots if p.group == "evaluate")
    return (
        f"<h2>Policies</h2>\n<p>Every policy answered the same{count} held-out prompts.</p>\n"
        f'<div class="plots">{figure}<p class="note">{POLICY_NOTES.replace(". ", ".<br>")}</p></div>\n'
        f"{_table(POLICY_COLUMNS, policy_rows(run), kinds, 'numbers')}"
    )


def _samples(run: Run, count: int) -> str:
    if not run.samples:
        return ""
    parts = ['<h2>Answers</h2>\n<p class="note">The first held-out prompts, not chosen ones.</p>']
    for prompt, rows in sample_groups(run, count):
        cards = "".join(_card(name, rows[name]) for name in SHOWN if name in rows)
        ask = f'<p class="ask">{escape(prompt)}</p>'
        parts.append(f'<div class="sample">{ask}<div class="answers">{cards}</div></div>')
    return "\n".join(parts)


def _card(name: str, row: dict) -> str:
    gold = "" if row["gold"] is None else f"gold {row['gold']:.2f}"
    cut = "" if row.get("ended", True) else ' <span class="cut">cut off</span>'
    text = escape(row["completion"].strip()) or '<span class="cut">(nothing)</span>'
    return f'<section class="{name}"><h4>{policy_title(name)}<span>{gold}</span></h4><p>{text}{cut}</p></section>'


def _training(run: Run, plots: list[Plot]) -> str:
    """Plots by stage, each stage with a sentence on what is to be seen."""
    parts = []
    titles = {"pretrain": "Pretraining", "sft": "Fine-tuning", "reward": "Reward model", "ppo": "PPO"}
    for group, title in titles.items():
        figures = [f"<figure>{plot.svg}</figure>" for plot in plots if plot.group == group]
        if figures:
            grid = f'<div class="plots">{"".join(figures)}</div>'
            parts.append(f"<h3>{title}</h3>\n<p>{escape(_reading(group, run))}</p>\n{grid}")
    return "<h2>Training</h2>\n" + "\n".join(parts) if parts else ""


def _reading(group: str, run: Run) -> str:
    if group == "pretrain":
        names = ("val_bpb", "bigram_bpb", "uniform_bpb")
        ours, bigram, uniform = (number(run.final(group, name), ".2f") for name in names)
        return f"Held-out text costs {ours} bits a byte; a bigram model needs {bigram}, a uniform one {uniform}."
    if group == "sft":
        return "The loss is on the tokens of the answer and its end alone."
    if group == "reward":
        bins = run.calibration.get("bins", [])
        total = sum(b["n"] for b in bins)
        off = sum(b["n"] * abs(b["predicted"] - b["observed"]) for b in bins) / total if total else None
        calibrated = "" if off is None else f" Its stated confidence is off by {off:.0%} on average."
        clean, noisy = run.final("reward", "accuracy"), run.final("reward", "noisy_accuracy")
        noise = "" if noisy in (None, clean) else f", {noisy:.1%} if the labels' noise is left in"
        return f"It ranks {number(clean, '.1%')} of held-out pairs right{noise}.{calibrated}"
    return "Faint lines are single updates, strong ones running means. Gold is only looked at, never optimised."


def _provenance(run: Run) -> str:
    facts = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in provenance(run))
    blocks = []
    for name, record in run.stages.items():
        settings = ", ".join(f"{key} {value}" for key, value in record["config"].items())
        blocks.append(
            f"<details><summary>{name}<span>{duration(record['seconds'])}</span></summary>"
            f"<p><code>{escape(record['command'])}</code></p><p class='note'>Inputs: {escape(inputs_of(record))}</p>"
            f"<p class='note'>Settings: {escape(settings)}</p></details>"
        )
    heading = '<h2>Provenance</h2>\n<p class="note">What was run, and the beginning of the sha256 of what it read.</p>'
    return f'{heading}\n<dl class="facts">{facts}</dl>\n{"".join(blocks)}'


def _table(columns: list[str], rows: list[list[str]], kinds: list[str], kind: str = "") -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        f'<tr class="{k}">' + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for k, row in zip(kinds, rows, strict=True)
    )
    table = f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll">{table}</div>'
