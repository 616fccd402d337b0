"""What the loss and its terms were over one optimisation step's global batch: sums, and quantiles of the teachers'
weights.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ..distributed.ranks import Ranks

QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}
WEIGHT = "w_"  # terms that start so are weights


class TermSums:
    """Gathers the per-sample terms of a step on this rank: `sums` by name, in float64."""

    def __init__(self):
        self.sums: dict[str, float] = {}
        self._weights: dict[str, list[float]] = {}

    def add(self, terms: dict[str, Tensor]) -> None:
        """Terms [b] of a micro-batch."""
        for name, term in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + term.double().sum().item()
            if name.startswith(WEIGHT):
                self._weights.setdefault(name, []).extend(term.tolist())

    def quantiles(self, ranks: Ranks) -> dict[str, float]:
        """`w_NAME_p10`, `_p50`, `_p90` over all ranks' samples, whatever their order. Collective; asks nothing where
        there is no weight.
        """
        if not self._weights:
            return {}
        shares = ranks.all_gather(self._weights)
        found = {
            name: np.quantile(np.concatenate([share[name] for share in shares]), list(QUANTILES.values()))
            for name in self._weights
        }
        return {f"{name}_{p}": float(value) for name, values in found.items() for p, value in zip(QUANTILES, values)}
