"""sim.py against closed forms, quadrature and itself: gradients, the detached mistake, SiD, micro-batches, resume, data-free."""
import dataclasses
import json
import math

import numpy as np
import pytest
import torch

import common
import sim
from common import GaussianMixture, UserError
from conftest import TinyInception, check_micro, check_resume, flat
from sim import Config, sim_loss, train
from test_common import write_cifar

F64 = torch.float64


def quick(**kw):
    """A run of a second: tiny networks, few steps."""
    return Config(**{**dict(device="cpu", steps=4, batch=32, width=16, teacher_steps=20, samples=200, every=2, out="run"), **kw})


# ---- the loss ----
# 1-D throughout: teacher N(0, 1), student x = m + s z with m = 0.7, s = 0.8, the fake score exact.

P, Q = GaussianMixture(torch.zeros(1, 1, dtype=F64), 1.0), GaussianMixture(torch.full((1, 1), 0.7, dtype=F64), 0.8)


def divergence_gradient(sigma, kind, c, law_varies):
    """d/d(m, s) of int q(x_t) d(y(x_t)) by quadrature, y = d_fake - d_real; the sampling law q moves too, or is frozen."""
    m, s = torch.tensor(0.7, dtype=F64, requires_grad=True), torch.tensor(0.8, dtype=F64, requires_grad=True)
    x_t = torch.linspace(-14, 14, 40001, dtype=F64)
    var = s**2 + sigma**2
    log_q = -(x_t - m) ** 2 / (2 * var) - 0.5 * (2 * math.pi * var).log()
    y = m + s**2 / var * (x_t - m) - x_t / (1 + sigma**2)
    d = y**2 if kind == "l2" else (y**2 + c**2).sqrt() - c
    q = log_q.exp() if law_varies else log_q.exp().detach()
    return torch.stack(torch.autograd.grad(torch.trapezoid(q * d, x_t), (m, s)))


def loss_gradient(sigma, loss):
    """d/d(m, s) of E loss(x, d_real, d_fake) over z and eps by Gauss-Hermite, the per-sample normaliser multiplied back."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    nodes, weights = torch.tensor(nodes), torch.tensor(weights / weights.sum())
    z, eps, w = nodes.repeat_interleave(80)[:, None], nodes.repeat(80)[:, None], (weights[:, None] * weights).flatten()
    x = (0.7 + 0.8 * z).requires_grad_()
    x_t, level = x + sigma * eps, torch.full((6400,), sigma, dtype=F64)
    d_real, d_fake = P(x_t, level), Q(x_t, level)
    loss(x, d_real, d_fake).sum().backward()
    g = w * (x.grad * (x - d_real).abs().detach())[:, 0]
    return torch.stack([g.sum(), (g * z[:, 0]).sum()])


@pytest.mark.parametrize("kind, c", [("l2", 1.0), ("huber", 0.3)])
@pytest.mark.parametrize("sigma", [0.3, 1.0])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_gradient_against_quadrature(kind, c, sigma, alpha):
    """
    alpha 1 is the gradient of E d(y) with the law of x_t frozen, alpha 0.5 with the law varying (for l2: of the Fisher
    divergence), and any other alpha the combination frozen + 2 (1 - alpha) (varying - frozen), SiD's 1.2 included.
    """
    frozen, varying = (divergence_gradient(sigma, kind, c, law_varies) for law_varies in (False, True))
    got = loss_gradient(sigma, lambda x, d_real, d_fake: sim_loss(x, d_real, d_fake, kind, c, alpha))
    torch.testing.assert_close(got, frozen + 2 * (1 - alpha) * (varying - frozen), rtol=1e-3, atol=1e-5)
    if alpha == 0.5:
        torch.testing.assert_close(got, varying, rtol=1e-3, atol=1e-5)
    assert (varying - frozen).abs().min() > 1e-3            # the three alphas are told apart


@pytest.mark.parametrize("kind, c", [("l2", 1.0), ("huber", 0.3)])
def test_detached_networks_are_caught(kind, c):
    """
    The known mistake, y without its gradient in x_t: the gradient in the mean is still right, the one in the scale only
    half. The loss as it is passes the same check.
    """
    want = divergence_gradient(1.0, kind, c, law_varies=False)
    right = loss_gradient(1.0, lambda x, d_real, d_fake: sim_loss(x, d_real, d_fake, kind, c, 1.0))

    def detached(x, d_real, d_fake):
        _, slope = sim.distance((d_fake - d_real).detach(), kind, c)
        return -(slope * (d_fake - x)).sum(1) / (x - d_real).detach().abs().mean(1)
    wrong = loss_gradient(1.0, detached)
    torch.testing.assert_close(right, want, rtol=1e-3, atol=1e-5)
    assert abs(wrong[0] / want[0] - 1) < 1e-3 and abs(wrong[1] / want[1] - 0.5) < 1e-3


def test_published_values():
    """The facts' reference at sigma 0.5, in units of the score: Fisher (0.897, -0.996), SIM with l2 (1.258, -1.165)."""
    for alpha, want in ((0.5, (0.897, -0.996)), (1.0, (1.258, -1.165))):
        got = loss_gradient(0.5, lambda x, d_real, d_fake: sim_loss(x, d_real, d_fake, "l2", 1.0, alpha)) / 0.5**4
        assert (got - torch.tensor(want)).abs().max() < 2e-3


