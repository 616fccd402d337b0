"""A few samples attacked again for the eye: the image, its perturbation magnified, what the model says of both."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..attacks import ensemble
from ..attacks.state import AttackSettings
from ..config import Data, Model, parse_fraction, section
from ..data.dataset import open_dataset
from ..data.images import Native, Transform
from ..data.paths import default_index, is_remote, shards_of
from ..data.samples import SampleReader
from ..data.stream import eval_batches
from ..errors import UserError
from ..models import loading
from ..models.clip import CONFIG_FILE, Clip
from ..models.weights import tensors_sha256
from ..zero_shot import ZeroShotHead
from .records import Evaluation, Zeroshot
from .run_files import ReportSource
from .style import Figure

ATTACK, ITERS = "apgd-ce", 20  # for the eye: the numbers of the tables come from the evaluation's own attacks
SIDE, GAP = 240, 6  # pixels


@dataclass(frozen=True)
class Shown:
    """One sample: its picture (image, perturbation, attacked image), its class, and what was said of it."""

    figure: Figure
    key: str
    label: str
    before: str
    after: str
    measured: str


@dataclass(frozen=True)
class Strip:
    """The samples of one model, or in `missing` why there are none."""

    title: str
    samples: list[Shown]
    caption: str = ""
    missing: str = ""


def strip(source: ReportSource, number: int, wanted: int) -> Strip:
    """Attack `wanted` samples of the source's newest evaluation, half of them broken there, as far as there are."""
    for evaluation in reversed(source.evaluations):
        for dataset in evaluation.zeroshot:
            if dataset.eps:
                eps = min(dataset.eps, key=parse_fraction)
                title = f"{source.name} on {dataset.name}, {evaluation.settings.norm} {eps}"
                try:
                    return _attacked(source, number, evaluation, dataset, eps, choose(dataset, eps, wanted), title)
                except (UserError, OSError, RuntimeError, ValueError, IndexError) as error:
                    return Strip(title, [], missing=" ".join(str(error).split()))
    return Strip(source.name, [], missing="no evaluation under attack names a model and samples to attack")


