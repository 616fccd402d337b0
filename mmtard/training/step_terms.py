"""What the loss and its terms were over one optimisation step's global batch: sums, and quantiles of the teachers'
weights.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..distributed.ranks import Ranks

QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}
SPREAD = ("w_", "entropy_")  # terms that start so are weights or entropies, whose quantiles are kept


class TermSums:
    """Gathers the per-sample terms of a step on this rank.

    They stay on the device until they are asked for: reading a number makes the host wait for everything launched so
    far.
    """

    def __init__(self):
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, list[Tensor]] = {}

    def add(self, terms: dict[str, Tensor]) -> None:
        """Terms [b] of a micro-batch."""
        for name, term in terms.items():
            total = term.double().sum()
            self._sums[name] = self._sums[name] + total if name in self._sums else total
            if name.startswith(SPREAD):
                self._weights.setdefault(name, []).append(term)

    @property
    def sums(self) -> dict[str, float]:
        """The sum of each term, in float64."""
        return dict(zip(self._sums, torch.stack(list(self._sums.values())).tolist())) if self._sums else {}

    @property
    def weights(self) -> dict[str, list[float]]:
        """Each sample's weights and entropies, by name."""
        return {name: torch.cat(terms).tolist() for name, terms in self._weights.items()}

    def quantiles(self, ranks: Ranks) -> dict[str, float]:
        """`w_NAME_p10`, `_p50`, `_p90` over all ranks' samples, whatever their order.

        Collective; asks nothing of the other ranks where there is no weight.
        """
        if not self._weights:
            return {}
        shares = ranks.all_gather(self.weights)
        found = {
            name: np.quantile(np.concatenate([share[name] for share in shares]), list(QUANTILES.values()))
            for name in self._weights
        }
        return {f"{name}_{p}": float(value) for name, values in found.items() for p, value in zip(QUANTILES, values)}
