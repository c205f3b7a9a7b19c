"""What a run came to, gathered from what its stages left behind: stage.json, metrics.jsonl, evaluate/.

`read_run` reads, `summary` picks the figures that people and scripts compare runs by, `headline` says in a sentence
whether PPO helped, `markdown` writes it down; report_html.py and report_plots.py make it a page to look at. A run that
went only part of the way is reported as far as it went.
"""

import json
import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

STAGES = ("tokenizer", "pretrain", "sft", "preferences", "reward", "ppo", "evaluate")
# Figures that summary.json has under these names for every run, in this order; whatever else a stage recorded follows.
FIXED = {
    "pretrain": ("val_bpb", "bigram_bpb", "tokens_per_s"),
    "sft": ("val_loss",),
    "reward": ("accuracy",),
    "ppo": ("episodes_per_s", "kl"),
}
POLICY_FIGURES = ("gold", "proxy", "kl", "length", "distinct_2")


@dataclass
class Run:
    """A run's records. `stages` has what is in stage.json by stage, in the chain's order, for finished stages only."""

    folder: Path
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    policies: dict[str, dict[str, Any]] = field(default_factory=dict)
    win_rate: dict[str, dict[str, Any]] = field(default_factory=dict)
    num_prompts: int | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)
    calibration: dict[str, Any] = field(default_factory=dict)

    @property
    def missing(self) -> list[str]:
        """Stages that have not finished."""
        return [name for name in STAGES if name not in self.stages]

    @property
    def preset(self) -> str:
        return next(iter(self.stages.values()))["preset"]

    @property
    def seed(self) -> int:
        return next(iter(self.stages.values()))["seed"]

    @property
    def seconds(self) -> float:
        """Seconds of all finished stages together."""
        return sum(stage["seconds"] for stage in self.stages.values())

    def final(self, stage: str, name: str) -> Any:
        """A final metric of a stage, or None."""
        return self.stages.get(stage, {}).get("metrics", {}).get(name)

    def series(self, stage: str, y: str, x: str = "step") -> tuple[list[float], list[float]]:
        """The points of a metric over a stage's steps (or another column), those that are finite numbers."""
        points = [
            (row[x], row[y]) for row in self.metrics.get(stage, []) if _is_number(row.get(x)) and _is_number(row.get(y))
        ]
        return [p[0] for p in points], [p[1] for p in points]


def read_run(folder: Path | str) -> Run:
    """Read what is there. Raises UserError if no stage has finished, or if a file is damaged."""
    run = Run(Path(folder))
    for name in STAGES:
        file = run.folder / name / "stage.json"
        if file.is_file():
            run.stages[name] = _read_json(file)
            metrics = file.with_name("metrics.jsonl")
            run.metrics[name] = _read_lines(metrics) if metrics.is_file() else []
    if not run.stages:
        raise UserError(f"report: no stage has finished in {folder}; run `make` first, or set run_dir")
    if "evaluate" in run.stages:
        scores = _read_json(run.folder / "evaluate" / "scores.json")
        run.policies, run.win_rate = scores["policies"], scores["win_rate"]
        run.num_prompts = scores.get("num_prompts")
        run.samples = _read_lines(run.folder / "evaluate" / "samples.jsonl")
    calibration = run.folder / "reward" / "calibration.json"
    if "reward" in run.stages and calibration.is_file():
        run.calibration = _read_json(calibration)
    return run


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"report: {file} is missing; run `make {file.parent.name}` again") from None
    except ValueError:
        raise UserError(f"report: {file} is damaged; run `make {file.parent.name}` again") from None


def _read_lines(file: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]
    except FileNotFoundError:
        raise UserError(f"report: {file} is missing; run `make {file.parent.name}` again") from None
    except ValueError:
        raise UserError(f"report: {file} has a line that is not JSON; run `make {file.parent.name}` again") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# ---- figures --------------------------------------------------------------------------------------------------------


def summary(run: Run) -> dict[str, Any]:
    """summary.json: the fixed names of FIXED and POLICY_FIGURES first (null where a stage did not record one), then
    whatever else there is; stages and policies that the run does not have are left out."""
    stages = {}
    for name, record in run.stages.items():
        figures = {k: v for k, v in record["metrics"].items() if not isinstance(v, dict)}
        if name == "sft":
            figures["val_loss"] = figures.pop("eval_loss", None)
        fixed = {key: figures.pop(key, None) for key in FIXED.get(name, ())}
        stages[name] = fixed | {"seconds": record["seconds"]} | figures
    policies = {
        name: {key: figures.get(key) for key in POLICY_FIGURES} | figures for name, figures in run.policies.items()
    }
    return {
        "preset": run.preset,
        "seed": run.seed,
        "total_seconds": round(run.seconds, 1),
        "stages": stages,
        "policies": policies,
        "win_rate": run.win_rate,
    }


