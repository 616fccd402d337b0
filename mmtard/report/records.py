"""What the report reads of a results.json (format 2, written by `mmtard evaluate`), with names instead of keys."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import UserError
from ..evaluation import results
from ..files import settings_digest


class Record(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


class Accuracy(Record):
    """A share of samples, its 95 % interval, and of how many."""

    accuracy: float
    interval95: tuple[float, float]
    n: int


class WorstClass(Record):
    name: str
    accuracy: float
    n: int


class UnderAttack(Record):
    """`attacks`: what stands after each attack, in the order in which they ran."""

    attacks: dict[str, Accuracy]
    robust: Accuracy
    worst_class: WorstClass | None = None


class Outcomes(Record):
    """One entry a sample: the attack that broke it or None, the prediction under attack, whether it stood."""

    broken_by: list[str | None]
    prediction: list[int]
    robust: list[bool]


class Samples(Record):
    ids: list[int]
    labels: list[int]
    clean: list[bool]
    clean_prediction: list[int]
    eps: dict[str, Outcomes] = {}


class Check(Record):
    check: str
    status: Literal["PASS", "WARN", "FAIL"]
    detail: str


class Measured(Record):
    """One dataset of an evaluation. Radii as they are written, `2/255`, in ascending order as the protocol lists them.

    `data`: as it was given; `shards` and `index` (None: beside them): what was read, in the cache where `data` is class folders.
    """

    name: str
    kind: str
    data: str | list[str]
    shards: str | list[str] | None = None
    index: str | None = None
    fingerprint: str
    health: list[Check] = []

    @property
    def way(self) -> dict[str, str]:
        """What of the data and of how they were asked decides the numbers: equal for results that may be compared."""
        found = {key: getattr(self, key, None) for key in ("fingerprint", "perturb_at", "classes", "templates")}
        return {key: value if isinstance(value, str) else settings_digest({key: value}) for key, value in found.items()}


class Zeroshot(Measured):
    classes: list[str]
    chance: float
    n_total: int
    templates: list[str]
    perturb_at: str
    perturbed_size: tuple[int, int]
    clean_all: Accuracy
    clean: Accuracy
    eps: dict[str, UnderAttack]
    samples: Samples


Recalls = dict[str, dict[str, Accuracy]]  # direction -> k -> recall at k


class RecallUnderAttack(Record):
    recall: Recalls


class Retrieval(Measured):
    """Images and captions, whose recall at k is measured in both directions. `attack`: in words."""

    n_total: int
    attack: str = ""
    clean_all: Recalls
    clean: Recalls
    eps: dict[str, RecallUnderAttack]


KINDS: dict[str, type[Measured]] = {"zeroshot": Zeroshot, "retrieval": Retrieval}


class Settings(Record):
    norm: str
    attacks: list[str]
    iters: int
    seed: int


class About(Record):
    """The model that was measured. `weights`: as they were named; `ema`: their moving average; `sha256`: of its image tower."""

    weights: str
    ema: bool = False
    sha256: str
    text_sha256: str | None = None
    quick_gelu: bool | None = None

    @property
    def identity(self) -> tuple:
        """What makes it this model, whatever it is called."""
        return self.sha256, self.text_sha256, self.quick_gelu


class Evaluation(Record):
    """A results.json and where it lies."""

    path: Path
    protocol: str
    command: str
    model: About
    settings: Settings
    environment: dict = {}
    datasets: list[Measured]

    @property
    def zeroshot(self) -> list[Zeroshot]:
        return [d for d in self.datasets if isinstance(d, Zeroshot)]

    @property
    def retrieval(self) -> list[Retrieval]:
        return [d for d in self.datasets if isinstance(d, Retrieval)]


def read(path: Path) -> Evaluation:
    """Raises UserError naming the file and what of it is not as `mmtard evaluate` writes it."""
    found = results.read(path)
    try:
        datasets = [KINDS.get(d.get("kind"), Measured).model_validate(d) for d in found.get("datasets", [])]
        return Evaluation.model_validate({**found, "path": path, "datasets": datasets})
    except (ValidationError, AttributeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": ("datasets",), "msg": str(error)}
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"'{path}': {where}: {first['msg']}; evaluate the model again") from None
