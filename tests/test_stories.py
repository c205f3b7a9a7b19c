"""The story world: what it tells is clean, what is spoiled is caught, and nothing held out is asked for in training."""

import hashlib
import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from reward_data import stories
from reward_data.stories import Spec, check, faults, gold, parse_prompt
from reward_data.stories.grammar import CLOSINGS, FRAMES, GROUPS, parse, split_sentences
from reward_data.stories.judge import score
from reward_data.stories.lexicon import (
    ANIMALS,
    DECOR,
    ENDINGS,
    GENDER,
    HELD_OUT_NAMES,
    KIND_OF,
    NAMES,
    OBJECTS,
    PLACES,
    REQUIRED,
)  # fmt: skip
from reward_data.stories.spec import WORDINGS, draw, held_out_pair, write_prompt
from reward_data.stories.telling import Teller, token_count

ROOT = Path(__file__).parent.parent
Case = tuple[Random, Spec, str, list[str]]


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return list(stories.corpus(seed=0, max_bytes=2_000_000))


@pytest.fixture(scope="module")
def answers() -> list[tuple[str, str]]:
    rows = stories.instructions(seed=0, size=3000)
    return [(row["prompt"][0]["content"], row["completion"][0]["content"]) for row in rows]


@pytest.fixture(scope="module")
def clean() -> list[Case]:
    """Clean stories that obey, half of them of held-out specs: (rng, spec, prompt, sentences)."""
    rng = Random("clean")
    cases = []
    for index in range(2000):
        spec = draw(rng, held_out=index % 2 == 0)
        cases.append((rng, spec, write_prompt(rng, spec), split_sentences(stories.story(rng, spec))))
    return cases


# What is told


def test_the_corpus_has_1000_words_and_200_frames_and_dialogue(corpus: list[str]) -> None:
    words = {word.lower() for text in corpus for word in re.findall("[A-Za-z]+", text)}
    sentences = [sentence for text in corpus for sentence in split_sentences(text)]
    frames = {parsed[0].template for parsed in map(parse, sentences) if parsed}
    assert len(words) >= 1000
    assert len(frames) >= 400 and len(frames) >= 0.98 * len(FRAMES)
    assert 0.05 < sum('"' in sentence for sentence in sentences) / len(sentences) < 0.3


def test_corpus_documents_are_short_and_of_mixed_quality(corpus: list[str]) -> None:
    counts = [len(split_sentences(text)) for text in corpus]
    assert sum(4 <= count <= 10 for count in counts) / len(counts) > 0.95
    words = [len(sentence.split()) for text in corpus for sentence in split_sentences(text)]
    assert 5 < sum(words) / len(words) < 8 and max(words) <= 20
    prompt = "Write a story about Ben. Use: kite, fox. Ending: happy."
    coherence = ("pronouns", "continuity", "grammar", "repeats", "close")
    faulty = sum(any(check(prompt, text)[name] < 1 for name in coherence) for text in corpus) / len(corpus)
    assert 0.2 < faulty < 0.31  # CORPUS_FAULTY, less the pronouns that happen to mean somebody else


def test_corpus_keeps_to_its_size_and_splits_differ() -> None:
    train = list(stories.corpus(1, 100_000))
    assert 99_000 < len("\n".join(train).encode()) <= 100_000
    assert train != list(stories.corpus(2, 100_000))
    assert not set(train) & set(stories.corpus(1, 100_000, "validation"))
    assert "\n" not in "".join(train)


def test_lexicon_words_are_of_one_kind() -> None:
    assert len(REQUIRED) == len(set(REQUIRED)) == len(KIND_OF)
    decor = {word for words in DECOR.values() for word in words}
    literals = {word for frame in FRAMES for word in re.findall("[A-Za-z]+", frame.text.replace("%s", ""))}
    assert not (decor | literals) & (set(REQUIRED) | set(NAMES))
    assert len({word.lower() for word in decor | literals} & {name.lower() for name in NAMES}) == 0


