"""sim.py against closed forms, quadrature and itself: gradients, the detached mistake, SiD."""
import math

import numpy as np
import pytest
import torch

import common
import sim
from common import GaussianMixture
from conftest import check_resume, flat
from sim import Config, sim_loss, train

F64 = torch.float64


def quick(**kw):
    """A run of a second: tiny networks, few steps."""
    return Config(**{**dict(device="cpu", steps=4, batch=32, width=16, teacher_steps=20, samples=200,
                            every=2, out="run"), **kw})


# ---- the loss ----
# 1-D throughout: teacher N(0, 1), student x = m + s z with m = 0.7, s = 0.8, the fake score exact.

P = GaussianMixture(torch.zeros(1, 1, dtype=F64), 1.0)
Q = GaussianMixture(torch.full((1, 1), 0.7, dtype=F64), 0.8)


def divergence_gradient(sigma, kind, c, law_varies):
    """d/d(m, s) of int q(x_t) d(y(x_t)) by quadrature; the sampling law q moves too, or is frozen."""
    m = torch.tensor(0.7, dtype=F64, requires_grad=True)
    s = torch.tensor(0.8, dtype=F64, requires_grad=True)
    x_t = torch.linspace(-14, 14, 40001, dtype=F64)
    var = s**2 + sigma**2
    log_q = -(x_t - m) ** 2 / (2 * var) - 0.5 * (2 * math.pi * var).log()
    y = m + s**2 / var * (x_t - m) - x_t / (1 + sigma**2)
    d = y**2 if kind == "l2" else (y**2 + c**2).sqrt() - c
    q = log_q.exp() if law_varies else log_q.exp().detach()
    return torch.stack(torch.autograd.grad(torch.trapezoid(q * d, x_t), (m, s)))


def loss_gradient(sigma, loss):
    """d/d(m, s) of E loss(x, d_real, d_fake) by Gauss-Hermite, the normaliser multiplied back."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    nodes, weights = torch.tensor(nodes), torch.tensor(weights / weights.sum())
    z, eps = nodes.repeat_interleave(80)[:, None], nodes.repeat(80)[:, None]
    x = (0.7 + 0.8 * z).requires_grad_()
    x_t, level = x + sigma * eps, torch.full((6400, 1), sigma, dtype=F64)
    d_real, d_fake = P(x_t, level), Q(x_t, level)
    loss(x, d_real, d_fake).sum().backward()
    g = (weights[:, None] * weights).flatten() * (x.grad * (x - d_real).abs().detach())[:, 0]
    return torch.stack([g.sum(), (g * z[:, 0]).sum()])


@pytest.mark.parametrize("kind, c", [("l2", 1.0), ("huber", 0.3)])
@pytest.mark.parametrize("sigma", [0.3, 1.0])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_gradient_against_quadrature(kind, c, sigma, alpha):
    """
    alpha 1 is the gradient of E d(y) with the law of x_t frozen, alpha 0.5 with the law varying,
    any other alpha the combination frozen + 2 (1 - alpha) (varying - frozen), SiD's 1.2 included.
    """
    frozen = divergence_gradient(sigma, kind, c, law_varies=False)
    varying = divergence_gradient(sigma, kind, c, law_varies=True)
    got = loss_gradient(sigma, lambda *views: sim_loss(*views, kind, c, alpha))
    want = frozen + 2 * (1 - alpha) * (varying - frozen)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
    assert (varying - frozen).abs().min() > 1e-3            # the three alphas are told apart


@pytest.mark.parametrize("kind, c", [("l2", 1.0), ("huber", 0.3)])
def test_detached_networks_are_caught(kind, c):
    """y without its gradient in x_t: right in the mean, half in the scale. The loss is right."""
    want = divergence_gradient(1.0, kind, c, law_varies=False)
    right = loss_gradient(1.0, lambda *views: sim_loss(*views, kind, c, 1.0))

    def detached(x, d_real, d_fake):
        _, slope = sim.distance((d_fake - d_real).detach(), kind, c)
        return -(slope * (d_fake - x)).sum(1) / (x - d_real).detach().abs().mean(1)

    wrong = loss_gradient(1.0, detached)
    torch.testing.assert_close(right, want, rtol=1e-3, atol=1e-5)
    assert abs(wrong[0] / want[0] - 1) < 1e-3 and abs(wrong[1] / want[1] - 0.5) < 1e-3


def test_published_values():
    """At sigma 0.5, in units of the score: Fisher (0.897, -0.996), SIM with l2 (1.258, -1.165)."""
    for alpha, want in ((0.5, (0.897, -0.996)), (1.0, (1.258, -1.165))):
        got = loss_gradient(0.5, lambda *views: sim_loss(*views, "l2", 1.0, alpha)) / 0.5**4
        assert (got - torch.tensor(want)).abs().max() < 2e-3


def sid_loss(x, d_real, d_fake, alpha):
    """SiD's loss as its paper writes it, per sample."""
    per_element = (d_real - d_fake) * ((d_real - x) - alpha * (d_real - d_fake))
    size = (x - d_real).detach().abs().flatten(1).mean(1).clamp(min=1e-5)
    return per_element.flatten(1).sum(1) / size


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_l2_is_twice_sid(alpha):
    """Value and gradient, for any alpha; images as well as points."""
    x = torch.randn(8, 3, 4, 4, dtype=F64, requires_grad=True)
    teacher = torch.nn.Conv2d(3, 3, 3, padding=1).double()
    ours = sim_loss(x, teacher(x), torch.tanh(x), "l2", 1.0, alpha)
    theirs = 2 * sid_loss(x, teacher(x), torch.tanh(x), alpha)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*[torch.autograd.grad(part.sum(), x)[0] for part in (ours, theirs)])


