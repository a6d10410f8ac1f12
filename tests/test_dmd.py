"""dmd.py against quadrature and itself."""
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import dmd
from common import MLP, TOYS, Denoiser, GaussianMixture, Images, UNet, UserError, level
from conftest import F64, TINY, divergence_slope, flat, student_slope
from dmd import Config, LowRank, critic_loss, roll_out, sample, student_loss, train

pytestmark = pytest.mark.usefixtures("no_pictures")


def quick(**flags):
    return Config(**(TINY | flags))


def tiny_student(seed=0, levels=(5.0, 0.8), **spec):
    torch.manual_seed(seed)
    G = Denoiser(MLP(width=16, **spec))
    G.sigma_init, G.levels, G.most, G.class_weights = 5.0, list(levels), 1000, []
    return G


def slope(loss, *inputs):
    return torch.autograd.grad(loss.sum(), inputs)


# ---- the losses ----


@pytest.mark.parametrize("sigma", [0.02, 0.3, 1.0, 5.0])
def test_gradients_are_those_of_kl(sigma):
    """Of student and teacher, noised: DMD's loss without its weight, SwiftBrush's with its own."""
    def dm(x, d_real, d_fake, r):
        return dmd.dm_loss(x, d_real, d_fake) * (x - d_real).abs()[:, 0].detach() / sigma**2

    def vsd(x, d_real, d_fake, r):
        return dmd.vsd_loss(x, d_real, d_fake, level(x, sigma), 0.5)

    want = divergence_slope(lambda r, y: -r.log(), sigma)
    torch.testing.assert_close(student_slope(dm, sigma), want, rtol=1e-5, atol=1e-6)
    want = want * sigma**3 * 0.5 / (sigma**2 + 0.25)
    torch.testing.assert_close(student_slope(vsd, sigma), want, rtol=1e-5, atol=1e-6)


def test_regression_losses():
    """L2 is the mean square; Huber's gradient is |x - y|'s far away and |x - y|^2 / 2c's near."""
    y, c = torch.zeros(2, 2), 0.00054 * 2**0.5
    x = torch.tensor([[3.0, 4.0], [3e-6, 4e-6]], requires_grad=True)
    assert dmd.regression_loss(x, y, "l2").tolist() == pytest.approx([12.5, 12.5e-12])
    dmd.regression_loss(x, y, "huber").sum().backward()
    want = torch.stack([x[0].detach() / 5, x[1].detach() / c])
    torch.testing.assert_close(x.grad, want, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("variant, term, weight", [("dmd2", "gan", 3), ("dmd", "reg", 0.25),
                                                   ("vsd", "dm", 0)])
def test_terms_of_the_losses(variant, term, weight):
    G, fake, disc = tiny_student(), tiny_student(1), dmd.make_discriminator((16,))
    cfg = quick(variant=variant, gan_weight=3.0, disc_weight=5.0, pairs=1)
    data, z = common.load_data(cfg), torch.randn(8, 1, 2)
    pairs = (torch.ones(1, 2), None, torch.zeros(1, 2)) if variant == "dmd" else None
    loss, terms = student_loss(G, fake, disc, TOYS["ring"], data, pairs, z, cfg)
    assert terms.keys() == {"gap", "dm", term}
    torch.testing.assert_close(loss, terms["dm"] + weight * terms[term])
    loss, terms = critic_loss(G, fake, disc, data, z, cfg)
    assert ("disc" in terms) == (variant == "dmd2")
    torch.testing.assert_close(loss, terms["fake"] + 5 * terms.get("disc", 0))


# ---- vsd ----


@pytest.mark.parametrize("net", [MLP(width=16), UNet(8, width=8, mult=(1,), blocks=1)])
def test_adapters(net):
    """No effect at first, all there is to train, of the rank asked for, in every layer."""
    D = Denoiser(net)
    x = torch.randn(5, *D.shape)
    want = D(x, level(x, 0.7))
    layers = sum(isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)) for m in D.modules())
    dmd.add_adapters(D, 2)
    assert torch.equal(D(x, level(x, 0.7)), want)
    assert all(p.requires_grad == (name[-1] in "AB") for name, p in D.named_parameters())
    adapters = [m for m in D.modules() if isinstance(m, LowRank)]
    assert len(adapters) == layers
    for m in adapters:
        m.B.data.normal_()
        assert torch.linalg.matrix_rank(m.B @ m.A) <= 2
    assert (D(x, level(x, 0.7)) - want).abs().max() > 1e-3


