"""The scripts as a user runs them: every toy, kill and resume, Ctrl-C, full disk, NaN, folders of other runs, copying."""
import ast
import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import QUICK, ROOT, PowerCut, main_in_process, run, start, start_copy

SCRIPTS = ["fdistill.py", "dmd.py", "sim.py", "consistency.py", "rectflow.py"]
TOYS = ["ring", "grid", "unequal", "moons", "spiral", "checkerboard"]


def log_rows(folder):
    return list(csv.DictReader((folder / "log.csv").read_text().splitlines()))


@pytest.mark.background
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_toy(script, tmp_path):
    """Copied alone with common.py, each script runs on each toy, leaves the documented files, ends with the measured distance."""
    name, argv = script[:-3], [["--data", toy, *QUICK, *["--cond"] * (toy in ("moons", "unequal"))] for toy in TOYS]
    if name == "rectflow":                                          # its default is three stages: not on every toy
        one = lambda toy: ["--stage", "distill", "--out", f"runs/rectflow-{toy}-0"] if toy != "ring" else []
        argv = [a + ["--pairs", "64", *one(toy)] for a, toy in zip(argv, TOYS)]
    process = start_copy(script, tmp_path / name, argv + [["--sample", f"runs/{name}-moons-0", "--samples", "10"]])
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert np.load(tmp_path / f"{name}/runs/{name}-moons-0/draw.npy").shape == (10, 2) and "draw.png" in out.splitlines()[-1]
    for toy in TOYS:
        folder = tmp_path / f"{name}/runs/{name}-{toy}-0"
        assert " H " in [line for line in out.splitlines() if line.startswith(f"{name} {toy} seed 0")][-1]
        files = {"config.json", "log.csv", "samples.png", "samples", "last.pt", "ema.pt", "metrics.json"}
        assert {p.name for p in folder.iterdir()} - {"draw.npy", "draw.png"} == files
        assert [p.name for p in sorted((folder / "samples").iterdir())] == ["0000002.png"]
        metrics, config = (json.loads((folder / f).read_text()) for f in ("metrics.json", "config.json"))
        assert metrics["n"] == 64 and abs(metrics["H"]) < 1 and metrics["step"] == 2 and config["data"] == toy
        rows = log_rows(folder)
        assert rows[-1]["step"] == "2" and all(np.isfinite(float(v)) for row in rows for v in row.values())


def test_budget(monkeypatch):
    """--budget replaces --steps: half for the teacher's fit, schedules that go by time, also over a power cut; each stage its share."""
    import common
    import consistency
    import fdistill
    import rectflow
    clock, seen, update, factor = [0.0], [], common.EMA.update, fdistill.lr_factor

    def second(self, model):                                        # each update takes one
        update(self, model)
        clock[0] += 1.0

    def spy(progress):
        seen.append(progress)
        if len(seen) == 6:
            raise PowerCut
        return factor(progress)
    monkeypatch.setattr(common, "time", SimpleNamespace(time=lambda: clock[0]))
    monkeypatch.setattr(common.EMA, "update", second)
    monkeypatch.setattr(fdistill, "lr_factor", spy)
    for module in (fdistill, consistency, rectflow):                # 5000 teacher samples in each picture take the longest
        monkeypatch.setattr(module, "gallery", lambda *a: common.gallery(*a, n=100))
    flags = dict(budget="20s", batch=16, samples=64, every=2, out="run")
    with pytest.raises(PowerCut):
        fdistill.train(fdistill.Config(**flags))
    clock[0] += 1000
    run = fdistill.train(fdistill.Config(**flags, resume=True))[1]
    steps = lambda folder: json.loads((folder / "metrics.json").read_text())["step"]
    assert seen == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, *[0.4, 0.5, 0.6, 0.7, 0.8, 0.9]]) and run.step == 10
    fdistill.train(fdistill.Config(**flags, resume=True))           # finished: nothing is left to do
    assert len(seen) == 12 and steps(next(Path("runs").glob("teacher-*"))) == 10
    assert consistency.train(consistency.Config(**{**flags, "loss": "ct", "budget": "0.1m", "out": "ct"}))[1].step == 6      # no teacher: all of it
    rectflow.train(rectflow.Config(**{**flags, "budget": "12s", "out": "chain", "pairs": 64}))
    assert [steps(Path(f)) for f in ("chain-flow", "chain-reflow", "chain")] == [4, 4, 4]
    for wrong in ("20", "m", "-5m", "0s", "1e3s"):
        with pytest.raises(common.UserError, match="--budget is a time"):
            common.check(fdistill.Config(budget=wrong))


