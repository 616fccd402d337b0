"""One evaluation: a model, datasets and a protocol to results.json; sharded over the ranks, resumable, the same at every world size."""

from __future__ import annotations

import shutil
import socket
import time
from pathlib import Path

from ..attacks import registry
from ..attacks.batching import AdaptiveBatchSize
from ..distributed.interruption import Interruption
from ..distributed.ranks import Ranks
from ..errors import UserError
from ..runs.environment import device_name, environment
from . import results
from .chunks import CPU_BATCH, CUDA_BATCH
from .model import full_float32, load_model
from .partial_results import FOLDER
from .request import EvaluationRequest
from .session import EvaluationSession, deciding_settings


@full_float32()
def evaluate(request: EvaluationRequest, ranks: Ranks, say=print, interruption: Interruption | None = None) -> dict:
    """Measure and write; returns the results, the same on every rank and at every world size. Collective.

    Datasets that OUT/results.json already holds for the same weights, data and settings are taken over, also those that are not
    asked for now; of `sanity` only what is missing is measured. Raises UserError for a model or data that do not fit, RunError with
    status REQUEUE when a rank was interrupted: the same call then goes on.
    """
    began, say = time.monotonic(), say if ranks.is_first else _silent
    for name in request.protocol.attacks:
        registry.find_attack(name)
    interruption = Interruption() if interruption is None else interruption
    hosts = ranks.all_gather(f"{socket.gethostname()} rank {ranks.rank} {device_name(ranks.device)}")
    subject = load_model(request.model, ranks)
    surrogate = load_model(request.transfer_from, ranks, "--transfer-from") if request.transfer_from else None
    chunk = request.batch_size or (CUDA_BATCH if ranks.device.type == "cuda" else CPU_BATCH)
    settings = {
        **request.protocol.settings(), "batch_size": chunk,
        "transfer_from": {"weights": surrogate.description["weights"], **surrogate.identity} if surrogate else None,
    }  # fmt: skip
    session = EvaluationSession(
        request, ranks, say, interruption, subject, surrogate, settings, AdaptiveBatchSize(chunk, say)
    )
    stored = ranks.run_on_first(lambda: _stored(request.out))
    entries, new = [], False
    for source in request.sources:
        entry, measured = session.dataset(source, stored)
        entries, new = [*entries, entry], new or measured
    asked = {entry["name"] for entry in entries}
    same = (
        "settings" in stored
        and deciding_settings(stored["settings"]) == deciding_settings(settings)
        and stored["model"] == stored["model"] | subject.identity
    )
    entries += [d for d in stored["datasets"] if same and d["name"] not in asked]
    if not new and len(entries) == len(stored["datasets"]):
        say(f"'{request.out}' holds these results already; remove it to measure them again")
        return stored
    known = environment(hosts)
    done = {
        "format": results.FORMAT,
        "protocol": request.protocol.name,
        "command": known.pop("command"),
        "environment": known,
        "model": subject.description,
        "settings": settings,
        "datasets": entries,
        "averages": results.averages(entries),
        "seconds": round(time.monotonic() - began, 1),
    }
    ranks.run_on_first(lambda: _publish(done, request.out, say))
    return done


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
