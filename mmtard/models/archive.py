"""The tensors of a torch zip archive, read without running any code that it names.

Two kinds of file come here: TorchScript models (OpenAI's own `ViT-B-32.pt`), whose loader in torch executes the
archive's program, and checkpoints that keep other Python objects beside the weights (an argparse.Namespace, a NumPy
scalar), which torch's weights-only loader refuses. Every class or function that the pickle names, other than torch's
own for tensors, becomes an `Inert` object that keeps its state and does nothing.
"""

from __future__ import annotations

import ast
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
MAX_PROGRAM = 1 << 28  # bytes of a TorchScript program, unpacked
MAX_DEPTH = 64  # of modules inside modules


class Inert:
    """What stands in place of an object of a foreign class: `origin` is that class, `state` its attributes."""

    origin = "?"

    def __new__(cls, *_, **__):
        made = object.__new__(cls)
        made.state = {}
        return made

    def __init__(self, *_, **__):
        pass

    def __setstate__(self, state) -> None:
        self.state = state if isinstance(state, dict) else {}

    def __call__(self, *_, **__) -> Inert:
        return self

    def __setitem__(self, *_) -> None:
        pass

    def append(self, *_) -> None:
        """Drop what the pickle would put in."""
        pass

    extend = append


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive: a zip that holds a program beside its tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(re.fullmatch(r"[^/]+/(constants\.pkl|code/.+)", name) for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return False


def read_archive(path: Path) -> object:
    """What `torch.save` or `torch.jit.save` wrote, with an `Inert` object in place of every foreign one.

    Raises ValueError, OSError, pickle.UnpicklingError or zipfile.BadZipFile for a file that is damaged or of another
    kind.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        program = [m for m in members if "/code/" in m.filename]  # compressed, and only read as text
        tensors = [m for m in members if "/code/" not in m.filename]
        if sum(m.file_size for m in tensors) > path.stat().st_size or sum(m.file_size for m in program) > MAX_PROGRAM:
            raise ValueError("its members are larger than torch ever writes them")
        if any(m.compress_type != zipfile.ZIP_STORED for m in tensors):
            raise ValueError("its tensors are compressed, which torch never does")
        roots = [m.filename.removesuffix("data.pkl") for m in members if re.fullmatch(r"[^/]+/data\.pkl", m.filename)]
        if len(roots) != 1:
            raise ValueError("it is no archive of torch (no data.pkl)")
        if f"{roots[0]}byteorder" in archive.namelist() and archive.read(f"{roots[0]}byteorder") != b"little":
            raise ValueError("it was written on a big-endian machine")
        with archive.open(f"{roots[0]}data.pkl") as file:
            return _Unpickler(file, archive, roots[0]).load()


def module_tensors(root: Inert, path: Path) -> dict[str, Tensor]:
    """The parameters and buffers of a TorchScript module by name, as its state_dict has them."""
    with zipfile.ZipFile(path) as archive:
        declared = _declared(archive)
    tensors: dict[str, Tensor] = {}

    def walk(module: Inert, prefix: str, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise ValueError("its modules are nested without end")
        names = declared.get(module.origin)
        for name, value in module.state.items():
            if isinstance(value, Inert):
                walk(value, f"{prefix}{name}.", depth + 1)
            elif isinstance(value, Tensor) and (names is None or name in names):
                tensors[f"{prefix}{name}"] = value

    walk(root, "", 0)
    return tensors


def _declared(archive: zipfile.ZipFile) -> dict[str, set[str]]:
    """Class -> the names of its parameters and buffers, as the archive's program lists them.

    The program is read as text.
    """
    found: dict[str, set[str]] = {}
    for name in archive.namelist():
        match = re.fullmatch(r"[^/]+/code/(.+)\.py", name)
        if not match:
            continue
        module = match[1].replace("/", ".")
        for part in re.split(r"^class ", archive.read(name).decode(errors="replace"), flags=re.MULTILINE)[1:]:
            lists = re.findall(r"^  __(?:parameters|buffers)__ = (\[[^\]]*\])", part, flags=re.MULTILINE)
            origin = f"{module}.{re.split(r'[^A-Za-z0-9_]', part, maxsplit=1)[0]}"
            found[origin] = {word for text in lists for word in ast.literal_eval(text)}
    return found


class _Type:
    """A storage type or dtype that the pickle names."""

    def __init__(self, dtype: torch.dtype | None):
        self.dtype = dtype

    def __setstate__(self, state) -> None:
        raise pickle.UnpicklingError("a type of torch cannot be changed")


class _Rebuild:
    """What torch's own functions for tensors do, as an object without attributes that a pickle could change."""

    __slots__ = ("kind",)

    def __init__(self, kind: str):
        self.kind = kind

    def __setstate__(self, state) -> None:
        raise pickle.UnpicklingError("a function of torch cannot be changed")

    def __call__(self, *args):
        if self.kind == "parameter":
            return args[0]
        storage, offset, size, stride = args[:4]
        if not isinstance(storage, Tensor):
            raise pickle.UnpicklingError("a tensor without a storage")
        if self.kind == "untyped" and isinstance(args[6], _Type):
            storage = storage.view(args[6].dtype)
        return torch.as_strided(storage, size, stride, offset)


_FUNCTIONS = {
    "_rebuild_tensor": "tensor",
    "_rebuild_tensor_v2": "tensor",
    "_rebuild_tensor_v3": "untyped",
    "_rebuild_parameter": "parameter",
    "_rebuild_parameter_with_state": "parameter",
}


class _Unpickler(pickle.Unpickler):
    """Knows torch's tensors and `OrderedDict`; everything else becomes inert."""

    def __init__(self, file, archive: zipfile.ZipFile, root: str):
        super().__init__(file, encoding="utf-8")
        self.archive, self.root = archive, root
        self.storages: dict[tuple[str, torch.dtype], Tensor] = {}

    def find_class(self, module: str, name: str):
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name in _FUNCTIONS:
            return _Rebuild(_FUNCTIONS[name])
        if module in ("torch", "torch.storage") and name in DTYPES:
            return _Type(DTYPES[name])
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return _Type(torch.uint8)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return _Type(getattr(torch, name))
        return type(name, (Inert,), {"origin": f"{module}.{name}"})

    def persistent_load(self, pid):
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage" or not isinstance(pid[1], _Type):
            raise pickle.UnpicklingError("a reference to something other than a tensor's storage")
        _, kind, key, _, count = pid
        if (key, kind.dtype) not in self.storages:
            data = bytearray(self.archive.read(f"{self.root}data/{key}"))
            empty = torch.empty(0, dtype=kind.dtype)
            self.storages[key, kind.dtype] = torch.frombuffer(data, dtype=kind.dtype) if data else empty
        storage = self.storages[key, kind.dtype]
        if storage.numel() < count:
            raise pickle.UnpicklingError(f"the storage {key} is cut short")
        return storage
