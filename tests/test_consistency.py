"""consistency.py against closed forms (Gaussian flow maps, tangents, levels), and its loop."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import consistency
from common import GaussianMixture, UserError
from consistency import LOSSES, Config, Draw, lognormal, sample, tangent, train

F64 = torch.float64
EVERY = [*LOSSES, "meanflow data"]                      # the last: with --velocity data


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    """A folder and a seed for each test; no pictures and no solved ODEs, which take longest."""
    def gallery(cfg, data, teacher):
        with torch.random.fork_rng([]):
            x, label = data.sample(8)
        solved = {} if teacher is None else {"teacher, 35 network calls": x}
        return dict(data=x) | solved, 0 * x + 1, label
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common.Run, "show", lambda *args: None)
    monkeypatch.setattr(consistency, "gallery", gallery)
    for name in ("draw_log", "draw_gif", "save_picture"):
        monkeypatch.setattr(common, name, lambda *args: None)
    torch.manual_seed(0)


def quick(loss="cd", **kw):
    """Flags of a run of half a second."""
    name, *data = loss.split()
    small = dict(device="cpu", steps=4, batch=32, width=16, samples=200, every=2, out="run",
                 loss=name, velocity="data" if data else "teacher")
    return Config(**small | kw)


def go(loss, **kw):
    """(student, run) of quick(loss, ...), the teacher an untrained network."""
    torch.manual_seed(0)
    cfg = quick(loss, **kw)
    scratch = loss in ("ct", "meanflow data")
    return train(cfg, None, None if scratch else common.build(cfg, common.load_data(cfg)).eval())


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
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    nodes, weights = torch.tensor(nodes), torch.tensor(weights / weights.sum())
    levels = (torch.arange(n, dtype=F64) + 0.5) / n
    u, x, eps = [a.reshape(-1, 1) for a in torch.meshgrid(levels, nodes, nodes, indexing="ij")]
    weight = (torch.ones(n, 1, 1) / n * weights[:, None] * weights).flatten()
    w = torch.arange(len(u), dtype=F64)[:, None] * 0.618 % 1
    return Draw(M + S * x, None, eps, u, w), weight


def value(loss, progress=0.99, scale=None, **kw):
    """Mean loss at the exact solution, or a scaled one, with the exact teacher."""
    b, weight = pairs()
    G = Exact(loss, scale)
    return (weight * LOSSES[loss](G, G, P, b, setting(loss, **kw), progress)).sum()


def test_exact_student_is_the_flow():
    """The closed form above is the ODE's, against 1000 Heun steps; its jumps lie on one path."""
    x, t = torch.randn(20, 1, dtype=F64) * T, torch.full((20, 1), T, dtype=F64)
    fine = common.heun_sample(P, x / T, steps=1000, sigma_min=1e-3, sigma_max=T)
    torch.testing.assert_close(Exact()(x, t), fine, rtol=0, atol=1e-5)
    s = torch.rand(20, 1, dtype=F64) * T
    at_s = consistency.jump(Exact("ctm"), x, t, s, None, s / t)
    torch.testing.assert_close(Exact()(at_s, s), Exact()(x, t), rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", ["cd", "ctm"])
def test_distillation_is_zero_to_the_order_of_its_solver(loss):
    """At the exact solution the squared loss is the square of Heun's local error: h^6."""
    coarse, fine = float(value(loss, N=160)), float(value(loss, N=320))
    assert 0 < fine < 1e-10 and abs(math.log2(coarse / fine) - 6) < 0.5, (coarse, fine)
    assert value(loss, N=320, scale=WRONG) > 1e-8


@pytest.mark.parametrize("loss", ["scd", "meanflow"])
def test_continuous_distillation_is_zero(loss):
    """The tangent (sCM) and u - v + (t - r) du/dt (MeanFlow) vanish there up to rounding."""
    assert value(loss) < 1e-20 and value(loss, scale=WRONG) > 1e-8


def test_meanflows_weight():
    """error / (error + floor)^power, the denominator held fixed; power 0 is the error itself."""
    b, _ = pairs(3)
    errors, weighted = [LOSSES["meanflow"](Exact("meanflow", WRONG), Exact("meanflow"), P, b, setting(
        "meanflow", power=power, floor=0.1), 0.5) for power in (0.0, 0.75)]
    assert errors.max() > 1e-3
    torch.testing.assert_close(weighted, errors / (errors + 0.1) ** 0.75)


@pytest.mark.parametrize("loss, settings", [
    ("ct", [dict(progress=0.3, s1=40), dict(progress=0.5, s1=40)]),
    ("ect", [dict(q=64.0, stages=1), dict(q=128.0, stages=1)])])
def test_training_without_teacher_is_stationary(loss, settings):
    """The mean gradient at the exact solution is of first order in the step."""
    s = torch.ones(1, dtype=F64, requires_grad=True)
    coarse, fine = [torch.autograd.grad(value(loss, scale=s, **kw), s)[0] for kw in settings]
    assert 0.3 < fine / coarse < 0.6, (coarse, fine)


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
    cfg, x, t = quick("ctm"), torch.randn(9, 2), torch.rand(9, 1) + 0.1
    teacher = common.build(cfg, common.load_data(cfg))
    G = consistency.set_up(cfg, None, teacher, None)[2]
    assert torch.equal(G(x, t, None, t), teacher(x, t))
    G = train(cfg, None, teacher)[0]
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


@pytest.mark.parametrize("loss", EVERY)
def test_every_loss_runs_saves_and_draws(loss, monkeypatch):
    """A few steps: finite metrics, and the saved student draws what the trained one does."""
    student, run = go(loss, nfe=2, cond=loss in ("cd", "meanflow"))
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert 0 < metrics["H"] < 1 and math.isfinite(metrics["H_2_steps"])
    assert ("paired" in metrics) == (loss not in ("ct", "meanflow data"))
    again, z = common.load_denoiser("run", run.cfg), torch.randn(50, 2)
    torch.manual_seed(1)
    x = sample(student, 50, z=z, nfe=3)
    torch.manual_seed(1)
    assert torch.equal(sample(again, 50, z=z, nfe=3), x) and len(again.levels) == 2
    monkeypatch.setattr("sys.argv", "consistency.py --sample run --samples 30".split())
    consistency.main(Config, consistency.PRESETS, train, sample)
    assert np.load("run/draw.npy").shape == (30, 2)


@pytest.mark.parametrize("loss, kw", [("sprint", {}), ("ctm", dict(cond=True))])
def test_resume_is_bit_exact(loss, kw, monkeypatch):
    """4 steps, a power cut, and 2 more are 6 steps in one go, to the bit."""
    def save(self):
        whole(self)
        if self.step == 4:
            raise InterruptedError
    whole = common.Run.save
    go(loss, steps=6, out="straight", **kw)
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(common.Run, "save", save)
        go(loss, steps=6, out="broken", **kw)
    go(loss, steps=6, out="broken", resume=True, **kw)
    a, b = [torch.load(f"{d}/last.pt", weights_only=True) for d in ("straight", "broken")]
    torch.testing.assert_close((a["state"], a["rng"]), (b["state"], b["rng"]), rtol=0, atol=0)


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


@pytest.mark.parametrize("loss, dtype", [("sprint", "bf16"), ("ctm", "fp32")])
def test_images_with_labels_dropout_and_two_parts(loss, dtype):
    pixels = torch.randint(256, (40, 1, 12, 12), dtype=torch.uint8)
    cfg = quick(loss, data="mnist", width=8, cond=True, steps=2, batch=4, accumulate=2, N=4,
                teacher_steps=1, dropout=0.1, recompute=loss == "ctm", dtype=dtype)
    student, _ = train(cfg, common.Images(pixels, torch.arange(40) % 4, 4))
    x = sample(student, 3, torch.eye(4)[:3], nfe=2)
    assert x.shape == (3, 1, 12, 12) and x.isfinite().all() and not student.training


@pytest.mark.parametrize("wrong, says", [
    (dict(loss="ct", teacher="exact"), "without a teacher"), (dict(sigma_init=2.0), "sigma_max"),
    (dict(loss="meanflow data", teacher="exact"), "without a teacher"), (dict(N=1), "--N"),
    (dict(velocity="data"), "--velocity"), (dict(s0=500), "--s0"), (dict(nfe=0), "--nfe"),
    (dict(data="mnist", dropout=0.1, compile=True), "--compile"), (dict(dropout=0.1), "--dropout"),
    (dict(mid=8.0), "--mid"), (dict(gamma=2.0), "--gamma"), (dict(p_mean=50.0), "--p_mean"),
    (dict(q=1.0), "--q"), (dict(stages=40), "--stages")])
def test_bad_input_is_one_sentence_before_anything_is_written(wrong, says):
    with pytest.raises(UserError, match=says):
        train(quick(**wrong))
    assert not list(Path(".").iterdir())


class Own(torch.nn.Module):
    """A network of one's own; `top` 0 makes it x_t at sigma 0."""

    def __init__(self, top):
        super().__init__()
        self.top, self.layer = top, torch.nn.Linear(2, 2)

    def forward(self, x_t, sigma, label=None):
        return x_t + (sigma + self.top) * self.layer(x_t)


def test_own_students():
    """One that is x_t at sigma 0 trains; others are told what a loss asks of them."""
    def teacher(x_t, sigma, label=None):
        return x_t / (1 + sigma**2)

    train(quick("cd"), None, teacher, Own(0.0))
    for loss, top, says in (("cd", 1.0, "x_t at sigma 0"), ("ctm", 0.0, "second")):
        with pytest.raises(UserError, match=says):
            train(quick(loss, out=f"run-{loss}-{top}"), None, teacher, Own(top))
