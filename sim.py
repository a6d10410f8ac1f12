"""
Score implicit matching (SIM, arXiv 2410.16794), score identity distillation (SiD, 2404.04057).

A one-step student x = G(z) is trained to have the teacher's score at every noise level, x_t = x +
sigma eps: it descends E d(y), d a distance and y = s_student(x_t) - s_teacher(x_t). Nobody knows
how s_student changes with the student's weights; but with the law of x_t fixed, the gradient is
that of a loss that needs only its value (SIM, Sec. 3.2):

    L = -E[ d'(y)^T (s_student(x_t) - grad log q(x_t | x)) ],   q(x_t | x) = N(x, sigma^2)
    L + 2 (1 - alpha) E[ d(y) ]     alpha 1: SIM; 1/2: exact, the law of x_t moves; d = |y|^2: SiD

s_student comes from a second denoiser, the *fake score*, fitted to the student's samples
throughout. Gradients flow through x_t into both networks; only their weights are held fixed. L
takes both signs and hovers about 0, so it shows no progress; gap in log.csv, E|d_real - d_fake|^2,
does. The loop reads no data.

    python sim.py                               # ring; alpha 1/2 and l2 are neither paper's
    python sim.py --distance huber --alpha 1    # score implicit matching
    python sim.py --alpha 1.2                   # SiD
    python sim.py --data cifar10 --dtype bf16 --teacher edm-cifar10-32x32-cond-vp.pkl

Differences from the papers and their code: 1. Both methods are one loss; alpha with the
pseudo-Huber distance is in neither paper. With l2 the loss is twice SiD's, of no effect under Adam;
SiD's factor 100 is left out.  2. y and c are in units of x (differences of denoisers, sigma^2 times
those of scores). SiD's normaliser serves both distances on images. It depends on x, which bends the
gradient, most where x has two numbers (ring: H 0.0004 for 0.00004; the grid with alpha 1.2: 0.99
for 0.0003): toys do without.  3. On toys the fake score gets 2 or 3 updates to the student's one
(papers: 1).  4. On toys alpha is 0.5, on MNIST and own images 1, not 1.2.  5. No dropout; Adam's
beta2 is 0.99 (SiD: 0.999); SiD augments the fake score's input (p = 0.12).  6. The EMA warms up;
rates fall over the last half, to 0 and a tenth.  7. A NaN ends the run, SiD drops such samples.  8.
SIM's settings for CIFAR-10 are not public: SiD's stand in.  9. Images: one GPU, 3 to 5 days:
150,000 updates of 256 (SiD: 3 million), ImageNet-64 40,000 (122,000 of 8192).
"""
import copy
from dataclasses import dataclass
from typing import Literal

import torch

from common import (Run, Shared, begin, denoising_loss, draw_label, gallery, generate, in_parts,
                    initial_student, karras, load_data, load_teacher, lognormal_sigma, main, need,
                    set_lr, uniform, update_ema)


@dataclass(init=False)
class Config(Shared):
    steps: int = 1400
    teacher_steps: int = 2000   # the teacher is all that the loop knows of the data
    lr: float = 2e-3
    ema: float = 0.995
    sigma_init: float = 2.5
    distance: Literal["l2", "huber"] = "l2"     # d of the divergence E d(y)
    c: float = 0.001            # width of the pseudo-Huber distance, in units of x
    alpha: float = 0.5          # 0.5: the gradient of E d(y) | 1: SIM | 1.2: SiD
    u_max: float = 0.8          # the student's loss looks at this lower part of the noise ramp
    fake_updates: int = 2       # updates of the fake score per student update
    lr_fake: float = 2e-3       # its learning rate


# At fdistill's and dmd's rate, 1e-3, the student outruns its fake score: images grow alike
SMALL = dict(net="small", teacher_steps=2000, steps=500, batch=32, accumulate=1, lr=3e-4, ema=0.99,
             lr_fake=2e-3, fake_updates=1, alpha=1.0, sigma_min=0.01, sigma_max=80.0, samples=5000)
LARGE = dict(cond=True, flip=True, alpha=1.2, batch=256, fake_updates=1, sigma_min=0.002,
             sigma_max=80.0, every=1000, samples=50_000)
PRESETS = {
    "grid": dict(fake_updates=3),       # 25 narrow modes want a closer fake score
    "mnist": dict(SMALL, cond=True), "images": SMALL,
    # SiD's table: rates, alpha, EMA half-life 0.5 and 2 million images; sigma above 24.4 =
    # karras(0.8) is left out. c as in consistency training, 0.00054 sqrt(3072): a guess.
    "cifar10": dict(LARGE, net="ddpmpp", teacher_steps=100_000, c=0.03, steps=150_000, accumulate=4,
                    lr=1e-5, lr_fake=1e-5, ema=0.99965),
    "imagenet64": dict(LARGE, net="adm", c=0.06, steps=40_000, accumulate=16, lr=4e-6, lr_fake=4e-6,
                       ema=0.99991),
    "cifar10 small": SMALL,             # for a CPU, with --minutes
}

