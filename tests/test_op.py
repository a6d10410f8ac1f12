"""The weighting op: forward and backward against autograd of the plain formula, dtypes, layouts, opcheck, bad values."""
import contextlib
import ctypes
import re
import shutil
import types
import warnings

import pytest
import torch

import common
from common import CUDA_DTYPES, F_DIVERGENCES, UserError, nvrtc, weighted_score_gradient, weighting_cuda, weighting_reference
from cuda_on_cpu import CDLL, Driver

SHAPES = [(5, 2), (1, 2), (4, 3, 8, 8), (3, 3, 7, 5), (2, 1, 1, 1), (3, 4, 16, 16)]


def inputs(shape, dtype=torch.float32, layout="contiguous"):
    tensors = [torch.randn(shape).to(dtype) for _ in range(3)]
    if layout == "channels_last" and len(shape) == 4:
        tensors = [t.contiguous(memory_format=torch.channels_last) for t in tensors]
    if layout == "strided":
        tensors = [torch.stack([t, t], -1)[..., 0] for t in tensors]
    return (*tensors, torch.randn(shape[0]))


def plain(x, d_real, d_fake, log_ratio, divergence):
    """The formula one sample at a time in float64, with f'' from autograd: nothing shared with the implementation."""
    g = []
    for b in range(len(x)):
        r = log_ratio[b].double().clamp(-10, 10).exp().requires_grad_()
        slope, = torch.autograd.grad(F_DIVERGENCES[divergence].f(r), r, create_graph=True)
        curvature, = torch.autograd.grad(slope, r)
        diff = (x[b].double() - d_real[b].double()).abs().sum() / x[b].numel()
        g.append(r.detach() ** 2 * curvature / diff * (d_fake[b].double() - d_real[b].double()))
    return torch.stack(g)


