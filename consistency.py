"""
The consistency family: eight losses for a student that jumps along a diffusion model's ODE.

D(x_t, sigma) is a denoiser at x_t = x + sigma eps; the ODE is dx/dsigma = (x_t - D) / sigma. A
consistency function says where the path through x_t ends: it is x_t at sigma 0 and one value along
a path. Any denoiser has the right form (EDM's c_skip is 1 and c_out 0 at sigma 0), so the student G
*is* one, and starts as the teacher. A loss compares G at two points of a path, the lower one fixed:

    --loss    the lower point                              paper
    cd        one solver step of the teacher below         consistency distillation, 2303.01469
    ct        x + sigma' eps, same eps, no teacher         improved training (iCT), 2310.14189
    ect       the same; sigma' / sigma grows towards 1     easy consistency tuning, 2406.14548
    scd       infinitely near, by a JVP, teacher's slope   sCM in TrigFlow, 2410.11081
    sct       infinitely near, by a JVP, slope of x, eps   sCM in TrigFlow, 2410.11081
    sprint    as scd, and a GAN on the teacher's features  SANA-Sprint, 2503.09641
    ctm       a solver step; jumps from t to any s         consistency trajectory, 2310.02279
    meanflow  infinitely near; jumps from t to any s       mean flows, 2505.13447

ctm, meanflow: Phi(x_t, t, s) = s/t x_t + (1 - s/t) G(x_t, t, label, second), second s/t or s/(1+s).

    python consistency.py                           # cd, ring: under a minute, H about 0.00005
    python consistency.py --loss scd --nfe 2        # another loss, measured by two network calls
    python consistency.py --data cifar10 --loss ect --teacher edm-cifar10-32x32-uncond-vp.pkl

Differences from papers and code: 1. The boundary is at sigma 0 (as in ECT); CM shifts it to
sigma_min. The teacher's last step, to 0, is Euler's.  2. The lower point sees the student's own
weights; CM has an EMA of them on ImageNet-64 (0.95), CTM too (0.999).  3. No LPIPS; cd and ctm take
the squared error, weighed by 1/sigma^2 + 1/sigma_data^2, as EDM does (CM: 1).  4. Adam with
betas (0.9, 0.99), not RAdam; the rate falls to 0 over the last half; the EMA warms up, then is
constant.  5. sCM: F is read off the denoiser, with EDM's c_noise ln(sigma) / 4 for t; no prior
weight 1 / tan t; its weight is a table over 16 bins of levels.  6. Levels outside sigma_min ..
sigma_max go to the ends.  7. ImageNet-64: no dropout (ECT, sCT: 0.4 and more at 16x16 and below);
ect without EDM's weight, at rate 1e-4 (ECT: 1e-3, falling).  8. sprint: one feature of the teacher
(Sana: four); sCM's law of levels; no mismatched pairs; on toys the GAN counts 1 (Sana: 0.5).
9. ctm: one solver step, not several; the denoising loss has a fixed weight and the jump's levels;
no GAN.  10. meanflow distils the teacher's velocity; --velocity data trains from scratch. r is
uniform below t (paper: the lower of two draws); embedded is r, not t-r.  11. Images: one GPU,
days, batch 128 (papers: to 4224), only flips, to 200,000 updates (papers: 800,000).
"""
import copy
import inspect
import math
import warnings
from collections import namedtuple
from dataclasses import asdict, dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from common import (Denoiser, Run, Shared, begin, build, denoising_loss, draw_label,
                    energy_coefficient, fork_rng, gallery, in_parts, initial_student, karras_sigmas,
                    level, load_data, load_teacher, main, need, set_lr, update_ema)


