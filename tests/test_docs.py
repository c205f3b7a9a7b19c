"""README and docs/: what they link to and name is there, their commands parse, their Python compiles and runs."""

import dataclasses
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, make
from tiny_models import tiny_policy, tiny_tokenizer, write_models

from pipeline.model.sampler import Samples
from pipeline.runtime import arguments
from pipeline.runtime.command_line import parse
from pipeline.runtime.ppo_arguments import PPOArguments

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "reward_data/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
# Options of other programs than the stages and the benchmarks.
FOREIGN = {"config", "config_file", "help", "sample"}
KINDS = [kind for name, kind in vars(arguments).items() if name.endswith("Arguments")] + [PPOArguments]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language ("" for those without a name)."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for name, block in fenced if name == language]


def commands(text: str) -> list[str]:
    """Lines of fenced blocks without a language and code within sentences; continued lines are joined."""
    fenced = "".join(blocks(text, "")).replace("\\\n", " ").splitlines()
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = fenced + [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", prose)]
    return [line.split(" #")[0].strip() for line in lines]


def stage_commands(text: str) -> list[list[str]]:
    """What follows `-m stages.` in each command, as words; `make sft ARGS="…"` is one, too."""
    found = []
    for line in commands(text):
        if run := re.search(r"-m stages\.(\w+.*)", line):
            found.append(shlex.split(run[1]))
        elif made := re.match(r"make ([a-z]+) .*?ARGS=([\"'])(.*?)\2", line):
            found.append([made[1], *shlex.split(made[3])])
    return found


def arguments_of(stage: str) -> type | None:
    """The dataclass of a stage's fields."""
    return {kind.__name__.lower(): kind for kind in KINDS}.get(f"{stage}arguments")


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    folders = "benchmarks|configs|docs|examples|pipeline|reward_data|stages|tests"
    for path in re.findall(rf"(?<![\w./-])(?:{folders})/[\w./-]+\.(?:ya?ml|py|md|json|png)", page.read_text("utf-8")):
        assert (ROOT / path).exists(), f"{page.name}: {path}"


@every_page
def test_rows_of_a_table_have_one_number_of_cells(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        cells = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(cells) == 1, f"{page.name}: {table[:200]}"


def test_every_page_is_in_the_index_and_the_index_in_the_readme() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    missing = {page.name for page in (ROOT / "docs").glob("*.md")} - set(re.findall(r"\]\(([\w.]+)\)", index))
    assert missing <= {"README.md"}, missing
    assert "](docs/README.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def targets() -> set[str]:
    return set(re.findall(r"^  ([a-z-]+) ", make("help").stdout, re.MULTILINE))


@every_page
def test_make_targets_and_presets_exist(page: Path, targets: set[str]) -> None:
    lines = [line for line in commands(page.read_text(encoding="utf-8")) if re.match(r"make\b", line)]
    named = {word for line in lines for word in re.findall(r"^make ([a-z]+(?:-[a-z]+)*)(?= |$)", line)}
    assert named <= targets, named - targets
    presets = {word for line in lines for word in re.findall(r"PRESET=([a-z0-9-]+)", line)}
    assert all((ROOT / "configs" / preset).is_dir() for preset in presets), presets


@every_page
def test_commands_of_stages_parse(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for stage, *words in stage_commands(page.read_text(encoding="utf-8")):
        kind = arguments_of(stage)
        assert kind or stage.startswith("bench") or stage in ("course", "torture", "mutants"), (
            f"{page.name}: {stage} is no stage"
        )
        if kind and "--help" not in words:
            parse(kind, words)


@every_page
def test_options_exist(page: Path) -> None:
    kinds = KINDS
    fields = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    sources = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "benchmarks").glob("*.py"))
    options = set(re.findall(r"add_argument\(\s*\"--([\w-]+)\"", sources))
    named = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", page.read_text(encoding="utf-8")))
    unknown = named - fields - options - FOREIGN
    assert not unknown, f"{page.name}: {unknown}"


@every_page
def test_python_compiles_and_its_imports_are_there(page: Path) -> None:
    for i, block in enumerate(blocks(page.read_text(encoding="utf-8"), "python")):
        compile(block, f"{page.name}, block {i}", "exec")
        for module, names in re.findall(
            r"^from ((?:pipeline|stages|reward_data)[\w.]*) import (.+)$", block, re.MULTILINE
        ):
            assert all(hasattr(importlib.import_module(module), name.strip()) for name in names.split(","))


@every_page
def test_dotted_names_exist(page: Path) -> None:
    """`pipeline.model.load.load_critic`: a module, or a name in one."""
    for dotted in re.findall(r"`((?:pipeline|stages|reward_data)(?:\.\w+)+)", page.read_text(encoding="utf-8")):
        try:
            importlib.import_module(dotted)
        except ImportError:
            module, _, name = dotted.rpartition(".")
            assert hasattr(importlib.import_module(module), name), f"{page.name}: {dotted}"


def test_hooks_and_workflow_call_make_targets(targets: set[str]) -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    called = [hook["entry"] for repository in hooks for hook in repository["hooks"]]
    assert called == ["make lint"]
    steps = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]["test"]["steps"]
    called = [step["run"] for step in steps if "run" in step]
    assert called[-2:] == ["make lint", "make test"] and {line.split()[1] for line in called} <= targets


def test_no_placeholder_is_left() -> None:
    for page in PAGES:
        assert "TODO" not in page.read_text(encoding="utf-8"), page.name


# ---- the blocks of Python, run --------------------------------------------------------------------------------------


def run_block(page: str, number: int, **changes: str) -> dict:
    """Run a page's Python block, with some of its text changed, and return what it defined."""
    block = blocks((ROOT / page).read_text(encoding="utf-8"), "python")[number]
    for old, new in changes.items():
        assert old in block, f"{page}: {old} is gone"
        block = block.replace(old, new)
    found: dict = {}
    exec(compile(block, page, "exec"), found)
    return found


def test_ppo_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_policy(0).save_pretrained("my-model")
    tiny_tokenizer().save_pretrained("my-model")
    changes = {"total_episodes=4096, response_length=64": "total_episodes=64, response_length=4"}
    found = run_block("README.md", 0, **changes)
    assert found["trainer"].final_metrics()["episodes"] == 64
    assert found["short"](["a"], ["four"]) == [-0.04]
    assert (tmp_path / "runs" / "short" / "model.safetensors").exists()


def test_folders_open_as_docs_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_models(tmp_path / "runs" / "stories")
    monkeypatch.chdir(tmp_path)
    found = run_block("docs/files.md", 0)
    assert type(found["model"]).__name__ == "Qwen3ForCausalLM" and len(found["tokenizer"]) == 300


def test_the_reward_of_docs_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.rewards import load_rewards

    block = blocks((ROOT / "docs/extending.md").read_text(encoding="utf-8"), "python")[0]
    (tmp_path / "reward_of_docs.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    reward = load_rewards(["reward_of_docs:mentions_river"], [0.5])
    message = [{"role": "assistant", "content": "No lake."}]
    assert reward([[], "b"], [message, "The River was cold"]) == [0.0, 0.5]
    sys.modules.pop("reward_of_docs")


def test_the_sampler_of_docs_samples() -> None:
    sampler = run_block("docs/extending.md", 1)["CountingSampler"]()
    sampler.sync(tiny_policy(0))
    samples = sampler.generate(
        [[7, 8], [9]], max_new_tokens=3, eos_token_id=1, pad_token_id=0, generator=torch.Generator().manual_seed(0)
    )
    assert isinstance(samples, Samples) and sampler.tokens == int(samples.response_lengths.sum()) > 0
