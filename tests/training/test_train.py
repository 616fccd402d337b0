"""Whole runs in this process: unlike teachers, state that survives an interruption, data without labels."""

import json
import tarfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.zero_shot_classifier import build_zero_shot_classifier
from safetensors.torch import load_file
from whole_runs import AfterSteps, Never, rows

from mmtard.config import Model
from mmtard.distributed.interruption import EXIT_REQUEUE
from mmtard.errors import RunError, UserError
from mmtard.models import loading
from mmtard.models.weights import tensors_sha256
from mmtard.runs.journal import Journal
from mmtard.training import overfitting_alarm
from mmtard.training.train import Trainer
from mmtard.training.watchdog import Watchdog

pytestmark = pytest.mark.slow


def state(run):
    return json.loads((run / "checkpoints/step-4/state.json").read_text())["method"]


def of_both(halves, whole):
    """File -> tensors of the last checkpoint, which an interrupted run and an undisturbed one have bit for bit."""
    assert rows(halves) == rows(whole) and state(halves) == state(whole)
    found, same = (
        {p.name: load_file(p) for p in (run / "checkpoints/step-4").glob("*.safetensors")} for run in (halves, whole)
    )
    assert [(file, found[file].keys()) for file in same] == [(file, same[file].keys()) for file in same]
    assert all(found[file][name].equal(value) for file in same for name, value in same[file].items())
    return same


def test_three_unlike_teachers_and_all_that_a_recipe_carries_survive_an_interruption(
    train, settings, vit, resnet, wide, monkeypatch
):
    """A ViT, a ResNet of another resolution, and a ViT of another width, embedding and context length; balanced
    weights, medians of entropies, a learned map and its moments, the samples' multipliers, a ramp, the moving
    average of the weights under a one-cycle schedule, and the alarm's fallback after the first step.
    """
    monkeypatch.setattr(overfitting_alarm, "overfitted", lambda single, multi, n, ratio: True)
    ensemble = {
        "teachers": {
            name: {"arch": arch, "weights": "random"}
            for name, arch in (("clean", vit), ("robust", resnet), ("third", wide))
        },
        "method": {
            "name": "mmtard",
            "weighting": "mtard",
            "rate": 0.5,
            "cross_modal_weight": 0.1,
            "views": {"clean": "clean", "robust": "adv", "third": "clean_for_adv"},
            "trust": "uncertainty",
        },
        "terms": {"anchor": {"teacher": "third"}, "bound": {"multipliers": "sample", "rho": 1e-3}},
        "attack": {
            "algorithm": "nfgsm",
            "eps": "8/255",
            "steps": 1,
            "alarm_every": 1,
            "ramp": {"until": 3, "eps": "1/2"},
        },
        "train": {"steps": 4, "batch_size": 8, "lr": 1e-3, "schedule": "onecycle", "ema": 0.5},
    }
    undisturbed, whole = settings("whole", **ensemble)
    assert train(undisturbed, Never()) == 0
    interrupted, halves = settings("halves", **ensemble)
    assert train(interrupted, AfterSteps()) == EXIT_REQUEUE and len(rows(halves)) == 2
    assert train(interrupted, Never()) == 0
    same = of_both(halves, whole)
    assert "learned.anchor.weight.exp_avg" in same["optimizer.safetensors"]
    multipliers = same["optimizer.safetensors"]["learned.bound.samples"]
    assert multipliers.shape == (24,) and multipliers.ne(torch.tensor(2.0).log()).all(), "all samples were seen"
    events = [json.loads(line) for line in (whole / "events.jsonl").read_text().splitlines()]
    assert [(e["step"], e["attack_steps_from_now_on"]) for e in events if "alarm" in e["event"]] == [(1, 3)]
    assert (
        state(whole)["entropy_robust"] > 0 and rows(whole)[1]["w_handed_third"] > 0 == rows(whole)[0]["w_handed_third"]
    )
    assert {"acc_clean", "acc_adv", "anchor"} <= rows(whole)[0].keys()
    weights = [state(whole)[f"w_{name}"] for name in ("clean", "robust", "third")]
    assert sum(weights) == pytest.approx(1) and len({round(w, 6) for w in weights}) == 3
    assert {f"w_{name}{p}" for name in ("clean", "robust", "third") for p in ("", "_p10", "_p50", "_p90")} <= rows(
        whole
    )[0].keys()


