"""consistency.py and the conversions against closed forms: Gaussian flow maps, tangents, boundary, dropout, the loop."""
import copy
import json
import math

import numpy as np
import pytest
import torch

import common
import consistency
import dmd
import rectflow
from common import GaussianMixture, UserError
from conftest import check_micro, check_resume, flat, main_in_process
from consistency import LOSSES, Config, Draw, train
from test_common import write_cifar

F64 = torch.float64


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    monkeypatch.setattr(common.gallery, "__defaults__", (100,))                 # the picture's samples of the teacher take longest

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

# ---- the losses at their exact solution: one Gaussian N(0.7, 0.8^2) in 1-D, float64 ----

M, S, T = 0.7, 0.8, 5.0
P = GaussianMixture(torch.full((1, 1), M, dtype=F64), S)


def smooth(x, sigma, label=None):
    """No denoiser of anything, but a smooth function with all derivatives (forward mode knows no torch.cdist)."""
    return x / (1 + sigma[:, None] ** 2) + torch.sin(3 * x + sigma[:, None])


class Exact:
    """The exact student: f(x, t) = m + (x - m) S / sqrt(S^2 + t^2), and with a second time g of the exact jump to s."""
    sigma_data = 0.8

    def __init__(self, scale=None):
        self.scale = scale                                      # (1,), to differentiate by, or to be wrong with

    def __call__(self, x, t, label=None):
        rho, t = 0.0 if label is None else label[:, :1], t[:, None]
        root = ((S**2 + (rho * t) ** 2) / (S**2 + t**2)) ** 0.5
        g = (1 + rho) / (S**2 + t**2) * (M * t**2 / (1 + root) + x * S**2 / (root + rho))
        return g if self.scale is None else M + (1 + (self.scale - 1) * t / (1 + t)) * (g - M)


def setting(loss, **kw):
    return Config(**{**dict(loss=loss, sigma_min=0.02, sigma_max=T, c=0.0, dsm=0.0, p_mean=0.0), **kw})


