"""
What the five scripts share, in reading order; nothing here belongs to one method.

    1 command line   2 data   3 noise levels   4 networks   5 teachers and sampling
    6 divergences and the weighting op   7 metrics   8 pictures   9 processes and run folder

One currency everywhere: a *denoiser* D(x_t, sigma, label) -> x, the expected clean sample, with x_t (B, ...) noised by
x_t = x + sigma * eps, sigma (B,), label one-hot (B, K) or None. A network, a closed-form mixture and a saved student are
all denoisers and may stand in for one another. The score is (D(x_t, sigma) - x_t) / sigma^2.
Importing this file does no work: it prints nothing, picks no device, compiles and downloads nothing.
"""
import argparse, copy, csv, ctypes, dataclasses, datetime, difflib, hashlib, inspect, io, json, math, os, pickletools, re
import signal, sys, tarfile, time, urllib.request, warnings, weakref, zipfile, zlib
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from tqdm import tqdm

# ---- 1. command line -------------------------------------------------------------------------------------------------


class UserError(ValueError):
    """Something the user can mend; its text is one sentence that says how. `main` prints it and exits with code 2."""


@dataclass
class Shared:
    """Flags that mean the same in every script. A script's Config adds its own and sets the defaults that matter to it."""
    data: str = "ring"          # data set
    data_dir: str = "data"      # where image data lies, or is downloaded to: a folder or the archive itself
    net: str = ""               # mlp | small | ddpmpp | adm: network; by default what the data calls for
    width: int = 0              # channels of the network's first level; 0: what --net calls for
    cond: bool = False          # class-conditional: every network sees the label
    teacher: str = ""           # a saved ema.pt or EDM's .pkl (its network, whatever --net says), 'exact' (toys), or nothing: fit one in runs/
    teacher_steps: int = 2000   # updates of that first fit
    out: str = ""               # run folder; by default runs/<script>-<data>-<seed>
    steps: int = 1000           # student updates
    budget: str = ""            # time to train, 90s, 25m or 2h, instead of --steps; half of it for a teacher that must be fitted
    batch: int = 512            # samples per update
    micro: int = 0              # samples per forward pass, 0: all of --batch; lower it if memory runs out, gradients stay the same
    lr: float = 1e-3            # learning rate of the student
    sigma_min: float = 0.02     # lowest noise level the method looks at
    sigma_max: float = 5.0      # highest
    sigma_init: float = 5.0     # noise level the one-step student starts from
    ema: float = 0.99           # decay per step of the averaged student, the one that is judged
    seed: int = 0               # random seed
    device: str = "auto"        # auto | cpu | cuda: where to run
    dtype: str = "fp32"         # fp32 | bf16: precision inside the networks
    compile: bool = False       # run the networks through torch.compile
    recompute: bool = False     # image networks keep only their blocks' inputs for the backward pass: less memory, a third more time
    every: int = 500            # steps between pictures and checkpoints
    samples: int = 20000        # samples for the final metrics, or how many to draw with --sample
    fid: str = ""               # TorchScript Inception file (inception-2015-12-05.pt); measures FID at the end
    fid_ref: str = ""           # FID reference: EDM's .npz, or this many training images, by default all of them
    resume: bool = False        # continue the run in the folder
    sample: str = ""            # a finished run folder to draw --samples from; nothing is trained


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def parse(Config, PRESETS, argv=None):
    """
    Command line for a Config dataclass: field names are the flags, trailing comments the help; a comment that starts
    with `a | b | c` also lists the only values allowed. Dataclass default < preset of --data < flag.
    Raises UserError for flags and values that it does not know; `check` looks at what they mean together.
    """
    notes = {}
    for cls in reversed(Config.__mro__[:-1]):
        notes.update(re.findall(r"^    (\w+):[^#\n]*#\s*(.+)$", inspect.getsource(cls), re.M))
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)         # only to learn --data, for its defaults
    first.add_argument("--data", nargs="?", default=Config.data)
    preset = PRESETS.get(first.parse_known_args(argv)[0].data, {})
    p = _Parser(allow_abbrev=False, usage="%(prog)s [--flag value] ...",
                description=(sys.modules[Config.__module__].__doc__ or "").strip().split("\n")[0])
    groups = [p.add_argument_group("flags of this method"), p.add_argument_group("flags that every script has")]
    for f in dataclasses.fields(Config):
        default, note = preset.get(f.name, f.default), notes.get(f.name, "")
        values = list(PRESETS) if f.name == "data" else (re.match(r"\w+(?: \| \w+)+", note) or [""])[0].split(" | ")
        note = f"{' | '.join(values)}: {note}" if f.name == "data" else note
        kind = dict(action=argparse.BooleanOptionalAction) if isinstance(f.default, bool) else \
            dict(type=type(f.default), metavar=type(f.default).__name__, choices=None if values == [""] else values)
        groups[hasattr(Shared, f.name)].add_argument(
            f"--{f.name}", default=default, help=(note + ("" if default == "" else f" [{default}]")).replace("%", "%%"), **kind)
    args, unknown = p.parse_known_args(argv)
    if unknown:
        flags = [f"--{f.name}" for f in dataclasses.fields(Config)]
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1)
        p.error(f"unknown argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else "; -h lists the flags"))
    return Config(**vars(args))


def check(cfg):
    """Raise UserError for values and combinations that cannot work, whatever the script."""
    toy = cfg.data in TOYS
    for name, value in vars(cfg).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name} must be a finite number, not {value}")
    for bad, sentence in (
        (min(cfg.steps, cfg.batch, cfg.every, cfg.samples, cfg.teacher_steps) < 1,
         "--steps, --batch, --every, --samples and --teacher_steps must be at least 1"),
        (cfg.budget and not duration(cfg.budget), f"--budget is a time such as 90s, 25m or 2h, not {cfg.budget}"),
        (cfg.samples < 2 and not cfg.sample, "--samples must be at least 2 to measure anything"),
        (cfg.micro < 0 or cfg.micro and cfg.batch % cfg.micro, f"--micro {cfg.micro} does not divide --batch {cfg.batch}"),
        (not 0 < cfg.sigma_min < cfg.sigma_max < math.inf or not 0 < cfg.sigma_init < math.inf,
         f"noise levels must fulfil 0 < sigma_min < sigma_max and 0 < sigma_init, not {cfg.sigma_min}, {cfg.sigma_max}, {cfg.sigma_init}"),
        (not 0 <= cfg.seed < 2**63, f"--seed must lie in 0 .. 2^63 - 1, not {cfg.seed}"),
        (not 0 <= cfg.ema < 1, f"--ema is a decay in [0, 1), not {cfg.ema}"),
        (not 0 < cfg.lr < math.inf, f"--lr must be a positive number, not {cfg.lr}"),
        (cfg.width < 0 or cfg.width % 4, f"--width must be a positive multiple of 4, not {cfg.width}"),
        (toy and cfg.net not in ("", "mlp") or not toy and cfg.net == "mlp",
         f"--net {cfg.net} does not go with --data {cfg.data}: toys take mlp, images small, ddpmpp or adm"),
        (not toy and cfg.teacher == "exact", "--teacher exact needs a toy: images have no closed form; give a file, or nothing to fit one"),
        (toy and cfg.fid, "--fid is for images; a toy is measured by its energy coefficient without it"),
        (cfg.batch % (processes() * (cfg.micro or 1)), f"--batch {cfg.batch} does not divide into {processes()} processes"
         f"{f' times --micro {cfg.micro}' if cfg.micro else ''}; choose another --nproc_per_node"),
        (processes() > 1 and pick_device(cfg).type == "cuda" and int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count(),
         f"--nproc_per_node is more than the {torch.cuda.device_count()} GPUs of this machine"),
        (cfg.device == "cuda" and not torch.cuda.is_available(), "--device cuda: PyTorch sees no CUDA GPU here; leave --device away to use the CPU"),
    ):
        if bad:
            raise UserError(sentence)
    if cfg.fid and not cfg.sample:                          # better now than after hours of training
        load_inception(cfg.fid, "cpu")
        fid_reference(cfg)


def duration(text):
    """Seconds in 90s, 25m or 2.5h; 0 if it is no such time."""
    match = re.fullmatch(r"(\d+\.?\d*)([smh])", text)
    return float(match[1]) * dict(s=1, m=60, h=3600)[match[2]] if match else 0


