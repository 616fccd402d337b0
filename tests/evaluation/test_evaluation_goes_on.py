"""Results are never taken for those of something else; what was interrupted goes on to the same numbers."""

import json
import threading
import zlib
from datetime import timedelta
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from tiny_datasets import edited, flags, strip_seconds, write
from torch._dynamo.exc import TorchDynamoException

from mmtard.attacks import ensemble, fused
from mmtard.config import Model, parse_fraction
from mmtard.distributed.interruption import EXIT_REQUEUE, Interruption, StoppedWithin
from mmtard.distributed.ranks import Ranks
from mmtard.errors import RunError, UserError
from mmtard.evaluation import chunk_memory, partial_results, results, zeroshot
from mmtard.evaluation.graphs import Graphs
from mmtard.examples.pretrain import ARCHITECTURE
from mmtard.models import clip, loading


def test_results_of_other_weights_data_or_settings_are_never_taken_for_these(
    colours, measure, exported, tmp_path, monkeypatch
):
    first, said = measure(colours), []
    monkeypatch.setattr(ensemble, "run_attacks", None)  # measuring again would fail
    monkeypatch.setattr(clip.Clip, "class_embeddings", None)
    assert measure(colours, say=said.append) == first and said == [
        f"'{tmp_path / 'out'}' holds these results already; remove it to measure them again"
    ]
    monkeypatch.undo()
    other = tmp_path / "other"
    loading.load_clip(Model(arch=str(ARCHITECTURE), weights="random"), seed=4).save(other)
    changed = write(tmp_path / "changed" / "colours", 47)
    # 1/255 and 1.5/255 are the same whole number of pixels: results keyed by it would be taken for the other's.
    for again in (
        {"model": other},
        {"root": changed},
        {"eps": (Fraction(3, 510),)},
        {"eps": (parse_fraction("1/255"),)},
        {"seed": 1},
        {"norm": "l2"},
    ):
        said = []
        found = measure(**{"root": colours, "say": said.append, **again})
        assert any("colours" in line and "will be replaced" in line for line in said), again
        assert found["datasets"][0]["key"] != first["datasets"][0]["key"]


def test_a_folder_that_was_copied_is_not_measured_again(colours, measure, exported, tmp_path, monkeypatch):
    """Its path stands in open_clip's name of it, and decides no number; nor does that of the model of `transfer`."""
    copied = edited(exported, tmp_path / "copied")
    first = measure(colours, attacks=("transfer",), iters=1, transfer_from=Model(weights=str(exported)))
    monkeypatch.setattr(ensemble, "run_attacks", None)
    again = measure(colours, attacks=("transfer",), iters=1, model=copied, transfer_from=Model(weights=str(copied)))
    assert again == first and again["model"]["weights"] == str(exported)


@pytest.mark.parametrize("way", [{"mean": [0.4, 0.5, 0.6]}, {"std": [0.4, 0.5, 0.6]}, {"interpolation": "bilinear"}])
def test_results_of_another_preprocessing_are_never_taken_for_these(colours, measure, exported, tmp_path, way):
    folder, said = edited(exported, tmp_path / "model"), []
    first = measure(colours, model=folder, attacks=("pgd",), iters=1)
    found = measure(colours, model=edited(exported, folder, **way), attacks=("pgd",), iters=1, say=said.append)
    assert (
        any("will be replaced" in line for line in said)
        and found["model"]["preprocess"] == first["model"]["preprocess"] | way
    )


def test_an_added_dataset_leaves_the_others_as_they_are(colours, measure, tmp_path, monkeypatch):
    root = tmp_path / "root"
    root.mkdir()
    (root / "colours").symlink_to(colours)
    first = measure(root)
    write(root / "more", 8)
    measured = []
    run = zeroshot.measure
    monkeypatch.setattr(zeroshot, "measure", lambda *args: measured.append(args[0].name) or run(*args))
    found = measure(root)
    assert (
        measured == ["more"]
        and [d["name"] for d in found["datasets"]] == ["colours", "more"]
        and found["datasets"][0] == first["datasets"][0]
    )


def test_datasets_of_equal_content_keep_their_names_and_a_renamed_one_is_another(measure, tmp_path, monkeypatch):
    root = tmp_path / "root"
    for name in ("colours", "twin"):
        write(root / name, 8)
    both = measure(root, iters=1)
    monkeypatch.setattr(ensemble, "run_attacks", None)  # measuring again would fail
    assert [d["name"] for d in measure(root, iters=1)["datasets"]] == ["colours", "twin"]
    monkeypatch.undo()
    (root / "twin").rename(root / "renamed")
    found = measure(root, iters=1)["datasets"]
    assert [d["name"] for d in found] == ["colours", "renamed", "twin"] and found[2] == both["datasets"][1]


