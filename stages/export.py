"""Take a model out: `python -m stages.export --run_dir runs/stories --to hf` (a stock folder), `gguf` or `hub`."""

import re
import tempfile
from pathlib import Path

from pipeline.errors import UserError
from pipeline.export import check, gguf_file, hub
from pipeline.export.card import Card, card_of, render
from pipeline.export.folder import Exported, dtype_for, last_policy, open_model, set_ends, write_folder
from pipeline.runtime import budget
from pipeline.runtime.arguments import ExportArguments
from pipeline.runtime.console import run
from pipeline.runtime.record import Stage
from pipeline.runtime.resume import remove


def main(args: ExportArguments) -> None:
    """Write what `to` says, and check it by opening it in a process that has none of our code."""
    args.output_dir = args.output_dir.replace("{to}", args.to)
    check_options(args)
    path = args.model_name_or_path or last_policy(args.run_dir)
    stage = Stage(args, "export", {"model": path})
    if not stage.is_main:  # one process does it
        return
    exported = open_model(path)
    dtype = dtype_for(args.to, args.dtype, exported.held)
    stage.say(f"{path} as {dtype}, {'as it is there' if dtype == exported.held else f'from {exported.held}'}")
    if args.dry_run:
        return budget.of_reading(stage, "of the model, which is written and then opened without our code")
    card = card_of(exported, stage.inputs["model"]["sha256"], dtype, args.license, args.repo_id)
    if args.to == "gguf":
        return write_gguf(stage, exported, card)
    folder = stage.output_dir / "model"
    difference = write_stock(stage, exported, card, folder)
    metrics = {"largest_difference": difference, "dtype": dtype, "bytes": size_of(folder)}
    if args.to == "hub" and args.repo_id:
        stage.say(f"pushing to {args.repo_id}, {'private' if args.private else 'public'} if it is new")
        address = hub.push(folder, args.repo_id, args.private, exported.is_reward)
        stage.say(f"pushed to {address}")
    stage.finish(metrics)


def check_options(args: ExportArguments) -> None:
    """Raise UserError for options that do not fit `to`, and where what it needs is missing."""
    dtype_for(args.to, args.dtype, "fp32")
    if args.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", args.license):
        raise UserError(f"license: {args.license!r} is no identifier of the hub; write it as mit or apache-2.0")
    if args.to == "hub":
        hub.check_can_push(args.repo_id)
    elif args.repo_id is not None:
        raise UserError(f"repo_id: {args.repo_id} is for `--to hub`; with `--to {args.to}` nothing is pushed")
    if args.to == "gguf":
        gguf_file.check_installed()


def write_stock(stage: Stage, exported: Exported, card: Card, folder: Path) -> float:
    """Write the stock folder with its card and return the largest difference of logits when it is opened alone."""
    stage.begin()
    if folder.exists():  # of this very run, which was stopped on the way
        remove(folder)
    write_folder(exported, folder, card.dtype)
    (folder / "README.md").write_text(render(card, exported), encoding="utf-8")
    here = check.ours(exported, check.ends_of(exported))
    difference = check.in_transformers(exported, here, folder)
    answer = "" if exported.is_reward else ", the same greedy answer"
    stage.say(f"opened by transformers alone: largest difference of logits {difference:.2g}{answer}")
    return difference


def write_gguf(stage: Stage, exported: Exported, card: Card) -> None:
    """Write model.gguf and the card beside it, and compare it in every reader that is installed."""
    pre = gguf_file.pre_tokenizer(exported)
    set_ends(exported)
    exported.tokenizer.chat_template = gguf_file.without_markers(exported.tokenizer.chat_template)
    stage.begin()
    file, text = stage.output_dir / "model.gguf", render(card, exported)
    with tempfile.TemporaryDirectory(prefix=".stock-", dir=stage.output_dir) as scratch:
        folder = Path(scratch) / card.title  # the converter names the model by it
        write_folder(exported, folder, exported.held)
        (folder / "README.md").write_text(text, encoding="utf-8")
        gguf_file.convert(folder, file, card.dtype, pre, card.title)
    (stage.output_dir / "README.md").write_text(text, encoding="utf-8")
    found = gguf_file.check_file(file, exported, card.dtype)
    kinds = ", ".join(f"{count} {name}" for name, count in found["types"].items())
    stage.say(f"read back: {found['tensors']} tensors ({kinds}), pre-tokenizer {pre if pre != '-' else 'by its hash'}")
    gguf_file.round_weights(exported.model, card.dtype)
    ends = check.ends_of(exported)
    here = check.ours(exported, ends)
    found |= {"differences": gguf_file.compare_readers(exported, here, file, card.dtype, ends, stage.say)}
    stage.finish(found | {"dtype": card.dtype, "bytes": file.stat().st_size})


def size_of(folder: Path) -> int:
    """Bytes of all files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":
    run(main, ExportArguments)
