"""One evaluation: a model, datasets and a protocol to results.json; sharded over the ranks, resumable, the same at every world size."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path

import open_clip

from .. import data
from ..config import Cache, Data, show_pixels
from ..errors import UserError
from ..parallel import Ranks
from ..preempt import Interruption
from ..run_folder import device_name, environment
from . import attacks, results, zeroshot
from .chunks import CPU_BATCH, CUDA_BATCH, Halving, Work
from .datasets import Source, class_names
from .naming import digest
from .progress import FOLDER, Progress
from .protocols import Protocol
from .request import Evaluation
from .subject import Subject, load


def evaluate(what: Evaluation, ranks: Ranks, say=print, interruption: Interruption | None = None) -> dict:
    """Measure and write; returns the results, the same on every rank and at every world size. Collective.

    Datasets that OUT/results.json already holds for the same weights, data and settings are taken over. Raises UserError for a model
    or data that do not fit, RunError with status REQUEUE when a rank was interrupted: the same call then goes on.
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
        **what.protocol.settings(), "batch_size": chunk, "sanity": what.sanity,
        "transfer_from": {k: surrogate.about[k] for k in ("weights", "sha256", "text_sha256")} if surrogate else None,
    }  # fmt: skip
    session = Session(what, ranks, say, interruption, subject, surrogate, settings, Halving(chunk, say))
    stored = ranks.from_first(lambda: _stored(what.out))
    entries, new = [], False
    for source in what.sources:
        entry, measured = session.dataset(source, stored)
        entries, new = [*entries, entry], new or measured
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
    """What the datasets of one evaluation share."""

    what: Evaluation
    ranks: Ranks
    say: object
    interruption: Interruption
    subject: Subject
    surrogate: Subject | None
    settings: dict
    halving: Halving

    def dataset(self, source: Source, stored: dict) -> tuple[dict, bool]:
        """A dataset's part of the results, and whether it had to be measured. Collective."""
        protocol, ranks = self.what.protocol, self.ranks
        source = ranks.from_first(lambda: _with_shards(source, self.say))
        ranks.from_first(lambda: data.open_dataset(source.data).fingerprint)  # one builds the index
        dataset = data.open_dataset(source.data)
        names, prompts = _names(source), _prompts(source, protocol)
        zeroshot.check_labels(dataset, names, source.name)
        perturb_at = protocol.perturb_at or ("native" if source.kind.native else "input")
        transform = data.Transform(self.subject.tower.image_size)
        if perturb_at == "native":
            transform = data.Native(ranks.from_first(lambda: _native_size(dataset, source.data.cache)))
        about = {
            "fingerprint": dataset.fingerprint,
            "kind": "zeroshot",
            "classes": names,
            "templates": prompts,
            "perturb_at": perturb_at,
            "perturbed_size": list(transform.shape),
        }
        weights = {k: v for k, v in self.subject.about.items() if k != "weights"}
        radii = [show_pixels(e) for e in protocol.radii(source.name)]
        key = digest({"model": weights, "data": about, "settings": {**self.settings, "eps": radii, "eps_of": None}})
        for entry in stored["datasets"]:
            if entry["key"] == key:
                return entry, False
            if entry["name"] == source.name:
                self.say(f"{source.name}: '{self.what.out / results.FILE}' holds results of another model, data or settings; they will be replaced")
        progress = Progress(self.what.out, source.name, key, ranks, self.say)
        work = Work(dataset, transform, self.settings["batch_size"], protocol.seed, self.what.workers, source.data.cache, ranks, self.halving, self.interruption, self.say)
        try:
            head = self.subject.head(names, prompts, ranks)
            other = self.surrogate and self.surrogate.logits(self.surrogate.head(names, prompts, ranks))
            measured = zeroshot.measure(work, self.subject.logits(head), other, names, protocol, source.name, progress, self.what.sanity)
        finally:
            progress.close()
        return {"name": source.name, "data": str(source.folder or source.data.shards), "key": key, **about, "chance": 1 / len(names), **measured}, True


def _silent(*_) -> None:
    pass


def _stored(out: Path) -> dict:
    if not (out / results.FILE).is_file():
        return {"datasets": []}
    return results.read(out)


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


def _names(source: Source) -> list[str]:
    if source.data.classnames is None and source.kind.thousand:
        return list(open_clip.IMAGENET_CLASSNAMES)
    return class_names(source, data.classnames(source.data))


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
