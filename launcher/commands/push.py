"""`tritrain export --push OWNER/NAME`: upload an export to the Hugging Face hub, after looking at it.

The token is the hub client's own business: it takes `HF_TOKEN`, or what its login stored. It is read here only to find
out that there is one, and to keep it out of messages.
"""

import re
from pathlib import Path

from data.messages import safe_message
from data.transformers_files import TOKENIZER_FILES
from launcher.commands.verify import published_in
from launcher.errors import CheckpointError, ConfigError
from launcher.formats.hf_source import listed
from launcher.inference.verdict import judge
from launcher.process.console import Console

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")

HF_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


def check_push(repository: str) -> None:
    """Make sure that an upload can be tried, before an export takes its time.

    Raises:
        ConfigError: the name is none, or there is no token.
    """
    if not REPOSITORY.fullmatch(repository):
        raise ConfigError(f"--push {repository!r}: must be OWNER/NAME, of a model on the Hugging Face hub")
    if _token() is None:
        raise ConfigError("--push: no token was found; set HF_TOKEN to one that may write, or run `hf auth login`")


def push(export: Path, repository: str, console: Console) -> None:
    """Upload a folder or file that `tritrain verify` finds nothing wrong with, in one commit.

    A repository that does not exist is created, for its owner's eyes only. In one that has an export already, what a
    program would read beside the new files or instead of them is deleted: weights in other shards, and files of a
    tokenizer. All else stays, models of other formats too.

    Args:
        export: the folder, or GGUF file.
        repository: OWNER/NAME.
        console: where to say that it was done.

    Raises:
        CheckpointError: something is wrong with the export, and nothing was uploaded; or the hub cannot be reached or
            refuses it.
    """
    problems = [problem for each in published_in(export) for problem in judge(each).problems]
    if problems:
        raise CheckpointError(listed(f"{export} was not uploaded; tritrain verify finds", problems))
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    hub, message = HfApi(), f"Export {export.name}"
    older: list[str] = []
    try:
        hub.create_repo(repository, private=True, exist_ok=True)
        if export.is_dir():
            older = _replaced(hub.list_repo_files(repository), {file.name for file in export.iterdir()})
            commit = hub.upload_folder(
                repo_id=repository, folder_path=export, commit_message=message, delete_patterns=older
            )
        else:
            commit = hub.upload_file(
                path_or_fileobj=export, path_in_repo=export.name, repo_id=repository, commit_message=message
            )
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise CheckpointError(
            f"{repository}: the upload failed, and {export} is complete here: {_without_token(str(error))}. Check that "
            "the token may write to this repository, and the network; the same upload can be tried again with "
            f"`hf upload {repository} {export}`" + (f"; then delete {', '.join(older)} there" if older else "")
        ) from None  # what the client raised may quote headers
    if older:
        console.line(f"Deleted there, of an earlier export: {', '.join(older)}")
    console.line(f"Uploaded: {commit.repo_url}, which only its owner sees unless it was public before")


def _replaced(there: list[str], new: set[str]) -> list[str]:
    """The files in a repository that would be read with the new ones, or instead of them, and are of another export."""
    has_weights = any(map(HF_WEIGHTS.fullmatch, new))
    return [
        name
        for name in there
        if name not in new and (name in TOKENIZER_FILES or (has_weights and HF_WEIGHTS.fullmatch(name)))
    ]


def _token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


def _without_token(text: str) -> str:
    token = _token()
    return safe_message(text.replace(token, "***") if token else text)
