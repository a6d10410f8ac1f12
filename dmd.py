"""
Distribution matching distillation: DMD (Yin et al., arXiv 2311.18828) and DMD2 (arXiv 2405.14867).

A student x = G(z) learns to have the teacher's distribution at every noise level, x_t = x + sigma
eps, by the difference of two scores:

    grad KL(student || teacher) = -E[ w (s_teacher(x_t) - s_student(x_t)) dG/dtheta ]  (DMD, Eq. 7)
    w = sigma^2 / mean|x - d_real|,   d_real = E[x | x_t] by the teacher               (DMD, Eq. 8)

s_student comes from a second denoiser, the *fake score*, fitted to the student's samples
throughout. --variant dmd2 fits it more often and adds a GAN on noised data; dmd regresses the
student on pairs of noise and teacher sample (DMD, Eq. 9); vsd, SwiftBrush (arXiv 2312.05239), reads
no data, and its fake score is the teacher with low-rank adapters. --steps_student 2 or 4 makes a
student of several calls; each call is trained on what the calls before it really give (backward
simulation, DMD2, Sec. 4.5).

    python dmd.py                               # ring of 8 Gaussians: a minute on a core
    python dmd.py --variant vsd                 # the same without data
    python dmd.py --data cifar10 --dtype bf16 --teacher edm-cifar10-32x32-cond-vp.pkl

Differences from the papers and their code: 1. Levels are continuous on Karras's ramp, all of it for
both networks; DMD's student sees 2 % to 98 % of 1000 levels.  2. Regression by L2 or pseudo-Huber;
DMD's LPIPS needs another network.  3. The GAN sees the sample noised for the score difference, not
anew; data and student share label and level (official: independent). Head and fake score share an
optimiser, as in DMD2; NVIDIA's FastGen has another for it, weight 1, and it reads the teacher.  4.
Adam with betas (0, 0.99) instead of AdamW with (0.9, 0.999) and weight decay; no clipping of
gradients (official: norm 10), no warm-up (500 steps); the student's rate falls to 0 over the last
half, the critic's to a tenth. One EMA (DMD2: none).  5. Labels in the data's proportions (DMD2:
uniform).  6. vsd without text guidance, no label is dropped; its weight is re-read for x + sigma
eps, its fake score has EDM's weight, adapters have scale 1.  7. Levels of 2 and 4 calls are DMD2's
for Stable Diffusion in units of the data's std. Gradients pass through all calls, but for GPUs'
image presets. DMD2 computes the loss after a random number of calls, one for all processes (here
each draws its own); its fake score knows only the mixture of what they give, which may be right
where the last call is not (4 calls on the grid: H 0.003, end to end 0.0002).  8. Image settings fit
one GPU and days: 40,000 x 256 on CIFAR-10 with 2 critic updates to one of the student (FastGen: 4),
15,000 x 280 on ImageNet-64. None was run at full size.
"""
import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
from torch.nn.utils import parametrize

from common import (Run, Shared, begin, denoising_loss, draw_label, gallery, in_parts,
                    initial_student, karras, level, load_data, load_teacher, loss_with_gradient,
                    main, need, set_lr, teacher_pairs, uniform, update_ema, weighted_score_gradient)

# Levels of the calls after the first, which has --sigma_init, in units of the data's std: DMD2's
# timesteps 749, 499, 249 of Stable Diffusion's 1000
LATER_LEVELS = {1: [], 2: [1.61], 4: [4.08, 1.61, 0.69]}


@dataclass(init=False)
class Config(Shared):
    steps: int = 1000
    lr: float = 2e-3
    ema: float = 0.995
    variant: Literal["dmd2", "dmd", "vsd"] = "dmd2"     # GAN, regression on pairs, or image-free
    steps_student: int = 1      # network calls of the student: 1, 2 or 4
    end_to_end: bool = True     # gradients through all calls; else the last of a random number
    fake_updates: int = 2       # updates of fake score and discriminator per student update
    lr_fake: float = 2e-3       # their learning rate
    gan_weight: float = 0.1     # dmd2: weight of the GAN term in the student's loss
    disc_weight: float = 1.0    # dmd2: of the discriminator's loss beside the fake score's
    reg_weight: float = 0.25    # dmd: weight of the regression
    distance: Literal["l2", "huber"] = "l2"     # dmd: distance of the regression
    pairs: int = 10000          # dmd: number of pairs of noise and teacher sample
    rank: int = 16              # vsd: rank of the fake score's adapters


