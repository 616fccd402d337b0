"""CIFAR as the splits of a study: no image is in two of them, captions name the classes of both."""

import io

import numpy as np
import pytest
from PIL import Image

from mmtard import config as settings
from mmtard.data.dataset import open_dataset
from mmtard.data.images import decode
from mmtard.data.reader import Reader
from mmtard.errors import UserError
from mmtard.examples import materials
from mmtard.examples.cifar_splits import make_splits
from mmtard.examples.pretrain import Pretraining
from mmtard.study.schema import Material

TEN, HUNDRED = ["cat", "dog"], ["sea_lion", "oak", "rose"]
SIZES = {"trained": "cifar100", "validation": 3, "zeroshot_validation": 2, "few": 3, "seed": 0}


def encoded(i):
    out = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), i, dtype=np.uint8)).save(out, "WEBP", lossless=True)
    return out.getvalue()


def archive(folder, name, first, n, classes):
    images = [encoded(i) for i in range(first, first + n)]
    offset, label = np.cumsum([0, *map(len, images)]), np.arange(n) % len(classes)
    blob = np.frombuffer(b"".join(images), np.uint8)
    np.savez(folder / f"{name}.npz", blob=blob, offset=offset, label=label, classes=np.array(classes))


@pytest.fixture
def source(tmp_path):
    """Image i is grey of level i: 8 + 4 of CIFAR-10 in three archives, 18 of CIFAR-100, which has no test images."""
    folder = tmp_path / "source"
    folder.mkdir()
    archive(folder, "cifar10_train0of2", 0, 4, TEN)
    archive(folder, "cifar10_train1of2", 4, 4, TEN)
    archive(folder, "cifar10_test", 8, 4, TEN)
    archive(folder, "cifar100_train_part", 20, 18, HUNDRED)
    return folder


def levels(folder):
    """{grey level: class name} of a split."""
    dataset = open_dataset(settings.Data(shards=str(folder)))
    names, reader = (folder / "classnames.txt").read_text().splitlines(), Reader(dataset)
    pixels = [int(np.asarray(decode(reader.image(i)))[0, 0, 0]) for i in range(len(dataset))]
    return {level: names[label] for level, label in zip(pixels, dataset.labels.tolist())}


def test_each_image_is_in_one_split_with_its_own_class(source, tmp_path):
    out = tmp_path / "out"
    make_splits(source, out, **SIZES)
    train, test, zeroshot = (levels(out / "images" / s) for s in ("train", "test", "zeroshot"))
    held, held_zeroshot = (levels(out / "validation" / s) for s in ("test", "zeroshot"))
    assert [len(s) for s in (train, held, test, zeroshot, held_zeroshot)] == [9, 3, 6, 4, 2]
    parts = [train, held, test, zeroshot, held_zeroshot]
    assert len({level for part in parts for level in part}) == sum(map(len, parts))
    assert set(zeroshot) == {8, 9, 10, 11}  # the test images of the set that is not trained on
    for part in (train, held, test):
        assert all(name == HUNDRED[(level - 20) % 3].replace("_", " ") for level, name in part.items())
    assert sorted(held.values()) == ["oak", "rose", "sea lion"]  # even over the classes
    pretraining = levels(out / "pretraining" / "train")
    assert set(pretraining) == set(train) | set(range(8)) - set(held_zeroshot)
    assert {n for level, n in pretraining.items() if level < 20} == {"cat", "dog"}
    assert Pretraining().settings(out / "pretraining")["data"]["trained"] == "cifar100"  # weights depend on it
    few = levels(out / "images" / "few")
    assert len(few) == 3 and few.items() <= train.items() and len(set(few.values())) == 3


def test_one_set_alone_is_taken_without_its_name_from_folders_or_archives(tmp_path):
    folders = tmp_path / "folders"
    for split, first in (("train", 0), ("test", 100)):
        for c, name in enumerate(TEN):
            (folders / split / name).mkdir(parents=True)
            for i in range(3):
                (folders / split / name / f"{i}.webp").write_bytes(encoded(first + 10 * c + i))
            (folders / split / name / ".DS_Store").write_text("what a file manager leaves is no image")
        (folders / split / ".cache").mkdir()
    make_splits(folders, tmp_path / "out", **SIZES | {"trained": "cifar10", "validation": 2, "zeroshot_validation": 0})
    assert len(levels(tmp_path / "out" / "images" / "train")) == 4
    assert set(levels(tmp_path / "out" / "images" / "test")) == {100, 101, 102, 110, 111, 112}
    assert not (tmp_path / "out" / "images" / "zeroshot").exists()


def test_a_second_call_writes_nothing(source, tmp_path):
    make_splits(source, tmp_path / "out", **SIZES)
    before = (tmp_path / "out" / "images" / "train" / "0.tar").stat().st_mtime_ns
    make_splits(source, tmp_path / "out", **SIZES)
    assert (tmp_path / "out" / "images" / "train" / "0.tar").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "material, message",
    [
        ({"maker": "cifar"}, "data.source: name the folder of CIFAR-10 and CIFAR-100"),
        ({"maker": "cifar", "source": "HERE"}, "has neither archives cifar100_*train*.npz nor a folder"),
        ({"maker": "cifar", "source": "HERE", "options": {"fwe": 1}}, "unknown key of data.options 'fwe'; known: few"),
        (
            {"maker": "cifar", "source": "HERE", "options": {"few": "1"}},
            "data.options.few: '1' is no whole number of 0 or more; write e.g. 2000",
        ),
        (
            {"maker": "cifar", "source": "HERE", "options": {"trained": "svhn"}},
            "'svhn' is neither of cifar10, cifar100",
        ),
        (
            {"maker": "shapes", "options": {"train": -1}},
            "data.options.train: -1 is no whole number of 0 or more; write e.g. 8000",
        ),
    ],
)
def test_what_cannot_be_made_is_told_and_nothing_is_left(material, message, tmp_path):
    material = {key: str(tmp_path) if value == "HERE" else value for key, value in material.items()}
    with pytest.raises(UserError) as refused:
        materials.MAKERS[material["maker"]](Material(**material), tmp_path / "out")
    assert message in str(refused.value) and not (tmp_path / "out").exists()


def test_more_validation_images_than_there_are_is_told(source, tmp_path):
    with pytest.raises(UserError, match="8 for validation of the 8 images of cifar10 leave none to train on"):
        make_splits(source, tmp_path / "out", **SIZES | {"zeroshot_validation": 8})


def test_rendered_validation_images_are_no_others_splits(tmp_path):
    """The same classes, and other images than those of the tests: rendered with a seed of their own."""
    options = {"train": 36, "test": 36, "zeroshot": 12, "validation": 36, "validation_zeroshot": 12}
    materials.shapes(Material(maker="shapes", options=options), tmp_path)
    shown = open_dataset(settings.Data(shards=str(tmp_path / "images" / "test")))
    held = open_dataset(settings.Data(shards=str(tmp_path / "validation" / "test")))
    assert len(shown) == len(held) == 36
    for split in ("test", "zeroshot"):
        names = [(tmp_path / part / split / "classnames.txt").read_text() for part in ("images", "validation")]
        assert names[0] == names[1]
    images = [[Reader(d).image(i) for i in range(36)] for d in (shown, held)]
    assert not set(images[0]) & set(images[1])
