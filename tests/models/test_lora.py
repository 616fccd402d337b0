"""Adapters on a tower's attention: what they compute, what dropout drops; merged, unmerged and peft's are one model."""

import copy
import json

import open_clip
import peft
import pytest
import torch
import torch.nn.functional as F

from mmtard.config import Lora, Model, dump, validate
from mmtard.errors import UserError
from mmtard.export.folder import export
from mmtard.models import loading, lora, student
from mmtard.models.clip import START_FOLDER
from mmtard.runs.checkpoint_writer import Checkpoints

SETTINGS = Lora(r=4, alpha=8, dropout=0.25)
IMAGES = torch.rand(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def double(tower):
    tower.dtype = torch.float64
    return tower.double()


@pytest.fixture
def adapted(vit):
    """(the tower in float64 with adapters whose update is not zero, the same without)."""
    plain = double(loading.load_clip(Model(arch=vit, weights="random"), seed=1).tower()).eval()
    tower = copy.deepcopy(plain)
    lora.attach(tower.visual, SETTINGS, tower.layout)
    # B is zero. The plain tower's last block adds in another order: see mmtard/models/vision_transformer.py.
    torch.testing.assert_close(tower.eval()(IMAGES), plain(IMAGES), rtol=1e-13, atol=1e-13)
    for i, (name, p) in enumerate(tower.named_parameters()):
        if ".lora_B." in name:
            torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(i))
    return tower, plain


def updated(plain, tower):
    """The plain tower with W + alpha / r * B A in its weights, worked out here."""
    by_hand, weights = copy.deepcopy(plain), dict(tower.named_parameters())
    for i, block in enumerate(by_hand.visual.transformer.resblocks):
        at = f"visual.transformer.resblocks.{i}.attn"
        for weight, name in (
            (block.attn.in_proj_weight, at),
            (block.attn.out_proj.weight, f"{at}.base_layer.out_proj"),
        ):
            weight.data += (
                8 / 4 * weights[f"{name}.lora_B.default.weight"].data @ weights[f"{name}.lora_A.default.weight"].data
            )
    return by_hand


def test_adapters_add_their_update_to_both_projections_of_the_attention(adapted):
    tower, plain = adapted
    torch.testing.assert_close(tower(IMAGES), updated(plain, tower)(IMAGES), rtol=1e-12, atol=1e-12)
    assert (tower(IMAGES) - plain(IMAGES)).abs().max() > 0.1


def test_merged_is_unmerged_and_the_plain_architecture_again(adapted):
    tower, plain = adapted
    before = tower(IMAGES)
    lora.merge(tower.visual)
    torch.testing.assert_close(tower(IMAGES), before, rtol=1e-12, atol=1e-12)
    assert tower.state_dict().keys() == plain.state_dict().keys()
    attention, untouched = (t.visual.transformer.resblocks[0].attn for t in (tower, plain))
    assert type(attention) is type(untouched) and isinstance(attention, torch.nn.MultiheadAttention)


def test_adapters_alone_get_gradients_and_those_of_the_merged_weights(adapted):
    tower, plain = adapted
    by_hand = updated(plain, tower).requires_grad_(True)
    tower(IMAGES).square().sum().backward()
    by_hand(IMAGES).square().sum().backward()
    assert all(p.requires_grad == (".lora_" in n) == (p.grad is not None) for n, p in tower.named_parameters())
    theirs = by_hand.visual.transformer.resblocks[1].attn.in_proj_weight.grad
    adapter = tower.visual.transformer.resblocks[1].attn
    a, b = adapter.lora_A["default"].weight, adapter.lora_B["default"].weight
    torch.testing.assert_close(a.grad, 2 * b.T @ theirs)
    torch.testing.assert_close(b.grad, 2 * theirs @ a.T)


def test_dropout_belongs_to_the_sample_and_the_view(adapted):
    tower, _ = adapted
    seeds = torch.tensor([5, 6, 7, 8])
    tower.train()
    tower.layout.describe(4, seeds)
    whole = tower(IMAGES)
    assert torch.equal(whole, tower(IMAGES)) and (whole - tower.eval()(IMAGES)).abs().max() > 0.1
    tower.train().layout.describe(2, seeds[2:])
    torch.testing.assert_close(tower(IMAGES[2:]), whole[2:], rtol=1e-12, atol=1e-12)
    tower.layout.describe(4, seeds[:2])  # two views of two samples
    twice = tower(IMAGES[:2].repeat(2, 1, 1, 1))
    torch.testing.assert_close(twice[:2], whole[:2], rtol=1e-12, atol=1e-12)
    assert (twice[2:] - whole[:2]).abs().max() > 0.1


