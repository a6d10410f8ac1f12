"""
Training step: steps per second, peak memory, and measured FLOPs per iteration against the floor of network passes.

    python tests/bench_step.py            # toys and small UNet, on a GPU also CIFAR-10's network; about ten minutes on a CPU core

The floor counts what f-distill and DMD2 cannot do without: per critic update a student forward and a fake-score forward and
backward, per student update a student forward and backward, a fake and a teacher forward, and with a GAN term a backward
through the fake score's encoder to its input (design floor). A discriminator must also see data: an encoder pass forward
and backward per critic update, which the second ratio includes. Each pass is measured alone by the same counter.
"""
import contextlib
import io
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import common
import dmd
import fdistill
from test_common import write_cifar


def flops(f):
    with FlopCounterMode(display=False) as counter:
        f()
    return counter.get_total_flops()


def passes(cfg):
    """FLOPs of one batch through the network: forward, forward and backward, the encoder's, and encoder to its input only."""
    data = common.load_data(cfg)
    net = common.build(cfg, data.shape, data.label_dim, data.sigma_data)
    x, sigma = (t.to(common.pick_device(cfg)) for t in (torch.randn(cfg.batch, *data.shape), torch.ones(cfg.batch)))
    forward = flops(lambda: net(x, sigma))
    both = flops(lambda: net(x, sigma).sum().backward())
    encoder_both = flops(lambda: net(x, sigma, features="only").sum().backward())
    net.requires_grad_(False)
    encoder = flops(lambda: net(x, sigma, features="only"))
    to_input = flops(lambda: net(x.requires_grad_(), sigma, features="only").sum().backward()) - encoder
    return forward, both, encoder_both, to_input


def bench(name, module, timed, **kw):
    """One row: a run of a few steps gives FLOPs of a step as a difference, a longer one the time."""
    cfg = module.Config(**kw)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

    def run(steps, out):
        out = f"{name}-{out}".replace("/", "")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return module.train(module.Config(**{**kw, "steps": steps, "out": out}))[1]
    run(1, "warm")                                                              # fits the teacher, outside the counts
    seconds = (run(2 * timed, "longer").seconds - (short := run(timed, "timed")).seconds) / timed       # start-up and compilation cancel
    if cfg.compile:                                                             # a compiled network hides its FLOPs
        print(f"| {name} | {1 / seconds:.2f} | {cfg.batch / seconds:.0f} | | | | {short.peak:.2f} |", flush=True)
        return
    step = flops(lambda: run(3, "three")) - flops(lambda: run(2, "two"))
    forward, both, encoder_both, to_input = passes(cfg)
    k, adversarial = cfg.fake_updates, cfg.gan_weight > 0 or getattr(cfg, "divergence", "rkl") != "rkl"
    floor = k * (forward + both) + both + 2 * forward + (to_input if cfg.gan_weight else 0)
    with_data = floor + (k * encoder_both if adversarial else 0)
    print(f"| {name} | {1 / seconds:.2f} | {cfg.batch / seconds:.0f} | {step / 1e9:.2f} | {step / floor:.3f} | {step / with_data:.3f} | "
          f"{short.peak:.2f} |", flush=True)


if __name__ == "__main__":
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if torch.cuda.is_available() else f'CPU, {torch.get_num_threads()} threads'}")
    print("| case | steps/s | samples/s | GFLOP/step | measured / floor | measured / (floor + data through the discriminator) | peak GiB |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as tmp:
        os.chdir(tmp)
        write_cifar(Path("data"))
        toy = dict(teacher_steps=2, samples=100, every=10**6)
        image = dict(toy, data="cifar10", net="small", batch=32, sigma_min=0.002, sigma_max=80.0, sigma_init=80.0)
        bench("fdistill, toy, default (js, GAN)", fdistill, 60, **toy)
        bench("fdistill, toy, rkl, no GAN", fdistill, 60, **toy, divergence="rkl", gan_weight=0.0)
        bench("fdistill, toy, js, no GAN term", fdistill, 60, **toy, gan_weight=0.0)
        bench("fdistill, toy, --micro 128", fdistill, 60, **toy, micro=128)
        bench("dmd, toy, default (GAN)", dmd, 60, **toy)
        bench("dmd, toy, no GAN", dmd, 60, **toy, gan_weight=0.0)
        bench("fdistill, small UNet 32x32, js, GAN", fdistill, 2, **image)
        bench("fdistill, small UNet 32x32, rkl, no GAN", fdistill, 2, **image, divergence="rkl", gan_weight=0.0)
        bench("dmd, small UNet 32x32, GAN", dmd, 2, **image)
        if torch.cuda.is_available():                                           # not yet run
            full = dict(image, net="ddpmpp", batch=256)
            for name, kw in {"fp32": {}, "bf16": dict(dtype="bf16"), "bf16, --compile": dict(dtype="bf16", compile=True)}.items():
                bench(f"fdistill, 55.7 M network, batch 256, {name}", fdistill, 10, **full, **kw)
