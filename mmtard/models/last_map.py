"""The last map of a convolutional tower beside its embedding, as one feature for each place of a grid.

A tower changes its class in place, as in vision_transformer.py: names, state dicts and embeddings stay what they are.
The classes are called as open_clip calls its own, which messages name.
"""

from __future__ import annotations

from open_clip import modified_resnet, timm_model
from torch import Tensor, nn

FAMILIES = ("ConvNeXt", "ResNet", "FastVit")  # of timm: their forward is forward_features, then forward_head


class ModifiedResNet(modified_resnet.ModifiedResNet):
    """CLIP's ResNet: images [B,3,H,W] -> embeddings [B,D]; with `output_map`, also the last map, [B,P,C]."""

    output_map = False

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """images [B,3,H,W] -> embeddings [B,D], and the last map [B,P,C] where it is wanted."""
        if not self.output_map:
            return super().forward(x)
        last = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(x)))))
        return self.attnpool(last), by_place(last)


class TimmModel(timm_model.TimmModel):
    """A convolutional tower of timm, asked in the same way."""

    output_map = False

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """images [B,3,H,W] -> embeddings [B,D], and the last map [B,P,C] where it is wanted."""
        if not self.output_map:
            return super().forward(x)
        last = self.trunk.forward_features(x)
        return self.head(self.trunk.forward_head(last)), by_place(last)


def by_place(last: Tensor) -> Tensor:
    """A map [B,C,h,w] -> its features by place, row by row: [B,h*w,C]."""
    return last.flatten(2).transpose(1, 2)


def offer(visual: nn.Module) -> None:
    """Let a convolutional tower give its last map when it is asked for; any other stays as it is."""
    if type(visual) is modified_resnet.ModifiedResNet:
        visual.__class__ = ModifiedResNet
    elif type(visual) is timm_model.TimmModel and type(visual.trunk).__name__ in FAMILIES:
        visual.__class__ = TimmModel


def width(visual: nn.Module) -> int | None:
    """The channels C of the last map; None for a tower that gives none."""
    if isinstance(visual, ModifiedResNet):
        return visual.attnpool.c_proj.in_features
    return visual.trunk.num_features if isinstance(visual, TimmModel) else None
