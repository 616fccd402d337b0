"""An evaluation's results as tables on the console."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ..distributed.console import printable
from .corruptions import ALEXNET_ERROR, SEVERITIES
from .protocols import PROTOCOLS

WAYS = [(way, k) for way in ("image_to_text", "text_to_image") for k in ("1", "5", "10")]


def show(results: dict) -> None:
    """Print the settings, a row for each dataset and eps, the averages, and the health lines that are not PASS."""
    results = printable_in({key: value for key, value in results.items() if key != "environment"})
    console = plain_console(soft_wrap=True)
    console.print(f"{results['model']['weights']}, {describe(results)}")
    of_kind = {kind: [d for d in results["datasets"] if d["kind"] == kind] for kind in ("zeroshot", "retrieval")}
    if of_kind["zeroshot"]:
        print_table(_zeroshot(of_kind["zeroshot"], results))
        notes = _fell_at_smaller(of_kind["zeroshot"]), _prompts(of_kind["zeroshot"])
        for line in (*notes[0], *notes[1], *_other_mean(of_kind["zeroshot"], results["protocol"])):
            console.print(line)
    if corrupted := results.get("imagenet_c"):
        print_table(_corruptions(corrupted))
        console.print(_corruption_error(corrupted))
        for line in _prompts([d for d in results["datasets"] if d["kind"] == "corruption"]):
            console.print(line)
    if of_kind["retrieval"]:
        print_table(_retrieval(of_kind["retrieval"]))
    for entry in results["datasets"]:
        if entry.get("not_used"):
            console.print(f"{entry['name']}: {used(entry)}")
    _health(console, results)


def printable_in(value):
    """The same results, with all their texts made printable: names of others may hold control characters."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {
            key if key == "samples" else printable_in(key): printable_in(part)
            for key, part in value.items()
            if key != "samples"
        }
    return [printable_in(part) for part in value] if isinstance(value, (list, tuple)) else value


def plain_console(**options) -> Console:
    """A console that shows names as they are: `[red]` and `:smile:` in a name change nothing."""
    return Console(highlight=False, markup=False, emoji=False, **options)


def print_table(table: Table) -> None:
    """Print a table as wide as it needs where the output is no terminal."""
    console = plain_console()
    wide = plain_console(width=60 + 16 * len(table.columns))
    (console if console.is_terminal else wide).print(table)


def describe(results: dict) -> str:
    """The protocol and what decides its numbers, in a line."""
    s = results["settings"]
    budget = f"{s['iters']} iterations, {s['restarts']} restart{'s' if s['restarts'] > 1 else ''}"
    if "square" in s["attacks"]:
        budget += f", {s['queries']} queries"
    samples = "all samples"
    if s["n_samples"] is not None:
        samples = f"at most {s['n_samples']} samples a dataset (stratified, seed {s['seed']})"
    attacks, scale = ", ".join(s["attacks"]), results["model"]["logit_scale"]
    compiled = {True: " compiled", False: ", not compiled as asked", None: ""}[results.get("compiled")]
    return (
        f"protocol {results['protocol']}: {s['norm']}, {attacks}, {budget}, {samples}, float32{compiled}, "
        f"logits = {scale:.4g} x cosines"
    )


def used(entry: dict) -> str:
    """How many samples of a dataset were used, how many were not, and why."""
    reasons = "; ".join(f"{n} {reason}" for reason, n in entry["not_used"].items())
    return f"{entry['n_total']} samples used, {sum(entry['not_used'].values())} not: {reasons}"


def _zeroshot(datasets: list[dict], results: dict) -> Table:
    attacks = results["settings"]["attacks"]
    after = [f"+ {attack}" for attack in attacks]
    columns = ["dataset", "eps", "clean (all)", "clean", *after, "robust % (95 %)", "samples", "worst class", "chance"]
    table = _table(columns)
    for entry in datasets:
        clean = [_percent(entry[key]["accuracy"]) for key in ("clean_all", "clean")]
        for i, (eps, at) in enumerate(entry["eps"].items()):
            stands = [_percent(at["attacks"][a]["accuracy"]) if a in at["attacks"] else "-" for a in attacks]
            worst = f"{at['worst_class']['name']} {_percent(at['worst_class']['accuracy'])}"
            name, robust, n = entry["name"] if i == 0 else "", _interval(at["robust"]), str(at["robust"]["n"])
            table.add_row(name, eps, *clean, *stands, robust, n, worst, _percent(entry["chance"]))
        if area := entry.get("robust_area"):
            blank = [""] * (len(attacks) + 2)
            table.add_row("", f"0 to {area['to']}", *blank, f"{_percent(area['accuracy'])} mean over eps", "", "", "")
    for name, label in (("all", "average"), ("without_imagenet", "average without ImageNet")):
        mean = results["averages"][name]
        if mean and mean["datasets"] > 1:
            clean, n = [_percent(mean["clean_all"]), _percent(mean["clean"])], f"{mean['datasets']} datasets"
            for eps, at in mean["eps"].items():
                table.add_row(label, eps, *clean, *[""] * len(attacks), _percent(at["robust"]), n, "", "")
    return table


