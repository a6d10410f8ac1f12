"""
Rectified flow from training to one step: flow, reflow, distillation, small students.

RF and reflow (Liu et al., arXiv 2209.03003), InstaFlow (2309.06380), SlimFlow (2407.12718), RF++
(2405.20320). Time t runs from NOISE at t = 0 to DATA at t = 1, as in all of these but RF++. On the
straight lines from noise z to data x a velocity is learnt; a sample is what its ODE makes of z:

    x_t = (1 - t) z + t x,   min E|v(x_t, t) - (x - z)|^2,   dx_t/dt = v(x_t, t)       (RF, Eq. 1)

Lines between the ODE's own pairs (z, x) hardly cross: *reflow* fits them, and paths become nearly
straight, one Euler step nearly exact. Every network is a denoiser, and exactly a velocity, since
x_t / t is x with noise of std (1 - t) / t. Below t = 1 / sigma_init the divisor stays that: one
Euler step from t = 0 is then D(sigma_init z, sigma_init), the five scripts' one-step generator.

    v(x_t, t) = (D(x_t / t, (1 - t) / t) - x_t) / (1 - t)

    flow     velocity from data and independent noise
    reflow   the same from pairs (z, ODE(z)) of the teacher, --rounds times
    distill  z + v(z, 0) = ODE(z), in 1 call or in K
    anneal   reflow into a small network, the noise slowly changed from fresh to the pairs'
    guided   distill, the annealed flow's two steps as further targets
    chain    = flow, reflow, distill
    slim     = anneal, guided

    python rectflow.py                          # ring of 8 Gaussians: a minute, H about 0.0001
    python rectflow.py --stage slim --teacher runs/rectflow-ring-0-flow
    python rectflow.py --data cifar10 --dtype bf16 --teacher edm-cifar10-32x32-uncond-vp.pkl

Differences from the papers and their code: 1. EDM's preconditioning and log-noise input instead of
999 t; t ends at 1 / (1 + sigma_min).  2. Pairs by EDM's Heun method, 35 calls, not RK45; 50,000 or
100,000 (RF advises a million, RF++ has 5 on ImageNet-64).  3. No LPIPS, by which all distil images:
mean square, or RF++'s pseudo-Huber without its factor 1 - t (t in our time), which beside LPIPS
only weighs, but alone leaves t = 0 unlearnt. RF distils at t = 1e-3, we at 0. InstaFlow's guidance
by text is absent.  4. SlimFlow's guide makes both steps, as in the paper, not in its code. Alone,
guided has its teacher as guide. anneal ends after 0.6 of the run.  5. Adam with betas (0.9, 0.99)
(papers: 0.999), no dropout (RF: 0.15) or clipping (RF: 1); the rate warms up over 2 % of the steps
(RF, RF++: 5000) and falls to 0 over the last half (papers: constant).  6. One EMA decay for all
stages, warmed up (RF's flow, SlimFlow: 0.999999).  7. Images: one GPU, 1 to 3 days a stage.
"""
import copy
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from common import (Run, Shared, begin, build, draw_label, energy_coefficient, gallery, in_parts,
                    initial_student, level, load_data, load_teacher, main, need, run_folder,
                    save_picture, set_lr, teacher_pairs, uniform, update_ema)


@dataclass(init=False)
class Config(Shared):
    steps: int = 1000           # of each stage
    batch: int = 512
    lr: float = 2e-3
    ema: float = 0.995
    sigma_max: float = 20.0
    sigma_init: float = 20.0
    stage: Literal["chain", "slim", "flow",     # chain: flow, reflow, distill; slim: anneal, guided
                   "reflow", "distill", "anneal", "guided"] = "chain"
    rounds: int = 1             # chain, reflow: how many reflows
    pairs: int = 50_000         # pairs (z, ODE(z)) of the teacher, made once, kept beside the runs
    t_law: Literal["uniform", "ushape"] = "uniform"     # reflow, anneal: law of t; ushape is RF++'s
    distance: Literal["l2", "huber"] = "l2"     # all but flow: mean square, or RF++'s pseudo-Huber
    steps_student: int = 1      # distill: network calls of the student
    shrink: float = 0.25        # anneal: parameters of the small student, as a share of --net's
    guide: float = 1.0          # guided: weight of the guide's targets


SMALL = dict(net="small", teacher_steps=2000, steps=1000, batch=32, accumulate=1, lr=1e-3,
             sigma_min=0.01, sigma_max=80.0, sigma_init=80.0, ema=0.999, pairs=2000, samples=5000)
