"""An evaluation's results as a table on the console."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from .protocols import PROTOCOLS


def show(results: dict) -> None:
    """Print the settings, a row for each dataset and eps, the averages, and the health lines that are not PASS."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{results['model']['weights']}, {describe(results)}")
    classified = [d for d in results["datasets"] if d["kind"] == "zeroshot"]
    if classified:
        _print(console, _zeroshot(classified, results))
        published, names = set(PROTOCOLS[results["protocol"]].datasets), {d["name"] for d in classified} - {"ImageNet"}
        differ = [
            f"{word} {', '.join(sorted(sets))}"
            for word, sets in (("without", published - names), ("with", names - published))
            if sets
        ]
        if published and differ:
            console.print(f"not the mean that {results['protocol']} publishes: {'; '.join(differ)}")
    retrieved = [d for d in results["datasets"] if d["kind"] == "retrieval"]
    if retrieved:
        _print(console, _retrieval(retrieved))
    lines = [(d["name"], line) for d in results["datasets"] for line in d["health"]]
    passed = sum(line["status"] == "PASS" for _, line in lines)
    for name, line in lines:
        if line["status"] != "PASS":
            console.print(f"{line['status']} {name}: {line['check']}: {line['detail']}", markup=False)
    console.print(f"PASS {passed} of {len(lines)} health checks")


def describe(results: dict) -> str:
    """The protocol and what decides its numbers, in a line."""
    s = results["settings"]
    budget = f"{s['iters']} iterations, {s['restarts']} restart{'s' if s['restarts'] > 1 else ''}"
    budget += f", {s['queries']} queries" if "square" in s["attacks"] else ""
    samples = (
        "all samples"
        if s["n_samples"] is None
        else f"at most {s['n_samples']} samples a dataset (stratified, seed {s['seed']})"
    )
    scale = results["model"]["logit_scale"]
    return f"protocol {results['protocol']}: {s['norm']}, {', '.join(s['attacks'])}, {budget}, {samples}, float32, logits = {scale:.4g} x cosines"


def _zeroshot(datasets: list[dict], results: dict) -> Table:
    attacks = results["settings"]["attacks"]
    table = _table(
        [
            "dataset",
            "eps",
            "clean (all)",
            "clean",
            *(f"+ {a}" for a in attacks),
            "robust % (95 %)",
            "samples",
            "worst class",
            "chance",
        ]
    )
    for entry in datasets:
        for i, (eps, at) in enumerate(entry["eps"].items()):
            after = [_percent(at["attacks"][a]["accuracy"]) if a in at["attacks"] else "-" for a in attacks]
            worst = f"{at['worst_class']['name']} {_percent(at['worst_class']['accuracy'])}"
            clean = [_percent(entry[k]["accuracy"]) for k in ("clean_all", "clean")]
            table.add_row(
                entry["name"] if i == 0 else "",
                eps,
                *clean,
                *after,
                _interval(at["robust"]),
                str(at["robust"]["n"]),
                worst,
                _percent(entry["chance"]),
            )
    for name, label in (("all", "average"), ("without_imagenet", "average without ImageNet")):
        mean = results["averages"][name]
        if mean and mean["datasets"] > 1:
            for eps, at in mean["eps"].items():
                clean = [_percent(mean["clean_all"]), _percent(mean["clean"])]
                table.add_row(
                    label,
                    eps,
                    *clean,
                    *[""] * len(attacks),
                    _percent(at["robust"]),
                    f"{mean['datasets']} datasets",
                    "",
                    "",
                )
    return table


def _retrieval(datasets: list[dict]) -> Table:
    ways = [(way, k) for way in ("image_to_text", "text_to_image") for k in ("1", "5", "10")]
    table = _table(["retrieval", "eps", *(f"{way.replace('_', ' ')} R@{k}" for way, k in ways), "images"])
    for entry in datasets:
        rows = [
            ("clean (all)", entry["clean_all"]),
            ("clean", entry["clean"]),
            *((eps, at["recall"]) for eps, at in entry["eps"].items()),
        ]
        for i, (what, recall) in enumerate(rows):
            table.add_row(
                entry["name"] if i == 0 else "",
                what,
                *(_interval(recall[way][k]) for way, k in ways),
                str(recall["image_to_text"]["1"]["n"]),
            )
    return table


def _table(columns: list[str]) -> Table:
    table = Table()
    for column in columns:
        table.add_column(column, justify="left" if column in ("dataset", "retrieval", "worst class") else "right")
    return table


def _print(console: Console, table: Table) -> None:
    (console if console.is_terminal else Console(highlight=False, width=60 + 16 * len(table.columns))).print(table)


def _interval(acc: dict) -> str:
    low, high = acc["interval95"]
    return f"{_percent(acc['accuracy'])} ({100 * low:.1f}-{100 * high:.1f})"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"
