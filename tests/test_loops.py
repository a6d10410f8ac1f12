"""What the five loops promise alike: they learn, resume to the bit, average parts, take images."""
import importlib

import pytest
import torch

import common
from conftest import TINY, check_resume, flat

SCRIPTS = ["fdistill", "dmd", "sim", "consistency", "rectflow"]
SLIM = dict(pairs=64, t_law="ushape", distance="huber", accumulate=2, cond=True)
RESUMED = [
    ("fdistill", dict(cond=True)), ("fdistill", dict(ratio_ema=0.5, divergence="fkl")),
    ("sim", dict(cond=True)), ("sim", dict(distance="huber", alpha=1.0)),
    ("dmd", dict(cond=True)), ("dmd", dict(variant="dmd", pairs=64, distance="huber")),
    ("dmd", dict(variant="vsd", rank=2, cond=True)), ("dmd", dict(steps_student=4)),
    ("dmd", dict(steps_student=2, end_to_end=False, accumulate=2)),
    ("consistency", dict(loss="sprint")), ("consistency", dict(loss="ctm", cond=True)),
    *[("rectflow", dict(SLIM, stage=name)) for name in ("flow", "reflow", "anneal", "guided")]]
IN_PARTS = [
    ("fdistill", {}), ("sim", {}), ("dmd", {}), ("dmd", dict(variant="vsd")),
    ("dmd", dict(variant="dmd", pairs=64)), ("rectflow", dict(stage="flow")),
    ("rectflow", dict(stage="guided", pairs=64)),
    *[("consistency", dict(loss=loss)) for loss in ("ctm", "sprint", "meanflow")]]
IMAGES = [
    ("fdistill", {}), ("sim", {}), ("dmd", {}), ("dmd", dict(variant="vsd")),
    ("consistency", dict(loss="sprint", dtype="bf16", dropout=0.1, nfe=2)),
    ("consistency", dict(loss="ctm", recompute=True, dropout=0.1, nfe=2)),
    *[("rectflow", dict(stage=name, pairs=8, shrink=0.5, batch=64)) for name in ("chain", "slim")]]


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch, no_pictures):
    """Instead of a picture's 3,000 points and solved ODEs."""
    def gallery(cfg, data, teacher=None):
        with torch.random.fork_rng():
            x, label = data.sample(32)
            return {}, torch.randn_like(x), label

    for script in SCRIPTS:
        monkeypatch.setattr(f"{script}.gallery", gallery)
    monkeypatch.setattr("rectflow.FINE", 8)


def prepare(script, flags):
    """(train, quick(**flags) -> Config, an untrained teacher if the flags allow one)."""
    def quick(**flags):
        return module.Config(**(TINY | flags))

    module, cond = importlib.import_module(script), flags.get("cond", False)
    teacher = common.Denoiser(common.MLP(2, 8 if cond else 0, 16), 0.7).eval()
    return module.train, quick, None if flags.get("stage") == "flow" else teacher


@pytest.mark.parametrize("script, flags", RESUMED)
def test_resume_is_bit_exact(script, flags):
    train, quick, teacher = prepare(script, flags)
    check_resume(train, quick, None, teacher, **flags)


@pytest.mark.parametrize("script, flags", IN_PARTS)
def test_parts_of_a_batch_are_averaged(script, flags, monkeypatch):
    """With noise that is always the same, a batch in 4 parts gives the update of the whole."""
    train, quick, teacher = prepare(script, flags)
    point, found = common.Images(torch.tensor([[1.0, -1.0]])), []
    monkeypatch.setattr(torch, "randn", torch.ones)
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    monkeypatch.setattr(torch, "rand", lambda *size, **more: torch.ones(*size, **more) / 2)
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.ones_like(x) / 2)
    monkeypatch.setattr(torch.optim, "Adam", lambda p, *_, **__: torch.optim.SGD(p))
    monkeypatch.setattr(common.Run, "report", lambda *_, **__: None)
    for n in (1, 4):
        _, run = train(quick(lr=0.02, accumulate=n, out=f"runs/{n}", **flags), point, teacher)
        modules = [part for part in run.state.values() if isinstance(part, torch.nn.Module)]
        found.append(torch.cat([flat(module) for module in modules]))
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


