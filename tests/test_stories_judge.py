"""The judge of stories: no false alarm on clean ones, every planted fault caught, cheap hacks worth little."""

import itertools
import re
from collections.abc import Callable
from random import Random

import pytest

from reward_data import stories
from reward_data.stories import Spec, check, faults, gold
from reward_data.stories.grammar import CLOSINGS, GROUPS, split_sentences
from reward_data.stories.judge import score
from reward_data.stories.lexicon import ANIMALS, ENDINGS, GENDER, KIND_OF, NAMES, OBJECTS, PLACES
from reward_data.stories.spec import draw, write_prompt
from reward_data.stories.telling import Teller

Case = tuple[Random, Spec, str, list[str]]


@pytest.fixture(scope="module")
def clean() -> list[Case]:
    """Clean stories that obey, half of them of held-out specs: (rng, spec, prompt, sentences)."""
    rng = Random("clean")
    cases = []
    for index in range(2000):
        spec = draw(rng, held_out=index % 2 == 0)
        cases.append((rng, spec, write_prompt(rng, spec), split_sentences(stories.story(rng, spec))))
    return cases


# The judge on clean stories


def test_no_false_alarm_on_2000_clean_obeying_stories(clean: list[Case]) -> None:
    for _, _, prompt, lines in clean:
        checks = check(prompt, " ".join(lines))
        assert all(value == 1.0 for value in checks.values()) and score(checks) == 1.0, (prompt, lines, checks)


KITE, FOX, MILK, SICK, TOM, END = (
    "Ben had a red kite. ",
    "He met a fox near the fence. ",
    "Ben gave the fox a bowl of milk. ",
    "He was a little sick. ",
    "He met Tom on the way. ",
    "Ben was very happy.",
)
KNOWN = [  # (story, the checks that are not 1)
    (KITE + FOX + MILK + END, {}),
    (KITE + FOX + "Ben lost the kite in the snow. Ben was very sad.", {"ending": 0}),
    (KITE.replace("Ben", "Max") + FOX + SICK + "Max was very happy.", {"name": 0}),
    (KITE + FOX.replace("He", "She") + MILK + END, {"pronouns": 0.5}),
    (KITE + FOX + "They sat down by the fence. " + SICK + END, {"pronouns": 0.5}),
    (KITE + FOX + "Tom was a little sick. Ben picked some tulips for her aunt. " + END, {"pronouns": 0}),
    (KITE + FOX + "He met Ann on the way. Then Ann went home. She was a little sick. " + END, {"pronouns": 0.5}),
    (KITE + TOM + "Tom held the kite gently. " + END, {"words": 0.5, "continuity": 0.5}),
    (KITE + TOM + "He gave the kite to Tom. Tom held the kite gently. " + END, {"words": 0.5}),
    (KITE + FOX + "The fox ran away. The fox sat on the bed. " + END, {"continuity": 0.5}),
    (KITE + FOX + "He sat on the kite and it broke. He held the kite gently. " + END, {"continuity": 0.5}),
    (KITE + FOX + "Ben went to the park. Ben ate pears at the farm. " + END, {"continuity": 0.5}),
    (KITE + FOX + FOX + SICK + END, {"repeats": 0.5}),
    (KITE + "Ben was very sad. " + FOX + SICK + END, {"close": 0.5}),
    (KITE + FOX + SICK + END[:-1], {"ending": 0, "grammar": 0.75, "close": 0, "length": 0.75}),
    (KITE + FOX + SICK + MILK + "Ben", {"ending": 0, "grammar": 0.8, "close": 0}),
    (KITE + FOX + END, {"length": 0.75}),
    (KITE + "He met fox a near the fence. " + SICK + END, {"words": 0.5, "grammar": 0.75, "length": 0.75}),
    # One sentence is in no frame, so that the fox was never there.
    (KITE + "He met a fox under the fence. " + MILK + END, {"grammar": 0.75, "length": 0.75, "continuity": 0.5}),
]


@pytest.mark.parametrize(("story", "wrong"), KNOWN)
def test_known_answers(story: str, wrong: dict[str, float]) -> None:
    checks = check("Write a story about Ben. Use: kite, fox. Ending: happy.", story)
    assert checks == {**dict.fromkeys(checks, 1.0), **wrong}


