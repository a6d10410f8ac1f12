"""rectflow.py against closed forms, quadrature and itself."""
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import rectflow
from common import MLP, TOYS, Denoiser, GaussianMixture, UserError
from conftest import F64, TINY, flat, hermite, main_in_process
from rectflow import FINE, Config, euler, even_times, flow_loss, train, velocity

M, S = torch.tensor([0.7, -0.4], dtype=F64), 0.6        # data N(M, S^2): everything is known
GAUSS = GaussianMixture(M[None], S)


@pytest.fixture(autouse=True)
def quick_teachers_and_pictures(request, monkeypatch, no_pictures):
    def few(cfg, data, teacher=None):
        with torch.random.fork_rng():
            x, label = data.sample(300)
            return {}, torch.randn_like(x), label

    monkeypatch.setattr(rectflow, "gallery", few)
    if "learns" not in request.node.name:
        heun = common.heun_sample
        monkeypatch.setattr(rectflow, "FINE", 8)
        monkeypatch.setattr(common, "heun_sample", lambda D, z, y, **kw: heun(D, z, y, 1, **kw))


def quick(**flags):
    return Config(**(TINY | dict(pairs=64, out="runs/run") | flags))


def given(stage, label_dim=0):
    torch.manual_seed(1)                                # data and teacher for train
    return [None, None if stage in ("flow", "chain") else Denoiser(MLP(2, label_dim, 16), 0.7)]


def straight(x_t, sigma, label=None):
    """Denoiser of the coupling z -> M + S z: on its lines, (1 - t) z + t (M + S z), z is known."""
    t = 1 / (1 + sigma)
    return (M + S * (t * x_t - t * M) / (1 - t + t * S)).to(x_t)        # x_t arrives divided by t


def gauss_velocity(x, t):
    return M + (t * S**2 - (1 - t)) / (t**2 * S**2 + (1 - t) ** 2) * (x - t * M)


def watch(monkeypatch, name, keep):
    """List that grows by keep(result, *arguments) at every call of rectflow's function `name`."""
    def spy(*args):
        out = real(*args)
        seen.append(keep(out, *args))
        return out

    seen, real = [], getattr(rectflow, name)
    monkeypatch.setattr(rectflow, name, spy)
    return seen


@pytest.mark.parametrize("t", [0.02, 0.3, 0.9])
def test_velocity_of_gaussians(t):
    x, t = torch.randn(50, 2, dtype=F64), torch.full((50, 1), t, dtype=F64)
    v = velocity(GAUSS, x, t, None, 1e3)
    torch.testing.assert_close(v, gauss_velocity(x, t), rtol=1e-10, atol=1e-10)


def test_noise_end():
    """At t = 0 the one-step generator; continuous at 1 / sigma_init, where the reading changes."""
    x, t = torch.randn(50, 2, dtype=F64), torch.full((50, 1), 0.05, dtype=F64)
    torch.testing.assert_close(velocity(GAUSS, x, 0 * t, None, 20.0), GAUSS(20 * x, 0 * t + 20) - x)
    torch.testing.assert_close(velocity(GAUSS, x, 0 * t, None, 1e5), M - x, rtol=0, atol=1e-4)
    below, above = [velocity(GAUSS, x, t * f, None, 20.0) for f in (1 - 1e-9, 1 + 1e-9)]
    torch.testing.assert_close(below, above, rtol=0, atol=1e-7)


def test_flow_map_of_gaussians():
    """z goes to t M + sqrt(t^2 S^2 + (1 - t)^2) z; Euler's error halves with its step."""
    z = torch.randn(50, 2, dtype=F64)
    t = torch.linspace(0, 1, FINE + 1, dtype=F64)[:, None, None]
    want = t * M + (t**2 * S**2 + (1 - t) ** 2).sqrt() * z
    coarse, fine = [euler(GAUSS, z, None, even_times(n), 1e6) for n in (FINE, 4 * FINE)]
    error, error_fine = (coarse - want).abs().max(), (fine[::4] - want).abs().max()
    assert error < 0.03 and 3.7 < error / error_fine < 4.3
    assert rectflow.straightness(want) > 0.05           # not straight


