"""Protocols: what papers agreed to measure, by name.

A protocol is its settings and nothing else; any of them may be overridden. Imports no torch: the command line is
checked against this file.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from fractions import Fraction

from ..config import show_pixels

PIXEL = Fraction(1, 255)
LINF_ONLY = ("square",)  # attacks that are written for no other norm
STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")  # AutoAttack's suite of that name
FARE_SETS = (
    "Caltech101",
    "Cars",
    "CIFAR10",
    "CIFAR100",
    "DTD",
    "EuroSAT",
    "FGVC",
    "Flowers",
    "ImageNet-R",
    "ImageNet-Sketch",
    "PCAM",
    "Pets",
    "STL-10",
)
CIFAR_RADII = (("CIFAR10", (8 * PIXEL,)), ("CIFAR100", (8 * PIXEL,)))


@dataclass(frozen=True)
class Protocol:
    """Settings of an evaluation. eps and step_size are in units of [0,1] pixels.

    attacks: in the order in which they run, each on what survived the earlier ones. iters: of each white-box attack.
    n_samples: size of the stratified sample that is attacked, None for all. templates: prompts for every dataset, None
    for those of the run or of each dataset. perturb_at: `native` (the images' stored size, resized inside the model) or
    `input` (the tower's), None for the way that is usual for each dataset. eps_of: other radii for datasets of which
    the protocol says so. independent_radii: attack at every radius, also what fell at a smaller one. datasets: those of
    its published mean.
    """

    name: str
    eps: tuple[Fraction, ...]
    attacks: tuple[str, ...]
    iters: int
    n_samples: int | None
    restarts: int = 1
    norm: str = "linf"
    step_size: Fraction | None = None  # of pgd; None: 2.5 eps / iters
    queries: int = 5000  # of Square
    templates: tuple[str, ...] | None = None
    perturb_at: str | None = None
    seed: int = 0
    eps_of: tuple[tuple[str, tuple[Fraction, ...]], ...] = ()
    independent_radii: bool = False
    datasets: tuple[str, ...] = ()
    purpose: str = ""

    def radii(self, dataset: str) -> tuple[Fraction, ...]:
        """The radii for a dataset, by its name."""
        return dict(self.eps_of).get(dataset, self.eps)

    def settings(self) -> dict:
        """What decides the numbers, as JSON holds it."""
        stored = {k: v for k, v in asdict(self).items() if k not in ("name", "datasets", "purpose")}
        # Results of versions that knew no other way have no such entry.
        several = any(len(radii) > 1 for radii in (self.eps, *dict(self.eps_of).values()))
        if not (self.independent_radii and several):
            del stored["independent_radii"]
        return stored | {
            "eps": [show_pixels(e) for e in self.eps],
            "eps_of": {name: [show_pixels(e) for e in radii] for name, radii in self.eps_of},
            "step_size": None if self.step_size is None else show_pixels(self.step_size),
            "attacks": list(self.attacks),
            "templates": None if self.templates is None else list(self.templates),
        }


_ALL = (
    Protocol(
        "fare",
        (2 * PIXEL, 4 * PIXEL),
        ("apgd-ce", "apgd-t"),
        iters=100,
        n_samples=1000,
        datasets=FARE_SETS,
        purpose="Schlarmann et al., ICML 2024 (RobustVLM); the tables of FARE and MMT-ARD",
    ),
    Protocol(
        "tecoa",
        (PIXEL,),
        ("pgd",),
        iters=10,
        n_samples=None,
        step_size=PIXEL,
        templates=("This is a photo of a {}",),
        purpose="Mao et al., ICLR 2023; few-step PGD, not comparable with fare",
    ),
    Protocol(
        "robustbench",
        (4 * PIXEL,),
        STANDARD,
        iters=100,
        n_samples=5000,
        eps_of=CIFAR_RADII,
        purpose="AutoAttack's `standard` (Croce & Hein, ICML 2020); the sample is ours, not RobustBench's list of 5000",
    ),
    Protocol(
        "autoattack",
        (4 * PIXEL,),
        STANDARD,
        iters=100,
        n_samples=None,
        eps_of=CIFAR_RADII,
        purpose="AutoAttack's `standard` (Croce & Hein, ICML 2020) on every sample, at the radii of RobustBench",
    ),
    Protocol(
        "quick",
        (2 * PIXEL,),
        ("pgd", "apgd-ce"),
        iters=20,
        n_samples=500,
        purpose="for watching a run, never for a table in a paper",
    ),
)
PROTOCOLS: dict[str, Protocol] = {protocol.name: protocol for protocol in _ALL}