LARGE = dict(flip=True, sigma_min=0.002, sigma_max=80.0, sigma_init=80.0, ema=0.9999, every=5000,
             samples=50_000)
PRESETS = {
    "images": dict(SMALL, stage="distill"), "mnist": dict(SMALL, cond=True, stage="distill"),
    # RF's batch, rate and steps of a reflow: 14 hours a stage. Pairs take 2.5 GB of memory
    "cifar10": dict(LARGE, net="ddpmpp", teacher_steps=100_000, steps=300_000, batch=128, lr=2e-4,
                    pairs=100_000),
    # RF++'s rate, law and distance: a day a stage (RF++: 700,000 steps of 2048). Pairs take 5 GB
    "imagenet64": dict(LARGE, net="adm", cond=True, steps=50_000, batch=256, accumulate=8, lr=1e-4,
                       t_law="ushape", distance="huber"),
    "cifar10 small": dict(SMALL, cond=True, stage="distill"),   # for a CPU: a chain takes longer
}
FINE = 100                      # Euler steps of a fine solution
ONE_STEP = ("distill", "guided")    # stages that train where the student is called, not anywhere

# ---- the method ----------------------------------------------------------------------------------


def velocity(D, x_t, t, label, sigma_init):
    """The denoiser D read as a velocity (B, ...) at x_t (B, ...), t (B, 1, ...) in [0, 1)."""
    s = t.clamp(min=1 / sigma_init)             # below, inputs stay finite: z becomes sigma_init z
    return (D(x_t / s, (1 - t) / s, label) - x_t) / (1 - t)


def pair_distance(a, b, kind):
    """Distance (B,) of a, b (B, ...): mean square, or RF++'s huber / dim (dmd.py: not divided)."""
    dim = a[0].numel()
    square = (a - b).square().flatten(1).sum(1)
    if kind == "l2":
        return square / dim
    c = 0.00054 * dim                           # of a whole sample's norm
    return ((square + c**2).sqrt() - c) / dim


def flow_loss(D, z, x, t, label, sigma_init, kind="l2"):
    """Loss (B,): the velocity at t on the line from z to x is to be its slope x - z (RF, Eq. 1). At
    t = 0 alone that is distilling: one Euler step from z is to end in x."""
    x_t = (1 - t) * z + t * x                                                       # t (B, 1, ...)
    return pair_distance(velocity(D, x_t, t, label, sigma_init), x - z, kind)


@torch.no_grad()
def guide_target(D, z, split, label, sigma_init):
    """The end of two Euler steps of D from z, the second at t = split (B, 1, ...) (SlimFlow)."""
    x_t = z + split * velocity(D, z, torch.zeros_like(split), label, sigma_init)
    return x_t + (1 - split) * velocity(D, x_t, split, label, sigma_init)


def draw_t(z, law, t_max, a=4):
    """Times (B, 1, ...) in [0, t_max]: uniform, or with RF++'s density e^(a t) + e^(a (1 - t))."""
    u = uniform(z)
    if law == "ushape":
        u = torch.log1p(u * math.expm1(a)) / a
        u = torch.where(uniform(z) < 0.5, u, 1 - u)
    return t_max * u


def anneal(z, progress, share=0.6):
    """Pairs' z with fresh noise mixed in: noise alone at first, none from share of the run on."""
    b = max(0.0, 1 - progress / share)
    return (1 - b**2) ** 0.5 * z + b * torch.randn_like(z)


@torch.no_grad()
def euler(D, z, label, times, sigma_init):
    """States (K + 1, B, ...) of Euler's method from z: K steps from times 0 = t_0 < ... on to 1."""
    path = [z]
    for t, t_next in zip(times, [*times[1:], 1.0]):
        v = velocity(D, path[-1], level(z, t).to(z.dtype), label, sigma_init)
        path.append(path[-1] + (t_next - t) * v)
    return torch.stack(path)


def even_times(calls):
    """The times of `calls` Euler steps of one length."""
    return [i / calls for i in range(calls)]


def straightness(path):
    """Mean square of velocity minus displacement on a path (K + 1, B, ...) of even steps (RF)."""
    return float((path.diff(dim=0) * (len(path) - 1) - (path[-1] - path[0])).square().mean())


# ---- training ------------------------------------------------------------------------------------