def pairs(n=40):
    """A Draw that integrates over x and eps exactly (Gauss-Hermite) for each level; weights (B,) sum to 1."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    nodes, weights = torch.tensor(nodes), torch.tensor(weights / weights.sum())
    levels = (torch.arange(n, dtype=F64) + 0.5) / n
    u, x, eps = (a.flatten() for a in torch.meshgrid(levels, nodes, nodes, indexing="ij"))
    weight = (torch.ones(n, 1, 1) / n * weights[:, None] * weights).flatten()
    w = (torch.arange(len(u), dtype=F64) * 0.618 % 1)
    return Draw(eps[:, None], M + S * x[:, None], None, u, w, torch.zeros(len(u), 1, 1, dtype=F64)), weight


def value(loss, progress=0.5, **kw):
    """Mean loss at the exact solution, with the exact teacher where the loss has one."""
    b, weight = pairs()
    guide = None if loss in ("ct", "ect", "sct") else P
    return float((weight * LOSSES[loss](Exact(), Exact(), guide, b, setting(loss, **kw), progress)[0]).sum())


def gradient(loss, progress=0.5, **kw):
    """Derivative of the mean loss by the scale of the student, at the exact solution."""
    b, weight = pairs()
    scale = torch.ones(1, dtype=F64, requires_grad=True)
    per_sample, _ = LOSSES[loss](Exact(scale), Exact(), None, b, setting(loss, **kw), progress)
    return abs(float(torch.autograd.grad((weight * per_sample).sum(), scale)[0]))


def test_exact_student_is_the_flow():
    """The closed form above is the ODE's: against 4000 Heun steps, and its jump from t to s along the same path."""
    x = torch.randn(20, 1, dtype=F64) * 5
    t = torch.full((20,), 5.0, dtype=F64)
    fine = common.heun_sample(P, x / 5, steps=4000, sigma_min=1e-3, sigma_max=5.0)
    torch.testing.assert_close(consistency.f(Exact(), x, t), fine, rtol=0, atol=2e-6)
    s = torch.rand(20, dtype=F64) * 5
    at_s = consistency.jump(Exact(), x, t, s)
    torch.testing.assert_close(consistency.f(Exact(), at_s, s), consistency.f(Exact(), x, t), rtol=0, atol=1e-12)
    torch.testing.assert_close(consistency.jump(Exact(), x, t, t), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss, solver, order", [("cd", "euler", 4), ("cd", "heun", 6), ("ctm", "euler", 4), ("ctm", "heun", 6)])
def test_distillation_is_zero_to_the_order_of_its_solver(loss, solver, order):
    """At the exact solution the squared loss is the solver's squared local error: Euler h^4, Heun h^6 (per step)."""
    coarse, fine = (value(loss, N=n, solver=solver) for n in (160, 320))
    assert fine > 0 and abs(math.log2(coarse / fine) - order) < 0.5, (coarse, fine)
    assert fine < (1e-6 if solver == "euler" else 1e-10)


def test_boot_is_zero_to_second_order():
    """Its squared error h^4 is divided by k^2 ~ h^2; the boundary term is exactly zero."""
    coarse, fine = value("boot", N=160), value("boot", N=320)
    assert abs(math.log2(coarse / fine) - 2) < 0.4 and fine < 1e-3, (coarse, fine)


@pytest.mark.parametrize("loss", ["scd", "meanflow"])
def test_continuous_distillation_is_zero(loss):
    """The tangent (sCM) and u - v + (t - r) du/dt (MeanFlow) vanish at the exact solution up to rounding."""
    assert value(loss, progress=0.99) < 1e-20


def test_wrong_students_are_not_zero():
    """The same losses at a student that is up to 10 % off are far from zero: the tests above can fail."""
    b, _ = pairs()
    wrong = Exact(torch.tensor([1.1], dtype=F64))
    for loss in ("cd", "ctm", "boot", "meanflow"):
        assert LOSSES[loss](wrong, wrong, P, b, setting(loss, N=320), 0.5)[0].mean() > 1e-8, loss
    assert LOSSES["scd"](wrong, wrong, P, b, setting("scd"), 0.99)[0].mean() > 1e-4


@pytest.mark.parametrize("loss, settings", [("ct", [dict(progress=0.3, N=40, s0=10), dict(progress=0.5, N=40, s0=10)]),
                                            ("ect", [dict(q=64.0, stages=1), dict(q=128.0, stages=1)])])
def test_training_without_teacher_is_stationary_at_the_solution(loss, settings):
    """
    x + sigma' eps lies on no path of the ODE, so single losses are not zero, but their mean gradient at the exact
    solution is of the step's first order after the weight 1 / (sigma - sigma'): halving the step halves it.
    """
    coarse, fine = (gradient(loss, **kw) for kw in settings)
    assert fine < 0.6 * coarse and fine > 0.3 * coarse, (coarse, fine)


def test_sct_and_scd_have_one_mean_tangent():
    """The slope of x and eps has the teacher's as its mean given x_t: E[(tangent_sct - tangent_scd) h(x_t)] = 0 for linear h."""
    b, weight = pairs()
    t = torch.full_like(b.u, 0.9)
    x_t = t.cos()[:, None] * b.x + t.sin()[:, None] * 0.8 * b.eps
    slope_sct = t.cos()[:, None] * 0.8 * b.eps - t.sin()[:, None] * b.x
    slope_scd = 0.8 * common.trigflow_from_denoiser(P, x_t, t, sigma_data=0.8)
    difference = consistency.tangent(Exact(), x_t, t, slope_sct, None, 0.8) - consistency.tangent(Exact(), x_t, t, slope_scd, None, 0.8)
    assert difference.abs().mean() > 0.1
    for h in (torch.ones_like(x_t), x_t):
        assert abs((weight[:, None] * difference * h).sum()) < 1e-12


def test_tangent_is_a_finite_difference():
    """cos t times df/dt along dx/dt = slope, f of an arbitrary smooth denoiser, against central differences in float64."""
    D, sd = smooth, 0.7
    x_t, slope, t = torch.randn(64, 2, dtype=F64), torch.randn(64, 2, dtype=F64), torch.rand(64, dtype=F64) * 1.3 + 0.1
    f_trig = lambda h: D((x_t + h * slope) / (t + h).cos()[:, None], sd * (t + h).tan())
    want = t.cos()[:, None] * (f_trig(1e-6) - f_trig(-1e-6)) / 2e-6
    torch.testing.assert_close(consistency.tangent(D, x_t, t, slope, None, sd), want, rtol=1e-6, atol=1e-7)
    half = consistency.tangent(D, x_t, t, slope, None, sd, 0.0)                     # r = 0: cos^2 t (slope - sd F), the teacher's loss
    F_trig = common.trigflow_from_denoiser(D, x_t, t, sigma_data=sd)
    torch.testing.assert_close(half, t.cos()[:, None] ** 2 * (slope - sd * F_trig), rtol=0, atol=1e-12)


@pytest.mark.parametrize("progress, r", [(0.9, 1.0), (0.05, 0.25)])
def test_scm_gradient_is_along_the_normalised_tangent(progress, r):
    """In F the loss has the gradient - 2 g / dim with |g| = |tangent| / (|tangent| + 0.1); the second term comes in over --warmup 0.2."""
    b = Draw(torch.randn(9, 3, dtype=F64), torch.randn(9, 3, dtype=F64), None, torch.rand(9, dtype=F64), None, None)
    sd, shift, cfg = 0.7, torch.zeros(9, 3, dtype=F64, requires_grad=True), setting("sct")

    def G(x, sigma, label=None):                                # smooth - sd sin t shift, that is F + shift
        return smooth(x, sigma) - (sd * torch.arctan(sigma / sd).sin())[:, None] * shift
    G.sigma_data = sd
    loss, sigma = LOSSES["sct"](G, smooth, None, b, cfg, progress)
    t = torch.arctan(sigma / sd)
    c, s = t.cos()[:, None], t.sin()[:, None]
    g = consistency.tangent(smooth, c * b.x + s * sd * b.eps, t, c * sd * b.eps - s * b.x, None, sd, r)
    g = g / (g.norm(dim=1, keepdim=True) + 0.1)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), shift)[0], -2 * g / 3, rtol=1e-5, atol=1e-7)


