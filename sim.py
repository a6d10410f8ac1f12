"""
Score implicit matching (SIM: Luo et al., arXiv 2410.16794) and score identity distillation (SiD: Zhou et al., 2404.04057).

A one-step student x = G(sigma_init z) learns to have the teacher's score at every noise level, x_t = x + sigma eps:
it descends E d(y), d a distance and y = s_student(x_t) - s_teacher(x_t). How s_student changes with the student nobody
knows, but with the law of x_t frozen the gradient is that of a loss that needs only its value (SIM, Sec. 3.2):

    L = - E[ d'(y)^T (s_student(x_t) - grad log q(x_t | x)) ],    q(x_t | x) = N(x, sigma^2)                       (SIM)
    L + 2 (1 - alpha) E[ d(y) ]                          alpha 1/2 lets the law of x_t move too; d = |y|^2 is SiD's loss

s_student comes from a second network, the *fake score*, fitted to the student's samples all along. Gradients flow through
x_t into both networks, only their weights are held fixed; detached, the student's scale gets half its gradient. L has a
sign and hovers about 0: no sign of convergence. `gap` in log.csv, E|d_real - d_fake|^2, is one. No data is touched.

Differences from the papers and their code: 1. Both methods are one loss; alpha with the pseudo-Huber distance is in
neither paper.  2. y and c are in units of x (differences of denoisers, sigma^2 times those of scores), and SiD's normaliser
serves both distances.  3. On toys the fake score gets 2 or 3 updates per student update; with the papers' 1 the grid's
modes are less even (H 0.0014 against 0.0005).  4. On toys alpha is 0.5, not SiD's 1.2, which fails on the grid (H 0.999)
and works on the ring (0.0003).  5. No dropout, no augmentation; Adam's beta2 is 0.99 (SiD: 0.999); SiD's factor 100 on the
loss, of no effect under Adam, is left out.  6. The EMA's decay is constant; the learning rate falls to 0 over the last half.
7. A NaN ends the run, SiD drops such samples.  8. SIM's settings for CIFAR-10 are not public: SiD's stand in.

    python sim.py                                       # ring of 8 Gaussians: about 50 s of one CPU core, H about 0.0002
    python sim.py --data cifar10 --dtype bf16 --teacher edm-cifar10-32x32-cond-vp.pkl              # SiD's settings, full size:
    python sim.py --data imagenet64 --dtype bf16 --teacher edm-imagenet-64x64-cond-adm.pkl         # not yet run
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from common import (EMA, TOYS, GaussianMixture, Run, Shared, UserError, bcast, denoising_loss, gallery, generate,
                    initial_student, karras, load_data, load_teacher, lognormal_sigma, lr_factor, main, micro_batches, report, set_lr)


@dataclass
class Config(Shared):
    steps: int = 1400
    batch: int = 512
    lr: float = 2e-3
    ema: float = 0.995
    sigma_init: float = 2.5
    distance: str = "l2"        # l2 | huber: the d of the divergence E d(y), y the difference of the two scores
    c: float = 0.001            # width of the pseudo-Huber distance, in units of x; of no effect on l2
    alpha: float = 0.5          # 0.5: exact gradient of E d(y) (Fisher, if l2) | 1: SIM | 1.2: SiD's correction beyond SIM
    u_max: float = 0.8          # the student's loss looks at this lower part of the noise ramp
    fake: str = "learned"       # learned | exact: the student's score by a network, or (toys) in closed form
    fake_updates: int = 2       # updates of the fake score per student update
    lr_fake: float = 2e-3       # its learning rate


PRESETS = {
    **{name: {} for name in TOYS},
    "grid": dict(fake_updates=3),   # 25 narrow modes want a closer fake score
    # SiD's table for conditional CIFAR-10: 800 million images at batch 256, EMA with a half-life of half a million images;
    # sigma above 24.4 = karras(0.8) is left out. c as in consistency training, 0.00054 sqrt(3072), a guess. Not yet run here.
    "cifar10": dict(net="ddpmpp", cond=True, teacher_steps=100_000, c=0.03, alpha=1.2, steps=3_125_000, batch=256, lr=1e-5,
                    lr_fake=1e-5, fake_updates=1, ema=0.99965, sigma_min=0.002, sigma_max=80.0, every=10_000, samples=50_000),
    # SiD's table for ImageNet-64: a billion images at batch 8192, EMA with a half-life of two million; c again 0.00054 times the
    # root of the dimensions. It wants --teacher edm-imagenet-64x64-cond-adm.pkl; --micro 16 is for 80 GB (README). Not yet run.
    "imagenet64": dict(net="adm", cond=True, c=0.06, alpha=1.2, steps=122_000, batch=8192, micro=16, lr=4e-6, lr_fake=4e-6,
                       fake_updates=1, ema=0.99716, sigma_min=0.002, sigma_max=80.0, every=1000, samples=50_000),
}

# ---- the method ------------------------------------------------------------------------------------------------------


def distance(y, kind, c):
    """d(y) (B,) and d'(y) (B, ...) of y (B, ...): |y|^2, or pseudo-Huber sqrt(|y|^2 + c^2) - c with |d'| < 1 (SIM, Sec. 3.3)."""
    square = y.square().flatten(1).sum(1)
    if kind == "l2":
        return square, 2 * y
    root = (square + c**2).sqrt()
    return root - c, y / bcast(root, y)


def sim_loss(x, d_real, d_fake, kind, c, alpha):
    """
    Per-sample loss (B,) whose gradient in x, through d_real and d_fake as well, is that of E d(y) (SIM, Sec. 3.2; SiD).
    In denoisers: y = d_fake - d_real is sigma^2 (s_fake - s_real), d_fake - x is sigma^2 (s_fake - grad log q(x_t | x)).
    """
    y = d_fake - d_real
    d, slope = distance(y, kind, c)
    loss = 2 * (1 - alpha) * d - (slope * (d_fake - x)).flatten(1).sum(1)
    return loss / (x - d_real).detach().abs().flatten(1).mean(1).clamp(min=1e-5)            # DMD, Eq. 8, as in SiD's code


def fake_score_loss(x, d_fake, sigma, sigma_data):
    """Denoising loss (B,) on the student's own samples: at its minimum d_fake is the student's exact denoiser."""
    return denoising_loss(d_fake, x, sigma, sigma_data)


# ---- training --------------------------------------------------------------------------------------------------------


def draw(n, data, device):
    """All that is random about n student samples: latent z, label, place u of the noise level on Karras's ramp, noise eps."""
    z, eps = torch.randn(2, n, *data.shape, device=device)
    return z, data.draw_label(n), torch.rand(n, device=device), eps


