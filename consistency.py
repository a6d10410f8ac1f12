"""
The consistency family: ten losses for one student that jumps along the probability-flow ODE of a diffusion model.

Noise levels are sigma, x_t = x + sigma eps, and D(x_t, sigma) a denoiser; the ODE is dx/dsigma = (x_t - D) / sigma. A
consistency function f(x_t, sigma) is where that path ends at sigma = 0: f(x, 0) = x, and it is one value along a path.
Any denoiser has the right form (EDM's c_skip is 1 and c_out 0 at sigma 0), so the student *is* one and starts as the
teacher. Every loss compares f at two points of a path, the lower one held fixed:

    --loss    the lower point                              paper
    cd        one solver step of the teacher below         consistency distillation, 2303.01469
    ct        x + sigma' eps, same eps, no teacher         improved consistency training (iCT), 2310.14189
    ect       the same; the ratio sigma' / sigma grows     easy consistency tuning, 2406.14548
    scd       infinitely near, by a JVP, teacher's slope   sCM in TrigFlow, 2410.11081
    sct       infinitely near, by a JVP, slope of x, eps   sCM in TrigFlow, 2410.11081
    sprint    as scd, and a GAN on the teacher's features  SANA-Sprint, 2503.09641
    scott     as cd by noisy solver steps, --eta           stochastic consistency distillation, 2403.01505
    ctm       some solver steps; jumps t to any s          consistency trajectory, 2310.02279
    meanflow  infinitely near; jumps t to any s            mean flows, 2505.13447, here with the teacher's velocity
    boot      where the student itself says the path is    BOOT, 2306.05544; from noise alone, no data

ctm, meanflow and boot see a second time s, as further inputs beside the label: Phi(x_t, t, s) = s/t x_t + (1 - s/t) g.

Differences from the papers and their code: 1. The boundary is at sigma 0 for all (as in ECT); 2303.01469 shifts c_skip and
c_out by sigma_min. The teacher's last step to 0 is Euler's. 2. No LPIPS. On toys cd and scott take 8 steps (at 300 updates 18
are worse), cd the squared error (ring: H 0.0006; pseudo-Huber 0.0009), scott, whose targets are random, pseudo-Huber (0.0015;
squared error 0.0025). 3. ct's curriculum ends at 160 steps on toys; there is no RAdam, Adam's betas are 0.9, 0.99. 4. sCM's F
is read off the denoiser, with EDM's c_noise ln(sigma) / 4 for t; the tangent is computed in fp32, its norm is over a whole
sample, and no 1 / tan t multiplies the loss again; levels outside sigma_min .. sigma_max go to the ends. 5. ctm takes one
solver step instead of several, its outer map is the student held fixed, not an EMA; squared error; no GAN, and a fixed weight
for the denoising term, which looks at the jump's own t. 6. meanflow distils the teacher's velocity, the paper trains on that of
data; r is uniform below t. 7. boot works in sigma, where x_T = T eps makes the paper's boundary condition the first slope; its
jump is Phi, not y; half of its paths start where a further call does, from its own samples noised to --mid or below: with all
from pure noise a second call made H ten times worse. 8. scott has no GAN. 9. sprint's student is updated together with each
update of the discriminator's head, which has a logit for each of two calls: half of its batch comes from the highest level, half
from --mid, where the paper has a law of levels; with one logit the errors of one call could make up for those of the other. What
the head sees is noised by --p_mean, --p_std (paper: -0.6, 1). 10. All losses that draw levels share the law of --p_mean, --p_std,
for images ECT's (sCM: -1, 1.4 and 1.6); ect has no further weight for ImageNet-64. 11. The rate falls to 0 over the last half.

    python consistency.py                               # cd on a ring of 8 Gaussians
    python consistency.py --loss scd --nfe 2            # another member; metrics and picture with two network calls
    python consistency.py --sample runs/consistency-ring-0 --nfe 2 --samples 64
    python consistency.py --data cifar10 --loss ect     # full size: not yet run
"""
import copy
import math
from collections import namedtuple
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (EMA, IMAGES, TOYS, Block, Denoiser, Run, Shared, UserError, bcast, build, denoising_loss, energy_coefficient, gallery,
                    initial_student, karras, karras_sigmas, load_data, load_teacher, lr_factor, main, micro_batches, place, report, set_lr,
                    trigflow_from_denoiser, velocity_from_denoiser)

