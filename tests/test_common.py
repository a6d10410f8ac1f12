"""common.py against closed forms: mixtures, noise levels, sampler, networks, metrics, flags."""
import copy
import dataclasses
import importlib
import math
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
import fdistill
from common import (MLP, TOYS, Denoiser, GaussianMixture, Images, Shared, UNet, UserError,
                    energy_coefficient, frechet_distance, heun_sample, level, load_data,
                    load_teacher)
from conftest import TinyInception, check_resume, flat, main_in_process

F64 = torch.float64
CPU = Shared(device="cpu")


def quick(**flags):
    tiny = dict(device="cpu", steps=2, batch=256, width=8, teacher_steps=2, samples=64, every=2)
    return fdistill.Config(**(tiny | flags))


def mixture(dim=2, std=0.3):
    return GaussianMixture(torch.randn(5, dim, dtype=F64), std, [1, 2, 3, 4, 5], [0, 0, 1, 1, 2])


@pytest.mark.parametrize("std", [0.3, 0.0])
def test_tweedie(std):
    """D = x + sigma^2 grad log p(x; sigma), by autograd in float64, also within a class."""
    m, sigma = mixture(std=std), torch.rand(50, 1, dtype=F64) + 0.05
    x = torch.randn(50, 2, dtype=F64, requires_grad=True)
    for label in (None, torch.eye(3)[torch.arange(50) % 3]):
        grad, = torch.autograd.grad(m.log_prob(x, sigma, label).sum(), x)
        torch.testing.assert_close(m.score(x, sigma, label), grad, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(m(x, sigma, label), x + sigma**2 * grad, rtol=1e-10, atol=1e-11)


def test_density_is_normalised_and_labels_partition_it():
    m, x = mixture(dim=1), torch.linspace(-12, 12, 20001, dtype=F64)[:, None]
    p = m.log_prob(x, level(x, 0.4)).exp()
    assert abs(torch.trapezoid(p, x[:, 0]) - 1) < 1e-9
    labels = torch.eye(3)[:, None].expand(3, len(x), 3)
    parts = torch.stack([m.log_prob(x, level(x, 0.4), label).exp() for label in labels])
    torch.testing.assert_close(torch.tensor([3, 7, 5], dtype=F64) / 15 @ parts, p)


def test_small_sigma_keeps_its_digits():
    """float32 at sigma 0.002 agrees with float64: distances are not formed by cancellation."""
    m, sigma = GaussianMixture(3 + 0.01 * torch.randn(3000, 2)), torch.full((64, 1), 0.002)
    x = m.means[:64] + 0.002 * torch.randn(64, 2)
    exact = GaussianMixture(m.means.double())(x.double(), sigma.double())
    torch.testing.assert_close(m(x, sigma).double(), exact, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", TOYS)
def test_toys(name):
    """Samples have the toy's sigma_data, labels are one-hot in its proportions, all in [-2, 2]."""
    m = TOYS[name]
    x, label = m.sample(20000)
    assert x.shape == (20000, 2) and (label.sum(1) == 1).all() and x.abs().max() < 2
    assert abs((x - x.mean(0)).square().mean().sqrt() - m.sigma_data) < 0.01
    share = torch.zeros(m.label_dim).index_add_(0, m.groups, m.weights)
    for drawn in (label, common.draw_label(20000, m)):
        torch.testing.assert_close(drawn.mean(0), share, rtol=0, atol=0.015)


def test_noise_levels():
    """The published ramp ends at 80, 0.002, 0; the 500th of 1000 is 2.527. EDM's law: lognormal."""
    s = common.karras_sigmas(18, 0.002, 80)
    assert s[[0, 17, 18]].tolist() == pytest.approx([80, 0.002, 0]) and (s.diff() < 0).all()
    assert abs(common.karras_sigmas(1000, 0.002, 80)[499] - 2.527) < 1e-3
    sigma = common.lognormal_sigma(torch.zeros(20000, 3, 2, 2))
    assert sigma.shape == (20000, 1, 1, 1)
    assert abs(sigma.log().mean() + 1.2) < 0.03 and abs(sigma.log().std() - 1.2) < 0.03


def test_denoising_loss_is_edms():
    """lambda |D - x|^2 with lambda = (sigma^2 + s^2) / (sigma s)^2."""
    x, d, sigma = torch.randn(5, 3), torch.randn(5, 3), torch.rand(5, 1) + 0.1
    want = ((sigma**2 + 0.49) / (sigma * 0.7) ** 2 * (d - x) ** 2).mean(1)
    torch.testing.assert_close(common.denoising_loss(d, x, sigma, 0.7), want)


def test_heun_is_second_order():
    """On one Gaussian the flow map is closed form; halving the step divides the error by four."""
    m = GaussianMixture(torch.tensor([[0.3, -0.2]], dtype=F64), 0.5)
    z = torch.randn(100, 2, dtype=F64)
    exact = m.means + (80 * z - m.means) * 0.5 / math.sqrt(0.25 + 80**2)
    error = [(heun_sample(m, z, steps=n) - exact).abs().mean().item() for n in (16, 32, 64, 128)]
    assert error[-1] < 1e-3
    for coarse, fine in zip(error, error[1:]):
        assert 3.2 < coarse / fine < 6


@pytest.mark.parametrize("churn", [0.0, 20.0])
def test_heun_recovers_the_mixture(churn):
    """Samples by the exact denoiser have the data's law, with and without fresh noise."""
    m, z = TOYS["unequal"], torch.randn(4000, 2)
    x = heun_sample(m, z, steps=40, sigma_min=0.01, sigma_max=20, churn=churn)
    assert energy_coefficient(x, m.sample(4000)[0]) < 0.001


@pytest.mark.parametrize("adm", [False, True])
def test_unet_at_start(adm):
    """An untrained network adds (almost) nothing: D = c_skip x_t, the best linear guess."""
    net = Denoiser(UNet(16, 3, 4, 36, (1, 2), 1, (8,), adm=adm), dtype="bf16")
    x, sigma = torch.randn(2, 3, 16, 16), torch.tensor([0.5, 2.0]).view(2, 1, 1, 1)
    got = net(x, sigma, torch.eye(4)[:2])               # float32, though inside is bf16
    torch.testing.assert_close(got, 0.25 / (sigma**2 + 0.25) * x, rtol=0, atol=2e-3)


@pytest.mark.parametrize("side, places", [(8, 4), (28, 14), (36, 9), (64, 16), (100, 25)])
def test_small_network_of_large_images(side, places):
    """--net small works at no more than 16x16 places, where the side can be halved so often."""
    data = SimpleNamespace(shape=(1, side, side), label_dim=0, sigma_data=0.5)
    D, x = common.build(quick(net="small", width=8), data), torch.randn(2, 1, side, side)
    assert next(iter(D.net.enc)) == f"{places}x{places}_conv"
    assert D(x, level(x, 0.7)).shape == x.shape


def test_direct_path():
    """Sixteen pixels through eight channels: past the blocks, low noise is learnt in few updates."""
    losses = []
    for direct in (False, True):
        torch.manual_seed(0)
        D = Denoiser(UNet(16, 1, 0, 8, (1,), 1, (), adm=True, patch=4, direct=direct))
        opt = torch.optim.Adam(D.parameters(), 4e-3)
        for _ in range(100):
            x = torch.rand(16, 1, 1, 1).expand(-1, 1, 16, 16)
            x_t, sigma = x + 0.2 * torch.randn(x.shape), level(x, 0.2)
            loss = common.denoising_loss(D(x_t, sigma), x, sigma, 0.5).mean()
            loss.backward()
            opt.step()
            opt.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0] / 2, losses


@pytest.mark.parametrize("net", [MLP(2, 3, 16, second=True),
                                 UNet(8, 1, 3, 8, (1, 2), 1, (), direct=True, second=True)])
def test_denoiser(net):
    """One feature from both calls; no label is zeros; `second` starts mute; D is x_t at sigma 0."""
    d, x = Denoiser(net), torch.randn(4, *net.shape)
    out, feature = d.with_feature(x, level(x, 0.7), torch.zeros(4, 3))
    assert torch.equal(out, d(x, level(x, 0.7))) and feature.shape[1:] == net.feature_shape
    assert torch.equal(feature, d.feature(x, level(x, 0.7)))
    assert torch.equal(out, d(x, level(x, 0.7), None, level(x, 0.3)))
    assert torch.equal(d(x, level(x, 0)), x)


def test_dropout_and_recompute():
    """The seed alone decides the mask; recomputing keeps fewer activations, the same gradients."""
    d, grads, kept = Denoiser(UNet(16, 3, 0, 16, (1, 2), 1, (8,))), [], []
    x = torch.ones(2, 3, 16, 16)
    for p in d.parameters():
        torch.nn.init.normal_(p, std=0.1)
    for module in d.modules():
        module.dropout = 0.3

    def keep(t):
        kept[-1] += t.numel()
        return t

    for d.net.recompute in (False, True):
        kept.append(0)
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = d(x, level(x, 1)).square().sum()
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in d.parameters() if p.grad is not None]))
        d.zero_grad()
    assert torch.equal(*grads) and kept[1] < kept[0] / 2
    out = d.eval()(x, level(x, 1))
    assert torch.equal(out, d(x, level(x, 1))) and out.square().sum() != loss


