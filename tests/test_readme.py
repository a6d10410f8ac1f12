"""README as a newcomer reads it: every command runs (at small size), the example is a method, the tables are true."""
import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from conftest import ROOT, TinyInception, main_in_process   # first: it puts the scripts on the path
import common
import consistency
import dmd
import fdistill
import rectflow
import sim
from common import UNet
from edm_format import edm_bytes
from test_common import write_cifar
from test_images import write_batches

README = (ROOT / "README.md").read_text()
SCRIPTS = dict(fdistill=fdistill, dmd=dmd, sim=sim, consistency=consistency, rectflow=rectflow)
COMMANDS = re.findall(r"^    (?:pip install -r requirements.txt && )?python (\w+\.py\b.*)", README.replace("\\\n", ""), re.M)
SMALL = "--steps 2 --teacher_steps 2 --batch 16 --micro 0 --samples 4 --every 2".split()


def build_world():
    """What the commands name, tiny, in the working folder: data sets, checkpoints in EDM's format, the FID network."""
    write_cifar(Path("data/cifar-10-batches-bin"), n=8)
    Path("DIR").mkdir()
    write_batches(Path("DIR"), [8])
    torch.jit.script(TinyInception()).save("data/inception-2015-12-05.pt")
    for name, net in (("cifar10-32x32-cond-vp", UNet.ddpmpp(label_dim=10, width=4, blocks=1)), ("imagenet-64x64-cond-adm", UNet.adm(width=4, blocks=1))):
        Path(f"edm-{name}.pkl").write_bytes(edm_bytes(net.state_dict()))


def run_command(command):
    """As it stands in README; only flags that make it small come last."""
    script, *args = shlex.split(command, comments=True)
    small, toy = list(SMALL), "cifar10" not in args and "imagenet64" not in args
    if script == "common.py":
        module, small, args = SimpleNamespace(__name__="common", main=common.main, Config=common.Sampling, PRESETS=common.SAMPLING,
                                              train=common.sample_teacher, sample=None), ["--samples", "4", "--heun", "2"], args[1:]
        toy = True                                          # it takes no --batch
    elif script == "regress.py":                            # the example of a new method, out of README itself
        example, = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if '"regress"' in block]
        Path(script).write_text(example)
        sys.path.insert(0, ".")
        module = importlib.import_module("regress")
    else:
        module = SCRIPTS[script[:-3]]
    small += ["--pairs", "16"] * (script == "rectflow.py") + ["--fid_ref", "16"] * ("--fid" in args) + ["--budget", "1s"] * ("--budget" in args)
    small += [] if toy else ["--batch", "2"] + ["--fake_updates", "1"] * hasattr(module.Config, "fake_updates")
    small += ["--net", "small", "--width", "4"] * (not toy and "--teacher" not in args)
    small = ["--samples", "4"] if "--sample" in args else small
    return main_in_process(module, *args, *small, "--device", "cpu", "--dtype", "fp32")


@pytest.mark.background
def test_commands(tmp_path):
    """Every command of README, one after the other in one folder, with the few files that they name."""
    assert len(COMMANDS) > 15
    p = subprocess.run([sys.executable, __file__], cwd=tmp_path, env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=240)
    assert p.returncode == 0, p.stdout + p.stderr


def names_used(module, functions):
    """Names of common.py that the functions of a script use, themselves or through others of the script."""
    tree = {n.name: n for n in ast.parse(Path(module.__file__).read_text()).body if isinstance(n, ast.FunctionDef)}
    todo, done, used = list(functions), set(), set()
    while todo:
        name = todo.pop()
        if name in tree and name not in done:
            done.add(name)
            todo += [n.id for n in ast.walk(tree[name]) if isinstance(n, ast.Name)]
        elif getattr(getattr(common, name, module), "__module__", "common") == "common" and not isinstance(getattr(common, name, module), ModuleType) \
                and name[0] != "_":
            used.add(name)
    return used


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_a_copy_takes_along(name):
    """The table's third column is what the losses in the second really use."""
    row, = [line for line in README.splitlines() if line.startswith(f"| `{name}.py` | `")]
    losses, needed = (re.findall(r"`(\w+)`", cell) for cell in row.split("|")[2:4])
    assert all(hasattr(SCRIPTS[name], f) for f in losses)
    assert names_used(SCRIPTS[name], losses) == set(needed)


def test_numbers_of_lines():
    """The table of methods says how long each script is."""
    for name, module in SCRIPTS.items():
        row, = [line for line in README.splitlines() if line.startswith("| ") and f"[`{name}.py`]" in line]
        assert f"| {len(Path(module.__file__).read_text().splitlines())} |" in row


def test_links():
    """Every picture and file that README points to is there."""
    targets = [t for t in re.findall(r"\]\(([^)#\s]+)\)", README) if not t.startswith("http")]
    assert len(targets) > 5 and all((ROOT / t).exists() for t in targets), [t for t in targets if not (ROOT / t).exists()]


if __name__ == "__main__":
    common.SHOWN, real = 4, common.heun_sample
    for module in (common, dmd, rectflow):                  # the teacher's own samples, in the picture and in pairs, take the longest
        module.heun_sample = lambda D, z, label=None, steps=18, *a, **kw: real(D, z, label, min(steps, 2), *a, **kw)
    build_world()
    for command in [*COMMANDS, "regress.py --cond --out runs/labels", "regress.py --sample runs/labels", "regress.py --budget 1s --out runs/clock"]:
        code, err = run_command(command)
        assert code == 0, f"{command}: {err}"
