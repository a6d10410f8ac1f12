"""
The five scripts side by side: one teacher, equal time, one thread, three seeds; a table in
Markdown, a picture, and a moving one of seed 0 as it learns.

    python tests/compare.py --data moons --minutes 1
    python tests/compare.py fdistill fdistill:divergence=fkl consistency:loss=scd --data ring
    python tests/compare.py --data mnist --dtype bf16 --minutes 5
    python tests/compare.py --data cifar10 --net small --teacher RUN --fid FILE --samples 1000
    python tests/compare.py --data ring --peers         # beside torchcfm and flow_matching (PyPI)
"""
import argparse
import contextlib
import importlib
import math
import sys
import time
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from common import MLP, energy_coefficient, in_parts, save_picture, toy_metrics

SCRIPTS = ["fdistill", "dmd", "sim", "consistency", "rectflow"]
PEERS = ["torchcfm", "flow_matching"]
QUALITY = ["FID", "precision", "recall"]                # of images, with --fid


def settings(entry, given, **more):
    """(module, its Config) of an entry such as "consistency:loss=scd,nfe=2"."""
    name, _, flags = entry.partition(":")
    common.need(name in SCRIPTS, f"{name!r} is none of {', '.join(SCRIPTS)}")
    flags = dict(flag.split("=", 1) for flag in flags.split(",") if flag)
    module = importlib.import_module(name)
    same = {name: getattr(given, name) for name in ("data", "data_dir", "net", "dtype", "device")}
    return module, module.Config(**(same | more | flags))


def count(network):
    return sum(p.numel() for p in network.parameters())


def measure(draw, data, given):
    """Figures of --samples samples draw(n, label), and some of them to show: images by class."""
    toy = len(data.shape) == 1
    n = given.samples or (20000 if toy else 2000)
    torch.manual_seed(10**6)
    label = common.draw_label(n, data, common.pick_device(given))
    x = draw(n, label)
    if toy:
        found = toy_metrics(x, data)
        return dict(H=found["H"], inside=found.get("in_3std", math.nan)), x[:3000]
    found = dict(H=energy_coefficient(x, data.sample(n)[0]), inside=math.nan)
    if given.fid:
        cfg = settings("fdistill", given, fid=given.fid, fid_ref="5000", samples=n)[1]
        found |= dict(zip(QUALITY, common.fid(cfg, data, lambda n, label: x).values()))
    if label is None:
        return found, x[:64]
    of_class = [x[label[:, k] == 1][:8] for k in range(min(data.label_dim, 10))]
    return found, torch.cat(of_class)


def run_teacher(given, data):
    """The teacher that all are to distil, kept in --out/teacher.pt: as run_script."""
    flags = dict(out=f"{given.out}/teacher", teacher=given.teacher)
    cfg, start = settings("fdistill", given, **flags)[1], time.time()
    cfg.started = start
    teacher = common.load_teacher(cfg, data)
    seconds = time.time() - start
    common.save_denoiser(f"{given.out}/teacher.pt", teacher, cfg)

    def solve(n, label):
        z = torch.randn(n, *data.shape, device=common.pick_device(given))
        return common.teacher_samples(cfg, teacher, z, label, cfg.sigma_max)

    found, x = measure(solve, data, given)
    return found | dict(seconds=seconds, parameters=count(teacher), calls=35), x


@contextlib.contextmanager
def watch(frames):
    """Inside, runs draw no pictures: what they would show of the student goes to frames."""
    show = common.Run.show
    common.Run.show = lambda run, panels, *_: frames.append(list(panels.values())[-1])
    try:
        yield
    finally:
        common.Run.show = show


