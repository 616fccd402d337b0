"""results.json: what an evaluation found of each dataset, and the averages."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ..attacks.checks import health_line
from ..errors import UserError
from .chunks import named
from .statistics import wilson_interval


def unread(left_out: Sequence[tuple[str, str]], n: int) -> list[dict]:
    """A line about the samples, of n, that could not be read, and so are in no number; none where all could."""
    return (
        [
            health_line(
                "every image was read", False, f"{len(left_out)} of {n} are left out of every number: {named(left_out)}"
            )
        ]
        if left_out
        else []
    )


FORMAT, FILE = 2, "results.json"


def accuracy(flags: list[bool]) -> dict:
    """ACC: the share of true flags with its 95 % interval."""
    low, high = wilson_interval(sum(flags), len(flags))
    return {"accuracy": sum(flags) / len(flags) if flags else 0.0, "interval95": [low, high], "n": len(flags)}


def under_attack(
    attacks: list[str],
    broken_by: list[str | None],
    clean: list[bool],
    labels: list[int],
    names: list[str],
    seconds: dict,
) -> dict:
    """What stands after each attack, worst case so far, and which class fares worst; one entry a sample."""
    standing, after = list(clean), {}
    for attack in attacks:
        standing = [s and by != attack for s, by in zip(standing, broken_by)]
        after[attack] = {**accuracy(standing), "seconds": round(seconds.get(attack, 0.0), 3)}
    by_class: dict[int, list[bool]] = {}
    for label, robust in zip(labels, standing):
        by_class.setdefault(label, []).append(robust)
    worst = min(by_class, key=lambda c: (sum(by_class[c]) / len(by_class[c]), c))
    found = {"name": names[worst], "accuracy": sum(by_class[worst]) / len(by_class[worst]), "n": len(by_class[worst])}
    return {"attacks": after, "robust": accuracy(standing), "worst_class": found}


def averages(datasets: list[dict]) -> dict:
    """Unweighted means over the zero-shot datasets, with and without ImageNet itself; None where nothing is left."""
    zeroshot = [d for d in datasets if d["kind"] == "zeroshot"]
    return {"all": _mean(zeroshot), "without_imagenet": _mean([d for d in zeroshot if d["name"] != "ImageNet"])}


def _mean(datasets: list[dict]) -> dict | None:
    if not datasets:
        return None

    def mean(of: Callable[[dict], float]) -> float:
        return sum(map(of, datasets)) / len(datasets)

    shared = [e for e in datasets[0]["eps"] if all(e in d["eps"] for d in datasets)]
    return {
        "datasets": len(datasets),
        "clean_all": mean(lambda d: d["clean_all"]["accuracy"]),
        "clean": mean(lambda d: d["clean"]["accuracy"]),
        "eps": {e: {"robust": mean(lambda d, e=e: d["eps"][e]["robust"]["accuracy"])} for e in shared},
    }


def read(path: Path) -> dict:
    """The results in a file, or in the results.json of a folder. Raises UserError when they are not of this format."""
    path = path / FILE if path.is_dir() else path
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"cannot read '{path}': {error.strerror}; give a results.json, or the folder that `mmtard evaluate` wrote"
        ) from None
    except ValueError:
        raise UserError(f"'{path}' is not JSON; give a results.json that `mmtard evaluate` wrote") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        of = found.get("format") if isinstance(found, dict) else None
        raise UserError(f"'{path}' has format {of}, this version reads {FORMAT}; evaluate the model again")
    return found


def write(results: dict, folder: Path) -> Path:
    """Write FOLDER/results.json, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    scratch = folder / f".{FILE}.{os.getpid()}.tmp"
    scratch.write_text(json.dumps(results, indent=1) + "\n")
    scratch.replace(path)
    return path
