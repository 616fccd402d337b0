"""What `engine.compile` says where it compiles nothing, or makes no CUDA graphs."""

from types import SimpleNamespace

import pytest
import torch
from parallel import five_steps

from mmtard.training.engine import Engine

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
