"""Shared helpers: scripts are imported from the folder above and run as a user would run them."""
import contextlib
import copy
import io
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SCRIPTS = ["fdistill", "dmd", "sim", "consistency", "rectflow"]
QUICK = "--steps 2 --teacher_steps 2 --batch 256 --samples 64 --every 2".split()
TINY = dict(device="cpu", steps=4, batch=32, width=16, teacher_steps=20, samples=200, every=2)
F64 = torch.float64


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also what .ci/run adds: every notebook")


def pytest_collection_modifyitems(config, items):
    for item in items if not config.option.slow else []:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="minutes long: asked for by --slow"))


def pytest_configure(config):
    """Warnings that our own files cause are errors; PyTorch has announcements of its own."""
    config.addinivalue_line("markers", "slow: takes minutes; only with --slow")
    config.addinivalue_line("markers", "background: takes processes of its own; runs meanwhile")
    for name in ("common", *SCRIPTS):
        config.addinivalue_line("filterwarnings", f"error:::{name}$")
    torch.set_num_threads(1)


def pytest_collection_finish(session):
    """Tests in the background begin now, one by one; their results are asked for last."""
    session.pool = ThreadPoolExecutor(1)
    session.items.sort(key=lambda item: item.get_closest_marker("background") is not None)
    for item in [] if session.config.option.collectonly else session.items:
        if item.get_closest_marker("background") and not item.get_closest_marker("skip"):
            params = item.callspec.params if hasattr(item, "callspec") else {}
            item.folder = tempfile.TemporaryDirectory(prefix="onestep-")
            item.result = session.pool.submit(item.function, Path(item.folder.name), **params)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    if hasattr(pyfuncitem, "result"):
        pyfuncitem.result.result()
        pyfuncitem.folder.cleanup()
        return True


def pytest_sessionfinish(session):
    if hasattr(session, "pool"):
        session.pool.shutdown(cancel_futures=True)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """Every test starts from seed 0 in a folder of its own; a teacher's fit draws no picture."""
    import common
    show = common.Run.show
    monkeypatch.setattr(common.Run, "show", lambda run, *given:
                        None if run.script == "teacher" else show(run, *given))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.fixture
def no_pictures(monkeypatch):
    """Runs draw nothing and solve no ODE for a picture: most of a short run's time."""
    import common

    def gallery(cfg, data, teacher=None):
        with torch.random.fork_rng([]):
            return {}, torch.randn(2, *data.shape).to(common.pick_device(cfg)), None

    monkeypatch.setattr("fdistill.gallery", gallery)
    monkeypatch.setattr("sim.gallery", gallery)
    monkeypatch.setattr("dmd.gallery", gallery)
    monkeypatch.setattr("common.Run.show", lambda self, *given: None)
    monkeypatch.setattr("common.draw_log", lambda folder: None)


def start(*args, cwd=".", **env):
    """A script of ours, or `-c CODE`, as a process of its own, one thread, output captured."""
    first = ROOT / args[0] if args[0].endswith(".py") else args[0]
    return subprocess.Popen(
        [sys.executable, first, *map(str, args[1:])], cwd=cwd, text=True, stdout=-1, stderr=-1,
        env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1", **env))


def run(*args, cwd=".", **env):
    """(exit code, stdout, stderr) of it."""
    process = start(*args, cwd=cwd, **env)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def main_in_process(module, *args, out=None):
    """(exit code, stderr) of a module's command line without the cost of a process."""
    err, out = io.StringIO(), out or io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
        try:
            with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
                module.main(module.Config, module.PRESETS, module.train, module.sample)
        except SystemExit as e:
            return e.code, err.getvalue()
    return 0, err.getvalue()


def flat(module):
    """All parameters of a module as one vector."""
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def check_resume(train, quick, *given, **flags):
    """4 steps, an exception in the 5th's update_ema, --resume: last.pt as after 6 steps in one go,
    to the bit. quick(**flags) makes the Config; `given` is data, teacher and so on for train."""
    module, calls = sys.modules[train.__module__], []
    update = module.update_ema

    def dying(*args):
        calls.append(args)
        if len(calls) > 4:
            raise RuntimeError("power cut")
        update(*args)

    def go(out, **more):
        return train(quick(steps=6, every=2, out=out, **flags, **more), *copy.deepcopy(given))

    go("runs/straight")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="cut"):
        patch.setattr(module, "update_ema", dying)
        go("runs/broken")
    go("runs/broken", resume=True)
    whole, parts = [torch.load(f"runs/{name}/last.pt") for name in ("straight", "broken")]
    for saved in (whole, parts):                        # time alone may differ
        assert saved.pop("seconds") and [row.pop(1) for row in saved["history"]]
    assert calls and whole.pop("history") == parts.pop("history")
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)


class TinyInception(torch.nn.Module):
    """Stands in for the FID network: same call, 12 features of 3 channels."""

    def forward(self, x: torch.Tensor, return_features: bool = True) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1)


# In closed form, 1-D: teacher N(0, 1), student x = m + s z with m = 0.7, s = 0.8, its score exact.


def hermite(n):
    """Gauss-Hermite for two normal numbers: z, eps (n * n, 1), their weights (n * n,)."""
    nodes, w = [torch.tensor(v) for v in np.polynomial.hermite_e.hermegauss(n)]
    z, eps = torch.cartesian_prod(nodes, nodes).split(1, 1)
    return z, eps, torch.outer(w, w).flatten() / w.sum() ** 2


def student_slope(loss, sigma, attached=False):
    """d/d(m, s) of E loss(x, d_real, d_fake, r) with r = p / q; x_t may depend on x, or not."""
    from common import GaussianMixture, level
    z, eps, w = hermite(80)
    x = (0.7 + 0.8 * z).requires_grad_()
    x_t, sigma = x + sigma * eps, level(x, sigma)
    x_t = x_t if attached else x_t.detach()
    p = GaussianMixture(torch.zeros(1, 1, dtype=F64), 1.0)
    q = GaussianMixture(torch.full((1, 1), 0.7, dtype=F64), 0.8)
    r = (p.log_prob(x_t, sigma) - q.log_prob(x_t, sigma)).exp().detach()
    g, = torch.autograd.grad(loss(x, p(x_t, sigma), q(x_t, sigma), r).sum(), x)
    return torch.stack([(w * g[:, 0]).sum(), (w * (g * z)[:, 0]).sum()])


def divergence_slope(f, sigma, frozen=False):
    """d/d(m, s) of the integral of q f(r, y), y the denoisers' difference; q moves, or not."""
    m, s = [torch.tensor(v, dtype=F64, requires_grad=True) for v in (0.7, 0.8)]
    x_t = torch.linspace(-14, 14, 40001, dtype=F64) * (0.64 + sigma**2) ** 0.5
    q = torch.distributions.Normal(m, (s**2 + sigma**2).sqrt()).log_prob(x_t)
    p = torch.distributions.Normal(0 * m, (1 + sigma**2) ** 0.5).log_prob(x_t)
    y = m + s**2 / (s**2 + sigma**2) * (x_t - m) - x_t / (1 + sigma**2)
    law = q.exp().detach() if frozen else q.exp()
    value = torch.trapezoid(law * f((p - q).exp(), y), x_t)
    return torch.stack(torch.autograd.grad(value, (m, s)))