@dataclass(init=False)
class Config(Shared):
    steps: int = 1400
    batch: int = 512
    lr: float = 2e-3
    ema: float = 0.995
    loss: Literal["cd", "ct", "ect", "scd", "sct", "sprint", "ctm", "meanflow"] = "cd"  # which one
    nfe: int = 1                # network calls per sample when drawing: any number works
    mid: float = 0.7            # level of the second call, in units of the data's std; then halved
    gamma: float = 0.0          # ctm, meanflow: share of fresh noise between calls; others have 1
    N: int = 18                 # cd, ctm: the teacher's Heun steps on a path, the last one Euler's
    huber: bool = False         # cd, ct, ect, ctm: pseudo-Huber distance instead of mean square
    c: float = 0.00076          # its width, 0.00054 sqrt(numbers in x) in iCT; 0: the plain norm
    p_mean: float = -0.4        # mean of ln sigma (ct, ect, scd, sct, sprint, meanflow)
    p_std: float = 1.2          # its std
    s0: int = 10                # ct: steps in the first stage, doubled in each further one
    s1: int = 160               # ct: steps in the last
    q: float = 2.0              # ect: 1 - sigma'/sigma shrinks by this factor from stage to stage
    stages: int = 4             # ect: number of stages
    warmup: float = 0.2         # sCM: share of the run in which the tangent's second term comes in
    adv: float = 1.0            # sprint: weight of the adversarial term
    lr_disc: float = 2e-3       # sprint: learning rate of the discriminator's head
    dsm: float = 0.1            # ctm: weight of the denoising loss
    velocity: Literal["teacher", "data"] = "teacher"    # meanflow: whose; data: from scratch
    equal: float = 0.5          # meanflow: share of samples with r = t
    power: float = 1.0          # meanflow: loss is error / (error + floor)^power
    floor: float = 0.01         # meanflow: the floor in that weight
    dropout: float = 0.0        # dropout in the student (images)


SMALL = dict(net="small", teacher_steps=2000, steps=800, batch=32, accumulate=1, lr=5e-4, ema=0.99,
             mid=1.64, p_mean=-0.8, p_std=1.6, sigma_min=0.01, sigma_max=80.0,
             sigma_init=80.0, lr_disc=1e-3, adv=0.5, dropout=0.0, warmup=0.2, samples=5000)
LARGE = dict(flip=True, batch=128, ema=0.9999, sigma_min=0.002, sigma_max=80.0, sigma_init=80.0,
             s1=1280, mid=1.96, adv=0.5, lr_disc=1e-4, every=5000, samples=50_000)
PRESETS = {
    # mid: where H by two calls was lowest. Normalised tangents do not shrink: lr
    "ct": dict(huber=True, mid=1.0),
    "ect": dict(huber=True),
    "scd": dict(lr=2e-4, mid=1.0), "sct": dict(lr=2e-4, mid=1.0),
    "sprint": dict(lr=2e-4, mid=1.56),
    "ctm": dict(mid=2.0), "meanflow": dict(mid=2.76), "meanflow data": dict(lr=5e-4, equal=0.75),
    "mnist": dict(SMALL, c=0.015, cond=True), "mnist cd": dict(N=8, lr=1e-3),
    "images": dict(SMALL, c=0.03),
    # An H100, a day or so. Rates, levels, dropout, sCM's 10,000 steps of warm-up: the papers'
    "cifar10": dict(LARGE, net="ddpmpp", teacher_steps=100_000, steps=200_000, lr=1e-4, p_mean=-1.0,
                    p_std=1.4, warmup=0.05),
    "cifar10 cd": dict(lr=4e-4, mid=2.76),
    "cifar10 ct": dict(p_mean=-1.1, p_std=2.0, mid=1.64, c=0.03, dropout=0.3),
    "cifar10 ect": dict(p_mean=-1.1, p_std=2.0, mid=1.64, c=0.0, stages=8, dropout=0.2),
    "cifar10 sct": dict(dropout=0.2),
    "cifar10 sprint": dict(mid=1.56, steps=100_000, warmup=0.1),
    "cifar10 ctm": dict(lr=4e-4, mid=2.76, steps=100_000, accumulate=2),
    "cifar10 meanflow": dict(p_mean=-2.0, p_std=2.0, mid=2.76, lr=6e-4, equal=0.25, power=0.75,
                             floor=1e-3, dropout=0.2),
    # An H100, two days or more; --teacher edm-imagenet-64x64-cond-adm.pkl
    "imagenet64": dict(LARGE, net="adm", cond=True, steps=100_000, accumulate=4, lr=7e-5, c=0.06,
                       p_mean=-1.0, p_std=1.6, warmup=0.1),
    "imagenet64 cd": dict(N=40, lr=8e-6, mid=2.76),
    "imagenet64 ct": dict(p_mean=-1.1, p_std=2.0, mid=3.05, lr=1e-4),
    "imagenet64 ect": dict(p_mean=-0.8, mid=3.05, lr=1e-4, q=4.0),
    "imagenet64 sprint": dict(mid=1.56, steps=50_000, warmup=0.2),
    "imagenet64 ctm": dict(N=39, lr=4e-4, mid=2.76, steps=50_000, accumulate=8),
    # On a CPU, with --minutes
    "cifar10 small": dict(SMALL, c=0.03, cond=True), "cifar10 small cd": dict(N=8, lr=1e-3),
}

