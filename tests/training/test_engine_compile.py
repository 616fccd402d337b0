"""What `engine.compile` compiles, and what it says where it compiles nothing; no step makes a graph anew."""

from types import SimpleNamespace

import pytest
import torch
from compiling import graphs_made, graphs_without_cpp
from parallel import five_steps, students
from torch._dynamo.exc import TorchDynamoException

from mmtard.attacks import fused
from mmtard.data.samples import Batch
from mmtard.distillation.task import DistillationTask
from mmtard.models.teachers import FrozenTeacher, compile_teachers
from mmtard.training.engine import Engine
from mmtard.training.step import optimizer_step
from mmtard.zero_shot import ZeroShotHead

UNCOMPILED = "uncompiled: engine.zero_stage 3 gathers the weights between the layers"
ON = "engine.compile 'graphs' is 'on' here: "
NO_COPY = ON + "CUDA graphs are those of the attack's copy; set engine.attack_copy=true"


@pytest.fixture
def engine(ranks, monkeypatch):
    """Call with ZeRO stage and attack_copy: an engine whose `compile` is the CPU's, and takes it for `device`."""
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)

    def make(stage: int, copy: bool, device: str = "cuda", attacks: bool = True) -> Engine:
        made = Engine(
            five_steps.settings(stage, "replicated", "float32", 8, attack_copy=copy), five_steps.tower(0), ranks
        )
        made.ranks, made.attacks = SimpleNamespace(device=torch.device(device)), attacks
        return made

    return make


@pytest.mark.parametrize(
    "stage, copy, setting, device, told",
    [
        (2, True, "on", "cuda", []),
        (2, False, "on", "cuda", []),
        (2, True, "graphs", "cuda", []),
        (2, False, "graphs", "cuda", [NO_COPY]),
        (2, True, "graphs", "cpu", [ON + "a CPU has no CUDA graphs"]),
        (3, True, "on", "cuda", [f"the student runs {UNCOMPILED}"]),
        (3, False, "on", "cuda", [f"the student and its attack run {UNCOMPILED}"]),
        (3, False, "graphs", "cuda", [NO_COPY, f"the student and its attack run {UNCOMPILED}"]),
        (3, False, "off", "cuda", []),
        (3, False, "auto", "cpu", []),
    ],
)
def test_what_is_not_compiled_is_said(engine, stage, copy, setting, device, told):
    made, said = engine(stage, copy, device), []
    made.compile(setting, said.append)
    assert said == told
    wanted = setting in ("on", "graphs")
    assert (made.ds.module.graph is not None) == (wanted and stage < 3)
    if copy:
        graph = made.attack_copy.tower.graph
        assert (graph is not None) == wanted
        assert not wanted or graph.graphs == (setting == "graphs" and device == "cuda")


def test_a_method_without_attack_is_said_to_have_no_cuda_graphs(engine):
    said = []
    engine(2, False, attacks=False).compile("graphs", said.append)
    assert said == [ON + "CUDA graphs are the attack's, and the method makes none"]


