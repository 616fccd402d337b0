"""`mmtard evaluate` equals open_clip's zero-shot classifier, at every batch size; it is never stale, and goes on."""

import json
import re
import shutil
import threading
import zlib
from datetime import timedelta
from fractions import Fraction

import numpy as np
import open_clip
import pytest
import torch
import webdataset as wds
from tiny_datasets import COLOURS, strip_seconds, write

from mmtard.attacks import ensemble
from mmtard.config import Model, parse_fraction
from mmtard.distributed.interruption import EXIT_REQUEUE, Interruption
from mmtard.errors import RunError, UserError
from mmtard.evaluation import chunks, partial_results, results, zeroshot
from mmtard.examples.pretrain import ARCHITECTURE
from mmtard.models import clip, loading
from mmtard.training import probe_process as probe

TEMPLATES = ("a photo of a {}", "an image of a {}")


def flags(found, eps="4/255"):
    (entry,) = found["datasets"]
    return entry["samples"]["clean"], entry["samples"]["eps"][eps]["robust"]


def test_clean_accuracy_is_that_of_open_clips_own_zero_shot_classifier(exported, colours, measure):
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{exported}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{exported}")
    model.eval()
    classifier = open_clip.build_zero_shot_classifier(
        model, tokenizer, list(COLOURS), [lambda c, t=t: t.format(c) for t in TEMPLATES]
    )
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


def edited(folder, to, **preprocess):
    """A copy of an exported folder, over an earlier one, with other settings of its preprocessing."""
    shutil.copytree(folder, to, dirs_exist_ok=True)
    cfg = json.loads((to / clip.CONFIG_FILE).read_text())
    cfg["preprocess_cfg"] |= preprocess
    (to / clip.CONFIG_FILE).write_text(json.dumps(cfg))
    return to


@pytest.mark.parametrize(
    "way",
    [{"resize_mode": "squash"}, {"resize_mode": "squash", "interpolation": "bilinear"}, {"interpolation": "bilinear"}],
)
def test_images_are_resized_as_the_model_was_trained_to_see_them(exported, measure, tmp_path, monkeypatch, way):
    """SigLIP squashes, CLIPA squashes bilinearly: a bicubic centre crop is not what open_clip measures."""
    folder = edited(exported, tmp_path / "model", **way)
    as_open_clip_shows_them(measure, folder, write(tmp_path / "wide", 12, size=(40, 70)), monkeypatch)


@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_a_model_of_images_that_are_no_squares_sees_them_as_they_are(measure, tmp_path, monkeypatch, mode):
    arch = json.loads(ARCHITECTURE.read_text())
    arch["vision_cfg"]["image_size"] = [32, 48]
    (tmp_path / "tests-wide-evaluated.json").write_text(json.dumps(arch))
    folder = tmp_path / "folder"
    loading.load_clip(Model(arch=str(tmp_path / "tests-wide-evaluated.json"), weights="random"), seed=3).save(folder)
    edited(folder, folder.with_name("model"), resize_mode=mode)
    dataset = write(tmp_path / "wide", 12, size=(40, 70))
    entry = as_open_clip_shows_them(measure, folder.with_name("model"), dataset, monkeypatch)
    assert entry["perturbed_size"] == [32, 48]


def as_open_clip_shows_them(measure, folder, dataset, monkeypatch):
    """Measure, and compare the attacked images with open_clip's own; the entry of the results."""
    seen, run = [], ensemble.run_attacks
    monkeypatch.setattr(
        ensemble, "run_attacks", lambda model, images, *args: seen.append(images) or run(model, images, *args)
    )
    (entry,) = measure(dataset, model=folder, attacks=("pgd",), iters=1)["datasets"]
    preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")[2]
    shard = wds.WebDataset([str(dataset / "test" / "0.tar")], shardshuffle=False).decode("pil")
    normalised = {key: preprocess(image) for key, image in shard.to_tuple("__key__", "png")}
    theirs = torch.stack(
        [normalised[key] for key, right in zip(entry["samples"]["keys"], entry["samples"]["clean"]) if right]
    )
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (preprocess.transforms[-1].mean, preprocess.transforms[-1].std))
    assert len(theirs) and torch.allclose(torch.cat(seen), theirs * std + mean, atol=1e-6)
    return entry


