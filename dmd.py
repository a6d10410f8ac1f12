"""
Distribution matching distillation: DMD (Yin et al., arXiv 2311.18828), DMD2 (arXiv 2405.14867), SwiftBrush (arXiv 2312.05239).

A student x = G(sigma_init z) learns to have the teacher's distribution at every noise level, x_t = x + sigma eps, by
following the difference of two scores, the teacher's and that of a *fake score* fitted to the student's samples all along:

    grad KL(student || teacher) = - E[ w (s_teacher(x_t) - s_student(x_t)) dG/dtheta ]              (DMD Eq. 7)
    w = sigma^2 / mean|x - d_real|                                                                  (DMD Eq. 8)

--variant dmd2 updates the fake score more often than the student and adds a GAN on noised real data; dmd updates both
in turn and regresses the student on (z, teacher sample) pairs (DMD Eq. 9); vsd reads no data, and its fake score is the
teacher with low-rank adapters. --steps_student 2 or 4 makes a student of several network calls, trained on what the calls
before really give (backward simulation, DMD2 Sec. 4.5).

Differences from the papers and their code: 1. Noise levels are continuous on Karras's ramp, the same range for student and
fake score; DMD's student sees 2 % to 98 % of 1000 levels.  2. Regression by L2 or pseudo-Huber; DMD's LPIPS needs another
network.  3. The GAN sees the sample noised for the score difference, not noised anew; its head reads the bottleneck only.
4. vsd without text guidance, its weight re-read for x + sigma eps, EDM's weight for its fake score, adapters of scale 1.
5. Few-step levels are DMD2's for Stable Diffusion in units of the data's std. On toys the student is trained end to end, in
all its calls at once. DMD2 looks after a random number of calls, and the fake score then knows only the mixture of what they
give: the mixture may be right where the last call is not (4 steps on the grid: H 0.003; always the last call 0.0006; end to
end 0.0002).  6. One EMA; the learning rate falls to 0 over the last half; Adam with betas (0, 0.99), no weight decay.

    python dmd.py                                       # ring of 8 Gaussians: about 65 s on one CPU core, H about 0.0001
    python dmd.py --variant vsd --out runs/vsd          # the same without data: about 30 s, H 0.0002 to 0.0008
    python dmd.py --data cifar10 --dtype bf16 --teacher edm-cifar10-32x32-cond-vp.pkl              # full size, FastGen's
    python dmd.py --data imagenet64 --dtype bf16 --teacher edm-imagenet-64x64-cond-adm.pkl         # and DMD2's settings: not yet run
"""
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrize
from tqdm import tqdm

from common import (EMA, TOYS, GaussianMixture, Run, Shared, UserError, bcast, denoising_loss, gallery, heun_sample,
                    initial_student, karras, load_data, load_teacher, lr_factor, main, micro_batches, one_first, report, set_lr,
                    weighted_score_gradient, write_atomically)


@dataclass
class Config(Shared):
    steps: int = 1400
    batch: int = 512
    lr: float = -1.0            # learning rate of the student; -1: as --variant
    ema: float = 0.995
    variant: str = "dmd2"       # dmd2 | dmd | vsd: GAN on real data, regression on teacher samples, or neither and no data
    fake: str = "learned"       # learned | exact: score of the student by a network, or (toys) in closed form
    steps_student: int = 1      # network calls of the student: 1, 2 or 4
    end_to_end: bool = True     # 2 or 4 calls: gradients pass through all of them; else through one, drawn anew in each update
    fake_updates: int = 2       # updates of fake score and discriminator per student update; dmd and vsd take 1
    lr_fake: float = -1.0       # their learning rate; -1: as --variant
    gan_weight: float = 0.1     # dmd2: weight of the GAN term in the student's loss
    disc_weight: float = 1.0    # dmd2: weight of the discriminator's loss beside the fake score's
    reg_weight: float = 0.25    # dmd: weight of the regression
    distance: str = "l2"        # l2 | huber: dmd: distance of the regression
    pairs: int = 10000          # dmd: how many (noise, teacher sample) pairs are made and kept in runs/
    rank: int = 16              # vsd: rank of the fake score's adapters

    def __post_init__(self):
        # adapters are slow: at equal rates of 2e-3 one ring of three never became more than a thin circle (H 0.023)
        lr, lr_fake = (1e-3, 4e-3) if self.variant == "vsd" else (2e-3, 2e-3)
        self.lr, self.lr_fake = lr if self.lr == -1 else self.lr, lr_fake if self.lr_fake == -1 else self.lr_fake


