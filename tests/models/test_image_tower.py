import copy
import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from embeddings_of import images
from open_clip.zero_shot_classifier import build_zero_shot_classifier
from PIL import Image

from mmtard.config import Model
from mmtard.data.images import Transform
from mmtard.errors import UserError
from mmtard.models import image_tower, loading
from mmtard.training.throughput import forward_flops


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


def test_tokens_are_the_patches_in_the_space_of_the_embeddings(base):
    tower, x = base.tower().eval(), images(16)
    v = tower.visual
    with torch.no_grad():
        plain, (z, tokens) = tower(x), tower(x, tokens=True)
        hidden = v.ln_post(v.transformer(v._embeds((x - tower.mean) / tower.std)))
        # Without tokens, the last block computes the class token alone: a matrix product adds in another order.
        torch.testing.assert_close(z, plain, rtol=1e-5, atol=1e-6)
        assert tokens.shape == (2, 4, 16)
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


def test_a_convolutional_tower_gives_its_last_map_place_by_place(tmp_path):
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    text = {"context_length": 10, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    arch = tmp_path / "tests-resnet-64.json"
    arch.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    tower, seen = loading.load_clip(Model(arch=str(arch), weights="random")).tower().eval(), []
    image_tower.require_places(tower, "student")
    tower.visual.layer4.register_forward_hook(lambda module, _, output: seen.append(output))
    x = images(64)
    z, places = tower(x, tokens=True)
    assert places.shape == (len(x), 4, 256) and tower.place_width == 256
    for place, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        assert places[:, place].equal(seen[0][:, :, row, column])
    assert tower(x).equal(z) and type(tower.visual).__name__ == "ModifiedResNet"
    places.sum().backward()
    assert tower.visual.conv1.weight.grad.abs().sum() > 0


def test_a_tower_of_neither_patches_nor_a_map_is_refused(base):
    tower = copy.deepcopy(base.tower())
    assert tower.place_width == 16
    tower.visual.attn_pool = torch.nn.Identity()  # as CoCa's
    with pytest.raises(UserError, match="robust: a VisionTransformer gives no features of places.*of=embedding"):
        image_tower.require_places(tower, "robust")


# ---------------------------------------------------------------- other shapes than squares


@pytest.fixture
def wide(tmp_path):
    """Model config of a 2-block ViT on images of 16 x 32 pixels (H x W)."""
    vision = {"image_size": [16, 32], "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
    text = {"context_length": 10, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    path = tmp_path / "tests-wide.json"
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    return str(path)


@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_images_of_another_shape_are_prepared_and_embedded_as_open_clip_does(wide, tmp_path, mode):
    source = loading.load_clip(Model(arch=wide, weights="random"), seed=1)
    source.config["preprocess_cfg"].update(resize_mode=mode)
    source.save(tmp_path / "out")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    clip = loading.load_clip(Model(weights=str(tmp_path / "out")))
    tower = clip.tower().eval()
    assert tower.size == tower.image_size == (16, 32)
    transform = Transform.of_model(tower.image_size, clip.config["preprocess_cfg"], "out")
    for height, width in ((40, 50), (50, 40), (16, 32), (17, 90)):
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        ours = torch.from_numpy(transform(Image.fromarray(pixels), 0))[None] / 255
        assert ours.shape == (1, 3, 16, 32)
        with torch.no_grad():
            expected = model.eval().encode_image(preprocess(Image.fromarray(pixels))[None])
            torch.testing.assert_close(tower(ours), expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():  # a square is brought to the tower's own shape
        square = images(24)
        torch.testing.assert_close(tower(square), tower(F.interpolate(square, (16, 32), mode="bicubic")))


def test_random_crops_of_another_shape_have_it(wide):
    tower = loading.load_clip(Model(arch=wide, weights="random")).tower()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    assert Transform(tower.image_size, crop_scale=(0.5, 1.0), flip=True)(image, 3).shape == (3, 16, 32)
    assert Transform(tower.image_size, resize=20)(image, 3).shape == (3, 16, 32)
    assert forward_flops(tower) == pytest.approx(2 * forward_flops(square_of(wide)), rel=0.3)


def square_of(wide):
    path = Path(wide).with_name("tests-square.json")
    path.write_text(Path(wide).read_text().replace("[16, 32]", "16"))
    return loading.load_clip(Model(arch=str(path), weights="random")).tower()
