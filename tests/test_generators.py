"""Every generator keeps to the protocol, a third one by the recipe of docs/extending.md among them."""

from inspect import signature
from itertools import islice

import pytest

from pipeline.errors import UserError
from pipeline.text import data
from reward_data import generators, reviews
from reward_data.formats import text_of
from reward_data.generators import GENERATORS, Generator, load_generator

NAMES = [*GENERATORS, "sums"]
KINDS = ("corpus", "instructions", "prompts", "preferences")
SPLITS = {
    "instructions": ("train", "validation", "test"),
    "prompts": ("ppo", "preferences", "validation", "test"),
    "preferences": ("train", "validation", "test"),
}
COLUMNS = {
    "instructions": {"prompt", "completion"},
    "prompts": {"prompt"},
    "preferences": {"prompt", "chosen", "rejected"},
}


@pytest.fixture(autouse=True)
def with_a_third(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GENERATORS, "sums", "sums")  # the line that the recipe asks for


def rows_of(name: str, kind: str, split: str, size: int | None = 40) -> list[dict]:
    """Rows by the public loaders; skips where the data of a generator are not installed."""
    limit = {} if kind == "preferences" else {"size": size}
    return getattr(data, f"load_{kind}")(name, split=split, seed=3, **limit).rows.to_list()


def skip_without_data(name: str) -> None:
    if name == "reviews":
        try:
            reviews.raw_rows()
        except ValueError as error:
            pytest.skip(str(error))


@pytest.mark.parametrize("name", NAMES)
def test_names_and_arguments_are_the_protocols(name: str) -> None:
    generator = load_generator(name)
    assert isinstance(generator, Generator) and isinstance(generator.ENDLESS, bool)
    for kind in KINDS:
        asked = list(signature(getattr(Generator, kind)).parameters)[1:]  # without self: a module has none
        assert list(signature(getattr(generator, kind)).parameters) == asked, kind


def test_what_lacks_a_name_is_no_generator() -> None:
    assert not isinstance(generators, Generator)


@pytest.mark.parametrize("name", NAMES)
def test_a_corpus_is_text_by_seed_and_size(name: str) -> None:
    skip_without_data(name)
    parts = {split: data.load_texts(name, split=split, seed=3, max_bytes=3000) for split in ("train", "validation")}
    assert all(0 < sum(len(text.encode()) for text in part) <= 3000 for part in parts.values())
    assert parts["train"] == data.load_texts(name, split="train", seed=3, max_bytes=3000)
    assert parts["train"] != data.load_texts(name, split="train", seed=4, max_bytes=3000)
    assert not set(parts["train"]) & set(parts["validation"])
    stream = data.TextStream(name, split="train", seed=3)
    assert len(list(islice(stream, 200))) == 200, "without end: what is endless, and what begins anew"
    for streaming in (False, True):
        with pytest.raises(UserError, match=f"dataset: {name}: .*train"):
            data.load_texts(name, split="test", max_bytes=3000, streaming=streaming)


@pytest.mark.parametrize("kind", SPLITS)
@pytest.mark.parametrize("name", NAMES)
def test_rows_have_their_columns_and_held_out_prompts_are_not_trained_on(name: str, kind: str) -> None:
    skip_without_data(name)
    if kind == "preferences" and name != "reviews":
        with pytest.raises(UserError, match=f"dataset: {name} has no preferences of its own; "):
            rows_of(name, kind, "train")
        return
    asked: dict[str, set[str]] = {}
    for split in SPLITS[kind]:
        rows = rows_of(name, kind, split)
        assert rows and rows == rows_of(name, kind, split)
        assert all(COLUMNS[kind] <= row.keys() and row["prompt"][-1]["role"] == "user" for row in rows)
        for column in COLUMNS[kind] - {"prompt"}:
            assert all([message["role"] for message in row[column]] == ["assistant"] for row in rows)
        side = split if split in ("validation", "test") else "train"
        asked.setdefault(side, set()).update(text_of(row["prompt"]) for row in rows)
    assert len(asked) == 3 and not asked["train"] & (asked["validation"] | asked["test"])


@pytest.mark.parametrize("name", NAMES)
def test_only_what_ends_gives_all_there_is(name: str) -> None:
    skip_without_data(name)
    for load in (data.load_texts, data.load_prompts):
        split = "train" if load is data.load_texts else "ppo"
        if load_generator(name).ENDLESS:
            with pytest.raises(UserError, match=f"{name} never ends; say how much"):
                load(name, split=split)
        else:
            assert len(getattr(found := load(name, split=split), "rows", found)) > 40


def test_a_column_beside_the_prompt_reaches_the_rewards() -> None:
    rows = rows_of("sums", "prompts", "test", size=None)
    assert len(rows) == 10 and {row["answer"] for row in rows} == {9}
    with pytest.raises(UserError, match="did you mean sums"):
        data.load_prompts("sumz", split="test")