def test_a_way_of_resizing_that_is_not_known_ends_it_with_its_name(exported, colours, measure, tmp_path):
    folder = edited(exported, tmp_path / "model", resize_mode="longest")
    with pytest.raises(
        UserError, match="model: its images are resized by resize_mode 'longest'; shortest and squash are known"
    ):
        measure(colours, model=folder)


@pytest.fixture
def tf32():
    """TF32 allowed everywhere, as a user's environment may have it: the two kinds of operations that may use it."""
    kinds = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [kind.fp32_precision for kind in kinds]
    for kind in kinds:
        kind.fp32_precision = "tf32"
    yield kinds
    for kind, precision in zip(kinds, before):
        kind.fp32_precision = precision


def test_nothing_is_rounded_to_tf32_while_it_is_measured(colours, measure, exported, tf32, monkeypatch):
    seen, run = [], ensemble.run_attacks
    monkeypatch.setattr(
        ensemble, "run_attacks", lambda *args: seen.append([kind.fp32_precision for kind in tf32]) or run(*args)
    )
    measure(colours, attacks=("pgd",), iters=1)
    asked = {
        "eps": "4/255",
        "norm": "linf",
        "steps": 1,
        "data": {"shards": str(colours / "test")},
        "checkpoint": str(exported),
        "ema": False,
    }
    probe.measure({**asked, "device": "cpu", "n_samples": 8, "batch_size": 8})
    assert seen == [["ieee", "ieee"]] * 2
    assert [kind.fp32_precision for kind in tf32] == ["tf32", "tf32"], "as it was"


def test_what_stands_after_each_attack_adds_up_and_is_written_as_it_is_returned(colours, measure, tmp_path):
    found = measure(colours, eps=(parse_fraction("1/255"), parse_fraction("64/255")), n_samples=24)
    (entry,) = found["datasets"]
    assert results.read(tmp_path / "out") == json.loads(json.dumps(found))
    samples = entry["samples"]
    assert (
        len(samples["ids"]) == len(set(samples["ids"])) == entry["clean"]["n"] == 24
        and entry["n_total"] == entry["clean_all"]["n"] == 48
    )
    assert np.bincount(samples["labels"]).tolist() == [6, 6, 6, 6]
    for eps in ("1/255", "64/255"):
        at, per_sample = entry["eps"][eps], samples["eps"][eps]
        clean, by = np.array(samples["clean"]), np.array(per_sample["broken_by"], dtype=object)
        assert not clean[by != None].tolist().count(False), "only what is right without attack can be broken"  # noqa: E711
        assert at["attacks"]["pgd"]["accuracy"] == np.mean(clean & (by != "pgd"))
        assert (
            at["attacks"]["apgd-ce"]["accuracy"]
            == at["robust"]["accuracy"]
            == np.mean(clean & np.equal(by, None))
            == np.mean(per_sample["robust"])
        )
        by_class = [np.mean(np.array(per_sample["robust"])[np.array(samples["labels"]) == k]) for k in range(4)]
        assert at["worst_class"] == {"name": list(COLOURS)[int(np.argmin(by_class))], "accuracy": min(by_class), "n": 6}
    assert entry["eps"]["64/255"]["robust"]["accuracy"] < entry["eps"]["1/255"]["robust"]["accuracy"]
    assert found["averages"]["all"]["eps"]["1/255"]["robust"] == entry["eps"]["1/255"]["robust"]["accuracy"]
    assert {"largest perturbation", "range", "NaN", "monotone in eps"} <= {line["check"] for line in entry["health"]}


def test_batch_size_changes_no_sample(colours, measure, tmp_path):
    """A mean-reduced loss, or a lost logit scale, makes robust accuracy rise with the batch."""
    by_size = [
        measure(colours, tmp_path / str(b), batch_size=b, n_samples=20)["datasets"][0]["samples"] for b in (1, 7, 64)
    ]
    assert by_size[0] == by_size[1] == by_size[2] and any(by_size[0]["clean"])


