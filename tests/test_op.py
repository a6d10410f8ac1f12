"""The weighting op against its formula, and its CUDA kernel's own text, run on the CPU by g++."""
import ctypes
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import torch

import common
from common import UserError, loss_with_gradient, weighted_score_gradient

SHAPES = [(5, 2), (1, 1), (3, 257), (4, 3, 8, 8), (2, 3, 17, 19), (300, 2)]


def inputs(shape):
    return [*torch.randn(3, *shape), torch.rand(shape[0]) + 0.5]


def formula(x, d_real, d_fake, h):
    """One sample at a time in float64; 0 where it is not finite."""
    rows = []
    for a, real, fake, weight in zip(x.double(), d_real.double(), d_fake.double(), h.double()):
        rows.append(weight * (fake - real) / (a - real).abs().mean())
    g = torch.stack(rows)
    return torch.where(g.isfinite(), g, 0.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_formula(shape):
    args = inputs(shape)
    g = weighted_score_gradient(*args)
    assert g.dtype == torch.float32 and not g.requires_grad
    torch.testing.assert_close(g.double(), formula(*args), rtol=2e-5, atol=1e-6)


def broken_inputs():
    """n = 0, a NaN in x, and elements of d_fake that are infinite or NaN."""
    x, d_real, d_fake, h = inputs((5, 40))
    d_real[0], x[1, 3], d_fake[2, 5], d_fake[2, 6] = x[0], torch.nan, torch.inf, torch.nan
    h[3] = torch.inf
    return x, d_real, d_fake, h


def test_non_finite_elements_become_zero():
    """They alone: the others of the sample, and other samples, are as they were."""
    g = weighted_score_gradient(*broken_inputs())
    assert g.isfinite().all() and g.count_nonzero(1).tolist() == [0, 0, 38, 0, 40]
    assert weighted_score_gradient(*inputs((0, 2))).shape == (0, 2)


def test_loss_with_gradient():
    """Its gradient in x is g / M, its value mean(g^2) / 2; nothing else gets a gradient."""
    x, *rest = [t.requires_grad_() for t in inputs((4, 3, 2, 2))]
    g, w = weighted_score_gradient(x, *rest), torch.rand(4)
    loss = loss_with_gradient(x, g)
    (w * loss).sum().backward()
    want = g.square().flatten(1).mean(1) / 2
    torch.testing.assert_close(loss.detach(), want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(x.grad, w.view(4, 1, 1, 1) * g / 12, rtol=1e-4, atol=1e-6)
    assert all(t.grad is None for t in rest)


def test_wrong_shapes():
    for k, shape in ((1, (4, 3)), (2, (4, 1)), (3, (3,)), (3, (4, 1))):
        args = inputs((4, 2))
        args[k] = torch.zeros(shape)
        with pytest.raises(UserError):
            weighted_score_gradient(*args)


def test_a_compiler_that_fails(monkeypatch):
    """One warning with its reason, then for ever the reference."""
    def fail(*_, **__):
        raise RuntimeError("NVRTC error 6")

    common.load_kernel.cache_clear()
    monkeypatch.setattr(torch.cuda, "_compile_kernel", fail, raising=False)
    with pytest.warns(UserWarning, match="NVRTC error 6"):
        assert common.load_kernel() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert common.load_kernel() is None
    common.load_kernel.cache_clear()


# ---- the kernel's text on the CPU: 1,024 threads of one block that meet at __syncthreads ----

SHIM = r"""
#include <barrier>
#include <cmath>
#include <thread>
#include <vector>
struct Dim { int x; };
static thread_local Dim threadIdx, blockIdx;
static std::barrier meet(1024);
static void __syncthreads() { meet.arrive_and_wait(); }
using std::isfinite;
#define __global__
#define __shared__ static
"""
RUN = r"""
extern "C" void run(int blocks, float* x, float* d_real, float* d_fake, float* h, float* g, int n) {
    std::vector<std::thread> threads;
    for (int t = 0; t < 1024; t++) threads.emplace_back([=] {
        for (int b = 0; b < blocks; b++) {
            threadIdx.x = t, blockIdx.x = b;
            weighted_score_gradient(x, d_real, d_fake, h, g, n);
            __syncthreads();
        }
    });
    for (auto& thread : threads) thread.join();
}
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """The kernel behind the shim, called as load_kernel's is."""
    path = tmp_path_factory.mktemp("kernel") / "kernel.cpp"
    path.write_text(SHIM + common.WEIGHTING_CUDA + RUN)
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-o", f"{path}.so", path]
    if not shutil.which("g++") or subprocess.run(command).returncode:
        pytest.skip("needs a g++ that knows C++20")
    library = ctypes.CDLL(f"{path}.so")

    def launch(grid, block, args):
        assert block == (1024, 1, 1) and grid[1:] == (1, 1)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in args[:-1]]
        library.run(grid[0], *pointers, args[-1])

    return launch


def by_kernel(kernel, x, d_real, d_fake, h):
    g = torch.empty_like(x)
    kernel((len(x), 1, 1), (1024, 1, 1), (x, d_real, d_fake, h, g, x[0].numel()))
    return g


@pytest.mark.parametrize("shape", SHAPES[:5])
def test_kernel_is_the_formula(shape, kernel):
    args = inputs(shape)
    got = by_kernel(kernel, *args)
    torch.testing.assert_close(got.double(), formula(*args), rtol=2e-5, atol=1e-6)
    args = broken_inputs()
    torch.testing.assert_close(by_kernel(kernel, *args), weighted_score_gradient(*args))


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"])
def test_kernel_compiles(arch):
    """By NVRTC from the wheel nvidia-cuda-nvrtc, or of a CUDA build of PyTorch."""
    path = next(Path(torch.__file__).parent.parent.glob("nvidia/*/lib/libnvrtc.so*"), None)
    if not path:
        pytest.skip("needs the wheel nvidia-cuda-nvrtc")
    lib, program, source = ctypes.CDLL(str(path)), ctypes.c_void_p(), common.WEIGHTING_CUDA.encode()
    options = (ctypes.c_char_p * 1)(f"-arch={arch}".encode())
    assert lib.nvrtcCreateProgram(ctypes.byref(program), source, b"", 0, None, None) == 0
    error = lib.nvrtcCompileProgram(program, 1, options)
    if error == 5:                                              # NVRTC_ERROR_INVALID_OPTION
        pytest.skip(f"this NVRTC is too old for {arch}")
    assert error == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", [*SHAPES, (512, 3, 64, 64)])
def test_kernel_on_a_gpu(shape):
    """It is taken, for any layout, and is the reference, which runs on the CPU."""
    args = inputs(shape)
    moved = [t.cuda().transpose(0, -1).contiguous().transpose(0, -1) for t in args]
    got = weighted_score_gradient(*moved).cpu()
    torch.testing.assert_close(got, weighted_score_gradient(*args))
    assert common.load_kernel() is not None
