"""The notebooks of variations run, keep their form, and their changes are right."""
import base64, itertools, json, re, subprocess, sys
from pathlib import Path

import pytest, torch
import common, consistency, dmd, fdistill, rectflow, sim

FOLDER = Path(__file__).resolve().parent.parent / "notebooks" / "variations"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def load(name):
    cells = json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]
    return cells, ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]


def change(name, **names):           # what the second code cell defines
    names |= vars(common) | dict(consistency=consistency, dmd=dmd, rectflow=rectflow, sim=sim)
    exec(load(name)[1][1], names)
    return names


@pytest.mark.slow
@pytest.mark.background
def test_runs(tmp_path):
    code = "import matplotlib, os, torch\ntorch.set_num_threads(1)\nmatplotlib.use('agg')\n"
    for name in NAMES:
        code += "\n".join([f"os.chdir({str(FOLDER)!r})", *load(name)[1], ""])
    few = re.sub("^(STEPS|FIT|COUNT|FINE) = .*", r"\1 = 10", code, flags=re.M)
    p = subprocess.run([sys.executable, "-c", few], capture_output=True, text=True)
    assert p.returncode == 0, p.stderr


@pytest.mark.parametrize("name", NAMES)
def test_form(name):
    """At most 8 cells, run in order; the change is at most 40 lines; one wide figure."""
    cells, code = load(name)
    pngs = re.findall('"image/png": "(.{40})', json.dumps(cells))
    assert len(pngs) == 1 and int.from_bytes(base64.b64decode(pngs[0])[16:20], "big") >= 900
    count = [c["execution_count"] for c in cells if c["cell_type"] == "code"]
    assert count == list(range(1, len(code) + 1)) and len(cells) <= 8
    assert len(code[1].splitlines()) <= 40 and not re.search("^[%!]|^.{101}", "\n".join(code), re.M)
    assert (FOLDER / f"{name}.ipynb").stat().st_size <= 200_000


def exact(s):
    """For N(0.3, s^2): the teacher D, and the student G whose jump down by `ratio` is the ODE's."""
    def D(x, t, label=None):
        return 0.3 + (x - 0.3) * s**2 / (s**2 + t**2)

    def G(x, t, label, ratio):
        lower = 0.3 + (x - 0.3) * ((s**2 + (ratio * t) ** 2) / (s**2 + t**2)) ** 0.5
        return torch.where(ratio < 1, (lower - ratio * x) / (1 - ratio).clamp(min=1e-9), D(x, t))
    G.sigma_data = s
    return D, G


def test_scott():
    """eta 0 is Euler's step of the ODE, which is DDIM's."""
    D, x, t = exact(0.5)[0], torch.randn(9, 2), torch.ones(9, 1)
    step = change("scott")["noisy_step"](D, x, 4 * t, t, None, 0.0)
    torch.testing.assert_close(step, x - 3 * (x - D(x, 4 * t)) / 4)


def test_boot_and_oftsr():
    """The exact student of a Gaussian has no loss, in OFTSR none but the last, small term's."""
    loss, (eps, u, w) = change("boot")["boot_loss"], torch.rand(3, 4000, 1).double()
    b = consistency.Draw(None, None, torch.special.ndtri(eps), u, w)
    cfg, (D, G), (_, W) = consistency.Config(loss="ctm", N=400), exact(0.5), exact(0.6)
    assert loss(G, G, D, b, cfg, 0, 0.5).mean() < 3e-4 < loss(W, W, D, b, cfg, 0, 0.5).mean()
    loss, (D, G) = change("oftsr", LEVEL=0.5)["oftsr_loss"], exact(0.4)
    x_0, t = torch.randn(999, 2).double(), 0.01 + 0.98 * torch.rand(999, 1).double()
    phi = G(x_0, 0.5, None, 1 - t) - x_0
    v = (D(x_0 + t * phi, (1 - t) / 2) - x_0 - t * phi) / (1 - t)
    last = (0.01 * (1 - t) ** 2 * (phi - v) ** 2).mean(1)
    found = loss(lambda x, sigma, label: G(x / sigma / 2, 0.5, None, 0.5 / sigma), D, x_0, t)
    assert (found - last).abs().max() < 1e-5 < 1e-4 < last.max()


def test_times():
    """BOSS finds what trying all subsets finds; the search is never worse than even times."""
    knots, c = change("boss")["boss_knots"], torch.rand(9, 9)
    c[torch.ones(9, 9).tril() > 0] = torch.inf
    for calls in (1, 2, 3, 5, 8):
        ways = [[0, *k, 8] for k in itertools.combinations(range(1, 8), calls - 1)]
        assert knots(c, calls) == min(ways, key=lambda k: sum(c[k[:-1], k[1:]]))
    names = change("autodiffusion", FINE=24)
    even = names["even_knots"](8)
    for fitness in (lambda k: k != even, sum, lambda k: -sum(k)):
        found = names["search_knots"](fitness, 8, 4)
        assert fitness(found) <= fitness(even) and len(set(found)) == 9


