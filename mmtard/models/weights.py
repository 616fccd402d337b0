"""Weights in files and in memory: read safely, loaded strictly, hashed."""

from __future__ import annotations

import hashlib
import pickle
import re
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import UserError
from .archive import Inert, is_torchscript, module_tensors, read_archive

# The entries under which trainers keep a model's weights; the last is DeepSpeed's.
WRAPPERS = ("state_dict", "model_state_dict", "model", "vision_encoder_state_dict", "module")
# What wrappers of a model put before every name: DDP, torch.compile, Lightning. Any of them, in any order.
PREFIXES = ("module.", "_orig_mod.", "model.")
# Buffers of archives that are no weights: OpenAI's three, and the mask that a traced model of open_clip keeps.
OPENAI_CONSTANTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")


def tensors_sha256(state: dict[str, Tensor]) -> str:
    """sha256 hex of names, types, shapes and bytes in the order of the names: equal from whichever file they came."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_strictly(module: nn.Module, state: dict[str, Tensor], what: str, remedy: str = "check `arch`") -> None:
    """Load every weight into `module`.

    what: how the message calls the weights. Raises UserError naming the keys that are missing, unexpected or of
    another shape, and the first tensor that holds NaN or infinity.
    """
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
    message = [
        f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in problems.items()
        if keys
    ]
    if message:
        raise UserError(f"{what} does not fit the architecture: {'; '.join(message)}; {remedy}")
    require_finite(state, what)
    module.load_state_dict(state, strict=True)


def load_trained(module: nn.Module, weights: dict[str, Tensor], what: str) -> None:
    """Load what a checkpoint holds of a module, all but its frozen parameters, as strictly as `load_strictly`."""
    frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    load_strictly(module, frozen | weights, what)


def require_finite(state: dict[str, Tensor], what: str) -> None:
    """Raise UserError naming the first tensor that holds NaN or infinity: such a model measures nothing."""
    for name, tensor in state.items():
        if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta:
            continue
        low, high = tensor.detach().aminmax()  # both are NaN where any element is
        if not (low.isfinite() and high.isfinite()):
            count = int((~tensor.detach().isfinite()).sum())
            raise UserError(
                f"{what} is not finite: '{name}' holds NaN or infinity in {count} of its {tensor.numel()} numbers;"
                " take other weights"
            )


def read_state_dict(path: Path, where: str) -> dict[str, Tensor]:
    """The weights of a file by name: safetensors, a torch checkpoint or a TorchScript archive. None of its code runs.

    Prefixes of DDP, torch.compile and Lightning are taken off; entries that are no tensors, such as an epoch, are
    left out. Raises UserError that begins with `where`, for a file that is empty, cut, damaged, or holds no weights.
    """
    content = _read(path, where)
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    state = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not state or not all(isinstance(name, str) for name in state):
        foreign = _foreign(content)
        if foreign:
            raise UserError(
                f"{where}.weights: cannot read '{path}': it holds a Python object ({foreign}) in place of weights,"
                " which is never"
                " run; save the model's state_dict() alone"
            )
        raise UserError(f"{where}.weights: '{path}' holds no state_dict (names and tensors)")
    return _without_prefixes(state, path, where)


def _without_prefixes(state: dict[str, Tensor], path: Path, where: str) -> dict[str, Tensor]:
    """The names as the model itself has them.

    torch.compile may wrap a part of a model, so its prefix goes wherever it stands.
    """
    while True:
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in state)), None)
        if prefix is None:
            break
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    plain: dict[str, Tensor] = {}
    for name, value in state.items():
        short = name.removeprefix("module.").replace("_orig_mod.", "")
        if short in plain:
            raise UserError(
                f"{where}.weights: '{path}' holds '{short}' twice, with and without a prefix; keep one of them"
            )
        plain[short] = value
    return plain


def _read(path: Path, where: str) -> object:
    refused = f"{where}.weights: cannot read '{path}'"
    try:
        with path.open("rb") as file:
            start = file.read(64)
        if not start:
            raise UserError(f"{refused}: the file is empty (0 bytes); fetch it again")
        if start.startswith(b"version ") and b"git-lfs" in start:
            raise UserError(f"{refused}: it is a pointer of Git LFS, not the file itself; run git lfs pull beside it")
        if path.suffix == ".safetensors":
            return load_file(path)
        if start.startswith(b"PK") and not zipfile.is_zipfile(path):
            raise UserError(
                f"{refused}: it is cut short, {path.stat().st_size} bytes of a torch archive; fetch it again"
            )
        if is_torchscript(path):
            tensors = module_tensors(_module(read_archive(path)), path)
            return {name: value for name, value in tensors.items() if name not in OPENAI_CONSTANTS}
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if zipfile.is_zipfile(path):
                return read_archive(path)
            named = re.search(r"GLOBAL (\S+)", str(error))
            if named is None:
                raise
            raise UserError(
                f"{refused}: it holds a Python object ({named[1]}), which is never run, in torch's old format; write"
                " the weights"
                " alone with torch.save(checkpoint['state_dict'], 'weights.pt')"
            ) from None
    except UserError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # every loader has its own family of errors for a file that is not its own
        if "Cannot allocate memory" in str(error):
            raise MemoryError(f"{path}: {' '.join(str(error).split())[:100]}") from None
        reason = f"{(str(error).splitlines() or [''])[0] or type(error).__name__}; fetch or write it again"
        if isinstance(error, pickle.UnpicklingError):
            reason = "it is damaged, or another program's pickle"  # torch itself advises to run its code
        raise UserError(f"{refused} as safetensors or a weights-only torch file: {reason}") from None


def _module(content: object) -> Inert:
    if not isinstance(content, Inert):
        raise ValueError("a TorchScript archive without a module")
    return content


def _foreign(content: object) -> str | None:
    """The class of the first object in `content` that stands for one of another library."""
    if isinstance(content, Inert):
        return content.origin
    if isinstance(content, dict):
        return next((value.origin for value in content.values() if isinstance(value, Inert)), None)
    return None
