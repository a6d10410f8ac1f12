"""
Everything that wants a GPU, by one command: part after part, each in a process and a time box of
its own. Without a GPU the same code runs at tiny size, which shows that it runs and nothing else.

    python tests/bench_gpu.py --minutes 25 --out OUT --data_dir DATA --fid inception-2015-12-05.pt
    python tests/bench_gpu.py --minutes 4 --out OUT --only step

OUT/results.md has a row a figure, results.json the same, both rewritten after each part. What is
over its box is killed and keeps its rows; what fails is a row with its error. Beside them lie each
part's log and small pictures. Random images stand in for a CIFAR-10 that is not in --data_dir.
"""
import argparse
import importlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import ExitStack, suppress
from pathlib import Path
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common

COLUMNS = "part what value unit command seconds peak_gib device torch".split()
TINY = dict(net="small", width=4, batch=64, accumulate=1, steps=2, teacher_steps=2, samples=8,
            minutes=0, every=100)


class Enough(Exception):
    """Ends a training."""


class Bench:
    """What a part knows: the flags, its name and box in seconds, the device, where its rows go."""

    def __init__(self, args, part, box):
        self.args, self.part, self.box, self.work = args, part, box, Path(args.work)
        self.gpu = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.gpu else "cpu")
        self.name = torch.cuda.get_device_name() if self.gpu else "CPU, tiny size"

    def row(self, what, value, unit="", command="", seconds=0.0):
        """A figure is kept at once: this process may be killed."""
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.gpu else 0.0
        cells = [self.part, what, value, unit, command, seconds, peak, self.name, torch.__version__]
        with open(f"{self.args.out}/{self.part}.jsonl", "a") as f:
            f.write(json.dumps(dict(zip(COLUMNS, cells))) + "\n")

    def attempt(self, what, command, function, *args, **flags):
        """Rows of what function(self, ...) finds: {figure: value or (value, unit)}, or an error."""
        began = time.time()
        if self.gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            found = function(self, *args, **flags)
        except Exception as e:
            found = dict(error=f"{type(e).__name__}: {e}"[:300])
        for name, value in found.items():
            value, unit = value if isinstance(value, tuple) else (value, "")
            self.row(f"{what}: {name}", value, unit, command, time.time() - began)

    def wait(self):
        if self.gpu:
            torch.cuda.synchronize()

    def seconds(self, function, *args):
        """Mean seconds of one call of many."""
        count = 50 if self.gpu else 2
        for _ in range(3):
            function(*args)
        self.wait()
        began = time.perf_counter()
        for _ in range(count):
            function(*args)
        self.wait()
        return (time.perf_counter() - began) / count

    def config(self, script, folder, **flags):
        """(module, Config) of a script; of a small network where there is no GPU."""
        module = importlib.import_module(script)
        flags = dict(data="cifar10", dtype="bf16", out=f"{self.work}/{folder}") | flags
        return module, module.Config(**flags | ({} if self.gpu else TINY))

    def images(self, cfg):
        """(data, whose): CIFAR-10 from --data_dir, or random images with labels."""
        if self.gpu and cfg.data == "cifar10" and Path(self.args.data_dir).exists():
            cfg.data_dir = self.args.data_dir
            return common.load_data(cfg), "CIFAR-10"
        torch.manual_seed(0)                            # each time the same ones
        side = 16
        if self.gpu:
            side = 64 if cfg.data == "imagenet64" else 32
        classes, x = 1000 if side == 64 else 10, torch.randint(256, (1000, 3, side, side))
        label = torch.arange(1000) % classes
        return common.Images(x.byte(), label, classes, self.device, cfg.flip), "random images"


# ---- 1. the weighting op -------------------------------------------------------------------------


def plain(x, d_real, d_fake, h):
    """What the op falls back to."""
    n = (x - d_real).abs().flatten(1).mean(1)
    g = (h / n).view(-1, *[1] * (x.ndim - 1)) * (d_fake - d_real)
    return torch.where(g.isfinite(), g, 0.0)