def test_drifting():
    """The Gaussian field is sigma^2 times a difference of scores; transport finds a translation."""
    names, (x, y) = change("drifting"), torch.randn(2, 200, 2).double()
    sigma = common.level(x, 0.4)
    gap = common.GaussianMixture(y).score(x, sigma) - common.GaussianMixture(x).score(x, sigma)
    assert (names["gaussian_drift"](x, y, 0.4) - sigma**2 * gap).abs().max() < 1e-6
    points = 9 * torch.cartesian_prod(torch.arange(5.0), torch.arange(5.0))
    shift = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(names["partner"](points, points + shift, 0.1), points + shift)
    moved = names["partner"](x, y, 0.5, rounds=500)     # Sinkhorn: each y is used as often
    torch.testing.assert_close(moved.mean(0), y.mean(0), rtol=0, atol=1e-6)


def test_pfgmpp():
    """The noise is Student's t: in two dimensions P(r^2 > q) = (1 + q / D)^(-D / 2)."""
    noise = change("pfgmpp")["heavy_noise"]
    for D in (4, 64):
        r = noise(torch.empty(50_000, 2), D).norm(dim=1)
        for q in (0.3, 1, 4, 16):
            assert abs((r**2 > q).double().mean() - (1 + q / D) ** (-D / 2)) < 0.01


def test_distilled_decoding():
    """The flow is rectflow's for the codebook as a mixture, and gives tokens in their shares."""
    names, codebook, p = change("distilled_decoding", FINE=100), torch.randn(5, 3), torch.rand(5)
    p, x = p / p.sum(), torch.randn(4000, 3)
    found = names["token_velocity"](x, 0.6, p.expand(4000, 5), codebook)
    D = common.GaussianMixture(codebook, weights=p)
    exact = rectflow.velocity(D, x, common.level(x, 0.6), None, 20.0)
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-3)
    share = names["tokens_of"](x, p.expand(4000, 5), codebook).bincount(minlength=5) / 4000
    assert (share - p).abs().max() < 0.03


def test_guidance():
    """SNOOPI's guided answer is that of the score of p(x | c)^kappa p(x)^(1 - kappa)."""
    data, (x, label) = common.TOYS["moons"], common.TOYS["moons"].sample(50)
    x, sigma, kappa = x.requires_grad_(), common.level(x, 0.5), 4 * torch.rand(50, 1)
    powers = [kappa[:, 0] * data.log_prob(x, sigma, label), data.log_prob(x, sigma)]
    score = torch.autograd.grad((powers[0] + (1 - kappa[:, 0]) * powers[1]).sum(), x)[0]
    found = change("snoopi")["guided"](data, x, sigma, label, kappa)
    torch.testing.assert_close(found, x + sigma**2 * score, rtol=1e-3, atol=1e-4)


def test_onemorestep():
    """From exact psi the first level has the data's mean and spread; from pure noise mean 0."""
    names, eps, m = change("onemorestep"), torch.randn(50_000, 2), torch.tensor([3.0, -1.0])
    sigma = names["sigma_of"](0.05)
    mended = sigma * names["start_of"](eps, None, 0.05, lambda eps, label: -m.expand_as(eps))
    assert (mended.mean(0) - m).abs().max() < 0.1 and (mended.std(0) - sigma).abs().max() < 0.1
    assert (sigma * names["start_of"](eps, None, 0.05)).mean(0).abs().max() < 0.1


def test_mean_flows():
    """Improved MeanFlow by the pair's slope, and alpha-Flow for small alpha, are MeanFlow."""
    def D(x, t, label=None, r=None):
        return (x.sin() + r * x) / (1 + t)

    (x, eps), (u, w) = torch.randn(2, 99, 2).double(), torch.rand(2, 99, 1).double()
    b = consistency.Draw(x, None, eps, u, w)
    cfg = consistency.Config(loss="meanflow", velocity="data", power=0.0)
    exact = consistency.meanflow_loss(D, D, None, b, cfg, 0)
    found = change("improved_meanflow")["imf_loss"](D, D, None, b, cfg, 0, own=0.0)
    torch.testing.assert_close(found, exact)
    found = change("alphaflow")["alpha_loss"](D, D, None, b, cfg, 0, alpha=1e-5) / 1e-5
    torch.testing.assert_close(found, exact, rtol=1e-2, atol=1e-3)
