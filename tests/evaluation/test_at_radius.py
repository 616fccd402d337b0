"""Attacks one after the other at several radii: what fell is not attacked again, and a stop costs a moment's work."""

import errno
import json
import zlib

import pytest
import torch
from tiny_datasets import strip_seconds
from torch._dynamo.exc import TorchDynamoException

from mmtard.attacks import ensemble, fused
from mmtard.config import parse_fraction
from mmtard.distributed.interruption import Interruption, StoppedWithin
from mmtard.errors import RunError
from mmtard.evaluation import chunk_memory, model, partial_results
from mmtard.evaluation.compare import compare_all
from mmtard.evaluation.table import describe

SMALL = (parse_fraction("1/510"),)  # at which some stand
EPS = tuple(map(parse_fraction, ("8/255", "1/255", "3/255")))


@pytest.fixture
def attacked(monkeypatch):
    """(attack, samples) of each call of an attack."""
    calls, run = [], ensemble.run_attacks
    monkeypatch.setattr(
        ensemble,
        "run_attacks",
        lambda logits, images, labels, seeds, names, *more: (
            calls.append((*names, len(images))) or run(logits, images, labels, seeds, names, *more)
        ),
    )
    return calls


@pytest.fixture
def asked(monkeypatch):
    """The sizes of the batches that the model was asked about. Call its `at(n, what)` to do something at the n-th."""

    class Asked(list):
        todo = {}

        def at(self, n, what):
            self.todo = {n: what}

    sizes, logits = Asked(), model.EvaluatedModel.logits

    def counted(self, head):
        ask = logits(self, head)

        def call(images):
            sizes.append(len(images))
            sizes.todo.get(len(sizes), lambda: None)()
            return ask(images)

        return call

    monkeypatch.setattr(model.EvaluatedModel, "logits", counted)
    return sizes


def test_what_fell_at_a_smaller_radius_has_fallen_at_a_larger_one(colours, measure, attacked, tmp_path):
    (entry,) = measure(colours, tmp_path / "nested", eps=EPS, iters=2)["datasets"]
    nested = sum(n for *_, n in attacked)
    attacked.clear()
    found = measure(colours, tmp_path / "independent", eps=EPS, iters=2, independent_radii=True)
    (independent,) = found["datasets"]
    assert nested < sum(n for *_, n in attacked)
    assert list(entry["eps"]) == list(independent["eps"]) == ["8/255", "1/255", "3/255"], "in the order asked for"
    assert entry["key"] != independent["key"] and found["settings"]["independent_radii"] is True
    small, middle, large = (entry["samples"]["eps"][eps] for eps in ("1/255", "3/255", "8/255"))
    assert "fell_at" not in small and small == independent["samples"]["eps"]["1/255"]
    fell = [by is not None for by in small["broken_by"]]
    assert sum(fell) == sum(at is not None for at in middle["fell_at"]) == entry["eps"]["3/255"]["fell_at_smaller"] > 0
    assert {at for at in large["fell_at"] if at} == {"1/255", "3/255"}
    for i, at in enumerate(large["fell_at"]):
        if at is not None:
            assert large["broken_by"][i] == entry["samples"]["eps"][at]["broken_by"][i] is not None
            assert large["prediction"][i] == entry["samples"]["eps"][at]["prediction"][i]
    for eps in ("3/255", "8/255"):
        ours, theirs = entry["samples"]["eps"][eps]["robust"], independent["samples"]["eps"][eps]["robust"]
        assert all(stands <= stood for stands, stood in zip(ours, theirs)) and sum(theirs) - sum(ours) <= 1


