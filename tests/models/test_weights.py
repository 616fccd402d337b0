import pickle
import random
from argparse import Namespace

import numpy as np
import pytest
import torch
from embeddings_of import embeddings, refused
from safetensors.torch import save_file

from mmtard.config import Model
from mmtard.errors import UserError
from mmtard.models import clip, loading, weights
from mmtard.models.weights import read_state_dict
from mmtard.runs import checkpoint_writer

SOURCES = {  # how the whole model is written
    "pt": lambda s, d: torch.save(s, d / "w.pt"),
    "wrapped pt of a parallel training": lambda s, d: torch.save(
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in s.items()}}, d / "w.pt"
    ),
    "safetensors": lambda s, d: save_file(s, d / "w.safetensors"),
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_file_of_the_whole_model_gives_its_embeddings(base, vit, tmp_path, source):
    SOURCES[source](dict(base.model.state_dict()), tmp_path)
    (path,) = tmp_path.iterdir()
    assert torch.equal(embeddings(loading.load_clip(Model(arch=vit, weights=str(path)), seed=9)), embeddings(base))


@pytest.mark.parametrize("prefix", ["", "visual.", "module."])
def test_an_image_tower_file_takes_its_text_from_another_source(base, vit, tmp_path, prefix):
    torch.save({f"{prefix}{k}": v for k, v in base.model.visual.state_dict().items()}, tmp_path / "tower.pt")
    whole = {k: v if not k.startswith("visual.") else v + 1 for k, v in base.model.state_dict().items()}
    torch.save(whole, tmp_path / "whole.pt")
    clip = loading.load_clip(Model(arch=vit, weights=str(tmp_path / "tower.pt"), text=str(tmp_path / "whole.pt")))
    assert torch.equal(embeddings(clip), embeddings(base))


SPOILED = {
    "missing": (lambda s: s.pop("visual.proj"), r"1 missing \(visual.proj\)"),
    "unexpected": (lambda s: s.update({"visual.head": torch.ones(1)}), r"1 unexpected \(visual.head\)"),
    "of another shape": (
        lambda s: s.update({"visual.proj": torch.ones(3, 4)}),
        r"1 of another shape \(visual.proj \(3, 4\) for \(32, 16\)\)",
    ),
}


@pytest.mark.parametrize("how", SPOILED)
def test_weights_that_do_not_fit_are_refused_with_the_key(base, vit, tmp_path, how):
    state = dict(base.model.state_dict())
    spoil, words = SPOILED[how]
    spoil(state)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UserError, match=f"^student.weights.*{words}; check `arch`$"):
        loading.load_clip(Model(arch=vit, weights=str(tmp_path / "w.pt")))


@pytest.mark.parametrize("how", SPOILED)
def test_an_exported_folder_that_does_not_fit_is_refused_with_the_key(base, tmp_path, how):
    state = dict(base.model.state_dict())
    SPOILED[how][0](state)
    base.save(tmp_path / "out")
    save_file(state, tmp_path / "out" / clip.WEIGHTS_FILE)
    with pytest.raises(UserError, match="^student.weights: cannot load .*(visual.proj|visual.head)"):
        loading.load_clip(Model(weights=str(tmp_path / "out")))


@pytest.mark.parametrize("how", SPOILED)
def test_an_image_tower_or_checkpoint_that_does_not_fit_is_refused_with_the_key(base, vit, tmp_path, how):
    state = dict(base.model.state_dict())
    SPOILED[how][0](state)
    tower = {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}
    torch.save(tower, tmp_path / "tower.pt")
    with pytest.raises(UserError, match=rf"^teachers.clean.weights.*1 {how} \((proj|head)"):
        loading.load_clip(Model(arch=vit, weights=str(tmp_path / "tower.pt"), text="random"), where="teachers.clean")
    base.save(tmp_path / "start")
    saver = checkpoint_writer.Checkpoints(tmp_path, keep_last=1)
    saver.save(1, {f"visual.{k}": v for k, v in tower.items()}, {}, {})
    saver.wait()
    with pytest.raises(UserError, match=rf"^checkpoint '.*step-1' does not fit.*1 {how} \(visual"):
        loading.load_clip(Model(weights=str(tmp_path)))


