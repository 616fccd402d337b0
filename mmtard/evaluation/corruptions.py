"""ImageNet-C: where its corruptions lie, and the mean corruption error.

Hendrycks and Dietterich, "Benchmarking neural network robustness to common corruptions and perturbations" (ICLR 2019).
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

SEVERITIES = (1, 2, 3, 4, 5)
# AlexNet's error of each corruption, the mean over the severities, as the paper publishes it (table 1).
ALEXNET_ERROR = {
    "gaussian_noise": 0.886,
    "shot_noise": 0.894,
    "impulse_noise": 0.923,
    "defocus_blur": 0.820,
    "glass_blur": 0.826,
    "motion_blur": 0.786,
    "zoom_blur": 0.798,
    "snow": 0.867,
    "frost": 0.827,
    "fog": 0.819,
    "brightness": 0.565,
    "contrast": 0.853,
    "elastic_transform": 0.646,
    "pixelate": 0.718,
    "jpeg_compression": 0.607,
}


def corruption_folders(root: Path) -> Iterator[tuple[str, int, Path]]:
    """(corruption, severity, folder) of ROOT/[noise|blur|weather|digital/]CORRUPTION/SEVERITY, in the paper's order."""
    for corruption in ALEXNET_ERROR:
        for severity in SEVERITIES:
            for folder in sorted([*root.glob(f"{corruption}/{severity}"), *root.glob(f"*/{corruption}/{severity}")])[
                :1
            ]:
                yield corruption, severity, folder


def corruption_error(datasets: list[dict]) -> dict | None:
    """The mean corruption error over the 15 corruptions, each error divided by AlexNet's; None without ImageNet-C.

    datasets: as results.json holds them; those of kind `corruption` count. Returns {"mean_corruption_error": None where
    a corruption or a severity is missing, "missing": which, "corruptions": {name: {"error", "corruption_error",
    "severities"}}}.
    """
    errors: dict[str, dict[int, float]] = {}
    for entry in datasets:
        if entry["kind"] == "corruption":
            errors.setdefault(entry["corruption"], {})[entry["severity"]] = 1 - entry["clean_all"]["accuracy"]
    if not errors:
        return None
    corruptions = {}
    for name, found in errors.items():
        error, whole = sum(found.values()) / len(found), len(found) == len(SEVERITIES)
        corruptions[name] = {
            "error": error,
            "corruption_error": error / ALEXNET_ERROR[name] if whole else None,
            "severities": {str(severity): found[severity] for severity in sorted(found)},
        }
    missing = [f"{name}/{s}" for name in ALEXNET_ERROR for s in SEVERITIES if s not in errors.get(name, {})]
    relative = [found["corruption_error"] for found in corruptions.values()]
    return {
        "mean_corruption_error": None if missing else sum(relative) / len(relative),
        "missing": missing,
        "corruptions": corruptions,
    }
