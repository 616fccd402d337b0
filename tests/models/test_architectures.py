"""Every image tower of open_clip can be counted and trained: by family, each a block or a stage deep."""

import copy
import json
import math
import re
from functools import partial
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.model import _build_vision_tower

from mmtard.config import Model
from mmtard.models import loading, model_config
from mmtard.models.image_tower import ImageTower
from mmtard.models.student import disable_dropout
from mmtard.training import throughput
from mmtard.training.throughput import cost, forward_flops

NARROW = {"depth": 1, "embed_dim": 64, "num_heads": 2}
STAGES = (16, 32, 64, 128)
# One architecture of each family, and how timm makes it small; open_clip's own by their width and layers.
FAMILIES = {
    "ViT-B-32": None,
    "coca_ViT-B-32": None,
    "ViT-H-14-CLIPA": None,
    "RN50": None,
    "ViT-B-32-SigLIP2-256": NARROW,
    "ViT-B-16-SigLIP-i18n-256": NARROW,
    "PE-Core-T-16-384": NARROW,
    "EVA02-B-16": NARROW,
    "EVA01-g-14": NARROW,
    "vit_medium_patch16_gap_256": NARROW,
    "vit_relpos_medium_patch16_cls_224": NARROW,
    "ViTamin-S": {"depth": 1, "num_heads": 2},
    "MobileCLIP2-B": {"depth": 1, "num_heads": 2},
    "MobileCLIP2-S0": {"layers": (1, 1, 1, 1), "embed_dims": STAGES},
    "convnext_tiny": {"depths": (1, 1, 1, 1), "dims": STAGES},
    "swin_base_patch4_window7_224": {"depths": (1, 1, 1, 1), "embed_dim": 16, "num_heads": (1, 2, 2, 2)},
}

WITH_PLACES = {"ViT-B-32", "ViT-H-14-CLIPA", "RN50", "MobileCLIP2-S0", "convnext_tiny"}


def tower_of(name):
    cfg = open_clip.get_model_config(name)
    vision = {
        **cfg["vision_cfg"],
        **({"timm_model_pretrained": False} if "timm_model_name" in cfg["vision_cfg"] else {}),
    }
    visual = _build_vision_tower(cfg["embed_dim"], vision, cfg.get("quick_gelu", False))
    return ImageTower(visual, (0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tower_of_each_family_is_counted_and_trained_a_step(monkeypatch, name):
    timm = pytest.importorskip("timm")
    if FAMILIES[name] is None:
        cfg = copy.deepcopy(open_clip.get_model_config(name))
        layers = cfg["vision_cfg"]["layers"]
        cfg["vision_cfg"] |= (
            {"layers": [1, 1, 1, 1], "width": 8} if isinstance(layers, list) else {"layers": 1, "width": 128}
        )
        cfg["vision_cfg"]["head_width"] = 32 if isinstance(layers, list) else 16  # 8 heads, as CoCa's pooling needs
        monkeypatch.setattr(open_clip, "get_model_config", lambda _: cfg)
    else:
        monkeypatch.setattr(timm, "create_model", partial(timm.create_model, **FAMILIES[name]))
    torch.manual_seed(0)
    tower = tower_of(name)
    assert forward_flops(tower) > 1e6
    disable_dropout(tower)
    images = torch.rand(2, 3, *tower.size, requires_grad=True)
    before = tower.eval()(images)
    (gradient,) = torch.autograd.grad(before.square().sum(), images)
    assert gradient.isfinite().all() and gradient.abs().max() > 0, "the attack's gradient"
    assert (tower.place_width is not None) == (name in WITH_PLACES)
    if name in WITH_PLACES:
        with torch.no_grad():
            z, places = tower(images, tokens=True)
        torch.testing.assert_close(z, before, rtol=1e-5, atol=1e-6)
        assert places.shape[::2] == (2, tower.place_width)
    tower.train()(images.detach()).square().sum().backward()
    with torch.no_grad():
        for parameter in tower.parameters():
            if parameter.grad is not None:
                assert parameter.grad.isfinite().all()
                parameter -= 1e-3 * parameter.grad.sign()
        after = tower.eval()(images)
    assert after.isfinite().all() and not torch.equal(after, before)


SIZES = {"width", "layers", "head_width", "mlp_ratio", "patch_size", "image_size"}  # of open_clip's own towers
SIZE_WORDS = {
    "tiny",
    "small",
    "medium",
    "base",
    "large",
    "xlarge",
    "xxlarge",
    "giant",
    "giantopt",
    "gigantic",
    "enormous",
    "so",
}


def kind(vision):
    """What code a tower runs: its configuration without its sizes."""
    if name := vision.get("timm_model_name"):
        words = re.sub(r"\d+m?(?=_|$)", "", name).split("_")
        return " ".join(word for word in words if word not in SIZE_WORDS | {"patch", ""})
    by_stages = isinstance(vision["layers"], list)
    return json.dumps([by_stages, {key: value for key, value in vision.items() if key not in SIZES}])


@pytest.mark.slow
def test_every_kind_of_architecture_of_open_clip_is_counted():
    pytest.importorskip("timm")
    counted = {}
    own = Path(open_clip.__file__).parent / "model_configs"  # and not what other tests added to the list
    for name in (name for name in open_clip.list_models() if (own / f"{name}.json").is_file()):
        of = kind(open_clip.get_model_config(name)["vision_cfg"])
        if of not in counted:
            with torch.device("meta"):
                counted[of] = forward_flops(tower_of(name))
            assert counted[of] > 1e6, name
    assert len(counted) > 15, counted


def test_a_tower_that_cannot_be_counted_trains_without_the_number(monkeypatch, vit):
    tower = loading.load_clip(Model(arch=vit, weights="random")).tower()

    def refuse(*_, **__):
        raise AssertionError("Expected gradient function to be set")

    monkeypatch.setattr(throughput, "FlopCounterMode", refuse)
    flops = forward_flops(tower)
    assert math.isnan(flops)
    columns = cost(2.0, images=8, flops=flops, peak=1e12, world_size=1, device=torch.device("cpu"))
    assert columns.keys() == {"seconds", "images_per_s", "memory_gib"} and columns["images_per_s"] == 4


def test_a_siglip_is_made_from_its_config_alone(monkeypatch):
    """Its whole model, text tower included, on the meta device: nothing downloaded."""
    monkeypatch.setattr(model_config, "_check_text_model", lambda *_: None)
    skeleton = loading.load_skeleton(Model(arch="ViT-B-32-SigLIP2-256", weights="random"), "student")
    assert skeleton.model.logit_bias is not None and skeleton.tower().size == (256, 256)
    assert skeleton.config["preprocess_cfg"]["size"] == [256, 256]