def test_a_run_of_lore_survives_an_interruption_with_its_network_a_map_of_places_and_a_ramp_of_steps(
    train, settings, wide
):
    """LORE's network, which steps after every second update; a map between the tokens of two widths; the moving
    average; an attack that has more of eps at each update, and a second step from the third on.
    """
    recipe = {
        "teachers": {"robust": {"arch": wide, "weights": "random"}},
        "method": {"name": "lore", "bound": {"rho": 1e-3, "dual_every": 2, "dual_lr": 1e-2}},
        "terms": {"feature": {"of": "tokens", "teacher_view": "adv"}},
        "attack": {"eps": "8/255", "step_size": "4/255", "steps": 3, "ramp": {"until": 4, "eps": "1/4", "steps": 1}},
        "train": {"steps": 4, "batch_size": 8, "lr": 1e-3, "ema": 0.5},
    }
    undisturbed, whole = settings("whole", **recipe)
    assert [undisturbed.attack.at(update).steps for update in range(4)] == [1, 1, 2, 2]
    assert train(undisturbed, Never()) == 0
    interrupted, halves = settings("halves", **recipe)
    assert train(interrupted, AfterSteps(3)) == EXIT_REQUEUE and len(rows(halves)) == 3
    assert train(interrupted, Never()) == 0
    kept = of_both(halves, whole)["optimizer.safetensors"]
    assert kept["learned.feature.weight"].shape == (24, 16)
    updates = [kept[f"learned.{name}.step"] for name in ("feature.weight", "bound.0.weight", "bound.2.bias")]
    assert updates == [4, 2, 2] and any(name.startswith("ema.") for name in kept)
    assert rows(whole)[0]["w_bound"] != rows(whole)[3]["w_bound"] and rows(whole)[3]["bound_distance"] > 1e-3