# What a loss calls for on toys where the flag is left at -1. mid is the second level of sampling, in units of the data's std: where
# H was lowest of the levels tried; for sprint, scott and meanflow the papers'.
AUTO = {
    "cd": dict(N=8, c=0.0, mid=0.7),
    "ct": dict(N=160, mid=1.0),
    "ect": dict(mid=0.7),
    "scd": dict(lr=2e-4, mid=1.0), "sct": dict(lr=2e-4, mid=1.0),       # normalised tangents do not shrink: scd
    "sprint": dict(lr=2e-4, mid=1.56),                                  # has H 0.007 at 2e-3, 0.0004 at 5e-4, 0.0002 at 2e-4
    "scott": dict(N=8, c=0.03, mid=2.76),
    "ctm": dict(N=18, c=0.0, mid=2.0),
    "meanflow": dict(mid=2.76),
    "boot": dict(N=18, c=0.0, mid=1.0),
}
# The papers' for images, which go before: cd's levels and rate of 2303.01469 (sigma 1.382), ct's of iCT (0.821), the others' of
# ECT and sCM (t = 1.1, SANA-Sprint's 1.0)
IMAGE_MID = dict(cd=2.76, ct=1.64, ect=1.64, scd=1.96, sct=1.96, ctm=2.76, boot=2.76)
IMAGE_AUTO = {
    "cifar10": {"cd": dict(N=18, c=0.0, lr=4e-4), "scott": dict(N=18, c=0.0, lr=4e-4), "ctm": dict(lr=4e-4), "ct": dict(N=1280)},
    "imagenet64": {"cd": dict(N=40, c=0.0, lr=8e-6), "scott": dict(N=40, c=0.0, lr=8e-6), "ctm": dict(N=39),
                   "ct": dict(N=1280, mid=3.05), "ect": dict(mid=3.05), **{loss: dict(lr=7e-5) for loss in ("scd", "sct", "sprint")}},
}
SECOND_TIME = ("ctm", "meanflow", "boot")
TANGENT = ("scd", "sct", "sprint")              # sCM and what builds on it


@dataclass
class Config(Shared):
    loss: str = "cd"            # cd | ct | ect | scd | sct | sprint | scott | ctm | meanflow | boot: member of the family
    steps: int = 1400
    batch: int = 512
    lr: float = -1.0            # learning rate; -1: as --loss
    ema: float = 0.995
    sigma_init: float = -1.0    # noise level the student starts from; it is --sigma_max, where -1 puts it
    nfe: int = 1                # network calls per sample when drawing: any number works
    mid: float = -1.0           # level of the second call in units of the data's std, halved for each further one; -1: as --loss
    N: int = -1                 # solver steps of the teacher's path (cd, scott, ctm, boot), final number of steps (ct); -1: as --loss
    solver: str = "heun"        # heun | euler: the teacher's step (cd, ctm)
    c: float = -1.0             # width of the pseudo-Huber distance, 0: squared error; -1: as --loss
    target_ema: float = 0.0     # decay per step of the target network; 0: the student as it is
    p_mean: float = -0.4        # mean of ln sigma (ct, ect, scd, sct, sprint, meanflow)
    p_std: float = 1.2          # std of ln sigma
    q: float = 2.0              # ect: 1 - sigma'/sigma shrinks by this factor from stage to stage
    stages: int = 4             # ect: number of stages
    s0: int = 10                # ct: number of steps in the first stage
    warmup: float = 0.2         # sCM: share of the training in which the tangent's second term comes in
    eta: float = 0.1            # scott: noise of the teacher's step, 0: cd
    gamma: float = -1.0         # ctm, meanflow: fresh noise when sampling, 0: none, as -1 in training, 1: all, as consistency models do
    dsm: float = 0.1            # ctm: weight of the denoising loss
    adv: float = -1.0           # sprint: weight of the adversarial term; -1: the paper's 0.5, on toys 1
    lr_disc: float = 2e-3       # sprint: learning rate of the discriminator's head
    dropout: float = 0.0        # dropout in the student (images)

    def __post_init__(self):
        shape = TOYS[self.data].shape if self.data in TOYS else IMAGES.get(self.data, [(1,)])[0]
        huber = 0.00054 * math.prod(shape) ** 0.5                       # iCT, Sec. 3.3
        values = {"c": huber, "lr": 2e-3, "adv": 1.0, "gamma": 0.0, **AUTO.get(self.loss, {}), "sigma_init": self.sigma_max}
        if self.data not in TOYS:
            values |= {"lr": 1e-4, "adv": 0.5, "mid": IMAGE_MID.get(self.loss, values.get("mid")),
                       **IMAGE_AUTO.get(self.data, {}).get(self.loss, {})}
        for name, value in values.items():
            if getattr(self, name) == -1 and not (self.sample and name in ("mid", "gamma")):        # --sample: -1 is as trained
                setattr(self, name, value)