def test_scott_without_noise_is_cd():
    """--eta 0 is cd with Euler's step, to rounding; with noise it is another loss."""
    b, _ = pairs()
    b = b._replace(more=torch.randn_like(b.eps)[:, None])       # one sub-step
    a, same, other = (LOSSES[k](Exact(), Exact(), P, b, setting(k, N=18, solver="euler", eta=eta), 0.5)[0]
                      for k, eta in (("cd", 0.0), ("scott", 0.0), ("scott", 0.5)))
    torch.testing.assert_close(a, same, rtol=1e-9, atol=1e-12)
    assert (other - same).abs().max() > 1e-3


def test_noisy_step_keeps_the_noise_level():
    """Of one data point (D = x) the SDE's step leaves noise of exactly the lower level, whatever eta."""
    D = lambda x, sigma, label: torch.full_like(x, 2.0)
    eps, more = torch.randn(2, 200_000, 1, dtype=F64)
    sigma, lower = torch.full((200_000,), 2.0, dtype=F64), torch.full((200_000,), 1.5, dtype=F64)
    for eta in (0.0, 0.4, 1.0):
        out = consistency.noisy_step(D, 2 + 2 * eps, sigma, lower, None, eta, more)
        assert abs(out.mean() - 2) < 0.02 and abs(out.std() - 1.5) < 0.01


def test_distance_and_levels():
    """Pseudo-Huber against its definition; the levels of a lognormal; Karras pairs are neighbours down to 0."""
    a, b = torch.randn(5, 3, dtype=F64), torch.randn(5, 3, dtype=F64)
    torch.testing.assert_close(consistency.distance(a, b, 0.3), ((a - b).norm(dim=1) ** 2 + 0.09).sqrt() - 0.3)
    torch.testing.assert_close(consistency.distance(a, b, 0), (a - b).square().mean(1))
    cfg = setting("ct", p_mean=-0.3, p_std=0.7)
    sigma = consistency.lognormal((torch.arange(10_000) + 0.5) / 10_000, cfg).log()
    assert abs(sigma.mean() + 0.3) < 0.01 and abs(sigma.std() - 0.7) < 0.01
    high, low = consistency.grid_pair(torch.tensor([0.0, 0.999]), setting("cd", N=4))
    assert abs(high[0] - T) < 1e-6 and abs(high[1] - 0.02) < 1e-6 and low[1] == 0 and 0.02 < low[0] < T


def levels_seen(loss, u, progress, **kw):
    """sigma and lower (B,) at which a loss without teacher calls the student and the fixed network."""
    seen = []
    D = lambda x, sigma, label: (seen.append(sigma), x)[1]
    n = torch.zeros(len(u), 1, dtype=F64)
    LOSSES[loss](D, D, None, Draw(n, n, None, u, None, None), setting(loss, **kw), progress)
    return seen[1], seen[0]


def test_levels_of_ct():
    """iCT: 10, 20, ... steps, N at last; the pair above sigma_i with the normal law's share of ln sigma between its ends (Eq. 10, 11)."""
    u = (torch.arange(40_000, dtype=F64) + 0.5) / 40_000
    for N, progress, steps in ((40, 0.3, 10), (40, 0.4, 20), (40, 0.7, 40), (30, 0.5, 20), (30, 0.99, 30)):
        sigma, lower = levels_seen("ct", u, progress, N=N, s0=10, p_mean=-0.3, p_std=0.9)
        grid = common.karras_sigmas(steps, 0.02, T)
        cdf = torch.distributions.Normal(-0.3, 0.9).cdf(grid.clamp(min=1e-30).log())
        want = (cdf[:-1] - cdf[1:]) / cdf[0]
        values, counts = sigma.unique(return_counts=True)
        i = torch.searchsorted(-grid, -values - 1e-9)
        torch.testing.assert_close(values, grid[i])
        assert (want[i] - counts / len(u)).abs().max() < 1e-3 and want[i].sum() > 0.999
        torch.testing.assert_close(lower[sigma == values[-1]], grid[i[-1] + 1].clamp(min=1e-6).expand(counts[-1]))


def test_levels_of_ect():
    """ECT with q = 2: in its first stage sigma' is 0 below sigma = ln 7, in the second below ln 5/3; then 1 - sigma'/sigma halves."""
    u = (torch.arange(1000, dtype=F64) + 0.5) / 1000
    for progress, edge in ((0.1, math.log(7)), (0.3, math.log(5 / 3)), (0.6, 0.0), (0.9, 0.0)):
        sigma, lower = levels_seen("ect", u, progress, q=2.0, stages=4)
        assert torch.equal(lower <= 1e-6, sigma <= edge)
        gap = (1 + 8 / (1 + sigma.exp())) / 2 ** (1 + int(4 * progress))
        torch.testing.assert_close(lower[sigma > edge], (sigma * (1 - gap))[sigma > edge])


