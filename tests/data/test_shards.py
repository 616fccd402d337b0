import io
import os
import shutil

import numpy as np
import pytest
import webdataset
from PIL import Image
from tiny_shards import encode, picture

from mmtard.config import Data
from mmtard.data import shard_writer as module
from mmtard.data.class_names import classnames
from mmtard.data.dataset import open_dataset
from mmtard.data.images import Transform
from mmtard.data.reader import Reader
from mmtard.data.samples import SampleReader
from mmtard.data.shard_writer import write_shards
from mmtard.data.stream import eval_batches
from mmtard.errors import UserError

CLASSES = {"n02": 7, "n01": 9, "n10": 5}


@pytest.fixture
def images(tmp_path):
    for number, (name, count) in enumerate(CLASSES.items()):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(count):
            (tmp_path / "images" / name / f"{name}_{i}.v1.JPEG").write_bytes(
                encode(picture(100 * number + i, (60, 40 + i)))
            )
    (tmp_path / "images" / "n01" / "n01_3.v1.txt").write_text("the third")
    (tmp_path / "images" / "n01" / "notes.md").write_text("no image")
    return tmp_path / "images"


def write(images, out, **more):
    return write_shards(images, out, samples_per_shard=8, **{"jobs": 1, "progress": False, **more})


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_image_folder_to_data_set(images, tmp_path):
    written = write(images, tmp_path / "out")
    assert str(written) == "21 samples of 3 classes in 3 shards"
    assert (tmp_path / "out" / "nshards.txt").read_text() == "3\n"
    data = Data(shards=str(tmp_path / "out"))
    dataset = open_dataset(data)
    assert classnames(data, dataset) == ["n01", "n02", "n10"] and np.bincount(dataset.labels).tolist() == [9, 7, 5]
    assert dataset.shard_counts.tolist() == [8, 8, 5] and all(
        len(set(dataset.labels[a : a + 8])) > 1 for a in (0, 8)
    ), "classes are mixed"
    reader = Reader(dataset)
    sources = {p.read_bytes(): p for p in images.rglob("*.JPEG")}
    for i in range(21):
        path = sources.pop(reader.image(i))
        assert (
            path.parent.name == ["n01", "n02", "n10"][dataset.labels[i]]
            and f"{path.parent.name}-{path.name[:5]}" in dataset.keys[i]
        )
        assert reader.caption(i) == ("the third" if path.name == "n01_3.v1.JPEG" else "")
    theirs = list(webdataset.WebDataset([str(tmp_path / "out" / f"{i:06d}.tar") for i in range(3)], shardshuffle=False))
    assert [s["__key__"] for s in theirs] == dataset.keys and [int(s["cls"]) for s in theirs] == dataset.labels.tolist()


@pytest.mark.parametrize("folders, order", [
    (["0", "1", "2", "10", "100"], ["0", "1", "2", "10", "100"]),
    (["10", "9", "a"], ["10", "9", "a"]),
    (["n10", "n9"], ["n10", "n9"]),
])  # fmt: skip
def test_folders_that_are_all_numbers_are_in_their_order(tmp_path, folders, order):
    for name in folders:
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "0.png").write_bytes(encode(picture(1)))
    write(tmp_path / "images", tmp_path / "out")
    data = Data(shards=str(tmp_path / "out"))
    assert classnames(data, open_dataset(data)) == order


@pytest.mark.parametrize("more", [{}, {"resize": 32}])
def test_bytes_do_not_depend_on_jobs(images, tmp_path, more):
    write(images, tmp_path / "a", **more)
    write(images, tmp_path / "b", jobs=3, **more)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_resize_shrinks_the_shorter_side_and_never_enlarges(images, tmp_path):
    written = write(images, tmp_path / "out", resize=45)
    dataset = open_dataset(Data(shards=str(tmp_path / "out")))
    sides = set()
    for i in range(written.samples):
        with Image.open(io.BytesIO(Reader(dataset).image(i))) as image:
            sides.add(image.size)
    assert sides == {(60, h) for h in range(40, 46)} | {(int(45 * 60 / h), 45) for h in (46, 47, 48)}