def choose(dataset: Zeroshot, eps: str, wanted: int) -> list[int]:
    """Choose places in `dataset.samples`, ascending: classified correctly, half of them broken at this radius.

    Where there are fewer of one kind, the others fill up.
    """
    samples = dataset.samples
    if eps not in samples.eps:
        return []
    right = [i for i, clean in enumerate(samples.clean) if clean]
    broken = [i for i in right if not samples.eps[eps].robust[i]]
    stood = [i for i in right if samples.eps[eps].robust[i]]
    first = broken[: wanted - min(len(stood), wanted // 2)]
    return sorted(first + stood[: wanted - len(first)])


def _attacked(
    source: ReportSource,
    number: int,
    evaluation: Evaluation,
    dataset: Zeroshot,
    eps: str,
    places: list[int],
    title: str,
) -> Strip:
    if not places:
        raise UserError("no sample is classified correctly without attack")
    clip, head = _model(source, evaluation, dataset)
    images, seeds = _images(dataset, places, clip, _bases(evaluation))
    tower = clip.tower().eval().requires_grad_(False)
    labels = torch.tensor([dataset.samples.labels[i] for i in places])

    def model(x: Tensor) -> Tensor:
        return head(tower(x)).logits

    settings = AttackSettings(eps=float(parse_fraction(eps)), norm=evaluation.settings.norm, iters=ITERS)
    outcome = ensemble.run_attacks(model, images, labels, seeds, [ATTACK], settings)
    with torch.no_grad():
        before, after = (model(x).softmax(1) for x in (images, outcome.adv))
    factor = 0.5 / float((outcome.adv - images).abs().max().clamp_min(1e-6))
    shown = []
    for row, place in enumerate(places):
        pair = _Pair(images[row], outcome.adv[row], before[row], after[row])
        shown.append(_shown(f"strip-{number}-{row}", pair, factor, dataset, eps, place))
    caption = (
        f"Left to right: the image, its perturbation times {factor:.3g} (grey: none), the attacked image. "
        f"Attacked again for this page with {ATTACK}, {ITERS} iterations; “measured” is the evaluation's own outcome."
    )
    return Strip(title, shown, caption)


@dataclass(frozen=True)
class _Pair:
    """An image and its attacked image, [3,H,W] in [0, 1], and the model's probabilities [C] of each."""

    image: Tensor
    adv: Tensor
    before: Tensor
    after: Tensor


def _bases(evaluation: Evaluation) -> list[Path]:
    """Where relative places of an evaluation may begin: here, else a folder above its results."""
    return [Path(), *evaluation.path.resolve().parents]


def _images(dataset: Zeroshot, places: list[int], clip: Clip, bases: list[Path]) -> tuple[Tensor, Tensor]:
    """Return ([B,3,H,W] in [0, 1], seeds [B]) of the stored sample ids, brought to the model's size in its own way.

    Raises UserError when the data are gone or others.
    """
    shards = dataset.shards or dataset.data
    if any(map(is_remote, [shards] if isinstance(shards, str) else shards)):
        raise UserError(f"its data '{shards}' are remote")
    if isinstance(shards, str):
        shards = next((str(base / shards) for base in bases if (base / shards).exists()), shards)
    if dataset.shards not in (None, dataset.data) and not Path(str(shards)).is_dir():
        raise UserError(
            f"the shards '{shards}', which '{dataset.data}' was read from, are gone; "
            "the command of its evaluation writes them again"
        )
    index = dataset.index if dataset.index and Path(dataset.index).is_file() else None
    data = section(Data, shards=shards, index=index)
    # A page writes nothing beside data, which a stranger's results may name.
    if index is None and not default_index(shards_of(data)).is_file():
        raise UserError(f"the shards '{shards}' have no index any more; `mmtard index` makes it")
    found = open_dataset(data, look_again=False)
    if found.fingerprint != dataset.fingerprint:
        raise UserError(f"'{dataset.data}' no longer holds the data that were measured")
    height, width = dataset.perturbed_size
    own = Transform.of_model(height, clip.config["preprocess_cfg"], dataset.name)
    transform = Native((height, width)) if dataset.perturb_at == "native" else own
    ids = [dataset.samples.ids[i] for i in places]
    (batch,) = eval_batches(SampleReader(found, transform), ids, len(ids))
    if batch.replaced:
        raise UserError(f"'{batch.replaced[0][0]}' can no longer be read: {batch.replaced[0][2]}")
    return batch.pixels("cpu"), batch.seeds


def _model(source: ReportSource, evaluation: Evaluation, dataset: Zeroshot) -> tuple[Clip, ZeroShotHead]:
    """Raises UserError when the weights are not on this machine, or no longer those that were measured."""
    named = Path(evaluation.model.weights)
    folder = next((base / named for base in _bases(evaluation) if (base / named).exists()), source.path)
    if not folder.is_dir() or not any(
        (folder / name).exists() for name in (CONFIG_FILE, "checkpoints", "manifest.json")
    ):
        raise UserError(f"its weights '{named}' are no run or exported folder on this machine")
    clip = _measured_clip(folder, evaluation.model.sha256)
    classes = clip.class_embeddings(dataset.classes, dataset.templates)
    return clip, ZeroShotHead(classes, clip.logit_scale)


def _measured_clip(folder: Path, sha256: str) -> Clip:
    """Load the weights of a folder, or else their moving average, whichever image tower has this hash."""
    clip = loading.load_clip(Model(weights=str(folder)), where="report")
    if tensors_sha256(clip.model.visual.state_dict()) == sha256:
        return clip
    try:
        clip = loading.load_clip(Model(weights=str(folder), ema=True), where="report")
    except UserError:  # it keeps none
        pass
    if tensors_sha256(clip.model.visual.state_dict()) != sha256:
        raise UserError(f"the weights in '{folder}' are no longer those that were measured")
    return clip


def _shown(name: str, pair: _Pair, factor: float, dataset: Zeroshot, eps: str, place: int) -> Shown:
    label = dataset.classes[dataset.samples.labels[place]]
    said = [f"{dataset.classes[int(p.argmax())]} ({100 * float(p.max()):.0f} %)" for p in (pair.before, pair.after)]
    measured = _measured(dataset, eps, place)
    picture = _triptych([pair.image, (pair.adv - pair.image) * factor + 0.5, pair.adv])
    alt = (
        f"A {label}, the perturbation magnified, and the attacked image: "
        f"said to be {said[0]} before, {said[1]} after the attack."
    )
    samples = dataset.samples
    return Shown(Figure(name, alt, picture), str(samples.ids[place]), label, *said, measured)


def _measured(dataset: Zeroshot, eps: str, place: int) -> str:
    """What the evaluation found of this sample."""
    outcomes = dataset.samples.eps[eps]
    if outcomes.robust[place]:
        return "stood"
    by = outcomes.broken_by[place]
    return f"broken by {by}" if by else "wrong without attack"


def _triptych(images: list[Tensor]) -> bytes:
    """Paste three images [3,H,W] side by side into a PNG, each pixel a square."""
    height, width = images[0].shape[1:]
    scale = max(1, round(SIDE / max(height, width)))
    canvas = Image.new("RGB", (3 * scale * width + 2 * GAP, scale * height), "white")
    for i, image in enumerate(images):
        pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        canvas.paste(
            Image.fromarray(pixels).resize((scale * width, scale * height), Image.Resampling.NEAREST),
            (i * (scale * width + GAP), 0),
        )
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG")
    return buffer.getvalue()
