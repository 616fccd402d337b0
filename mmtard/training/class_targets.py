"""The classes of a training: their frozen embeddings for each model, or the captions of a batch as its classes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import Config
from ..data.class_names import classnames, templates
from ..data.dataset import Dataset
from ..data.samples import Batch
from ..distributed.ranks import Ranks
from ..errors import UserError
from ..evaluation.data_checks import caption_lines
from ..files import why_not_written
from ..models.clip import Clip
from ..models.image_tower import DTYPES
from ..models.tokenizer import read_alike
from ..runs import checksums
from ..runs.checkpoints import save_tensors
from ..runs.layout import CLASS_EMBEDDINGS
from ..zero_shot import Prediction, ZeroShotHead


def zero_shot_heads(
    run: Path, clips: dict[str, Clip], classnames: list[str], templates: list[str], ranks: Ranks
) -> dict[str, ZeroShotHead]:
    """A Head for each model on the ranks' device; the first rank asks the text towers, the others receive its bits.

    Collective. Raises UserError when the run stored embeddings of other class names or templates.
    """
    stored = ranks.run_on_first(lambda: _stored(run, clips, classnames, templates, ranks))
    return {name: ZeroShotHead(stored[name].to(ranks.device), clip.logit_scale) for name, clip in clips.items()}


def heads_without_classes(clips: dict[str, Clip], ranks: Ranks) -> dict[str, ZeroShotHead]:
    """A Head of no class for each model, whose predictions are embeddings alone."""
    return {
        name: ZeroShotHead(torch.empty(0, clip.config["model_cfg"]["embed_dim"], device=ranks.device), clip.logit_scale)
        for name, clip in clips.items()
    }


def _stored(run: Path, clips, classnames, templates, ranks) -> dict[str, torch.Tensor]:
    path = run / CLASS_EMBEDDINGS
    asked = hashlib.sha256(json.dumps([classnames, templates]).encode()).hexdigest()
    text_towers = json.dumps({name: clip.sha256(image=False) for name, clip in sorted(clips.items())})
    if path.is_file():
        checksums.verify(run, CLASS_EMBEDDINGS, "remove it to have it made anew")
        try:
            metadata, embeddings = _read(path)
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"'{path}' cannot be read: {reason}; remove it to have it made anew") from None
        if metadata.get("prompts") != asked:
            raise UserError(
                f"data.classnames: not the names and templates that '{path}' was made with; "
                "restore them or choose another run_dir"
            )
        if metadata.get("text_towers") == text_towers and clips.keys() <= embeddings.keys():
            return {name: embeddings[name] for name in clips}
    embeddings = {name: clip.class_embeddings(classnames, templates, ranks.device) for name, clip in clips.items()}
    try:
        with checksums.renewed(run, CLASS_EMBEDDINGS):
            save_tensors(embeddings, path, {"prompts": asked, "text_towers": text_towers})
    except OSError as error:
        needed = sum(tensor.nbytes for tensor in embeddings.values())
        raise UserError(why_not_written(path, error, needed)) from None
    return embeddings


def _read(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """The metadata and the tensors of a safetensors file. Raises OSError and SafetensorError."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}


def build_class_targets(
    config: Config,
    run: Path,
    clips: dict[str, Clip],
    dataset: Dataset,
    ranks: Ranks,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, ZeroShotHead], Callable[[Iterable[Batch]], Iterable[Batch]]]:
    """(a Head for each model, what the batches have to pass before they are trained on), by `data.targets`. Both are
    collective.
    """
    if config.data.targets == "captions":
        captions = CaptionTargets(clips, ranks, DTYPES[config.engine.precision], say)
        return captions.heads, captions
    if config.data.targets == "none":
        return heads_without_classes(clips, ranks), lambda batches: batches
    return zero_shot_heads(
        run, clips, classnames(config.data, dataset), templates(config.data), ranks
    ), lambda batches: batches


