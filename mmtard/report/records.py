"""What the report reads of a results.json (format 2, written by `mmtard evaluate`), with names instead of keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from ..config import parse_fraction
from ..errors import UserError
from ..evaluation import results
from ..files import settings_digest


def _radius(text: str) -> str:
    parse_fraction(text)
    return text


Share = Annotated[FiniteFloat, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Radius = Annotated[str, AfterValidator(_radius)]  # as it is written: `2/255`


class Record(BaseModel):
    """A part of a results.json; keys that the report does not show are kept as they are."""

    model_config = ConfigDict(extra="allow", frozen=True)


class Accuracy(Record):
    """A share of samples, its 95 % interval, and of how many."""

    accuracy: Share
    interval95: tuple[Share, Share]
    n: Count


class WorstClass(Record):
    """The class that fares worst under attack, and on how many samples."""

    name: str
    accuracy: Share
    n: Count


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
    """The attacked samples: the same places in every list, and in those of each radius."""

    ids: list[int]
    labels: list[Annotated[int, Field(ge=0)]]
    clean: list[bool]
    clean_prediction: list[int]
    eps: dict[Radius, Outcomes] = {}

    @model_validator(mode="after")
    def _of_one_length(self) -> Self:
        lists = [self.labels, self.clean, self.clean_prediction]
        lists += [part for at in self.eps.values() for part in (at.broken_by, at.prediction, at.robust)]
        if any(len(part) != len(self.ids) for part in lists):
            raise ValueError("its lists are not of one length")
        return self


class Check(Record):
    """A health check of an attack and what it found."""

    check: str
    status: Literal["PASS", "WARN", "FAIL"]
    detail: str


class Measured(Record):
    """One dataset of an evaluation. Radii as they are written, `2/255`, in ascending order as the protocol lists them.

    data: as it was given. shards, index (None: beside them): what was read, in the cache where `data` is class folders.
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
    """A dataset of classes, measured by the prompts `templates`; perturbed_size: (height, width) in pixels."""

    classes: list[str]
    chance: Share
    n_total: Count
    templates: list[str]
    perturb_at: str
    perturbed_size: tuple[Count, Count]
    clean_all: Accuracy
    clean: Accuracy
    eps: dict[Radius, UnderAttack]
    samples: Samples

    @model_validator(mode="after")
    def _of_these_classes(self) -> Self:
        if self.samples.ids and max(self.samples.labels) >= len(self.classes):
            raise ValueError(f"a label is {max(self.samples.labels)}, there are {len(self.classes)} classes")
        return self


Recalls = dict[str, dict[str, Accuracy]]  # direction -> k -> recall at k


class RecallUnderAttack(Record):
    """Recall among the samples under attack."""

    recall: Recalls


class Retrieval(Measured):
    """Images and captions, whose recall at k is measured in both directions. attack: in words."""

    n_total: Count
    attack: str = ""
    clean_all: Recalls
    clean: Recalls
    eps: dict[Radius, RecallUnderAttack]


KINDS: dict[str, type[Measured]] = {"zeroshot": Zeroshot, "retrieval": Retrieval}


class Settings(Record):
    """How it was attacked."""

    norm: str
    attacks: list[str]
    iters: int
    seed: int


class About(Record):
    """The model that was measured.

    weights: as they were named. ema: their moving average. sha256: of its image tower.
    """

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
        """The datasets that were measured by classification."""
        return [d for d in self.datasets if isinstance(d, Zeroshot)]

    @property
    def retrieval(self) -> list[Retrieval]:
        """The datasets that were measured by retrieval."""
        return [d for d in self.datasets if isinstance(d, Retrieval)]


def read(path: Path) -> Evaluation:
    """Read a results.json. Raises UserError naming the file and what of it is not as `mmtard evaluate` writes it."""
    try:
        found = results.read(path)
        datasets = [KINDS.get(d.get("kind"), Measured).model_validate(d) for d in found.get("datasets", [])]
        return Evaluation.model_validate({**found, "path": path, "datasets": datasets})
    except RecursionError:
        raise UserError(f"'{path}' is nested too deeply for a results.json; evaluate the model again") from None
    except (ValidationError, AttributeError, TypeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": ("datasets",), "msg": str(error)}
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"'{path}': {where}: {first['msg']}; evaluate the model again") from None