class Harmful:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


@pytest.mark.parametrize(
    "name, write, words",
    [
        ("w.pt", lambda p: torch.save({"a": Harmful()}, p), "cannot read '.*w.pt'"),
        ("w.pkl", lambda p: p.write_bytes(pickle.dumps({"a": Harmful()}, protocol=2)), "cannot read '.*w.pkl'"),
        (
            "w.bin",
            lambda p: p.write_bytes(pickle.dumps({"a": Harmful()})),
            "w.bin' .*damaged, or another program's pickle$",
        ),
        ("w.safetensors", lambda p: p.write_bytes(b"no tensors here"), "cannot read '.*w.safetensors'"),
        ("w.pt", lambda p: torch.save({"step": 3}, p), "holds no state_dict"),
        ("w.pt", lambda p: torch.save(torch.ones(3), p), "holds no state_dict"),
    ],
)
def test_a_file_that_is_no_state_dict_is_refused_without_running_it(vit, tmp_path, name, write, words):
    write(tmp_path / name)
    with pytest.raises(UserError, match=f"^student.weights: .*{words}") as error:
        loading.load_clip(Model(arch=vit, weights=str(tmp_path / name)))
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- files as people have them


def write_torchscript(state, path):
    """A TorchScript module with these tensors, another that is no weight, and an integer, as OpenAI's archives have."""

    class Leaf(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = 3
            self.constant = torch.ones(2)  # an attribute, no parameter

        def forward(self, x):
            return x * self.factor + self.constant.sum()

    root = Leaf()
    for name, value in state.items():
        *modules, last = name.split(".")
        at = root
        for part in modules:
            if not hasattr(at, part):
                at.add_module(part, Leaf())
            at = getattr(at, part)
        if value.is_floating_point():
            at.register_parameter(last, torch.nn.Parameter(value.clone()))
        else:
            at.register_buffer(last, value.clone())
    root.register_buffer("context_length", torch.tensor(77))
    root.register_buffer("attn_mask", torch.full((2, 2), -float("inf")).triu_(1))
    torch.jit.save(torch.jit.script(root), path)


def with_prefix(prefix, state):
    return {prefix + name: value for name, value in state.items()}


FILES = {
    "compiled": lambda s, p: torch.save(with_prefix("_orig_mod.", s), p),
    "compiled, then parallel": lambda s, p: torch.save({"state_dict": with_prefix("module._orig_mod.", s)}, p),
    "Lightning, compiled": lambda s, p: torch.save({"state_dict": with_prefix("model._orig_mod.", s), "epoch": 1}, p),
    "only the tower compiled": lambda s, p: torch.save(
        {name.replace("visual.", "visual._orig_mod."): value for name, value in s.items()}, p
    ),
    "an integer among the tensors": lambda s, p: torch.save({**s, "epoch": 5}, p),
    "a Namespace beside them": lambda s, p: torch.save({"args": Namespace(lr=1), "state_dict": s}, p),
    "a NumPy scalar beside them": lambda s, p: torch.save({"best": np.float64(3), "state_dict": s}, p),
    "a harmful object beside them": lambda s, p: torch.save({"args": Harmful(), "state_dict": s}, p),
    "DeepSpeed's": lambda s, p: torch.save({"module": s, "ds_config": {}}, p),
    "half precision": lambda s, p: torch.save({k: v.double() for k, v in s.items()}, p),
    "TorchScript": write_torchscript,
}


@pytest.mark.parametrize("kind", FILES)
def test_weights_are_found_in_files_as_people_have_them(base, vit, tmp_path, kind):
    path = tmp_path / "w.pt"
    FILES[kind](dict(base.model.state_dict()), path)
    loaded = loading.load_clip(Model(arch=vit, weights=str(path)), seed=9)
    assert all(torch.equal(value, base.model.state_dict()[name]) for name, value in loaded.model.state_dict().items())


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "the file is empty (0 bytes); fetch it again"),
        (b"version https://git-lfs\noid sha256:abc\nsize 123\n", "it is a pointer of Git LFS"),
        (b"PK\x03\x04 and then nothing more", "it is cut short, 26 bytes"),
    ],
)
def test_a_file_that_did_not_arrive_says_so(vit, tmp_path, content, words):
    (tmp_path / "w.pt").write_bytes(content)
    refused(f"cannot read|{words}", arch=vit, weights=str(tmp_path / "w.pt"))


