"""What the loss and its terms were over one optimisation step's global batch: sums, and quantiles of the teachers'
weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..distributed.ranks import Ranks

QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}
SPREAD = ("w_", "entropy_")  # terms that start so are weights or entropies, whose quantiles are kept

BAD = "bad samples"  # the count of those without a finite loss; no term is called so
GRAD_NORM = "grad_norm"


@dataclass(frozen=True)
class StepTotals:
    """A step's numbers over all ranks."""

    sums: dict[str, float]  # of each term, in float64
    counts: list[float]  # of what else the ranks counted
    quantiles: dict[str, float]  # `w_NAME_p10`, `_p50`, `_p90` of weights and entropies, whatever the samples' order
    alike: dict[str, float] = field(default_factory=dict)  # what every rank has the same of


class TermSums:
    """Gathers the per-sample terms of a step on this rank.

    They stay on the device until all ranks' are there: reading a number makes the host wait for everything launched
    so far.
    """

    def __init__(self):
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, list[Tensor]] = {}
        self.alike: dict[str, Tensor] = {}  # numbers that are the same on every rank, on the device

    def count(self, name: str, chosen: Tensor) -> None:
        """Count the samples of a micro-batch that are chosen, bool [b], as a sum of that name."""
        self._add(name, chosen.double().sum())

    def _add(self, name: str, total: Tensor) -> None:
        self._sums[name] = self._sums[name] + total if name in self._sums else total

    def add(self, terms: dict[str, Tensor]) -> None:
        """Terms [b] of a micro-batch."""
        for name, term in terms.items():
            self._add(name, term.double().sum())
            if name.startswith(SPREAD):
                self._weights.setdefault(name, []).append(term)

    def total(self, counts: list[float], ranks: Ranks) -> StepTotals:
        """This step's numbers over all ranks, with `counts` of this rank's added up, too.

        One collective over the device's group, and one wait of the host. Collective, with as many samples on each rank.
        """
        return self.unpack(ranks.gather_numbers(self.pack(counts)).cpu().numpy(), len(counts))

    def pack(self, counts: list[float]) -> Tensor:
        """Sums, counts, what is alike, and each sample's weights and entropies of this rank, as float64 [n] on the
        terms' device.
        """
        sums = list(self._sums.values())
        device = sums[0].device if sums else None
        numbers = torch.tensor(counts, dtype=torch.float64)
        weights = [term.double() for terms in self._weights.values() for term in terms]
        alike = [number.double().to(device, non_blocking=True).view(1) for number in self.alike.values()]
        return torch.cat([*(total.view(1) for total in sums), numbers.to(device, non_blocking=True), *alike, *weights])

    def unpack(self, gathered: np.ndarray, n_counts: int) -> StepTotals:
        """What the ranks' packed numbers, float64 [world, n], come to; `n_counts` of them are counts."""
        totals = gathered[:, : len(self._sums) + n_counts].sum(0).tolist()
        rest = len(totals) + len(self.alike)
        # One [world, b] for each weight.
        weights = np.split(gathered[:, rest:], len(self._weights), axis=1) if self._weights else []
        return StepTotals(
            dict(zip(self._sums, totals)),
            totals[len(self._sums) :],
            {
                f"{name}_{p}": float(value)
                for name, of_all in zip(self._weights, weights)
                for p, value in zip(QUANTILES, np.quantile(of_all.ravel(), list(QUANTILES.values())))
            },
            dict(zip(self.alike, gathered[0, len(totals) : rest].tolist())),
        )