@dataclass(frozen=True)
class _Embedded:
    """A batch whose labels are places in `rows` [C, sum of D]: the classes' embeddings, those of all models in one."""

    batch: Batch
    rows: Tensor


class CaptionTargets:
    """Makes the captions of a step's global batch its classes, each embedded by every model's own frozen text tower.

    Which classes there are, and in which order, depends on the global batch alone: equal captions are one class, the
    classes are sorted. A rank embeds the captions of its own samples and receives the others', so that the text
    towers' work is shared; the towers run in `dtype` under autocast. Embeddings are float32 and never leave the
    device. `say` is told of captions in the first batch that a text tower cannot tell apart: they are classes that can
    never be right.
    """

    def __init__(
        self,
        clips: dict[str, Clip],
        ranks: Ranks,
        dtype: torch.dtype = torch.float32,
        say: Callable[[str], None] = lambda text: None,
    ):
        self.ranks, self.dtype, self.say, self.looked = ranks, dtype, say, False
        self.towers = {name: clip.text_tower().to(ranks.device) for name, clip in clips.items()}
        self.widths = [clip.config["model_cfg"]["embed_dim"] for clip in clips.values()]
        self.heads = {name: CaptionHead(clip.logit_scale) for name, clip in clips.items()}
        self.beside = torch.cuda.Stream(ranks.device) if ranks.device.type == "cuda" else None

    def __call__(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The rank's batches with each sample's own caption as its label; the heads have the classes of the batch that
        was given last.

        A batch's captions are embedded one step ahead: on a GPU beside the step before. Collective.
        """
        ahead: _Embedded | None = None
        for batch in batches:
            following = self._embed(batch)
            if ahead is not None:
                yield self._use(ahead)
            ahead = following
        if ahead is not None:
            yield self._use(ahead)

    def _embed(self, batch: Batch) -> _Embedded:
        own = sorted(set(batch.captions))
        cast = torch.autocast(self.ranks.device.type, self.dtype, enabled=self.dtype != torch.float32)
        with torch.cuda.stream(self.beside) if self.beside else nullcontext(), cast:
            rows = torch.cat([tower(own) for tower in self.towers.values()], dim=1)
            padded = F.pad(rows, (0, 0, 0, len(batch) - len(own)))  # as many on every rank
            shared = self.ranks.gather_numbers(padded.view(-1)).view(-1, rows.shape[1])
            captions = self.ranks.all_gather(own)
            place = {
                caption: rank * len(batch) + row
                for rank, of_rank in reversed([*enumerate(captions)])
                for row, caption in enumerate(of_rank)
            }
            classes = sorted(place)
            rows = shared[torch.tensor([place[caption] for caption in classes]).to(shared.device, non_blocking=True)]
        if not self.looked:
            self._look(classes)
        index = {caption: i for i, caption in enumerate(classes)}
        return _Embedded(replace(batch, labels=torch.tensor([index[caption] for caption in batch.captions])), rows)

    def _use(self, embedded: _Embedded) -> Batch:
        if self.beside is not None:
            current = torch.cuda.current_stream(self.ranks.device)
            current.wait_stream(self.beside)
            embedded.rows.record_stream(current)
        for head, rows in zip(self.heads.values(), embedded.rows.split(self.widths, dim=1)):
            head.class_embeddings = rows.contiguous()
        return embedded.batch

    def _look(self, classes: list[str]) -> None:
        self.looked = True
        for name, tower in self.towers.items():
            for line in caption_lines(read_alike(tower.tokenize, classes), len(classes)):
                self.say(f"{line['status']} {line['check']} of the first batch, {name}: {line['detail']}")


class CaptionHead:
    """A Head whose `class_embeddings` [C,D] are those of the step under way."""

    def __init__(self, logit_scale: float):
        self.class_embeddings, self.logit_scale = torch.empty(0, 0), logit_scale

    def __call__(self, *outputs: Tensor) -> Prediction:
        return ZeroShotHead(self.class_embeddings, self.logit_scale)(*outputs)
