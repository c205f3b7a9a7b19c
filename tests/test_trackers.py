"""Trackers, for real and offline: names and numbers of metrics.jsonl, tables of answers, and what a resume does."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from ppo_tools import count_t7, critic, policy, prompts, settings, tokenizer
from test_resume import arguments, begun, steps
from tiny_models import write_models

from benchmarks.torture_compare import compare
from pipeline.errors import UserError
from pipeline.identity import may_change
from pipeline.ppo import PPOTrainer
from pipeline.runtime.arguments import EvaluateArguments, PreferencesArguments
from pipeline.runtime.command_line import parse, resolve
from pipeline.runtime.ppo_arguments import PPOArguments
from pipeline.runtime.record import Stage
from pipeline.text.sources import data_files
from pipeline.trackers import TABLE_ROWS, TrackingFields, check_installed, flat, markdown, names_of

MISSING = [name for name in ("trackio", "tensorboard") if importlib.util.find_spec(name) is None]
needs_both = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (extra `trackers`)")
BOTH = ["trackio", "tensorboard"]


@pytest.fixture(scope="session")
def trackio_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """trackio reads TRACKIO_DIR when it is imported: all tests of this process share one, each with its project."""
    folder = tmp_path_factory.mktemp("trackio")
    os.environ["TRACKIO_DIR"] = str(folder)
    return folder


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may look up a name or connect."""

    def refuse(*words: object) -> None:
        raise AssertionError(f"the network is asked: {words}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a folder: (step, value) by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    shown = {name: events.Tensors(name) for name in events.Tags()["tensors"]}
    found = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
    for name, values in shown.items():  # texts
        text = [(event.step, event.tensor_proto.string_val[0].decode()) for event in values]
        found[name.removesuffix("/text_summary")] = text
    return found


def trackio_rows(project: str, run: str) -> list[dict[str, Any]]:
    from trackio.sqlite_storage import SQLiteStorage

    return [
        {name: value for name, value in row.items() if name != "timestamp"}
        for row in SQLiteStorage.get_logs(project, run)
    ]


def by_name(rows: list[dict[str, Any]], kinds: tuple[type, ...] = (int, float)) -> dict[str, list[tuple[int, Any]]]:
    """(step, value) by name, as the lines of metrics.jsonl have them."""
    found: dict[str, list[tuple[int, Any]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "time") and isinstance(value, kinds):
                found.setdefault(name, []).append((row["step"], value))
    return found


def close_to(expected: dict[str, list], found: dict[str, list]) -> None:
    """TensorBoard keeps fp32."""
    assert expected.keys() <= found.keys(), expected.keys() - found.keys()
    for name, values in expected.items():
        assert [step for step, _ in found[name]] == [step for step, _ in values], name
        assert [value for _, value in found[name]] == pytest.approx([value for _, value in values], rel=1e-6), name


# ---- names ----------------------------------------------------------------------------------------------------------


def test_a_tracker_that_is_not_there_is_one_sentence_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="report_to: 'comet' is none of trackio, tensorboard, wandb, mlflow"):
        Stage(arguments(tmp_path, report_to=["comet"]), "sft", {})
    if importlib.util.find_spec("wandb") is None:
        with pytest.raises(UserError, match="report_to: wandb is not installed; `pip install wandb`, or take it out"):
            Stage(arguments(tmp_path, report_to=["wandb"]), "sft", {})
        with pytest.raises(UserError, match="wandb is not installed"):
            PPOTrainer(
                policy(), count_t7, settings(tmp_path, report_to=["wandb"]), prompts(), tokenizer(), critic=critic()
            )
    assert list(tmp_path.iterdir()) == []
    check_installed(None)


def test_it_is_set_as_in_trl_and_may_change_when_a_run_goes_on() -> None:
    assert parse(PPOArguments, []).report_to is None and parse(PPOArguments, ["--report_to", "none"]).report_to is None
    assert parse(PPOArguments, ["--report_to", *BOTH]).report_to == BOTH
    assert parse(EvaluateArguments, ["--report_to", "trackio", "--run_name", "a"]).run_name == "a"
    assert names_of("tensorboard") == ["tensorboard"] and names_of("none") == names_of(None) == []
    assert names_of(["wandb", "none", "wandb"]) == ["wandb"]
    assert all(may_change(name, stage) for name in ("report_to", "project", "run_name") for stage in ("sft", "ppo"))


def test_nested_figures_get_one_name_each_and_cells_stay_in_their_row() -> None:
    assert flat({"a": 1, "b": {"c": [2, {"d": "x"}], "e": None}}) == {"a": 1, "b/c/0": 2, "b/c/1/d": "x"}
    assert markdown(["p", "s"], [["a|b\nc", 0.123456]]) == "| p | s |\n| --- | --- |\n| a\\|b<br>c | 0.1235 |"


# ---- PPO ------------------------------------------------------------------------------------------------------------


@needs_both
def test_ppo_reports_its_lines_and_the_answers_of_every_evaluation(
    tmp_path: Path, trackio_folder: Path, no_network: None
) -> None:
    rows: list[dict] = []
    tracked = {"report_to": BOTH, "project": "ppo", "run_name": "one"}
    args = settings(tmp_path, eval_steps=2, logging_steps=2, **tracked)
    held_out = prompts(TABLE_ROWS + 2)
    made = PPOTrainer(policy(), count_t7, args, prompts(), tokenizer(), critic=critic(), eval_dataset=held_out)
    log = made.recorder.log
    made.recorder.log = lambda row: (rows.append(row), log(row))  # type: ignore[method-assign]
    made.train()
    made.recorder.trackers.finish({"kl": 0.5, "interval": [1, 2]})  # type: ignore[attr-defined]
    assert [row["step"] for row in rows] == [0, 2, 2, 4, 4]

    found = scalars(tmp_path / "trackers" / "tensorboard")
    close_to(by_name(rows), found)
    assert found["final/kl"] == [(4, 0.5)] and found["final/interval/1"] == [(4, 2.0)]
    assert [step for step, _ in found["eval/answers"]] == [0, 2, 4]

    logged = trackio_rows("ppo", "one")
    tables = [row for row in logged if "eval/answers" in row]
    assert by_name([row for row in logged if row not in tables and "final/kl" not in row]) == by_name(rows)
    assert [row["step"] for row in tables] == [0, 2, 4]
    last = tables[-1]["eval/answers"]["_value"]
    assert len(last) == TABLE_ROWS and list(last[0]) == ["prompt", "text", "length", "ended", "proxy", "gold", "kl"]
    assert [row["prompt"] for row in last] == [row["prompt"] for row in held_out[:TABLE_ROWS]]
    assert all(row["proxy"] == count_t7([0], [row["text"]])[0] for row in last)
    shown = found["eval/answers"][-1][1].splitlines()
    assert len(shown) == 2 + TABLE_ROWS and last[0]["text"] in shown[2]


@needs_both
def test_a_resumed_script_shows_no_step_twice(tmp_path: Path, trackio_folder: Path) -> None:
    """PPO from Python, broken off after update 3, of which update 2 has the last checkpoint."""

    def stop(made: PPOTrainer, metrics: dict) -> None:
        if made.state.updates_done == 3:
            raise KeyboardInterrupt

    def build(*callbacks: Any) -> PPOTrainer:
        args = settings(tmp_path, save_steps=2, report_to=BOTH, project="script", run_name="s")
        return PPOTrainer(policy(), count_t7, args, prompts(), tokenizer(), critic=critic(), callbacks=callbacks)

    first, second = build(stop), build()
    with pytest.raises(KeyboardInterrupt):
        first.train()
    first.recorder.trackers.finish()  # type: ignore[attr-defined]
    second.train()
    second.recorder.trackers.finish()  # type: ignore[attr-defined]
    found = scalars(tmp_path / "trackers" / "tensorboard")
    assert [step for step, _ in found["objective/kl"]] == [1, 2, 3, 4]
    assert [row["step"] for row in trackio_rows("script", "s")] == [1, 2, 3]
    assert [row["step"] for row in trackio_rows("script", "s from step 3")] == [3, 4]


# ---- stages ---------------------------------------------------------------------------------------------------------


@needs_both
def test_a_resumed_stage_shows_no_step_twice(tmp_path: Path, trackio_folder: Path, no_network: None) -> None:
    """The first part logged steps 1 and 2, its checkpoint is that of step 1; the second part logs 2 and 3."""
    tracked = {"report_to": BOTH, "project": "resume"}
    first = begun(tmp_path, **tracked)
    first.trackers.finish()  # as the end of its process does
    again = Stage(arguments(tmp_path, **tracked), "sft", {})
    for step in (2, 3):
        again.log({"step": step, "loss": 10.0 * step})
    again.finish({"eval_loss": 1.0})
    assert steps(tmp_path / "sft") == [1, 2, 3]
    assert scalars(tmp_path / "sft/trackers/tensorboard")["loss"] == [(1, 3.0), (2, 20.0), (3, 30.0)]
    name = f"{tmp_path.name}/sft"
    assert [row["step"] for row in trackio_rows("resume", name)] == [1, 2]
    later = trackio_rows("resume", f"{name} from step 2")
    assert [(row["step"], row.get("loss"), row.get("final/eval_loss")) for row in later] == [
        (2, 20.0, None),
        (3, 30.0, None),
        (3, None, 1.0),
    ]


@needs_both
def test_what_trackers_keep_is_no_output_no_data_and_no_strangers(tmp_path: Path, trackio_folder: Path) -> None:
    stage = Stage(arguments(tmp_path, report_to=["tensorboard"]), "sft", {})
    stage.log({"step": 1, "loss": 2.0})
    (stage.output_dir / "rows.jsonl").write_text('{"prompt": "a"}\n')
    (stage.output_dir / "trackers" / "rows.jsonl").write_text('{"prompt": "b"}\n')
    stage.finish({"eval_loss": 1.0})
    assert list(json.loads((stage.output_dir / "stage.json").read_text())["outputs"]) == ["rows.jsonl"]
    assert data_files(stage.output_dir) == [stage.output_dir / "rows.jsonl"]
    with_config = (stage.output_dir / "trackers/tensorboard").glob("*/hparams.yml")
    assert "max_steps: 1000" in next(with_config).read_text()


@needs_both
def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(
    tmp_path: Path, trackio_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    stage = Stage(arguments(tmp_path, report_to=["tensorboard"]), "sft", {})
    stage.log({"step": 1, "loss": 2.0})

    def broken(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    stage.trackers._open["tensorboard"].log = broken
    stage.log({"step": 2, "loss": 1.0})
    stage.log({"step": 3, "loss": 0.5})
    said = capsys.readouterr().out
    assert said.count("warning: tensorboard failed at step 2 (OSError: No space left on device) and gets no more") == 1
    assert steps(tmp_path / "sft") == [1, 2, 3]


@needs_both
def test_evaluate_reports_its_figures_and_answers(tmp_path: Path, trackio_folder: Path, no_network: None) -> None:
    from stages.evaluate import main

    run = write_models(tmp_path / "run")
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Write about {name}:"}) + "\n" for name in ("Ben", "Ann", "Sam")))
    fields = {"gold": None, "num_prompts": 3, "best_of": 2, "max_new_tokens": 4, "mixed_precision": "no"}
    tracked = {"report_to": BOTH, "project": "evaluate", "run_name": "e"}
    main(resolve(EvaluateArguments(run_dir=str(run), dataset=str(file), **fields, **tracked)))  # type: ignore[arg-type]
    lines = [json.loads(line) for line in (run / "evaluate/metrics.jsonl").read_text().splitlines()]
    expected = {name: value for line in lines for name, value in line.items() if isinstance(value, float)}
    del expected["time"]
    logged: dict[str, Any] = {}
    for row in trackio_rows("evaluate", "e"):
        logged |= row
    assert {name: logged[name] for name in expected} == expected and "ppo/proxy" in expected
    record = json.loads((run / "evaluate/stage.json").read_text())
    assert logged["final/policies/ppo/proxy"] == record["metrics"]["policies"]["ppo"]["proxy"]
    samples = [json.loads(line) for line in (run / "evaluate/samples.jsonl").read_text().splitlines()]
    assert logged["answers"]["_value"] == samples
    assert scalars(run / "evaluate/trackers/tensorboard")["answers"][0][1].count("\n") == 1 + len(samples)


@needs_both
def test_preferences_reports_pairs_and_counts(tmp_path: Path, trackio_folder: Path, no_network: None) -> None:
    from stages.preferences import main

    rows = [{"prompt": f"Add {i}:", "chosen": f" {i}", "rejected": " no"} for i in range(8)]
    (tmp_path / "data").mkdir()
    for name, part in (("train", rows[:6]), ("test", rows[6:])):
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    tracked = {"report_to": BOTH, "project": "preferences", "run_name": "p"}
    given = {"run_dir": str(tmp_path / "run"), "dataset": str(tmp_path / "data"), "labeller": "human"}
    main(resolve(PreferencesArguments(**given, **tracked)))  # type: ignore[arg-type]
    logged: dict[str, Any] = {}
    for row in trackio_rows("preferences", "p"):
        logged |= row
    key = "prompt"
    assert sorted(logged["pairs"]["_value"], key=lambda row: row[key]) == sorted(rows[:6], key=lambda row: row[key])
    assert (logged["final/pairs"], logged["final/test_pairs"]) == (6, 2)
    assert scalars(tmp_path / "run/preferences/trackers/tensorboard")["final/pairs"] == [(0, 6.0)]


# ---- a whole stage, as a process ------------------------------------------------------------------------------------


@needs_both
@pytest.mark.slow
def test_sft_reports_what_metrics_jsonl_has_and_leaves_the_same_folder(tmp_path: Path) -> None:
    """On two runs, one with trackers: what they leave is equal to the bit, and the trackers have all lines."""
    run = write_models(tmp_path / "run")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i}+1=", "completion": f" {i + 1}"}) + "\n" for i in range(60)))
    words = ["--run_dir", str(run), "--dataset", str(rows), "--max_steps", "6", "--logging_steps", "2", "--max_length"]
    words += ["64", "--eval_steps", "3", "--save_steps", "3", "--warmup_steps", "1", "--mixed_precision", "no"]
    environment = {name: value for name, value in os.environ.items() if name != "TRACKIO_DIR"}
    for name, more in (("plain", []), ("tracked", ["--report_to", *BOTH, "--run_name", "t"])):
        command = [sys.executable, "-m", "stages.sft", "--output_dir", str(tmp_path / name), *words, *more]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
    assert "metrics go to trackio" in done.stdout and "* Trackio" not in done.stdout
    tracked = tmp_path / "tracked"
    said = [line for line in compare(tmp_path / "plain", tracked)[1] if not line.startswith("stage.json")]
    assert said == []
    lines = [json.loads(line) for line in (tracked / "metrics.jsonl").read_text().splitlines()]
    close_to(by_name(lines), scalars(tracked / "trackers/tensorboard"))
    script = "from trackio.sqlite_storage import SQLiteStorage as s; import json; print(json.dumps(s.get_logs(*{})))"
    command = [sys.executable, "-c", script.format(("rlhf-pipeline", "t"))]
    where = environment | {"TRACKIO_DIR": str(tracked / "trackers" / "trackio")}
    logged = json.loads(subprocess.run(command, capture_output=True, text=True, env=where, check=True).stdout)
    names = {name for line in lines for name in line} - {"step", "time"}
    assert [{k: v for k, v in row.items() if k in names} for row in logged if "final/eval_loss" not in row] == [
        {k: v for k, v in line.items() if k not in ("step", "time")} for line in lines
    ]
    final = next(row for row in logged if "final/eval_loss" in row)
    assert final["final/eval_loss"] == json.loads((tracked / "stage.json").read_text())["metrics"]["eval_loss"]


def test_defaults_report_to_nobody(tmp_path: Path) -> None:
    assert TrackingFields().report_to is None
    stage = begun(tmp_path)
    assert not stage.trackers.due and not (stage.output_dir / "trackers").exists()
