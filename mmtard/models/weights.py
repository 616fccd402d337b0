"""Weights in files and in memory: read safely, loaded strictly, hashed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import UserError


def tensors_sha256(state: dict[str, Tensor]) -> str:
    """sha256 hex of names, types, shapes and bytes, in the order of the names: the same from whichever file they came."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_strictly(module: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Load every weight or raise UserError naming the keys that are missing, unexpected or of another shape."""
    own = module.state_dict()
    problems = {
        "missing": [k for k in own if k not in state],
        "unexpected": [k for k in state if k not in own],
        "of another shape": [
            f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}"
            for k in own
            if k in state and own[k].shape != state[k].shape
        ],
    }
    told = [
        f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in problems.items()
        if keys
    ]
    if told:
        raise UserError(f"{what} does not fit the architecture: {'; '.join(told)}; check `arch`")
    module.load_state_dict(state, strict=True)


def load_trained(module: nn.Module, weights: dict[str, Tensor], what: str) -> None:
    """Load what a checkpoint holds of a module: everything but its frozen parameters, as strictly as `load_strictly`."""
    frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    load_strictly(module, frozen | weights, what)


def read_state_dict(path: Path, where: str) -> dict[str, Tensor]:
    try:
        state = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # every loader has its own family of errors for a file that is not its own
        raise UserError(
            f"{where}.weights: cannot read '{path}' as safetensors or a weights-only torch file: {str(error).splitlines()[0]}"
        ) from None
    for wrapper in ("state_dict", "model", "vision_encoder_state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{where}.weights: '{path}' holds no state_dict (names and tensors)")
    return {k.removeprefix("module."): v for k, v in state.items()}
