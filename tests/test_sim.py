"""sim.py against quadrature and itself: gradients, SiD, the loop."""
from pathlib import Path

import pytest
import torch

import common
import sim
from conftest import F64, TINY, divergence_slope, flat, student_slope
from sim import Config, sim_loss, train

pytestmark = pytest.mark.usefixtures("no_pictures")


def quick(**flags):
    return Config(**(TINY | flags))


# ---- the loss ----


@pytest.mark.parametrize("kind, d", [("l2", lambda r, y: y**2),
                                     ("huber", lambda r, y: (y**2 + 0.09).sqrt() - 0.3)])
@pytest.mark.parametrize("sigma", [0.3, 1.0])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_gradient_against_quadrature(kind, d, sigma, alpha):
    """
    alpha 1 is the gradient of E d(y) with the law of x_t frozen, alpha 0.5 with the law varying,
    any other alpha the combination frozen + 2 (1 - alpha) (varying - frozen), SiD's 1.2 included.
    """
    def loss(x, d_real, d_fake, r):
        return sim_loss(x, d_real, d_fake, kind, 0.3, alpha)

    frozen, varying = divergence_slope(d, sigma, frozen=True), divergence_slope(d, sigma)
    want = frozen + 2 * (1 - alpha) * (varying - frozen)
    got = student_slope(loss, sigma, attached=True)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
    assert (varying - frozen).abs().min() > 1e-3        # the three alphas are told apart


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_l2_is_twice_sid(alpha):
    """As SiD's paper writes it, with its code's normaliser: value and gradient, for any alpha."""
    x = torch.randn(8, 3, 4, 4, dtype=F64, requires_grad=True)
    d_real, d_fake = torch.nn.Conv2d(3, 3, 3, padding=1).double()(x), torch.tanh(x)
    per_element = (d_real - d_fake) * ((d_real - x) - alpha * (d_real - d_fake))
    sid = per_element.sum((1, 2, 3)) / (x - d_real).detach().abs().mean((1, 2, 3))
    ours = sim_loss(x, d_real, d_fake, "l2", 1.0, alpha)
    torch.testing.assert_close(ours, 2 * sid)
    slopes = [torch.autograd.grad(loss.sum(), x, retain_graph=True)[0] for loss in (ours, 2 * sid)]
    torch.testing.assert_close(*slopes)


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


def test_loss_is_finite_at_its_corners():
    """x on the teacher's estimate, and y = 0."""
    x = torch.zeros(4, 2, requires_grad=True)
    loss = sim_loss(x, x * 1.0, x * 0.5, "huber", 0.01, 1.2)
    loss.sum().backward()
    assert loss.isfinite().all() and x.grad.isfinite().all()


# ---- the loop ----


def test_gradients_pass_through_both_networks(monkeypatch):
    """To x, up to --u_max's level and by --distance; the fake score is left without a gradient."""
    def spy(x, d_real, d_fake, *settings):
        for d in (d_real, d_fake):
            assert torch.autograd.grad(d.sum(), x, retain_graph=True)[0].abs().max() > 0
        seen.append(settings)
        return sim_loss(x, d_real, d_fake, *settings)

    def teacher(x_t, sigma, label=None):
        levels.append(sigma.max())
        return x_t / (1 + sigma**2)

    seen, levels, cfg = [], [], quick(distance="huber", c=0.2, alpha=0.7, u_max=0.5)
    network = common.build(cfg, common.load_data(cfg))
    monkeypatch.setattr(sim, "sim_loss", spy)
    _, run = train(cfg, None, teacher, network)
    assert set(seen) == {("huber", 0.2, 0.7)} and len(seen) == 4
    assert max(levels[-4:]) <= common.karras(0.5, 0.02, 5.0)
    assert all(p.grad is None for p in run.state["fake"].parameters())


def test_no_data_is_touched(monkeypatch):
    """With a teacher at hand, the loop reads no sample."""
    cfg = quick(cond=True)
    data = common.load_data(cfg)
    teacher = common.load_teacher(cfg, data)
    monkeypatch.setattr(common.GaussianMixture, "sample", None)
    monkeypatch.setattr(common.Run, "report", lambda *_: None)
    student, _ = train(cfg, data, teacher)
    assert (flat(student) - flat(teacher)).abs().max() > 1e-4


def test_a_teacher_must_pass_gradients_on():
    """One that is wrapped for inference would silently train another loss."""
    teacher = torch.no_grad()(lambda x_t, sigma, label=None: x_t / (1 + sigma**2))
    with pytest.raises(common.UserError, match="no_grad"):
        train(quick(), None, teacher)


@pytest.mark.parametrize("flags, words", [(dict(c=0.0), "--c"), (dict(u_max=1.5), "u_max"),
                                          (dict(fake_updates=0), "fake_updates")])
def test_bad_input_before_any_work(flags, words):
    with pytest.raises(common.UserError, match=words):
        train(quick(**flags))
    assert not Path("runs").exists()
