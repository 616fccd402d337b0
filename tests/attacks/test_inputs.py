"""Wrong use is answered where it happens, in one line that names the value and says what to write instead."""

import fractions
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmtard.attacks import ensemble
from mmtard.attacks.apgd import apgd
from mmtard.attacks.pgd import input_gradient, pgd, worst_of
from mmtard.attacks.state import AttackSettings, logits_of
from mmtard.attacks.threat_model import ascent, check_norm, perturbation_size, project, random_start
from mmtard.errors import UserError

LINF = ["linf", "Linf", "LINF", "L-inf", "l_inf", "L inf", " linf ", "inf", "Inf", "infinity", "l∞", math.inf, np.inf]
LINF += [np.float32("inf"), torch.inf]
L2 = ["l2", "L2", "L-2", "l_2", "2", 2, 2.0, "2.0", np.int64(2), np.float64(2)]
WRONG_NORMS = [
    "foo",
    "l1",
    "L1",
    1,
    0,
    "",
    "-inf",
    -math.inf,
    math.nan,
    None,
    True,
    "l22",
    "linf2",
    3,
    ["linf"],
    torch.tensor(2),
]

LABELS = torch.tensor([0, 1, 2, 0])
SEEDS = torch.arange(4)


@pytest.fixture
def images():
    return torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    torch.manual_seed(0)
    weight = torch.randn(48, 5)
    return lambda x: x.flatten(1) @ weight.to(x.dtype)


@pytest.fixture
def loss(model):
    return lambda x: F.cross_entropy(model(x), LABELS, reduction="none")


# ---------------------------------------------------------------- norms


@pytest.mark.parametrize("norms,ours", [(LINF, "linf"), (L2, "l2")])
def test_a_norm_is_taken_in_every_spelling_of_the_field(norms, ours):
    assert [check_norm(norm) for norm in norms] == [ours] * len(norms)


@pytest.mark.parametrize("norm", WRONG_NORMS, ids=repr)
def test_any_other_norm_is_refused_by_name(norm):
    with pytest.raises(UserError, match="norm: .* is not known; write 'linf' or 'l2'") as caught:
        check_norm(norm)
    assert repr(norm) in str(caught.value)


@pytest.mark.parametrize("attack", [pgd, apgd])
def test_autoattacks_spelling_is_its_norm_and_not_another_ball(attack, loss, images):
    """pgd(norm="Linf") once ran an L2 attack of that radius: its largest change was 0.37/255 instead of 8/255."""
    means = {"eps": 8 / 255, "steps": 5, "seeds": SEEDS} | ({"step_size": 2 / 255} if attack is pgd else {})
    for spelling in ("Linf", "L-inf", np.inf):
        adv = attack(loss, images, norm=spelling, **means)
        assert adv.equal(attack(loss, images, norm="linf", **means))
        assert (adv - images).abs().amax((1, 2, 3)).allclose(torch.full((4,), 8 / 255), rtol=1e-4)
    assert attack(loss, images, norm="L2", **means).equal(attack(loss, images, norm="l2", **means))
    with pytest.raises(UserError, match="norm: 'foo' is not known"):
        attack(loss, images, norm="foo", **means)


