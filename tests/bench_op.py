"""
The weighting op: fused kernel against eager PyTorch and torch.compile, and against the copy bandwidth, all of one run.

    python tests/bench_op.py            # on a GPU under a minute; without one the CPU part and the compiler's figures

Least traffic of the forward pass is four elements per element of x: three read, one written. `bandwidth` is that over the
time, as a share of what copying a large tensor reaches in the same run. Times on a GPU are of CUDA graphs that hold 20 calls
on rotating buffers, together larger than the cache: kernels alone, without the host. `host` is one call outside a graph.
"""
import re
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from common import CUDA_DTYPES, nvrtc, weighted_score_gradient, weighting_constants, weighting_reference, weighting_source

GPU = torch.cuda.is_available()
CASES = [(name, shape, dtype) for name, shape in (("toy", (4096, 2)), ("3x32x32", (512, 3, 32, 32)), ("3x64x64", (512, 3, 64, 64)),
                                                  ("3x256x256", (64, 3, 256, 256))) for dtype in (torch.float32, torch.bfloat16)]
SIZES = {"toy": 2, "3x32x32": 3072, "3x64x64": 12288, "4x64x64": 16384, "3x256x256": 196608, "odd: 3x93x101": 28179}
ARCHS = ["sm_80", "sm_90", "sm_100", "sm_120"]


def registers():
    """What NVRTC says of the kernel: registers of a thread and bytes spilled to memory, for each generation of GPUs."""
    print(f"| case | dtype | threads a sample | blocks a sample | elements a thread | {' | '.join(ARCHS)} |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, size in SIZES.items():
        for dtype in CUDA_DTYPES:
            vec = next(v for v in (8, 4, 2, 1) if v * dtype.itemsize <= 16 and size % v == 0)
            constants, cells = weighting_constants(dtype, "js", size, vec), []
            for arch in ARCHS:
                start = time.time()
                log = nvrtc(weighting_source(constants), arch)[1]
                used, spilled = re.search(r"Used (\d+) registers", log)[1], re.search(r"(\d+) bytes spill stores", log)[1]
                cells.append(f"{used} registers, {spilled} spilled, {time.time() - start:.2f} s")
            print(f"| {name} | {str(dtype)[6:]} | {constants['GROUP']} | {constants['SPLIT']} | {constants['KEEP'] * vec} | "
                  f"{' | '.join(cells)} |", flush=True)


def seconds(call, buffers):
    """Time of call(*buffer), the best of several rounds over all buffers; on a GPU as a replayed CUDA graph."""
    calls = 20 if GPU else len(buffers)
    round_ = lambda: [call(*buffers[i % len(buffers)]) for i in range(calls)]
    if GPU:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            round_()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            round_()
        begin, end, best = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True), float("inf")
        for _ in range(10):
            begin.record(), graph.replay(), end.record()
            torch.cuda.synchronize()
            best = min(best, begin.elapsed_time(end) / 1e3 / calls)
        return best
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        round_()
        best = min(best, (time.perf_counter() - start) / calls)
    return best


def host(call, buffer):
    """Seconds of the host for one call outside a graph."""
    call(*buffer)
    if GPU:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(50):
        call(*buffer)
    spent = (time.perf_counter() - start) / 50
    if GPU:
        torch.cuda.synchronize()
    return spent


def both(op):
    """Forward and backward of an op that returns (g, loss), as the scripts use it."""
    def call(x, *rest):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(op(x, *rest, "js")[1].mean(), x)
    return call


def eager(x, d_real, d_fake, log_ratio, divergence):
    """What one writes without the op: the formula for g, and half the squared distance to x - g for a loss that has it."""
    g, _ = weighting_reference(x.detach(), d_real, d_fake, log_ratio, divergence)
    return g, (x - (x.detach() - g)).float().square().flatten(1).mean(1) / 2


def main():
    device = torch.device("cuda" if GPU else "cpu")
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if GPU else f'CPU, {torch.get_num_threads()} threads'}\n")
    try:
        registers()
    except (OSError, RuntimeError) as e:
        print(f"no figures of the compiler: {e}")
    big = torch.randn(2**28 if GPU else 2**24, device=device)
    copy = 2 * big.nbytes / seconds(lambda a, b: b.copy_(a), [(big, torch.empty_like(big))])
    print(f"\ncopy bandwidth {copy / 1e9:.0f} GB/s")
    ops = {"eager": (weighting_reference, eager)}
    if GPU:
        compiled = tuple(torch.compile(f, dynamic=False) for f in (weighting_reference, eager))
        ops = {"fused": (weighted_score_gradient, weighted_score_gradient), **ops, "torch.compile": compiled}
    else:
        print("no GPU here: only eager PyTorch on the CPU was timed, neither the kernel nor torch.compile")
    print("| case | dtype | op | forward, us | over the first | bandwidth | forward + backward, us | over the first | host, us |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, shape, dtype in CASES if GPU else CASES[:4:2]:
        nbytes, first = 4 * torch.Size(shape).numel() * dtype.itemsize, None
        make = lambda: (*(torch.randn(shape, device=device).to(dtype) for _ in range(3)), torch.randn(shape[0], device=device))
        buffers = [make() for _ in range(max(1, min(20, 2**28 // nbytes)) if GPU else 1)]
        for label, (op, pair) in ops.items():
            forward, row = (lambda *a: op(*a, "js")), f"| {name} B={shape[0]} | {str(dtype)[6:]} | {label} "
            try:
                t, t2, t3 = seconds(forward, buffers), seconds(both(pair), buffers), host(forward, buffers[0])
            except Exception as e:                          # no Triton
                print(f"{row}| {type(e).__name__}: {str(e).splitlines()[0][:60]} |")
                continue
            first = first or (t, t2)
            print(f"{row}| {t * 1e6:.1f} | {t / first[0]:.2f} | {nbytes / t / copy:.0%} | {t2 * 1e6:.1f} | {t2 / first[1]:.2f} | {t3 * 1e6:.0f} |",
                  flush=True)


if __name__ == "__main__":
    main()