PRESETS = {
    **{name: {} for name in TOYS},
    # Karras et al.'s noise levels; steps and batch of 2303.01469, law of sigma of ECT. Not yet run at this size.
    "cifar10": dict(net="ddpmpp", teacher_steps=100_000, steps=800_000, batch=512, ema=0.9999, stages=8, sigma_min=0.002,
                    sigma_max=80.0, p_mean=-1.1, p_std=2.0, every=10_000, samples=50_000),
    # The same sources for ImageNet-64 (2303.01469's cd has --target_ema 0.95). It wants --teacher edm-imagenet-64x64-cond-adm.pkl;
    # --micro 16 is a guess for 80 GB, less than sim.py's 26 there: derivatives forward want room. Not yet run.
    "imagenet64": dict(net="adm", cond=True, steps=600_000, batch=2048, micro=16, ema=0.999943, sigma_min=0.002, sigma_max=80.0,
                       p_mean=-0.8, p_std=1.6, q=4.0, every=10_000, samples=50_000),
}

# ---- the method ------------------------------------------------------------------------------------------------------
# A loss takes the student G, the same network held fixed `minus`, the teacher, a Draw, cfg and progress in [0, 1), and
# returns the loss (B,) and the level sigma (B,) that it looked at. u and w are uniform, eps and more normal.

Draw = namedtuple("Draw", "eps x label u w more")


def f(G, x_t, sigma, label=None):
    """The consistency function (B, ...): G itself, and x_t where sigma is 0."""
    return torch.where(bcast(sigma, x_t) > 0, G(x_t, sigma.clamp(min=1e-6), label), x_t)


def second_time(t, s, label=None):
    """What a network with a second time sees beside t: the label, and six smooth functions of s and t, (B, K + 6)."""
    a, b = math.pi * s / t, 2 * torch.arctan(2 * s)
    more = torch.stack([s / t, a.sin(), a.cos(), b / math.pi, b.sin(), b.cos()], 1)
    return more if label is None else torch.cat([label.to(more), more], 1)


def jump(G, x_t, t, s, label=None):
    """Phi (B, ...): the path through x_t at level t, at level s (CTM, Eq. 6). Exact for s = t; with s = 0 it is f."""
    ratio = bcast(s / t, x_t)
    return ratio * x_t + (1 - ratio) * G(x_t, t, second_time(t, s, label))


def distance(a, b, c):
    """Per-sample distance (B,): mean square for c = 0, else pseudo-Huber sqrt(|a - b|^2 + c^2) - c (iCT, Eq. 8)."""
    square = (a - b).square().flatten(1).sum(1)
    return (square + c**2).sqrt() - c if c else square / a[0].numel()


def solver_step(D, x_t, sigma, lower, label, order="heun"):
    """The ODE of D from level sigma to lower, by Euler, or by Heun where lower > 0 (EDM, Algorithm 1)."""
    slope = (x_t - D(x_t, sigma, label)) / bcast(sigma, x_t)
    x = x_t + bcast(lower - sigma, x_t) * slope
    if order == "heun":
        slope_2 = (x - D(x, lower.clamp(min=1e-6), label)) / bcast(lower.clamp(min=1e-6), x)
        x = torch.where(bcast(lower, x) > 0, x_t + bcast(lower - sigma, x_t) * (slope + slope_2) / 2, x)
    return x


def noisy_step(D, x_t, sigma, lower, label, eta, eps):
    """One step of the SDE from level sigma to lower; eta = 0 is Euler's step of the ODE (DDIM's eta)."""
    up = eta * lower * (1 - (lower / sigma) ** 2).sqrt()
    d = D(x_t, sigma, label)
    return d + bcast((lower**2 - up**2).sqrt() / sigma, x_t) * (x_t - d) + bcast(up, x_t) * eps


def same_dropout(x):
    """Inside, random numbers are drawn that come again after it: two networks get one dropout mask, on CPU and CUDA."""
    return torch.random.fork_rng([x.device] if x.device.type == "cuda" else [])


def lognormal(u, cfg):
    """Levels (B,) with ln sigma normal, of uniform u (B,); what lies outside goes to the ends."""
    return (cfg.p_mean + cfg.p_std * torch.special.ndtri(u)).exp().clamp(cfg.sigma_min, cfg.sigma_max)


