"""
Memory and hours of the image presets, without a GPU: each script's own training loop runs two steps
on fake tensors, which have a size and no numbers.

    python tests/bench_memory.py                # all scripts at 32x32 and 64x64: 20 minutes
    python tests/bench_memory.py imagenet64 sim # one data set, one script
"""
import contextlib
import importlib
import io
import sys
import tempfile
import weakref
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.optim import Adam
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

SHAPES = dict(cifar10=((3, 32, 32), 10), imagenet64=((3, 64, 64), 1000))
LOSSES = ("cd", "ct", "ect", "scd", "sct", "sprint", "ctm", "meanflow")
RUNS = [("fdistill", {}), ("dmd", {}), ("dmd", dict(variant="dmd")), ("dmd", dict(variant="vsd")),
        ("sim", {}), ("rectflow", dict(stage="flow")), ("rectflow", dict(stage="reflow")),
        ("rectflow", dict(stage="guided")), *[("consistency", dict(loss=loss)) for loss in LOSSES]]
RATE = 100e12                   # FLOP/s of one H100 as measured: 41 (scd) to 154 (flow) teraFLOP/s
CARDS = (24, 48, 80, 141)       # GB
FREE = 0.9                      # share of a card that tensors get; CUDA itself, gaps, workspaces


class Noise:
    """A data set of no images in particular."""

    def __init__(self, shape, classes, cond):
        self.shape, self.sigma_data, self.class_weights = shape, 0.5, []
        if cond:
            self.class_weights = [1 / classes] * classes
        self.label_dim = len(self.class_weights)

    def sample(self, n):
        return torch.randn(n, *self.shape, device="meta"), common.draw_label(n, self, "meta")


def count_flops(function, args, kwargs, out):
    """FLOPs of one operation, by PyTorch's formulas. (Its counter keeps graphs alive.)"""
    ops, shapes = torch.ops.aten, [t.shape for t in args[:4] if torch.is_tensor(t)]
    if function == ops._scaled_dot_product_flash_attention_for_cpu.default:
        return sdpa_flop_count(*shapes[:3])
    if function == ops._scaled_dot_product_flash_attention_for_cpu_backward.default:
        return sdpa_backward_flop_count(*shapes)
    formula = flop_registry.get(function._overloadpacket)
    return formula(*args, **kwargs, out_val=out) if formula else 0


class Memory(TorchDispatchMode):
    """Bytes of all storages that are alive, and their peak; FLOPs."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known, self.flops = 0, 0, set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        self.flops += count_flops(function, args, kwargs or {}, out)
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(t) and t.untyped_storage()._cdata not in self.known:
                self.add(t.untyped_storage())
        return out

    def add(self, storage):
        self.known.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.release, storage._cdata, storage.nbytes())

    def release(self, key, size):
        self.known.discard(key)
        self.now -= size


class LikeCuda(TorchFunctionMode):
    """What a GPU does in autocast, for tensors without numbers: layers and attention in bf16, the
    latter by the fused kernel, which keeps no matrix of weights."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        attention, kind = F.scaled_dot_product_attention, None
        if torch.is_autocast_enabled("cpu"):            # see `autocast`
            if function in (F.conv2d, F.linear, attention):
                kind = torch.bfloat16
        if kind:
            args = [a.to(kind) if torch.is_tensor(a) else a for a in args]
        if function is attention:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args)[0]
        return function(*args, **kwargs or {})


def autocast(device, dtype, enabled):
    """Remembers what was asked for where `checkpoint` finds it again; of no effect by itself."""
    return torch.amp.autocast("cpu", dtype, enabled)


def adam(params, *args, fused, **kwargs):
    """Adam without its fused kernel, which wants numbers."""
    return Adam(params, *args, **kwargs, foreach=False)


def block(forward):
    """Block's forward, which --recompute runs in a backward pass, where no mode is active."""
    def run(*args):
        with LikeCuda() if torch.is_grad_enabled() else contextlib.nullcontext():
            return forward(*args)

    return run