def test_every_place_that_takes_a_norm_takes_the_same_ones(images):
    delta = images - 0.5
    for ours, other in (("linf", "Linf"), ("l2", 2)):
        assert project(images + delta, images, other, 0.1).equal(project(images + delta, images, ours, 0.1))
        assert random_start(images, SEEDS, other, 0.1).equal(random_start(images, SEEDS, ours, 0.1))
        assert perturbation_size(delta, other).equal(perturbation_size(delta, ours))
        assert ascent(delta, other).equal(ascent(delta, ours))
        assert AttackSettings(eps=0.1, norm=other) == AttackSettings(eps=0.1, norm=ours)
    for call in (
        lambda: project(images, images, "l1", 0.1),
        lambda: random_start(images, SEEDS, "l1", 0.1),
        lambda: perturbation_size(delta, "l1"),
        lambda: ascent(delta, "l1"),
        lambda: AttackSettings(eps=0.1, norm="l1"),
    ):
        with pytest.raises(UserError, match="norm: 'l1'"):
            call()


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    "eps,message",
    [
        (8, "write 8/255 for 8 of 255 levels"),
        (-0.1, "is no size"),
        (math.nan, "is no size"),
        (math.inf, "is no size"),
        ("8/255", "'8/255' is not a number"),
        (True, "is not a number"),
        (None, "is not a number"),
    ],
)
def test_a_radius_that_is_none_is_refused(eps, message, loss, images):
    for call in (
        lambda: pgd(loss, images, norm="linf", eps=eps, step_size=0.01, steps=1),
        lambda: apgd(loss, images, norm="linf", eps=eps, steps=1),
        lambda: random_start(images, SEEDS, "linf", eps),
        lambda: AttackSettings(eps=eps),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_fractions_are_radii_and_l2_radii_may_be_larger_than_a_pixel(loss, images):
    exact = fractions.Fraction(8, 255)
    assert pgd(loss, images, norm="linf", eps=exact, step_size=exact, steps=1).equal(
        pgd(loss, images, norm="linf", eps=8 / 255, step_size=8 / 255, steps=1)
    )
    assert AttackSettings(eps=3, norm="l2").eps == 3.0


@pytest.mark.parametrize(
    "change,message",
    [
        ({"step_size": 0.0}, "step_size: 0.0 is not positive"),
        ({"step_size": "1/255"}, "step_size: '1/255' is not a number"),
        ({"steps": 0}, "steps: 0 is too few"),
        ({"steps": 2.5}, "steps: 2.5 is not a whole number"),
        ({"momentum": 1.0}, r"momentum: 1.0 is not in \[0,1\)"),
        ({"seeds": torch.arange(3)}, r"seeds: shape \[3\] beside 4 images"),
        ({"seeds": torch.arange(4.0)}, "seeds: torch.float32 instead of int64"),
        ({"seeds": [1, 2, 3, 4]}, "seeds: a list, not a tensor"),
    ],
)
def test_pgd_checks_its_means(change, message, loss, images):
    means = {"norm": "linf", "eps": 0.1, "step_size": 0.05, "steps": 2, **change}
    with pytest.raises(UserError, match=message):
        pgd(loss, images, **means)


@pytest.mark.parametrize("change", [{"iters": 1.5}, {"queries": True}, {"targets": "9"}])
def test_settings_are_whole_numbers(change):
    with pytest.raises(UserError, match=f"{next(iter(change))}: .* is not a whole number"):
        AttackSettings(eps=0.1, **change)


# ---------------------------------------------------------------- tensors


@pytest.mark.parametrize("attack", [pgd, apgd])
def test_images_and_losses_of_another_kind_are_refused_by_the_bare_attacks(attack, model, loss, images):
    means = {"norm": "linf", "eps": 0.1, "steps": 2} | ({"step_size": 0.05} if attack is pgd else {})
    for wrong, message in (
        ((images * 255).byte(), "torch.uint8 instead of float32; divide 8-bit pixels by 255"),
        (images[0, 0, 0], r"shape \[4\]; give a batch"),
        (images.numpy(), "a ndarray, not a tensor"),
    ):
        with pytest.raises(UserError, match=f"images: {message}"):
            attack(loss, wrong, **means)
    for wrong, message in (
        (lambda x: F.cross_entropy(model(x), LABELS), r"returns shape \[\] for 4 images; .* reduction='none'"),
        (lambda x: model(x), r"returns shape \[4, 5\]"),
        (lambda x: loss(x)[:3], r"returns shape \[3\]"),
        (lambda x: loss(x).tolist(), "returns a list"),
        (lambda x: model(x).argmax(1), "returns torch.int64"),
        (lambda x: loss(x).detach(), "have no gradient to the images"),
        (lambda x: loss(images.clone().requires_grad_()), "have no gradient to the images"),
    ):
        with pytest.raises(UserError, match=f"loss_fn: .*{message}"):
            attack(wrong, images, **means)


def test_projecting_onto_other_images_is_refused(images):
    with pytest.raises(UserError, match=r"adv: shape \[4, 3, 4, 4\] beside images of \[1, 3, 4, 4\]"):
        project(images, images[:1], "linf", 0.1)


def test_the_worst_of_nothing_is_refused_and_of_scalar_losses_too(loss, images):
    with pytest.raises(UserError, match="no adversarial batch"):
        worst_of(loss, [])
    with pytest.raises(UserError, match="one loss for each"):
        worst_of(lambda x: loss(x).mean(), [images, images])


def run(model, images, labels=LABELS, seeds=SEEDS):
    return ensemble.run_attacks(model, images, labels, seeds, ["pgd"], AttackSettings(eps=0.1, iters=2))


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda x: x[0], r"images: shape \[3, 4, 4\]; give a batch, \[B,C,H,W\] \(one image: images\[None\]\)"),
        (lambda x: x[:0], r"images: shape \[0, 3, 4, 4\] holds no pixel"),
        (lambda x: x.double(), "images: torch.float64 instead of float32"),
        (lambda x: x - 0.5, r"not within \[0,1\]"),
        (lambda x: torch.where(x > 0.9, torch.nan, x), "NaN among the pixels"),
        (lambda x: torch.where(x > 0.9, torch.inf, x), r"values from .* to inf, not within \[0,1\]"),
    ],
)
def test_images_that_are_no_pixels_are_refused(change, message, model, images):
    with pytest.raises(UserError, match=message):
        run(model, change(images))