@pytest.mark.parametrize("script, flags", IMAGES)
def test_images(script, flags):
    """A few steps on grey images with labels, by 4x4 patches: the student, and the saved one, give
    images, whose H over pixels is measured."""
    module, k = importlib.import_module(script), torch.arange(40) % 3
    images = common.Images(torch.randint(256, (40, 1, 36, 36), dtype=torch.uint8), k, 3)
    small = dict(data="mnist", width=8, steps=2, batch=8, teacher_steps=2, accumulate=2, cond=True)
    student, run = module.train(module.Config(**(TINY | small | flags)), images)
    for network in (student, common.load_denoiser(run.dir, run.cfg)):
        x = module.sample(network, 3)
        assert x.shape == (3, 1, 36, 36) and x.isfinite().all() and not network.training
    assert 0 < common.read_json(run.dir / "metrics.json")["H"] < 1
    assert script != "rectflow" or list(run.dir.parent.glob("*/trajectories.png"))


@pytest.mark.parametrize("script, flags", [
    ("fdistill", dict(cond=True, steps=150, teacher_steps=400)),
    ("sim", dict(steps=200, teacher_steps=400)), ("dmd", dict(steps=150, teacher_steps=300))])
def test_short_run_learns_the_ring(script, flags):
    """A fraction of the default run has all modes, each where its label says; else H is 0.009."""
    module = importlib.import_module(script)
    student, run = module.train(module.Config(device="cpu", batch=256, samples=3000, **flags))
    metrics = common.read_json(run.dir / "metrics.json")
    assert metrics["H"] < 0.006 and metrics["mode_min"] > 0.5, metrics
    if student.label_dim:
        x = module.sample(student, 800, torch.eye(8).repeat(100, 1))
        near = torch.cdist(x, common.TOYS["ring"].means).argmin(1)
        assert (near == torch.arange(800) % 8).float().mean() > 0.9


@pytest.mark.parametrize("script", SCRIPTS)
def test_labels_for_an_unconditional_student(script):
    network = common.Denoiser(common.MLP(width=16))
    network.config = {}
    with pytest.raises(common.UserError, match="not class-conditional"):
        importlib.import_module(script).sample(network, 2, torch.eye(2))


@pytest.mark.parametrize("script, flags", [
    ("fdistill", dict(gan_weight=1.0)), ("fdistill", dict(divergence="fkl")),
    ("fdistill", dict(bins=1)), ("dmd", dict(gan_weight=1.0)), ("sim", dict(alpha=1.2)),
    ("consistency", dict(loss="meanflow", equal=0.9)), ("consistency", dict(loss="cd", N=5)),
    ("rectflow", dict(stage="reflow", pairs=64, t_law="ushape"))])
def test_a_flag_changes_the_student(script, flags):
    """From the same seed, another value gives another student."""
    kept = {name: flags[name] for name in ("loss", "stage", "pairs") if name in flags}
    students = []
    for given in (kept, flags):
        train, quick, teacher = prepare(script, given)
        torch.manual_seed(0)
        for p in teacher.parameters() if teacher else []:
            torch.nn.init.normal_(p, 0, 0.1)
        students.append(flat(train(quick(out=f"runs/{len(students)}", **given), None, teacher)[0]))
    assert not students[0].equal(students[1])


@pytest.mark.slow
@pytest.mark.parametrize("script, flags", [
    ("fdistill", {}), ("sim", {}), ("dmd", {}), ("rectflow", dict(stage="flow")),
    ("consistency", dict(loss="scd"))])
def test_compile(script, flags):
    """--compile gives the same student, but for rounding, from 1 to 5 graphs without breaks."""
    from torch._dynamo.utils import counters
    torch._dynamo.reset()
    counters.clear()
    train, quick, teacher = prepare(script, flags)
    plain, compiled = [flat(train(quick(compile=on, out=f"runs/{on}", **flags), None, teacher)[0])
                       for on in (False, True)]
    torch.testing.assert_close(compiled, plain, atol=1e-3, rtol=0)
    assert 1 <= counters["stats"]["unique_graphs"] <= 5 and not counters["graph_break"]
