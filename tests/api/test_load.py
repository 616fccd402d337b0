"""`mmtard.load`: the models of the command line, and an open_clip model as it is."""

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import mmtard
from mmtard.errors import UserError

from .conftest import NAMES

TEMPLATES = ["a photo of a {}", "a red {}"]


def open_clips_logits(model, preprocess_mean, preprocess_std, images, names, templates):
    """Zero-shot logits as open_clip's own example computes them."""
    tokenize = open_clip.SimpleTokenizer(context_length=10)
    with torch.no_grad():
        classes = []
        for name in names:
            z = F.normalize(model.encode_text(tokenize([t.format(name) for t in templates])), dim=-1).mean(0)
            classes.append(z / z.norm())
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (preprocess_mean, preprocess_std))
        z = F.normalize(model.encode_image((images - mean) / std), dim=-1)
        return model.logit_scale.exp() * z @ torch.stack(classes).T


def test_logits_are_open_clips_own(open_clip_model, images):
    expected = open_clips_logits(
        open_clip_model, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD, images, NAMES, TEMPLATES
    )
    logits = mmtard.load(open_clip_model).logits(images, NAMES, TEMPLATES)
    assert logits.shape == (12, 5) and logits.dtype == torch.float32
    assert torch.allclose(logits, expected, atol=1e-4)


def test_a_wrapped_model_stays_its_owners(open_clip_model, images):
    """Its weights are shared; what takes a gradient and which mode it is in stays as it was."""
    open_clip_model.visual.proj.requires_grad_(False)
    before = [(p.data_ptr(), p.requires_grad) for p in open_clip_model.parameters()]
    model = mmtard.load(open_clip_model)
    first = model.logits(images, NAMES)
    assert [(p.data_ptr(), p.requires_grad) for p in open_clip_model.parameters()] == before
    with torch.no_grad():
        open_clip_model.visual.proj.mul_(-1)
    assert torch.allclose(model.logits(images, NAMES), -first, atol=1e-5)


def test_the_folder_of_a_run_or_an_export_gives_the_same_model(model, images, tmp_path):
    model.clip.save(tmp_path / "exported")
    again = mmtard.load(tmp_path / "exported")
    assert again.logits(images, NAMES).equal(model.logits(images, NAMES))
    assert not any(p.requires_grad for p in again.clip.model.parameters()) and not again.clip.model.training


def test_preprocessing_is_open_clips_without_its_normalisation(model, open_clip_model):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    ours = model.preprocess(Image.fromarray(pixels))
    transform = open_clip.image_transform(16, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
    assert ours.shape == (3, 16, 16) and ours.dtype == torch.float32
    assert torch.allclose(ours, transform(Image.fromarray(pixels)), atol=1e-6)
    with pytest.raises(UserError, match="image: a ndarray; give a PIL image"):
        model.preprocess(pixels)


def test_logits_lead_back_to_the_images(model, images):
    images.requires_grad_()
    model.logits(images, NAMES).sum().backward()
    assert images.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda m: mmtard.load(3), "source: a int; give a path, an open_clip tag, or an open_clip model"),
        (lambda m: mmtard.load("openai"), "^arch: weights 'openai' do not .*; set it, e.g. arch=\"ViT-B-32\"$"),
        (lambda m: mmtard.load("runs/nowhere"), "^source: 'runs/nowhere' does not exist"),
        (lambda m: mmtard.load(torch.nn.Linear(2, 2)), "a Linear has no visual, so it is no CLIP of open_clip"),
        (lambda m: mmtard.load(m.train()), r"it is in training mode; call model.eval\(\) first"),
        (lambda m: mmtard.load(m.half()), r"its weights are torch.float16; .* model.float\(\)"),
        (lambda m: mmtard.load(m, arch="ViT-Z"), "arch: open_clip has no architecture 'ViT-Z'"),
        (lambda m: mmtard.load(m, arch="zzz"), r"no architecture 'zzz'; open_clip.list_models\(\) has them all"),
        (lambda m: mmtard.load(m, arch="gone.json"), "arch: .*gone.json"),
        (lambda m: mmtard.load(m, text="openai"), "they belong to weights that are loaded"),
        (lambda m: mmtard.load(m).logits(torch.rand(2, 3, 16, 16), "cat"), "class_names: 'cat'; give a list"),
        (lambda m: mmtard.load(m).classifier([]), "class_names: an empty list"),
        (lambda m: mmtard.load(m).classifier(["cat"], ["a photo"]), "templates: 'a photo' has no place"),
        (lambda m: mmtard.load(m).classifier(["cat"])(torch.zeros(2, 3, 4, 4).byte()), "images: torch.uint8"),
        (lambda m: mmtard.load(m).classifier(["cat"])(torch.zeros(3, 4, 4)), r"images: torch.float32 \[3, 4, 4\]"),
    ],
)
def test_wrong_use_is_answered_in_one_line(call, message, open_clip_model):
    with pytest.raises(UserError, match=message) as caught:
        call(open_clip_model)
    assert "\n" not in str(caught.value)


def test_a_wrapped_model_takes_the_file_of_its_architecture(open_clip_model, images, vit):
    model = mmtard.load(open_clip_model, arch=vit)
    assert model.logits(images, NAMES).equal(mmtard.load(open_clip_model, arch="tests-vit").logits(images, NAMES))
    assert model.clip.config["model_cfg"]["embed_dim"] > 0


def test_a_wrapped_model_of_another_vocabulary_needs_its_tokenizer(open_clip_model):
    open_clip_model.vocab_size = 32000
    with pytest.raises(UserError, match="vocabulary of 32000 is not OpenAI's, .* name its arch or tokenizer"):
        mmtard.load(open_clip_model)
    model = mmtard.load(open_clip_model, tokenizer=lambda texts: torch.zeros(len(texts), 10, dtype=torch.long))
    assert model.embed_texts(["a", "b"]).shape == (2, 16)