def _prompts(datasets: list[dict]) -> list[str]:
    """A line for each set of prompts, and the datasets that it was used for."""
    used_for: dict[tuple, list[str]] = {}
    for entry in datasets:
        used_for.setdefault((tuple(entry["templates"]), entry.get("templates_from")), []).append(entry["name"])
    lines = []
    for (prompts, origin), names in used_for.items():
        more = f" and {len(prompts) - 1} more" if len(prompts) > 1 else ""
        where = "" if len(used_for) == 1 else f" of {', '.join(names)}"
        lines.append(f"prompts{where}: '{prompts[0]}'{more}" + (f" ({origin})" if origin else ""))
    return lines


def _fell_at_smaller(datasets: list[dict]) -> list[str]:
    """A line where samples that fell at a smaller radius were not attacked again at a larger one."""
    n = sum(at.get("fell_at_smaller", 0) for entry in datasets for at in entry["eps"].values())
    told = f"{n} attacks were spared: what falls at a smaller eps has fallen at a larger one (--independent-radii)"
    return [told] if n else []


def _other_mean(datasets: list[dict], protocol: str) -> list[str]:
    """A line where the average is over other datasets than the protocol's published one."""
    published, names = set(PROTOCOLS[protocol].datasets), {d["name"] for d in datasets} - {"ImageNet"}
    differ = [
        f"{word} {', '.join(sorted(sets))}"
        for word, sets in (("without", published - names), ("with", names - published))
        if sets
    ]
    return [f"not the mean that {protocol} publishes: {'; '.join(differ)}"] if published and differ else []


def _corruptions(found: dict) -> Table:
    """The errors in % at each severity, their mean, and the mean divided by AlexNet's."""
    table = _table(["ImageNet-C", *(f"error at {s}" for s in SEVERITIES), "error", "AlexNet's", "corruption error"])
    for name, of in found["corruptions"].items():
        at = [_percent(of["severities"][str(s)]) if str(s) in of["severities"] else "-" for s in SEVERITIES]
        relative = "-" if of["corruption_error"] is None else _percent(of["corruption_error"])
        table.add_row(name, *at, _percent(of["error"]), _percent(ALEXNET_ERROR[name]), relative)
    return table


def _corruption_error(found: dict) -> str:
    if found["mean_corruption_error"] is not None:
        return f"mean corruption error {_percent(found['mean_corruption_error'])} % of AlexNet's"
    missing = found["missing"]
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return f"no mean corruption error: without {', '.join(missing[:3])}{more}"


def _retrieval(datasets: list[dict]) -> Table:
    table = _table(["retrieval", "eps", *(f"{way.replace('_', ' ')} R@{k}" for way, k in WAYS), "images"])
    for entry in datasets:
        rows = [("clean (all)", entry["clean_all"]), ("clean", entry["clean"])]
        rows += [(eps, at["recall"]) for eps, at in entry["eps"].items()]
        for i, (eps, recall) in enumerate(rows):
            found = [_interval(recall[way][k]) for way, k in WAYS]
            table.add_row(entry["name"] if i == 0 else "", eps, *found, str(recall["image_to_text"]["1"]["n"]))
    return table


def _health(console: Console, results: dict) -> None:
    lines = [(d["name"], line) for d in results["datasets"] for line in d["health"]]
    passed = sum(line["status"] == "PASS" for _, line in lines)
    for name, line in lines:
        if line["status"] != "PASS":
            console.print(f"{line['status']} {name}: {line['check']}: {line['detail']}")
    console.print(f"PASS {passed} of {len(lines)} health checks")


def _table(columns: list[str]) -> Table:
    table = Table()
    for column in columns:
        table.add_column(
            column, justify="left" if column in ("dataset", "retrieval", "ImageNet-C", "worst class") else "right"
        )
    return table


def _interval(acc: dict) -> str:
    low, high = acc["interval95"]
    return f"{_percent(acc['accuracy'])} ({100 * low:.1f}-{100 * high:.1f})"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"
