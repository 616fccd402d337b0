"""Anchor, feature term and LORE's bound, against numpy in float64; the modules that they learn."""

import numpy as np
import pytest
import torch

from mmtard.config import validate
from mmtard.distillation.added_terms import added_loss, learned_parts, on_grid_of, run_passes
from mmtard.distillation.learned import LearnedPart, LearnedParts, projection
from mmtard.distillation.methods import Pass
from mmtard.errors import UserError
from mmtard.zero_shot import Prediction

B, D, WIDE, P = 5, 6, 8, 4
RNG = np.random.Generator(np.random.PCG64(3))
WIDTHS = {"student": D, "clean": D, "start": D, "robust": WIDE}
Z = {(m, v): RNG.standard_normal((B, w)) for m, w in WIDTHS.items() for v in ("clean", "adv")}
TOKENS = {(m, v): RNG.standard_normal((B, P, w)) for m, w in WIDTHS.items() for v in ("clean", "adv")}


def setting(method="tecoa", teachers=(), **terms):
    return validate(
        {
            "run_dir": "r",
            "student": {"weights": "random"},
            "teachers": {name: {"weights": "random"} for name in teachers},
            "method": {"name": method},
            "terms": terms,
            "data": {"shards": "s", "lanes": 2},
            "train": {"steps": 1, "batch_size": 2},
        }
    )


def predictions(config, grad=()):
    def leaf(values, wanted):
        return torch.tensor(values).requires_grad_(wanted)

    return {
        p: Prediction(leaf(Z[p], p in grad), None, None, leaf(TOKENS[p], p in grad), None) for p in run_passes(config)
    }


def cosine(a, b):
    return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def in_float64(learned):
    for part in learned.parts.values():
        part.module.double()
    return learned


