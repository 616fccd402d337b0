"""The settings of a grid: what names them as folders, which are alike, and which the study sets itself. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from ..errors import UserError
from ..files import settings_digest, slug

Settings = dict[str, Any]
# What a study sets in each of its trainings, whatever the settings say -> what to do instead.
OWN = {
    "seed": "list the seeds of the runs in `seeds`",
    "run_dir": "each run has a folder of its own below `out`",
    "checkpoint.every": "`curve.points` says how many checkpoints there are",
    "checkpoint.keep_every": "those that `curve.points` asks for are kept",
    "probe": "it costs time that would count as a method's, and `curve` measures the checkpoints",
    "log.tensorboard": "it costs time that would count as a method's, and the page shows the curves",
    "log.wandb": "it costs time that would count as a method's, and the page shows the curves",
}


def refuse_own(place: str, settings: Settings, allowed: tuple[str, ...] = ()) -> None:
    """Raise ValueError where settings, dotted or nested, name one that the study sets itself, or a part of one."""
    named = sorted(dotted(settings))
    for own, remedy in OWN.items():
        found = [key for key in named if key == own or key.startswith(f"{own}.")]
        if found and own not in allowed:
            raise ValueError(f"{place}: sets {found[0]}, which the study sets itself; remove it: {remedy}")


def dotted(tree: Settings, prefix: str = "") -> Iterator[str]:
    """The dotted key of every section and setting of a tree."""
    for key, value in tree.items():
        place = f"{prefix}{key}"
        yield place
        if isinstance(value, dict):
            yield from dotted(value, f"{place}.")


def names_of(found: list[Settings]) -> list[str]:
    """What settings set, each as a part of a path.

    A character that has no place in a path becomes `_`. Where that makes one name of two settings, each that it
    changed has a digest behind it; all other names are as they are without, since they are on users' disks.
    """
    written = ["_".join(_words(one)) for one in found]
    names = [slug(text) for text in written]
    shared = Counter(names)
    return [
        f"{name}-{settings_digest({key: repr(value) for key, value in one.items()})[:8]}"
        if shared[name] > 1 and name != text
        else name
        for one, text, name in zip(found, written, names)
    ]


def refuse_one_name(place: str, named: list[tuple[str, Settings]]) -> None:
    """Raise UserError where two settings would be kept in one folder: one run would be taken for the other."""
    known: dict[str, Settings] = {}
    for name, one in named:
        if name in known:
            raise UserError(
                f"{place}: {known[name]} and {one} would both be kept as '{name}'; write the value of one otherwise, "
                "or remove it"
            )
        known[name] = one


def _words(one: Settings) -> list[str]:
    return [f"{key}={value}" for key, value in one.items()]
