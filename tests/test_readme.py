"""README as a newcomer reads it: commands and code run, small; tables and links are true."""
import importlib
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from conftest import ROOT, SCRIPTS, TinyInception, main_in_process, run     # first: sets the path
import common

README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "notebooks/results.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    python (\w+)\.py\b(.*)", README, re.M)
MEASURED = re.findall(rf"`({'|'.join(SCRIPTS)})\.py([^`]*)`", RESULTS)
MEASURED += [("consistency", flags) for flags in re.findall("`(--loss [^`]+)`", RESULTS)]
SMALL = ("--steps 2 --teacher_steps 2 --batch 64 --samples 8 --accumulate 1 --device cpu "
         "--dtype fp32")


def build_world(folder):
    """What the commands name, tiny, in this folder."""
    from PIL import Image
    (folder / "data/mnist").mkdir(parents=True)
    pixels, digits = os.urandom(20 * 784), bytes(i % 10 for i in range(20))
    (folder / "data/mnist/train-images-idx3-ubyte").write_bytes(bytes(16) + pixels)
    (folder / "data/mnist/train-labels-idx1-ubyte").write_bytes(bytes(8) + digits)
    (folder / "FOLDER/cats").mkdir(parents=True)
    for i in range(4):
        pixels = torch.randint(256, (16, 16, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"FOLDER/cats/{i}.png")
    torch.jit.script(TinyInception()).save(folder / "FILE")


@pytest.mark.background
def test_commands(tmp_path):
    """Every command but those that want official files, one after the other; few words."""
    assert len(README.split()) <= 1300
    assert len(COMMANDS) >= 10
    code, out, err = run(__file__, "README", cwd=tmp_path)
    assert code == 0, out + err


@pytest.mark.slow
@pytest.mark.background
def test_commands_of_the_results(tmp_path):
    """Every command of the toys' tables."""
    assert len({*MEASURED}) >= 30
    code, out, err = run(__file__, "results", cwd=tmp_path)
    assert code == 0, out + err


def code_of(mark):
    """The Python block of README that holds these words."""
    block, = [b for b in re.findall(r"```python\n(.*?)```", README, re.S) if mark in b]
    return block


def test_own_loop(capsys):
    """The loop with own network and data, as printed but for its number of updates."""
    exec(code_of("class Net").replace("steps = Net(), 1500", "steps = Net(), 60"), {})
    assert 0 < float(capsys.readouterr().out.split()[1]) < 0.5


def test_python_example(no_pictures):
    """The call from Python, with fewer updates."""
    names = {}
    few = "steps=3, teacher_steps=3, samples=64"
    exec(code_of("fdistill.train(cfg)").replace("steps=500", few), names)
    assert names["x"].shape == (1000, 2)


def test_own_images_on_a_gpu():
    """What README writes for them is a Config with CIFAR-10's network for the user's folder."""
    module = importlib.import_module("fdistill")
    names = vars(module) | {}
    for line in re.findall(r"`(cfg[ .].*?)`", README):
        exec(line, names)
    want = module.Config(data="cifar10", dtype="bf16", cond=False)
    want.data, want.data_dir = "images", "FOLDER"
    assert names["cfg"] == want and want.net == "ddpmpp"


def test_digits_are_measured(no_pictures, capsys, monkeypatch):
    """bench_digits gives a row for held-out images, for the teacher and for each finished run."""
    import bench_digits
    import compare
    build_world(Path())
    flags = "--data mnist --width 8 --out runs/one".split()
    assert main_in_process(importlib.import_module("sim"), *SMALL.split(), *flags)[0] == 0

    def reads_four(x):
        return torch.eye(10)[[4] * len(x)]

    monkeypatch.setattr(bench_digits, "fit_judge", lambda train: reads_four)
    bench_digits.main(["--data_dir", "data/mnist", "--teacher", "runs/one", "runs/one"])
    shares = re.findall(r"^\| (.+?) \| (\d+\.0)% \|", capsys.readouterr().out, re.M)
    assert shares == [("other held-out images", "0.0"),         # of 3 and 9; samples of 4 and 5
                      ("teacher, 35 calls", "50.0"), ("runs/one", "50.0")]
    assert Path("runs/mnist.png").exists()
    # compare trains from the same teacher, and adds FID, precision and recall of few samples
    flags = "--data mnist --data_dir data/mnist --teacher runs/one --fid FILE --samples 20"
    compare.main(["sim:width=8,steps=2,minutes=0,batch=8", *flags.split(), "--seeds", "1"])
    rows = [line.split(" | ") for line in Path("runs/compare-mnist/compare.md").open()]
    assert rows[0][3:6] == compare.QUALITY and len(rows) == 4
    assert all(float(cell) >= 0 for row in rows[2:] for cell in row[3:6])
    monkeypatch.setattr(compare, "run_teacher", lambda *_: pytest.fail("too late"))
    with pytest.raises(common.UserError, match="cannot be used"):
        compare.main(["sim", *flags.replace("FILE", "nowhere").split()])


def test_small_networks_are_searched(capsys, monkeypatch):
    """bench_search gives a row a setting, with losses of images that were held out."""
    import bench_search
    build_world(Path())
    monkeypatch.setattr(bench_search, "HELD", 2)
    flags = "--data images --data_dir FOLDER --cond --minutes 0.001".split()
    bench_search.main([*flags, "batch=2,width=8,mult=(1, 2)", "cond=False,width=8,mult=(1, 2)"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 4 and rows[3][0] == "| cond=False,width=8,mult=(1, 2)"
    assert all(0 < float(loss.strip("| ")) < 9 for row in rows[2:] for loss in row[3:])


def test_numbers_of_lines():
    """The table of methods says how long each script is."""
    for name in SCRIPTS:
        row, = re.findall(rf"^\| .*\[`{name}.py`\].*", README, re.M)
        assert f"| {len((ROOT / f'{name}.py').read_text().splitlines())} |" in row


def test_links():
    """Every file that README and the results point to is there; every picture is shown, 300 KB."""
    files = [README, RESULTS, *(p.read_text() for p in ROOT.glob("notebooks/**/*.ipynb"))]
    for picture in (ROOT / "notebooks/img").iterdir():
        assert picture.stat().st_size <= 300_000 and any(picture.name in f for f in files)
    for path in (ROOT / "README.md", ROOT / "notebooks/results.md"):
        text = path.read_text(encoding="utf-8")
        targets = [t for t in re.findall(r"\]\(([^)#\s]+)\)", text) if "http" not in t]
        assert targets and all((path.parent / t).exists() for t in targets), targets


if __name__ == "__main__":
    build_world(Path())
    torch.set_num_threads(1)
    common.Run.show = lambda self, *given: None                     # no time for pictures
    common.teacher_samples = lambda cfg, teacher, z, *given: z
    commands = [("fdistill", " --out runs/fdistill-ring-0"), *COMMANDS]     # --sample names it
    for script, rest in sorted({*MEASURED}) if sys.argv[1] == "results" else commands:
        args = shlex.split(rest, comments=True)
        if any(arg.endswith(".pkl") for arg in args) or args == ["--loss", "L"]:
            continue
        module, small = importlib.import_module(script), SMALL.split()
        if script == "rectflow":
            small += ["--pairs", "64"]
        if "mnist" in args or "images" in args:
            small += ["--width", "8"]
        if "--sample" in args:
            small = ["--samples", "8"]
        code, err = main_in_process(module, *args, *small)
        assert code == 0, f"{script} {args}: {err}"