def test_each_attack_takes_full_chunks_of_what_stands(colours, measure, attacked):
    (entry,) = measure(colours, attacks=("pgd", "apgd-ce"), batch_size=5, iters=2, eps=SMALL)["datasets"]
    by = entry["samples"]["eps"]["1/510"]["broken_by"]
    right = sum(entry["samples"]["clean"])
    for attack, n in (("pgd", right), ("apgd-ce", right - by.count("pgd"))):
        sizes = [size for name, size in attacked if name == attack]
        assert sizes == [5] * (n // 5) + ([n % 5] if n % 5 else []) and n > 5


def stop_and_go_on(measure, colours, asked, at, **settings):
    """The results of an evaluation that was stopped at the model's question number `at`, and what was asked since."""
    interruption = Interruption()
    asked.clear()
    asked.at(at, lambda: setattr(interruption, "signal", "SIGUSR2"))
    with pytest.raises(RunError, match="stopped by SIGUSR2; what is measured is kept"):
        measure(colours, interruption=interruption, **settings)
    assert len(asked) == at, "the next question was not asked"
    asked.clear()
    asked.at(0, None)
    return measure(colours, **settings), len(asked)


def test_a_chunk_that_was_stopped_goes_on_where_it_was(colours, measure, asked, tmp_path):
    settings = {"attacks": ("apgd-ce", "square"), "iters": 30, "queries": 60, "n_samples": 16, "eps": SMALL}
    undisturbed = measure(colours, tmp_path / "undisturbed", **settings)
    whole = len(asked)
    for at in (20, whole // 2):
        found, more = stop_and_go_on(measure, colours, asked, at, out=tmp_path / f"{at}", **settings)
        assert strip_seconds(found["datasets"]) == strip_seconds(undisturbed["datasets"])
        assert more < whole - at + 10, "but for clean passes, nothing is asked again"
        assert not (tmp_path / f"{at}" / partial_results.FOLDER).exists()


def test_a_process_that_is_killed_loses_no_more_than_the_last_minutes(colours, measure, asked, tmp_path, monkeypatch):
    monkeypatch.setattr(chunk_memory, "SAVE_EVERY_S", 0.0)
    settings = {"attacks": ("apgd-ce",), "iters": 30, "n_samples": 16, "eps": SMALL}
    undisturbed = measure(colours, tmp_path / "undisturbed", **settings)
    asked.clear()

    def killed():
        raise KeyboardInterrupt

    asked.at(20, killed)
    with pytest.raises(KeyboardInterrupt):
        measure(colours, **settings)
    asked.clear()
    asked.at(0, None)
    found = measure(colours, **settings)
    assert len(asked) < 30 and strip_seconds(found["datasets"]) == strip_seconds(undisturbed["datasets"])


def test_a_damaged_memory_costs_the_chunk_and_a_line(colours, measure, asked, tmp_path):
    settings = {"attacks": ("apgd-ce",), "iters": 4, "n_samples": 8, "eps": SMALL}
    undisturbed = measure(colours, tmp_path / "undisturbed", **settings)
    interruption, said = Interruption(), []
    asked.clear()
    asked.at(5, lambda: setattr(interruption, "signal", "SIGUSR2"))
    with pytest.raises(RunError):
        measure(colours, interruption=interruption, **settings)
    (memory,) = (tmp_path / "out" / partial_results.FOLDER).glob(f"*{partial_results.MEMORY}")
    assert memory.stat().st_mode == next(memory.parent.glob("*.jsonl")).stat().st_mode, "a colleague may go on"
    memory.write_bytes(memory.read_bytes()[:100])
    found = measure(colours, say=said.append, **settings)
    assert [line for line in said if "is damaged" in line and "begins anew" in line]
    assert strip_seconds(found["datasets"]) == strip_seconds(undisturbed["datasets"])


def test_a_full_disk_costs_the_chunk_and_a_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(chunk_memory, "save_tensors", full)
    said, path = [], tmp_path / "memory.safetensors"
    memory = chunk_memory.ChunkMemory(path, said.append)
    assert memory.batch(torch.tensor([3, 4]), lambda _: {"row": 1}) == {"row": 1}

    def stopped(_):
        raise StoppedWithin

    with pytest.raises(StoppedWithin):
        memory.batch(torch.tensor([5]), stopped)
    assert said == [f"'{path}': cannot write it (No space left on device); this chunk's attack will begin anew"]


def test_partial_results_of_an_earlier_version_are_measured_again_with_a_line(colours, measure, tmp_path):
    """They held a chunk under all attacks at once."""
    interruption, said = Interruption(), []
    settings = {"attacks": ("pgd",), "iters": 1}
    undisturbed = measure(colours, tmp_path / "undisturbed", **settings)
    interruption.signal = "SIGTERM"
    with pytest.raises(RunError):
        measure(colours, interruption=interruption, **settings)
    folder = tmp_path / "out" / partial_results.FOLDER
    folder.mkdir(parents=True)  # the one that was stopped had nothing to leave
    key = undisturbed["datasets"][0]["key"]
    row = {"part": "colours 4/255", "chunk": 0, "ids": [0], "left_out": [], "broken_by": ["pgd"], "prediction": [0]}
    row = json.dumps(row | {"crc32": zlib.crc32(json.dumps(row, sort_keys=True).encode())})
    (folder / f"colours-{key}.0-host-1.jsonl").write_text(f"{row}\n")
    found = measure(colours, say=said.append, **settings)
    told = f"colours 4/255: 1 chunks in '{folder}' are of an earlier version; they are measured again"
    assert told in said and strip_seconds(found["datasets"]) == strip_seconds(undisturbed["datasets"])


@pytest.mark.slow
def test_the_checks_of_sanity_heed_a_signal_and_are_made_when_it_goes_on(colours, measure, asked, tmp_path):
    settings = {"attacks": ("pgd",), "iters": 1, "n_samples": 8, "sanity": True}
    undisturbed = measure(colours, tmp_path / "undisturbed", **settings)
    asked.clear()
    measure(colours, tmp_path / "without", **settings | {"sanity": False})
    found, _ = stop_and_go_on(measure, colours, asked, len(asked) + 20, **settings)
    assert strip_seconds(found["datasets"]) == strip_seconds(undisturbed["datasets"])


def test_compiled_forwards_find_what_others_find_and_the_results_say_so(measure, colours, tmp_path, monkeypatch):
    plain = measure(colours, out=tmp_path / "plain", eps=SMALL)
    asked = []
    monkeypatch.setattr(fused, "_graphs", {})
    monkeypatch.setattr(
        torch,
        "compile",
        lambda function, **_: (
            lambda first, *others: asked.append((function.__name__, len(first))) or function(first, *others)
        ),
    )
    quick = measure(colours, out=tmp_path / "compiled", eps=SMALL, compile=True)
    assert len(set(asked)) > 2, "the batches shrink as samples fall"
    assert {"compute", "_climbed"} < {name for name, _ in asked}, "the tower and the attacks' arithmetic"
    assert quick["settings"] == {**plain["settings"], "compile": True} and quick["compiled"] is True
    assert "float32 compiled" in describe(quick) and "compiled" not in describe(plain)
    for one, other in zip(plain["datasets"], quick["datasets"]):
        assert one["samples"] == other["samples"] and one["key"] != other["key"]
    for row in compare_all([tmp_path / "plain", tmp_path / "compiled"])[1::2]:
        assert row.difference["difference"] == 0


def test_results_do_not_say_compiled_where_a_part_was_not(measure, colours, tmp_path, monkeypatch):
    def compile(function, **_):
        def run(*given):
            if function.__name__ == "compute":
                return function(*given)
            raise TorchDynamoException("no kernel")

        return run

    monkeypatch.setattr(fused, "_graphs", {})
    monkeypatch.setattr(torch, "compile", compile)
    found = measure(colours, out=tmp_path, eps=SMALL, compile=True)
    assert found["compiled"] is False and "not compiled as asked" in describe(found)


def test_results_do_not_say_compiled_where_no_batch_came_that_a_graph_is_for(measure, colours, tmp_path, monkeypatch):
    monkeypatch.setattr(fused, "_graphs", {})
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    found = measure(colours, out=tmp_path, eps=SMALL, compile=True, batch_size=1)
    assert found["compiled"] is False and "not compiled as asked" in describe(found)