def grid_pair(u, cfg, top=None):
    """Neighbours sigma > lower (B,) on Karras's grid of N levels and 0, each pair as likely; top (B,): instead of sigma_max."""
    i, top = (u * cfg.N).long(), cfg.sigma_max if top is None else top.double()
    level = lambda i: torch.where(i < cfg.N, karras(1 - i.double() / (cfg.N - 1), cfg.sigma_min, top), 0.0).to(u)
    return level(i), level(i + 1)


def cd_loss(G, minus, teacher, b, cfg, progress):
    """Consistency distillation (2303.01469, Eq. 7)."""
    sigma, lower = grid_pair(b.u, cfg)
    x_t = b.x + bcast(sigma, b.x) * b.eps
    with torch.no_grad(), same_dropout(x_t):
        x_lower = solver_step(teacher, x_t, sigma, lower, b.label, cfg.solver)
        target = f(minus, x_lower, lower, b.label)
    return distance(f(G, x_t, sigma, b.label), target, cfg.c), sigma


def scott_loss(G, minus, teacher, b, cfg, progress):
    """Stochastic consistency distillation (2403.01505): three noisy sub-steps of the teacher. eta = 0 is cd with three of Euler's."""
    sigma, lower = grid_pair(b.u, cfg)
    x_t = b.x + bcast(sigma, b.x) * b.eps
    with torch.no_grad(), same_dropout(x_t):
        x_lower = x_t
        for k, eps in enumerate(b.more.unbind(1)):
            start, end = (sigma + (lower - sigma) * j / b.more.shape[1] for j in (k, k + 1))
            x_lower = noisy_step(teacher, x_lower, start, end, b.label, cfg.eta, eps)
        target = f(minus, x_lower, lower, b.label)
    return distance(f(G, x_t, sigma, b.label), target, cfg.c), sigma