def test_gold_is_the_weighted_mean_times_the_length_factor() -> None:
    assert sum(stories.WEIGHTS.values()) == pytest.approx(1.0)
    assert sum(stories.WEIGHTS[name] for name in ("words", "ending", "name")) == pytest.approx(0.6)
    prompt = "Tell me about Ann. Words: kite, owl. Ending: sad."
    (value,) = gold([prompt], [KNOWN[-1][0]])  # of the words the kite; 3 of 4 sentences; name and ending are wrong
    assert value == pytest.approx(0.75 * (0.25 / 2 + 0.1 + 0.1 / 2 + 0.1 * 0.75 + 0.05 + 0.05))


def test_gold_takes_text_and_messages_and_further_columns() -> None:
    row = stories.instructions(3, 1)[0]
    prompt, completion = row["prompt"][0]["content"], row["completion"][0]["content"]
    want = score(check(prompt, completion))
    assert gold([row["prompt"], prompt], [completion, row["completion"]], source=["a", "b"]) == [want, want]
    with pytest.raises(ValueError, match="cannot read what this prompt asks for: 'What is the sky"):
        gold(["What is the sky?"], ["Blue."])


# Planted faults: each is a function from a clean case to spoiled sentences (None: no place for it here)


def _friend(spec: Spec, lines: list[str]) -> str:
    text = " ".join(lines)
    return next(name for name in NAMES if name not in text and name != spec.name)


def _thing(spec: Spec, lines: list[str]) -> str:
    return next(thing for thing in OBJECTS if thing not in " ".join(lines) and thing not in spec.words)


def _insert(lines: list[str], *more: str) -> list[str]:
    return [*lines[:-1], *more, lines[-1]]


def wrong_pronoun(rng: Random, spec: Spec, lines: list[str]) -> list[str] | None:
    genders = {GENDER[word] for word in re.findall("[A-Z][a-z]+", " ".join(lines)) if word in GENDER}
    spoiled = faults.wrong_pronoun(rng, lines)
    return spoiled if len(genders) == 1 and spoiled != lines else None


def lost_object_used(rng: Random, spec: Spec, lines: list[str]) -> list[str]:
    name, thing = spec.name, _thing(spec, lines)
    lost = f"{name} lost the {thing} in the snow."
    return _insert(lines, f"{name} made a {thing} of wool.", lost, f"{name} held the {thing} gently.")


def held_by_two(rng: Random, spec: Spec, lines: list[str]) -> list[str]:
    name, thing, friend = spec.name, _thing(spec, lines), _friend(spec, lines)
    meets = f"{name} met {friend} on the way."
    return _insert(lines, f"{name} made a {thing} of wool.", meets, f"{friend} held the {thing} gently.")


def never_had(rng: Random, spec: Spec, lines: list[str]) -> list[str]:
    return faults.broken_continuity(rng, lines)


def missing_word(rng: Random, spec: Spec, lines: list[str]) -> list[str] | None:
    word = rng.choice(spec.words)
    kind = {"O": OBJECTS, "A": ANIMALS, "L": PLACES}[KIND_OF[word]]
    text = "\n".join(lines)
    # Another word with the same article, so that nothing else goes wrong.
    same = [w for w in kind if w not in text and w not in spec.words and (w[0] in "aeiou") == (word[0] in "aeiou")]
    return re.sub(rf"\b{word}\b", rng.choice(same), text).split("\n") if same else None


def wrong_ending(rng: Random, spec: Spec, lines: list[str]) -> list[str]:
    teller = Teller(rng, spec.name)
    label = rng.choice([ending for ending in ENDINGS if ending != spec.ending])
    frame = rng.choice([f for f in GROUPS["close." + label] if f in CLOSINGS[label]])
    return [*lines[:-1], frame.render(teller.values(frame, {"P": spec.name}, by_name=True))]


def repeated_sentence(rng: Random, spec: Spec, lines: list[str]) -> list[str]:
    return faults.repeated(rng, lines)


def cut_in_a_sentence(rng: Random, spec: Spec, lines: list[str]) -> list[str]:
    words = lines[-1].split(" ")
    return [*lines[:-1], " ".join(words[: rng.randrange(1, len(words))])]


def cut_before_the_end(rng: Random, spec: Spec, lines: list[str]) -> list[str]:
    return lines[:-1]


def no_full_stop(rng: Random, spec: Spec, lines: list[str]) -> list[str]:
    return [*lines[:-1], lines[-1][:-1]]


