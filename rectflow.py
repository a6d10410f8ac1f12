"""
Rectified flow from training to one step: flow, reflow, distillation, small students, step sizes, restoration.

RF and reflow (Liu et al., arXiv 2209.03003), InstaFlow (2309.06380), SlimFlow (2407.12718), BOSS (2312.16414),
AutoDiffusion (2309.10438), OFTSR (2412.09465), with RF++'s settings (2405.20320) as flags.

Time t runs from noise to data: t = 0 is NOISE, t = 1 is DATA, as in all these papers but RF++. On the straight line from
z to x a velocity is learnt, and a sample is what its ODE makes of noise:

    x_t = (1 - t) z + t x,     min E|v(x_t, t) - (x - z)|^2,     dx_t/dt = v(x_t, t)                    (RF Eq. 1)

Every network is a denoiser, its velocity an exact re-reading: x_t / t is x with noise of std sigma = (1 - t) / t, so

    v(x_t, t) = (D(x_t / t, (1 - t) / t) - x_t) / (1 - t)

At the noise end sigma is infinite. For t < 1 / sigma_init the divisor t stays 1 / sigma_init: pure noise z is read as
D(sigma_init z, sigma_init), as EDM does. For a network trained here that is merely how the inputs are coded; a teacher
trained elsewhere is off there by what sigma_init leaves of the data. One Euler step, z + v(z, 0), is then the project's
one-step generator D(sigma_init z, sigma_init), and the ema.pt of flow and reflow is a --teacher for every script.

--stage chain is flow, reflow, distill, one folder each; with --teacher it starts at reflow.
  flow     velocity from data and independent noise                       reflow   the same from pairs (z, ODE(z)), --rounds times
  distill  D(sigma_init z, sigma_init) = ODE(z) in 1 call, or in K        slim     a small student: anneal, then guided
  steps    best times for K calls, without data: BOSS and a search        restore  clean from noisy or downsampled in one call
  anneal, guided: the halves of slim: reflow into a small network, its noise slowly changed from fresh to the pairs', and then
  distill with the small network's own two-step solutions of fresh noise as further targets

Differences from the papers and their code: 1. EDM's preconditioning and log-noise input, no time in 0..999.  2. Pairs by
EDM's Heun method, 35 calls, instead of RK45.  3. No LPIPS: L2 or RF++'s pseudo-Huber.  4. SlimFlow guides by the paper's two
teacher steps with a random split; its code lets the student make the first.  5. AutoDiffusion's fitness is H against the
teacher's fine samples, where it takes FID; no layers are skipped.  6. OFTSR's student reads its input x_0 / (1 - t) at
noise level / (1 - t), which makes it the posterior mean at t = 0 from the start; the teacher sees x_t alone, not the
input beside it. For noisy input any denoiser is the teacher as it stands.  7. Adam with betas (0.9, 0.99), no dropout, no
clipping, constant EMA decay; the learning rate falls to 0 over the last half.

What to expect on the ring (seed 0): one Euler step has H 0.34 before and 0.0002 after one reflow. Distilling the reflowed flow
is ahead of distilling the curved one while updates are few (50: H 0.0001 against 0.0021), not after 1200 (ring: 0.00007
both; moons: 0.00020 against 0.00011): a map of the plane is learnt either way. Times are CPU seconds of a busy machine, with
the measurement:

    python rectflow.py                                              # ring of 8 Gaussians, the chain: 65 s, H 0.00007
    python rectflow.py --stage slim --teacher runs/rectflow-ring-0-flow     # a quarter of the parameters: 33 s
    python rectflow.py --stage steps                                # times for 2 to 8 calls, by two methods: 28 s
    python rectflow.py --stage restore --level 0.5                  # error 0.141, H 0.0099 at t = 0 to 0.158, 0.0001 at 0.99: 33 s
    python rectflow.py --data cifar10 --dtype bf16                  # full size: not yet run
"""
import hashlib
import json
import math
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import (EMA, TOYS, Denoiser, Run, Shared, UserError, bcast, build, denoising_loss, duration, energy_coefficient, gallery, heun_sample,
                    initial_student, load_data, load_teacher, lr_factor, main, micro_batches, one_first, place, report, save_picture, set_lr,
                    write_atomically)