def ct_loss(G, minus, teacher, b, cfg, progress):
    """Improved consistency training (2310.14189, Eq. 5 to 11): no teacher, steps double, weight 1 / (sigma - sigma')."""
    stages = math.log2(cfg.N // cfg.s0) + 1
    grid = karras_sigmas(min(cfg.s0 * 2 ** int(progress * stages), cfg.N), cfg.sigma_min, cfg.sigma_max, device=b.u.device)
    share = torch.special.erf((grid.log() - cfg.p_mean) / (2**0.5 * cfg.p_std)).diff().neg()
    i = torch.searchsorted((share / share.sum()).cumsum(0), b.u.double()).clamp(max=len(share) - 1)
    sigma, lower = grid[i].to(b.x), grid[i + 1].to(b.x)
    x_t = b.x + bcast(sigma, b.x) * b.eps
    with torch.no_grad(), same_dropout(x_t):
        target = f(minus, b.x + bcast(lower, b.x) * b.eps, lower, b.label)
    return distance(f(G, x_t, sigma, b.label), target, cfg.c) / (sigma - lower), sigma


def ect_loss(G, minus, teacher, b, cfg, progress):
    """Easy consistency tuning (2406.14548, Sec. 3): no grid, sigma' / sigma goes from 0 (diffusion) towards 1."""
    sigma = lognormal(b.u, cfg)
    gap = cfg.q ** -(int(progress * cfg.stages) + 1.0) * (1 + 8 * torch.sigmoid(-sigma))
    lower = sigma * (1 - gap).clamp(min=0)
    x_t = b.x + bcast(sigma, b.x) * b.eps
    with torch.no_grad(), same_dropout(x_t):
        target = f(minus, b.x + bcast(lower, b.x) * b.eps, lower, b.label)
    return distance(f(G, x_t, sigma, b.label), target, cfg.c) / (sigma - lower), sigma


def jvp(function, inputs, tangents):
    """torch.func.jvp for networks: fused attention knows no forward derivative, group norm only on contiguous tensors."""
    plain = lambda m, x: (x[0].clone(memory_format=torch.contiguous_format),) if isinstance(m, nn.GroupNorm) else None
    hook = nn.modules.module.register_module_forward_pre_hook(plain)
    try:
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            return torch.func.jvp(function, inputs, tangents)
    finally:
        hook.remove()


def in_fp32(D):
    """The same network, whatever --dtype: bf16 is too coarse for derivatives."""
    return Denoiser(D.net, D.sigma_data) if isinstance(D, Denoiser) else D


def tangent(D, x_t, t, slope, label, sigma_data, r=1.0):
    """
    cos t times df/dt (B, ...) of f = cos t x_t - sin t sd F along the path with dx/dt = slope, its second term times r
    (2410.11081, Eq. 6 and App. E): -cos^2 t (sd F - dx/dt) - r (cos t sin t x_t + sd cos t sin t dF/dt).
    """
    cos, sin = bcast(t.cos(), x_t), bcast(t.sin(), x_t)
    F_trig = lambda x, t: trigflow_from_denoiser(D, x, t, label, sigma_data)
    out, dF = jvp(F_trig, (x_t, t), (cos * sin * slope, t.cos() * t.sin()))
    return -cos**2 * (sigma_data * out - slope) - r * (cos * sin * x_t + sigma_data * dF)


def scm_loss(G, minus, teacher, b, cfg, progress):
    """sCM (2410.11081, Algorithm 1): scd with the teacher's slope dx/dt, sct (teacher None) with that of x and eps."""
    sigma, sd = lognormal(b.u, cfg), G.sigma_data
    t = torch.arctan(sigma / sd)
    cos, sin = bcast(t.cos(), b.x), bcast(t.sin(), b.x)
    x_t = cos * b.x + sin * sd * b.eps
    with torch.no_grad(), same_dropout(x_t):
        slope = cos * sd * b.eps - sin * b.x if teacher is None else sd * trigflow_from_denoiser(teacher, x_t, t, b.label, sd)
        g = tangent(in_fp32(minus), x_t, t, slope, b.label, sd, min(1.0, (progress + 1e-9) / cfg.warmup if cfg.warmup else 1.0))
        g = g / (bcast(g.flatten(1).norm(dim=1), g) + 0.1)
    out = trigflow_from_denoiser(G, x_t, t, b.label, sd)
    return (out - out.detach() - g).square().flatten(1).mean(1), sigma


def ctm_loss(G, minus, teacher, b, cfg, progress):
    """Consistency trajectory (2310.02279, Eq. 9 and 12): t, u = some solver steps below, any s under u; compared at 0."""
    grid = karras_sigmas(cfg.N, cfg.sigma_min, cfg.sigma_max, device=b.u.device).to(b.x)
    i = (b.u * cfg.N).long()
    t, lower, s = grid[i], grid[i + 1], grid[i + 1 + (b.w * (cfg.N - i)).long()]             # s uniform from lower to 0
    x_t = b.x + bcast(t, b.x) * b.eps
    clean = lambda x, s: torch.where(bcast(s, x) > 0, jump(minus, x, s.clamp(min=1e-6), torch.zeros_like(s), b.label), x)
    with torch.no_grad(), same_dropout(x_t):
        x_lower = solver_step(teacher, x_t, t, lower, b.label, cfg.solver)
        at_s = torch.where(bcast(lower, x_t) > 0, jump(minus, x_lower, lower.clamp(min=1e-6), s, b.label), x_lower)
        target = clean(at_s, s)
    loss = distance(clean(jump(G, x_t, t, s, b.label), s), target, cfg.c)       # next after the target, for its dropout masks
    dsm = denoising_loss(G(x_t, t, second_time(t, t, b.label)), b.x, t, G.sigma_data)
    return loss + cfg.dsm * dsm, t


def meanflow_loss(G, minus, teacher, b, cfg, progress):
    """MeanFlow (2505.13447, Eq. 10, 11, 22) with the teacher's velocity: u = v - (t - r) du/dt; half the pairs r = t."""
    sigma = lognormal(b.u, cfg)
    t = sigma / (1 + sigma)
    r = torch.where(b.w < 0.5, t, t * 2 * (1 - b.w))
    z = bcast(1 - t, b.x) * b.x + bcast(t, b.x) * b.eps
    u = lambda D, z, t: velocity_from_denoiser(lambda x, s, y: D(x, s, second_time(s, r / (1 - r), y)), z, t, b.label)
    with torch.no_grad(), same_dropout(z):
        v = velocity_from_denoiser(teacher, z, t, b.label)
        _, du = jvp(lambda z, t: u(in_fp32(minus), z, t), (z, t), (v, torch.ones_like(t)))
    error = (u(G, z, t) - (v - bcast(t - r, z) * du)).square().flatten(1).sum(1)
    return error / (error.detach() + 0.01), sigma


def which_call(b):
    """From w: mask (B,) of the rows for the first call, from noise, the others being for a further one; and w's rest, uniform (B,)."""
    return b.w < 0.5, 2 * b.w % 1


def boot_start(minus, b, cfg):
    """Start (B, ...) and level (B,) of a call: noise, or one of its samples noised to a further call's, deeper ones rarer."""
    first, rest = which_call(b)
    T = torch.full_like(b.u, cfg.sigma_max)
    level = (cfg.mid * minus.sigma_data * 2 ** rest.log2().ceil()).clamp(2 * cfg.sigma_min, cfg.sigma_max)
    x_T = bcast(T, b.eps) * b.eps
    x = jump(minus, x_T, T, torch.zeros_like(T), b.label) + bcast(level, x_T) * b.more[:, 0]
    return torch.where(bcast(first, x), x_T, x), torch.where(first, T, level)


def boot_loss(G, minus, teacher, b, cfg, progress):
    """BOOT (2306.05544, Eq. 10, 12): from a start at T, the student's own point at sigma and a teacher's step from there."""
    with torch.no_grad():
        x_T, T = boot_start(minus, b, cfg)
    sigma, lower = grid_pair(b.u, cfg, T)
    with torch.no_grad(), same_dropout(x_T):
        x_t = jump(minus, x_T, T, sigma, b.label)
        target = solver_step(teacher, x_t, sigma, lower, b.label, "euler")
        first = teacher(x_T, T, b.label)
    loss = distance(jump(G, x_T, T, lower, b.label), target, cfg.c) / (1 - lower / sigma) ** 2      # next, for target's dropout masks
    boundary = distance(G(x_T, T, second_time(T, T, b.label)), first, 0)
    return loss + 0.1 * boundary, sigma


def hinge_loss(logit_real, logit_fake):
    """The discriminator's side (B,); the student's is - logit_fake (2503.09641, Sec. 3.3)."""
    return 0.5 * (F.relu(1 - logit_real) + F.relu(1 + logit_fake))


def look(critic, disc, x, b, cfg):
    """The head's logit (B,) for this row's call, from the frozen teacher's features of x, noised to a random level."""
    first, rest = which_call(b)
    sigma = lognormal(rest, cfg)
    logits = disc(critic(x + bcast(sigma, x) * b.more[:, 0], sigma, b.label, features="only"))
    return torch.where(first, logits[:, 0], logits[:, 1])


def guess(G, b, cfg):
    """The student's sample (B, ...) that the discriminator sees: from the highest level, or from that of the second call."""
    sigma = torch.where(which_call(b)[0], cfg.sigma_max, cfg.mid * G.sigma_data).to(b.u)
    return f(G, b.x + bcast(sigma, b.x) * b.eps, sigma, b.label)


LOSSES = dict(cd=cd_loss, ct=ct_loss, ect=ect_loss, scd=scm_loss, sct=scm_loss, sprint=scm_loss, scott=scott_loss,
              ctm=ctm_loss, meanflow=meanflow_loss, boot=boot_loss)

# ---- training --------------------------------------------------------------------------------------------------------


class Weight(nn.Module):
    """sCM's learned weight w(sigma) (B,): exp(w) |error|^2 - w makes every level count the same."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(9, 1)
        nn.init.zeros_(self.layer.weight), nn.init.zeros_(self.layer.bias)

    def forward(self, sigma):
        angle = sigma.log()[:, None] / 4 * torch.arange(1, 5, device=sigma.device)
        return self.layer(torch.cat([angle.sin(), angle.cos(), sigma.log()[:, None] / 4], 1))[:, 0]


def make_discriminator(shape):
    """Head that turns the teacher's features, (C,) or (C, R, R), into logits (B, 2), a first and a further call's."""
    if len(shape) == 1:
        return nn.Sequential(nn.Linear(shape[0], shape[0]), nn.ReLU(), nn.Linear(shape[0], 2))
    c = shape[0]
    return nn.Sequential(nn.Conv2d(c, c, 3, 2, 1), nn.GroupNorm(math.gcd(32, c), c), nn.SiLU(), nn.Conv2d(c, c, 3, 2, 1),
                         nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 2))


def widen(denoiser, more):
    """The same denoiser with `more` further label inputs, which it does not yet heed."""
    net = denoiser.net
    wide = type(net)(**{**net.spec, "label_dim": net.label_dim + more})
    old = net.state_dict()
    with torch.no_grad():
        for name, w in wide.state_dict().items():
            if name in old and old[name].shape == w.shape:
                w.copy_(old[name])
            else:
                w.zero_()
                if name in old:         # DDPM++ multiplies labels by the root of their number
                    factor = (net.label_dim / wide.label_dim) ** 0.5 if name == "map_label.weight" and not net.adm else 1
                    w[:, :old[name].shape[1]] = factor * old[name]
    return Denoiser(wide, denoiser.sigma_data, denoiser.dtype)


def make_student(cfg, teacher, data):
    """A trainable copy of the teacher, or (ct) a fresh network; with a second time if the loss wants one."""
    G = initial_student(cfg, teacher, data) if teacher else build(cfg, data.shape, data.label_dim, data.sigma_data)
    G = place(widen(G, 6), cfg).train() if cfg.loss in SECOND_TIME else G
    for block in G.modules():
        if isinstance(block, Block):
            block.dropout = cfg.dropout
    G.sigma_init, G.config = cfg.sigma_init, asdict(cfg)
    return G


def draw(n, data, device, loss):
    """All that is random about n training pairs. BOOT reads no data."""
    x, label = (None, data.draw_label(n)) if loss == "boot" else data.sample(n)
    eps, (u, w) = torch.randn(n, *data.shape, device=device), torch.rand(2, n, device=device)
    return Draw(eps, x, label, u, w, torch.randn(n, 3, *data.shape, device=device) if loss in ("scott", "sprint", "boot") else None)


def complain(cfg):
    """Raise UserError for settings that cannot work."""
    for bad, sentence in (
        (cfg.loss not in LOSSES, f"unknown loss {cfg.loss!r}: choose one of {', '.join(LOSSES)}"),
        (cfg.loss == "ct" and cfg.teacher, "--loss ct trains without a teacher; leave --teacher away, or take ect, which starts from one"),
        (cfg.sigma_init != cfg.sigma_max, "a consistency student starts at --sigma_max; leave --sigma_init away"),
        (cfg.loss in ("cd", "scott", "ctm", "boot") and cfg.N < 2, f"--N must be at least 2, not {cfg.N}"),
        (cfg.loss == "ct" and not 2 <= cfg.s0 <= cfg.N, f"--s0 {cfg.s0} must lie between 2 and --N {cfg.N}"),
        (cfg.stages < 1 or cfg.q <= 1, "--stages must be at least 1, --q above 1"),
        (cfg.stages * math.log(cfg.q) > math.log(1e5), "--q to the power of --stages must be at most 1e5: float32 knows no smaller steps"),
        (min(cfg.p_std, cfg.lr_disc) <= 0, "--p_std and --lr_disc must be positive"),
        (not math.log(cfg.sigma_min) < cfg.p_mean < math.log(cfg.sigma_max),
         f"--p_mean {cfg.p_mean} is a mean of ln sigma: e to the power of it must lie between --sigma_min and --sigma_max"),
        (not 0 <= cfg.target_ema < 1 or not 0 <= cfg.dropout < 1, "--target_ema and --dropout must lie in [0, 1)"),
        (not 0 <= min(cfg.warmup, cfg.eta, cfg.gamma) <= max(cfg.warmup, cfg.eta, cfg.gamma) <= 1,
         "--warmup, --eta and --gamma must lie in [0, 1]"),
        (min(cfg.adv, cfg.dsm) < 0 or cfg.c < 0, "--adv, --dsm and --c must be at least 0"),
        (cfg.dropout and cfg.data in TOYS, "--dropout is for images: the toys' network has none"),
    ):
        if bad:
            raise UserError(sentence)


def train(cfg):
    """Distil, or train, as cfg says; returns the averaged student and its Run."""
    complain(cfg)
    data = load_data(cfg)
    call_levels(cfg.nfe, cfg.mid, data.sigma_data, cfg.sigma_min, cfg.sigma_max)
    teacher = None if cfg.loss == "ct" else load_teacher(cfg, data)
    run = Run(cfg, "consistency", teacher is not None)
    G = make_student(cfg, teacher, data)
    minus, ema, weight = copy.deepcopy(G).requires_grad_(False), EMA(G, cfg.ema), Weight().to(run.device)
    opt = torch.optim.Adam([*G.parameters(), *weight.parameters()], betas=(0.9, 0.99), fused=True)
    state = dict(G=G, minus=minus, weight=weight, ema=ema, opt=opt)
    if cfg.loss == "sprint":
        critic = teacher if isinstance(teacher, Denoiser) else initial_student(cfg, teacher, data).eval().requires_grad_(False)
        disc = make_discriminator(critic.net.feature_shape()).to(run.device)
        state |= dict(disc=disc, opt_disc=torch.optim.Adam(disc.parameters(), cfg.lr_disc, betas=(0.0, 0.99), fused=True))
    panels, z_show, label_show = gallery(cfg, data, teacher)
    micro, loss_of = run.micro, LOSSES[cfg.loss]
    guide = None if cfg.loss in ("ct", "ect", "sct") else teacher

    for step in run.steps(state):
        set_lr(opt, cfg.lr * lr_factor(run.progress))
        with torch.no_grad():                                   # the network held fixed follows
            torch._foreach_lerp_(list(minus.parameters()), list(G.parameters()), 1 - cfg.target_ema if step else 1.0)

        # 1. sprint: the discriminator learns to tell the student's samples from data
        if cfg.loss == "sprint":
            for part in run.parts(*draw(cfg.batch, data, run.device, cfg.loss)):
                b = Draw(*part)
                with torch.no_grad():
                    x = guess(G, b, cfg)
                loss_disc = hinge_loss(look(critic, disc, b.x, b, cfg), look(critic, disc, x, b, cfg)).mean()
                (loss_disc * micro / cfg.batch).backward()
            run.add_gradients(state["opt_disc"])
            state["opt_disc"].step()
            state["opt_disc"].zero_grad()
            disc.requires_grad_(False)

        # 2. the student
        for part in run.parts(*draw(cfg.batch, data, run.device, cfg.loss)):
            b = Draw(*part)
            loss, sigma = loss_of(G, minus, guide, b, cfg, run.progress)
            if cfg.loss in TANGENT:                         # sCM's adaptive weight
                w = weight(sigma)
                loss = w.exp() * loss - w
            total = loss = loss.mean()
            if cfg.loss == "sprint":
                total = loss - cfg.adv * look(critic, disc, guess(G, b, cfg), b, cfg).mean()
            (total * micro / cfg.batch).backward()
        if cfg.loss == "sprint":
            disc.requires_grad_(True)
        run.add_gradients(opt)
        opt.step()
        opt.zero_grad()
        ema.update(G)
        run.log(loss=loss, **dict(disc=loss_disc) if cfg.loss == "sprint" else {})
        if run.due():
            run.show({**panels, f"{cfg.loss}, {cfg.nfe} network call{'s' * (cfg.nfe > 1)}":
                      sample(ema.model, len(z_show), label_show, cfg.nfe, z_show)})

    more = {}
    if teacher:                                             # root mean square distance to the end points of the teacher's own ODE
        more["paired"] = (sample(ema.model, len(z_show), label_show, 1, z_show) - list(panels.values())[1]).square().mean().sqrt().item()
    if cfg.data in TOYS:
        x, label = data.sample(cfg.samples)
        more["H_2_steps"] = energy_coefficient(sample(ema.model, cfg.samples, label, steps=2), x)
    if more:
        print(", ".join(f"{name} {v:.5f}" for name, v in more.items()))
    report(run, data, teacher, lambda n, label: sample(ema.model, n, label, cfg.nfe), **more)
    return ema.model, run


def call_levels(steps, mid, sigma_data, sigma_min, sigma_max):
    """Noise levels (steps + 1) of the calls and of their end: sigma_max; mid, mid / 2, ... in units of the data's std; 0."""
    if steps < 1:
        raise UserError(f"--nfe must be at least 1, not {steps}")
    if not 0 < mid * sigma_data < sigma_max:
        raise UserError(f"--mid {mid:g} times the data's std, {sigma_data:.2g}, must lie between 0 and --sigma_max, {sigma_max:g}")
    return [sigma_max] + [max(mid * sigma_data * 0.5**k, sigma_min) for k in range(steps - 1)] + [0.0]


@torch.no_grad()
def sample(student, n, label=None, steps=1, z=None, mid=None, gamma=None):
    """
    n samples (n, ...) of a student in `steps` network calls; random labels if it wants some and gets none. mid and gamma are
    the flags of these names, by default as the student was trained.
    """
    cfg, device = student.config, next(student.parameters()).device
    second = cfg["loss"] in SECOND_TIME
    gamma, classes = cfg["gamma"] if gamma is None else gamma, student.label_dim - 6 * second
    if not 0 <= gamma <= 1:
        raise UserError(f"--gamma must lie in [0, 1], not {gamma}")
    gamma = gamma if second and cfg["loss"] != "boot" else 1.0
    levels = call_levels(steps, cfg["mid"] if mid is None else mid, student.sigma_data, cfg["sigma_min"], student.sigma_init)
    z = torch.randn(n, *student.shape, device=device) if z is None else z
    if label is None and classes:
        label = F.one_hot(torch.randint(classes, (n,), device=device), classes).float()
    parts = []
    for x, y in micro_batches(1000, z, label):
        x = student.sigma_init * x
        for t, lower in zip(levels, levels[1:]):
            t, s = x.new_full((len(x),), t), x.new_full((len(x),), lower * (1 - gamma**2) ** 0.5)
            x = jump(student, x, t, s, y) if second else f(student, x, t, y)
            x = x + gamma * lower * torch.randn_like(x) if lower and gamma else x
        parts.append(x)
    return torch.cat(parts)


if __name__ == "__main__":
    main(Config, PRESETS, train, sample)