def operands(bench, shape):
    return [*torch.randn(3, *shape, device=bench.device), torch.rand(shape[0], device=bench.device)]


def op(bench):
    bench.row("kernel compiled", bench.gpu and common.load_kernel() is not None)
    sizes = [(4, 2), (3, 257), (64, 3, 32, 32), (64, 3, 64, 64), (8, 3, 256, 256), (5, 3, 17, 19)]
    for shape in sizes if bench.gpu else sizes[:2]:
        bench.attempt(f"op, {shape}, largest difference", "", differences, shape)
    large = [(4096, 2), (512, 3, 32, 32), (512, 3, 64, 64), (4096, 3, 64, 64)]
    for shape in large if bench.gpu else [(16, 2)]:
        bench.attempt(f"op, {shape}", "", speed, shape)
    if bench.gpu:                                       # a CPU has no graphs, and compiles slowly
        bench.attempt("op in a CUDA graph, largest difference", "", in_graph)
        bench.attempt("op in torch.compile, largest difference", "", differences, (64, 3, 32, 32),
                      op=torch.compile(common.weighted_score_gradient))


def differences(bench, shape, op=common.weighted_score_gradient):
    """From plain lines in float64: as it is, in another layout, with values that are not finite."""
    args = operands(bench, shape)
    turned = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in args]
    broken = [args[0].clone(), args[1], args[2].clone(), args[3]]
    broken[0][0], broken[2][1] = args[1][0], torch.inf
    found = {}
    for name, given in dict(plain=args, turned=turned, broken=broken).items():
        want = plain(*[t.double() for t in given])
        found[name] = float((op(*given) - want).abs().max())
    return found


def in_graph(bench):
    args, graph = operands(bench, (64, 3, 32, 32)), torch.cuda.CUDAGraph()
    common.weighted_score_gradient(*args)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        g = common.weighted_score_gradient(*args)
    for t in args[:3]:
        t.copy_(torch.randn_like(t))
    graph.replay()
    return dict(replayed=float((g - plain(*args)).abs().max()))


def speed(bench, shape):
    """Times, and bandwidth as a share of a copy's, larger than the cache: the op moves 4 tensors, a
    copy 2."""
    args = operands(bench, shape)
    fused = replayed(bench, common.weighted_score_gradient, *args)
    large = torch.randn(2**28 if bench.gpu else 2**16, device=bench.device)
    copy = 2 * large.nbytes / bench.seconds(torch.clone, large)
    found = {"time": (1e6 * fused, "us"), "a copy's bandwidth": (copy / 1e9, "GB/s"),
             "bandwidth over a copy's": 4 * args[0].nbytes / fused / copy,
             "eager time over op's": replayed(bench, plain, *args) / fused,
             "time with Python's": (1e6 * bench.seconds(common.weighted_score_gradient, *args),
                                    "us")}
    if bench.gpu:
        found["compiled time over op's"] = replayed(bench, torch.compile(plain), *args) / fused
    return found


