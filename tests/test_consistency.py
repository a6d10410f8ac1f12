"""consistency.py against closed forms (Gaussian flow maps, tangents, levels), and its loop."""
import math
from pathlib import Path

import pytest
import torch

import common
import consistency
from common import GaussianMixture, UserError
from conftest import F64, TINY, hermite
from consistency import LOSSES, Config, Draw, lognormal, sample, tangent, train

EVERY = [*LOSSES, "meanflow data"]                      # the last: with --velocity data


@pytest.fixture(autouse=True)
def gallery_of_eight(monkeypatch, no_pictures):
    def gallery(cfg, data, teacher):
        with torch.random.fork_rng([]):
            x, label = data.sample(8)
        solved = {} if teacher is None else {"teacher, 35 network calls": x}
        return solved, 0 * x + 1, label

    monkeypatch.setattr(consistency, "gallery", gallery)


def quick(loss="cd", **flags):
    name, *data = loss.split()
    return Config(**(TINY | dict(loss=name, velocity="data" if data else "teacher") | flags))


def network(**flags):
    """An untrained teacher."""
    cfg = quick(**flags)
    return common.build(cfg, common.load_data(cfg)).eval()


def go(loss, **flags):
    """(student, run) of a run of half a second."""
    scratch = loss in ("ct", "meanflow data")
    return train(quick(loss, **flags), None, None if scratch else network(**flags))


# ---- the losses at their exact solution: one Gaussian N(0.7, 0.8^2) in 1-D, float64 ----

M, S, T = 0.7, 0.8, 5.0
WRONG = torch.tensor([1.1], dtype=F64)                  # a student up to 10 % off
P = GaussianMixture(torch.full((1, 1), M, dtype=F64), S)


def smooth(x, sigma, label=None, second=None):
    """No denoiser of anything, but a smooth function with all derivatives, and x at sigma 0."""
    return x / (1 + sigma**2) + torch.sin(3 * x + sigma) * sigma / (1 + sigma)


class Exact:
    """The exact student: g of the exact jump from t to rho t; with rho = 0 where the path ends."""
    sigma_data = S

    def __init__(self, loss="cd", scale=None):
        self.loss, self.scale = loss, scale             # (1,), to differentiate by

    def __call__(self, x, t, label=None, second=None):
        rho = torch.zeros_like(t) if second is None else second
        if self.loss == "meanflow":
            rho = second / (1 - second) / t
        root = ((S**2 + (rho * t) ** 2) / (S**2 + t**2)) ** 0.5
        g = (1 + rho) / (S**2 + t**2) * (M * t**2 / (1 + root) + x * S**2 / (root + rho))
        return g if self.scale is None else M + (1 + (self.scale - 1) * t / (1 + t)) * (g - M)


def setting(loss, **kw):
    return Config(**dict(loss=loss, sigma_min=0.02, huber=False, dsm=0.0, p_mean=0.0) | kw)


def pairs(n=40):
    """A Draw that integrates over x and eps exactly (Gauss-Hermite) for each level, and weights."""
    z, eps, weight = hermite(8)
    u = (torch.arange(n, dtype=F64)[:, None] + 0.5).repeat_interleave(64, 0) / n
    w = torch.arange(len(u), dtype=F64)[:, None] * 0.618 % 1
    return Draw(M + S * z.repeat(n, 1), None, eps.repeat(n, 1), u, w), weight.repeat(n) / n


def value(loss, progress=0.99, scale=None, **kw):
    """Mean loss at the exact solution, or a scaled one, with the exact teacher."""
    b, weight = pairs()
    G = Exact(loss, scale)
    return (weight * LOSSES[loss](G, G, P, b, setting(loss, **kw), progress)).sum()


@pytest.mark.parametrize("loss", ["cd", "ctm"])
def test_distillation_is_zero_to_the_order_of_its_solver(loss):
    """At the exact solution the squared loss is the square of Heun's local error: h^6."""
    coarse, fine = float(value(loss, N=160)), float(value(loss, N=320))
    assert 0 < fine < 1e-10 and abs(math.log2(coarse / fine) - 6) < 0.5
    assert value(loss, N=320, scale=WRONG) > 1e-8


