import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.zero_shot_classifier import build_zero_shot_classifier
from PIL import Image
from safetensors.torch import save_file

from mmtard.config import Model
from mmtard.errors import UserError
from mmtard.models import clip, image_tower, loading
from mmtard.runs import checkpoint_writer


@pytest.fixture(scope="module")
def base(vit):
    """A random ViT from seed 3: the weights that every source below stores."""
    return loading.load_clip(Model(arch=vit, weights="random"), seed=3)


def images(size, batch=2):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def embeddings(clip):
    with torch.no_grad():
        image = clip.tower().eval()(images(clip.model.visual.image_size[0]))
        text = clip.model.eval().encode_text(clip.tokenizer()(["a cat", "two dogs"]))
    return torch.cat([image, text])


SOURCES = {  # how the whole model is written
    "pt": lambda s, d: torch.save(s, d / "w.pt"),
    "wrapped pt of a parallel training": lambda s, d: torch.save(
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in s.items()}}, d / "w.pt"
    ),
    "safetensors": lambda s, d: save_file(s, d / "w.safetensors"),
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_file_of_the_whole_model_gives_its_embeddings(base, vit, tmp_path, source):
    SOURCES[source](dict(base.model.state_dict()), tmp_path)
    (path,) = tmp_path.iterdir()
    assert torch.equal(embeddings(loading.load_clip(Model(arch=vit, weights=str(path)), seed=9)), embeddings(base))


@pytest.mark.parametrize("prefix", ["", "visual.", "module."])
def test_an_image_tower_file_takes_its_text_from_another_source(base, vit, tmp_path, prefix):
    torch.save({f"{prefix}{k}": v for k, v in base.model.visual.state_dict().items()}, tmp_path / "tower.pt")
    whole = {k: v if not k.startswith("visual.") else v + 1 for k, v in base.model.state_dict().items()}
    torch.save(whole, tmp_path / "whole.pt")
    clip = loading.load_clip(Model(arch=vit, weights=str(tmp_path / "tower.pt"), text=str(tmp_path / "whole.pt")))
    assert torch.equal(embeddings(clip), embeddings(base))


