"""dmd.py against closed forms, quadrature, fdistill.py and itself: losses, pairs, adapters, backward simulation, resume."""
import csv
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import dmd
import fdistill
from common import Denoiser, GaussianMixture, MLP, TOYS, UNet, UserError, generate, heun_sample, karras
from conftest import PowerCut, TinyInception, check_micro, check_resume, flat
from dmd import (Config, LowRank, add_adapters, dm_loss, regression_loss, roll_out, sample, student_sigmas, teacher_pairs, train,
                 vsd_loss)
from test_common import write_cifar

F64 = torch.float64
TINY = dict(device="cpu", steps=4, batch=32, width=16, teacher_steps=20, samples=200, every=2, out="run")
VARIANTS = [dict(cond=True), dict(variant="dmd", pairs=64, distance="huber"), dict(variant="vsd", rank=2, cond=True),
            dict(steps_student=4), dict(fake="exact", steps_student=2)]


@pytest.fixture(autouse=True)
def small_gallery(monkeypatch):
    """Pictures of few samples: they are looked at elsewhere."""
    for module in (dmd, fdistill):
        monkeypatch.setattr(module, "gallery", lambda cfg, data, teacher: common.gallery(cfg, data, teacher, n=4))


def quick(**kw):
    """A run of a second: tiny networks, few steps."""
    return Config(**{**TINY, **kw})


def tiny_student(seed=0, dim=2, **kw):
    torch.manual_seed(seed)
    G = Denoiser(MLP(dim, width=16, **kw))
    G.sigma_init = 5.0
    return G


# ---- the losses ----


@pytest.mark.parametrize("loss", ["dm", "vsd"])
def test_gradient_is_that_of_the_integral_kl(loss):
    """
    1-D teacher N(0, 1), student x = m + s z: the gradient, its weight divided out, equals the derivative in m and s of
    KL(q || p) of the noised Gaussians summed over noise levels, in closed form; the expectation is taken by quadrature.
    """
    m, s = torch.tensor(0.7, dtype=F64, requires_grad=True), torch.tensor(0.8, dtype=F64, requires_grad=True)
    levels = karras(torch.linspace(0.1, 1, 5, dtype=F64), 0.02, 5.0)
    p, q = 1 + levels**2, s**2 + levels**2
    kl = ((p / q).log() + (q + m**2) / p - 1) / 2
    w = levels * 0.5 / (levels**2 + 0.25) * levels**2 if loss == "vsd" else 1               # SwiftBrush's weight stays
    want = torch.autograd.grad((w * kl).sum(), (m, s))

    nodes, weights = (torch.tensor(a) for a in np.polynomial.hermite_e.hermegauss(40))                   # over z and eps
    weights = weights / weights.sum()
    sigma, z, eps = (a.flatten()[:, None] for a in torch.meshgrid(levels, nodes, nodes, indexing="ij"))
    probability = (weights[:, None] * weights).flatten().repeat(5)
    x = (m.detach() + s.detach() * z).requires_grad_()
    x_t, sigma = (x + sigma * eps).detach(), sigma[:, 0]
    d_real = GaussianMixture(torch.zeros(1, 1, dtype=F64), 1.0).denoise(x_t, sigma)
    d_fake = GaussianMixture(m.detach().reshape(1, 1), 0.8).denoise(x_t, sigma)
    if loss == "vsd":
        vsd_loss(x, d_real, d_fake, sigma, 0.5).sum().backward()
        g = x.grad[:, 0]
    else:
        dm_loss(x, d_real, d_fake).sum().backward()
        g = (x.grad * (x.detach() - d_real).abs())[:, 0] / sigma**2
    got = torch.stack([(probability * g).sum(), (probability * g * z[:, 0]).sum()])
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-5, atol=1e-6)


def test_stationary_where_fake_equals_teacher():
    """The student does not move where both scores agree."""
    x, d = torch.randn(16, 2, requires_grad=True), torch.randn(16, 2)
    (dm_loss(x, d, d.clone()) + vsd_loss(x, d, d.clone(), torch.rand(16) + 0.1, 0.5)).sum().backward()
    assert (x.grad == 0).all()