def draw_frames(folder, panels, frames):
    """compare.gif, 1,000 pixels wide: data and teacher, each student as it learned. 12 frames, of
    images 6: they are larger files."""
    most = 12 if next(iter(panels.values())).ndim == 2 else 6
    pictures, count = [], min(most, max(map(len, frames.values())))
    for k in range(count):
        now = panels | {name: seen[k * len(seen) // count] for name, seen in frames.items()}
        if next(iter(panels.values())).ndim > 2:        # of images 16, evenly spread over classes
            now = {name: x[::max(len(x) // 16, 1)][:16] for name, x in now.items()}
        save_picture(f"{folder}/frame.png", now, columns=4)
        picture = Image.open(f"{folder}/frame.png").convert("RGB")
        picture = picture.resize((1000, 1000 * picture.height // picture.width))
        pictures.append(picture.quantize(16))
    pictures[0].save(f"{folder}/compare.gif", save_all=True, append_images=pictures[1:],
                     duration=[300] * (count - 1) + [2000], loop=0)
    Path(f"{folder}/frame.png").unlink()


def run_script(entry, given, data, seed):
    """One run of a script: its figures, and samples to show."""
    module, cfg = settings(entry, given, teacher=f"{given.out}/teacher.pt", minutes=given.minutes,
                           seed=seed, samples=64,       # measured below
                           out=f"{given.out}/{entry.replace(':', '-')}-{seed}")
    start = time.time()
    with watch(given.frames.setdefault(entry, []) if seed == 0 else []):
        student, _ = module.train(cfg, data)
    seconds = time.time() - start                       # of all stages
    found, x = measure(lambda n, label: module.sample(student, n, label), data, given)
    calls = len(student.levels)
    return found | dict(seconds=seconds, parameters=count(student), calls=calls), x


def run_peer(peer, given, data, seed):
    """The same for a flow of torchcfm (minibatch optimal transport) or flow_matching (straight
    paths), trained by their code with our MLP: by one call, as they offer no distillation."""
    torch.manual_seed(seed)
    device = common.pick_device(given)
    net, start = common.Denoiser(MLP(data.shape[0])).to(device), time.time()
    opt = torch.optim.Adam(net.parameters(), lr=2e-3)

    def velocity(t, x):
        return net.net.decode(*net.net.encode(x, t, None, None))

    if peer == "torchcfm":
        from torchcfm.conditional_flow_matching import ExactOptimalTransportConditionalFlowMatcher
        matcher = ExactOptimalTransportConditionalFlowMatcher(sigma=0.0)
    else:
        from flow_matching.path import AffineProbPath
        from flow_matching.path.scheduler import CondOTScheduler
        matcher = AffineProbPath(scheduler=CondOTScheduler())
    while time.time() - start < 60 * given.minutes:
        common.set_lr(opt, 2e-3, (time.time() - start) / 60 / given.minutes)
        x = data.sample(512)[0]
        z = torch.randn_like(x)
        if peer == "torchcfm":
            t, x_t, slope = matcher.sample_location_and_conditional_flow(z, x)
        else:
            point = matcher.sample(x_0=z, x_1=x, t=torch.rand(len(x), device=device))
            t, x_t, slope = point.t, point.x_t, point.dx_t
        (velocity(t, x_t) - slope).square().mean().backward()
        opt.step()
        opt.zero_grad()

    @torch.no_grad()
    def euler(z, label):
        return z + velocity(torch.zeros(len(z), device=device), z)

    def draw(n, label):
        return in_parts(euler, torch.randn(n, *data.shape, device=device), None)

    seconds = time.time() - start
    found, x = measure(draw, data, given)
    return found | dict(seconds=seconds, parameters=count(net), calls=1), x


def row(name, runs):
    """A line of the table: every seed's H, share and FID, the others' mean."""
    cells = [name, ", ".join(f"{run['H']:.5f}" for run in runs)]
    cells.append(", ".join(f"{run['inside']:.3f}" for run in runs).replace("nan", "-"))
    for key in QUALITY:
        if key in runs[0]:
            cells.append(", ".join(f"{run[key]:.4g}" for run in runs))
    for key in ("seconds", "parameters", "calls"):
        cells.append(f"{sum(run[key] for run in runs) / len(runs):,.0f}")
    return f"| {' | '.join(cells)} |"


def read_flags(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entries", nargs="*", default=SCRIPTS, help="script[:flag=value,...]")
    parser.add_argument("--data", default="moons")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--minutes", type=float, default=1.0, help="training of each student")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--net", default="auto")
    parser.add_argument("--dtype", default="fp32", help="bf16: faster on CPUs that know it")
    parser.add_argument("--device", default="auto", help="auto is the GPU where there is one")
    parser.add_argument("--teacher", default="", help="as of the scripts; else one is fitted")
    parser.add_argument("--fid", default="", help="Inception network: FID against 5,000 images")
    parser.add_argument("--samples", type=int, help="by default 20,000 of toys, 2,000 images")
    parser.add_argument("--out", help="folder, by default runs/compare-DATA")
    parser.add_argument("--peers", action="store_true", help="also torchcfm and flow_matching")
    given = parser.parse_args(argv)
    given.out = given.out or f"runs/compare-{given.data}"
    given.frames = {}                                   # of each entry's first seed
    return given


def main(argv=None):
    given = read_flags(argv)
    for entry in given.entries:
        settings(entry, given)                          # refuse what cannot work before any work
    torch.set_num_threads(1)
    Path(given.out).mkdir(parents=True, exist_ok=True)
    names = ["method", "H, each seed", "share within 3 std", *(QUALITY if given.fid else []),
             "seconds", "parameters", "calls"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    print(*lines, sep="\n")
    with open(f"{given.out}/log.txt", "a") as log:      # of the runs' own lines and bars
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            cfg = settings("fdistill", given, fid=given.fid, fid_ref="5000")[1]
            data = common.load_data(cfg)                # refuses a --fid that cannot work
            found, x = run_teacher(given, data)
        panels = common.gallery(cfg, data)[0] | {"teacher, 35 calls": x}
        still = dict(panels)
        lines.append(row("teacher", [found]))
        print(lines[-1], flush=True)
        for entry in [*given.entries, *(PEERS if given.peers else [])]:
            run_one = run_peer if entry in PEERS else run_script
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                runs = [run_one(entry, given, data, seed) for seed in range(given.seeds)]
            panels[entry] = runs[0][1]
            lines.append(row(entry, [found for found, _ in runs]))
            print(lines[-1], flush=True)
    save_picture(f"{given.out}/compare.png", panels)
    draw_frames(given.out, still, given.frames)
    Path(f"{given.out}/compare.md").write_text("\n".join(lines) + "\n")
    print(f"{given.out}/compare.png\n{given.out}/compare.gif")


if __name__ == "__main__":
    try:
        main()
    except common.UserError as e:
        print(f"compare.py: {e}", file=sys.stderr)
        sys.exit(2)
