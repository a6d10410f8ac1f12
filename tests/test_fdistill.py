"""fdistill.py against quadrature and itself."""
import pytest
import torch

from conftest import F64, TINY, divergence_slope, flat, student_slope
from fdistill import (WEIGHTS, Config, balance_ratio, density_ratio, discriminator_loss,
                      f_distill_loss, train)

pytestmark = pytest.mark.usefixtures("no_pictures")
# f of D_f(p || q) = E_q[f(p / q)], of which fdistill.py knows h(r) = r^2 f''(r) alone
F = {
    "rkl": lambda r: -r.log(),
    "fkl": lambda r: r * r.log(),
    "js": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "srkl": lambda r: (r + 1) * (0.5 + 0.5 / r).log(),
    "hellinger": lambda r: 1 - r.sqrt(),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "neyman": lambda r: (1 - r) ** 2 / r,
}


def quick(**flags):
    return Config(**(TINY | flags))


# ---- the losses ----


@pytest.mark.parametrize("name", WEIGHTS)
def test_h_is_r_squared_times_the_second_derivative_of_f(name):
    r = torch.linspace(0.05, 20, 500, dtype=F64).requires_grad_()
    slope, = torch.autograd.grad(F[name](r).sum(), r, create_graph=True)
    curvature, = torch.autograd.grad(slope.sum(), r)
    torch.testing.assert_close(WEIGHTS[name](r), r**2 * curvature)


@pytest.mark.parametrize("sigma", [0.1, 1.0])
@pytest.mark.parametrize("name", WEIGHTS)
def test_gradient_against_quadrature(name, sigma):
    """The loss's gradient, its normalisers multiplied back, is the f-divergence's (Theorem 1)."""
    def loss(x, d_real, d_fake, r):
        size = (x - d_real).abs()[:, 0].detach() * (WEIGHTS[name](r).mean() + 1e-6)
        return size * f_distill_loss(x, d_real, d_fake, r, name) / sigma**2

    want = divergence_slope(lambda r, y: F[name](r), sigma)
    torch.testing.assert_close(student_slope(loss, sigma), want, rtol=2e-3, atol=2e-4)


def test_discriminator_optimum_is_the_log_ratio():
    """Expected logistic loss under p (real), q (student) is least at log p / q; r is clamped."""
    p = torch.tensor([0.1, 0.2, 0.7], dtype=F64)
    q = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
    logit, never = (p / q).log().requires_grad_(), torch.full_like(p, 1e9)
    expected = p * discriminator_loss(logit, -never) + q * discriminator_loss(never, logit)
    grad, = torch.autograd.grad(expected.sum(), logit)
    assert grad.abs().max() < 1e-12
    torch.testing.assert_close(density_ratio(logit), p / q)
    assert density_ratio(torch.tensor([-50.0, 50.0])).tolist() == pytest.approx([0.1, 20.0])


def test_ratio_bins():
    """Every bin's mean becomes 1; empty bins keep their memory; ratio_ema mixes old and new."""
    u, r, means = torch.rand(4000) * 0.5, torch.rand(4000) + 0.1, torch.full((10,), 3.0)
    out = balance_ratio(r, u, means, ratio_ema=0.0)
    for k in range(5):
        assert abs(out[(u * 10).long() == k].mean() - 1) < 1e-3
    assert (means[5:] == 3).all() and (means[:5] < 1).all()
    mixed = torch.full((10,), 3.0)
    balance_ratio(r, u, mixed, ratio_ema=0.25)
    torch.testing.assert_close(mixed, 0.25 * 3 + 0.75 * means)


# ---- the loop ----


def test_when_the_ratio_is_needed():
    """The discriminator's loss matters to any student but that of reverse KL without a GAN."""
    for flags, needed in ((dict(divergence="rkl", gan_weight=0.0), False),
                          (dict(divergence="rkl"), True), (dict(gan_weight=0.0), True)):
        cfgs = [quick(disc_weight=w, **flags) for w in (0.1, 0.5)]
        a, b = [flat(train(cfg)[0]) for cfg in cfgs]
        assert torch.equal(a, b) != needed


def test_another_seed_gives_another_student():
    a, b = [flat(train(quick(seed=seed))[0]) for seed in (0, 1)]
    assert not torch.equal(a, b)
