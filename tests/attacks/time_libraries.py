"""Seconds of AutoAttack's standard suite by mmtard, plain and compiled, and by pyautoattack, on photographs.

    python -m tests.attacks.time_libraries OUT.json [suite ...]

In a checkout, beside the images that `test_libraries` needs; no test. Some six minutes on two idle cores. Suites:
standard, fare, robustvlm; standard alone unless named.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from mmtard.attacks.state import AttackSettings
from mmtard.benchmarks.evaluate import SUITES, EvaluationBenchmark
from mmtard.models.compiled import CompiledForward

from .test_libraries import EPS, photographs

if __name__ == "__main__":
    if len(sys.argv) < 2 or not set(sys.argv[2:]) <= set(SUITES):
        sys.exit(f"usage: python -m tests.attacks.time_libraries OUT.json [{' '.join(SUITES)}]")
    found = photographs()
    tower = SimpleNamespace(compute=lambda images, tokens: found.model(images), convolves=True)
    compiled = CompiledForward(tower, "the network", print, any_batch=True)
    suites = [SUITES[name] for name in sys.argv[2:] or ["standard"]]
    report = EvaluationBenchmark(AttackSettings(eps=EPS), rounds=2, suites=suites).run(
        found.model, found.images, found.labels, compiled
    )
    report.publish(Path(sys.argv[1]), torch.device("cpu"))
