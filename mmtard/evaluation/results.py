"""results.json: what an evaluation found of each dataset, and the averages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..attacks.checks import health_line
from ..config import parse_fraction
from ..errors import UserError
from ..files import DIGEST, opened, sealed, write_text
from ..runs.layout import RESULTS as FILE
from .chunks import named
from .statistics import wilson_interval

FORMAT = 2


def unread(left_out: Sequence[tuple[str, str]], n: int) -> list[dict]:
    """A line about the samples, of n, that could not be read, and so are in no number; none where all could."""
    if not left_out:
        return []
    detail = f"{len(left_out)} of {n} are left out of every number: {named(left_out)}"
    return [health_line("every image was read", False, detail)]


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


def robust_area(clean: dict, by_eps: dict[str, dict]) -> dict | None:
    """The mean robust accuracy over every eps from 0, which is clean, to the largest that was measured.

    The area under the curve of accuracy over eps, by trapezoids, divided by the largest eps. None for a single radius.
    """
    if len(by_eps) < 2:
        return None
    points = [(0.0, clean["accuracy"])]
    points += [(float(parse_fraction(eps)), at["robust"]["accuracy"]) for eps, at in by_eps.items()]
    points.sort()
    area = sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in zip(points, points[1:]))
    largest = max(by_eps, key=parse_fraction)
    return {"accuracy": area / points[-1][0], "from": "0", "to": largest, "radii": len(by_eps)}


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
    if path.exists() and not path.is_file():
        raise UserError(f"'{path}' is a pipe or a device; give a results.json that `mmtard evaluate` wrote")
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"cannot read '{path}': {error.strerror}; give a results.json, or the folder that `mmtard evaluate` wrote"
        ) from None
    except (ValueError, RecursionError):
        raise UserError(f"'{path}' is not JSON; give a results.json that `mmtard evaluate` wrote") from None
    found, whole = opened(found) if isinstance(found, dict) else (found, True)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        of = found.get("format") if isinstance(found, dict) else None
        raise UserError(f"'{path}' has format {of}, this version reads {FORMAT}; evaluate the model again")
    if (problem := _problem(found)) is not None:
        raise UserError(f"'{path}' is damaged: {problem}; evaluate the model again")
    if not whole:
        raise UserError(
            f"'{path}' is damaged: its content does not fit its {DIGEST}, so a number in it may be another one; "
            "restore it, or evaluate the model again"
        )
    return found


# The types of what readers of results.json rely on.
_RESULT = {"protocol": str, "model": dict, "settings": dict, "datasets": list, "averages": dict}
_DATASET = {"name": str, "kind": str, "key": str, "fingerprint": str, "eps": dict, "samples": dict, "health": list}


def _problem(found: dict) -> str | None:
    """What of results has not the type that `mmtard evaluate` writes; None when all has."""
    datasets = found.get("datasets")
    rows = list(enumerate(datasets)) if isinstance(datasets, list) else []
    checked = [(f"'{key}'", found.get(key, kind()), kind) for key, kind in _RESULT.items()]
    checked += [(f"'datasets[{i}]'", d, dict) for i, d in rows]
    checked += [
        (f"'datasets[{i}].{key}'", d.get(key, kind()), kind)
        for i, d in rows
        if isinstance(d, dict)
        for key, kind in _DATASET.items()
    ]
    return next(
        (f"{where} is no {kind.__name__}" for where, value, kind in checked if not isinstance(value, kind)), None
    )


@contextmanager
def damage_named(*paths: Path) -> Iterator[None]:
    """Turn whatever damaged results run into, within the block, into a UserError of one line that names their files."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        where = " or ".join(f"'{path}'" for path in paths)
        reason = " ".join(f"{type(error).__name__} {error}".split())[:120]
        raise UserError(f"{where} is damaged ({reason}); evaluate the model again") from None


def check_complete(found: dict, path: Path) -> None:
    """Raises UserError naming what results lack that an evaluation needs to go on from them."""
    missing = [key for key in _RESULT if key not in found]
    missing += [
        f"datasets[{i}].{key}" for i, d in enumerate(found.get("datasets", [])) for key in _DATASET if key not in d
    ]
    if missing:
        raise UserError(f"'{path}' is damaged: it has no '{missing[0]}'; evaluate the model again")


def write(results: dict, folder: Path) -> Path:
    """Write FOLDER/results.json with a digest of it, whole or not at all. UserError where it cannot be written."""
    path = folder / FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(sealed(results), indent=1) + "\n")
    except OSError as error:
        raise not_written(path, error) from None
    return path


def not_written(path: Path, error: OSError) -> UserError:
    """What is said of results that the disk did not take."""
    return UserError(
        f"--out: cannot write '{path}': {error.strerror or error}; free space there and start it again: "
        "what is measured is kept"
    )