def test_terms_of_ctm(monkeypatch):
    """s lies on the grid, as often at each level from u down to 0; the denoising loss has EDM's weight."""
    seen, jump, b = [], consistency.jump, pairs()[0]
    monkeypatch.setattr(consistency, "jump", lambda G, x, t, s, label: (seen.append((t, s)), jump(G, x, t, s, label))[1])
    D = lambda x, t, label: torch.full_like(x, 0.3)
    D.sigma_data = 0.8
    with_it, without = (LOSSES["ctm"](D, D, P, b, setting("ctm", N=4, dsm=dsm), 0.5) for dsm in (1.0, 0.0))
    t = with_it[1]
    torch.testing.assert_close(with_it[0] - without[0], (1 / t**2 + 1 / 0.64) * (0.3 - b.x[:, 0]) ** 2)
    (lower, s), grid = seen[0], common.karras_sigmas(4, 0.02, T)
    assert (s <= lower).all()
    share = (s[t > 0.99 * T][:, None] - grid[1:]).abs().lt(1e-9).double().mean(0)             # from the highest level: 4 levels below it
    assert (share - 0.25).abs().max() < 0.03, share


def test_weights_of_meanflow_and_boot():
    """meanflow's error e counts as e / (e + 0.01); boot's boundary term with 0.1, at the level where the path starts."""
    b, _ = pairs()
    wrong = Exact(torch.tensor([5.0], dtype=F64))
    loss = LOSSES["meanflow"](wrong, wrong, P, b, setting("meanflow"), 0.5)[0]
    assert 0.9 < loss.max() < 1
    off = lambda x, t, label: torch.where(label[:, :1] == 1, 0.3, Exact()(x, t, label))                # wrong only where s = t
    got, right = (LOSSES["boot"](G, Exact(), P, b, setting("boot", N=8), 0.5)[0] for G in (off, Exact()))
    x_T, level = consistency.boot_start(Exact(), b, setting("boot", N=8))
    torch.testing.assert_close(got - right, 0.1 * (0.3 - P(x_T, level)[:, 0]) ** 2)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_target_has_no_gradient_and_derivatives_no_bf16(loss):
    """The student gets the same gradient whether the fixed network is it or its frozen copy; tangents are the same under --dtype bf16."""
    D = common.Denoiser(common.MLP(2, 6 if loss in consistency.SECOND_TIME else 0, width=16))
    for p in D.parameters():
        p.data += 0.1 * torch.randn_like(p)
    b = Draw(*torch.randn(2, 32, 2), None, *torch.rand(2, 32), torch.randn(32, 3, 2))
    guide, cfg = None if loss in ("ct", "ect", "sct") else common.TOYS["ring"], setting(loss, N=8, s0=4)
    frozen, coarse = copy.deepcopy(D).requires_grad_(False), copy.deepcopy(D).requires_grad_(False)
    coarse.dtype = "bf16"

    def gradient(minus):
        D.zero_grad()
        LOSSES[loss](D, minus, guide, b, cfg, 0.9)[0].mean().backward()
        return torch.cat([p.grad.flatten() for p in D.parameters()])
    want, other = gradient(frozen), copy.deepcopy(frozen)
    for p in other.parameters():
        p.data *= 1.1
    assert (gradient(other) - want).abs().max() > 1e-6          # the target is the fixed network's
    if loss != "ctm":                                           # whose gradient runs through the fixed network to its input
        assert torch.equal(gradient(D), want)
    if loss in (*consistency.TANGENT, "meanflow"):
        assert torch.equal(gradient(coarse), want)


# ---- networks ----


@pytest.mark.parametrize("net", [lambda n: common.MLP(2, n, width=16),
                                 lambda n: common.UNet(8, 1, n, width=8, mult=(1,), blocks=1, attention=(), adm=False),
                                 lambda n: common.UNet(8, 1, n, width=8, mult=(1,), blocks=1, attention=(), adm=True)])
@pytest.mark.parametrize("classes", [0, 3])
def test_second_time_starts_unheeded(net, classes):
    """A widened network gives what it gave, whatever s; one step of training on, it heeds s."""
    D = common.Denoiser(net(classes))
    for p in D.parameters():
        p.data += 0.1 * torch.randn_like(p)
    wide = consistency.widen(D, 6)
    x, t, s = torch.randn(5, *D.shape), torch.rand(5) + 1, torch.rand(5)
    label = torch.eye(3)[[0, 1, 2, 0, 1]] if classes else None
    look = lambda s: wide(x, t, consistency.second_time(t, s, label))
    torch.testing.assert_close(look(s), D(x, t, label), rtol=1e-5, atol=1e-5)
    look(s).square().sum().backward()
    with torch.no_grad():
        for p in wide.parameters():
            p -= 0.1 * p.grad / (p.grad.norm() + 1e-6)
    assert (look(s) - look(0.5 * s)).abs().max() > 1e-6


