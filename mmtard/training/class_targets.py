"""The classes of a training: their frozen embeddings for each model, or the captions of a batch as its classes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
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
) -> tuple[dict[str, ZeroShotHead], Callable[[Batch], Batch]]:
    """(a Head for each model, what every batch has to pass before it is trained on), by `data.targets`. Both are
    collective.
    """
    if config.data.targets == "captions":
        captions = CaptionTargets(clips, ranks, say)
        return captions.heads, captions
    if config.data.targets == "none":
        return heads_without_classes(clips, ranks), lambda batch: batch
    return zero_shot_heads(
        run, clips, classnames(config.data, dataset), templates(config.data), ranks
    ), lambda batch: batch


class CaptionTargets:
    """Makes the captions of a step's global batch its classes, each embedded by every model's own frozen text tower.

    Which classes there are, and in which order, depends on the global batch alone: equal captions are one class, the
    classes are sorted. A rank embeds the captions of its own samples and receives the others', so that the text
    towers' work is shared. They stay on the ranks' device in float32. `say` is told of captions in the first batch
    that a text tower cannot tell apart: they are classes that can never be right.
    """

    def __init__(self, clips: dict[str, Clip], ranks: Ranks, say: Callable[[str], None] = lambda text: None):
        self.ranks, self.say, self.looked = ranks, say, False
        self.towers = {name: clip.text_tower().to(ranks.device) for name, clip in clips.items()}
        self.heads = {name: CaptionHead(clip.logit_scale) for name, clip in clips.items()}

    def __call__(self, batch: Batch) -> Batch:
        """Give the heads the classes of this step; the rank's batch with each sample's own caption as its label.
        Collective.
        """
        own = sorted(set(batch.captions))
        shared = self.ranks.all_gather((own, {name: tower(own).cpu() for name, tower in self.towers.items()}))
        place = {
            caption: (embedded, row) for captions, embedded in reversed(shared) for row, caption in enumerate(captions)
        }
        classes = sorted(place)
        if not self.looked:
            self._look(classes)
        for name, head in self.heads.items():
            head.class_embeddings = torch.stack([embedded[name][row] for embedded, row in map(place.get, classes)]).to(
                self.ranks.device
            )
        index = {caption: i for i, caption in enumerate(classes)}
        return replace(batch, labels=torch.tensor([index[caption] for caption in batch.captions]))

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
