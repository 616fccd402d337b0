"""`mmtard evaluate` equals open_clip's zero-shot classifier, at every batch size; it is never stale, and goes on."""

import json
import re

import numpy as np
import open_clip
import pytest
import torch
import webdataset as wds
from tiny_datasets import COLOURS, edited, flags, write

from mmtard.attacks import ensemble
from mmtard.config import Model, parse_fraction
from mmtard.errors import UserError
from mmtard.evaluation import chunks, results
from mmtard.examples.pretrain import ARCHITECTURE
from mmtard.models import loading
from mmtard.training import probe_process as probe

TEMPLATES = ("a photo of a {}", "an image of a {}")


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