def test_each_model_of_an_ensemble_reads_the_class_names_with_its_own_tokenizer(
    train, settings, vit, word_tokenizer, tmp_path
):
    """CLIP's byte pairs for the student and the clean teacher; whole words for a text tower like SigLIP's, and for a
    BERT.
    """
    transformers = pytest.importorskip("transformers")
    words = len(open_clip.tokenizer.HFTokenizer(str(word_tokenizer)).tokenizer)
    bert = transformers.BertConfig(
        vocab_size=words,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    bert.save_pretrained(tmp_path / "bert-config")
    hugging_face = {"hf_tokenizer_name": str(word_tokenizer), "context_length": 9}
    texts = {
        "siglip": {
            **hugging_face,
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "vocab_size": words,
            "width": 16,
            "heads": 2,
            "layers": 1,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
        },
        "bert": {
            **hugging_face,
            "hf_model_name": str(tmp_path / "bert-config"),
            "hf_proj_type": "linear",
            "hf_pooler_type": "mean_pooler",
        },
    }
    for name, text in texts.items():
        vision = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
        cfg = {"embed_dim": 12, "custom_text": True, "vision_cfg": vision, "text_cfg": text}
        (tmp_path / f"tests-{name}.json").write_text(json.dumps(cfg))
        loading.load_clip(Model(arch=str(tmp_path / f"tests-{name}.json"), weights="random")).save(tmp_path / name)
    given, run = settings(
        "tokenizers",
        teachers={
            "clean": {"arch": vit, "weights": "random"},
            **{name: {"weights": str(tmp_path / name)} for name in texts},
        },
        method={
            "name": "mmtard",
            "views": {"clean": "clean", "siglip": "adv", "bert": "adv"},
            "weighting": "confidence_sigmoid",
        },
        attack={"objective": "kl_fused", "eps": "8/255", "step_size": "4/255", "steps": 2},
    )
    assert train(given, Never()) == 0
    assert all(
        np.isfinite(row["loss"]) and row["kl_siglip"] != row["kl_bert"] and row["skipped"] == 0 for row in rows(run)
    )
    used = load_file(run / "class_embeddings.safetensors")
    assert used.keys() == {"student", "clean", "siglip", "bert"}
    for name, source in {"student": run / "start", "siglip": tmp_path / "siglip", "bert": tmp_path / "bert"}.items():
        model = open_clip.create_model(f"local-dir:{source}").eval()
        tokenize = open_clip.get_tokenizer(f"local-dir:{source}")
        expected = build_zero_shot_classifier(model, tokenize, ["cat", "dog", "cow"], ["This is a photo of a {}"])
        torch.testing.assert_close(used[name], expected.T, rtol=1e-5, atol=1e-6)
    read = {name: open_clip.get_tokenizer(f"local-dir:{tmp_path / name}")(["a Cat"])[0, :2].tolist() for name in texts}
    assert read == {"siglip": [2, 5], "bert": [2, 1]}, "only SigLIP's tokenizer writes all in lower case"


@pytest.mark.parametrize("method", ["fare", "sim_clip"])
def test_a_method_of_embeddings_trains_on_images_alone_as_it_does_with_classes(train, settings, method, capfd):
    """No label, no class names; against the start of its run; with an attack of one step, whose alarm has no accuracy
    to watch.
    """
    changes = {
        "method": {"name": method},
        "teachers": {"start": {"placement": "sharded"}},
        "attack": {"eps": "8/255", "step_size": "8/255", "steps": 1, "alarm_every": 1},
    }
    given, run = settings("alone", labels=False, data={"targets": "none"}, **changes)
    assert train(given, Never()) == 0
    assert "24 samples, images 16 px" in capfd.readouterr().out
    classes, beside = settings("classes", **changes)
    assert train(classes, Never()) == 0
    with_accuracy = [{k: v for k, v in row.items() if k != "acc_adv"} for row in rows(beside)]
    assert rows(run) == with_accuracy != rows(beside) and state(run) == {}
    assert all(row["replaced"] == 0 and np.isfinite(row["loss"]) for row in rows(run))


def test_a_run_that_cannot_be_built_leaves_its_records_closed_and_the_terminal_as_it_was(
    settings, ranks_of_module, capfd, monkeypatch
):
    given, _ = settings("broken", method={"name": "tecoa"})
    monkeypatch.setattr(Trainer, "_build", lambda self: (_ for _ in ()).throw(UserError("student.arch: no such")))
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes this for a terminal
    with Watchdog(given, ranks_of_module) as watchdog:
        run = Trainer(given, ranks_of_module, watchdog)
        with pytest.raises(UserError):
            run.train(Never())
    shown = capfd.readouterr().out
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 2, (
        "hidden by the bars of the index and the run, and shown again"
    )


def test_images_alone_are_no_data_for_a_method_of_classes(train, settings):
    with pytest.raises(
        UserError,
        match="data.targets: 'none' leaves no classes, which method 'fare' with attack objective 'kl_clean' needs; "
        "set it to labels or captions",
    ):
        settings(
            "kl",
            data={"targets": "none"},
            method={"name": "fare"},
            attack={"objective": "kl_clean"},
            teachers={"clean": {"weights": "random"}},
        )
    given, _ = settings("labels", labels=False, method={"name": "fare"})
    with pytest.raises(
        UserError,
        match="no classnames.txt beside .*; set data.classnames to a file .*, or "
        "data.targets=none where the method reads embeddings alone",
    ):
        train(given, Never())


def test_the_start_says_what_of_the_shards_is_not_used_and_doubts_the_class_names(train, settings, capfd):
    given, _ = settings("odd", method={"name": "tecoa"}, train={"steps": 1, "batch_size": 8, "warmup_steps": 0})
    folder = Path(given.data.shards)
    (folder / "classnames.txt").write_text("cat\ndog\ncat\ncow\n")
    with tarfile.open(folder / "0.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("024.gif"))
    assert train(given, Never()) == 0
    said = capfd.readouterr().out
    assert "of the shards: 1 left out without an image" in said and "not read: 1 .gif images" in said
    assert "WARN class names: 'cat' twice" in said and "4 names, but the highest label is 2" in said


def test_a_newer_checkpoint_that_is_not_whole_is_told_where_the_run_goes_on(train, settings, capfd):
    given, run = settings(
        "cut",
        method={"name": "tecoa"},
        train={"steps": 2, "batch_size": 8, "warmup_steps": 0},
        checkpoint={"every": 1, "keep_last": 2},
    )
    assert train(given, Never()) == 0
    with open(run / "checkpoints" / "step-2" / "weights.safetensors", "r+b") as file:
        file.truncate(1000)
    capfd.readouterr()
    assert train(given, Never()) == 0
    said = capfd.readouterr().out
    assert "tecoa goes on from step-1" in said
    assert "WARN a newer checkpoint is not whole and was passed over: step-2: weights.safetensors has 1000 " in said


def test_the_rows_of_all_steps_are_on_the_disk_before_their_checkpoint(train, settings, monkeypatch):
    """A power cut leaves no checkpoint whose steps have no metrics."""
    changes = {"method": {"name": "tecoa"}, "train": {"steps": 3, "batch_size": 8, "warmup_steps": 0}}
    given, run = settings("synced", checkpoint={"every": 1, "keep_last": 5}, **changes)
    order, sync = [], Journal.sync

    def noted(journal):
        if journal.path.name == "metrics.jsonl":
            there = {int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*")}
            order.append((len(rows(run)), max(there, default=0)))
        sync(journal)

    monkeypatch.setattr(Journal, "sync", noted)
    assert train(given, Never()) == 0
    assert all(metrics > published for metrics, published in order[:3]) and [p for _, p in order] == [0, 1, 2, 3]


def test_a_device_without_memory_is_one_line_that_says_what_to_lower(train, settings, monkeypatch):
    def full(self, batch, lr):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    given, _ = settings("full", method={"name": "tecoa"})
    monkeypatch.setattr(Trainer, "_optimizer_step", full)
    with pytest.raises(
        RunError, match=r"^step 1: cpu has too little memory; set .*=.* \(.* GiB less\).*Tried to allocate"
    ):
        train(given, Never())


def test_a_teacher_whose_weights_were_replaced_is_refused_where_the_run_goes_on(train, settings, vit, tmp_path, capfd):
    def write_teacher(seed):
        spec = Model(arch=str(vit), weights="random")
        clip = loading.load_clip(spec, seed)
        clip.save(tmp_path / "teacher")
        return tensors_sha256(clip.model.state_dict())

    def starts(run):
        return [json.loads(line) for line in (run / "resume.jsonl").read_text().splitlines()]

    old, changes = write_teacher(1), {"teachers": {"robust": {"weights": str(tmp_path / "teacher")}}}
    changes |= {"method": {"name": "ard"}, "train": {"steps": 6, "batch_size": 8, "lr": 1e-3}}
    given, run = settings("replaced", **changes)
    assert train(given, AfterSteps()) == EXIT_REQUEUE
    saved = json.loads((run / "checkpoints/step-2/state.json").read_text())
    assert saved["teachers_sha256"] == starts(run)[0]["teachers_sha256"] == {"robust": old}
    new = write_teacher(2)
    message = rf"teachers.robust.sha256: {old[:12]} -> {new[:12]}.*put the old weights back.*resume.allow=\["
    with pytest.raises(UserError, match=message):
        train(given, Never())
    assert write_teacher(1) == old
    assert train(given, AfterSteps()) == EXIT_REQUEUE, "the old weights are back"
    assert write_teacher(2) == new
    allowed, _ = settings("replaced", **changes, resume={"allow": ["teachers.robust.sha256"]})
    assert train(allowed, Never()) == 0
    assert starts(run)[-1]["changed"] == {"teachers.robust.sha256": [old, new]}
    saved = json.loads((run / "checkpoints/step-6/state.json").read_text())
    assert saved["teachers_sha256"] == {"robust": new}