def test_guide_target():
    """Two Euler steps, the second from each sample's own split on."""
    z, split = torch.randn(60, 2, dtype=F64), torch.linspace(0.2, 0.8, 60, dtype=F64)[:, None]
    x_t = z + split * (M - z)                           # v(z, 0) = M - z
    want = x_t + (1 - split) * gauss_velocity(x_t, split)
    got = rectflow.guide_target(GAUSS, z, split, None, 1e7)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_flow_loss_is_minimal_at_the_velocity():
    """In 1-D, by quadrature: its slope in a and b of a D + b."""
    D = GaussianMixture(torch.tensor([[0.7]], dtype=F64), S)
    z, x, w = hermite(30)

    def slope(shift):
        a, b = [torch.tensor(v, dtype=F64, requires_grad=True) for v in (1.0, shift)]
        loss = flow_loss(lambda *args: a * D(*args) + b, z, 0.7 + S * x, 0 * z + 0.4, None, 20.0)
        return torch.stack(torch.autograd.grad((w * loss).sum(), (a, b))).abs()

    assert slope(0.0).max() < 1e-10 and slope(0.1).min() > 0.1


def test_pseudo_huber():
    e, c = torch.tensor([[3.0, 4.0], [3e-6, 4e-6]], dtype=F64), 0.00054 * 2    # far out, near 0
    want = pytest.approx([(5 - c) / 2, 25e-12 / (4 * c)], rel=1e-3)
    assert rectflow.pair_distance(e, 0 * e, "huber").tolist() == want


@pytest.mark.parametrize("law, cdf", [("uniform", lambda t: t), ("ushape", lambda t: (
    torch.expm1(4 * t) - math.exp(4) * torch.expm1(-4 * t)) / (2 * math.expm1(4)))])
def test_laws_of_t(law, cdf):
    t = rectflow.draw_t(torch.zeros(40000, 2), law, 0.9).flatten().sort().values / 0.9
    assert 0 <= t[0] and t[-1] <= 1 and (cdf(t) - torch.arange(40000) / 40000).abs().max() < 0.01


@pytest.mark.parametrize("progress, b", [(0.0, 1.0), (0.3, 0.5), (0.6, 0.0), (0.9, 0.0)])
def test_annealing(progress, b):
    """Fresh noise first, the pair's from 60 % on: unit variance, correlation sqrt(1 - b^2)."""
    z = torch.randn(40000, 2)
    mixed = rectflow.anneal(z, progress)
    assert abs(mixed.std() - 1) < 0.02 and abs((mixed * z).mean() - math.sqrt(1 - b**2)) < 0.02


@pytest.mark.parametrize("stage, times", [("reflow", 0), ("anneal", 0), ("distill", [0, 0.5])])
def test_lines_of_pairs(stage, times):
    """A pair is mirrored as one; only annealing changes its noise; t is where it is called."""
    cfg, z = quick(stage=stage, batch=400, flip=True, sigma_min=0.5), torch.randn(1, 3, 4, 4)
    run = common.Run(cfg, "rectflow", ema=torch.nn.Linear(2, 2))
    zs, _, xs, t = rectflow.draw_lines(cfg, None, (z, None, 2 * z), run, [0.0, 0.5])
    mirrored = (xs == 2 * z.flip(3)).flatten(1).all(1)
    assert 150 < mirrored.sum() < 250 and torch.equal(2 * zs, xs) == (stage != "anneal")
    assert t.max() <= 1 / 1.5 and (times == 0 or t.unique().tolist() == times)


@pytest.mark.parametrize("stage", ["flow", "reflow", "anneal", "distill", "guided"])
def test_labels_law_and_distance_reach_the_loss(stage, monkeypatch):
    losses = watch(monkeypatch, "flow_loss", lambda _, *args: args[4:])
    laws = watch(monkeypatch, "draw_t", lambda _, z, law, t_max: law)
    train(quick(stage=stage, cond=True, t_law="ushape", distance="huber"), *given(stage, 8))
    assert all(label.shape == (32, 8) and sigma == 20.0 for label, sigma, _ in losses)
    assert {kind for *_, kind in losses} == {"l2" if stage == "flow" else "huber"}
    assert laws == 4 * dict(flow=["uniform"], reflow=["ushape"], anneal=["ushape"]).get(stage, [])


def test_the_guide_has_its_weight():
    cfgs = [quick(stage="guided", guide=w, out=f"runs/{w}") for w in (0.5, 1.0)]
    half, whole = [flat(train(cfg, *given("guided"))[0]) for cfg in cfgs]
    assert not torch.equal(half, whole)


@pytest.mark.parametrize("stage, taught, want", [
    ("chain", False, ["flow", "reflow", "reflow2", "distill"]), ("flow", False, ["flow"]),
    ("chain", True, ["reflow", "reflow2", "distill"]), ("slim", False, ["anneal", "guided"])])
