"""One evaluation: a model, datasets and a protocol to results.json; sharded over the ranks, resumable, the same at every world size."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import open_clip

from .. import data
from ..config import Cache, Data, show_pixels
from ..errors import UserError
from ..parallel import Ranks
from ..preempt import Interruption
from ..run_folder import device_name, environment
from . import attacks, results, retrieval, zeroshot
from .chunks import CPU_BATCH, CUDA_BATCH, Halving, Work
from .datasets import Source, class_names
from .naming import digest
from .progress import FOLDER, Progress
from .protocols import Protocol
from .request import Evaluation
from .subject import Subject, full_float32, load
from .trial import Model


@full_float32()
def evaluate(what: Evaluation, ranks: Ranks, say=print, interruption: Interruption | None = None) -> dict:
    """Measure and write; returns the results, the same on every rank and at every world size. Collective.

    Datasets that OUT/results.json already holds for the same weights, data and settings are taken over, also those that are not
    asked for now; of `sanity` only what is missing is measured. Raises UserError for a model or data that do not fit, RunError with
    status REQUEUE when a rank was interrupted: the same call then goes on.
    """
    began, say = time.monotonic(), say if ranks.first else _silent
    for name in what.protocol.attacks:
        attacks.find(name)
    interruption = Interruption() if interruption is None else interruption
    hosts = ranks.gather(f"{socket.gethostname()} rank {ranks.rank} {device_name(ranks.device)}")
    subject = load(what.model, ranks)
    surrogate = load(what.transfer_from, ranks, "--transfer-from") if what.transfer_from else None
    chunk = what.batch_size or (CUDA_BATCH if ranks.device.type == "cuda" else CPU_BATCH)
    settings = {
        **what.protocol.settings(), "batch_size": chunk,
        "transfer_from": {"weights": surrogate.about["weights"], **surrogate.identity} if surrogate else None,
    }  # fmt: skip
    session = Session(what, ranks, say, interruption, subject, surrogate, settings, Halving(chunk, say))
    stored = ranks.from_first(lambda: _stored(what.out))
    entries, new = [], False
    for source in what.sources:
        entry, measured = session.dataset(source, stored)
        entries, new = [*entries, entry], new or measured
    asked = {entry["name"] for entry in entries}
    same = "settings" in stored and _deciding(stored["settings"]) == _deciding(settings) and stored["model"] == stored["model"] | subject.identity
    entries += [d for d in stored["datasets"] if same and d["name"] not in asked]
    if not new and len(entries) == len(stored["datasets"]):
        say(f"'{what.out}' holds these results already; remove it to measure them again")
        return stored
    known = environment(hosts)
    done = {
        "format": results.FORMAT,
        "protocol": what.protocol.name,
        "command": known.pop("command"),
        "environment": known,
        "model": subject.about,
        "settings": settings,
        "datasets": entries,
        "averages": results.averages(entries),
        "seconds": round(time.monotonic() - began, 1),
    }
    ranks.from_first(lambda: _publish(done, what.out, say))
    return done


@dataclass(frozen=True)
class Session:
    """What the datasets of one evaluation share. `settings`: as results.json holds them."""

    what: Evaluation
    ranks: Ranks
    say: Callable
    interruption: Interruption
    subject: Subject
    surrogate: Subject | None
    settings: dict
    halving: Halving

    def dataset(self, source: Source, stored: dict) -> tuple[dict, bool]:
        """A dataset's part of the results, and whether it had to be measured. Collective."""
        source = self.ranks.from_first(lambda: _with_shards(source, self.say))
        dataset = data.open_on_all(source.data, self.ranks)
        retrieves = source.captions or ((dataset.labels < 0).all() and (dataset.index.text_size >= 0).any())
        about, transform = self._about(source, dataset, "retrieval" if retrieves else "zeroshot")
        key = self._key(source, about)
        for entry in stored["datasets"]:
            if entry["name"] == source.name and entry["key"] != key:
                self.say(f"{source.name}: '{self.what.out / results.FILE}' holds results of another model, data or settings; they will be replaced")
        entry = next((e for e in stored["datasets"] if e["key"] == key), None)
        checked = retrieves or not self.what.sanity or (entry is not None and entry["sanity"])
        if entry is not None and checked:
            return entry, False
        if entry is not None:
            self.say(f"{source.name}: is measured, the checks of --sanity are added")
        seed, chunk = self.what.protocol.seed, self.settings["batch_size"]
        work = Work(
            dataset, transform, chunk, seed, self.what.workers, source.data.cache, self.ranks, self.halving, self.interruption, self.say,
            source.data.max_replaced,
        )  # fmt: skip
        progress = Progress(self.what.out, source.name, key, self.ranks, self.say)
        where = {"data": str(source.folder or source.data.shards), "shards": source.data.shards, "index": source.data.index}
        try:
            models = () if retrieves else self._models(about)
            if entry is None:
                if retrieves:
                    measured = self._retrieval(work, source.name, progress)
                else:
                    measured = zeroshot.measure(work, *models, about["classes"], self.what.protocol, source.name, progress)
                entry = {"name": source.name, **where, "key": key, **about, **measured, "sanity": False}
            if not checked:
                lines = zeroshot.sanity(work, *models, entry["samples"], self.what.protocol, source.name, progress)
                entry = {**entry, "health": [*entry["health"], *lines], "sanity": True}
        finally:
            progress.close()
        return entry, True

    def _about(self, source: Source, dataset: data.Dataset, kind: str) -> tuple[dict, data.Transform | data.Native]:
        """What of a dataset decides its numbers, and the images' way to the model."""
        perturb_at = self.what.protocol.perturb_at or ("native" if source.kind.native else "input")
        if perturb_at == "native":
            transform = data.Native(self.ranks.from_first(lambda: _native_size(dataset, source.data.cache)))
        else:
            transform = self.subject.transform()
        about = {"fingerprint": dataset.fingerprint, "kind": kind, "perturb_at": perturb_at, "perturbed_size": list(transform.shape)}
        if kind == "zeroshot":
            names, prompts = _names(source, dataset), _prompts(source, self.what.protocol)
            zeroshot.check_labels(dataset, names, source.name)
            about |= {"classes": names, "chance": 1 / len(names), "templates": prompts}
        return about, transform

    def _key(self, source: Source, about: dict) -> str:
        radii = [show_pixels(e) for e in self.what.protocol.radii(source.name)]
        return digest({"model": self.subject.identity, "data": about, "settings": {**_deciding(self.settings), "eps": radii, "eps_of": None}})

    def _models(self, about: dict) -> tuple[Model, Model | None]:
        """The model, and the one that `transfer` follows, as classifiers of a dataset's classes."""
        names, prompts = about["classes"], about["templates"]
        logits = self.subject.logits(self.subject.head(names, prompts, self.ranks))
        return logits, self.surrogate and self.surrogate.logits(self.surrogate.head(names, prompts, self.ranks))

    def _retrieval(self, work: Work, name: str, progress: Progress) -> dict:
        def texts(captions: list[str]):
            return self.subject.head(captions, ["{}"], self.ranks).class_embeddings.cpu()

        return retrieval.measure(work, self.subject.embed, texts, self.subject.clip.logit_scale, self.what.protocol, name, progress)


