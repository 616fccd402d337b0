"""Two models on the same samples: paired differences with McNemar's test."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..errors import UserError
from .results import read
from .statistics import paired_difference

# What may differ between two evaluations that measure the same: how fast, and what else was checked.
FREE = ("batch_size", "sanity")


def compare(a: Path, b: Path) -> list[dict]:
    """For each dataset and eps, how B's accuracy differs from A's: {"dataset","eps" (None: clean),"a","b",difference,...}.

    Raises UserError naming what differs when settings, data or samples are not the same.
    """
    first, second = read(a), read(b)
    for key in sorted(first["settings"].keys() | second["settings"].keys()):
        x, y = first["settings"].get(key), second["settings"].get(key)
        if key not in FREE and x != y:
            raise UserError(
                f"'{a}' and '{b}' were measured otherwise: {key} is {x} and {y}; evaluate both with the same settings"
            )
    ours, theirs = ({d["name"]: d for d in r["datasets"]} for r in (first, second))
    if ours.keys() != theirs.keys():
        alone = sorted(ours.keys() ^ theirs.keys())
        raise UserError(
            f"'{a}' and '{b}' have other datasets: {', '.join(alone)} stands in one alone; evaluate both on the same"
        )
    rows = []
    for name in ours:
        rows += _dataset(name, ours[name], theirs[name])
    if not rows:
        raise UserError(f"'{a}' and '{b}' have no zero-shot dataset; a difference in recall is not tested")
    return rows


def _dataset(name: str, x: dict, y: dict) -> list[dict]:
    for key in ("kind", "fingerprint", "classes", "templates", "perturb_at", "perturbed_size", "left_out"):
        if x.get(key) != y.get(key):
            at, ours, theirs = _where(x.get(key), y.get(key))
            raise UserError(
                f"{name}: {key}{at} differs, {_short(ours)} and {_short(theirs)}; evaluate both on the same data in the same way"
            )
    if x["kind"] != "zeroshot":
        return []
    for key in ("ids", "labels"):
        if x["samples"][key] != y["samples"][key]:
            raise UserError(f"{name}: samples.{key} differ; evaluate both with the same --n-samples and --seed")
    if x["eps"].keys() != y["eps"].keys():
        raise UserError(f"{name}: eps {', '.join(x['eps'])} and {', '.join(y['eps'])}; evaluate both at the same")
    flags = {None: (x["samples"]["clean"], y["samples"]["clean"])}
    flags |= {e: (x["samples"]["eps"][e]["robust"], y["samples"]["eps"][e]["robust"]) for e in x["eps"]}
    return [
        {"dataset": name, "eps": eps, "a": sum(f) / len(f), "b": sum(g) / len(g), **paired_difference(f, g)}
        for eps, (f, g) in flags.items()
    ]


def _where(x, y) -> tuple:
    """(`[3]`, its values) where two lists of one length first differ, else ("", both)."""
    if not (isinstance(x, list) and isinstance(y, list) and len(x) == len(y)):
        return "", x, y
    return next((f"[{i}]", a, b) for i, (a, b) in enumerate(zip(x, y)) if a != b)


def _short(value) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def show(rows: list[dict], a: Path, b: Path) -> None:
    """Print the differences as a table."""
    table = Table(title=f"B - A in points; A: {a}, B: {b}")
    for column in (
        "dataset",
        "eps",
        "A %",
        "B %",
        "B - A (95 % interval)",
        "only A right",
        "only B right",
        "McNemar p",
    ):
        table.add_column(column, justify="left" if column == "dataset" else "right")
    for r in rows:
        low, high = r["interval95"]
        difference = f"{100 * r['difference']:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"
        cells = [
            f"{100 * r['a']:.2f}",
            f"{100 * r['b']:.2f}",
            difference,
            str(r["only_a"]),
            str(r["only_b"]),
            f"{r['p']:.3g}",
        ]
        table.add_row(r["dataset"], r["eps"] or "clean", *cells)
    console = Console(highlight=False)
    (console if console.is_terminal else Console(highlight=False, width=160)).print(table)