def test_normaliser():
    """DMD Eq. 8: the gradient is (d_fake - d_real) / mean|x - d_real|, over the elements of each sample."""
    x, d_real, d_fake = torch.randn(8, 3, 4, 4, requires_grad=True), torch.randn(8, 3, 4, 4), torch.randn(8, 3, 4, 4)
    dm_loss(x, d_real, d_fake).sum().backward()
    want = (d_fake - d_real) / (x - d_real).abs().mean((1, 2, 3), keepdim=True) / 48
    torch.testing.assert_close(x.grad, want.detach())


def test_regression_losses():
    """L2 is the mean square; pseudo-Huber has the gradient of |x - y| far away, of |x - y|^2 / 2c near, and is 0 at y."""
    y, c = torch.zeros(2, 2), 0.00054 * 2**0.5
    x = torch.tensor([[3.0, 4.0], [3e-6, 4e-6]], requires_grad=True)
    assert regression_loss(x, y, "l2").tolist() == pytest.approx([12.5, 12.5e-12])
    far, near = regression_loss(x, y, "huber")
    assert far.item() == pytest.approx(5 - c, rel=1e-6) and regression_loss(y, y, "huber").tolist() == [0, 0]
    (far + near).backward()
    torch.testing.assert_close(x.grad, torch.stack([x[0].detach() / 5, x[1].detach() / c]), rtol=1e-4, atol=1e-7)


# ---- parity with fdistill.py ----


def test_loss_is_f_distills_reverse_kl():
    """Same value and same gradient as fdistill's loss with divergence rkl, to 1e-6, whatever the ratio."""
    x, d_real, d_fake, r = torch.randn(64, 2), torch.randn(64, 2), torch.randn(64, 2), torch.rand(64) * 5 + 0.1
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss_a, loss_b = dm_loss(a, d_real, d_fake), fdistill.f_distill_loss(b, d_real, d_fake, r, "rkl", torch.ones(()))
    (loss_a.sum() + loss_b.sum()).backward()
    torch.testing.assert_close(loss_a, loss_b, rtol=2e-6, atol=0)
    torch.testing.assert_close(a.grad, b.grad, rtol=2e-6, atol=0)


@pytest.mark.parametrize("kw", [dict(cond=True), dict(fake="exact"), dict(micro=8)])
def test_run_is_f_distills_reverse_kl_without_gan(kw):
    """fdistill --divergence rkl --gan_weight 0 and dmd --gan_weight 0: the same losses, student and fake score, to 1e-6."""
    same = dict(TINY, gan_weight=0.0, steps=6, every=9, **kw)
    a, b = train(Config(**dict(same, out="a")))[0], fdistill.train(fdistill.Config(**dict(same, divergence="rkl", out="b")))[0]
    start = common.load_denoiser(next(Path("runs").glob("teacher-*")), quick())
    assert (flat(a) - flat(start)).abs().max() > 1e-3
    torch.testing.assert_close(flat(a), flat(b), rtol=0, atol=1e-6)
    fake_a, fake_b = (torch.load(f"{d}/last.pt", weights_only=True)["state"]["fake"] for d in "ab")
    torch.testing.assert_close(fake_a, fake_b, rtol=0, atol=1e-6)
    for row_a, row_b in zip(*(csv.DictReader(Path(d, "log.csv").read_text().splitlines()) for d in "ab")):
        assert float(row_a["dm"]) == pytest.approx(float(row_b["f"]), rel=1e-5) and row_a.get("fake") == row_b.get("fake")


# ---- regression pairs ----


def pairs_of(cfg, teacher):
    return teacher_pairs(cfg, teacher, common.load_data(cfg), torch.device("cpu"))


