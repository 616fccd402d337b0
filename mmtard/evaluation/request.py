"""What an evaluation is asked to do, from the words of a command line.

Imports no torch: what is wrong with the words is said at once.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from ..config import Model, show_pixels
from ..errors import UserError, unknown_name
from ..files import settings_digest, slug
from ..runs.layout import CHECKPOINTS, EVALUATIONS
from .datasets import DatasetSource
from .protocols import LINF_ONLY, PROTOCOLS, Protocol


@dataclass(frozen=True)
class EvaluationRequest:
    """What is measured, how, and where its results go: OUT/results.json."""

    model: Model
    sources: list[DatasetSource]
    protocol: Protocol
    out: Path
    transfer_from: Model | None = None  # the model whose gradients the `transfer` attack follows
    batch_size: int | None = None  # images a rank takes at once; None: by the device
    workers: int = 2
    sanity: bool = False  # the costly health checks, too
    datasets_prompts: bool = False  # each dataset's own prompts, although the model is a run with prompts of its own
    compile: bool = False  # the image towers' forwards and the attacks' arithmetic by torch.compile


def protocol(
    name: str, eps: list[Fraction] | None = None, transfer: bool = False, all_samples: bool = False, **changes
) -> Protocol:
    """The protocol of that name with what the user changed (None: as the protocol says).

    Raises UserError for what does not fit.
    """
    if name not in PROTOCOLS:
        raise _unknown_protocol(name)
    changes = {k: v for k, v in changes.items() if v is not None}
    if all_samples:
        changes["n_samples"] = None
    if eps is not None:
        changes |= {"eps": tuple(dict.fromkeys(eps)), "eps_of": ()}
    if "attacks" in changes:  # the original AutoAttack under any of its names
        changes["attacks"] = tuple("autoattack" if _is_autoattack(attack) else attack for attack in changes["attacks"])
    chosen = replace(PROTOCOLS[name], **changes)
    if transfer and "transfer" not in chosen.attacks:
        chosen = replace(chosen, attacks=(*chosen.attacks, "transfer"))
    if "transfer" in chosen.attacks and not transfer:
        raise UserError(
            "--attacks: 'transfer' needs the model whose gradients it follows; name it with --transfer-from"
        )
    _check_threat(chosen, eps is not None)
    return chosen


def _unknown_protocol(name: str) -> UserError:
    if _is_autoattack(name):
        return UserError(f"unknown protocol '{name}'; AutoAttack's standard suite is --protocol autoattack")
    return unknown_name("protocol", name, PROTOCOLS)


def _is_autoattack(name: str) -> bool:
    return re.sub(r"[^a-z]", "", name.lower()) in ("aa", "autoattack", "standard")


def _check_threat(chosen: Protocol, own_eps: bool) -> None:
    for e in chosen.eps:
        if e <= 0:
            raise UserError(f"--eps: {e} is no attack; write a positive size such as 2/255")
        if chosen.norm == "linf" and e >= 1:
            raise UserError(
                f"--eps: {e} lets an attack replace the whole image, for pixels are in [0,1]; "
                "write it as a fraction such as 2/255"
            )
    usual = PROTOCOLS[chosen.name].norm
    if chosen.norm != usual and not own_eps:
        raise UserError(
            f"--norm: the radii of '{chosen.name}' are {usual}'s, not {chosen.norm}'s; "
            "give its own with --eps, such as 0.5"
        )
    unfit = [a for a in chosen.attacks if a in LINF_ONLY and chosen.norm != "linf"]
    if unfit:
        others = " ".join(a for a in chosen.attacks if a not in (*unfit, "transfer"))
        raise UserError(
            f"--attacks: '{unfit[0]}' is written for linf, not {chosen.norm}; "
            f"leave it out: --attacks {others or 'apgd-ce'}"
        )


def default_out(model: Model, chosen: Protocol, sources: list[DatasetSource], root: str, **others) -> Path:
    """RUN/evaluations/PROTOCOL-DATA-NORM-EPS-DIGEST of a run or checkpoint folder, else the same below ./evaluations.

    The digest stands for every other setting, so that two evaluations share a folder only when they are the same.
    others: those beside the protocol and the data, such as what `given` says of the data's files.
    """
    path = Path(model.weights)
    checkpoint = path.parent.name == CHECKPOINTS and path.name
    run = path.parent.parent if checkpoint else path if (path / CHECKPOINTS).is_dir() else Path()
    of = sources[0].name if len(sources) == 1 else Path(root).resolve().name
    others |= {"settings": chosen.settings(), "datasets": [s.name for s in sources], "root": str(Path(root).resolve())}
    others |= {"model": model.model_dump(mode="json")} if run == Path() else {}
    name = [
        chosen.name,
        *(["ema"] if model.ema else []),
        of,
        chosen.norm,
        "+".join(map(show_pixels, chosen.eps)),
        settings_digest(others)[:8],
    ]
    return run / EVALUATIONS / slug("-".join([checkpoint, *name] if checkpoint else name))


def given(index: str | None = None, classnames: str | None = None, **keys: str | None) -> dict:
    """What the default folder's digest says of files and keys of the data, where the user gave them.

    A file of class names counts by its content, wherever it lies: other names are another evaluation. Where it is no
    plain file, or cannot be read, which is told when it is needed, it counts by its path, as an index does.
    """
    told = {"index": index and str(Path(index).resolve()), "classnames": classnames and _content(classnames), **keys}
    return {name: value for name, value in told.items() if value}


def _content(file: str) -> str:
    path = Path(file)
    try:
        if path.is_file():  # a pipe can be read but once
            return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        pass
    return str(path.resolve())


# What a setting is called on the command line of `mmtard evaluate`.
_FLAGS = {
    "model.weights": "MODEL",
    "model.arch": "--arch",
    "model.text": "--text",
    "model.quick_gelu": "--quick-gelu",
    "model.ema": "--ema",
    "--transfer-from.weights": "--transfer-from",
    "--transfer-from.arch": "--transfer-arch",
    "--transfer-from.text": "--transfer-from",
    "--transfer-from.quick_gelu": "--transfer-from",
    "data.shards": "--data",
    "data.index": "--index",
    "data.classnames": "--classnames",
    "data.templates": "--templates",
    "engine.device": "--device",
    "attacks": "--attacks",
}
_PHRASES = {
    "arch: ": "{arch} ",
    "text: ": "--text ",
    "check `arch`": "check {arch}",
    "leave arch out": "leave {arch} out",
    "leave text out": "leave --text out",
    "leave ema out": "leave --ema out",
    "leave quick_gelu out": "leave --quick-gelu out",
    "set quick_gelu to": "set --quick-gelu to",
}
# Longest first: `model.text.arch` is --arch, not --text. What stands in quotes is the user's own.
_KEYS = re.compile(
    r"'[^']*'|(?<![\w.-])(?:"
    + "|".join(
        rf"{re.escape(key.rpartition('.')[0])}(?:\.text)*\.{re.escape(key.rpartition('.')[2])}(?![\w.])"
        if "." in key
        else rf"{re.escape(key)}(?=: )"
        for key in _FLAGS
    )
    + ")"
)


def in_flags(message: str) -> str:
    """A message about settings in the words of `mmtard evaluate`: `--arch` for `model.arch`."""
    arch = "--transfer-arch" if message.startswith("--transfer-from.") else "--arch"

    def flag(match: re.Match) -> str:
        key = re.sub(r"(\.text)+(?=\.)", "", match[0])
        return _FLAGS.get(key, match[0])

    found = _KEYS.sub(flag, message)
    for phrase, words in _PHRASES.items():
        found = re.sub(rf"(?<![\w.-]){re.escape(phrase)}", words.format(arch=arch), found)
    return found
