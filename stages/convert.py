"""Turn a model from elsewhere into a stock folder: `python -m stages.convert --config configs/smollm2/convert.yaml`."""

from pathlib import Path

from pipeline.checkpoint import sha256_of
from pipeline.model.foreign import changed_texts, check_gguf, find_source, odd_cut, open_source
from pipeline.model.load import parameter_count
from pipeline.runtime import budget
from pipeline.runtime.arguments import ConvertArguments
from pipeline.runtime.console import run
from pipeline.runtime.record import Stage


def main(args: ConvertArguments) -> None:
    """Write safetensors, config.json, generation_config.json and the tokenizer, which every other stage takes."""
    source = find_source(args.model_name_or_path)
    stage = Stage(args, "convert", {"model": source.path})
    if not stage.is_main:
        return
    if source.file:
        check_gguf(source)
    if args.dry_run:
        return budget.of_reading(stage, "of the model, which is opened in fp32 and written")
    if sentence := odd_cut(source):
        stage.say(sentence)
    model, tokenizer = open_source(source)
    if changed := changed_texts(tokenizer):
        stage.say(f"warning: the tokenizer does not give {len(changed)} odd texts back, such as {changed[0]!r}")

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    stage.begin()
    stage.write_model(write)
    ends = model.generation_config.eos_token_id
    stage.finish(
        {
            "parameters": parameter_count(model),
            "vocab_size": len(tokenizer),
            "texts_changed": len(changed),
            "architecture": type(model).__name__,
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "end_tokens": tokenizer.convert_ids_to_tokens(ends if isinstance(ends, list) else [ends]),
            "pad_token": tokenizer.pad_token,
            "source": args.model_name_or_path,
            "source_sha256": sha256_of(source.file) if source.file else stage.inputs["model"]["sha256"],
            **source.facts,
        }
    )


if __name__ == "__main__":
    run(main, ConvertArguments)