def sid_loss(x, d_real, d_fake, alpha):
    """SiD's loss as its paper writes it, per sample."""
    per_element = (d_real - d_fake) * ((d_real - x) - alpha * (d_real - d_fake))
    return per_element.flatten(1).sum(1) / (x - d_real).detach().abs().flatten(1).mean(1).clamp(min=1e-5)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_l2_is_sid(alpha):
    """SIM with d = |y|^2 is 2 SiD at alpha 1, value and gradient, and so for any alpha; images as well as points."""
    x = torch.randn(8, 3, 4, 4, dtype=F64, requires_grad=True)
    teacher, fake = torch.nn.Conv2d(3, 3, 3, padding=1).double(), torch.tanh
    loss = [f(x, teacher(x), fake(x)) for f in (lambda *a: sim_loss(*a, "l2", 1.0, alpha), lambda *a: 2 * sid_loss(*a, alpha))]
    torch.testing.assert_close(*loss)
    torch.testing.assert_close(*[torch.autograd.grad(part.sum(), x)[0] for part in loss])


def test_distances():
    """d' is the gradient of d, over all dimensions of a sample at once; pseudo-Huber is |y| far out and |y|^2 / 2c near 0."""
    for kind in ("l2", "huber"):
        y = torch.randn(6, 2, 3, dtype=F64, requires_grad=True)
        d, slope = sim.distance(y, kind, 0.4)
        torch.testing.assert_close(slope, torch.autograd.grad(d.sum(), y)[0])
    y = torch.randn(6, 5, dtype=F64)
    torch.testing.assert_close(sim.distance(1e6 * y, "huber", 0.4)[0], 1e6 * y.norm(dim=1), rtol=1e-6, atol=1)
    torch.testing.assert_close(sim.distance(1e-4 * y, "huber", 0.4)[0], 1e-8 * y.square().sum(1) / 0.8, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["l2", "huber"])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_stationary_where_fake_equals_teacher(kind, alpha):
    """The student does not move where both networks are one function, although gradients pass through both."""
    net = common.Denoiser(common.MLP(width=16))
    x, sigma = torch.randn(16, 2, requires_grad=True), torch.rand(16) + 0.1
    x_t = x + sigma[:, None] * torch.randn(16, 2)
    loss = sim_loss(x, net(x_t, sigma), net(x_t, sigma), kind, 0.1, alpha)
    loss.sum().backward()
    assert (loss == 0).all() and x.grad.abs().max() < 1e-5      # the two passes' gradients cancel up to rounding


def test_loss_is_finite_at_its_corners():
    """x on the teacher's estimate, and y = 0: the normaliser's clamp and c keep value and gradient finite."""
    x = torch.zeros(4, 2, requires_grad=True)
    loss = sim_loss(x, x * 1.0, x * 0.5, "huber", 0.01, 1.2)
    loss.sum().backward()
    assert loss.isfinite().all() and x.grad.isfinite().all()


# ---- the loop ----


def test_gradients_pass_through_both_networks(monkeypatch):
    """In the loop, d_real and d_fake depend on x, neither network's weights get a gradient from it, the student's do."""
    seen, loss = [], sim.sim_loss

    def spy(x, d_real, d_fake, *args):
        for d in (d_real, d_fake):
            assert torch.autograd.grad(d.sum(), x, retain_graph=True)[0].abs().max() > 0
        seen.append(loss(x, d_real, d_fake, *args))
        return seen[-1]
    monkeypatch.setattr(sim, "sim_loss", spy)
    nets, student = [], sim.initial_student
    monkeypatch.setattr(sim, "initial_student", lambda *a: nets.append(student(*a)) or nets[-1])
    step = torch.optim.Adam.step

    def checked(opt, *args):
        (G, fake), mine = nets, {id(p) for group in opt.param_groups for p in group["params"]}
        for net in (G, fake):                       # when one is stepped, the other has not been touched
            assert all((p.grad is not None) == (id(p) in mine) for p in net.parameters())
        return step(opt, *args)
    common.load_teacher(quick())
    monkeypatch.setattr(torch.optim.Adam, "step", checked)
    train(quick(fake_updates=1))
    assert len(seen) == 4