def test_pairs_are_the_teachers_and_kept(monkeypatch):
    """y is the Heun sample of z from sigma_init; a second call reads the file; another teacher, level or --cond makes its own."""
    cfg, teacher = quick(pairs=50), TOYS["ring"]
    z, label, y = pairs_of(cfg, teacher)
    assert label is None and z.shape == y.shape == (50, 2)
    torch.testing.assert_close(y, heun_sample(teacher, z, None, 18, cfg.sigma_min, cfg.sigma_init))
    assert teacher.log_prob(y, torch.zeros(50)).mean() > teacher.log_prob(teacher.sample(5000)[0], torch.zeros(5000)).mean() - 1
    calls, made = [], dmd.heun_sample
    monkeypatch.setattr(dmd, "heun_sample", lambda *a: calls.append(1) or made(*a))
    again = pairs_of(cfg, teacher)
    assert not calls and torch.equal(y, again[2]) and len(list(Path("runs").glob("pairs-ring-*"))) == 1
    others = [(cfg, GaussianMixture(teacher.means, 0.11)), (cfg, GaussianMixture(teacher.means * 1.01, 0.1)),
              (cfg, tiny_student(1)), (cfg, tiny_student(2)), (dataclasses.replace(cfg, sigma_init=4.0), teacher),
              (dataclasses.replace(cfg, cond=True), teacher)]
    before = torch.get_rng_state()
    for k, (other_cfg, other) in enumerate(others):
        calls.clear()
        assert not torch.equal(pairs_of(other_cfg, other)[2], y) and calls
        assert len(list(Path("runs").glob("pairs-ring-*"))) == k + 2
    assert torch.equal(before, torch.get_rng_state())               # making pairs does not shift the run's random draws
    z, label, y = pairs_of(others[-1][0], teacher)
    assert (torch.cdist(y, teacher.means).argmin(1) == label.argmax(1)).float().mean() > 0.95


def test_making_pairs_can_be_interrupted(monkeypatch):
    """What was made before a power cut is kept and not made again; the result is that of one go; damage is named."""
    cfg, made, calls = quick(pairs=2500, batch=1000), dmd.heun_sample, []
    whole = pairs_of(cfg, TOYS["ring"])[2]
    folder = next(Path("runs").glob("pairs-*"))
    folder.rename("runs/whole")

    def dying(*a):
        calls.append(1)
        if len(calls) == 2:
            raise PowerCut
        return made(*a)
    monkeypatch.setattr(dmd, "heun_sample", dying)
    with pytest.raises(PowerCut):
        pairs_of(cfg, TOYS["ring"])
    assert [f.name for f in folder.iterdir()] == ["0000000.pt"]
    assert torch.equal(pairs_of(cfg, TOYS["ring"])[2], whole) and len(calls) == 4 and len(whole) == 2500
    (folder / "0001000.pt").write_bytes(b"half a fi")
    with pytest.raises(UserError, match="0001000.pt is damaged"):
        pairs_of(cfg, TOYS["ring"])


# ---- vsd: adapters, no data ----


@pytest.mark.parametrize("net", [lambda: MLP(width=16), lambda: UNet(8, width=8, mult=(1,), blocks=1, attention=(8,))])
def test_adapters(net):
    """No effect at first, all there is to train, of the rank asked for, on linear and convolutional layers alike."""
    plain = Denoiser(net())
    x, sigma = torch.randn(5, *plain.shape), torch.rand(5) + 0.1
    want, layers = plain(x, sigma), sum(isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)) for m in plain.modules())
    with torch.no_grad():
        adapted = add_adapters(plain, 2)
    assert torch.equal(adapted(x, sigma), want)
    adapters = [m for m in adapted.modules() if isinstance(m, LowRank)]
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert len(adapters) == layers and {id(p) for p in trained} == {id(p) for m in adapters for p in (m.A, m.B)}
    for m in adapters:
        m.B.data.normal_()
        assert torch.linalg.matrix_rank(m.B @ m.A) <= 2
    assert (adapted(x, sigma) - want).abs().max() > 1e-3


