"""make with names that it or the shell could take for something else: used as they are, or refused in a sentence."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

from pipeline.chain import make_words, run_name

Make = Callable[..., subprocess.CompletedProcess[str]]

WRONG = (
    "a b",
    "a\tb",
    "$HOME",
    "$(shell touch made)",
    "`touch made`",
    "a;touch made",
    "a'b",
    'a"b',
    "*",
    "a?b",
    "[ab]",
)
WRONG += (
    "-rf",
    "a%b",
    "a#b",
    "a:b",
    "a=b",
    "a&b",
    "a|b",
    "(a)",
    "{a,b}",
    "a\\b",
    "a!b",
    "a>b",
    "",
    ".",
    "..",
    "/",
    "~",
    "~x/y",
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What make reads, in a folder where nothing that it does matters."""
    folder = tmp_path_factory.mktemp("home") / "project"
    shutil.copytree(ROOT / "configs", folder / "configs")
    for name in (
        "Makefile",
        "pyproject.toml",
        "constraints.txt",
        "requirements-reviews.txt",
        "requirements-smollm2.txt",
    ):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture
def make(project: Path) -> Make:
    """Run make there."""
    return lambda *words: subprocess.run(["make", *words], cwd=project, capture_output=True, text=True)


@pytest.mark.parametrize("run", WRONG)
@pytest.mark.parametrize("goal", ["clean", "tokenizer"])
def test_a_run_that_is_no_plain_folder_is_refused(make: Make, project: Path, run: str, goal: str) -> None:
    done = make(goal, f"RUN={run}")
    sentence = done.stderr.strip()
    assert done.returncode == 2 and sentence.endswith("Stop.") and f"RUN={run}: give one folder" in sentence
    assert not (project / "made").exists()


def test_clean_removes_one_run_and_nothing_else(make: Make, tmp_path: Path) -> None:
    for name in ("a", "b", "a b", "strangers", "made-by-hand/ppo"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "kept.txt").write_text("x")
    (tmp_path / "a" / ".settings").mkdir()
    (tmp_path / "made-by-hand" / "ppo" / "stage.json").write_text("{}")
    assert make("clean", f"RUN={tmp_path}/a b").returncode == 2
    assert make("clean", f"RUN={tmp_path}/strangers").stderr.startswith("error: ")
    assert make("clean", f"RUN={tmp_path}").returncode == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "a b", "b", "made-by-hand", "strangers"]
    for name in ("a", "made-by-hand", "never/was"):
        assert make("clean", f"RUN={tmp_path}/{name}/").returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a b", "b", "strangers"]


def test_clean_never_removes_the_folder_that_the_project_lies_in(make: Make, project: Path) -> None:
    (project.parent / ".settings").mkdir()
    done = make("clean", f"RUN={project.parent}")
    assert done.returncode == 2 and "holds this project; nothing is removed" in done.stderr
    assert (project / "Makefile").exists()


def test_a_home_folder_and_odd_but_plain_names(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for run, folder in (("~/x", f"{tmp_path}/x"), (f"{tmp_path}/é-1.2_3+", f"{tmp_path}/é-1.2_3+")):
        assert f"--run_dir {folder} " in make("-n", "tokenizer", f"RUN={run}").stdout
    (tmp_path / "it's mine.txt").write_text("x")
    for text in ("~/it's mine.txt", f"{tmp_path}/it's mine.txt"):
        made = make("-n", "tokenizer", f"TEXT={text}", f"RUN={tmp_path}/run")
        assert f"--dataset '{tmp_path}/it'\\''s mine.txt'" in made.stdout, made.stderr


@pytest.mark.parametrize("preset", ["stories", "reviews", "smoke", "hub/gsm8k", "hub/tldr", "hub/hh"])
@pytest.mark.parametrize("seed", [0, 1, 12])
def test_run_is_the_one_that_the_stages_take_by_themselves(make: Make, preset: str, seed: int) -> None:
    first = "ppo" if preset == "hub/gsm8k" else "sft" if preset.startswith("hub/") else "tokenizer"
    ran = re.findall(r"--run_dir (\S+)", make("-n", first, f"PRESET={preset}", f"SEED={seed}").stdout)
    assert set(ran) == {f"runs/{run_name(preset, seed)}"}
    words = make_words(first, ran[0])
    assert words.split()[2:] == [f"PRESET={preset}"][preset == "stories" :] + ([f"SEED={seed}"] if seed else [])


def test_a_recipe_for_the_hub_runs_the_stages_that_it_has(make: Make) -> None:
    """Not those before them: their models come from the hub."""
    stages = {"gsm8k": "ppo evaluate report", **dict.fromkeys(("tldr", "hh"), "sft reward ppo evaluate report")}
    for name, ran in stages.items():
        dry = make("-n", f"PRESET=hub/{name}")
        assert re.findall(r"-m stages\.(\w+)", dry.stdout) == ran.split(), dry.stderr
        assert f"--config configs/hub/{name}/ppo.yaml" in dry.stdout
    assert "PRESET=hub/gsm8k has no stage sft" in make("sft", "PRESET=hub/gsm8k").stderr


@pytest.mark.parametrize(
    "words", ["SEED=", "SEED=1 2", "SEED=x", "SEED=-1", "SEED=01", "SEED=1';touch made;'", "SEED=1.0"]
)
def test_a_seed_is_a_whole_number(make: Make, project: Path, words: str) -> None:
    done = make("-n", "tokenizer", words)
    assert done.returncode == 2 and "is not a whole number" in done.stderr and not (project / "made").exists()


@pytest.mark.parametrize(
    "preset", ["", "stories smoke", "%", "../configs", "accelerate", "hub", "hub/", "storys", "$(shell touch made)"]
)
def test_a_preset_is_one_of_those_there_are(make: Make, project: Path, preset: str) -> None:
    done = make("-n", "tokenizer", f"PRESET={preset}")
    assert done.returncode == 2 and "is none of:" in done.stderr and "stories" in done.stderr
    assert not (project / "made").exists()
