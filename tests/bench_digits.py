"""
Digits of the five scripts from one teacher, judged by three numbers.

    python tests/bench_digits.py --data_dir data/mnist --minutes 5      # fits, trains, measures
    python tests/bench_digits.py --data_dir data/mnist --teacher RUN RUN RUN ...
    python tests/bench_digits.py --data_dir data/mnist --minutes 10 --ship notebooks/digits.pt

The first line fits a teacher for --minutes, then trains each script's student from it for as long;
the second measures finished runs; the third fits a teacher and saves it in half precision, as the
notebooks have it. MNIST's t10k files must lie in --data_dir. 2,000 samples, 200 of a class: `as
asked` is the share that a small classifier reads as the class asked for; H the energy coefficient
over pixels against 2,000 test images; sharpness the mean squared Laplacian over theirs.
"""
import argparse
import functools
import gzip
import importlib
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import (energy_coefficient, heun_sample, in_parts, load_data, load_teacher,
                    save_denoiser, save_picture)

EACH = 200                                              # samples of a class


def read_test(folder):
    """MNIST's 10,000 test images (N, 1, 28, 28) in [-1, 1], and their classes (N,)."""
    raw = []
    for name in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        path = Path(folder) / name
        raw.append(path.read_bytes() if path.exists() else gzip.open(f"{path}.gz").read())
    x = torch.tensor(np.frombuffer(raw[0], np.uint8, offset=16)).view(-1, 1, 28, 28)
    return x / 127.5 - 1, torch.tensor(np.frombuffer(raw[1], np.uint8, offset=8)).long()


def fit_judge(data, test, path=Path("runs/digits-judge.pt")):
    """A classifier, trained by 1,200 updates or read from path, and its accuracy on test images."""
    torch.manual_seed(0)
    judge = nn.Sequential(nn.Conv2d(1, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 4, 2, 1),
                          nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 49, 10))
    if path.exists():
        judge.load_state_dict(torch.load(path, weights_only=True))
    else:
        opt = torch.optim.Adam(judge.parameters(), 2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 1200)
        for _ in range(1200):
            x, label = data.sample(128)
            F.cross_entropy(judge(x), label).backward()
            opt.step()
            opt.zero_grad()
            schedule.step()
        path.parent.mkdir(exist_ok=True)
        torch.save(judge.state_dict(), path)
    judge.eval().requires_grad_(False)
    return judge, float((judge(test[0]).argmax(1) == test[1]).float().mean())


def roughness(x):
    """Mean squared Laplacian of images (N, 1, H, W)."""
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])
    return float(F.conv2d(x, kernel[None, None]).square().mean())


def measure(cfg, data, teacher, runs):
    """Print a row for test images, for the teacher, and for each (script, folder) of runs."""
    test = read_test(cfg.data_dir)
    judge, accuracy = fit_judge(data, test)
    asked = torch.arange(10).repeat_interleave(EACH)
    label = F.one_hot(asked).float()
    # evenly spread: the first 5,000 test images were written by other people than the last
    rows = [(test[1] == k).nonzero().flatten() for k in range(10)]
    places = [torch.arange(EACH) * len(row) // EACH for row in rows]
    real = test[0][torch.cat([row[i] for row, i in zip(rows, places)])]
    other = test[0][torch.cat([row[i + 1] for row, i in zip(rows, places)])]
    print(f"\nThe classifier reads {accuracy:.2%} of the 10,000 test images rightly.\n")
    print("| samples | as asked | H | sharpness | CPU seconds |\n|---|---|---|---|---|")
    panels = {}

    def line(name, draw):
        name = str(name)
        torch.manual_seed(0)
        start = time.process_time()
        x = draw().clamp(-1, 1)
        seconds = time.process_time() - start
        share = float((judge(x).argmax(1) == asked).float().mean())
        sharp = roughness(x) / roughness(real)
        panels[Path(name).name.split("-")[0]] = x.unflatten(0, (10, EACH))[:, :8].flatten(0, 1)
        print(f"| {name} | {share:.1%} | {energy_coefficient(x, real):.4f} | {sharp:.2f} | "
              f"{seconds:.1f} |", flush=True)

    line("2,000 other test images", lambda: other)
    solve = functools.partial(heun_sample, teacher)
    line("teacher, 35 calls", lambda: in_parts(solve, torch.randn_like(real), label))
    for script, folder in runs:
        student = load_teacher(replace(cfg, teacher=str(folder)), data)
        sample = importlib.import_module(script).sample
        line(folder, lambda: sample(student, len(label), label))
    save_picture(Path("runs/digits.png"), panels)
    print("\nruns/digits.png")


def main(argv=None):
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("runs", nargs="*")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--teacher", default="")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--ship")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    shared = dict(data="mnist", data_dir=args.data_dir, device="cpu")
    fdistill = importlib.import_module("fdistill")
    cfg = fdistill.Config(**shared, teacher=args.teacher, minutes=2 * args.minutes)    # half: fit
    data = load_data(cfg)
    teacher = load_teacher(cfg, data)
    if args.ship:
        teacher.half()
        save_denoiser(args.ship, teacher, replace(cfg, data_dir="data"))
        teacher = load_teacher(replace(cfg, teacher=args.ship), data)
    about = [Path(run) / "config.json" for run in args.runs]
    runs = [(json.loads(path.read_text())["script"], path.parent) for path in about]
    every = ("fdistill", "dmd", "sim", "consistency", "rectflow")
    for script in [] if runs or args.ship else every:
        module, cpu = importlib.import_module(script), time.process_time()
        _, run = module.train(module.Config(**shared, minutes=args.minutes), teacher=teacher)
        print(f"{(time.process_time() - cpu) / 60:.1f} minutes of CPU")
        runs.append((script, run.dir))
    measure(cfg, data, teacher, runs)


if __name__ == "__main__":
    main()
