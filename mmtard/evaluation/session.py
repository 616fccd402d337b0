"""What the datasets of one evaluation share, and how one of them is measured."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import open_clip

from ..attacks.batching import AdaptiveBatchSize
from ..attacks.state import Classifier
from ..config import Cache, Data, show_pixels
from ..data.class_names import classnames, templates
from ..data.dataset import Dataset, open_dataset_on_all_ranks
from ..data.images import DecodeError, Native, Transform, decode
from ..data.reader import Reader
from ..data.shard_writer import write_shards
from ..data.staging import staging_for
from ..distributed.interruption import Interruption
from ..distributed.ranks import Ranks
from ..errors import UserError
from ..files import settings_digest
from . import results, retrieval, zeroshot
from .chunks import ChunkedWork
from .datasets import DatasetSource, class_names
from .model import EvaluatedModel
from .partial_results import PartialResults
from .protocols import Protocol
from .request import EvaluationRequest


@dataclass(frozen=True)
class EvaluationSession:
    """What the datasets of one evaluation share. `settings`: as results.json holds them."""

    request: EvaluationRequest
    ranks: Ranks
    say: Callable
    interruption: Interruption
    subject: EvaluatedModel
    surrogate: EvaluatedModel | None
    settings: dict
    halving: AdaptiveBatchSize

    def dataset(self, source: DatasetSource, stored: dict) -> tuple[dict, bool]:
        """A dataset's part of the results, and whether it had to be measured. Collective."""
        source = self.ranks.run_on_first(lambda: _with_shards(source, self.say))
        dataset = open_dataset_on_all_ranks(source.data, self.ranks)
        retrieves = source.captions or ((dataset.labels < 0).all() and (dataset.index.text_size >= 0).any())
        about, transform = self._about(source, dataset, "retrieval" if retrieves else "zeroshot")
        key = self._key(source, about)
        for entry in stored["datasets"]:
            if entry["name"] == source.name and entry["key"] != key:
                self.say(
                    f"{source.name}: '{self.request.out / results.FILE}' holds results of another model, data or settings; they will be replaced"
                )
        entry = next((e for e in stored["datasets"] if e["key"] == key), None)
        checked = retrieves or not self.request.sanity or (entry is not None and entry["sanity"])
        if entry is not None and checked:
            return entry, False
        if entry is not None:
            self.say(f"{source.name}: is measured, the checks of --sanity are added")
        seed, chunk = self.request.protocol.seed, self.settings["batch_size"]
        work = ChunkedWork(
            dataset, transform, chunk, seed, self.request.workers, source.data.cache, self.ranks, self.halving, self.interruption, self.say,
            source.data.max_replaced,
        )  # fmt: skip
        progress = PartialResults(self.request.out, source.name, key, self.ranks, self.say)
        where = {
            "data": str(source.folder or source.data.shards),
            "shards": source.data.shards,
            "index": source.data.index,
        }
        try:
            models = () if retrieves else self._models(about)
            if entry is None:
                if retrieves:
                    measured = self._retrieval(work, source.name, progress)
                else:
                    measured = zeroshot.measure(
                        work, *models, about["classes"], self.request.protocol, source.name, progress
                    )
                entry = {"name": source.name, **where, "key": key, **about, **measured, "sanity": False}
            if not checked:
                lines = zeroshot.sanity(work, *models, entry["samples"], self.request.protocol, source.name, progress)
                entry = {**entry, "health": [*entry["health"], *lines], "sanity": True}
        finally:
            progress.close()
        return entry, True

    def _about(self, source: DatasetSource, dataset: Dataset, kind: str) -> tuple[dict, Transform | Native]:
        """What of a dataset decides its numbers, and the images' way to the model."""
        perturb_at = self.request.protocol.perturb_at or ("native" if source.kind.native else "input")
        if perturb_at == "native":
            transform = Native(self.ranks.run_on_first(lambda: _native_size(dataset, source.data.cache)))
        else:
            transform = self.subject.transform()
        about = {
            "fingerprint": dataset.fingerprint,
            "kind": kind,
            "perturb_at": perturb_at,
            "perturbed_size": list(transform.shape),
        }
        if kind == "zeroshot":
            names, prompts = _names(source, dataset), _prompts(source, self.request.protocol)
            zeroshot.check_labels(dataset, names, source.name)
            about |= {"classes": names, "chance": 1 / len(names), "templates": prompts}
        return about, transform

    def _key(self, source: DatasetSource, about: dict) -> str:
        radii = [show_pixels(e) for e in self.request.protocol.radii(source.name)]
        return settings_digest(
            {
                "model": self.subject.identity,
                "data": about,
                "settings": {**deciding_settings(self.settings), "eps": radii, "eps_of": None},
            }
        )

    def _models(self, about: dict) -> tuple[Classifier, Classifier | None]:
        """The model, and the one that `transfer` follows, as classifiers of a dataset's classes."""
        names, prompts = about["classes"], about["templates"]
        logits = self.subject.logits(self.subject.head(names, prompts, self.ranks))
        return logits, self.surrogate and self.surrogate.logits(self.surrogate.head(names, prompts, self.ranks))

    def _retrieval(self, work: ChunkedWork, name: str, progress: PartialResults) -> dict:
        def texts(captions: list[str]):
            return self.subject.head(captions, ["{}"], self.ranks).class_embeddings.cpu()

        return retrieval.measure(
            work, self.subject.embed, texts, self.subject.clip.logit_scale, self.request.protocol, name, progress
        )