def test_vsd_touches_no_data(monkeypatch):
    """With every way to data cut, vsd trains student and adapters, dmd2 does not."""
    def refuse(*_):
        raise RuntimeError("data was read")

    teacher, data = tiny_student(), TOYS["ring"]
    monkeypatch.setattr(common.Run, "report", lambda *_: None)
    for name in ("sample", "forward", "log_prob", "score"):
        monkeypatch.setattr(GaussianMixture, name, refuse)
    with pytest.raises(RuntimeError, match="data was read"):
        train(quick(out="runs/dmd2"), data, teacher)
    student, run = train(quick(variant="vsd", rank=2), data, teacher)
    assert (flat(student) - flat(teacher)).abs().max() > 1e-4
    state = run.state["fake"].state_dict()
    assert all(value.abs().max() > 0 for name, value in state.items() if name.endswith(".B"))


# ---- students of several calls ----


def test_levels_are_dmd2s():
    """Timesteps 749, 499, 249 on Stable Diffusion's schedule, in units of the data's std."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=F64) ** 2
    want = 0.3 * (1 / (1 - beta).cumprod(0)[[749, 499, 249]] - 1).sqrt()
    data = Images(torch.randn(20000, 2) * 0.3)
    student, run = train(quick(steps_student=4, steps=1), data, tiny_student())
    assert common.load_denoiser(run.dir, run.cfg).levels == student.levels
    assert student.levels == pytest.approx([5.0, *want.tolist()], rel=0.02)


@pytest.mark.parametrize("end_to_end", [True, False])
def test_roll_out(end_to_end):
    """A loop by hand: call k sees the sample so far under fresh noise of level k; its gradient."""
    G, z = tiny_student(levels=(5.0, 2.0, 0.8)), torch.randn(6, 3, 2)
    x = G(5 * z[:, 0], level(z[:, 0], 5))
    for k in (1, 2):
        x = x if end_to_end else x.detach()
        x = G(x + G.levels[k] * z[:, k], level(x, G.levels[k]))
    got = roll_out(G, z, None, end_to_end)
    torch.testing.assert_close(got, x)
    torch.testing.assert_close(sample(G, 6, z=z), x)
    weights = list(G.parameters())
    torch.testing.assert_close(slope(got.square(), *weights), slope(x.square(), *weights))


@pytest.mark.parametrize("end_to_end", [True, False])
def test_which_calls_are_trained(monkeypatch, end_to_end):
    """All four, or the last of 1 to 4, each about equally often; critic and student the same."""
    def watch(G, z, *more):
        seen.append((z.shape[1], more[-1]))
        return roll_out(G, z, *more)

    seen = []
    monkeypatch.setattr(dmd, "roll_out", watch)
    monkeypatch.setattr(common.Run, "due", lambda *_: False)
    monkeypatch.setattr(common.Run, "report", lambda *_: None)
    cfg = quick(steps_student=4, end_to_end=end_to_end, steps=120, fake_updates=1, every=1000)
    train(cfg, TOYS["ring"], tiny_student())
    calls, through = zip(*seen)
    assert calls[::2] == calls[1::2] and set(through[1::2]) == {end_to_end}
    count = np.bincount(calls[::2], minlength=5)
    assert count[1:].min() > 15 or end_to_end and count[4] == 120


def test_sample_draws_labels_in_the_datas_proportions():
    G = tiny_student(label_dim=3)
    G.class_weights, seen = [0.0, 0.25, 0.75], []
    G.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    assert sample(G, 2001).shape == (2001, 2)
    share = torch.cat(seen).mean(0)
    assert share[0] == 0 and abs(share[1] - 0.25) < 0.05
    assert max(len(label) for label in seen) <= 1000    # never more at once


# ---- the loop ----


@pytest.mark.parametrize("flags, words", [
    (dict(variant="dmd", steps_student=2), "one call"), (dict(steps_student=3), "1, 2 or 4"),
    (dict(sigma_init=0.01), "above 0.02"), (dict(sigma_init=2.0, steps_student=4), "above 2.9")])
def test_bad_input_before_any_work(flags, words):
    with pytest.raises(UserError, match=words):
        train(quick(**flags))
    assert not Path("runs").exists()