def test_fewer_datasets_are_asked_for_and_none_is_lost(colours, measure, tmp_path, monkeypatch):
    root = tmp_path / "root"
    root.mkdir()
    (root / "colours").symlink_to(colours)
    write(root / "more", 8)
    both = measure(root, iters=1)
    monkeypatch.setattr(zeroshot, "measure", None)
    assert measure(root, wanted=["more"], iters=1)["datasets"] == both["datasets"]
    assert results.read(tmp_path / "out") == json.loads(json.dumps(both))


def test_an_interrupted_evaluation_keeps_what_it_measured_and_ends_with_the_same_numbers(
    colours, measure, tmp_path, monkeypatch
):
    undisturbed = measure(colours, tmp_path / "undisturbed", batch_size=8)
    interruption, calls, said, run = Interruption(), [], [], ensemble.run_attacks

    def stopped_after_two(*args):
        calls.append(1)
        interruption.signal = "SIGTERM" if len(calls) == 2 else interruption.signal
        return run(*args)

    monkeypatch.setattr(ensemble, "run_attacks", stopped_after_two)
    with pytest.raises(
        RunError, match="stopped by SIGTERM; what is measured is kept in '.*out', start it again"
    ) as end:
        measure(colours, batch_size=8, interruption=interruption)
    assert end.value.status == EXIT_REQUEUE and not (tmp_path / "out" / "results.json").exists()
    (partial,) = (tmp_path / "out" / partial_results.FOLDER).iterdir()
    partial.write_text(partial.read_text() + '{"part": "colours 4/255", "chu')  # as a kill leaves it
    found = measure(colours, batch_size=8, say=said.append)
    by = undisturbed["datasets"][0]["samples"]["eps"]["4/255"]["broken_by"]
    right = sum(flags(undisturbed)[0])
    chunks = -(-right // 8) + -(-(right - by.count("pgd")) // 8)  # of pgd, and of apgd-ce on what stands
    # The chunk in which the signal came was left at the next question to the model, and taken up again.
    assert len(calls) == chunks + 1 and f"colours: goes on, {6 + 1} chunks are done" in said
    timeless = [strip_seconds(r["datasets"][0]) for r in (found, undisturbed)]
    assert timeless[0] == timeless[1] and not (tmp_path / "out" / partial_results.FOLDER).exists()


@pytest.mark.slow
def test_a_signal_is_heeded_within_an_attack_and_ranks_wait_for_one_anothers_chunks(colours, measure, ranks):
    """An attack of a million iterations, which would take hours; a group's 30 minutes would end the ranks that wait."""
    interruption = Interruption()
    timer = threading.Timer(2.0, lambda: setattr(interruption, "signal", "SIGUSR2"))
    timer.start()
    with pytest.raises(RunError, match="stopped by SIGUSR2") as end:
        measure(colours, attacks=("pgd",), iters=1_000_000, interruption=interruption)
    assert end.value.status == EXIT_REQUEUE
    timeout = ranks.cpu_group._get_backend(torch.device("cpu")).options._timeout
    assert timeout > timedelta(days=1)


def test_partial_results_of_other_settings_are_dropped_with_a_line(ranks, tmp_path):
    folder, said = tmp_path / partial_results.FOLDER, []
    folder.mkdir()
    row = {"part": "colours clean", "chunk": 0}
    row = json.dumps(row | {"crc32": zlib.crc32(json.dumps(row, sort_keys=True).encode())})
    for name in (f"colours-{'0' * 16}", f"colours-{'1' * 16}", f"colours-2-{'0' * 16}"):
        (folder / f"{name}.0-host-1.jsonl").write_text(f"{row}\n")
    found = partial_results.PartialResults(tmp_path, "colours", "1" * 16, ranks, said.append)
    assert found.mine("colours clean", 3) == ([1, 2], 2)
    assert said == [
        f"colours: the partial results in '{folder}' are of another model, data or settings; "
        "they are removed, it starts anew",
        "colours: goes on, 1 chunks are done",
    ]
    assert sorted(p.name[:12] for p in folder.iterdir()) == ["colours-1111", "colours-2-00"]


GRAPHS = {"compile": True, "attacks": ("pgd",), "iters": 1, "batch_size": 8}


@pytest.fixture
def compiler(monkeypatch):
    """torch.compile that makes nothing; of the towers, in the order in which they are compiled, `missing` fail."""

    class Compiler:
        missing: tuple[int, ...] = ()
        towers = 0

    def compile(function, **_):
        number = Compiler.towers
        Compiler.towers += function.__name__ == "compute"

        def run(*given):
            if function.__name__ == "compute" and number in Compiler.missing:
                raise TorchDynamoException("no C++ compiler")
            return function(*given)

        return run

    monkeypatch.setattr(fused, "_graphs", {})
    monkeypatch.setattr(torch, "compile", compile)
    return Compiler


@pytest.fixture
def killed(measure, monkeypatch):
    """Measure as `measure` does, and be stopped in the second chunk of an attack."""

    def run(root, **settings):
        interruption, calls, attack = Interruption(), [], ensemble.run_attacks

        def stopped(*args):
            calls.append(1)
            interruption.signal = "SIGTERM" if len(calls) == 2 else None
            return attack(*args)

        with monkeypatch.context() as patch, pytest.raises(RunError, match="stopped by SIGTERM"):
            patch.setattr(ensemble, "run_attacks", stopped)
            measure(root, interruption=interruption, **settings)

    return run


@pytest.mark.parametrize("missing, compiled", [((0,), False), ((1,), False), ((), True)])
def test_results_say_compiled_only_where_the_calls_before_had_a_compiler_too(
    colours, measure, killed, compiler, missing, compiled
):
    compiler.missing = missing
    killed(colours, **GRAPHS)
    assert measure(colours, **GRAPHS)["compiled"] is compiled


def test_what_an_earlier_version_measured_is_not_said_to_be_compiled(colours, measure, killed, compiler, tmp_path):
    killed(colours, **GRAPHS)
    (partial,) = (tmp_path / "out" / partial_results.FOLDER).iterdir()
    rows = [json.loads(line) for line in partial.read_text().splitlines()]
    plain = [{k: v for k, v in row.items() if k not in ("compiled", partial_results.CHECKSUM)} for row in rows]
    lines = [json.dumps(row | {partial_results.CHECKSUM: partial_results._checksum(row)}) for row in plain]
    partial.write_text("".join(f"{line}\n" for line in lines))
    said = []
    assert measure(colours, say=said.append, **GRAPHS)["compiled"] is False
    assert f"colours: goes on, {len(rows)} chunks are done" in said


def test_a_kill_before_the_results_are_written_does_not_lose_that_all_was_compiled(
    colours, measure, compiler, monkeypatch
):
    def full(*_):
        raise UserError("no space left")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="no space left"):
        patch.setattr(results, "write", full)
        measure(colours, **GRAPHS)
    monkeypatch.setattr(ensemble, "run_attacks", None)  # measuring again would fail
    assert measure(colours, **GRAPHS)["compiled"] is True


