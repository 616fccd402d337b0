"""A CLIPModel of transformers as a model here."""

import json
import random

import pytest
import torch
from embeddings_of import embeddings, refused

from mmtard.config import Model
from mmtard.errors import UserError
from mmtard.models import loading

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random CLIPModel as its own library saves it, with another preprocessing than OpenAI's."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        vision_config={**sizes, "hidden_size": 32, "intermediate_size": 72, "image_size": 16, "patch_size": 8},
        text_config={**sizes, "hidden_size": 16, "intermediate_size": 40, "max_position_embeddings": 10},
        projection_dim=16,
    )
    path = tmp_path_factory.mktemp("hf") / "model"
    transformers.CLIPModel(config).save_pretrained(path)
    (path / "preprocessor_config.json").write_text(
        json.dumps(
            {"image_mean": [0.1, 0.5, 0.3], "image_std": [0.2, 0.4, 0.9], "size": {"shortest_edge": 16}, "resample": 2}
        )
    )
    return path


def test_a_transformers_folder_gives_transformers_embeddings(folder, tmp_path):
    clip = loading.load_clip(Model(weights=str(folder)))
    theirs = transformers.CLIPModel.from_pretrained(folder).eval()
    x = torch.rand(2, 3, 16, 16)
    tokens = clip.tokenizer()(["a cat", "two dogs on a red square"])
    with torch.no_grad():
        image = theirs.get_image_features(pixel_values=(x - clip.tower().mean) / clip.tower().std)
        text = theirs.get_text_features(input_ids=tokens)
        torch.testing.assert_close(clip.tower().eval()(x), getattr(image, "pooler_output", image))
        torch.testing.assert_close(clip.model.eval().encode_text(tokens), getattr(text, "pooler_output", text))
    assert clip.logit_scale == pytest.approx(float(theirs.logit_scale.exp()))
    preprocess = clip.config["preprocess_cfg"]
    assert (preprocess["mean"], preprocess["interpolation"]) == ([0.1, 0.5, 0.3], "bilinear")
    clip.save(tmp_path / "start")  # what a run keeps of it
    assert torch.equal(embeddings(loading.load_clip(Model(weights=str(tmp_path / "start")))), embeddings(clip))


def test_its_weights_alone_load_into_the_same_architecture(folder, tmp_path):
    clip = loading.load_clip(Model(weights=str(folder)))
    (tmp_path / "tests-hf.json").write_text(json.dumps(clip.config["model_cfg"]))
    weights = str(folder / "model.safetensors")
    alone = loading.load_clip(Model(arch=str(tmp_path / "tests-hf.json"), weights=weights))
    assert alone.sha256(image=True) == clip.sha256(image=True) and alone.sha256(image=False) == clip.sha256(image=False)


def test_models_that_are_not_converted_say_what_to_take(folder, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    config = json.loads((folder / "config.json").read_text())
    for change, words in (
        ({"model_type": "siglip"}, "is a SigLIP of transformers|hf-hub:timm/ViT-B-16-SigLIP"),
        ({"model_type": "llava"}, "is a llava of transformers; CLIP models are read"),
        ({"vision_config": {"hidden_act": "relu"}}, "has the activation relu"),
        ({"text_config": {**config["text_config"], "vocab_size": 30522}}, "has a tokenizer of 30522 tokens"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        refused(words, weights=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**config, "vision_config": {}}))
    refused("does not fit the architecture", weights=str(tmp_path))


def test_a_damaged_folder_is_one_line(folder, tmp_path):
    dice, original = random.Random(0), (folder / "config.json").read_bytes()
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    for _ in range(60):
        content = bytearray(original)
        for _ in range(dice.choice((1, 2, 5))):
            content[dice.randrange(len(content))] = dice.choice(b'0123456789"{}[],:xnt \x00\xff')
        (tmp_path / "config.json").write_bytes(content)
        try:
            loading.load_clip(Model(weights=str(tmp_path)))
        except UserError as error:
            assert "\n" not in str(error)
