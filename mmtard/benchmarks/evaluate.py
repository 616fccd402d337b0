"""`mmtard bench evaluate`: mmtard's attacks beside pyautoattack's, on the same samples, in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

import torch
from torch import Tensor, nn

from ..attacks.attack import attack_tensors
from ..attacks.autoattack import NORMS, require_library, set_means, undisturbed
from ..attacks.fused import Fusion, fused
from ..attacks.registry import not_defined
from ..attacks.state import AttackSettings, Classifier
from ..distributed.progress import WorkProgress
from ..errors import UserError
from .report import BenchmarkReport, BenchmarkTable

STANDARD, FARE = ("apgd-ce", "apgd-t", "fab-t", "square"), ("apgd-ce", "apgd-t")
HIDDEN_RESTARTS = 5  # of APGD-CE under pyautoattack's version `custom`, as RobustVLM's code runs it
COLUMNS = (
    "suite", "mmtard s", "pyautoattack s", "ratio", "ours passes", "their passes", "standing", "flags differ",
)  # fmt: skip
BATCH = 250  # pyautoattack's own default
COMPILED, LIBRARY = "mmtard compiled", "pyautoattack"


@dataclass
class Measured:
    """What one way of attacking did to the samples: bool [B], seconds, and the forward passes that it asked for."""

    fell: Tensor
    seconds: float
    passes: int


@dataclass(frozen=True)
class Suite:
    """Attacks to compare on. their_restarts: of the library's APGD-CE; ours are the settings' own."""

    name: str
    attacks: tuple[str, ...]
    their_restarts: int = 1


Ways = dict[str, tuple[Callable[..., Measured], Classifier]]  # name -> how it attacks, and what

SUITES = {
    "standard": Suite("standard", STANDARD),
    "fare": Suite("fare", FARE),
    "robustvlm": Suite("fare as RobustVLM's code runs it", FARE, HIDDEN_RESTARTS),
}


@dataclass
class EvaluationBenchmark:
    """mmtard's attacks beside pyautoattack's on the same samples, alternately, `rounds` times.

    Both take the same iterations, queries, targets and radius, at most 250 samples at once, and each its own random
    starts. `progress` says which of them attacks; its time left is at most that, since what falls is asked no more.
    """

    settings: AttackSettings
    rounds: int = 1
    suites: Sequence[Suite] = tuple(SUITES.values())
    say: Callable[[str], object] = print
    progress: WorkProgress = field(default_factory=lambda: WorkProgress(shown=False))

    def run(
        self, model: Classifier, images: Tensor, labels: Tensor, compiled: Classifier | None = None
    ) -> BenchmarkReport:
        """Seconds, passes, and flags that differ.

        model: images [B,3,H,W] in [0,1] -> logits [B,C]. images, labels: on its device. compiled: the same classifier
        by torch.compile, on which mmtard's attacks are timed once more, fused. Raises UserError without pyautoattack,
        and for inputs that `attack_tensors` refuses.
        """
        require_library()
        classes = model(images[:1]).shape[1]
        for suite in self.suites:
            for name in suite.attacks:
                if reason := not_defined(name, classes):
                    raise UserError(f"--suites: '{suite.name}' needs {reason}; give data of more classes")
        own_ways: Ways = {"mmtard": (ours, model)}
        if compiled:
            own_ways[COMPILED] = (self._ours_fused, compiled)
        compiling = self._warm_up(own_ways, model, images[:8])
        ways: Ways = {**own_ways, LIBRARY: (theirs, model)}
        most = self._most_passes(ways, len(images), classes)
        self.progress.part("", self.rounds * sum(most.values()))
        report = BenchmarkReport(numbers={"settings": vars(self.settings), "samples": len(images), "suites": {}})
        table = BenchmarkTable(self._title(len(images)), list(COLUMNS))
        for suite in self.suites:
            measured = self._measured(suite, ways, most, images, labels)
            for name in own_ways:
                title = suite.name if name != COMPILED else f"{suite.name}, compiled"
                report.numbers["suites"][title] = found = _found(measured[name], measured[LIBRARY])
                table.rows.append(_row(title, found, len(images)))
        report.tables.append(table)
        report.notes.append(
            "passes: samples that the model was asked about. Seconds are the median of the rounds, ratio theirs by "
            f"ours. RobustVLM's code leaves APGD-CE at {HIDDEN_RESTARTS} restarts; mmtard takes one."
        )
        if compiled:
            report.numbers["compiling_seconds"] = compiling[COMPILED]
            report.notes.append(f"Compiling took {compiling[COMPILED]:.0f} s before, which are not in the table.")
        return report

    def _warm_up(self, ways: Ways, model: Classifier, images: Tensor) -> dict[str, float]:
        """Ask each way for every attack, until nothing new is left to compile; the seconds that compiling took."""
        labels = model(images).argmax(1)
        settings = replace(self.settings, eps=1e-6, iters=3, queries=60)  # none falls, so that all are asked
        attacks = {name: Suite(name, (name,)) for suite in self.suites for name in suite.attacks}

        def seconds(attack: Callable[..., Measured], asked: Classifier) -> float:
            return sum(attack(asked, images, labels, settings, alone).seconds for alone in attacks.values())

        found = {}
        for name, way in ways.items():
            first = seconds(*way)
            again = seconds(*way)
            found[name] = first - again
        return found

    def _ours_fused(self, *asked) -> Measured:
        """`ours`, as `mmtard evaluate --compile` runs it."""
        with fused(Fusion(self.say)):
            return ours(*asked)

    def _title(self, samples: int) -> str:
        s = self.settings
        return f"{samples} samples, {s.norm} {s.eps:.4g}, {s.iters} iterations"

    def _measured(
        self, suite: Suite, ways: Ways, most: dict[tuple[Suite, str], int], images: Tensor, labels: Tensor
    ) -> dict[str, list[Measured]]:
        """What each way did in every round."""
        measured: dict[str, list[Measured]] = {name: [] for name in ways}
        for number in range(self.rounds):
            for name, (attack, asked) in ways.items():
                words = f"{suite.name}, {name}: round {number + 1} of {self.rounds}"
                with self.progress.running_at_most(words, most[suite, name]) as heard:
                    measured[name].append(attack(_Heard(asked, heard), images, labels, self.settings, suite))
            seconds = ", ".join(f"{name} {found[-1].seconds:.1f} s" for name, found in measured.items())
            self.say(f"{suite.name}: {seconds}")
        return measured

    def _most_passes(self, ways: Ways, samples: int, classes: int) -> dict[tuple[Suite, str], int]:
        """Passes where every sample stands to the end, by and large, by suite and way."""
        s = self.settings
        targets = min(s.targets, classes - 1)
        gradient = {"apgd-ce": 1, "apgd-t": targets, "fab-t": 2 * targets}  # in units of iterations
        found = {}
        for suite in self.suites:
            own = sum(gradient.get(name, 0) for name in suite.attacks) * s.iters
            own += s.queries if "square" in suite.attacks else 0
            for name in ways:
                more_restarts = suite.their_restarts - 1 if name == LIBRARY else 0
                found[suite, name] = samples * (own + more_restarts * s.iters)
        return found


def ours(model: Classifier, images: Tensor, labels: Tensor, settings: AttackSettings, suite: Suite) -> Measured:
    """mmtard's attacks, each on what the earlier ones left standing."""
    asked, began = _Counted(model), _now(images)
    result = attack_tensors(asked, images, labels, settings, list(suite.attacks), batch_size=BATCH)
    return Measured(~result.robust, _now(images) - began, asked.passes)


