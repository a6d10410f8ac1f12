"""Several processes: the same weights as one, resume across their number, and what remains when one of them is killed."""
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT, PowerCut, run        # first: it puts the scripts on the path
import common
import consistency
import dmd
import fdistill
import rectflow
import sim

TINY = dict(steps=20, teacher_steps=4, batch=32, samples=64, every=10, width=32)
SCRIPTS = dict(fdistill=(fdistill, dict(cond=True)), dmd=(dmd, dict(micro=8)), sim=(sim, {}), pairs=(dmd, dict(variant="dmd", pairs=40)),
               consistency=(consistency, dict(loss="sprint", micro=8)), rectflow=(rectflow, dict(stage="guided", pairs=64)))
ENV = dict(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", CUDA_VISIBLE_DEVICES="")


def train(name, out, cut=None, **kw):
    """Train a script in this process, or as one of several; `cut`: the power fails in that step."""
    module, own = SCRIPTS[name]
    update, show, count = common.EMA.update, common.Run.show, [0]

    def dying(self, model):
        count[0] += 1
        if count[0] > cut:
            raise PowerCut
        update(self, model)
    cfg = module.Config(**{**TINY, **own, **kw, "out": str(out)})
    common.load_teacher(cfg)                                # its updates do not count
    common.Run.show = lambda *_: None                       # pictures take longer than the training
    if cut:
        common.EMA.update = dying
    try:
        module.train(cfg)
    except PowerCut:
        pass
    finally:
        common.EMA.update, common.Run.show = update, show


def work():
    """One of two processes: fdistill up to a power cut, the rest of a dmd run that one process began, all of the others."""
    common.join_processes()
    assert common.processes() == 2
    train("fdistill", "fdistill", cut=13)
    train("dmd", "dmd", resume=True)
    train("sim", "sim")
    train("pairs", "pairs")
    train("consistency", "consistency")
    train("rectflow", "rectflow")
    clock = SimpleNamespace(time=lambda: (1 + common.rank()) * time.time())                     # the second one's runs twice as fast:
    common.time = clock
    train("sim", "budget", budget="2s")                     # they must agree when to stop
    common.any_process(False)
    print(f"rank {common.rank()} prints")
    common.dist.destroy_process_group()                     # else gloo's threads may outlive the interpreter, which aborts


def assert_same_run(a, b):
    """Every tensor of two checkpoints to 1e-5: networks, EMA, optimiser states, bins, and the random generator to the bit."""
    a, b = (torch.load(folder / "last.pt", weights_only=True) for folder in (a, b))
    assert a["step"] == b["step"] == 20 and torch.equal(a["rng"][0], b["rng"][0])
    torch.testing.assert_close(a["state"], b["state"], rtol=1e-5, atol=1e-5)


def test_two_processes_equal_one(tmp_path, monkeypatch):
    """20 steps of each script with the same global batch; resumed with twice or half as many processes in between."""
    one, two = tmp_path / "one", tmp_path / "two"
    two.mkdir(), one.mkdir()
    monkeypatch.chdir(two)
    train("dmd", two / "dmd", cut=13)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = dict(os.environ, **ENV, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", TORCHELASTIC_RUN_ID="test")
    workers = [subprocess.Popen([sys.executable, __file__], env=dict(env, RANK=str(r), LOCAL_RANK=str(r)), text=True, cwd=two,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for r in (0, 1)]
    (out0, err0), (out1, err1) = (w.communicate(timeout=120) for w in workers)
    assert [w.returncode for w in workers] == [0, 0], err0 + err1
    assert "rank 0 prints" in out0 and "dmd ring seed 0" in out0 and out1 == "" and "sim: " in err0 and "sim: " not in err1
    assert torch.load(two / "fdistill/last.pt", weights_only=True)["step"] == 10
    assert torch.load(two / "budget/last.pt", weights_only=True)["last"]
    train("fdistill", two / "fdistill", resume=True)
    monkeypatch.chdir(one)
    for name in SCRIPTS:
        train(name, one / name)
        assert_same_run(one / name, two / name)
        assert len((one / name / "log.csv").read_text().splitlines()) == len((two / name / "log.csv").read_text().splitlines()) == 3


@pytest.mark.background
def test_a_killed_process_ends_the_run(tmp_path):
    """torchrun, one process killed while training: one clear sentence, a whole checkpoint, and one process can go on."""
    flags = ["--steps", "4000", "--teacher_steps", "5", "--batch", "16", "--samples", "64", "--every", "20", "--width", "16"]
    flags += ["--out", "run"]
    err = open(tmp_path / "err", "w")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "fdistill.py"), *flags]
    torchrun = subprocess.Popen(command, cwd=tmp_path, env=dict(os.environ, **ENV), stdout=subprocess.DEVNULL, stderr=err, text=True)
    try:
        end = time.time() + 120
        while not (tmp_path / "run/last.pt").exists():
            assert torchrun.poll() is None and time.time() < end, (tmp_path / "err").read_text()
            time.sleep(0.05)
        children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
        victim, = [int(c) for c in children if b"\0RANK=1\0" in Path(f"/proc/{c}/environ").read_bytes()]
        os.kill(victim, signal.SIGKILL)
        assert torchrun.wait(60) != 0
    finally:
        torchrun.kill()
        torchrun.wait(), err.close()
    said = [line for line in re.split(r"[\r\n]", (tmp_path / "err").read_text()) if "fdistill.py: " in line]
    assert len(said) == 1 and "another process of this run died" in said[0] and "--resume" in said[0]
    step = torch.load(tmp_path / "run/last.pt", weights_only=True)["step"]
    assert step % 20 == 0 and not list((tmp_path / "run").rglob("*.part"))
    flags[1] = str(step)                                    # nothing left to do but to measure: a quick end
    config = tmp_path / "run/config.json"
    config.write_text(config.read_text().replace('"steps": 4000', f'"steps": {step}'))
    code, _, err = run("fdistill.py", *flags, "--resume", cwd=tmp_path)
    assert code == 0 and (tmp_path / "run/metrics.json").exists(), err


@pytest.mark.parametrize("batch, micro, sentence", [(15, 0, "--batch 15 does not divide into 2 processes"),
                                                    (16, 16, "2 processes times --micro 16")])
def test_shares_must_be_even(batch, micro, sentence, monkeypatch):
    monkeypatch.setattr(common, "processes", lambda: 2)
    with pytest.raises(common.UserError, match=sentence):
        common.check(fdistill.Config(batch=batch, micro=micro, device="cpu"))


if __name__ == "__main__":
    work()
