"""An exported folder on the Hugging Face Hub: what would be uploaded, and the upload."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import UserError
from ..folders import MANIFEST

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_push(repository: str, upload: bool) -> None:
    """Raise UserError for a name that is no ORG/NAME and, before an upload, where no token is at hand."""
    if not _REPOSITORY.fullmatch(repository) or ".." in repository or "--" in repository:
        raise UserError(f"--push: '{repository}' is not the name of a repository; write it as org/name")
    if upload:
        from huggingface_hub import get_token

        if not get_token():
            raise UserError("--push: no token of the Hub is at hand; run `hf auth login` or set HF_TOKEN, then again")


def push(folder: Path, repository: str, upload: bool = False) -> list[str]:
    """Say what of an exported folder goes to a repository of the Hub and, with `upload`, upload it.

    A repository that is new is made private. Files of the repository that the folder does not have stay there. Returns
    the lines to print. Raises UserError in one line when the Hub refuses or cannot be reached.
    """
    check_push(repository, upload)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    listed = [f"  {path.relative_to(folder)}  {path.stat().st_size / 2**20:,.1f} MiB" for path in files]
    if not upload:
        head = f"would upload to {repository} (made private if it is new):"
        return [head, *listed, "nothing was uploaded; add --yes to do it"]
    return [f"uploaded to {_upload(folder, repository)}:", *listed]


def _upload(folder: Path, repository: str) -> str:
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        url = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            ignore_patterns=[MANIFEST],
            commit_message="Model exported by mmtard",
        )
    except (OSError, ValueError) as error:  # those of huggingface_hub are of these kinds
        reason = " ".join(str(error).split())
        raise UserError(f"--push: {repository} was not uploaded: {reason}; the export lies in '{folder}'") from None
    return str(url)
