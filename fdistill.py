"""
f-distill: one-step diffusion by f-divergence distribution matching (arXiv 2502.15681).

A one-step student x = G(z) is trained to have the teacher's distribution at every noise level,
x_t = x + sigma eps. For any f-divergence D_f(p || q) = E_q[f(r)], r = p_teacher(x_t) /
q_student(x_t), the gradient is distribution matching's difference of scores, weighted (Theorem 1):

    grad D_f = -E[ h(r) (s_teacher(x_t) - s_student(x_t)) dG/dtheta ],    h(r) = r^2 f''(r)

s_student comes from a second denoiser, the *fake score*, fitted to the student's samples; r from a
small discriminator on its features, to which data stand for the teacher's samples. h = 1 is DMD2.

    python fdistill.py                                  # ring of 8 Gaussians: under a minute
    python fdistill.py --data moons --divergence fkl    # forward KL
    python fdistill.py --data cifar10 --dtype bf16 --teacher edm-cifar10-32x32-cond-vp.pkl

Differences from paper and code (NVIDIA's FastGen): 1. The discriminator reads the fake score's last
feature, as in DMD2, not the frozen teacher's, at one label and level for data and student; head and
fake score share an optimiser, the head has --disc_weight (FastGen: its own, 1).  2. Ratio bins are
equal in count, not in width of sigma; means of r and h are over one process's part of a batch.  3.
The fake score's loss has EDM's weight (official: none).  4. One EMA, warmed up (FastGen: three);
over the last half the student's rate falls to 0, the critic's to a tenth.  5. Adam with betas (0,
0.99), not AdamW with (0.9, 0.999); no R1 penalty (paper: 1 on CIFAR-10), no clipping.  6. Levels
are continuous.  7. Images: one GPU, 1 to 3 days; 2 critic updates a student's (FastGen: 4); 40,000
of 256 at rate 5e-5 (paper: 60,000 of 2048 at 1e-4), ImageNet-64 30,000 of 128 (380,000 of 512).
"""
import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn

from common import (Run, Shared, begin, denoising_loss, draw_label, gallery, generate, in_parts,
                    initial_student, karras, load_data, load_teacher, loss_with_gradient, main,
                    need, set_lr, uniform, update_ema, weighted_score_gradient)

# h(r) = r^2 f''(r) of each divergence (Table 1; Neyman: FastGen)
WEIGHTS = {
    "rkl": torch.ones_like,                 # reverse KL, f = -log r
    "fkl": lambda r: r,                     # forward KL, f = r log r
    "js": lambda r: r / (r + 1),            # Jensen-Shannon, f = r log r - (r + 1) log((r + 1) / 2)
    "srkl": lambda r: 1 / (r + 1),          # softened reverse KL, f = (r + 1) log(1/2 + 1/(2 r))
    "hellinger": lambda r: r.sqrt() / 4,    # squared Hellinger, f = 1 - sqrt(r)
    "jeffreys": lambda r: r + 1,            # Jeffreys, f = (r - 1) log r
    "neyman": lambda r: 2 / r,              # Neyman chi-square, f = (1 - r)^2 / r
}


@dataclass(init=False)
class Config(Shared):
    steps: int = 750
    lr: float = 2e-3
    ema: float = 0.995
    divergence: Literal[tuple(WEIGHTS)] = "js"      # rkl: reverse KL; fkl: forward; js: between
    fake_updates: int = 2       # updates of fake score and discriminator per student update
    lr_fake: float = 2e-3       # their learning rate
    gan_weight: float = 0.01    # weight of the GAN term in the student's loss
    disc_weight: float = 0.1    # weight of the discriminator's loss beside the fake score's
    bins: int = 10              # noise-level bins in which the ratio is brought to mean 1
    ratio_ema: float = 0.0      # memory of the bins' means; 0: this batch alone


SMALL = dict(net="small", teacher_steps=2000, steps=500, batch=32, accumulate=1, lr=1e-3,
             lr_fake=2e-3, ema=0.99, fake_updates=1, gan_weight=1e-2, disc_weight=1.0,
             sigma_min=0.01, sigma_max=80.0, sigma_init=2.5, samples=5000)
