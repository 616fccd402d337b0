"""`mmtard evaluate`: equal to open_clip's own zero-shot classifier, the same at every batch size, honest about its attack."""

import json

import numpy as np
import open_clip
import pytest
import torch
import webdataset as wds
from PIL import Image

from mmtard import towers
from mmtard.config import Data, Model, parse_fraction
from mmtard.errors import RunError, UserError
from mmtard.evaluate import quick
from mmtard.quickstart.pretrain import ARCHITECTURE
from mmtard.quickstart.render import make_data

TEMPLATES = ["a photo of a {}", "an image of a {}"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("rendered") / "data", train=8, test=90, zeroshot=24, shard_size=50) / "test"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder of a model that is better than chance without any training: nearest class mean would do, random weights will not."""
    folder = tmp_path_factory.mktemp("model") / "exported"
    towers.load(Model(arch=str(ARCHITECTURE), weights="random"), seed=3).save(folder)
    return folder


def source(shards):
    return Data(shards=str(shards), templates=TEMPLATES)


def measure(exported, shards, ranks, **changes):
    settings = {"eps": parse_fraction("4/255"), "steps": 4, "workers": 0, **changes}
    return quick.evaluate(Model(weights=str(exported)), source(shards), quick.Quick(**settings), ranks, say=lambda _: None)


def test_clean_accuracy_is_that_of_open_clips_own_zero_shot_classifier(exported, shards, ranks):
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{exported}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{exported}")
    names = (shards / "classnames.txt").read_text().splitlines()
    model.eval()
    classifier = open_clip.build_zero_shot_classifier(model, tokenizer, names, [lambda c, t=t: t.format(c) for t in TEMPLATES])
    paths = [str(p) for p in sorted(shards.glob("*.tar"))]
    images, labels = zip(*wds.WebDataset(paths, shardshuffle=False).decode("pil").to_tuple("jpg", "cls"))
    with torch.no_grad():
        logits = model.encode_image(torch.stack([preprocess(i) for i in images]), normalize=True) @ classifier
    theirs = (logits.argmax(1) == torch.tensor(labels)).tolist()
    ours = measure(exported, shards, ranks)
    assert ours["samples"]["clean"] == theirs
    assert ours["clean"]["accuracy"] == np.mean(theirs)
    assert 0 < sum(theirs) < len(theirs), "a model that is always or never right compares nothing"


def test_batch_size_changes_no_sample(exported, shards, ranks):
    by_size = [measure(exported, shards, ranks, batch_size=b)["samples"] for b in (1, 8, 64)]
    assert by_size[0] == by_size[1] == by_size[2]


def test_the_attack_lowers_accuracy_and_stays_in_its_ball(exported, shards, ranks):
    weak, strong = measure(exported, shards, ranks, eps=parse_fraction("0")), measure(exported, shards, ranks, eps=parse_fraction("64/255"), steps=20)
    assert weak["pgd"] == weak["clean"] and weak["health"]["largest_perturbation"] == 0
    assert strong["pgd"]["accuracy"] == 0 and 32 / 255 < strong["health"]["largest_perturbation"] <= 64 / 255 + 1e-6
    assert strong["health"]["zero_gradient_samples"] == 0


def test_an_attack_that_leaves_its_ball_ends_the_evaluation(exported, shards, ranks, monkeypatch):
    monkeypatch.setattr(quick, "pgd", lambda loss, images, **_: images + 0.1)
    with pytest.raises(RunError, match="left its ball"):
        measure(exported, shards, ranks)


def test_a_stratified_sample_is_stored_with_the_result(exported, shards, ranks):
    results = measure(exported, shards, ranks, n_samples=36)
    assert results["clean"]["n"] == len(set(results["samples"]["ids"])) == 36
    assert json.loads(json.dumps(results)) == results


def test_labels_beyond_the_class_names_are_refused(exported, shards, ranks, tmp_path):
    (tmp_path / "few.txt").write_text("red circle\nblue ring\n")
    data = Data(shards=str(shards), classnames=str(tmp_path / "few.txt"))
    with pytest.raises(UserError, match="2 names, but"):
        quick.evaluate(Model(weights=str(exported)), data, quick.Quick(parse_fraction("1/255")), ranks)


def test_images_of_another_size_are_brought_to_the_towers(exported, shards, ranks, tmp_path):
    folder = tmp_path / "large"
    folder.mkdir()
    with wds.TarWriter(str(folder / "0.tar")) as tar:
        for i in range(4):
            tar.write({"__key__": f"{i}", "png": np.asarray(Image.new("RGB", (50 + i, 40), (60 * i, 10, 200))), "cls": i})
    (folder / "classnames.txt").write_text("a\nb\nc\nd\n")
    assert measure(exported, folder, ranks)["clean"]["n"] == 4