def test_every_frame_parses_back_to_itself() -> None:
    rng = Random(0)
    for frame, _ in itertools.product(FRAMES, range(20)):
        teller = Teller(rng)
        bound = {
            variable: teller.pick(words) for variable, words in zip("OAL", (OBJECTS, ANIMALS, PLACES), strict=True)
        }
        values = teller.values(frame, {**bound, "P": teller.pick(NAMES), "Q": teller.pick(NAMES)})
        assert parse(frame.render(values)) == (frame, tuple(values)), frame.template


def test_articles_and_capitals_are_part_of_the_grammar() -> None:
    assert (
        parse("Ben found an old kite.")
        and parse('"Look, an owl!" she said.')
        and parse("A brave knight named Ann came by.")
    )
    for wrong in (
        "Ben found a old kite.",
        '"Look, a owl!" she said.',
        "ben found an old kite.",
        "He Found an old kite.",
    ):
        assert parse(wrong) is None, wrong


def test_quotations_belong_to_the_sentence_round_them() -> None:
    text = '"Look, an owl!" Ben said. "Why?" she asked. Nobody could believe it! Then'
    assert split_sentences(text) == [
        '"Look, an owl!" Ben said.',
        '"Why?" she asked.',
        "Nobody could believe it!",
        "Then",
    ]


# The judge on clean stories


def test_no_false_alarm_on_2000_clean_obeying_stories(clean: list[Case]) -> None:
    for _, _, prompt, lines in clean:
        checks = check(prompt, " ".join(lines))
        assert all(value == 1.0 for value in checks.values()) and score(checks) == 1.0, (prompt, lines, checks)


KITE, FOX, MILK, SICK, TOM, END = (
    "Ben had a red kite. ", "He met a fox near the fence. ", "Ben gave the fox a bowl of milk. ",
    "He was a little sick. ", "He met Tom on the way. ", "Ben was very happy.",
)  # fmt: skip
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
            lines, f"{name} made a {thing} of wool.", f"{name} lost the {thing} in the snow.",
            f"At last, {name} found the {thing} again.", f"{name} held the {thing} gently.",
            f"{name} met {friend} on the way.", f"{name} gave the {thing} to {friend}.",
            f"{friend} held the {thing} gently.",
        )  # fmt: skip
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


# Instructions and prompts


@pytest.mark.parametrize("wording", WORDINGS)
def test_a_prompt_says_exactly_what_it_asks(wording: str) -> None:
    rng = Random(wording)
    for held_out in (False, True) * 50:
        spec = draw(rng, held_out)
        text = wording.format(name=spec.name, words=", ".join(spec.words), ending=spec.ending)
        assert parse_prompt(text) == spec
        assert parse_prompt(f"<|user|>{text}<|end|><|assistant|>") == spec


