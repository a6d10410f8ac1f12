"""
Training step: steps per second, peak memory, and measured FLOPs per iteration against the floor of network passes.

    python tests/bench_step.py            # toy and small UNet, CPU or GPU, about two minutes on 2 cores

The floor counts what f-distill cannot do without: per critic update a student forward and a fake-score forward and
backward, per student update a student forward and backward, a fake and a teacher forward, and with a GAN term a backward
through the fake score's encoder to its input (design floor). A discriminator must also see data: an encoder pass forward
and backward per critic update, which the second ratio includes. Each pass is measured alone by the same counter.
"""
import contextlib
import io
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import common
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
    x, sigma = torch.randn(cfg.batch, *data.shape), torch.ones(cfg.batch)
    forward = flops(lambda: net(x, sigma))
    both = flops(lambda: net(x, sigma).sum().backward())
    encoder_both = flops(lambda: net(x, sigma, features="only").sum().backward())
    net.requires_grad_(False)
    encoder = flops(lambda: net(x, sigma, features="only"))
    to_input = flops(lambda: net(x.requires_grad_(), sigma, features="only").sum().backward()) - encoder
    return forward, both, encoder_both, to_input


def bench(name, cfg, timed):
    """One row: a run of a few steps gives FLOPs of a step as a difference, a longer one the time."""
    def run(steps, out):
        out = f"{name}-{out}".replace("/", "")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return fdistill.train(fdistill.Config(**{**vars(cfg), "steps": steps, "out": out}))[1]
    run(1, "warm")                                                              # fits the teacher, outside the counts
    step = flops(lambda: run(3, "three")) - flops(lambda: run(2, "two"))
    seconds = run(timed, "timed").seconds / timed
    forward, both, encoder_both, to_input = passes(cfg)
    k, adversarial = cfg.fake_updates, cfg.gan_weight > 0 or cfg.divergence != "rkl"
    floor = k * (forward + both) + both + 2 * forward + (to_input if cfg.gan_weight else 0)
    with_data = floor + (k * encoder_both if adversarial else 0)
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"| {name} | {1 / seconds:.2f} | {cfg.batch / seconds:.0f} | {step / 1e9:.2f} | {step / floor:.3f} | {step / with_data:.3f} | {peak:.2f} |", flush=True)


if __name__ == "__main__":
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if torch.cuda.is_available() else f'CPU, {torch.get_num_threads()} threads'}")
    print("| case | steps/s | samples/s | GFLOP/step | measured / floor | measured / (floor + data through the discriminator) | peak GiB |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as tmp:
        os.chdir(tmp)
        write_cifar(Path("data"))
        toy = dict(teacher_steps=2, samples=100, every=10**6)
        image = dict(toy, data="cifar10", net="small", batch=32, sigma_min=0.002, sigma_max=80.0, sigma_init=80.0)
        bench("toy, default (js, GAN)", fdistill.Config(**toy), 60)
        bench("toy, rkl, no GAN", fdistill.Config(**toy, divergence="rkl", gan_weight=0.0), 60)
        bench("toy, js, no GAN term", fdistill.Config(**toy, gan_weight=0.0), 60)
        bench("toy, --micro 128", fdistill.Config(**toy, micro=128), 60)
        bench("small UNet 32x32, js, GAN", fdistill.Config(**image), 4)
        bench("small UNet 32x32, rkl, no GAN", fdistill.Config(**image, divergence="rkl", gan_weight=0.0), 4)
