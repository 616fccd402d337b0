"""What an attack maximises, against float64 numpy and plain autograd."""

import numpy as np
import pytest
import torch
from test_methods import LABELS, SCALE, TEXT, B, C, Z, kl, of_label, p

from mmtard.config import ATTACK_OBJECTIVES
from mmtard.distillation import attack_objectives
from mmtard.distillation.methods import Pass
from mmtard.errors import UserError
from mmtard.zero_shot import ZeroShotHead

HEAD = ZeroShotHead(torch.tensor(TEXT), SCALE)
SEEDS = torch.arange(40, 40 + B)
FUSION = {"robust": 0.75, "clean": 0.25}
SHARPNESS = (0.05, 0.3)
P_S = p("student", "adv")


def expected(name):
    match name:
        case "ce":
            return -np.log(of_label(P_S))
        case "ce_targeted":
            return np.log(P_S[np.arange(B), attack_objectives.wrong_class(torch.tensor(LABELS), SEEDS, C).numpy()])
        case "kl_clean" | "kl_robust" | "kl_self":
            return kl(p({"kl_self": "student"}.get(name, name[3:]), "clean"), P_S)
        case "kl_start":
            return kl(p("start", "clean", 1 / SHARPNESS[0]), p("student", "adv", 1 / SHARPNESS[1]))
        case "kl_fused":
            return kl(sum(w * p(m, "clean") for m, w in FUSION.items()), P_S)
        case "kl_adaptive":
            return kl(p("robust", "adv"), P_S)
        case "l2_embedding":
            return ((Z["student", "adv"] - Z["start", "clean"]) ** 2).sum(1)
    pytest.fail(f"write the equation of {name!r} here, independently of distillation/attack_objectives.py")


@pytest.mark.parametrize("name", ATTACK_OBJECTIVES)
def test_an_objective_is_its_equation_in_float64(name):
    """Measured from a fixed target to the perturbed student; the gradient reaches a moving teacher and no fixed one."""
    objective = attack_objectives.find_objective(name, FUSION, SHARPNESS)
    targets = {q: HEAD(torch.tensor(Z[q]).requires_grad_()) for q in objective.reference_passes}
    student = HEAD(torch.tensor(Z["student", "adv"]).requires_grad_())
    moving = [HEAD(torch.tensor(Z["robust", "adv"]).requires_grad_())] if objective.through_teacher else []
    loss = attack_objectives.attack_loss(objective, targets, torch.tensor(LABELS), SEEDS)(student, *moving)
    np.testing.assert_allclose(loss.detach().numpy(), expected(name), rtol=1e-11, atol=1e-14)
    loss.sum().backward(inputs=[t.embeddings for t in (student, *moving, *targets.values())])
    assert all(t.embeddings.grad.abs().sum() > 0 for t in (student, *moving))
    assert all(t.embeddings.grad is None for t in targets.values())


def test_the_objectives_are_those_of_the_schema_and_ask_for_the_same_models():
    needed = {"kl_self": "student", "kl_fused": None}
    assert attack_objectives.LOSSES.keys() == ATTACK_OBJECTIVES.keys(), "an objective stands in both"
    for name, needs in ATTACK_OBJECTIVES.items():
        objective = attack_objectives.find_objective(name)
        asked = {q.model for q in objective.reference_passes} | {objective.through_teacher} - {None}
        assert asked == {needed.get(name, needs.teacher)} - {None} and all(
            q.image == "clean" for q in objective.reference_passes
        )
    assert attack_objectives.find_objective("kl_fused", FUSION).reference_passes == {
        Pass("robust", "clean"),
        Pass("clean", "clean"),
    }
    with pytest.raises(UserError, match="unknown attack objective 'cw'; known: ce, ce_targeted, kl_adaptive, kl_clean"):
        attack_objectives.find_objective("cw")


@pytest.mark.parametrize("name", ATTACK_OBJECTIVES)
def test_only_the_objectives_that_say_so_read_labels(name):
    objective = attack_objectives.find_objective(name, FUSION, SHARPNESS)
    targets = {q: HEAD(torch.tensor(Z[q])) for q in objective.reference_passes}
    models = [
        HEAD(torch.tensor(Z[m, "adv"]))
        for m in ("student", *([objective.through_teacher] if objective.through_teacher else []))
    ]
    found = [
        attack_objectives.attack_loss(objective, targets, y, SEEDS)(*models)
        for y in (torch.tensor(LABELS), torch.tensor((LABELS + 1) % C))
    ]
    assert (not found[0].equal(found[1])) is ATTACK_OBJECTIVES[name].labels


def test_a_target_class_is_wrong_and_uniform_over_the_others_and_its_seeds_alone():
    labels, seeds = torch.full((6000,), 2), torch.arange(6000) * 7919
    chosen = attack_objectives.wrong_class(labels, seeds, 5)
    counts = torch.bincount(chosen, minlength=5).tolist()
    assert counts[2] == 0 and sum(counts) == 6000
    assert all(abs(n - 1500) < 5 * 34 for n in counts[:2] + counts[3:])  # a standard deviation is 34
    assert attack_objectives.wrong_class(labels[10:20], seeds[10:20], 5).equal(chosen[10:20])
    assert attack_objectives.wrong_class(torch.tensor([0, 1]), torch.tensor([-(2**63), 2**63 - 1]), 2).tolist() == [
        1,
        0,
    ]