@dataclass
class Config(Shared):
    steps: int = 1200
    batch: int = 512
    lr: float = 2e-3
    ema: float = 0.995
    sigma_max: float = 20.0
    sigma_init: float = 20.0
    stage: str = "chain"        # chain | flow | reflow | distill | slim | anneal | guided | steps | restore: chain is flow, reflow, distill; slim is anneal, guided
    rounds: int = 1             # reflow: how often
    pairs: int = 50000          # pairs (z, ODE(z)) of the teacher, made once and kept in runs/
    t_law: str = "uniform"      # uniform | ushape: reflow, anneal: law of t; RF++ looks more often at both ends
    distance: str = "l2"        # l2 | huber: reflow, distill, slim: distance, l2 or RF++'s pseudo-Huber
    steps_student: int = 1      # distill: network calls of the student; steps: calls to find times for (1: takes 4)
    times: str = ""             # distill: times of these calls, such as 0,0.3; by default uniform
    shrink: float = 0.25        # anneal: parameters of the small student, as a share of the teacher's
    guide: float = 1.0          # guided: weight of the flow-guided loss
    large: str = ""             # guided: whose pairs to distil, named as --teacher is; slim takes those of anneal again
    straighten: bool = False    # steps: train the network to go straight between the times found
    level: float = 0.5          # restore: std of the noise in the input
    down: int = 1               # restore: the input is averaged over this many neighbours first (toys: 2, the coordinates)


PRESETS = {
    **{name: {} for name in TOYS},
    # RectifiedFlow's CIFAR-10 settings, batch 128; 100,000 pairs rather than a million, they are kept in memory; not yet run
    "cifar10": dict(net="ddpmpp", steps=300_000, batch=128, lr=2e-4, ema=0.9999, pairs=100_000, sigma_min=0.002, sigma_max=80.0,
                    sigma_init=80.0, teacher_steps=100_000, every=10_000, samples=50_000, level=0.2),
    # Batch, rate and steps of RF++ for ImageNet-64, which takes 5 million pairs: 50,000 fill 5 GB of memory here. Not yet run.
    "imagenet64": dict(net="adm", cond=True, steps=700_000, batch=2048, micro=32, lr=1e-4, ema=0.9999, pairs=50_000, t_law="ushape",
                       distance="huber", sigma_min=0.002, sigma_max=80.0, sigma_init=80.0, every=10_000, samples=50_000, level=0.2),
}
FINE = 120                                          # Euler steps of a fine solution, BOSS's grid: 2 to 6 and 8 calls divide it

# ---- the method ------------------------------------------------------------------------------------------------------


def velocity(D, x_t, t, label, sigma_init):
    """The velocity (B, ...) at x_t (B, ...), t (B,) in [0, 1), that is the same thing as the denoiser D."""
    s = t.clamp(min=1 / sigma_init)                 # below, inputs stay finite: x_0 = z becomes sigma_init z
    return (D(x_t / bcast(s, x_t), (1 - t) / s, label) - x_t) / bcast(1 - t, x_t)


def pair_distance(a, b, kind):
    """Distance (B,) of a and b (B, ...): mean square, or pseudo-Huber with RF++'s c, 0.00054 times the dimension."""
    square, dim = (a - b).square().flatten(1).sum(1), a[0].numel()
    return square / dim if kind == "l2" else ((square + (0.00054 * dim) ** 2).sqrt() - 0.00054 * dim) / dim


def flow_loss(D, z, x, t, label, sigma_init, kind="l2"):
    """Velocity on the line from z to x against its slope, (B,) (RF Eq. 1). At t = 0 it is |D(sigma_init z) - x|: distillation."""
    x_t = bcast(1 - t, x) * z + bcast(t, x) * x
    return pair_distance(velocity(D, x_t, t, label, sigma_init), x - z, kind)


def guide_loss(D, teacher, z, split, label, sigma_init, kind="l2"):
    """One step from fresh noise z against two of the teacher's, divided at t = split (B,): pairs without a solver, (B,) (SlimFlow)."""
    x = euler(teacher, z, label, [0, split, 1], sigma_init)[-1]
    return flow_loss(D, z, x, torch.zeros_like(split), label, sigma_init, kind)


def draw_t(n, law, t_max, device, a=4):
    """n times in [0, t_max]: uniform, or RF++'s U shape with density e^(a t) + e^(a (1 - t))."""
    u = torch.rand(n, device=device)
    if law == "ushape":
        u = torch.log1p(u * math.expm1(a)) / a
        u = torch.where(torch.rand(n, device=device) < 0.5, u, 1 - u)
    return t_max * u


def anneal(z, progress, share=0.6):
    """The pair's noise replaced by fresh noise at first, then less and less, not at all after `share` of the training (SlimFlow)."""
    b = max(0.0, 1 - progress / share)
    return (1 - b**2) ** 0.5 * z + b * torch.randn_like(z)


@torch.no_grad()
def euler(D, z, label, times, sigma_init):
    """States (K + 1, B, ...) of Euler's method from z at times[0] = 0 to times[-1] = 1; a time may be a number or (B,)."""
    path = [z]
    for t, t_next in pairwise(torch.as_tensor(s, dtype=z.dtype, device=z.device).expand(len(z)) for s in times):
        path.append(path[-1] + bcast(t_next - t, z) * velocity(D, path[-1], t, label, sigma_init))
    return torch.stack(path)


