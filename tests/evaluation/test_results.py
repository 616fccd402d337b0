"""results.json and its partial results: whole or not there, the user's own files left alone, damage is one line."""

import errno
import json
import os

import pytest
from tiny_datasets import write

from mmtard import losses
from mmtard.errors import RunError, UserError
from mmtard.evaluation import evaluate, model, partial_results, results, table
from mmtard.evaluation.compare import compare_all


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write(tmp_path_factory.mktemp("small") / "small", 8, size=(8, 8))


def test_a_folder_of_the_users_own_is_left_as_it_is(small, measure, tmp_path):
    own = tmp_path / "out" / partial_results.FOLDER
    own.mkdir(parents=True)
    for name in ("thesis.txt", "notes.jsonl", "small-notes.jsonl"):
        (own / name).write_text("mine")
    measure(small, attacks=("pgd",), iters=1)
    assert {p.name: p.read_text() for p in own.iterdir()} == {
        name: "mine" for name in ("thesis.txt", "notes.jsonl", "small-notes.jsonl")
    }


def test_a_results_json_of_the_users_own_is_refused_and_stays(small, measure, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text('{"mine": 1}')
    with pytest.raises(UserError, match="--out: '.*results.json' has format None, .*; remove it, or choose another"):
        measure(small)
    assert (tmp_path / "out" / "results.json").read_text() == '{"mine": 1}'


DAMAGE = [
    lambda d: d["datasets"][0].pop("key"),
    lambda d: d["datasets"][0].update(samples=3),
    lambda d: d["datasets"].append(None),
    lambda d: d.update(datasets={}),
    lambda d: d.update(settings=[]),
    lambda d: d.pop("model"),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_results_are_one_line(tmp_path, damage):
    entry = {
        "name": "small",
        "kind": "zeroshot",
        "key": "k",
        "fingerprint": "f",
        "eps": {},
        "samples": {},
        "health": [],
    }
    found = {"format": 2, "protocol": "quick", "model": {}, "settings": {}, "datasets": [entry], "averages": {}}
    damage(found)
    path = tmp_path / "out" / "results.json"
    path.parent.mkdir()
    path.write_text(json.dumps(found))
    with pytest.raises(UserError, match="--out: '.*results.json' is damaged: .*; remove it, or choose another folder"):
        evaluate._stored(tmp_path / "out")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[" * 100_000, b"", b"{", b"null", b'"text"'])
def test_bytes_that_are_no_results_are_one_line(tmp_path, content):
    (tmp_path / "results.json").write_bytes(content)
    for read in (results.read, lambda path: compare_all([path, path])):
        with pytest.raises(UserError, match="results.json' (is not JSON|has format None)"):
            read(tmp_path)


def test_a_damaged_partial_line_is_measured_again_and_takes_no_other_with_it(small, measure, ranks, tmp_path):
    said, key = [], "0" * 16
    first = partial_results.PartialResults(tmp_path, "small", key, ranks)
    for chunk in range(3):
        first.add("small clean", chunk, {"ids": [chunk], "prediction": [chunk], "left_out": []})
    first.close()
    (path,) = partial_results.own_files(tmp_path / partial_results.FOLDER)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1].replace(b'"prediction": [1]', b'"prediction": [3]') + b"\xff\xfe\n" + lines[2])
    again = partial_results.PartialResults(tmp_path, "small", key, ranks, said.append)
    assert again.mine("small clean", 3) == ([1], 1) and "damaged lines" in said[-1]


def test_a_full_disk_is_one_line_and_leaves_no_scratch(small, measure, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(results, "write_text", full)
    with pytest.raises(UserError, match="--out: cannot write '.*results.json': No space left on device; free space"):
        measure(small, attacks=("pgd",), iters=1)
    assert [p.name for p in (tmp_path / "out").iterdir()] == [partial_results.FOLDER]
    monkeypatch.undo()
    monkeypatch.setattr(partial_results.os, "fsync", full)
    with pytest.raises(RunError, match="--out: cannot write to '.*partial': No space left on device; free space"):
        measure(small, tmp_path / "other", attacks=("pgd",), iters=1)


def test_the_mean_over_a_range_of_radii_is_the_area_under_the_curve_over_the_largest():
    def at(accuracy):
        return {"robust": {"accuracy": accuracy}}

    area = results.robust_area({"accuracy": 0.8}, {"4/255": at(0.2), "2/255": at(0.6)})
    # (0.8 + 0.6) / 2 over the first half, (0.6 + 0.2) / 2 over the second: (0.7 + 0.4) / 2
    assert area["accuracy"] == pytest.approx(0.55) and (area["from"], area["to"], area["radii"]) == ("0", "4/255", 2)
    assert results.robust_area({"accuracy": 0.8}, {"2/255": at(0.6)}) is None


def test_names_of_others_are_shown_as_they_are(small, measure, tmp_path, capsys):
    folder = write(
        tmp_path / "[red]set", 8, size=(8, 8), classes={"[/green]": 0, "[bold]x": 1, ":smile:": 2, "d": None}
    )
    found = measure(folder, attacks=("pgd",), iters=1, eps=tuple(results.parse_fraction(f"{e}/255") for e in (1, 2)))
    worst = found["datasets"][0]["eps"]["1/255"]["worst_class"]["name"]
    capsys.readouterr()
    table.show(found | {"model": found["model"] | {"weights": "runs/[red]x"}})
    printed = capsys.readouterr().out
    assert "[red]set" in printed and worst in printed and printed.startswith("runs/[red]x")
    assert "0 to 2/255" in printed and "mean over eps" in printed


def test_a_sample_whose_logits_are_not_finite_is_no_prediction(small, measure, monkeypatch, capsys):
    """The largest of some NaN is class 0: half of the samples of a broken model would be right."""
    logits = model.EvaluatedModel.logits

    def broken(self, head):
        right = logits(self, head)
        return lambda images: right(images).masked_fill(images.mean((1, 2, 3))[:, None] > 0.55, float("nan"))

    monkeypatch.setattr(model.EvaluatedModel, "logits", broken)
    found = measure(small, attacks=("pgd",), iters=1)
    (entry,) = found["datasets"]
    bad = [k for k, p in enumerate(entry["samples"]["clean_prediction"]) if p == losses.NO_CLASS]
    assert 0 < len(bad) < 8 and not any(entry["samples"]["clean"][k] for k in bad)
    (line,) = [line for line in entry["health"] if line["check"] == "finite logits"]
    assert (
        line["status"] == "FAIL"
        and f"{len(bad)} of 8 clean images with NaN or infinite logits; they count as wrong (0.tar/s00"
        in line["detail"]
    )


def test_a_number_that_was_changed_is_damage_and_files_without_a_digest_are_read(tmp_path):
    found = {"format": results.FORMAT, "protocol": "quick", "model": {}, "settings": {}, "averages": {}}
    found |= {"datasets": [{"name": "a", "clean": {"accuracy": 0.75}}]}
    path = results.write(found, tmp_path)
    assert results.read(tmp_path) == found
    whole = path.read_text()
    path.write_text(whole.replace("0.75", "0.95"))
    with pytest.raises(UserError, match=r"results.json' is damaged: its content does not fit its digest, .*restore it"):
        results.read(tmp_path)
    path.write_text(json.dumps(found))
    assert results.read(tmp_path) == found


def test_a_pipe_in_the_place_of_results_is_one_line(tmp_path):
    os.mkfifo(tmp_path / "results.json")
    with pytest.raises(UserError, match="results.json' is a pipe or a device; give a results.json"):
        results.read(tmp_path)
