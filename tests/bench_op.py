"""
The weighting op against its plain PyTorch lines, as ratios of one run.

    python tests/bench_op.py            # on a GPU the kernel; without one only the plain lines
"""
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common


def plain(x, d_real, d_fake, h):
    """What the op falls back to."""
    n = (x - d_real).abs().flatten(1).mean(1)
    g = (h / n).view(-1, *[1] * (x.ndim - 1)) * (d_fake - d_real)
    return torch.where(g.isfinite(), g, 0.0)


def seconds(function, args, repeat=20):
    """Median time of one call."""
    times = []
    for _ in range(repeat + 3):
        begin = time.perf_counter()
        function(*args)
        if args[0].is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return sorted(times[3:])[repeat // 2]


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{device}, torch {torch.__version__}, kernel: {device == 'cuda' and common.load_kernel()}")
    for shape in ((4096, 2), (512, 3, 32, 32), (512, 3, 64, 64)):
        args = [torch.randn(shape, device=device) for _ in range(3)]
        args.append(torch.rand(shape[0], device=device))
        op = seconds(common.weighted_score_gradient, args)
        eager, copy = seconds(plain, args) / op, seconds(torch.clone, args[:1]) / op
        print(f"{shape}: op {1e6 * op:.0f} us; plain lines {eager:.2f}, a copy of x {copy:.2f}")