def straightness(path):
    """Mean square of velocity minus end-to-end displacement along a uniform path (K + 1, B, ...): 0 if straight (RF)."""
    return float((path.diff(dim=0) * (len(path) - 1) - (path[-1] - path[0])).square().mean())


def boss_costs(path):
    """c (N + 1, N + 1): mean square error of one Euler step from state i of a path on uniform times to state j > i (BOSS)."""
    n = len(path) - 1
    c = path.new_full((n + 1, n + 1), math.inf)
    for i in range(n):
        step = torch.arange(1, n - i + 1, device=path.device)       # the slope is that of the fine step at i
        c[i, i + 1:] = (path[i] + bcast(step, path) * (path[i + 1] - path[i]) - path[i + 1:]).square().flatten(1).mean(1)
    return c


def boss_knots(c, calls):
    """Indices 0 = k_0 < ... < k_calls = N with the least sum of costs, by dynamic programming (BOSS)."""
    best, back = c[:, -1], []                       # best[i]: from i to the end in one step
    for _ in range(calls - 1):
        best, to = (c + best).min(1)                # one step more: to j, then on
        back.append(to.tolist())
    knots = [0]
    for to in reversed(back):
        knots.append(to[knots[-1]])
    return knots + [len(c) - 1]


def search_knots(fitness, calls, generations=8, population=24, top=6):
    """
    Indices as of boss_knots with a low fitness(knots), by evolution (AutoDiffusion): the best `top` so far are crossed
    and mutated, the rest is drawn anew. The first generation has the uniform knots, so the result is never less fit.
    """
    n, size = FINE, calls - 1
    choose = lambda pool, k: [pool[i] for i in torch.randperm(len(pool))[:k].tolist()]
    fresh = lambda: tuple(sorted(choose(range(1, n), size)))
    scores, crowd = {}, [tuple(uniform_knots(calls)[1:-1])] + [fresh() for _ in range(population - 1)]
    for _ in range(generations):
        for genes in crowd:
            scores.setdefault(genes, fitness([0, *genes, n]))
        parents = sorted(scores, key=scores.get)[:top]
        crowd = []
        for _ in range(population):
            a, b = choose(parents, 2) if len(parents) > 1 else parents * 2
            pick, move = torch.rand(size) < 0.5, torch.rand(size) < 0.5
            child = [x if p else y for x, y, p in zip(a, b, pick)]                                          # crossover
            child = [g + int(torch.randint(-5, 6, ())) if m else g for g, m in zip(child, move)]            # mutation
            child = tuple(sorted({min(max(g, 1), n - 1) for g in child}))
            crowd.append(child if len(child) == size else fresh())
    return [0, *min(scores, key=scores.get), n]


def uniform_knots(calls):
    """What these compete with: evenly spaced indices."""
    return [round(FINE * i / calls) for i in range(calls + 1)]


def degrade(x, level, down, noise):
    """What restoration starts from: x (B, ...) averaged over blocks of `down` neighbours, plus level * noise."""
    if down > 1:
        flat = x[:, None] if x.ndim == 2 else x
        pool, factor = (F.avg_pool1d, 1) if x.ndim == 2 else (F.avg_pool2d, 2)
        x = F.interpolate(pool(flat, down), scale_factor=float(down), mode="nearest").reshape(x.shape)
    return x + level * noise


def bridge_velocity(D, x_t, t, label, level):
    """Velocity of the line x_t = (1 - t) x_0 + t x from a degraded x_0 to x: its noise has std (1 - t) level."""
    return (D(x_t, (1 - t) * level, label) - x_t) / bcast(1 - t, x_t)


def restored(G, x_0, t, label, level):
    """x_0 + phi(x_0, t): one call, phi the mean velocity over [0, t]. The level / (1 - t) tells the network t."""
    return G(x_0 / bcast(1 - t, x_0), level / (1 - t), label)


def oftsr_loss(G, D, x_0, t, label, level, step=0.05, t_max=0.99):
    """
    Loss (B,) that makes x_t = x_0 + t phi(x_0, t) follow D's ODE (OFTSR): from t to s = t + step by the midpoint
    rule; the first velocity is D's; and the velocity at x_t, lightly. phi_s = phi_t + (s - t) / s (v - phi_t) is exact.
    """
    phi = lambda t: restored(G, x_0, t, label, level) - x_0
    mean = lambda e: e.square().flatten(1).mean(1)
    s, zero = (t + step).clamp(max=t_max), torch.zeros_like(t)
    phi_t = phi(t)
    with torch.no_grad():
        x_t, h = x_0 + bcast(t, x_0) * phi_t, bcast(s - t, x_0)
        v = bridge_velocity(D, x_t, t, label, level)
        middle = bridge_velocity(D, x_t + h / 2 * v, (t + s) / 2, label, level)
        target = phi_t + h / bcast(s, x_0) * (middle - phi_t)
        v_first = bridge_velocity(D, x_0, zero, label, level)
    return mean(phi(s) - target) + 0.1 * mean(phi(zero) - v_first) + 0.01 * (1 - t) ** 2 * mean(phi_t - v)