def test_dropout_keeps_its_share_and_the_mean(adapted):
    dropout = adapted[0].visual.transformer.resblocks[0].attn.lora_dropout["default"]
    adapted[0].layout.describe(4096, torch.arange(4096))
    ones = dropout.train()(torch.ones(4096, 5, 32))
    assert ones.unique().tolist() == [0, pytest.approx(4 / 3)]
    assert ones.mean().item() == pytest.approx(1, abs=5 * (1 / 3 / ones.numel()) ** 0.5)


@pytest.fixture
def run(vit, tmp_path):
    """A run of adapters with a start, a checkpoint and an average: (folder, the checkpoint's adapted float32 tower)."""
    folder = tmp_path / "run"
    config = validate({
        "run_dir": str(folder), "method": {"name": "clean"},
        "student": {"arch": vit, "weights": "random", "lora": SETTINGS.model_dump()},
        "data": {"shards": "s", "lanes": 4}, "train": {"steps": 1, "batch_size": 4},
    })  # fmt: skip
    clip = loading.load_clip(config.student, 1)
    clip.save(folder / START_FOLDER)
    (folder / "config.yaml").write_text(dump(config))
    tower = student.trainable_tower(config, clip, None)
    weights = {
        n: torch.randn(p.shape, generator=torch.Generator().manual_seed(9))
        for n, p in tower.named_parameters()
        if p.requires_grad
    }
    saver = Checkpoints(folder, keep_last=1)
    saver.save(1, weights, {f"ema.{n}": v / 2 for n, v in weights.items()}, {"step": 1})
    saver.wait()
    return folder, student.trainable_tower(
        config, loading.load_clip(Model(weights=str(folder / "start"))), folder / "checkpoints" / "step-1"
    ).eval()


def test_a_run_is_loaded_and_exported_merged(run, tmp_path):
    folder, tower = run
    x = IMAGES.float()
    torch.testing.assert_close(
        loading.load_clip(Model(weights=str(folder))).tower().eval()(x), tower(x), rtol=1e-4, atol=1e-4
    )
    export(Model(weights=str(folder)), tmp_path / "out", merge_lora=True)
    model = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    torch.testing.assert_close(model.encode_image((x - tower.mean) / tower.std), tower(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ema, scale", [(False, 1), (True, 0.5)])
def test_peft_loads_the_exported_adapter_on_the_open_clip_model(run, tmp_path, ema, scale):
    folder, tower = run
    written = export(Model(weights=str(folder), ema=ema), tmp_path / "out")
    assert [p.name for p in written] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert json.loads(written[1].read_text())["base_model_name_or_path"].endswith("tests-vit.json/random")
    clip = loading.load_clip(Model(weights=str(folder / "start")))
    loaded = peft.PeftModel.from_pretrained(clip.model, tmp_path / "out").eval()
    for name, p in tower.named_parameters():
        p.data *= scale if ".lora_" in name else 1
    x = IMAGES.float()
    torch.testing.assert_close(loaded.encode_image((x - tower.mean) / tower.std), tower(x), rtol=1e-4, atol=1e-4)
    assert (
        F.cosine_similarity(loading.load_clip(Model(weights=str(folder / "start"))).tower().eval()(x), tower(x)) < 0.9
    ).all()


def test_what_does_not_fit_is_refused(run, resnet, tmp_path, monkeypatch):
    folder, _ = run
    with pytest.raises(UserError, match="--hf: transformers loads whole models alone; add --merge-lora"):
        export(Model(weights=str(folder)), tmp_path / "out", hf=True)
    with pytest.raises(UserError, match="--merge-lora: .* holds no adapter"):
        export(Model(weights=str(folder / "start")), tmp_path / "out", merge_lora=True)
    tower = loading.load_clip(Model(arch=resnet, weights="random")).tower()
    with pytest.raises(UserError, match="student.lora: no attention blocks for adapters in a ModifiedResNet tower"):
        lora.attach(tower.visual, SETTINGS, tower.layout)
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"peft, which is not installed; pip install mmtard\[lora\]"):
        loading.load_clip(Model(weights=str(folder)))