@pytest.mark.parametrize("name", ["cd", "ctm"])
def test_weight_of_an_error(name, monkeypatch):
    """As in denoising, 1 / sigma^2 + 1 / sigma_data^2, sigma the upper level."""
    monkeypatch.setattr(consistency, "distance", lambda a, b, cfg: torch.ones(len(a), dtype=F64))
    (b, _), G = pairs(3), Exact(name)
    loss = LOSSES[name](G, G, P, b, setting(name, N=3, sigma_max=5.0, dsm=0.0), 0.0)
    sigma = common.karras_sigmas(3, 0.02, 5.0)[:3].repeat_interleave(64).to(F64)
    torch.testing.assert_close(loss, 1 / sigma**2 + 1 / S**2)


@pytest.mark.parametrize("loss", ["scd", "meanflow"])
def test_continuous_distillation_is_zero(loss):
    """The tangent (sCM) and u - v + (t - r) du/dt (MeanFlow) vanish there up to rounding."""
    assert value(loss) < 1e-20 and value(loss, scale=WRONG) > 1e-8


def test_meanflows_weight():
    """error / (error + floor)^power, the denominator held fixed; power 0 is the error itself."""
    def loss(power):
        cfg = setting("meanflow", power=power, floor=0.1)
        return LOSSES["meanflow"](Exact("meanflow", WRONG), Exact("meanflow"), P, b, cfg, 0.5)

    b, _ = pairs(3)
    errors = loss(0.0)
    assert errors.max() > 1e-3
    torch.testing.assert_close(loss(0.75), errors / (errors + 0.1) ** 0.75)


@pytest.mark.parametrize("loss, settings", [
    ("ct", [dict(progress=0.3, s1=40), dict(progress=0.5, s1=40)]),
    ("ect", [dict(q=64.0, stages=1), dict(q=128.0, stages=1)])])
def test_training_without_teacher_is_stationary(loss, settings):
    """The mean gradient at the exact solution is of first order in the step."""
    s = torch.ones(1, dtype=F64, requires_grad=True)
    coarse, fine = [torch.autograd.grad(value(loss, scale=s, **kw), s)[0] for kw in settings]
    assert 0.3 < fine / coarse < 0.6


def test_tangent_is_a_finite_difference():
    """cos t df/dt of any smooth denoiser along dx/dt = slope; with r = 0, its first term."""
    x_t, slope = torch.randn(2, 64, 2, dtype=F64)
    t = torch.rand(64, 1, dtype=F64) * 1.3 + 0.1

    def f(h):
        return smooth((x_t + h * slope) / (t + h).cos(), 0.7 * (t + h).tan())
    want = t.cos() * (f(1e-6) - f(-1e-6)) / 2e-6
    got = tangent(smooth, x_t, t, slope, None, 0.7)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    first = t.cos() ** 2 * (slope - 0.7 * consistency.trigflow(smooth, x_t, t, None, 0.7))
    torch.testing.assert_close(tangent(smooth, x_t, t, slope, None, 0.7, 0.0), first)


@pytest.mark.parametrize("progress, r", [(0.9, 1.0), (0.05, 0.25)])
def test_scm_gradient_is_along_the_normalised_tangent(progress, r):
    """In F it is -2 g / dim, |g| = |tangent| / (|tangent| + 0.1); the second term comes in by r."""
    (x, eps), u = torch.randn(2, 9, 3, dtype=F64), torch.rand(9, 1, dtype=F64)
    sd, shift, cfg = 0.7, torch.zeros(9, 3, dtype=F64, requires_grad=True), setting("sct")
    t = torch.arctan(lognormal(u, cfg) / sd)

    def G(x, sigma, label=None):                        # F + shift
        return smooth(x, sigma) - sd * t.sin() * shift
    G.sigma_data = sd
    loss = LOSSES["sct"](G, smooth, None, Draw(x, None, eps, u, None), cfg, progress)
    x_t, slope = t.cos() * x + t.sin() * sd * eps, t.cos() * sd * eps - t.sin() * x
    g = tangent(smooth, x_t, t, slope, None, sd, r)
    g = g / (g.norm(dim=1, keepdim=True) + 0.1)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), shift)[0], -2 * g / 3)


