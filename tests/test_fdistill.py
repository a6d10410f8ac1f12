"""fdistill.py against closed forms, quadrature and itself: gradients, ratio, micro-batches, conditional, resume, claims."""
import dataclasses
import json
import math

import numpy as np
import pytest
import torch

import common
import fdistill
from common import F_DIVERGENCES, GaussianMixture, UserError, energy_coefficient
from conftest import TinyInception, check_micro, check_resume, flat
from fdistill import Config, balance_ratio, density_ratio, discriminator_loss, f_distill_loss, train
from mode_seeking import TWO, fit_affine
from test_common import write_cifar

F64 = torch.float64


def quick(**kw):
    """A run of a second: tiny networks, few steps."""
    return Config(**{**dict(device="cpu", steps=4, batch=32, width=16, teacher_steps=20, samples=200, every=2, out="run"), **kw})


# ---- the losses ----


@pytest.mark.parametrize("divergence", F_DIVERGENCES)
@pytest.mark.parametrize("sigma", [0.1, 1.0])
def test_gradient_against_quadrature(divergence, sigma):
    """
    1-D teacher N(0, 1), student x = m + s z: the loss's gradient, its two normalisers multiplied back, equals the
    derivative in m and s of D_f(p || q) = int q f(p / q) of the noised densities, computed by quadrature.
    """
    m, s = torch.tensor(0.7, dtype=F64, requires_grad=True), torch.tensor(0.8, dtype=F64, requires_grad=True)
    grid = torch.linspace(-14, 14, 40001, dtype=F64)
    log_normal = lambda x, mean, var: -(x - mean) ** 2 / (2 * var) - 0.5 * (2 * math.pi * var).log()
    log_q = log_normal(grid, m, s**2 + sigma**2)
    log_r = log_normal(grid, 0, torch.tensor(1 + sigma**2, dtype=F64)) - log_q
    inside = log_q > -200                                       # beyond, q underflows and r overflows
    f = F_DIVERGENCES[divergence].f(log_r[inside].exp())
    want = torch.autograd.grad(torch.trapezoid(log_q[inside].exp() * f, grid[inside]), (m, s))

    nodes, weights = np.polynomial.hermite_e.hermegauss(60)     # over z and eps
    nodes, weights = torch.tensor(nodes), torch.tensor(weights / weights.sum())
    z, eps, w = nodes.repeat_interleave(60)[:, None], nodes.repeat(60)[:, None], (weights[:, None] * weights).flatten()
    x = (m.detach() + s.detach() * z).requires_grad_()
    x_t, level = (x + sigma * eps).detach(), torch.full((3600,), sigma, dtype=F64)
    p, q = GaussianMixture(torch.zeros(1, 1, dtype=F64), 1.0), GaussianMixture(m.detach().reshape(1, 1), 0.8)
    d_real, d_fake = p.denoise(x_t, level), q.denoise(x_t, level)
    r = (p.log_prob(x_t, level) - q.log_prob(x_t, level)).exp()
    h_mean = F_DIVERGENCES[divergence].h(r).mean()
    f_distill_loss(x, d_real, d_fake, r, divergence, h_mean).sum().backward()
    g = (x.grad * (x.detach() - d_real).abs() * h_mean / sigma**2)[:, 0]
    got = (w * g).sum(), (w * g * z[:, 0]).sum()
    torch.testing.assert_close(torch.stack(got), torch.stack(want), rtol=2e-3, atol=2e-4)


def test_published_value_for_jensen_shannon():
    """The facts' reference: p = N(0, 1), q = N(0.7, 0.8^2) without noise has JS dmu = 0.3571, ds = -0.3146."""
    m, s = torch.tensor(0.7, dtype=F64, requires_grad=True), torch.tensor(0.8, dtype=F64, requires_grad=True)
    x = torch.linspace(-9, 9, 20001, dtype=F64)
    log_q = -(x - m) ** 2 / (2 * s**2) - s.log() - 0.5 * math.log(2 * math.pi)
    r = (-x**2 / 2 - 0.5 * math.log(2 * math.pi) - log_q).exp()
    grad = torch.autograd.grad(torch.trapezoid(log_q.exp() * F_DIVERGENCES["js"].f(r), x), (m, s))
    assert abs(grad[0] - 0.3571) < 1e-4 and abs(grad[1] + 0.3146) < 1e-4


@pytest.mark.parametrize("divergence", F_DIVERGENCES)
def test_stationary_where_fake_equals_teacher(divergence):
    """The student does not move where both scores agree, whatever the ratio says."""
    x, d = torch.randn(16, 2, requires_grad=True), torch.randn(16, 2)
    loss = f_distill_loss(x, d, d.clone(), torch.rand(16) + 0.1, divergence, torch.ones(()))
    loss.sum().backward()
    assert (x.grad == 0).all() and (loss == 0).all()


def test_weighting_has_mean_one():
    """The batch mean of h / h_mean is 1: no divergence takes larger steps than another."""
    x, r = torch.zeros(1000, 1, requires_grad=True), torch.rand(1000) * 5 + 0.1
    for name, (_, h) in F_DIVERGENCES.items():
        x.grad = None
        f_distill_loss(x, torch.ones(1000, 1), 2 * torch.ones(1000, 1), r, name, h(r).mean()).sum().backward()
        assert abs(x.grad.mean() - 1) < 1e-4


def test_discriminator_optimum_is_the_log_ratio():
    """Expected logistic loss under p (real) and q (student) is least at log p / q: the sign and scale of the ratio."""
    p, q = torch.tensor([0.1, 0.2, 0.7], dtype=F64), torch.tensor([0.5, 0.3, 0.2], dtype=F64)
    logit = (p / q).log().requires_grad_()
    expected = (p * discriminator_loss(logit, torch.full_like(logit, -1e9)) + q * discriminator_loss(torch.full_like(logit, 1e9), logit)).sum()
    grad, = torch.autograd.grad(expected, logit)
    assert grad.abs().max() < 1e-12
    torch.testing.assert_close(density_ratio(logit), (p / q).clamp(0.1, 20))


