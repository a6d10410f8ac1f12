"""The notebooks of variations run, keep their form, and their changes are right."""
import base64, itertools, json, re, subprocess, sys
from pathlib import Path

import pytest, torch
import common, consistency, rectflow

FOLDER = Path(__file__).resolve().parent.parent / "notebooks" / "variations"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def load(name):
    cells = json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]
    return cells, ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]


def change(name, **names):           # what the second code cell defines
    names |= vars(common) | dict(consistency=consistency, rectflow=rectflow)
    exec(load(name)[1][1], names)
    return names


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
