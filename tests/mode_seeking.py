"""
Mode seeking against mode covering: an affine student x = m + A z, which cannot represent two separated modes, under each
f-divergence. Its fake score and density ratio are closed form, so only the divergence acts. The gradient is the pure one
of Theorem 1: DMD's per-sample normaliser, which the training scripts keep, is taken out again, since it weighs samples too
(with it forward KL covers a little more than the closed-form answer, and reverse KL may cover as well).

    python tests/mode_seeking.py notebooks/img/mode_seeking.png        # 10 s; test_fdistill.py tests the figures
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import F_DIVERGENCES, GaussianMixture, karras, save_picture
from fdistill import f_distill_loss

TWO = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), 0.2, weights=[1, 3])


def fit_affine(divergence, steps=600, batch=1024):
    """(m (2,), A (2, 2)) minimising the divergence between TWO and the law of m + A z, noised up to sigma 0.5."""
    torch.manual_seed(0)
    m, a = torch.tensor([0.4, 0.1]).requires_grad_(), (0.6 * torch.eye(2)).requires_grad_()
    opt = torch.optim.Adam([m, a], lr=0.02)
    for step in range(steps):
        opt.param_groups[0]["lr"] = 0.02 * (1 - step / steps)
        z, eps, sigma = torch.randn(batch, 2), torch.randn(batch, 2), karras(torch.rand(batch), 0.05, 0.5)
        x = m + z @ a.T
        with torch.no_grad():
            x_t = x + sigma[:, None] * eps
            noised = a @ a.T + sigma[:, None, None] ** 2 * torch.eye(2)                     # covariance of x_t, (B, 2, 2)
            d_fake = m + (a @ a.T @ torch.linalg.solve(noised, (x_t - m)[..., None]))[..., 0]
            log_q = torch.distributions.MultivariateNormal(m, noised).log_prob(x_t)
            r = (TWO.log_prob(x_t, sigma) - log_q).clamp(-10, 10).exp()
            d_real = TWO.denoise(x_t, sigma)
            plain = (x - d_real).abs().mean(1) / sigma**2                       # instead of DMD's 1 / mean|x - d_real|
        loss = f_distill_loss(x, d_real, d_fake, r, divergence, F_DIVERGENCES[divergence].h(r).mean())
        (0.1 * plain * loss).mean().backward()
        opt.step()
        opt.zero_grad()
    return m.detach(), a.detach()


if __name__ == "__main__":
    panels = {"data: two modes, 1 : 3": TWO.sample(4000)[0]}
    for name, title in (("rkl", "reverse KL"), ("js", "Jensen-Shannon"), ("fkl", "forward KL")):
        m, a = fit_affine(name)
        std = (a @ a.T).diagonal().sqrt()
        print(f"{name}: mean {m.tolist()}, std {std.tolist()}")
        panels[f"affine student, {title}"] = m + torch.randn(4000, 2) @ a.T
    save_picture(sys.argv[1] if len(sys.argv) > 1 else "mode_seeking.png", panels, reach=2.5)
