"""One evaluation: a model, datasets and a protocol to results.json.

Sharded over the ranks, resumable, the same at every world size.
"""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack, nullcontext
from datetime import timedelta
from pathlib import Path

from ..attacks import registry
from ..attacks.batching import AdaptiveBatchSize
from ..attacks.fused import Fusion, fused
from ..distributed.console import say
from ..distributed.interruption import Interruption
from ..distributed.ranks import Ranks, set_timeouts
from ..errors import UserError
from ..models.compiled import compile_tower
from ..models.precision import full_float32
from ..runs.environment import device_name, environment
from . import out_folder, partial_results, results
from .chunks import CPU_BATCH, CUDA_BATCH
from .corruptions import corruption_error
from .graphs import Graphs, all_compiled
from .matching import deciding_settings
from .model import EvaluatedModel, load_model
from .request import EvaluationRequest
from .session import EvaluationSession
from .trained_with import trained_with

PATIENCE = timedelta(days=2)  # longer than any chunk under all attacks


@full_float32()
def evaluate(request: EvaluationRequest, ranks: Ranks, say=say, interruption: Interruption | None = None) -> dict:
    """Measure and write; returns the results, the same on every rank and at every world size. Collective.

    Datasets that OUT/results.json already holds by their name for the same weights, data and settings are taken over,
    also those that are not asked for now; of `sanity` only what is missing is measured. Others may measure other
    datasets into OUT meanwhile. Raises UserError for a model or data that do not fit, for a dataset that another
    evaluation is measuring into OUT, and where OUT has results of other datasets by another model or other settings;
    RunError with status REQUEUE when a rank was interrupted: the same call then goes on.
    """
    began = time.monotonic()
    if not ranks.is_first:
        say = _silent
    for name in request.protocol.attacks:
        registry.find_attack(name)
    # Ranks wait for one another's chunks of attacks. A rank that is lost shows at once, as a closed connection.
    set_timeouts(PATIENCE)
    hosts = ranks.all_gather(f"{socket.gethostname()} rank {ranks.rank} {device_name(ranks.device)}")
    with ExitStack() as held:
        names = [source.name for source in request.sources]
        ranks.run_on_first(lambda: held.enter_context(out_folder.hold(request.out, names)))
        stored = ranks.run_on_first(lambda: _stored(request.out))
        session = _session(request, ranks, say, Interruption() if interruption is None else interruption, held)
        _refuse_to_lose(names, stored, session)
        own, measured = [], []  # measured: whether by graphs, of each dataset that had to be; see `all_compiled`
        with fused(session.graphs.fusion) if session.graphs else nullcontext():
            for source in request.sources:
                entry, chunks = session.dataset(source, stored)
                own.append(entry)
                measured += [chunks.compiled] if chunks else []
        if not measured and len(_with_stored(own, stored, session)) == len(stored["datasets"]):
            say(f"'{request.out}' holds these results already; remove it to measure them again")
            return stored
        return ranks.run_on_first(lambda: _publish(own, session, hosts, began, measured))


def _silent(*_) -> None:
    pass


def _session(
    request: EvaluationRequest, ranks: Ranks, say, interruption: Interruption, held: ExitStack
) -> EvaluationSession:
    """The models on every rank, and what all datasets share. Collective."""
    run = ranks.run_on_first(lambda: trained_with(request.model))
    model = load_model(request.model, ranks)
    other = load_model(request.transfer_from, ranks, "--transfer-from") if request.transfer_from else None
    batch_size = request.batch_size or (CUDA_BATCH if ranks.device.type == "cuda" else CPU_BATCH)
    settings = {
        **request.protocol.settings(),
        "batch_size": batch_size,
        "transfer_from": {"weights": other.description["weights"], **other.identity} if other else None,
        **({"compile": True} if request.compile else {}),
    }
    graphs = None
    if request.compile:
        towers = {name: one.tower for name, one in (("the model", model), ("--transfer-from", other)) if one}
        for name, tower in towers.items():
            compile_tower(tower, name, say, any_batch=True)
        graphs = Graphs([tower.graph for tower in towers.values()], Fusion(say))
    in_batches = AdaptiveBatchSize(batch_size, say)
    return EvaluationSession(request, ranks, say, interruption, model, other, settings, in_batches, held, run, graphs)


def _with_stored(own: list[dict], stored: dict, session: EvaluationSession) -> list[dict]:
    """With the stored datasets of other names that were measured with the same settings and the same model."""
    if "settings" not in stored or deciding_settings(stored["settings"]) != deciding_settings(session.settings):
        return own
    names = {entry["name"] for entry in own}
    return own + [d for d in stored["datasets"] if d["name"] not in names and _same_model(stored, session.model)]


def _refuse_to_lose(own: list[str], stored: dict, session: EvaluationSession) -> None:
    """Raise UserError where the stored results of datasets that nobody asks for now would go, being another's."""
    others = [entry for entry in stored["datasets"] if entry["name"] not in own]
    if len(_with_stored([], {**stored, "datasets": others}, session)) < len(others):
        names = ", ".join(entry["name"] for entry in others)
        raise UserError(
            f"--out: '{session.request.out}' has results of another model, or of other settings, for {names}; "
            "choose another folder, or remove these"
        )


def _same_model(stored: dict, model: EvaluatedModel) -> bool:
    return stored["model"] == stored["model"] | model.identity


def _stored(out: Path) -> dict:
    if not (out / results.FILE).exists():
        return {"datasets": []}
    try:
        found = results.read(out)
        results.check_complete(found, out / results.FILE)
    except UserError as error:
        raise UserError(f"--out: {str(error).rpartition(';')[0]}; remove it, or choose another folder") from None
    return found


def _compiled(measured: list[bool | None], entries: list[dict], stored: dict) -> bool:
    """Whether graphs computed all that they are for, in what was measured now and in what is taken over.

    Asked for stands in the settings; a compiler may have been missing all the time, or for a part: both are False.
    """
    names = {(entry["name"], entry["key"]) for entry in entries}
    taken_over = any((entry["name"], entry["key"]) in names for entry in stored["datasets"])
    return all_compiled([*measured, *([stored.get("compiled", False)] if taken_over else [])]) is True


def _publish(
    own: list[dict], session: EvaluationSession, hosts: list[str], began: float, measured: list[bool | None]
) -> dict:
    """Write what was measured, beside what others have published meanwhile; the results. First rank."""
    request = session.request
    with out_folder.publishing(request.out):
        stored = _stored(request.out)
        _refuse_to_lose([entry["name"] for entry in own], stored, session)
        entries = _with_stored(own, stored, session)
        known = environment(hosts)
        found = {
            "format": results.FORMAT,
            "protocol": request.protocol.name,
            "command": known.pop("command"),
            "environment": known,
            "model": session.model.description,
            "settings": session.settings,
            "datasets": entries,
            "averages": results.averages(entries),
            **({"imagenet_c": found_c} if (found_c := corruption_error(entries)) else {}),
            **({"compiled": _compiled(measured, entries, stored)} if session.graphs else {}),
            "seconds": round(time.monotonic() - began, 1),
        }
        session.say(f"written: {results.write(found, request.out)}")
    partial_results.remove(request.out, [entry["name"] for entry in own])
    return found
