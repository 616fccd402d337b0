"""open_clip's ViT computed with less work: the same function of the same parameters, up to the order of additions.

Three parts change their class in place, so that names, state dicts, hooks and copies stay what they are:

- the patch embedding is a matrix product; as a convolution of stride = kernel, its gradient to the pixels alone took an
  eighth of an attack step on a CPU;
- self-attention is asked without transposing tokens and batch. nn.MultiheadAttention multiplies transposed tokens with
  weights that ask for no gradient, such as an attack's or a teacher's, image by image;
- the last block computes what the embedding is read from, the class token alone: what it makes of the patches is
  nobody's, yet 7 % of a ViT-B/32's arithmetic and 3.5 % of a ViT-L/14's, in every forward and backward.
"""

from __future__ import annotations

import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn


class PatchEmbedding(nn.Conv2d):
    """A convolution whose patches touch and do not overlap: images [B,C,H,W] -> [B,D,H/p,W/q], as a matrix product."""

    def forward(self, images: Tensor) -> Tensor:
        """images [B,C,H,W] -> [B,D,H/p,W/q]."""
        p, q = self.kernel_size
        batch, channels, height, width = images.shape
        rows, columns = height // p, width // q
        patches = images[:, :, : rows * p, : columns * q].reshape(batch, channels, rows, p, columns, q)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * p * q)
        return F.linear(patches, self.weight.flatten(1), self.bias).transpose(1, 2).unflatten(2, (rows, columns))


class SelfAttention(nn.MultiheadAttention):
    """Attention of queries [B,Q,D] over keys that are their own values, [B,L,D] -> ([B,Q,D], None)."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """query [B,Q,D], key [B,L,D] -> ([B,Q,D], None); open_clip's own way where values differ from keys."""
        if need_weights or key is not value:
            return super().forward(query, key, value, need_weights=need_weights, attn_mask=attn_mask)
        weight, bias, width = self.in_proj_weight, self.in_proj_bias, self.embed_dim
        if query is key:
            q, k, v = F.linear(query, weight, bias).chunk(3, -1)
        else:
            q = F.linear(query, weight[:width], None if bias is None else bias[:width])
            k, v = F.linear(key, weight[width:], None if bias is None else bias[width:]).chunk(2, -1)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), None


class ClassTokenBlock(ResidualAttentionBlock):
    """A residual attention block, x [B,L,D] -> that of the first token, [B,1,D]; or of all, where `all_tokens`."""

    all_tokens = False

    def forward(
        self, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """x [B,L,D] -> [B,1,D]; all tokens [B,L,D] where they are wanted, or with a mask."""
        if self.all_tokens or k_x is not None or v_x is not None or attn_mask is not None:
            return super().forward(q_x, k_x, v_x, attn_mask)
        x = self.ln_1(q_x)
        # An adapted attention (LoRA) takes all tokens, for the sake of its dropout. The class token is every L-th row:
        # at the strides of `:1`, torch 2.11 would multiply with frozen weights image by image.
        queries = x[:, :: x.shape[1]] if isinstance(self.attn, nn.MultiheadAttention) else x
        attended = self.attn(queries, x, x, need_weights=False)[0][:, :1]
        token = q_x[:, :1] + self.ls_1(attended)
        return token + self.ls_2(self.mlp(self.ln_2(token)))


def lighten(visual: nn.Module) -> None:
    """Let a ViT of open_clip compute so; any other tower stays as it is, and so does any part of another kind."""
    if not isinstance(visual, VisionTransformer):
        return
    if type(visual.conv1) is nn.Conv2d and _tiles(visual.conv1):
        visual.conv1.__class__ = PatchEmbedding
    blocks = [block for block in visual.transformer.resblocks if type(block) is ResidualAttentionBlock]
    for block in blocks:
        if type(block.attn) is nn.MultiheadAttention and _is_plain(block.attn):
            block.attn.__class__ = SelfAttention
    reads_class_token = visual.attn_pool is None and visual.pool_type == "tok"
    if reads_class_token and blocks and blocks[-1] is visual.transformer.resblocks[-1] and blocks[-1].attn.batch_first:
        blocks[-1].__class__ = ClassTokenBlock


def restore(visual: nn.Module) -> None:
    """Let a tower compute as open_clip does it again."""
    for module in visual.modules():
        for ours in (PatchEmbedding, SelfAttention, ClassTokenBlock):
            if type(module) is ours:
                module.__class__ = ours.__base__


def ask_for_all_tokens(visual: VisionTransformer, wanted: bool) -> None:
    """Let the last block compute all tokens in the forwards that follow, or the class token alone."""
    last = visual.transformer.resblocks[-1]
    if isinstance(last, ClassTokenBlock):
        last.all_tokens = wanted


def _tiles(conv: nn.Conv2d) -> bool:
    plain = conv.padding in ((0, 0), "valid") and conv.dilation == (1, 1) and conv.groups == 1
    return plain and conv.stride == conv.kernel_size


def _is_plain(attention: nn.MultiheadAttention) -> bool:
    same_width = attention.in_proj_weight is not None
    extra = attention.bias_k is not None or attention.add_zero_attn or attention.dropout > 0
    return same_width and attention.batch_first and not extra
