"""Shards of anybody's images as the splits of a study."""

import io

import numpy as np
import pytest
import webdataset as wds
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from mmtard import config as settings
from mmtard.data.dataset import open_dataset
from mmtard.data.reader import Reader
from mmtard.errors import UserError
from mmtard.examples import materials
from mmtard.examples.shard_splits import split_shards
from mmtard.study.schema import Material, Pretraining, Study


def encoded(i, kind):
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), i, dtype=np.uint8)).save(out, {"jpg": "JPEG"}.get(kind, kind.upper()))
    return out.getvalue()


@pytest.fixture
def source(tmp_path):
    """Two shards of 20 images in all, of two classes and two formats; the names lie one folder up."""
    folder = tmp_path / "source" / "train"
    folder.mkdir(parents=True)
    (folder.parent / "classnames.txt").write_text("sea_lion\noak\n")
    with wds.ShardWriter(str(folder / "%d.tar"), maxcount=12, verbose=0) as shards:
        for i in range(20):
            kind = ("jpg", "png")[i % 3 == 0]
            shards.write({"__key__": f"image{i}", kind: encoded(i, kind), "cls": str(i % 2).encode()})
    return folder


def made(source, out, **options):
    materials.MAKERS["shards"](Material(maker="shards", source=str(source), options=options), out)
    return out


def contents(folder):
    """{bytes of an image: (its format, its class)} of a split."""
    dataset = open_dataset(settings.Data(shards=str(folder)))
    names, reader = (folder / "classnames.txt").read_text().splitlines(), Reader(dataset)
    return {
        reader.image(i): (dataset.file_name(i).rpartition(".")[2], names[label])
        for i, label in enumerate(dataset.labels.tolist())
    }


def test_each_image_is_in_one_split_as_it_was(source, tmp_path):
    out = made(source, tmp_path / "out", validation=4)
    train, test, held = (contents(out / split) for split in ("images/train", "images/test", "validation/test"))
    assert [len(train), len(test), len(held)] == [8, 8, 4]
    given = {
        encoded(i, kind): (kind, ("sea_lion", "oak")[i % 2])
        for i, kind in ((i, ("jpg", "png")[i % 3 == 0]) for i in range(20))
    }
    assert train | test | held == given
    for split in (train, test, held):  # even over the classes
        assert sum(name == "oak" for _, name in split.values()) * 2 == len(split)
    assert (out / "images" / "settings.json").is_file()  # weights that are pretrained on it depend on it


def test_another_seed_splits_otherwise_and_the_same_call_writes_nothing(source, tmp_path):
    one = contents(made(source, tmp_path / "out", validation=4) / "images/train")
    shard = tmp_path / "out" / "images" / "train" / "0.tar"
    before = shard.stat().st_mtime_ns
    assert contents(made(source, tmp_path / "out", validation=4) / "images/train") == one
    assert shard.stat().st_mtime_ns == before
    assert contents(made(source, tmp_path / "other", validation=4, seed=1) / "images/train") != one


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"validation": 7},
            "7 for validation and twice as many for test, 21 in all, of the 20 images of '{source}' leave none",
        ),
        ({"validation": 0}, "data.options.validation: no image to choose settings by; ask for 1 or more"),
        ({"few": 3}, "unknown key of data.options 'few'; known: seed, size, validation"),
    ],
)
def test_what_cannot_be_split_is_told_and_nothing_is_left(options, message, source, tmp_path):
    with pytest.raises(UserError) as refused:
        made(source, tmp_path / "out", **options)
    assert message.format(source=source) in str(refused.value) and not (tmp_path / "out").exists()


def test_other_class_names_are_other_splits(source, tmp_path):
    made(source, tmp_path / "out", validation=4)
    (source.parent / "classnames.txt").write_text("sea lion\noak tree\n")
    names = set(contents(made(source, tmp_path / "out", validation=4) / "images/train").values())
    assert {name for _, name in names} == {"sea lion", "oak tree"}


def test_a_class_of_which_none_is_left_to_train_on_is_named(source, tmp_path):
    (source.parent / "classnames.txt").write_text("sea_lion\noak\nrare\n")
    with wds.ShardWriter(str(source / "9%d.tar"), verbose=0) as shards:
        for i in (90, 91):
            shards.write({"__key__": f"rare{i}", "jpg": encoded(i, "jpg"), "cls": b"2"})
    with pytest.raises(UserError, match="4 leaves no image of class 'rare' of .* to train on, which has 2"):
        made(source, tmp_path / "out", validation=4)


@pytest.mark.parametrize("label, problem", [({}, "no .cls member"), ({"cls": b"1.0"}, ".cls is not a class number")])
def test_an_image_without_a_label_is_named(label, problem, source, tmp_path):
    with wds.ShardWriter(str(source / "9%d.tar"), verbose=0) as shards:
        shards.write({"__key__": "bare", "jpg": encoded(1, "jpg"), **label})
    with pytest.raises(UserError, match=f"data.source: '90.tar/bare': {problem}; settings are chosen by classes"):
        made(source, tmp_path / "out", validation=2)


@pytest.mark.parametrize(
    "names, message",
    [
        ("sea_lion\n", "data.source: .* has 1 names, and the shards have a sample of label 1"),
        (None, "data.source: no classnames.txt beside the shards of .*; write one there"),
    ],
)
def test_a_label_that_has_no_name_is_told(names, message, source, tmp_path):
    file = source.parent / "classnames.txt"
    file.unlink() if names is None else file.write_text(names)
    with pytest.raises(UserError, match=message):
        made(source, tmp_path / "out", validation=2)