def test_an_exported_folder_gives_its_embeddings_here_and_in_open_clip(base, tmp_path):
    base.save(tmp_path / "out")
    assert torch.equal(embeddings(loading.load_clip(Model(weights=str(tmp_path / "out")))), embeddings(base))
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    assert all(torch.equal(v, base.model.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Call with a model and org/name: that repository, in the only cache that Hugging Face's own library then looks into."""
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


def test_a_model_of_the_hub_brings_its_own_tokenizer(vit, word_tokenizer, hub, tmp_path):
    """In a process of its own: transformers reads the place of its cache once."""
    cfg = json.loads(Path(vit).read_text())
    cfg["text_cfg"]["hf_tokenizer_name"] = str(word_tokenizer)
    (tmp_path / "tests-words.json").write_text(json.dumps(cfg))
    words = loading.load_clip(Model(arch=str(tmp_path / "tests-words.json"), weights="random"))
    expected = words.class_embeddings(["cat", "red cow"], ["a photo of a {}"])
    words.config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "org/words"
    hub(words, "org/words")
    script = (
        "import torch; from mmtard.models.loading import load_clip; from mmtard.config import Model; clip = load_clip(Model(weights='hf-hub:org/words'));"
        "torch.save(clip.class_embeddings(['cat', 'red cow'], ['a photo of a {}']), 'out.pt'); clip.save(towers.Path('saved'))"
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


# ---------------------------------------------------------------- what does not fit

SPOILED = {
    "missing": (lambda s: s.pop("visual.proj"), r"1 missing \(visual.proj\)"),
    "unexpected": (lambda s: s.update({"visual.head": torch.ones(1)}), r"1 unexpected \(visual.head\)"),
    "of another shape": (
        lambda s: s.update({"visual.proj": torch.ones(3, 4)}),
        r"1 of another shape \(visual.proj \(3, 4\) for \(32, 16\)\)",
    ),
}


@pytest.mark.parametrize("how", SPOILED)
def test_weights_that_do_not_fit_are_refused_with_the_key(base, vit, tmp_path, how):
    state = dict(base.model.state_dict())
    spoil, words = SPOILED[how]
    spoil(state)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UserError, match=f"^student.weights.*{words}; check `arch`$"):
        loading.load_clip(Model(arch=vit, weights=str(tmp_path / "w.pt")))


@pytest.mark.parametrize("how", SPOILED)
def test_an_exported_folder_that_does_not_fit_is_refused_with_the_key(base, tmp_path, how):
    state = dict(base.model.state_dict())
    SPOILED[how][0](state)
    base.save(tmp_path / "out")
    save_file(state, tmp_path / "out" / clip.WEIGHTS_FILE)
    with pytest.raises(UserError, match="^student.weights: cannot load .*(visual.proj|visual.head)"):
        loading.load_clip(Model(weights=str(tmp_path / "out")))


@pytest.mark.parametrize("how", SPOILED)
def test_an_image_tower_or_checkpoint_that_does_not_fit_is_refused_with_the_key(base, vit, tmp_path, how):
    state = dict(base.model.state_dict())
    SPOILED[how][0](state)
    tower = {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}
    torch.save(tower, tmp_path / "tower.pt")
    with pytest.raises(UserError, match=rf"^teachers.clean.weights.*1 {how} \((proj|head)"):
        loading.load_clip(Model(arch=vit, weights=str(tmp_path / "tower.pt"), text="random"), where="teachers.clean")
    base.save(tmp_path / "start")
    saver = checkpoint_writer.Checkpoints(tmp_path, keep_last=1)
    saver.save(1, {f"visual.{k}": v for k, v in tower.items()}, {}, {})
    saver.wait()
    with pytest.raises(UserError, match=rf"^checkpoint '.*step-1' does not fit.*1 {how} \(visual"):
        loading.load_clip(Model(weights=str(tmp_path)))


class Harmful:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


@pytest.mark.parametrize(
    "name, write, words",
    [
        ("w.pt", lambda p: torch.save({"a": Harmful()}, p), "cannot read '.*w.pt'"),
        ("w.pkl", lambda p: p.write_bytes(pickle.dumps({"a": Harmful()}, protocol=2)), "cannot read '.*w.pkl'"),
        ("w.safetensors", lambda p: p.write_bytes(b"no tensors here"), "cannot read '.*w.safetensors'"),
        ("w.pt", lambda p: torch.save({"step": 3}, p), "holds no state_dict"),
        ("w.pt", lambda p: torch.save(torch.ones(3), p), "holds no state_dict"),
    ],
)
def test_a_file_that_is_no_state_dict_is_refused_without_running_it(vit, tmp_path, name, write, words):
    write(tmp_path / name)
    with pytest.raises(UserError, match=f"^student.weights: .*{words}") as error:
        loading.load_clip(Model(arch=vit, weights=str(tmp_path / name)))
    assert "\n" not in str(error.value)


def refused(words, where="student", **settings):
    with pytest.raises(UserError, match=f"^{re.escape(where)}") as error:
        loading.load_clip(Model(**settings), where=where)
    assert all(word in str(error.value) for word in words.split("|")) and "\n" not in str(error.value), error.value


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


# ---------------------------------------------------------------- QuickGELU


@pytest.fixture
def created(monkeypatch):
    """The arguments open_clip's model would be made with, instead of a download."""
    calls = []
    monkeypatch.setattr(
        loading, "_create", lambda name, quick_gelu, pretrained=None: calls.append((name, pretrained, quick_gelu))
    )
    return calls


@pytest.mark.parametrize(
    "arch, tag, gelu",  # as open_clip's own list of pretrained models says how each was trained
    [("ViT-B-32", "openai", True), ("ViT-B-32-quickgelu", "openai", True), ("ViT-B/32", "openai", True), ("ViT-B-32", "laion2b_s34b_b79k", False),
     ("RN50", "openai", True)],
)  # fmt: skip
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


# ---------------------------------------------------------------- the image tower


@pytest.mark.parametrize("arch", ["vit", "resnet"])
def test_pixels_in_the_tower_equal_open_clips_preprocessing_and_encode_image(arch, request, tmp_path):
    source = loading.load_clip(Model(arch=request.getfixturevalue(arch), weights="random"), seed=1)
    source.config["preprocess_cfg"].update(mean=[0.1, 0.5, 0.3], std=[0.2, 0.4, 0.9])
    source.save(tmp_path / "out")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    tower = loading.load_clip(Model(weights=str(tmp_path / "out"))).tower().eval()
    pixels = np.random.default_rng(0).integers(0, 256, (tower.image_size, tower.image_size, 3), dtype=np.uint8)
    with torch.no_grad():
        expected = model.eval().encode_image(preprocess(Image.fromarray(pixels))[None])
        got = tower(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(24, 24), (8, 20)])
def test_other_sizes_are_resized_inside_and_gradients_reach_their_pixels(base, size):
    tower = base.tower().eval()
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    z = tower(x)
    torch.testing.assert_close(z, tower(F.interpolate(x, (16, 16), mode="bicubic")))
    (gradient,) = torch.autograd.grad(z.square().sum(), x)
    assert gradient.shape == x.shape and gradient.isfinite().all() and (gradient != 0).any(dim=1).all()


def test_batch_norm_never_learns_from_a_batch(resnet):
    tower = loading.load_clip(Model(arch=resnet, weights="random")).tower()
    before = {k: v.clone() for k, v in tower.state_dict().items()}
    assert sum("running_mean" in k for k in before) > 10
    expected = tower.eval()(images(32))
    for x in (images(32), images(32) * 0.1):
        tower.train()(x).sum().backward()
    assert tower.training and torch.equal(tower.train()(images(32)), expected)
    assert all(torch.equal(v, before[k]) for k, v in tower.state_dict().items())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tower.parameters())


