"""
f-distill: one-step diffusion models through f-divergence distribution matching (Xu, Nie, Vahdat, arXiv 2502.15681).

A one-step student x = G(sigma_init z) learns to have the teacher's distribution at every noise level,
x_t = x + sigma eps. For any f-divergence D_f(p || q) = E_q[f(r)], r = p_teacher(x_t) / q_student(x_t), the gradient is
the score difference of distribution matching, weighted by how the divergence values a sample (Theorem 1):

    grad D_f(p || q) = - E[ h(r) (s_teacher(x_t) - s_student(x_t)) dG/dtheta ],    h(r) = r^2 f''(r)

since s_teacher - s_student = (d_real - d_fake) / sigma^2 for the denoised estimates of the teacher and of a second network,
the *fake score*, which is fitted to the student's own samples all along. h = 1 is reverse KL, that is DMD2; an h that grows
with r trusts samples where the teacher has mass, and seeks modes less. r comes from a discriminator, a small head on the
fake network's last encoder features; it compares with data, which stand in for the teacher's samples. As in DMD every sample
is further weighted by sigma^2 / mean|x - d_real|, and h is divided by its batch mean, so what is summed over the noise
levels is no single divergence any more.

Differences from the paper and its code (FastGen): 1. The discriminator reads the fake score's encoder (as DMD2), not the
frozen teacher's, so that one pass gives both; they learn in one step, and data and student share label and noise level there.
2. Its head reads the bottleneck only.  3. Ratio bins have equal counts over the sampled noise levels; the official ones are
equal in sigma, and 64 % of the draws fall into the first.  4. Both normalisations see the whole batch, also with --micro.
5. The fake score's loss has EDM's weight, the official one none.  6. One EMA; the student's learning rate falls to 0 over
the last half, the critic's to a tenth.  7. Adam with betas (0, 0.99) instead of AdamW with (0.9, 0.999) and weight decay; no
R1 penalty (paper: 1 on CIFAR-10, code: 0), no gradient clipping.  8. Noise levels are continuous, not 1000 steps.

    python fdistill.py                                  # ring of 8 Gaussians: about 48 s on a CPU core, H about 0.0001
    python fdistill.py --data cifar10 --dtype bf16 --teacher edm-cifar10-32x32-cond-vp.pkl         # the paper's settings,
    python fdistill.py --data imagenet64 --dtype bf16 --teacher edm-imagenet-64x64-cond-adm.pkl    # full size: not yet run
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (EMA, F_DIVERGENCES, TOYS, GaussianMixture, Run, Shared, UserError, bcast, denoising_loss, gallery,
                    generate, initial_student, karras, load_data, load_teacher, lr_factor, main, micro_batches, report,
                    set_lr, weighted_score_gradient)


@dataclass
class Config(Shared):
    steps: int = 1400
    batch: int = 512
    lr: float = 2e-3
    ema: float = 0.995
    divergence: str = "js"      # rkl | fkl | js | srkl | hellinger | jeffreys | neyman: the f of D_f(teacher || student)
    fake: str = "learned"       # learned | exact: score and ratio of the student by a network, or (toys) in closed form
    fake_updates: int = 2       # updates of fake score and discriminator per student update
    lr_fake: float = 2e-3       # their learning rate
    gan_weight: float = 0.01    # weight of the GAN term in the student's loss
    disc_weight: float = 0.1    # weight of the discriminator's loss beside the fake score's
    bins: int = 10              # noise-level bins in which the ratio is brought to mean 1
    ratio_ema: float = 0.0      # memory of the bins' means; 0: this batch alone


PRESETS = {
    **{name: {} for name in TOYS},
    # FastGen's config and Table 5 of the paper (60K iterations there, 100K here, 4 of 5 for the critic); disc_weight: DMD2's.
    # Not yet run here.
    "cifar10": dict(net="ddpmpp", cond=True, teacher_steps=100_000, divergence="fkl", steps=20_000, batch=2048, micro=256, lr=1e-4,
                    lr_fake=1e-4, fake_updates=4, gan_weight=1e-3, disc_weight=1e-2, ema=0.9999, sigma_min=0.002, sigma_max=80.0,
                    sigma_init=80.0, every=1000, samples=50_000),
    # Table 5 and FastGen's config: 380K iterations, every fifth the student's; disc_weight and labels of DMD2. It wants
    # --teacher edm-imagenet-64x64-cond-adm.pkl; --micro 32 is for 80 GB (README's memory table). Not yet run here.
    "imagenet64": dict(net="adm", cond=True, divergence="js", ratio_ema=0.5, steps=76_000, batch=512, micro=32, lr=2e-6, lr_fake=2e-6,
                       fake_updates=4, gan_weight=3e-3, disc_weight=1e-2, ema=0.9999, sigma_min=0.002, sigma_max=80.0, sigma_init=80.0,
                       every=1000, samples=50_000),
}

# ---- the method ------------------------------------------------------------------------------------------------------


def density_ratio(logit):
    """r = p / q (B,) from the discriminator's logit; both clamps, FastGen's, keep single samples from ruling it."""
    return logit.detach().clamp(-10, 10).exp().clamp(0.1, 20)


def balance_ratio(r, u, means, ratio_ema=0.0):
    """Divide r (B,) by its mean in each bin of the noise level's place u (B,) in [0, 1); `means` (bins,) is updated in place."""
    k = (u * len(means)).long().clamp(max=len(means) - 1)                                                        # (B,)
    count = torch.zeros_like(means).index_add_(0, k, torch.ones_like(r))                                      # (bins,)
    batch_mean = torch.zeros_like(means).index_add_(0, k, r) / count.clamp(min=1)
    means.copy_(torch.where(count > 0, ratio_ema * means + (1 - ratio_ema) * batch_mean, means))
    return r / (means[k] + 1e-6)


