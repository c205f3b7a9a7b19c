"""What a run came to, gathered from what its stages left behind: stage.json, metrics.jsonl, evaluate/.

`read_run` reads, `summary` picks the figures that people and scripts compare runs by, `headline` says in a sentence
whether PPO helped, `policy_table` and `stage_table` write figures as text. The page, the Markdown and the terminal all
show these tables. A run that went only part of the way is reported as far as it went.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from pipeline.chain import CHAIN, make_words
from pipeline.errors import UserError

STAGES = {stage.name: stage for stage in CHAIN if stage.name != "report"}
Shape = dict[str, Any]
"""Keys that an object must have, each with the types that its value may have."""
NUMBER = (int, float)
RECORD: Shape = {
    **dict.fromkeys(("stage", "preset", "command", "started", "device"), str),
    **dict.fromkeys(("config", "inputs", "metrics", "versions"), dict),
    **dict.fromkeys(("seed", "processes"), int),
    "seconds": NUMBER,
}
SAMPLE: Shape = {"index": int, **dict.fromkeys(("prompt", "policy", "completion"), str)}
POLICY_FIGURES = ("gold", "proxy", "kl", "length", "distinct_2")


@dataclass
class Run:
    """A run's records. `stages` has what is in stage.json by stage, in the chain's order, for finished stages only."""

    folder: Path
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    policies: dict[str, dict[str, Any]] = field(default_factory=dict)
    win_rate: dict[str, dict[str, Any]] = field(default_factory=dict)
    judges: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """By judge, PPO's paired difference to SFT: `ppo_vs_sft` → mean, standard_error, n."""
    num_prompts: int | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)
    calibration: dict[str, Any] = field(default_factory=dict)

    @property
    def missing(self) -> list[str]:
        """Stages that have not finished, of those of a run that converts a model or of one that pretrains it."""
        away = {name for stage in self.stages for name in STAGES[stage].stands_for}
        away |= {stage.name for stage in STAGES.values() if stage.stands_for} - self.stages.keys()
        return [name for name in STAGES if name not in self.stages and name not in away]

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
        """A final metric of a stage, or None. Dots in the name go into dictionaries."""
        found = self.stages.get(stage, {}).get("metrics", {})
        for key in name.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        return found

    @property
    def miscalibration(self) -> float | None:
        """Mean distance of the reward model's stated confidence from the share that was right, weighted by pairs."""
        bins = self.calibration.get("bins", [])
        off = sum(b["n"] * abs(b["predicted"] - b["observed"]) for b in bins)
        return off / sum(b["n"] for b in bins) if bins else None

    def series(self, stage: str, y: str, x: str = "step") -> tuple[list[float], list[float]]:
        """The points of a metric over a stage's steps (or another column), those that are finite numbers."""
        rows = [row for row in self.metrics.get(stage, []) if _is_number(row.get(x)) and _is_number(row.get(y))]
        return [row[x] for row in rows], [row[y] for row in rows]


def read_run(folder: Path | str) -> Run:
    """Read what is there. Raises UserError if no stage has finished, or if a file is damaged."""
    run = Run(Path(folder))
    for name in STAGES:
        file = run.folder / name / "stage.json"
        if file.is_file():
            run.stages[name] = _read(file, RECORD)
            for given in run.stages[name]["inputs"].values():
                _check_shape(file, given, {"path": str, "sha256": str})
            metrics = file.with_name("metrics.jsonl")
            run.metrics[name] = _read(metrics, {}) if metrics.is_file() else []
    if not run.stages:
        raise UserError(f"report: no stage has finished in {folder}; run `make` first, or set run_dir")
    if "evaluate" in run.stages:
        scores = _read(run.folder / "evaluate" / "scores.json", {"policies": dict, "win_rate": dict})
        run.policies, run.win_rate = scores["policies"], scores["win_rate"]
        run.num_prompts, run.judges = scores.get("num_prompts"), scores.get("judges", {})
        run.samples = _read(run.folder / "evaluate" / "samples.jsonl", SAMPLE)
        _check_scores(run)
    calibration = run.folder / "reward" / "calibration.json"
    if "reward" in run.stages and calibration.is_file():
        run.calibration = _read(calibration, {"bins": list})
        for place in run.calibration["bins"]:
            _check_shape(calibration, place, dict.fromkeys(("predicted", "observed", "n"), NUMBER))
    return run


