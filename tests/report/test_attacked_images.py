"""The strip's images: attacked with the weights and the data that were measured, or a reason why not."""

import copy
import io
import re
import shutil

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image
from written import dataset, results, save

from mmtard.config import Data, Model
from mmtard.data.dataset import open_dataset
from mmtard.models import loading
from mmtard.models.weights import tensors_sha256
from mmtard.report import sources
from mmtard.report.attacked_images import GAP, choose, strip
from mmtard.report.records import Zeroshot

NAMES = ["red square", "green square", "blue square"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, vit):
    """An exported model, shards of 12 images that it classifies as their labels say, and their results.json."""
    folder = tmp_path_factory.mktemp("strip")
    loading.load_clip(Model(arch=vit, weights="random"), seed=3).save(folder / "model")
    clip = loading.load_clip(Model(weights=str(folder / "model")))
    rng = np.random.default_rng(0)
    pixels = rng.integers(60, 200, (12, 16, 16, 3), dtype=np.uint8)
    z = torch.nn.functional.normalize(clip.tower().eval()(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255), dim=-1)
    labels = (z @ clip.class_embeddings(NAMES, ["a photo of a {}"]).T).argmax(1).tolist()
    (folder / "shards").mkdir()
    with wds.TarWriter(str(folder / "shards" / "0.tar")) as tar:
        for i, (image, label) in enumerate(zip(pixels, labels)):
            tar.write({"__key__": f"{i:03d}", "png": image, "cls": label})
    shards = str(folder / "shards")
    part = dataset(
        "X",
        [True] * 12,
        {"64/255": [i % 2 > 0 for i in range(12)]},
        shards,
        open_dataset(Data(shards=shards)).fingerprint,
        NAMES,
    )
    part["samples"]["labels"] = labels
    content = results([part], str(folder / "model"), tensors_sha256(clip.model.visual.state_dict()))
    return folder, content, pixels, labels


def read(tmp_path, content):
    save(content, tmp_path / "r")
    return sources.read([tmp_path / "r"])[0]


def test_the_measured_samples_are_attacked_and_shown(place, tmp_path):
    _, content, pixels, labels = place
    made = strip(read(tmp_path, content), 0, 4)
    assert not made.missing and "linf 64/255" in made.title
    assert [s.key for s in made.samples] == ["0", "1", "2", "3"]
    assert [s.measured for s in made.samples] == ["broken by apgd-t", "stood"] * 2
    for shown, image, label in zip(made.samples, pixels, labels):
        assert shown.label == NAMES[label] and shown.before.startswith(NAMES[label])
        assert not shown.after.startswith(NAMES[label])  # nothing stands at 64/255
        picture = np.asarray(Image.open(io.BytesIO(shown.figure.png))).astype(int)
        scale = (picture.shape[1] - 2 * GAP) // 48
        clean, magnified, attacked = (
            picture[::scale, i * (16 * scale + GAP) :][:, : 16 * scale : scale] for i in range(3)
        )
        assert np.array_equal(clean, image)
        assert 60 < abs(attacked - clean).max() <= 64
        moved = attacked - clean
        # the perturbation times 0.5 / eps around grey: 255 where it is +eps, 0 where it is -eps
        assert abs(magnified - (127.5 + moved * 127.5 / 64)).max() <= 3


def test_a_page_writes_no_index_beside_shards_that_a_strangers_results_name(place, tmp_path):
    folder, content, _, _ = copy.deepcopy(place)
    shutil.copytree(folder / "shards", tmp_path / "shards")
    (tmp_path / "shards" / "mmtard-index.npz").unlink()
    content["datasets"][0]["data"] = str(tmp_path / "shards")
    assert "have no index any more; `mmtard index` makes it" in strip(read(tmp_path, content), 0, 2).missing
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["0.tar"]


@pytest.fixture
def photos(place, tmp_path, monkeypatch):
    """An evaluation, as `mmtard evaluate` wrote it, of the shards' images in class folders; the cache is its own."""
    folder, _, pixels, labels = place
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for i, (image, label) in enumerate(zip(pixels, labels)):
        own = tmp_path / "photos" / NAMES[label]
        own.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(own / f"{i:03d}.png")
    words = [
        "evaluate",
        folder / "model",
        "--data",
        tmp_path / "photos",
        "--templates",
        "a photo of a {}",
        "--attacks",
        "pgd",
        "--iters",
        5,
        "--eps",
        "8/255",
    ]
    return [*words, "--workers", 0, "--device", "cpu", "--out", tmp_path / "r"]


def test_images_in_class_folders_are_attacked_too_as_long_as_their_shards_are_there(photos, command, tmp_path):
    assert command(*photos) == 0
    made = strip(sources.read([tmp_path / "r"])[0], 0, 2)
    assert not made.missing and len(made.samples) == 2
    shutil.rmtree(tmp_path / "cache")
    made = strip(sources.read([tmp_path / "r"])[0], 0, 2)
    assert re.fullmatch(
        rf"the shards '{tmp_path}/cache/.*', which '{tmp_path}/photos' was read from, are gone; "
        "the command of its evaluation writes them again",
        made.missing,
    )
    assert command(*photos) == 0
    assert not strip(sources.read([tmp_path / "r"])[0], 0, 2).missing


def test_an_index_that_lies_elsewhere_is_used(place, tmp_path):
    """Beside shards behind which nobody can write, a second index would be built, or none could be."""
    folder, content, _, _ = place
    content = copy.deepcopy(content)
    shutil.copytree(folder / "shards", tmp_path / "shards")
    (tmp_path / "shards" / "mmtard-index.npz").rename(tmp_path / "own.npz")
    content["datasets"][0] |= {
        "data": str(tmp_path / "shards"),
        "shards": str(tmp_path / "shards"),
        "index": str(tmp_path / "own.npz"),
    }
    assert not strip(read(tmp_path, content), 0, 2).missing
    assert not list((tmp_path / "shards").glob("*.npz"))


def test_half_of_the_samples_were_broken_as_far_as_there_are():
    part = Zeroshot.model_validate(dataset("X", [False] + [True] * 9, {"2/255": [False] * 8 + [True] * 2}))
    assert choose(part, "2/255", 4) == [1, 2, 8, 9]
    assert choose(part, "2/255", 8) == [1, 2, 3, 4, 5, 6, 8, 9]
    assert choose(part, "2/255", 100) == list(range(1, 10))


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda c: c["model"].update(weights="openai"),
            "its weights 'openai' are no run or exported folder on this machine",
        ),
        (lambda c: c["model"].update(sha256="0"), "are no longer those that were measured"),
        (lambda c: c["datasets"][0].update(fingerprint="0"), "no longer holds the data that were measured"),
        (lambda c: c["datasets"][0].update(data="gone.tar"), "missing shard 'gone.tar'"),
        (lambda c: c["datasets"][0].update(data="pipe:cat x.tar"), "are remote"),
        (lambda c: c["datasets"][0]["samples"].update(clean=[False] * 12), "no sample is classified correctly"),
        (lambda c: c["datasets"][0].update(eps={}), "no evaluation under attack"),
    ],
)
def test_why_there_is_no_strip_is_said(place, tmp_path, change, words):
    content = copy.deepcopy(place[1])
    change(content)
    made = strip(read(tmp_path, content), 0, 4)
    assert made.samples == [] and words in made.missing
