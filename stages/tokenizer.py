"""Train the tokenizer: `python -m stages.tokenizer --config configs/stories/tokenizer.yaml`."""

import time

from pipeline.runtime import budget, preview
from pipeline.runtime.arguments import TokenizerArguments
from pipeline.runtime.console import console, run
from pipeline.runtime.record import Stage
from pipeline.text import data
from pipeline.text.counts import counted
from pipeline.text.lengths import percentiles
from pipeline.text.tokenizer import character_tokenizer, encode, train_tokenizer

SAMPLE_LENGTH = 100_000  # characters of a document to measure bytes_per_token on: a text may be one long document


def main(args: TokenizerArguments) -> None:
    """Learn byte-level BPE merges, or the alphabet, from the corpus and save the fast tokenizer."""
    stage = Stage(args, "tokenizer", {"dataset": args.dataset})
    if not stage.is_main:
        return
    where = {name: getattr(args, name) for name in ("seed", "max_bytes", "text_column", "streaming")}
    texts = data.load_texts(args.dataset, split="train", **where)
    sizes = [len(text.encode()) for text in texts]
    documents = counted(len(texts), "documents")
    summary = f"{documents}, {sum(sizes):,} bytes of UTF-8", percentiles("bytes of documents", sizes)
    if args.show:
        for number, text in enumerate(texts[: args.show], start=1):
            console.print(f"\ndocument {number}, {sizes[number - 1]:,} bytes", style="bold", markup=False)
            console.print(preview.plain(text), markup=False, soft_wrap=True)
        console.print("", *summary, sep="\n", markup=False, soft_wrap=True)
        return
    for line in summary:
        stage.say(line)
    if args.dry_run:
        return say_budget(args, stage, texts)
    if args.algorithm == "char":
        # A letter that only the held-out text has needs an entry too, or its loss could not be taken.
        held_out = data.load_texts(args.dataset, split="validation", **where)
        tokenizer = character_tokenizer([*texts, *held_out])
    else:
        tokenizer = train_tokenizer(texts, args.vocab_size)
    stage.begin()
    tokenizer.save_pretrained(stage.output_dir)
    sample = [text[:SAMPLE_LENGTH] for text in texts[: max(1, len(texts) // 20)]]
    tokens = sum(len(ids) for ids in encode(tokenizer, sample, split_special_tokens=True))
    text_bytes = sum(len(text.encode()) for text in sample)
    stage.finish({"vocab_size": len(tokenizer), "bytes_per_token": round(text_bytes / tokens, 3)})


def say_budget(args: TokenizerArguments, stage: Stage, texts: list[str]) -> None:
    """Print how long learning takes, by a tenth of the documents; a model's memory is not needed."""
    some, start = texts[: max(1, len(texts) // 10)], time.perf_counter()
    _ = character_tokenizer(some) if args.algorithm == "char" else train_tokenizer(some, args.vocab_size)
    seconds = (time.perf_counter() - start) * len(texts) / len(some)
    told = f"about {budget.clock(seconds)} to learn, by {len(some):,} of {len(texts):,} documents"
    budget.of_reading(stage, told)


if __name__ == "__main__":
    run(main, TokenizerArguments)