def test_boundary_condition_of_networks():
    """f(x, 0) = x exactly, f tends to it, and a jump from t to t stays where it is."""
    D, x = common.Denoiser(common.MLP(2, 6, width=16)), torch.randn(7, 2)
    for sigma, tol in ((0.0, 0.0), (1e-4, 1e-3)):
        assert (consistency.f(D, x, torch.full((7,), sigma)) - x).abs().max() <= tol
    t = torch.rand(7) + 0.1
    torch.testing.assert_close(consistency.jump(D, x, t, t), x, rtol=0, atol=0)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))])
@pytest.mark.parametrize("loss", LOSSES)
def test_dropout_masks_are_shared(loss, device, monkeypatch):
    """The student's call and the fixed network's see one mask, element by element, though derivatives need another memory layout."""
    def spy(x, *args):
        out = dropout(x, *args)
        masks.append(out == 0)
        return out
    dropout, masks, cfg = torch.nn.functional.dropout, [], setting(loss, data="cifar10", net="small", device=device, N=8, s0=4)
    net = common.Denoiser(common.UNet(8, 1, width=8, mult=(1,), blocks=1, attention=(8,)))
    G = common.place(consistency.widen(net, 6) if loss in consistency.SECOND_TIME else net, cfg)
    teacher = common.place(common.Denoiser(common.UNet(8, 1, width=8, mult=(1,), blocks=1, attention=())), cfg).eval()
    for block in (m for m in G.modules() if isinstance(m, common.Block)):
        block.dropout = 0.5
    minus = copy.deepcopy(G.train())
    monkeypatch.setattr(torch.nn.functional, "dropout", spy)
    x, more = torch.randn(4, 1, 8, 8, device=device), torch.randn(4, 3, 1, 8, 8, device=device)
    b = Draw(torch.randn_like(x), x, None, *torch.rand(2, 4, device=device), more)
    LOSSES[loss](G, minus, None if loss in ("ct", "ect", "sct") else teacher, b, cfg, 0.5)
    calls = [torch.cat([m.flatten() for m in masks[i:i + 5]]) for i in range(0, len(masks), 5)]         # five blocks
    pairs = {"ctm": [(0, 2), (1, 3)], "boot": [(1, 2)]}.get(loss, [(0, 1)])         # ctm jumps twice, boot first draws where to start
    assert all(torch.equal(calls[i], calls[j]) for i, j in pairs) and abs(calls[0].float().mean() - 0.5) < 0.1
    assert len(calls) == {"ctm": 5, "boot": 4}.get(loss, 2) and (loss != "ctm" or not torch.equal(calls[3], calls[4]))


# ---- sampling, and sprint's adversarial term ----


@pytest.mark.parametrize("gamma", [0.0, 0.6, 1.0])
def test_sampling_keeps_the_law(gamma, monkeypatch):
    """CTM's gamma-sampling, any number of calls: the exact jumps give N(0.7, 0.8^2), whatever share of the noise is fresh."""
    student, levels = torch.nn.Linear(1, 1, dtype=F64), []
    jump = consistency.jump
    monkeypatch.setattr(consistency, "jump", lambda G, x, t, s, label: (levels.append(float(s[0])), jump(Exact(), x, t, s, label))[1])
    for name, v in dict(config=dict(loss="ctm", gamma=gamma, mid=1.5, sigma_min=0.02), shape=(1,), label_dim=6, sigma_init=T, sigma_data=0.8).items():
        setattr(student, name, v)
    z = (M + (S**2 + T**2) ** 0.5 * torch.special.ndtri((torch.arange(4000, dtype=F64) + 0.5) / 4000)[:, None]) / T   # no luck in the first noise
    for steps in (1, 3):
        x = consistency.sample(student, len(z), steps=steps, z=z)
        assert abs(x.mean() - M) < 0.03 and abs(x.std() - S) < 0.03, (x.mean(), x.std())
    assert levels[-3] == pytest.approx(1.2 * (1 - gamma**2) ** 0.5) and levels[-1] == 0


def test_levels_of_the_calls():
    """mid, mid / 2, ... and nothing below sigma_min, however many calls; another mid and gamma than in training on demand."""
    class Student(torch.nn.Linear):
        def forward(self, x, t, label=None):
            seen.append(float(t[0]))
            return x
    seen, student = [], Student(1, 1)
    for name, v in dict(config=dict(loss="cd", gamma=0.0, mid=1.5, sigma_min=0.02), shape=(1,), label_dim=0, sigma_init=T, sigma_data=0.8).items():
        setattr(student, name, v)
    consistency.sample(student, 3, steps=4)
    assert seen == pytest.approx([T, 1.2, 0.6, 0.3])
    assert consistency.sample(student, 3, steps=2000, mid=1.0).isfinite().all()
    assert seen[5] == pytest.approx(0.8) and min(seen) == pytest.approx(0.02)
    student.config["loss"], student.label_dim = "ctm", 6
    draw = lambda **kw: (torch.manual_seed(0), consistency.sample(student, 3, steps=3, z=torch.ones(3, 1), **kw))[1]
    assert not torch.equal(draw(gamma=1.0), draw()) and torch.equal(draw(gamma=0.0, mid=1.5), draw())
    for wrong in (dict(gamma=1.1), dict(mid=7.0), dict(mid=-1.0), dict(steps=0)):
        with pytest.raises(UserError):
            consistency.sample(student, 3, **{"steps": 2, **wrong})


