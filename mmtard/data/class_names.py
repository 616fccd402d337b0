"""Class names and prompts, as text files beside the shards or as settings give them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..config import Data
from ..errors import UserError
from .dataset import Dataset
from .paths import is_remote, shards_of


def classnames(settings: Data, dataset: Dataset) -> list[str]:
    """The class names, in the order of the labels.

    From `settings.classnames`, else from classnames.txt beside the shards or one folder up. Raises UserError when
    there is no such file, it is no list of names, or a label of the data has no name in it.
    """
    path = Path(settings.classnames) if settings.classnames else beside(settings)
    if path is None:
        raise UserError(
            f"data.classnames: no classnames.txt beside '{shards_of(settings)[0]}'; set data.classnames to a file of "
            "one name a line, in the order of the labels, or data.targets=none where the method reads embeddings alone"
        )
    return names_of(dataset, path, "data.classnames")


def beside(settings: Data) -> Path | None:
    """The classnames.txt beside the shards, or one folder up."""
    first = shards_of(settings)[0]
    if is_remote(first):
        return None
    folder = Path(os.path.abspath(first)).parent
    return next((path for at in (folder, folder.parent) if (path := at / "classnames.txt").is_file()), None)


def names_of(dataset: Dataset, path: Path, key: str) -> list[str]:
    """The names of a file of class names. Raises UserError naming `key` as `read_names` does, and where a label of the
    data has no name in it.
    """
    names = read_names(path, key)
    highest = int(dataset.labels.max(initial=-1))
    if highest >= len(names):
        raise UserError(
            f"{key}: '{path}' has {len(names)} names, and the shards have a sample of label {highest}; "
            "give the file of their classes"
        )
    return names


def read_names(path: Path, key: str) -> list[str]:
    """The names of a file of class names, one a line; a name's line is its label.

    Raises UserError naming `key` for a file that cannot be read, a blank line among the names (those after it would get
    other labels), and numbers before the names.
    """
    names = read_entries(path, key)
    if "" in names:
        number = names.index("") + 1
        raise UserError(
            f"{key}: line {number} of '{path}' is blank, and a name's line is its label; name the class there"
        )
    numbered = [re.fullmatch(r"(\d+)\s*[,;:\t]\s*(.+)", name) for name in names]
    if names and all(numbered):
        raise UserError(
            f"{key}: the lines of '{path}' begin with numbers ('{names[0]}'); write the names alone, one a line, "
            "in the order of the labels"
        )
    return names


def templates(settings: Data) -> list[str]:
    """The prompts, each with `{}` where the class name goes.

    Raises UserError for a prompt without a place for the name, or with other braces.
    """
    given = settings.templates
    if isinstance(given, str):
        if "{" in given and not Path(given).is_file():
            given = [given]
        else:
            given = [line for line in read_entries(Path(given), "data.templates") if line]
    prompts = [t.replace("{c}", "{}") for t in given]
    for prompt in prompts:
        rest = prompt.replace("{}", "")
        if rest == prompt or "{" in rest or "}" in rest:
            raise UserError(
                f"data.templates: '{prompt}' has no single kind of place for the class name; "
                "write it like 'a photo of a {}'"
            )
    if not prompts:
        raise UserError("data.templates: no prompt given; write at least one, like 'a photo of a {}'")
    return prompts


def read_entries(path: Path, key: str) -> list[str]:
    """The lines of a UTF-8 text file without white space around them; blank lines at its end are dropped.

    Lines end at a line feed, a carriage return or both, and at nothing else: U+2028 and U+0085 may stand in a name. A
    byte-order mark is no part of the first line. Raises UserError naming `key` for a file that cannot be read.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{key}: cannot read '{path}' ({getattr(error, 'strerror', None) or error}); "
            "give a text file in UTF-8, one entry a line"
        ) from None
    lines = [line.strip() for line in re.split(r"\r\n|\r|\n", text)]
    while lines and not lines[-1]:
        lines.pop()
    return lines
