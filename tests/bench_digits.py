"""
Digits, or own images in sub-folders, of the five scripts from one teacher, judged by three numbers.

    python tests/bench_digits.py --data_dir data/mnist --dtype bf16 --minutes 5     # trains all
    python tests/bench_digits.py --data_dir data/mnist --teacher RUN RUN RUN ...
    python tests/bench_digits.py --data images --data_dir FOLDER --teacher RUN RUN RUN ...
    python tests/bench_digits.py --data_dir data/mnist --minutes 10 --ship notebooks/digits.pt

The first line fits a teacher for --minutes, then trains each script's student from it for as long,
and measures; the next two measure finished runs; the last fits a teacher and saves it in half
precision, as the notebooks have it. A quarter of the images is held out from a small classifier.
At most 2,000 samples with labels as those: `as asked` is the share that it reads as the class asked
for; H the energy coefficient over pixels against held-out images; sharpness the mean squared
Laplacian over theirs.
"""
import argparse
import functools
import importlib
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import (Images, energy_coefficient, gallery, heun_sample, in_parts, load_data,
                    load_teacher, save_denoiser, save_picture)

MOST = 2000                                             # samples


def split(data):
    """Images to train a classifier on, and a quarter held out: (x, one-hot labels). They are drawn,
    since every fourth of MNIST's is of other writers than the rest."""
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
    held, rest = order[:len(order) // 4], order[len(order) // 4:]
    return Images(data.images[rest], data.labels[rest], data.label_dim), data.take(held)


def fit_judge(train):
    """A classifier of x (N, C, H, W), which it sees at less than 64x64; trained by 1,200 updates."""
    torch.manual_seed(0)
    channels, side, _ = train.shape
    smaller = max(1, side // 32)
    judge = nn.Sequential(
        nn.AvgPool2d(smaller), nn.Conv2d(channels, 32, 4, 2, 1), nn.ReLU(),
        nn.Conv2d(32, 64, 4, 2, 1), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3),
        nn.Linear(64 * (side // smaller // 4)**2, train.label_dim))
    opt = torch.optim.Adam(judge.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 1200)
    for _ in range(1200):
        x, label = train.sample(128)
        F.cross_entropy(judge(x), label).backward()
        opt.step()
        opt.zero_grad()
        schedule.step()
    return judge.eval().requires_grad_(False)


def roughness(x):
    """Mean squared Laplacian of images (N, C, H, W)."""
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])
    return float(F.conv2d(x.flatten(0, 1)[:, None], kernel[None, None]).square().mean())


def measure(cfg, data, teacher, runs):
    """Print a row for held-out images, for the teacher, and for each (script, folder) of runs."""
    train, (held, labels) = split(data)
    judge = fit_judge(train)

    def share(x, label):
        return float((in_parts(judge, x).argmax(1) == label.argmax(1)).float().mean())

    n = min(MOST, len(held) // 2)
    real, label = held[:n], labels[:n]
    panels, z, shown = gallery(cfg, data)
    print(f"\nThe classifier reads {share(held, labels):.2%} of {len(held):,} held-out images "
          f"rightly.\n\n| {n:,} samples | as asked | H | sharpness | CPU seconds |")
    print("|---|---|---|---|---|")

    def line(name, x, label, start):
        x, seconds = x.clamp(-1, 1), time.process_time() - start
        print(f"| {name} | {share(x, label):.1%} | {energy_coefficient(x, real):.4f} | "
              f"{roughness(x) / roughness(real):.2f} | {seconds:.1f} |", flush=True)

    line("other held-out images", held[n:2 * n], labels[n:2 * n], time.process_time())
    solve, start = functools.partial(heun_sample, teacher), time.process_time()
    torch.manual_seed(0)
    line("teacher, 35 calls", in_parts(solve, torch.randn_like(real), label), label, start)
    panels["teacher"] = solve(z, shown)
    for script, folder in runs:
        student = load_teacher(replace(cfg, teacher=str(folder)), data)
        sample, start = importlib.import_module(script).sample, time.process_time()
        torch.manual_seed(0)
        line(folder, sample(student, n, label), label, start)
        panels[script] = sample(student, len(shown), shown)
    save_picture(Path(f"runs/{cfg.data}.png"), panels)
    print(f"\nruns/{cfg.data}.png")


def main(argv=None):
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("runs", nargs="*")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--teacher", default="")
    parser.add_argument("--data", choices=("mnist", "images"), default="mnist")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--ship")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    shared = dict(data=args.data, data_dir=args.data_dir, cond=True, dtype=args.dtype, device="cpu")
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