@pytest.mark.parametrize("divergence", F_DIVERGENCES)
@pytest.mark.parametrize("shape", SHAPES[:4])
def test_gradient_is_the_formula(shape, divergence):
    """g = r^2 f''(r) (d_fake - d_real) / mean|x - d_real|, with f'' by double autograd of f itself."""
    args = inputs(shape)
    g, loss = weighted_score_gradient(*args, divergence)
    want = plain(*args, divergence)
    torch.testing.assert_close(g.double(), want, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(loss.double(), want.square().flatten(1).mean(1) / 2, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(shape, layout, dtype, tol):
    """The gradient of sum_b w_b loss_b in x is w_b g_b / M, of the dtype and shape of x, whatever the layout."""
    x, d_real, d_fake, log_ratio = inputs(shape, dtype, layout)
    x.requires_grad_()
    g, loss = weighted_score_gradient(x, d_real, d_fake, log_ratio, "js")
    w = torch.rand(shape[0])
    (w * loss).sum().backward()
    want = plain(x.detach(), d_real, d_fake, log_ratio, "js")
    assert g.dtype == x.dtype and x.grad.dtype == dtype and loss.dtype == torch.float32 and not g.requires_grad
    torch.testing.assert_close(g.double(), want, rtol=tol, atol=tol * want.abs().max().item())
    want = want * w.double().reshape(-1, *[1] * (x.ndim - 1)) / x[0].numel()
    torch.testing.assert_close(x.grad.double(), want, rtol=3 * tol, atol=3 * tol * want.abs().max().item())


def test_only_x_gets_a_gradient():
    """Scores and ratio are constants of the student's loss (f-distill, Theorem 1: h is not differentiated)."""
    args = [a.requires_grad_() for a in inputs((4, 2))]
    weighted_score_gradient(*args, "fkl")[1].sum().backward()
    assert args[0].grad is not None and all(a.grad is None for a in args[1:])


@pytest.mark.parametrize("shape, dtype", [((4, 2), torch.float32), ((2, 3, 4, 4), torch.bfloat16), ((0, 2), torch.float32)])
def test_opcheck(shape, dtype):
    """torch.library.opcheck: schema, autograd registration, FakeTensor and AOT dispatch agree."""
    x, *rest = inputs(shape, dtype)
    torch.library.opcheck(torch.ops.onestep.weighted_score_gradient.default, (x.requires_grad_(), *rest, "hellinger"))


def test_non_finite_elements_become_zero():
    """x = d_real makes n = 0, an infinite d_fake one infinite element: both give 0 there and leave the others alone."""
    x, d_real, d_fake, log_ratio = inputs((3, 4))
    d_real[0] = x[0]
    d_fake[1, 2] = float("inf")
    g, loss = weighted_score_gradient(x, d_real, d_fake, log_ratio, "rkl")
    assert (g[0] == 0).all() and g[1, 2] == 0 and (g[1, [0, 1, 3]] != 0).all() and loss.isfinite().all()
    torch.testing.assert_close(g[2], weighted_score_gradient(x[2:], d_real[2:], d_fake[2:], log_ratio[2:], "rkl")[0][0])


def test_overflow_of_half_precision_becomes_zero():
    """Elements that are finite in float32 but not in fp16 count as not finite."""
    x, d_real = torch.zeros(1, 2, dtype=torch.float16), torch.full((1, 2), 1e-3, dtype=torch.float16)
    g, loss = weighted_score_gradient(x, d_real, torch.tensor([[1000.0, 1.0]], dtype=torch.float16), torch.zeros(1), "rkl")
    assert g[0, 0] == 0 and g[0, 1] > 900 and loss.isfinite().all()


def test_log_ratio_is_clamped():
    """Log ratios beyond +-10 count as +-10."""
    args = inputs((3, 2))[:3]
    far, edge = torch.tensor([-1e4, 0.0, 1e4]), torch.tensor([-10.0, 0.0, 10.0])
    assert torch.equal(weighted_score_gradient(*args, far, "fkl")[0], weighted_score_gradient(*args, edge, "fkl")[0])


def test_compile_sees_one_node():
    """torch.compile(fullgraph=True) traces through the op without a break, forward and backward."""
    x, *rest = inputs((6, 2))
    f = torch.compile(lambda x: (weighted_score_gradient(x * 2, *rest, "js")[1] * 3).sum(), fullgraph=True, backend="aot_eager")
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    f(a).backward()
    (weighted_score_gradient(b * 2, *rest, "js")[1] * 3).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("bad", [dict(divergence="kl"), dict(d_real=torch.zeros(4, 3)), dict(log_ratio=torch.zeros(3))])
def test_bad_input(bad):
    args = dict(zip(("x", "d_real", "d_fake", "log_ratio"), inputs((4, 2))), divergence="rkl")
    with pytest.raises(UserError):
        weighted_score_gradient(**{**args, **bad})


@pytest.mark.parametrize("name", F_DIVERGENCES)
def test_h_belongs_to_f(name):
    """h(r) = r^2 f''(r) in float64, f convex and f(1) = 0."""
    r = torch.logspace(-2, 2, 50, dtype=torch.float64).requires_grad_()
    f, h = F_DIVERGENCES[name]
    slope, = torch.autograd.grad(f(r).sum(), r, create_graph=True)
    curvature, = torch.autograd.grad(slope.sum(), r)
    torch.testing.assert_close(h(r), r**2 * curvature, rtol=1e-9, atol=1e-12)
    assert (curvature > 0).all() and abs(f(torch.ones(1, dtype=torch.float64)).item()) < 1e-12


def test_importing_common_does_no_work():
    """The reference is what the op runs on a CPU; nothing was compiled at import."""
    args = inputs((4, 2))
    for a, b in zip(weighted_score_gradient(*args, "js"), common.weighting_reference(*args, "js")):
        assert torch.equal(a, b)


# ---- the CUDA kernel, on a CPU ----


def has_nvrtc():
    try:
        return bool(nvrtc("", "sm_90"))
    except (OSError, RuntimeError):
        return False


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def cpu_driver(monkeypatch, compiled):
    """weighting_cuda takes CPU tensors and launches through tests/cuda_on_cpu.py; everything else is its own code."""
    if not shutil.which("g++"):
        pytest.skip("needs g++ to run the kernel on the CPU")
    driver = Driver(compiled)
    monkeypatch.setattr(common, "_kernels", {})
    monkeypatch.setattr(common, "nvrtc", lambda source, arch: (source.encode(), ""))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver if name == "libcuda.so.1" else CDLL(name))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    properties = types.SimpleNamespace(multi_processor_count=32, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return driver


def assert_same(args, divergence="js"):
    """Kernel and reference: g to rounding of the sums, in half precision one step of the last bit at most; layout alike."""
    (g, loss), (want_g, want_loss) = weighting_cuda(*args, divergence), weighting_reference(*args, divergence)
    step = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[g.dtype]
    assert g.dtype == want_g.dtype and g.stride() == want_g.stride() and loss.dtype == torch.float32 and loss.shape == want_loss.shape
    torch.testing.assert_close(g.float(), want_g.float(), rtol=step, atol=6e-8)
    torch.testing.assert_close(loss, want_loss, rtol=1e-3 if g.dtype != torch.float32 else 5e-6, atol=1e-12)
    if g.dtype != torch.float32:
        assert (g != want_g).float().mean() < 0.02           # nearly always the very same bits
    return g


CASES = [((300, 2), "contiguous"), ((5, 3), "strided"), ((2, 1, 1, 1), "contiguous"), ((3, 3, 7, 5), "channels_last"),
         ((7, 3, 20), "contiguous"), ((3, 4, 16, 16), "channels_last"), ((2, 3, 32, 32), "contiguous"), ((2, 4, 64, 64), "channels_last"),
         ((3, 3, 93, 101), "contiguous")]


@pytest.mark.parametrize("shape, layout, dtype", [(*case, dtype) for i, case in enumerate(CASES) for j, dtype in enumerate(CUDA_DTYPES)
                                                  if i == 8 or j == i % 3])         # a compiled kernel each: not all 27
def test_kernel_equals_reference(shape, layout, dtype, cpu_driver):
    """The kernel's own text, run on the CPU: threads, shuffles, shared memory, odd sizes, samples shared by blocks (the last)."""
    assert_same(inputs(shape, dtype, layout))
    assert len(cpu_driver.launches) == 1


def test_kernel_every_divergence(cpu_driver):
    """The weights in C equal the weights in Python, at log ratios within and beyond the clamp and at NaN."""
    args = (*inputs((6, 4))[:3], torch.tensor([-30.0, -2.0, 0.0, 3.0, 11.0, float("nan")]))
    for divergence in F_DIVERGENCES:
        assert_same(args, divergence)


def test_kernel_with_non_finite_values(cpu_driver):
    """n = 0, infinite and NaN elements, and what overflows in fp16 only: zeros where the reference has them."""
    for dtype in CUDA_DTYPES:
        x, d_real, d_fake, log_ratio = inputs((6, 40), dtype)
        d_real[0], x[1, 3], d_fake[2, 5], d_fake[2, 6] = x[0], float("nan"), float("inf"), float("nan")
        x[3], d_real[3], d_fake[3, :3] = 0, 1e-3, torch.tensor([1000.0, 60.0, -70.0])
        d_fake[4] = torch.finfo(dtype).max
        g = assert_same((x, d_real, d_fake, log_ratio), "rkl")
        assert (g[:2] == 0).all() and g[2].count_nonzero() == 38 and (g[3, 0] == 0) == (dtype == torch.float16) and g[3, 1] > 5e4


@pytest.mark.parametrize("resident", [8, 13])
def test_kernel_of_large_images(resident, cpu_driver):
    """3x256x256: eight blocks share a sample; no deadlock with only as many running as a sample needs, whatever their order."""
    cpu_driver.resident = resident
    x, d_real, d_fake, log_ratio = inputs((3, 3, 256, 256))
    d_fake[2, 0, 0, 0] = float("inf")
    assert_same((x, d_real, d_fake, log_ratio))
    assert cpu_driver.launches == [(24, 512)]


def test_kernel_layouts_and_alignment(cpu_driver):
    """Mixed layouts, transposed tensors, an expanded ratio, views that start at odd addresses, more samples than a block holds."""
    x, d_real, d_fake, log_ratio = inputs((3, 4, 6, 8))
    assert_same((x, d_real.contiguous(memory_format=torch.channels_last), d_fake, log_ratio))
    assert_same((x.transpose(1, 3), d_real.transpose(1, 3), d_fake.transpose(1, 3), log_ratio[:1].expand(3)))
    for dtype in (torch.float32, torch.bfloat16):
        for offset in (1, 2):
            views = [torch.randn(5 * 24 + 8).to(dtype)[offset:][:120].view(5, 24) for _ in range(3)]
            assert_same((*views, torch.randn(5)))
            assert_same((views[0].clone(), *views[1:], torch.randn(5)))


def test_kernel_leaves_the_rest_to_pytorch(cpu_driver, monkeypatch):
    """None, without a launch: nothing to do, other or mixed dtypes, a first call in a graph capture, too large samples."""
    x, d_real, d_fake, log_ratio = inputs((4, 6))
    assert weighting_cuda(x[:0], d_real[:0], d_fake[:0], log_ratio[:0], "js") is None
    assert weighting_cuda(x[:, :0], d_real[:, :0], d_fake[:, :0], log_ratio, "js") is None
    assert weighting_cuda(x.double(), d_real.double(), d_fake.double(), log_ratio, "js") is None
    assert weighting_cuda(x.bfloat16(), d_real, d_fake, log_ratio, "js") is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert weighting_cuda(x, d_real, d_fake, log_ratio, "js") is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert weighting_cuda(*(torch.zeros(1, 24576 * 16 + 1) for _ in range(3)), log_ratio[:1], "js") is None
    assert not cpu_driver.launches and weighting_cuda(x, d_real, d_fake, log_ratio, "js")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert weighting_cuda(x, d_real, d_fake, log_ratio, "js") and len(cpu_driver.launches) == 2         # compiled by now


@pytest.mark.parametrize("fault", ["source", "library", "driver", "launch"])
def test_fallback(fault, cpu_driver, monkeypatch):
    """A kernel that does not compile, load or start: one warning with the reason, then and for ever the PyTorch path."""
    def broken(*_):
        raise {"source": RuntimeError("NVRTC error 6"), "library": OSError("libnvrtc was not found")}[fault]
    if fault == "driver":
        monkeypatch.setattr(cpu_driver, "cuModuleLoadData", lambda *_: 200)
    elif fault == "launch":
        monkeypatch.setattr(cpu_driver, "cuLaunchKernel", lambda *_: 701)
    else:
        monkeypatch.setattr(common, "nvrtc", broken)
    args = inputs((4, 6))
    reason = dict(source="NVRTC error 6", library="libnvrtc was not found", driver="driver error 200", launch="driver error 701")[fault]
    with pytest.warns(UserWarning, match="runs in plain PyTorch.*" + reason):
        assert weighting_cuda(*args, "js") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert weighting_cuda(*args, "js") is None and not cpu_driver.launches


@pytest.mark.skipif(not has_nvrtc(), reason="needs NVRTC: a CUDA build of PyTorch, or pip install nvidia-cuda-nvrtc")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_kernel_compiles(arch):
    """NVRTC makes machine code for every generation since Ampere, without spills at the sizes that matter."""
    for dtype, divergence, size, vec in ((torch.float32, "rkl", 2, 2), (torch.float32, "js", 3 * 256**2, 4),
                                         (torch.bfloat16, "hellinger", 12288, 8), (torch.float16, "neyman", 3072, 8)):
        code, log = nvrtc(common.weighting_source(common.weighting_constants(dtype, divergence, size, vec)), arch)
        assert code[:4] == b"\x7fELF" and int(re.search(r"(\d+) bytes spill stores", log)[1]) == 0
        assert int(re.search(r"Used (\d+) reg", log)[1]) <= 128                    # 512 threads have 65,536 between them
    with pytest.raises(RuntimeError, match="NVRTC error 6 .*undefined"):
        nvrtc(common.weighting_source({}), arch)


# ---- the CUDA kernel, on a GPU ----

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@needs_gpu
@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize("shape, layout", [*CASES, ((512, 3, 64, 64), "channels_last"), ((300, 3, 256, 256), "contiguous"),
                                           ((65536, 2), "contiguous")])
def test_gpu_equals_reference(shape, layout, dtype, monkeypatch):
    """Every case, and more blocks than the GPU holds at once; the op takes the kernel."""
    args = [a.cuda() for a in inputs(shape, dtype, layout)]
    g = assert_same(args)
    monkeypatch.setattr(common, "weighting_reference", None)
    assert torch.equal(g, weighted_score_gradient(*args, "js")[0])


@needs_gpu
def test_gpu_graph_compile_and_stream():
    """Captured in a CUDA graph after a first call, replayed on new values; on a side stream; under torch.compile; gradients."""
    static, fresh = [a.cuda() for a in inputs((16, 3, 32, 32))], [a.cuda() for a in inputs((16, 3, 32, 32))]
    weighted_score_gradient(*static, "js")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        g, loss = weighted_score_gradient(*static, "js")
    for a, b in zip(static, fresh):
        a.copy_(b)
    graph.replay()
    torch.testing.assert_close((g, loss), weighting_reference(*fresh, "js"))
    with torch.cuda.stream(torch.cuda.Stream()):
        assert torch.equal(weighted_score_gradient(*fresh, "js")[0], g)
    torch.cuda.synchronize()
    x = fresh[0].requires_grad_()
    torch.compile(lambda x: weighted_score_gradient(x, *fresh[1:], "js")[1].sum(), fullgraph=True, backend="aot_eager")(x).backward()
    torch.testing.assert_close(x.grad, g / 3072)
    torch.library.opcheck(torch.ops.onestep.weighted_score_gradient.default, (x, *fresh[1:], "hellinger"))
