"""What the datasets of one evaluation share, and how one of them is measured."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace

from ..attacks.batching import AdaptiveBatchSize
from ..config import Cache, show_pixels
from ..data.dataset import INDEXING, Dataset, open_dataset
from ..data.images import DecodeError, Native, Transform, decode
from ..data.reader import Reader
from ..data.staging import staging_for
from ..distributed.interruption import Interruption
from ..distributed.ranks import Ranks
from ..errors import UserError
from ..files import settings_digest
from . import data_checks, results, retrieval, zeroshot
from .chunks import ChunkedWork
from .class_folders import with_shards
from .datasets import DatasetSource
from .graphs import Graphs
from .matching import deciding_settings
from .model import EvaluatedModel
from .partial_results import PartialResults
from .prompts import names_of, prompts_of
from .protocols import Protocol
from .request import EvaluationRequest
from .trained_with import TrainedWith
from .zeroshot_task import ZeroShotTask


@dataclass(frozen=True)
class EvaluationSession:
    """What the datasets of one evaluation share.

    settings: as results.json holds them. held: what is kept from others' hands until the evaluation ends. run: what the
    model's run says of its training; None where it is no run's. graphs: None where they are not asked for.
    """

    request: EvaluationRequest
    ranks: Ranks
    say: Callable
    interruption: Interruption
    model: EvaluatedModel
    transfer_from: EvaluatedModel | None
    settings: dict
    in_batches: AdaptiveBatchSize
    held: ExitStack
    run: TrainedWith | None = None
    graphs: Graphs | None = None

    def dataset(self, source: DatasetSource, stored: dict) -> tuple[dict, PartialResults | None]:
        """A dataset's part of the results, and its chunks where it had to be measured. Collective."""
        source, native = self.ranks.run_on_first(lambda: self._prepare(source), patience=INDEXING)
        # The first rank has just looked whether the shards are those that were indexed.
        dataset = open_dataset(source.data, look_again=False)
        transform = self.model.transform() if native is None else Native(native)
        measured = self._measured(source, dataset, transform)
        key = self._key(source, measured)
        entry = self._stored(source, stored, key)
        attacked = measured["kind"] == "zeroshot"
        checked = not attacked or not self.request.sanity or (entry is not None and entry["sanity"])
        if entry is not None and checked:
            return entry, None
        if entry is not None:
            self.say(f"{source.name}: is measured, the checks of --sanity are added")
        progress = PartialResults(self.request.out, source.name, key, self.ranks, self.say, self.graphs)
        try:
            work = self._work(source, dataset, transform)
            if measured["kind"] == "retrieval":
                found = self._retrieval(work, source.name, progress)
                return self._entry(source, dataset, key, measured, found), progress
            task = self._task(work, source, measured, progress)
            if entry is None:
                entry = self._entry(source, dataset, key, measured, zeroshot.measure(task))
            if not checked:
                lines = zeroshot.sanity(task, entry["samples"])
                entry = {**entry, "health": [*entry["health"], *lines], "sanity": True}
        finally:
            progress.close()
        return entry, progress

    def _prepare(self, source: DatasetSource) -> tuple[DatasetSource, tuple[int, int] | None]:
        """The source with shards and an index, and its images' size where they are perturbed at it. First rank."""
        source = with_shards(source, self.say, self.held)
        dataset = open_dataset(source.data)
        native = self._perturb_at(source) == "native"
        return source, _native_size(dataset, source.data.cache) if native else None

    def _protocol(self, source: DatasetSource) -> Protocol:
        """The request's; what is corrupted already is not attacked."""
        protocol = self.request.protocol
        return replace(protocol, eps=(), eps_of=()) if source.corruption else protocol

    def _perturb_at(self, source: DatasetSource) -> str:
        return self.request.protocol.perturb_at or ("native" if source.kind.native else "input")

    def _measured(self, source: DatasetSource, dataset: Dataset, transform: Transform | Native) -> dict:
        """What of a dataset, and of the way it is shown, decides its numbers."""
        retrieves = source.captions or ((dataset.labels < 0).all() and (dataset.index.text_size >= 0).any())
        measured = {
            "fingerprint": dataset.fingerprint,
            "kind": "corruption" if source.corruption else "retrieval" if retrieves else "zeroshot",
            "perturb_at": self._perturb_at(source),
            "perturbed_size": list(transform.shape),
        }
        if measured["kind"] != "retrieval":
            names = names_of(source, dataset)
            zeroshot.check_labels(dataset, names, source.name)
            measured |= {"classes": names, "chance": 1 / len(names), "templates": self._prompts(source)[0]}
        return measured

    def _prompts(self, source: DatasetSource) -> tuple[list[str], str]:
        return prompts_of(source, self.request.protocol, self.run, self.request.datasets_prompts)

    def _key(self, source: DatasetSource, measured: dict) -> str:
        radii = [show_pixels(e) for e in self._protocol(source).radii(source.name)]
        settings = {**deciding_settings(self.settings), "eps": radii, "eps_of": None}
        return settings_digest({"model": self.model.identity, "data": measured, "settings": settings})

    def _stored(self, source: DatasetSource, stored: dict, key: str) -> dict | None:
        """The stored entry of this name and key; says where the name has another key."""
        for entry in stored["datasets"]:
            if entry["name"] == source.name and entry["key"] == key:
                return entry
            if entry["name"] == source.name:
                self.say(
                    f"{source.name}: '{self.request.out / results.FILE}' holds results of another model, data or "
                    "settings; they will be replaced"
                )
        return None

    def _work(self, source: DatasetSource, dataset: Dataset, transform: Transform | Native) -> ChunkedWork:
        return ChunkedWork(
            dataset,
            transform,
            chunk=self.settings["batch_size"],
            seed=self.request.protocol.seed,
            workers=self.request.workers,
            cache=source.data.cache,
            ranks=self.ranks,
            in_batches=self.in_batches,
            interruption=self.interruption,
            say=self.say,
            max_left_out=source.data.max_replaced,
        )

    def _task(
        self, work: ChunkedWork, source: DatasetSource, measured: dict, progress: PartialResults
    ) -> ZeroShotTask:  # fmt: skip
        names, prompts = measured["classes"], measured["templates"]
        other = self.transfer_from
        return ZeroShotTask(
            source.name,
            work,
            progress,
            logits=self.model.logits(self.model.head(names, prompts, self.ranks)),
            transfer_from=other and other.logits(other.head(names, prompts, self.ranks)),
            class_names=names,
            protocol=self._protocol(source),
        )

    def _retrieval(self, work: ChunkedWork, name: str, progress: PartialResults) -> dict:
        def texts(captions: list[str]):
            return self.model.head(captions, ["{}"], self.ranks).class_embeddings.cpu()

        task = retrieval.RetrievalTask(
            name,
            work,
            progress,
            self.model.embed,
            texts,
            self.model.read_alike,
            self.model.clip.logit_scale,
            self.request.protocol,
        )
        return retrieval.measure(task)

    def _entry(self, source: DatasetSource, dataset: Dataset, key: str, measured: dict, found: dict) -> dict:
        """A dataset's part of results.json."""
        entry = {
            "name": source.name,
            "data": str(source.folder or source.data.shards),
            "shards": source.data.shards,
            "index": source.data.index,
            "key": key,
            **measured,
            **found,
            "sanity": False,
        }
        health = list(entry["health"])
        if source.corruption is not None:
            corruption, severity = source.corruption
            entry |= {"corruption": corruption, "severity": severity, "samples": {}}
        if measured["kind"] != "retrieval":
            entry["templates_from"] = self._prompts(source)[1]
            health += data_checks.label_lines(dataset)
            health += data_checks.class_name_lines(measured["classes"], dataset.labels, self._read_alike(measured))
            health += data_checks.chance_lines(entry["clean_all"], entry["chance"])
            if samples := entry["samples"]:
                guesses = samples["clean_prediction"]
                health += data_checks.shifted_lines(samples["labels"], guesses, entry["chance"])
        if self.run is not None:
            health.append(self.run.line(dataset))
        return {**entry, "health": health}

    def _read_alike(self, measured: dict) -> list[tuple[str, str]]:
        """Pairs of class names that are the same to the model, in the first of the prompts. Collective."""
        before, _, after = measured["templates"][0].partition("{}")
        prompts = [before + name + after for name in measured["classes"]]
        pairs = self.ranks.run_on_first(lambda: self.model.read_alike(prompts))
        return [tuple(p.removeprefix(before).removesuffix(after) for p in pair) for pair in pairs]


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
