"""The weighting op: forward and backward against autograd of the plain formula, dtypes, layouts, opcheck, bad values."""
import pytest
import torch

import common
from common import F_DIVERGENCES, UserError, weighted_score_gradient

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