def test_a_foreign_object_in_torchs_old_format_is_named_with_the_way_to_extract_the_weights(base, vit, tmp_path):
    content = {"args": Namespace(lr=1), "state_dict": dict(base.model.state_dict())}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    refused("(argparse.Namespace)|torch.save(checkpoint['state_dict']", arch=vit, weights=str(tmp_path / "w.pt"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_with_the_tensors_name(base, vit, tmp_path, value):
    state = {k: v.clone() for k, v in base.model.state_dict().items()}
    state["visual.proj"][0, 0] = value
    torch.save(state, tmp_path / "w.pt")
    words = "is not finite: 'visual.proj' holds NaN or infinity in 1 of its 512 numbers"
    refused(words, arch=vit, weights=str(tmp_path / "w.pt"))
    base.save(tmp_path / "out")
    save_file(state, tmp_path / "out" / clip.WEIGHTS_FILE)
    refused(words, weights=str(tmp_path / "out"))


def test_the_same_weight_with_and_without_a_prefix_is_refused(base, vit, tmp_path):
    state = dict(base.model.state_dict())
    torch.save({**state, "module.visual.proj": state["visual.proj"] + 1}, tmp_path / "w.pt")
    refused("holds 'visual.proj' twice", arch=vit, weights=str(tmp_path / "w.pt"))


@pytest.mark.parametrize("kind", ["w.safetensors", "zip.pt", "namespace.pt", "jit.pt", "old.pt"])
def test_a_damaged_file_is_one_line(tmp_path, kind):
    """100 mutations of each kind of file: read, or refused in one line, and nothing else."""
    state = {"visual.a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.float16)}
    path, dice = tmp_path / kind, random.Random(1)
    {
        "w.safetensors": lambda: save_file(state, path),
        "zip.pt": lambda: torch.save(state, path),
        "namespace.pt": lambda: torch.save({"args": Namespace(lr=1), "state_dict": state}, path),
        "jit.pt": lambda: write_torchscript(state, path),
        "old.pt": lambda: torch.save(state, path, _use_new_zipfile_serialization=False),
    }[kind]()
    original, refusals = path.read_bytes(), 0
    for _ in range(100):
        content = bytearray(original)
        for _ in range(dice.choice((1, 3, 20))):
            content[dice.randrange(len(content))] = dice.randrange(256)
        if dice.random() < 0.3:
            del content[dice.randrange(len(content)) :]
        path.write_bytes(content)
        try:
            read_state_dict(path, "student")
        except UserError as error:
            assert "\n" not in str(error), error
            refusals += 1
    assert refusals >= 30


def test_too_little_memory_is_not_taken_for_a_damaged_file(tmp_path, monkeypatch):
    save_file({"visual.proj": torch.zeros(2)}, path := tmp_path / "w.safetensors")

    def load(path):
        raise RuntimeError("unable to mmap 8098700 bytes from file: Cannot allocate memory (12)")

    monkeypatch.setattr(weights, "load_file", load)
    with pytest.raises(MemoryError, match="w.safetensors"):
        read_state_dict(path, "student")
