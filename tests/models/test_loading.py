import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import open_clip
import pytest
import torch
from embeddings_of import embeddings, images, refused

from mmtard.config import Model
from mmtard.errors import UserError
from mmtard.models import clip, loading
from mmtard.runs import checkpoint_writer


def test_an_exported_folder_gives_its_embeddings_here_and_in_open_clip(base, tmp_path):
    base.save(tmp_path / "out")
    assert torch.equal(embeddings(loading.load_clip(Model(weights=str(tmp_path / "out")))), embeddings(base))
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    assert all(torch.equal(v, base.model.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Call with a model and org/name: that repository, in the only cache that Hugging Face's library looks into."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def publish(clip, name):
        repository, commit = tmp_path / "hub" / f"models--{name.replace('/', '--')}", "a" * 40
        clip.save(repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / ".no_exist" / commit).mkdir(parents=True)
        (repository / ".no_exist" / commit / "config.json").touch()  # as the library notes that there is none
        (repository / "refs" / "main").write_text(commit)

    return publish


def test_a_model_of_the_hub_gives_its_embeddings(base, hub, tmp_path):
    hub(base, "org/clip")
    loaded = loading.load_clip(Model(weights="hf-hub:org/clip"))
    assert torch.equal(embeddings(loaded), embeddings(base)) and loaded.config == base.config
    loaded.save(tmp_path / "start")  # what a run keeps of it
    assert torch.equal(embeddings(loading.load_clip(Model(weights=str(tmp_path / "start")))), embeddings(base))


@pytest.mark.slow
def test_a_model_of_the_hub_brings_its_own_tokenizer(vit, word_tokenizer, hub, tmp_path):
    """In a process of its own: transformers reads the place of its cache once."""
    cfg = json.loads(Path(vit).read_text())
    cfg["text_cfg"]["hf_tokenizer_name"] = str(word_tokenizer)
    (tmp_path / "tests-words.json").write_text(json.dumps(cfg))
    words = loading.load_clip(Model(arch=str(tmp_path / "tests-words.json"), weights="random"))
    expected = words.class_embeddings(["cat", "red cow"], ["a photo of a {}"])
    hub(words, "org/words")
    (config,) = (tmp_path / "hub").glob("*/snapshots/*/open_clip_config.json")
    config.write_text(config.read_text().replace(str(word_tokenizer), "org/words"))
    script = (
        "import torch; from mmtard.models.loading import load_clip; from mmtard.config import Model; clip ="
        " load_clip(Model(weights='hf-hub:org/words'));"
        "torch.save(clip.class_embeddings(['cat', 'red cow'], ['a photo of a {}']), 'out.pt'); from pathlib import"
        " Path; clip.save(Path('saved'))"
    )
    offline = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.getcwd()}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=os.environ | offline, check=True, timeout=120)
    assert torch.equal(torch.load(tmp_path / "out.pt"), expected)
    assert torch.equal(
        loading.load_clip(Model(weights=str(tmp_path / "saved"))).class_embeddings(
            ["cat", "red cow"], ["a photo of a {}"]
        ),
        expected,
    )


def test_what_the_hub_does_not_have_is_refused(base, hub):
    refused("teachers.robust.weights: cannot load 'hf-hub:org/absent'", "teachers.robust", weights="hf-hub:org/absent")
    hub(base, "org/clip")
    refused("'hf-hub:org/clip' brings its own architecture; leave arch out", arch="ViT-B-32", weights="hf-hub:org/clip")
    refused("student.ema: 'hf-hub:org/clip' is no run", weights="hf-hub:org/clip", ema=True)


@pytest.mark.parametrize("trained, activation", [(True, "QuickGELU"), (False, "GELU")])
def test_a_tag_gives_its_weights_with_the_activation_they_were_trained_with(
    base, vit, hub, monkeypatch, trained, activation
):
    """A tag of open_clip's own list, whose file Hugging Face's cache has."""
    hub(base, "org/tagged")
    name = Path(vit).stem
    monkeypatch.setitem(
        open_clip.pretrained._PRETRAINED, name, {"ours": {"hf_hub": "org/tagged/", "quick_gelu": trained}}
    )
    tagged = loading.load_clip(Model(arch=vit, weights="ours"), where="student")
    assert all(torch.equal(v, base.model.state_dict()[k]) for k, v in tagged.model.state_dict().items())
    assert {type(m).__name__ for m in tagged.model.modules() if "GELU" in type(m).__name__} == {activation}


@pytest.mark.parametrize("at", [".", "checkpoints/step-2", "checkpoints/latest"])
def test_a_run_gives_the_weights_of_its_checkpoint_not_of_its_start(base, vit, tmp_path, at):
    loading.load_clip(Model(arch=vit, weights="random"), seed=4).save(tmp_path / clip.START_FOLDER)
    tower = loading.load_clip(Model(arch=vit, weights="random"), seed=5).tower()
    saver = checkpoint_writer.Checkpoints(tmp_path, keep_last=2)
    for step, weights in ((1, base.tower().state_dict()), (2, tower.state_dict())):
        saver.save(step, dict(weights), {}, {})
        saver.wait()
    loaded = loading.load_clip(Model(weights=str(tmp_path / at)))
    assert torch.equal(loaded.tower().eval()(images(16)), tower.eval()(images(16)))


