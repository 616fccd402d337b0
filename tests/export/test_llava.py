"""The image tower of a ViT-L/14-336 as models with a language model read it: 577 tokens of its next-to-last layer."""

import json

import open_clip
import pytest
import torch

from mmtard.config import Model
from mmtard.export.folder import export
from mmtard.models import loading

transformers = pytest.importorskip("transformers")


def test_an_exported_vit_l_14_336_gives_577_tokens(tmp_path):
    """Random weights, two of its 24 layers, a quarter of its width: the tokens are the architecture's own."""
    cfg = open_clip.get_model_config("ViT-L-14-336")
    cfg["vision_cfg"] |= {"layers": 2, "width": 256}
    cfg["text_cfg"] |= {"layers": 1, "width": 64, "heads": 1}
    (tmp_path / "two-layers-336.json").write_text(json.dumps(cfg))
    clip = loading.load_clip(Model(arch=str(tmp_path / "two-layers-336.json"), weights="random", quick_gelu=True))
    clip.save(tmp_path / "model")
    export(Model(weights=str(tmp_path / "model")), tmp_path / "out", hf=True)

    tower = transformers.CLIPVisionModel.from_pretrained(tmp_path / "out" / "transformers").eval()
    images = torch.rand(1, 3, 336, 336)
    visual, seen = clip.model.eval().visual, []
    visual.transformer.resblocks[0].register_forward_hook(lambda module, given, out: seen.append(out))
    with torch.no_grad():
        tokens = tower(pixel_values=images, output_hidden_states=True).hidden_states[-2]
        visual(images)
    assert tokens.shape == (1, 577, 256)  # the class token and 24 x 24 patches; LLaVA leaves the first out
    torch.testing.assert_close(tokens, seen[0], rtol=1e-4, atol=1e-4)
