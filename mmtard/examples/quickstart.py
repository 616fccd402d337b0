"""The main job from nothing: renders images, pretrains a tiny CLIP, trains teachers, distils, compares, reports.

`python -m mmtard.examples.quickstart` runs the study configs/studies/quickstart.yaml below the current folder, and
skips what is done.
"""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

from .. import resources
from ..distributed.console import outlive_reader
from ..distributed.processes import exit_process
from ..errors import RunError, UserError
from ..report.page import report
from ..study import loading, run, summary
from ..study.findings import Findings, collect
from ..study.runs import model_folder, run_folder
from .materials import make

NAME = "quickstart"


def main() -> int:
    """Run it, say what was found and how long it took; return the exit status, that of an error or 0."""
    outlive_reader()
    began = time.monotonic()
    try:
        study = loading.load(resources.studies()[NAME])
        page = run.run_here(study, make, f"mmtard {NAME}")
        found = collect(study)
        summary.show(found)
        runs = report_of_runs(found)
    except (UserError, RunError) as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        return getattr(error, "status", 2)
    print(
        "The zero-shot classes are colour-shape combinations that no training image shows.\n"
        f"Look at it in a browser: {page.resolve().as_uri()}\n"
        f"Curves, and attacked images: {runs.resolve().as_uri()}\n"
        f"{time.monotonic() - began:.0f} s. The runs are in {study.out}"
    )
    return 0


def report_of_runs(found: Findings) -> Path:
    """Write the report of the runs and their teachers, with attacked images and curves; its path."""
    study = found.study
    shown = {study.labels[method]: run_folder(study, state.runs[0]) for method, state in found.main.items()}
    shown |= {f"{name} teacher": model_folder(study, name) for name in study.models}
    out = Path(study.out) / "runs-report"
    words = [str(path) for path in shown.values()]
    command = shlex.join(["mmtard", "report", *words, "--labels", *shown, "--out", str(out)])
    return report(list(shown.values()), out, images=2, command=command, labels=list(shown))


if __name__ == "__main__":
    exit_process(main())
