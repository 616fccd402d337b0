"""`mmtard bench train`, and the published step beside which it measures: the same numbers, otherwise computed."""

import json
from contextlib import contextmanager

import pytest
import torch

from mmtard.config import validate
from mmtard.distillation.task import DistillationTask
from mmtard.errors import UserError
from mmtard.models.image_tower import freeze
from mmtard.models.loading import load_clip
from mmtard.zero_shot import ZeroShotHead

CLASSES = 7


class Student:
    """A tower as the distillation task takes it, in plain PyTorch."""

    def __init__(self, tower):
        self.tower = tower

    def __call__(self, images, seeds, tokens=False):
        return self.tower(images)

    @contextmanager
    def attack_forward(self):
        yield self.tower


class Teacher:
    def __init__(self, tower, head):
        self.tower, self.head = tower, head

    @torch.no_grad()
    def __call__(self, images):
        return self.head(self.tower(images))


@pytest.fixture
def config(vit):
    model = {"arch": vit, "weights": "random"}
    return validate(
        {
            "run_dir": "unused",
            "student": model,
            "teachers": {"clean": model, "robust": model},
            "method": {"name": "mmtard", "weighting": "official"},
            "attack": {"eps": "8/255", "step_size": "2/255", "steps": 4, "momentum": 0},
            "data": {"shards": "unused", "lanes": 4},
            "train": {"steps": 9, "batch_size": 4, "lr": 1e-3},
            "engine": {"precision": "float32", "device": "cpu"},
        }
    )


@pytest.fixture
def both(config):
    """(the published step, our task on a student of the same weights, the student's tower)."""
    from mmtard.benchmarks.models import random_classes
    from mmtard.benchmarks.phases import PhaseClock
    from mmtard.benchmarks.published import PublishedModels, PublishedStep

    towers = {
        name: load_clip(config.student, seed).tower()
        for seed, name in enumerate(("student", "theirs", "clean", "robust"))
    }
    towers["theirs"].load_state_dict(towers["student"].state_dict())
    heads = {name: ZeroShotHead(random_classes(CLASSES, 16, name), 20.0) for name in ("student", "clean", "robust")}
    clean, robust = (freeze(towers[name], torch.float32, torch.device("cpu")) for name in ("clean", "robust"))
    models = PublishedModels(towers["theirs"], clean, robust, clean, heads["student"], heads["clean"], heads["robust"])
    teachers = {"clean": Teacher(clean, heads["clean"]), "robust": Teacher(robust, heads["robust"])}
    task = DistillationTask(config, Student(towers["student"]), heads["student"], teachers)
    return PublishedStep(config, models, PhaseClock(torch.device("cpu"))), task, models


def batch():
    from mmtard.benchmarks.models import random_batch

    made = random_batch(4, (16, 16), CLASSES)
    return made.pixels("cpu"), made.labels, made.seeds


def test_the_published_step_has_our_loss_and_our_perturbation(both):
    published, task, _ = both
    images, labels, seeds = batch()
    ours = task.adversarial(images, labels, seeds)
    loss, _ = task(images, labels, seeds)
    theirs, adv = published(images, labels, seeds)
    assert theirs.item() == pytest.approx(loss.mean().item(), rel=1e-5)
    assert (adv - images).abs().max() > 1 / 255 and (ours - adv).abs().max() < 1e-6


def test_what_makes_the_published_step_slow_changes_none_of_its_numbers(both):
    from mmtard.benchmarks.published import PublishedOptions

    published, _, models = both
    images, labels, seeds = batch()
    start = {name: value.clone() for name, value in models.student.state_dict().items()}
    with torch.no_grad():
        stored = models.clean(images)
    found = []
    for options in (PublishedOptions(), PublishedOptions(False, stored, frozen_attack=True)):
        models.student.load_state_dict(start)
        loss, adv = published(images, labels, seeds, options)
        found.append((loss, adv, models.student.visual.proj.detach().clone()))
    (slow, adv, _), (lean, lean_adv, _) = found
    assert lean.item() == pytest.approx(slow.item(), rel=1e-6) and (adv - lean_adv).abs().max() < 1e-6
    assert not torch.equal(found[0][2], start["visual.proj"])  # it is trained


@pytest.mark.parametrize(
    "changed, place",
    [
        ({"method": {"name": "mmtard", "weighting": "uniform"}}, "method.weighting: 'uniform'"),
        ({"method": {"name": "mmtard", "views": {"clean": "clean", "robust": "clean_for_adv"}}}, "method.views: "),
        ({"attack": {"norm": "l2"}}, "attack.norm: 'l2', but the published step has 'linf'"),
        ({"attack": {"algorithm": "apgd"}}, "attack.algorithm: 'apgd'"),
        ({"attack": {"objective": "ce"}}, "attack.objective: 'ce', but the published step has 'kl_clean'"),
        ({"attack": {"momentum": 0.9}}, "attack.momentum: 0.9"),
        ({"attack": {"ramp": {"until": 9, "steps": 1}}}, "attack.ramp: until 9, eps 1.*set attack.ramp=null"),
        ({"terms": {"anchor": {"teacher": "start"}}}, "terms.anchor: teacher start.*set terms.anchor=null"),
    ],
)
def test_a_step_with_another_loss_or_attack_is_not_measured_against_the_published_one(config, changed, place):
    from mmtard.benchmarks.published import check_comparable

    plain = config.model_dump(mode="json", exclude_unset=True)
    check_comparable(validate(plain))
    other = plain | {name: plain.get(name, {}) | part for name, part in changed.items()}
    with pytest.raises(UserError, match=f"{place}.*or leave --against out"):
        check_comparable(validate(other))