@pytest.mark.parametrize("adm", [False, True])
def test_jvp_is_torchs_own(adm):
    """Through convolutions, norms, attention, labels and the second number; channels_last too."""
    D = common.Denoiser(common.UNet(8, 1, 3, 16, (1, 2), 1, (8, 4), adm=adm, second=True))
    for p in D.parameters():
        p.data += 0.05 * torch.randn_like(p)
    label, r, t = torch.eye(3), *torch.rand(2, 3, 1, 1, 1) + 0.3
    x, dx = torch.randn(2, 3, 1, 8, 8)
    args = [lambda x, t: D(x, t, label, r), (x, t), (dx, t / 2)]
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        want = torch.func.jvp(*args)
        for layout in (torch.contiguous_format, torch.channels_last):
            D.to(memory_format=layout)
            torch.testing.assert_close(tuple(consistency.jvp(*args)), want, rtol=1e-4, atol=1e-4)


def test_distance():
    """Mean square; pseudo-Huber; for c = 0 the norm, whose gradient at 0 is 0 and not NaN."""
    a, b = torch.randn(2, 5, 3, dtype=F64)
    norm = (a - b).norm(dim=1)
    torch.testing.assert_close(consistency.distance(a, b, setting("cd")), norm**2 / 3)
    for c, want in ((0.3, (norm**2 + 0.09).sqrt() - 0.3), (0.0, norm)):
        got = consistency.distance(a, b, setting("ect", huber=True, c=c))
        torch.testing.assert_close(got, want)
    a.requires_grad_()
    consistency.distance(a, a.detach(), setting("ect", huber=True, c=0.0)).sum().backward()
    assert (a.grad == 0).all()


@pytest.mark.parametrize("s1, progress, steps", [(40, 0.3, 10), (40, 0.4, 20), (30, 0.99, 30)])
def test_ct_levels(s1, progress, steps):
    """10, 20, ... steps, s1 at last; pairs as likely as ln sigma between their ends (Eq. 10)."""
    u, grid = (torch.arange(40_000, dtype=F64) + 0.5) / 40_000, common.karras_sigmas(steps, 0.02, T)
    sigma, lower = consistency.ct_levels(u, setting("ct", s1=s1, p_mean=-0.3, p_std=0.9), progress)
    cdf = torch.distributions.Normal(-0.3, 0.9).cdf(grid.clamp(min=1e-30).log())
    want = (cdf[:-1] - cdf[1:]) / cdf[0]
    i = torch.searchsorted(-grid, -sigma - 1e-9)
    torch.testing.assert_close((sigma, lower), (grid[i], grid[i + 1]))
    assert (want - torch.bincount(i, minlength=steps) / len(u)).abs().max() < 1e-3


@pytest.mark.parametrize("progress, gap", [(0.0, 1 / 2), (0.3, 1 / 4), (1.0, 1 / 16)])
def test_ect_levels(progress, gap):
    """1 - lower / sigma is q^-(stage + 1) (1 + 8 sigmoid(-sigma)), at most 1 (ECT's code)."""
    u = (torch.arange(100, dtype=F64) + 0.5) / 100
    sigma, lower = consistency.ect_levels(u, setting("ect"), progress)
    torch.testing.assert_close(1 - lower / sigma, (gap * (1 + 8 / (1 + sigma.exp()))).clamp(max=1))