def test_distances():
    """d' is the gradient of d; pseudo-Huber is |y| far out and |y|^2 / 2c near 0."""
    for kind in ("l2", "huber"):
        y = torch.randn(6, 2, 3, dtype=F64, requires_grad=True)
        d, slope = sim.distance(y, kind, 0.4)
        torch.testing.assert_close(slope, torch.autograd.grad(d.sum(), y)[0])
    y = torch.randn(6, 5, dtype=F64)
    far, near = sim.distance(1e6 * y, "huber", 0.4)[0], sim.distance(1e-4 * y, "huber", 0.4)[0]
    torch.testing.assert_close(far, 1e6 * y.norm(dim=1), rtol=1e-6, atol=1)
    torch.testing.assert_close(near, 1e-8 * y.square().sum(1) / 0.8, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["l2", "huber"])
def test_stationary_where_fake_equals_teacher(kind):
    """The student does not move where both networks are one, although gradients pass through both."""
    net = common.Denoiser(common.MLP(width=16))
    x, sigma = torch.randn(16, 2, requires_grad=True), torch.rand(16, 1) + 0.1
    x_t = x + sigma * torch.randn(16, 2)
    loss = sim_loss(x, net(x_t, sigma), net(x_t, sigma), kind, 0.1, 1.2)
    loss.sum().backward()
    assert (loss == 0).all() and x.grad.abs().max() < 1e-5


def test_loss_is_finite_at_its_corners():
    """x on the teacher's estimate, and y = 0."""
    x = torch.zeros(4, 2, requires_grad=True)
    loss = sim_loss(x, x * 1.0, x * 0.5, "huber", 0.01, 1.2)
    loss.sum().backward()
    assert loss.isfinite().all() and x.grad.isfinite().all()


# ---- the loop ----


def test_gradients_pass_through_both_networks(monkeypatch, no_pictures):
    """d_real and d_fake depend on x; when one network is stepped, the other has no gradient."""
    loss, nets, student = sim.sim_loss, [], sim.initial_student

    def spy(x, d_real, d_fake, *args):
        for d in (d_real, d_fake):
            assert torch.autograd.grad(d.sum(), x, retain_graph=True)[0].abs().max() > 0
        return loss(x, d_real, d_fake, *args)

    def remember(*args):
        nets.append(student(*args))
        return nets[-1]

    def step(optimizer, *args):
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for net in nets:
            assert all((p.grad is not None) == (id(p) in mine) for p in net.parameters())

    data = common.load_data(quick())
    common.load_teacher(quick(), data)
    monkeypatch.setattr(sim, "sim_loss", spy)
    monkeypatch.setattr(sim, "initial_student", remember)
    monkeypatch.setattr(torch.optim.Adam, "step", step)
    train(quick(fake_updates=1))
    assert len(nets) == 2


def test_no_data_is_touched(no_pictures, monkeypatch):
    """With a teacher at hand, the loop reads no sample."""
    cfg = quick(cond=True)
    data = common.load_data(cfg)
    teacher = common.load_teacher(cfg, data)
    z = torch.randn(8, 2)
    monkeypatch.setattr(sim, "gallery", lambda *args: ({}, z, torch.eye(8)))
    monkeypatch.setattr(common.GaussianMixture, "sample", None)
    monkeypatch.setattr(common.Run, "report", lambda *args, **kw: None)
    assert flat(train(cfg, data, teacher)[0]).isfinite().all()


@pytest.mark.parametrize("kw", [dict(cond=True), dict(distance="huber", alpha=1.0)])
def test_resume_is_bit_exact(no_pictures, kw):
    check_resume(train, quick, **kw)


def test_short_run_learns_the_ring(no_pictures):
    """A fifth of the default run has all eight modes; without one H is 0.009."""
    _, run = train(Config(device="cpu", steps=200, batch=256, teacher_steps=400, samples=3000,
                          out="run"))
    metrics = common.read_json(run.dir / "metrics.json")
    assert metrics["H"] < 0.006 and metrics["mode_min"] > 0.5, metrics


@pytest.mark.parametrize("wrong, says", [(dict(c=0.0), "--c"), (dict(u_max=1.5), "u_max"),
                                         (dict(fake_updates=0), "fake_updates")])
def test_bad_input(wrong, says):
    """Impossible settings end in one sentence, before anything is written."""
    with pytest.raises(common.UserError, match=says):
        train(quick(**wrong))
    assert not common.Path("run").exists() and not common.Path("runs").exists()


def test_images_end_to_end(no_pictures):
    """A few steps on images, in parts."""
    data = torch.rand(40, 3, 16, 16) * 2 - 1
    cfg = Config(data="images", device="cpu", width=8, steps=2, batch=8, accumulate=2,
                 teacher_steps=2, out="run")
    student, _ = train(cfg, data=data)
    assert sim.sample(student, 3).shape == (3, 3, 16, 16)
