"""The transformers folder of an export: the same embeddings, pixels and tokens as open_clip's, or a clear refusal."""

import json
import shutil
import sys

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from mmtard.config import Model
from mmtard.errors import UserError
from mmtard.export import hf
from mmtard.models import loading

transformers = pytest.importorskip("transformers")


def clip(arch, quick_gelu=True, seed=1):
    return loading.load_clip(Model(arch=arch, weights="random", quick_gelu=quick_gelu), seed=seed)


@pytest.mark.parametrize("quick_gelu, activation", [(True, "quick_gelu"), (False, "gelu")])
def test_transformers_gives_the_same_embeddings_from_images_and_text(vit, tmp_path, quick_gelu, activation):
    ours = clip(vit, quick_gelu)
    ours.config["preprocess_cfg"].update(mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])
    hf.save_transformers(ours, tmp_path / "hf")
    model = transformers.CLIPModel.from_pretrained(tmp_path / "hf").eval()
    assert model.config.vision_config.hidden_act == model.config.text_config.hidden_act == activation
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (21, 30, 3), dtype=np.uint8))
    preprocess = open_clip.image_transform(16, is_train=False, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    prompts = ["a red square", "Don't  PANIC!"]
    pixels = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")(image, return_tensors="pt")[
        "pixel_values"
    ]
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")(
        prompts, return_tensors="pt", padding="max_length"
    )
    # An 8-bit resize by another library may round a pixel up or down.
    torch.testing.assert_close(pixels[0], preprocess(image), atol=2 / 255 / 0.5, rtol=0)
    with torch.no_grad():
        theirs = model(pixel_values=preprocess(image)[None], **tokens)
        image_z = ours.model.eval().encode_image(preprocess(image)[None], normalize=True)
        text_z = ours.model.encode_text(open_clip.get_tokenizer(ours.name)(prompts), normalize=True)
    torch.testing.assert_close(theirs.image_embeds, image_z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(theirs.text_embeds, text_z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(theirs.logits_per_image, ours.logit_scale * image_z @ text_z.T, rtol=1e-4, atol=1e-4)


def changed(vit, tmp_path, name, vision=None, text=None):
    cfg = json.loads(open(vit).read())
    cfg["vision_cfg"].update(vision or {})
    cfg["text_cfg"].update(text or {})
    path = tmp_path / f"tests-{name}.json"
    path.write_text(json.dumps(cfg))
    return str(path)


@pytest.mark.parametrize(
    "name, vision, text, words",
    [
        ("averaged", {"pool_type": "avg"}, {}, "its image tower does not end in the class token"),
        (
            "attended",
            {"attentional_pool": True, "attn_pooler_heads": 2},
            {},
            "its image tower does not end in the class token",
        ),
        ("last", {}, {"pool_type": "last"}, "its text tower does not end in the end-of-text token"),
        ("bare", {"no_ln_pre": True}, {}, "vision_model.pre_layrnorm"),
        ("scaled", {"ls_init_value": 0.1}, {}, "layers.0.ls_1"),
        ("late", {"final_ln_after_pool": True}, {}, None),  # of the class token alone it is the same
    ],
)
def test_an_architecture_that_transformers_lacks_is_refused(vit, tmp_path, name, vision, text, words):
    ours = clip(changed(vit, tmp_path, name, vision, text))
    if words is None:
        return hf.save_transformers(ours, tmp_path / "hf")
    with pytest.raises(UserError, match=words):
        hf.save_transformers(ours, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_resnet_is_refused(resnet, tmp_path):
    with pytest.raises(
        UserError,
        match="--hf: transformers' CLIPModel has no such architecture: "
        "its image tower is a ModifiedResNet; leave --hf out",
    ):
        hf.save_transformers(clip(resnet), tmp_path / "hf")


def test_a_conversion_that_changes_the_embeddings_is_never_published(vit, tmp_path, monkeypatch):
    convert = hf.convert

    def swapped(state):
        out = convert(state)
        q, v = (f"vision_model.encoder.layers.0.self_attn.{name}_proj.weight" for name in "qv")
        return {**out, q: out[v], v: out[q]}

    monkeypatch.setattr(hf, "convert", swapped)
    with pytest.raises(UserError, match="embeddings differ by"):
        hf.save_transformers(clip(vit), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_without_transformers_the_option_says_so(vit, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="--hf: needs transformers"):
        hf.save_transformers(clip(vit), tmp_path / "hf")


def test_a_hugging_face_tokenizer_goes_with_the_folder(vit, word_tokenizer, tmp_path):
    shutil.copytree(word_tokenizer, tmp_path / "tokenizer")
    ours = clip(changed(vit, tmp_path, "worded", text={"hf_tokenizer_name": str(tmp_path / "tokenizer")}))
    ours.save(tmp_path / "out")
    (tmp_path / "tokenizer").rename(tmp_path / "gone")
    read = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")
    assert read(["a red heron square"]).tolist() == [[2, 8, 1, 9, 0, 0, 0, 0, 0, 0]]
    with pytest.raises(UserError, match="its tokenizer is .*, not CLIP's"):
        hf.save_transformers(ours, tmp_path / "hf")
    with pytest.raises(UserError, match="its tokenizer '.*' is not at hand"):
        ours.save(tmp_path / "again")
    with pytest.raises(UserError, match="its tokenizer '.*' is not at hand"):
        ours.class_embeddings(["cat"], ["a {}"])