def deciding_settings(settings: dict) -> dict:
    """The settings without where the other model's weights came from."""
    other = settings["transfer_from"]
    return settings | {"transfer_from": other and {k: v for k, v in other.items() if k != "weights"}}


def _with_shards(source: DatasetSource, say) -> DatasetSource:
    """The source with shards to read: those of class folders are written into the cache folder first."""
    if source.folder is None:
        return source
    place = hashlib.sha256(str(source.folder.resolve()).encode()).hexdigest()[:16]
    shards = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmtard" / f"shards-{place}"
    say(f"{source.name}: '{source.folder}' is read from shards, which are written to '{shards}' the first time")
    names = Path(source.data.classnames) if source.data.classnames else None
    write_shards(source.folder, shards, classnames=names, progress=False)
    return replace(source, data=source.data.model_copy(update={"shards": str(shards)}))


def _names(source: DatasetSource, dataset: Dataset) -> list[str]:
    if source.data.classnames is None and source.kind.thousand:
        found = len(np.unique(dataset.labels[dataset.labels >= 0]))
        if found != len(open_clip.IMAGENET_CLASSNAMES):
            where, wanted = source.folder or source.data.shards, len(open_clip.IMAGENET_CLASSNAMES)
            raise UserError(
                f"'{where}' has {found} classes, {source.name} has {wanted}: their labels may be others; "
                "name them, one a line in the order of the labels, in a classnames.txt beside them or with --classnames"
            )
        return list(open_clip.IMAGENET_CLASSNAMES)
    return class_names(source, classnames(source.data, dataset))


def _prompts(source: DatasetSource, protocol: Protocol) -> list[str]:
    if protocol.templates is not None:
        return templates(Data(shards=source.data.shards, templates=list(protocol.templates)))
    if source.kind.imagenet and not isinstance(source.data.templates, str):
        return [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    return templates(source.data)


def _native_size(dataset: Dataset, cache: Cache) -> tuple[int, int]:
    """(H, W) of the first image that can be read."""
    reader = Reader(dataset, staging_for(dataset, cache))
    for sample in range(len(dataset)):
        try:
            image = decode(reader.image(sample))
        except DecodeError:
            continue
        return image.height, image.width
    raise UserError(f"'{dataset.paths[0]}' has no image that can be decoded; restore the shards")
