"""What attacks are given, checked where it comes in: wrong use ends in one line that says what to write instead.

All but `check_images` and `check_label_range` look at shapes and types alone, and never wait for a GPU.
"""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor

from ..errors import UserError

FLOATS = (torch.float32, torch.float64)


def check_batch(images: Tensor) -> None:
    """UserError unless `images` is a floating-point tensor [B,...]."""
    if not isinstance(images, Tensor):
        raise UserError(f"images: a {type(images).__name__}, not a tensor; give float32 [B,C,H,W] in [0,1]")
    if not images.is_floating_point():
        raise UserError(f"images: {images.dtype} instead of float32; divide 8-bit pixels by 255: images.float() / 255")
    if images.dim() < 2:
        raise UserError(f"images: shape {list(images.shape)}; give a batch, [B,C,H,W]")


def check_images(images: Tensor) -> None:
    """UserError unless `images` is float32 [B,C,H,W] in [0,1], the scale of eps; the model normalises by itself."""
    check_batch(images)
    if images.dtype != torch.float32:
        raise UserError(f"images: {images.dtype} instead of float32; an attack of 1/255 does not survive less")
    if images.dim() != 4:
        raise UserError(f"images: shape {list(images.shape)}; give a batch, [B,C,H,W] (one image: images[None])")
    if not images.numel():
        raise UserError(f"images: shape {list(images.shape)} holds no pixel; give at least one image")
    low, high = (float(extreme) for extreme in images.detach().aminmax())
    if math.isnan(low):
        raise UserError("images: NaN among the pixels, which is not within [0,1]; repair or leave out these images")
    if not (low >= 0 and high <= 1):
        raise UserError(
            f"images: values from {low:.4g} to {high:.4g}, not within [0,1]; "
            "pass plain pixels / 255 and normalise inside the model"
        )


def check_per_sample(values: Tensor, images: Tensor, name: str) -> None:
    """UserError unless `values` (labels, seeds) are int64 [B] on the images' device."""
    n = len(images)
    if not isinstance(values, Tensor):
        raise UserError(f"{name}: a {type(values).__name__}, not a tensor; give int64 [{n}]: torch.tensor({name})")
    if values.shape != (n,):
        raise UserError(f"{name}: shape {list(values.shape)} beside {n} images; give one for each, [{n}]")
    if values.dtype != torch.int64:
        raise UserError(f"{name}: {values.dtype} instead of int64; write {name}.long()")
    if values.device != images.device:
        raise UserError(f"{name}: on {values.device}, the images on {images.device}; write {name}.to(images.device)")


def check_label_range(labels: Tensor, n_classes: int) -> None:
    """UserError unless every label is a class of the model."""
    lowest, highest = (int(extreme) for extreme in labels.aminmax())
    if lowest < 0:
        raise UserError(f"labels: {lowest} is no class; leave the unlabelled samples out")
    if highest >= n_classes:
        raise UserError(
            f"labels: {highest} is beyond the model's {n_classes} classes; give it the class names of these labels"
        )


def check_logits(logits: Tensor, images: Tensor) -> None:
    """UserError unless a model's answer is float32 or float64 [B,C] on the images' device."""
    if not isinstance(logits, Tensor):
        kind = f"a {type(logits).__name__}"
        if isinstance(logits, tuple | list):
            kind += f" of {len(logits)}"
        raise UserError(
            f"model: it returns {kind} instead of logits [B,C]; wrap it, such as lambda x: model(x)[0], "
            "and an open_clip model with mmtard.load(model)"
        )
    if logits.dtype not in FLOATS:
        raise UserError(
            f"model: its logits are {logits.dtype}; attacks need float32: "
            "evaluate it without autocast or half-precision weights"
        )
    if logits.dim() != 2 or len(logits) != len(images):
        raise UserError(
            f"model: its logits have shape {list(logits.shape)} for {len(images)} images; "
            "return [B,C], a row for each image"
        )
    if logits.shape[1] < 2:
        raise UserError("model: its logits are of one class; an attack needs two (binary: stack [-z, z])")
    if logits.device != images.device:
        raise UserError(f"model: its logits are on {logits.device}, the images on {images.device}; move one of them")


def check_loss(loss: Tensor, images: Tensor) -> None:
    """UserError unless a loss is floating-point, one value for each image, and can be differentiated."""
    if not isinstance(loss, Tensor) or not loss.is_floating_point():
        raise UserError(f"loss_fn: it returns {_kind(loss)}; return floating-point losses, one for each image")
    if loss.shape != images.shape[:1]:
        raise UserError(
            f"loss_fn: it returns shape {list(loss.shape)} for {len(images)} images; "
            "return one loss for each: reduction='none'"
        )


def check_radius(eps: float) -> float:
    """The radius as a float. UserError unless it is a finite number >= 0."""
    value = _number(eps, "eps", "2/255")
    if not 0 <= value < math.inf:
        raise UserError(f"eps: {eps} is no size; write a positive one such as 2/255")
    return value


def check_eps(eps: float, norm: str) -> float:
    """As `check_radius`; an L-inf radius must also be at most 1, the range of a pixel."""
    value = check_radius(eps)
    if norm == "linf" and value > 1:
        raise UserError(
            f"eps: {eps} is in units of [0,1], the whole range of a pixel; write {eps}/255 for {eps} of 255 levels"
        )
    return value


def check_positive(value: float, name: str) -> float:
    """The value as a float. UserError unless it is a finite number > 0."""
    number = _number(value, name, "1/255")
    if not 0 < number < math.inf:
        raise UserError(f"{name}: {value} is not positive; write a size such as 1/255")
    return number


def check_count(value: int, name: str) -> None:
    """UserError unless the value is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise UserError(f"{name}: {value!r} is not a whole number; write 1 or more")
    if value < 1:
        raise UserError(f"{name}: {value} is too few; write 1 or more")


def _number(value: object, name: str, example: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UserError(f"{name}: {value!r} is not a number; write one such as {example}")
    return float(value)


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else f"a {type(value).__name__}"
