"""fdistill.py against closed forms, quadrature and itself."""
import math

import numpy as np
import pytest
import torch

import common
import fdistill
from common import GaussianMixture, karras, uniform
from conftest import check_resume, flat
from fdistill import (WEIGHTS, Config, balance_ratio, density_ratio, discriminator_loss,
                      f_distill_loss, train)

F64 = torch.float64
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


def quick(**kw):
    """A run of a second: tiny networks, few steps."""
    return Config(**{**dict(device="cpu", steps=4, batch=32, width=16, teacher_steps=20, samples=200,
                            every=2, out="run"), **kw})


def pure(x, d_real, r, name):
    """f_distill_loss's two normalisers, (B, 1): what its gradient is divided by."""
    n = (x.detach() - d_real).abs().mean(1, keepdim=True)
    return n * (WEIGHTS[name](r).mean() + 1e-6)


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
    """
    1-D teacher N(0, 1), student x = m + s z: the loss's gradient, normalisers multiplied back, is
    the derivative in m and s of int q f(p / q) of the noised densities.
    """
    m = torch.tensor(0.7, dtype=F64, requires_grad=True)
    s = torch.tensor(0.8, dtype=F64, requires_grad=True)
    grid = torch.linspace(-14, 14, 40001, dtype=F64)

    def log_normal(x, mean, var):
        return -(x - mean) ** 2 / (2 * var) - 0.5 * (2 * math.pi * var).log()

    log_q = log_normal(grid, m, s**2 + sigma**2)
    log_r = log_normal(grid, 0, torch.tensor(1 + sigma**2, dtype=F64)) - log_q
    inside = log_q > -200                                       # beyond, q underflows
    f = F[name](log_r[inside].exp())
    value = torch.trapezoid(log_q[inside].exp() * f, grid[inside])
    want = torch.stack(torch.autograd.grad(value, (m, s)))

    nodes, weights = np.polynomial.hermite_e.hermegauss(60)     # over z and eps
    nodes, weights = torch.tensor(nodes), torch.tensor(weights / weights.sum())
    z, eps = nodes.repeat_interleave(60)[:, None], nodes.repeat(60)[:, None]
    w = (weights[:, None] * weights).flatten()
    x = (m.detach() + s.detach() * z).requires_grad_()
    x_t, level = (x + sigma * eps).detach(), torch.full((3600, 1), sigma, dtype=F64)
    p = GaussianMixture(torch.zeros(1, 1, dtype=F64), 1.0)
    q = GaussianMixture(m.detach().reshape(1, 1), 0.8)
    d_real, d_fake = p(x_t, level), q(x_t, level)
    r = (p.log_prob(x_t, level) - q.log_prob(x_t, level)).exp()
    f_distill_loss(x, d_real, d_fake, r, name).sum().backward()
    g = (x.grad * pure(x, d_real, r, name) / sigma**2)[:, 0]
    got = torch.stack([(w * g).sum(), (w * g * z[:, 0]).sum()])
    torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", WEIGHTS)
def test_stationary_where_fake_equals_teacher(name):
    x, d = torch.randn(16, 2, requires_grad=True), torch.randn(16, 2)
    loss = f_distill_loss(x, d, d.clone(), torch.rand(16) + 0.1, name)
    loss.sum().backward()
    assert (x.grad == 0).all() and (loss == 0).all()


def test_no_divergence_takes_larger_steps():
    """The batch mean of the weights is 1, whatever f."""
    x, r = torch.zeros(1000, 1, requires_grad=True), torch.rand(1000) * 5 + 0.1
    for name in WEIGHTS:
        x.grad = None
        f_distill_loss(x, torch.ones(1000, 1), 2 * torch.ones(1000, 1), r, name).sum().backward()
        assert abs(x.grad.mean() - 1) < 1e-4


def test_discriminator_optimum_is_the_log_ratio():
    """Expected logistic loss under p (real) and q (student) is least at log p / q."""
    p = torch.tensor([0.1, 0.2, 0.7], dtype=F64)
    q = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
    logit, never = (p / q).log().requires_grad_(), torch.full_like(p, 1e9)
    expected = p * discriminator_loss(logit, -never) + q * discriminator_loss(never, logit)
    grad, = torch.autograd.grad(expected.sum(), logit)
    assert grad.abs().max() < 1e-12
    torch.testing.assert_close(density_ratio(logit), (p / q).clamp(0.1, 20))


def test_density_ratio_is_clamped():
    got = density_ratio(torch.tensor([-50.0, 0.0, 50.0])).tolist()
    assert got == pytest.approx([0.1, 1.0, 20.0])


def test_ratio_bins():
    """Every bin's mean becomes 1; empty bins keep their memory; ratio_ema mixes old and new."""
    u, r, means = torch.rand(4000) * 0.5, torch.rand(4000) + 0.1, torch.full((10,), 3.0)
    out = balance_ratio(r, u, means, ratio_ema=0.0)
    for k in range(5):
        assert abs(out[(u * 10).long() == k].mean() - 1) < 1e-3
    assert (means[5:] == 3).all() and (means[:5] < 1).all()
    mixed = torch.full((10,), 3.0)
    balance_ratio(r, u, mixed, ratio_ema=0.5)
    torch.testing.assert_close(mixed, (3 + means) / 2)


# ---- the paper's claim ----

TWO = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), 0.2, weights=[1, 3])