def replayed(bench, function, *args):
    """Seconds of one call on the GPU alone, of 20 in a CUDA graph: Python takes longer."""
    if not bench.gpu:
        return bench.seconds(function, *args)
    for _ in range(3):
        function(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            function(*args)
    return bench.seconds(graph.replay) / 20


# ---- 2. toys -------------------------------------------------------------------------------------


def toys(bench):
    """Each script's default on the GPU, one by one; on the CPU's cores meanwhile."""
    few, slow = {}, {}
    for script in ("fdistill", "dmd", "sim", "consistency", "rectflow"):
        if bench.gpu:
            out = f"{bench.work}/cpu-{script}/run"
            command = [sys.executable, ROOT / f"{script}.py", "--device", "cpu", "--out", out]
            slow[script] = subprocess.Popen(command, env=os.environ | dict(OMP_NUM_THREADS="1"))
        else:
            few = dict(steps=2, teacher_steps=2, batch=64, samples=64)
            few |= dict(stage="flow") if script == "rectflow" else {}
        bench.attempt(script, f"{script}.py", train, script, f"toy-{script}/run", **few)
    for script, process in slow.items():
        process.wait()
        bench.attempt(f"{script}, CPU", f"{script}.py --device cpu", metrics,
                      f"{bench.work}/cpu-{script}/run")


def train(bench, script, folder, images=None, teacher=None, **flags):
    """A script's training; its metrics, its picture."""
    module, began = importlib.import_module(script), time.time()
    out = f"{bench.work}/{folder}"
    module.train(module.Config(out=out, **flags), images, teacher)
    for name in ("samples.png", "log.csv"):
        shutil.copy(f"{out}/{name}", f"{bench.args.out}/{folder.replace('/', '-')}-{name}")
    return metrics(bench, out) | {"all in all": (time.time() - began, "s")}


def metrics(bench, folder):
    found = json.loads(Path(folder, "metrics.json").read_text())
    words = ("H", "in_3std", "fid", "precision", "recall", "steps", "train_seconds")
    return {name: value for name, value in found.items() if name.startswith(words)}


# ---- 3. updates of image networks ----------------------------------------------------------------


def step(bench):
    n = 8192 if bench.gpu else 64
    a = torch.randn(n, n, device=bench.device, dtype=torch.bfloat16)
    rate = 2 * n**3 / bench.seconds(torch.mm, a, a)
    bench.row("matrix product, bf16", rate / 1e12, "TFLOP/s", f"torch.mm {n}")
    plans = [("fdistill", {}), ("dmd", {}), ("sim", {}), ("consistency", dict(loss="scd")),
             ("rectflow", dict(stage="flow")), ("fdistill", dict(dtype="fp32")),
             ("fdistill", dict(recompute=True)), ("fdistill", dict(accumulate=2))]
    plans += [("fdistill", dict(compile=True))] if bench.gpu else []
    for data in ("cifar10", "imagenet64"):
        for script, flags in plans if bench.gpu or data == "cifar10" else plans[:3]:
            words = command(script, dict(data=data, dtype="bf16") | flags)
            bench.attempt(words, words, updates, script, data, rate, **flags)


def updates(bench, script, data, rate, **flags):
    """Images a second of a script's own loop, in parts of its preset, after two updates."""
    module, cfg = bench.config(script, f"step-{time.time()}", data=data, **flags)
    cfg.batch, cfg.accumulate, cfg.steps = cfg.batch // cfg.accumulate, 1, 10**6
    images, _ = bench.images(cfg)
    network = common.build(cfg, common.load_data(cfg, images)).eval()
    counter, clock = FlopCounterMode(display=False), Clock(bench, module.update_ema)
    stubs = [(module, "update_ema", clock), (module, "gallery", no_gallery),
             (common.Run, "due", lambda _: False)]
    with ExitStack() as stack, warnings.catch_warnings(record=True) as heard, suppress(Enough):
        warnings.simplefilter("always")
        for stub in stubs:
            stack.enter_context(mock.patch.object(*stub))
        clock.first = stack.enter_context(ExitStack())
        clock.first.enter_context(counter)              # the first update's operations
        module.train(cfg, images, None if script == "rectflow" else network)
    seconds = (clock.at[clock.last] - clock.at[1]) / (clock.last - 1)
    found = {"rate": (cfg.batch / seconds, f"images/s, part {cfg.batch}")}
    if not cfg.compile:
        found["of the matrix rate"] = counter.get_total_flops() / seconds / rate
        found["attention by"] = attention(network)
    if bench.gpu:
        torch.cuda.set_sync_debug_mode("default")
        words = [str(w.message) for w in heard]
        waits = ["synchroniz" in text and "prototype" not in text for text in words]
        found["waits in an update"] = sum(waits)
    return found


class Clock:
    """Stands in for update_ema: notes when each update ends, and ends the training."""

    def __init__(self, bench, update):
        self.bench, self.update, self.at, self.last = bench, update, {}, 8 if bench.gpu else 2

    def __call__(self, ema, G, decay, number):
        self.update(ema, G, decay, number)
        if not decay:                                   # consistency's copy is no average
            return
        self.bench.wait()
        self.at[number] = time.perf_counter()
        if number == 0:
            self.first.close()
        if number == self.last and self.bench.gpu:
            torch.cuda.set_sync_debug_mode("warn")      # one more update, to count who waits
        elif number >= self.last:
            raise Enough


def no_gallery(*_):
    return {}, torch.zeros(1), None


def attention(network):
    """Names of what runs in attention, by PyTorch's profiler."""
    x = torch.randn(2, *network.shape, device=next(network.parameters()).device)
    with torch.no_grad(), torch.profiler.profile() as profile:
        network(x, common.level(x, 1.0))
    names = {event.key[:60] for event in profile.key_averages()}
    return ", ".join(sorted(name for name in names if re.search("flash|fmha|effic|cudnn_a", name)))


# ---- 4. CIFAR-10 from nothing to one step, 5. the other scripts, 6. resume -----------------------


def by_clock(bench, minutes, samples):
    """Flags of a training that is measured by FID, whose reference is made once. The small network:
    in minutes DDPM++ learns textures, and students of those collapse."""
    flags = dict(data="cifar10", net="small", dtype="bf16", flip=True, cond=True, every=10**6,
                 minutes=minutes, samples=samples)
    if bench.gpu and bench.args.fid:
        flags |= dict(fid=bench.args.fid, fid_ref="10000")
    return flags if bench.gpu else flags | TINY


def command(script, flags):
    words = [f"--{name}" if value is True else f"--{name} {value}" for name, value in flags.items()]
    return " ".join([f"{script}.py", *words])


def cifar10(bench):
    flags = by_clock(bench, 0.7 * bench.box / 60, 10_000)
    _, cfg = bench.config("fdistill", "runs/fdistill", **flags)
    images, whose = bench.images(cfg)
    bench.row("data", whose)
    bench.attempt("fdistill", command("fdistill", flags), train, "fdistill", "runs/fdistill",
                  images, **flags)
    data = common.load_data(cfg, images)
    teacher = common.load_teacher(cfg, data)            # the same one again, from its folder
    for steps in (18, 1):
        bench.attempt(f"teacher, {steps} steps", "", teacher_quality, cfg, data, teacher, steps)


def teacher_quality(bench, cfg, data, teacher, steps):
    """FID of the teacher by Heun's method, and a picture."""
    def part(z, label):
        return common.heun_sample(teacher, z, label, steps)

    def draw(n, label):
        z = torch.randn(n, *data.shape, device=bench.device)
        return common.in_parts(part, z, label, most=cfg.batch)

    shown = draw(16, common.draw_label(16, data, bench.device))
    common.save_picture(f"{bench.args.out}/teacher-{steps}.png", {f"teacher, {steps} steps": shown})
    return common.fid(cfg, data, draw) if cfg.fid else {"no FID": "without --fid"}


def scripts(bench):
    """One teacher, the one of the part before if there is one; a minute for each script."""
    same = by_clock(bench, bench.box / 60 / 10, 5000)
    _, cfg = bench.config("fdistill", "runs/none", **same)
    images, whose = bench.images(cfg)
    for path in bench.work.glob("runs/teacher-*/ema.pt"):
        cfg.teacher = str(path)
    teacher = common.load_teacher(cfg, common.load_data(cfg, images))
    bench.row("teacher", cfg.teacher or "fitted here")
    bench.row("data", whose)
    pairs = 4000 if bench.gpu else 8
    plans = [("dmd", {}), ("sim", {}), ("consistency", dict(loss="cd")),
             ("consistency", dict(loss="ect")), ("rectflow", dict(stage="distill", pairs=pairs)),
             ("consistency", dict(loss="scd"))]
    for script, more in plans:
        name = "-".join([script, *map(str, more.values())])
        flags = same | more
        bench.attempt(name, command(script, flags), train, script, f"runs/{name}", images, teacher,
                      **flags)


def resume(bench):
    """20 updates against 10, an end without notice and 10 more, and against 20 once again."""
    bench.attempt("largest difference of weights", "fdistill.py --resume", resumed)


def resumed(bench):
    students = {}
    for name in ("straight", "again", "broken"):
        module, cfg = bench.config("fdistill", f"resume/{name}")
        images, cfg.batch, cfg.accumulate = bench.images(cfg)[0], min(cfg.batch, 64), 1
        cfg.steps, cfg.every = (20, 10) if bench.gpu else (4, 2)
        torch.manual_seed(0)
        teacher = common.build(cfg, common.load_data(cfg, images)).eval()
        update = Dying(module.update_ema, cfg.every + 2 if name == "broken" else 0)
        with mock.patch.object(module, "update_ema", update), mock.patch.object(
                module, "gallery", no_gallery), mock.patch.object(
                common.Run, "due", lambda _: False):
            with suppress(Enough):
                student, _ = module.train(cfg, images, teacher)
            if name == "broken":
                cfg.resume = True
                student, _ = module.train(cfg, images, teacher)
        students[name] = torch.cat([p.flatten() for p in student.parameters()])
    straight = students.pop("straight")
    return {name: float((found - straight).abs().max()) for name, found in students.items()}


class Dying:
    """Stands in for update_ema, and dies at a call."""

    def __init__(self, update, call):
        self.update, self.left = update, call

    def __call__(self, *args):
        self.left -= 1
        if self.left == 0:
            raise Enough
        self.update(*args)


PARTS = {op: 1, toys: 2, step: 4, cifar10: 12, scripts: 6, resume: 1}        # minutes of 26


def work(args, part, box):
    """A part, in a process of its own that can be killed with what it started."""
    os.setsid()
    log = os.open(f"{args.out}/{part.__name__}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(8 if torch.cuda.is_available() else 1)
    bench = Bench(args, part.__name__, box)
    try:
        part(bench)
    except Exception as e:
        bench.row("error", f"{type(e).__name__}: {e}"[:300])
        raise


def run(args, part, box):
    """The rows of a part, which is killed when its box is over."""
    name, began = part.__name__, time.time()
    # a fork: PyTorch is imported once, and this process never touches the GPU
    process = multiprocessing.get_context("fork").Process(target=work, args=(args, part, box))
    process.start()
    process.join(box)
    rows, file = [], Path(args.out, f"{name}.jsonl")
    code = process.exitcode
    if code is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    if file.exists():
        rows = [json.loads(line) for line in file.read_text().splitlines()]
    if code != 0:
        what = f"killed: over its {box:.0f} s" if code is None else f"ended by code {code}"
        rows.append(dict.fromkeys(COLUMNS, "") | dict(part=name, what="error", value=what))
    print(f"{name}: {len(rows)} rows in {time.time() - began:.0f} of {box:.0f} s", flush=True)
    return rows


def write(args, rows):
    """results.json and results.md, whole after each part."""
    Path(args.out, "results.json").write_text(json.dumps(rows, indent=1))
    lines = [COLUMNS, ["---" for _ in COLUMNS]]
    for row in rows:
        lines.append([f"{v:.5g}" if isinstance(v, float) else str(v) for v in row.values()])
    cells = [" | ".join(line).replace("\n", " ") for line in lines]
    Path(args.out, "results.md").write_text("".join(f"| {line} |\n" for line in cells))


def main():
    names = {part.__name__: part for part in PARTS}
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--out", default="bench")
    parser.add_argument("--only", choices=names, nargs="+", help="parts, which get all the time")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--fid", default="")
    args, rows = parser.parse_args(), []
    parts = [names[name] for name in args.only or names]
    os.makedirs(args.out)                               # an error where one is: nothing is lost
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as args.work:
        for part in parts:
            share = PARTS[part] / sum(PARTS[p] for p in parts)
            rows += run(args, part, 60 * args.minutes * share)
            write(args, rows)
    errors = sum("error" in row["what"] for row in rows)
    print(f"{len(rows)} rows, {errors} errors: {args.out}/results.md")


if __name__ == "__main__":
    main()