def headline(run: Run) -> tuple[str, str]:
    """A title of a few words and one sentence with the numbers: did PPO make it better?"""
    if "evaluate" not in run.stages:
        done = ", ".join(run.stages)
        return "No verdict yet", f"Finished so far: {done}. The policies have not been judged: run make evaluate."
    sft, ppo, win = run.policies["sft"], run.policies["ppo"], run.win_rate.get("ppo_vs_sft")
    if win is None:
        return (
            "No gold judge",
            f"Without one, all there is to see is that PPO moved the reward model's score from "
            f"{sft['proxy']:.2f} to {ppo['proxy']:.2f} at a KL of {ppo['kl']:.1f} nats.",
        )
    low, high = win["ci95"]
    verdict = "better" if low > 0.5 else "worse" if high < 0.5 else None
    title = f"PPO made the model {verdict}" if verdict else "PPO made no clear difference"
    return title, (
        f"Gold went from {with_interval(sft)} for SFT to {with_interval(ppo)} for PPO, whose answer wins on "
        f"{win['mean']:.0%} of {win['n']} held-out prompts against SFT's "
        f"(95% interval {low:.0%} to {high:.0%}, ties half)."
    )


def with_interval(figures: dict[str, Any]) -> str:
    """Gold with its interval: `0.52 (0.48–0.56)`."""
    if figures["gold"] is None:
        return "–"
    low, high = figures["gold_ci95"]
    return f"{figures['gold']:.2f} ({low:.2f}–{high:.2f})"


def policy_title(name: str) -> str:
    """How a policy is called in tables: `best_of_16` is `Best of 16`."""
    known = {"pretrain": "Pretrained", "sft": "SFT", "ppo": "PPO"}
    return known.get(name) or name.replace("_", " ").capitalize()


def policy_rows(run: Run) -> list[list[str]]:
    """The policies as a table of text: name, gold, proxy, KL, length, distinct-2, bits per byte, share without end."""
    rows = []
    for name, p in run.policies.items():
        rows.append(
            [
                policy_title(name),
                with_interval(p),
                number(p["proxy"], ".2f"),
                number(p["kl"], ".1f"),
                number(p["length"], ".1f"),
                number(p["distinct_2"], ".2f"),
                number(p.get("bpb_under_pretrained"), ".2f"),
                number(p.get("without_eos"), ".0%"),
            ]
        )
    return rows


POLICY_COLUMNS = ["Policy", "Gold", "Proxy", "KL", "Length", "Distinct-2", "Bits/byte", "No end"]
POLICY_NOTES = (
    "Gold: mean score, in [0, 1], of the judge that PPO is never paid by, with a 95% bootstrap interval. "
    "Proxy: mean standardised score of the reward model. KL: to SFT, in nats an answer. Length: tokens. "
    "Distinct-2: distinct word pairs over all word pairs. Bits/byte: of the answers under the pretrained model. "
    "No end: share of answers cut off at the longest length."
)


def number(value: float | None, form: str) -> str:
    """A number in the given format, or a dash."""
    return "–" if value is None else format(value, form).replace("-", "−")