def theirs(model: Classifier, images: Tensor, labels: Tensor, settings: AttackSettings, suite: Suite) -> Measured:
    """pyautoattack's attacks of the same names and means."""
    from pyautoattack import AutoAttack

    asked, began = _Counted(model), _now(images)
    with undisturbed(images.device):
        library = AutoAttack(
            asked, norm=NORMS[settings.norm], eps=settings.eps, seed=0, version="standard", device=images.device
        )
        library.verbose, library.attacks_to_run = False, list(suite.attacks)
        set_means(library, settings, asked(images[:1]).shape[1])
        library.apgd.n_restarts = suite.their_restarts
        _, predicted = library.run_standard_evaluation(images, labels, batch_size=BATCH)
    return Measured(predicted != labels, _now(images) - began, asked.passes)


class _Heard:
    """The model; tells `heard` of the samples that it is asked about."""

    def __init__(self, model: Classifier, heard: Callable[[int], object]):
        self.model, self.heard = model, heard

    def __call__(self, images: Tensor) -> Tensor:
        self.heard(len(images))
        return self.model(images)


class _Counted(nn.Module):
    """The model; counts the samples that it is asked about."""

    def __init__(self, model: Classifier):
        super().__init__()
        self.ask, self.passes = model, 0
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        self.passes += len(images)
        return self.ask(images)


def _row(title: str, found: dict, samples: int) -> list[str]:
    sides = [found["mmtard"], found[LIBRARY]]
    seconds, passes = [f"{side['seconds']:.2f}" for side in sides], [str(side["passes"]) for side in sides]
    differ = f"{found['flags_differ']} of {samples}"
    return [title, *seconds, f"{found['ratio']:.2f}", *passes, str(found["standing"]), differ]


def _found(by_us: list[Measured], by_them: list[Measured]) -> dict:
    first, other = by_us[0], by_them[0]
    seconds = [median(measured.seconds for measured in side) for side in (by_us, by_them)]
    return {
        "mmtard": {"seconds": seconds[0], "passes": first.passes},
        LIBRARY: {"seconds": seconds[1], "passes": other.passes},
        "rounds": [[measured.seconds for measured in pair] for pair in zip(by_us, by_them)],
        "ratio": seconds[1] / seconds[0],
        "standing": int((~first.fell).sum()),
        "flags_differ": int((first.fell != other.fell).sum()),
    }


def _now(images: Tensor) -> float:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return time.perf_counter()
