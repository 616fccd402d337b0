"""`mmtard config --memory`: parameters to the last one, activations as autograd keeps them, states by ZeRO's
arithmetic.
"""

import json
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmtard.cli.main import main
from mmtard.config import Model, validate
from mmtard.errors import UserError
from mmtard.models import loading, student
from mmtard.training import memory

ROOT = Path(__file__).parents[2]


class Alive(TorchDispatchMode):
    """Counts the most bytes that storages made inside hold at once."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.seen = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in known | self.seen:
                    self.seen.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return out

    def _gone(self, address, size):
        self.seen.discard(address)
        self.now -= size


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A ViT of six narrow blocks for student and teacher, where no number of a published model matters."""
    path = tmp_path_factory.mktemp("arch") / "tests-memory-vit.json"
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 6, "head_width": 16}
    text = {"context_length": 10, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    model = {"arch": str(path), "weights": "random"}
    return {"student": model, "teachers": {"robust": {**model, "placement": "sharded"}}}


def run(**changes):
    return validate(
        {
            "run_dir": "r",
            "student": {"arch": "ViT-B-32", "weights": "openai"},
            "teachers": {"robust": {"arch": "ViT-B-32", "weights": "openai", "placement": "sharded"}},
            "method": {"name": "ard"},
            "data": {"shards": "s", "lanes": 4},
            "train": {"steps": 1, "batch_size": 16},
            **changes,
        }
    )


@pytest.mark.parametrize(
    "arch, parameters", [("ViT-B-32", 87849216), ("RN50", 38316896), ("RN101", 56259936), ("ViT-L-14", 303966208)]
)
def test_parameters_of_the_published_towers(arch, parameters):
    """As CLIP's models have them."""
    tower = loading.load_skeleton(Model(arch=arch, weights="openai"), "student").tower()
    assert sum(p.numel() for p in tower.parameters()) == parameters and next(tower.parameters()).is_meta
    assert ("QuickGELU" in str(tower)) == arch.startswith("ViT")


@pytest.mark.parametrize("arch, size", [("vit", 16), ("resnet", 32)])
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_those_that_autograd_keeps_on_real_images(request, arch, size, precision, checkpointing):
    spec = Model(arch=request.getfixturevalue(arch), weights="random")
    found = []
    for tower in (loading.load_skeleton(spec, "student").tower(), loading.load_clip(spec).tower()):
        tower.autocast = precision
        if checkpointing:
            student.checkpoint_activations(tower)
        found.append(tower.train())
    image, copies, _ = memory.per_image(found[0])
    assert memory.Saved(found[1], torch.rand(5, 3, size, size)).total == pytest.approx(copies + 5 * image, rel=0.02)
    assert image > 0 and (copies > 0) == (precision is not None)


def test_what_autograd_keeps_of_a_layer_is_its_input(vit):
    tower = loading.load_clip(Model(arch=vit, weights="random")).tower()
    tower.visual = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 7))
    assert memory.Saved(tower, torch.rand(5, 3, 16, 16)).total == 5 * 3 * 16 * 16 * 4


def test_states_are_divided_as_zero_divides_them():
    p, world = 87849216, 4
    rows = memory.of_run(run(train={"steps": 1, "batch_size": 16, "ema": 0.999}), world)
    assert rows["weights"] == [4 * p, 4 * p, 4 * p, p]
    assert rows["gradients"] == [4 * p, 4 * p, p, p]
    assert rows["moments of AdamW"] == [8 * p, 2 * p, 2 * p, 2 * p]
    assert rows["average of the weights"] == [4 * p, p, p, p]
    assert rows["teacher robust, sharded"] == [2 * p / world] * 4
    # The patch embedding's is not kept: no gradient goes to the images.
    assert rows["weights in bf16"][0] == pytest.approx(2 * (p - 768 * 3 * 32 * 32), rel=0.02)
    # ard asks the student for one view; the attack keeps less of it, since its copy's weights ask for no gradient
    assert 0 < rows[memory.ATTACK][0] < rows[memory.TRAINING][0]
    assert rows["gradients under way"] == [0, *[2 * 4 * 25_000_000] * 3]
    parts = [rows[name][0] for name in memory.ONE_AT_A_TIME]
    assert memory.total(rows, 0) == sum(row[0] for row in rows.values()) - sum(parts) + max(parts)
    bf16, spread = rows[memory.COPY][0], rows[memory.COPY][3]
    assert rows[memory.COPY][:3] == [bf16] * 3 and bf16 == pytest.approx(2 * p, rel=0.01)
    assert spread - bf16 == 4 * (p - bf16 / 2)  # beside weights that ZeRO-3 spreads, norms are copied, too