def main(Config, PRESETS, train, sample):
    """A script's command line: parse, then train or draw; bad input exits with 2 and one sentence, Ctrl-C with 130."""
    join_processes()
    try:
        cfg = parse(Config, PRESETS)
        check(cfg)
        if cfg.data in TOYS and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)        # small matrices: two threads won a tenth of the time alone, lost half beside other work
        if not cfg.sample:
            train(cfg)
        elif not rank():
            draw(cfg, sample)
        any_process(False)                                  # nobody leaves before all are done
    except LostProcess as e:
        code, message = 1, str(e)
    except (UserError, OSError) as e:                       # OSError: a full disk, a folder that may not be written
        code, message = 2, str(e)
    except (RuntimeError, MemoryError) as e:                # the CPU's allocator raises a plain RuntimeError
        if not isinstance(e, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in str(e):
            raise
        code, message = 2, f"memory is full: lower --micro (now {cfg.micro or cfg.batch // processes()}, gradients stay the same), or what else is large"
    except KeyboardInterrupt as e:
        code, message = 130, f"stopped; {e}" if str(e) else "stopped"
    else:
        if processes() > 1:
            dist.destroy_process_group()
        return
    if first_to_say():                                      # code 1 comes in the middle of a progress bar's line
        print("\n" * (code == 1) + f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code) if processes() > 1 else sys.exit(code)   # a normal exit may wait for what the others no longer send


def pick_device(cfg):
    """The torch.device that --device names; auto is the GPU where there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device)


# ---- 2. data ---------------------------------------------------------------------------------------------------------
# A data set has .sample(n) -> (x, label), .draw_label(n), .shape of one x, .label_dim and .sigma_data. All draws use
# PyTorch's global generator, so that a checkpoint of its state resumes the very same stream.


class GaussianMixture(nn.Module):
    """
    Mixture of isotropic Gaussians with closed-form density, score and denoiser at every noise level: data set and
    perfect teacher in one. means (K, D); std >= 0, one for all; weights (K,), equal by default; groups (K,) the class
    of each component, its own by default. With samples as means and std=0 it is the exact denoiser of that sample set.
    """

    def __init__(self, means, std=0.0, weights=None, groups=None):
        super().__init__()
        means = torch.as_tensor(means)
        means = means if means.is_floating_point() else means.float()
        weights = means.new_ones(len(means)) if weights is None else torch.as_tensor(weights).to(means)
        groups = torch.arange(len(means)) if groups is None else torch.as_tensor(groups)
        if means.ndim != 2 or len(weights) != len(means) or len(groups) != len(means) or std < 0 or not weights.sum() > 0:
            raise UserError("GaussianMixture wants means (K, D), K weights and groups, and std >= 0")
        self.std, self.shape, self.label_dim = float(std), tuple(means.shape[1:]), int(groups.max()) + 1
        self.register_buffer("means", means)
        self.register_buffer("weights", weights / weights.sum())
        self.register_buffer("groups", groups.to(means.device))
        mean = self.weights @ means
        self.sigma_data = float((self.weights @ (means - mean).square().sum(1) / means.shape[1] + std**2).sqrt())

    def sample(self, n):
        """n samples x (n, D) with one-hot labels (n, label_dim), or None where label_dim is 0."""
        k = torch.multinomial(self.weights, n, replacement=True)
        x = self.means[k] + self.std * torch.randn(n, *self.shape, device=k.device, dtype=self.means.dtype)
        return x, F.one_hot(self.groups[k], self.label_dim).to(x) if self.label_dim else None

    def draw_label(self, n):
        """n random one-hot labels in the data's proportions, None where label_dim is 0."""
        return self.sample(n)[1]

    def _log_joint(self, x, sigma, label):                                          # log w_k N(x; m_k, std^2 + sigma^2)
        var = (self.std**2 + sigma.to(x) ** 2)[:, None]                                                          # (B, 1)
        # not by matrix products: |x|^2 - 2xm + |m|^2 cancels in float32 when sigma is small
        d2 = torch.cdist(x, self.means.to(x), compute_mode="donot_use_mm_for_euclid_dist").square()              # (B, K)
        log_w = self.weights.to(x).log().expand_as(d2)
        if label is not None:                       # keep the components of the label's class, and their law among them
            log_w = log_w.masked_fill(label.argmax(1)[:, None] != self.groups[None], -math.inf)
            log_w = log_w - log_w.logsumexp(1, keepdim=True)
        return log_w - d2 / (2 * var) - 0.5 * x.shape[1] * (2 * math.pi * var).log()

    def log_prob(self, x, sigma, label=None):
        """log density (B,) of x (B, D) under the mixture blurred by noise of std sigma (B,)."""
        return self._log_joint(x, sigma, label).logsumexp(1)

    def score(self, x, sigma, label=None):
        """Gradient (B, D) of log_prob in x: towards the posterior-weighted means. sigma = 0 works too."""
        mean = self._log_joint(x, sigma, label).softmax(1) @ self.means.to(x)                                    # (B, D)
        return (mean - x) / (self.std**2 + sigma.to(x) ** 2)[:, None]

    def forward(self, x, sigma, label=None):
        """E[clean | x = clean + sigma eps], (B, D), by Tweedie's formula."""
        return x + sigma.to(x)[:, None] ** 2 * self.score(x, sigma, label)

    denoise = forward


def _toys():
    ring = torch.view_as_real(torch.polar(torch.ones(8), torch.arange(8) * math.pi / 4))
    line, arc, turn = torch.linspace(-1.2, 1.2, 5), torch.linspace(0, math.pi, 16), torch.linspace(1, 3.5, 48) * math.pi
    moon = torch.stack([arc.cos() - 0.5, arc.sin() - 0.25], 1)
    spiral = torch.view_as_real(torch.polar(1.2 * turn / turn.max(), turn))
    cell = torch.arange(16) // 4
    black = (cell[:, None] + cell) % 2 == 0                                          # on a 16 x 16 grid, 4 x 4 to a square
    return dict(
        ring=GaussianMixture(ring, 0.1),
        grid=GaussianMixture(torch.cartesian_prod(line, line), 0.05),
        unequal=GaussianMixture(ring, 0.1, weights=[8, 1, 4, 1, 2, 1, 4, 1]),
        moons=GaussianMixture(torch.cat([moon, -moon]), 0.08, groups=torch.arange(32) // 16),
        spiral=GaussianMixture(spiral, 0.04, groups=torch.arange(48) // 12),
        checkerboard=GaussianMixture(black.nonzero() / 8 - 0.9375, 0.05, groups=(cell[:, None] * 4 + cell)[black] // 2))


TOYS = _toys()

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
IMAGES = {"cifar10": ((3, 32, 32), 10), "imagenet64": ((3, 64, 64), 1000)}      # name -> shape of an image, number of classes
ON_DEVICE = 2**30                                   # larger data sets stay in a file: ImageNet-64 has 15.7e9 bytes


class Images:
    """
    Labelled images, uint8 (N, C, H, W); sample() gives [-1, 1] float32 on the device, randomly flipped. Either all of them
    lie on the device, or in a memory-mapped file of which a thread reads the next batch ahead. Which one that will be is
    settled by a seed drawn with the batch before it, `ahead`, a part of every checkpoint: reading ahead changes no result.
    """
    sigma_data = 0.5                                # of EDM; CIFAR-10 itself has 0.50
    ahead = None                                    # of the one data set of this process

    def __init__(self, images, labels, crc, label_dim, device):
        self.mapped, self.device, self.crc, self.next = images.nbytes > ON_DEVICE, device, crc, None
        self.images, self.labels = (t if self.mapped else t.to(device) for t in (images, labels))
        self.label_dim, self.shape = label_dim, tuple(images.shape[1:])
        self.classes = labels.unique().to(device)                               # all of them, but for small stand-ins
        self.thread = ThreadPoolExecutor(1)                                     # begins when it is first asked to read

    def sample(self, n):
        if self.mapped:
            images, labels, flip = self._read_ahead(n)
        else:
            i = torch.randint(len(self.images), (n,), device=self.device)
            images, labels, flip = self.images[i], self.labels[i], torch.rand(n, 1, 1, 1, device=self.device) < 0.5
        x = images.float() / 127.5 - 1
        return torch.where(flip, x.flip(3), x), F.one_hot(labels, self.label_dim).float() if self.label_dim else None

    def draw_label(self, n):
        k = self.classes[torch.randint(len(self.classes), (n,), device=self.device)]
        return F.one_hot(k, self.label_dim).float() if self.label_dim else None

    def _read_ahead(self, n):
        draw = lambda: int(torch.randint(2**62, ()))
        batch, Images.ahead = (n, draw() if Images.ahead is None else Images.ahead), draw()
        key, read = self.next or (None, None)
        parts = read.result() if key == batch else self._read(*batch)
        self.next = (n, Images.ahead), self.thread.submit(self._read, n, Images.ahead)
        return [t.to(self.device, non_blocking=True) for t in parts]

    def _read(self, n, seed):
        g = torch.Generator().manual_seed(seed)
        i = torch.randint(len(self.images), (n,), generator=g)
        parts = self.images[i], self.labels[i], torch.rand(n, 1, 1, 1, generator=g) < 0.5
        return [t.pin_memory() for t in parts] if self.device.type == "cuda" else parts


def load_data(cfg):
    """
    The data set --data as an endless source: .sample(n) -> x (n, ...) float32 on the device, label one-hot or None
    (without --cond). Raises UserError for missing, truncated or damaged files.
    """
    where, device = Path(cfg.data_dir), pick_device(cfg)
    if cfg.data in TOYS:
        data = copy.deepcopy(TOYS[cfg.data]).to(device)
    elif cfg.data in IMAGES:
        read = _cifar10 if cfg.data == "cifar10" and where.suffix != ".zip" else _converted
        shape, classes = IMAGES[cfg.data]
        data = Images(*one_first(read, where, shape, classes), classes, device)
    else:
        raise UserError(f"unknown data set {cfg.data!r}: choose one of {', '.join([*TOYS, *IMAGES])}")
    if not cfg.cond:
        data.label_dim = 0
    return data


def _converted(where, shape, classes):
    """
    (images (N, C, H, W) uint8 in a memory map, labels (N,), checksum) of an EDM data set zip, or of the downsampled ImageNet's
    train_data_batch_*.npz in a folder. They are converted once, into three files beside them; an interrupted conversion goes on
    where it stopped.
    """
    single, size = where.suffix == ".zip", math.prod(shape)
    sources = [where] if single else sorted(where.glob("train_data_batch_*.npz"), key=lambda p: (len(p.name), p.name))
    if not where.exists() or not sources:
        raise UserError(f"{where} has no train_data_batch_*.npz (downsampled ImageNet) and is no EDM data set .zip; README says where to get them")
    bytes_, label_file, state_file = (where.with_suffix(f".{end}") if single else where / f"train_data.{end}" for end in ("bin", "npy", "json"))
    reader = _zip_rows if single else _npz_rows
    try:
        state, now = {}, [[p.name, p.stat().st_size] for p in sources]
        if bytes_.exists() and label_file.exists() and state_file.exists():
            state = json.loads(state_file.read_text())
        if state.get("sources") != now:
            state, labels = dict(sources=now, rows=0, crc=0), np.concatenate([reader(p, shape, classes)[0] for p in sources])
            write_atomically(label_file, lambda f: np.save(f, labels))
            bytes_.write_bytes(b"")
        labels, start = np.load(label_file), 0
        if state["rows"] < len(labels):
            with open(bytes_, "r+b") as out, tqdm(total=len(labels), initial=state["rows"], unit=" images", desc=f"converting {where}") as bar:
                out.seek(state["rows"] * size)
                for p in sources:
                    here, rows = reader(p, shape, classes)
                    for part in rows(state["rows"] - start) if start + len(here) > state["rows"] else ():
                        out.write(part)
                        out.flush()
                        os.fsync(out.fileno())
                        state |= dict(rows=state["rows"] + len(part), crc=zlib.crc32(part, state["crc"]))
                        write_atomically(state_file, lambda f: f.write(json.dumps(state).encode()))
                        bar.update(len(part))
                    start += len(here)
        return torch.from_numpy(np.memmap(bytes_, np.uint8, "c", shape=(len(labels), *shape))), torch.from_numpy(labels), state["crc"]
    except UserError:
        raise
    except Exception as e:          # whatever numpy, zipfile and the PNG reader meet in a damaged file, or a full disk
        why = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"
        raise UserError(f"{where}: could not read or convert its images ({why}); get a damaged file again")


def _npz_rows(path, shape, classes, part=8192):
    """(labels from 0, rows(skip) -> parts (n, C, H, W)) of one official batch: data (N, C*H*W) uint8, labels 1..classes."""
    with open(path, "rb") as f, np.load(f) as z:
        labels = z["labels"].reshape(-1).astype(np.int64) - 1
    if not len(labels) or labels.min() < 0 or labels.max() >= classes:
        raise UserError(f"{path} has labels {labels.min() + 1} to {labels.max() + 1}, not 1 to {classes}" if len(labels) else f"{path} has no images")

    def rows(skip):
        with zipfile.ZipFile(path) as z, z.open("data.npy") as f:               # streamed: a batch alone has 1.6e9 bytes
            np.lib.format.read_magic(f)
            size, fortran, dtype = np.lib.format.read_array_header_1_0(f)
            row = math.prod(shape)
            if size != (len(labels), row) or fortran or dtype != np.uint8:
                raise UserError(f"{path} has data {size} {dtype}, not ({len(labels)}, {row}) uint8")
            f.seek(f.tell() + skip * row)
            for i in range(skip, len(labels), part):
                n = min(part, len(labels) - i)
                yield np.frombuffer(f.read(n * row), np.uint8).reshape(n, *shape)
    return labels, rows


def _zip_rows(path, shape, classes, part=1024):
    """The same for EDM's data set: PNG files in the order of their names, and dataset.json with labels from 0."""
    from matplotlib.image import imread
    with zipfile.ZipFile(path) as z:
        names = sorted(n for n in z.namelist() if n.endswith(".png"))
        of = dict(json.loads(z.read("dataset.json"))["labels"])
    labels = np.array([of[n] for n in names], np.int64)
    if not names or labels.min() < 0 or labels.max() >= classes:
        raise UserError(f"{path} has no PNG files with labels 0 to {classes - 1}")

    def rows(skip):
        with zipfile.ZipFile(path) as z:
            for i in range(skip, len(names), part):
                pngs = [imread(io.BytesIO(z.read(n)), format="png") for n in names[i:i + part]]
                if {p.shape for p in pngs} != {(*shape[1:], shape[0])}:
                    raise UserError(f"{path} has images that are not {shape[2]}x{shape[1]} RGB")
                yield np.ascontiguousarray((np.stack(pngs) * 255).round().astype(np.uint8).transpose(0, 3, 1, 2))
    return labels, rows


def _cifar10(where, shape, classes):
    """What _converted gives, for CIFAR-10's official binary version: read from its folder or its archive, or downloaded."""
    names = [f"data_batch_{i}.bin" for i in range(1, 6)]
    folder = next((f for f in (where, where / "cifar-10-batches-bin") if (f / names[0]).exists()), None)
    source = folder or (where if where.is_file() else where / "cifar-10-binary.tar.gz")
    again = f"delete it and get it again from {CIFAR10_URL}"
    if not source.exists():
        download(CIFAR10_URL, source, CIFAR10_MD5)
    elif source.name == "cifar-10-binary.tar.gz" and _md5(source) != CIFAR10_MD5:
        raise UserError(f"{source} has the wrong MD5 sum (damaged or cut off); {again}")
    try:
        if folder:
            parts = {n: (folder / n).read_bytes() for n in names if (folder / n).is_file()}
        else:
            with tarfile.open(source) as tar:       # members are read in memory: nothing is unpacked, no path can escape
                parts = {Path(m.name).name: tar.extractfile(m).read() for m in tar if Path(m.name).name in names and m.isfile()}
    except (tarfile.TarError, EOFError, OSError, zlib.error) as e:
        raise UserError(f"{source} is no readable CIFAR-10 archive ({str(e).splitlines()[0]}); {again}")
    files = [np.frombuffer(parts.get(name, b""), np.uint8) for name in names]
    for name, b in zip(names, files):
        if not b.size or b.size % 3073 or b[::3073].max() >= classes:
            raise UserError(f"{source} lacks {name}, or it is damaged: {b.size:,} bytes are not rows of a label 0..9 and 3x32x32 bytes")
    rows = torch.from_numpy(np.concatenate(files).reshape(-1, 3073))
    images = rows[:, 1:].reshape(-1, *shape).contiguous()
    return images, rows[:, 0].long(), zlib.crc32(images.numpy())


def _md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def download(url, path, md5):
    """Fetch url to path, continuing a partial download, and keep it only if the checksum fits."""
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    done = part.stat().st_size if part.exists() else 0
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
        with urllib.request.urlopen(request, timeout=30) as reply:
            done = done if reply.status == 206 else 0           # a server that ignores Range sends the whole file again
            total = done + int(reply.headers.get("Content-Length", 0))
            with open(part, "ab" if done else "wb") as f, tqdm(total=total, initial=done, unit="B", unit_scale=True, desc=path.name) as bar:
                while chunk := reply.read(1 << 20):
                    f.write(chunk)
                    bar.update(len(chunk))
        if part.stat().st_size < total:
            raise OSError(f"it broke off after {part.stat().st_size:,} of {total:,} bytes")
    except OSError as e:
        if getattr(e, "code", None) != 416:                     # of an HTTPError: the part is already whole
            raise UserError(f"could not download {url} ({e}); get it by other means and put it at {path}, or run again to continue")
    if _md5(part) != md5:
        part.unlink()
        raise UserError(f"{url} arrived with the wrong MD5 sum and was deleted; run again, or put a good copy at {path}")
    part.replace(path)


# ---- 3. noise levels -------------------------------------------------------------------------------------------------


def bcast(v, x):
    """v (B,) with trailing axes, so that it multiplies x (B, ...)."""
    return v.reshape(-1, *[1] * (x.ndim - 1))


def karras(u, sigma_min, sigma_max, rho=7):
    """Noise level at u in [0, 1] along Karras's ramp from sigma_min to sigma_max (EDM, arXiv 2206.00364, Eq. 5)."""
    return (sigma_min ** (1 / rho) + u * (sigma_max ** (1 / rho) - sigma_min ** (1 / rho))) ** rho


def karras_sigmas(steps, sigma_min, sigma_max, device=None):
    """The sampler's levels (steps + 1,) float64, falling from sigma_max to sigma_min and then 0 (EDM, Eq. 5)."""
    ramp = torch.linspace(1, 0, steps, dtype=torch.float64, device=device)
    return torch.cat([karras(ramp, sigma_min, sigma_max), ramp.new_zeros(1)])


def lognormal_sigma(n, mean=-1.2, std=1.2, device=None):
    """n levels with ln sigma ~ N(mean, std^2), EDM's training distribution (EDM, Table 1)."""
    return (mean + std * torch.randn(n, device=device)).exp()


def denoising_loss(d, target, sigma, sigma_data):
    """EDM's weighted squared error (B,) of denoised estimates d (B, ...); the weight makes it about one at every level (Table 1)."""
    return (1 / sigma**2 + 1 / sigma_data**2) * (d - target).square().flatten(1).mean(1)


# One state in four coordinates: a point x_t = a x + b eps of any path is a denoiser's x_t / a at sigma = b / a, exactly.
#     VP              a^2 = A, b^2 = 1 - A (A = alpha-bar)     eps = (x_t / a - D) / sigma
#     rectified flow  a = 1 - t, b = t (noise at t = 1)        v = dx_t/dt = (x_t - D) / t
#     TrigFlow        a = cos t, b = sd sin t                  sd F = dx_t/dt = (cos t x_t - D) / sin t      (2410.11081)
# Levels A, t, sigma are (B,), x_t (B, ...); F of EDM's own network is minus the network. If noise is at t = 0, v changes sign.


def eps_from_denoiser(D, x_t, alpha_bar, label=None):
    """The VP noise estimate that is the same thing as the denoiser D."""
    x, sigma = x_t / bcast(alpha_bar, x_t).sqrt(), (1 / alpha_bar - 1).sqrt()
    return (x - D(x, sigma, label)) / bcast(sigma, x_t)


def denoiser_from_eps(eps, x_t, sigma, label=None):
    """The denoised estimate of x_t = x + sigma eps by a VP noise estimator eps(x_t, alpha_bar, label)."""
    alpha_bar = 1 / (1 + sigma**2)
    return x_t - bcast(sigma, x_t) * eps(bcast(alpha_bar, x_t).sqrt() * x_t, alpha_bar, label)


def velocity_from_denoiser(D, x_t, t, label=None):
    """The rectified-flow velocity at x_t = (1 - t) x + t eps, 0 < t < 1, that is the same thing as the denoiser D."""
    return (x_t - D(x_t / bcast(1 - t, x_t), t / (1 - t), label)) / bcast(t, x_t)


def denoiser_from_velocity(v, x_t, sigma, label=None):
    """The denoised estimate of x_t = x + sigma eps by a velocity v(x_t, t, label)."""
    t, x = sigma / (1 + sigma), x_t / bcast(1 + sigma, x_t)
    return x - bcast(t, x) * v(x, t, label)


def trigflow_from_denoiser(D, x_t, t, label=None, sigma_data=0.5):
    """TrigFlow's F at x_t = cos t x + sin t sigma_data eps, 0 < t < pi/2, that is the same thing as the denoiser D."""
    cos, sin = bcast(t.cos(), x_t), bcast(t.sin(), x_t)
    return (cos * x_t - D(x_t / cos, sigma_data * t.tan(), label)) / (sigma_data * sin)


def denoiser_from_trigflow(F_trig, x_t, sigma, label=None, sigma_data=0.5):
    """The denoised estimate of x_t = x + sigma eps by a TrigFlow network F_trig(x_t, t, label)."""
    t = torch.arctan(sigma / sigma_data)
    cos, sin = bcast(t.cos(), x_t), bcast(t.sin(), x_t)
    return cos**2 * x_t - sigma_data * sin * F_trig(cos * x_t, t, label)


# ---- 4. networks -----------------------------------------------------------------------------------------------------
# A network maps (x, c_noise (B,), label) to x's shape in two halves: encode() -> (features, rest), decode(features, rest).
# The last feature is what a discriminator's head reads, so one pass serves a denoiser and a discriminator at once.


class Denoiser(nn.Module):
    """
    A network with EDM's preconditioning (EDM, Table 1): D = c_skip x + c_out F(c_in x, ln(sigma) / 4, label).
    Inside it may run in bf16; in and out are float32. `spec` and shape say how to build it again.
    """

    def __init__(self, net, sigma_data=0.5, dtype="fp32"):
        super().__init__()
        self.net, self.sigma_data, self.dtype = net, sigma_data, dtype
        self.shape, self.label_dim = net.shape, net.label_dim

    def forward(self, x_t, sigma, label=None, features=""):
        """x_t (B, ...), sigma (B,) -> x. features="also": (x, features), "only": features, the net's second half unused."""
        if self.label_dim and label is None:
            label = x_t.new_zeros(len(x_t), self.label_dim)                     # EDM: no label is a row of zeros
        x_t, s = x_t.float(), bcast(sigma.float(), x_t)
        total = s**2 + self.sigma_data**2
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.dtype == "bf16"):
            h, rest = self.net.encode(x_t * total.rsqrt(), sigma.float().log() / 4, label if self.label_dim else None)
            if features == "only":
                return h[-1].float()
            out = self.net.decode(h, rest)
        x = self.sigma_data**2 / total * x_t + s * self.sigma_data * total.rsqrt() * out.float()
        return (x, h[-1].float()) if features else x


class MLP(nn.Module):
    """
    Denoiser network for toys. ReLU on purpose: one step has to tear one Gaussian into separate modes, and piecewise
    linear maps have the sharp edges for it (ring, share of samples within 3 std of a mode: ReLU 0.94, SiLU 0.80).
    """

    def __init__(self, dim=2, label_dim=0, width=128, depth=4):
        super().__init__()
        self.spec, self.shape, self.label_dim = dict(dim=dim, label_dim=label_dim, width=width, depth=depth), (dim,), label_dim
        self.layers = nn.ModuleList(nn.Linear(dim + 16 + label_dim if i == 0 else width, width) for i in range(depth))
        self.out = nn.Linear(width, dim)

    def encode(self, x, c_noise, label):
        angle = c_noise[:, None] * torch.arange(0.5, 4.5, 0.5, device=x.device)                                  # (B, 8)
        h = torch.cat([x, angle.sin(), angle.cos()] + ([] if label is None else [label]), 1)
        for layer in self.layers:
            h = layer(h).relu()
        return [h], None

    def decode(self, features, rest):
        return self.out(features[-1])

    def feature_shape(self):
        return (self.out.in_features,)


def _norm(c, eps):
    """Group norm over EDM's number of groups, min(32, c / 4), or the next smaller one that divides c."""
    return nn.GroupNorm(next(g for g in range(max(min(32, c // 4), 1), 0, -1) if c % g == 0), c, eps)


class Block(nn.Module):
    """Residual block of the UNet: norm, SiLU, (resample,) conv, embedding, norm, SiLU, conv, skip, attention."""

    def __init__(self, c_in, c_out, c_emb, adm, dropout, resample="", attention=False):
        super().__init__()
        eps = 1e-5 if adm else 1e-6
        self.adm, self.dropout, self.resample = adm, dropout, resample
        self.scale = 1 if adm else 0.5**0.5                         # DDPM++ keeps the variance of the sum at one
        most = c_out // 64 if adm else 1                            # ADM: 64 channels a head, or the next that fits
        self.heads = next(h for h in range(max(most, 1), 0, -1) if c_out % h == 0) if attention else 0
        self.norm0, self.conv0 = _norm(c_in, eps), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.affine = nn.Linear(c_emb, c_out * (2 if adm else 1))
        self.norm1, self.conv1 = _norm(c_out, eps), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out or (resample and not adm) else nn.Identity()
        if attention:
            self.norm2 = _norm(c_out, eps)
            self.qkv, self.proj = nn.Conv2d(c_out, 3 * c_out, 1), nn.Conv2d(c_out, c_out, 1)

    def resize(self, x):            # EDM's [1, 1] filter is exactly nearest neighbour up and 2x2 mean down
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return F.avg_pool2d(x, 2) if self.resample == "down" else x

    def forward(self, x, emb):                                                                          # (B, C, H, W)
        h = self.conv0(self.resize(F.silu(self.norm0(x))))
        e = self.affine(emb)[:, :, None, None]
        if self.adm:                                                # scale and shift after the norm
            scale, shift = e.chunk(2, 1)
            h = F.silu(self.norm1(h) * (1 + scale) + shift)
        else:
            h = F.silu(self.norm1(h + e))
        if self.dropout and self.training:      # of its own shape and type: one random state is one mask, whatever h's layout and precision
            h = h * F.dropout(torch.ones(h.shape, device=h.device), self.dropout).to(h.dtype)
        h = self.conv1(h)
        x = (self.skip(self.resize(x)) + h) * self.scale
        if self.heads:
            b, c, height, w = x.shape       # EDM's layout: q, k, v are the fastest of the 3C channels
            q, k, v = self.qkv(self.norm2(x)).reshape(b, self.heads, c // self.heads, 3, height * w).unbind(3)
            a = F.scaled_dot_product_attention(q.transpose(2, 3), k.transpose(2, 3), v.transpose(2, 3))
            x = (self.proj(a.transpose(2, 3).reshape(b, c, height, w)) + x) * self.scale
        return x


class UNet(nn.Module):
    """
    EDM's two image networks in one class, with EDM's parameter names: DDPM++ (adm=False, CIFAR-10: 55,733,891
    parameters) and ADM (adm=True, ImageNet-64: 295,899,267). width channels times mult[i] at resolution / 2^i.
    """

    def __init__(self, resolution=32, channels=3, label_dim=0, width=128, mult=(2, 2, 2), blocks=4, attention=(16,),
                 augment_dim=0, dropout=0.0, adm=False):
        super().__init__()
        if resolution % 2 ** (len(mult) - 1):
            raise UserError(f"resolution {resolution} cannot be halved {len(mult) - 1} times, as multipliers {mult} want")
        self.spec = dict(resolution=resolution, channels=channels, label_dim=label_dim, width=width, mult=tuple(mult),
                         blocks=blocks, attention=tuple(attention), augment_dim=augment_dim, dropout=dropout, adm=adm)
        self.shape, self.label_dim, self.width, self.adm = (channels, resolution, resolution), label_dim, width, adm
        self.recompute = False
        c_emb = 4 * width
        self.map_layer0, self.map_layer1 = nn.Linear(width, c_emb), nn.Linear(c_emb, c_emb)
        if label_dim:
            self.map_label = nn.Linear(label_dim, c_emb if adm else width, bias=not adm)
        if augment_dim:             # EDM's augmentation labels; zero when distilling, so it is only carried along
            self.map_augment = nn.Linear(augment_dim, width, bias=False)
        block = lambda c_in, c_out, **kw: Block(c_in, c_out, c_emb, adm, dropout, **kw)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        c, skips = channels, []
        for level, m in enumerate(mult):
            r = f"{resolution >> level}x{resolution >> level}"
            if level == 0:
                self.enc[f"{r}_conv"], c = nn.Conv2d(channels, width, 3, padding=1), width
            else:
                self.enc[f"{r}_down"] = block(c, c, resample="down")
            skips.append(c)
            for i in range(blocks):
                self.enc[f"{r}_block{i}"] = block(c, width * m, attention=resolution >> level in attention)
                c = width * m
                skips.append(c)
        for level, m in reversed(list(enumerate(mult))):
            r = f"{resolution >> level}x{resolution >> level}"
            if level == len(mult) - 1:
                self.dec[f"{r}_in0"], self.dec[f"{r}_in1"] = block(c, c, attention=True), block(c, c)
            else:
                self.dec[f"{r}_up"] = block(c, c, resample="up")
            for i in range(blocks + 1):
                attend = resolution >> level in attention and (adm or i == blocks)
                self.dec[f"{r}_block{i}"], c = block(c + skips.pop(), width * m, attention=attend), width * m
        norm, conv = _norm(c, 1e-5 if adm else 1e-6), nn.Conv2d(c, channels, 3, padding=1)
        if adm:
            self.out_norm, self.out_conv = norm, conv
        else:
            self.dec[f"{r}_aux_norm"], self.dec[f"{r}_aux_conv"] = norm, conv
        self._initialise(conv)

    @classmethod
    def ddpmpp(cls, resolution=32, label_dim=0, **kw):
        """EDM's CIFAR-10 network; keywords (width, mult, blocks, attention ...) make it any size."""
        return cls(**dict(dict(resolution=resolution, label_dim=label_dim, augment_dim=9), **kw))

    @classmethod
    def adm(cls, resolution=64, label_dim=1000, **kw):
        """EDM's ImageNet-64 network."""
        return cls(**dict(dict(resolution=resolution, label_dim=label_dim, width=192, mult=(1, 2, 3, 4), blocks=3,
                               attention=(32, 16, 8), adm=True), **kw))

    def _initialise(self, last):
        zero = [last] + [m for b in self.modules() if isinstance(b, Block) for m in (b.conv1, getattr(b, "proj", None)) if m]
        if self.adm:                # PyTorch's own initialisation, but every residual branch starts at zero
            for m in zero:
                nn.init.zeros_(m.weight), nn.init.zeros_(m.bias)
            if self.label_dim:
                nn.init.normal_(self.map_label.weight)
            return
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(m.weight, 1e-5 if any(m is z for z in zero) else 1)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
            if isinstance(m, Block) and m.heads:
                nn.init.xavier_uniform_(m.qkv.weight, 0.2**0.5)

    def encode(self, x, c_noise, label):
        half = self.width // 2
        power = torch.arange(half, device=x.device) / (half if self.adm else half - 1)
        angle = c_noise[:, None] * 10000.0 ** -power                                                         # (B, half)
        emb = torch.cat([angle.cos(), angle.sin()] if self.adm else [angle.sin(), angle.cos()], 1)
        if self.adm:
            emb = self.map_layer1(F.silu(self.map_layer0(emb)))
            emb = F.silu(emb if label is None else emb + self.map_label(label))
        else:
            emb = emb if label is None else emb + self.map_label(label * self.label_dim**0.5)
            emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))
        features = []
        for module in self.enc.values():
            x = self._block(module, x, emb) if isinstance(module, Block) else module(x)
            features.append(x)
        return features, emb

    def _block(self, block, x, emb, skip=None):
        f = lambda x, emb, skip: block(x if skip is None else torch.cat([x, skip], 1), emb)
        if self.recompute and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(f, x, emb, skip, use_reentrant=False)
        return f(x, emb, skip)

    def decode(self, features, emb):
        x, skips = features[-1], list(features)
        for name, module in self.dec.items():
            if isinstance(module, Block):
                x = self._block(module, x, emb, skips.pop() if "_block" in name else None)
        norm, conv = (self.out_norm, self.out_conv) if self.adm else list(self.dec.values())[-2:]
        return conv(F.silu(norm(x)))

    def feature_shape(self):
        r = self.shape[1] >> len(self.spec["mult"]) - 1
        return (self.width * self.spec["mult"][-1], r, r)


def generate(G, z, label=None):
    """One step: unit noise z (B, ...) to samples x of the same shape, G read at its noise level sigma_init."""
    return G(G.sigma_init * z, z.new_full((len(z),), G.sigma_init), label)


class EMA:
    """Exponential average of a network's weights, `ema.model`; a short warm-up lets early steps count less."""

    def __init__(self, model, decay):
        self.model, self.decay, self.count = copy.deepcopy(model).eval().requires_grad_(False), decay, 0

    @torch.no_grad()
    def update(self, model):
        self.count += 1
        decay = min(self.decay, self.count / (self.count + 9))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)

    def state_dict(self):
        return dict(model=self.model.state_dict(), count=self.count)

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        self.count = state["count"]


def lr_factor(progress, warmup=0.0, decay=0.5):
    """Learning-rate factor at progress in [0, 1]: linear up over `warmup`, one, linear down to 0 over the last `decay`."""
    return min(1.0, (progress + 1e-9) / warmup if warmup else 1.0, (1 - progress) / decay if decay else 1.0)


def micro_batches(size, *tensors):
    """Tuples of the tensors (B, ...) cut into parts of `size`; a None stays None."""
    return zip(*(t.split(size) if t is not None else [None] * -(-len(tensors[0]) // size) for t in tensors))


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


# ---- 5. teachers and sampling ----------------------------------------------------------------------------------------


@torch.no_grad()
def heun_sample(denoiser, z, label=None, steps=18, sigma_min=0.002, sigma_max=80.0, churn=0.0, s_min=0.05, s_max=50.0, s_noise=1.003):
    """
    EDM's second-order sampler (EDM, Algorithm 2): unit noise z (B, ...) to samples of z's shape and dtype by
    2 * steps - 1 network calls. churn > 0 adds fresh noise between s_min and s_max; the state is kept in float64.
    """
    call = lambda x, s: denoiser(x.to(z.dtype), s.to(z.dtype).repeat(len(z)), label).double()
    sigmas = karras_sigmas(steps, sigma_min, sigma_max, z.device)
    x = z.double() * sigmas[0]
    for s, s_next in zip(sigmas[:-1], sigmas[1:]):
        if churn and s_min <= s <= s_max:
            s_hat = s * (1 + min(churn / steps, 2**0.5 - 1))
            x, s = x + (s_hat**2 - s**2).sqrt() * s_noise * torch.randn_like(z).double(), s_hat
        slope = (x - call(x, s)) / s                                                    # dx/dsigma (EDM, Eq. 3)
        x_next = x + (s_next - s) * slope
        if s_next > 0:
            x_next = x + (s_next - s) * (slope + (x_next - call(x_next, s_next)) / s_next) / 2
        x = x_next
    return x.to(z.dtype)


def in_batches(draw, n, label=None, size=500):
    """Samples (n, ...) from draw(k, label) -> (k, ...), at most `size` at a time."""
    parts = [draw(min(size, n - i), None if label is None else label[i:i + size]) for i in range(0, n, size)]
    return torch.cat(parts)


def build(cfg, shape, label_dim, sigma_data):
    """A fresh Denoiser as --net and --width ask for, for samples of `shape`."""
    kind = cfg.net or {1: "mlp", 3: "small"}[len(shape)]
    kw = dict(width=cfg.width) if cfg.width else {}
    if kind == "mlp":
        net = MLP(shape[0], label_dim, **kw)
    elif kind == "small":           # under a million parameters: CIFAR-10 on a CPU
        net = UNet(shape[1], shape[0], label_dim, **dict(dict(width=16, mult=(1, 2, 4), blocks=1, attention=(shape[1] // 4,)), **kw))
    else:
        net = (UNet.ddpmpp if kind == "ddpmpp" else UNet.adm)(shape[1], label_dim, channels=shape[0], **kw)
    return place(Denoiser(net, sigma_data, cfg.dtype), cfg)


def place(denoiser, cfg):
    """Move a denoiser to --device, with the memory layout and compilation that --device and --compile ask for."""
    denoiser.to(pick_device(cfg), memory_format=torch.channels_last if len(denoiser.shape) == 3 else torch.preserve_format)
    denoiser.net.recompute = cfg.recompute
    if cfg.compile:
        denoiser.compile()
    return denoiser


def pack_denoiser(denoiser, cfg):
    """What ema.pt holds: plain tensors, numbers and strings, so that it loads with weights_only=True."""
    return dict(onestep=1, kind=type(denoiser.net).__name__, spec=denoiser.net.spec, sigma_data=denoiser.sigma_data,
                sigma_init=getattr(denoiser, "sigma_init", None), model=denoiser.net.state_dict(), config=dataclasses.asdict(cfg))


def load_denoiser(path, cfg):
    """The Denoiser of an ema.pt at `path` (or in the run folder `path`), or of EDM's .pkl. Raises UserError for anything else."""
    if str(path).endswith(".pkl"):
        return load_edm(path, cfg)
    path = Path(path) / "ema.pt" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give an ema.pt or the folder of a run that has one")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        net = {"MLP": MLP, "UNet": UNet}[saved["kind"]](**saved["spec"])
        net.load_state_dict(saved["model"])
        denoiser = Denoiser(net, saved["sigma_data"], cfg.dtype)
        denoiser.sigma_init, denoiser.steps = saved["sigma_init"], saved["config"].get("steps_student", 1)
        denoiser.config = saved["config"]
    except Exception as e:          # whatever torch.load meets in a foreign or damaged file
        raise UserError(f"{path} is no checkpoint of onestep or is damaged ({type(e).__name__}); give the ema.pt of a run")
    return place(denoiser.eval(), cfg)


class _Record:
    """What a pickle wants imported, called or built: kept as a name, arguments and state, never done."""

    def __init__(self, name, args=None):
        self.name, self.args, self.state = name, args, {}


def read_pickle(f, most=1_000_000):
    """
    The next pickle of a binary file as plain data. An interpreter of its own that knows no imports, calls or attributes:
    whatever would be one becomes a _Record. Only names that a PyTorch model needs are allowed, keys are strings (others are
    left out, so that nothing hostile is hashed), sets are lists, and nothing is printed or compared: a short file can describe a
    tuple of 2^200 parts. Raises some Exception for anything else.
    """
    stack, marks, memo = [], [], {}
    new = dict(NONE=lambda: None, NEWTRUE=lambda: True, NEWFALSE=lambda: False, EMPTY_TUPLE=tuple, EMPTY_LIST=list, EMPTY_SET=list, EMPTY_DICT=dict)

    def take(start):
        part, stack[start:] = stack[start:], []
        return part

    for count, (op, arg, _) in enumerate(pickletools.genops(f)):
        op = op.name
        if op == "STOP":
            return stack.pop()
        elif count > most:
            raise ValueError("it has too many parts")
        elif op.startswith(("BININT", "BINFLOAT", "BINBYTES", "BINUNICODE", "BINSTRING", "SHORT_BIN", "BYTEARRAY8")) or op in ("LONG1", "LONG4"):
            stack.append(arg)
        elif op in new:
            stack.append(new[op]())
        elif op == "MARK":
            marks.append(len(stack))
        elif op in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(take(marks.pop() if op == "TUPLE" else -int(op[-1]))))
        elif op in ("APPEND", "APPENDS", "ADDITEMS"):
            items = take(-1 if op == "APPEND" else marks.pop())
            stack[-1].extend(items)
        elif op in ("SETITEM", "SETITEMS"):
            items = take(-2 if op == "SETITEM" else marks.pop())
            stack[-1].update((k, v) for k, v in zip(items[::2], items[1::2]) if isinstance(k, str))
        elif op in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if arg is None else arg] = stack[-1]
        elif op in ("BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif op in ("GLOBAL", "STACK_GLOBAL"):
            name = ".".join(arg.split(" ", 1) if op == "GLOBAL" else take(-2))         # join takes strings only
            if not re.fullmatch(r"(torch|torch_utils|dnnlib|numpy)(\.\w+)+|collections\.OrderedDict|(builtins|__builtin__)\.set", name):
                raise ValueError(f"it asks for {name[:80]!r}, which no EDM network needs; nothing of it was run")
            stack.append(_Record(name))
        elif op in ("REDUCE", "NEWOBJ"):
            args, what = stack.pop(), stack.pop()
            stack.append({} if what.name.endswith(("OrderedDict", "EasyDict")) else _Record(what.name, args))
        elif op == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], _Record):
                stack[-1].state = state
        elif op == "POP":
            take(-1)
        elif op == "BINPERSID":
            stack.append(_Record("persistent id", stack.pop()))
        elif op not in ("PROTO", "FRAME"):
            raise ValueError(f"it uses the pickle instruction {op}, which no EDM network needs")


def _edm_weights(module, prefix, seen):
    """(name, record of a tensor) of all parameters and buffers of a module that read_pickle gave."""
    if id(module) in seen:
        raise ValueError("its modules contain one another")
    seen.add(id(module))
    state = module.args[0]["state"] if module.args else module.state            # of a class of EDM's, of PyTorch's
    for name, t in [*state["_parameters"].items(), *state["_buffers"].items()]:
        if t is not None:
            yield prefix + name, t.args[0] if t.name == "torch._utils._rebuild_parameter" else t
    for name, child in state["_modules"].items():
        if child is not None:
            yield from _edm_weights(child, f"{prefix}{name}.", seen)


def _edm_tensor(record, left):
    """float32 tensor of torch's record (storage, offset, size, stride); left[0] is how many bytes the file can still hold."""
    storage, offset, size, stride = record.args[:4]
    raw = storage.args[0]
    left[0] -= len(raw)
    f = io.BytesIO(raw)                             # magic number, version, machine, storage, keys, then count and bytes
    persistent = [read_pickle(f, most=1000) for _ in range(5)][3]
    dtype = dict(FloatStorage="<f4", HalfStorage="<f2", DoubleStorage="<f8")[persistent.args[1].name.split(".")[-1]]
    count = int.from_bytes(f.read(8), "little")
    flat = torch.from_numpy(np.frombuffer(raw, dtype, count, f.tell()).astype(np.float32))
    if left[0] < 0 or math.prod(size) > len(flat):
        raise ValueError("its weights claim more bytes than it has")
    return flat.as_strided(size, stride, offset).contiguous()


def _unet_spec(sizes):
    """What UNet must be called with to have weights of these names and sizes."""
    first = next(k for k in sizes if re.fullmatch(r"enc\.(\d+)x\1_conv\.weight", k))
    levels = sorted({int(m[1]) for k in sizes if (m := re.match(r"enc\.(\d+)x", k))}, reverse=True)
    block = lambda r, i, layer: f"enc.{r}x{r}_block{i}.{layer}.weight"
    classes = lambda layer: sizes.get(f"{layer}.weight", (0, 0))[1]
    width, channels = sizes[first][:2]
    return dict(resolution=levels[0], channels=channels, width=width, label_dim=classes("map_label"), augment_dim=classes("map_augment"),
                mult=[sizes[block(r, 0, "conv0")][0] // width for r in levels], attention=[r for r in levels if block(r, 0, "qkv") in sizes],
                blocks=next(i for i in range(len(sizes)) if block(levels[0], i, "conv0") not in sizes), adm="out_norm.weight" in sizes)


def load_edm(path, cfg=None):
    """
    The Denoiser of an official EDM checkpoint (.pkl). The file is read as data: nothing in it is imported or called, EDM's
    source is not needed, and the network's dimensions follow from names and sizes of its weights. Without EDM's dropout, which
    the losses here do not expect; EDM's augmentation label counts as zero. Raises UserError for any other file.
    """
    path, cfg = Path(path), cfg or Shared()
    if not path.is_file():
        raise UserError(f"{path}: no such file; README says where to get EDM's checkpoints")
    try:
        with open(path, "rb") as f:
            start = f.read(64).lstrip()
            for mark, what in ((b"version https://git-lfs", "it is a git-lfs pointer; fetch the file itself"), (b"<", "it is a web page"),
                               (b"PK\3\4", "it is a zip archive")):
                if start.startswith(mark):
                    raise ValueError(what)
            f.seek(0)
            root = read_pickle(f)
        meta = root["ema"].args[0]
        if meta["class_name"] != "EDMPrecond":
            raise ValueError(f"its network is a {meta['class_name'].strip()[:40]!r}, not EDM's own preconditioning (EDMPrecond)")
        tensors = {k.removeprefix("model."): t for k, t in _edm_weights(root["ema"], "", set())}
        sizes = {k: tuple(t.args[2]) for k, t in tensors.items()}
        if not all(type(n) is int and 0 < n < 2**31 for size in sizes.values() for n in size):
            raise ValueError("its weights have impossible sizes")
        filters = {k for k in sizes if k.endswith("resample_filter") and sizes[k] == (1, 1, 2, 2)}     # [1, 1]: the only one UNet knows
        sizes = {k: size for k, size in sizes.items() if k not in filters}
        spec = _unet_spec(sizes)
        with torch.device("meta"):
            net = UNet(**spec) if min(spec["mult"]) > 0 else None
        if net is None or {k: tuple(v.shape) for k, v in net.state_dict().items()} != sizes:
            raise ValueError("its network is neither DDPM++ nor ADM (the -vp and -adm files are)")
        left = [path.stat().st_size]
        net.load_state_dict({k: _edm_tensor(tensors[k], left) for k in sizes}, assign=True)
        denoiser = Denoiser(net, float(meta["state"]["sigma_data"]), cfg.dtype)
        if not 0 < denoiser.sigma_data < math.inf:
            raise ValueError(f"its sigma_data is {denoiser.sigma_data}")
    except Exception as e:          # whatever damaged or hostile bytes lead to
        known = isinstance(e, (ValueError, OSError)) and str(e).strip()
        why = str(e).strip().splitlines()[0][:150] if known else f"it is damaged or holds something else ({type(e).__name__})"
        raise UserError(f"{path} is no EDM checkpoint: {why}; README says where to get them") from None
    denoiser.sigma_init, denoiser.steps = None, 1
    return place(denoiser.eval(), cfg)


def load_teacher(cfg, data=None):
    """
    The frozen denoiser to distil: --teacher names a saved one, 'exact' is the toy's closed form, nothing fits one first
    and keeps it in runs/teacher-*. `data` saves loading the data set again. Raises UserError if it does not fit --data.
    """
    if cfg.teacher == "exact":
        return (data or load_data(cfg)).requires_grad_(False)
    if not cfg.teacher:
        return fit_teacher(cfg, data or load_data(cfg)).requires_grad_(False)
    teacher = load_denoiser(cfg.teacher, cfg)
    shape, classes = (TOYS[cfg.data].shape, TOYS[cfg.data].label_dim) if cfg.data in TOYS else IMAGES[cfg.data]
    if teacher.shape != shape:
        raise UserError(f"--teacher {cfg.teacher} makes samples of shape {teacher.shape}, --data {cfg.data} has {shape}")
    if teacher.label_dim != classes * cfg.cond:
        need = "add --cond" if not cfg.cond and teacher.label_dim == classes else "choose a teacher of the same classes"
        raise UserError(f"--teacher {cfg.teacher} takes {teacher.label_dim} classes, this run {classes * cfg.cond}; {need}")
    return teacher.requires_grad_(False)


def initial_student(cfg, teacher, data):
    """A trainable copy of the teacher; of the fitted MLP where the teacher is the closed form. Starts at --sigma_init."""
    source = teacher if isinstance(teacher, Denoiser) else fit_teacher(cfg, data)
    G = place(copy.deepcopy(source).train().requires_grad_(True), cfg)
    G.sigma_init = cfg.sigma_init
    return G


def fit_teacher(cfg, data):
    """
    Fit a denoiser to the data and keep it in runs/teacher-<data>-<key>: toys regress the closed form, images take EDM's
    denoising loss. A later call with the same settings and data loads it; an interrupted fit goes on where it stopped.
    """
    toy = cfg.data in TOYS
    same = dict(data=cfg.data, net=cfg.net, width=cfg.width, cond=cfg.cond, dtype=cfg.dtype, steps=cfg.teacher_steps, budget=cfg.budget)
    same |= dict(lr=2e-3, sigma_min=cfg.sigma_min, sigma_max=cfg.sigma_max) if toy else \
        dict(lr=1e-3, ema=0.999, batch=512) if cfg.net in ("ddpmpp", "adm") else dict(lr=2e-3, ema=0.999, batch=32)
    content = 0 if toy else data.crc
    key = hashlib.sha256(json.dumps([same, content]).encode()).hexdigest()[:8]
    fit = Shared(**same, out=f"runs/teacher-{cfg.data}-{key}", resume=True, device=cfg.device, compile=cfg.compile)
    fit.micro = math.gcd(fit.batch // processes(), cfg.micro)
    if any_process((Path(fit.out) / "metrics.json").exists()):
        return load_denoiser(fit.out, cfg)
    if fit.batch % processes():
        raise UserError(f"the teacher's batch of {fit.batch} does not divide into {processes()} processes; fit it with one process first")
    with torch.random.fork_rng([pick_device(cfg)] if pick_device(cfg).type == "cuda" else []):    # the caller's draws stay the same
        run = Run(fit, "teacher")
        net = build(fit, data.shape, data.label_dim, data.sigma_data)
        ema, opt = EMA(net, fit.ema), torch.optim.Adam(net.parameters(), fit.lr, fused=True)
        for _ in run.steps(dict(net=net, ema=ema, opt=opt)):
            set_lr(opt, fit.lr * lr_factor(run.progress, warmup=0.05, decay=0.7))
            x, label = data.sample(fit.batch)
            sigma = karras(torch.rand(len(x), device=x.device), fit.sigma_min, fit.sigma_max) if toy else \
                lognormal_sigma(len(x), device=x.device)
            for x, label, sigma, eps in run.parts(x, label, sigma, torch.randn_like(x)):
                x_t = x + bcast(sigma, x) * eps
                target = data.denoise(x_t, sigma, label) if toy else x          # a toy knows the best answer, images only x
                loss = denoising_loss(net(x_t, sigma, label), target, sigma, data.sigma_data).mean()
                (loss * run.micro / fit.batch).backward()
            run.add_gradients(opt)
            opt.step()
            opt.zero_grad()
            ema.update(net)
            run.log(loss=loss)
        run.finish({})
        any_process(False)                                  # its files are there
    return load_denoiser(fit.out, cfg)


# ---- 6. divergences and the weighting op -----------------------------------------------------------------------------
# f and h(r) = r^2 f''(r) of D_f(p || q) = E_q[f(r)], r = p / q with p the teacher's density and q the student's
# (f-distill, arXiv 2502.15681, Table 1; Hellinger without its factor 1/4 would do as well, h is normalised later).

Divergence = namedtuple("Divergence", "f h")
F_DIVERGENCES = {
    "rkl": Divergence(lambda r: -r.log(), lambda r: torch.ones_like(r)),
    "fkl": Divergence(lambda r: r * r.log(), lambda r: r),
    "js": Divergence(lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(), lambda r: r / (r + 1)),
    "srkl": Divergence(lambda r: (r + 1) * (0.5 + 0.5 / r).log(), lambda r: 1 / (r + 1)),
    "hellinger": Divergence(lambda r: 1 - r.sqrt(), lambda r: r.sqrt() / 4),
    "jeffreys": Divergence(lambda r: (r - 1) * r.log(), lambda r: r + 1),
    "neyman": Divergence(lambda r: (1 - r) ** 2 / r, lambda r: 2 / r),
}
LOG_RATIO_MAX = 10.0                                # log ratios are clamped to +-10 before exp


def weighted_score_gradient(x, d_real, d_fake, log_ratio, divergence):
    """
    The student's gradient in its own samples, and a per-sample loss that has it.

    x, d_real, d_fake (B, ...) in fp32, bf16 or fp16: samples, the teacher's and the fake score's denoised estimates of
    their noised versions; log_ratio (B,) = log p_teacher / q_student; divergence a name of F_DIVERGENCES. With
    n_b = mean|x - d_real| (DMD, arXiv 2311.18828, Eq. 8) and h_b = h(exp(clamp(log_ratio, +-10))):

        g    = h_b (d_fake - d_real) / n_b     (B, ...) of x's dtype; elements that are not finite become 0
        loss = mean(g^2) / 2 per sample        (B,) float32, with d loss_b / d x_b = g_b / (elements of a sample)

    since s_fake - s_real = (d_fake - d_real) / sigma^2. Only x gets a gradient, and only through loss. Sums are taken
    in float32. Raises UserError for unknown divergences and shapes that differ.
    """
    if divergence not in F_DIVERGENCES:
        raise UserError(f"unknown divergence {divergence!r}: choose one of {', '.join(F_DIVERGENCES)}")
    if not x.shape == d_real.shape == d_fake.shape or log_ratio.shape != x.shape[:1]:
        raise UserError(f"x {tuple(x.shape)}, d_real {tuple(d_real.shape)}, d_fake {tuple(d_fake.shape)} must agree and "
                        f"log_ratio {tuple(log_ratio.shape)} be ({len(x)},)")
    return _weighting_op(x, d_real.detach(), d_fake.detach(), log_ratio.detach(), divergence)


@torch.library.custom_op("onestep::weighted_score_gradient", mutates_args=())
def _weighting_op(x: torch.Tensor, d_real: torch.Tensor, d_fake: torch.Tensor, log_ratio: torch.Tensor,
                  divergence: str) -> tuple[torch.Tensor, torch.Tensor]:
    fused = weighting_cuda(x, d_real, d_fake, log_ratio, divergence) if x.is_cuda else None
    return fused or weighting_reference(x, d_real, d_fake, log_ratio, divergence)


def weighting_reference(x, d_real, d_fake, log_ratio, divergence):
    """The op in plain PyTorch: what every other implementation must equal."""
    h = F_DIVERGENCES[divergence].h(log_ratio.float().clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX).exp())            # (B,)
    n = (x.float() - d_real.float()).abs().flatten(1).mean(1)                                                # (B,)
    g = bcast(h / n, x) * (d_fake.float() - d_real.float())
    g = g.to(x.dtype)
    g = torch.where(g.isfinite(), g, torch.zeros_like(g))       # the one place where non-finite values are dropped
    return torch.empty_like(x).copy_(g), g.float().square().flatten(1).mean(1) / 2


# The same as one CUDA kernel, which reads each input once and writes g once. Everything known before the launch is a constant
# of the source: SIZE elements of type T to a sample, in packs of VEC that fill one memory access; GROUP threads to a sample,
# THREADS to a block; H, the weight h as a function of r. A thread keeps its share of d_fake - d_real, KEEP packs, in
# registers between the sum that needs all of the sample and the product that needs the sum: so nothing is read twice.
# A toy's sample is one thread's work, an image a whole block's; one too large for the registers of a block is shared by SPLIT
# blocks, each of which waits for the others' sums. Elements may lie in any order, as long as all tensors share it.
# NOT YET RUN ON A GPU: its text was run on CPUs, thread by thread, against the reference (tests/test_op.py), and compiled by NVRTC.
WEIGHTING_CUDA = r"""
#if defined(BF16)                                   // the upper half of a float, rounded to nearest, ties to even
typedef unsigned short T;
__device__ float to_float(T v) { return __uint_as_float((unsigned)v << 16); }
__device__ T from_float(float v) { unsigned u = __float_as_uint(v); return (u + 0x7fff + (u >> 16 & 1)) >> 16; }
#elif defined(FP16)                                 // one instruction each way; a header would have to be found
typedef unsigned short T;
__device__ float to_float(T v) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v)); return f; }
__device__ T from_float(float v) { T h; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v)); return h; }
#else
typedef float T;
__device__ float to_float(T v) { return v; }
__device__ T from_float(float v) { return v; }
#endif
struct alignas(VEC * sizeof(T)) Pack { T e[VEC]; }; // up to 16 bytes: one access moves it
const int PACKS = SIZE / VEC, WARPS = THREADS / 32;

__device__ float group_sum(float v) {               // the sum over a sample's threads in this block, known to all of them
    for (int o = (GROUP < 32 ? GROUP : 32) / 2; o > 0; o /= 2) v += __shfl_xor_sync(0xffffffff, v, o);
    if (GROUP > 32) {                               // then over the warps, in shared memory
        __shared__ float warp_sums[WARPS];
        warp_sums[threadIdx.x / 32] = v;            // all 32 threads of a warp write the same value
        __syncthreads();
        v = 0;
        for (int w = 0; w < WARPS; w++) v += warp_sums[w];
        __syncthreads();                            // nobody writes again before all have read
    }
    return v;
}

__device__ float sum_over_blocks(float v, volatile float* sums, int part, int* arrived) {
    if (threadIdx.x == 0) {
        sums[part] = v;
        __threadfence();                            // the sum is out before the count says so
        atomicAdd(arrived, 1);
        while (atomicAdd(arrived, 0) < SPLIT) {}
        __threadfence();
    }
    __syncthreads();
    v = 0;
    for (int k = 0; k < SPLIT; k++) v += sums[k];   // in one order: all blocks get the same bits
    return v;
}

extern "C" __global__ void __launch_bounds__(THREADS) weighted_score_gradient(
        const Pack* x, const Pack* d_real, const Pack* d_fake, const float* log_ratio, Pack* g, float* loss,
        int samples, int* arrived, float* sums) {
    // 1. Which sample, which part of it. Blocks that wait for each other number themselves as they start: those before
    //    a waiting one are then running or done, so the wait ends (arrived[0] counts starts, the rest is per sample).
    __shared__ int ticket;
    if (threadIdx.x == 0) ticket = SPLIT > 1 ? atomicAdd(arrived, 1) : blockIdx.x;
    __syncthreads();
    const int block = ticket, part = block % SPLIT, lane = threadIdx.x % GROUP;
    const int sample = block / SPLIT * (THREADS / GROUP) + threadIdx.x / GROUP;
    const int first = part * KEEP * GROUP + lane, left = sample < samples ? PACKS - first : 0;
    const long long start = (long long)sample * PACKS + first;

    // 2. Read everything once; sum |x - d_real|, keep d_fake - d_real. Zeros stand in beyond the end.
    float diff[KEEP][VEC], sum = 0;
    #pragma unroll
    for (int k = 0; k < KEEP; k++) {
        Pack a = {}, r = {}, f = {};
        const long long i = start + k * GROUP;
        if (k * GROUP < left) a = x[i], r = d_real[i], f = d_fake[i];
        #pragma unroll
        for (int e = 0; e < VEC; e++) {
            sum += fabsf(to_float(a.e[e]) - to_float(r.e[e]));
            diff[k][e] = to_float(f.e[e]) - to_float(r.e[e]);
        }
    }
    sum = group_sum(sum);
    if (SPLIT > 1) sum = sum_over_blocks(sum, sums + (long long)sample * SPLIT, part, arrived + 1 + sample);

    // 3. The weight h(r) / n. The clamp is written so that NaN stays NaN, as in PyTorch.
    float log_r = sample < samples ? log_ratio[sample] : 0.f;
    log_r = log_r < -LOG_RATIO_MAX ? -LOG_RATIO_MAX : log_r > LOG_RATIO_MAX ? LOG_RATIO_MAX : log_r;
    const float r = expf(log_r), weight = (H(r)) / (sum / SIZE);

    // 4. Write g, rounded to T, zero where it is not finite (in T); the loss is half its mean square.
    float square = 0;
    #pragma unroll
    for (int k = 0; k < KEEP; k++) {
        Pack out;
        #pragma unroll
        for (int e = 0; e < VEC; e++) {
            float v = weight * diff[k][e];
            if (!isfinite(v) || !isfinite(to_float(from_float(v)))) v = 0;
            out.e[e] = from_float(v);
            square += to_float(out.e[e]) * to_float(out.e[e]);
        }
        if (k * GROUP < left) g[start + k * GROUP] = out;
    }
    square = group_sum(square);
    if (lane == 0 && sample < samples) loss[(long long)sample * SPLIT + part] = square / SIZE / 2;
}
"""
CUDA_DTYPES = {torch.float32: "FP32", torch.bfloat16: "BF16", torch.float16: "FP16"}
CUDA_H = dict(rkl="1.f", fkl="r", js="r / (r + 1)", srkl="1 / (r + 1)", hellinger="sqrtf(r) / 4", jeffreys="r + 1", neyman="2 / r")
_kernels = {}                                       # (device, constants) -> (libcuda, function), or None where it failed


def nvrtc(source, arch):
    """(machine code, compiler's log) of CUDA source for an arch like "sm_90", by the NVRTC that comes with PyTorch's CUDA build."""
    name = "libnvrtc.so." + (torch.version.cuda or "").split(".")[0]                # loaded already, or in one of pip's folders
    for name in [name, *map(str, Path(torch.__file__).parents[1].glob(f"nvidia/*/lib/{name}*")), "libnvrtc.so"]:
        try:
            lib = ctypes.CDLL(name)
            break
        except OSError:
            continue
    else:
        raise OSError("libnvrtc was not found")
    program, size, options = ctypes.c_void_p(), ctypes.c_size_t(), [f"--gpu-architecture={arch}".encode(), b"--ptxas-options=-v"]

    def fetch(what):
        getattr(lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        data = ctypes.create_string_buffer(size.value)
        getattr(lib, f"nvrtcGet{what}")(program, data)
        return data.raw
    lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"onestep.cu", 0, None, None)
    try:
        failed = lib.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        log = fetch("ProgramLog").rstrip(b"\0").decode(errors="replace")
        if failed:
            raise RuntimeError(f"NVRTC error {failed} for {arch}: {' '.join(log.split())[:300]}")
        return fetch("CUBIN"), log
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))


def weighting_constants(dtype, divergence, size, vec):
    """The kernel's constants for samples of `size` elements in packs of `vec`: at most 48 elements to a thread, 512 threads to a block."""
    group = min(512, 1 << max(-(-size // 16) - 1, 0).bit_length())         # power of two with about 16 elements to a thread
    split = -(-size // (512 * 48))
    return {CUDA_DTYPES[dtype]: 1, "SIZE": size, "VEC": vec, "GROUP": group, "THREADS": group if group > 32 else 128, "SPLIT": split,
            "KEEP": -(-size // (vec * group * split)), "LOG_RATIO_MAX": f"{LOG_RATIO_MAX}f", "H(r)": CUDA_H[divergence]}


def weighting_source(constants):
    return "".join(f"#define {k} {v}\n" for k, v in constants.items()) + WEIGHTING_CUDA


def weighting_cuda(x, d_real, d_fake, log_ratio, divergence):
    """
    The op as one kernel; None where PyTorch has to do it: mixed or other dtypes, samples too large for half the GPU, nothing
    to do, no compiler (one warning), or a first call inside a CUDA graph capture, where nothing can be loaded.
    """
    size, tensors = x[0].numel() if len(x) else 0, (x, d_real, d_fake)
    if not size or x.dtype not in CUDA_DTYPES or divergence not in CUDA_H or any(
            t.dtype != x.dtype or t.device != x.device for t in (d_real, d_fake)) or log_ratio.device != x.device:
        return None
    nhwc = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if nhwc else torch.contiguous_format
    out = torch.empty_like(x)
    g = out if out.is_contiguous(memory_format=layout) else torch.empty_like(x, memory_format=layout)
    tensors = [*(t.contiguous(memory_format=layout) for t in tensors), g]           # a copy only where layouts differ
    fits = lambda v: size % v == 0 and all(t.data_ptr() % (v * t.element_size()) == 0 for t in tensors)
    constants = weighting_constants(x.dtype, divergence, size, next(v for v in (8, 4, 2, 1) if v * x.element_size() <= 16 and fits(v)))
    group, threads, split = (constants[k] for k in ("GROUP", "THREADS", "SPLIT"))
    key, properties = (x.device, *constants.items()), torch.cuda.get_device_properties(x.device)
    with torch.cuda.device(x.device):
        if split > 1 and split > properties.multi_processor_count // 2 or key not in _kernels and torch.cuda.is_current_stream_capturing():
            return None
        if key not in _kernels:
            _kernels[key] = _load_kernel(weighting_source(constants), f"sm_{properties.major}{properties.minor}")
        if not _kernels[key]:
            return None
        (cuda, function), samples = _kernels[key], len(x)
        loss = x.new_empty(samples, split, dtype=torch.float32)
        arrived = x.new_zeros(samples + 1 if split > 1 else 0, dtype=torch.int32)
        log_ratio, sums, blocks = log_ratio.float().contiguous(), torch.empty_like(loss), -(-samples // (threads // group)) * split
        values = [ctypes.c_int(v) if v is samples else ctypes.c_void_p(v.data_ptr())
                  for v in (*tensors[:3], log_ratio, g, loss, samples, arrived, sums)]
        error = cuda.cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, 0, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
                                    (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values)), None)
    if error:
        _kernels[key] = _no_kernel(f"CUDA driver error {error} at its start")
        return None
    return out if g is out else out.copy_(g), loss[:, 0] if split == 1 else loss.sum(1)


def _load_kernel(source, arch):
    try:
        code, cuda = nvrtc(source, arch)[0], ctypes.CDLL("libcuda.so.1")
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        error = cuda.cuModuleLoadData(ctypes.byref(module), code) or \
            cuda.cuModuleGetFunction(ctypes.byref(function), module, b"weighted_score_gradient")
        return _no_kernel(f"CUDA driver error {error} when it was loaded") if error else (cuda, function)
    except (OSError, RuntimeError, AttributeError) as e:            # AttributeError: a library without these functions
        return _no_kernel(e)


def _no_kernel(why):
    warnings.warn(f"the weighting op runs in plain PyTorch, its CUDA kernel does not work here: {why}")


@_weighting_op.register_fake
def _(x, d_real, d_fake, log_ratio, divergence):
    return torch.empty_like(x), x.new_empty(len(x), dtype=torch.float32)


def _save_gradient(ctx, inputs, output):
    ctx.mark_non_differentiable(output[0])
    ctx.save_for_backward(output[0])


def _use_gradient(ctx, _, grad_loss):
    g, = ctx.saved_tensors
    per_element = grad_loss / max(g[0].numel() if len(g) else 1, 1)
    return (g * bcast(per_element, g)).to(g.dtype), None, None, None, None


_weighting_op.register_autograd(_use_gradient, setup_context=_save_gradient)


# ---- 7. metrics ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def energy_coefficient(x, y):
    """
    Szekely and Rizzo's H = (2 E|X-Y| - E|X-X'| - E|Y-Y'|) / (2 E|X-Y|) of samples x (n, D), y (m, D): 0 for equal laws,
    towards 1 for distant ones, free of scale. Without self-pairs, hence unbiased and sometimes slightly below 0.
    """
    total = lambda a, b: sum(torch.cdist(part, b).sum(1).double().sum() for part in a.split(250))       # parts fit a CPU's cache
    n, m = len(x), len(y)
    cross = 2 * total(x, y) / (n * m)
    return float((cross - total(x, x) / (n * (n - 1)) - total(y, y) / (m * (m - 1))) / cross)


@torch.no_grad()
def toy_metrics(x, mixture, n_density=4000):
    """
    How close samples x (n, 2) are to a GaussianMixture: H against n fresh samples; the share within 3 std of a mode
    beside that share of the data; the smallest and largest mode weight relative to the true one, each sample counted at its nearest
    mode; and the divergences rkl, fkl, js between the two densities blurred by std, from n_density held-out samples.
    """
    y = mixture.sample(len(x))[0]
    (near, k), (true_near, true_k) = torch.cdist(x, mixture.means).min(1), torch.cdist(y, mixture.means).min(1)
    share = torch.bincount(k, minlength=len(mixture.means)) / torch.bincount(true_k, minlength=len(mixture.means)).clamp(min=1)
    out = dict(H=energy_coefficient(x, y), in_3std=(near < 3 * mixture.std).float().mean().item(),
               in_3std_data=(true_near < 3 * mixture.std).float().mean().item(),
               mode_min=share.min().item(), mode_max=share.max().item())
    n = min(n_density, len(x) // 2)
    q, sigma = GaussianMixture(x[n:2 * n]), x.new_full((n,), mixture.std)
    at_q, at_p = x[:n] + mixture.std * torch.randn_like(x[:n]), y[:n] + mixture.std * torch.randn_like(y[:n])
    log_r = lambda a: mixture.log_prob(a, sigma) - q.log_prob(a, sigma)
    at_q, at_p = log_r(at_q), log_r(at_p)
    js = 2 * math.log(2) - F.softplus(-at_p).mean() - F.softplus(at_q).mean()           # E_p log 2p/(p+q) + E_q log 2q/(p+q)
    out.update(rkl=-at_q.mean().item(), fkl=at_p.mean().item(), js=js.item())
    return out


def to_uint8(x):
    """[-1, 1] to 0..255, rounded as the data was."""
    return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def feature_statistics(images, inception, size=None, desc="inception", device=None):
    """
    Mean (2048,) and covariance, float64, of Inception features of uint8 images (N, 3, H, W), `size` at a time, and the features
    of at most 10,000 of them, spread evenly.
    """
    device = device or images.device
    size = size or (250 if device.type == "cuda" else 20)                   # small parts are faster on a CPU
    total, outer, some, step = 0, 0, [], -(-len(images) // 10000)
    for i in tqdm(range(0, len(images), size), desc=desc, leave=False):
        f = inception(images[i:i + size].to(device), return_features=True)
        some.append(f[-i % step::step])
        total, outer = total + f.double().sum(0), outer + f.double().T @ f.double()
    mean = total / len(images)
    return mean, (outer - len(images) * mean[:, None] * mean) / (len(images) - 1), torch.cat(some)[:10000]


def frechet_distance(mean1, cov1, mean2, cov2):
    """Frechet distance of two Gaussians, |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), float64, by eigenvalues."""
    values, vectors = torch.linalg.eigh(cov1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T                 # tr (C1 C2)^(1/2) = tr (root C2 root)^(1/2)
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross)


def fid_name(n, what="fid"):
    """fid50k, fid1k, fid500: the sample count is part of the metric's name."""
    return f"{what}{n // 1000}k" if n % 1000 == 0 else f"{what}{n}"


def load_inception(path, device):
    """NVIDIA's TorchScript Inception network, net(images 0..255, return_features=True) -> (N, 2048); UserError for others."""
    if not Path(path).is_file():
        raise UserError(f"--fid {path}: no such file; README says where to get the Inception network")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)         # TorchScript is the format of this network
            inception = torch.jit.load(path, map_location=device).eval()
        inception(torch.zeros(1, 3, 32, 32, dtype=torch.uint8, device=device), return_features=True)
    except (RuntimeError, ValueError, OSError) as e:
        raise UserError(f"--fid {path} is not the Inception network ({str(e).strip().splitlines()[0]}); README says where to get it")
    return inception


@torch.no_grad()
def precision_recall(real, fake, k=3):
    """
    Precision, the share of features fake (m, D) within the k-th neighbour's distance of some real (n, D), and recall, the same
    with the two exchanged (Kynkaanniemi et al., arXiv 1904.06991, there with VGG's features).
    """
    radius = lambda a: torch.cat([torch.cdist(part, a).kthvalue(min(k + 1, len(a)), 1).values for part in a.split(500)])      # itself is the first
    share = lambda a, b, r: torch.cat([(torch.cdist(part, b) <= r).any(1) for part in a.split(500)]).float().mean().item()
    return share(fake, real, radius(real)), share(real, fake, radius(fake))


def fid_reference(cfg):
    """(mean, covariance) of EDM's reference file, where --fid_ref names one; None where it is a number of training images."""
    if re.fullmatch(r"\d*", str(cfg.fid_ref)):
        return None
    try:
        with open(cfg.fid_ref, "rb") as f, np.load(f) as z:
            mean, cov = (torch.from_numpy(np.asarray(z[k], np.float64)) for k in ("mu", "sigma"))
        if mean.shape != (2048,) or cov.shape != (2048, 2048):
            raise ValueError(f"mu has shape {tuple(mean.shape)}, sigma {tuple(cov.shape)}")
        return mean, cov
    except Exception as e:          # whatever numpy meets in a foreign file
        why = (str(e).splitlines() or [""])[0]
        raise UserError(f"--fid_ref {cfg.fid_ref} is neither a number of training images nor an .npz with EDM's mu and sigma ({why})")


def image_metrics(cfg, data, samplers):
    """
    FID of each {name: draw(n, label) -> images} over --samples images, precision and recall from up to 10,000 of the same
    features, each under a name that says it all: fid50k_train50k_1_step is 50,000 samples against 50,000 training images. The
    statistics of training images are kept in runs/.
    """
    device, given = pick_device(cfg), fid_reference(cfg)
    inception = load_inception(cfg.fid, device)
    n = 0 if given else int(cfg.fid_ref or 0)
    reference = data.images[:n or len(data.images)]
    if given:                                               # then training images serve precision and recall only
        reference = reference[::max(1, len(reference) // 10000)][:10000]
    key = zlib.crc32(f"{data.crc} {bool(given)} {len(reference)}".encode(), zlib.crc32(Path(cfg.fid).read_bytes()))
    cache = Path(f"runs/fidref-{cfg.data}-{len(reference)}-{key:08x}.pt")
    if not cache.exists():
        stats = feature_statistics(reference, inception, desc=f"reference, {len(reference):,} images", device=device)
        write_atomically(cache, lambda f: torch.save([t.cpu() for t in stats], f))
    *stats, real = (t.to(device) for t in torch.load(cache, weights_only=True))
    stats = [t.to(device) for t in given] if given else stats
    name = Path(cfg.fid_ref).stem if given else fid_name(len(reference), "train")
    out = dict(fid_ref=cfg.fid_ref if given else f"{cfg.data} training images, {len(reference)}", fid_samples=cfg.samples)
    for who, draw in samplers.items():
        x = in_batches(lambda n, label: to_uint8(draw(n, label)), cfg.samples, data.draw_label(cfg.samples))
        mean, cov, fake = feature_statistics(x, inception, desc=who)
        fid = frechet_distance(mean, cov, *stats)
        k = min(len(real), len(fake))
        precision, recall = precision_recall(real[:k], fake[:k])
        out |= {f"{fid_name(cfg.samples)}_{name}_{who}": fid, f"{fid_name(k, 'precision')}_{who}": precision,
                f"{fid_name(k, 'recall')}_{who}": recall}
    return out


def report(run, data, teacher, draw, **more):
    """Measure the finished student draw(n, label) -> x, write metrics.json, with `more` in it, print figures and where things are."""
    cfg, start = run.cfg, time.time()
    if rank():                                              # the first process measures
        return
    with torch.random.fork_rng([run.device] if run.device.type == "cuda" else []):
        torch.manual_seed(cfg.seed)
        if cfg.data in TOYS:
            metrics = dict(toy_metrics(draw(cfg.samples, data.draw_label(cfg.samples)), data), n=cfg.samples)
            line = "H {H:.5f} ({n:,} samples; 0 is perfect), {in_3std:.1%} within 3 std of a mode (data {in_3std_data:.1%}), " \
                   "mode weights {mode_min:.2f} to {mode_max:.2f} of the true ones".format(**metrics)
        elif cfg.fid:
            z, calls = lambda n: torch.randn(n, *data.shape, device=run.device), getattr(cfg, "steps_student", getattr(cfg, "nfe", 1))
            samplers = {f"{calls}_step" + "s" * (calls > 1): draw}
            if teacher is not None:
                samplers["teacher_1_step"] = lambda n, y: teacher(cfg.sigma_max * z(n), torch.full((n,), cfg.sigma_max, device=run.device), y)
            if teacher is not None and cfg.data == "cifar10":   # elsewhere longer than the student; `common.py sample` measures it once
                samplers["teacher_18_steps"] = lambda n, y: heun_sample(teacher, z(n), y, 18, cfg.sigma_min, cfg.sigma_max)
            metrics = image_metrics(cfg, data, samplers)
            line = ", ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k}: {v}" for k, v in metrics.items())
        else:
            metrics, line = {}, "no FID was measured; --fid FILE does it"
    run.finish(metrics | more)
    print(f"{run.dir}/samples.png   more samples: python {run.script}.py --sample {run.dir} --samples 64")
    print(f"{run.script} {cfg.data} seed {cfg.seed}, {run.step} steps in {run.seconds:.0f} s (+ {time.time() - start:.0f} s to measure), "
          f"peak memory {run.peak:.1f} GiB: {line}")


# ---- 8. pictures -----------------------------------------------------------------------------------------------------


def save_picture(path, panels, reach=None):
    """Panels {title: samples} side by side as a PNG: scatter plots of (n, 2) on axes -reach..reach, or grids of (n, C, H, W)."""
    from matplotlib.figure import Figure                    # no pyplot: no global state, nothing to close in a notebook
    figure = Figure(figsize=(3.2 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.08)
    first = next(iter(panels.values()))
    toy, reach = first.ndim == 2, reach or 1.25 * float(first.abs().max())                  # the data's axes for all
    for ax, (title, x) in zip(axes, panels.items()):
        x = x.detach().float().cpu()
        if toy:
            ax.scatter(*x[:5000].T.numpy(), s=1, alpha=0.4, color="#0072b2", linewidths=0, rasterized=True)
            ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[])
        else:
            n = math.isqrt(min(len(x), 256))
            grid = to_uint8(x[:n * n]).reshape(n, n, *x.shape[1:]).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
            ax.imshow(grid.squeeze(-1).numpy(), cmap="gray", interpolation="nearest")
            ax.set_axis_off()
        ax.set_title(title, fontsize=9)
    write_atomically(path, lambda f: figure.savefig(f, format="png", dpi=130))


SHOWN = 64                                          # images in a picture


def gallery(cfg, data, teacher, n=None):
    """(panels, z, label): pictures of data and teacher samples (if any), and the fixed latents for the student's panel beside them."""
    device = pick_device(cfg)
    large = device.type == "cpu" and teacher is not None and sum(p.numel() for p in teacher.parameters()) > 10**7       # a second a call and image
    n = n or (5000 if cfg.data in TOYS else 1 if large else SHOWN)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        x, label = data.sample(n)
        z = torch.randn(n, *data.shape, device=device)
        panels, steps = {f"data: {cfg.data}": x}, 40 if cfg.data == "imagenet64" else 18
        if teacher is not None:
            panels[f"teacher, {2 * steps - 1} network calls"] = heun_sample(
                teacher, z, label, steps, cfg.sigma_min if cfg.data in TOYS else 0.002, cfg.sigma_max)
    Images.ahead = None                                     # drawn in the fork, too
    return panels, z, label


# ---- 9. processes and run folder -------------------------------------------------------------------------------------
# Under torchrun every process draws the random numbers of the whole batch, from the same seed, and works on its share; the
# gradients are added up before each optimiser step, so weights stay the same everywhere and N processes do what one does.
# Only the first process writes. Flags and waiting go through gloo on the CPU: they never make a GPU wait.


class LostProcess(BaseException):
    """Another process of this run is gone."""


def processes():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def join_processes():
    """Under torchrun: join the other processes, by NCCL between GPUs, one each, and gloo between CPUs; only the first one prints."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or not dist.is_available() or dist.is_initialized():
        return
    gpus = torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % gpus)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=datetime.timedelta(days=2))    # one may measure for long
    signal.signal(signal.SIGTERM, lambda *_: _lost())       # torchrun's way to end the others when one process has died
    if rank():
        sys.stdout = open(os.devnull, "w")


def _lost(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)           # said once is enough
    raise LostProcess("another process of this run died, or torchrun was told to stop; the last checkpoint is whole: continue with --resume")


def all_reduce(t, **kw):
    """dist.all_reduce in place; LostProcess if a process no longer answers."""
    if processes() > 1:
        try:
            dist.all_reduce(t, **kw)
        except RuntimeError as e:
            _lost(e)
    return t


def largest(value):
    """The largest of the processes' numbers. All wait here for each other."""
    return float(all_reduce(torch.tensor(value, dtype=torch.float64), op=dist.ReduceOp.MAX)) if processes() > 1 else float(value)


def any_process(flag):
    """True in every process if `flag` is in one. All wait here for each other."""
    return bool(largest(flag))


def one_first(function, *args):
    """function(*args), by the first process alone and by the others after it: they find the files that it made."""
    if rank():
        any_process(False)
    out = function(*args)
    if not rank():
        any_process(False)
    return out


def first_to_say():
    """True for the first process of a run that has something to say at its end, so that it is said once."""
    if processes() == 1:
        return True
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:                                                    # torchrun's own store, which outlives the processes
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=datetime.timedelta(seconds=5))
        return store.add("onestep/said", 1) == 1
    except RuntimeError:
        return True


def write_atomically(path, write):
    """write(file) to a neighbour of `path`, then rename: a kill or a full disk leaves the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + f".{os.getpid()}.part")
    try:
        with open(part, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as e:                    # torch.save reports a full disk as a RuntimeError
        raise UserError(f"could not write {path} ({str(e).splitlines()[0]}); what was there is kept: make room, then add --resume")
    finally:
        part.unlink(missing_ok=True)                        # is there only if something broke


class Run:
    """
    The folder of one run: config.json, log.csv, samples.png, samples/<step>.png, last.pt (everything, for --resume),
    ema.pt (the student) and metrics.json. Seeds PyTorch. A folder of other settings is refused; one of the same
    settings is continued with --resume, else renamed to <folder>~1, never overwritten. `teacher` is False in runs that need
    none: the others leave half of --budget to fit_teacher.
    """
    free = {"resume", "every", "samples", "sample", "fid", "fid_ref", "device", "micro", "compile", "recompute", "data_dir", "out"}

    def __init__(self, cfg, script, teacher=True):
        check(cfg)
        self.cfg, self.script, self.device = cfg, script, pick_device(cfg)
        self.dir = Path(cfg.out or f"runs/{script}-{cfg.data}-{cfg.seed}")
        self.step, self.rows, self.seconds, self.began = 0, [], 0.0, time.time()
        self.progress, self.last = 0.0, False               # share of the training done, what schedules go by; is this the last step?
        self.budget = duration(cfg.budget) / (2 if teacher and cfg.teacher in ("", "exact") else 1)
        self.micro = cfg.micro or cfg.batch // processes()          # samples per forward pass
        if not rank():
            self._open(json.loads(json.dumps(dataclasses.asdict(cfg))))
        any_process(False)                                  # the others look into the folder only now
        torch.manual_seed(cfg.seed)
        Images.ahead = None

    def _open(self, now):
        """Refuse, continue, set aside or make the folder of a run with the settings `now`."""
        cfg = self.cfg
        self._claim()
        names = {p.name for p in self.dir.iterdir() if p.suffix != ".part"}
        if "config.json" in names and names <= {"config.json", "log.csv", "samples", "samples.png"}:
            (self.dir / "log.csv").unlink(missing_ok=True)          # a false start: nothing in it to protect
        elif names:
            try:
                old = dict(json.loads((self.dir / "config.json").read_text()))
            except (OSError, ValueError, TypeError):
                raise UserError(f"{self.dir} exists and is no run folder; choose another --out")
            other = [f"--{k} {old.get(k)!r} there, {now.get(k)!r} here" for k in {**old, **now}
                     if k not in self.free | {"about"} and old.get(k) != now.get(k)]
            if other:
                raise UserError(f"{self.dir} holds a run with other settings ({'; '.join(other[:3])}); choose another --out")
            if not cfg.resume:
                aside = next(p for i in range(1, 10**6) if not (p := Path(f"{self.dir}~{i}")).exists())
                self.dir.rename(aside)
                self._claim()
                print(f"the earlier run in {self.dir} is now {aside}")
        for part in self.dir.glob("**/*.part"):              # what a kill in the middle of a write left behind
            part.unlink()
        gpu = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        now["about"] = dict(script=self.script, torch=torch.__version__, device=gpu, processes=processes())
        write_atomically(self.dir / "config.json", lambda f: f.write(json.dumps(now, indent=1).encode()))

    def _claim(self):
        """Lock the folder while this process works in it: a second run is refused, a second fit of a teacher waits."""
        import fcntl                                        # not on Windows, nor is `resource` in finish()
        if self.dir.is_file():
            raise UserError(f"{self.dir} exists and is no run folder; choose another --out")
        self.dir.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.dir, os.O_RDONLY)
        self.release = weakref.finalize(self, os.close, folder)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | (0 if self.script == "teacher" else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(f"another process is working in {self.dir}; wait for it, or choose another --out")

    def parts(self, *batch):
        """This process's share of the batch's tensors (B, ...), in parts of --micro; a None stays None."""
        share = len(batch[0]) // processes()
        return micro_batches(self.micro, *(t if t is None else t[rank() * share:(rank() + 1) * share] for t in batch))

    def whole(self, share):
        """The whole batch (B, ...) from the share (B / processes, ...) of each process: for statistics of the batch."""
        out = share.new_zeros(processes(), *share.shape)
        out[rank()] = share
        return all_reduce(out).flatten(0, 1)

    def add_gradients(self, optimizer):
        """Sum the gradients that the processes have found on their shares, before the optimiser's step."""
        if processes() > 1:
            grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            total = all_reduce(torch.cat([g.flatten() for g in grads])).split([g.numel() for g in grads])
            torch._foreach_copy_(grads, [t.view(g.shape) for t, g in zip(total, grads)])

    def _look_at_clock(self):
        """Progress at the start of a step, the same in every process; with --budget the last step is the one that would end too late."""
        before, self.progress = self.progress, self.step / self.cfg.steps
        self.last = self.step + 1 >= self.cfg.steps
        if self.budget:
            self.progress = min(1.0, largest((time.time() - self.began) / self.budget))
            self.last = 2 * self.progress - before >= 1

    def steps(self, state):
        """
        Yield step numbers to the end of training, from the checkpoint with --resume. `state` names everything with a
        state_dict; its entry "ema" is the student that ema.pt gets. Saves every --every steps, on Ctrl-C and at the end.
        """
        self.state, self.interrupted = state, False
        if self.cfg.resume and (self.dir / "last.pt").exists():
            self._restore()

        def on_interrupt(*_):
            if self.interrupted and processes() == 1:       # torchrun may pass on what the terminal has sent already
                raise KeyboardInterrupt
            self.interrupted = True
        try:
            before = signal.signal(signal.SIGINT, on_interrupt)
        except ValueError:                                  # not the main thread: leave signals alone
            before = None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)         # a teacher fitted before does not count
        self.began, total = time.time() - self.seconds, None if self.budget else self.cfg.steps
        self.bar = tqdm(total=total, initial=self.step, desc=self.script, disable=rank() > 0)
        try:
            while not self.last:
                self._look_at_clock()
                yield self.step
                self.step += 1
                self.bar.update()
                self.interrupted = any_process(self.interrupted)
                if len(self.rows) >= 50 or self.last:
                    self.flush()
                if self.step % self.cfg.every == 0 or self.last or self.interrupted:
                    self.save()
                if self.interrupted:
                    raise KeyboardInterrupt(f"saved at step {self.step}; continue with --resume")
        finally:
            self.bar.close()
            self.seconds = time.time() - self.began
            if before is not None:
                signal.signal(signal.SIGINT, before)

    def due(self):
        """True in the steps after which a checkpoint is written: the time for a picture."""
        return (self.step + 1) % self.cfg.every == 0 or self.last

    def log(self, **values):
        """Keep the step's scalars (tensors or numbers); they are fetched, checked and written every 50 steps."""
        self.rows.append((self.step, {k: torch.as_tensor(v).detach() for k, v in values.items()}))

    def flush(self):
        """Write the averages kept since the last time as one row of log.csv; UserError at the first non-finite value."""
        if not self.rows:
            return
        names = list(self.rows[0][1])
        table = torch.stack([torch.stack([row[k].float().to(self.device) for k in names]) for _, row in self.rows])
        table = (all_reduce(table) / processes()).cpu()
        for i, j in (~table.isfinite()).nonzero()[:1].tolist():
            kept = f"the checkpoint before it is in {self.dir}" if (self.dir / "last.pt").exists() else "nothing was saved yet"
            raise UserError(f"{names[j]} became {table[i, j]} at step {self.rows[i][0]}; {kept}; a lower --lr may help")
        means, self.rows = table.mean(0).tolist(), []
        if rank():
            return
        self.bar.set_postfix_str(" ".join(f"{k} {v:.3g}" for k, v in zip(names, means)))
        new = not (self.dir / "log.csv").exists()
        with open(self.dir / "log.csv", "a", newline="") as f:
            writer = csv.writer(f)
            writer.writerows([["step", "seconds", *names]] * new)
            writer.writerow([self.step, round(time.time() - self.began, 2), *(f"{v:.6g}" for v in means)])

    def show(self, panels):
        """samples/<step>.png and samples.png from {title: samples}."""
        if rank():
            return
        path = self.dir / "samples" / f"{self.step + 1:07d}.png"
        save_picture(path, panels)
        write_atomically(self.dir / "samples.png", lambda f: f.write(path.read_bytes()))

    def save(self):
        """Checkpoint: ema.pt, then last.pt. Refuses to store weights that are not finite."""
        self.flush()
        for name, part in self.state.items():
            bad = isinstance(part, nn.Module) and [n for n, p in part.named_parameters() if not p.isfinite().all()]
            if bad:
                raise UserError(f"weight {bad[0]} of {name} is not finite at step {self.step}; the checkpoint before it is kept; a lower --lr may help")
        rng = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else [])
        everything = dict(step=self.step, last=self.last, progress=self.progress, seconds=time.time() - self.began, rng=rng, ahead=Images.ahead,
                          state={k: v if torch.is_tensor(v) else v.state_dict() for k, v in self.state.items()})
        if not rank():
            write_atomically(self.dir / "ema.pt", lambda f: torch.save(pack_denoiser(self.state["ema"].model, self.cfg), f))
            write_atomically(self.dir / "last.pt", lambda f: torch.save(everything, f))
        any_process(False)                                  # nobody leaves, and is missed, before it is written

    def _restore(self):
        try:
            saved = torch.load(self.dir / "last.pt", map_location="cpu", weights_only=True)
            for name, part in self.state.items():
                (part.copy_ if torch.is_tensor(part) else part.load_state_dict)(saved["state"][name])
            self.step, self.progress, self.seconds, Images.ahead = (saved[k] for k in ("step", "progress", "seconds", "ahead"))
            self.last = saved["last"] if self.budget else self.step >= self.cfg.steps
            torch.set_rng_state(saved["rng"][0])
            if self.device.type == "cuda" and len(saved["rng"]) > 1:
                torch.cuda.set_rng_state(saved["rng"][1], self.device)
        except Exception as e:
            raise UserError(f"{self.dir}/last.pt is damaged or of another version ({type(e).__name__}); choose another --out to start afresh")
        log = self.dir / "log.csv"
        if log.exists() and not rank():                                    # rows after the checkpoint will be written again
            lines = log.read_text().splitlines()
            keep = lines[:1] + [r for r in lines[1:] if r.split(",")[0].isdigit() and int(r.split(",")[0]) <= self.step]
            write_atomically(log, lambda f: f.write("".join(r + "\n" for r in keep).encode()))

    def finish(self, metrics):
        """metrics.json: the measured figures with sample count, training seconds, peak memory and machine."""
        if rank():
            return
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / 2**30
        else:
            import resource
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
        self.peak = peak
        about = dict(step=self.step, train_seconds=round(self.seconds, 1), peak_gib=round(peak, 2), processes=processes(),
                     device=str(self.device), torch=torch.__version__)
        write_atomically(self.dir / "metrics.json", lambda f: f.write(json.dumps({**metrics, **about}, indent=1).encode()))
        self.release()


def draw(cfg, sample):
    """--sample: draw --samples from the student in a run folder into draw.npy and draw.png there."""
    student = load_denoiser(cfg.sample, cfg)
    if student.sigma_init is None:
        raise UserError(f"{cfg.sample} holds a teacher, not a one-step student; python common.py sample --teacher draws from it")
    foreign = student.config.keys() - vars(cfg).keys()
    if foreign:
        raise UserError(f"{cfg.sample} is a run of another script, which has --{min(foreign)}; draw from it with that one")
    torch.manual_seed(cfg.seed)
    student.steps = getattr(cfg, "nfe", student.steps)
    given = {name: getattr(cfg, name) for name in inspect.signature(sample).parameters if getattr(cfg, name, -1) != -1}
    x = sample(student, cfg.samples, **{**given, "steps": student.steps})               # --steps is of training
    folder = Path(cfg.sample) if Path(cfg.sample).is_dir() else Path(cfg.sample).parent
    write_atomically(folder / "draw.npy", lambda f: np.save(f, x.cpu().numpy()))
    save_picture(folder / "draw.png", {f"{len(x):,} samples, {student.steps} network call{'s' * (student.steps > 1)} each": x})
    print(f"{folder}/draw.png and draw.npy: {len(x):,} samples")


# ---- python common.py sample -----------------------------------------------------------------------------------------


@dataclass
class Sampling(Shared):
    samples: int = 64           # how many to draw; with --fid, to measure
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    heun: int = 18              # steps of Heun's method: 2 heun - 1 network calls
    churn: float = 0.0          # EDM's S_churn, fresh noise on the way; 0: deterministic


# EDM's samplers for its own networks; deterministic ones for ImageNet-64 are usually quoted with --heun 40 --churn 0
SAMPLING = {**{name: dict(sigma_min=0.02, sigma_max=5.0) for name in TOYS}, "cifar10": {}, "imagenet64": dict(cond=True, heun=256, churn=40.0)}


def sample_teacher(cfg):
    """--teacher's samples by EDM's method into <out>/samples.png and .npy, and their metrics into metrics.json."""
    if cfg.heun < 2 or not 0 <= cfg.churn < math.inf:
        raise UserError("--heun must be at least 2, --churn at least 0")
    toy, device = cfg.data in TOYS, pick_device(cfg)
    data = load_data(cfg) if toy or cfg.fid or not cfg.teacher else None            # a file alone needs no data
    teacher, start = load_teacher(cfg, data), time.time()
    torch.manual_seed(cfg.seed)
    noise = lambda n, label: torch.randn(n, *teacher.shape, device=device)
    sample = lambda n, label: heun_sample(teacher, noise(n, label), label, cfg.heun, cfg.sigma_min, cfg.sigma_max, churn=cfg.churn)
    draw = lambda n, label: in_batches(sample, n, label, cfg.micro or 500)
    n, classes = min(cfg.samples, 64) if cfg.fid else cfg.samples, teacher.label_dim
    label = F.one_hot(torch.arange(n, device=device) * classes // n, classes).float() if classes else None          # all of them, if n allows
    x, folder = draw(n, label), Path(cfg.out or f"runs/sample-{cfg.data}-{cfg.seed}")
    how = f"teacher_{cfg.heun}_steps" + f"_churn{cfg.churn:g}" * (cfg.churn > 0)
    metrics = toy_metrics(x, data) if toy else image_metrics(cfg, data, {how: draw}) if cfg.fid else {}
    metrics |= dict(teacher=cfg.teacher, n=cfg.samples if cfg.fid else n, calls=2 * cfg.heun - 1, seconds=round(time.time() - start, 1))
    save_picture(folder / "samples.png", {f"{how.replace('_', ' ')}, {2 * cfg.heun - 1} network calls": x})
    write_atomically(folder / "samples.npy", lambda f: np.save(f, x.cpu().numpy()))
    write_atomically(folder / "metrics.json", lambda f: f.write(json.dumps(metrics, indent=1).encode()))
    figures = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k}: {v}" for k, v in metrics.items())
    print(f"{folder}/samples.png, samples.npy, metrics.json: {figures}")


if __name__ == "__main__":
    if sys.argv[1:2] != ["sample"]:
        sys.exit("usage: python common.py sample --teacher FILE --data DATA [--flag value] ..., see python common.py sample -h")
    del sys.argv[1]
    main(Sampling, SAMPLING, sample_teacher, sample_teacher)