def test_half_precision_is_only_inside(base, vit):
    x = images(16)
    exact = base.tower().eval()(x)
    cast = loading.load_clip(Model(arch=vit, weights="random"), seed=3).tower().eval().cast(torch.bfloat16)
    tower = loading.load_clip(Model(arch=vit, weights="random"), seed=3).tower().eval()
    tower.autocast = torch.bfloat16
    assert {p.dtype for p in cast.parameters()} == {torch.bfloat16} and {p.dtype for p in tower.parameters()} == {
        torch.float32
    }
    for t in (cast, tower):
        assert t.mean.dtype == t(x).dtype == torch.float32
        assert 0 < (F.normalize(t(x), dim=-1) - F.normalize(exact, dim=-1)).abs().max() < 0.05


def test_class_embeddings_equal_open_clips_zero_shot_classifier(base):
    names, prompts = (
        ["cat", "fire truck", "great white shark"],
        ["a photo of a {}", "{}", "a bad drawing of the {} in the rain"],
    )
    expected = build_zero_shot_classifier(base.model.eval(), open_clip.get_tokenizer(base.name), names, prompts).T
    got = base.class_embeddings(names, prompts)
    assert got.dtype == torch.float32 and got.shape == (3, 16)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_many_texts_are_embedded_a_batch_at_a_time(base):
    texts = ["a cat", "two dogs", "a bad drawing of the fire truck in the rain"]
    text = base.text_tower()
    torch.testing.assert_close(text(texts, batch_size=2), text(texts), rtol=1e-5, atol=1e-6)


def test_logit_scale_is_its_exponential(base):
    assert base.logit_scale == pytest.approx(1 / 0.07, rel=1e-6)  # CLIP's initial temperature
    assert json.loads(json.dumps(base.config)) == base.config


def test_a_coca_gives_its_image_embedding_alone(vit, tmp_path):
    """Its image tower always gives the tokens for its own decoder, too."""
    cfg = json.loads(Path(vit).read_text())
    cfg["vision_cfg"] |= {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    cfg["text_cfg"] |= {"embed_cls": True, "output_tokens": True}
    cfg["custom_text"], cfg["multimodal_cfg"] = (
        True,
        {"context_length": 10, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    )
    (tmp_path / "coca_tests.json").write_text(json.dumps(cfg))
    coca = loading.load_clip(Model(arch=str(tmp_path / "coca_tests.json"), weights="random"))
    assert type(coca.model).__name__ == "CoCa"
    tower, x = coca.tower().eval(), images(16)
    with torch.no_grad():
        torch.testing.assert_close(
            tower(x), coca.model.eval().encode_image((x - tower.mean) / tower.std, normalize=False)
        )
        expected = build_zero_shot_classifier(coca.model, coca.tokenizer(), ["cat", "dog"], ["a {}"]).T
    torch.testing.assert_close(coca.class_embeddings(["cat", "dog"], ["a {}"]), expected)
    with pytest.raises(UserError, match="patch tokens, which a VisionTransformer does not give"):
        image_tower.require_tokens(tower, "student")


# ---------------------------------------------------------------- patch tokens


def test_tokens_are_the_patches_in_the_space_of_the_embeddings(base):
    tower, x = base.tower().eval(), images(16)
    v = tower.visual
    with torch.no_grad():
        plain, (z, tokens) = tower(x), tower(x, tokens=True)
        hidden = v.ln_post(v.transformer(v._embeds((x - tower.mean) / tower.std)))
        assert z.equal(plain) and tokens.shape == (2, 4, 16)
        assert torch.allclose(tokens, hidden[:, 1:] @ v.proj, atol=1e-6) and torch.allclose(
            z, hidden[:, 0] @ v.proj, atol=1e-6
        )
        assert tower(x).equal(plain) and base.tower().eval()(x, tokens=True)[1].equal(
            tokens
        )  # a second tower of the same weights projects once


def test_a_resnet_has_no_patch_tokens_and_says_so(resnet, base):
    image_tower.require_tokens(base.tower(), "student")
    with pytest.raises(
        UserError,
        match="student: the method reads a ViT's patch tokens, which a ModifiedResNet does not give; choose a ViT",
    ):
        image_tower.require_tokens(loading.load_clip(Model(arch=resnet, weights="random")).tower(), "student")