def test_update_ema():
    """decay * old + (1 - decay) * new once the warm-up is over; buffers are copied."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    ema = copy.deepcopy(net)
    old, other = flat(ema), flat(ema) + 1
    torch.nn.utils.vector_to_parameters(other, net.parameters())
    net(torch.randn(50, 2) + 3)
    common.update_ema(ema, net, 0.6, 1000)
    torch.testing.assert_close(flat(ema), 0.6 * old + 0.4 * other)
    assert torch.equal(ema[1].running_mean, net[1].running_mean) and ema[1].num_batches_tracked == 1
    common.update_ema(ema, net, 0.6, 0)                 # the first step counts 0.9
    torch.testing.assert_close(flat(ema), other - 0.06)


def test_set_lr():
    """Up over the warm-up, constant, from the middle down to floor * lr."""
    opt, got = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0), []
    for progress in (0.05, 0.2, 0.5, 0.75, 1.0):
        common.set_lr(opt, 2.0, progress, floor=0.1, warmup=0.1)
        got.append(opt.param_groups[0]["lr"])
    assert got == pytest.approx([1.0, 2.0, 2.0, 1.0, 0.2])


def test_checkpoint_is_plain():
    """It loads with weights_only=True; a student comes back with all that sampling wants."""
    cfg, data, x = quick(cond=True, accumulate=8), TOYS["unequal"], torch.randn(4, 2)
    G = common.initial_student(cfg, data, student=Denoiser(MLP(2, 8, 8)))
    G.levels = [5.0, 0.8]
    common.save_denoiser("ema.pt", G, cfg)
    assert torch.load("ema.pt", weights_only=True)
    again = common.load_denoiser(".", cfg)
    assert torch.equal(again(x, level(x, 1)), G(x, level(x, 1))) and not again.training
    assert again.sigma_init == 5.0 and again.levels == [5.0, 0.8]
    label = common.draw_label(20000, again)             # the data's proportions, not even ones
    assert label.mean(0).tolist() == pytest.approx(data.weights.tolist(), abs=0.015)
    sizes = []
    again.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    assert fdistill.sample(again, 70).shape == (70, 2) and sizes == [32, 32, 6]     # batch / 8


def test_foreign_checkpoints():
    """A text, a cut-off file, code, another dict, none: one sentence each."""
    torch.save({"model": 1}, "dict.pt")
    Path("text.pt").write_text("hello")
    common.save_denoiser("good.pt", Denoiser(MLP(width=8)), CPU)
    Path("cut.pt").write_bytes(Path("good.pt").read_bytes()[:500])
    torch.save(np.random.default_rng(0), "code.pt")
    for name in ("dict", "text", "cut", "code", "none"):
        with pytest.raises(UserError, match=f"^[^\n]*{name}.pt[^\n]*$"):
            common.load_denoiser(f"{name}.pt", CPU)


def test_fitted_teacher_is_cached(no_pictures, monkeypatch):
    """By the data's contents and the settings, of one Config too; random numbers tell no cached one
    from a new one."""
    draws, found, a, b, cfg = [], [], torch.eye(2), -torch.eye(2), quick(data="mine")
    for cfg.teacher_steps, means in ((20, a), (20, a), (20, b), (3, a)):
        monkeypatch.setitem(TOYS, "mine", GaussianMixture(means, 0.1))
        torch.manual_seed(5)
        found.append(load_teacher(cfg, load_data(cfg)))
        draws.append(torch.rand(3).tolist())
    assert torch.equal(flat(found[0]), flat(found[1])) and draws == draws[:1] * 4
    assert len(list(Path("runs").iterdir())) == 3


class Own(torch.nn.Sequential):
    """A student that is none of ours, with a buffer that moves."""

    def forward(self, x_t, sigma, label=None):
        return super().forward(torch.cat([x_t, sigma], 1))


def own_draws(n):
    return torch.randn(n, 2), torch.eye(3)[torch.randint(3, (n,))]


@pytest.mark.parametrize("data, classes", [
    (torch.randn(500, 2), 0), (np.random.randn(500, 2), 0), (mixture().float(), 3),
    (SimpleNamespace(sample=own_draws), 3),
    (SimpleNamespace(sample=own_draws), 0)])
def test_own_data(no_pictures, data, classes):
    """A tensor, a mixture, anything with sample; without --cond its labels are not asked for."""
    student, _ = fdistill.train(quick(cond=classes > 0), data)
    assert student.label_dim == classes and fdistill.sample(student, 3).shape == (3, 2)


def test_own_teacher_and_student(no_pictures):
    """They train, resume to the bit and load again; the student's buffers are averaged too, the
    teacher's stay, and so does what the student calls sigma_data."""
    teacher, own = [Own(torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
                    for _ in range(2)]
    own.sigma_data = 0.25
    check_resume(fdistill.train, quick, None, teacher, own)
    assert teacher[1].num_batches_tracked == 0 and own.sigma_data == 0.25
    again = common.load_denoiser("runs/straight", CPU, own)
    assert again[1].num_batches_tracked > 0 and fdistill.sample(again, 7).shape == (7, 2)
    with pytest.raises(UserError, match="of your own"):
        common.load_denoiser("runs/straight", CPU)


def test_a_teacher_for_three_processes(monkeypatch):
    """Its batch, which nobody gave, divides among them."""
    def look(fit, *_):
        common.check(fit)
        assert fit.batch == 510
        raise InterruptedError

    monkeypatch.setattr(common, "processes", lambda: 3)
    monkeypatch.setattr(common, "largest", lambda numbers: numbers)
    monkeypatch.setattr(common, "train_teacher", look)
    with pytest.raises(InterruptedError):
        load_teacher(CPU, load_data(CPU))


def test_teacher_pairs():
    """z and the end of the exact ODE from there; what was made is not made again."""
    m, cfg = GaussianMixture(torch.zeros(1, 2), 0.5), Shared(device="cpu", out="there/run")
    z, label, x = common.teacher_pairs(cfg, m, m, 1500)
    assert label.shape == (1500, 1) and len(z.unique(dim=0)) == 1500
    torch.testing.assert_close(x, z * 5 * 0.5 / (0.25 + 25) ** 0.5, rtol=0, atol=0.03)
    files = {f: f.stat().st_mtime_ns for f in Path("there").rglob("*.pt")}
    assert torch.equal(common.teacher_pairs(cfg, m, m, 1500)[2], x)
    assert len(files) == 2 and files == {f: f.stat().st_mtime_ns for f in files}


def test_energy_coefficient():
    """0 within noise for equal laws, not for others; and once by hand, at any scale."""
    x, y = torch.randn(2, 4000, 2)
    assert abs(energy_coefficient(x, y)) < 1e-3 and energy_coefficient(x, y + 0.3) > 0.005
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [4.0]])
    for scale in (1, 1000):
        assert energy_coefficient(scale * a, scale * b) == pytest.approx((5 - 1 - 2) / 5)


