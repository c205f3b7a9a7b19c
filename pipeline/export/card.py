"""The model card (README.md) of an exported model, from the template card.md beside this file and the run's records."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.export.folder import Exported
from pipeline.export.history import NOT_RECORDED, History, Step, history_of, public_command, read_record
from pipeline.model.load import parameter_count
from pipeline.report import gather
from pipeline.text.lengths import positions_of
from reward_data.generators import ORIGINS

UNKNOWN = "unknown"  # the hub's own word
MADE_BY = {"pretrain": "pretraining", "sft": "supervised fine-tuning", "reward": "reward modelling", "ppo": "PPO"}


@dataclass
class Results:
    """What the evaluation of this very model came to; `reason` says why there is none."""

    policies: gather.Table | None = None
    run: gather.Run | None = None
    judge: str = ""
    reason: str = ""


@dataclass
class Card:
    """All that the template shows beside the model's own figures."""

    title: str
    history: History
    results: Results
    license: str
    dtype: str
    repo_id: str | None
    stages: list[list[str]] = field(default_factory=list)
    commands: list[list[str]] = field(default_factory=list)


def card_of(exported: Exported, sha256: str, dtype: str, license: str | None, repo_id: str | None) -> Card:
    """Gather the card. `sha256` is the fingerprint of the model's folder: results of other weights are left out.

    Raises UserError where a record is damaged.
    """
    history = history_of(exported.path)
    last = history.steps[-1] if history.steps else None
    base_licence = history.base_licence if history.base else None
    title = repo_id.split("/")[-1] if repo_id else _title(last)
    return Card(
        title,
        history,
        results_of(last, sha256),
        license or (base_licence or UNKNOWN).lower(),
        dtype,
        repo_id,
        stages=[stage_row(step) for step in history.steps],
        commands=[[step.name, public_command(step)] for step in history.steps],
    )


def _title(last: Step | None) -> str:
    """A name of letters, digits and hyphens: preset, stage and seed."""
    if last is None:
        return "model"
    seed = last.record["seed"]
    return re.sub(r"[^\w.-]+", "-", f"{last.record['preset']}-{last.name}" + (f"-seed{seed}" if seed else ""))


def stage_row(step: Step) -> list[str]:
    """Name, time, data, parameters and headline figures, as in the report."""
    if step.name not in gather.STAGES:
        return [step.name, gather.duration(step.record["seconds"]), "–", "–", "–"]
    run = gather.Run(step.folder.parent, {step.name: step.record})
    return gather.stage_table(run).rows[step.name]


def results_of(last: Step | None, sha256: str) -> Results:
    """The figures that the run's evaluation has of the model, where it judged these weights."""
    if last is None:
        return Results(reason="The folder has no record of how it was made.")
    evaluate = last.folder.parent / "evaluate"
    if last.name == "reward":
        return Results(reason="See the accuracy on held-out pairs above.")
    if not (evaluate / "stage.json").is_file():
        return Results(reason="It was not evaluated.")
    record = read_record(evaluate)
    judged = record["inputs"].get(last.name)
    if not isinstance(judged, dict) or judged.get("sha256") != sha256:
        return Results(reason="The evaluation beside it judged other weights.")
    run = gather.read_run(last.folder.parent)
    gold = record["config"].get("gold")
    return Results(gather.policy_table(run), run, judge_of(gold))


def judge_of(gold: Any) -> str:
    """A sentence on who gave the gold scores, and what that does not show."""
    if not gold:
        return "There was no judge: only the reward model's own score and figures of the text are known."
    generator = str(gold).partition(":")[0].removeprefix("reward_data.")
    if generator in ORIGINS:
        return f"Gold is given by {ORIGINS[generator].judge}."
    return f"Gold is given by the function `{gold}`."


def render(card: Card, exported: Exported) -> str:
    """README.md: metadata in YAML for the hub, then Markdown."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # Markdown
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": gather.number, "cells": cells}
    parameters, positions = parameter_count(exported.model), positions_of(exported.model)
    text = environment.get_template("card.md").render(
        card=card,
        metadata=metadata_of(card, exported).to_yaml(),
        exported=exported,
        architecture=stock_architecture(exported),
        parameters=parameters,
        positions=positions,
        stage=MADE_BY.get(card.history.steps[-1].name) if card.history.steps else None,
        seeds=sorted({step.record["seed"] for step in card.history.steps}),
        commits=list(dict.fromkeys(short_commit(step.record.get("git_commit")) for step in card.history.steps)),
        versions=card.history.steps[-1].record["versions"] if card.history.steps else {},
    )
    return text.rstrip() + "\n"


def metadata_of(card: Card, exported: Exported) -> ModelCardData:
    """The front matter. Data sets without an address on the hub stand in the text alone, as the hub links these."""
    made = card.history.steps[-1].name if card.history.steps else None
    on_hub = [data.name for data in card.history.data if re.fullmatch(r"[\w.-]+/[\w.-]+", data.name)]
    base = card.history.base
    return ModelCardData(
        language=card.history.language,
        license=card.license,
        library_name="transformers",
        pipeline_tag="text-classification" if exported.is_reward else "text-generation",
        tags=["rlhf-pipeline", *([made] if made in MADE_BY else [])],
        datasets=on_hub or None,
        base_model=base if base and re.fullmatch(r"[\w.-]+/[\w.-]+", base) else None,
    )


def short_commit(commit: Any) -> str:
    """`0123456789ab-dirty` of a whole commit's name."""
    head, dash, tail = str(commit or NOT_RECORDED).partition("-")
    return head[:12] + dash + tail


def stock_architecture(exported: Exported) -> str:
    """The class of transformers that opens the folder."""
    own: Any = type(exported.model)
    return getattr(exported.model, "stock_architecture", None) or own.__name__


def cells(values: list[str]) -> str:
    """The cells of a row of a Markdown table."""
    return " | ".join(str(value).replace("|", "\\|").replace("\n", " ") for value in values)
