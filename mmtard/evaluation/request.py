"""What an evaluation is asked to do, from the words of a command line.

Imports no torch: what is wrong with the words is said at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from ..config import Model, show_pixels
from ..errors import UserError, unknown_name
from ..files import settings_digest, slug
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


def protocol(
    name: str, eps: list[Fraction] | None = None, transfer: bool = False, all_samples: bool = False, **changes
) -> Protocol:
    """The protocol of that name with what the user changed (None: as the protocol says). Raises UserError for what does not fit."""
    if name not in PROTOCOLS:
        raise unknown_name("protocol", name, PROTOCOLS)
    changes = {k: v for k, v in changes.items() if v is not None}
    if all_samples:
        changes["n_samples"] = None
    if eps is not None:
        changes |= {"eps": tuple(dict.fromkeys(eps)), "eps_of": ()}
    asked = replace(PROTOCOLS[name], **changes)
    if transfer and "transfer" not in asked.attacks:
        asked = replace(asked, attacks=(*asked.attacks, "transfer"))
    if "transfer" in asked.attacks and not transfer:
        raise UserError(
            "--attacks: 'transfer' needs the model whose gradients it follows; name it with --transfer-from"
        )
    _check_threat(asked, eps is not None)
    return asked


def _check_threat(asked: Protocol, own_eps: bool) -> None:
    for e in asked.eps:
        if e <= 0:
            raise UserError(f"--eps: {e} is no attack; write a positive size such as 2/255")
        if asked.norm == "linf" and e >= 1:
            raise UserError(
                f"--eps: {e} lets an attack replace the whole image, for pixels are in [0,1]; write it as a fraction such as 2/255"
            )
    if asked.norm != PROTOCOLS[asked.name].norm and not own_eps:
        raise UserError(
            f"--norm: the radii of '{asked.name}' are {PROTOCOLS[asked.name].norm}'s, not {asked.norm}'s; give its own with --eps, such as 0.5"
        )
    unfit = [a for a in asked.attacks if a in LINF_ONLY and asked.norm != "linf"]
    if unfit:
        others = " ".join(a for a in asked.attacks if a not in (*unfit, "transfer"))
        raise UserError(
            f"--attacks: '{unfit[0]}' is written for linf, not {asked.norm}; leave it out: --attacks {others or 'apgd-ce'}"
        )


def default_out(model: Model, asked: Protocol, sources: list[DatasetSource], root: str, **others) -> Path:
    """RUN/evaluations/PROTOCOL-DATA-NORM-EPS-DIGEST of a run or checkpoint folder, else the same under evaluations/ here.

    The digest stands for every other setting, so that two evaluations share a folder only when they are the same.
    """
    path = Path(model.weights)
    checkpoint = path.parent.name == "checkpoints" and path.name
    run = path.parent.parent if checkpoint else path if (path / "checkpoints").is_dir() else Path()
    of = sources[0].name if len(sources) == 1 else Path(root).resolve().name
    others |= {"settings": asked.settings(), "datasets": [s.name for s in sources], "root": str(Path(root).resolve())}
    others |= {"model": model.model_dump(mode="json")} if run == Path() else {}
    name = [
        asked.name,
        *(["ema"] if model.ema else []),
        of,
        asked.norm,
        "+".join(map(show_pixels, asked.eps)),
        settings_digest(others)[:8],
    ]
    return run / "evaluations" / slug("-".join([checkpoint, *name] if checkpoint else name))
