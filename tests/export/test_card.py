"""The model card: numbers of exactly these weights, with how they came about, or that there are none."""

import json

import pytest
import yaml

from mmtard.config import Model
from mmtard.export.folder import export
from mmtard.models import clip, loading
from mmtard.models.weights import tensors_sha256
from mmtard.runs.checkpoint_writer import Checkpoints

ACC = {"accuracy": 0.5, "interval95": [0.401, 0.599], "n": 100}


@pytest.fixture
def run(vit, tmp_path):
    """A run folder with one checkpoint, of step 7 of 10, and what a start writes."""
    folder = tmp_path / "runs" / "b32"
    loading.load_clip(Model(arch=vit, weights="random"), seed=1).save(folder / clip.START_FOLDER)
    saver = Checkpoints(folder, keep_last=1)
    saver.save(
        7,
        dict(loading.load_clip(Model(arch=vit, weights="random"), seed=2).tower().state_dict()),
        {},
        {"step": 7, "data_fingerprint": "d" * 64},
    )
    saver.wait()
    config = {
        "run_dir": str(folder), "seed": 3, "student": {"arch": "ViT-B-32", "weights": "openai"}, "method": {"name": "mmtard"},
        "teachers": {"clean": {"arch": "ViT-L-14", "weights": "openai"}, "robust": {"weights": "hf-hub:chs20/fare2-clip"}},
        "attack": {"eps": "2/255", "steps": 10}, "data": {"shards": "shards/imagenet", "lanes": 4}, "train": {"steps": 10, "batch_size": 8},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    environment = {
        "command": "mmtard train b32.yaml",
        "versions": {"torch": "2.14.1"},
        "git": {"commit": "c0ffee", "changed": ["x"]},
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


CAPTIONS = {
    "name": "COCO", "kind": "retrieval", "data": "d", "fingerprint": "g", "n_total": 200, "attack": "apgd on the captions",
    **{
        part: {direction: {k: {**ACC, "accuracy": a + b + int(k) / 100} for k in ("1", "5")} for direction, b in (("image_to_text", 0.0), ("text_to_image", 0.5))}
        for part, a in (("clean_all", 0.2), ("clean", 0.3))
    },
    "eps": {"2/255": {"recall": {direction: {k: {**ACC, "accuracy": b + int(k) / 100} for k in ("1", "5")} for direction, b in (("image_to_text", 0.0), ("text_to_image", 0.5))}}},
    "health": [],
}  # fmt: skip


def evaluated(run, sha256, *datasets):
    dataset = {
        "name": "Pets", "kind": "zeroshot", "data": "d", "fingerprint": "f", "classes": ["a", "b"], "chance": 0.5, "n_total": 200, "templates": ["{}"],
        "perturb_at": "input", "perturbed_size": [16, 16], "clean_all": {**ACC, "accuracy": 0.625, "n": 200}, "clean": ACC,
        "eps": {"2/255": {"attacks": {"apgd-ce": ACC}, "robust": {"accuracy": 0.31, "interval95": [0.228, 0.406], "n": 100}}},
        "samples": {"ids": [0], "labels": [0], "clean": [True], "clean_prediction": [0], "eps": {}},
        "health": [{"check": "range", "status": "PASS", "detail": "in [0,1]"}, {"check": "monotone", "status": "WARN", "detail": "rises at 4/255"}],
    }  # fmt: skip
    content = {
        "format": 2, "protocol": "fare", "command": "mmtard evaluate runs/b32 --protocol fare", "model": {"weights": str(run), "sha256": sha256},
        "settings": {"norm": "linf", "attacks": ["apgd-ce"], "iters": 100, "seed": 0}, "datasets": list(datasets) or [dataset],
    }  # fmt: skip
    (run / "evaluations" / "fare").mkdir(parents=True)
    (run / "evaluations" / "fare" / "results.json").write_text(json.dumps(content))


def card(run, tmp_path, **spec):
    export(Model(weights=str(run), **spec), tmp_path / "out")
    return (tmp_path / "out" / "README.md").read_text()


def test_the_card_holds_the_numbers_of_these_weights(run, tmp_path):
    evaluated(run, tensors_sha256(loading.load_clip(Model(weights=str(run))).model.visual.state_dict()))
    text = card(run, tmp_path)
    assert (
        "| Pets | 62.50 (40.1–59.9), n 200 | 50.00 (40.1–59.9), n 100 | 2/255 | 31.00 (22.8–40.6), n 100 | 50.00 |"
        in text
    )
    assert (
        "Protocol `fare`, linf, apgd-ce, 100 iterations, seed 0" in text
        and "mmtard evaluate runs/b32 --protocol fare" in text
    )
    assert (
        "1 checks passed, 1 warned, 0 failed" in text
        and "- Pets, monotone: rises at 4/255" in text
        and "Not measured" not in text
    )
    assert (
        "| steps | 7 of 10, 8 images each |" in text
        and "| attack | pgd, linf 2/255, 10 steps, maximises `kl_clean` |" in text
    )
    assert (
        "| teacher `robust` | `hf-hub:chs20/fare2-clip` |" in text
        and "`c0ffee`, with changes" in text
        and "mmtard train b32.yaml" in text
    )
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "open_clip" and front["license"] == "other" and "bound by their licences" in text
    configuration = text.partition("```yaml\n")[2].partition("```")[0]
    assert yaml.safe_load(configuration)["teachers"]["robust"]["weights"] == "hf-hub:chs20/fare2-clip"


def test_the_card_of_a_retrieval_holds_its_recalls_and_no_empty_table(run, tmp_path):
    evaluated(run, tensors_sha256(loading.load_clip(Model(weights=str(run))).model.visual.state_dict()), CAPTIONS)
    text = card(run, tmp_path)
    assert (
        "| COCO | image to text | 5 | 25.00 (40.1–59.9), n 100 | 35.00 (40.1–59.9), n 100 | 2/255 | 5.00 (40.1–59.9), n 100 |"
        in text
    )
    assert (
        "| COCO | text to image | 1 | 71.00 (40.1–59.9), n 100 | 81.00 (40.1–59.9), n 100 | 2/255 | 51.00 (40.1–59.9), n 100 |"
        in text
    )
    assert (
        text.count("| COCO |") == 4
        and "apgd on the captions" in text
        and "Zero-shot accuracy" not in text
        and "| chance |" not in text
    )


def test_the_average_is_measured_as_the_average(run, vit, tmp_path):
    """Without --ema the advised command would measure the weights, and the card would say again that nothing was measured."""
    tower, average = (loading.load_clip(Model(arch=vit, weights="random"), seed=seed).tower() for seed in (2, 3))
    saver = Checkpoints(run, keep_last=1)
    saver.save(
        8, dict(tower.state_dict()), {f"ema.{k}": v.detach() for k, v in average.named_parameters()}, {"step": 8}
    )
    saver.wait()
    text = card(run, tmp_path, ema=True)
    assert f"Not measured. `mmtard evaluate {run} --ema --protocol fare --data ROOT` measures it." in text


def test_numbers_of_other_weights_are_left_out_and_it_says_so(run, tmp_path):
    evaluated(run, "of another checkpoint")
    text = card(run, tmp_path)
    assert "Not measured." in text and "1 evaluation of this run measured other weights" in text and "62.50" not in text


def test_a_run_that_was_not_measured_says_how_to(run, tmp_path):
    text = card(run, tmp_path)
    assert (
        f"Not measured. `mmtard evaluate {run} --protocol fare --data ROOT` measures it." in text
        and "other weights" not in text
    )


def test_a_model_that_is_no_run_has_a_card_too(run, vit, tmp_path):
    text = card(run / clip.START_FOLDER, tmp_path)
    assert "Not by a run of mmtard." in text and "Not measured." in text
