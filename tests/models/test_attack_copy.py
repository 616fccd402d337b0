"""The attack's copy of a tower: the same numbers, no gradient, no cast at a pass, no memory where none is needed."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmtard.config import Model
from mmtard.models import loading, student
from mmtard.models.attack_copy import AttackCopy, cast_by_autocast, frozen_twin

X = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def made(arch, autocast=None, seed=3):
    tower = loading.load_clip(Model(arch=arch, weights="random"), seed).tower()
    tower.autocast = autocast
    return tower


def joined(tower):
    found = AttackCopy(tower)
    found.follow(tower, whole=True)
    return found


def input_gradient(tower, x):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", enabled=False):
        z = tower(x)
        return z.detach(), torch.autograd.grad(z.square().sum(), x)[0]


class Casts(TorchDispatchMode):
    """Counts matrices that are cast to bf16."""

    def __init__(self):
        super().__init__()
        self.matrices = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        to_bf16 = (kwargs or {}).get("dtype") is torch.bfloat16
        if function is torch.ops.aten._to_copy.default and to_bf16 and args[0].dim() == 2:
            self.matrices += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["vit", "resnet"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_copy_gives_the_towers_own_bits(request, kind, autocast):
    tower = made(request.getfixturevalue(kind), autocast).eval()
    x = X if kind == "vit" else torch.rand(3, 3, 32, 32)
    ours, theirs = input_gradient(joined(tower).tower, x), input_gradient(tower, x)
    assert ours[0].equal(theirs[0]) and torch.allclose(ours[1], theirs[1], rtol=1e-5, atol=1e-8)


def test_in_float32_it_has_no_memory_of_its_own_and_follows_at_once(vit):
    tower = made(vit)
    found = joined(tower)
    assert found.bytes == 0 and list(found.parts(None)) == []
    with torch.no_grad():
        tower.visual.proj.mul_(2)
    assert found.tower(X).equal(tower.eval()(X))
    assert not any(p.requires_grad for p in found.tower.parameters())
    assert all(p.requires_grad for p in tower.parameters())


def test_in_bf16_matrices_are_cast_once_an_update_and_norms_stay(vit):
    tower = made(vit, torch.bfloat16)
    found = joined(tower)
    dtypes = {name: p.dtype for name, p in found.tower.named_parameters()}
    assert {n for n, d in dtypes.items() if d == torch.float32} == {n for n in dtypes if ".ln_" in n}
    with torch.no_grad():
        for p in tower.parameters():
            p.mul_(1.5)
    before = found.tower(X)
    for part in found.parts(None):
        part.refresh()
    after = found.tower(X)
    assert after.equal(tower.eval()(X)) and not after.equal(before)
    with Casts() as casts:
        found.tower(X)
    assert casts.matrices == 0


def test_weights_are_refreshed_in_parts_of_bounded_size(vit):
    found = joined(made(vit, torch.bfloat16))
    parts = list(found.parts(10_000))
    whole = next(found.parts(None))
    assert [id(w) for part in parts for w in part.weights] == [id(w) for w in whole.weights]
    assert all(len(part.weights) == 1 or sum(w.numel() for w in part.weights) <= 10_000 for part in parts)
    assert len(parts) > 2


def test_weights_that_zero_spreads_are_copied_whole(vit):
    """As under ZeRO-3, which takes each parameter's memory away and gives it back for a while."""
    tower = made(vit, torch.bfloat16)
    expected = made(vit, torch.bfloat16).eval()(X)
    found = AttackCopy(tower)
    kept = {name: p.data.clone() for name, p in tower.named_parameters()}
    for p in tower.parameters():
        p.data = torch.empty(0)
    found.follow(tower, whole=False)
    assert found.tower(X).equal(expected)
    for name, p in tower.named_parameters():
        p.data = kept[name] * 1.5
    for part in found.parts(None):
        part.refresh()
    assert found.tower(X).equal(tower.eval()(X))


def test_what_is_frozen_is_cast_once_for_good(vit):
    from mmtard.config import Lora
    from mmtard.models import lora

    tower = made(vit, torch.bfloat16)
    lora.attach(tower.visual, Lora(r=2), tower.layout)
    found = joined(tower)
    part = next(found.parts(None))
    assert len(part.sources) == 8 and all(p.requires_grad for p in part.sources)  # 2 blocks, 2 projections, A and B
    assert found.tower(X).equal(tower.eval()(X))
    with Casts() as casts:
        found.tower(X)
    assert casts.matrices == 0


def test_a_parameter_that_is_also_used_as_it_is_stays_as_it_is(resnet):
    """CLIP's attention pooling joins its three biases in float32 before they are cast."""
    twin = frozen_twin(made(resnet, torch.bfloat16))
    cast = cast_by_autocast(twin)
    assert "visual.attnpool.q_proj.weight" in cast and "visual.attnpool.q_proj.bias" not in cast
    assert "visual.conv1.weight" in cast and "visual.bn1.weight" not in cast


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_the_copy_keeps_activations_that_the_tower_computes_again(request, kind):
    tower = made(request.getfixturevalue(kind))
    student.checkpoint_activations(tower)
    with student.keeping_activations(tower):
        twin = frozen_twin(tower)
    calls = {}
    for name, model in (("tower", tower), ("twin", twin)):
        block = next(m for n, m in model.named_modules() if n.endswith(("resblocks.0.mlp.c_fc", "layer1.0.conv1")))
        block.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
        input_gradient(model, X if kind == "vit" else torch.rand(2, 3, 32, 32))
    assert calls == {"tower": 2, "twin": 1}
    assert copy.deepcopy(tower).checkpointed and not twin.checkpointed