# ---- training --------------------------------------------------------------------------------------------------------


def teacher_pairs(cfg, teacher, data, device, part=1000):
    """
    --pairs of (z, label, x): x what the teacher's ODE makes of sigma_init z by Heun's method. Kept in runs/ under a key of the
    teacher's weights and all settings, which each file repeats, `part` pairs a file: an interrupted call goes on where it stopped.
    """
    settings = dict(data=cfg.data, cond=cfg.cond, dtype=cfg.dtype, sigmas=[cfg.sigma_min, cfg.sigma_init], steps=18, part=part,
                    pairs=cfg.pairs, teacher=[type(teacher).__name__, getattr(teacher, "std", 0), teacher.sigma_data])
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, value in teacher.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    key = digest.hexdigest()[:12]
    folder, parts = Path(f"runs/flowpairs-{cfg.data}-{key}"), []
    for i in tqdm(range(0, cfg.pairs, part), desc="pairs"):
        path, n = folder / f"{i:07d}.pt", min(part, cfg.pairs - i)
        if not path.exists():
            with torch.random.fork_rng([device] if device.type == "cuda" else []):      # the caller's draws stay the same
                torch.manual_seed(i)
                z, label = torch.randn(n, *data.shape, device=device), data.draw_label(n)
            x = torch.cat([heun_sample(teacher, z, label, 18, cfg.sigma_min, cfg.sigma_init)
                           for z, label in micro_batches(cfg.micro or 1000, z, label)])
            label = z.new_zeros(n, 0) if label is None else label
            made = dict(key=key, first=i, pair=[t.cpu() for t in (z, label, x)])
            write_atomically(path, lambda f: torch.save(made, f))
        try:
            saved = torch.load(path, weights_only=True)
            mine, pair = (saved["key"], saved["first"]) == (key, i), saved["pair"]
            parts.append(pair)
        except Exception as e:      # whatever torch.load meets in a damaged file
            raise UserError(f"{path} is damaged ({type(e).__name__}); delete it and run again")
        if not mine:
            raise UserError(f"{path} holds pairs of another teacher or place; delete it and run again")
    z, label, x = (torch.cat(t) for t in zip(*parts))
    return z, label if label.shape[1] else None, x


def draw_pairs(pairs, n, device):
    """n of the pairs at random, z and x of an image flipped together half of the time."""
    pick = torch.randint(len(pairs[0]), (n,))
    z, label, x = (t if t is None else t[pick].to(device) for t in pairs)
    if x.ndim == 4:
        flip = torch.rand(n, 1, 1, 1, device=device) < 0.5
        z, x = torch.where(flip, z.flip(3), z), torch.where(flip, x.flip(3), x)
    return z, label, x


def small_network(cfg, like):
    """A fresh network of the same kind as `like`, the widest with at most --shrink of its parameters."""
    size = lambda net: sum(p.numel() for p in net.parameters())
    for width in range(like.net.spec["width"], 0, -4):
        spec = dict(like.net.spec, width=width)
        with torch.device("meta"):
            if size(type(like.net)(**spec)) > cfg.shrink * size(like):
                continue
        return place(Denoiser(type(like.net)(**spec), like.sigma_data, cfg.dtype), cfg)
    raise UserError(f"--shrink {cfg.shrink} leaves no network; take more")