def test_toy_metrics():
    """H of fresh data, and about 0.009 without a mode; true shares count 1 in mode_min and max."""
    m = TOYS["ring"]
    good, (x, label) = common.toy_metrics(m.sample(10000)[0], m), m.sample(10000)
    assert abs(good["H"]) < 3e-4 and good["in_3std"] == pytest.approx(0.989, abs=0.003)
    bad = common.toy_metrics(x[label[:, 0] == 0], m)
    assert 0.006 < bad["H"] < 0.012 and bad["mode_min"] < 0.01
    m = TOYS["unequal"]
    exact = common.toy_metrics(m.means.repeat_interleave((m.weights * 2200).round().long(), 0), m)
    assert (exact["mode_min"], exact["mode_max"]) == pytest.approx((1, 1))


def test_frechet_distance_of_gaussians():
    """|m1 - m2|^2 + tr(C1 + C2) - 2 sum of the roots of the product's eigenvalues."""
    m, n = torch.randn(2, 6, dtype=F64)
    c1, c2 = [r @ r.T for r in torch.randn(2, 6, 8, dtype=F64)]
    root = torch.linalg.eigvals(c1 @ c2).real.sqrt().sum()
    want = (m - n).square().sum() + (c1 + c2).trace() - 2 * root
    assert frechet_distance(m, c1, n, c2) == pytest.approx(float(want))


