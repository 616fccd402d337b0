"""What is measured of a run or a model: the protocol of each evaluation, and where its results lie. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..config import Config, Model
from ..errors import UserError
from ..evaluation import request
from ..evaluation.datasets import DatasetSource, find_datasets
from ..evaluation.protocols import PROTOCOLS, Protocol
from ..evaluation.request import EvaluationRequest
from ..files import settings_digest, slug
from ..runs.layout import CHECKPOINTS, EVALUATIONS, RESULTS
from .runs import MODELS, Run, all_runs, checkpoints, configuration, model_configuration, model_folder, run_folder
from .schema import START, Measure, Study

CURVE = "curve"


@dataclass(frozen=True)
class Measurement:
    """One evaluation of one state of a model. out: the folder of its results."""

    weights: Model
    measure: Measure
    protocol: Protocol
    out: Path

    @property
    def done(self) -> bool:
        """Whether its results are there."""
        return (self.out / RESULTS).is_file()

    def request(self) -> EvaluationRequest:
        """Raises UserError where its data are not one dataset."""
        sources = _one_dataset(self.measure)
        return EvaluationRequest(self.weights, sources, self.protocol, self.out, batch_size=self.measure.batch_size)


def check(study: Study, data: bool) -> None:
    """Raise UserError, before anything is trained, that names a measurement whose attacks are unknown or do not fit.

    data: raise it also for one whose data are not one dataset.
    """
    found = {f"evaluations.{name}": one for name, one in study.evaluations.items()}
    found |= {f"validation.{name}": one for name, one in study.validation.items()}
    found |= {"curve.measure": study.curve.measure} if study.curve else {}
    usual = {attack for protocol in PROTOCOLS.values() for attack in protocol.attacks}
    for place, measure in found.items():
        try:
            for attack in set(protocol_of(measure, None).attacks) - usual:
                from ..attacks import registry  # torch: not for the attacks of the protocols

                registry.find_attack(attack)
            if data:
                _one_dataset(measure)
        except UserError as error:
            raise UserError(f"{place}: {str(error).removeprefix('--data: ')}") from None


def of_run(study: Study, run: Run, tuning: bool, chosen: bool) -> list[Measurement]:
    """All evaluations of a run; on validation data where it is for tuning, on the way where it was chosen."""
    config, folder = configuration(study, run), run_folder(study, run)
    named = dict(study.evaluations)
    if tuning:
        named |= {f"validation-{name}": measure for name, measure in study.validation.items()}
    last = _state_of(study, run, _last(folder, config))
    found = [_measurement(name, m, config, folder, last) for name, m in named.items()]
    return found + (on_the_way(study, run) if chosen else [])


def evaluation(study: Study, run: Run, name: str, measure: Measure) -> Measurement:
    """One evaluation of a run; validation data have names of their own, `validation-NAME`."""
    config, folder = configuration(study, run), run_folder(study, run)
    return _measurement(name, measure, config, folder, _state_of(study, run, _last(folder, config)))


def on_the_way(study: Study, run: Run) -> list[Measurement]:
    """The checkpoints of a run, in their order; [] without a curve."""
    if study.curve is None:
        return []
    config, folder = configuration(study, run), run_folder(study, run)
    found = []
    for step in checkpoints(study, config.train.steps):
        weights = _state_of(study, run, folder / CHECKPOINTS / f"step-{step}")
        found.append(_measurement(f"{CURVE}-{step}", study.curve.measure, config, folder, weights))
    return found


def of_model(study: Study, name: str) -> list[Measurement]:
    """The evaluations of a model that is trained once, or of the student before any training."""
    if name == START:
        config = start_configuration(study)
        known = {key: getattr(config.student, key) for key in Model.model_fields}
        folder, weights = Path(study.out) / MODELS / START, Model(**known)
    else:
        config, folder = model_configuration(study, name), model_folder(study, name)
        weights = Model(weights=str(_last(folder, config)))
    return [_measurement(n, measure, config, folder, weights) for n, measure in study.evaluations.items()]


def start_configuration(study: Study) -> Config:
    """The configuration whose student all methods begin from: that of the first run."""
    return configuration(study, next(iter(all_runs(study).values())))


def protocol_of(measure: Measure, prompts: tuple[str, ...] | None) -> Protocol:
    """The protocol of an evaluation. Raises UserError for what does not fit, in the words of `mmtard evaluate`."""
    n_samples = measure.n_samples if isinstance(measure.n_samples, int) else None
    changes = {"iters": measure.iters, "seed": measure.seed, "n_samples": n_samples}
    changes |= {"attacks": measure.attacks and tuple(measure.attacks)}
    changes |= {"templates": tuple(measure.templates) if measure.templates else prompts}
    return request.protocol(measure.protocol, [measure.eps], False, measure.n_samples == "all", **changes)


def _one_dataset(measure: Measure) -> list[DatasetSource]:
    sources = find_datasets(measure.data)
    if len(sources) != 1:
        names = ", ".join(source.name for source in sources)
        raise UserError(f"'{measure.data}' holds several datasets ({names}); name one of their folders")
    return sources


def _state_of(study: Study, run: Run, folder: Path) -> Model:
    return Model(weights=str(folder), ema=study.methods[run.method].ema)


def _last(folder: Path, config: Config) -> Path:
    """The checkpoint of a run's last step, by its name: where it is damaged, the run itself means an earlier one."""
    return folder / CHECKPOINTS / f"step-{config.train.steps}"


def _measurement(name: str, measure: Measure, config: Config, folder: Path, weights: Model) -> Measurement:
    prompts = config.data.templates
    prompts = [prompts] if isinstance(prompts, str) and "{" in prompts else prompts
    # From a file of prompts, a run knows its own; the dataset's stand in for the student before training.
    protocol = protocol_of(measure, tuple(prompts) if isinstance(prompts, list) else None)
    decides = {"protocol": protocol.settings(), "data": measure.data, **({"ema": True} if weights.ema else {})}
    digest = settings_digest(decides)[:8]
    return Measurement(weights, measure, protocol, folder / EVALUATIONS / slug(f"{name}-{digest}"))
