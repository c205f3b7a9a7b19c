"""Text in: where rows come from, the tokenizer, packing into rows of tokens."""