def f_distill_loss(x, d_real, d_fake, r, divergence, h_mean):
    """Per-sample loss (B,) whose gradient in x is h(r) / h_mean * (d_fake - d_real) / mean|x - d_real| (Theorem 1; DMD Eq. 8)."""
    _, loss = weighted_score_gradient(x, d_real, d_fake, r.log(), divergence)
    return loss / (h_mean + 1e-6)                           # h of mean 1: steps as large as reverse KL's, whatever the f


def fake_score_loss(x, d_fake, sigma, sigma_data):
    """Denoising loss (B,) on the student's own samples: at its minimum d_fake is the student's exact denoiser."""
    return denoising_loss(d_fake, x, sigma, sigma_data)


def discriminator_loss(logit_real, logit_fake):
    """Logistic loss (B,); its optimum is logit = log p_data(x_t) / q_student(x_t), which is why exp(logit) is the ratio."""
    return F.softplus(-logit_real) + F.softplus(logit_fake)


def gan_loss(logit_fake):
    """The student's non-saturating side of it (B,)."""
    return F.softplus(-logit_fake)


def make_discriminator(shape):
    """Head that turns the fake score's features, (C,) or (C, R, R), into a logit (B, 1)."""
    if len(shape) == 1:
        return nn.Linear(shape[0], 1)
    c, size, _ = shape
    norm = lambda: nn.GroupNorm(math.gcd(32, c), c)
    half = [m for _ in range((size // 4).bit_length() - 1) for m in (nn.Conv2d(c, c, 4, 2, 1), norm(), nn.SiLU())]
    return nn.Sequential(*half, nn.Conv2d(c, c, min(size, 4)), norm(), nn.SiLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, 1, 1), nn.Flatten())


# ---- training --------------------------------------------------------------------------------------------------------


def draw(n, data, device):
    """All that is random about n student samples: latent z, label, place u of the noise level on Karras's ramp, noise eps."""
    z, eps = torch.randn(2, n, *data.shape, device=device)
    return z, data.draw_label(n), torch.rand(n, device=device), eps


def exact_fake(G, data, device, n=4096):
    """The student's exact denoiser and density, as far as n fresh samples tell: for --fake exact."""
    z, label, _, _ = draw(n, data, device)
    with torch.no_grad():
        return GaussianMixture(generate(G, z, label), groups=None if label is None else label.argmax(1))


def look(x_t, sigma, label, fake, disc):
    """(d_fake, logit (B,)) at x_t: from the networks, or from two mixtures that know their densities."""
    if isinstance(fake, GaussianMixture):
        return fake(x_t, sigma, label), disc.log_prob(x_t, sigma, label) - fake.log_prob(x_t, sigma, label)
    d_fake, feature = fake(x_t, sigma, label, features="also")
    return d_fake, disc(feature)[:, 0]


def train(cfg):
    """Distil as cfg says; returns the averaged student and its Run."""
    if cfg.fake == "exact" and cfg.data not in TOYS:
        raise UserError("--fake exact needs a toy: images have no closed form")
    if min(cfg.bins, cfg.fake_updates) < 1 or not 0 <= cfg.ratio_ema < 1:
        raise UserError("--bins and --fake_updates must be at least 1, --ratio_ema in [0, 1)")
    if not (0 < cfg.lr_fake < math.inf and 0 <= cfg.gan_weight < math.inf and 0 <= cfg.disc_weight < math.inf):
        raise UserError("--lr_fake must be positive, --gan_weight and --disc_weight at least 0, all of them finite")
    data = load_data(cfg)
    teacher = load_teacher(cfg, data)
    run = Run(cfg, "fdistill")
    G, fake = initial_student(cfg, teacher, data), initial_student(cfg, teacher, data)
    disc, ema = make_discriminator(fake.net.feature_shape()).to(run.device), EMA(G, cfg.ema)
    opt_G = torch.optim.Adam(G.parameters(), betas=(0.0, 0.99), fused=True)
    opt_fake = torch.optim.Adam([*fake.parameters(), *disc.parameters()], betas=(0.0, 0.99), fused=True)
    state = dict(G=G, fake=fake, disc=disc, ema=ema, opt_G=opt_G, opt_fake=opt_fake, bin_means=torch.ones(cfg.bins, device=run.device))
    panels, z_show, label_show = gallery(cfg, data, teacher)
    micro, h = run.micro, F_DIVERGENCES[cfg.divergence].h
    adversarial = cfg.gan_weight > 0 or cfg.divergence != "rkl"             # reverse KL alone needs no ratio, hence no data

    for step in run.steps(state):
        factor = lr_factor(run.progress)
        set_lr(opt_G, cfg.lr * factor)
        set_lr(opt_fake, cfg.lr_fake * max(factor, 0.1))

        # 1. fit the fake score, and the discriminator on its features, to the student's present samples
        for _ in range(cfg.fake_updates if cfg.fake == "learned" else 0):
            z, label, u, eps = draw(cfg.batch, data, run.device)
            real, label = data.sample(cfg.batch) if adversarial else (z, label)     # same label and noise level for both
            sigma, eps_real = karras(u, cfg.sigma_min, cfg.sigma_max), torch.randn_like(z)
            for z, label, sigma, eps, real, eps_real in run.parts(z, label, sigma, eps, real, eps_real):
                with torch.no_grad():
                    x = generate(G, z, label)
                d_fake, logit = look(x + bcast(sigma, x) * eps, sigma, label, fake, disc)
                loss_fake = fake_score_loss(x, d_fake, sigma, data.sigma_data).mean()
                loss_disc = torch.zeros_like(loss_fake)
                if adversarial:
                    feature = fake(real + bcast(sigma, x) * eps_real, sigma, label, features="only")
                    loss_disc = discriminator_loss(disc(feature)[:, 0], logit).mean()
                ((loss_fake + cfg.disc_weight * loss_disc) * micro / cfg.batch).backward()
            run.add_gradients(opt_fake)
            opt_fake.step()
            opt_fake.zero_grad()

        # 2. look at fresh samples through teacher, fake score and discriminator; weights need the ratios of the whole batch
        z, label, u, eps = draw(cfg.batch, data, run.device)
        parts, views = list(run.parts(z, label, karras(u, cfg.sigma_min, cfg.sigma_max), eps)), []
        critic = (fake, disc) if cfg.fake == "learned" else (exact_fake(G, data, run.device), data)
        fake.requires_grad_(False), disc.requires_grad_(False)
        for z, label, sigma, eps in parts:
            with torch.set_grad_enabled(len(parts) == 1):   # several parts: their graphs are built one at a time in 3.
                x = generate(G, z, label)
                x_t = x + bcast(sigma, x) * eps
            with torch.set_grad_enabled(len(parts) == 1 and cfg.gan_weight > 0):
                d_fake, logit = look(x_t, sigma, label, *critic)
            with torch.no_grad():
                views.append((x, teacher(x_t, sigma, label), d_fake.detach(), logit))
        r = density_ratio(run.whole(torch.cat([logit.detach() for *_, logit in views])))
        r = balance_ratio(r, u, state["bin_means"], cfg.ratio_ema)                                               # (B,)

        # 3. move the student
        h_mean = h(r).mean()
        for (z, label, sigma, eps), (x, d_real, d_fake, logit), (r_part,) in zip(parts, views, run.parts(r)):
            if len(parts) > 1:
                x = generate(G, z, label)
                if cfg.gan_weight > 0:
                    logit = look(x + bcast(sigma, x) * eps, sigma, label, *critic)[1]
            loss_f = f_distill_loss(x, d_real, d_fake, r_part, cfg.divergence, h_mean).mean()
            loss_gan = gan_loss(logit).mean()
            ((loss_f + cfg.gan_weight * loss_gan if cfg.gan_weight > 0 else loss_f) * micro / cfg.batch).backward()
        run.add_gradients(opt_G)
        opt_G.step()
        opt_G.zero_grad()
        ema.update(G)
        fake.requires_grad_(True), disc.requires_grad_(True)

        # of the last part; gap falls while the student learns, loss_f is |g|^2 / 2 and tells little
        losses = dict(fake=loss_fake, disc=loss_disc) if cfg.fake == "learned" else {}
        run.log(gap=(d_real - d_fake).square().mean(), f=loss_f, gan=loss_gan, **losses, ratio_std=r.std(correction=0))
        if run.due():
            run.show({**panels, "student, 1 network call": sample(ema.model, len(z_show), label_show, z=z_show)})
    report(run, data, teacher, lambda n, label: sample(ema.model, n, label))
    return ema.model, run


@torch.no_grad()
def sample(student, n, label=None, steps=1, z=None):
    """n samples (n, ...) of a student in one network call; random labels if it wants some and gets none."""
    if steps != 1:
        raise UserError("an f-distill student makes a sample in one step")
    device = next(student.parameters()).device
    z = torch.randn(n, *student.shape, device=device) if z is None else z
    if label is None and student.label_dim:
        label = F.one_hot(torch.randint(student.label_dim, (n,), device=device), student.label_dim).float()
    return torch.cat([generate(student, *part) for part in micro_batches(1000, z, label)])


if __name__ == "__main__":
    main(Config, PRESETS, train, sample)