def exact_fake(G, data, device, n=4096):
    """The student's exact denoiser, as far as n fresh samples tell: for --fake exact."""
    z, label, _, _ = draw(n, data, device)
    with torch.no_grad():
        return GaussianMixture(generate(G, z, label), groups=None if label is None else label.argmax(1))


def train(cfg):
    """Distil as cfg says; returns the averaged student and its Run."""
    if cfg.fake == "exact" and cfg.data not in TOYS:
        raise UserError("--fake exact needs a toy: images have no closed form")
    if cfg.fake_updates < 1 or not 0 < cfg.lr_fake < float("inf") or not 0 < cfg.c < float("inf") or not 0 < cfg.u_max <= 1:
        raise UserError("--fake_updates must be at least 1, --lr_fake and --c positive, --u_max in (0, 1]")
    data = load_data(cfg)
    teacher = load_teacher(cfg, data)
    run = Run(cfg, "sim")
    G, fake = initial_student(cfg, teacher, data), initial_student(cfg, teacher, data)
    ema = EMA(G, cfg.ema)
    opt_G = torch.optim.Adam(G.parameters(), betas=(0.0, 0.99), fused=True)
    opt_fake = torch.optim.Adam(fake.parameters(), betas=(0.0, 0.99), fused=True)
    state = dict(G=G, fake=fake, ema=ema, opt_G=opt_G, opt_fake=opt_fake)
    panels, z_show, label_show = gallery(cfg, data, teacher)
    micro = run.micro

    for step in run.steps(state):
        factor = lr_factor(run.progress)
        set_lr(opt_G, cfg.lr * factor)
        set_lr(opt_fake, cfg.lr_fake * max(factor, 0.1))

        # 1. fit the fake score to the student's present samples
        for _ in range(cfg.fake_updates if cfg.fake == "learned" else 0):
            z, label, _, eps = draw(cfg.batch, data, run.device)
            sigma = lognormal_sigma(cfg.batch, device=run.device)
            for z, label, sigma, eps in run.parts(z, label, sigma, eps):
                with torch.no_grad():
                    x = generate(G, z, label)
                loss_fake = fake_score_loss(x, fake(x + bcast(sigma, x) * eps, sigma, label), sigma, data.sigma_data).mean()
                (loss_fake * micro / cfg.batch).backward()
            run.add_gradients(opt_fake)
            opt_fake.step()
            opt_fake.zero_grad()

        # 2. move the student; gradients pass through x_t into both networks, of which only the parameters are frozen
        z, label, u, eps = draw(cfg.batch, data, run.device)
        critic = fake.requires_grad_(False) if cfg.fake == "learned" else exact_fake(G, data, run.device)
        for z, label, sigma, eps in run.parts(z, label, karras(cfg.u_max * u, cfg.sigma_min, cfg.sigma_max), eps):
            x = generate(G, z, label)
            x_t = x + bcast(sigma, x) * eps
            d_real, d_fake = teacher(x_t, sigma, label), critic(x_t, sigma, label)
            loss = sim_loss(x, d_real, d_fake, cfg.distance, cfg.c, cfg.alpha).mean()
            (loss * micro / cfg.batch).backward()
        run.add_gradients(opt_G)
        opt_G.step()
        opt_G.zero_grad()
        ema.update(G)
        fake.requires_grad_(True)

        gap = (d_real - d_fake).square().flatten(1).sum(1).mean()       # tells of convergence, unlike the signed loss
        run.log(sim=loss, gap=gap, **dict(fake=loss_fake) if cfg.fake == "learned" else {})
        if run.due():
            run.show({**panels, "student, 1 network call": sample(ema.model, len(z_show), label_show, z=z_show)})
    report(run, data, teacher, lambda n, label: sample(ema.model, n, label))
    return ema.model, run


@torch.no_grad()
def sample(student, n, label=None, steps=1, z=None):
    """n samples (n, ...) of a student in one network call; random labels if it wants some and gets none."""
    if steps != 1:
        raise UserError("a SIM student makes a sample in one step")
    device = next(student.parameters()).device
    z = torch.randn(n, *student.shape, device=device) if z is None else z
    if label is None and student.label_dim:
        label = F.one_hot(torch.randint(student.label_dim, (n,), device=device), student.label_dim).float()
    return torch.cat([generate(student, *part) for part in micro_batches(1000, z, label)])


if __name__ == "__main__":
    main(Config, PRESETS, train, sample)
