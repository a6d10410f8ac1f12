"""
What a GPU would find, without one: tensors here remember a logical device. Mixing devices, .numpy()
of a GPU's tensor and a generator of the wrong device are errors; who waits for the GPU is counted.
"""
import importlib
import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import common
import fdistill
import rectflow
from conftest import ROOT

CPU, GPU = torch.device("cpu"), torch.device("cuda")
READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal")
Tensor = torch.Tensor


def where(t):
    return getattr(t.untyped_storage(), "logical", CPU)


def put(out, device):
    for t in tree_leaves(out):
        if torch.is_tensor(t):
            t.untyped_storage().logical = device
    return out


class Kernels(TorchDispatchMode):
    """Below autograd: devices must agree, results are where the inputs are."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)]
        name = op._schema.name.removeprefix("aten::")
        if name.startswith("index"):                    # indices may lie on the CPU
            if where(tensors[0]) == GPU and any(where(t) == CPU or t.dtype == torch.bool
                                                for t in tensors[1:] if t.ndim):
                self.waits[name] += 1
            tensors = [t for t in tensors if t.is_floating_point() or where(t) == GPU]
        places = {where(t) for t in tensors if t.ndim or where(t) == GPU} - {None}
        if len(places) > 1 and name == "copy_":
            self.waits["copy_ between devices"] += 1
            return op(*args, **kwargs or {})            # the first argument stays where it is
        if len(places) > 1 and not name.startswith("prims"):    # PyTorch's own, in a JVP
            raise RuntimeError(f"{name} of tensors on the CPU and on the GPU")
        self.waits[name] += name in READS and GPU in places
        out = op(*args, **kwargs or {})
        if not tensors and "zero" in name:              # perhaps autograd's, which know their place
            return put(out, None)
        return put(out, GPU) if GPU in places else out


class Rehearsal(TorchFunctionMode):
    """Above: what PyTorch is asked for by the name of a device."""

    def __init__(self):
        super().__init__()
        self.kernels = Kernels()
        self.waits = self.kernels.waits = Counter()

    def __enter__(self):
        self.kernels.__enter__()
        return super().__enter__()

    def __exit__(self, *args):
        super().__exit__(*args)
        self.kernels.__exit__(*args)

    def __torch_function__(self, f, types, args=(), kwargs=None):
        kwargs, wanted = dict(kwargs or {}), None
        if f == Tensor.device.__get__:
            return where(args[0])
        if f == Tensor.is_cuda.__get__:
            return where(args[0]) == GPU
        if f in (Tensor.numpy, Tensor.__array__) and where(args[0]) == GPU:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if f is F.one_hot:                              # a GPU does not look at the numbers
            return put(torch.eye(args[1], dtype=torch.long), where(args[0]))[args[0]]
        if f is Tensor.tolist and where(args[0]) == GPU:
            self.waits["tolist"] += 1
        if kwargs.get("device") is not None:
            wanted, kwargs["device"] = torch.device(kwargs["device"]), CPU
        if f is Tensor.cpu:
            return self.move(args[0], CPU)
        if f is Tensor.to:
            args, wanted = self.target(args, wanted)
            x = args[0] if wanted is None else self.move(args[0], wanted)
            return put(f(x, *args[1:], **kwargs), where(x))
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type != (wanted or CPU).type:
            raise RuntimeError("Expected a generator of the tensor's device")
        out = f(*args, **kwargs)
        if wanted == GPU:
            self.waits["tensor of a list"] += f is torch.tensor
        if f in (torch.zeros, torch.eye):
            put(out, CPU)
        return put(out, wanted) if wanted else out

    def target(self, args, wanted):
        """The arguments of Tensor.to with its device taken out."""
        first = args[1] if len(args) > 1 else None
        if torch.is_tensor(first):
            return (args[0], first.dtype, *args[2:]), where(first)
        if isinstance(first, (str, torch.device)):
            return (args[0], CPU, *args[2:]), torch.device(first)
        return args, wanted

    def move(self, x, device):
        """x on a logical device: itself if it is there, else a copy, which is a wait."""
        if where(x) == device:
            return x
        self.waits["copy between devices"] += 1
        return put(x.clone(), device)


@pytest.fixture
def gpu(monkeypatch):
    """A rehearsal under way; the parts of torch.cuda that a run asks for."""
    fork, autocast = torch.random.fork_rng, torch.autocast

    def fork_rng(devices, **more):                      # `checkpoint` gives more
        assert more or [torch.device(d) for d in devices] == [GPU], "the GPU's numbers would go on"
        return fork([], **more)

    def cast(device, dtype, enabled):
        assert device == "cuda" or not enabled          # --recompute's second pass knows no device
        return autocast("cpu", dtype, enabled)

    for name, stub in dict(get_rng_state=lambda *_: torch.zeros(16, dtype=torch.uint8),
                           set_rng_state=lambda *_: None, max_memory_allocated=lambda _: 0).items():
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    monkeypatch.setattr(torch, "autocast", cast)
    monkeypatch.setattr(common, "pick_device", lambda cfg: GPU)
    monkeypatch.setattr(common, "load_kernel", lambda: None)
    with Rehearsal() as rehearsal:
        yield rehearsal


LOSSES = ("cd", "ct", "ect", "scd", "sct", "sprint", "ctm", "meanflow")
CASES = [("fdistill", {}), ("dmd", {}), ("dmd", dict(variant="dmd", pairs=4)), ("sim", {}),
         ("dmd", dict(variant="vsd")), ("dmd", dict(steps_student=2, end_to_end=False)),
         *[("rectflow", dict(stage=stage, pairs=4)) for stage in ("flow", "reflow", "guided")],
         *[("consistency", dict(loss=loss)) for loss in LOSSES]]
SMALL = dict(data="cifar10", net="small", width=4, dtype="bf16", accumulate=2, cond=True)
ADM = dict(SMALL, net="adm", width=8, recompute=True)
IMAGES = [(script, dict(SMALL, **flags)) for script, flags in CASES[:1] + CASES[6:7] + CASES[14:15]]
LARGE = [("fdistill", ADM), ("consistency", dict(ADM, loss="scd"))]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in IMAGES + LARGE]


@pytest.mark.parametrize("script, flags", CASES + SLOW)
def test_rehearsal(script, flags, gpu, monkeypatch):
    """No script mixes devices, and no update of its loop waits for the GPU."""
    module, data, seen = importlib.import_module(script), None, []
    flags = dict(data="unequal", cond=True) | flags
    cfg = module.Config(**flags | dict(batch=8, steps=4, every=9, samples=8))
    if cfg.data == "cifar10":
        images = torch.randint(256, (32, 3, 8, 8)).byte()
        data = common.Images(images, torch.arange(32) % 2, 2, GPU, True)
    teacher = common.build(cfg, common.load_data(cfg, data))
    if {"flow", "ct"} & set(flags.values()):
        teacher = None

    def counted(ema, G, decay, step):
        common.update_ema(ema, G, decay, step)
        if decay:                                       # else it is no update's last line
            seen.append(+gpu.waits)
            gpu.waits.clear()

    def gallery(cfg, data, teacher):
        x, label = data.sample(4)
        return {}, torch.randn_like(x), label

    monkeypatch.setattr(module, "update_ema", counted)
    monkeypatch.setattr(module, "gallery", gallery)
    monkeypatch.setattr(rectflow, "compare", lambda *_: {})
    monkeypatch.setattr(common.Run, "due", lambda _: False)
    module.train(cfg, data, teacher)
    assert not seen[1] | seen[2]


def test_compare_rehearsed(gpu, monkeypatch):
    """tests/compare.py draws labels and noise where the scripts have theirs."""
    import compare
    monkeypatch.setattr(fdistill, "PRESETS", dict(unequal=dict(teacher_steps=2)))
    monkeypatch.setattr(compare, "draw_frames", lambda *_: None)
    compare.main("fdistill:steps=2,minutes=0 --data unequal --samples 64 --seeds 1".split())


def test_errors_on_purpose(gpu):
    """What it is to find, it finds."""
    x = torch.randn(3, device="cuda")
    for mistake in (lambda: x + torch.randn(3), x.numpy, lambda: torch.cat([x, torch.ones(2)]),
                    lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
                    lambda: nn.Linear(3, 2)(x)):
        with pytest.raises((RuntimeError, TypeError)):
            mistake()
    assert not +gpu.waits and x.cpu().numpy().shape == (3,)
    float(x.sum()), x[x > 0], x.tolist(), torch.tensor([1.0], device="cuda")
    assert set(+gpu.waits) >= {"copy between devices", "_local_scalar_dense", "index", "tolist"}


@pytest.mark.slow
@pytest.mark.background
def test_bench_gpu(tmp_path):
    """Its first and last part at tiny size (all take two minutes): rows, and none is an error."""
    for part in ("op", "resume"):
        command = [sys.executable, ROOT / "tests" / "bench_gpu.py", "--only", part, "--out", part]
        p = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path,
                           env=os.environ | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""))
        rows = json.loads((tmp_path / part / "results.json").read_text())
        assert p.returncode == 0 and len(rows) >= 2, p.stderr
        assert [row for row in rows if "error" in row["what"]] == []


@pytest.mark.slow
def test_bench_memory():
    """Its row for sim on CIFAR-10 has the figures of results.md's."""
    command = [sys.executable, ROOT / "tests/bench_memory.py", "cifar10", "sim"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    cells = out.splitlines()[2].strip("| ").split(" | ")
    _, fixed, mb, _, _, part, gb, _, hours, *cards = cells
    plain, saving = zip(*[card.split(" / ") for card in cards])
    row = ["sim", fixed, mb, part, gb, " / ".join(plain), " / ".join(saving), hours]
    assert f"| {' | '.join(row)} |" in (ROOT / "notebooks/results.md").read_text()


def test_bench_memory_counts_every_part():
    """A flow's FLOPs a sample are a pass forward and one back, as PyTorch counts them."""
    import bench_memory
    found = bench_memory.measure("rectflow", "cifar10", part=1, stage="flow")[2]
    cfg = rectflow.Config(data="cifar10", stage="flow")
    D = common.build(cfg, bench_memory.Noise((3, 32, 32), 10, False))
    with FlopCounterMode(display=False) as counter:
        D(torch.randn(1, 3, 32, 32), torch.ones(1, 1, 1, 1)).sum().backward()
    assert found == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_group_norm_keeps_bf16():
    """Autocast alone would work in float32, and keep a copy twice as large for backward."""
    x = torch.randn(2, 8, 4, 4, device="cuda", dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        assert common.GroupNorm(8, adm=False).cuda()(x).dtype == torch.bfloat16