def test_the_anchor_is_one_minus_the_cosine_of_the_clean_embeddings():
    config = setting(teachers=["clean"], anchor={"weight": 2.0})
    assert run_passes(config) == {Pass("student", "adv"), Pass("student", "clean"), Pass("clean", "clean")}
    learned = learned_parts(config, WIDTHS)
    assert not learned.parts, "equal widths need no projection"
    total, terms = added_loss(config, predictions(config), learned)
    expected = 1 - cosine(Z["student", "clean"], Z["clean", "clean"])
    np.testing.assert_allclose(terms["anchor"].numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(total.numpy(), 2 * expected, rtol=1e-12)


@pytest.mark.parametrize("of,view", [("embedding", "clean"), ("embedding", "adv"), ("tokens", "adv")])
def test_the_feature_term_reaches_a_teacher_of_another_width_through_a_learned_map(of, view):
    config = setting(teachers=["robust"], feature={"weight": 0.5, "of": of, "teacher_view": view})
    assert run_passes(config) == {Pass("student", "adv"), Pass("robust", view)}
    assert config.token_models == ({"student", "robust"} if of == "tokens" else set())
    learned = in_float64(learned_parts(config, WIDTHS))
    W = learned.parts["feature"].module.weight
    given = predictions(config, grad=[Pass("student", "adv")])
    total, terms = added_loss(config, given, learned)
    values = Z if of == "embedding" else TOKENS
    apart = 1 - cosine(values["student", "adv"] @ W.detach().numpy().T, values["robust", view])
    expected = apart if of == "embedding" else apart.mean(1)
    np.testing.assert_allclose(terms["feature"].detach().numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(total.detach().numpy(), 0.5 * expected, rtol=1e-12)
    total.sum().backward()
    student = given["student", "adv"]
    reached = student.embeddings if of == "embedding" else student.tokens
    assert W.grad.abs().sum() > 0 and reached.grad.abs().sum() > 0


def test_features_of_places_have_a_width_of_their_own():
    """As the channels of a last map: not that of the embeddings."""
    config = setting(teachers=["robust"], feature={"of": "tokens"})
    learned = learned_parts(config, {"student": 99, "robust": 99}, places=WIDTHS)
    W = in_float64(learned).parts["feature"].module.weight
    assert W.shape == (WIDE, D)
    _, terms = added_loss(config, predictions(config), learned)
    apart = 1 - cosine(TOKENS["student", "adv"] @ W.detach().numpy().T, TOKENS["robust", "clean"])
    np.testing.assert_allclose(terms["feature"].detach().numpy(), apart.mean(1), rtol=1e-12)
    of_embedding = setting(teachers=["robust"], feature={})
    assert not learned_parts(of_embedding, {"student": 99, "robust": 99}, places=WIDTHS).parts


def test_a_teachers_patches_are_brought_to_the_students_grid():
    rows = torch.arange(16.0).reshape(1, 16, 1)  # a 4 x 4 grid of its row-major numbers
    assert on_grid_of(rows, 16) is rows
    # Half the size with antialiasing: a tent over four neighbours a side, symmetric, so the grid stays linear.
    small = on_grid_of(rows, 4).reshape(2, 2)
    assert small.mean() == pytest.approx(7.5) and small[0, 1] - small[0, 0] == pytest.approx(
        float(small[1, 1] - small[1, 0]), rel=1e-5
    )
    with pytest.raises(UserError, match="5 places and the teacher's 16 are not both square grids"):
        on_grid_of(rows, 5)


def test_lores_bound_has_its_value_and_the_gradients_of_a_saddle():
    config = setting("lore")
    learned = in_float64(learned_parts(config, WIDTHS))
    first, _, second, _ = learned.parts["bound"].module
    given = predictions(config, grad=[Pass("student", "clean")])
    total, terms = added_loss(config, given, learned)
    z, z0 = Z["student", "clean"], Z["start", "clean"]
    hidden = np.maximum(z0 @ first.weight.detach().numpy().T + first.bias.detach().numpy(), 0)
    multiplier = np.log1p(np.exp(hidden @ second.weight.detach().numpy().T + second.bias.detach().numpy()))[:, 0]
    excess = ((z - z0) ** 2).sum(1) - 0.1 * (z0**2).sum(1)
    np.testing.assert_allclose(total.detach().numpy(), multiplier * excess, rtol=1e-12)
    np.testing.assert_allclose(terms["w_bound"].numpy(), multiplier, rtol=1e-12)
    total.sum().backward()
    analytic = 2 * multiplier[:, None] * (z - z0)
    np.testing.assert_allclose(given["student", "clean"].embeddings.grad.numpy(), analytic, rtol=1e-10)
    # The network climbs: its gradient is minus that of sum lambda * excess, by autograd on the plain formula.
    network = learned.parts["bound"].module
    plain = (network(torch.tensor(z0))[:, 0] * torch.tensor(excess)).sum()
    for p, rising in zip(network.parameters(), torch.autograd.grad(plain, list(network.parameters()))):
        torch.testing.assert_close(p.grad, -rising)


def test_a_bound_that_is_exceeded_raises_its_multiplier():
    """And one that holds lowers it: 200 steps of the network on embeddings that stay where they are."""
    for scale, direction in ((2.0, 1), (0.1, -1)):
        config = setting("lore")
        learned = learned_parts(config, WIDTHS)
        z0 = torch.tensor(Z["start", "clean"]).float()
        given = {Pass("start", "clean"): Prediction(z0, None, None), Pass("student", "clean"): None}
        given["student", "clean"] = Prediction(z0 * (1 + scale), None, None)
        before = added_loss(config, given, learned)[1]["w_bound"]
        for update in range(200):
            added_loss(config, given, learned)[0].mean().backward()
            learned.update(update, True, 1.0, lambda gradient: None, 1)
        after = added_loss(config, given, learned)[1]["w_bound"]
        assert ((after - before) * direction > 0).all()


def test_a_multiplier_of_each_samples_own_climbs_by_its_excess_and_stays_above_zero():
    config = setting("fare", bound={"multipliers": "sample", "rho": 0.5, "dual_lr": 0.25})
    learned = learned_parts(config, WIDTHS, samples=9)
    ids = torch.tensor([3, 0, 8, 5, 1])
    given = predictions(config, grad=[Pass("student", "clean")])
    total, terms = added_loss(config, given, learned, ids)
    z, z0 = Z["student", "clean"], Z["start", "clean"]
    size = (z0**2).sum(1)
    excess = ((z - z0) ** 2).sum(1) - 0.5 * size
    np.testing.assert_allclose(total.detach().numpy(), np.log(2) * excess, rtol=1e-6)
    total.sum().backward()
    np.testing.assert_allclose(given["student", "clean"].embeddings.grad.numpy(), 2 * np.log(2) * (z - z0), rtol=1e-6)
    # Noted twice before the update, as by two micro-batches, and again by a second rank.
    added_loss(config, given, learned, ids)
    learned.update(0, True, 1.0, lambda excess: excess.mul_(2), 2)
    expected = np.full(9, np.log(2))
    expected[ids.numpy()] = np.maximum(np.log(2) + 4 * 0.25 * excess / size, 0)
    np.testing.assert_allclose(learned.samples.values.numpy(), expected, rtol=1e-5)
    assert added_loss(config, given, learned, ids)[1]["w_bound"].equal(learned.samples.values[ids])
    learned.update(1, False, 1.0, lambda excess: excess, 1)
    learned.update(2, True, 1.0, lambda excess: excess, 1)
    np.testing.assert_allclose(learned.samples.values.numpy(), expected, rtol=1e-5, err_msg="of a skipped update")
    again = learned_parts(config, WIDTHS, samples=9)
    again.restore(learned.tensors())
    assert again.samples.values.equal(learned.samples.values)


def parts():
    return LearnedParts(
        {
            "a": LearnedPart(projection(3, 2, 0, "a"), 0.1),
            "b": LearnedPart(projection(3, 3, 0, "b"), 0.1, scheduled=False, every=2),
        }
    )


def one_update(learned, update, applied=True):
    z = torch.linspace(-1, 1, 12).reshape(4, 3) * (update + 1)
    sum((learned(name, z) ** 2).sum() for name in learned.parts).backward()
    learned.update(update, applied, 0.5, lambda gradient: gradient.mul_(2), 2)


def weights(learned):
    return {name: part.module.weight.detach().clone() for name, part in learned.parts.items()}


def test_learned_parts_go_on_from_a_checkpoint_bit_for_bit():
    whole, first = parts(), parts()
    for update in range(5):
        one_update(whole, update)
    for update in range(3):
        one_update(first, update)
    second = parts()
    second.restore(first.tensors())
    for update in range(3, 5):
        one_update(second, update)
    assert all(second.tensors()[key].equal(value) for key, value in whole.tensors().items())
    assert {k.count(".") for k in whole.tensors()} == {2, 3}, "learned.NAME.weight and its moments"


def test_a_module_steps_when_it_is_due_and_not_after_a_skipped_update():
    learned = parts()
    before = weights(learned)
    one_update(learned, 0, applied=False)
    assert all(weights(learned)[name].equal(before[name]) for name in before)
    one_update(learned, 0)
    assert not weights(learned)["a"].equal(before["a"]) and weights(learned)["b"].equal(before["b"])
    # AdamW's first step has the size of the rate: half of it by the schedule.
    assert (weights(learned)["a"] - before["a"]).abs().max() == pytest.approx(0.05, rel=1e-3)
    one_update(learned, 1)
    assert (weights(learned)["b"] - before["b"]).abs().max() == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize(
    "given,words",
    [
        (dict(anchor={}), "terms.anchor.teacher: teachers has no 'clean'; add it there, or name another (start)"),
        (dict(method="clean", feature={"teacher": "start"}), "terms.feature: method 'clean' attacks none"),
        (dict(method="lore", bound={}), "terms.bound: method 'lore' has this bound itself; set method.bound"),
        (dict(anchor={"teacher": "start", "weight": 0}), "terms.anchor.weight: 0: input should be greater than 0"),
    ],
)
def test_terms_that_mean_nothing_are_refused(given, words):
    with pytest.raises(UserError) as error:
        setting(**given)
    assert words in str(error.value)


def test_widths_that_differ_need_a_projection():
    config = setting(teachers=["robust"], feature={"projection": False})
    with pytest.raises(UserError, match="terms.feature.projection: false, but the student's features have 6 numbers"):
        learned_parts(config, WIDTHS)