def test_hinge():
    """At its best logit, the sign of p - q, the hinge is 1 - total variation: p uniform on cells 1, 2, q on 2, 3, TV 1/2."""
    p, q, logits = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.0, 0.5, 0.5]), torch.linspace(-2, 2, 41)[:, None]
    far = torch.full_like(logits, 9.0)                              # a sure discriminator has no loss on that side
    per_cell = 2 * (p * consistency.hinge_loss(logits, -far) + q * consistency.hinge_loss(far, logits))         # (41, 3)
    assert float(per_cell.amin(0).sum() / 2) == pytest.approx(1 - 0.5)
    assert per_cell.argmin(0)[0] >= 30 and per_cell.argmin(0)[2] <= 10             # +1 or more where only p is, -1 or less for q


def test_sprint_pulls_the_student_up_the_logit():
    """With a linear critic and head the term - logit(guess) has a closed-form gradient in an affine student a y + c."""
    a, c = torch.tensor(0.4, dtype=F64, requires_grad=True), torch.zeros(2, dtype=F64, requires_grad=True)
    head = torch.nn.Linear(2, 2, dtype=F64).requires_grad_(False)
    cfg, n = setting("sprint", mid=1.5), 64
    b = Draw(*torch.randn(2, n, 2, dtype=F64), None, *torch.rand(2, n, dtype=F64), torch.randn(n, 1, 2, dtype=F64))
    seen = []
    G = lambda y, sigma, label: (seen.append((y, sigma)), a * y + c)[1]
    G.sigma_data = 0.8
    critic = lambda x, sigma, label, features: x
    loss = -consistency.look(critic, head, consistency.guess(G, b, cfg), b, cfg).mean()
    loss.backward()
    (y, sigma), = seen
    first = b.w < 0.5
    assert (sigma[first] == cfg.sigma_max).all() and (sigma[~first] - 1.2).abs().max() < 1e-6 and 10 < first.sum() < 54   # two calls' levels
    torch.testing.assert_close(y, b.x + sigma[:, None] * b.eps)
    own = head.weight[(~first).long()]                                     # each call has a logit of its own
    torch.testing.assert_close(c.grad, -own.mean(0))
    torch.testing.assert_close(a.grad, -(y * own).sum(1).mean())


def test_boot_starts_where_its_calls_start():
    """Half of the rows are noise at T; the others the student's own sample of it, noised to mid, mid / 2, ..., each half as often."""
    torch.manual_seed(0)
    n, cfg = 4000, setting("boot", mid=1.5)
    b = Draw(torch.randn(n, 1, dtype=F64), None, None, *torch.rand(2, n, dtype=F64), torch.randn(n, 1, 1, dtype=F64))
    x, level = consistency.boot_start(Exact(), b, cfg)
    sample = consistency.f(Exact(), T * b.eps, torch.full((n,), T, dtype=F64))
    first = level == T
    assert abs(first.double().mean() - 0.5) < 0.04 and torch.equal(x[first], T * b.eps[first])
    torch.testing.assert_close(x[~first], (sample + level[:, None] * b.more[:, 0])[~first])
    share = [(level[~first] - 1.2 / 2**k).abs().lt(1e-9).double().mean() for k in range(3)]
    assert all(abs(s - 0.5 ** (k + 1)) < 0.04 for k, s in enumerate(share)) and level.min() >= 2 * cfg.sigma_min


def test_a_second_call_helps_boot():
    """A short run on the ring: with starts from pure noise alone H rises from 0.0011 to 0.03 with the second call."""
    student, _ = train(Config(loss="boot", device="cpu", steps=150, batch=256, teacher_steps=500, samples=200, every=150, out="run"))
    torch.manual_seed(0)
    data = common.TOYS["ring"].sample(8000)[0]
    one, two = (common.energy_coefficient(consistency.sample(student, 8000, steps=k), data) for k in (1, 2))
    assert two < one < 0.003, (one, two)


def test_grid_pairs():
    """Neighbours on Karras's grid and 0, from the highest level or from one of their own for each row."""
    cfg, u = setting("cd", N=6), (torch.arange(6, dtype=F64) + 0.5) / 6
    for top in (None, torch.full((6,), 1.2, dtype=F64)):
        want = common.karras_sigmas(6, cfg.sigma_min, cfg.sigma_max if top is None else 1.2)
        sigma, lower = consistency.grid_pair(u, cfg, top)
        torch.testing.assert_close(sigma, want[:-1])
        torch.testing.assert_close(lower, want[1:])


def test_papers_constants():
    """iCT's c for CIFAR-10 and ImageNet-64; the second call's level of 2303.01469, iCT, sCM and SANA-Sprint at a data std of 0.5."""
    of = lambda data, loss: Config(data=data, loss=loss)
    assert [of(data, "ct").c for data in ("cifar10", "imagenet64")] == pytest.approx([0.03, 0.06], rel=0.01)
    for loss, level in dict(cd=1.382, ct=0.821, ect=0.821, scd=math.tan(1.1) / 2, sct=math.tan(1.1) / 2, sprint=math.tan(1.0) / 2).items():
        assert of("cifar10", loss).mid / 2 == pytest.approx(level, rel=0.01), loss


