"""A folder of images in class folders: which files are images of which class, and which are left out and why."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError
from .index import EXTENSIONS
from .shard_scan import OTHER_IMAGES


@dataclass(frozen=True)
class Source:
    """An image of a class, its key in the shards, and when it, or its caption, was last changed (nanoseconds)."""

    path: Path
    label: int
    key: str
    changed: int


@dataclass
class ImageFolder:
    """What `survey` found; `digest` is of all names and sizes, `left_out` counts images that are no part of it, by why.

    `unread` are those among them that lie in a class folder and are of a kind that is not read.
    """

    classes: list[str]
    sources: list[Source]
    digest: str
    left_out: dict[str, int] = field(default_factory=dict)
    unread: list[Path] = field(default_factory=list)


def survey(images: Path, nested: bool = False) -> ImageFolder:
    """The classes of an image folder and every image in sorted order.

    A class is a sub-folder; with `nested`, every folder at any depth that holds images, named by its path. Raises
    UserError for a folder without class folders, or a class folder without images.
    """
    images = Path(images)
    if not images.is_dir():
        raise UserError(f"'{images}' is not a folder; give one whose sub-folders are the classes")
    classes, left_out = _classes(images, nested)
    sources, unread, digest = [], [], hashlib.sha256()
    for label, name in enumerate(classes):
        found, others = _images_in(images / name)
        unread += others
        if not nested and (below := _images_below(images / name)):
            why = "below a class folder (--nested makes each such folder a class)"
            left_out[why] = left_out.get(why, 0) + below
        if not found:
            _refuse_empty(images / name, others, nested)
        for path in found:
            sources.append(_source(path, label, name, len(sources)))
            digest.update(_identity(name, path))
    if unread:
        left_out[_not_read(unread)] = len(unread)
    return ImageFolder(classes, sources, digest.hexdigest(), left_out, unread)


def _classes(images: Path, nested: bool) -> tuple[list[str], dict[str, int]]:
    """The class folders' names in the order of their labels, and the images beside them by reason."""
    loose, others = _images_in(images)
    left_out = {f"beside the class folders, in '{images}' itself": len(loose) + len(others)}
    if nested:
        names = []
        for folder, below, _ in os.walk(images, followlinks=True):
            below[:] = sorted(name for name in below if not name.startswith("."))
            if Path(folder) != images and _images_in(Path(folder))[0]:
                names.append(Path(folder).relative_to(images).as_posix())
        names.sort()
    else:
        names = sorted(p.name for p in images.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise UserError(f"'{images}' has no sub-folders; give a folder whose sub-folders are the classes")
    for name in names:
        # Python reads bytes that are no UTF-8 as surrogates; a control character would break a line of classnames.txt.
        if any("\ud800" <= c <= "\udfff" or ord(c) < 32 or ord(c) == 127 for c in name):
            raise UserError(
                f"'{images}': the class folder {name!r} has a name that cannot be written as text; rename it"
            )
    if all(re.fullmatch("[0-9]+", name) for name in names):
        names.sort(key=int)
    return names, {why: count for why, count in left_out.items() if count}


def _images_in(folder: Path) -> tuple[list[Path], list[Path]]:
    """The images that lie in a folder itself and those of kinds that are not read, each sorted."""
    found, others = [], []
    for path in folder.iterdir():
        kind = path.suffix[1:].lower()
        if path.name.startswith(".") or path.is_dir():
            continue
        if kind in EXTENSIONS:
            found.append(path)
        elif kind in OTHER_IMAGES:
            others.append(path)
    return sorted(found), sorted(others)


def _not_read(others: list[Path]) -> str:
    kinds = sorted({path.suffix.lower() for path in others})
    what = "a kind that is" if len(kinds) == 1 else "kinds that are"
    return f"of {what} not read ({', '.join(kinds)}; {', '.join(EXTENSIONS)} are)"


def _images_below(folder: Path) -> int:
    """How many images lie in folders below a class folder."""
    count = 0
    for below, _, files in os.walk(folder):
        if Path(below) != folder:
            count += sum(name.rpartition(".")[2].lower() in (*EXTENSIONS, *OTHER_IMAGES) for name in files)
    return count


def _refuse_empty(folder: Path, others: list[Path], nested: bool) -> None:
    told = f"; {len(others)} are {_not_read(others)}" if others else ""
    if not nested and (below := _images_below(folder)):
        told += f"; {below} lie in folders below it: --nested makes each such folder a class"
    raise UserError(
        f"class folder '{folder}' has no image ({', '.join(EXTENSIONS)}){told}; "
        "give the folder whose sub-folders are the classes, or remove it"
    )


def _source(path: Path, label: int, name: str, number: int) -> Source:
    # The number makes keys unique; dots would end them, and long or foreign names do not fit a plain tar header.
    readable = re.sub(r"[^A-Za-z0-9_-]", "_", f"{name}-{path.stem}")[:64]
    times = [path.stat()]
    if (caption := path.with_suffix(".txt")).is_file():
        times.append(caption.stat())
    return Source(path, label, f"{number:08d}-{readable}", max(max(t.st_mtime_ns, t.st_ctime_ns) for t in times))


def _identity(name: str, path: Path) -> bytes:
    caption = path.with_suffix(".txt")
    sizes = (path.stat().st_size, caption.stat().st_size if caption.is_file() else -1)
    return f"{name}/{path.name}\0{sizes[0]}\0{sizes[1]}\n".encode("utf-8", "surrogateescape")