@pytest.mark.parametrize(
    "labels,message",
    [
        (LABELS[:3], r"labels: shape \[3\] beside 4 images"),
        (LABELS.int(), r"labels: torch.int32 instead of int64; write labels.long\(\)"),
        (F.one_hot(LABELS, 5).float(), r"labels: shape \[4, 5\] beside 4 images; give one for each, \[4\]"),
        (F.one_hot(LABELS, 5), r"labels: shape \[4, 5\] beside 4 images"),
        ([0, 1, 2, 0], r"labels: a list, not a tensor; give int64 \[4\]: torch.tensor\(labels\)"),
        (LABELS - 1, "labels: -1 is no class"),
        (LABELS + 3, "labels: 5 is beyond the model's 5 classes"),
        (LABELS.to("meta"), "labels: on meta, the images on cpu"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message, model, images):
    with pytest.raises(UserError, match=message):
        run(model, images, labels)


@pytest.mark.parametrize(
    "wrong,message",
    [
        (lambda z: (z, z), "it returns a tuple of 2 instead of logits"),
        (lambda z: {"logits": z}, "it returns a dict instead of logits"),
        (lambda z: z[:, 0], r"its logits have shape \[4\] for 4 images"),
        (lambda z: z[:2], r"its logits have shape \[2, 5\] for 4 images"),
        (lambda z: z[:, None], r"its logits have shape \[4, 1, 5\] for 4 images"),
        (lambda z: z[:, :1], "its logits are of one class"),
        (lambda z: z.half(), "its logits are torch.float16; attacks need float32"),
        (lambda z: z.argmax(1), "its logits are torch.int64; attacks need float32"),
        (lambda z: z.to("meta"), "its logits are on meta, the images on cpu"),
    ],
)
def test_a_model_that_gives_no_logits_is_refused(wrong, message, model, images):
    with pytest.raises(UserError, match=message):
        logits_of(lambda x: wrong(model(x)), images)
    with pytest.raises(UserError, match=message):
        run(lambda x: wrong(model(x)), images)


def test_the_checks_of_the_inner_loop_read_no_values(images):
    """Tensors of the meta device have no values to read: whoever asks for one would wait for a GPU."""
    x = images.to("meta")
    gradient, losses = input_gradient(lambda z: z.flatten(1).sum(1), x)
    assert gradient.shape == x.shape and losses.shape == (4,)
    assert project(x, x, "linf", 0.1).shape == x.shape
    adv = pgd(lambda z: z.flatten(1).sum(1), x, norm="L2", eps=0.1, step_size=0.05, steps=2, seeds=SEEDS.to("meta"))
    assert adv.shape == x.shape
