"""The student's tower: activation checkpointing, and towers that are neither open_clip's ViT nor its ResNet."""

import json
from pathlib import Path

import pytest
import torch

from mmtard.config import Lora, Model, Teacher, validate
from mmtard.errors import UserError
from mmtard.models import batch_norm, loading, lora, student
from mmtard.models.image_tower import blocks
from mmtard.models.teachers import FrozenTeacher
from mmtard.training.memory import Saved
from mmtard.zero_shot import ZeroShotHead


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


def test_blocks_that_keep_their_activations_for_a_while_are_the_same_again(resnet):
    """A compiled graph is bound to the very functions that it was made of: new ones would have it made anew."""
    tower = loading.load_clip(Model(arch=resnet, weights="random")).tower()
    plain = [block.forward for block in blocks(tower)]
    student.checkpoint_activations(tower)
    again = [block.forward for block in blocks(tower)]
    with student.keeping_activations(tower):
        assert [block.forward for block in blocks(tower)] == plain
    assert all(block.forward is function for block, function in zip(blocks(tower), again))


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


# ---------------------------------------------------------------- several ranks, one source


class Rank:
    """One of two ranks, one after the other: what the first found is the second's."""

    world_size, device = 2, torch.device("cpu")

    def __init__(self, is_first, shared):
        self.is_first, self.shared = is_first, shared

    def run_on_first(self, work):
        if self.is_first:
            self.shared["result"] = work()
        return self.shared["result"]


def test_one_rank_reads_the_source_of_a_start_and_the_others_what_it_wrote(vit, tmp_path, monkeypatch, tree):
    config = validate({**tree, "student": {"arch": vit, "weights": "random"}})
    sources, load = [], loading.load_clip
    monkeypatch.setattr(loading, "load_clip", lambda spec, *a, **k: sources.append(spec.weights) or load(spec, *a, **k))
    shared = {}
    first, second = (student.start_model(config, tmp_path, False, Rank(is_first, shared)) for is_first in (True, False))
    assert sources == ["random", str(tmp_path / "start")], "the first has what it wrote"
    assert (first.name, first.config) == (second.name, second.config)
    assert all(first.sha256(image=image) == second.sha256(image=image) for image in (True, False))


def test_what_comes_over_the_network_is_fetched_by_one_rank_before_the_others_ask(monkeypatch):
    asked, shared = [], {}
    monkeypatch.setattr(loading, "load_clip", lambda spec, *_: asked.append("first" if not shared else "then") or spec)
    for is_first in (True, False):
        loading.load_clip_on_all_ranks(Model(weights="hf-hub:org/clip"), Rank(is_first, shared), 0, "teachers.clean")
    assert asked == ["first", "then"]

    def absent(*_):
        raise UserError("teachers.clean.weights: cannot load")

    monkeypatch.setattr(loading, "load_clip", absent)
    with pytest.raises(UserError, match="cannot load"):
        loading.load_clip_on_all_ranks(Model(arch="ViT-B-32", weights="openai"), Rank(True, {}), 0, "teachers.clean")


@pytest.mark.parametrize("value, words", [(0.0, "zero"), (1.0, "the same for 8 different images")])
def test_a_teacher_whose_embeddings_say_nothing_is_refused_at_its_first_batch(vit, value, words):
    tower = loading.load_clip(Model(arch=vit, weights="random")).tower()
    with torch.no_grad():
        tower.visual.proj.zero_()
        if value:
            tower.visual.ln_post.weight.zero_()
            tower.visual.proj.fill_(value)
            tower.visual.ln_post.bias.fill_(1.0)
    head = ZeroShotHead(torch.nn.functional.normalize(torch.randn(3, 16), dim=-1), 100.0)
    teacher = FrozenTeacher("clean", Teacher(arch=vit, weights="random"), tower, head, Rank(True, {}), torch.float32)
    with pytest.raises(UserError, match=f"^teachers.clean: its embeddings are {words}; take other weights"):
        teacher(torch.rand(8, 3, 16, 16))
