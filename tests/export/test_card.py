"""The model card: numbers of exactly these weights, with how they came about, or that there are none."""

import json
import re

import pytest
import yaml
from markdown_it import MarkdownIt

from mmtard.config import Model
from mmtard.export.folder import export
from mmtard.export.metadata import base_model
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
        "run_dir": str(folder),
        "seed": 3,
        "student": {"arch": "ViT-B-32", "weights": "openai"},
        "method": {"name": "mmtard"},
        "teachers": {
            "clean": {"arch": "ViT-L-14", "weights": "openai"},
            "robust": {"weights": "hf-hub:chs20/fare2-clip"},
        },
        "attack": {"eps": "2/255", "steps": 10},
        "data": {"shards": "shards/imagenet", "lanes": 4},
        "train": {"steps": 10, "batch_size": 8},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    environment = {
        "command": "mmtard train b32.yaml",
        "versions": {"torch": "2.14.1"},
        "git": {"commit": "c0ffee", "changed": ["x"]},
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


DIRECTIONS = (("image_to_text", 0.0), ("text_to_image", 0.5))


def recalls(more):
    return {
        name: {k: {**ACC, "accuracy": more + direction + int(k) / 100} for k in ("1", "5")}
        for name, direction in DIRECTIONS
    }


CAPTIONS = {
    "name": "COCO",
    "kind": "retrieval",
    "data": "d",
    "fingerprint": "g",
    "n_total": 200,
    "attack": "apgd on the captions",
    "clean_all": recalls(0.2),
    "clean": recalls(0.3),
    "eps": {"2/255": {"recall": recalls(0.0)}},
    "health": [],
}
PETS = {
    "name": "Pets",
    "kind": "zeroshot",
    "data": "d",
    "fingerprint": "f",
    "classes": ["a", "b"],
    "chance": 0.5,
    "n_total": 200,
    "templates": ["a photo of a {}, a pet"],
    "perturb_at": "input",
    "perturbed_size": [16, 16],
    "clean_all": {**ACC, "accuracy": 0.625, "n": 200},
    "clean": ACC,
    "eps": {
        "2/255": {
            "attacks": {"apgd-ce": ACC},
            "robust": {"accuracy": 0.31, "interval95": [0.228, 0.406], "n": 100},
        }
    },
    "samples": {"ids": [0], "labels": [0], "clean": [True], "clean_prediction": [0], "eps": {}},
    "health": [
        {"check": "range", "status": "PASS", "detail": "in [0,1]"},
        {"check": "monotone", "status": "WARN", "detail": "rises at 4/255"},
    ],
}


def evaluated(run, sha256, *datasets, folder=None, **changes):
    content = {
        "format": 2,
        "protocol": "fare",
        "command": "/home/me/.venv/bin/mmtard evaluate runs/b32 --protocol fare",
        "model": {"weights": str(run), "sha256": sha256},
        "settings": {"norm": "linf", "attacks": ["apgd-ce"], "iters": 100, "seed": 0},
        "datasets": list(datasets) or [PETS],
        **changes,
    }
    folder = folder or run / "evaluations" / "fare"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(content))


def hash_of(run):
    return tensors_sha256(loading.load_clip(Model(weights=str(run))).model.visual.state_dict())


def card(run, tmp_path, **spec):
    export(Model(weights=str(run), **spec), tmp_path / "out")
    return (tmp_path / "out" / "README.md").read_text()


def test_the_card_holds_the_numbers_of_these_weights(run, tmp_path):
    evaluated(run, hash_of(run))
    text = card(run, tmp_path)
    for line in (
        "| Pets | 62.50 (40.1–59.9), n 200 | 50.00 (40.1–59.9), n 100 | 2/255 | 31.00 (22.8–40.6), n 100 | 50.00 |",
        "Protocol `fare`, linf, apgd-ce, 100 iterations, seed 0",
        r"Prompts: “a photo of a \{\}, a pet”.",
        "\n```\nmmtard evaluate runs/b32 --protocol fare\n```\n",
        "1 checks passed, 1 warned, 0 failed",
        "- Pets, monotone: rises at 4/255",
        "| steps | 7 of 10, 8 images each |",
        "| attack | pgd, linf 2/255, 10 steps, maximises `kl_clean` |",
        "| teacher `robust` | `hf-hub:chs20/fare2-clip` |",
        "`c0ffee`, with changes",
        "mmtard train b32.yaml",
        "@software{mmtard,",
    ):
        assert line in text
    assert "Not measured" not in text
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "open_clip" and front["license"] == "other" and "bound by their licences" in text
    configuration = text.partition("```yaml\n")[2].partition("```")[0]
    assert yaml.safe_load(configuration)["teachers"]["robust"]["weights"] == "hf-hub:chs20/fare2-clip"


