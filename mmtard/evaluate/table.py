"""An evaluation's results as a table on the console."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def show(results: dict) -> None:
    """Print the settings, a row for each dataset and eps, the averages, and the health lines that are not PASS."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{results['model']['weights']}, {describe(results)}")
    table, attacks = Table(), results["settings"]["attacks"]
    columns = ["dataset", "eps", "clean (all)", "clean", *(f"+ {a}" for a in attacks), "robust % (95 %)", "samples", "worst class", "chance"]
    for column in columns:
        table.add_column(column, justify="left" if column in ("dataset", "worst class") else "right")
    for entry in results["datasets"]:
        for cells in _ROWS[entry["kind"]](entry, attacks):
            table.add_row(*cells, *[""] * (len(columns) - len(cells)))
    for name, label in (("all", "average"), ("without_imagenet", "average without ImageNet")):
        mean = results["averages"][name]
        if mean and mean["datasets"] > 1:
            for eps, at in mean["eps"].items():
                clean = [_percent(mean["clean_all"]), _percent(mean["clean"])]
                table.add_row(label, eps, *clean, *[""] * len(attacks), _percent(at["robust"]), f"{mean['datasets']} datasets", "", "")
    (console if console.is_terminal else Console(highlight=False, width=60 + 16 * (len(columns) - 4))).print(table)
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
    samples = "all samples" if s["n_samples"] is None else f"at most {s['n_samples']} samples a dataset (stratified, seed {s['seed']})"
    scale = results["model"]["logit_scale"]
    return f"protocol {results['protocol']}: {s['norm']}, {', '.join(s['attacks'])}, {budget}, {samples}, float32, logits = {scale:.4g} x cosines"


def _zeroshot(entry: dict, attacks: list[str]) -> list[list[str]]:
    rows = []
    for i, (eps, at) in enumerate(entry["eps"].items()):
        low, high = at["robust"]["interval95"]
        after = [_percent(at["attacks"][a]["accuracy"]) if a in at["attacks"] else "-" for a in attacks]
        robust = f"{_percent(at['robust']['accuracy'])} ({100 * low:.1f}-{100 * high:.1f})"
        worst = f"{at['worst_class']['name']} {_percent(at['worst_class']['accuracy'])}"
        clean = [_percent(entry[k]["accuracy"]) for k in ("clean_all", "clean")]
        rows.append([entry["name"] if i == 0 else "", eps, *clean, *after, robust, str(at["robust"]["n"]), worst, _percent(entry["chance"])])
    return rows


_ROWS = {"zeroshot": _zeroshot}


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"