def test_answers_obey_part_of_the_time(answers: list[tuple[str, str]]) -> None:
    checks = [check(prompt, story) for prompt, story in answers]
    mean = sum(map(score, checks)) / len(checks)
    assert 0.5 < mean < 0.6
    for name in stories.WEIGHTS:
        right = sum(one[name] == 1 for one in checks) / len(checks)
        assert 0.15 < right < 0.8, name
    spread = sorted(map(score, checks))
    assert spread[len(spread) // 10] < 0.35 and spread[-len(spread) // 10] > 0.78


def test_answers_fit_60_tokens(answers: list[tuple[str, str]]) -> None:
    counts = sorted(token_count(story) for _, story in answers)
    assert counts[int(0.99 * len(counts))] <= 60
    words = [len(story.split()) for _, story in answers]
    assert 28 < sum(words) / len(words) < 50


def test_nearly_every_word_is_one_token_of_a_bpe_of_2048(corpus: list[str], answers: list[tuple[str, str]]) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=2048, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(corpus, trainer)
    assert [word for word in (*REQUIRED, *NAMES) if len(bpe.encode(" " + word).ids) > 1] == []
    counts = sorted(len(bpe.encode(story).ids) for _, story in answers)
    assert counts[int(0.99 * len(counts))] <= 63  # and an end token


def test_held_out_names_and_pairs_are_never_asked_for_in_training(corpus: list[str]) -> None:
    sets = {
        **{split: stories.prompts(0, 3000, split) for split in ("preferences", "ppo", "validation", "test")},
        **{"instructions " + split: stories.instructions(0, 1500, split) for split in ("train", "validation", "test")},
    }
    specs = {name: [parse_prompt(row["prompt"][0]["content"]) for row in rows] for name, rows in sets.items()}
    training = [spec for name in ("preferences", "ppo", "instructions train") for spec in specs[name]]
    held_out = [spec for name, some in specs.items() if "validation" in name or "test" in name for spec in some]
    names = [{spec.name for spec in some} for some in (training, held_out)]
    pairs = [{frozenset(spec.words) for spec in some} for some in (training, held_out)]
    assert not names[0] & names[1] and names[1] == set(HELD_OUT_NAMES)
    assert not pairs[0] & pairs[1] and len(pairs[1]) > 2000
    told = " ".join(row["completion"][0]["content"] for row in sets["instructions train"])
    assert not HELD_OUT_NAMES & set(re.findall("[A-Z][a-z]+", told))
    seen = set(re.findall("[A-Za-z]+", " ".join(corpus)))
    assert seen.issuperset(HELD_OUT_NAMES) and seen.issuperset(REQUIRED)


def test_held_out_pairs_do_not_depend_on_order_and_leave_no_word_out() -> None:
    held = [pair for pair in itertools.combinations(REQUIRED, 2) if held_out_pair(*pair)]
    assert all(held_out_pair(b, a) for a, b in held)
    assert len(held) / (len(REQUIRED) * (len(REQUIRED) - 1) / 2) == pytest.approx(0.2, abs=0.01)
    assert {word for pair in held for word in pair} == set(REQUIRED)


@pytest.mark.parametrize("make", [stories.prompts, stories.instructions, lambda *a: list(stories.corpus(*a))])
def test_an_unknown_split_is_an_error_that_names_the_known(make: Callable) -> None:
    with pytest.raises(ValueError, match="have no split 'dev'; choose one of"):
        make(0, 5, "dev")


def test_splits_and_seeds_differ() -> None:
    rows = [
        str(stories.prompts(seed, 20, split))
        for seed in (0, 1)
        for split in ("preferences", "ppo", "validation", "test")
    ]
    assert len(set(rows)) == 8


# Determinism and speed


DIGEST = """
import hashlib
from reward_data import stories
rows = stories.instructions(5, 200)
text = "\\n".join(stories.corpus(5, 200_000)) + str(rows) + str(stories.prompts(5, 200, "test"))
text += str(stories.gold([r["prompt"] for r in rows], [r["completion"] for r in rows]))
print(hashlib.sha256(text.encode()).hexdigest())
"""


def test_the_same_seed_tells_the_same_in_every_process() -> None:
    digests = set()
    for hash_seed in ("0", "1", "777"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        run = subprocess.run(
            [sys.executable, "-c", DIGEST], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        digests.add(run.stdout.strip())
    assert len(digests) == 1 and len(digests.pop()) == len(hashlib.sha256().hexdigest())


def test_speed(answers: list[tuple[str, str]]) -> None:
    """Generous, since tests run on busy machines: a free core does ten times this."""
    start = time.process_time()
    size = sum(map(len, stories.corpus(9, 500_000)))
    assert size / (time.process_time() - start) > 250_000  # bytes a second
    parse.cache_clear()
    start = time.process_time()
    gold(*zip(*answers, strict=True))
    assert len(answers) / (time.process_time() - start) > 1000  # stories a second