def test_the_hub_reads_the_accuracies_and_the_base_model(run, tmp_path):
    """By huggingface_hub's own reader, which refuses a model-index that is not one."""
    from huggingface_hub import ModelCardData
    from huggingface_hub.repocard_data import model_index_to_eval_results

    evaluated(run, hash_of(run))
    front = yaml.safe_load(card(run, tmp_path).split("---")[1])
    assert (front["base_model"], front["base_model_relation"]) == ("timm/vit_base_patch32_clip_224.openai", "finetune")
    name, found = model_index_to_eval_results(front["model-index"])
    assert name == "b32" and ModelCardData(model_name=name, eval_results=found).eval_results
    assert {(r.task_type, r.dataset_name, r.dataset_type, r.metric_type) for r in found} == {
        ("zero-shot-image-classification", "Pets", "pets", "accuracy")
    }
    assert [(r.metric_value, r.metric_name) for r in found] == [
        (62.5, "clean accuracy, n 200, prompts “a photo of a {}, a pet”"),
        (31.0, "robust accuracy, linf 2/255, apgd-ce, 100 iterations, n 100"),
    ]


@pytest.mark.parametrize(
    "model, repository",
    [
        ({"weights": "hf-hub:chs20/fare2-clip"}, "chs20/fare2-clip"),
        ({"arch": "ViT-B-32", "weights": "laion2b_s34b_b79k"}, "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"),
        ({"arch": "ViT-B-32", "weights": "random"}, None),
        ({"arch": "mine.json", "weights": "weights/mine.pt"}, None),
        ({"weights": "runs/b32"}, None),
        ({"weights": "hf-hub:[x](y)/<b>"}, None),
    ],
)
def test_the_base_model_is_a_repository_or_left_out(model, repository):
    assert base_model(Model(**model)) == repository


def test_an_evaluation_beside_the_run_stands_in_the_card(run, tmp_path):
    """`mmtard evaluate --out` put it elsewhere, under another name of the weights."""
    evaluated(run, hash_of(run), folder=run.parent / "results" / "x", model={"weights": "gone", "sha256": hash_of(run)})
    assert "| Pets | 62.50" in card(run, tmp_path)


HOSTILE = "x\n```\n<script>alert(1)</script>\n# Robust accuracy 99 %\n---\nlicense: mit | `a` $b$ [c](d)"


def test_text_of_others_is_text_in_the_card(run, tmp_path):
    """In names, classes, prompts, commands, versions, health and the configuration: none begins a line of its own."""
    dataset = {**PETS, "name": HOSTILE, "templates": [HOSTILE], "health": [{**PETS["health"][1], "detail": HOSTILE}]}
    hostile = run.parent / HOSTILE.replace("\n", " ").replace("/", "")
    run.rename(hostile)
    evaluated(hostile, hash_of(hostile), dataset, command=HOSTILE, protocol=HOSTILE)
    (hostile / "environment.json").write_text(
        json.dumps({"command": HOSTILE, "versions": {HOSTILE: HOSTILE}, "git": 3})
    )
    text = card(hostile, tmp_path)
    front = yaml.safe_load(text.split("\n---\n")[0])
    assert front["license"] == "other" and front["model-index"][0]["name"].startswith("x ")
    html = MarkdownIt("commonmark").enable("table").render(text.split("\n---\n", 1)[1])
    assert "<script" not in html and "&lt;script&gt;alert(1)" in html and '<a href="d"' not in html
    headings = re.findall(r"<h[1-6]>(.*?)</h", html)
    assert headings[1:] == ["Use", "How robust it is", "How it was trained", "Citation", "Licence"]
    assert html.count("<table>") == 2 and html.count("<hr") == 0


def test_the_card_of_a_retrieval_holds_its_recalls_and_no_empty_table(run, tmp_path):
    evaluated(run, hash_of(run), CAPTIONS)
    text = card(run, tmp_path)
    rows = [
        ("image to text | 5 | 25.00", "35.00", "5.00"),
        ("text to image | 1 | 71.00", "81.00", "51.00"),
    ]
    for first, clean, robust in rows:
        interval = "(40.1–59.9), n 100"
        assert f"| COCO | {first} {interval} | {clean} {interval} | 2/255 | {robust} {interval} |" in text
    assert text.count("| COCO |") == 4 and "apgd on the captions" in text
    assert "Zero-shot accuracy" not in text and "| chance |" not in text


def test_the_average_is_measured_as_the_average(run, vit, tmp_path):
    """Without --ema the advised command would measure the weights, and the card would still say "Not measured"."""
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
    assert (
        "Not measured." in text
        and "1 evaluation of this run measured other weights, and is not shown here." in text
        and "62.50" not in text
    )


def test_a_run_that_was_not_measured_says_how_to(run, tmp_path):
    text = card(run, tmp_path)
    assert (
        f"Not measured. `mmtard evaluate {run} --protocol fare --data ROOT` measures it." in text
        and "other weights" not in text
    )


def test_a_model_that_is_no_run_has_a_card_too(run, vit, tmp_path):
    text = card(run / clip.START_FOLDER, tmp_path)
    assert "Not by a run of mmtard." in text and "Not measured." in text