def test_papers_settings():
    """Second calls' levels, iCT's c, ECT's norm, dropout, and 10,000 steps of sCM's warm-up."""
    cd, ct, ect, scd, sct = [Config(data="cifar10", loss=loss) for loss in list(LOSSES)[:5]]
    for cfg, level in (cd, 1.382), (ct, 0.821), (ect, 0.821), (scd, math.tan(1.1) / 2):
        assert cfg.mid / 2 == pytest.approx(level, rel=0.01), cfg.loss
    assert ct.huber and ct.c == pytest.approx(0.00054 * 3072**0.5, rel=0.01)
    assert ect.huber and ect.c == 0 and not cd.huber and scd.warmup * scd.steps == 10_000
    assert [cfg.dropout for cfg in (cd, ct, ect, scd, sct)] == [0, 0.3, 0.2, 0, 0.2]


def test_second_number_starts_without_effect():
    """ctm's student is the teacher before its first update, and heeds the second number later."""
    x, t, teacher = torch.randn(9, 2), torch.rand(9, 1) + 0.1, network()
    G = consistency.set_up(quick("ctm"), None, teacher, None)[2]
    assert torch.equal(G(x, t, None, t), teacher(x, t))
    G = go("ctm")[0]
    assert not torch.equal(G(x, t, None, t), G(x, t, None, 0 * t))


@pytest.mark.parametrize("loss", EVERY)
def test_compared_calls_share_their_dropout(loss, monkeypatch):
    """The masks of the passes that make the target come again in those compared with it."""
    def spy(x, p, training=True):
        masks.append((torch.rand(x.shape) < p).float())
        return masks[-1]
    masks, cfg = [], quick(loss, data="mnist")
    monkeypatch.setattr(torch.nn.functional, "dropout", spy)
    second = cfg.loss in consistency.SECOND
    G = common.Denoiser(common.UNet(8, 1, 0, 16, (1,), 1, (), second=second))
    for module in G.modules():
        module.dropout = 0.5
    b = Draw(torch.randn(4, 1, 8, 8), None, torch.randn(4, 1, 8, 8), *torch.rand(2, 4, 1, 1, 1))
    LOSSES[cfg.loss](G, G, smooth, b, cfg, 0.5)
    passes = 5 if loss == "ctm" else 2                  # ctm: two for each side, and the denoising
    half = passes // 2 * (len(masks) // passes)
    assert half and all(torch.equal(a, b) for a, b in zip(masks[:half], masks[half:2 * half]))


class Recorder(torch.nn.Linear):
    """A student that leaves x as it is and notes where it is called."""
    shape, label_dim, class_weights, most, sigma_init, sigma_data = (1,), 0, [], 8, T, 0.8

    def __init__(self, **config):
        super().__init__(1, 1)
        usual = dict(loss="cd", nfe=1, mid=1.5, gamma=0.0, sigma_min=0.02, sigma_max=T)
        self.config, self.seen = usual | config, []

    def forward(self, x, t, label=None, second=None):
        self.seen.append(float(t[0] if second is None else second[0]))
        return x


def test_levels_of_the_calls():
    """mid, mid / 2, ... times the data's std, nothing below sigma_min, however many calls."""
    student = Recorder(nfe=4)
    sample(student, 3)
    sample(student, 3, nfe=2000, mid=1.0)
    assert student.seen[:6] == pytest.approx([T, 1.2, 0.6, 0.3, T, 0.8])
    assert student.seen[-1] == pytest.approx(0.02)


@pytest.mark.parametrize("loss, second", [("ctm", 0.96 / T), ("meanflow", 0.96 / 1.96)])
def test_gamma_sampling(loss, second):
    """A call jumps to sqrt(1 - gamma^2) of the next level, the last one to 0 (CTM, Algorithm 3)."""
    student, z = Recorder(loss=loss, nfe=2, gamma=0.6), torch.ones(3, 1)
    assert not torch.equal(sample(student, 3, z=z), sample(student, 3, z=z))
    assert student.seen[:2] == pytest.approx([second, 0.0])


# ---- the loop ----


@pytest.mark.parametrize("loss", EVERY)
def test_every_loss_runs(loss):
    """A few steps: finite figures, the distance to the teacher's ODE only where there is one."""
    _, run = go(loss, cond=loss in ("cd", "meanflow"))
    metrics = common.read_json(run.dir / "metrics.json")
    assert 0 < metrics["H"] < 1 and math.isfinite(metrics["H_2_steps"])
    assert ("paired" in metrics) == (loss not in ("ct", "meanflow data"))