def validate(cfg):
    """Raise UserError for flags that this script cannot work with."""
    try:
        times = [float(t) for t in cfg.times.split(",")] if cfg.times else [0.0]
    except ValueError:
        times = [math.nan]
    width = 2 if cfg.data in TOYS else 32
    for bad, sentence in (
        (cfg.stage == "flow" and cfg.teacher, "--stage flow learns from data alone: leave --teacher away, or choose another --stage"),
        (min(cfg.rounds, cfg.pairs, cfg.steps_student) < 1, "--rounds, --pairs and --steps_student must be at least 1"),
        (not cfg.sigma_min < cfg.sigma_init <= cfg.sigma_max,
         f"--sigma_init {cfg.sigma_init} must lie above --sigma_min and not above --sigma_max {cfg.sigma_max}"),
        (not 0 < cfg.shrink <= 1, f"--shrink is a share in (0, 1], not {cfg.shrink}"),
        (not 0 <= cfg.guide < math.inf, f"--guide is a weight of at least 0, not {cfg.guide}"),
        (times != sorted(set(times)) or times[0] != 0 or not times[-1] < 1,
         f"--times must rise from 0 and stay below 1, like 0,0.3,0.6, not {cfg.times}"),
        (cfg.times and len(times) != cfg.steps_student, f"--times has {len(times)} times, --steps_student {cfg.steps_student} calls"),
        (cfg.stage == "steps" and cfg.pairs < 2, "--stage steps needs at least 2 --pairs: it compares sets of samples"),
        (cfg.stage == "steps" and cfg.steps_student > 8, "--stage steps looks at 2 to 8 calls"),
        (cfg.stage == "restore" and not cfg.sigma_min < cfg.level <= cfg.sigma_max,
         f"--level {cfg.level} must lie between --sigma_min and --sigma_max"),
        (cfg.stage == "restore" and (cfg.down < 1 or width % cfg.down), f"--down {cfg.down} does not divide {width}"),
    ):
        if bad:
            raise UserError(sentence)


def train(cfg):
    """Run --stage, or the stages it consists of one after the other; returns the last averaged network and its Run."""
    validate(cfg)
    plan = dict(chain=["flow"] * (not cfg.teacher) + ["reflow"] * cfg.rounds + ["distill"], reflow=["reflow"] * cfg.rounds,
                slim=["anneal", "guided"]).get(cfg.stage, [cfg.stage])
    out = cfg.out or f"runs/rectflow-{cfg.data}-{cfg.seed}" + f"-{cfg.stage}" * (cfg.stage != "chain")
    teacher, budget = cfg.teacher, f"{duration(cfg.budget) / len(plan):.2f}s" if cfg.budget else ""
    for i, stage in enumerate(plan):
        number = str(plan[:i + 1].count(stage)) * (plan.count(stage) > 1)
        part = replace(cfg, stage=stage, teacher=teacher, budget=budget, out=out if i == len(plan) - 1 else f"{out}-{stage}{number}",
                       large=cfg.teacher if cfg.stage == "slim" else cfg.large)
        student, run = dict(steps=find_steps, restore=train_restore).get(stage, train_flow)(part)
        teacher = part.out                          # the next stage's teacher
    return student, run


def train_flow(cfg):
    """flow, reflow, distill, anneal and guided: a network fitted to the velocity of straight lines, or to where they begin."""
    stage, data = cfg.stage, load_data(cfg)
    teacher = None if stage == "flow" else load_teacher(cfg, data)
    run = Run(cfg, "rectflow", teacher is not None)
    G = initial_student(cfg, teacher, data) if teacher else build(cfg, data.shape, data.label_dim, data.sigma_data)
    G = small_network(cfg, G) if stage == "anneal" else G
    one_step, straight = stage in ("distill", "guided"), stage in ("reflow", "anneal")
    calls = cfg.steps_student if one_step else 1 if straight else FINE
    run.cfg = replace(cfg, steps_student=calls, times=cfg.times if one_step else "")            # what ema.pt is drawn with
    G.sigma_init, G.times = cfg.sigma_init, run.cfg.times
    ema, opt = EMA(G, cfg.ema), torch.optim.Adam(G.parameters(), betas=(0.9, 0.99), fused=True)
    panels, z_show, label_show = gallery(cfg, data, teacher)
    large = load_teacher(replace(cfg, teacher=cfg.large), data) if stage == "guided" else teacher
    pairs = one_first(teacher_pairs, cfg, large, data, run.device) if teacher else None
    knots = torch.tensor(call_times(G, calls)[:-1], device=run.device)
    micro, law, kind = run.micro, cfg.t_law if straight else "uniform", cfg.distance if pairs else "l2"

    for step in run.steps(dict(G=G, ema=ema, opt=opt)):
        set_lr(opt, cfg.lr * lr_factor(run.progress))

        # 1. the two ends of the lines: independent, or a pair of the teacher's
        if pairs:
            z, label, x = draw_pairs(pairs, cfg.batch, run.device)
            z = anneal(z, run.progress) if stage == "anneal" else z
        else:
            x, label = data.sample(cfg.batch)
            z = torch.randn_like(x)

        # 2. where on them: anywhere, or where a student is called; a guide makes lines of its own from fresh noise
        t = knots[torch.randint(calls, (cfg.batch,))] if one_step else draw_t(cfg.batch, law, 1 / (1 + cfg.sigma_min), run.device)
        fresh, split = (torch.randn_like(z), 0.2 + 0.6 * torch.rand_like(t)) if stage == "guided" else (None, None)

        # 3. velocity against slope
        for z, label, x, t, fresh, split in run.parts(z, label, x, t, fresh, split):
            losses = dict(flow=flow_loss(G, z, x, t, label, cfg.sigma_init, kind).mean())
            if stage == "guided":
                losses.update(guide=guide_loss(G, teacher, fresh, split, label, cfg.sigma_init, kind).mean())
            ((losses["flow"] + cfg.guide * losses.get("guide", 0)) * micro / cfg.batch).backward()
        run.add_gradients(opt)
        opt.step()
        opt.zero_grad()
        ema.update(G)

        run.log(**losses)
        if run.due():
            name = f"{stage}, {calls} network call{'s' * (calls > 1)}"
            run.show({**panels, name: sample(ema.model, len(z_show), label_show, calls, z=z_show)})
    more = {} if one_step else compare(run, data, teacher, ema.model, z_show, label_show)
    report(run, data, teacher, lambda n, label: sample(ema.model, n, label, calls), **more)
    return ema.model, run