LARGE = dict(cond=True, flip=True, ema=0.9995, disc_weight=1e-2, sigma_min=0.002, sigma_max=80.0,
             sigma_init=80.0, every=1000, samples=50_000)
PRESETS = {
    "mnist": dict(SMALL, cond=True), "images": SMALL,
    "cifar10": dict(LARGE, net="ddpmpp", teacher_steps=100_000, divergence="fkl", gan_weight=1e-3,
                    steps=40_000, batch=256, accumulate=2, lr=5e-5, lr_fake=5e-5),
    "imagenet64": dict(LARGE, net="adm", ratio_ema=0.5, gan_weight=3e-3, steps=30_000, batch=128,
                       accumulate=4, lr=2e-6, lr_fake=2e-6),
    "cifar10 small": SMALL,         # for a CPU, with --minutes
}

# ---- the method ----------------------------------------------------------------------------------


def density_ratio(logit):
    """r = p / q (B,) from the discriminator's logit, clamped as in FastGen: no sample dominates."""
    return logit.detach().clamp(-10, 10).exp().clamp(0.1, 20)


def balance_ratio(r, u, means, ratio_ema=0.0):
    """r (B,) over its mean in the bin of the noise level's place u (B,); updates means (bins,)."""
    k = (u * len(means)).long()                                                     # (B,)
    batch_mean = means.scatter_reduce(0, k, r, "mean", include_self=False)      # old where empty
    means.copy_(ratio_ema * means + (1 - ratio_ema) * batch_mean)
    return r / (means[k] + 1e-6)


def f_distill_loss(x, d_real, d_fake, r, divergence):
    """Loss (B,) whose gradient in x, of n elements a sample, is h(r) / mean h * (d_fake - d_real) /
    mean|x - d_real| / n (Theorem 1; DMD Eq. 8), as sigma^2 (s_fake - s_real) = d_fake - d_real."""
    h = WEIGHTS[divergence](r)
    h = h / (h.mean() + 1e-6)                           # steps as large as reverse KL's, whatever f
    return loss_with_gradient(x, weighted_score_gradient(x, d_real, d_fake, h))


def discriminator_loss(logit_real, logit_fake):
    """Logistic loss (B,); at its optimum, logit = log p_data(x_t) / q_student(x_t)."""
    return nn.functional.softplus(-logit_real) + nn.functional.softplus(logit_fake)


def gan_loss(logit_fake):
    """The student's non-saturating side of it (B,)."""
    return nn.functional.softplus(-logit_fake)


def make_discriminator(shape):
    """Head that turns the fake score's last feature, (C,) or (C, R, R), into a logit (B, 1)."""
    if len(shape) == 1:
        return nn.Linear(shape[0], 1)
    c, size, _ = shape
    layers = []
    while size >= 8:                                    # halve it down to 4 to 7 pixels
        layers += [nn.Conv2d(c, c, 4, 2, 1), nn.GroupNorm(math.gcd(32, c), c), nn.SiLU()]
        size //= 2
    layers += [nn.Conv2d(c, c, min(size, 4)), nn.GroupNorm(math.gcd(32, c), c), nn.SiLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 1))


# ---- training ------------------------------------------------------------------------------------


