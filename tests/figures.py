"""
Two of README's pictures, and its figures of consistency students.

    python tests/figures.py strip RUNS OUT.png      # data and one call of the five students in RUNS/<script>-<toy>-0, as STRIP
                                                    # names them (consistency.py with --loss scd)
    python tests/figures.py scott OUT.png           # consistency.py --loss scott on the ring for four --eta: about 6 minutes of one core
    python tests/figures.py calls RUN [RUN ...]     # H of one and of two calls of consistency students on toys
    python tests/figures.py gamma RUN [RUN ...]     # H of two calls of ctm's or meanflow's for three --gamma
"""
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import consistency
import dmd
import fdistill
import rectflow
import sim
from common import TOYS, energy_coefficient, load_denoiser, save_picture, toy_metrics, write_atomically

STRIP = dict(fdistill="ring", dmd="moons", sim="spiral", consistency="unequal", rectflow="ring")
SCRIPTS = dict(fdistill=fdistill, dmd=dmd, sim=sim, consistency=consistency, rectflow=rectflow)


def strip(runs, out):
    """Two rows: the data above, one network call of each script's student below."""
    torch.manual_seed(0)
    figure = Figure(figsize=(11, 4.7), layout="constrained", facecolor="white")
    for (name, toy), (above, below) in zip(STRIP.items(), figure.subplots(2, 5).T):
        student = load_denoiser(Path(runs) / f"{name}-{toy}-0", SCRIPTS[name].Config(data=toy, device="cpu"))
        x, data = SCRIPTS[name].sample(student, 6000), TOYS[toy].sample(6000)[0]
        reach = 1.1 * data.abs().max()
        for ax, points, color, title in ((above, data, "black", f"data: {toy}"), (below, x, "#0072b2", f"{name}.py, one call")):
            ax.scatter(*points.T, s=1, alpha=0.35, color=color, linewidths=0, rasterized=True)
            ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[])
            ax.set_title(title, fontsize=10)
    write_atomically(out, lambda f: figure.savefig(f, format="png", dpi=80))


def scott(out):
    """The blur of stochastic consistency distillation grows with --eta: H, share within 3 std of a mode, and the pictures."""
    panels = {"data: ring": TOYS["ring"].sample(5000)[0]}
    for eta in (0.0, 0.1, 0.3, 1.0):
        student, run = consistency.train(consistency.Config(loss="scott", eta=eta, out=f"runs/scott-{eta}"))
        x = consistency.sample(student, 20000)
        m = toy_metrics(x, TOYS["ring"])
        print(f"eta {eta}: H {m['H']:.5f}, {m['in_3std']:.1%} within 3 std of a mode")
        panels[f"scott, eta {eta}: {m['in_3std']:.0%} within 3 std"] = x[:5000]
    save_picture(Path(out), panels)


def measure(runs, ways):
    """Print each run's mean H over three sets of 20,000 data, the same for all ways (name: keywords of sample) and runs."""
    for run in runs:
        student = load_denoiser(run, consistency.Config(device="cpu"))
        H = {name: 0 for name in ways}
        for seed in (100, 101, 102):
            torch.manual_seed(seed)
            data = TOYS[student.config["data"]].sample(20_000)[0]
            for name, kw in ways.items():
                H[name] += energy_coefficient(consistency.sample(student, 20_000, **kw), data) / 3
        print(run, *(f"{name}: H {h:.5f}" for name, h in H.items()), flush=True)


def calls(*runs):
    """Finished runs of consistency.py with one network call and with two."""
    measure(runs, {"1 call": dict(steps=1), "2 calls": dict(steps=2)})


def gamma(*runs):
    """Finished runs of ctm or meanflow with two calls, by the share of fresh noise in the second."""
    measure(runs, {f"gamma {g:g}": dict(steps=2, gamma=g) for g in (0.0, 0.5, 1.0)})


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