# ---- the loop ----


def quick(**kw):
    """A run of a second: tiny networks, few steps."""
    return Config(**{**dict(device="cpu", steps=4, batch=32, width=16, teacher_steps=20, samples=200, every=2, out="run"), **kw})


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_runs_saves_and_draws(loss, monkeypatch):
    """Few steps of each loss: a student that moved, metrics with two steps, and --sample draws the same student in n steps."""
    guides, loss_of = [], LOSSES[loss]
    monkeypatch.setitem(LOSSES, loss, lambda G, minus, teacher, *rest: (guides.append(teacher), loss_of(G, minus, teacher, *rest))[1])
    student, run = train(quick(loss=loss))
    assert all((guide is None) == (loss in ("ct", "ect", "sct")) for guide in guides)
    metrics = json.loads((run.dir / "metrics.json").read_text())
    assert 0 < metrics["H"] < 1 and math.isfinite(metrics["H_2_steps"]) and ("paired" in metrics) == (loss != "ct")
    again = common.load_denoiser("run", quick())
    z = torch.randn(50, 2)
    for steps in (1, 3):
        torch.manual_seed(1)
        want = consistency.sample(student, 50, steps=steps, z=z)
        torch.manual_seed(1)
        assert torch.equal(consistency.sample(again, 50, steps=steps, z=z), want)
    assert main_in_process(consistency, "--sample", "run", "--samples", 30, "--nfe", 2, "--device", "cpu")[0] == 0
    assert common.Path("run/draw.npy").exists()


def test_sampling_settings_and_foreign_runs():
    """--sample takes another --mid and --gamma than in training, and refuses bad ones and the run of another script."""
    train(quick(loss="ctm", mid=1.0, gamma=0.3))
    def drawn(*flags):
        assert main_in_process(consistency, "--sample", "run", "--samples", 30, "--nfe", 3, "--device", "cpu", *flags)[0] == 0
        return np.load("run/draw.npy")
    as_trained = drawn()
    assert (drawn("--gamma", 0.3, "--mid", 1.0) == as_trained).all()
    assert (drawn("--gamma", 0) != as_trained).any() and (drawn("--mid", 0.5) != as_trained).any()
    for script, flags, says in ((consistency, ("--gamma", 7), "--gamma"), (consistency, ("--mid", 9), "--mid"), (dmd, (), "another script"),
                                (rectflow, (), "another script"), (consistency, ("--gamma", "nan"), "finite")):
        code, err = main_in_process(script, "--sample", "run", "--samples", 30, "--nfe", 3, *flags) if script is consistency else \
            main_in_process(script, "--sample", "run", "--samples", 30)
        assert code == 2 and says in err, err


def test_labels_of_unequal_classes():
    """Two calls are measured with the data's labels: at --cond the share of a class is its weight, not one in eight."""
    student, run = train(quick(loss="cd", data="unequal", cond=True, steps=150, batch=256, teacher_steps=400, samples=2000, width=64, every=150))
    metrics = json.loads((run.dir / "metrics.json").read_text())
    assert metrics["H_2_steps"] < 2 * metrics["H"] + 0.005, metrics


def test_scms_weight_makes_levels_count_the_same(monkeypatch):
    """With a loss of 4 everywhere exp(w) 4 - w is least at exp(w) = 1/4."""
    monkeypatch.setitem(LOSSES, "scd", lambda G, minus, teacher, b, cfg, progress: (
        4 + 0 * G(b.x, 0 * b.u + 1).square().flatten(1).sum(1), consistency.lognormal(b.u, cfg)))
    _, run = train(quick(loss="scd", lr=0.05, steps=80, every=80))
    w = run.state["weight"](torch.tensor([0.1, 0.5, 2.0]))
    assert (4 * w.exp() - 1).abs().max() < 0.2, w


@pytest.mark.parametrize("who, kw", [("head", dict(lr_disc=0.02, lr=1e-9)), ("student", dict(lr_disc=1e-9, lr=0.02, adv=1e4))])
def test_who_pulls_which_way_in_sprint(who, kw, monkeypatch):
    """The head's logit rises on data over the fixed student's samples; the student's samples climb a fixed head's logit."""
    def spy(critic, disc, x, b, cfg):
        logit = look(critic, disc, x, b, cfg)
        seen["data" if x is b.x else "student"].append(float(logit.detach().mean()))
        return logit
    look, seen = consistency.look, dict(data=[], student=[])
    monkeypatch.setattr(consistency, "look", spy)
    train(quick(loss="sprint", steps=40, batch=256, teacher_steps=200, every=40, **kw))
    mean = lambda values: sum(values[-10:]) / 10
    if who == "head":
        assert mean(seen["data"]) > mean(seen["student"]) + 0.1, seen
    else:
        assert mean(seen["student"]) > sum(seen["student"][:4]) / 4 + 0.1, seen


