"""The rendered shape world: what is written, what is held out, and that labels say what is drawn."""

import colorsys
import hashlib
import io
import re

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from mmtard.errors import UserError
from mmtard.examples.shapes import COLOURS, HELD_OUT, SHAPES, SIZE, TRAINED, draw, make_data

SIZES = dict(train=72, test=36, zeroshot=24, shard_size=30)


def digests(folder):
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("quickstart") / "data", **SIZES, seed=3)


def samples(data, split):
    shards = sorted(str(path) for path in (data / split).glob("*.tar"))
    return list(wds.WebDataset(shards, shardshuffle=False, nodesplitter=None).to_tuple("__key__", "jpg", "cls", "txt"))


def test_the_seed_alone_decides_the_bytes(data, tmp_path):
    again = make_data(tmp_path / "again", **SIZES, seed=3)
    other = make_data(tmp_path / "other", **SIZES, seed=4)
    assert digests(again) == digests(data)
    assert all(digests(other)[name] != digest for name, digest in digests(data).items() if name.suffix == ".tar")


def test_made_once_remade_for_other_settings_and_never_over_foreign_files(tmp_path):
    out = make_data(tmp_path / "data", train=36, test=36, zeroshot=12)
    (out / "train" / "index").write_text("kept while the settings stay")
    make_data(out, train=36, test=36, zeroshot=12)
    assert (out / "train" / "index").exists()
    make_data(out, train=37, test=36, zeroshot=12)
    assert not (out / "train" / "index").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="mine"):
        make_data(tmp_path / "mine", train=36)


def test_held_out_combinations_never_occur_in_training_but_their_words_do(data):
    assert len(TRAINED) == 36 and len(HELD_OUT) == 12
    assert (data / "train/classnames.txt").read_text().split("\n")[:-1] == TRAINED
    assert (data / "test/classnames.txt").read_text().split("\n")[:-1] == TRAINED
    assert (data / "zeroshot/classnames.txt").read_text().split("\n")[:-1] == HELD_OUT
    captions = [caption.decode() for _, _, _, caption in samples(data, "train")]
    assert not any(name in caption for name in HELD_OUT for caption in captions)
    words = set(" ".join(captions).split())
    assert {word for name in HELD_OUT for word in name.split()} <= words
    assert {colour for colour in COLOURS} | set(SHAPES) == {word for name in TRAINED for word in name.split()}


@pytest.mark.parametrize("split, names", [("train", TRAINED), ("test", TRAINED), ("zeroshot", HELD_OUT)])
def test_webdataset_reads_balanced_mixed_samples(data, split, names):
    read = samples(data, split)
    assert [key for key, *_ in read] == [f"{i:06d}" for i in range(SIZES[split])]
    labels = [int(label) for _, _, label, _ in read]
    assert np.bincount(labels, minlength=len(names)).tolist() == [SIZES[split] // len(names)] * len(names)
    assert labels != sorted(labels)
    for _, jpeg, label, caption in read:
        image = Image.open(io.BytesIO(jpeg))
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (SIZE, SIZE))
        assert re.search(rf"\b{names[int(label)]}\b", caption.decode())


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_named_colour_dominates(colour, shape):
    saturation_of_white = 0.25
    for i in range(5):
        pixels = np.asarray(draw(f"{colour} {shape}", np.random.default_rng(i))[0]) / 255.0
        hsv = np.array([colorsys.rgb_to_hsv(*pixel) for pixel in pixels.reshape(-1, 3)])
        if colour == "white":
            object_pixels = hsv[hsv[:, 2] >= np.quantile(hsv[:, 2], 0.9)]
            assert np.median(object_pixels[:, 1]) < saturation_of_white
        else:
            chroma = hsv[:, 1] * hsv[:, 2]
            hues = hsv[chroma >= np.quantile(chroma, 0.9)][:, 0] * 360
            off = (hues - COLOURS[colour][0] + 180) % 360 - 180
            assert abs(np.median(off)) < 15


def test_shapes_differ_in_how_far_they_fill_their_box():
    def filled(shape):
        fractions = []
        for i in range(20):
            pixels = np.asarray(draw(f"green {shape}", np.random.default_rng(i))[0]).astype(int)
            mask = pixels[..., 1] - pixels[..., [0, 2]].max(-1) > 60
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            fractions.append(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].mean())
        return np.mean(fractions)

    areas = {shape: filled(shape) for shape in SHAPES}
    assert areas["square"] > areas["circle"] > areas["triangle"] > areas["star"]
    assert areas["circle"] > areas["ring"] and areas["square"] > areas["cross"]
