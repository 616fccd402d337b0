"""Results are never taken for those of something else; what was interrupted goes on to the same numbers."""

import json
import threading
import zlib
from datetime import timedelta
from fractions import Fraction

import pytest
import torch
from tiny_datasets import edited, flags, strip_seconds, write

from mmtard.attacks import ensemble
from mmtard.config import Model, parse_fraction
from mmtard.distributed.interruption import EXIT_REQUEUE, Interruption
from mmtard.errors import RunError
from mmtard.evaluation import partial_results, results, zeroshot
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
