"""Whether an answer to a word problem of GSM8K (arXiv 2110.14168) is right: the number after `####`, to the digit.

    --dataset openai/gsm8k:main --reward reward_data.gsm8k:strict --gold reward_data.gsm8k:strict

A row has a `question` and an `answer` whose last line is `#### 42`. The model is asked to end in the same way, and a
right number that stands elsewhere earns nothing ("strict").
"""

import re
from decimal import Decimal
from typing import Any

from reward_data.formats import Answer, text_of

MARK = "####"
# What may follow the mark: a sign, a currency, digits with or without commas between thousands, a fraction.
NUMBER = re.compile(
    r"[ \t]*(?P<sign>[-−+]?)[ \t]*(?:[$€£][ \t]*(?P<later>[-−+]?))?"
    r"(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d*)(?P<part>\.\d+)?"
)


def final_number(text: str) -> Decimal | None:
    """The number that an answer ends with: the one after its last `####`; None where no number stands there.

    The last mark counts, as in verl's strict score: "#### 18, no, #### 20" says 20 in the end, and several tries earn
    no more than one. Commas between thousands, a currency, a unit after the number ("18 dollars", "18%"), a full stop,
    blanks and Markdown's stars do not matter. Where a fraction ("1/2"), a sum ("3+4") or a second number follows, no
    one number is said.
    """
    _, mark, said = text.rpartition(MARK)
    line = said.lstrip().split("\n")[0].replace("**", "").replace("\\$", "$") if mark else ""
    found = NUMBER.match(line)
    if not found or not (found["whole"] or found["part"]):
        return None
    if re.search(r"[\d/*+=^]", line[found.end() :]):  # a date, a fraction, a sum: not one number
        return None
    sign = "-" if {found["sign"], found["later"]} & {"-", "−"} else ""
    return Decimal(f"{sign}{found['whole'].replace(',', '')}{found['part'] or ''}")


def strict(prompts: list[Answer], completions: list[Answer], answer: list[str], **columns: Any) -> list[float]:
    """1 for a completion whose final number is that of `answer`, else 0.

    Raises ValueError for a row whose own answer has no number after `####`.
    """
    scores = []
    for completion, worked in zip(completions, answer, strict=True):
        expected = final_number(worked)
        if expected is None:
            raise ValueError(f"the column 'answer' has no number after {MARK}: {worked[-60:]!r}")
        scores.append(float(final_number(text_of(completion)) == expected))
    return scores