SMALL = dict(net="small", teacher_steps=2000, steps=500, batch=32, accumulate=1, lr=1e-3,
             lr_fake=2e-3, fake_updates=1, sigma_min=0.01, sigma_max=80.0, sigma_init=2.5,
             gan_weight=1e-2, disc_weight=1.0, pairs=5000, ema=0.99, samples=5000)
LARGE = dict(cond=True, flip=True, disc_weight=1e-2, rank=64, end_to_end=False, ema=0.9995,
             sigma_min=0.002, sigma_max=80.0, sigma_init=80.0, every=1000, samples=50_000)
PRESETS = {
    "grid dmd2": dict(fake_updates=3, steps=1600),      # 25 narrow modes want a closer fake score
    "dmd": dict(fake_updates=1, steps=1400),
    # adapters are slow: with rates of 2e-3 one of three seeds stayed a thin circle (H 0.023)
    "vsd": dict(teacher_steps=2000, fake_updates=1, steps=1400, lr=1e-3, lr_fake=4e-3),
    "mnist": dict(SMALL, cond=True), "images": SMALL,
    # An H100, a day. DMD2 has no CIFAR-10 settings; f-distill's Table 5 and FastGen: batch 2048,
    # rates 1e-4, 20K student updates with 4 of the critic
    "cifar10": dict(LARGE, net="ddpmpp", teacher_steps=100_000, steps=40_000, batch=256,
                    accumulate=2, lr=5e-5, lr_fake=5e-5, gan_weight=1e-3, pairs=100_000),
    # An H100, three to four days; DMD2: 194K steps, every fifth the student's
    "imagenet64": dict(LARGE, net="adm", steps=15_000, batch=280, accumulate=10, lr=2e-6,
                       lr_fake=2e-6, gan_weight=3e-3, pairs=25_000),
    "imagenet64 dmd2": dict(fake_updates=5),
    "cifar10 vsd": dict(lr_fake=1e-3),                  # SwiftBrush's for its adapters
    "imagenet64 vsd": dict(lr_fake=1e-3),
    "cifar10 small": SMALL,                             # for a CPU, with --minutes
}

# ---- the method ----------------------------------------------------------------------------------


def dm_loss(x, d_real, d_fake):
    """
    Loss (B,) of samples x (B, ...), the teacher's and the fake score's estimates of them: gradient
    (d_fake - d_real) / mean|x - d_real| / D in x, D the elements of a sample (DMD, Eqs. 7 and 8).
    """
    return loss_with_gradient(x, weighted_score_gradient(x, d_real, d_fake, x.new_ones(len(x))))


def vsd_loss(x, d_real, d_fake, sigma, sigma_data):
    """
    Loss (B,) whose gradient in x is w (d_fake - d_real) / D: SwiftBrush's weight, the noise's
    share of variance, times (eps_teacher - eps_fake); the eps differ by (d_fake - d_real) / sigma,
    and w has a factor sigma_data that makes it free of units.
    """
    w = sigma * sigma_data / (sigma**2 + sigma_data**2)                             # (B, 1, ...)
    return loss_with_gradient(x, w * (d_fake - d_real))


def regression_loss(x, y, distance):
    """Distance (B,) of samples of one noise (DMD, Eq. 9); huber: a norm of it all, c as in iCT."""
    square = (x - y).square().flatten(1)                                            # (B, elements)
    if distance == "l2":
        return square.mean(1)
    c = 0.00054 * square.shape[1] ** 0.5
    return (square.sum(1) + c**2).sqrt() - c


def discriminator_loss(logit_real, logit_fake):
    """Logistic loss (B,); at its optimum, logit = log p_data(x_t) / q_student(x_t) (DMD2, 4.3)."""
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


