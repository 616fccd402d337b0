import copy
import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from pyautoattack.autopgd_base import APGDAttack

from mmtard.attacks.apgd import apgd, step_size_checkpoints
from mmtard.attacks.pgd import pgd
from mmtard.attacks.threat_model import project, random_start
from mmtard.seeding import sample_uniform

NORMS = {"linf": 8 / 255, "l2": 0.5}
B, STEPS = 8, 10


@pytest.fixture(scope="module")
def net():
    """A smooth float64 classifier of 3x6x6 images in 5 classes, far from linear inside the balls above."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3),
        torch.nn.GELU(),
        torch.nn.Conv2d(6, 6, 3),
        torch.nn.GELU(),
        torch.nn.Flatten(),
        torch.nn.Linear(24, 5),
    )
    return layers.double().apply(lambda m: hasattr(m, "weight") and m.weight.data.mul_(4))


@pytest.fixture
def images():
    """Float64, with whole regions at 0 and at 1."""
    x = torch.rand(B, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return ((x - 0.5) * 2 + 0.5).clamp(0, 1)


SEEDS = torch.tensor([3, -5, 2**63 - 1, -(2**63), 0, 1, 2, 1234567])
LABELS = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])


def ce(net, labels=LABELS):
    return lambda x: F.cross_entropy(net(x), labels, reduction="none")


def run(attack, loss_fn, images, norm, **kwargs):
    if attack is pgd:
        kwargs = {"step_size": NORMS[norm] / 4, **kwargs}
    return attack(
        loss_fn, images, **{"norm": norm, "eps": NORMS[norm], "steps": STEPS, "seeds": SEEDS[: len(images)], **kwargs}
    )


both = pytest.mark.parametrize("attack", [pgd, apgd])
norms = pytest.mark.parametrize("norm", NORMS)

# ---------------------------------------------------------------- random starts


def splitmix64(seed, n):
    """Steele, Lea and Flood 2014, in Python's unbounded integers."""
    out, mask = [], 2**64 - 1
    for _ in range(n):
        seed = (seed + 0x9E3779B97F4A7C15) & mask
        z = seed
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        out.append(z ^ (z >> 31))
    return out


def test_sample_uniform_is_splitmix64_bit_for_bit():
    assert splitmix64(1234567, 3) == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]  # the known test vector
    ours = sample_uniform(SEEDS, (3, 6, 6))
    assert ours.shape == (B, 3, 6, 6) and ours.dtype == torch.float32
    for row, seed in zip(ours, SEEDS.tolist()):
        assert row.flatten().tolist() == [(z >> 40) / 2**24 for z in splitmix64(seed, 108)]


@pytest.mark.parametrize("at_once", [1, 107, 108, 250])
def test_sample_uniform_is_the_same_drawn_in_parts(at_once, monkeypatch):
    whole = sample_uniform(SEEDS, (3, 6, 6))
    monkeypatch.setattr("mmtard.seeding.AT_ONCE", at_once)
    assert torch.equal(sample_uniform(SEEDS, (3, 6, 6)), whole)


def test_sample_uniform_is_uniform_and_neighbouring_seeds_are_unrelated():
    a, b = sample_uniform(torch.tensor([7, 8]), (3, 100, 100)).double()
    n = a.numel()
    assert 0 <= a.min() and a.max() < 1
    assert abs(a.mean() - 0.5) < 5 / math.sqrt(12 * n)  # five standard errors
    assert (torch.histc(a, 20, 0, 1) - n / 20).abs().max() < 5 * math.sqrt(n / 20)
    assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 5 / math.sqrt(n)


@norms
def test_random_starts_fill_the_ball_and_differ_by_seed(norm):
    eps = NORMS[norm]
    grey = torch.full((1000, 3, 6, 6), 0.5, dtype=torch.float64)
    delta = random_start(grey, torch.arange(1000), norm, eps) - grey
    size = delta.abs().amax((1, 2, 3)) if norm == "linf" else delta.flatten(1).norm(dim=1)
    assert size.max() <= eps * (1 + 1e-6)  # the start's numbers are float32
    assert delta.mean().abs() < 5 * eps / math.sqrt(delta.numel())
    if norm == "linf":
        assert abs(delta.std() - eps / math.sqrt(3)) < 0.01 * eps
    else:
        assert abs(size.mean() - eps / 2) < 5 * eps / math.sqrt(12 * 1000)
    assert len({tuple(d.flatten().tolist()) for d in delta}) == 1000
    white = random_start(torch.ones(B, 3, 6, 6), SEEDS, norm, eps)
    assert white.max() == 1 and white.min() < 1 - 0.01 * eps, "a start at the border stays in the range"