def test_a_compiled_dataset_does_not_speak_for_those_that_were_measured_before(colours, measure, compiler, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "colours").symlink_to(colours)
    compiler.missing = (0,)
    assert measure(root, **GRAPHS)["compiled"] is False
    write(root / "more", 8)
    assert measure(root, **GRAPHS)["compiled"] is False


def test_the_model_that_transfer_attacks_is_among_what_is_compiled(colours, measure, exported, compiler):
    settings = GRAPHS | {"attacks": ("transfer",), "transfer_from": Model(weights=str(exported))}
    compiler.missing = (1,)
    assert measure(colours, **settings)["compiled"] is False


def test_chunks_of_other_ranks_count_among_the_compiled(ranks, tmp_path, monkeypatch):
    graphs = Graphs([SimpleNamespace(ran={True})], fused.Fusion(print))
    first, second = (
        partial_results.PartialResults(tmp_path / str(rank), "colours", "1" * 16, ranks, print, own)
        for rank, own in enumerate((graphs, Graphs([SimpleNamespace(ran={True, False})], fused.Fusion(print))))
    )
    first.add("colours clean", 0, {})
    assert first.compiled is True
    second.add("colours clean", 1, {})
    monkeypatch.setattr(Ranks, "all_gather", lambda self, own: [own, second.done])
    first.rows("colours clean")
    assert first.compiled is False


def test_a_chunk_that_was_begun_without_a_compiler_is_not_compiled(tmp_path):
    path, done = tmp_path / "memory.safetensors", []

    def stopped(_):
        raise StoppedWithin

    for ran in (False, True):
        graphs = Graphs([SimpleNamespace(ran=set())], fused.Fusion(print))
        memory = chunk_memory.ChunkMemory(path, print, graphs)
        graphs.forwards[0].ran.add(ran)
        memory.batch(torch.tensor([3, 4]), lambda _: done.append(ran))
        with pytest.raises(StoppedWithin):
            memory.batch(torch.tensor([5]), stopped)
    assert done == [False] and graphs.end_chunk() is False and graphs.compiled() is None