def test_class_ordered_shards_give_a_sample_of_every_class(exported, measure, tmp_path):
    """The first n, or a shuffle over a short buffer, would take the first classes alone."""
    ordered = write(tmp_path / "ordered", 40, label=lambda i, n: i * n // 40)
    entry = measure(ordered, n_samples=8, iters=1)["datasets"][0]
    assert (
        np.bincount(entry["samples"]["labels"], minlength=4).tolist() == [2, 2, 2, 2]
        and len(entry["samples"]["ids"]) == 8
    )


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


UNREADABLE = (3, 40, 41, 42)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """400 samples, 4 of which cannot be read, as many as may be: three in one chunk of 3."""
    return write(tmp_path_factory.mktemp("damaged") / "colours", 400, size=(8, 8), truncated=UNREADABLE)


def test_an_image_that_cannot_be_read_is_in_no_number(damaged, measure, tmp_path):
    """A neighbour's image would be counted twice, and pass every check."""
    found = measure(damaged, attacks=("pgd",), iters=1)
    (entry,) = found["datasets"]
    (whole,) = measure(write(tmp_path / "whole", 400, size=(8, 8)), tmp_path / "other", attacks=("pgd",), iters=1)[
        "datasets"
    ]

    def per_sample(e):
        s = e["samples"]
        return {
            key: outcome for key, *outcome in zip(s["keys"], s["labels"], s["clean"], s["eps"]["4/255"]["broken_by"])
        }

    assert per_sample(entry) == {key: v for key, v in per_sample(whole).items() if int(key[1:]) not in UNREADABLE}
    ns = (
        entry["n_total"],
        entry["clean_all"]["n"],
        entry["clean"]["n"],
        entry["eps"]["4/255"]["robust"]["n"],
        entry["left_out"],
    )
    assert ns == (396, 396, 396, 396, 4) and (whole["n_total"], whole["left_out"]) == (400, 0)
    (line,) = [line for line in entry["health"] if line["check"] == "every image was read"]
    told = r"4 of 400 are left out of every number: 0.tar/s0003: cannot be decoded: .*; 0.tar/s0040: .*; \.\.\."
    assert line["status"] == "WARN" and re.fullmatch(told, line["detail"])
    assert "every image was read" not in {line["check"] for line in whole["health"]}


def test_a_sample_of_the_readable_is_the_same_in_other_chunks_and_after_an_interruption(
    damaged, measure, tmp_path, monkeypatch
):
    asked = {"attacks": ("pgd",), "iters": 1, "n_samples": 50}
    (whole,) = measure(damaged, tmp_path / "whole", **asked)["datasets"]
    assert len(whole["samples"]["ids"]) == 50 and not set(UNREADABLE) & set(whole["samples"]["ids"])
    interruption, run = Interruption(), ensemble.run_attacks
    monkeypatch.setattr(ensemble, "run_attacks", lambda *args: setattr(interruption, "signal", "SIGTERM") or run(*args))
    with pytest.raises(RunError, match="stopped by SIGTERM"):
        measure(damaged, batch_size=3, interruption=interruption, **asked)
    monkeypatch.setattr(ensemble, "run_attacks", run)
    (entry,) = measure(damaged, batch_size=3, **asked)["datasets"]
    assert entry["samples"] == whole["samples"] and entry["clean_all"] == whole["clean_all"] and entry["left_out"] == 4
    assert [line for line in entry["health"] if line["check"] == "every image was read"] == whole["health"][:1]


@pytest.mark.parametrize("n, truncated", [(48, range(10)), (400, range(5)), (2, range(2))])
def test_too_many_that_cannot_be_read_end_it(measure, tmp_path, n, truncated):
    folder = write(tmp_path / "colours", n, size=(8, 8), truncated=truncated)
    told = (
        f"colours clean: {len(truncated)} of {n} samples cannot be read, and 1 % may be left out "
        ".0.tar/s0000: cannot be decoded: .*; repair or remove them"
    )
    with pytest.raises(UserError, match=told):
        measure(folder, attacks=("pgd",), iters=1)


def test_a_probe_leaves_out_what_cannot_be_read(damaged, exported, ranks):
    asked = {
        "eps": "4/255",
        "norm": "linf",
        "steps": 1,
        "checkpoint": str(exported),
        "ema": False,
        "device": "cpu",
        "batch_size": 3,
    }
    found = probe.measure({**asked, "data": {"shards": str(damaged / "test")}, "n_samples": 400})
    assert (found["clean"]["n"], found["robust"]["n"]) == (396, 396)
    with pytest.raises(UserError, match="probe.data: 4 of 400 samples cannot be read, and 0.5 % may be left out"):
        probe.measure({**asked, "data": {"shards": str(damaged / "test"), "max_replaced": "1/200"}, "n_samples": 400})


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


def test_labels_beyond_the_class_names_are_refused(measure, tmp_path):
    folder = write(tmp_path / "few", 8)
    (folder / "classnames.txt").write_text("red\ngreen\n")
    with pytest.raises(UserError, match="classnames.txt' has 2 names, and the shards have a sample of label 3"):
        measure(folder)


def test_an_attack_that_leaves_its_ball_fails_the_command_after_it_wrote(
    colours, exported, tmp_path, monkeypatch, capsys, command
):
    run = ensemble.run_attacks

    def outside(*args):
        outcome = run(*args)
        outcome.facts.largest_perturbation = 0.1
        return outcome

    monkeypatch.setattr(ensemble, "run_attacks", outside)
    words = ["--attacks", "pgd", "--iters", 2, "--workers", 0, "--device", "cpu", "--out", tmp_path / "out"]
    assert command("evaluate", exported, "--data", colours, *words) == 1
    printed = capsys.readouterr().out
    assert (
        "FAIL colours: largest perturbation" in printed
        and results.read(tmp_path / "out")["datasets"][0]["health"][0]["status"] == "FAIL"
    )


def test_a_transfer_attack_follows_the_other_models_gradients(colours, measure, exported, tmp_path):
    other = tmp_path / "other"
    loading.load_clip(Model(arch=str(ARCHITECTURE), weights="random"), seed=4).save(other)
    asked = {"attacks": ("transfer",), "iters": 10, "eps": (parse_fraction("8/255"),)}
    own, transferred = (
        measure(colours, tmp_path / str(i), transfer_from=Model(weights=str(m)), **asked)
        for i, m in enumerate((exported, other))
    )
    broken = [
        sum(b is not None for b in found["datasets"][0]["samples"]["eps"]["8/255"]["broken_by"])
        for found in (own, transferred)
    ]
    assert broken[1] < broken[0], "another model's gradients are worse than one's own"
    assert [found["settings"]["transfer_from"]["weights"] for found in (own, transferred)] == [
        str(exported),
        str(other),
    ]
    assert own["datasets"][0]["key"] != transferred["datasets"][0]["key"]


def test_the_activation_stands_in_the_results_and_another_is_refused(colours, measure, tmp_path):
    """The same weights under the other GELU are another, worse model, which looks more robust or less."""
    folder = tmp_path / "quick"
    loading.load_clip(Model(arch=str(ARCHITECTURE), weights="random", quick_gelu=True), seed=3).save(folder)
    assert measure(colours, model=folder, attacks=("pgd",), iters=1)["model"]["quick_gelu"] is True
    with pytest.raises(UserError, match="quick_gelu: False, but .* was trained with quick_gelu True"):
        measure(colours, tmp_path / "other", model=Model(weights=str(folder), quick_gelu=False))


def test_the_speed_and_the_time_left_are_told(colours, measure, monkeypatch):
    monkeypatch.setattr(chunks, "SAY_EVERY_S", 0.0)
    said = []
    measure(colours, attacks=("pgd",), iters=1, batch_size=16, say=said.append)
    assert re.fullmatch(r"colours clean: 16/48 samples  [\d.e+]+ images/s  left \d+ s", said[0]) and said[2].startswith(
        "colours clean: 48/48"
    )


def test_an_unknown_attack_is_refused_before_anything_is_measured(colours, measure):
    with pytest.raises(UserError, match="unknown attack 'pdg'; known: apgd-ce"):
        measure(colours, attacks=("pdg",))