def wait_for(condition, process, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.time() < end
        time.sleep(0.01)


@pytest.mark.background
@pytest.mark.parametrize("script", SCRIPTS[:1])           # the folder is common.py's; resume is tested for each script
def test_kill_and_resume(script, tmp_path):
    """kill -9 while training and while saving (a checkpoint every step), resumed each time: the same student to the bit."""
    flags = ["--steps", "10", "--teacher_steps", "5", "--batch", "64", "--samples", "64", "--every", "1", "--width", "64"]
    code, _, err = run(script, *flags, "--out", "straight", cwd=tmp_path)
    assert code == 0, err
    for pause in (0.0, 0.3):
        process = start(script, *flags, "--out", "killed", "--resume", cwd=tmp_path)
        marker = tmp_path / "killed/last.pt"
        before = marker.stat().st_mtime if marker.exists() else 0
        wait_for(lambda: marker.exists() and marker.stat().st_mtime > before, process)
        time.sleep(pause)
        process.kill()
        process.communicate()
        torch.load(marker, weights_only=True)                       # whole, whenever the kill came
    code, _, err = run(script, *flags, "--out", "killed", "--resume", cwd=tmp_path)
    assert code == 0, err
    a, b = (torch.load(tmp_path / d / "ema.pt", weights_only=True)["model"] for d in ("straight", "killed"))
    assert all(torch.equal(a[k], b[k]) for k in a) and not list((tmp_path / "killed").rglob("*.part"))
    assert [r["step"] for r in log_rows(tmp_path / "killed")] == [str(i) for i in range(1, 11)]


@pytest.mark.background
@pytest.mark.parametrize("script", SCRIPTS[:1])           # the folder is common.py's; resume is tested for each script
def test_ctrl_c(script, tmp_path):
    """Ctrl-C saves the step it is in, says how to go on, exits with 130, and the run can be finished."""
    flags = ["--steps", "2000", "--teacher_steps", "5", "--batch", "64", "--samples", "64", "--every", "50", "--width", "64", "--out", "run"]
    process = start(script, *flags, cwd=tmp_path)
    wait_for(lambda: (tmp_path / "run/last.pt").exists(), process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "continue with --resume" in err and "Traceback" not in err
    step = torch.load(tmp_path / "run/last.pt", weights_only=True)["step"]
    assert f"saved at step {step}" in err
    process = start(script, *flags, cwd=tmp_path)                   # without --resume nothing is lost either
    wait_for((tmp_path / "run~1/last.pt").exists, process)
    process.kill()
    process.communicate()


def test_full_disk(monkeypatch, tmp_path):
    """When a checkpoint cannot be written the run ends with one sentence, the one before it is whole, and room lets it go on."""
    import resource

    import common
    import fdistill
    flags = [*QUICK, "--width", "256", "--every", "1", "--out", "run"]
    limits, save = resource.getrlimit(resource.RLIMIT_FSIZE), common.Run.save

    def save_then_fill(run):
        save(run)
        if run.script == "fdistill":
            resource.setrlimit(resource.RLIMIT_FSIZE, (Path("run/ema.pt").stat().st_size - 8192, limits[1]))    # no file may be larger
    try:
        with monkeypatch.context() as patch:
            patch.setattr(common.Run, "save", save_then_fill)
            code, err = main_in_process(fdistill, *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and err.splitlines()[-1].startswith("fdistill.py: could not write run/ema.pt") and "Traceback" not in err, err
    assert torch.load("run/last.pt", weights_only=True)["step"] == 1 and not list(Path().rglob("*.part"))
    code, err = main_in_process(fdistill, *flags, "--resume")
    assert code == 0 and torch.load("run/last.pt", weights_only=True)["step"] == 2, err


def test_nan_stops_the_run(tmp_path, monkeypatch):
    """A loss that is no number ends the run with step and term named; the checkpoint before it stays."""
    import fdistill
    flags = [*QUICK, "--steps", "6", "--every", "2", "--out", "run"]
    loss, calls = fdistill.gan_loss, [0]

    def bad(logit):
        calls[0] += 1
        return loss(logit) * (float("nan") if calls[0] == 4 else 1)
    monkeypatch.setattr(fdistill, "gan_loss", bad)
    code, err = main_in_process(fdistill, *flags)
    assert code == 2 and "gan became nan at step 3" in err.splitlines()[-1]
    saved = torch.load("run/last.pt", weights_only=True)
    assert saved["step"] == 2 and all(v.isfinite().all() for v in saved["state"]["G"].values())


def test_folders_are_never_overwritten(tmp_path):
    """Other settings or another folder: refused with the difference named. The same settings: the old run is set aside."""
    import fdistill
    flags = [*QUICK, "--out", "run"]
    assert main_in_process(fdistill, *flags, "--teacher", "typo.pt")[0] == 2        # a false start leaves nothing to protect
    assert main_in_process(fdistill, *flags)[0] == 0
    code, err = main_in_process(fdistill, *flags, "--lr", "0.5")
    assert code == 2 and "--lr 0.002 there, 0.5 here" in err
    code, err = main_in_process(fdistill, *flags, "--lr", "0.5", "--resume")
    assert code == 2 and "--lr" in err
    first = Path("run/last.pt").read_bytes()
    assert main_in_process(fdistill, *flags)[0] == 0 and Path("run~1/last.pt").read_bytes() == first
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    code, err = main_in_process(fdistill, *QUICK, "--out", "mine")
    assert code == 2 and "no run folder" in err and Path("mine/thesis.txt").exists()
    Path("run/last.pt").write_bytes(first[:1000])
    code, err = main_in_process(fdistill, *flags, "--resume")
    assert code == 2 and "last.pt is damaged" in err


@pytest.mark.background
def test_two_processes_never_share_a_folder(tmp_path):
    """While one process works in a folder a second one is refused; two that fit the same teacher take turns."""
    flags = ["--steps", "150", "--teacher_steps", "60", "--batch", "64", "--samples", "64", "--every", "1000", "--width", "64"]
    first, other = start("fdistill.py", *flags, cwd=tmp_path), start("fdistill.py", *flags, "--seed", "1", cwd=tmp_path)
    wait_for((tmp_path / "runs/fdistill-ring-0/config.json").exists, first)
    code, _, err = run("fdistill.py", *flags, "--divergence", "fkl", cwd=tmp_path)
    assert code == 2 and "another process is working in" in err
    for process in (first, other):
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
    teacher, = (tmp_path / "runs").glob("teacher-*")
    assert [r["step"] for r in log_rows(teacher)] == ["50", "60"]


def test_a_bad_path_disturbs_no_finished_run(tmp_path):
    """Data and teacher are read before the folder is touched; folders that cannot be made are one sentence."""
    import fdistill
    assert main_in_process(fdistill, *QUICK, "--out", "run")[0] == 0
    before = sorted(Path("run").rglob("*"))
    assert main_in_process(fdistill, *QUICK, "--out", "run", "--teacher", "typo.pt")[0] == 2
    assert sorted(Path("run").rglob("*")) == before and not Path("run~1").exists()
    code, err = main_in_process(fdistill, *QUICK, "--out", "/dev/null/x")
    assert code == 2 and err.splitlines()[-1].startswith("fdistill.py: ")


def test_a_teacher_of_nans_is_noticed(tmp_path, monkeypatch):
    """The weighting op turns non-finite gradients into zeros; the logged gap still tells."""
    import fdistill
    load = fdistill.load_teacher

    def broken(cfg, data):
        teacher = load(cfg, data)
        for p in teacher.parameters():
            p.fill_(float("nan"))
        return teacher
    monkeypatch.setattr(fdistill, "load_teacher", broken)
    monkeypatch.setattr(fdistill, "initial_student", common_student)
    code, err = main_in_process(fdistill, *QUICK, "--out", "run")
    assert code == 2 and "gap became nan at step 0" in err


def common_student(cfg, teacher, data):
    """A student that does not come from the (broken) teacher."""
    import common
    G = common.build(cfg, data.shape, data.label_dim, data.sigma_data)
    G.sigma_init = cfg.sigma_init
    return G


def test_drawing_from_what_is_no_student_of_this_script(tmp_path):
    """A teacher, a run of another script (its sampler would fail or give nonsense), and python common.py sample with --sample."""
    import common
    import consistency
    import dmd
    import fdistill
    import rectflow
    import sim
    sampling = SimpleNamespace(__name__="common", main=common.main, Config=common.Sampling, PRESETS=common.SAMPLING,
                               train=common.sample_teacher, sample=common.sample_teacher)
    assert main_in_process(fdistill, *QUICK, "--out", "run")[0] == 0
    code, err = main_in_process(fdistill, "--sample", str(next(Path("runs").glob("teacher-*"))))
    assert code == 2 and "not a one-step student" in err
    for other in (consistency, dmd, rectflow, sim, sampling):
        code, err = main_in_process(other, "--sample", "run", "--samples", "2")
        assert code == 2 and "a run of another script" in err, other
    code, err = main_in_process(fdistill, "--sample", "run", "--samples", "0")
    assert code == 2 and "--samples" in err


# ---- the house rules ----


@pytest.mark.parametrize("script", ["common.py", *SCRIPTS])
def test_imports(script):
    """A script needs the standard library, five packages and common.py; none imports another script."""
    tree = ast.parse((ROOT / script).read_text())
    names = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert names - set(sys.stdlib_module_names) <= {"torch", "numpy", "matplotlib", "tqdm", "common"} - {script[:-3]}


@pytest.mark.background
def test_import_does_no_work(tmp_path):
    """Importing a script prints nothing, writes nothing and leaves the random generator alone."""
    code = "import torch; a = torch.get_rng_state(); import fdistill, dmd, sim, consistency, rectflow; assert torch.equal(a, torch.get_rng_state())"
    p = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": "", "PYTHONDONTWRITEBYTECODE": "1"},
                       capture_output=True, text=True)
    assert p.returncode == 0 and p.stdout == p.stderr == "" and not list(tmp_path.iterdir())


def test_full_memory(monkeypatch):
    """Too large a --batch is one sentence on a CPU as on a GPU; other errors of PyTorch stay what they are."""
    import fdistill
    code, err = main_in_process(fdistill, *QUICK, "--batch", 10**15, "--out", "run", "--teacher", "exact")
    assert code == 2 and "memory is full: lower --micro (now 1000000000000000" in err, err
    for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError()):
        def train(cfg, error=error):
            raise error
        monkeypatch.setattr(fdistill, "train", train)
        code, err = main_in_process(fdistill)
        assert code == 2 and "memory is full" in err

    def broken(cfg):
        raise RuntimeError("shapes differ")
    monkeypatch.setattr(fdistill, "train", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        main_in_process(fdistill)