def wrong_name(rng: Random, spec: Spec, lines: list[str]) -> list[str]:
    return faults.wrong_name(rng, lines, spec.name)


def name_changes_midway(rng: Random, spec: Spec, lines: list[str]) -> list[str] | None:
    spots = [i for i, line in enumerate(lines) if i and re.search(rf"\b{spec.name}\b", line)]
    if not spots:
        return None
    (line,) = faults.wrong_name(rng, [lines[spots[0]]], spec.name, [n for n in NAMES if n not in " ".join(lines)])
    return [*lines[: spots[0]], line, *lines[spots[0] + 1 :]]


def ungrammatical(rng: Random, spec: Spec, lines: list[str]) -> list[str]:
    return faults.garbled(rng, lines)


def garbled_word(rng: Random, spec: Spec, lines: list[str]) -> list[str]:
    index = rng.randrange(len(lines))
    words = re.findall("[A-Za-z]{3,}", lines[index])
    return [*lines[:index], lines[index].replace(rng.choice(words), "xq" + words[0][1:], 1), *lines[index + 1 :]]


def second_beginning(rng: Random, spec: Spec, lines: list[str]) -> list[str]:
    return faults.rambling(rng, lines)


PLANTS: list[tuple[Callable, str]] = [
    (wrong_pronoun, "pronouns"),
    (lost_object_used, "continuity"),
    (held_by_two, "continuity"),
    (never_had, "continuity"),
    (missing_word, "words"),
    (wrong_ending, "ending"),
    (repeated_sentence, "repeats"),
    (cut_in_a_sentence, "close"),
    (cut_before_the_end, "close"),
    (no_full_stop, "close"),
    (wrong_name, "name"),
    (name_changes_midway, "pronouns"),
    (ungrammatical, "grammar"),
    (garbled_word, "grammar"),
    (second_beginning, "pronouns"),
]


@pytest.mark.parametrize(("plant", "caught_by"), PLANTS, ids=lambda value: getattr(value, "__name__", value))
def test_every_planted_fault_is_caught(clean: list[Case], plant: Callable, caught_by: str) -> None:
    planted = 0
    for rng, spec, prompt, lines in clean[:800]:
        spoiled = plant(rng, spec, lines)
        if spoiled is None:
            continue
        planted += 1
        checks = check(prompt, " ".join(spoiled))
        assert checks[caught_by] < 1 and score(checks) < 1, (prompt, spoiled, checks)
    assert planted >= 250


def test_what_was_lost_and_found_or_given_is_no_fault(clean: list[Case]) -> None:
    for _, spec, prompt, lines in clean[:300]:
        name, thing, friend = spec.name, _thing(spec, lines), _friend(spec, lines)
        found = _insert(
            lines,
            f"{name} made a {thing} of wool.",
            f"{name} lost the {thing} in the snow.",
            f"At last, {name} found the {thing} again.",
            f"{name} held the {thing} gently.",
            f"{name} met {friend} on the way.",
            f"{name} gave the {thing} to {friend}.",
            f"{friend} held the {thing} gently.",
        )
        if check(prompt, lines[-1])["continuity"] == 1:  # the closing stands alone
            assert check(prompt, " ".join(found))["continuity"] == 1, found


# Hacks


@pytest.mark.parametrize(
    "hack",
    [
        "",
        " ",
        ".",
        "Ben was very happy.",
        "Ben kite fox happy.",
        "kite, fox, kite, fox. Ben! happy.",
        "Ben had a red kite. " * 12,
        "Ben had a red kite. Ben was very happy. " * 6,
        "Ben saw a gray fox. Ben had a red kite. Ben was very happy. " * 5,
        "Ben was very happy. " * 9,
        "Write a story about Ben. Use: kite, fox. Ending: happy.",
        "Ben kite fox. " * 10 + "Ben was very happy.",
        "kite fox Ben happy " * 12,
    ],
)
def test_cheap_hacks_score_low(hack: str) -> None:
    assert gold(["Write a story about Ben. Use: kite, fox. Ending: happy."], [hack])[0] < 0.35


def test_a_perfect_story_for_another_prompt_scores_low(clean: list[Case]) -> None:
    others = [
        gold([prompt], [" ".join(lines)])[0] for (_, _, prompt, _), (_, _, _, lines) in itertools.pairwise(clean[:400])
    ]
    assert sum(others) / len(others) < 0.55
