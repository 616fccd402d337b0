"""QuickGELU or GELU: the activation that a model's weights were trained with is the one it runs with."""

from __future__ import annotations

import open_clip

from ..config import Model
from ..errors import UserError


def trained_gelu(name: str, tag: str) -> bool:
    """Whether the weights of a tag were trained with QuickGELU."""
    return bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False))


def wanted_gelu(name: str, spec: Model, trained: bool | None, where: str) -> bool:
    """Whether the model is to run with QuickGELU. trained: whether its weights were; None where nothing says so.

    Raises UserError when the weights were trained with the other activation.
    """
    architecture_default = bool(open_clip.get_model_config(name).get("quick_gelu", False))
    if spec.quick_gelu is not None:
        quick_gelu = spec.quick_gelu
    elif trained is not None and not architecture_default:
        quick_gelu = trained
    else:
        quick_gelu = architecture_default
    if trained is not None and quick_gelu != trained:
        asked = "quick_gelu" if spec.quick_gelu is not None else f"arch {name}"
        raise UserError(
            f"{where}: weights '{spec.weights}' were trained with quick_gelu {str(trained).lower()}, but {asked} asks"
            f" for {str(quick_gelu).lower()}; leave quick_gelu out and name the plain architecture"
        )
    return quick_gelu