# ---- the method ----------------------------------------------------------------------------------
# A loss (B,) is a function of the student G, of `minus`, which has G's weights and does not learn,
# of the teacher, of what is random about a batch, and of the share of the training that is over.

Draw = namedtuple("Draw", "x label eps u w")    # eps normal (B, ...), u and w uniform (B, 1, ...)


def distance(a, b, cfg):
    """Distance (B,): mean square, or sqrt(|a - b|^2 + c^2) - c (iCT, Eq. 8), for c = 0 the norm."""
    y = (a - b).flatten(1)
    if cfg.huber:                                       # as a norm: its gradient at 0 is 0, not NaN
        return F.pad(y, (0, 1), value=cfg.c).norm(dim=1) - cfg.c
    return y.square().mean(1)


def solver_step(D, x_t, sigma, lower, label):
    """The ODE of D from level sigma to lower: a step of Heun, or of Euler to 0 (EDM, Alg. 1)."""
    slope = (x_t - D(x_t, sigma, label)) / sigma
    x = x_t + (lower - sigma) * slope
    slope_lower = (x - D(x, lower, label)) / lower      # not finite at lower 0, where x is taken
    return torch.where(lower > 0, x_t + (lower - sigma) * (slope + slope_lower) / 2, x)


def lognormal(u, cfg):
    """Levels with ln sigma normal, of uniform u; what lies outside goes to the ends."""
    sigma = (cfg.p_mean + cfg.p_std * torch.special.ndtri(u)).exp()
    return sigma.clamp(cfg.sigma_min, cfg.sigma_max)


def cd_levels(u, cfg, progress):
    """Neighbours sigma > lower on Karras's grid of N levels and 0, equally likely (CM, Alg. 2)."""
    grid = karras_sigmas(cfg.N, cfg.sigma_min, cfg.sigma_max, u.device).to(u)
    i = (u * cfg.N).long()
    return grid[i], grid[i + 1]


