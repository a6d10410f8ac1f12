"""Shared helpers: the scripts are imported from the folder above and run as a user would, in an empty working folder."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
QUICK = ["--steps", "2", "--teacher_steps", "2", "--batch", "16", "--samples", "64", "--every", "1"]


def pytest_configure(config):
    """Warnings are errors, but for PyTorch's own announcement about TorchScript, the format of the FID network."""
    config.addinivalue_line("filterwarnings", "error")
    config.addinivalue_line("filterwarnings", "ignore:.*torch.jit:DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """Every test starts from seed 0 in a folder of its own."""
    monkeypatch.chdir(tmp_path)
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