def train(cfg, data=None, teacher=None, student=None, on_log=None):
    """Distil as cfg says; what is passed in replaces what flags would load. -> (EMA, Run)"""
    taught = bool(cfg.teacher) or teacher is not None
    need(cfg.stage != "flow" or not taught, "--stage flow learns from data: omit --teacher")
    need(1 < cfg.sigma_init <= cfg.sigma_max, "--sigma_init must lie in (1, --sigma_max]")
    need(0 < cfg.shrink <= 1, f"--shrink is a share in (0, 1], not {cfg.shrink}")
    parts = split_stages(cfg, taught)
    for part in parts:
        begin(part, "rectflow")                         # refuse what cannot work before any work
    data = load_data(cfg, data)
    for i, part in enumerate(parts, 1):
        print(f"stage {i} of {len(parts)}: {part.stage}")
        begin(part, "rectflow")                         # its own seed and clock
        if i == 1 and part.stage != "flow":
            teacher = load_teacher(part, data, teacher)
        run = None                                      # frees the optimiser of the stage before
        ema, run = train_stage(part, data, teacher, student, on_log)
        student = copy.deepcopy(ema)
        if part.stage != "anneal":                      # guided takes the pairs that anneal took
            teacher = ema
    return ema, run


def split_stages(cfg, taught):
    """A Config for each stage of --stage: its name, its folder, its share of --minutes."""
    reflows = ["reflow"] + [f"reflow{k}" for k in range(2, cfg.rounds + 1)]
    plans = dict(chain=["flow", *reflows, "distill"], reflow=reflows, slim=["anneal", "guided"])
    names = plans.get(cfg.stage, [cfg.stage])
    if cfg.stage == "chain" and taught:
        names = names[1:]
    out = str(run_folder(cfg, "rectflow"))
    folders = [f"{out}-{name}" for name in names[:-1]] + [out]
    return [replace(cfg, stage=name.rstrip("0123456789"), out=folder,       # reflow2 is a reflow
                    minutes=cfg.minutes / len(names)) for name, folder in zip(names, folders)]


def train_stage(cfg, data, teacher, student, on_log):
    """One stage: fit a network to straight lines, or to where they end; returns (average, Run)."""
    if student is None and cfg.stage in ("flow", "anneal"):
        student = fresh_network(cfg, data)
    G = initial_student(cfg, data, teacher, student)
    # the levels of a student are times here
    G.levels = even_times(dict(flow=FINE, distill=cfg.steps_student).get(cfg.stage, 1))
    ema = copy.deepcopy(G).eval().requires_grad_(False)
    guide = copy.deepcopy(ema) if cfg.stage == "guided" else None       # the flow it starts from
    opt = torch.optim.Adam(G.parameters(), betas=(0.9, 0.99), fused=True)
    pairs = None if cfg.stage == "flow" else teacher_pairs(cfg, data, teacher, cfg.pairs)
    panels, z_show, label_show = gallery(cfg, data, teacher)
    run = Run(cfg, "rectflow", on_log, G=G, ema=ema, opt=opt)
    calls = min(len(G.levels), 20)                      # samples by 100 cost more than training
    kind = "l2" if pairs is None else cfg.distance

    for step in run.steps():
        set_lr(opt, cfg.lr, run.progress, warmup=0.02)
        for _ in range(cfg.accumulate):     # run.part: samples of one pass, batch / accumulate
            # 1. velocity against slope, anywhere on the lines or where the student is called
            z, label, x, t = draw_lines(cfg, data, pairs, run, G.levels)
            loss = flow_loss(G, z, x, t, label, cfg.sigma_init, kind).mean()
            terms = dict(flow=loss)
            # 2. the guide has lines of its own, from fresh noise
            if guide is not None:
                z = torch.randn_like(z)
                x = guide_target(guide, z, 0.2 + 0.6 * uniform(z), label, cfg.sigma_init)
                terms["guide"] = flow_loss(G, z, x, t, label, cfg.sigma_init, kind).mean()
                loss = loss + cfg.guide * terms["guide"]
            (loss / cfg.accumulate).backward()
        opt.step()
        opt.zero_grad()
        update_ema(ema, G, cfg.ema, step)
        run.log(**terms)
        if run.due():
            shown = sample(ema, len(z_show), label_show, z_show, calls)
            run.show({**panels, f"{cfg.stage}, network calls: {calls}": shown}, label_show, z_show)
    figures = {} if cfg.stage in ONE_STEP else compare(run, data, teacher, ema, z_show, label_show)
    run.report(data, lambda n, label: sample(ema, n, label, None, calls), **figures)
    return ema, run