# ---- the method ----------------------------------------------------------------------------------


def distance(y, kind, c):
    """d(y) (B,), its gradient d'(y) (B, ...): |y|^2, or sqrt(|y|^2 + c^2) - c (SIM, Sec. 3.3)."""
    square = y.square().flatten(1).sum(1)
    if kind == "l2":
        return square, 2 * y
    root = (square + c**2).sqrt()
    return root - c, y / root.view(-1, *[1] * (y.ndim - 1))


def sim_loss(x, d_real, d_fake, kind, c, alpha):
    """Loss (B,), whose gradient in x also runs through d_real and d_fake (B, ...). Of points, at
    alpha 1/2 it is that of E d(y), at alpha 1 the same with the law of x_t held fixed (SIM, Sec.
    3.2; SiD). In denoisers: y = d_fake - d_real is sigma^2 (s_fake - s_real), d_fake - x is sigma^2
    (s_fake - grad log q(x_t | x))."""
    y = d_fake - d_real
    d, slope = distance(y, kind, c)
    loss = 2 * (1 - alpha) * d - (slope * (d_fake - x)).flatten(1).sum(1)
    if x.ndim > 2:                      # images: SiD's normaliser, calmer, though it bends this
        loss = loss / (x - d_real).detach().abs().flatten(1).mean(1).clamp(min=1e-5)
    return loss


# ---- training ------------------------------------------------------------------------------------


def train(cfg, data=None, teacher=None, student=None, on_log=None):
    """Distil as cfg says; what is passed in replaces what flags would load. -> (EMA, Run)"""
    begin(cfg, "sim")
    need(cfg.c > 0 and 0 < cfg.u_max <= 1, "--c must be greater than 0, --u_max in (0, 1]")
    data = load_data(cfg, data)
    teacher = load_teacher(cfg, data, teacher)
    G = initial_student(cfg, data, teacher, student)
    fake = initial_student(cfg, data, teacher)
    ema = copy.deepcopy(G).eval().requires_grad_(False)
    opt_G = torch.optim.Adam(G.parameters(), betas=(0.0, 0.99), fused=True)
    opt_fake = torch.optim.Adam(fake.parameters(), betas=(0.0, 0.99), fused=True)
    panels, z_show, label_show = gallery(cfg, data, teacher)
    run = Run(cfg, "sim", on_log, G=G, fake=fake, ema=ema, opt_G=opt_G, opt_fake=opt_fake)

    for step in run.steps():
        set_lr(opt_G, cfg.lr, run.progress)
        set_lr(opt_fake, cfg.lr_fake, run.progress, floor=0.1)
        # 1. fit the fake score to the student's present samples
        for _ in range(cfg.fake_updates):
            for _ in range(cfg.accumulate):     # run.part: samples of one pass, batch / accumulate
                label = draw_label(run.part, data, run.device)
                with torch.no_grad():
                    x = generate(G, torch.randn(run.part, *data.shape, device=run.device), label)
                sigma = lognormal_sigma(x)              # (B, 1, ...), EDM's law, as in SiD
                d_fake = fake(x + sigma * torch.randn_like(x), sigma, label)
                loss_fake = denoising_loss(d_fake, x, sigma, data.sigma_data).mean()
                (loss_fake / cfg.accumulate).backward()
            opt_fake.step()
            opt_fake.zero_grad()

        # 2. move the student; gradients pass through x_t into both networks, not to their weights
        for _ in range(cfg.accumulate):
            label = draw_label(run.part, data, run.device)
            x = generate(G, torch.randn(run.part, *data.shape, device=run.device), label)
            sigma = karras(cfg.u_max * uniform(x), cfg.sigma_min, cfg.sigma_max)
            x_t = x + sigma * torch.randn_like(x)
            d_real = teacher(x_t, sigma, label)
            d_fake = fake(x_t, sigma, label)
            need(d_real.requires_grad, "the teacher must pass gradients on: no torch.no_grad in it")
            loss = sim_loss(x, d_real, d_fake, cfg.distance, cfg.c, cfg.alpha).mean()
            (loss / cfg.accumulate).backward(inputs=list(G.parameters()))
        opt_G.step()
        opt_G.zero_grad()
        update_ema(ema, G, cfg.ema, step)

        gap = (d_real - d_fake).square().mean()     # falls as the student learns, unlike the loss
        run.log(gap=gap, sim=loss, fake=loss_fake)
        if run.due():
            shown = sample(ema, len(z_show), label_show, z_show)
            run.show({**panels, "student, 1 network call": shown}, label_show, z_show)
    run.report(data, lambda n, label: sample(ema, n, label))
    return ema, run


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