def test_precision_recall():
    """A narrow sample is precise, a wide one recalls, a far one neither; and once by hand."""
    real, same = torch.randn(2, 1000, 4)
    narrow, wide = [common.precision_recall(real, s * same) for s in (0.3, 3)]
    assert narrow[0] > 0.95 and narrow[1] < 0.5 and wide[0] < 0.5 and wide[1] > 0.85
    assert common.precision_recall(real, same + 100) == (0, 0)
    real, fake = torch.tensor([[0.0], [1.0], [10.0]]), torch.tensor([[1.5], [30.0]])
    assert common.precision_recall(real, fake, k=1) == (0.5, 1.0)


def fid_case(channels=3, **flags):
    """(a Config, images from dark to light, as a class order may be, their features)."""
    torch.jit.script(TinyInception()).save("tiny.pt")
    noise = torch.randint(0, 156, (100, channels, 8, 8)) + torch.arange(100).view(-1, 1, 1, 1)
    images = noise.to(torch.uint8)
    cfg = quick(**(dict(data="images", fid="tiny.pt", samples=100) | flags))
    return cfg, images, TinyInception()(images.expand(-1, 3, -1, -1)).double()


def fid_of_itself(cfg, images, data=None):
    """What fid says of a student whose samples are the data."""
    data = load_data(cfg, Images(images) if data is None else data)
    return common.fid(cfg, data, lambda n, label: images[:n].float() / 127.5 - 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_fid(channels):
    """Names tell samples and reference; the data itself has 0, also as floats; nothing warns."""
    cfg, images, _ = fid_case(channels)
    for data in (images, images / 127.5 - 1):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = fid_of_itself(cfg, images, Images(data))
        assert abs(got["fid100_train100"]) < 0.01
        assert got["precision100"] == got["recall100"] == 1


def test_fid_references():
    """Every fourth image of sorted data stands for all, the first quarter would not; EDM's file."""
    cfg, images, f = fid_case(fid_ref="25")
    got = fid_of_itself(cfg, images)
    spread, first = [frechet_distance(f.mean(0), f.T.cov(), part.mean(0), part.T.cov())
                     for part in (f[::4], f[:25])]
    assert got["fid100_train25"] == pytest.approx(spread, rel=1e-6) and first > 9 * spread
    assert got["precision25"] > 0.7
    np.savez("edm-ref.npz", mu=f.mean(0) + 1, sigma=f.T.cov())
    got = fid_of_itself(dataclasses.replace(cfg, fid_ref="edm-ref.npz"), images)
    assert got["fid100_edm-ref"] == pytest.approx(12, rel=1e-4)


@pytest.mark.parametrize("flags", [
    dict(fid_ref="0"), dict(fid_ref="no.npz"), dict(fid_ref="all"), dict(fid="no.pt"),
    dict(fid=__file__), dict(fid_ref="3"), dict(samples=3)])
def test_fid_that_cannot_work_is_refused_at_once(flags):
    """Precision and recall want 4 features: said before the training."""
    cfg, images, _ = fid_case(**flags)
    with pytest.raises(UserError, match="--fid|--samples"):
        load_data(cfg, Images(images))


def test_default_preset_flag(monkeypatch):
    """Default < preset < later key, which may be longer < flag; the same from Python."""
    presets = {"grid": dict(steps=7, lr=0.5), "js": dict(bins=3), "grid js": dict(bins=5, ema=0.5)}
    monkeypatch.setattr(fdistill, "PRESETS", presets)
    assert quick().bins == 3 and quick(divergence="rkl").bins == 10
    argv = ["--data", "grid", "--lr", "0.25", "--cond", "--teacher", "runs/x"]
    cfg = common.parse(fdistill.Config, presets, argv)
    assert (cfg.steps, cfg.lr, cfg.bins, cfg.ema, cfg.cond) == (7, 0.25, 5, 0.5, True)
    assert cfg == fdistill.Config(data="grid", lr=0.25, cond=True, teacher="runs/x/")
    assert dataclasses.replace(cfg, steps=5).steps == 5


def test_presets():
    """Only photographs are mirrored, not digits; images need EDM's highest noise."""
    for data in [key for key in fdistill.PRESETS if " " not in key]:
        cfg = fdistill.Config(data=data)
        assert cfg.flip == (data in ("cifar10", "imagenet64")) and cfg.sigma_max == 80


@pytest.mark.parametrize("script", ["fdistill", "dmd", "sim", "consistency", "rectflow"])
def test_cifar10_on_a_cpu(script):
    """--data cifar10 --net small has digits' settings, mirrored images and classes."""
    cfg = importlib.import_module(script).Config(data="cifar10", net="small")
    assert (cfg.batch, cfg.accumulate, cfg.teacher_steps) == (32, 1, 2000)
    assert cfg.cond and cfg.flip


def test_a_teachers_parts_are_no_larger_than_the_students(monkeypatch):
    """A fit of batch 512 in parts of 128 for a student of 256 / 2; toys fit any memory."""
    parts = []
    monkeypatch.setattr(common, "load_denoiser", lambda folder, cfg: None)
    monkeypatch.setattr(common, "train_teacher",
                        lambda fit, *_: parts.append(fit.batch // fit.accumulate))
    images = Images(torch.zeros(20, 3, 32, 32, dtype=torch.uint8), torch.arange(20) % 10)
    for data, more in ((images, dict(data="cifar10")), (TOYS["ring"], dict(batch=4))):
        common.fit_teacher(fdistill.Config(**more, out="run"), data)
    assert parts == [128, 512]


def test_a_teacher_by_other_code_is_fitted_anew(no_pictures, monkeypatch):
    """Who changes its law of noise levels is not given the teacher of before."""
    train, fits = common.train_teacher, []
    for k in range(3):
        if k == 2:
            monkeypatch.setattr(common, "train_teacher", lambda *flags: train(*flags))
        common.fit_teacher(quick(), TOYS["ring"])
        fits.append(len(list(Path("runs").glob("teacher-*"))))
    assert fits == [1, 1, 2]


@pytest.mark.parametrize("line", [
    "--divergance js: did you mean --divergence", "--divergence kl: rkl", "--data mnits: mnist",
    "--steps 0: --steps", "--steps many: steps", "--steps: argument", "--accumulate 100: divide",
    "--ema 1: --ema", "--lr -1: --lr", "--lr nan: --lr", "--lr 0: --lr", "--st 3: --st",
    "stray: stray", "--fid x: --fid", "--width 6: 4", "--teacher no.pt: no.pt", "--net small: mlp",
    "--sample nowhere: nowhere", "--sigma_min 0: sigma_min", "--sigma_max 0.01: --sigma_m",
    "--ema=-inf: --ema", "--seed -1: --seed", "--samples 1: samp", f"--seed {'9' * 400}: --seed",
    "--ratio_ema 1: --ratio_ema", "--minutes -1: --minutes", "--gan_weight nan: --gan_weight",
    "--data images --data_dir none: none", "--data mnist --net mlp --data_dir none: none"])
def test_bad_flags(line):
    """Each ends with exit code 2 and one sentence that says what to do, before any work is done."""
    flags, words = line.split(": ")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.hub.download_url_to_file", lambda *_: Path("none/x").read_bytes())
        code, err = main_in_process(fdistill, *flags.split())
    assert code == 2 and words in err and err.count("\n") == 1 and err.startswith("fdistill.py: ")
    assert not list(Path().glob("runs/*"))


NET, RING = Denoiser(MLP(2, width=8)), load_data(CPU)


@pytest.mark.parametrize("words, function, given, flags", [
    ("wants", GaussianMixture, [torch.zeros(2, 2)], dict(std=-1.0)),
    ("wants", GaussianMixture, [torch.zeros(2, 2)], dict(weights=[1.0])),
    ("--divergence", fdistill.Config, [], dict(divergence="kl")),
    ("--steps", fdistill.Config, [], dict(stpes=3)),
    ("--cond", fdistill.Config, [], dict(cond=1)),
    ("square", load_data, [CPU, torch.zeros(9, 3, 29, 29)], {}),
    ("square", load_data, [CPU, torch.zeros(9, 2, 8, 8)], {}),
    ("square", load_data, [CPU, torch.zeros(9, 1)], {}),
    ("deviation is nan", load_data, [CPU, torch.full((9, 2), math.nan)], {}),
    ("deviation is 0", load_data, [CPU, torch.zeros(9, 2)], {}),
    ("-1, 1", load_data, [CPU, 100 * torch.randn(9, 3, 8, 8)], {}),
    ("no tensor", load_data, [CPU, "data.npz"], {}),
    ("must give", load_data, [CPU, SimpleNamespace(sample=lambda n: torch.zeros(n, 2))], {}),
    ("uint8", load_data, [CPU, SimpleNamespace(sample=lambda n: (torch.ones(n).byte(), None))], {}),
    ("one-hot", load_data, [CPU, SimpleNamespace(
        sample=lambda n: (torch.randn(n, 2), torch.randint(3, (n, 1))))], {}),
    ("float", load_data, [CPU, torch.zeros(9, 8, dtype=torch.int64)], {}),
    ("no labels", load_data, [quick(cond=True), torch.randn(9, 2)], {}),
    ("makes", load_teacher, [CPU, RING, Denoiser(MLP(3, width=8))], {}),
    ("makes", load_teacher, [CPU, RING, Denoiser(MLP(2, 8, width=8))], {}),
    ("teacher gives", load_teacher, [CPU, RING, lambda x_t, sigma, label=None: x_t[:, :1]], {}),
    ("not finite", load_teacher, [CPU, RING, lambda x_t, sigma, label=None: x_t / 0], {}),
    ("path", load_teacher, [CPU, RING, "runs/teacher"], {}),
    ("pass a copy", common.initial_student, [CPU, RING, NET, NET], {})])
def test_what_does_not_fit(words, function, given, flags):
    """What one hands over from Python: odd numbers, data or teachers."""
    with pytest.raises(UserError, match=words):
        function(*given, **flags)


def test_folder_names():
    """What differs from the preset is part of the name: different runs never share a folder."""
    cases = [{}, dict(divergence="rkl"), dict(seed=1), dict(lr=0.5), dict(data="grid"),
             dict(teacher="runs/a/ema.pt"), dict(teacher="runs/b/ema.pt"), dict(minutes=2)]
    names = [str(common.run_folder(fdistill.Config(**flags), "x")) for flags in cases]
    assert len(set(names)) == len(cases)
    assert names[:3] == ["runs/x-ring-0", "runs/x-ring-divergence=rkl-0", "runs/x-ring-1"]
    assert common.run_folder(fdistill.Config(data="cifar10"), "x").name == "x-cifar10-0"