def fresh_network(cfg, data):
    """A network of --net; for anneal the widest with at most --shrink of its parameters."""
    network = build(cfg, data)
    if cfg.stage == "flow":
        return network
    most = cfg.shrink * sum(p.numel() for p in network.parameters())
    width = int(network.net.spec["width"] * cfg.shrink**0.5) // 4 * 4   # nothing wider can fit
    while sum(p.numel() for p in network.parameters()) > most:
        need(width > 0, f"--shrink {cfg.shrink} leaves no network; take more")
        network = build(replace(cfg, width=width), data)
        width -= 4
    return network


def draw_lines(cfg, data, pairs, run, levels):
    """run.part lines: noise z, label, sample x, times t (B, 1, ...) by the stage's law."""
    if pairs is None:
        x, label = data.sample(run.part)
        z = torch.randn_like(x)
    else:
        i = torch.randint(len(pairs[0]), (run.part,), device=pairs[0].device)
        z, label, x = [t if t is None else t[i].to(run.device) for t in pairs]
    if cfg.flip and pairs and x.ndim == 4:              # a pair as one; data has its own
        mirror = uniform(x) < 0.5
        z = torch.where(mirror, z.flip(3), z)
        x = torch.where(mirror, x.flip(3), x)
    if cfg.stage == "anneal":
        z = anneal(z, run.progress)
    if cfg.stage in ONE_STEP:
        t = (uniform(z) * len(levels)).floor() / len(levels)            # levels are even times
    else:
        t = draw_t(z, "uniform" if pairs is None else cfg.t_law, 1 / (1 + cfg.sigma_min))
    return z, label, x, t


def compare(run, data, teacher, student, z, label):
    """{figure: [before the stage, after it]}: straightness, square distance from one Euler step to
    the ODE's end, on toys H of one step. Without a teacher, after alone. Draws trajectories.png."""
    found, paths = dict(straightness=[], one_step_error=[], one_step_H=[]), {}
    n, sigma_init = min(1000 if z.ndim == 2 else 16, run.part), run.cfg.sigma_init
    some = None if label is None else label[:n]
    for D in [student] if teacher is None else [teacher, student]:
        path = euler(D, z[:n], some, even_times(FINE), sigma_init)
        x = in_parts(lambda z, label: euler(D, z, label, [0.0], sigma_init)[-1], z, label,
                     most=run.part)
        found["straightness"].append(straightness(path))
        found["one_step_error"].append(float((x[:n] - path[-1]).square().mean()))
        if z.ndim == 2:
            found["one_step_H"].append(energy_coefficient(x, data.sample(len(x))[0]))
        paths["after" if D is student else "before"] = path
    draw_trajectories(run.dir / "trajectories.png", paths)
    return {name: [round(v, 5) for v in values] for name, values in found.items() if values}


def draw_trajectories(file, paths):
    """{title: states (K + 1, B, ...)} as lines from noise to samples; of images, rows of states."""
    if paths["after"].ndim > 3:
        k = torch.linspace(0, FINE, min(8, paths["after"].shape[1])).long()
        rows = {title: p[k, :len(k)].transpose(0, 1).flatten(0, 1) for title, p in paths.items()}
        return save_picture(file, rows, columns=len(k))
    from matplotlib.figure import Figure
    figure = Figure(figsize=(4.2 * len(paths), 4.4), layout="constrained")
    for ax, (title, p) in zip(figure.subplots(1, len(paths), squeeze=False)[0], paths.items()):
        p = p[:, :250].cpu().numpy()
        ax.plot(p[..., 0], p[..., 1], color="#0072b2", linewidth=0.5, alpha=0.5)
        ax.scatter(p[-1, :, 0], p[-1, :, 1], s=6, color="#d55e00", linewidths=0, zorder=3)
        ax.set(title=title, aspect="equal", xticks=[], yticks=[])
    figure.savefig(file, dpi=130)


@torch.no_grad()
def sample(student, n, label=None, z=None, calls=0):
    """n samples of z (n, ...), label (n, K) by Euler steps at student.levels, or `calls` even."""
    device = next(student.parameters()).device
    need(label is None or student.label_dim, "this student is not class-conditional")
    label = draw_label(n, student, device) if label is None else label
    z = torch.randn(n, *student.shape, device=device) if z is None else z
    times = even_times(calls) if calls else student.levels
    return in_parts(lambda z, label: euler(student, z, label, times, student.sigma_init)[-1],
                    z, label, most=student.most)


if __name__ == "__main__":
    main(Config, PRESETS, train, sample)
