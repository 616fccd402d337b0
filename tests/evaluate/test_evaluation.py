"""`mmtard evaluate`: equal to open_clip's own zero-shot classifier, the same at every batch size, never stale, taken up after a kill."""

import json
import re
from fractions import Fraction

import numpy as np
import open_clip
import pytest
import torch
import webdataset as wds
from tiny_datasets import COLOURS, write

from mmtard import towers
from mmtard.config import Model, parse_fraction
from mmtard.errors import RunError, UserError
from mmtard.evaluate import chunks, health, progress, results, retrieval, suite, zeroshot
from mmtard.evaluate.compare import compare
from mmtard.preempt import REQUEUE, Interruption
from mmtard.quickstart.pretrain import ARCHITECTURE

TEMPLATES = ("a photo of a {}", "an image of a {}")


def flags(found, eps="4/255"):
    (entry,) = found["datasets"]
    return entry["samples"]["clean"], entry["samples"]["eps"][eps]["robust"]


def test_clean_accuracy_is_that_of_open_clips_own_zero_shot_classifier(exported, colours, measure):
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{exported}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{exported}")
    model.eval()
    classifier = open_clip.build_zero_shot_classifier(model, tokenizer, list(COLOURS), [lambda c, t=t: t.format(c) for t in TEMPLATES])
    shards = [str(p) for p in (colours / "test").glob("*.tar")]
    images, labels = zip(*wds.WebDataset(shards, shardshuffle=False).decode("pil").to_tuple("png", "cls"))
    with torch.no_grad():
        logits = model.encode_image(torch.stack([preprocess(i) for i in images]), normalize=True) @ classifier
    theirs = (logits.argmax(1) == torch.tensor(labels)).tolist()
    found = measure(colours, templates=TEMPLATES, attacks=("pgd",), iters=1)
    (entry,) = found["datasets"]
    assert flags(found)[0] == theirs and entry["clean_all"] == entry["clean"]
    assert entry["clean_all"]["accuracy"] == np.mean(theirs) and 0 < sum(theirs) < len(theirs)
    assert entry["chance"] == 0.25 and entry["name"] == "colours" and entry["templates"] == list(TEMPLATES)


def test_what_stands_after_each_attack_adds_up_and_is_written_as_it_is_returned(colours, measure, tmp_path):
    found = measure(colours, eps=(parse_fraction("1/255"), parse_fraction("64/255")), n_samples=24)
    (entry,) = found["datasets"]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(found))
    samples = entry["samples"]
    assert len(samples["ids"]) == len(set(samples["ids"])) == entry["clean"]["n"] == 24 and entry["n_total"] == entry["clean_all"]["n"] == 48
    assert np.bincount(samples["labels"]).tolist() == [6, 6, 6, 6]
    for eps in ("1/255", "64/255"):
        at, per_sample = entry["eps"][eps], samples["eps"][eps]
        clean, by = np.array(samples["clean"]), np.array(per_sample["broken_by"], dtype=object)
        assert not clean[by != None].tolist().count(False), "only what is right without attack can be broken"  # noqa: E711
        assert at["attacks"]["pgd"]["accuracy"] == np.mean(clean & (by != "pgd"))
        assert at["attacks"]["apgd-ce"]["accuracy"] == at["robust"]["accuracy"] == np.mean(clean & (by == None)) == np.mean(per_sample["robust"])  # noqa: E711
        by_class = [np.mean(np.array(per_sample["robust"])[np.array(samples["labels"]) == k]) for k in range(4)]
        assert at["worst_class"] == {"name": list(COLOURS)[int(np.argmin(by_class))], "accuracy": min(by_class), "n": 6}
    assert entry["eps"]["64/255"]["robust"]["accuracy"] < entry["eps"]["1/255"]["robust"]["accuracy"]
    assert found["averages"]["all"]["eps"]["1/255"]["robust"] == entry["eps"]["1/255"]["robust"]["accuracy"]
    assert {"largest perturbation", "range", "NaN", "monotone in eps"} <= {line["check"] for line in entry["health"]}


def test_batch_size_changes_no_sample(colours, measure, tmp_path):
    """A mean-reduced loss, or a lost logit scale, makes robust accuracy rise with the batch."""
    by_size = [measure(colours, tmp_path / str(b), batch_size=b, n_samples=20)["datasets"][0]["samples"] for b in (1, 7, 64)]
    assert by_size[0] == by_size[1] == by_size[2] and any(by_size[0]["clean"])