# ---------------------------------------------------------------- both attacks


@both
@norms
def test_stays_in_the_ball_and_in_the_range_in_float32(attack, norm, net, images):
    x = images.float()
    adv = run(attack, ce(copy.deepcopy(net).float()), x, norm)
    assert adv.dtype == torch.float32 and 0 <= adv.min() and adv.max() <= 1
    size = (adv - x).abs().max() if norm == "linf" else (adv - x).flatten(1).norm(dim=1).max()
    assert 0.5 * NORMS[norm] < size <= NORMS[norm] + 1e-6  # rounding of pixels near 1 is 2^-25


@both
@norms
def test_raises_the_loss_above_the_clean_image_and_the_start_for_every_sample(attack, norm, net, images):
    loss = ce(net)
    clean, start = loss(images), loss(random_start(images, SEEDS, norm, NORMS[norm]))
    assert (loss(run(attack, loss, images, norm)) > torch.maximum(clean, start)).all()


@both
@norms
def test_a_sample_does_not_depend_on_its_batch(attack, norm, net, images):
    whole = run(attack, ce(net), images, norm)
    order = torch.tensor([5, 2, 7, 0, 1, 6, 4, 3])
    permuted = run(attack, ce(net, LABELS[order]), images[order], norm, seeds=SEEDS[order])
    alone = torch.cat(
        [run(attack, ce(net, LABELS[i : i + 1]), images[i : i + 1], norm, seeds=SEEDS[i : i + 1]) for i in range(B)]
    )
    # A convolution may sum in another order for another batch size; float64 leaves 1e-10 for it.
    assert torch.allclose(whole[order], permuted, rtol=0, atol=1e-10)
    assert torch.allclose(whole, alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("attack,forwards", [(pgd, STEPS), (apgd, STEPS + 1)])
def test_costs_its_steps_and_leaves_no_gradient_behind(attack, forwards, net, images):
    calls, loss = [], ce(net)
    with torch.no_grad():
        adv = run(attack, lambda x: calls.append(x) or loss(x), images, "linf")
    assert len(calls) == forwards
    assert all(p.grad is None for p in net.parameters())
    assert not adv.requires_grad and images.grad is None


@both
@norms
def test_without_seeds_it_starts_at_the_images(attack, norm, net, images):
    seen, loss = [], ce(net)
    before = images.clone()
    run(attack, lambda x: seen.append(x.detach().clone()) or loss(x), images, norm, seeds=None)
    assert seen[0].equal(images) and images.equal(before)
    seen.clear()
    run(attack, lambda x: seen.append(x.detach().clone()) or loss(x), images, norm)
    assert seen[0].equal(random_start(images, SEEDS, norm, NORMS[norm]))


@both
@norms
def test_a_sample_without_gradient_stays_and_spoils_nothing(attack, norm, net, images):
    alive = (torch.arange(B) != 2).double()
    adv = run(attack, lambda x: ce(net)(x) * alive, images, norm, seeds=None)
    assert adv.isfinite().all() and adv[2].equal(images[2])
    assert (adv != images).flatten(1).any(1).tolist() == [i != 2 for i in range(B)]


@both
@norms
def test_eps_zero_returns_the_images(attack, norm, net, images):
    assert torch.allclose(run(attack, ce(net), images, norm, eps=0.0), images, rtol=0, atol=1e-15)


def test_projection_is_the_nearest_point_of_the_ball():
    x = torch.full((2, 1, 1, 2), 0.5, dtype=torch.float64)
    out = torch.tensor([[0.8, 0.9], [0.53, 0.46]], dtype=torch.float64).view(2, 1, 1, 2)  # 0.3, 0.4: of length 0.5
    assert torch.allclose(
        project(out, x, "l2", 0.1).flatten(1),
        torch.tensor([[0.56, 0.58], [0.53, 0.46]], dtype=torch.float64),
        atol=1e-15,
    )
    assert torch.allclose(
        project(out, x, "linf", 0.35).flatten(1),
        torch.tensor([[0.8, 0.85], [0.53, 0.46]], dtype=torch.float64),
        atol=1e-15,
    )
    assert project(x + 9, x, "linf", 3.0).max() == 1.0


# ---------------------------------------------------------------- PGD


def plain_pgd(loss_fn, images, start, norm, eps, step_size, steps, momentum, keep=lambda m: m):
    """Madry et al. 2018 with a momentum of normalised gradients, a sample at a time; `keep`: what is remembered."""
    out = []
    for i in range(len(images)):
        clean, x, m = images[i], start[i], torch.zeros_like(images[i])
        for _ in range(steps):
            batch = torch.stack([x if j == i else images[j] for j in range(len(images))]).requires_grad_()
            loss_fn(batch)[i].backward(inputs=batch)
            g = batch.grad[i]
            if norm == "linf":
                m = keep(momentum * m + g.sign())
                x = torch.clamp(torch.min(torch.max(x + step_size * m.sign(), clean - eps), clean + eps), 0, 1)
            else:
                m = keep(momentum * m + g / g.norm())
                d = x + step_size * m / m.norm() - clean
                x = torch.clamp(clean + d * min(1.0, eps / d.norm().item()), 0, 1)
        out.append(x)
    return torch.stack(out)


@norms
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("seeds", [SEEDS, None])
def test_pgd_is_the_papers(norm, momentum, seeds, net, images):
    loss, eps = ce(net), NORMS[norm]
    start = images if seeds is None else random_start(images, seeds, norm, eps)
    expected = plain_pgd(loss, images, start, norm, eps, eps / 4, STEPS, momentum)
    assert torch.allclose(run(pgd, loss, images, norm, momentum=momentum, seeds=seeds), expected, rtol=0, atol=1e-10)


def test_momentum_changes_the_attack_but_the_published_codes_is_none(net, images):
    """It keeps only the sign of its velocity: sign(0.9 * (+-1) + sign(g)) = sign(g), so momentum 0 reproduces it."""
    loss, eps = ce(net), NORMS["linf"]
    ours = run(pgd, loss, images, "linf", seeds=None)
    published = plain_pgd(loss, images, images, "linf", eps, eps / 4, STEPS, 0.9, keep=torch.sign)
    assert torch.allclose(ours, published, rtol=0, atol=1e-10)
    assert not torch.allclose(run(pgd, loss, images, "linf", seeds=None, momentum=0.9), published, rtol=0, atol=eps / 4)


# ---------------------------------------------------------------- APGD


def test_checkpoints_are_exact():
    # .22, then gaps .19 .16 .13 .10 .07 .06 .06: by hand
    assert step_size_checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert step_size_checkpoints(10) == [3, 5, 6, 7, 8, 9, 10, 10]
    p = [Fraction(0), Fraction(22, 100)]
    while p[-1] + Fraction(6, 100) <= 1:
        p.append(p[-1] + max(p[-1] - p[-2] - Fraction(3, 100), Fraction(6, 100)))
    for steps in range(1, 300):
        assert step_size_checkpoints(steps) == [math.ceil(q * steps) for q in p[1:]], steps


def algorithm1(loss_fn, images, start, norm, eps, steps, checks):
    """Croce & Hein 2020, algorithm 1, a sample at a time over lists f[k], eta[k] as in the paper -> largest losses."""

    def losses_and_gradients(x):
        x = x.clone().requires_grad_()
        f = loss_fn(x)
        return f.detach().tolist(), torch.autograd.grad(f.sum(), x)[0]

    def P(x, clean):
        d = (
            (x - clean).clamp(-eps, eps)
            if norm == "linf"
            else (x - clean) * min(1.0, eps / max((x - clean).norm().item(), 1e-12))
        )
        return (clean + d).clamp(0, 1)

    n, (f0, g) = len(images), losses_and_gradients(start)
    x, x_old, eta = list(start), list(start), [[2 * eps] for _ in range(n)]
    f, f_max = [[v] for v in f0], [[v] for v in f0]
    x_max, g_max, g = list(start), list(g), list(g)
    gained = [[] for _ in range(n)]
    for k in range(steps):
        for i in range(n):
            u = g[i].sign() if norm == "linf" else g[i] / g[i].norm()
            z = P(x[i] + eta[i][k] * u, images[i])
            a = 0.75 if k > 0 else 1.0
            x[i], x_old[i] = P(x[i] + a * (z - x[i]) + (1 - a) * (x[i] - x_old[i]), images[i]), x[i]
        f_new, g_new = losses_and_gradients(torch.stack(x))
        for i in range(n):
            gained[i].append(f_new[i] > f[i][-1])
            f[i].append(f_new[i])
            g[i] = g_new[i]
            f_max[i].append(max(f_max[i][-1], f_new[i]))
            if f_new[i] > f_max[i][-2]:
                x_max[i], g_max[i] = x[i], g[i]
            eta[i].append(eta[i][k])
            if k + 1 in checks:
                w, w_old = k + 1, max([c for c in checks if c < k + 1], default=0)
                condition1 = sum(gained[i][w_old:w]) < 0.75 * (w - w_old)
                condition2 = eta[i][max(w_old - 1, 0)] == eta[i][w - 1] and f_max[i][w_old] == f_max[i][w]
                if condition1 or condition2:
                    eta[i][-1] /= 2
                    x[i], g[i], f[i][-1] = x_max[i], g_max[i], f_max[i][-1]
    return torch.tensor([m[-1] for m in f_max], dtype=torch.float64), torch.stack(x_max), eta


@norms
@pytest.mark.parametrize("seeds", [SEEDS, None])
def test_apgd_is_algorithm_1_of_its_paper(norm, seeds, net, images):
    loss, eps, steps = ce(net), NORMS[norm], 50
    start = images if seeds is None else random_start(images, seeds, norm, eps)
    best, points, eta = algorithm1(loss, images, start, norm, eps, steps, [11, 21, 29, 35, 40, 44, 47, 50])
    assert len({e[-1] for e in eta}) > 1, "every sample halves its step equally often: a weak test"
    adv = run(apgd, loss, images, norm, steps=steps, seeds=seeds)
    assert torch.allclose(loss(adv), best, rtol=1e-9)
    assert torch.allclose(adv, points, rtol=0, atol=1e-9)


def test_apgd_follows_the_paper_through_any_sequence_of_losses():
    """Scripted losses, climbing with sudden falls, reach every branch of the step-size rule."""
    n, steps, rng = 200, 50, torch.Generator().manual_seed(0)
    falls, size = torch.rand(2, steps + 1, n, generator=rng, dtype=torch.float64)
    values = torch.where(falls < 0.12, -4 * size, size).cumsum(0)
    directions = torch.randn(steps + 1, n, 1, 2, 2, generator=rng, dtype=torch.float64)
    grey = torch.full((n, 1, 2, 2), 0.5, dtype=torch.float64)

    def script(seen):
        def loss_fn(x):
            slope = (x * directions[len(seen)]).flatten(1).sum(1)
            seen.append(x.detach().clone())
            return values[len(seen) - 1] + slope - slope.detach()

        return loss_fn

    ours, paper = [], []
    apgd(script(ours), grey, norm="linf", eps=0.1, steps=steps)
    _, _, eta = algorithm1(script(paper), grey, grey, "linf", 0.1, steps, [11, 21, 29, 35, 40, 44, 47, 50])
    assert len({e[-1] for e in eta}) >= 5, "the script reaches too few cases"
    assert torch.allclose(torch.stack(ours), torch.stack(paper), rtol=0, atol=1e-12)


@norms
def test_apgd_returns_each_samples_largest_loss_of_all_it_saw(norm, net, images):
    seen, loss = [], ce(net)
    adv = run(
        apgd, lambda x: seen.append(loss(x)) or seen[-1], images, norm, steps=200
    )  # the last checkpoint is at 198
    assert loss(adv).equal(torch.stack(seen).amax(0))


@norms
def test_apgd_is_at_least_as_strong_as_pgd_of_equal_steps(norm, net, images):
    loss = ce(net)
    ours = loss(run(apgd, loss, images, norm, steps=40))
    other = loss(run(pgd, loss, images, norm, steps=40, step_size=2.5 * NORMS[norm] / 40))
    assert ours.mean() >= other.mean()


@pytest.mark.parametrize("norm,theirs", [("linf", "Linf"), ("l2", "L2")])
def test_apgd_fools_the_samples_that_autoattacks_apgd_fools(norm, theirs, net):
    n = 128
    x = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(2))
    net = copy.deepcopy(net).float()
    y = net(x).argmax(1)
    eps = NORMS[norm] / 4
    adv = apgd(ce(net, y), x, norm=norm, eps=eps, steps=50, seeds=torch.arange(n))
    library = APGDAttack(net, n_iter=50, norm=theirs, eps=eps, seed=0, loss="ce", device="cpu")
    ours, other = (net(a).argmax(1) != y for a in (adv, library.perturb(x, y)))
    assert 0.2 * n < ours.sum() < 0.8 * n, "the sizes are badly chosen: nothing to compare"
    assert (ours == other).float().mean() > 0.98  # other random starts: a sample on the edge may differ


def test_a_loss_that_is_once_nan_does_not_keep_apgd_from_better_iterates():
    asked = []

    def loss(x):
        asked.append(x)
        return x.flatten(1).sum(1) * (float("nan") if len(asked) == 2 else 1.0)

    images = torch.full((1, 3, 2, 2), 0.5)
    adv = apgd(loss, images, norm="linf", eps=0.1, steps=5)
    torch.testing.assert_close(adv, images + 0.1)
