"""What would fail or crawl on a GPU, without one: no operation mixes devices, neither the attack nor the loss waits.

Tensors of the CPU pretend to lie on a GPU (`pretended_gpu`). What an evaluation waits for is nothing beside a model in
float32; there, mixed devices alone are looked for.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from pretended_gpu import CUDA, DevicesMixed, pretended_gpu

from mmtard.attacks import checks, ensemble
from mmtard.attacks.batching import AdaptiveBatchSize
from mmtard.attacks.state import AttackSettings
from mmtard.config import METHODS, WEIGHTINGS, Model, validate
from mmtard.data.samples import Batch
from mmtard.distillation.added_terms import learned_parts
from mmtard.distillation.task import DistillationTask
from mmtard.distributed.interruption import Interruption
from mmtard.evaluation import retrieval
from mmtard.evaluation.recall import Captions
from mmtard.models import batch_norm, loading, lora, student
from mmtard.models.image_tower import ImageTower
from mmtard.models.teachers import FrozenTeacher
from mmtard.runs.metrics import SilentLogger
from mmtard.training.class_targets import CaptionTargets, heads_without_classes, zero_shot_heads
from mmtard.training.engine import Engine
from mmtard.training.overfitting_alarm import OverfittingAlarm
from mmtard.zero_shot import ZeroShotHead

B, CLASSES, PIXELS = 4, 5, 16


@pytest.fixture
def gpu():
    with pretended_gpu() as gpu:
        yield gpu


# The control: what the pretence has to catch.


def test_what_cuda_refuses_is_refused(gpu):
    here, there = torch.rand(3, 4), torch.rand(3, 4).to(gpu.device)
    assert there.device == CUDA and there.is_cuda and there[1:].T.device == CUDA and here.device.type == "cpu"
    for mixed in (
        lambda: there + here,
        lambda: torch.where(there > 0, there, here),
        lambda: torch.cat([there, here]),
        lambda: F.linear(there, here),
        lambda: here[torch.zeros(2, dtype=torch.int64, device=gpu.device)],
        lambda: F.cross_entropy(there, torch.zeros(3, dtype=torch.int64)),
        lambda: there.add_(torch.ones(4)),
    ):
        with pytest.raises(DevicesMixed):
            mixed()
    with pytest.raises(TypeError):
        there.numpy()
    assert (there * 2 + torch.tensor(1.0)).device == CUDA  # a number of the CPU goes along


def test_a_module_that_keeps_a_table_on_the_cpu_is_caught(gpu):
    class Forgotten(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.mean = torch.nn.Parameter(torch.rand(4)), torch.zeros(4)  # not a buffer: stays behind

        def forward(self, x):
            return (x - self.mean) * self.weight

    with pytest.raises(DevicesMixed, match=r"sub.* of \(2, 4\) on cuda:0, \(4,\) on cpu"):
        Forgotten().to(gpu.device)(torch.rand(2, 4).to(gpu.device))


def test_a_mix_within_a_backward_is_caught(gpu):
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, dy):
            return dy * torch.full(dy.shape, 2.0)

    x = torch.rand(3, device=gpu.device, requires_grad=True)
    with pytest.raises(DevicesMixed):
        Scaled.apply(x).sum().backward()


def test_what_the_host_waits_for_is_counted_and_nothing_else(gpu):
    x, labels = torch.rand(B, 3).to(gpu.device, non_blocking=True), torch.arange(B).to(gpu.device, non_blocking=True)
    loss = F.cross_entropy(x.requires_grad_(), labels % 3, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    (x.detach() + gradient.sign() * 0.1).clamp(0, 1).view(-1)[::2].to(torch.float64)
    torch.full((2,), 1.0, device=gpu.device)
    assert not gpu.waits
    for waiting in (
        lambda: loss.sum().item(),
        lambda: bool((loss > 0).all()),
        lambda: float(loss[0].detach()),
        lambda: loss.tolist(),
        lambda: loss.cpu(),
        lambda: loss[loss > 0],
        lambda: (loss > 0).nonzero(),
        lambda: x[torch.tensor([0, 1])],
        lambda: torch.tensor([1.0, 2.0], device=gpu.device),
        lambda: loss.new_tensor([1.0]),
        lambda: torch.rand(3).to(gpu.device),
    ):
        gpu.waits.clear()
        waiting()
        assert gpu.waits.total() == 1, gpu.waits


def test_a_resnets_images_are_laid_out_as_tensor_cores_convolve_them(gpu, resnet):
    tower = loading.load_clip(Model(arch=resnet, weights="random")).tower().eval().to(gpu.device)
    seen = []
    tower.visual.conv1.register_forward_hook(lambda _, given, result: seen.append((given[0], result)))
    tower(torch.rand(2, 3, 32, 32).to(gpu.device, non_blocking=True))
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen[0])


# The training step.


class Undistributed:
    """What the engine asks of DeepSpeed's engine, without DeepSpeed, which takes no pretended device."""

    def __init__(self, module):
        self.module, self.train = module, module.train

    def __call__(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def vit(seed, pixels=PIXELS, embedding=8):
    torch.manual_seed(seed)
    visual = VisionTransformer(
        image_size=pixels, patch_size=8, width=16, layers=2, heads=2, mlp_ratio=2, output_dim=embedding
    )
    return ImageTower(visual, (0.5,) * 3, (0.25,) * 3)


def an_engine(config, tower, ranks):
    """The engine around a tower that DeepSpeed was not asked to partition."""
    engine = Engine.__new__(Engine)
    tower.autocast = torch.bfloat16
    engine.ds, engine.ranks, engine.stage = Undistributed(tower.to(ranks.device)), ranks, 0
    engine.checkpoint_attack, engine._copy_is_old = config.engine.checkpoint_attack, True
    engine.attack_copy = engine._attack_copy(config, tower)
    if engine.attack_copy:
        engine.attack_copy.follow(tower, whole=True)
    return engine


def a_head(embedding=8):
    return ZeroShotHead(F.normalize(torch.randn(CLASSES, embedding), dim=-1).to(CUDA, non_blocking=True), 20.0)


def settings(method, attack=None, **sections):
    needs = set(METHODS[method["name"]](**method).teachers) - {"start"}
    needs |= {"kl_adaptive": {"robust"}, "kl_robust": {"robust"}, "kl_fused": {"clean", "robust"}}.get(
        (attack or {}).get("objective"), set()
    )
    return validate(
        {
            "run_dir": "unused",
            "student": {"weights": "random"},
            "teachers": {name: {"weights": "random"} for name in needs},
            "method": method,
            "attack": {"steps": 2, **(attack or {})},
            "data": {"shards": "unused", "lanes": B, "targets": "labels"},
            "train": {"steps": 1, "batch_size": B},
            **sections,
        }
    )


def a_batch():
    return Batch(
        torch.randint(0, 255, (B, 3, PIXELS, PIXELS), dtype=torch.uint8),
        torch.arange(B) % CLASSES,
        torch.arange(B),
        torch.arange(B) + 100,
        [f"a photo of {i}" for i in range(B)],
    )


def a_task(config, ranks, tower=None, teacher_pixels=PIXELS):
    ranks = replace(ranks, device=CUDA)
    engine = an_engine(config, vit(0) if tower is None else tower, ranks)
    teachers = {
        name: FrozenTeacher(name, teacher, vit(seed, teacher_pixels), a_head(), ranks, torch.bfloat16)
        for seed, (name, teacher) in enumerate(config.ensemble.items(), 1)
    }
    learned = learned_parts(config, dict.fromkeys(("student", *teachers), 8), device=CUDA, samples=B)
    return DistillationTask(config, engine, a_head(), teachers, learned)


def assert_a_step_waits_for_nothing(gpu, task, batch=None, stored=None):
    """Attack, loss and backward of two steps; the first looks at the teachers' embeddings once, which waits."""
    batch = (batch or a_batch()).to(CUDA)
    for _ in range(2):
        gpu.waits.clear()
        task.student._copy_is_old = True  # as after an update
        loss, terms = task(batch.pixels(CUDA), batch.labels, batch.seeds, stored or {}, batch.sample_ids)
        loss.mean().backward()
    assert not gpu.waits
    assert all(term.device == CUDA for term in (loss, *terms.values()))
    trained = [p for p in task.student.ds.module.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and p.grad.device == CUDA for p in trained if p.grad is not None)
    assert any(p.grad is not None for p in trained)


@pytest.mark.parametrize(
    "method",
    [
        *({"name": name} for name in METHODS if name != "mmtard"),
        *({"name": "mmtard", "weighting": name, "cross_modal_weight": 1.0} for name in WEIGHTINGS),
        *({"name": "mmtard", "trust": trust} for trust in ("label", "clean", "uncertainty")),
    ],
    ids=lambda method: "-".join(str(method[key]) for key in ("name", "weighting", "trust") if key in method),
)
def test_no_training_objective_mixes_devices_or_waits(gpu, ranks, method):
    assert_a_step_waits_for_nothing(gpu, a_task(settings(method), ranks))


@pytest.mark.parametrize(
    "attack",
    [
        {"algorithm": "apgd"},
        {"algorithm": "nfgsm", "steps": 1},
        {"norm": "l2", "eps": 1.0, "step_size": 0.5},
        {"algorithm": "apgd", "norm": "l2", "eps": 1.0, "restarts": 2},
        {"restarts": 2},
        {"momentum": 0.9},
        {"random_start": False},
        *({"objective": name} for name in ("ce", "ce_targeted", "kl_robust", "kl_fused", "kl_self", "kl_adaptive")),
        {"objective": "l2_embedding"},
    ],
    ids=lambda attack: "-".join(map(str, attack.values())),
)
def test_no_attack_of_the_training_mixes_devices_or_waits(gpu, ranks, attack):
    assert_a_step_waits_for_nothing(gpu, a_task(settings({"name": "mmtard"}, attack), ranks))


@pytest.mark.parametrize(
    "terms",
    [
        {"anchor": {"teacher": "clean", "projection": True}},
        {"feature": {"teacher": "robust", "teacher_view": "adv"}},
        {"feature": {"teacher": "robust", "of": "tokens", "projection": True}},
        {"bound": {}},
        {"bound": {"multipliers": "sample"}},
    ],
    ids=lambda terms: "-".join(terms),
)
def test_no_added_term_mixes_devices_or_waits(gpu, ranks, terms):
    task = a_task(settings({"name": "mmtard"}, terms=terms), ranks, teacher_pixels=24)
    assert_a_step_waits_for_nothing(gpu, task)
    task.learned.update(4, True, 1.0, lambda tensor: None, 1)  # LORE's multipliers move with every fifth
    assert not gpu.waits


def test_a_teacher_of_another_size_is_resized_to_on_the_gpu(gpu, ranks):
    assert_a_step_waits_for_nothing(gpu, a_task(settings({"name": "adaad"}), ranks, teacher_pixels=24))


@pytest.mark.parametrize("engine", [{"checkpoint_attack": True}, {"checkpoint_attack": False}, {"attack_copy": False}])
def test_activations_that_are_computed_again_lie_on_the_gpu(gpu, ranks, engine):
    tower = vit(0)
    student.checkpoint_activations(tower)
    assert_a_step_waits_for_nothing(gpu, a_task(settings({"name": "trades"}, engine=engine), ranks, tower))


@pytest.fixture(scope="module")
def peft():
    """Imported before anything is pretended."""
    return pytest.importorskip("peft.tuners.lora")


def test_adapters_and_their_dropout_lie_on_the_gpu(peft, gpu, ranks):
    config = settings({"name": "tecoa"}, student={"weights": "random", "lora": {"r": 2, "dropout": 0.5}})
    tower = vit(0)
    lora.attach(tower.visual, config.student.lora, tower.layout)
    assert_a_step_waits_for_nothing(gpu, a_task(config, ranks, tower))


def test_stored_embeddings_come_with_the_batch(gpu, ranks):
    config = settings({"name": "mmtard"})
    batch = replace(a_batch(), teacher_embeddings={"clean": torch.rand(B, 8)})
    assert_a_step_waits_for_nothing(gpu, a_task(config, ranks), batch, batch.to(CUDA).teacher_embeddings)


def test_synced_batch_norm_lies_on_the_gpu_and_waits_for_nothing(gpu, ranks, resnet):
    tower = loading.load_clip(Model(arch=resnet, weights="random")).tower()
    batch_norm.synchronise(tower.visual, tower.layout)
    tower.frozen_batch_norm = False
    engine = an_engine(settings({"name": "clean"}), tower, replace(ranks, device=CUDA))
    images, seeds = torch.rand(2 * B, 3, 32, 32).to(CUDA), torch.arange(B).to(CUDA)
    gpu.waits.clear()
    engine(images, seeds).square().mean().backward()
    batch_norm.update_running(tower)
    assert not gpu.waits and tower.visual.bn1.running_mean.device == CUDA


def test_captions_become_classes_on_the_gpu(gpu, ranks, vit):
    clips = {"student": loading.load_clip(Model(arch=vit, weights="random"))}
    targets = CaptionTargets(clips, replace(ranks, device=CUDA))
    (batch,) = (batch.to(CUDA) for batch in targets([a_batch()]))
    logits = targets.heads["student"](torch.rand(B, 16).to(CUDA)).logits
    assert logits.device == CUDA and F.cross_entropy(logits, batch.labels).isfinite()


def test_embeddings_without_classes_need_no_head_on_the_gpu(gpu, ranks, vit):
    clips = {"student": loading.load_clip(Model(arch=vit, weights="random"))}
    heads = heads_without_classes(clips, replace(ranks, device=CUDA))
    assert heads["student"](torch.rand(B, 16).to(CUDA)).logits.shape == (B, 0)


def test_stored_class_embeddings_reach_the_gpu(gpu, ranks, vit, tmp_path):
    clips = {"student": loading.load_clip(Model(arch=vit, weights="random"))}
    for _ in ("made", "read again"):
        heads = zero_shot_heads(tmp_path, clips, ["cat", "dog"], ["a {}"], replace(ranks, device=CUDA))
        assert heads["student"](torch.rand(B, 16).to(CUDA)).logits.device == CUDA


def test_the_alarm_compares_its_attacks_on_the_gpu(gpu, ranks):
    config = settings({"name": "tecoa"}, {"steps": 1, "alarm_every": 1})
    task = a_task(config, ranks)
    alarm = OverfittingAlarm(config, task, replace(ranks, device=CUDA), B, SilentLogger())
    assert alarm.after_step(1, a_batch()) is None


# Evaluation.


def a_classifier(seed=0):
    """A frozen tower and its head: images on the GPU -> logits."""
    tower, head = vit(seed).eval().requires_grad_(False).to(CUDA), a_head()
    return lambda images: head(tower(images)).logits


@pytest.fixture
def victims(gpu):
    """(images, labels as the model sees them, seeds), on the GPU."""
    model = a_classifier()
    images = torch.rand(B, 3, PIXELS, PIXELS).to(CUDA)
    return model, images, model(images).argmax(1), torch.arange(B).to(CUDA)


@pytest.mark.parametrize(
    "norm, attacks",
    [
        ("linf", ["pgd", "apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square", "transfer"]),
        ("l2", ["pgd", "apgd-ce", "apgd-dlr", "apgd-t", "transfer"]),
    ],
)
def test_no_evaluation_attack_mixes_devices(victims, norm, attacks):
    model, images, labels, seeds = victims
    eps = 2 / 255 if norm == "linf" else 0.1
    for attack in attacks:  # each on all samples
        found = ensemble.run_attacks(
            model, images, labels, seeds, [attack], AttackSettings(eps, norm, iters=3, queries=5), a_classifier(1)
        )
        assert found.adv.device == CUDA and found.robust.device == CUDA and found.facts.attacked == B


def test_the_library_that_attacks_are_checked_against_takes_the_gpu(victims):
    pytest.importorskip("pyautoattack")
    model, images, labels, seeds = victims
    found = ensemble.run_attacks(model, images, labels, seeds, ["autoattack"], AttackSettings(1e-4, iters=2, queries=2))
    assert found.adv.device == CUDA


@pytest.mark.slow
def test_the_checks_of_a_models_attacks_mix_no_devices(victims):
    model, images, labels, seeds = victims
    batches = AdaptiveBatchSize(B, lambda line: None)
    lines = checks.sanity(model, images, labels, seeds, AttackSettings(2 / 255, iters=1), None, batches)
    assert len(lines) > 3


def test_attacked_images_are_taken_from_their_captions_on_the_gpu(gpu):
    tower = vit(0).eval().requires_grad_(False).to(CUDA)
    work = SimpleNamespace(interruption=Interruption(), in_batches=AdaptiveBatchSize(B, lambda line: None))
    task = SimpleNamespace(work=work, logit_scale=20.0, embed=lambda x: F.normalize(tower(x), dim=-1))
    captions = Captions([f"caption {i}" for i in range(B)], torch.arange(B))
    sample = retrieval.Sample(np.arange(B), captions, F.normalize(torch.rand(B, 8), dim=-1))
    batch = a_batch()
    found = retrieval._attack_chunk(
        task, sample, AttackSettings(2 / 255, iters=2), batch.pixels(CUDA), batch, list(range(B))
    )
    assert found["embeddings"]["shape"] == [B, 8] and found["facts"]["not_finite"] == 0
