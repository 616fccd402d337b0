"""What a check of a preflight is, and what runs it on all ranks."""

from __future__ import annotations

import platform
from typing import Any

from ..config import Config
from ..distributed.ranks import Ranks, peer_is_gone
from ..errors import UserError


class CheckFailed(Exception):
    """What a check found wrong."""


class Check:
    """One thing that is checked.

    `measure` runs on every rank and may fail on some of them only. `verdict` sees what all ranks found, and gives the
    words of the PASS line. Both raise CheckFailed with the words of the FAIL line.
    """

    name: str

    def applies(self, config: Config) -> bool:
        """Whether there is anything to check for this configuration."""
        return True

    def measure(self, bench: Bench) -> Any:
        """What this rank finds."""
        raise NotImplementedError

    def verdict(self, bench: Bench, found: list) -> str:
        """The words of the PASS line. found: what `measure` gave, rank by rank."""
        raise NotImplementedError


class Bench:
    """What the checks share: the run that is checked, and what earlier checks found out about it."""

    def __init__(self, config: Config, ranks: Ranks):
        self.config, self.ranks = config, ranks
        self.image_size, self.parameters = 224, 0  # of the student, known after `Models`
        self.most_images_per_s = 0.0  # that the models allow, known after `Models`

    def run(self, check: Check) -> bool:
        """Do a check, print its line on the first rank; the same answer on every rank."""
        failure = found = None
        try:
            found = check.measure(self)
        except (CheckFailed, UserError, OSError) as error:
            failure = str(error)
        except RuntimeError as error:
            if peer_is_gone(error):
                raise
            failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"  # such as a GPU's own errors
        answers = self.ranks.all_gather((platform.node(), found, failure))
        failures: dict[str, list[str]] = {}
        for rank, (node, _, reason) in enumerate(answers):
            if reason:
                failures.setdefault(reason, []).append(f"rank {rank} ({node})")
        passed = not failures
        line = "; ".join(f"{', '.join(where)}: {reason}" for reason, where in failures.items())
        if passed:
            try:
                line = check.verdict(self, [found for _, found, _ in answers])
            except CheckFailed as error:
                passed, line = False, str(error)
        if self.ranks.is_first:
            print(f"{'PASS' if passed else 'FAIL'} {check.name}: {line}", flush=True)
        return passed