@pytest.mark.parametrize("kw", [{}, dict(cond=True, data="unequal", distance="huber", alpha=1.2), dict(fake="exact", alpha=0.5)])
def test_micro_batches_change_nothing(kw):
    check_micro(train, quick, (16, 8), **kw)


@pytest.mark.parametrize("kw", [dict(cond=True), dict(fake="exact", teacher="exact"), dict(distance="huber", alpha=0.5)])
def test_resume_is_bit_exact(monkeypatch, kw):
    check_resume(monkeypatch, train, quick, **kw)


def test_same_seed_same_student_other_seed_other():
    a, b, c = (flat(train(quick(out=f"r{i}", seed=seed))[0]) for i, seed in enumerate((0, 0, 1)))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_short_run_learns_the_ring(monkeypatch):
    """A seventh of the default run already has all eight modes: H far below the 0.009 of a ring that lacks one."""
    monkeypatch.setattr(sim, "gallery", lambda *a: common.gallery(*a, n=100))
    _, run = train(Config(device="cpu", steps=200, batch=256, teacher_steps=400, samples=3000, every=1000, out="run"))
    metrics = json.loads((run.dir / "metrics.json").read_text())
    assert metrics["H"] < 0.006 and metrics["mode_min"] > 0.5, metrics


@pytest.mark.parametrize("wrong, says", [(dict(fake="exact", data="cifar10"), "needs a toy"), (dict(c=0.0), "--c"),
                                         (dict(fake_updates=0), "fake_updates"), (dict(u_max=1.5), "u_max"),
                                         (dict(lr_fake=-1.0), "lr_fake")])
def test_bad_input(wrong, says):
    """Impossible combinations end in one sentence, before anything is written."""
    with pytest.raises(UserError, match=says):
        train(quick(**wrong))
    assert not common.Path("run").exists()


def test_a_student_cannot_take_two_steps():
    with pytest.raises(UserError, match="one step"):
        sim.sample(common.Denoiser(common.MLP(width=8)), 3, steps=2)


# ---- images ----


def test_images_end_to_end_and_data_free(tmp_path, monkeypatch):
    """
    A few CPU steps on files in CIFAR-10's format: teacher fitted and cached, picture, FID of student and teacher. Then
    with that teacher as a file and the images taken away once training begins: the same student to the bit.
    """
    write_cifar(tmp_path / "data")
    torch.jit.script(TinyInception()).save("tiny.pt")
    cfg = Config(data="cifar10", data_dir="data", device="cpu", net="small", width=8, cond=True, steps=2, batch=8, micro=4,
                 teacher_steps=2, samples=12, fid="tiny.pt", every=2, sigma_min=0.002, sigma_max=80.0, out="run")
    monkeypatch.setattr(sim, "gallery", lambda *a: common.gallery(*a, n=4))
    student, run = train(cfg)
    metrics = json.loads((run.dir / "metrics.json").read_text())
    assert metrics["fid_ref"] == "cifar10 training images, 100"
    assert all(math.isfinite(metrics[f"fid12_train100_{name}"]) for name in ("1_step", "teacher_18_steps", "teacher_1_step"))
    x = sim.sample(student, 3)
    assert x.shape == (3, 3, 32, 32) and x.isfinite().all()

    def untouchable(n):
        raise AssertionError("an image was read")

    def fork(f, *args):                                             # as the gallery does: the run's own draws stay the same
        with torch.random.fork_rng([]):
            return f(*args)

    def hide(cfg, data, teacher):                                   # in place of the picture, the last look at the data
        x, label = data.sample(4)
        data.sample, data.images, data.labels = untouchable, torch.empty(0, dtype=torch.uint8), None
        return {"data": x}, torch.randn_like(x), label
    monkeypatch.setattr(sim, "gallery", lambda *a: fork(hide, *a))
    path = str(next(common.Path("runs").glob("teacher-*/ema.pt")))
    free, _ = train(dataclasses.replace(cfg, out="run2", teacher=path, fid=""))
    assert torch.equal(flat(free), flat(student))                  # and it is the same student
    with pytest.raises(UserError, match="add --cond"):
        train(dataclasses.replace(cfg, cond=False, out="run3", teacher=path))