PRESETS = {
    **{name: {} for name in TOYS},
    "grid": dict(fake_updates=3, steps=1600),       # 25 narrow modes want a closer fake score
    # DMD2 has no CIFAR-10 settings of its own: those of f-distill's Table 5 and FastGen's DMD2 config, 20,000 student updates
    # with 4 critic updates each; number of pairs as in DMD; not yet run here
    "cifar10": dict(net="ddpmpp", cond=True, teacher_steps=100_000, steps=20_000, batch=2048, micro=256, lr=1e-4, lr_fake=1e-4,
                    fake_updates=4, gan_weight=1e-3, disc_weight=1e-2, pairs=100_000, rank=64, end_to_end=False, ema=0.9999, sigma_min=0.002,
                    sigma_max=80.0, sigma_init=80.0, every=1000, samples=50_000),
    # DMD2's ImageNet-64 experiment with the GAN from the start: 194K steps, every fifth the student's, no EMA; DMD's 25,000
    # pairs. It wants --teacher edm-imagenet-64x64-cond-adm.pkl; --micro 28 is for 80 GB (README's memory table). Not yet run.
    "imagenet64": dict(net="adm", cond=True, steps=39_000, batch=280, micro=28, lr=2e-6, lr_fake=2e-6, fake_updates=5, gan_weight=3e-3,
                       disc_weight=1e-2, pairs=25_000, rank=64, end_to_end=False, ema=0.0, sigma_min=0.002, sigma_max=80.0,
                       sigma_init=80.0, every=1000, samples=50_000),
}

# ---- the method ------------------------------------------------------------------------------------------------------


def dm_loss(x, d_real, d_fake):
    """Per-sample loss (B,) whose gradient in x is (d_fake - d_real) / mean|x - d_real| (DMD Eqs. 7 and 8)."""
    return weighted_score_gradient(x, d_real, d_fake, x.new_zeros(len(x)), "rkl")[1]


def vsd_loss(x, d_real, d_fake, sigma, sigma_data):
    """
    Per-sample loss (B,) whose gradient in x is w (d_fake - d_real): SwiftBrush's sigma^2 (eps_teacher - eps_fake), in which
    sigma^2 is the noise's share of the variance and the eps differ by (d_fake - d_real) / sigma.
    """
    w = sigma * sigma_data / (sigma**2 + sigma_data**2)                                                          # (B,)
    return (bcast(w, x) * (d_fake - d_real).detach() * x).flatten(1).mean(1)        # linear in x: its slope is the gradient


def regression_loss(x, y, distance):
    """Distance (B,) of student and teacher samples from the same noise (DMD Eq. 9); Huber's c is iCT's, arXiv 2310.14189."""
    if distance == "l2":
        return (x - y).square().flatten(1).mean(1)
    c = 0.00054 * y[0].numel() ** 0.5
    return ((x - y).square().flatten(1).sum(1) + c**2).sqrt() - c


def fake_score_loss(x, d_fake, sigma, sigma_data):
    """Denoising loss (B,) on the student's own samples: at its minimum d_fake is the student's exact denoiser (DMD Eq. 6)."""
    return denoising_loss(d_fake, x, sigma, sigma_data)


def discriminator_loss(logit_real, logit_fake):
    """Logistic loss (B,); its optimum is logit = log p_data(x_t) / q_student(x_t) (DMD2 Sec. 4.3)."""
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


def student_sigmas(steps, G):
    """
    The student's levels, falling from sigma_init. DMD2's timesteps 749, 499, 249 of Stable Diffusion's 1000 are noise of
    4.08, 1.61, 0.69 times the data's std.
    """
    later = {1: [], 2: [1.61], 4: [4.08, 1.61, 0.69]}[steps]
    return [G.sigma_init] + [G.sigma_data * ratio for ratio in later]