class Enough(Exception):
    """Ends a training."""


def two_steps(before_the_second):
    """A stand-in for a script's Run: two steps, nothing written."""
    class TwoSteps:
        progress, device = 0.5, torch.device("meta")

        def __init__(self, cfg, script, on_log=None, **state):
            self.cfg, self.part = cfg, cfg.batch // cfg.accumulate

        def steps(self):
            yield 0
            before_the_second()                         # the optimisers' states are there now
            self.cfg.accumulate = 2                     # of the loop's own: rectflow copies it
            yield 1
            raise Enough

        def log(self, **values):
            pass

        def due(self):
            return False

    return TwoSteps


def measure(script, data, part=64, **flags):
    """(bytes between steps, bytes a sample of a part beside them, FLOPs a sample of a batch)."""
    module, first = importlib.import_module(script), (0, 0)
    cfg = module.Config(data=data, batch=part, accumulate=1, dtype="bf16", out="/nowhere", **flags)
    noise = Noise(*SHAPES[data], cfg.cond)
    if script == "dmd":
        cfg.end_to_end, cfg.pairs = True, part          # the number of calls is not drawn

    def first_is_over():
        nonlocal first
        memory.peak = memory.now
        first = memory.now, memory.flops

    def pairs(*_):
        x, label = noise.sample(part)
        return torch.randn_like(x), label, x

    meta = torch.device("meta")
    stubs = [(module, "Run", two_steps(first_is_over)), (module, "teacher_pairs", pairs),
             (module, "gallery", lambda *_: ({}, torch.zeros(1), None)),
             (torch.nn.Module, "load_state_dict", lambda *_, **__: None),
             (common, "need", lambda *_: None),         # no number is finite here
             (torch, "autocast", autocast), (torch.optim, "Adam", adam),
             (common.Block, "forward", block(common.Block.forward)),
             (common, "pick_device", lambda _: meta)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        for stub in stubs:
            stack.enter_context(mock.patch.object(*stub, create=True))
        memory = Memory()
        for mode in (LikeCuda(), memory):
            stack.enter_context(mode)
        teacher = None
        if not {"ct", "flow"} & set(flags.values()):
            teacher = common.build(cfg, noise).eval()
        stack.enter_context(contextlib.suppress(Enough))
        module.train(cfg, noise, teacher)
    between, before = first
    flops = (memory.flops - before) / (2 * part)
    return between, (memory.peak - between) / part, flops


def row(script, data, flags):
    """A row of the table: what a preset needs, and what fits."""
    preset = importlib.import_module(script).Config(data=data, **flags)
    cells, part = [], preset.batch // preset.accumulate
    for recompute in (False, True):
        fixed, sample, flops = measure(script, data, recompute=recompute, **flags)
        cells.append([int((FREE * card * 1e9 - fixed) / sample) for card in CARDS])
        if not recompute:
            hours = preset.steps * preset.batch * flops / RATE / 3600
            need = (fixed + part * sample) / FREE / 1e9
            about = " | ".join([f"{fixed / 1e9:.1f}", f"{sample / 1e6:.0f}", f"{preset.steps:,}",
                                f"{preset.batch}", f"{part}", f"{need:.0f}", f"{flops / 1e9:,.0f}",
                                f"{hours:.1f}"])
    name = " ".join([script, *map(str, flags.values())])
    fits = [f"{max(0, a)} / {max(0, b)}" for a, b in zip(*cells)]
    return f"| {data} {name} | {about} | {' | '.join(fits)} |"


if __name__ == "__main__":
    words = set(sys.argv[1:])
    print("| preset | GB between steps | MB a sample | steps | batch | part | GB needed | GFLOP a "
          "sample | hours | " + " | ".join(f"{card} GB" for card in CARDS) + " |")
    print("|---" * (9 + len(CARDS)) + "|")
    for data in SHAPES:
        for script, flags in RUNS:
            if words <= {data, script, *flags.values()}:
                print(row(script, data, flags), flush=True)