def test_images_of_one_class_are_no_study(tmp_path):
    with wds.ShardWriter(str(tmp_path / "%d.tar"), verbose=0) as shards:
        for i in range(9):
            shards.write({"__key__": f"image{i}", "png": encoded(i, "png"), "cls": b"1"})
    (tmp_path / "classnames.txt").write_text("sea_lion\noak\n")
    with pytest.raises(UserError, match="data.source: .* has images of class 'oak' alone; a study takes 2 classes"):
        made(tmp_path, tmp_path / "out", validation=2)


def test_what_is_not_read_is_said(source, tmp_path, capsys):
    with wds.ShardWriter(str(source / "9%d.tar"), verbose=0) as shards:
        shards.write({"__key__": "moving", "gif": b"GIF89a", "cls": b"0"})
        shards.write({"__key__": "still", "png": encoded(90, "png"), "cls": b"0"})
    made(source, tmp_path / "out", validation=4)
    said = capsys.readouterr().out
    assert f"data.source '{source}': not read: 1 .gif images" in said and "such as 'moving.gif'" in said


@pytest.mark.parametrize(
    "packed, message",
    [
        (False, "data.source: no .tar in '.*empty'; write shards with `mmtard shards IMAGES"),
        (True, "data.source: no .tar in '.*empty' but '0.tar.gz'; unpack it to plain .tar"),
    ],
)
def test_a_source_without_shards_is_told_before_anything_is_made(tmp_path, packed, message):
    (tmp_path / "empty").mkdir()
    if packed:
        (tmp_path / "empty" / "0.tar.gz").touch()
    study = Study.model_construct(
        out=str(tmp_path / "out"), data=Material(maker="shards", source=str(tmp_path / "empty")), pretrain={}
    )
    with pytest.raises(UserError, match=message):
        materials.check(study)


def test_shards_in_train_are_a_source(source, tmp_path):
    made(source.parent, tmp_path / "out", validation=2)
    material = Material(maker="shards", source=str(source.parent))
    materials.check(Study.model_construct(out=str(tmp_path / "out"), data=material, pretrain={}))


def test_an_index_that_has_grown_stale_is_told_as_the_sources(source, tmp_path):
    made(source, tmp_path / "out", validation=2)
    with wds.ShardWriter(str(source / "9%d.tar"), verbose=0) as shards:
        shards.write({"__key__": "more", "png": encoded(1, "png"), "cls": b"0"})
    with pytest.raises(UserError, match=f"data.source '{source}': "):
        made(source, tmp_path / "out", validation=2)


def test_images_that_runs_came_of_are_not_replaced(source, tmp_path, capsys):
    made(source, tmp_path / "out", validation=2)
    with pytest.raises(UserError, match="out' was made with another validation than it would be now"):
        split_shards(source, tmp_path / "out", validation=4, size=0, seed=0, keep=True)
    before = (tmp_path / "out").stat().st_ino
    moved = source.parent.rename(tmp_path / "moved") / source.name
    split_shards(moved, tmp_path / "out", validation=2, size=0, seed=0, keep=True)  # the same images, elsewhere
    assert (tmp_path / "out").stat().st_ino == before
    assert f"stays as it was made of '{source}'" in capsys.readouterr().out


def test_without_a_source_it_is_asked_for(tmp_path):
    with pytest.raises(UserError, match="data.source: name the folder of the shards"):
        materials.MAKERS["shards"](Material(maker="shards"), tmp_path / "out")


def test_images_are_brought_to_a_size_as_for_a_model_and_captions_come_along(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "classnames.txt").write_text("oak\nelm\n")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    photograph = Image.fromarray(pixels).resize((40, 24))
    with wds.TarWriter(str(folder / "0.tar")) as tar:
        for i in range(8):
            out = io.BytesIO()
            photograph.save(out, "PNG")
            label = str(i % 2).encode()
            tar.write({"__key__": f"{i}", "png": out.getvalue(), "cls": label, **({"txt": f"tree {i}"} if i else {})})
    out = made(folder, tmp_path / "out", validation=1, size=8)
    splits = [out / split for split in ("images/train", "images/test", "validation/test")]
    readers = [Reader(open_dataset(settings.Data(shards=str(split)))) for split in splits]
    found = [(reader, i) for reader in readers for i in range(len(reader.dataset))]
    assert sorted(reader.caption(i) for reader, i in found) == ["", *(f"tree {i}" for i in range(1, 8))]
    expected = Compose([Resize(8, InterpolationMode.BICUBIC), CenterCrop(8)])(photograph)
    for reader, i in found:
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(reader.image(i)))), np.asarray(expected))


def test_an_image_that_cannot_be_brought_to_a_size_is_named(source, tmp_path):
    with wds.ShardWriter(str(source / "9%d.tar"), verbose=0) as shards:
        shards.write({"__key__": "half", "png": encoded(1, "png")[:40], "cls": b"0"})
    with pytest.raises(UserError, match="data.source: '90.tar/half' cannot be decoded"):
        made(source, tmp_path / "out", validation=2, size=8)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "size, message",
    [
        (0, "' of '{source}' has 8 x 8 px"),
        (16, "data.options.size: 16, and pretrain.student.architecture, tiny_clip, takes 32 px; write 32"),
    ],
)
def test_images_that_cannot_be_pretrained_on_are_told_where_their_size_was_given(size, message, source, tmp_path):
    out = tmp_path / "study"
    how = Pretraining(architecture="tiny_clip", data=str(out / "data" / "images"), steps=4)
    material = Material(maker="shards", source=str(source), options={"validation": 2, "size": size})
    study = Study.model_construct(out=str(out), data=material, pretrain={"student": how})
    with pytest.raises(UserError, match=message.format(source=source)):
        materials.make(study)