def _read(file: Path, shape: Shape) -> Any:
    """The content of a .json file, or the rows of a .jsonl file; each an object with at least the keys of `shape`."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise _unreadable(file, "is missing") from None
    except ValueError:
        raise _unreadable(file, "is no text") from None
    if file.suffix != ".jsonl":
        return _parsed(file, text, shape, "is damaged")
    # By newline alone: U+2028 and its like may stand within a text
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    return [_parsed(file, line, shape, f"has a line that is not JSON (line {number})") for number, line in lines]


def _parsed(file: Path, text: str, shape: Shape, problem: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        raise _unreadable(file, problem) from None
    _check_shape(file, value, shape)
    return value


def _check_shape(file: Path, value: Any, shape: Shape) -> None:
    if not isinstance(value, dict):
        raise _unreadable(file, f"has {json.dumps(value)[:40]} where an object should be")
    for key, kinds in shape.items():
        if not isinstance(value.get(key), kinds):
            raise _unreadable(file, f"lacks {key}, or has something else there")


def _check_scores(run: Run) -> None:
    """Raise UserError unless scores.json has what the report shows of each policy and comparison."""
    file = run.folder / "evaluate" / "scores.json"
    _check_shape(file, run.policies, {"sft": dict, "ppo": dict})
    _check_shape(file, run.win_rate, {"ppo_vs_sft": dict} if run.win_rate else {})
    for figures in run.policies.values():
        _check_shape(file, figures, dict.fromkeys(POLICY_FIGURES, (*NUMBER, type(None))))
        figures |= dict.fromkeys(POLICY_FIGURES) | figures  # null where one was not recorded
        if figures["gold"] is not None and not _is_interval(figures.get("gold_ci95")):
            raise _unreadable(file, "has a gold_ci95 that is no interval")
    for wins in run.win_rate.values():
        _check_shape(file, wins, {"mean": NUMBER, "n": int})
        if not _is_interval(wins.get("ci95")):
            raise _unreadable(file, "has a ci95 that is no interval")
    _check_shape(file, run.judges, dict.fromkeys(run.judges, dict))
    for name, found in run.judges.items():
        _check_shape(file, found, {"ppo_vs_sft": dict})
        _check_shape(file, found["ppo_vs_sft"], {"mean": NUMBER, "standard_error": (*NUMBER, type(None)), "n": int})
        for figures in run.policies.values():
            _check_shape(file, figures, {f"judge_{name}": NUMBER})
            if not _is_interval(figures.get(f"judge_{name}_ci95")):
                raise _unreadable(file, f"has a judge_{name}_ci95 that is no interval")
    for row in run.samples:
        row.setdefault("gold", None)


def _is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


def _unreadable(file: Path, problem: str) -> UserError:
    again = f"run `{make_words(file.parent.name, str(file.parents[1]))} ARGS='--fresh True'` to make it again"
    return UserError(f"report: {file} {problem}; {again}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# ---- figures --------------------------------------------------------------------------------------------------------


def summary(run: Run) -> dict[str, Any]:
    """summary.json: the fixed names of the chain and POLICY_FIGURES first (null where a stage did not record one), then
    whatever else there is; stages and policies that the run does not have are left out."""
    stages = {}
    for name, record in run.stages.items():
        others = {key: value for key, value in record["metrics"].items() if not isinstance(value, dict)}
        fixed = {key: others.pop(metric, None) for key, metric in STAGES[name].fixed.items()}
        stages[name] = fixed | {"seconds": record["seconds"]} | others
    return {
        "preset": run.preset,
        "seed": run.seed,
        "total_seconds": round(run.seconds, 1),
        "stages": stages,
        "policies": {name: dict.fromkeys(POLICY_FIGURES) | figures for name, figures in run.policies.items()},
        "win_rate": run.win_rate,
        **({"judges": run.judges} if run.judges else {}),
    }


def headline(run: Run) -> tuple[str, str]:
    """A title of a few words and one sentence with the numbers: did PPO make it better?"""
    if "evaluate" not in run.stages:
        done = ", ".join(run.stages)
        return "No verdict yet", f"Finished so far: {done}. The policies have not been judged: run make evaluate."
    sft, ppo, win = run.policies["sft"], run.policies["ppo"], run.win_rate.get("ppo_vs_sft")
    if win is None:
        before, after, kl = number(sft["proxy"], ".2f"), number(ppo["proxy"], ".2f"), number(ppo["kl"], ".1f")
        return "No gold judge", (
            f"Without one, all there is to see is that PPO moved the reward model's score from {before} to {after} at "
            f"a KL of {kl} nats."
        )
    low, high = win["ci95"]
    verdict = "better" if low > 0.5 else "worse" if high < 0.5 else None
    title = f"PPO made the model {verdict}" if verdict else "PPO made no clear difference"
    return title, (
        f"Gold went from {with_interval(sft)} for SFT to {with_interval(ppo)} for PPO, whose answer wins on "
        f"{win['mean']:.0%} of {win['n']} held-out prompts against SFT's "
        f"(95% interval {low:.0%} to {high:.0%}, ties half)."
    )


def sample_groups(run: Run, count: int) -> list[tuple[str, dict[str, dict[str, Any]]]]:
    """The first `count` prompts, each with its rows by policy."""
    groups: dict[int, tuple[str, dict[str, dict[str, Any]]]] = {}
    for row in run.samples:
        groups.setdefault(row["index"], (row["prompt"], {}))[1][row["policy"]] = row
    return list(groups.values())[:count]


# ---- figures as text ------------------------------------------------------------------------------------------------


def number(value: float | None, form: str) -> str:
    """A number in the given format, or a dash."""
    return "–" if value is None else format(value, form).replace("-", "−")


def duration(seconds: float) -> str:
    """`8 s`, `3 min 05 s`, `2 h 10 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def with_interval(figures: dict[str, Any], name: str = "gold") -> str:
    """A judge's mean with its interval: `0.52 (0.48–0.56)`."""
    if figures[name] is None:
        return "–"
    low, high = (number(end, ".2f") for end in figures[f"{name}_ci95"])
    return f"{number(figures[name], '.2f')} ({low}–{high})"


def judge_sentences(run: Run) -> list[str]:
    """What each of the other judges says of PPO against SFT, with the standard error."""
    found = {name: judge["ppo_vs_sft"] for name, judge in run.judges.items()}
    return [
        f"{judge_title(name)}: PPO {number(by['mean'], '+.3f')} ± {number(by['standard_error'], '.3f')} over SFT (mean "
        f"and standard error of the difference on the same {by['n']} prompts)."
        for name, by in found.items()
    ]


def judge_title(name: str) -> str:
    """How a judge is called in tables."""
    return f"Judge {name.replace('_', ' ')}"


def policy_title(name: str) -> str:
    """How a policy is called in tables: `best_of_16` is `Best-of-16`."""
    known = {"pretrain": "Pretrained", "sft": "SFT", "ppo": "PPO"}
    return known.get(name) or name.replace("_", "-").capitalize()


@dataclass
class Table:
    """A table of text: the cells of a row stand under its name (a policy's or a stage's)."""

    columns: list[str]
    rows: dict[str, list[str]]


def policy_table(run: Run) -> Table:
    """The figures of every policy; shared.jinja explains the columns."""
    forms = {
        "Proxy": ("proxy", ".2f"),
        "KL": ("kl", ".1f"),
        "Length": ("length", ".1f"),
        "Distinct-2": ("distinct_2", ".2f"),
        "Bits/byte": ("bpb_under_pretrained", ".2f"),
        "No end": ("without_eos", ".0%"),
    }
    rows = {
        name: [
            policy_title(name),
            with_interval(p),
            *(with_interval(p, f"judge_{judge}") for judge in run.judges),
            *(number(p.get(key), form) for key, form in forms.values()),
        ]
        for name, p in run.policies.items()
    }
    return Table(["Policy", "Gold", *map(judge_title, run.judges), *forms], rows)


def stage_table(run: Run) -> Table:
    """The time, data, parameters and headline figures of every finished stage."""
    rows = {}
    for name, record in run.stages.items():
        figures = [_figure(run, name, metric, form) for metric, form in STAGES[name].figures]
        said = ", ".join(figure for figure in figures if figure)
        rows[name] = [name, duration(record["seconds"]), _data(record), _parameters(run.folder / name), said or "–"]
    return Table(["Stage", "Time", "Data", "Parameters", "Result"], rows)


def _figure(run: Run, stage: str, metric: str, form: str) -> str:
    """A figure in words, with its interval and number where the stage recorded `<metric>_ci95` and `<metric>_n`."""
    value, interval, n = (run.final(stage, metric + end) for end in ("", "_ci95", "_n"))
    if not _is_number(value):
        return ""
    within = f" (95% interval {interval[0]:.1%} to {interval[1]:.1%}, n {n})" if interval and n else ""
    return form.format(value) + within


def _data(record: dict[str, Any]) -> str:
    counts = {unit: record["metrics"].get(unit) for unit in ("rows", "pairs", "episodes")}
    counts["tokens"] = record.get("tokens")
    if record["stage"] == "evaluate":
        counts["prompts"] = record["config"].get("num_prompts")
    return ", ".join(f"{count:,} {unit}" for unit, count in counts.items() if count) or "–"


def _parameters(folder: Path) -> str:
    """Parameters in a folder's safetensors files, from their headers alone (a tied matrix is stored once)."""
    count = 0
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, framework="np") as tensors:
            count += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return f"{count / 1e6:.2f} M" if count else "–"


def inputs_of(record: dict[str, Any]) -> str:
    """A stage's inputs with the beginning of their sha256."""
    return ", ".join(f"{i['path']} ({i['sha256'][:10]})" for i in record["inputs"].values()) or "none"