def bytes_of_a_start() -> int:
    from mmtard.seeding import sample_uniform

    drawn = Alive()
    with drawn:
        sample_uniform(torch.arange(64), (3, 32, 32))
    return drawn.most


def test_the_random_start_holds_what_is_counted_for_it_and_the_update_nothing():
    """Counted where torch makes tensors: what is alive at once beside what was there before. In a process of its own:
    after other tests two of its tensors can live longer than they are used.
    """
    code = f"import {__name__} as tests; print(tests.bytes_of_a_start())"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    most = int(
        subprocess.run([sys.executable, "-c", code], env=env, check=True, stdout=subprocess.PIPE).stdout.split()[-1]
    )
    assert most == pytest.approx(memory.DRAWS * 8 * 64 * 3 * 32 * 32, rel=0.05)
    weights = [torch.nn.Parameter(torch.rand(1000)) for _ in range(8)]
    adam = torch.optim.AdamW(weights, fused=True)
    for weight in weights:
        weight.grad = torch.rand(1000)
    adam.step()
    updated = Alive()
    with updated:
        adam.step()
    assert updated.most < 4 * 1000  # foreach would hold the square roots of all second moments


def test_an_attack_on_the_trained_tower_itself_keeps_what_a_training_forward_keeps():
    rows = memory.of_run(run(engine={"attack_copy": False}), 4)
    assert rows[memory.ATTACK] == rows[memory.TRAINING] and memory.COPY not in rows


@pytest.mark.slow
def test_checkpointing_reaches_the_attack_where_it_is_asked_to(small):
    kept = {
        attack: memory.of_run(run(**small, engine={"checkpoint_activations": True, "checkpoint_attack": attack}), 4)
        for attack in (False, True)
    }
    assert kept[True][memory.ATTACK][0] < kept[False][memory.ATTACK][0] / 2
    assert kept[True][memory.TRAINING] == kept[False][memory.TRAINING]


def test_captions_keep_every_models_text_tower():
    with_captions = memory.of_run(run(data={"shards": "s", "lanes": 4, "targets": "captions"}), 1)
    text = 151277313 - 87849216  # a whole ViT-B/32 CLIP has so many parameters
    assert with_captions["text towers"] == [2 * 4 * text] * 4 and "text towers" not in memory.of_run(run(), 1)


@pytest.mark.slow
def test_a_checkpointed_timm_tower_computes_one_of_its_blocks_again():
    spec = {"arch": "ViT-B-16-SigLIP", "weights": "random"}
    config = run(student=spec, method={"name": "tecoa"}, teachers={}, engine={"checkpoint_activations": True})
    image, _, block = memory.per_image(memory.trained_tower(config, False))
    kept = memory.per_image(memory.trained_tower(config, True))[0]
    assert block == pytest.approx(image / 12, rel=0.1)
    assert memory.of_run(config, 1)[memory.TRAINING][0] == 16 * (kept + block) < 0.3 * 16 * image


@pytest.mark.slow
def test_adapters_and_checkpointing_take_less():
    whole, adapters, less = (
        memory.of_run(run(**changes), 1)
        for changes in (
            {},
            {"student": {"arch": "ViT-B-32", "weights": "openai", "lora": {}}},
            {"engine": {"checkpoint_activations": True}},
        )
    )
    trained = 12 * 16 * (768 + 3 * 768 + 768 + 768)  # r x (in + out) of qkv and of the output projection, in 12 blocks
    assert adapters["gradients"][0] == 4 * trained and adapters["weights"][0] == 4 * (87849216 + trained)
    assert less[memory.TRAINING][0] < 0.3 * whole[memory.TRAINING][0]