def test_several_ranks_are_not_measured_against_the_published_step(config):
    from mmtard.benchmarks.published import check_comparable

    with pytest.raises(UserError, match="no gradients of other ranks, and here are 2; start one"):
        check_comparable(config, world_size=2)


def test_what_cannot_be_compared_is_told_before_models_are_made(command, config, write, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mmtard.benchmarks.training.resident_parts", lambda *_, **__: pytest.fail("models were made"))
    path = write(config.model_dump(mode="json"))
    assert (
        command("bench", "train", path, "attack.norm=l2", "--against", "published", "--out", tmp_path / "o.json") == 2
    )
    assert "attack.norm: 'l2'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_benchmark_writes_ratios_of_one_run_with_its_command(command, config, write, tmp_path, capsys):
    path, out = write(config.model_dump(mode="json")), tmp_path / "bench" / "train.json"
    words = ["bench", "train", path, "--against", "published", "--rounds", "2", "--classes", "5", "--out", out]
    assert command(*words, "--trace", tmp_path / "trace.json") == 0
    found = json.loads(out.read_text())
    assert "GiB" not in found["tables"][0]["columns"]  # of a process that holds the models of all variants
    names = list(found["variants"])
    assert names[0] == "published" and {"lean loop", "mmtard", "mmtard, clean stored"} <= set(names)
    for name, variant in found["variants"].items():
        assert len(variant["seconds"]) == len(variant["phases"]) == 2
        for seconds, phases in zip(variant["seconds"], variant["phases"]):
            assert {"attack", "student backward", "optimiser"} <= phases.keys()
            assert ("agreement" in phases) == name.startswith("mmtard")
            assert 0 < sum(phases.values()) <= seconds, name
        assert len(variant["communication"]) == 2 and variant["first_step_seconds"] > 0
    of_phases = {row[0]: dict(zip(found["tables"][1]["columns"], row)) for row in found["tables"][1]["rows"]}
    low, high = sorted(phases["attack"] for phases in found["variants"]["mmtard"]["phases"])
    assert of_phases["mmtard"]["attack"] == f"{(low + high) / 2:.3g}\n{low:.3g}-{high:.3g}"
    assert found["world_size"] == 1 and found["attack_by_its_passes"]["n"] == 2
    seconds = {name: variant["seconds"] for name, variant in found["variants"].items()}
    expected = sorted(a / b for a, b in zip(seconds["published"], seconds["mmtard"]))
    ratio = found["variants"]["mmtard"]["ratio"]
    assert [ratio["low"], ratio["high"]] == pytest.approx(expected)
    flops = {name: variant["flops_an_image"] for name, variant in found["variants"].items()}
    forward = flops["published"] / (2 * 4 + 6 + 3)  # student and teachers are of one architecture
    assert flops["lean loop"] == pytest.approx(15 * forward)
    assert flops["mmtard, open_clip's own towers"] == pytest.approx(16 * forward)
    for name, variant in found["variants"].items():
        assert sum(variant["flops_by_phase"].values()) == pytest.approx(flops[name])
    by_phase = found["variants"]["mmtard"]["flops_by_phase"]
    assert by_phase == pytest.approx({"teachers": 2 * flops["mmtard"] / 16, "attack": flops["mmtard"] / 2,
                                      "student": 6 * flops["mmtard"] / 16})  # fmt: skip
    ours = flops["mmtard"] / 16
    assert flops["mmtard, clean stored"] == pytest.approx(15 * ours) and ours < forward  # see vision_transformer.py
    assert flops["mmtard, clean stored, open_clip's own towers"] == pytest.approx(15 * forward)
    assert flops["mmtard, one noisy step (N-FGSM)"] == pytest.approx((2 + 6 + 2) * ours)  # for PGD's 4 steps
    around = found["around_the_step"]
    assert around["load"] == {"not_measured": "no shards; `mmtard bench data` measures it"}
    assert around["logging"]["n"] == around["checkpoint"]["n"] == 2
    assert found["matrix_flops"] > 0 and found["made_with"]["versions"]["torch"]
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    said = capsys.readouterr().out
    assert "lean loop" in said and str(out) in said
    assert "of the time of 4 forwards and input gradients of its tower alone" in said and "The first step of" in said


def test_the_passes_that_an_attack_is_held_to_are_its_own():
    from types import SimpleNamespace

    from mmtard.benchmarks.attack_cost import AttackPasses, share_of_passes
    from mmtard.benchmarks.models import random_batch

    asked = []

    @contextmanager
    def attack_forward():
        yield lambda x: asked.append((len(x), x.requires_grad)) or x.flatten(1)

    engine = SimpleNamespace(attack_forward=attack_forward, micro_batch_size=2)
    for algorithm, passes in (("pgd", 3 * 2), ("apgd", 4 * 2)):  # APGD also asks about its start
        asked.clear()
        task = SimpleNamespace(attack=SimpleNamespace(steps=3, restarts=2, algorithm=algorithm))
        of_attack = AttackPasses(SimpleNamespace(task=task, engine=engine, batch=random_batch(4, (16, 16), CLASSES)))
        of_attack()
        assert asked == [(2, True)] * 2 * passes and of_attack.number == passes
    share, said = share_of_passes([2.1, 2.2], [2.0, 2.0], 10)
    assert (share.low, share.high) == pytest.approx((1.05, 1.1)) and "1.075 (1.050-1.100)" in said


def test_collectives_are_timed_whoever_asks_for_them_and_left_as_they_were():
    import torch.distributed as dist

    from mmtard.benchmarks.instruments import timed_collectives
    from mmtard.benchmarks.phases import PhaseClock
    from mmtard.distributed.ranks import process_group, reduce

    clock, own = PhaseClock(torch.device("cpu")), (dist.all_reduce, dist.Work.wait)
    with process_group("cpu") as ranks, timed_collectives(clock):
        reduce(torch.ones(3))
        ranks.all_gather("word")
        began = clock.seconds()
        assert began.keys() == {"communication"} and 0 < began["communication"] < 60
        assert clock.seconds() == {}
    assert own == (dist.all_reduce, dist.Work.wait)


@pytest.mark.slow
def test_a_teacher_that_the_configuration_stores_is_not_run(command, config, write, tmp_path):
    tree, out = config.model_dump(mode="json"), tmp_path / "train.json"
    tree["teachers"]["clean"]["stored"] = True
    words = ["bench", "train", write(tree), "--rounds", "1", "--classes", "5", "--out", out]
    assert command(*words) == 0
    found = json.loads(out.read_text())["variants"]
    flops = {name: variant["flops_an_image"] for name, variant in found.items()}
    assert list(found)[:2] == ["mmtard", "mmtard, nothing stored"] and "mmtard, clean stored" not in found
    assert flops["mmtard, nothing stored"] == pytest.approx(16 / 15 * flops["mmtard"])
    # Its towers are counted as open_clip has them, also where no published step stands beside.
    assert flops["mmtard, open_clip's own towers"] > 1.01 * flops["mmtard"]


@pytest.mark.slow
def test_the_row_of_open_clips_towers_says_that_they_run_uncompiled(command, config, write, tmp_path):
    name, out = "mmtard, open_clip's own towers, uncompiled", tmp_path / "train.json"
    words = ["bench", "train", write(config.model_dump(mode="json")), "engine.compile=on", "--variants", name]
    assert command(*words, "--rounds", "1", "--warm-up", "0", "--classes", "5", "--out", out) == 0
    found = json.loads(out.read_text())
    assert list(found["variants"]) == [name] and "around_the_step" not in found  # which is around mmtard's own step


def test_a_variant_that_is_not_there_is_refused_with_those_that_are(command, config, write, tmp_path, capsys):
    path = write(config.model_dump(mode="json"))
    assert command("bench", "train", path, "--variants", "fastest") == 2
    assert "no 'fastest' here; those of this configuration: 'mmtard', 'mmtard, clean stored'" in capsys.readouterr().err
    out = tmp_path / "new" / "train.json"
    assert command("bench", "train", path, "--variants", "mmtard", "train.lr=1", "--out", out) == 2
    assert "'train.lr=1' is a setting, and no name; settings come before --variants" in capsys.readouterr().err
    assert not out.parent.exists()


def test_the_page_has_the_arithmetic_of_the_main_step():
    from pathlib import Path

    from mmtard.config import Model
    from mmtard.models.loading import load_skeleton
    from mmtard.models.vision_transformer import restore
    from mmtard.training.throughput import forward_flops

    towers = [load_skeleton(Model(arch=arch, weights="random"), "student").tower() for arch in ("ViT-B-32", "ViT-L-14")]
    student, teacher = (forward_flops(tower) / 1e9 for tower in towers)
    for tower in towers:
        restore(tower.visual)
    plain_student, plain_teacher = (forward_flops(tower) / 1e9 for tower in towers)
    published = 26 * plain_student + 3 * plain_teacher
    expected = {
        "published: three teacher forwards, one thrown away": published,
        "published, without its third teacher": published - plain_teacher,
        "lean loop: clean embeddings given, the attack's weights ask for no gradient": published - 2 * plain_teacher,
        "mmtard": 26 * student + 2 * teacher,
        "mmtard, clean teacher stored (`teachers.clean.stored`)": 26 * student + teacher,
        "mmtard, every target stored (`method.views.robust: clean_for_adv`)": 26 * student,
    }
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()
    for step, count in expected.items():
        ratio = f"{published / count:.2f}".replace("1.00", "1")
        assert f"| {step} | {count:.0f} | {ratio} |" in page, (step, count, ratio)
