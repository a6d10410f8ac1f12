"""
Small teachers, each fitted for as long, judged by held-out loss: how --net small was chosen.

    python tests/bench_search.py --data cifar10 --data_dir data --cond --flip --minutes 1.5
    python tests/bench_search.py --data images --data_dir FOLDER --cond --minutes 1.5 taken patch=4

Settings that are named are tried instead of VARIANTS, "batch=64,lr=2e-3" for two at once. HELD
images are held out. The columns are EDM's denoising loss of them at levels whose ln sigma has the
mean -1.2, -0.6 and 0: comparable within a column. Minutes are of CPU time; on a busy machine
they hold fewer updates, so look at their number too. The dtype is a setting; --dtype does nothing.
"""
import copy
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fdistill
from common import (Denoiser, Images, UNet, denoising_loss, in_parts, load_data, lognormal_sigma,
                    parse, place, set_lr, update_ema)

HELD = 1000
# What is taken; the attention is at half the side of the patches' grid.
TAKEN = dict(width=32, mult=(1, 2, 4), blocks=1, attention=True, adm=True, patch=2, direct=False,
             dtype="bf16", cond=True, flip=True, batch=32, lr=4e-3, mean=-0.6, ema=0.999, seed=0)
VARIANTS = ("taken", "seed=1", "direct=True", "dtype='fp32'", "patch=1,width=16,mult=(1, 2, 4, 8)",
            "patch=4", "patch=4,direct=True", "width=24", "width=48", "blocks=2", "attention=False",
            "adm=False", "batch=16", "batch=64", "lr=2e-3", "lr=8e-3", "mean=-1.2", "mean=0.0",
            "ema=0.99", "ema=0.9995", "cond=False", "flip=False")


def fit(how, cfg, train):
    """The average of a network fitted for --minutes of CPU time, and its number of updates."""
    torch.manual_seed(how["seed"])
    channels, side, _ = train.shape
    attention = (side // how["patch"] // 2,) if how["attention"] else ()
    net = UNet(side, channels, train.label_dim, how["width"], how["mult"], how["blocks"], attention,
               0, how["adm"], how["patch"], how["direct"])
    D = place(Denoiser(net, train.sigma_data, how["dtype"]), cfg)
    ema = copy.deepcopy(D).eval().requires_grad_(False)
    opt = torch.optim.Adam(D.parameters(), betas=(0.9, 0.99), fused=True)
    start, step, progress = time.process_time(), 0, 0.0
    while progress < 1:
        set_lr(opt, how["lr"], progress, warmup=0.05)
        x, label = train.sample(how["batch"])
        sigma = lognormal_sigma(x, mean=how["mean"])
        answer = D(x + sigma * torch.randn_like(x), sigma, label)
        denoising_loss(answer, x, sigma, train.sigma_data).mean().backward()
        opt.step()
        opt.zero_grad()
        update_ema(ema, D, how["ema"], step)
        step += 1
        progress = (time.process_time() - start) / 60 / cfg.minutes
    return ema, step


def split(how, images, labels, classes):
    """Two data sets: the images to train on, and those held out."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    parts = []
    for i, flip in ((order[HELD:], how["flip"]), (order[:HELD], False)):
        labels_i = labels[i] if how["cond"] else None
        parts.append(Images(images[i], labels_i, classes, flip=flip))
    return parts


@torch.no_grad()
def held_out(D, test):
    """Losses of the held-out images, from the same noise for every network."""
    x, label = test.take(torch.arange(len(test.images)))
    losses = []
    for mean in (-1.2, -0.6, 0.0):
        torch.manual_seed(0)
        sigma = lognormal_sigma(x, mean=mean)
        answer = in_parts(D, x + sigma * torch.randn_like(x), sigma, label)
        losses.append(denoising_loss(answer, x, sigma, test.sigma_data).mean().item())
    return losses


def main(argv):
    named = [arg for arg in argv if arg == "taken" or "=" in arg and not arg.startswith("--")]
    cfg = parse(fdistill.Config, fdistill.PRESETS, [arg for arg in argv if arg not in named])
    cfg.device = "cpu"                                  # its minutes are what is counted
    torch.set_num_threads(1)
    data = load_data(cfg)
    print("| setting | million parameters | updates | loss at -1.2 | at -0.6 | at 0 |")
    print("|---|---|---|---|---|---|")
    for name in named or VARIANTS:
        how = TAKEN | dict(cond=cfg.cond, flip=cfg.flip)
        if name != "taken":
            how |= eval(f"dict({name})")            # one's own command line
        train, test = split(how, data.images, data.labels if cfg.cond else None, data.label_dim)
        D, step = fit(how, cfg, train)
        size = sum(weight.numel() for weight in D.parameters()) / 1e6
        losses = " | ".join(f"{loss:.4f}" for loss in held_out(D, test))
        print(f"| {name} | {size:.2f} | {step:,} | {losses} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
