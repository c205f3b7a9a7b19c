"""Train the tokenizer: `python -m stages.tokenizer --config configs/stories/tokenizer.yaml`."""

from pipeline import data, runtime
from pipeline.arguments import TokenizerArguments
from pipeline.tokenizer import train_tokenizer


def main(args: TokenizerArguments) -> None:
    """Learn byte-level BPE merges from the corpus and save the fast tokenizer."""
    stage = runtime.Stage(args, "tokenizer", {"dataset": args.dataset})
    if not stage.is_main:
        return
    texts = data.load_texts(args.dataset, split="train", seed=args.seed, max_bytes=args.max_bytes)
    tokenizer = train_tokenizer(texts, args.vocab_size)
    tokenizer.save_pretrained(stage.output_dir)
    sample = texts[: max(1, len(texts) // 20)]
    tokens = sum(len(ids) for ids in tokenizer(sample)["input_ids"])
    text_bytes = sum(len(text.encode()) for text in sample)
    stage.finish({"vocab_size": len(tokenizer), "bytes_per_token": round(text_bytes / tokens, 3)})


if __name__ == "__main__":
    runtime.run(main, TokenizerArguments)