def compare(run, data, teacher, student, z, label):
    """Straightness, H (toys) of one Euler step and its squared distance to the ODE's end, before and after; trajectories.png."""
    cfg, out, pictures = run.cfg, {}, {}
    if cfg.data not in TOYS:
        z, label = z[:16], label if label is None else label[:16]
    for name, D in dict(before=teacher, after=student).items():
        if D is not None:
            few = (z[:1000], label if label is None else label[:1000])              # 120 calls are dear
            path, one = (euler(D, *some, call_times(None, n), cfg.sigma_init) for n, some in ((FINE, few), (1, (z, label))))
            out[f"straightness_{name}"] = straightness(path)
            out[f"one_step_error_{name}"] = float((one[-1][:1000] - path[-1]).square().mean())
            if cfg.data in TOYS:
                out[f"H_one_step_{name}"] = energy_coefficient(one[-1], data.sample(len(z))[0])
            pictures[f"{name}: straightness {out[f'straightness_{name}']:.3g}"] = path
    draw_trajectories(run.dir / "trajectories.png", pictures)
    for k in [k.removesuffix("_after") for k in out if k.endswith("_after")]:
        print(f"{k}: " + " -> ".join(f"{out[f'{k}_{name}']:.5f}" for name in ("before", "after") if f"{k}_{name}" in out))
    return out


def draw_trajectories(path, pictures):
    """{title: states (K + 1, B, ...)} as lines from grey noise to blue samples; images as rows from noise to sample."""
    if next(iter(pictures.values())).ndim > 3:
        rows = {title: p[torch.linspace(0, len(p) - 1, 8).long(), :8].transpose(0, 1).flatten(0, 1) for title, p in pictures.items()}
        return save_picture(path, rows)
    from matplotlib.figure import Figure
    figure = Figure(figsize=(4.2 * len(pictures), 4.4), layout="constrained")
    for ax, (title, p) in zip(figure.subplots(1, len(pictures), squeeze=False)[0], pictures.items()):
        p = p[:, :250].cpu().numpy()
        ax.plot(p[..., 0], p[..., 1], color="#0072b2", linewidth=0.5, alpha=0.5)
        ax.scatter(*p[0].T, s=4, color="#999999", linewidths=0)
        ax.scatter(*p[-1].T, s=6, color="#d55e00", linewidths=0, zorder=3)
        ax.set(xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), aspect="equal", xticks=[], yticks=[])
        ax.set_title(title, fontsize=9)
    write_atomically(path, lambda f: figure.savefig(f, format="png", dpi=130))


