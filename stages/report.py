"""Gather a run into a report: `python -m stages.report --config configs/stories/report.yaml`."""

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.checkpoint import write_json
from pipeline.errors import NothingToDo
from pipeline.report import gather as report
from pipeline.report.page import markdown, page
from pipeline.report.plots import draw_plots
from pipeline.runtime import budget
from pipeline.runtime.arguments import ReportArguments
from pipeline.runtime.console import console, run
from pipeline.runtime.record import Stage


def main(args: ReportArguments) -> None:
    """Write report.html, report.md, plots/ and summary.json, then show the short of it in the terminal."""
    run = report.read_run(args.run_dir)
    inputs: dict[str, str | None] = {name: str(run.folder / name / "stage.json") for name in run.stages}
    try:
        stage = Stage(args, "report", inputs)
    except NothingToDo:
        show(run, args, console)
        raise
    if not stage.is_main:
        return
    if args.dry_run:
        return budget.of_reading(stage, f"of the stages {', '.join(run.stages)}; drawing takes seconds")
    plots = draw_plots(run)
    stage.begin()
    folder = stage.output_dir
    (folder / "plots").mkdir(exist_ok=True)
    for plot in plots:
        (folder / "plots" / f"{plot.name}.png").write_bytes(plot.png)
    (folder / "report.md").write_text(markdown(run, plots, args.num_samples), encoding="utf-8")
    (folder / "report.html").write_text(page(run, plots, args.num_samples), encoding="utf-8")
    write_json(folder / "summary.json", report.summary(run))
    stage.finish({"plots": len(plots)})
    show(run, args, console)


def show(run: report.Run, args: ReportArguments, console: Console) -> None:
    """Print the policies, a few prompts with SFT's and PPO's answers side by side, and where the report lies."""
    title, sentence = report.headline(run)
    console.print(f"\n[bold]{title}.[/bold] {sentence}\n")
    if run.policies:
        console.print(policy_table(run))
    for sentence in report.judge_sentences(run):
        console.print(sentence, markup=False)
    for prompt, answers in report.sample_groups(run, args.num_samples):
        console.print(answer_table(prompt, answers))
    if run.missing:
        console.print(f"not in the report, because they have not run: {', '.join(run.missing)}")
    console.print(f"{report.duration(run.seconds)} in all; the report: [bold]{args.output_dir}/report.html[/bold]")


def policy_table(run: report.Run) -> Table:
    """pretrain, SFT, best-of-n, PPO: gold, KL, length."""
    figures = report.policy_table(run)
    shown = [figures.columns.index(column) for column in ("Policy", "Gold", "KL", "Length")]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i in shown:
        table.add_column(figures.columns[i], justify="right" if i else "left")
    for name, cells in figures.rows.items():
        table.add_row(*(cells[i] for i in shown), style="bold" if name == "ppo" else None)
    return table


def answer_table(prompt: str, answers: dict[str, dict]) -> Table:
    """One prompt, SFT's answer left and PPO's right; the models' text is shown as it is, brackets and all."""
    table = Table(title=Text(prompt, "bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
    shown = [name for name in ("sft", "ppo") if name in answers]
    for name in shown:
        gold = answers[name]["gold"]
        table.add_column(report.policy_title(name) + ("" if gold is None else f", gold {gold:.2f}"), ratio=1)
    table.add_row(*(Text(answers[name]["completion"].strip()) for name in shown))
    return table


if __name__ == "__main__":
    run(main, ReportArguments)