def train(cfg, data=None, teacher=None, student=None, on_log=None):
    """Distil as cfg says; what is passed in replaces what flags would load. -> (EMA, Run)"""
    begin(cfg, "fdistill")
    need(cfg.ratio_ema < 1, f"--ratio_ema must be less than 1, not {cfg.ratio_ema}")
    data = load_data(cfg, data)
    teacher = load_teacher(cfg, data, teacher)
    G = initial_student(cfg, data, teacher, student)
    fake = initial_student(cfg, data, teacher)
    ema = copy.deepcopy(G).eval().requires_grad_(False)
    disc = make_discriminator(fake.net.feature_shape).to(next(fake.parameters()).device)
    disc.register_buffer("bin_means", next(disc.parameters()).new_ones(cfg.bins))
    critic = [*fake.parameters(), *disc.parameters()]
    opt_G = torch.optim.Adam(G.parameters(), betas=(0.0, 0.99), fused=True)
    opt_fake = torch.optim.Adam(critic, betas=(0.0, 0.99), fused=True)
    panels, z_show, label_show = gallery(cfg, data, teacher)
    run = Run(cfg, "fdistill", on_log, G=G, fake=fake, disc=disc, ema=ema, opt_G=opt_G,
              opt_fake=opt_fake)

    for step in run.steps():
        set_lr(opt_G, cfg.lr, run.progress)
        set_lr(opt_fake, cfg.lr_fake, run.progress, floor=0.1)
        # 1. fit the fake score, and the discriminator on its features, to the student's samples
        for _ in range(cfg.fake_updates):
            for _ in range(cfg.accumulate):     # run.part: samples of one pass, batch / accumulate
                loss_fake, loss_disc = critic_losses(G, fake, disc, data, run.part, cfg)
                ((loss_fake + cfg.disc_weight * loss_disc) / cfg.accumulate).backward()
            opt_fake.step()
            opt_fake.zero_grad()
        # 2. move the student alone (`inputs`) by the weighted difference of scores, and by the GAN
        for _ in range(cfg.accumulate):
            label = draw_label(run.part, data, run.device)
            x = generate(G, torch.randn(run.part, *data.shape, device=run.device), label)
            u = uniform(x)                              # the noise level's place on Karras's ramp
            sigma = karras(u, cfg.sigma_min, cfg.sigma_max)                         # (B, 1, ...)
            x_t = x + sigma * torch.randn_like(x)
            d_real = teacher(x_t.detach(), sigma, label)
            with torch.set_grad_enabled(cfg.gan_weight > 0):    # only the GAN's term needs it
                d_fake, feature = fake.with_feature(x_t, sigma, label)
                d_fake = d_fake.detach()        # frees half of the graph: the GAN reads feature
                logit = disc(feature)[:, 0]                                         # (B,)
            r = balance_ratio(density_ratio(logit), u.flatten(), disc.bin_means, cfg.ratio_ema)
            loss = f_distill_loss(x, d_real, d_fake, r, cfg.divergence).mean()
            gan = gan_loss(logit).mean()
            ((loss + cfg.gan_weight * gan) / cfg.accumulate).backward(inputs=list(G.parameters()))
        opt_G.step()
        opt_G.zero_grad()
        update_ema(ema, G, cfg.ema, step)
        gap = (d_real - d_fake).square().mean()         # falls as the student learns; dm does not
        run.log(gap=gap, dm=loss, gan=gan, fake=loss_fake, disc=loss_disc, ratio_std=r.std())
        if run.due():
            shown = sample(ema, len(z_show), label_show, z_show)
            run.show({**panels, "student, 1 network call": shown}, label_show, z_show)
    run.report(data, lambda n, label: sample(ema, n, label))
    return ema, run


def critic_losses(G, fake, disc, data, n, cfg):
    """Losses of fake score and discriminator on n of the student's samples and n of the data."""
    real, label = data.sample(n)
    with torch.no_grad():
        x = generate(G, torch.randn_like(real), label)
    sigma = karras(uniform(x), cfg.sigma_min, cfg.sigma_max)
    d_fake, feature = fake.with_feature(x + sigma * torch.randn_like(x), sigma, label)
    loss_fake = denoising_loss(d_fake, x, sigma, data.sigma_data).mean()
    if cfg.gan_weight == 0 and cfg.divergence == "rkl":
        return loss_fake, torch.zeros_like(loss_fake)   # reverse KL alone needs no ratio
    feature_real = fake.feature(real + sigma * torch.randn_like(x), sigma, label)
    return loss_fake, discriminator_loss(disc(feature_real)[:, 0], disc(feature)[:, 0]).mean()


@torch.no_grad()
def sample(student, n, label=None, z=None):
    """n samples (n, ...), one call each, of noise z (n, ...) and label (n, K), by default drawn."""
    device = next(student.parameters()).device
    need(label is None or student.label_dim, "this student is not class-conditional")
    label = draw_label(n, student, device) if label is None else label
    z = torch.randn(n, *student.shape, device=device) if z is None else z
    return in_parts(lambda z, label: generate(student, z, label), z, label, most=student.most)


if __name__ == "__main__":
    main(Config, PRESETS, train, sample)