def test_images_end_to_end(tmp_path, monkeypatch):
    """Two CPU steps on files in CIFAR-10's format, with labels, dropout and micro-batches: a student that moved, picture, samples in two calls."""
    write_cifar(tmp_path / "data")
    monkeypatch.setattr(common.gallery, "__defaults__", (4,))
    for loss in ("sprint", "boot"):                                         # one teacher for both; sprint has scd's derivative
        student, run = train(Config(data="cifar10", data_dir="data", device="cpu", net="small", width=8, cond=True, steps=2, batch=4, micro=2,
                                    N=4, teacher_steps=2, samples=4, every=2, dropout=0.1, ema=0.0, loss=loss, out=loss))
        start = common.load_denoiser(next(common.Path("runs").glob("teacher-*")), run.cfg)
        assert (student.net.state_dict()["map_layer0.weight"] - start.net.state_dict()["map_layer0.weight"]).abs().max() > 1e-6, loss
        x = consistency.sample(student, 3, steps=2)
        assert x.shape == (3, 3, 32, 32) and x.isfinite().all() and (run.dir / "samples.png").exists(), loss


def test_target_ema(monkeypatch):
    """--target_ema 0.9: `minus` is the student's first weights, then their average."""
    def spy(G, minus, teacher, b, cfg, progress, loss=LOSSES["cd"]):
        want[:] = [flat(G)] if not want else [0.9 * want[0] + 0.1 * flat(G)]
        torch.testing.assert_close(flat(minus), want[0], rtol=0, atol=1e-6)
        assert step == [] or not torch.equal(flat(G), flat(minus))
        step.append(1)
        return loss(G, minus, teacher, b, cfg, progress)
    want, step = [], []
    monkeypatch.setitem(LOSSES, "cd", spy)
    train(quick(target_ema=0.9))
    assert len(step) == 4


def test_the_target_network_is_the_student_without_a_graph(monkeypatch):
    """--target_ema 0: at every step `minus` holds the student's weights and no history; gradients reach the student alone."""
    def spy(G, minus, teacher, b, cfg, progress, loss=LOSSES["ctm"]):
        assert torch.equal(flat(G), flat(minus)) and not any(p.requires_grad for p in minus.parameters())
        seen.append(1)
        return loss(G, minus, teacher, b, cfg, progress)
    seen = []
    monkeypatch.setitem(LOSSES, "ctm", spy)
    train(quick(loss="ctm"))
    assert len(seen) == 4


def test_boot_reads_no_data():
    """BOOT's draws hold noise alone, and its loss is finite on them."""
    b = consistency.draw(8, common.load_data(quick()), "cpu", "boot")
    D = common.Denoiser(common.MLP(2, 6, width=16))
    assert b.x is None and LOSSES["boot"](D, D, common.Denoiser(common.MLP()), b, setting("boot", N=8), 0.0)[0].isfinite().all()


@pytest.mark.parametrize("loss", ["scott", "sprint"])
def test_micro_batches_change_nothing(loss):
    check_micro(train, quick, (1, 16), loss=loss)


@pytest.mark.parametrize("kw", [dict(loss="sprint"), dict(loss="ctm", cond=True)])
def test_resume_is_bit_exact(monkeypatch, kw):
    check_resume(monkeypatch, train, quick, **kw)


@pytest.mark.parametrize("wrong, says", [
    (dict(loss="ct", teacher="exact"), "without a teacher"), (dict(loss="nope"), "unknown loss"), (dict(sigma_init=2.0), "sigma_max"),
    (dict(N=1), "--N"), (dict(loss="ct", s0=500), "--s0"), (dict(eta=1.5), "--eta"), (dict(dropout=0.1), "--dropout"),
    (dict(nfe=0), "--nfe"), (dict(mid=0.0), "--mid"), (dict(mid=8.0), "--mid"), (dict(q=1.0), "--q"), (dict(adv=-0.5), "--adv"),
    (dict(target_ema=1.0), "--target_ema"), (dict(loss="ect", stages=40), "--stages"), (dict(loss="ct", p_mean=50.0), "--p_mean")])
def test_bad_input(wrong, says):
    """Impossible settings end in one sentence, before anything is written."""
    with pytest.raises(UserError, match=says):
        train(quick(**wrong))
    assert not common.Path("run").exists()


def test_tangent_through_a_unet_with_attention():
    """Forward derivatives exist for the image network: against finite differences, to float32's accuracy."""
    D = common.Denoiser(common.UNet(8, 1, width=8, mult=(1,), blocks=1, attention=(8,)), 0.5)
    for p in D.parameters():
        p.data += 0.1 * torch.randn_like(p)
    x_t, slope, t = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8), torch.rand(4) + 0.3
    with torch.no_grad():
        got = consistency.tangent(D, x_t, t, slope, None, 0.5)
        f_trig = lambda h: D((x_t + h * slope) / common.bcast((t + h).cos(), x_t), 0.5 * (t + h).tan())
        want = common.bcast(t.cos(), x_t) * (f_trig(1e-2) - f_trig(-1e-2)) / 2e-2
    assert (got - want).abs().max() < 0.02 * want.abs().max()
