"""rectflow.py against closed forms, brute force and itself: velocities, flow maps, pairs, knots, restoration, stages, resume."""
import dataclasses
import gc
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import rectflow
from common import TOYS, Denoiser, GaussianMixture, MLP, UserError, heun_sample
from conftest import PowerCut, TinyInception, check_micro, check_resume, flat, main_in_process
from rectflow import (FINE, Config, anneal, boss_costs, boss_knots, bridge_velocity, degrade, draw_t, euler, flow_loss, guide_loss,
                      oftsr_loss, pair_distance, restored, sample, search_knots, straightness, teacher_pairs, train, uniform_knots,
                      velocity)
from test_common import write_cifar

F64 = torch.float64
M, S = torch.tensor([0.7, -0.4], dtype=F64), 0.6                                # data N(M, S^2): everything is known
GAUSS = GaussianMixture(M[None], S)
UNIFORM = [i / FINE for i in range(FINE + 1)]


@pytest.fixture(autouse=True)
def small_gallery(monkeypatch):
    """Pictures of few samples: they are looked at elsewhere."""
    monkeypatch.setattr(rectflow, "gallery", lambda *a: common.gallery(*a, n=9))


def quick(**kw):
    """A run of a second: tiny networks, few steps."""
    return Config(**{**dict(device="cpu", steps=4, batch=32, width=16, teacher_steps=20, samples=200, every=2, pairs=64, out="run"), **kw})


def straight(x_t, sigma, label=None):
    """Denoiser of the coupling z -> M + S z in closed form: on its lines x_t = (1 - t) z + t (M + S z) the end is known from x_t."""
    t = (1 / (1 + sigma))[:, None]
    z = (t * x_t - t * M) / (1 - t + t * S)                                     # x_t arrives divided by t
    return M + S * z


def straight_exact(z):
    return M + S * z


# ---- velocities and flows ----