def roll_out(G, z, label, sigmas, end_to_end=False):
    """
    x (B, ...) after z.shape[1] calls of the student, each on the sample before it under fresh noise: z (B, calls, ...) is one
    unit noise per call. Sampling and backward simulation in one; the gradient is the last call's alone, as in DMD2 (Sec. 4.5),
    or end to end.
    """
    x, calls = 0, z.shape[1]                                # the first call sees pure noise
    for k, (noise, sigma) in enumerate(zip(z.unbind(1), sigmas)):
        with torch.set_grad_enabled(torch.is_grad_enabled() and (end_to_end or k == calls - 1)):
            x = G(x + sigma * noise, noise.new_full((len(z),), sigma), label)
    return x


class LowRank(nn.Module):
    """Parametrization weight + B A with B (out, rank) zero at first and A (rank, in): the adapter of a layer's weight."""

    def __init__(self, weight, rank):
        super().__init__()
        fan_in = weight[0].numel()
        self.A = nn.Parameter(torch.randn(rank, fan_in, device=weight.device) / fan_in**0.5)
        self.B = nn.Parameter(weight.new_zeros(len(weight), rank))

    def forward(self, weight):
        return weight + (self.B @ self.A).view_as(weight)


def add_adapters(denoiser, rank):
    """Freeze a denoiser and give each of its linear and convolutional layers an adapter, all there is to train."""
    denoiser.requires_grad_(False)
    for layer in [m for m in denoiser.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]:
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank))
    return denoiser


# ---- training --------------------------------------------------------------------------------------------------------


class ImageFree:
    """What vsd knows of the data: shape, scale and classes, drawn evenly. There is nothing to sample from."""

    def __init__(self, data, device):
        self.shape, self.sigma_data, self.label_dim, self.device = data.shape, data.sigma_data, data.label_dim, device

    def draw_label(self, n):
        k = torch.randint(max(self.label_dim, 1), (n,), device=self.device)
        return F.one_hot(k, self.label_dim).float() if self.label_dim else None


def teacher_pairs(cfg, teacher, data, device, part=1000):
    """
    --pairs of (z, label, y): y what the teacher's ODE makes of sigma_init z by Heun's method. Kept in runs/ under a key of
    the teacher's weights and all settings, `part` pairs a file, so that an interrupted call goes on where it stopped.
    """
    settings = dict(data=cfg.data, cond=cfg.cond, dtype=cfg.dtype, sigmas=[cfg.sigma_min, cfg.sigma_init], steps=18, part=part,
                    pairs=cfg.pairs, teacher=[type(teacher).__name__, getattr(teacher, "std", 0), teacher.sigma_data])
    key = hashlib.sha256(json.dumps(settings).encode())
    for name, value in teacher.state_dict().items():
        key.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    folder, parts = Path(f"runs/pairs-{cfg.data}-{key.hexdigest()[:12]}"), []
    for i in tqdm(range(0, cfg.pairs, part), desc="pairs"):
        path, n = folder / f"{i:07d}.pt", min(part, cfg.pairs - i)
        if not path.exists():
            with torch.random.fork_rng([device] if device.type == "cuda" else []):      # the caller's draws stay the same
                torch.manual_seed(i)
                z, label = torch.randn(n, *data.shape, device=device), data.draw_label(n)
            y = torch.cat([heun_sample(teacher, z, label, 18, cfg.sigma_min, cfg.sigma_init)
                           for z, label in micro_batches(cfg.micro or cfg.batch, z, label)])
            label = z.new_zeros(n, 0) if label is None else label
            write_atomically(path, lambda f: torch.save([t.cpu() for t in (z, label, y)], f))
        try:
            parts.append(torch.load(path, weights_only=True))
        except Exception as e:      # whatever torch.load meets in a damaged file
            raise UserError(f"{path} is damaged ({type(e).__name__}); delete it and run again")
    z, label, y = (torch.cat(t) for t in zip(*parts))
    return z, label if label.shape[1] else None, y


def draw(n, data, device, calls=1):
    """All that is random about n student samples: z (n, calls, ...), label, place u of the noise level on Karras's ramp, eps."""
    z, eps = torch.randn(2, n, *data.shape, device=device)
    label, u = data.draw_label(n), torch.rand(n, device=device)
    return torch.cat([z[:, None], torch.randn(n, calls - 1, *data.shape, device=device)], 1), label, u, eps


def draw_calls(steps):
    """After how many of its calls the student is looked at in this update, the same for the whole batch (DMD2 Sec. 4.5)."""
    return int(torch.randint(steps, ())) + 1 if steps > 1 else 1


