"""Every objective on two ranks under ZeRO: the same three steps as plain PyTorch, teachers of different widths,
states included.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mmtard.config import METHODS

from .each_method import CASES, batches, plain, plain_teacher
from .launch import run_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("each")
    run_ranks([Path(__file__).with_name("each_method.py"), folder / "out.pt"], 2, folder, "ranks")
    found, weights = json.loads((folder / "out.pt.json").read_text()), torch.load(folder / "out.pt", weights_only=True)
    return {case: {**found[case], "weights": weights[case]} for case in CASES} | {
        p: weights[p] for p in ("replicated", "sharded")
    }


def test_every_method_has_a_case():
    assert {method["name"] for method, *_ in CASES.values()} == set(METHODS), "CASES of each_method.py needs a row each"


@pytest.mark.parametrize("case", CASES)
def test_two_zero_ranks_equal_plain_pytorch(two_ranks, case):
    ours, theirs = two_ranks[case], plain(case)
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=2e-5, abs=1e-6)
    assert len(set(ours["losses"])) == 3 and ours["state"] == pytest.approx(theirs["state"], rel=1e-5)
    assert ours["alarm"] == theirs["alarm"]
    assert ours["weights"].keys() == theirs["weights"].keys()
    for name, weight in theirs["weights"].items():
        # A key's bias is cancelled by softmax: its gradient is rounding noise that AdamW makes steps of.
        if not name.endswith(("in_proj_bias", "k_proj.bias")):
            assert (ours["weights"][name] - weight).abs().max() < 5e-5, name


def test_the_gradient_through_a_sharded_teacher_is_that_through_a_replica(two_ranks):
    """And that of the plain formula in float64."""
    teacher, student = (plain_teacher(name) for name in ("robust", "student"))
    for i, (images, *_) in zip(range(2), batches()):
        x = images[::2].double().requires_grad_()  # what the first rank saw
        logits = [
            scale * F.normalize(t.tower.double().cast(torch.float64)(x), dim=-1) @ t.head.class_embeddings.double().T
            for t, scale in ((teacher, 20), (student, 20))
        ]
        p, q = (z.softmax(-1) for z in logits)
        (gradient,) = torch.autograd.grad((p * (p / q).log()).sum(), x)
        for name, expected in ((f"logits{i}", logits[0].detach()), (f"gradient{i}", gradient)):
            replicated, sharded = (two_ranks[placement][name] for placement in ("replicated", "sharded"))
            assert sharded.equal(replicated)
            assert (replicated - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_alarm_asks_all_ranks(two_ranks):
    ((single, multi, n),) = two_ranks["agft"]["alarm"]
    assert n == 8 and 0 <= multi <= single <= 8 and not any(two_ranks[c]["alarm"] for c in CASES if c != "agft")


def test_balanced_weights_move_with_the_losses(two_ranks):
    for case, teachers in (("mtard", 2), ("mmtard, three teachers", 3)):
        state, spread = two_ranks[case]["state"], two_ranks[case]["spread"]
        weights = [v for k, v in state.items() if k.startswith("w_")]
        assert len(weights) == teachers and sum(weights) == pytest.approx(1) and max(weights) - min(weights) > 1e-3
        assert all(
            spread["w_robust_p10"] == spread[f"w_robust_{p}"] for p in ("p50", "p90")
        )  # the same for every sample