def find_steps(cfg):
    """steps: times for 2 to 8 Euler steps of the teacher's ODE, from its own samples alone; --straighten trains for one choice."""
    data = load_data(cfg)
    teacher = load_teacher(cfg, data)
    run, calls = Run(cfg, "rectflow"), cfg.steps_student if cfg.steps_student > 1 else 4
    run.cfg, device = replace(cfg, steps_student=calls), run.device                      # by which its FID is named
    noise = lambda n: (torch.randn(n, *data.shape, device=device), data.draw_label(n))
    solve = lambda D, start, knots: torch.cat([euler(D, *part, [k / FINE for k in knots], cfg.sigma_init)
                                               for part in micro_batches(cfg.micro or 1000, *start)], 1)

    # 1. the teacher's fine solutions: one set to search on, one to judge by
    start, test = noise(min(cfg.pairs, 5000)), noise(min(cfg.pairs, 5000))              # as many as BOSS takes
    path = solve(teacher, test, range(FINE + 1))
    fresh, end = boss_costs(path[:, :1000]), path[-1].clone()
    path = solve(teacher, start, range(FINE + 1))
    few = tuple(a if a is None else a[:500] for a in start)                             # enough for the search
    costs, goal = boss_costs(path[:, :1000]), path[-1, -500:].flatten(1)

    def judge(D, found):
        x = solve(D, test, found)[-1]
        return dict(error=float((x - end).square().mean()), H_to_teacher=energy_coefficient(x.flatten(1), end.flatten(1)))

    # 2. knots by dynamic programming and by evolution, beside uniform ones
    knots, judged = {}, {}
    for k in range(2, 9):
        fitness = lambda found: energy_coefficient(solve(teacher, few, found)[-1].flatten(1), goal)
        for name, found in dict(uniform=uniform_knots(k), boss=boss_knots(costs, k), search=search_knots(fitness, k)).items():
            along = float(sum(fresh[i, j] for i, j in pairwise(found)))                 # what BOSS minimises, on fresh paths
            knots[name, k], judged[name, k] = found, dict(path_error=along, **judge(teacher, found))
        print(f"{k} calls, error along the path, at its end, and H: "
              + "; ".join(f"{n} {', '.join(f'{e:.5f}' for e in v.values())}" for (n, m), v in judged.items() if m == k))
    draw_knots(run.dir / "steps.png", knots, judged)

    # 3. samples with these calls, of the teacher or of a network straightened between them
    best, student = knots["boss", calls], teacher
    if cfg.straighten:
        student = straighten(run, teacher, data, path[best], start[1], [k / FINE for k in best])
        judged["straightened", calls] = judge(student, best)
        print("{} calls, straightened: error at the end {error:.5f}, H {H_to_teacher:.5f}".format(calls, **judged["straightened", calls]))
    panels, z, label = gallery(cfg, data, teacher)
    run.show({**panels, f"{calls} uniform calls": solve(teacher, (z, label), uniform_knots(calls))[-1],
              f"BOSS's {calls} calls" + ", straightened" * cfg.straighten: solve(student, (z, label), best)[-1]})
    report(run, data, teacher, lambda n, label: solve(student, (noise(n)[0], label), best)[-1],
           **{f"knots_{name}_{k}": v for (name, k), v in knots.items()},
           **{f"{what}_{name}_{k}": v for (name, k), figures in judged.items() for what, v in figures.items()})
    return student, run


def straighten(run, teacher, data, path, label, times):
    """The teacher trained to go straight from knot to knot of its own solutions path (K + 1, n, ...) (BOSS); returns the average."""
    cfg, calls, device = run.cfg, len(times) - 1, run.device
    G, start = initial_student(cfg, teacher, data), torch.tensor(times, device=device)
    slopes = path.diff(dim=0) / bcast(start.diff(), path)
    G.sigma_init, G.times = cfg.sigma_init, ",".join(f"{t:.6g}" for t in times[:-1])
    run.cfg = replace(cfg, steps_student=calls, times=G.times)                          # what ema.pt is drawn with
    ema, opt = EMA(G, cfg.ema), torch.optim.Adam(G.parameters(), betas=(0.9, 0.99), fused=True)
    micro = run.micro
    for step in run.steps(dict(G=G, ema=ema, opt=opt)):
        set_lr(opt, cfg.lr * lr_factor(run.progress))
        i, who = (torch.randint(n, (cfg.batch,), device=device) for n in (calls, path.shape[1]))
        for x, t, slope, y in run.parts(path[i, who], start[i], slopes[i, who], None if label is None else label[who]):
            loss = pair_distance(velocity(G, x, t, y, cfg.sigma_init), slope, "l2").mean()
            (loss * micro / cfg.batch).backward()
        run.add_gradients(opt)
        opt.step()
        opt.zero_grad()
        ema.update(G)
        run.log(straighten=loss)
    return ema.model