def exact_fake(G, data, device, calls, sigmas, n=4096):
    """The student's exact denoiser and density, as far as n fresh samples tell: for --fake exact."""
    z, label, _, _ = draw(n, data, device, calls)
    with torch.no_grad():
        return GaussianMixture(roll_out(G, z, label, sigmas), groups=None if label is None else label.argmax(1))


def look(x_t, sigma, label, fake, disc):
    """(d_fake, logit (B,)) at x_t: from the networks, or from two mixtures that know their densities."""
    if isinstance(fake, GaussianMixture):
        return fake(x_t, sigma, label), disc.log_prob(x_t, sigma, label) - fake.log_prob(x_t, sigma, label) if disc else None
    d_fake, feature = fake(x_t, sigma, label, features="also")
    return d_fake, disc(feature)[:, 0]


def train(cfg):
    """Distil as cfg says; returns the averaged student and its Run."""
    if cfg.fake == "exact" and cfg.data not in TOYS:
        raise UserError("--fake exact needs a toy: images have no closed form")
    if cfg.steps_student not in (1, 2, 4) or cfg.steps_student > 1 and cfg.variant == "dmd":
        raise UserError("--steps_student is 1, 2 or 4, and 1 with --variant dmd: its pairs belong to a one-step student")
    if min(cfg.fake_updates, cfg.pairs, cfg.rank) < 1:
        raise UserError("--fake_updates, --pairs and --rank must be at least 1")
    if not (0 < cfg.lr_fake < math.inf and all(0 <= w < math.inf for w in (cfg.gan_weight, cfg.disc_weight, cfg.reg_weight))):
        raise UserError("--lr_fake must be positive, --gan_weight, --disc_weight and --reg_weight at least 0, all of them finite")
    scale = TOYS[cfg.data].sigma_data if cfg.data in TOYS else 0.5
    lowest = max(cfg.sigma_min, scale * {1: 0, 2: 1.61, 4: 4.08}[cfg.steps_student])
    if cfg.sigma_init <= lowest:
        raise UserError(f"--sigma_init {cfg.sigma_init} must lie above {lowest:.3g} with --steps_student {cfg.steps_student}")
    data = load_data(cfg)
    teacher = load_teacher(cfg, data)
    run = Run(cfg, "dmd")
    source = ImageFree(data, run.device) if cfg.variant == "vsd" else data              # what training may draw from
    G, fake = initial_student(cfg, teacher, data), initial_student(cfg, teacher, data)
    fake = add_adapters(fake, cfg.rank) if cfg.variant == "vsd" else fake
    disc, ema = make_discriminator(fake.net.feature_shape()).to(run.device), EMA(G, cfg.ema)
    critic = [p for p in [*fake.parameters(), *disc.parameters()] if p.requires_grad]
    opt_G = torch.optim.Adam(G.parameters(), betas=(0.0, 0.99), fused=True)
    opt_fake = torch.optim.Adam(critic, betas=(0.0, 0.99), fused=True)
    state = dict(G=G, fake=fake, disc=disc, ema=ema, opt_G=opt_G, opt_fake=opt_fake)
    panels, z_show, label_show = gallery(cfg, data, teacher)
    pairs = one_first(teacher_pairs, cfg, teacher, data, run.device) if cfg.variant == "dmd" else None
    micro, sigmas = run.micro, student_sigmas(cfg.steps_student, G)
    z_show = draw(len(z_show), source, run.device, cfg.steps_student)[0] if cfg.steps_student > 1 else z_show[:, None]
    adversarial = cfg.variant == "dmd2" and cfg.gan_weight > 0                  # the only one that looks at data
    fake_updates = cfg.fake_updates if cfg.variant == "dmd2" else 1

    for step in run.steps(state):
        factor = lr_factor(run.progress)
        set_lr(opt_G, cfg.lr * factor)
        set_lr(opt_fake, cfg.lr_fake * max(factor, 0.1))
        calls = cfg.steps_student if cfg.end_to_end else draw_calls(cfg.steps_student)      # the same for critic and student: one law of x at a time

        # 1. fit the fake score, and the discriminator on its features, to the student's present samples
        for _ in range(fake_updates if cfg.fake == "learned" else 0):
            z, label, u, eps = draw(cfg.batch, source, run.device, calls)
            real, label = source.sample(cfg.batch) if adversarial else (eps, label)     # same label and noise level for both
            sigma, eps_real = karras(u, cfg.sigma_min, cfg.sigma_max), torch.randn_like(eps)
            for z, label, sigma, eps, real, eps_real in run.parts(z, label, sigma, eps, real, eps_real):
                with torch.no_grad():
                    x = roll_out(G, z, label, sigmas)
                d_fake, logit = look(x + bcast(sigma, x) * eps, sigma, label, fake, disc)
                loss_fake = fake_score_loss(x, d_fake, sigma, source.sigma_data).mean()
                loss_disc = torch.zeros_like(loss_fake)
                if adversarial:
                    feature = fake(real + bcast(sigma, x) * eps_real, sigma, label, features="only")
                    loss_disc = discriminator_loss(disc(feature)[:, 0], logit).mean()
                ((loss_fake + cfg.disc_weight * loss_disc) * micro / cfg.batch).backward()
            run.add_gradients(opt_fake)
            opt_fake.step()
            opt_fake.zero_grad()

        # 2. move the student along the difference of the two scores
        z, label, u, eps = draw(cfg.batch, source, run.device, calls)
        pick = torch.randint(cfg.pairs, (cfg.batch,)) if pairs else u
        views = (fake, disc)
        if cfg.fake == "exact":
            views = exact_fake(G, source, run.device, calls, sigmas), data if adversarial else None
        for p in critic:
            p.requires_grad_(False)
        for z, label, u, eps, pick in run.parts(z, label, u, eps, pick):
            sigma = karras(u, cfg.sigma_min, cfg.sigma_max)
            x = roll_out(G, z, label, sigmas, cfg.end_to_end)
            x_t = x + bcast(sigma, x) * eps
            with torch.set_grad_enabled(adversarial):       # only the GAN term goes back through the fake score
                d_fake, logit = look(x_t, sigma, label, *views)
            with torch.no_grad():
                d_real = teacher(x_t, sigma, label)
            if cfg.variant == "vsd":
                losses = dict(vsd=vsd_loss(x, d_real, d_fake, sigma, source.sigma_data).mean())
            else:
                losses = dict(dm=dm_loss(x, d_real, d_fake).mean())
            if adversarial:
                losses.update(gan=gan_loss(logit).mean())
            if pairs:
                z, label, y = (t if t is None else t[pick].to(run.device) for t in pairs)
                losses.update(reg=regression_loss(roll_out(G, z[:, None], label, sigmas), y, cfg.distance).mean())
            weights = dict(gan=cfg.gan_weight, reg=cfg.reg_weight)
            (sum(weights.get(name, 1) * loss for name, loss in losses.items()) * micro / cfg.batch).backward()
        run.add_gradients(opt_G)
        opt_G.step()
        opt_G.zero_grad()
        ema.update(G)
        for p in critic:
            p.requires_grad_(True)

        critic_losses = dict(fake=loss_fake, disc=loss_disc) if cfg.fake == "learned" else {}
        run.log(gap=(d_real - d_fake).square().mean(), **losses, **critic_losses)
        if run.due():
            name = f"student, {cfg.steps_student} network call{'s' * (cfg.steps_student > 1)}"
            run.show({**panels, name: sample(ema.model, len(z_show), label_show, cfg.steps_student, z=z_show)})
    report(run, data, teacher, lambda n, label: sample(ema.model, n, label, cfg.steps_student))
    return ema.model, run


@torch.no_grad()
def sample(student, n, label=None, steps=1, z=None):
    """n samples (n, ...) of a student in `steps` network calls; random labels if it wants some and gets none."""
    if steps not in (1, 2, 4):
        raise UserError(f"a student makes a sample in 1, 2 or 4 steps, not {steps}")
    device = next(student.parameters()).device
    z = torch.randn(n, steps, *student.shape, device=device) if z is None else z                         # (n, steps, ...)
    if label is None and student.label_dim:
        label = F.one_hot(torch.randint(student.label_dim, (n,), device=device), student.label_dim).float()
    sigmas = student_sigmas(steps, student)
    return torch.cat([roll_out(student, *part, sigmas) for part in micro_batches(1000, z, label)])


if __name__ == "__main__":
    main(Config, PRESETS, train, sample)
