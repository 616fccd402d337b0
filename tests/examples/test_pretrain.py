"""The tiny CLIP: it builds offline, learns, and comes out the same twice."""

import io
import json

import numpy as np
import open_clip
import pytest
import torch
import webdataset as wds
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from mmtard.errors import UserError
from mmtard.examples import materials, pretrain as pretraining
from mmtard.examples.pretrain import ARCHITECTURE, Pretraining, pretrain, read_split
from mmtard.examples.shapes import make_data
from mmtard.folders import SETTINGS
from mmtard.study import schema


def test_the_architecture_builds_without_a_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    open_clip.add_model_config(ARCHITECTURE)
    model = open_clip.create_model("tiny_clip")
    tokens = open_clip.get_tokenizer("tiny_clip")(["a picture showing a large checkered purple triangle at the bottom"])
    end_of_text = 49407
    assert tokens.shape == (1, 20) and end_of_text in tokens and tokens[0, -1] == 0
    assert (
        model.encode_image(torch.zeros(2, 3, 32, 32)).shape == model.encode_text(tokens.repeat(2, 1)).shape == (2, 64)
    )


@pytest.mark.slow
def test_pretraining_learns_and_repeats_itself(tmp_path):
    data = make_data(tmp_path / "data", train=720, test=180, zeroshot=60)
    settings = dict(how=Pretraining(steps=40, batch_size=64, seed=1), progress=False)
    accuracy = pretrain(data, tmp_path / "a", **settings)
    chance = 1 / 36
    assert accuracy["test"] > 3 * chance
    pretrain(data, tmp_path / "b", **settings)
    first, second = (load_file(tmp_path / run / "tiny_clip.safetensors") for run in "ab")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)

    written = (tmp_path / "a" / "tiny_clip.safetensors").stat().st_mtime_ns
    assert pretrain(data, tmp_path / "a", **settings) == accuracy
    assert (tmp_path / "a" / "tiny_clip.safetensors").stat().st_mtime_ns == written