def test_random_weights_are_a_function_of_the_seed_and_leave_the_generator_alone(base, vit):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    again, another = (loading.load_clip(Model(arch=vit, weights="random"), seed=s) for s in (3, 4))
    assert torch.equal(embeddings(again), embeddings(base)) and not torch.equal(embeddings(another), embeddings(base))
    assert torch.equal(torch.get_rng_state(), before)


def test_sources_that_do_not_exist_or_contradict_themselves(base, vit, tmp_path):
    base.save(tmp_path / "out")
    torch.save(base.model.visual.state_dict(), tmp_path / "tower.pt")
    torch.save(base.model.state_dict(), tmp_path / "whole.pt")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "no.json").write_text('{"embed_dim": 3}')
    (tmp_path / "RN50.json").write_text(open(vit).read())
    (tmp_path / "empty").mkdir()
    refused("student.arch: open_clip has no architecture 'ViT-B-23'|near: |ViT-B-32", arch="ViT-B-23", weights="openai")
    refused(
        "teachers.clean.weights: 'opanai'|nor a tag of ViT-B-32|laion2b_s34b_b79k|openai",
        "teachers.clean",
        arch="ViT-B-32",
        weights="opanai",
    )
    refused("student.arch: weights 'openai' do not name their architecture; set it", weights="openai")
    refused("brings its own architecture; leave arch out", arch=vit, weights=str(tmp_path / "out"))
    refused(
        "holds an image tower alone; name the source of its text tower", arch=vit, weights=str(tmp_path / "tower.pt")
    )
    refused("already holds a text tower; leave text out", arch=vit, weights=str(tmp_path / "whole.pt"), text="random")
    refused("cannot read model config", arch=str(tmp_path / "gone.json"), weights="random")
    refused("cannot read model config", arch=str(tmp_path / "broken.json"), weights="random")
    refused("it needs embed_dim, vision_cfg and text_cfg", arch=str(tmp_path / "no.json"), weights="random")
    refused("open_clip already has an architecture 'RN50'; rename", arch=str(tmp_path / "RN50.json"), weights="random")
    (tmp_path / "out" / clip.WEIGHTS_FILE).unlink()
    refused("cannot load 'local-dir:", weights=str(tmp_path / "out"))
    with pytest.raises(UserError, match="is no run, checkpoint or exported folder"):
        loading.load_clip(Model(weights=str(tmp_path / "empty")))


@pytest.fixture
def created(monkeypatch):
    """The arguments open_clip's model would be made with, instead of a download."""
    calls = []
    monkeypatch.setattr(
        loading, "_pretrained", lambda name, tag, quick_gelu, where: calls.append((name, tag, quick_gelu))
    )
    return calls


@pytest.mark.parametrize(
    "arch, tag, gelu",  # as open_clip's own list of pretrained models says how each was trained
    [
        ("ViT-B-32", "openai", True),
        ("ViT-B-32-quickgelu", "openai", True),
        ("ViT-B/32", "openai", True),
        ("ViT-B-32", "laion2b_s34b_b79k", False),
        ("RN50", "openai", True),
    ],
)
def test_the_tag_decides_the_activation(created, arch, tag, gelu):
    loading.load_clip(Model(arch=arch, weights=tag))
    assert created == [(arch.replace("/", "-"), tag, gelu)]


def test_an_activation_the_weights_were_not_trained_with_is_refused(base, created, tmp_path):
    refused(
        "'openai' were trained with quick_gelu true, but quick_gelu asks for false",
        arch="ViT-B-32",
        weights="openai",
        quick_gelu=False,
    )
    refused(
        "trained with quick_gelu false, but quick_gelu asks for true",
        arch="ViT-B-32",
        weights="laion2b_s34b_b79k",
        quick_gelu=True,
    )
    torch.save(base.model.state_dict(), tmp_path / "w.pt")
    refused(
        "student.quick_gelu: the file|does not say which activation", arch="ViT-B-32", weights=str(tmp_path / "w.pt")
    )
    base.save(tmp_path / "out")
    refused(
        "student.quick_gelu: True, but|trained with quick_gelu False", weights=str(tmp_path / "out"), quick_gelu=True
    )
    assert created == []


def test_quick_gelu_is_used_and_travels_with_the_model(base, vit, tmp_path):
    torch.save(base.model.state_dict(), tmp_path / "w.pt")
    quick = loading.load_clip(Model(arch=vit, weights=str(tmp_path / "w.pt"), quick_gelu=True))
    kinds = {type(m).__name__ for m in quick.model.modules() if "GELU" in type(m).__name__}
    assert kinds == {"QuickGELU"} and not torch.equal(embeddings(quick), embeddings(base))
    quick.save(tmp_path / "out")
    assert torch.equal(embeddings(loading.load_clip(Model(weights=str(tmp_path / "out")))), embeddings(quick))


def test_weights_that_cannot_be_fetched_are_told_once_with_their_setting(monkeypatch, caplog):
    def fails(*args, **kwargs):
        logging.error("Failed to download")
        raise RuntimeError("Failed to download\nweights.")

    monkeypatch.setattr(open_clip, "create_model", fails)
    message = "teachers.clean.weights: cannot load 'openai' of ViT-B-32: Failed to download weights; without internet"
    with pytest.raises(UserError, match=message):
        loading.load_clip(Model(arch="ViT-B-32", weights="openai"), where="teachers.clean")
    assert not caplog.records