def test_density_ratio_is_clamped():
    assert density_ratio(torch.tensor([-50.0, 0.0, 50.0])).tolist() == pytest.approx([0.1, 1.0, 20.0])


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


# ---- the loop ----


@pytest.mark.parametrize("kw", [{}, dict(cond=True, divergence="fkl", data="unequal"), dict(divergence="rkl", gan_weight=0.0),
                                dict(fake="exact", divergence="jeffreys", gan_weight=0.0)])
def test_micro_batches_change_nothing(kw):
    check_micro(train, quick, (16, 8), **kw)


@pytest.mark.parametrize("kw", [dict(cond=True), dict(fake="exact"), dict(ratio_ema=0.5, divergence="fkl")])
def test_resume_is_bit_exact(monkeypatch, kw):
    check_resume(monkeypatch, train, quick, **kw)


def test_same_seed_same_student_other_seed_other():
    a, b, c = (flat(train(quick(out=f"r{i}", seed=seed))[0]) for i, seed in enumerate((0, 0, 1)))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_conditional_student_obeys_its_label(monkeypatch):
    """With --cond the label chooses the mode: after a short run most samples lie nearest to the mode they were asked for."""
    monkeypatch.setattr(fdistill, "gallery", lambda *a: common.gallery(*a, n=100))
    student, _ = train(Config(device="cpu", cond=True, steps=150, batch=256, teacher_steps=400, samples=200, every=1000, out="run"))
    label = torch.eye(8).repeat(100, 1)
    x = fdistill.sample(student, 800, label)
    near = torch.cdist(x, common.TOYS["ring"].means).argmin(1)
    assert (near == label.argmax(1)).float().mean() > 0.9
    assert fdistill.sample(student, 10).shape == (10, 2)


def test_short_run_learns_the_ring(monkeypatch):
    """A sixth of the default run already has all eight modes: H far below the 0.009 of a ring that lacks one."""
    monkeypatch.setattr(fdistill, "gallery", lambda *a: common.gallery(*a, n=100))
    student, run = train(Config(device="cpu", steps=250, batch=256, teacher_steps=500, samples=4000, every=1000, out="run"))
    metrics = json.loads((run.dir / "metrics.json").read_text())
    assert metrics["H"] < 0.006 and metrics["mode_min"] > 0.5, metrics
    start = common.load_denoiser(next(common.Path("runs").glob("teacher-*")), Config(device="cpu"))
    one_step = start(5 * torch.randn(2000, 2), torch.full((2000,), 5.0))
    assert energy_coefficient(one_step, common.TOYS["ring"].sample(2000)[0]) > 0.1      # where the student began


def test_a_student_cannot_take_two_steps():
    with pytest.raises(UserError, match="one step"):
        fdistill.sample(common.Denoiser(common.MLP(width=8)), 3, steps=2)


# ---- the paper's claim ----


def test_reverse_kl_seeks_forward_kl_covers():
    """
    An affine student on two modes of weight 1 : 3 at -1 and 1, std 0.2. Forward KL must match the moments, mean 0.5 and
    variance 0.04 + 0.75; reverse KL must sit on the heavier mode, mean 1, std 0.2; Jensen-Shannon lies between.
    """
    got = {}
    for name in ("rkl", "js", "fkl"):
        m, a = fit_affine(name)
        got[name] = m[0].item(), (a @ a.T)[0, 0].sqrt().item()
        assert abs(m[1]) < 0.02 and abs((a @ a.T)[1, 1].sqrt() - 0.2) < 0.01
    assert got["fkl"] == pytest.approx((0.5, 0.79**0.5), abs=0.04)
    assert got["rkl"] == pytest.approx((1.0, 0.2), abs=0.02)
    assert got["fkl"][0] + 0.02 < got["js"][0] < got["rkl"][0] - 0.2 and got["rkl"][1] + 0.2 < got["js"][1] < got["fkl"][1] - 0.02
    assert TWO.weights.tolist() == [0.25, 0.75]


# ---- images ----


def test_images_end_to_end(tmp_path, monkeypatch):
    """A few CPU steps on files in CIFAR-10's format: teacher fitted and cached, picture, FID of student and teacher."""
    monkeypatch.setattr(fdistill, "gallery", lambda *a: common.gallery(*a, n=4))
    write_cifar(tmp_path / "data")
    torch.jit.script(TinyInception()).save("tiny.pt")
    cfg = Config(data="cifar10", data_dir="data", device="cpu", net="small", width=8, cond=True, steps=2, batch=8, teacher_steps=2,
                 samples=12, fid="tiny.pt", every=1, sigma_min=0.002, sigma_max=80.0, sigma_init=80.0, micro=4, out="run")
    student, run = train(cfg)
    metrics = json.loads((run.dir / "metrics.json").read_text())
    assert metrics["fid_ref"] == "cifar10 training images, 100"
    assert all(math.isfinite(metrics[f"fid12_train100_{name}"]) for name in ("1_step", "teacher_18_steps", "teacher_1_step"))
    x = fdistill.sample(student, 3)
    assert x.shape == (3, 3, 32, 32) and x.isfinite().all()
    with pytest.raises(UserError, match="add --cond"):              # the fitted teacher as a file, without its labels
        train(dataclasses.replace(cfg, cond=False, out="run2", teacher=str(next(common.Path("runs").glob("teacher-*/ema.pt")))))
