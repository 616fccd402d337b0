"""Class names and prompts, as files beside the shards or as settings give them."""

import os
from pathlib import Path

from ..config import Data
from ..errors import UserError
from .dataset import Dataset
from .paths import is_remote, shards_of


def classnames(settings: Data, dataset: Dataset) -> list[str]:
    """The class names, in the order of the labels: `settings.classnames`, else classnames.txt beside the shards or one folder up.

    Raises UserError when there is no such file, or a label of the data has no name in it.
    """
    path = _classnames_file(settings)
    names = _lines(path, "data.classnames")
    highest = int(dataset.labels.max(initial=-1))
    if highest >= len(names):
        raise UserError(
            f"data.classnames: '{path}' has {len(names)} names, and the shards have a sample of label {highest}; give the file of their classes"
        )
    return names


def _classnames_file(settings: Data) -> Path:
    if settings.classnames:
        return Path(settings.classnames)
    first = shards_of(settings)[0]
    if not is_remote(first):
        folder = Path(os.path.abspath(first)).parent
        for path in (folder / "classnames.txt", folder.parent / "classnames.txt"):
            if path.is_file():
                return path
    raise UserError(
        f"data.classnames: no classnames.txt beside '{first}'; set data.classnames to a file of one name a line, in the order of the labels, or data.targets=none where the method reads embeddings alone"
    )


def templates(settings: Data) -> list[str]:
    """The prompts, each with `{}` where the class name goes. Raises UserError for one without a place, or with other braces."""
    given = settings.templates
    if isinstance(given, str):
        given = [given] if "{" in given and not Path(given).is_file() else _lines(Path(given), "data.templates")
    prompts = [t.replace("{c}", "{}") for t in given]
    for prompt in prompts:
        rest = prompt.replace("{}", "")
        if rest == prompt or "{" in rest or "}" in rest:
            raise UserError(
                f"data.templates: '{prompt}' has no single kind of place for the class name; write it like 'a photo of a {{}}'"
            )
    if not prompts:
        raise UserError("data.templates: no prompt given; write at least one, like 'a photo of a {}'")
    return prompts


def _lines(path: Path, key: str) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{key}: cannot read '{path}' ({getattr(error, 'strerror', None) or error}); give a text file, one entry a line"
        ) from None
    return [line for line in lines if line]