def roll_out(G, z, label=None, end_to_end=True):
    """
    x (B, ...) after some calls of the student, each on the sample before it under fresh noise: z
    (B, calls, ...) has a unit noise for each. Sampling and backward simulation in one; gradients
    pass through all calls, or through the last alone, as in DMD2 (Sec. 4.5).
    """
    x = torch.zeros_like(z[:, 0])                       # the first call sees pure noise
    for noise, sigma in zip(z.unbind(1), G.levels):     # as many calls as z has noises
        if not end_to_end:
            x = x.detach()
        x = G(x + sigma * noise, level(noise, sigma), label)
    return x


class LowRank(nn.Module):
    """Adapter of a layer's weight: weight + B A, B (out, rank) zero at first, A (rank, in)."""

    def __init__(self, weight, rank):
        super().__init__()
        fan_in = weight[0].numel()
        self.A = nn.Parameter(torch.randn(rank, fan_in, device=weight.device) / fan_in**0.5)
        self.B = nn.Parameter(torch.zeros(len(weight), rank, device=weight.device))

    def forward(self, weight):
        return weight + (self.B @ self.A).view_as(weight)


def add_adapters(denoiser, rank):
    """Freeze a denoiser, and give its linear and convolutional layers adapters that train."""
    denoiser.requires_grad_(False)
    for layer in list(denoiser.modules()):
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank))


# ---- training ------------------------------------------------------------------------------------


def train(cfg, data=None, teacher=None, student=None, on_log=None):
    """Distil as cfg says; what is passed in replaces what flags would load. -> (EMA, Run)"""
    begin(cfg, "dmd")
    need(cfg.steps_student in LATER_LEVELS, "--steps_student is 1, 2 or 4")
    need(cfg.variant != "dmd" or cfg.steps_student == 1, "--variant dmd wants --steps_student 1: "
         "its pairs belong to students of one call")
    data = load_data(cfg, data)
    levels = [cfg.sigma_init, *[data.sigma_data * r for r in LATER_LEVELS[cfg.steps_student]]]
    lower = max([cfg.sigma_min, *levels[1:]])
    need(cfg.sigma_init > lower, f"--sigma_init must lie above {lower:.3g}, the next level")
    teacher = load_teacher(cfg, data, teacher)
    G = initial_student(cfg, data, teacher, student)
    fake = initial_student(cfg, data, teacher)
    G.levels = levels
    if cfg.variant == "vsd":
        add_adapters(fake, cfg.rank)
    disc = make_discriminator(fake.net.feature_shape).to(next(fake.parameters()).device)
    ema = copy.deepcopy(G).eval().requires_grad_(False)
    opt_G = torch.optim.Adam(G.parameters(), betas=(0.0, 0.99), fused=True)
    opt_fake = torch.optim.Adam([*fake.parameters(), *disc.parameters()], betas=(0.0, 0.99),
                                fused=True)
    pairs = teacher_pairs(cfg, data, teacher, cfg.pairs) if cfg.variant == "dmd" else None
    state = dict(G=G, fake=fake, disc=disc, ema=ema, opt_G=opt_G, opt_fake=opt_fake)
    panels, z_show, label_show = gallery(cfg, data, teacher)
    run = Run(cfg, "dmd", on_log, **state)
    z_show = torch.stack([z_show.roll(k, 0) for k in range(len(levels))], 1)    # (n, calls, ...)

    for step in run.steps():
        set_lr(opt_G, cfg.lr, run.progress)
        set_lr(opt_fake, cfg.lr_fake, run.progress, floor=0.1)
        calls = cfg.steps_student       # the same for critic and student: one law of x at a time
        if not cfg.end_to_end:
            calls = int(torch.randint(calls, ())) + 1
        size = [run.part, calls, *data.shape]   # run.part: samples of one pass, batch / accumulate
        # 1. fit the fake score, and the discriminator on its features, to the student's samples
        for _ in range(cfg.fake_updates):
            for _ in range(cfg.accumulate):
                z = torch.randn(size, device=run.device)                    # (B, calls, ...)
                loss, critic_terms = critic_loss(G, fake, disc, data, z, cfg)
                (loss / cfg.accumulate).backward()
            opt_fake.step()
            opt_fake.zero_grad()
        # 2. move the student by the difference of the two scores, and by the GAN or the pairs
        for _ in range(cfg.accumulate):
            z = torch.randn(size, device=run.device)
            loss, terms = student_loss(G, fake, disc, teacher, data, pairs, z, cfg)
            (loss / cfg.accumulate).backward(inputs=list(G.parameters()))   # not the critic's
        opt_G.step()
        opt_G.zero_grad()
        update_ema(ema, G, cfg.ema, step)
        run.log(**terms, **critic_terms)                # gap falls while the student learns
        if run.due():
            shown = sample(ema, len(z_show), label_show, z_show)
            panels[f"student, network calls: {len(levels)}"] = shown
            run.show(panels, label_show, z_show[:, 0])
    run.report(data, lambda n, label: sample(ema, n, label))
    return ema, run