def test_vsd_touches_no_data_and_trains_only_adapters(monkeypatch):
    """Every way to data cut once the teacher is fitted, vsd trains, dmd2 does not; its critic keeps the teacher's weights."""
    common.load_teacher(quick())
    z = torch.randn(10, 2)
    monkeypatch.setattr(dmd, "gallery", lambda *a: ({}, z, None))
    monkeypatch.setattr(dmd, "report", lambda *a: None)

    def refuse(*_):
        raise PowerCut
    for name in ("sample", "denoise", "forward", "log_prob", "score", "draw_label"):
        monkeypatch.setattr(GaussianMixture, name, refuse)
    with pytest.raises(PowerCut):
        train(quick(out="no"))
    student, _ = train(quick(variant="vsd", rank=2))
    state = torch.load("run/last.pt", weights_only=True)["state"]["fake"]
    start = common.load_denoiser(next(Path("runs").glob("teacher-*")), quick())
    assert (flat(student) - flat(start)).abs().max() > 1e-3
    for name, value in start.state_dict().items():
        kept = state.get(name, state.get(f"{name.removesuffix('.weight')}.parametrizations.weight.original"))
        assert torch.equal(kept, value), name
    assert all(value.abs().max() > 0 for name, value in state.items() if name.endswith(".B"))


# ---- several steps ----


