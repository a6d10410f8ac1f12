"""consistency.py and the conversions against closed forms: Gaussian flow maps, tangents, boundary, dropout, the loop."""
import math

import pytest
import torch

import common
from common import GaussianMixture

F64 = torch.float64

# ---- conversions: EDM, VP, rectified flow, TrigFlow ----


def world():
    """A mixture, clean samples x, noise eps and levels sigma from 0.005 to 50, float64."""
    m = GaussianMixture(torch.randn(5, 2, dtype=F64), 0.3)
    return m, m.sample(64)[0], torch.randn(64, 2, dtype=F64), torch.logspace(math.log10(0.005), math.log10(50), 64, dtype=F64)


def test_every_coordinate_is_the_denoiser():
    """There and back again, to 1e-10: each D -> coordinate -> D is D itself, at every noise level."""
    m, x, eps, sigma = world()
    x_t = x + sigma[:, None] * eps
    want = m(x_t, sigma)
    vp = lambda y, a, label: common.eps_from_denoiser(m, y, a, label)
    rf = lambda y, t, label: common.velocity_from_denoiser(m, y, t, label)
    trig = lambda y, t, label: common.trigflow_from_denoiser(m, y, t, label, 0.7)
    for got in (common.denoiser_from_eps(vp, x_t, sigma), common.denoiser_from_velocity(rf, x_t, sigma),
                common.denoiser_from_trigflow(trig, x_t, sigma, sigma_data=0.7)):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_coordinates_hold_what_their_names_say():
    """With the exact posterior mean of eps: VP's eps is it, v is eps - D, sd F is cos t sd eps - sin t D; to 1e-10."""
    m, x, eps, sigma = world()
    x_t = x + sigma[:, None] * eps
    d = m(x_t, sigma)
    n = (x_t - d) / sigma[:, None]                                  # E[eps | x_t]
    a = 1 / (1 + sigma**2)
    torch.testing.assert_close(common.eps_from_denoiser(m, a.sqrt()[:, None] * x_t, a), n, rtol=0, atol=1e-10)
    t = sigma / (1 + sigma)
    torch.testing.assert_close(common.velocity_from_denoiser(m, (1 - t)[:, None] * x_t, t), n - d, rtol=0, atol=1e-10)
    t = torch.arctan(sigma / 0.7)[:, None]
    got = 0.7 * common.trigflow_from_denoiser(m, t.cos() * x_t, t[:, 0], sigma_data=0.7)
    torch.testing.assert_close(got, t.cos() * 0.7 * n - t.sin() * d, rtol=0, atol=1e-10)


def test_velocity_to_trigflow_as_in_sana_sprint():
    """SANA-Sprint's conversion of a velocity of unit-variance data (2503.09641) is our way over the denoiser, to 1e-10."""
    m, x, eps, sigma = world()
    t = torch.arctan(sigma)
    x_t = t.cos()[:, None] * (x + sigma[:, None] * eps)
    u = t.sin() / (t.sin() + t.cos())
    q = (u**2 + (1 - u) ** 2).sqrt()[:, None]
    v, w = common.velocity_from_denoiser(m, q * x_t, u), u[:, None]
    want = ((1 - 2 * w) * q * x_t + (1 - 2 * w + 2 * w**2) * v) / q
    torch.testing.assert_close(common.trigflow_from_denoiser(m, x_t, t, sigma_data=1.0), want, rtol=0, atol=1e-10)


def test_edm_network_is_minus_trigflow():
    """F = -F_edm: the raw network of a Denoiser, read at x_t / sd, is TrigFlow's F with the sign turned (float32)."""
    D = common.Denoiser(common.MLP(width=16), sigma_data=0.7)
    x_t, t = torch.randn(64, 2), torch.rand(64) * 1.3 + 0.1
    h, rest = D.net.encode(x_t / 0.7, (0.7 * t.tan()).log() / 4, None)
    torch.testing.assert_close(common.trigflow_from_denoiser(D, x_t, t, sigma_data=0.7), -D.net.decode(h, rest), rtol=0, atol=2e-5)
