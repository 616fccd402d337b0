"""open_clip's ViT, computed with less work: the same numbers and gradients in float64."""

import copy
from collections import Counter

import pytest
import torch
from open_clip.transformer import VisionTransformer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mmtard.models import vision_transformer
from mmtard.models.vision_transformer import ClassTokenBlock, PatchEmbedding, SelfAttention

SHAPE = dict(image_size=16, patch_size=8, width=32, layers=3, heads=2, mlp_ratio=2, output_dim=16)


def pair(**changes):
    """(open_clip's, ours) with the same weights, in float64."""
    torch.manual_seed(0)
    plain = VisionTransformer(**{**SHAPE, **changes}).double()
    ours = copy.deepcopy(plain)
    vision_transformer.lighten(ours)
    return plain, ours


def gradients(visual, x):
    x = x.clone().requires_grad_()
    z = visual(x)
    names, weights = zip(*visual.named_parameters())
    found = torch.autograd.grad(z.square().sum(), [x, *weights], allow_unused=True)
    return z, dict(zip(("images", *names), found))


@pytest.mark.parametrize(
    "changes", [{}, {"pool_type": "avg"}, {"ls_init_value": 0.1}, {"no_ln_pre": True}, {"image_size": (24, 16)}]
)
def test_embeddings_and_gradients_are_open_clips(changes):
    plain, ours = pair(**changes)
    height, width = plain.image_size
    x = torch.rand(5, 3, height, width, dtype=torch.float64)
    (z, g), (z_ours, g_ours) = gradients(plain, x), gradients(ours, x)
    torch.testing.assert_close(z_ours, z, rtol=1e-10, atol=1e-12)
    assert g.keys() == g_ours.keys()
    for name in g:
        torch.testing.assert_close(g_ours[name], g[name], rtol=1e-9, atol=1e-12, msg=name)


def test_the_parts_are_those_that_save_work():
    _, ours = pair()
    assert type(ours.conv1) is PatchEmbedding and type(ours.transformer.resblocks[-1]) is ClassTokenBlock
    assert all(type(block.attn) is SelfAttention for block in ours.transformer.resblocks)
    _, mean = pair(pool_type="avg")  # reads every patch
    assert not isinstance(mean.transformer.resblocks[-1], ClassTokenBlock)


def test_all_tokens_are_open_clips_when_they_are_asked_for():
    plain, ours = pair()
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    plain.output_tokens = ours.output_tokens = True
    vision_transformer.ask_for_all_tokens(ours, True)
    for a, b in zip(ours(x), plain(x)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    vision_transformer.ask_for_all_tokens(ours, False)
    assert ours(x)[1].shape == (2, 0, 32)


def test_a_large_vit_saves_what_is_said():
    """ViT-B/32: the last block's patches are 7 % of its arithmetic."""
    with torch.device("meta"):
        model = VisionTransformer(224, 32, 768, layers=12, heads=12, mlp_ratio=4, output_dim=512)
    counts = []
    for visual in (model, copy.deepcopy(model)):
        if counts:
            vision_transformer.lighten(visual)
        visual.requires_grad_(False)
        x = torch.empty(1, 3, 224, 224, device="meta", requires_grad=True) * 1  # the counter takes no leaf
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(visual(x).sum(), x)
        counts.append(counter)
    plain, ours = (c.get_total_flops() for c in counts)
    assert 0.06 < 1 - ours / plain < 0.08


def test_attention_of_frozen_weights_multiplies_all_images_at_once():
    """open_clip's would multiply image by image, forwards and backwards, where weights ask for no gradient."""
    batched = []
    for visual in pair():
        seen = Operations()
        x = torch.rand(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
        with seen:
            torch.autograd.grad(visual.requires_grad_(False)(x).sum(), x)
        batched.append(seen.counts[torch.ops.aten.bmm.default])
    assert batched[0] > 0 and batched[1] == 0


def test_the_class_tokens_query_is_rows_of_one_matrix_to_every_torch_that_is_accepted():
    """torch 2.11 folds images into rows where all strides say so; 2.14 leaves out that of a length of 1."""
    _, ours = pair()
    queries = []
    ours.transformer.resblocks[-1].attn.register_forward_pre_hook(lambda _, args: queries.append(args[0]))
    ours(torch.rand(2, 3, 16, 16, dtype=torch.float64))
    (query,) = queries
    assert query.shape == (2, 1, 32) and query.stride(0) == query.stride(1)


class Operations(TorchDispatchMode):
    """Counts every operation."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function] += 1
        return function(*args, **(kwargs or {}))


def test_a_tower_can_be_given_back_as_open_clip_made_it():
    plain, ours = pair()
    vision_transformer.restore(ours)
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    assert ours(x).equal(plain(x))
    assert [type(m) for m in ours.modules()] == [type(m) for m in plain.modules()]
    assert ours.state_dict().keys() == plain.state_dict().keys()