def test_minus_is_the_student_held_fixed(monkeypatch):
    def spy(G, minus, *rest):
        both = zip(G.parameters(), minus.parameters())
        seen.append(all(torch.equal(p, q) and not q.requires_grad for p, q in both))
        return loss(G, minus, *rest)
    seen, loss = [], LOSSES["ctm"]
    monkeypatch.setitem(LOSSES, "ctm", spy)
    assert go("ctm") and seen == [True] * 4


def test_scms_weight_makes_levels_count_the_same(monkeypatch):
    """With a loss of 4 everywhere exp(w) 4 - w is least at exp(w) = 1/4."""
    def four(G, minus, teacher, b, cfg, progress):
        return 4 + 0 * G(b.x, b.u + 1).sum(1)
    monkeypatch.setattr(consistency, "scm_loss", four)
    monkeypatch.setitem(LOSSES, "scd", four)
    _, run = go("scd", lr=0.05, steps=80, every=80, batch=256)
    assert (4 * run.state["weight"].weight.exp() - 1).abs().max() < 0.2


def test_sprints_head_prefers_data(monkeypatch):
    def spy(judge, disc, x, label):
        seen.append(look(judge, disc, x, label))
        return seen[-1]
    seen, look = [], consistency.look
    monkeypatch.setattr(consistency, "look", spy)
    go("sprint", steps=40, batch=256, every=40, lr_disc=0.1, lr=1e-9)
    real, fake, _ = torch.stack(seen).detach().mean(1).view(40, 3).T        # as they come in a step
    assert (real - fake)[-10:].mean() > 0.01


def test_sprints_student_climbs_the_logit(monkeypatch):
    """With a head that gives the first coordinate, samples move to the right."""
    def look(judge, disc, x, label):
        seen.append(float(x.detach()[:, 0].mean()))
        return x[:, 0] + 0 * disc[0].weight.sum()
    seen = []
    monkeypatch.setattr(consistency, "look", look)
    go("sprint", steps=20, batch=256, every=20, lr=0.02, adv=1e4)
    assert seen[-1] > seen[1] + 0.5


@pytest.mark.parametrize("wrong, says", [
    (dict(loss="ct", teacher="exact"), "without a teacher"), (dict(sigma_init=2.0), "sigma_max"),
    (dict(loss="meanflow data", teacher="exact"), "without a teacher"), (dict(N=1), "--N"),
    (dict(velocity="data"), "--velocity"), (dict(s0=500), "--s0"), (dict(nfe=0), "--nfe"),
    (dict(data="mnist", dropout=0.1, compile=True), "--compile"), (dict(dropout=0.1), "--dropout"),
    (dict(mid=8.0), "--mid"), (dict(gamma=2.0), "--gamma"), (dict(p_mean=50.0), "--p_mean"),
    (dict(q=1.0), "--q"), (dict(stages=40), "--stages")])
def test_bad_input_before_any_work(wrong, says):
    with pytest.raises(UserError, match=says):
        train(quick(**wrong))
    assert not Path("runs").exists()


class Own(torch.nn.Linear):
    """A network of one's own; `top` 0 makes it x_t at sigma 0."""
    top = 0.0

    def forward(self, x_t, sigma, label=None):
        return x_t + (sigma + self.top) * super().forward(x_t)


def test_own_students():
    """One that is x_t at sigma 0 trains; others are told what a loss asks of them."""
    def teacher(x_t, sigma, label=None):
        return x_t / (1 + sigma**2)

    train(quick(), None, teacher, Own(2, 2))
    wrong = Own(2, 2)
    wrong.top = 1.0
    for loss, student, says in (("cd", wrong, "x_t at sigma 0"), ("ctm", Own(2, 2), "second")):
        with pytest.raises(UserError, match=says):
            train(quick(loss, out=f"runs/{loss}"), None, teacher, student)