def test_stages_have_folders_and_share_the_minutes(stage, taught, want):
    parts = rectflow.split_stages(quick(stage=stage, rounds=2, minutes=6.0), taught)
    assert [part.stage for part in parts] == [name.rstrip("2") for name in want]
    assert [part.out for part in parts] == [f"runs/run-{name}" for name in want[:-1]] + ["runs/run"]
    assert {part.minutes for part in parts} == {6.0 / len(want)}


class Own(torch.nn.Linear):
    def forward(self, x_t, sigma, label=None):
        return x_t / (1 + sigma**2) + super().forward(x_t / (1 + sigma**2).sqrt())


def test_chain_hands_flows_on(monkeypatch):
    """Each stage is taught by the flow before it and starts as its copy; a network of one's own."""
    stages = watch(monkeypatch, "train_stage", lambda out, *args: (out[0], args[2]))
    starts = watch(monkeypatch, "initial_student", lambda G, *_: flat(G).clone())
    train(quick(), student=Own(2, 2))
    (flow, none), (reflow, its_teacher), (last, last_teacher) = stages
    assert none is None and its_teacher is flow and last_teacher is reflow and type(last) is Own
    assert torch.equal(starts[1], flat(flow)) and torch.equal(starts[2], flat(reflow))


def test_slim_distils_the_large_teacher_guided_by_the_small_flow(monkeypatch):
    stages = watch(monkeypatch, "train_stage", lambda out, *args: (out[0], args[2]))
    guides = watch(monkeypatch, "guide_target", lambda _, D, *rest: flat(D))
    large = given("slim")[1]
    train(quick(stage="slim", shrink=0.5), None, large)
    (small, _), (_, teacher) = stages
    assert teacher is large and 0.3 < len(flat(small)) / len(flat(large)) <= 0.5
    assert len(guides) == 4 and all(torch.equal(guide, flat(small)) for guide in guides)


def test_chain_in_one_command():
    """--resume of what is finished changes nothing; --sample draws from each stage at its times."""
    small = TINY | dict(pairs=64, out="runs/run")
    flags = [f"--{name}={value}" for name, value in small.items()]
    assert main_in_process(rectflow, *flags)[0] == 0
    before = [path.read_bytes() for path in sorted(Path("runs").glob("run*/last.pt"))]
    assert main_in_process(rectflow, *flags, "--resume")[0] == 0 and len(before) == 3
    assert before == [path.read_bytes() for path in sorted(Path("runs").glob("run*/last.pt"))]
    for folder, calls in (("runs/run-flow", 8), ("runs/run-reflow", 1), ("runs/run", 1)):
        assert main_in_process(rectflow, "--sample", folder, "--samples", 10)[0] == 0
        assert np.load(f"{folder}/draw.npy").shape == (10, 2)
        assert common.load_denoiser(folder, quick()).levels == even_times(calls)


def test_flows_are_compared():
    """[before, after]: straightness and error of one step are 0 for a straight flow, H nearly."""
    cfg = quick(stage="reflow", sigma_init=1e4, sigma_max=1e4)
    run = common.Run(cfg, "rectflow", ema=torch.nn.Linear(2, 2))
    z, target = torch.randn(300, 2), GaussianMixture(M[None].float(), S)
    found = rectflow.compare(run, target, TOYS["ring"], straight, z, None)
    assert len(found) == 3 and all(before > 0.05 for before, after in found.values())
    assert found["straightness"][1] == found["one_step_error"][1] == 0
    assert found["one_step_H"][1] < 0.02 and Path("runs/run/trajectories.png").exists()
    assert rectflow.compare(run, target, None, straight, z, None)["straightness"] == [0]


@pytest.mark.parametrize("flags, words", [
    (dict(stage="flow", teacher="exact"), "omit --teacher"), (dict(shrink=0.0), "--shrink"),
    (dict(sigma_init=30.0), "--sigma_init"), (dict(sigma_init=0.5), "--sigma_init")])
def test_bad_input(flags, words):
    with pytest.raises(UserError, match=words):
        train(quick(**flags))


def test_points_of_three_numbers():
    """The picture at the end shows the first two."""
    train(quick(stage="flow"), torch.randn(99, 3))
    assert Path("runs/run/trajectories.png").exists()


def test_short_chain_learns_the_ring():
    """A fraction of the default run: paths become straight, and one step finds all modes."""
    train(quick(steps=120, batch=256, width=0, samples=2000, pairs=2000, every=1000, lr=4e-3))
    reflow = common.read_json("runs/run-reflow/metrics.json")
    for before, after in (reflow["straightness"], reflow["one_step_error"], reflow["one_step_H"]):
        assert after < 0.1 * before
    distill = common.read_json("runs/run/metrics.json")
    assert distill["H"] < 0.006 and distill["mode_min"] > 0.4, distill