def has_gan(cfg):
    """Whether there is a GAN: nothing else looks at data, or uses disc."""
    return cfg.variant == "dmd2" and cfg.gan_weight > 0


def critic_loss(G, fake, disc, data, z, cfg):
    """Loss of the fake score (DMD, Eq. 6) and the discriminator, and its terms."""
    if has_gan(cfg):
        real, label = data.sample(len(z))               # the student's samples get the same labels
    else:
        label = draw_label(len(z), data, z.device)
    with torch.no_grad():
        x = roll_out(G, z, label)
    sigma = karras(uniform(x), cfg.sigma_min, cfg.sigma_max)                        # (B, 1, ...)
    d_fake, feature = fake.with_feature(x + sigma * torch.randn_like(x), sigma, label)
    loss = denoising_loss(d_fake, x, sigma, data.sigma_data).mean()
    terms = dict(fake=loss)
    if has_gan(cfg):
        feature_real = fake.feature(real + sigma * torch.randn_like(x), sigma, label)
        terms["disc"] = discriminator_loss(disc(feature_real)[:, 0], disc(feature)[:, 0]).mean()
        loss = loss + cfg.disc_weight * terms["disc"]
    return loss, terms


def student_loss(G, fake, disc, teacher, data, pairs, z, cfg):
    """The student's loss, and its terms."""
    label = draw_label(len(z), data, z.device)
    x = roll_out(G, z, label, cfg.end_to_end)
    sigma = karras(uniform(x), cfg.sigma_min, cfg.sigma_max)
    x_t = x + sigma * torch.randn_like(x)
    d_real = teacher(x_t.detach(), sigma, label)
    with torch.set_grad_enabled(has_gan(cfg)):          # only the GAN's term goes back through it
        d_fake, feature = fake.with_feature(x_t, sigma, label)
        d_fake = d_fake.detach()                        # frees half of the graph
    if cfg.variant == "vsd":
        loss = vsd_loss(x, d_real, d_fake, sigma, data.sigma_data).mean()
    else:
        loss = dm_loss(x, d_real, d_fake).mean()
    terms = dict(gap=(d_real - d_fake).square().mean(), dm=loss)
    if has_gan(cfg):
        terms["gan"] = gan_loss(disc(feature)[:, 0]).mean()
        loss = loss + cfg.gan_weight * terms["gan"]
    if pairs:
        pick = torch.randint(cfg.pairs, (len(z),), device=pairs[0].device)
        z_pair, label_pair, y = [t if t is None else t[pick].to(z.device) for t in pairs]
        x = roll_out(G, z_pair[:, None], label_pair)
        terms["reg"] = regression_loss(x, y, cfg.distance).mean()
        loss = loss + cfg.reg_weight * terms["reg"]
    return loss, terms


@torch.no_grad()
def sample(student, n, label=None, z=None):
    """n samples (n, ...) by all calls; z (n, calls, ...) and label (n, K) are drawn by default."""
    device = next(student.parameters()).device
    need(label is None or student.label_dim, "this student is not class-conditional")
    label = draw_label(n, student, device) if label is None else label
    z = torch.randn(n, len(student.levels), *student.shape, device=device) if z is None else z
    return in_parts(lambda z, label: roll_out(student, z, label), z, label, most=student.most)


if __name__ == "__main__":
    main(Config, PRESETS, train, sample)