def test_class_ordered_shards_give_a_sample_of_every_class(exported, measure, tmp_path):
    """The first n, or a shuffle over a short buffer, would take the first classes alone."""
    ordered = write(tmp_path / "ordered", 40, label=lambda i, n: i * n // 40)
    entry = measure(ordered, n_samples=8, iters=1)["datasets"][0]
    assert np.bincount(entry["samples"]["labels"], minlength=4).tolist() == [2, 2, 2, 2] and len(entry["samples"]["ids"]) == 8


def test_results_of_other_weights_data_or_settings_are_never_taken_for_these(colours, measure, exported, tmp_path, monkeypatch):
    first, said = measure(colours), []
    monkeypatch.setattr(suite, "run", None)  # measuring again would fail
    monkeypatch.setattr(towers.Clip, "class_embeddings", None)
    assert measure(colours, say=said.append) == first and said == [f"'{tmp_path / 'out'}' holds these results already; remove it to measure them again"]
    monkeypatch.undo()
    other = tmp_path / "other"
    towers.load(Model(arch=str(ARCHITECTURE), weights="random"), seed=4).save(other)
    changed = write(tmp_path / "changed" / "colours", 47)
    # 1/255 and 1.5/255 are the same whole number of pixels: results keyed by it would be taken for the other's.
    for again in ({"model": other}, {"root": changed}, {"eps": (Fraction(3, 510),)}, {"eps": (parse_fraction("1/255"),)}, {"seed": 1}, {"norm": "l2"}):
        said = []
        found = measure(**{"root": colours, "say": said.append, **again})
        assert any("colours" in line and "will be replaced" in line for line in said), again
        assert found["datasets"][0]["key"] != first["datasets"][0]["key"]


def test_an_added_dataset_leaves_the_others_as_they_are(colours, measure, tmp_path, monkeypatch):
    root = tmp_path / "root"
    root.mkdir()
    (root / "colours").symlink_to(colours)
    first = measure(root)
    write(root / "more", 8)
    measured = []
    run = zeroshot.measure
    monkeypatch.setattr(zeroshot, "measure", lambda *args: measured.append(args[5]) or run(*args))
    found = measure(root)
    assert measured == ["more"] and [d["name"] for d in found["datasets"]] == ["colours", "more"] and found["datasets"][0] == first["datasets"][0]


def test_fewer_datasets_are_asked_for_and_none_is_lost(colours, measure, tmp_path, monkeypatch):
    root = tmp_path / "root"
    root.mkdir()
    (root / "colours").symlink_to(colours)
    write(root / "more", 8)
    both = measure(root, iters=1)
    monkeypatch.setattr(zeroshot, "measure", None)
    assert measure(root, wanted=["more"], iters=1)["datasets"] == both["datasets"]
    assert results.read(tmp_path / "out") == json.loads(json.dumps(both))


def test_an_interrupted_evaluation_keeps_what_it_measured_and_ends_with_the_same_numbers(colours, measure, tmp_path, monkeypatch):
    undisturbed = measure(colours, tmp_path / "undisturbed", batch_size=8)
    interruption, calls, said, run = Interruption(), [], [], suite.run

    def stopped_after_two(*args):
        calls.append(1)
        interruption.signal = "SIGTERM" if len(calls) == 2 else interruption.signal
        return run(*args)

    monkeypatch.setattr(suite, "run", stopped_after_two)
    with pytest.raises(RunError, match="stopped by SIGTERM; what is measured is kept in '.*out', start it again") as end:
        measure(colours, batch_size=8, interruption=interruption)
    assert end.value.status == REQUEUE and not (tmp_path / "out" / "results.json").exists()
    (partial,) = (tmp_path / "out" / progress.FOLDER).iterdir()
    partial.write_text(partial.read_text() + '{"part": "colours 4/255", "chu')  # as a kill leaves it
    found = measure(colours, batch_size=8, say=said.append)
    attacked = -(-sum(flags(undisturbed)[0]) // 8)
    assert len(calls) == attacked and f"colours: goes on, {6 + 2} chunks are done" in said
    timeless = [strip_seconds(r["datasets"][0]) for r in (found, undisturbed)]
    assert timeless[0] == timeless[1] and not (tmp_path / "out" / progress.FOLDER).exists()


def strip_seconds(entry):
    return json.loads(json.dumps(entry), object_hook=lambda d: {k: v for k, v in d.items() if k != "seconds"})


def test_partial_results_of_other_settings_are_dropped_with_a_line(ranks, tmp_path):
    folder, said = tmp_path / progress.FOLDER, []
    folder.mkdir()
    row = json.dumps({"part": "colours clean", "chunk": 0})
    for name in (f"colours-{'0' * 16}", f"colours-{'1' * 16}", f"colours-2-{'0' * 16}"):
        (folder / f"{name}.0-host-1.jsonl").write_text(f"{row}\n")
    found = progress.Progress(tmp_path, "colours", "1" * 16, ranks, said.append)
    assert found.mine("colours clean", 3) == ([1, 2], 2)
    assert said == [
        f"colours: the partial results in '{folder}' are of another model, data or settings; they are removed, it starts anew",
        "colours: goes on, 1 chunks are done",
    ]
    assert sorted(p.name[:12] for p in folder.iterdir()) == ["colours-1111", "colours-2-00"]


def test_labels_beyond_the_class_names_are_refused(measure, tmp_path):
    folder = write(tmp_path / "few", 8)
    (folder / "classnames.txt").write_text("red\ngreen\n")
    with pytest.raises(UserError, match="2 names, but 'few' has label 3"):
        measure(folder)


def test_an_attack_that_leaves_its_ball_fails_the_command_after_it_wrote(colours, exported, tmp_path, monkeypatch, capsys, command):
    run = suite.run

    def outside(*args):
        outcome = run(*args)
        outcome.facts.largest_perturbation = 0.1
        return outcome

    monkeypatch.setattr(suite, "run", outside)
    words = ["--attacks", "pgd", "--iters", 2, "--workers", 0, "--device", "cpu", "--out", tmp_path / "out"]
    assert command("evaluate", exported, "--data", colours, *words) == 1
    printed = capsys.readouterr().out
    assert "FAIL colours: largest perturbation" in printed and results.read(tmp_path / "out")["datasets"][0]["health"][0]["status"] == "FAIL"


def test_the_costly_checks_see_every_class_and_are_not_made_twice(measure, tmp_path, monkeypatch):
    seen = []

    def sanity(model, images, labels, seeds, settings, source):
        seen.append((labels.tolist(), settings.eps))
        return [{"check": "batch size", "status": "WARN", "detail": "differs"}]

    monkeypatch.setattr(health, "sanity", sanity)
    monkeypatch.setattr(health, "SANITY_SAMPLES", 2)
    ordered = write(tmp_path / "ordered", 40, label=lambda i, n: i * n // 40)
    (entry,) = measure(ordered, iters=1, sanity=True)["datasets"]
    right = {y for y, clean in zip(entry["samples"]["labels"], entry["samples"]["clean"]) if clean}
    assert len(seen) == 1 and seen[0][1] == 4 / 255 and len(seen[0][0]) == 2 and len(set(seen[0][0])) == min(2, len(right))
    assert entry["health"][-1]["check"] == "batch size"


def test_sanity_is_added_to_what_is_measured_and_stays(measure, tmp_path, monkeypatch):
    """With --sanity a finished evaluation is the same one: its attacks, of hours, are not made again, nor is it another's pair."""
    write(tmp_path / "root" / "colours", 24)
    write(tmp_path / "root" / "flickr", 6, captions=lambda i: f"a picture {i}")
    (tmp_path / "root" / "flickr" / "dataset_type.txt").write_text("retrieval\n")
    root, out, said = tmp_path / "root", tmp_path / "out" / "results.json", []
    at_once = measure(root, tmp_path / "at once", sanity=True)
    plain = measure(root)
    assert plain["settings"] == at_once["settings"] and [d["sanity"] for d in plain["datasets"]] == [False, False]
    compare(tmp_path / "at once", tmp_path / "out")
    for module, name in ((zeroshot, "measure"), (retrieval, "measure"), (suite, "run")):
        monkeypatch.setattr(module, name, None)  # measuring again would fail
    added = measure(root, sanity=True, say=said.append)
    assert "colours: is measured, the checks of --sanity are added" in said and not any("replaced" in line for line in said)
    assert [strip_seconds(d) for d in added["datasets"]] == [strip_seconds(d) for d in at_once["datasets"]]
    assert added["datasets"][0]["health"][: len(plain["datasets"][0]["health"])] == plain["datasets"][0]["health"] and added["datasets"][0]["sanity"]
    monkeypatch.setattr(zeroshot, "sanity", None)
    for sanity in (True, False):
        before = out.read_bytes(), out.stat().st_mtime_ns
        assert measure(root, sanity=sanity, say=said.append) == json.loads(before[0]) == json.loads(json.dumps(added))
        assert "holds these results already" in said[-1] and (out.read_bytes(), out.stat().st_mtime_ns) == before


def test_sanity_belongs_into_the_same_folder(colours, exported, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(health, "sanity", lambda *_: [{"check": "batch size", "status": "PASS", "detail": "all agree"}])
    words = ["evaluate", exported, "--data", colours, "--attacks", "pgd", "--iters", 1, "--workers", 0, "--device", "cpu"]
    assert command(*words) == command(*words, "--sanity") == 0
    (out,) = (tmp_path / "evaluations").iterdir()
    (entry,) = results.read(out)["datasets"]
    assert entry["sanity"] and entry["health"][-1]["check"] == "batch size"


def test_sanity_of_a_model_that_is_never_right_has_nothing_to_check(measure, tmp_path):
    noise = dict.fromkeys(COLOURS)  # images do not depend on their labels
    (entry,) = measure(write(tmp_path / "right", 4, classes=noise), iters=1)["datasets"]
    wrong = write(tmp_path / "wrong", 4, classes=noise, label=lambda i, n: (entry["samples"]["clean_prediction"][i] + 1) % n)
    said = []
    (entry,) = measure(wrong, tmp_path / "other", iters=1, sanity=True)["datasets"]
    assert entry["health"] == [zeroshot.NOTHING_ATTACKED] and entry["sanity"]
    measure(wrong, tmp_path / "other", iters=1, sanity=True, say=said.append)
    assert "holds these results already" in said[-1]


def test_a_transfer_attack_follows_the_other_models_gradients(colours, measure, exported, tmp_path):
    other = tmp_path / "other"
    towers.load(Model(arch=str(ARCHITECTURE), weights="random"), seed=4).save(other)
    asked = {"attacks": ("transfer",), "iters": 10, "eps": (parse_fraction("8/255"),)}
    own, transferred = (measure(colours, tmp_path / str(i), transfer_from=Model(weights=str(m)), **asked) for i, m in enumerate((exported, other)))
    broken = [sum(b is not None for b in found["datasets"][0]["samples"]["eps"]["8/255"]["broken_by"]) for found in (own, transferred)]
    assert broken[1] < broken[0], "another model's gradients are worse than one's own"
    assert [found["settings"]["transfer_from"]["weights"] for found in (own, transferred)] == [str(exported), str(other)]
    assert own["datasets"][0]["key"] != transferred["datasets"][0]["key"]


def test_the_activation_stands_in_the_results_and_another_is_refused(colours, measure, tmp_path):
    """The same weights under the other GELU are another, worse model, which looks more robust or less."""
    folder = tmp_path / "quick"
    towers.load(Model(arch=str(ARCHITECTURE), weights="random", quick_gelu=True), seed=3).save(folder)
    assert measure(colours, model=folder, attacks=("pgd",), iters=1)["model"]["quick_gelu"] is True
    with pytest.raises(UserError, match="quick_gelu: False, but .* was trained with quick_gelu True"):
        measure(colours, tmp_path / "other", model=Model(weights=str(folder), quick_gelu=False))


def test_the_speed_and_the_time_left_are_told(colours, measure, monkeypatch):
    monkeypatch.setattr(chunks, "SAY_EVERY_S", 0.0)
    said = []
    measure(colours, attacks=("pgd",), iters=1, batch_size=16, say=said.append)
    assert re.fullmatch(r"colours clean: 16/48 samples  [\d.e+]+ images/s  left \d+ s", said[0]) and said[2].startswith("colours clean: 48/48")


def test_an_unknown_attack_is_refused_before_anything_is_measured(colours, measure):
    with pytest.raises(UserError, match="unknown attack 'pdg'; known: apgd-ce"):
        measure(colours, attacks=("pdg",))
