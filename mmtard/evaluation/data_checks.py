"""Whether a dataset is what its user takes it for: unused samples, names and captions that are likely mistakes.

Lines of health as `mmtard.attacks.checks` writes them; none where all is well.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from ..attacks.checks import health_line
from ..data.dataset import Dataset
from .statistics import wilson_interval

# What names look like that a folder or a table left in place of words.
_NO_WORDS = (
    ("WordNet ids", re.compile(r"n\d{8}")),
    ("numbers", re.compile(r"\d+")),
    ("numbered lines", re.compile(r"\d+\s*[,;:\t|]\s*\S.*")),
    ("words joined by _", re.compile(r"\S*[^\W\d]_[^\W\d]\S*")),
    ("text of a list", re.compile(r"[\[{].*[\]}]")),
)


def not_used(dataset: Dataset, left_out: Sequence[tuple[str, str]], labels: bool) -> dict[str, int]:
    """reason -> how many samples are in no number for it. labels: samples without a label are not measured."""
    reasons: Counter[str] = Counter()
    if labels:
        unlabelled = np.flatnonzero(dataset.labels < 0)
        for status in np.unique(dataset.index.label_status[unlabelled]):
            alike = unlabelled[dataset.index.label_status[unlabelled] == status]
            reasons[dataset.label_problem(int(alike[0])) or "no label"] += len(alike)
    reasons["without an image"] += int(dataset.index.imageless.sum())
    for what, (n, _) in dataset.index.not_read().items():
        reasons[f"not read: {what}"] += n
    for _, reason in left_out:
        reasons[reason.partition(":")[0]] += 1
    return {reason: n for reason, n in reasons.items() if n}


def label_lines(dataset: Dataset) -> list[dict]:
    """A line where samples have no usable label."""
    missing = np.flatnonzero(dataset.labels < 0)
    if not len(missing):
        return []
    first = int(missing[0])
    detail = (
        f"{len(missing)} of {len(dataset)} samples have none and are in no number "
        f"({dataset.name(first)}: {dataset.label_problem(first)}{'; ...' if len(missing) > 1 else ''})"
    )
    return [health_line("every sample has a label", False, detail)]


def class_name_lines(names: list[str], labels: np.ndarray, same: list[tuple[str, str]]) -> list[dict]:
    """Lines about class names that are likely mistakes.

    labels: int64 [N] of the data, -1 where there is none. same: pairs of different names that the model reads alike.
    """
    problems = []
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice:
        problems.append(f"{_some(twice)} twice: the model cannot tell these classes apart")
    for kind, looks in _NO_WORDS:
        alike = [name for name in names if looks.fullmatch(name)]
        if alike:
            problems.append(f"{len(alike)} of {len(names)} are {kind} ({_some(alike)}): write the words that name them")
    highest = int(labels.max(initial=-1))
    used = labels[labels >= 0]
    if len(used) and used.min() > 0:
        problems.append(
            f"no sample has label 0 ('{_short(names[0])}'), the lowest is {used.min()}: labels count from 0; were "
            "these counted from 1?"
        )
    if len(names) > highest + 1:
        problems.append(
            f"{len(names)} names, but the highest label is {highest}: is a name too many, or another file meant?"
        )
    first: dict[str, str] = {}
    same = same + [(earlier, name) for name in names if (earlier := first.setdefault(name.casefold(), name)) != name]
    if same:
        pairs = "; ".join(f"'{_short(a)}' and '{_short(b)}'" for a, b in same[:3])
        problems.append(
            f"{len(same)} are read as another one ({pairs}): the text tower does not see how they differ, which may be "
            "past its last token"
        )
    return [health_line("class names", False, problem) for problem in problems]


def chance_lines(clean: dict, chance: float) -> list[dict]:
    """A line where the clean accuracy is not shown to be above chance: its 95 % interval reaches down to chance."""
    if clean["interval95"][0] > chance:
        return []
    low, high = (100 * share for share in clean["interval95"])
    detail = (
        f"not shown: clean accuracy is {100 * clean['accuracy']:.2f} % ({low:.1f} to {high:.1f}), chance "
        f"{100 * chance:.2f} %; there may be too few samples, the model may not have learned these classes, or the "
        "class names may not be in the order of the labels"
    )
    return [health_line("above chance", False, detail)]


def shifted_lines(labels: Sequence[int], predictions: Sequence[int], chance: float) -> list[dict]:
    """A line where the predictions fit the labels only when each label is less, or more, by one.

    What the model sees is then right, and the numbering of the labels or the list of names is not. Shares are compared
    by their 95 % intervals, so that chance alone does not speak; nor does a model that gives one class nearly always.
    """
    n = len(labels)
    as_they_are = sum(label == prediction for label, prediction in zip(labels, predictions))
    lines = []
    for shift, change, remedy in (
        (-1, "less by one", "labels count from 0: write them anew, or put the name of class 0 on top of the names"),
        (+1, "more by one", "is the first of the names a heading? remove it"),
    ):
        fits = Counter(guess for label, guess in zip(labels, predictions) if label + shift == guess)
        shifted = sum(fits.values())
        if not shifted or max(fits.values()) > 0.75 * shifted:
            continue
        if wilson_interval(shifted, n)[0] > max(wilson_interval(as_they_are, n)[1], chance):
            detail = (
                f"{100 * shifted / n:.2f} % of the clean predictions are right with every label {change}, "
                f"{100 * as_they_are / n:.2f} % as they stand; {remedy}"
            )
            lines.append(health_line("labels and names in step", False, detail, "FAIL"))
    return lines


def caption_lines(same: list[tuple[str, str]], n: int) -> list[dict]:
    """A line where different captions are one to the model. same: pairs of them; n: captions in all."""
    if not same:
        return []
    detail = (
        f"{len(same)} of {n} are read as another one ('{_short(same[0][0])}' and '{_short(same[0][1])}'): "
        "they differ past the text tower's last token, "
        "and none of them can be told from the other"
    )
    return [health_line("captions", False, detail)]


def _some(names: list[str]) -> str:
    return ", ".join(f"'{_short(name)}'" for name in names[:3]) + (", ..." if len(names) > 3 else "")


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