def _deciding(settings: dict) -> dict:
    """The settings without where the other model's weights came from."""
    other = settings["transfer_from"]
    return settings | {"transfer_from": other and {k: v for k, v in other.items() if k != "weights"}}


def _silent(*_) -> None:
    pass


def _stored(out: Path) -> dict:
    if not (out / results.FILE).is_file():
        return {"datasets": []}
    try:
        return results.read(out)
    except UserError as error:
        raise UserError(f"--out: {str(error).rpartition(';')[0]}; remove it, or choose another folder") from None


def _publish(done: dict, out: Path, say) -> None:
    say(f"written: {results.write(done, out)}")
    shutil.rmtree(out / FOLDER, ignore_errors=True)


def _with_shards(source: Source, say) -> Source:
    """The source with shards to read: those of class folders are written into the cache folder first."""
    if source.folder is None:
        return source
    place = hashlib.sha256(str(source.folder.resolve()).encode()).hexdigest()[:16]
    shards = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmtard" / f"shards-{place}"
    say(f"{source.name}: '{source.folder}' is read from shards, which are written to '{shards}' the first time")
    names = Path(source.data.classnames) if source.data.classnames else None
    data.write_shards(source.folder, shards, classnames=names, progress=False)
    return replace(source, data=source.data.model_copy(update={"shards": str(shards)}))


def _names(source: Source, dataset: data.Dataset) -> list[str]:
    if source.data.classnames is None and source.kind.thousand:
        found = len(np.unique(dataset.labels[dataset.labels >= 0]))
        if found != len(open_clip.IMAGENET_CLASSNAMES):
            where, wanted = source.folder or source.data.shards, len(open_clip.IMAGENET_CLASSNAMES)
            raise UserError(
                f"'{where}' has {found} classes, {source.name} has {wanted}: their labels may be others; "
                "name them, one a line in the order of the labels, in a classnames.txt beside them or with --classnames"
            )
        return list(open_clip.IMAGENET_CLASSNAMES)
    return class_names(source, data.classnames(source.data, dataset))


def _prompts(source: Source, protocol: Protocol) -> list[str]:
    if protocol.templates is not None:
        return data.templates(Data(shards=source.data.shards, templates=list(protocol.templates)))
    if source.kind.imagenet and not isinstance(source.data.templates, str):
        return [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    return data.templates(source.data)


def _native_size(dataset: data.Dataset, cache: Cache) -> tuple[int, int]:
    """(H, W) of the first image that can be read."""
    reader = data.Reader(dataset, data.Staging(dataset, cache) if dataset.remote else None)
    for sample in range(len(dataset)):
        try:
            image = data.decode(reader.image(sample))
        except data.DecodeError:
            continue
        return image.height, image.width
    raise UserError(f"'{dataset.paths[0]}' has no image that can be decoded; restore the shards")
