"""A repository on the hub, by transformers' and huggingface_hub's own calls."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from pipeline.errors import UserError
from pipeline.text.sources import one_line


def check_can_push(repo_id: str | None) -> None:
    """Raise UserError where nothing can be pushed: no name, no token, or the hub is switched off."""
    if not repo_id:
        raise UserError("repo_id: `--to hub` needs the name of a repository, as in `--repo_id my-name/my-model`")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"repo_id: {one_line(error)}") from None
    if constants.HF_HUB_OFFLINE:
        raise UserError("export: HF_HUB_OFFLINE is set, so that nothing can be pushed; unset it, or use `--to hf`")
    if get_token() is None:
        raise UserError("export: there is no token for the hub; run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, repo_id: str, private: bool, is_reward: bool) -> str:
    """Push a stock folder: model, tokenizer, and README.md as the card. Returns the repository's address.

    A repository that exists is added to and stays as private or public as it is. Raises UserError where the hub
    refuses.
    """
    kind: Any = AutoModelForSequenceClassification if is_reward else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype="auto", trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    for trace in ("is_local", "local_files_only", "name_or_path"):
        tokenizer.init_kwargs.pop(trace, None)
    try:
        model.push_to_hub(repo_id, private=private, commit_message="Model")
        tokenizer.push_to_hub(repo_id, private=private, commit_message="Tokenizer")
        ModelCard.load(folder / "README.md").push_to_hub(repo_id, commit_message="Model card")
    except Exception as error:  # of the network, the token, the card's metadata: the libraries raise many kinds
        raise UserError(
            f"export: {repo_id} cannot be pushed ({one_line(error) or type(error).__name__}); the folder is in "
            f"{folder}, and the same command tries again"
        ) from None
    return f"{constants.ENDPOINT}/{repo_id}"