def duration(seconds: float) -> str:
    """`8 s`, `3 min 05 s`, `2 h 10 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def stage_rows(run: Run) -> list[list[str]]:
    """The stages as a table of text: name, time, data, parameters, key figures."""
    return [
        [name, duration(stage["seconds"]), _data(name, stage), _parameters(run.folder / name), _key_figures(name, run)]
        for name, stage in run.stages.items()
    ]


STAGE_COLUMNS = ["Stage", "Time", "Data", "Parameters", "Result"]


def _data(name: str, record: dict[str, Any]) -> str:
    metrics, config = record["metrics"], record["config"]
    counts = [(metrics.get(unit), unit) for unit in ("rows", "pairs", "episodes")]
    counts += [(record.get("tokens"), "tokens")]
    counts += [(config.get("num_prompts"), "prompts")] if name == "evaluate" else []
    return ", ".join(f"{count:,} {unit}" for count, unit in counts if count) or "–"


def _key_figures(name: str, run: Run) -> str:
    """What a stage is judged by, in words."""
    forms = {
        "tokenizer": (("vocab_size", "{:,} entries"), ("bytes_per_token", "{:.2f} bytes a token")),
        "pretrain": (("val_bpb", "{:.3f} bits/byte held out"), ("tokens_per_s", "{:,.0f} tokens/s")),
        "sft": (("eval_loss", "held-out loss {:.3f}"),),
        "preferences": (("flip_rate", "{:.1%} of labels flipped by noise"),),
        "reward": (("accuracy", "{:.1%} of held-out pairs right"),),
        "ppo": (("kl", "KL {:.1f} nats"), ("episodes_per_s", "{:.1f} episodes/s")),
    }
    if name == "evaluate":
        win = run.win_rate.get("ppo_vs_sft")
        return f"PPO wins {win['mean']:.0%} against SFT" if win else "–"
    values = [(run.final(name, key), form) for key, form in forms[name]]
    return ", ".join(form.format(value) for value, form in values if value is not None) or "–"


def _parameters(folder: Path) -> str:
    """Parameters in a folder's safetensors files, from their headers alone (a tied matrix is stored once)."""
    count = 0
    for file in folder.glob("model*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
        count += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return f"{count / 1e6:.2f} M" if count else "–"


def sample_groups(run: Run, count: int) -> list[tuple[str, dict[str, dict[str, Any]]]]:
    """The first `count` prompts, each with its rows by policy."""
    groups: dict[int, tuple[str, dict[str, dict[str, Any]]]] = {}
    for row in run.samples:
        groups.setdefault(row["index"], (row["prompt"], {}))[1][row["policy"]] = row
    return list(groups.values())[:count]


def provenance(run: Run) -> list[tuple[str, str]]:
    """Facts that hold for the run as a whole."""
    last = list(run.stages.values())[-1]
    processes = sorted({record["processes"] for record in run.stages.values()})
    commits = sorted({record["git_commit"] or "none" for record in run.stages.values()})
    return [
        ("Folder", str(run.folder)),
        ("Started", next(iter(run.stages.values()))["started"].replace("T", " ")),
        ("Seed", ", ".join(str(s) for s in sorted({record["seed"] for record in run.stages.values()}))),
        ("Device", f"{last['device']}; processes: {', '.join(map(str, processes))}"),
        ("Code", ", ".join(_short_commit(commit) for commit in commits)),
        ("Versions", ", ".join(f"{name} {version}" for name, version in last["versions"].items())),
    ]


def _short_commit(commit: str) -> str:
    head, dash, tail = commit.partition("-")
    return head[:12] + dash + tail


def inputs_of(record: dict[str, Any]) -> str:
    """A stage's inputs with the beginning of their sha256."""
    return ", ".join(f"{i['path']} ({i['sha256'][:10]})" for i in record["inputs"].values()) or "none"


# ---- Markdown -------------------------------------------------------------------------------------------------------


def markdown(run: Run, plots: list[tuple[str, str]], num_samples: int) -> str:
    """The report as Markdown; `plots` are (title, path) of images beside it."""
    title, sentence = headline(run)
    parts = [f"# {title}", sentence, f"Preset {run.preset}, seed {run.seed}, {duration(run.seconds)} in all."]
    if run.missing:
        parts.append(f"Not in this report, because they have not run: {', '.join(run.missing)}.")
    if run.policies:
        parts += ["## Policies", _table(POLICY_COLUMNS, policy_rows(run)), POLICY_NOTES]
    if run.samples:
        parts.append("## Answers\n\nThe first held-out prompts, not chosen ones.")
        for prompt, answers in sample_groups(run, num_samples):
            parts.append(f"**{_inline(prompt)}**")
            parts += [f"> *{policy_title(p)}{_gold(row)}:* {_inline(row['completion'])}" for p, row in answers.items()]
    parts += ["## Training", *(f"![{name}]({path})" for name, path in plots)] if plots else []
    parts += ["## Stages", _table(STAGE_COLUMNS, stage_rows(run))]
    parts += ["## Provenance", "\n".join(f"- {name}: {_inline(value)}" for name, value in provenance(run))]
    commands = [[name, f"`{record['command']}`", inputs_of(record)] for name, record in run.stages.items()]
    parts.append(_table(["Stage", "Command", "Inputs (sha256)"], commands))
    return "\n\n".join(parts) + "\n"


def _gold(row: dict[str, Any]) -> str:
    return "" if row["gold"] is None else f", gold {row['gold']:.2f}"


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _inline(text: str) -> str:
    """Text of a model on one line, with what Markdown would read as markup taken literally."""
    escaped = "".join("\\" + c if c in "\\`*_[]<>#|" else c for c in text)
    return " ".join(escaped.split()) or "(nothing)"