def draw_knots(path, knots, judged):
    """Picture of find_steps's result: where the calls are, and the error they leave."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for row, (name, colour) in enumerate(dict(uniform="#999999", boss="#0072b2", search="#d55e00").items()):
        for (_, k), found in ((key, found) for key, found in knots.items() if key[0] == name):
            left.plot([i / FINE for i in found[:-1]], [k + 0.2 * (row - 1)] * k, "o", markersize=3, color=colour)
        right.semilogy(range(2, 9), [judged[name, k]["error"] for k in range(2, 9)], "o-", markersize=3, color=colour, label=name)
    left.set(xlabel="t of the calls (0: noise, 1: data)", ylabel="calls")
    right.set(xlabel="calls", ylabel="squared error of the end point")
    right.legend()
    write_atomically(path, lambda f: figure.savefig(f, format="png", dpi=130))


def train_restore(cfg):
    """restore: a one-step student whose t sets fidelity (0) against realism (1), from the flow between input and clean sample."""
    data = load_data(cfg)
    teacher = load_teacher(cfg, data)
    run = Run(cfg, "rectflow")
    G, D = initial_student(cfg, teacher, data), initial_student(cfg, teacher, data) if cfg.down > 1 else teacher
    G.sigma_init = None                             # no generator: --sample refuses it
    ema, opt = EMA(G, cfg.ema), torch.optim.Adam(G.parameters(), betas=(0.9, 0.99), fused=True)
    state = dict(G=G, ema=ema, opt=opt)
    if cfg.down > 1:            # its input has lost more than noise covers: the teacher is no denoiser for that yet
        opt_D = torch.optim.Adam(D.parameters(), betas=(0.9, 0.99), fused=True)
        state.update(D=D, opt_D=opt_D)
    micro, levels = run.micro, (0.0, 0.25, 0.5, 0.75, 0.99)

    def draw(n):                                    # clean, label, input
        x, label = data.sample(n)
        return x, label, degrade(x, cfg.level, cfg.down, torch.randn_like(x))
    call = lambda x_0, label, t: torch.cat([restored(ema.model, *part, cfg.level) for part in (
        (x, torch.full_like(x.flatten(1)[:, 0], t), y) for x, y in micro_batches(1000, x_0, label))])
    x_show, label_show, show = draw(len(gallery(cfg, data, None)[1]))

    for step in run.steps(state):
        factor = lr_factor(run.progress)
        set_lr(opt, cfg.lr * factor)
        x, label, x_0 = draw(cfg.batch)
        t = torch.rand(cfg.batch, device=run.device)

        # 1. downsampled input: fit the flow from input to clean sample, all along
        losses = {}
        if cfg.down > 1:
            set_lr(opt_D, cfg.lr * factor)
            for clean, y, start, u in run.parts(x, label, x_0, t * (1 - cfg.sigma_min / cfg.level)):
                sigma, x_t = (1 - u) * cfg.level, bcast(1 - u, x) * start + bcast(u, x) * clean
                losses.update(flow=denoising_loss(D(x_t, sigma, y), clean, sigma, data.sigma_data).mean())
                (losses["flow"] * micro / cfg.batch).backward()
            run.add_gradients(opt_D)
            opt_D.step()
            opt_D.zero_grad()

        # 2. the student follows that flow
        for start, label, u in run.parts(x_0, label, 0.01 + 0.98 * t):
            losses.update(oftsr=oftsr_loss(G, D, start, u, label, cfg.level).mean())
            (losses["oftsr"] * micro / cfg.batch).backward()
        run.add_gradients(opt)
        opt.step()
        opt.zero_grad()
        ema.update(G)

        run.log(**losses)
        if run.due():
            with torch.no_grad():
                run.show({"clean": x_show, "input": show, **{f"restored, t = {t}": call(show, label_show, t) for t in levels[::2]}})

    # 3. the trade-off: error of each sample against distance of all to the data
    with torch.no_grad():
        x, label, x_0 = draw(min(cfg.samples, 10_000 if cfg.data in TOYS else 500))
        y, curve = data.sample(len(x))[0].flatten(1), {}
        for t in levels:
            r = call(x_0, label, t)
            curve |= {f"error_t{t}": float((r - x).square().mean()), f"H_t{t}": energy_coefficient(r.flatten(1), y)}
            print(f"t {t}: error {curve[f'error_t{t}']:.5f}, H {curve[f'H_t{t}']:.5f}")

        def realistic(n, _):
            _, label, x_0 = draw(n)
            return call(x_0, label, levels[-1])
        report(run, data, teacher, realistic, **curve)
    return ema.model, run


def call_times(G, calls):
    """Times (calls + 1,) of Euler's method from 0 to 1: those G was made for, or uniform."""
    times = G.times if hasattr(G, "times") else getattr(G, "config", {}).get("times", "")      # a copy of the teacher keeps its config
    own = [float(t) for t in times.split(",") if t]
    return own + [1.0] if len(own) == calls else [i / calls for i in range(calls)] + [1.0]


@torch.no_grad()
def sample(student, n, label=None, steps=1, z=None):
    """n samples (n, ...) in `steps` network calls, Euler steps of the student's flow; random labels if it wants some and gets none."""
    if steps < 1:
        raise UserError(f"a sample takes at least one step, not {steps}")
    device = next(student.parameters()).device
    z = torch.randn(n, *student.shape, device=device) if z is None else z
    if label is None and student.label_dim:
        label = F.one_hot(torch.randint(student.label_dim, (n,), device=device), student.label_dim).float()
    times = call_times(student, steps)
    return torch.cat([euler(student, *part, times, student.sigma_init)[-1] for part in micro_batches(1000, z, label)])


if __name__ == "__main__":
    main(Config, PRESETS, train, sample)
