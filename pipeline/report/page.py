"""The report as one page and as Markdown, from the templates page.html and page.md beside this file.

The page has no script and no link and loads nothing; it is readable on a phone and in the dark. What a run came to is
gathered in gather.py, where it stands and how it looks is the templates' business.
"""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from pipeline.report import gather
from pipeline.report.plots import PALETTE, Plot


def page(run: gather.Run, plots: list[Plot], num_samples: int) -> str:
    """The whole page as HTML text."""
    return _render("page.html", run, plots, num_samples)


def markdown(run: gather.Run, plots: list[Plot], num_samples: int) -> str:
    """The report as Markdown; the plots' PNG files are expected in `plots/` beside it."""
    return _render("page.md", run, plots, num_samples)


def _render(template: str, run: gather.Run, plots: list[Plot], num_samples: int) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (gather.duration, gather.inputs_of, gather.number, gather.policy_title, inline, short_commit)
    environment.filters |= {function.__name__: function for function in filters}
    title, sentence = gather.headline(run)
    return environment.get_template(template).render(
        palette=PALETTE,
        run=run,
        title=title,
        sentence=sentence,
        plots=plots,
        policies=gather.policy_table(run),
        judges=gather.judge_sentences(run),
        samples=gather.sample_groups(run, num_samples),
        stages=gather.stage_table(run),
        chain=gather.STAGES,
    )


def inline(text: str) -> str:
    """Text of a model on one line, with what Markdown would read as markup taken literally."""
    escaped = "".join("\\" + c if c in "\\`*_[]<>#|" else c for c in text)
    return " ".join(escaped.split()) or "(nothing)"


def short_commit(commit: str | None) -> str:
    """`0123456789ab-dirty` of a whole commit's name."""
    head, dash, tail = (commit or "none").partition("-")
    return head[:12] + dash + tail