def test_a_start_with_weights_of_its_own_is_counted_by_its_own_architecture():
    other = {"start": {"arch": "ViT-L-14", "weights": "openai"}}
    fare = memory.of_run(run(method={"name": "fare"}, teachers=other), 1)
    assert fare["teacher start, replicated"] == [2 * 303966208] * 4


@pytest.mark.slow
def test_the_start_is_held_too_and_an_attack_through_a_teacher_keeps_its_activations(small):
    fare = memory.of_run(run(method={"name": "fare"}, teachers={}), 2)
    assert fare["teacher start, replicated"] == [2 * 87849216] * 4
    through, beside = (memory.of_run(run(**small, method={"name": name}), 1) for name in ("adaad", "ard"))
    # The student's trained copy keeps float32 beside bf16; a frozen teacher in bf16 keeps about what a student of its
    # kind does.
    assert beside[memory.ATTACK][0] < through[memory.ATTACK][0] < 2.1 * beside[memory.ATTACK][0]
    assert through[memory.TRAINING] == beside[memory.TRAINING]
    stored = run(**small | {"teachers": {"robust": {**small["student"], "stored": True}}})
    assert not any(name.startswith("teacher") for name in memory.of_run(stored, 1))


def test_a_model_that_is_not_here_needs_its_architecture():
    with pytest.raises(UserError, match="teachers.robust: 'runs/later' is not here .* give teachers.robust.arch="):
        memory.of_run(run(teachers={"robust": {"weights": "runs/later"}}), 1)


def test_the_command_prints_the_table(tree, write, capsys):
    assert main(["config", "--memory", "--world", "4", str(write(tree))]) == 0
    out = capsys.readouterr().out
    assert (
        "GiB a GPU, 4 of them, 2 images each at once" in out
        and "ZeRO 2 *" in out
        and "teacher clean, replicated" in out
    )


@pytest.mark.slow
def test_what_to_lower_is_said_with_what_it_saves(small):
    """Half of the images at once take half of the activations."""
    config = run(**small, train={"steps": 1, "batch_size": 64, "micro_batch_size": 32})
    words = memory.what_to_lower(config, 2)
    saved = {key: float(gib) for key, gib in re.findall(r"(\S+=\S+) \(([\d.e-]+) GiB less\)", words)}
    rows, smaller = (
        memory.of_run(config, 2),
        memory.of_run(run(**small, train={"steps": 1, "batch_size": 64, "micro_batch_size": 16}), 2),
    )
    assert saved["train.micro_batch_size=16"] == pytest.approx(
        (memory.total(rows, 2) - memory.total(smaller, 2)) / 2**30, rel=0.05
    )
    assert "engine.checkpoint_activations=true" in saved
    assert list(saved.values()) == sorted(saved.values(), reverse=True), "most first"


HEADER = re.compile(r"mmtard config (\S+) --memory --world (\d+)((?: \w+(?:\.\w+)+=[\w./-]+)*)")


@pytest.mark.slow
def test_the_memory_that_configurations_name_is_what_their_own_commands_print(capsys, monkeypatch):
    """In the header of each: `2.5 GiB`, with the command behind it."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "160")
    checked = 0
    some = [Path("configs", *name.split("/")) for name in ("baselines/adaad.yaml", "teachers/clean_vitl14.yaml")]
    for file in (*sorted(Path("configs").glob("*.yaml")), *some):
        text = " ".join(line[1:].strip() for line in file.read_text().splitlines() if line.startswith("#"))
        command = HEADER.search(text)
        if command is None:
            continue
        config, world, more = command.groups()
        assert Path(config.rstrip(".")) == file
        assert main(["config", str(file), "--memory", "--world", world, *(w.rstrip(".") for w in more.split())]) == 0
        printed = capsys.readouterr().out.splitlines()
        head, total = (next(line for line in printed if word in line) for word in ("ZeRO 2 *", "total"))
        column = [cell.strip() for cell in re.split("[┃│]", head)].index("ZeRO 2 *")
        found = float(re.split("[┃│]", total)[column])
        assert re.search(r"([\d.]+) GiB", text)[1] == f"{found:.1f}", file
        checked += 1
    assert checked > 6