@pytest.fixture
def update(ranks):
    """Call with an engine: the summed loss of an update that moves nothing, under PGD with a start and momentum."""

    def run(engine: Engine) -> float:
        config, head = five_steps.settings(2, "replicated", "float32", 8), ZeroShotHead(five_steps.text(), 20.0)
        teachers = {
            name: FrozenTeacher(name, config.teachers[name], five_steps.tower(seed), head, ranks, torch.float32)
            for seed, name in enumerate(("clean", "robust"), 1)
        }
        images = torch.randint(255, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
        batch = Batch(images, torch.arange(8) % five_steps.CLASSES, torch.arange(8), torch.arange(8), [""] * 8)
        task = DistillationTask(config, engine, head, teachers)
        done = optimizer_step(task, engine, batch, 0.0, torch.device("cpu"))
        return done.terms.total([], ranks).sums["loss"]

    return run


ARITHMETIC = {"_started", "_carried"}


@pytest.mark.parametrize(
    "stage, copy, setting, compiled",
    [
        (2, True, "on", {"compute", *ARITHMETIC}),
        (2, True, "graphs", {"compute", *ARITHMETIC}),
        (2, False, "on", {"compute", *ARITHMETIC}),
        (3, True, "on", {"compute", *ARITHMETIC}),
        (3, False, "on", set()),
        (2, True, "auto", set()),
        (2, True, "off", set()),
    ],
)
def test_a_trainings_attack_is_fused_where_its_tower_is_compiled(
    engine, update, monkeypatch, stage, copy, setting, compiled
):
    names = set()
    monkeypatch.setattr(fused, "_graphs", {})
    monkeypatch.setattr(torch, "compile", lambda function, **settings: names.add(function.__name__) or function)
    made = engine(stage, copy, "cpu")
    made.compile(setting, lambda line: None)
    update(made)
    assert names == compiled


def test_arithmetic_that_cannot_be_compiled_is_said_once_in_all_updates(engine, update, monkeypatch):
    def broken(*_):
        raise TorchDynamoException("no C++ compiler\nfound")

    said, tried = [], []

    def compile(function, **settings):
        tried.append(function.__name__)
        return broken if function.__name__ in ARITHMETIC else function

    monkeypatch.setattr(fused, "_graphs", {})
    made, plain = engine(2, True, "cpu"), engine(2, True, "cpu")
    monkeypatch.setattr(torch, "compile", compile)
    made.compile("on", said.append)
    assert [update(made), update(made)] == [update(plain)] * 2  # at a learning rate of 0
    assert said == ["the attacks' arithmetic is not fused: _started: TorchDynamoException: no C++ compiler found"]
    assert "_carried" not in tried


def test_synced_batch_norm_that_is_computed_again_is_said_to_run_uncompiled(ranks, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    said = []
    for kind in ("bn", "bnc"):
        made = Engine(students.settings(kind, 2), students.start(kind), ranks)
        made.compile("on", said.append)
        assert (made.ds.module.graph is None) == (kind == "bnc") == bool(said)
    assert said == [
        "the student runs uncompiled: engine.checkpoint_activations leaves no way out to the statistics of"
        " student.batch_norm=synced"
    ]


@pytest.mark.slow  # it compiles
@pytest.mark.parametrize("copy", (True, False))
def test_no_step_after_the_first_makes_a_graph(ranks, copy):
    """Under bf16, while the attack's radius and steps grow; between the steps the student is asked for accuracy."""
    config = five_steps.settings(2, "replicated", "bf16", 8, attack_copy=copy)
    ramp = {"until": five_steps.STEPS, "eps": "1/4", "steps": 1}
    config = config.model_copy(update={"attack": type(config.attack)(**{**config.attack.model_dump(), "ramp": ramp})})
    said, graphs, head = [], [], ZeroShotHead(five_steps.text(), 20.0)
    with graphs_without_cpp():
        engine = Engine(config, five_steps.tower(0), ranks)
        engine.compile("on", said.append)
        teachers = {
            name: FrozenTeacher(name, config.teachers[name], five_steps.tower(seed), head, ranks, torch.bfloat16)
            for seed, name in enumerate(("clean", "robust"), 1)
        }
        compile_teachers("on", teachers, ranks.device, said.append)
        task = DistillationTask(config, engine, head, teachers)
        for step, batch in enumerate(five_steps.batches()):
            task.begin_step(step)
            engine.backward(task(*batch)[0].mean())
            assert engine.end_micro_batch(five_steps.LR).applied
            with torch.no_grad(), engine.attack_forward() as forward:
                forward(batch[0])
            graphs.append(graphs_made())
    # The attack's with a gradient to the images and without, the trained tower's, and the teachers', which are alike;
    # the attack's start and its steps.
    assert graphs == [6] * five_steps.STEPS and said == []
