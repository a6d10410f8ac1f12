"""Shared helpers: the scripts are imported from the folder above and run as a user would, in an empty working folder."""
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
QUICK = ["--steps", "2", "--teacher_steps", "2", "--batch", "16", "--samples", "64", "--every", "2"]


def pytest_configure(config):
    """Warnings are errors, but for PyTorch's own announcement about TorchScript, the format of the FID network."""
    config.addinivalue_line("markers", "background: takes processes of its own; runs on a second core while the others run")
    torch.set_num_threads(1)
    config.addinivalue_line("filterwarnings", "error")
    config.addinivalue_line("filterwarnings", "ignore:.*torch.jit:DeprecationWarning")


def pytest_collection_modifyitems(items):
    """Those that run in the background are asked for their results last: nothing waits for them before."""
    items.sort(key=lambda item: item.get_closest_marker("background") is not None)


def pytest_collection_finish(session):
    """Tests marked `background` begin now, one after the other in a thread; they touch no global state, only their tmp_path."""
    session.pool, waiting = ThreadPoolExecutor(1), [item for item in session.items if item.get_closest_marker("background")]
    for item in [] if session.config.option.collectonly else waiting:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        item.folder = tempfile.TemporaryDirectory(prefix="onestep-")
        item.result = session.pool.submit(item.function, tmp_path=Path(item.folder.name), **params)


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
    """Every test starts from seed 0 in a folder of its own; pictures of images have 9 of them."""
    import common
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "SHOWN", 9)
    torch.manual_seed(0)


def start(script, *args, cwd="."):
    """A script as a process of its own, one thread, output captured."""
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
    return subprocess.Popen([sys.executable, str(ROOT / script), *map(str, args)], cwd=cwd, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(script, *args, cwd="."):
    """(exit code, stdout, stderr) of a script."""
    p = start(script, *args, cwd=cwd)
    out, err = p.communicate(timeout=240)
    return p.returncode, out, err


def start_copy(script, folder, argvs):
    """
    A copy of the script and of common.py alone in a new folder, run there once for each list of arguments: all by one
    process, so that PyTorch is imported once.
    """
    folder.mkdir()
    for name in (script, "common.py"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    loop = f"import runpy, sys\nfor sys.argv in {[[script, *argv] for argv in argvs]}: runpy.run_path(sys.argv[0], run_name='__main__')"
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(folder))
    return subprocess.Popen([sys.executable, "-c", loop], cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def main_in_process(module, *args):
    """(exit code, stderr) of module's command line without the cost of a process; 0 if it ended by itself."""
    import contextlib
    import io
    err = io.StringIO()
    old = sys.argv
    sys.argv = [module.__name__ + ".py", *map(str, args)]
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            module.main(module.Config, module.PRESETS, module.train, module.sample)
        return 0, err.getvalue()
    except SystemExit as e:
        return e.code, err.getvalue()
    finally:
        sys.argv = old


def flat(module):
    """All parameters of a module as one vector."""
    return torch.cat([p.detach().flatten() for p in module.parameters()])


class PowerCut(Exception):
    pass


def check_resume(monkeypatch, train, quick, **kw):
    """4 steps + power cut at 5 + resume = 6 steps in one go: every tensor of last.pt and the metrics agree to the bit."""
    import common
    common.load_teacher(quick(**{k: v for k, v in kw.items() if k == "cond"}))          # the fit would count as updates too
    train(quick(steps=6, out="straight", **kw))
    update, count = common.EMA.update, [0]

    def dying(self, model):
        count[0] += 1
        if count[0] > 5:
            raise PowerCut
        update(self, model)
    with monkeypatch.context() as patch:
        patch.setattr(common.EMA, "update", dying)
        with pytest.raises(PowerCut):
            train(quick(steps=6, out="broken", **kw))
    assert torch.load("broken/last.pt", weights_only=True)["step"] == 4
    train(quick(steps=6, out="broken", resume=True, **kw))
    a, b = (torch.load(f"{d}/last.pt", weights_only=True) for d in ("straight", "broken"))
    torch.testing.assert_close((a["state"], a["rng"]), (b["state"], b["rng"]), rtol=0, atol=0)
    assert len({json.loads(Path(d, "metrics.json").read_text())["H"] for d in ("straight", "broken")}) == 1


def check_micro(train, quick, micros, **kw):
    """The whole batch and its parts, --micro 0 and others, give the same student after 3 steps up to rounding."""
    import common
    whole, *parts = (flat(train(quick(steps=3, micro=micro, out=f"run{micro}", **kw))[0]) for micro in (0, *micros))
    start = flat(common.load_denoiser(next(Path("runs").glob("teacher-*")), quick()))
    assert (whole - start).abs().max() > 1e-4
    for part in parts:
        torch.testing.assert_close(part, whole, rtol=0, atol=2e-6)


class TinyInception(torch.nn.Module):
    """Stands in for the FID network: same call, 8 features."""

    def forward(self, x: torch.Tensor, return_features: bool = True) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1)[:, :8]
