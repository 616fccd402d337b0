"""The student's tower: activation checkpointing, and towers that are neither open_clip's ViT nor its ResNet."""

import json
from pathlib import Path

import pytest
import torch

from mmtard.config import Lora, Model, validate
from mmtard.errors import UserError
from mmtard.models import batch_norm, loading, lora, student
from mmtard.training.memory import Saved


@pytest.fixture(scope="session")
def timm_arch(tmp_path_factory):
    """Call with a timm model's name: the model config of an open_clip model with that image tower."""

    def make(name):
        vision = {
            "timm_model_name": name,
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": 160,
        }
        text = {"context_length": 10, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
        path = tmp_path_factory.mktemp("timm") / f"tests-{name}.json"
        path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
        return str(path)

    return make


def passes(arch, checkpointing, size):
    """(saved bytes, parameter gradients of a training pass, input gradient of an attack pass) of a small tower."""
    tower = loading.load_clip(Model(arch=arch, weights="random"), seed=1).tower()
    for name, p in tower.named_parameters():
        if name.endswith("bn3.weight"):
            torch.nn.init.ones_(p)
    if checkpointing:
        student.checkpoint_activations(tower)
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    saved = Saved(tower.train(), images).total
    tower(images).square().sum().backward()
    gradients = {name: p.grad for name, p in tower.named_parameters()}
    x = images.clone().requires_grad_(True)
    return saved, gradients, torch.autograd.grad(tower.eval()(x).square().sum(), x)[0]


@pytest.mark.parametrize("arch, size, share", [("vit", 16, 0.3), ("resnet", 32, 0.8)])
def test_checkpointing_keeps_less_and_changes_no_gradient(request, arch, size, share):
    """The tiny ResNet's stem, which is not a block, keeps most of what there is."""
    arch = request.getfixturevalue(arch)
    whole, less = passes(arch, False, size), passes(arch, True, size)
    assert less[0] < share * whole[0]
    assert less[1].keys() == whole[1].keys() and all(torch.equal(less[1][k], v) for k, v in whole[1].items())
    assert torch.equal(less[2], whole[2]) and whole[2].abs().max() > 0


@pytest.mark.parametrize("name", ["test_convnext", "test_vit"])
def test_a_timm_tower_trains_with_and_without_checkpointing(timm_arch, name):
    whole, less = (passes(timm_arch(name), checkpointing, 160) for checkpointing in (False, True))
    assert less[0] < whole[0]
    for k, v in whole[1].items():
        torch.testing.assert_close(less[1][k], v)
    assert any(v.abs().max() > 0 for v in whole[1].values()) and whole[2].abs().max() > 0


def test_adapters_fit_timms_attention_and_merge(timm_arch):
    tower = loading.load_clip(Model(arch=timm_arch("test_vit"), weights="random"), seed=1).tower().eval()
    x = torch.rand(2, 3, 160, 160)
    before, names = tower(x), tower.state_dict().keys()
    lora.attach(tower.visual, Lora(r=4, alpha=8, dropout=0), tower.layout)
    assert torch.equal(tower(x), before)
    for name, p in tower.named_parameters():
        assert p.requires_grad == (".lora_" in name)
        if ".lora_B." in name:
            torch.nn.init.normal_(p)
    adapted = tower(x)
    assert (adapted - before).abs().max() > 0.01
    lora.merge(tower.visual)
    torch.testing.assert_close(tower(x), adapted, rtol=1e-4, atol=1e-4)
    assert tower.state_dict().keys() == names


def test_nothing_in_a_students_training_pass_is_left_to_torchs_generator(timm_arch, tree, tmp_path):
    """A ConvNeXt with stochastic depth, whose masks would differ by rank, micro-batch and restart."""
    cfg = json.loads(Path(timm_arch("test_convnext")).read_text())
    cfg["vision_cfg"]["timm_drop_path"] = 0.5
    arch = tmp_path / "tests-droppath.json"
    arch.write_text(json.dumps(cfg))
    clip = loading.load_clip(Model(arch=str(arch), weights="random"), seed=1)
    for name, p in clip.model.visual.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.ones_(p)  # layer scale begins with next to no residual branch
    x = torch.rand(4, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    untouched = clip.tower().train()
    assert not torch.allclose(untouched(x), untouched(x))
    tower = student.trainable_tower(
        validate({**tree, "student": {"arch": str(arch), "weights": "random"}}), clip, None
    ).train()
    assert torch.equal(tower(x), tower(x))
    torch.testing.assert_close(torch.cat([tower(x[:2]), tower(x[2:])]), tower(x))


def test_adapters_fit_attention_whose_three_projections_are_apart_and_refuse_what_they_cannot_reach():
    names = lora._attention(loading.load_skeleton(Model(arch="EVA02-B-16", weights="random"), "student").tower().visual)
    assert {name.rpartition(".")[2] for name in names} == {"q_proj", "k_proj", "v_proj", "proj"} and len(
        names
    ) == 4 * 12
    with pytest.raises(UserError, match=r"student.lora: trunk.blocks.0.attn.qkv of this TimmModel takes no adapter"):
        lora._attention(loading.load_skeleton(Model(arch="EVA01-g-14", weights="random"), "student").tower().visual)


def test_what_a_tower_cannot_is_refused(timm_arch):
    tower = loading.load_clip(Model(arch=timm_arch("test_convnext"), weights="random")).tower()
    with pytest.raises(UserError, match="student.lora: no attention blocks for adapters in a TimmModel tower"):
        lora.attach(tower.visual, Lora(), tower.layout)
    with pytest.raises(UserError, match="student.batch_norm: a TimmModel tower has no batch norm to synchronise"):
        batch_norm.synchronise(tower.visual, tower.layout)
    tower.visual = torch.nn.Flatten()
    with pytest.raises(UserError, match="engine.checkpoint_activations: a Flatten tower cannot; set it to false"):
        student.checkpoint_activations(tower)