def test_weights_that_do_not_fit_on_the_disk_are_one_line(tmp_path, monkeypatch):
    def full(*args, **_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(materials, "pretrain", full)
    how = {"architecture": "tiny_clip", "data": str(tmp_path), "steps": 1}
    study = schema.Study.model_construct(out=str(tmp_path), data=None, pretrain={"student": schema.Pretraining(**how)})
    with pytest.raises(UserError, match=r"cannot write '.*pretrained/student': No space left on device \(the disk"):
        materials.make(study)


def test_images_and_captions_are_read_as_a_training_reads_them(tmp_path):
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    out = io.BytesIO()
    Image.fromarray(np.full((4, 4), 0x7C21, dtype=np.uint16)).save(out, "PNG")
    captions = ['["a red cat", "a cat"]', "a dog\nthe dog", "", None]
    with wds.TarWriter(str(tmp_path / "0.tar")) as tar:
        for i, text in enumerate(captions):
            text = {} if text is None else {"txt": text}
            tar.write({"__key__": str(i), "png": out.getvalue(), "cls": str(i % 2).encode(), **text})
    images, labels, captions, names = read_split(tmp_path)
    assert images.shape == (4, 3, 4, 4) and (images == 0x7C).all(), "the upper byte of 16 bits"
    assert captions == ["a red cat", "a dog", "a photo of a cat", "a photo of a dog"]
    assert labels.tolist() == [0, 1, 0, 1] and names == ["cat", "dog"]


@pytest.mark.parametrize(
    "label, message",
    [
        (None, "data: '0.tar/1' of '.*': no .cls member; give it one"),
        (b"2", "data: .* 1 names, .* sample of label 2"),
    ],
)
def test_an_image_whose_class_has_no_name_is_told(tmp_path, label, message):
    (tmp_path / "classnames.txt").write_text("cat\n")
    with wds.TarWriter(str(tmp_path / "0.tar")) as tar:
        for i, given in enumerate((b"0", label)):
            tar.write({"__key__": str(i), "png": png(32), **({"cls": given} if given else {})})
    with pytest.raises(UserError, match=message):
        read_split(tmp_path)


def png(size):
    out = io.BytesIO()
    Image.new("RGB", (size, size)).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize(
    "last, message",
    [
        pytest.param(
            png(40),
            "data: '0.tar/3' of '.*train' has 40 x 40 px, and tiny_clip is pretrained on 32 x 32; .*options.size=32",
            id="size",
        ),
        pytest.param(
            png(32)[:40], r"data: '0.tar/3' of '.*train' cannot be decoded \(.+\); leave it out", id="damaged"
        ),
    ],
)
def test_an_image_that_cannot_be_pretrained_on_is_named(tmp_path, last, message):
    folder = tmp_path / "data" / "train"
    folder.mkdir(parents=True)
    (folder / "classnames.txt").write_text("cat\n")
    (folder.parent / SETTINGS).write_text('{"kind": "made by hand"}\n')
    with wds.TarWriter(str(folder / "0.tar")) as tar:
        for i, image in enumerate([png(32)] * 3 + [last]):
            tar.write({"__key__": str(i), "png": image, "cls": b"0"})
    how = schema.Pretraining(architecture="tiny_clip", data=str(tmp_path / "data"), steps=4)
    study = schema.Study.model_construct(out=str(tmp_path / "out"), data=None, pretrain={"student": how})
    with pytest.raises(UserError, match=message):
        materials.make(study)


def own_study(tmp_path, last="", size=32, **how):
    """A study that pretrains on eight images of the user's own, `last` among those of its test split."""
    for split in ("train", "test"):
        folder = tmp_path / "data" / split
        folder.mkdir(parents=True)
        (folder / "classnames.txt").write_text("cat\n")
        with wds.TarWriter(str(folder / "0.tar")) as tar:
            for i in range(8):
                image = last if last and split == "test" and i == 7 else png(size)
                tar.write({"__key__": str(i), "png": image, "cls": b"0"})
    given = {"architecture": "tiny_clip", "data": str(tmp_path / "data"), "steps": 2, "batch_size": 4, **how}
    return schema.Study.model_construct(
        out=str(tmp_path / "out"), data=None, pretrain={"student": schema.Pretraining(**given)}
    )


@pytest.mark.parametrize("last", [png(32)[:40], png(40), None], ids=["damaged", "size", "size of all"])
def test_an_image_of_a_measured_split_is_told_before_the_work(tmp_path, monkeypatch, last):
    one = own_study(tmp_path, last or "")
    if last is None:
        with wds.TarWriter(str(tmp_path / "data" / "test" / "0.tar")) as tar:
            tar.write({"__key__": "7", "png": png(40), "cls": b"0"})
    monkeypatch.setattr(pretraining, "_train", lambda *_: pytest.fail("trained before it was told"))
    with pytest.raises(UserError, match="data: '0.tar/7' of '.*test' "):
        materials.make(one)


def test_a_device_that_is_full_is_not_blamed_on_an_image(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pretraining, "_train", full)
    with pytest.raises(torch.OutOfMemoryError):
        materials.make(own_study(tmp_path, size=40))


def test_weights_that_runs_came_of_are_not_replaced(tmp_path):
    one = own_study(tmp_path)
    materials.make(one)
    weights = tmp_path / "out" / "pretrained" / "student" / "tiny_clip.safetensors"
    before = weights.read_bytes()
    (tmp_path / "out" / "runs" / "tecoa").mkdir(parents=True)
    (tmp_path / "out" / "runs" / "tecoa" / "config.yaml").touch()
    materials.make(one)
    for changed, what in (({"seed": 1}, "seed"), ({"steps": 3, "lr": 1e-2}, "steps and lr")):
        other = one.model_copy(update={"pretrain": {"student": one.pretrain["student"].model_copy(update=changed)}})
        with pytest.raises(UserError, match=f"pretrained/student' was made with another {what} than it would be now"):
            materials.make(other)
    with wds.TarWriter(str(tmp_path / "data" / "train" / "0.tar")) as tar:
        tar.write({"__key__": "one", "png": png(32), "cls": b"0"})
    (tmp_path / "data" / "train" / "mmtard-index.npz").unlink(missing_ok=True)
    with pytest.raises(UserError, match="was made with another data than it would be now"):
        materials.make(one)
    assert weights.read_bytes() == before


def test_weights_of_an_earlier_version_stay_where_runs_came_of_them(tmp_path, monkeypatch):
    """It noted a hash of its code: whether this version would give the same cannot be told, and need not be."""
    one = own_study(tmp_path)
    materials.make(one)
    file = tmp_path / "out" / "pretrained" / "student" / SETTINGS
    noted = json.loads(file.read_text())
    del noted["made_with"]["version"], noted["made_with"]["architecture"]
    file.write_text(json.dumps(noted | {"made_with": {**noted["made_with"], "code": "0123"}}))
    (tmp_path / "out" / "models" / "clean").mkdir(parents=True)
    (tmp_path / "out" / "models" / "clean" / "config.yaml").touch()
    monkeypatch.setattr(pretraining, "_train", lambda *_: pytest.fail("pretrained again"))
    materials.make(one)


def test_a_model_config_may_name_height_and_width(tmp_path):
    config = json.loads(ARCHITECTURE.read_text())
    config["vision_cfg"]["image_size"] = [32, 32]
    (tmp_path / "wide.json").write_text(json.dumps(config))
    materials.make(own_study(tmp_path, architecture=str(tmp_path / "wide.json")))
    assert (tmp_path / "out" / "pretrained" / "student" / "wide.safetensors").is_file()