def test_levels():
    """DMD2's timesteps on Stable Diffusion's schedule, in units of the data's std; the first level is sigma_init."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=F64) ** 2
    alpha = (1 - beta).cumprod(0)[[749, 499, 249]]
    G = tiny_student()
    want = [5.0, *(0.5 * (1 / alpha - 1).sqrt()).tolist()]
    assert student_sigmas(4, G) == pytest.approx(want, rel=0.01)
    assert student_sigmas(2, G) == student_sigmas(4, G)[::2] and student_sigmas(1, G) == [5.0]


def test_backward_simulation_is_sampling():
    """
    The first call sees pure noise at sigma_init, call k the sample so far under fresh noise of level k, as in a loop by
    hand, which is what sample() does with the same noise; only the last call is differentiated.
    """
    G, z = tiny_student(), torch.randn(6, 4, 2)
    sigmas = student_sigmas(4, G)
    seen = []
    G.register_forward_pre_hook(lambda _, args: seen.append(args))
    assert torch.equal(roll_out(G, z[:, :1], None, sigmas), generate(G, z[:, 0]))
    assert torch.equal(seen[0][0], 5 * z[:, 0]) and (seen[0][1] == 5).all()
    x = G(5 * z[:, 0], torch.full((6,), 5.0))
    for k in (1, 2, 3):
        x_t = x.detach() + sigmas[k] * z[:, k]
        x = G(x_t, torch.full((6,), sigmas[k]))
        seen.clear()
        torch.testing.assert_close(roll_out(G, z[:, :k + 1], None, sigmas), x)
        assert len(seen) == k + 1 and torch.allclose(seen[-1][0], x_t) and not seen[-1][0].requires_grad
    torch.testing.assert_close(sample(G, 6, steps=4, z=z), x)
    want = torch.autograd.grad(x.square().sum(), list(G.parameters()))          # of the last call alone
    got = torch.autograd.grad(roll_out(G, z, None, sigmas).square().sum(), list(G.parameters()))
    torch.testing.assert_close(got, want)
    x = G(5 * z[:, 0], torch.full((6,), 5.0))
    for k in (1, 2, 3):                                                         # the same without detach(): end to end
        x = G(x + sigmas[k] * z[:, k], torch.full((6,), sigmas[k]))
    want = torch.autograd.grad(x.square().sum(), list(G.parameters()))
    got = torch.autograd.grad(roll_out(G, z, None, sigmas, end_to_end=True).square().sum(), list(G.parameters()))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("end_to_end, calls", [(True, {4}), (False, {1, 2, 3, 4})])
def test_which_calls_are_trained(monkeypatch, end_to_end, calls):
    """End to end every update simulates all four calls; without it as many as are drawn, the same for critic and student."""
    seen = []

    def watch(G, z, label, sigmas, through=False):
        if torch.is_grad_enabled() and not through == end_to_end:
            raise AssertionError("gradients through the wrong calls")
        seen.append(z.shape[1])
        return roll_out(G, z, label, sigmas, through)
    monkeypatch.setattr(dmd, "roll_out", watch)
    train(quick(steps_student=4, end_to_end=end_to_end, steps=12, fake_updates=1, every=100))
    updates = [seen[i:i + 2] for i in range(0, 24, 2)]
    assert {n for pair in updates for n in pair} == calls and all(a == b for a, b in updates)


def test_calls_are_drawn_evenly():
    """Every call of a 4-step student is looked at equally often; a one-step student draws nothing."""
    counts = np.bincount([dmd.draw_calls(4) for _ in range(4000)], minlength=5)
    assert counts[0] == 0 and (abs(counts[1:] - 1000) < 150).all()
    before = torch.get_rng_state()
    assert dmd.draw_calls(1) == 1 and torch.equal(before, torch.get_rng_state())


def test_sample():
    """Shapes, one row per label, labels drawn where none is given, 0 steps refused; a saved student samples in its 4 steps."""
    G = tiny_student(label_dim=3)
    assert sample(G, 1001).shape == (1001, 2) and sample(G, 2, torch.eye(3)[:2], 4).shape == (2, 2)
    with pytest.raises(UserError, match="not 0"):
        sample(G, 3, steps=0)
    student, run = train(quick(steps_student=4))
    saved, z = common.load_denoiser(run.dir, run.cfg), torch.randn(5, 4, 2)
    assert torch.equal(sample(saved, 5, steps=4, z=z), sample(student, 5, steps=4, z=z))


# ---- the loop ----


@pytest.mark.parametrize("kw", VARIANTS)
def test_micro_batches_change_nothing(kw):
    check_micro(train, quick, (8,), **kw)


@pytest.mark.parametrize("kw", VARIANTS)
def test_resume_is_bit_exact(monkeypatch, kw):
    check_resume(monkeypatch, train, quick, **kw)


@pytest.mark.parametrize("kw, words", [(dict(variant="dmd", steps_student=2), "one-step"), (dict(steps_student=3), "1, 2 or 4"),
                                       (dict(rank=0), "--rank"), (dict(fake="exact", data="cifar10"), "needs a toy"),
                                       (dict(sigma_init=0.01), "above 0.02"),
                                       (dict(sigma_init=2.0, steps_student=4), "above 2.9")])
def test_bad_input(kw, words):
    with pytest.raises(UserError, match=words):
        train(quick(**kw))


@pytest.mark.parametrize("kw", [dict(), dict(variant="vsd")])
def test_short_run_learns_the_ring(kw):
    """A ninth of the default run already has all eight modes: H far below the 0.009 of a ring that lacks one."""
    _, run = train(Config(device="cpu", steps=150, batch=256, teacher_steps=400, samples=2000, every=1000, out="run", **kw))
    metrics = json.loads((run.dir / "metrics.json").read_text())
    assert metrics["H"] < 0.006 and metrics["mode_min"] > 0.4, metrics


@pytest.mark.parametrize("kw", [dict(steps_student=2, fid="tiny.pt"), dict(variant="vsd", rank=2), dict(variant="dmd", pairs=4)])
def test_images_end_to_end(tmp_path, kw):
    """A few CPU steps on files in CIFAR-10's format: every variant, labels, picture, FID, samples."""
    write_cifar(tmp_path / "data")
    torch.jit.script(TinyInception()).save("tiny.pt")
    student, run = train(Config(data="cifar10", data_dir="data", device="cpu", net="small", width=8, cond=True, steps=2, batch=8,
                                teacher_steps=2, samples=12, every=2, sigma_min=0.002, sigma_max=80.0, sigma_init=80.0, micro=4,
                                out="run", **kw))
    metrics = json.loads((run.dir / "metrics.json").read_text())
    assert "fid" not in kw or all(math.isfinite(metrics[f"fid12_train100_{name}"]) for name in ("2_steps", "teacher_18_steps", "teacher_1_step"))
    x = sample(student, 3, steps=kw.get("steps_student", 1))
    assert x.shape == (3, 3, 32, 32) and x.isfinite().all() and (run.dir / "samples.png").exists()