@pytest.mark.parametrize("t", [0.02, 0.3, 0.9])
def test_velocity_of_gaussians(t):
    """Noise to N(M, S^2): v = M + (t S^2 - (1 - t)) / (t^2 S^2 + (1 - t)^2) (x - t M); at t = 0 it is D(sigma_init z) - z."""
    x, time = torch.randn(50, 2, dtype=F64), torch.full((50,), t, dtype=F64)
    want = M + (t * S**2 - (1 - t)) / (t**2 * S**2 + (1 - t) ** 2) * (x - t * M)
    v = velocity(GAUSS, x, time, None, 1e3)
    torch.testing.assert_close(v, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(x + (1 - t) * v, GAUSS(x / t, (1 - time) / time), rtol=1e-10, atol=1e-10)        # and back
    v = velocity(GAUSS, x, 0 * time, None, 20.0)
    torch.testing.assert_close(v, GAUSS(20 * x, 0 * time + 20) - x)
    torch.testing.assert_close(-common.velocity_from_denoiser(GAUSS, x, 1 - time), want, rtol=1e-10, atol=1e-10)     # time reversed
    torch.testing.assert_close(velocity(GAUSS, x, 0 * time, None, 1e5), M - x, rtol=0, atol=1e-4)               # the true limit


def test_noise_end_is_continuous():
    """Either side of t = 1 / sigma_init, where the reading changes, velocities agree; the change is felt further down."""
    x, t = torch.randn(50, 2, dtype=F64), torch.full((50,), 0.05, dtype=F64)
    below, above = (velocity(GAUSS, x, t * f, None, 20.0) for f in (1 - 1e-9, 1 + 1e-9))
    torch.testing.assert_close(below, above, rtol=0, atol=1e-7)
    assert (velocity(GAUSS, x, t / 2, None, 20.0) - velocity(GAUSS, x, t / 2, None, 1e4)).abs().max() > 1e-3


def test_flow_map_of_gaussians():
    """The ODE's solution from z is t M + sqrt(t^2 S^2 + (1 - t)^2) z, which Euler meets with an error that halves with the step."""
    z = torch.randn(50, 2, dtype=F64)
    t = torch.linspace(0, 1, FINE + 1, dtype=F64)[:, None, None]
    want = t * M + (t**2 * S**2 + (1 - t) ** 2).sqrt() * z
    coarse, fine = (euler(GAUSS, z, None, [i / n for i in range(n + 1)], 1e6) for n in (FINE, 4 * FINE))
    error = (coarse - want).abs().max(), (fine[::4] - want).abs().max()
    assert error[0] < 0.03 and 3.7 < error[0] / error[1] < 4.3
    assert straightness(want) > 0.05                                            # independent ends: not straight


def test_straight_coupling_is_solved_in_one_step():
    """The closed-form straight coupling: no loss, straightness 0, one Euler step is the exact map; and two, wherever split."""
    z = torch.randn(200, 2, dtype=F64)
    path, one = euler(straight, z, None, UNIFORM, 1e9), euler(straight, z, None, [0, 1], 1e9)[-1]
    torch.testing.assert_close(one, straight_exact(z), rtol=0, atol=1e-6)
    torch.testing.assert_close(path[-1], one, rtol=0, atol=1e-6)
    assert straightness(path) < 1e-12
    t = torch.rand(200, dtype=F64) * 0.98
    assert flow_loss(straight, z, straight_exact(z), t, None, 1e9).max() < 1e-12
    assert flow_loss(straight, z, torch.randn_like(z), t, None, 1e9).mean() > 0.1
    assert guide_loss(straight, straight, z, 0.2 + 0.6 * t, None, 1e9).max() < 1e-12
    assert guide_loss(GAUSS, straight, z, 0.2 + 0.6 * t, None, 1e9).mean() > 0.01


def test_guide_is_the_teachers_second_step():
    """The target is two Euler steps of the teacher, split per sample, here of the curved flow in closed form."""
    z, split = torch.randn(60, 2, dtype=F64), torch.linspace(0.2, 0.8, 60, dtype=F64)
    x = z + split[:, None] * (M - z)                                            # v(z, 0) = M - z
    t = split[:, None]
    x = x + (1 - t) * (M + (t * S**2 - (1 - t)) / (t**2 * S**2 + (1 - t) ** 2) * (x - t * M))
    got = guide_loss(straight, GAUSS, z, split, None, 1e7)
    torch.testing.assert_close(got, (straight_exact(z) - x).square().mean(1), rtol=1e-4, atol=1e-6)


def test_flow_loss_is_minimal_at_the_velocity():
    """Data N(M, S^2) and noise independent, by quadrature in one dimension: the loss is stationary at the exact denoiser, not beside it."""
    D = GaussianMixture(torch.tensor([[0.7]], dtype=F64), S)
    nodes, w = np.polynomial.hermite_e.hermegauss(30)
    nodes, w = torch.tensor(nodes), torch.tensor(w / w.sum())
    z, x, w = nodes.repeat_interleave(30)[:, None], 0.7 + S * nodes.repeat(30)[:, None], (w[:, None] * w).flatten()
    t = torch.full((900,), 0.4, dtype=F64)

    def slope(scale, shift):
        a, b = (torch.tensor(float(v), dtype=F64, requires_grad=True) for v in (scale, shift))
        loss = (w * flow_loss(lambda *args: a * D(*args) + b, z, x, t, None, 20.0)).sum()
        return torch.stack(torch.autograd.grad(loss, (a, b))).abs()
    assert slope(1, 0).max() < 1e-10 and slope(1, 0.1).min() > 0.1
    at_noise = flow_loss(D, z, x, 0 * t, None, 20.0)                            # distillation: |D(sigma_init z, sigma_init) - x|^2
    torch.testing.assert_close(at_noise, (D(20 * z, 0 * t + 20) - x).square()[:, 0])


def test_distances():
    """Mean square, or RF++'s pseudo-Huber: |e| / dim far out, |e|^2 / (2 c dim) near 0, c = 0.00054 dim."""
    e, zero, c = torch.tensor([[3.0, 4.0], [3e-6, 4e-6]], dtype=F64), torch.zeros(2, 2, dtype=F64), 0.00108
    assert pair_distance(e, zero, "l2").tolist() == pytest.approx([12.5, 12.5e-12])
    assert pair_distance(e, zero, "huber").tolist() == pytest.approx([(5 - c) / 2, 25e-12 / (4 * c)], rel=1e-4)


def test_laws_of_t():
    """Uniform, and RF++'s density e^(4 t) + e^(4 (1 - t)): the largest gap between empirical and exact distribution is noise."""
    for law, cdf in (("uniform", lambda t: t), ("ushape", lambda t: (torch.expm1(4 * t) + math.exp(4) * -torch.expm1(-4 * t)) / (2 * math.expm1(4)))):
        t = draw_t(40000, law, 1.0, "cpu").sort().values
        assert 0 <= t[0] and t[-1] <= 1 and (cdf(t) - torch.arange(40000) / 40000).abs().max() < 0.01, law
    assert draw_t(1000, "ushape", 0.9, "cpu").max() <= 0.9


def test_annealing():
    """Fresh noise at the start, the pair's from 60 % on, unit variance and correlation sqrt(1 - b^2) between."""
    z = torch.randn(40000, 2)
    for progress, b in ((0.0, 1.0), (0.3, 0.5), (0.45, 0.25)):
        mixed = anneal(z, progress)
        assert abs(mixed.std() - 1) < 0.02 and abs((mixed * z).mean() - math.sqrt(1 - b**2)) < 0.02
    assert torch.equal(anneal(z, 0.6), z) and torch.equal(anneal(z, 0.9), z)


# ---- step sizes ----


def test_boss_costs_and_knots():
    """One cost by hand; 0 for a straight path; dynamic programming finds what trying every choice finds, and never less than uniform."""
    z = torch.randn(40, 2, dtype=F64)
    path = euler(GAUSS, z, None, UNIFORM, 1e3)
    c = boss_costs(path)
    v = (path[31] - path[30]) * FINE
    torch.testing.assert_close(c[30, 75], (path[30] + 45 / FINE * v - path[75]).square().mean())
    assert torch.isinf(c.tril()[c.tril() != 0]).all() and boss_costs(euler(straight, z, None, UNIFORM, 1e9))[0, -1] < 1e-12
    small = torch.rand(9, 9).masked_fill(torch.ones(9, 9).tril().bool(), math.inf)
    cost = lambda c, knots: sum(float(c[i, j]) for i, j in itertools.pairwise(knots))
    for calls in range(2, 9):
        every = [[0, *inner, 8] for inner in itertools.combinations(range(1, 8), calls - 1)]
        assert boss_knots(small, calls) == min(every, key=lambda knots: cost(small, knots))
        assert cost(c, boss_knots(c, calls)) < cost(c, uniform_knots(calls))


def test_boss_beats_uniform_on_fresh_noise():
    """Exact ring: with knots from 200 noises, 2 to 8 Euler steps from 500 others stay and end nearer to the ODE's solution than uniform ones."""
    solve = lambda z, knots: euler(TOYS["ring"], z, None, [k / FINE for k in knots], 20.0)
    path, z = solve(torch.randn(200, 2), range(FINE + 1)), torch.randn(500, 2)
    other = solve(z, range(FINE + 1))
    costs, fresh = boss_costs(path), boss_costs(other)
    along = lambda knots: float(sum(fresh[i, j] for i, j in itertools.pairwise(knots)))
    error = lambda knots: (solve(z, knots)[-1] - other[-1]).square().mean()
    for calls in range(2, 9):
        assert along(boss_knots(costs, calls)) < 0.9 * along(uniform_knots(calls)), calls
        assert error(boss_knots(costs, calls)) < 0.9 * error(uniform_knots(calls)), calls


@pytest.mark.parametrize("calls", [2, 5])
def test_search(calls):
    """Valid knots, never less fit than the uniform ones, and close to a known optimum."""
    best = [0, *[10 * i + 5 for i in range(1, calls)], FINE]
    fitness = lambda knots: sum(abs(a - b) for a, b in zip(knots, best))
    found = search_knots(fitness, calls)
    assert found[0] == 0 and found[-1] == FINE and len(found) == calls + 1 and found == sorted(set(found))
    assert fitness(found) < fitness(uniform_knots(calls)) / 3
    assert search_knots(lambda knots: knots != uniform_knots(calls), calls) == uniform_knots(calls)


# ---- restoration ----

LEVEL = 0.8


def exact_student(x_in, sigma, label=None):
    """OFTSR's student for N(M, S^2) in closed form: x_0 + (x_t - x_0) / t with x_t on the ODE; its input is coded as restored() does."""
    t = 1 - LEVEL / sigma[:, None]
    x_0 = x_in * (1 - t)
    x_t = M + (x_0 - M) * ((S**2 + (1 - t) ** 2 * LEVEL**2) / (S**2 + LEVEL**2)).sqrt()
    posterior_mean = M + (x_0 - M) * S**2 / (S**2 + LEVEL**2)
    return torch.where(t < 1e-6, posterior_mean, x_0 + (x_t - x_0) / t.clamp(min=1e-6))


def test_degraded_input():
    """Blocks of neighbours become their mean, on images and on points; noise of the level is added."""
    x = torch.randn(3, 3, 8, 8)
    got = degrade(x, 0.5, 4, torch.zeros_like(x))
    torch.testing.assert_close(got[:, :, 4:, :4], x[:, :, 4:, :4].mean((2, 3), keepdim=True).expand(3, 3, 4, 4))
    x = torch.randn(5, 2)
    assert torch.allclose(degrade(x, 0.0, 2, x), x.mean(1, keepdim=True).expand(5, 2)) and torch.equal(degrade(x, 0.5, 1, x), 1.5 * x)


def test_oftsr_loss_vanishes_at_the_exact_student():
    """
    Gaussian data: the closed-form student has no loss but the midpoint rule's and OFTSR's light pull towards the velocity at
    x_t, here by hand; at t = 0 it is the denoiser; another student has loss.
    """
    x_0, t = torch.randn(300, 2, dtype=F64), torch.linspace(0.01, 0.99, 300, dtype=F64)
    phi = restored(exact_student, x_0, t, None, LEVEL) - x_0
    pull = phi - bridge_velocity(GAUSS, x_0 + t[:, None] * phi, t, None, LEVEL)
    rest = [oftsr_loss(G, GAUSS, x_0, t, None, LEVEL) for G in (exact_student, lambda *a: exact_student(*a) + 0.1)]
    rest[0] -= 0.01 * (1 - t) ** 2 * pull.square().mean(1)
    assert rest[0].abs().max() < 1e-7 and rest[1].min() > 1e-3
    torch.testing.assert_close(restored(exact_student, x_0, 0 * t, None, LEVEL), GAUSS(x_0, 0 * t + LEVEL))
    v = bridge_velocity(GAUSS, x_0, 0 * t, None, LEVEL)
    torch.testing.assert_close(x_0 + v, GAUSS(x_0, 0 * t + LEVEL))


def test_trade_off_is_monotone_in_closed_form():
    """From t = 0, the least error, to t = 1, the law of the data: the error rises, the gap between the stds closes."""
    x = M + S * torch.randn(50000, 2, dtype=F64)
    x_0 = x + LEVEL * torch.randn_like(x)
    out = [restored(exact_student, x_0, torch.full((50000,), t, dtype=F64), None, LEVEL) for t in (0.0, 0.25, 0.5, 0.75, 0.999)]
    error, gap = [float((r - x).square().mean()) for r in out], [abs(float(r.std(0).mean()) - S) for r in out]
    assert error == sorted(error) and gap == sorted(gap, reverse=True) and gap[-1] < 0.01 < gap[0]
    assert error[0] == pytest.approx(S**2 * LEVEL**2 / (S**2 + LEVEL**2), rel=0.02)


# ---- pairs ----


def pairs_of(cfg, teacher):
    return teacher_pairs(cfg, teacher, common.load_data(cfg), torch.device("cpu"))


def test_pairs_belong_to_one_teacher(monkeypatch):
    """Pairs are the teacher's ODE, made once; another teacher or setting makes its own; a file moved in from elsewhere is refused."""
    cfg, teacher, calls = quick(), TOYS["ring"], []
    made = rectflow.heun_sample
    monkeypatch.setattr(rectflow, "heun_sample", lambda *a: calls.append(1) or made(*a))
    before = torch.get_rng_state()
    z, label, x = pairs_of(cfg, teacher)
    assert torch.equal(before, torch.get_rng_state()) and label is None         # the run's own draws stay the same
    assert torch.equal(x, heun_sample(teacher, z, None, 18, cfg.sigma_min, cfg.sigma_init)) and len(calls) == 1
    assert torch.equal(pairs_of(cfg, teacher)[2], x) and len(calls) == 1
    others = [(cfg, GaussianMixture(teacher.means * 1.01, 0.1)), (cfg, Denoiser(MLP(width=16))),
              (dataclasses.replace(cfg, sigma_init=10.0), teacher), (dataclasses.replace(cfg, cond=True), teacher)]
    for k, (other_cfg, other) in enumerate(others):
        assert not torch.equal(pairs_of(other_cfg, other)[2], x) and len(calls) == k + 2
    folders = sorted(Path("runs").glob("flowpairs-*"), key=lambda f: f.stat().st_mtime_ns)
    assert len(folders) == 5
    (folders[1] / "0000000.pt").write_bytes((folders[0] / "0000000.pt").read_bytes())
    with pytest.raises(UserError, match="another teacher"):
        pairs_of(*others[0])


def test_making_pairs_can_be_interrupted(monkeypatch):
    """What was made before a power cut is kept and not made again; the result is that of one go; damage is named."""
    cfg, made, calls = quick(pairs=2500), rectflow.heun_sample, []
    whole = pairs_of(cfg, TOYS["ring"])[2]
    folder = next(Path("runs").glob("flowpairs-*"))
    folder.rename("runs/whole")

    def dying(*a):
        calls.append(1)
        if len(calls) == 2:
            raise PowerCut
        return made(*a)
    monkeypatch.setattr(rectflow, "heun_sample", dying)
    with pytest.raises(PowerCut):
        pairs_of(cfg, TOYS["ring"])
    assert [f.name for f in folder.iterdir()] == ["0000000.pt"]
    assert torch.equal(pairs_of(cfg, TOYS["ring"])[2], whole) and len(calls) == 4 and len(whole) == 2500
    (folder / "0001000.pt").write_bytes(b"half a fi")
    with pytest.raises(UserError, match="0001000.pt is damaged"):
        pairs_of(cfg, TOYS["ring"])


def test_images_of_a_pair_are_flipped_together():
    """Half of the draws are mirrored, z and x alike; points stay as they are."""
    z = torch.randn(1, 3, 4, 4)
    zs, _, xs = rectflow.draw_pairs((z, None, 2 * z), 400, torch.device("cpu"))
    flipped = (zs == z.flip(3)).flatten(1).all(1)
    assert 150 < flipped.sum() < 250 and torch.equal(zs[~flipped], z.expand(int((~flipped).sum()), 3, 4, 4)) and torch.equal(xs, 2 * zs)


# ---- the stages ----

STAGES = [dict(stage="flow", cond=True), dict(stage="reflow", t_law="ushape", distance="huber"), dict(stage="anneal", shrink=0.5),
          dict(stage="distill", steps_student=2, times="0,0.7"), dict(stage="guided", distance="huber", cond=True),
          dict(stage="steps", straighten=True, steps_student=3), dict(stage="restore"), dict(stage="restore", down=2, cond=True)]


@pytest.fixture
def lean(monkeypatch):
    """No pictures and no evolution, which are tested by themselves: they would take most of the time."""
    monkeypatch.setattr(rectflow, "search_knots", lambda fitness, calls: uniform_knots(calls))
    monkeypatch.setattr(common.Run, "show", lambda *a: None)
    for name in ("draw_knots", "draw_trajectories"):
        monkeypatch.setattr(rectflow, name, lambda *a: None)


@pytest.mark.parametrize("kw", STAGES)
def test_resume_is_bit_exact(monkeypatch, kw, lean):
    check_resume(monkeypatch, lambda cfg: (gc.collect(), train(cfg))[1], quick, **kw)           # a power cut leaves no lock


@pytest.mark.parametrize("kw", [kw for kw in STAGES if kw["stage"] not in ("anneal", "restore") or "down" in kw])
def test_micro_batches_change_nothing(kw, lean):
    common.load_teacher(quick(cond=kw.get("cond", False)))
    check_micro(train, quick, (8,), **kw)


def test_chain_in_one_command():
    """
    flow, reflow twice and distill from one command, each in its folder and taught by the one before; --resume does nothing
    twice; --sample draws; a flow is a teacher for every script, and with a teacher the chain starts at reflow.
    """
    flags = "--steps 4 --batch 32 --width 16 --samples 100 --pairs 64 --rounds 2 --device cpu".split()
    assert main_in_process(rectflow, *flags)[0] == 0
    folders = [f"runs/rectflow-ring-0{s}" for s in ("-flow", "-reflow1", "-reflow2", "")]
    configs = [json.loads(Path(f, "config.json").read_text()) for f in folders]
    assert [c["stage"] for c in configs] == ["flow", "reflow", "reflow", "distill"] and [c["teacher"] for c in configs] == ["", *folders[:3]]
    assert {p.name for p in Path(folders[-1]).iterdir()} == {"config.json", "log.csv", "samples.png", "samples", "last.pt", "ema.pt", "metrics.json"}
    metrics = json.loads(Path(folders[1], "metrics.json").read_text())
    assert metrics["straightness_before"] > 0 and "H_one_step_after" in metrics and Path(folders[1], "trajectories.png").exists()
    saved = [Path(f, "last.pt").read_bytes() for f in folders]
    assert main_in_process(rectflow, *flags, "--resume")[0] == 0 and saved == [Path(f, "last.pt").read_bytes() for f in folders]
    assert not list(Path("runs").glob("*~1"))
    for folder, calls in ((folders[0], FINE), (folders[-1], 1)):
        assert main_in_process(rectflow, "--sample", folder, "--samples", 10)[0] == 0
        D = common.load_denoiser(folder, quick())
        torch.manual_seed(0)
        assert D.steps == calls and np.allclose(np.load(f"{folder}/draw.npy"), sample(D, 10, steps=calls).numpy())
    assert torch.equal(flat(common.load_teacher(quick(teacher=folders[0]))), flat(common.load_denoiser(folders[0], quick())))
    train(quick(stage="chain", teacher=folders[0]))
    assert json.loads(Path("run-reflow/config.json").read_text())["teacher"] == folders[0] and not Path("run-flow").exists()


def test_slim_and_steps(monkeypatch):
    """slim's student has at most a quarter of the parameters; steps's network is drawn at BOSS's times, also from its file."""
    monkeypatch.setattr(rectflow, "search_knots", lambda fitness, calls: uniform_knots(calls))
    count = lambda net: sum(p.numel() for p in net.parameters())
    student, run = train(quick(stage="slim", width=32))
    teacher = common.load_teacher(quick(width=32))
    assert 0.15 * count(teacher) < count(student) <= 0.25 * count(teacher) and Path("run-anneal/ema.pt").exists()
    student, run = train(quick(stage="steps", straighten=True, out="steps"))
    metrics, saved = json.loads(Path("steps/metrics.json").read_text()), common.load_denoiser("steps", quick())
    knots, z = metrics["knots_boss_4"], torch.randn(20, 2)
    want = euler(student, z, None, [k / FINE for k in knots], 20.0)[-1]
    torch.testing.assert_close(sample(saved, 20, steps=saved.steps, z=z), want, rtol=1e-4, atol=1e-5)
    assert saved.steps == 4 and {f"{what}error_{name}_{k}" for what in ("", "path_")
                                for name in ("uniform", "boss", "search") for k in range(2, 9)} < set(metrics)
    assert Path("steps/steps.png").exists() and metrics["error_straightened_4"] >= 0


def watch(monkeypatch, name, keep):
    """List that grows by keep(result, *arguments) at every call of rectflow's function `name`."""
    seen, real = [], getattr(rectflow, name)

    def spy(*args, **kw):
        out = real(*args, **kw)
        seen.append(keep(out, *args))
        return out
    monkeypatch.setattr(rectflow, name, spy)
    return seen


@pytest.mark.parametrize("stage", ["flow", "reflow", "anneal", "guided", "distill"])
def test_what_a_stage_trains_on_and_judges(stage, monkeypatch):
    """Labels, law of t, distance and annealed noise reach the loss; the rate falls; everything measured is of the averaged student."""
    monkeypatch.setattr(rectflow, "FINE", 8)
    train(quick(stage="flow", cond=True, out="teacher"))
    train(quick(stage="flow", cond=True, out="large", width=32))
    losses = watch(monkeypatch, "flow_loss", lambda _, D, z, x, t, label, sigma_init, kind: (z, t, label, kind))
    laws = watch(monkeypatch, "draw_t", lambda _, n, law, t_max, device: (law, t_max))
    noises = watch(monkeypatch, "anneal", lambda z, *_: z)
    paired = watch(monkeypatch, "teacher_pairs", lambda _, cfg, teacher, *rest: teacher.net.spec["width"])
    rates = watch(monkeypatch, "set_lr", lambda _, opt, lr: lr)
    drawn = watch(monkeypatch, "sample", lambda _, model, *rest: model)
    compared = watch(monkeypatch, "compare", lambda _, run, data, teacher, model, *rest: model)
    kw = dict(large="large") if stage == "guided" else {}
    student, _ = train(quick(stage=stage, cond=True, teacher="teacher" * (stage != "flow"), t_law="ushape", distance="huber", sigma_min=0.5,
                             shrink=0.5, ema=0.99, **kw))
    assert all(label.shape == (32, 8) for _, _, label, _ in losses)
    assert {kind for *_, kind in losses[::2 if stage == "guided" else 1]} == {"l2" if stage == "flow" else "huber"}
    straight = stage in ("reflow", "anneal")
    assert set(laws) == ({("ushape" if straight else "uniform", 1 / 1.5)} if straight or stage == "flow" else set())
    assert len(noises) == (4 if stage == "anneal" else 0) and all(torch.equal(z, seen[0]) for z, seen in zip(noises, losses))
    assert paired == {"flow": [], "guided": [32]}.get(stage, [16])
    assert rates[0] == 2e-3 and rates[-1] < 0.6 * rates[0]
    assert drawn and all(model is student for model in drawn + compared) and len(compared) == (stage in ("flow", "reflow", "anneal"))


def test_guide_has_a_weight_and_labels():
    """--guide 0 and 1 train different students; the teacher's two steps are of the label."""
    a, b = (flat(train(quick(stage="guided", teacher="exact", large="exact", guide=guide, out=f"guide{guide}"))[0]) for guide in (0.0, 1.0))
    assert not torch.equal(a, b)
    z, label = torch.randn(6, 2), torch.eye(8)[:6]
    seen = []
    D = lambda x, sigma, label: (seen.append(label), x)[1]
    guide_loss(D, D, z, torch.full((6,), 0.5), label, 20.0)
    assert len(seen) == 3 and all(torch.equal(y, label) for y in seen)


def test_stages_share_budget_and_teachers(monkeypatch):
    """A chain of three has a third of --budget each; slim's second stage distils the pairs of slim's own teacher."""
    parts = []
    monkeypatch.setattr(rectflow, "train_flow", lambda cfg: (parts.append(cfg), (None, None))[1])
    train(quick(budget="30s"))
    assert [(c.stage, c.budget) for c in parts] == [("flow", "10.00s"), ("reflow", "10.00s"), ("distill", "10.00s")]
    parts.clear()
    train(quick(stage="slim", teacher="exact"))
    assert [(c.stage, c.teacher, c.large) for c in parts] == [("anneal", "exact", "exact"), ("guided", "run-anneal", "exact")]


def test_number_of_pairs_is_part_of_their_key():
    """Fewer pairs made before are not taken for more."""
    data = common.load_data(quick())
    assert [len(teacher_pairs(quick(pairs=n), GAUSS.float(), data, torch.device("cpu"))[0]) for n in (40, 64)] == [40, 64]


def test_straightened_slopes(monkeypatch):
    """--straighten regresses (x at the next knot - x) / (time between): from knot to knot of the teacher's solutions."""
    monkeypatch.setattr(rectflow, "search_knots", lambda fitness, calls: uniform_knots(calls))
    calls = watch(monkeypatch, "straighten", lambda _, run, data, teacher, path, label, times: (path, times))
    slopes = watch(monkeypatch, "pair_distance", lambda _, v, slope, kind: slope)
    train(quick(stage="steps", teacher="exact", straighten=True))
    (path, times), = calls
    want = torch.cat([(b - a) / (t - s) for a, b, s, t in zip(path, path[1:], times, times[1:])])
    got = torch.cat(slopes)
    assert len(times) == 5 and len(got) == 4 * 32 and torch.cdist(got, want, compute_mode="donot_use_mm_for_euclid_dist").min(1).values.max() < 1e-4


def test_a_student_has_times_of_its_own(monkeypatch):
    """Distilled from a network straightened between BOSS's times, without --times, a student is trained and drawn at uniform ones."""
    monkeypatch.setattr(rectflow, "search_knots", lambda fitness, calls: uniform_knots(calls))
    train(quick(stage="steps", teacher="exact", straighten=True, steps_student=3, out="straight"))
    student, _ = train(quick(stage="distill", teacher="straight", steps_student=3))
    uniform = [0, 1 / 3, 2 / 3, 1]
    assert rectflow.call_times(student, 3) == rectflow.call_times(common.load_denoiser("run", quick()), 3) == pytest.approx(uniform)
    assert rectflow.call_times(common.load_denoiser("straight", quick()), 3) != pytest.approx(uniform)


def test_step_sizes_are_judged_on_fresh_noise(monkeypatch):
    """BOSS and the search see one set of the teacher's paths; what is reported is measured on another."""
    monkeypatch.setattr(rectflow, "search_knots", lambda fitness, calls: uniform_knots(calls))
    costs = watch(monkeypatch, "boss_costs", lambda cost, path: (cost, path[0]))
    used = watch(monkeypatch, "boss_knots", lambda _, cost, calls: cost)
    starts = watch(monkeypatch, "euler", lambda _, D, z, label, times, sigma_init: z)
    train(quick(stage="steps", teacher="exact"))
    (fresh, judged), (own, searched) = costs
    assert len(used) == 7 and all(cost is own for cost in used) and not torch.equal(judged, searched)
    assert all(torch.equal(z, judged) for z in starts[2:2 + 21])                # three choices of 2 to 8 calls


def test_the_restoring_flow_stays_above_the_lowest_level(monkeypatch):
    """--down: the flow from input to clean sample is fitted from --level down to --sigma_min."""
    levels = watch(monkeypatch, "denoising_loss", lambda _, d, x, sigma, sigma_data: sigma)
    train(quick(stage="restore", teacher="exact", down=2, sigma_min=0.3, level=0.5, batch=256))
    seen = torch.cat(levels)
    assert 0.3 <= seen.min() < 0.31 and 0.49 < seen.max() <= 0.5


def test_restoration_is_judged_with_labels_and_of_the_average(monkeypatch):
    """Every restored picture and figure is of the averaged student at its input's label."""
    seen = watch(monkeypatch, "restored", lambda _, G, x_0, t, label, level: (G, label) if not torch.is_grad_enabled() else None)
    student, _ = train(quick(stage="restore", teacher="exact", cond=True))
    judged = [s for s in seen if s]
    assert len(judged) > 5 and all(G is student and label is not None for G, label in judged)


def test_short_chain_learns_the_ring(monkeypatch):
    """
    A fraction of the default run: straightness and one Euler step's H fall far below a tenth, the distilled student has all
    modes, and with few updates the reflowed flow is the better one to distil.
    """
    monkeypatch.setattr(rectflow, "gallery", lambda *a: common.gallery(*a, n=1000))      # whose noise H of one step is measured on
    cfg = Config(device="cpu", steps=150, batch=256, samples=2000, pairs=3000, every=1000, out="run", lr=4e-3)
    train(cfg)
    reflow, distill = (json.loads(Path(f, "metrics.json").read_text()) for f in ("run-reflow", "run"))
    assert reflow["straightness_after"] < 0.1 * reflow["straightness_before"]
    assert distill["H"] < 0.006 and distill["mode_min"] > 0.4, distill
    assert reflow["H_one_step_after"] < 0.1 * reflow["H_one_step_before"], reflow
    H = {}
    for name in ("flow", "reflow"):
        train(dataclasses.replace(cfg, stage="distill", teacher=f"run-{name}", steps=30, out=name))
        H[name] = json.loads(Path(name, "metrics.json").read_text())["H"]
    assert H["reflow"] < 0.7 * H["flow"], H


def test_short_restoration_is_monotone():
    """Noisy ring: error rises and H falls with t (the last two are within noise so early), after an eighth of the default run."""
    train(quick(stage="restore", teacher="exact", teacher_steps=300, width=64, steps=150, batch=256, lr=4e-3, samples=2000, every=1000))
    metrics = json.loads(Path("run/metrics.json").read_text())
    error, H = ([metrics[f"{name}_t{t}"] for t in (0.0, 0.25, 0.5, 0.75, 0.99)] for name in ("error", "H"))
    assert main_in_process(rectflow, "--sample", "run")[0] == 2                 # it restores, it generates nothing
    assert error == sorted(error) and H[0] > 2 * H[1] > 4 * H[3] and H[4] < H[2], (error, H)


@pytest.mark.parametrize("kw, words", [
    (dict(stage="flow", teacher="exact"), "leave --teacher away"), (dict(rounds=0), "--rounds"), (dict(pairs=0), "--pairs"),
    (dict(sigma_init=30.0), "--sigma_init"), (dict(sigma_init=0.01), "--sigma_init"), (dict(shrink=0.0), "--shrink"),
    (dict(guide=-1.0), "--guide"), (dict(times="0,x", steps_student=2), "--times"), (dict(times="0.2,0.5", steps_student=2), "--times"),
    (dict(times="0,0.5"), "2 times"), (dict(stage="steps", steps_student=9), "2 to 8"), (dict(stage="steps", pairs=1), "2 --pairs"), (dict(stage="restore", level=0.01), "--level"),
    (dict(stage="restore", down=3), "--down"), (dict(stage="distill", teacher="nowhere"), "no such file")])
def test_bad_input(kw, words):
    """Impossible combinations end in one sentence, before anything is written."""
    with pytest.raises(UserError, match=words):
        train(quick(**kw))
    assert not Path("run").exists()


def test_no_network_is_small_enough():
    with pytest.raises(UserError, match="--shrink"):
        train(quick(stage="anneal", shrink=0.001))


def test_images_end_to_end(tmp_path, monkeypatch):
    """A few CPU steps on files in CIFAR-10's format: the chain with FID, step sizes and restoration of downsampled images, with labels."""
    write_cifar(tmp_path / "data")
    torch.jit.script(TinyInception()).save("tiny.pt")
    cfg = Config(data="cifar10", data_dir="data", device="cpu", net="small", width=4, cond=True, steps=2, batch=4, samples=4,
                 every=2, sigma_min=0.002, sigma_max=80.0, sigma_init=80.0, teacher_steps=2, pairs=4, out="run")
    heun, picture = heun_sample, common.gallery                                 # 35 and 120 calls are for real runs
    monkeypatch.setattr(rectflow, "FINE", 8)
    monkeypatch.setattr(rectflow, "gallery", lambda cfg, data, teacher: picture(cfg, data, None, n=4))
    for module in (rectflow, common):
        monkeypatch.setattr(module, "heun_sample", lambda D, z, label, steps, *a: heun(D, z, label, 2, *a))
    train(dataclasses.replace(cfg, stage="flow", out="run-flow", fid="tiny.pt", micro=2))
    assert math.isfinite(json.loads(Path("run-flow/metrics.json").read_text())["fid4_train100_8_steps"])
    student, run = train(dataclasses.replace(cfg, teacher="run-flow", stage="chain"))
    x = sample(student, 3)
    assert x.shape == (3, 3, 32, 32) and x.isfinite().all() and Path("run-reflow/trajectories.png").exists()
    for name in ("search_knots", "boss_knots"):
        monkeypatch.setattr(rectflow, name, lambda c, calls: uniform_knots(calls))
    cfg = dataclasses.replace(cfg, teacher="run-flow")
    train(dataclasses.replace(cfg, stage="steps", out="steps", fid="tiny.pt"))
    assert math.isfinite(json.loads(Path("steps/metrics.json").read_text())["fid4_train100_4_steps"])
    train(dataclasses.replace(cfg, stage="restore", down=4, out="restore"))
    assert math.isfinite(json.loads(Path("restore/metrics.json").read_text())["error_t0.5"]) and Path("steps/samples.png").exists()