def fit_affine(name, steps=600, batch=1024):
    """(m (2,), A (2, 2)) minimising the divergence between TWO and m + A z, noised up to 0.5."""
    m, a = torch.tensor([0.4, 0.1]).requires_grad_(), (0.6 * torch.eye(2)).requires_grad_()
    opt = torch.optim.Adam([m, a])
    for step in range(steps):
        opt.param_groups[0]["lr"] = 0.02 * (1 - step / steps)
        z = torch.randn(batch, 2)
        x = m + z @ a.T
        sigma = karras(uniform(x), 0.05, 0.5)
        with torch.no_grad():
            x_t = x + sigma * torch.randn(batch, 2)
            noised = a @ a.T + sigma[..., None] ** 2 * torch.eye(2)     # covariance of x_t, (B, 2, 2)
            d_fake = m + (a @ a.T @ torch.linalg.solve(noised, (x_t - m)[..., None]))[..., 0]
            log_q = torch.distributions.MultivariateNormal(m, noised).log_prob(x_t)
            r = (TWO.log_prob(x_t, sigma) - log_q).clamp(-10, 10).exp()
            d_real = TWO(x_t, sigma)
            plain = (x - d_real).abs().mean(1) / sigma[:, 0] ** 2       # instead of DMD's weight
        (0.1 * plain * f_distill_loss(x, d_real, d_fake, r, name)).mean().backward()
        opt.step()
        opt.zero_grad()
    return m.detach(), (a @ a.T).detach()


def test_reverse_kl_seeks_forward_kl_covers():
    """
    An affine student on two modes of weight 1 : 3 at -1 and 1, std 0.2. Forward KL must match the
    moments, mean 0.5 and variance 0.04 + 0.75; reverse KL must sit on the heavier mode;
    Jensen-Shannon lies between.
    """
    got = {}
    for name in ("rkl", "js", "fkl"):
        m, cov = fit_affine(name)
        got[name] = m[0].item(), cov[0, 0].sqrt().item()
        assert abs(m[1]) < 0.02 and abs(cov[1, 1].sqrt() - 0.2) < 0.01
    assert got["fkl"] == pytest.approx((0.5, 0.79**0.5), abs=0.04)
    assert got["rkl"] == pytest.approx((1.0, 0.2), abs=0.02)
    assert got["fkl"][0] + 0.02 < got["js"][0] < got["rkl"][0] - 0.2
    assert got["rkl"][1] + 0.2 < got["js"][1] < got["fkl"][1] - 0.02


# ---- the loop ----


def test_accumulated_gradients_are_those_of_the_whole_batch(no_pictures):
    """Reverse KL: parts of a batch with the same draws add up to the whole; only rounding differs."""
    torch.manual_seed(0)
    x, d_real, d_fake = torch.randn(3, 32, 2)
    x.requires_grad_()
    whole, = torch.autograd.grad(f_distill_loss(x, d_real, d_fake, torch.ones(32), "rkl").mean(), x)
    total = 0
    for i in range(0, 32, 8):
        part = slice(i, i + 8)
        loss = f_distill_loss(x[part], d_real[part], d_fake[part], torch.ones(8), "rkl").mean() / 4
        total = total + torch.autograd.grad(loss, x)[0]
    torch.testing.assert_close(total, whole)
    G, run = train(quick(accumulate=4))
    assert run.part == 8 and flat(G).isfinite().all()


@pytest.mark.parametrize("kw", [dict(cond=True), dict(ratio_ema=0.5, divergence="fkl")])
def test_resume_is_bit_exact(no_pictures, kw):
    check_resume(train, quick, **kw)


def test_same_seed_same_student_other_seed_other(no_pictures):
    a, b, c = [flat(train(quick(out=f"r{i}", seed=seed))[0]) for i, seed in enumerate((0, 0, 1))]
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_reverse_kl_without_gan_reads_no_data(no_pictures):
    """Its student is the same whatever the discriminator says: the ratio is not needed."""
    a, b = [flat(train(quick(divergence="rkl", gan_weight=0.0, disc_weight=w, out=f"r{w}"))[0])
            for w in (0.1, 0.5)]
    assert torch.equal(a, b)


def test_short_conditional_run_learns_the_ring(no_pictures):
    """A sixth of the default run has all modes, each where its label says; labels as in the data."""
    cfg = Config(device="cpu", cond=True, steps=150, batch=256, teacher_steps=400, samples=3000,
                 out="run")
    student, run = train(cfg)
    metrics = common.read_json(run.dir / "metrics.json")
    assert metrics["H"] < 0.006 and metrics["mode_min"] > 0.5, metrics
    label = torch.eye(8).repeat(100, 1)
    near = torch.cdist(fdistill.sample(student, 800, label), common.TOYS["ring"].means).argmin(1)
    assert (near == label.argmax(1)).float().mean() > 0.9
    with pytest.raises(common.UserError, match="conditional"):
        student.label_dim = 0
        fdistill.sample(student, 2, torch.eye(2))


def test_images_end_to_end(no_pictures):
    """A few steps on images: a conditional student of 28x28 grey pixels, in parts."""
    data = common.Images(torch.randint(256, (40, 1, 28, 28), dtype=torch.uint8),
                         torch.arange(40) % 4, 4)
    cfg = Config(data="mnist", device="cpu", width=8, steps=2, batch=8, accumulate=2, teacher_steps=2,
                 out="run")
    student, _ = train(cfg, data=data)
    x = fdistill.sample(student, 3)
    assert x.shape == (3, 1, 28, 28) and x.isfinite().all()
    assert fdistill.sample(common.load_denoiser("run", cfg), 3).shape == (3, 1, 28, 28)