def ct_levels(u, cfg, progress):
    """Neighbours on a grid that doubles from stage to stage; ln sigma is about normal (iCT)."""
    stage = int(progress * (math.log2(cfg.s1 // cfg.s0) + 1))                       # Eq. 11
    grid = karras_sigmas(min(cfg.s0 * 2**stage, cfg.s1), cfg.sigma_min, cfg.sigma_max, u.device)
    share = torch.special.erf((grid.log() - cfg.p_mean) / (2**0.5 * cfg.p_std)).diff().neg()
    edges = (share / share.sum()).cumsum(0)                                         # Eq. 10
    i = torch.searchsorted(edges, u.double()).clamp(max=len(share) - 1)
    return grid[i].to(u), grid[i + 1].to(u)


def ect_levels(u, cfg, progress):
    """No grid: the ratio lower / sigma goes from 0, which is diffusion, towards 1 (ECT, Sec. 3)."""
    stage = min(int(progress * cfg.stages), cfg.stages - 1)
    sigma = lognormal(u, cfg)
    gap = cfg.q ** -(stage + 1.0) * (1 + 8 * torch.sigmoid(-sigma))
    return sigma, sigma * (1 - gap).clamp(min=0)


def pair_loss(G, minus, teacher, b, cfg, progress):
    """cd (CM, Eq. 7), ct (iCT, Eq. 5) and ect: G at sigma is to give what minus gives at lower."""
    levels = dict(cd=cd_levels, ct=ct_levels, ect=ect_levels)[cfg.loss]
    sigma, lower = levels(b.u, cfg, progress)                                       # (B, 1, ...)
    x_t = b.x + sigma * b.eps
    with torch.no_grad(), fork_rng(x_t.device):         # two passes, one dropout mask
        x_lower = b.x + lower * b.eps
        if cfg.loss == "cd":
            x_lower = solver_step(teacher, x_t, sigma, lower, b.label)
        target = minus(x_lower, lower, b.label)
    weight = (1 / sigma**2 + 1 / G.sigma_data**2) if cfg.loss == "cd" else 1 / (sigma - lower)
    return weight.flatten() * distance(G(x_t, sigma, b.label), target, cfg)


class TwoPasses(TorchFunctionMode):
    """Forward derivatives by two passes; PyTorch's rule for layers takes a third, for weights."""
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.group_norm:                    # its rule wants contiguous tensors
            args = (args[0].clone(memory_format=torch.contiguous_format), *args[1:])
        attention = F.scaled_dot_product_attention      # the fused one has no rule
        if kwargs or function not in (attention, F.conv2d, F.linear):
            return function(*args, **kwargs or {})
        x, *rest = args
        if function is attention:
            return (x @ rest[0].mT / x.shape[-1] ** 0.5).softmax(-1) @ rest[1]
        x, dx = forward_ad.unpack_dual(x)
        out = function(x, *rest)
        if dx is None:
            return out
        return forward_ad.make_dual(out, function(dx, rest[0], None, *rest[2:]))


def jvp(function, inputs, tangents):
    """(value, derivative along the tangents) of function(*inputs)."""
    with warnings.catch_warnings(), forward_ad.dual_level(), TwoPasses():
        warnings.simplefilter("ignore")                 # PyTorch's own rules are TorchScript
        dual = [forward_ad.make_dual(x, dx) for x, dx in zip(inputs, tangents)]
        return forward_ad.unpack_dual(function(*dual))


def trigflow(D, x_t, t, label, sd):
    """TrigFlow's F (B, ...) of D at x_t = cos t x + sin t sd eps: t an angle, sd sigma_data."""
    return (t.cos() * x_t - D(x_t / t.cos(), sd * t.tan(), label)) / (sd * t.sin())


def tangent(D, x_t, t, slope, label, sd, r=1.0):
    """cos t df/dt of f = cos t x_t - sin t sd F along dx/dt = slope (sCM, Eq. 6); r: warm-up."""
    cos, sin = t.cos(), t.sin()
    out, dF = jvp(lambda x_t, t: trigflow(D, x_t, t, label, sd), (x_t, t),
                  (cos * sin * slope, cos * sin))
    return -cos**2 * (sd * out - slope) - r * (cos * sin * x_t + sd * dF)


def scm_loss(G, minus, teacher, b, cfg, progress):
    """scd, sprint: the teacher's slope dx/dt; sct: that of x, eps (sCM, Alg. 1); t is an angle."""
    sd = G.sigma_data
    t = torch.arctan(lognormal(b.u, cfg) / sd)                                      # (B, 1, ...)
    x_t = t.cos() * b.x + t.sin() * sd * b.eps
    with torch.no_grad(), fork_rng(x_t.device):
        slope = t.cos() * sd * b.eps - t.sin() * b.x
        if cfg.loss != "sct":
            slope = sd * trigflow(teacher, x_t, t, b.label, sd)
        r = min(1.0, (progress + 1e-9) / max(cfg.warmup, 1e-9))
        g = tangent(minus, x_t, t, slope, b.label, sd, r)
        g = g / (g.flatten(1).norm(dim=1).view_as(t) + 0.1)
    out = trigflow(G, x_t, t, b.label, sd)
    return (out - out.detach() - g).square().flatten(1).mean(1)


def jump(G, x_t, t, s, label, second):
    """Phi (B, ...): the path through x_t at noise level t, at level s (CTM, Eq. 6)."""
    ratio = s / t.clamp(min=1e-6)
    return ratio * x_t + (1 - ratio) * G(x_t, t, label, second)


def ctm_loss(G, minus, teacher, b, cfg, progress):
    """From noise level t and a step below it to any s under that; compared at 0 (CTM, Eq. 9)."""
    grid = karras_sigmas(cfg.N, cfg.sigma_min, cfg.sigma_max, b.u.device).to(b.u)
    i = (b.u * cfg.N).long()
    t, lower, s = grid[i], grid[i + 1], grid[i + 1 + (b.w * (cfg.N - i)).long()]    # (B, 1, ...)
    x_t, zero, one = b.x + t * b.eps, torch.zeros_like(t), torch.ones_like(t)
    with torch.no_grad(), fork_rng(x_t.device):
        x_lower = solver_step(teacher, x_t, t, lower, b.label)
        x_s = jump(minus, x_lower, lower, s, b.label, s / lower.clamp(min=1e-6))
        target = minus(x_s, s, b.label, zero)
    x_s = jump(G, x_t, t, s, b.label, s / t)            # this, then minus: the target's two masks
    weight = (1 / t**2 + 1 / G.sigma_data**2).flatten()
    loss = weight * distance(minus(x_s, s, b.label, zero), target, cfg)
    return loss + cfg.dsm * denoising_loss(G(x_t, t, b.label, one), b.x, t, G.sigma_data)   # s = t


def meanflow_loss(G, minus, teacher, b, cfg, progress):
    """The mean velocity u from time r to t is v - (t - r) du/dt (MeanFlow, Eq. 10, 11, 22)."""
    sigma = lognormal(b.u, cfg)                                                     # (B, 1, ...)
    t = sigma / (1 + sigma)                             # a time
    r = t * ((1 - b.w) / max(1 - cfg.equal, 1e-9)).clamp(max=1)
    z = (1 - t) * b.x + t * b.eps

    def mean_velocity(D, z, t):
        return (z - D(z / (1 - t), t / (1 - t), b.label, r)) / t
    with torch.no_grad(), fork_rng(z.device):
        v = b.eps - b.x
        if cfg.velocity == "teacher":
            v = (z - teacher(z / (1 - t), sigma, b.label)) / t
        du = jvp(lambda z, t: mean_velocity(minus, z, t), (z, t), (v, torch.ones_like(t)))[1]
    error = (mean_velocity(G, z, t) - (v - (t - r) * du)).square().flatten(1).sum(1)
    return error / (error.detach() + cfg.floor) ** cfg.power


def look(judge, disc, x, label):
    """The head's logit (B,): it sees the frozen teacher's feature of x noised to a random level."""
    sigma = (torch.randn_like(level(x, 0)) - 0.6).exp()                 # as in SANA-Sprint's code
    return disc(judge.feature(x + sigma * torch.randn_like(x), sigma, label))[:, 0]


def guess(G, b, cfg):
    """The student's samples for the head, half from the highest level (SANA-Sprint, Sec. 3.3)."""
    sigma = lognormal(2 * b.w % 1, cfg)                 # w's other half, uniform again
    sigma = torch.where(b.w < 0.5, cfg.sigma_max, sigma)
    return G(b.x + sigma * b.eps, sigma, b.label)


LOSSES = dict(cd=pair_loss, ct=pair_loss, ect=pair_loss, scd=scm_loss, sct=scm_loss,
              sprint=scm_loss, ctm=ctm_loss, meanflow=meanflow_loss)
SECOND = ("ctm", "meanflow")                            # the losses with a second number

# ---- training ------------------------------------------------------------------------------------


def make_discriminator(shape):
    """Head that turns the teacher's last feature, (C,) or (C, R, R), into a logit (B, 1)."""
    c = shape[0]
    if len(shape) == 1:
        return nn.Sequential(nn.Linear(c, c), nn.ReLU(), nn.Linear(c, 1))
    return nn.Sequential(nn.Conv2d(c, c, 3, 2, 1), nn.GroupNorm(math.gcd(32, c), c), nn.SiLU(),
                         nn.Conv2d(c, c, 3, 2, 1), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(c, 1))


def check_flags(cfg, scratch, teacher):
    """Raise UserError for settings that cannot work together."""
    taught = bool(cfg.teacher) or teacher is not None
    need(not (scratch and taught), "--loss ct and --velocity data train without a teacher: omit "
         "it, or take ect or sct, which start from one")
    need(cfg.velocity == "teacher" or cfg.loss == "meanflow", "--velocity is for --loss meanflow")
    need(cfg.sigma_init == cfg.sigma_max, "--sigma_init must be --sigma_max: students start there")
    need(cfg.N > 1 and 2 <= cfg.s0 <= cfg.s1, "--N and --s0 must be at least 2, --s1 at least --s0")
    need(cfg.q > 1 and cfg.stages * math.log(cfg.q) < math.log(1e5), "--q must be above 1, and to "
         "the power of --stages at most 1e5: float32 knows no smaller steps")
    need(cfg.p_std > 0 and math.log(cfg.sigma_min) < cfg.p_mean < math.log(cfg.sigma_max),
         "--p_std must be above 0, e to the --p_mean between --sigma_min and --sigma_max")
    need(max(cfg.warmup, cfg.equal, cfg.dropout) <= 1, "--warmup, --equal and --dropout: at most 1")
    need(not (cfg.compile and cfg.dropout), "--compile does not go with --dropout, whose masks are "
         "to be the same in two passes: add --dropout 0 or omit --compile")


def check_student(G, cfg, data):
    """Raise UserError for a network of one's own that these losses cannot train."""
    x = torch.randn(2, *data.shape, device=next(G.parameters()).device)
    more = [level(x, 0)] if cfg.loss in SECOND else []
    need(len(inspect.signature(G.forward).parameters) > 2 + len(more), f"--loss {cfg.loss} calls "
         f"student(x_t, sigma, label{', second' if more else ''}), and yours takes less")
    out = G(x, level(x, 0), draw_label(2, data, x.device), *more)
    need(torch.allclose(out, x, atol=1e-3), "a student of consistency must be x_t at sigma 0")


def set_up(cfg, data, teacher, student):
    """(data, teacher or None, student, judge, disc), the last two for sprint."""
    scratch = cfg.loss == "ct" or cfg.velocity == "data"
    check_flags(cfg, scratch, teacher)
    data = load_data(cfg, data)
    need(len(data.shape) > 1 or not cfg.dropout, "--dropout is for images, not for toys")
    levels = call_levels(asdict(cfg), data.sigma_data)
    if scratch and student is None:
        student = build(cfg, data)
    teacher = None if scratch else load_teacher(cfg, data, teacher)
    G = initial_student(cfg, data, teacher, student)
    if cfg.loss in SECOND and isinstance(G, Denoiser):
        net = type(G.net)(**G.net.spec | dict(second=True))
        net.load_state_dict(G.net.state_dict(), strict=False)           # map_second starts at zero
        G = initial_student(cfg, data, student=Denoiser(net, G.sigma_data, G.dtype))
    if not isinstance(G, Denoiser):
        check_student(G, cfg, data)
    G.levels, G.config = levels, asdict(cfg)
    judge, disc = teacher, nn.Identity()
    if cfg.loss == "sprint":
        if not isinstance(teacher, Denoiser):
            judge = initial_student(cfg, data, teacher).eval().requires_grad_(False)
        disc = make_discriminator(judge.net.feature_shape).to(next(G.parameters()).device)
    return data, teacher, G, judge, disc


def draw(n, data):
    """All that is random about n training samples."""
    x, label = data.sample(n)
    u = torch.rand_like(level(x, 0))
    return Draw(x, label, torch.randn_like(x), u, torch.rand_like(u))


def train(cfg, data=None, teacher=None, student=None, on_log=None):
    """Distil as cfg says; what is passed in replaces what flags would load. -> (EMA, Run)"""
    begin(cfg, "consistency")
    data, teacher, G, judge, disc = set_up(cfg, data, teacher, student)
    minus = copy.deepcopy(G).requires_grad_(False)      # in training mode, for the dropout's masks
    if LOSSES[cfg.loss] in (scm_loss, meanflow_loss):
        minus.dtype = "fp32"                            # bf16 is too coarse for derivatives
    ema = copy.deepcopy(G).eval().requires_grad_(False)
    weight = nn.Embedding(16, 1, _weight=torch.zeros(16, 1)).to(next(G.parameters()).device)
    opt = torch.optim.Adam([*G.parameters(), *weight.parameters()], betas=(0.9, 0.99), fused=True)
    state = dict(G=G, weight=weight, ema=ema, opt=opt)
    if cfg.loss == "sprint":
        opt_disc = torch.optim.Adam(disc.parameters(), cfg.lr_disc, betas=(0.0, 0.99), fused=True)
        state |= dict(disc=disc, opt_disc=opt_disc)
    panels, z_show, label_show = gallery(cfg, data, teacher)
    run = Run(cfg, "consistency", on_log, **state)

    for step in run.steps():
        set_lr(opt, cfg.lr, run.progress)
        update_ema(minus, G, 0.0, step)                 # decay 0: minus is G
        # 1. sprint: the head learns to tell the student's samples from data
        terms = {}
        if cfg.loss == "sprint":
            opt_disc.zero_grad()                        # of what the student's loss left there
            for _ in range(cfg.accumulate):     # run.part: samples of one pass, batch / accumulate
                b = draw(run.part, data)
                with torch.no_grad():
                    x = guess(G, b, cfg)
                real = F.relu(1 - look(judge, disc, b.x, b.label))
                fake = F.relu(1 + look(judge, disc, x, b.label))
                terms["disc"] = (real + fake).mean() / 2            # hinge (SANA-Sprint, Sec. 3.3)
                (terms["disc"] / cfg.accumulate).backward()
            opt_disc.step()
        # 2. the student
        for _ in range(cfg.accumulate):
            b = draw(run.part, data)
            loss = LOSSES[cfg.loss](G, minus, teacher, b, cfg, run.progress)        # (B,)
            if LOSSES[cfg.loss] is scm_loss:            # every level is to count the same
                log_weight = weight((16 * b.u).long().flatten())[:, 0]
                loss = log_weight.exp() * loss - log_weight
            terms["loss"] = loss = loss.mean()
            if cfg.loss == "sprint":
                loss = loss - cfg.adv * look(judge, disc, guess(G, b, cfg), b.label).mean()
            (loss / cfg.accumulate).backward()
        opt.step()
        opt.zero_grad()
        update_ema(ema, G, cfg.ema, step)
        run.log(**terms)
        if run.due():
            shown = sample(ema, len(z_show), label_show, z_show)
            run.show({**panels, f"student, network calls: {cfg.nfe}": shown}, label_show, z_show)
    figures = more_figures(cfg, data, ema, panels, z_show, label_show)
    run.report(data, lambda n, label: sample(ema, n, label), **figures)
    return ema, run


def more_figures(cfg, data, ema, panels, z, label):
    """paired: rms distance to the teacher's ODE; H_2_steps: H by two calls (toys)."""
    figures, solved = {}, panels.get("teacher, 35 network calls")
    if solved is not None:
        error = sample(ema, len(z), label, z, nfe=1) - solved
        figures["paired"] = error.square().mean().sqrt().item()
    if len(data.shape) == 1:
        x, label = data.sample(cfg.samples)
        figures["H_2_steps"] = energy_coefficient(sample(ema, len(x), label, nfe=2), x)
    return figures


def call_levels(config, sigma_data):
    """Noise levels of the calls: sigma_max; then mid, mid / 2, ... in units of the data's std."""
    nfe, top, mid = config["nfe"], config["sigma_max"], config["mid"] * sigma_data
    need(nfe > 0 and 0 <= config["gamma"] <= 1, "--nfe must be at least 1, --gamma in [0, 1]")
    need(0 < mid < top, f"--mid times the data's std is {mid:.2g}, not between 0 and --sigma_max")
    return [top] + [max(mid * 0.5**k, config["sigma_min"]) for k in range(nfe - 1)]


@torch.no_grad()
def sample(student, n, label=None, z=None, nfe=None, mid=None, gamma=None):
    """n samples of z (n, ...), label (n, K); nfe, mid, gamma as those flags, default as trained."""
    given = dict(nfe=nfe, mid=mid, gamma=gamma)
    config = student.config | {name: v for name, v in given.items() if v is not None}
    device = next(student.parameters()).device
    need(label is None or student.label_dim, "this student is not class-conditional")
    label = draw_label(n, student, device) if label is None else label
    z = torch.randn(n, *student.shape, device=device) if z is None else z
    levels = call_levels(config, student.sigma_data)
    gamma = config["gamma"] if config["loss"] in SECOND else 1.0

    def calls(z, label):
        x = levels[0] * z
        for high, low in zip(levels, levels[1:] + [0.0]):
            t = level(x, high)
            s = level(x, low * (1 - gamma**2) ** 0.5)
            second = dict(ctm=s / t, meanflow=s / (1 + s)).get(config["loss"])
            x = student(x, t, label) if second is None else jump(student, x, t, s, label, second)
            x = x + gamma * low * torch.randn_like(x)
        return x
    return in_parts(calls, z, label, most=student.most)


if __name__ == "__main__":
    main(Config, PRESETS, train, sample)