def test_an_interrupted_call_goes_on(images, tmp_path, monkeypatch):
    write(images, tmp_path / "whole")
    image, calls = module._image, []

    def stops(*a):
        calls.append(a)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return image(*a)

    monkeypatch.setattr(module, "_image", stops)
    with pytest.raises(KeyboardInterrupt):
        write(images, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["000000.tar", "shards.json"]
    (tmp_path / "out" / ".000001.tar.4711.part").write_bytes(b"left by a killed call")
    assert str(write(images, tmp_path / "out")) == "21 samples of 3 classes in 3 shards"
    assert len(calls) == 12 + 13, "the finished shard was written again"
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_other_settings_or_images_are_refused(images, tmp_path):
    write(images, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="resize was None, now 32"):
        write(images, tmp_path / "out", resize=32)
    with pytest.raises(UserError, match="shuffle_seed was 0, now 1"):
        write(images, tmp_path / "out", shuffle_seed=1)
    shutil.copy(images / "n01" / "n01_0.v1.JPEG", images / "n01" / "more.jpg")
    with pytest.raises(UserError, match="images_sha256 was"):
        write(images, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    (tmp_path / "out" / "shards.json").unlink()
    with pytest.raises(UserError, match="were not written here"):
        write(images, tmp_path / "out")


def test_unreadable_images_are_left_out_and_listed(images, tmp_path):
    bad = images / "n10" / "n10_2.v1.JPEG"
    bad.write_bytes(bad.read_bytes()[:-300])
    written = write(images, tmp_path / "out", resize=32)
    assert written.samples == 20 and written.skipped == [str(bad)]
    assert str(written).endswith("; 1 unreadable image left out, listed in skipped.txt beside the shards")
    assert (tmp_path / "out" / "skipped.txt").read_text() == f"{bad}\n"
    again = write(images, tmp_path / "out", resize=32)
    assert again == written, "a second call knows what the first left out"


def test_class_names_from_a_file(images, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("tench\ngoldfish\nshark\n")
    write(images, tmp_path / "out", classnames=names)
    data = Data(shards=str(tmp_path / "out"))
    assert classnames(data, open_dataset(data)) == ["tench", "goldfish", "shark"]
    names.write_text("tench\n")
    with pytest.raises(UserError, match="has 1 names for 3 class folders"):
        write(images, tmp_path / "other", classnames=names)


def test_folders_that_are_no_image_folders(images, tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        write(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(UserError, match="has no sub-folders"):
        write(images / "n01", tmp_path / "out")
    with pytest.raises(UserError, match="class folder '.*images' has no image"):
        write(tmp_path, images.parent.parent / "out-of-the-way")
    with pytest.raises(UserError, match="lies inside the image folder"):
        write(images, images / "out")
    assert not (tmp_path / "out").exists()


def test_names_that_are_no_text_and_links_to_nothing_are_refused_before_any_work(images, tmp_path):
    latin1 = os.fsencode(images) + b"/caf\xe9"
    os.mkdir(latin1)
    with pytest.raises(
        UserError, match="the class folder 'caf.udce9' has a name that cannot be written as text; rename it"
    ):
        write(images, tmp_path / "out")
    os.rmdir(latin1)
    (images / "n01" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    with pytest.raises(UserError, match="gone.jpg' cannot be read .No such file or directory.; mend or remove it"):
        write(images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_keys_are_plain_whatever_the_file_names(tmp_path):
    folder = tmp_path / "images" / "schöne Käfer.2"
    folder.mkdir(parents=True)
    for name in ("a b.c.jpg", "a b_c.jpg", "ü" * 90 + ".png"):
        image = picture(len(name))
        image.save(folder / name, "PNG" if name.endswith("png") else "JPEG")
    assert write(tmp_path / "images", tmp_path / "out").samples == 3
    dataset = open_dataset(Data(shards=str(tmp_path / "out")))
    assert len(set(dataset.keys)) == 3 and all("." not in k and k.isascii() for k in dataset.keys)
    assert classnames(Data(shards=str(tmp_path / "out")), dataset) == ["schöne Käfer.2"]
    assert sum(len(b) for b in eval_batches(SampleReader(dataset, Transform(16)), range(3), 2)) == 3


def test_images_that_are_left_out_are_counted_by_why_and_nested_folders_are_taken_on_request(images, tmp_path):
    deep = images / "n01" / "deep"
    deep.mkdir()
    for name in ("a.JPG", "b.PNG"):
        picture(7).save(deep / name)
    picture(8).save(images / "n02" / "old.gif")
    picture(9).save(images / "loose.png")
    written = write(images, tmp_path / "out")
    assert written.samples == 21 and str(written) == (
        "21 samples of 3 classes in 3 shards; 4 images left out: "
        f"1 beside the class folders, in '{images}' itself; "
        "2 below a class folder (--nested makes each such folder a class); "
        "1 of a kind that is not read (.gif; jpg, jpeg, png, webp are), listed in skipped.txt beside the shards"
    )
    nested = write(images, tmp_path / "nested", nested=True)
    assert nested.samples == 23 and nested.classes == 4 and sum(nested.left_out.values()) == 2
    data = Data(shards=str(tmp_path / "nested"))
    assert classnames(data, open_dataset(data)) == ["n01", "n01/deep", "n02", "n10"]
    with pytest.raises(UserError, match="class folder '.*images' has no image.*23 lie in folders below it: --nested"):
        (images / "loose.png").unlink()
        (images / "n02" / "old.gif").unlink()
        write(tmp_path, images.parent.parent / f"out-of-the-way-{os.getpid()}")


def test_images_of_several_kinds_that_are_not_read_are_one_clause_and_listed_by_name(images, tmp_path):
    others = [images / "n01" / "b.AVIF", images / "n02" / "a.bmp", images / "n02" / "c.bmp"]
    for path in others:
        path.write_bytes(b"not looked into")
    bad = images / "n10" / "n10_2.v1.JPEG"
    bad.write_bytes(bad.read_bytes()[:-300])
    written = write(images, tmp_path / "out", resize=32)
    assert str(written).endswith(
        "; 1 unreadable image left out, listed in skipped.txt beside the shards; 3 images left out: "
        "3 of kinds that are not read (.avif, .bmp; jpg, jpeg, png, webp are), listed in skipped.txt beside the shards"
    )
    assert (tmp_path / "out" / "skipped.txt").read_text().splitlines() == [str(path) for path in [*others, bad]]
    (images / "none").mkdir()
    for name in ("a.avif", "b.bmp"):
        (images / "none" / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"none' has no image .*; 2 are of kinds that are not read \(.avif, .bmp; jpg"):
        write(images, tmp_path / "refused")


@pytest.mark.parametrize("more", [{}, {"resize": 32}])
def test_images_exchanged_between_classes_are_noticed_when_a_folder_goes_on(images, tmp_path, more):
    """Names and sizes stay the same: what tells is when the files were moved."""
    pair = [images / "n01" / "x.png", images / "n02" / "x.png"]
    for path, colour in zip(pair, ((255, 0, 0), (0, 0, 255))):
        Image.new("RGB", (64, 64), colour).save(path, compress_level=0)
    assert pair[0].stat().st_size == pair[1].stat().st_size
    write(images, tmp_path / "out", **more)
    before = contents(tmp_path / "out")
    os.utime(images / "n10" / "n10_0.v1.JPEG")
    assert write(images, tmp_path / "out", **more).samples == 23, "touched, but the same bytes"
    pair[0].rename(images / "swap")
    pair[1].rename(pair[0])
    (images / "swap").rename(pair[1])
    with pytest.raises(UserError, match="holds shards of other images .* of its shards would be written otherwise now"):
        write(images, tmp_path / "out", **more)
    assert {k: v for k, v in contents(tmp_path / "out").items() if k.endswith("tar")} == {
        k: v for k, v in before.items() if k.endswith("tar")
    }


def test_a_class_name_of_any_letters_is_read_as_it_was_written(images, tmp_path):
    strange = "dog\u2028big \x85 bird"
    (images / "n02").rename(images / strange)
    write(images, tmp_path / "out")
    data = Data(shards=str(tmp_path / "out"))
    assert classnames(data, open_dataset(data)) == [strange, "n01", "n10"]
    (images / strange).rename(images / "two\nlines")
    with pytest.raises(
        UserError, match="the class folder 'two.nlines' has a name that cannot be written as text; rename it"
    ):
        write(images, tmp_path / "again")


@pytest.mark.parametrize("name", ["classnames.txt", "nshards.txt", "mmtard-index.npz"])
def test_a_file_of_the_users_own_beside_the_shards_is_not_overwritten(images, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(UserError, match=f"'.*out' holds {name}, which were not written here; choose another folder"):
        write(images, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir() if path.read_text() == "mine"] == [name]


@pytest.mark.parametrize("record", ["[1]", "12", "[" * 9999, "{"])
def test_a_damaged_record_is_one_line(images, tmp_path, record):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "shards.json").write_text(record)
    with pytest.raises(UserError, match="shards.json' is damaged; remove '.*out' and write the shards anew"):
        write(images, tmp_path / "out")
