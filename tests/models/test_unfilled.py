"""Models whose weights come from a file are allocated and filled once: nothing is drawn at random for them first."""

import json
from pathlib import Path

import pytest
import torch

from mmtard.config import Model
from mmtard.models import loading
from mmtard.models.unfilled import unfilled

SMALL_TEXT = {"context_length": 10, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
KINDS = {
    "vit": {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": SMALL_TEXT},
    "resnet": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
        "text_cfg": SMALL_TEXT,
    },
    "coca": {
        "embed_dim": 16,
        "vision_cfg": {**VIT, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": {**SMALL_TEXT, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**SMALL_TEXT, "attn_pooler_heads": 2},
        "custom_text": True,
    },
    "timm": {
        "embed_dim": 16,
        "vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "image_size": 224},
        "text_cfg": SMALL_TEXT,
        "custom_text": True,
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_folders_weights_are_those_bits_and_no_random_number_is_drawn_for_them(kind, tmp_path):
    (tmp_path / f"tests-unfilled-{kind}.json").write_text(json.dumps(KINDS[kind]))
    drawn = loading.load_clip(Model(arch=str(tmp_path / f"tests-unfilled-{kind}.json"), weights="random"), seed=5)
    if kind == "coca":
        drawn.model.text_decoder.text_projection.data.normal_()  # which open_clip itself leaves as the memory was
    drawn.save(tmp_path / "folder")
    before = torch.get_rng_state()
    read = loading.load_clip(Model(weights=str(tmp_path / "folder")))
    assert torch.equal(torch.get_rng_state(), before)
    for kept in ("named_parameters", "named_buffers"):  # buffers that no file holds, too, such as the text tower's mask
        ours, theirs = (dict(getattr(clip.model, kept)()) for clip in (read, drawn))
        assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours), kept
    assert read.class_embeddings(["cat", "cow"], ["a {}"]).equal(drawn.class_embeddings(["cat", "cow"], ["a {}"]))


def test_a_file_of_weights_is_read_without_a_draw_too(base, vit, tmp_path):
    torch.save(base.model.state_dict(), tmp_path / "weights.pt")
    before = torch.get_rng_state()
    read = loading.load_clip(Model(arch=vit, weights=str(tmp_path / "weights.pt"), quick_gelu=False))
    assert torch.equal(torch.get_rng_state(), before)
    assert read.sha256(image=True) == base.sha256(image=True) and read.sha256(image=False) == base.sha256(image=False)


def test_half_precision_weights_fill_a_float32_model(base, tmp_path):
    base.save(tmp_path / "folder")
    halves = {name: value.half() for name, value in base.model.state_dict().items()}
    (tmp_path / "folder" / "open_clip_model.safetensors").unlink()
    torch.save(halves, tmp_path / "folder" / "open_clip_pytorch_model.bin")
    read = loading.load_clip(Model(weights=str(tmp_path / "folder"))).model.state_dict()
    assert all(read[name].equal(value.float()) for name, value in halves.items())


def test_outside_the_block_everything_is_drawn_as_always(vit):
    with unfilled():
        pass
    first, second = (loading.load_clip(Model(arch=vit, weights="random"), seed=3) for _ in range(2))
    assert first.sha256(image=True) == second.sha256(image=True) and first.model.visual.conv1.weight.std() > 0
    assert json.loads(Path(vit).read_text())["vision_cfg"] == first.config["model_cfg"]["vision_cfg"]
