"""
What the five scripts share, in reading order. Nothing in it belongs to one method.

    1 command line   2 data              3 noise levels   4 networks
    5 teachers       6 the weighting op  7 metrics        8 a run

One currency: a *denoiser* D(x_t, sigma, label) -> x, the expected clean sample. x_t (B, ...) is x +
sigma eps, sigma is (B, 1, ...), label is one-hot (B, K) or None. A network, a closed-form mixture,
an EDM checkpoint and a function of your own are all denoisers, and one can stand in for another.
The score is (D(x_t, sigma, label) - x_t) / sigma^2.

Importing this file does no work. It is no script: start with `python fdistill.py`.
"""
import argparse, contextlib, copy, dataclasses, difflib, functools, glob, gzip, hashlib, inspect
import io, json, math, os, pickle, re, signal, sys, tarfile, tempfile, threading, time, warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# ---- 1. command line -----------------------------------------------------------------------------


class UserError(ValueError):
    """Something the user can mend, in one sentence. `main` prints it and exits with code 2."""


def need(ok, sentence):
    """Raise UserError with this sentence unless ok."""
    if not ok:
        raise UserError(sentence)


@contextlib.contextmanager
def blame(sentence):
    """Whatever goes wrong inside, such as in a foreign file, is a UserError of one sentence."""
    try:
        yield
    except Exception as e:
        cause = re.sub("(load failed|identify image file).*", r"\1", str(e))     # no unsafe advice
        raise UserError(f"{sentence}: {cause}".splitlines()[0][:400]) from None


@dataclass(init=False)
class Shared:
    """Flags that every script has. In Python, `Config(data="cifar10", steps=100)` means `--data
    cifar10 --steps 100`: defaults < presets < what is given. UserError for unknown ones."""
    data: str = "ring"          # a toy, mnist, cifar10, imagenet64, or images: your own
    data_dir: str = "data"      # folder or file with the images
    net: Literal["auto", "mlp", "small", "ddpmpp", "adm"] = "auto"      # small: a CPU's
    width: int = 0              # its channels at the first level; 0: as --net has it
    cond: bool = False          # class-conditional: every network sees the label
    flip: bool = False          # mirror half of the training images
    teacher: str = ""           # ema.pt, run folder or EDM's .pkl; exact (toys); nothing: fit one
    teacher_steps: int = 1000   # updates of that fit
    out: str = ""               # run folder; by default runs/<script>-<data>[-flag=value]-<seed>
    steps: int = 1000           # student updates
    minutes: float = 0.0        # train this long instead of --steps; a teacher's fit gets half
    batch: int = 512            # samples per update
    accumulate: int = 1         # parts in which a batch is worked on: more parts need less memory
    lr: float = 1e-3            # learning rate of the student
    sigma_min: float = 0.02     # lowest noise level that the method looks at
    sigma_max: float = 5.0      # highest
    sigma_init: float = 5.0     # noise level from which the student starts
    ema: float = 0.99           # decay per step of the averaged student, the one that is judged
    seed: int = 0               # random seed
    device: Literal["auto", "cpu", "cuda"] = "auto"     # where to run
    dtype: Literal["fp32", "bf16"] = "fp32"     # inside networks; bf16 is faster, coarser
    compile: bool = False       # networks through torch.compile; copies (for a JVP) stay eager
    recompute: bool = False     # image networks: a third more time, much less memory
    every: int = 500            # steps between checkpoints
    samples: int = 20000        # to measure with (H of images: at most 2,000), or to draw
    fid: str = ""               # Inception network (inception-2015-12-05.pt): measure FID
    fid_ref: str = ""           # its reference: EDM's .npz, or a number of training images
    resume: bool = False        # go on with the run in the folder
    sample: str = ""            # a finished run to draw --samples from; nothing is trained

    def __init__(self, **flags):
        argv = []
        for name, value in flags.items():
            switch = f"--{name}" if value else f"--no-{name}"
            argv.append(switch if isinstance(value, bool) else f"--{name}={value}")
        presets = getattr(sys.modules[type(self).__module__], "PRESETS", {})
        vars(self).update(vars(parse(type(self), presets, argv)))


# What may change when a run is resumed, and is not part of its folder's name
FREE = ("data_dir", "out", "fid", "fid_ref", "sample", "device", "accumulate", "compile",
        "recompute", "every", "samples", "resume")


@functools.cache
def make_parser(Config):
    """The parser of a Config's flags: names and types are its fields', help is their comments."""
    source = "".join(inspect.getsource(cls) for cls in reversed(Config.__mro__[:-1]))
    notes = dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.+)$", source, re.M))
    doc = (sys.modules[Config.__module__].__doc__ or "").strip()
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--flag value] ...", description=doc.partition("\n")[0],
        epilog="\n".join(re.findall("^    python.*", doc, re.M)), allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, exit_on_error=False)
    kinds = {bool: dict(action=argparse.BooleanOptionalAction), int: dict(type=int, metavar="int"),
             float: dict(type=float, metavar="float"),      # and runs/x/ is the path runs/x
             str: dict(type=lambda text: text and os.path.normpath(text), metavar="str")}
    for f in sorted(dataclasses.fields(Config), key=lambda f: hasattr(Shared, f.name)):
        kind = kinds.get(f.type, dict(choices=get_args(f.type)))
        note = f"{notes.get(f.name, '')} [{f.default}]".replace("%", "%%")
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=note, **kind)
    return parser


def parse(Config, presets, argv=None):
    """A Config from a command line: its defaults < presets < what is given. A preset counts if
    every word of its key ("cifar10", "cifar10 cd") is the value of a flag; later ones win. --sample
    starts from the flags of the run that it names."""
    with blame("wrong use"):
        given, rest = make_parser(Config).parse_known_args(argv)
    known = {f.name: f for f in dataclasses.fields(Config)}
    for word in rest:
        near = difflib.get_close_matches(word.split("=")[0].lstrip("-"), known, 1) or ["help"]
        raise UserError(f"unknown argument {word}; did you mean --{near[0]}?")
    flags = vars(given)
    if flags.get("sample"):
        script = Path(inspect.getfile(Config)).stem
        saved = read_json(f"{flags['sample']}/config.json")
        need(saved.get("script") == script, f"--sample {flags['sample']}: no run of {script}")
        names = known.keys() & saved.keys() - {*FREE, "seed"}
        flags = {name: saved[name] for name in names} | flags
    values = {name: f.default for name, f in known.items()} | flags
    words = {values[name] for name, f in known.items() if name == "data" or get_args(f.type)}
    for key, preset in presets.items():
        if words.issuperset(key.split()):
            values |= preset
    cfg = Config.__new__(Config)
    vars(cfg).update(values | flags)
    return cfg


def check(cfg):
    """Raise UserError for values that cannot work, whatever the script."""
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        least = int(f.type is int and f.name not in ("width", "seed"))
        if f.type in (int, float) and f.name != "p_mean":
            need(least <= value < 2**63, f"--{f.name} is a number of at least {least}, not {value}")
        need(value or not f.name.startswith(("lr", "sigma")), f"--{f.name} must be greater than 0")
    parts, names = cfg.accumulate * processes(), [*TOYS, *FORMATS]
    need(cfg.data in names, f"unknown data set {cfg.data!r}: choose one of {', '.join(names)}")
    need(cfg.sigma_min < cfg.sigma_max, "--sigma_min must lie below --sigma_max")
    need(cfg.ema < 1, f"--ema is a decay in [0, 1), not {cfg.ema}")
    need(cfg.width % 4 == 0, f"--width must be a multiple of 4, not {cfg.width}")
    need(cfg.batch % parts == 0, f"--batch {cfg.batch} does not divide into {parts} parts")
    need(cfg.samples > 1 or cfg.sample, "--samples must be at least 2 to measure anything")
    need(cfg.data in FORMATS or not cfg.fid, "--fid is for images; toys are measured by H without")
    need(cfg.device != "cuda" or torch.cuda.is_available(), "--device cuda: PyTorch sees no GPU")


def main(Config, presets, train, sample):
    """A script's command line. Bad input: a sentence and exit code 2; Ctrl-C: 130; SIGTERM: 143."""
    code, sentence = 2, "memory is full; a larger --accumulate or a smaller --batch needs less"
    try:
        join_processes()
        cfg = parse(Config, presets)
        if cfg.sample:
            draw(cfg, sample)
        else:
            train(cfg)
        if processes() > 1:
            dist.destroy_process_group()
        return
    except (UserError, OSError) as e:       # OSError: a full disk, a folder that may not be written
        sentence = str(e)
    except KeyboardInterrupt as e:
        code, sentence = e.args or (130, "stopped")
    except (RuntimeError, MemoryError) as e:
        if "memory" not in repr(e).lower():
            raise
    if rank() == 0:
        print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr, flush=True)
    sys.exit(code)


def pick_device(cfg):
    """The torch.device that --device names; auto is the GPU where there is one."""
    gpu = cfg.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if gpu else "cpu")


# ---- 2. data -------------------------------------------------------------------------------------
# A data set has sample(n) -> (x, label or None), the shape of one x, class_weights (the classes'
# proportions, empty without labels), label_dim (their number) and sigma_data. All draws use
# PyTorch's global generator, so that a checkpoint of its state resumes the very same stream.


def draw_label(n, source, device=None):
    """n one-hot labels (n, K) in the proportions source.class_weights; None where it has none."""
    if not source.class_weights:
        return None
    weights = on_device(tuple(source.class_weights), device)
    return F.one_hot(torch.multinomial(weights, n, replacement=True), len(weights)).float()


@functools.cache
def on_device(numbers, device):
    """Numbers as a tensor that stays on its device: to copy them there anew is to wait for it."""
    return torch.tensor(numbers, device=device)


class GaussianMixture(nn.Module):
    """Mixture of isotropic Gaussians, closed-form at every noise level: data set and perfect
    teacher in one. means (K, D); std >= 0, one for all; weights (K,), equal by default; groups (K,)
    the class of each component, its own by default. std 0: the exact denoiser of a sample set."""

    def __init__(self, means, std=0.0, weights=None, groups=None):
        super().__init__()
        means = torch.as_tensor(means) + 0.0
        weights = torch.as_tensor([1.0] * len(means) if weights is None else weights).to(means)
        groups = torch.as_tensor(range(len(means)) if groups is None else groups)
        need(means.ndim == 2 and len(weights) == len(groups) == len(means) and std >= 0
             and weights.min() >= 0 and weights.sum() > 0,
             "GaussianMixture wants means (K, D), K weights and groups, and std >= 0")
        weights = weights / weights.sum()
        self.std, self.shape = float(std), tuple(means.shape[1:])
        self.register_buffer("means", means)
        self.register_buffer("weights", weights)
        self.register_buffer("groups", groups.to(means.device))
        self.class_weights = torch.bincount(self.groups, weights).tolist()
        self.label_dim = len(self.class_weights)
        variance = weights @ (means - weights @ means).square().mean(1) + std**2
        self.sigma_data = float(variance.sqrt())

    def sample(self, n):
        """n samples x (n, D) with one-hot labels (n, label_dim), or None where label_dim is 0."""
        k = torch.multinomial(self.weights, n, replacement=True)
        x = self.means[k] + self.std * torch.randn_like(self.means[k])
        return x, F.one_hot(self.groups[k], self.label_dim).to(x) if self.label_dim else None

    def log_joint(self, x, sigma, label):
        """log w_k N(x; m_k, std^2 + sigma^2), (B, K); with a label, within its class."""
        var = self.std**2 + sigma.to(x) ** 2                                        # (B, 1)
        # not by matrix products: |x|^2 - 2xm + |m|^2 cancels in float32 when sigma is small
        d = torch.cdist(x, self.means.to(x), compute_mode="donot_use_mm_for_euclid_dist")
        log_w = self.weights.to(x).log().expand_as(d)                               # (B, K)
        if label is not None:
            log_w = log_w.masked_fill(label.argmax(1)[:, None] != self.groups, -math.inf)
            log_w = log_w - log_w.logsumexp(1, keepdim=True)
        return log_w - d.square() / (2 * var) - 0.5 * x.shape[1] * (2 * math.pi * var).log()

    def log_prob(self, x, sigma, label=None):
        """log density (B,) of x (B, D) under the mixture blurred by noise of std sigma (B, 1)."""
        return self.log_joint(x, sigma, label).logsumexp(1)

    def score(self, x, sigma, label=None):
        """Gradient (B, D) of log_prob in x: towards the posterior-weighted means."""
        mean = self.log_joint(x, sigma, label).softmax(1) @ self.means.to(x)        # (B, D)
        return (mean - x) / (self.std**2 + sigma.to(x) ** 2)

    def forward(self, x_t, sigma, label=None):
        """E[x | x_t = x + sigma eps], (B, D), by Tweedie's formula."""
        return x_t + sigma.to(x_t) ** 2 * self.score(x_t, sigma, label)


def _toys():
    ring = torch.view_as_real(torch.polar(torch.ones(8), torch.arange(8) * math.pi / 4))
    line = torch.linspace(-1.2, 1.2, 5)
    arc = torch.linspace(0, math.pi, 16)
    moon = torch.stack([arc.cos() - 0.5, arc.sin() - 0.25], 1)
    turn = torch.linspace(1, 3.5, 48) * math.pi
    spiral = torch.view_as_real(torch.polar(1.2 * turn / turn.max(), turn))
    cell = torch.arange(16) // 4                        # squares of a board, 4 x 4 points to each
    black = (cell[:, None] + cell) % 2 == 0
    square = (cell[:, None] * 4 + cell)[black] // 2
    return dict(
        ring=GaussianMixture(ring, 0.1),
        grid=GaussianMixture(torch.cartesian_prod(line, line), 0.05),
        unequal=GaussianMixture(ring, 0.1, weights=[8, 1, 4, 1, 2, 1, 4, 1]),
        moons=GaussianMixture(torch.cat([moon, -moon]), 0.08, groups=torch.arange(32) // 16),
        spiral=GaussianMixture(spiral, 0.04, groups=torch.arange(48) // 12),
        checkerboard=GaussianMixture(black.nonzero() / 8 - 0.9375, 0.05, groups=square))


TOYS = _toys()


class Images:
    """A set of samples: images uint8 (N, C, H, W), drawn as float32 in [-1, 1], or any float (N,
    ...); labels (N,) class numbers. What is over a GiB stays where it is, as in a memory map."""

    def __init__(self, images, labels=None, classes=0, device="cpu", flip=False):
        self.device, self.flip = torch.device(device), flip
        self.images = torch.as_tensor(images).to(device if images.nbytes <= 2**30 else "cpu")
        self.shape, self.class_weights, self.sigma_data = tuple(images.shape[1:]), [], 0.5   # EDM's
        if self.images.dtype != torch.uint8:
            self.sigma_data = float(self.images.std())
        if labels is not None:
            self.labels = torch.as_tensor(labels).long().to(self.images.device)
            count = torch.bincount(self.labels, minlength=classes)
            self.class_weights = (count / len(labels)).tolist()
        self.label_dim = len(self.class_weights)

    def sample(self, n):
        """n samples x (n, ...) with one-hot labels, or None where label_dim is 0."""
        return self.take(torch.randint(len(self.images), (n,), device=self.images.device))

    def take(self, i):
        """The samples of numbers i (n,), as sample gives them."""
        x = self.images[i].to(self.device)
        x = x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x.float()
        if self.flip and x.ndim == 4:
            x = torch.where(uniform(x) < 0.5, x, x.flip(3))
        if not self.label_dim:
            return x, None
        return x, F.one_hot(self.labels[i].to(self.device), self.label_dim).float()


def load_data(cfg, data=None):
    """The data set --data, or the one that is given: a GaussianMixture, Images, a tensor of
    samples, or anything with sample(n) -> (x, one-hot label or None). Without --cond labels are
    left out. Raises UserError for missing or damaged files, and for --fid that cannot work."""
    if data is None:
        data = TOYS[cfg.data] if cfg.data in TOYS else read_data(cfg)
    if torch.is_tensor(data) or isinstance(data, np.ndarray):
        data = torch.as_tensor(data)
        need(data.dtype == torch.uint8 or data.is_floating_point(), "data must be float or uint8")
        data = Images(data, None, 0, pick_device(cfg), cfg.flip)
    if isinstance(data, nn.Module):
        data = copy.deepcopy(data).to(pick_device(cfg))
    need(hasattr(data, "sample"), f"data {type(data).__name__} is no tensor, has no sample(n)")
    data = copy.copy(data)
    if not hasattr(data, "class_weights"):
        describe(data, cfg)
    need(fits(data.shape), f"samples {data.shape}: not (D > 1,), not square images (C, 4k, 4k)")
    need(0 < data.sigma_data < cfg.sigma_max / 2, f"the data's standard deviation is "
         f"{data.sigma_data:g}: scale points to about 1, images as floats to [-1, 1]")
    need(data.class_weights or not cfg.cond, "the data has no labels: omit --cond")
    data.class_weights = data.class_weights if cfg.cond else []
    data.label_dim = len(data.class_weights)
    if cfg.fid:
        need(hasattr(data, "images"), "--fid is for data that is a set of images")
        first_alone(fid_reference, cfg, data)
    return data


def describe(data, cfg):
    """Give data of your own, an object with sample(n), what the scripts ask a data set for."""
    draw, found, device = data.sample, data.sample(4096), pick_device(cfg)
    with blame("data.sample(n) must give (x (n, ...) float, label (n, K) one-hot or None)"):
        x, label = found
        need(x.is_floating_point(), f"x is {x.dtype}")
        need(label is None or (label.sum(1) == 1).all(), "its labels are not one-hot")

    def sample(n):
        x, label = draw(n)
        return x.float().to(device), label.float().to(device) if cfg.cond else None

    data.sample, data.shape, data.sigma_data = sample, tuple(x.shape[1:]), float(x.std())
    data.class_weights = [] if label is None else label.float().mean(0).tolist()


def fits(shape):
    """Whether networks take samples of this shape: points (D,), or square images, grey or RGB."""
    if len(shape) != 3:
        return len(shape) == 1 and shape[0] > 1
    return shape[0] in (1, 3) and shape[1] == shape[2] and shape[2] % 4 == 0


MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
CIFAR10 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"


def read_data(cfg):
    """The Images in --data_dir; UserError, which says what is wanted, for anything else."""
    read, classes, wanted = FORMATS[cfg.data]
    with blame(f"--data_dir {cfg.data_dir} has no {wanted}"):
        images, labels = first_alone(read, cfg, Path(cfg.data_dir))
        good = len(images) and fits(images.shape[1:]) and images.dtype == np.uint8
        need(good, f"its images are {images.shape} {images.dtype}")
        need(labels is not None or not cfg.cond, "its images have no labels: omit --cond")
        good = labels is None or (labels.shape == images.shape[:1] and labels.dtype.kind in "iu" and
                                  labels.min() >= 0 and labels.max() < (classes or 2**31))
        need(good, f"{len(images)} images want a class number each, not {labels}")
        return Images(images, labels, classes, pick_device(cfg), cfg.flip)


def download(cfg, url, path, sha256):
    """Fetch url to path unless it is there; not into a folder of the user's with something else."""
    if not path.exists():
        need(cfg.data_dir == "data", "nothing of that kind is there")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), sha256)


def read_mnist(cfg, where):
    """MNIST's idx files, gzipped or not, in --data_dir or in mnist/ there, or downloaded."""
    raw, folder = [], where if any(where.glob("train-images*")) else where / "mnist"
    for name, sha256 in (("train-images-idx3-ubyte", "440fcabf73cc546fa21475e81ea37026"),
                         ("train-labels-idx1-ubyte", "3552534a0a558bbed6aed32b30c495cc")):
        plain, zipped = folder / name, folder / f"{name}.gz"
        if not plain.exists():
            download(cfg, f"{MNIST}{name}.gz", zipped, sha256)
        raw.append(plain.read_bytes() if plain.exists() else gzip.decompress(zipped.read_bytes()))
    images = np.frombuffer(bytearray(raw[0]), np.uint8, offset=16)
    return images.reshape(-1, 1, 28, 28), np.frombuffer(bytearray(raw[1]), np.uint8, offset=8)


def read_cifar10(cfg, where):
    """CIFAR-10's binary version, its folder or its archive, or downloaded; or EDM's zip of it."""
    if where.suffix == ".zip":
        return read_images(cfg, where, (3, 32, 32))
    names = [f"data_batch_{i}.bin" for i in range(1, 6)]
    folder = where if (where / names[0]).exists() else where / "cifar-10-batches-bin"
    if folder.is_dir():
        parts = [(folder / name).read_bytes() for name in names]
    else:
        archive = where if where.is_file() else where / "cifar-10-binary.tar.gz"
        download(cfg, CIFAR10, archive, "c4a38c50a1bc5f3a1c5537f2155ab9d6")
        with tarfile.open(archive) as tar:              # read in memory: no path can escape
            files = {Path(member.name).name: member for member in tar if member.isfile()}
            parts = [tar.extractfile(files[name]).read() for name in names]
    rows = np.frombuffer(bytearray().join(parts), np.uint8).reshape(-1, 3073)
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0]


def read_imagenet(cfg, where):
    """EDM's zip of ImageNet-64 (recommended: cropped like the teacher's data), or the official
    downsampled batches train_data_batch_*.npz (squashed). Their labels 1 to 1000 count another
    order than EDM's, the sorted one of the synsets: map_clsloc.txt beside them re-orders them."""
    files = sorted(where.glob("train_data_batch_*.npz"), key=lambda p: (len(p.name), p.name))
    if not files:
        return read_images(cfg, where, (3, 64, 64))
    names, place = where / "map_clsloc.txt", {k: k - 1 for k in range(1, 1001)}
    if names.exists():                                  # lines such as "n02119789 1 kit_fox"
        lines = sorted(line.split() for line in names.read_text().splitlines() if line.strip())
        place = {int(line[1]): i for i, line in enumerate(lines)}
    need(names.exists() or not cfg.cond or not cfg.teacher.endswith(".pkl"), "the official "
         "map_clsloc.txt is missing: without it, classes are not in the teacher's order")
    labels = np.concatenate([np.load(file)["labels"].reshape(-1) for file in files]).tolist()
    need(place.keys() >= set(labels), "labels are not 1 to 1000, all mapped")
    parts = (np.load(file)["data"].reshape(-1, 3, 64, 64) for file in files)
    images = memory_map(cfg, files, (len(labels), 3, 64, 64), parts)
    return images, np.array([place[k] for k in labels])


def read_images(cfg, where, shape=None):
    """Images of your own, PNG or JPEG in a folder or a .zip, or an .npz; sub-folders are classes.
    A `shape` that is given is that of EDM's zips, which have their labels in dataset.json."""
    if where.suffix.lower() == ".npz":
        return read_npz(where)
    paths = list_files(where)
    index = paths.pop("dataset.json", None)
    need(paths, "there are no images")
    known = find_classes(paths, index, own=shape is None)
    shape = read_picture(next(iter(paths.values())), shape).shape
    need(fits(shape), f"its images are {shape}")
    labels = None
    if known and cfg.cond:
        odd = sorted(paths.keys() - known.keys())
        need(not odd, f"some images have a class and some have none, such as {odd[:1]}")
        labels = np.array([known[name] for name in paths])
        if labels.dtype.kind == "U":                    # folders' names: numbers in their order
            labels = np.unique(labels, return_inverse=True)[1]
    parts = (read_picture(path, shape) for path in paths.values())
    files = paths.values() if where.is_dir() else [where]
    return memory_map(cfg, files, (len(paths), *shape), parts), labels


def find_classes(paths, index, own):
    """{name: class} by EDM's dataset.json, or by the sub-folders of images of one's own."""
    if index:
        return dict(json.loads(index.read_bytes()).get("labels") or [])
    if not own:
        return {}
    around = os.path.commonpath([Path(name).parent.parent for name in paths])   # itself no class
    return {name: Path(name).relative_to(around).parts[0] for name in paths if "/" in name}


def list_files(where):
    """{name: path}, sorted, of all files but hidden ones in a folder or a .zip."""
    if where.is_dir():
        for folder in where.iterdir():
            need(folder.is_file() or any(folder.iterdir()), f"class folder {folder} is empty")
        names = glob.glob("**", root_dir=where, recursive=True)     # follows links
        paths = {Path(name).as_posix(): where / name for name in names}
    else:
        root = zipfile.Path(where)
        paths = {name: root / name for name in root.root.namelist()}
    hidden = re.compile(r"(^|/)(\.|__MACOSX)")
    names = sorted(name for name in paths if not hidden.search(name))
    return {name: paths[name] for name in names if paths[name].is_file()}


def read_picture(path, shape):
    """uint8 (C, H, W) of a PNG or JPEG file; UserError if it has not `shape`."""
    with blame(f"{path} is no picture, or damaged"):
        picture = Image.open(io.BytesIO(path.read_bytes()))
        pixels = np.atleast_3d(np.asarray(picture)).transpose(2, 0, 1)
    need(picture.mode in ("L", "RGB"), f"{path} has mode {picture.mode}, not L (grey) or RGB")
    need(shape in (None, pixels.shape), f"{path} is {pixels.shape}, not {shape} as it should be")
    return pixels


def read_npz(where):
    """(images (N, C, H, W), labels or None) of an .npz of your own."""
    need(zipfile.is_zipfile(where), "it is no .npz archive")
    z = np.load(where)
    need("images" in z, f"it has {list(z)}")
    need(z["images"].ndim in (3, 4), f"its images are {z['images'].shape}")
    images, labels = z["images"], z["labels"].reshape(-1) if "labels" in z else None
    images = images[:, None] if images.ndim == 3 else images
    if images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(images), labels


def memory_map(cfg, files, shape, parts):
    """Images of this shape in one file, made once from parts and kept beside the runs."""
    facts = [[str(file), os.path.getsize(file), os.path.getmtime(file)] for file in files]
    path = runs_folder(cfg) / f"images-{checksum(facts)}.bin"
    if not path.exists():
        raw = (part.tobytes() for part in tqdm(parts, f"reading {cfg.data_dir}", ncols=79))
        write_atomically(path, lambda f: f.writelines(raw))
    need(path.stat().st_size == math.prod(shape), "it has not as many labels as images")
    return np.memmap(path, np.uint8, "c", shape=shape)


FORMATS = dict(
    mnist=(read_mnist, 10, "train-images-idx3-ubyte and train-labels-idx1-ubyte, gzipped or not"),
    cifar10=(read_cifar10, 10, "cifar-10-binary.tar.gz, cifar-10-batches-bin, or EDM's .zip"),
    imagenet64=(read_imagenet, 1000, "EDM's .zip, or train_data_batch_1.npz and so on"),
    images=(read_images, 0, "PNG or JPEG in a folder or .zip, or images (N, H, W[, C]) or (N, C, "
            "H, W) uint8 in an .npz: grey or RGB, of one size, square, side a multiple of 4"))


# ---- 3. noise levels -----------------------------------------------------------------------------


def uniform(x):
    """A uniform number in [0, 1) for each sample of x (B, ...), shape (B, 1, ...)."""
    return torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device)


def level(x, sigma):
    """The number sigma as levels (B, 1, ...) for x (B, ...)."""
    return x.new_full((len(x), *[1] * (x.ndim - 1)), float(sigma))


def karras(u, sigma_min, sigma_max, rho=7):
    """Noise level at u in [0, 1] along Karras's ramp from sigma_min to sigma_max (EDM, Eq. 5)."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (low + u * (high - low)) ** rho


def karras_sigmas(steps, sigma_min, sigma_max, device=None):
    """A sampler's levels (steps + 1,) float64, from sigma_max to sigma_min, then 0 (EDM, Eq. 5)."""
    ramp = torch.linspace(1, 0, steps, dtype=torch.float64, device=device)
    return torch.cat([karras(ramp, sigma_min, sigma_max), ramp.new_zeros(1)])


def lognormal_sigma(x, mean=-1.2, std=1.2):
    """Levels (B, 1, ...) with ln sigma ~ N(mean, std^2), EDM's training law (EDM, Table 1)."""
    return (mean + std * torch.randn_like(uniform(x))).exp()


def denoising_loss(d, x, sigma, sigma_data):
    """EDM's weighted squared error (B,) of d (B, ...): about one at every level (EDM, Table 1)."""
    weight = 1 / sigma**2 + 1 / sigma_data**2                                       # (B, 1, ...)
    return (weight * (d - x).square()).flatten(1).mean(1)


# ---- 4. networks ---------------------------------------------------------------------------------
# A network has two halves: encode(x, c_noise (B,), label, second) -> (features, embedding) and
# decode(features, embedding) -> x's shape. A discriminator's head reads the last feature.


class Denoiser(nn.Module):
    """A network with EDM's preconditioning (EDM, Table 1): D = c_skip x_t + c_out F(c_in x_t,
    c_noise). Inside it may run in bf16; in and out are float32. At sigma 0, D is x_t. `second` (B,
    1, ...) is a number that some methods embed beside the level."""

    def __init__(self, net, sigma_data=0.5, dtype="fp32"):
        super().__init__()
        self.net, self.sigma_data, self.dtype = net, sigma_data, dtype
        self.shape, self.label_dim = net.shape, net.label_dim

    def forward(self, x_t, sigma, label=None, second=None):
        """x_t (B, ...), sigma (B, 1, ...) -> x (B, ...)."""
        return self.with_feature(x_t, sigma, label, second)[0]

    def with_feature(self, x_t, sigma, label=None, second=None):
        """(x, last feature of the encoder) in one pass."""
        x_t, sigma = x_t.float(), sigma.float()
        total = sigma**2 + self.sigma_data**2
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.dtype == "bf16"):
            features, emb = self.encode(x_t, sigma, label, second)
            out = self.net.decode(features, emb).float()
        c_out = sigma * self.sigma_data * total.rsqrt()
        return self.sigma_data**2 / total * x_t + c_out * out, features[-1].float()

    def feature(self, x_t, sigma, label=None):
        """The last feature alone: the network's second half is left out."""
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.dtype == "bf16"):
            return self.encode(x_t.float(), sigma.float(), label)[0][-1].float()

    def encode(self, x_t, sigma, label, second=None):
        c_in = (sigma**2 + self.sigma_data**2).rsqrt()
        c_noise = sigma.clamp(min=1e-6).log().flatten() / 4
        if label is None and self.label_dim:
            label = x_t.new_zeros(len(x_t), self.label_dim)     # EDM: no label is a row of zeros
        return self.net.encode(c_in * x_t, c_noise, label if self.label_dim else None, second)


def waves(v):
    """Sines and cosines (B, 16) of a number v (B,) or (B, 1, ...)."""
    angle = v.reshape(-1, 1) * torch.arange(0.5, 4.5, 0.5, device=v.device)
    return torch.cat([angle.sin(), angle.cos()], 1)


def xavier(module, gain=1.0):
    """Xavier's weights and zero biases for the layers of a module, which is returned."""
    for m in module.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(m.weight, gain)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
    return module


class MLP(nn.Module):
    """Network for toys. ReLU on purpose: one step has to tear one Gaussian into modes, and
    piecewise linear maps have the sharp edges for it."""

    def __init__(self, dim=2, label_dim=0, width=128, depth=4, second=False):
        super().__init__()
        self.spec = dict(dim=dim, label_dim=label_dim, width=width, depth=depth, second=second)
        self.shape, self.label_dim, self.feature_shape = (dim,), label_dim, (width,)
        sizes = [dim + 16 + label_dim] + [width] * depth
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:]))
        self.out = nn.Linear(width, dim)
        if second:
            self.map_second = xavier(nn.Linear(16, width), 0)

    def encode(self, x, c_noise, label, second):
        h = torch.cat([x, waves(c_noise)] if label is None else [x, waves(c_noise), label], 1)
        h = self.layers[0](h)
        if second is not None:
            h = h + self.map_second(waves(second))
        for layer in self.layers[1:]:
            h = layer(h.relu())
        return [h.relu()], None

    def decode(self, features, emb):
        return self.out(features[-1])


class GroupNorm(nn.GroupNorm):
    """Group norm with EDM's min(32, c / 4) groups, or fewer where that does not divide c; in x's
    own type: on GPUs autocast would work in float32 and keep twice as much."""

    def __init__(self, c, adm):
        super().__init__(math.gcd(min(32, max(c // 4, 1)), c), c, 1e-5 if adm else 1e-6)

    def forward(self, x):
        with torch.autocast(x.device.type, torch.bfloat16, False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class Block(nn.Module):
    """Block of the UNet: norm, SiLU, conv, embedding, norm, SiLU, conv, skip, attention."""

    def __init__(self, c_in, c_out, c_emb, adm, resample="", attention=False):
        super().__init__()
        self.adm, self.resample, self.dropout = adm, resample, 0.0
        self.scale = 1 if adm else 0.5**0.5             # DDPM++ keeps the sum's variance at one
        self.norm0, self.conv0 = GroupNorm(c_in, adm), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.affine = nn.Linear(c_emb, c_out * (2 if adm else 1))
        self.norm1, self.conv1 = GroupNorm(c_out, adm), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip, self.heads = nn.Identity(), 0
        if c_in != c_out or (resample and not adm):
            self.skip = nn.Conv2d(c_in, c_out, 1)
        if attention:
            self.heads = math.gcd(c_out // 64 or 1, c_out) if adm else 1    # ADM: 64 channels each
            self.norm2, self.proj = GroupNorm(c_out, adm), nn.Conv2d(c_out, c_out, 1)
            self.qkv = nn.Conv2d(c_out, 3 * c_out, 1)

    def resize(self, x):        # EDM's [1, 1] filter is nearest neighbour up and 2x2 mean down
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return F.avg_pool2d(x, 2) if self.resample == "down" else x

    def forward(self, x, emb):                                                      # (B, C, H, W)
        h = self.conv0(self.resize(F.silu(self.norm0(x))))
        e = self.affine(emb)[:, :, None, None]
        if self.adm:                                    # scale and shift after the norm
            scale, shift = e.chunk(2, 1)
            h = F.silu(self.norm1(h) * (1 + scale) + shift)
        else:
            h = F.silu(self.norm1(h + e))
        if self.dropout and self.training:      # on fresh ones: a mask must not depend on layout
            h = h * F.dropout(torch.ones(h.shape, device=h.device), self.dropout).to(h.dtype)
        x = (self.skip(self.resize(x)) + self.conv1(h)) * self.scale
        return (x + self.attend(x)) * self.scale if self.heads else x

    def attend(self, x):
        qkv = self.qkv(self.norm2(x)).flatten(2).unflatten(1, (self.heads, -1, 3))  # v is fastest
        q, k, v = qkv.permute(3, 0, 1, 4, 2).contiguous()       # as PyTorch's fused kernels want it
        a = F.scaled_dot_product_attention(q, k, v)                                 # (B, h, HW, c)
        return self.proj(a.transpose(2, 3).reshape(x.shape))


class UNet(nn.Module):
    """EDM's two image networks with its parameter names, DDPM++ and ADM (adm=True): width channels
    times mult[i] at resolution / 2^i. patch=2 takes 2x2 pixels as channels, for a CPU. direct adds
    a linear path past all blocks: low levels, whose answer is nearly linear, are soon learnt."""

    def __init__(self, resolution=32, channels=3, label_dim=0, width=128, mult=(2, 2, 2), blocks=4,
                 attention=(16,), augment_dim=0, adm=False, patch=1, direct=False, second=False):
        super().__init__()
        need(resolution % (patch * 2 ** (len(mult) - 1)) == 0,
             f"{resolution}x{resolution} images cannot be halved {len(mult) - 1} times")
        self.spec = dict(resolution=resolution, channels=channels, label_dim=label_dim, width=width,
                         mult=tuple(mult), blocks=blocks, attention=tuple(attention),
                         augment_dim=augment_dim, adm=adm, patch=patch, direct=direct,
                         second=second)
        self.shape, self.label_dim = (channels, resolution, resolution), label_dim
        self.width, self.adm, self.patch, self.recompute = width, adm, patch, False
        c_emb = 4 * width
        self.map_layer0, self.map_layer1 = nn.Linear(width, c_emb), nn.Linear(c_emb, c_emb)
        if label_dim:
            self.map_label = nn.Linear(label_dim, c_emb if adm else width, bias=not adm)
        if augment_dim:         # EDM's augmentation labels; zero here, so it is only carried along
            self.map_augment = nn.Linear(augment_dim, width, bias=False)
        c_patch = channels * patch**2
        first = nn.Conv2d(c_patch, width, 3, padding=1)
        last = nn.Conv2d(width * mult[0], c_patch, 3, padding=1)
        sides = [resolution // patch >> i for i in range(len(mult))]
        self.enc, skips = nn.ModuleDict({f"{sides[0]}x{sides[0]}_conv": first}), [width]
        for i, side in enumerate(sides):
            if i:
                self.enc[f"{side}x{side}_down"] = Block(skips[-1], skips[-1], c_emb, adm, "down")
                skips.append(skips[-1])
            for k in range(blocks):
                block = Block(skips[-1], width * mult[i], c_emb, adm, "", side in attention)
                self.enc[f"{side}x{side}_block{k}"] = block
                skips.append(width * mult[i])
        self.feature_shape = (skips[-1], sides[-1], sides[-1])
        self.dec = self.make_decoder(skips, sides, c_emb)
        if adm:
            self.out_norm, self.out_conv = GroupNorm(width * mult[0], adm), last
        else:
            self.dec[f"{sides[0]}x{sides[0]}_aux_norm"] = GroupNorm(width * mult[0], adm)
            self.dec[f"{sides[0]}x{sides[0]}_aux_conv"] = last
        self.initialise(last)
        self.direct = None
        if direct:
            self.direct = nn.Conv2d(c_patch, c_patch, 3, padding=1)
            self.gain = xavier(nn.Linear(c_emb, c_patch), 0)            # mute at first
        if second:
            self.map_second = xavier(nn.Linear(16, c_emb), 0)

    def make_decoder(self, skips, sides, c_emb):
        """The encoder's mirror image, one block more a level; each also takes a feature."""
        dec, c, how = nn.ModuleDict(), skips[-1], self.spec
        for i, side in reversed(list(enumerate(sides))):
            if side == sides[-1]:
                dec[f"{side}x{side}_in0"] = Block(c, c, c_emb, self.adm, "", True)
                dec[f"{side}x{side}_in1"] = Block(c, c, c_emb, self.adm)
            else:
                dec[f"{side}x{side}_up"] = Block(c, c, c_emb, self.adm, "up")
            for k in range(how["blocks"] + 1):
                c_in, c = c + skips.pop(), self.width * how["mult"][i]
                attend = side in how["attention"] and (self.adm or k == how["blocks"])
                dec[f"{side}x{side}_block{k}"] = Block(c_in, c, c_emb, self.adm, "", attend)
        return dec

    def initialise(self, conv):
        """ADM: PyTorch's own; DDPM++: Xavier's; in both, residual branches start about zero."""
        small = 0 if self.adm else 1e-5
        if not self.adm:
            xavier(self)
        elif self.label_dim:
            nn.init.normal_(self.map_label.weight)
        xavier(conv, small)
        for block in self.modules():
            if isinstance(block, Block):
                xavier(block.conv1, small)
                if block.heads:
                    xavier(block.proj, small)
                if block.heads and not self.adm:
                    xavier(block.qkv, 0.2**0.5)

    def embed(self, c_noise, label, second):
        """Embedding (B, 4 width) of noise level, label and second number."""
        half = self.width // 2
        power = torch.arange(half, device=c_noise.device) / (half if self.adm else half - 1)
        angle = c_noise[:, None] * 10000.0**-power                                  # (B, half)
        if self.adm:
            emb = self.map_layer0(torch.cat([angle.cos(), angle.sin()], 1))
            emb = self.map_layer1(F.silu(emb))
            emb = emb if label is None else emb + self.map_label(label)
        else:
            emb = torch.cat([angle.sin(), angle.cos()], 1)
            emb = emb if label is None else emb + self.map_label(label * self.label_dim**0.5)
            emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        return F.silu(emb if second is None else emb + self.map_second(waves(second)))

    def encode(self, x, c_noise, label, second):
        emb, x = self.embed(c_noise, label, second), F.pixel_unshuffle(x, self.patch)
        features = [] if self.direct is None else [x]
        for module in self.enc.values():
            x = self.run(module, x, emb) if isinstance(module, Block) else module(x)
            features.append(x)
        return features, emb

    def decode(self, features, emb):
        x, skips = features[-1], list(features)
        for name, module in self.dec.items():
            if "_block" in name:
                x = torch.cat([x, skips.pop()], 1)
            if isinstance(module, Block):
                x = self.run(module, x, emb)
        norm, conv = (self.out_norm, self.out_conv) if self.adm else list(self.dec.values())[-2:]
        x = conv(F.silu(norm(x)))
        if self.direct is not None:
            x = x + self.gain(emb)[:, :, None, None] * self.direct(features[0])
        return F.pixel_shuffle(x, self.patch)

    def run(self, block, x, emb):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, x, emb, use_reentrant=False)
        return block(x, emb)


def build(cfg, data):
    """A fresh Denoiser as --net and --width ask for, for samples of `data`."""
    kind, width, label_dim, (first, *sides) = cfg.net, cfg.width, data.label_dim, data.shape
    if kind == "auto":
        kind = "small" if sides else "mlp"
    need(bool(sides) == (kind != "mlp"), f"--net {kind}: toys take mlp, images small, ddpmpp, adm")
    if kind == "mlp":
        net = MLP(first, label_dim, width or 128)
    elif kind == "small":
        net = small_unet(first, sides[0], label_dim, width or 32)
    elif kind == "ddpmpp":
        net = UNet(sides[0], first, label_dim, width or 128, augment_dim=9)
    else:
        net = UNet(sides[0], first, label_dim, width or 192, (1, 2, 3, 4), 3, (32, 16, 8), adm=True)
    return place(Denoiser(net, data.sigma_data, cfg.dtype), cfg)


def small_unet(channels, side, label_dim, width):
    """ADM's blocks on patches that leave 16x16 places or fewer, where the side can be halved so
    often: learned most in a CPU core's minutes."""
    patch = 2
    while side // patch > 16 and side % (2 * patch) == 0:
        patch *= 2
    grid = side // patch
    mult = [2**i for i in range(3) if grid % 2**i == 0]
    # a patch of 4x4 colours has 48 numbers, the network 32 channels: it wants the direct path
    return UNet(side, channels, label_dim, width, mult, 1, (grid // 2,), 0, True, patch, patch > 2)


def place(network, cfg):
    """The network on --device, compiled if --compile says so."""
    network.to(pick_device(cfg))
    if isinstance(network, Denoiser) and len(network.shape) == 3:
        network.net.recompute = cfg.recompute
        for block in network.net.modules():
            block.dropout = getattr(cfg, "dropout", 0.0)
    if cfg.compile:
        network.compile()
    return network


def generate(G, z, label=None):
    """One call: unit noise z (B, ...) to samples x of the same shape, from level G.sigma_init."""
    return G(G.sigma_init * z, level(z, G.sigma_init), label)


@torch.no_grad()
def update_ema(ema, G, decay, step):
    """Move the average `ema` towards G, early steps counting less; buffers are copied."""
    decay = min(decay, (step + 1) / (step + 10))
    torch._foreach_lerp_(list(ema.parameters()), list(G.parameters()), 1 - decay)
    for mine, new in zip(ema.buffers(), G.buffers()):
        mine.copy_(new)


def set_lr(optimizer, lr, progress, floor=0.0, warmup=0.0):
    """Rate at progress in [0, 1]: up over warmup, constant, in the last half down to floor * lr."""
    factor = max(min(1.0, 2 * (1 - progress)), floor)
    if progress < warmup:
        factor = (progress + 1e-9) / warmup
    for group in optimizer.param_groups:
        group["lr"] = lr * factor


# ---- 5. teachers ---------------------------------------------------------------------------------


def in_parts(function, *tensors, most=None):
    """function(*tensors) of tensors (N, ...), a None staying None, in parts that fit any memory."""
    size, parts = min(1000 if tensors[0].ndim == 2 else 64, most or 1000), []
    for i in range(0, len(tensors[0]), size):
        parts.append(function(*[t if t is None else t[i:i + size] for t in tensors]))
    return torch.cat(parts)


@torch.no_grad()
def heun_sample(denoiser, z, label=None, steps=18, sigma_min=0.002, sigma_max=80.0, churn=0.0):
    """EDM's second-order sampler (EDM, Algorithm 2): unit noise z (B, ...) to samples of z's shape
    by 2 steps - 1 network calls. churn > 0 adds fresh noise. The state is kept in float64."""
    def slope_at(x, sigma):                             # dx/dsigma (EDM, Eqs. 1 and 3)
        return (x - denoiser(x.to(z.dtype), level(z, sigma), label).double()) / sigma

    sigmas = karras_sigmas(steps, sigma_min, sigma_max).tolist()
    x = z.double() * sigmas[0]
    for sigma, lower in zip(sigmas, sigmas[1:]):
        if churn and 0.05 <= sigma <= 50:               # EDM's S_min and S_max, S_noise = 1.003
            up = sigma * (1 + min(churn / steps, 2**0.5 - 1))
            x = x + (up**2 - sigma**2) ** 0.5 * 1.003 * torch.randn_like(z)
            sigma = up
        slope = slope_at(x, sigma)
        x_next = x + (lower - sigma) * slope
        if lower > 0:
            x_next = x + (lower - sigma) * (slope + slope_at(x_next, lower)) / 2
        x = x_next
    return x.to(z.dtype)


def teacher_samples(cfg, teacher, z, label, sigma_max):
    """What the teacher's ODE makes of noise z (N, ...) from sigma_max, by 35 calls each."""
    solve = functools.partial(heun_sample, teacher, sigma_min=cfg.sigma_min, sigma_max=sigma_max)
    return in_parts(solve, z, label, most=cfg.batch // cfg.accumulate)


def teacher_pairs(cfg, data, teacher, count):
    """`count` pairs of unit noise z and the end x of the teacher's ODE from there, as (z, label or
    None, x), over a GiB on the CPU; 1000 a file beside the runs: an interrupted call goes on."""
    parts, device = [], pick_device(cfg)

    def make(seed, n):
        torch.manual_seed(seed)
        z, label = torch.randn(n, *data.shape, device=device), draw_label(n, data, device)
        return z, label, teacher_samples(cfg, teacher, z, label, cfg.sigma_init)

    with fork_rng(device):                              # the caller's random numbers stay the same
        key = checksum([cfg.sigma_min, cfg.sigma_init, data.class_weights], *make(0, 4))
        for i in tqdm(range(0, count, 1000), "pairs", disable=rank() > 0, ncols=79):
            n = min(1000, count - i)
            path = runs_folder(cfg) / f"pairs-{cfg.data}-{key}" / f"{i}-{n}.pt"
            if not path.exists():
                part = make(i, n)
                write_atomically(path, lambda f: torch.save(part, f))
            parts.append(load_tensors(path))
    keep = device if count * math.prod(data.shape) <= 2**28 else "cpu"      # floats of 4 bytes
    return [None if t[0] is None else torch.cat(t).to(keep) for t in zip(*parts)]


def checksum(facts, *tensors):
    """Eight letters that stand for plain facts and for the contents of tensors."""
    key = hashlib.sha256(json.dumps(facts).encode())
    for t in tensors:
        if t is not None:
            key.update(t.detach().cpu().contiguous().numpy().tobytes())
    return key.hexdigest()[:8]


def load_tensors(path):
    """What torch.save wrote; UserError if it is damaged."""
    with blame(f"{path} is damaged, missing, or no file of onestep"):
        return torch.load(path, map_location="cpu", weights_only=True)


# What sampling and saving want to know of any student, beside its weights.
ATTRIBUTES = ("shape", "label_dim", "class_weights", "sigma_data", "sigma_init", "levels", "most")


def save_denoiser(path, network, cfg):
    """Write ema.pt: plain tensors, numbers and strings, so that it loads with weights_only=True."""
    saved = dict(onestep=2, model=network.state_dict(), config=dataclasses.asdict(cfg))
    saved |= {name: getattr(network, name, None) for name in ATTRIBUTES}
    if isinstance(network, Denoiser):
        saved |= dict(kind=type(network.net).__name__, spec=network.net.spec)
    write_atomically(path, lambda f: torch.save(saved, f))


def load_denoiser(path, cfg, network=None):
    """The network of an ema.pt, of a run's folder, or of EDM's .pkl; a network of your own is
    filled if it is given. Raises UserError for anything else."""
    if str(path).endswith(".pkl"):
        return load_edm(path, cfg)
    path = Path(path) / "ema.pt" if Path(path).is_dir() else Path(path)
    saved = load_tensors(path)
    need(isinstance(saved, dict) and saved.get("onestep") == 2, f"{path} is no ema.pt of onestep 2")
    need(network or "kind" in saved, f"{path} has a network of your own; pass it as `network`")
    with blame(f"{path} does not fit its network"):
        if network is None:
            net = {"MLP": MLP, "UNet": UNet}[saved["kind"]](**saved["spec"])
            network = Denoiser(net, saved["sigma_data"], cfg.dtype)
        network.load_state_dict(saved["model"])
        vars(network).update({name: saved[name] for name in ("config", *ATTRIBUTES)})
    return place(network.eval(), cfg)


class _Inert(dict):
    """Stands for every class and function of a pickle: keeps what it is given, does nothing."""

    def __init__(self, *args):
        if args and isinstance(args[0], dict):          # EDM's modules: all is in one argument
            vars(self).update(args[0])

    def __setstate__(self, state):
        self.state = state


def _tensor(storage, offset, size, stride, *_):
    flat = torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    need(0 <= offset <= last < len(flat), "a tensor lies outside of its storage")
    return flat.as_strided(size, stride, offset)


class _EdmReader(pickle._Unpickler):
    """Reads a pickle as data: nothing in it is imported or called but these harmless names. Only
    string keys are kept, and no sets: to hash a hostile key may take for ever."""
    harmless = {
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        "torch.storage._load_from_bytes": lambda b: torch.load(io.BytesIO(b), weights_only=True)}

    def find_class(self, module, name):
        return self.harmless.get(f"{module}.{name}", _Inert)

    def set_items(self, items):
        pairs = zip(items[::2], items[1::2])
        self.stack[-1].update({key: value for key, value in pairs if isinstance(key, str)})

    dispatch = pickle._Unpickler.dispatch | {
        pickle.SETITEM[0]: lambda self: self.set_items([self.stack.pop(-2), self.stack.pop()]),
        pickle.SETITEMS[0]: lambda self: self.set_items(self.pop_mark()),
        pickle.ADDITEMS[0]: pickle._Unpickler.pop_mark}
    del dispatch[pickle.FROZENSET[0]], dispatch[pickle.DICT[0]]


def edm_weights(module, prefix="", depth=0):
    """{name: tensor} of all parameters and buffers of a module that _EdmReader gave."""
    need(depth < 8, "its modules contain one another")
    found = module.state["_parameters"] | module.state["_buffers"]
    found = {prefix + name: t for name, t in found.items() if t is not None}
    for name, child in module.state["_modules"].items():
        found |= edm_weights(child, f"{prefix}{name}.", depth + 1)
    return found


def load_edm(path, cfg):
    """The Denoiser of an official EDM checkpoint (.pkl), read as data: nothing in it is run, and
    EDM's source is not needed. Without EDM's dropout. Raises UserError for any other file."""
    with blame(f"{path} is no EDM checkpoint"):
        with open(path, "rb") as f:
            outer = _EdmReader(f).load()["ema"]
        name = outer.class_name[:40] if isinstance(outer.class_name, str) else "unknown"
        need(name != "Precond", "it is EDM2's, which is not supported")
        need(name == "EDMPrecond", f"its network is {name!r}, not EDM's EDMPrecond")
        known, inner = outer.state, outer.state["_modules"]["model"]
        # its only filter is [1, 1], which Block.resize knows
        weights = {name: t for name, t in edm_weights(inner).items() if t.shape != (1, 1, 2, 2)}
        size = sum(t.numel() for t in weights.values())
        need(size <= os.path.getsize(path), "it is too short for its weights")
        adm = inner.class_name == "DhariwalUNet"
        how = dict(model_channels=128, channel_mult=[1, 2, 2, 2], num_blocks=4, augment_dim=0,
                   attn_resolutions=[16])
        if adm:
            how |= dict(model_channels=192, channel_mult=[1, 2, 3, 4], num_blocks=3,
                        attn_resolutions=[32, 16, 8])
        how |= inner.state["_init_kwargs"]              # what its modules were made with
        need(len(how["channel_mult"]) < 9 and how["num_blocks"] < 99, "it is too deep")
        with torch.device("meta"):
            net = UNet(known["img_resolution"], known["img_channels"], known["label_dim"],
                       how["model_channels"], how["channel_mult"], how["num_blocks"],
                       how["attn_resolutions"], how["augment_dim"], adm)
        weights = {name: t.float().contiguous() for name, t in weights.items()}
        with blame("its network is neither DDPM++ nor ADM (the -vp and -adm files are)"):
            net.load_state_dict(weights, assign=True)
        denoiser = Denoiser(net, float(known["sigma_data"]), cfg.dtype)
        need(0 < denoiser.sigma_data < math.inf, "its sigma_data is no positive number")
    denoiser.config = {}
    return place(denoiser.eval(), cfg)


def load_teacher(cfg, data, teacher=None):
    """The frozen denoiser to distil: the one that is given, or --teacher's, `exact` being a toy's
    closed form, or a network fitted to the data. Raises UserError if it does not fit the data."""
    exact = data if isinstance(data, GaussianMixture) else None
    if teacher is None and cfg.teacher == "exact":
        need(exact, "--teacher exact needs a toy: images have no closed form")
        teacher = exact
    elif teacher is None:
        teacher = load_denoiser(cfg.teacher, cfg) if cfg.teacher else fit_teacher(cfg, data, exact)
    if isinstance(teacher, Denoiser):
        made, wanted = [f"{tuple(d.shape)} in {d.label_dim} classes" for d in (teacher, data)]
        need(made == wanted, f"the teacher makes {made}, the data is {wanted}: see --data, --cond")
    need(callable(teacher), "teacher is no denoiser D(x_t, sigma, label); paths go into --teacher")
    if isinstance(teacher, nn.Module):
        teacher.eval().to(pick_device(cfg)).requires_grad_(False)
    with fork_rng(pick_device(cfg)):                    # the caller's random numbers stay the same
        x = torch.randn(2, *data.shape, device=pick_device(cfg))
        answer = teacher(x, level(x, cfg.sigma_min), draw_label(2, data, x.device))
    need(torch.is_tensor(answer) and answer.shape == x.shape, "the teacher gives "
         f"{type(answer).__name__} {getattr(answer, 'shape', '')} for x_t {x.shape}")
    need(answer.isfinite().all(), "the teacher gives numbers that are not finite")
    return teacher


def initial_student(cfg, data, teacher=None, student=None):
    """A trainable copy of the teacher, or of a network fitted to its answers if it is no Denoiser;
    or the module that is given. It gets what sampling and saving want to know (ATTRIBUTES)."""
    need(student is None or student is not teacher, "student and teacher are one: pass a copy")
    if student is None:
        source = teacher if isinstance(teacher, Denoiser) else fit_teacher(cfg, data, teacher)
        student = copy.deepcopy(source)
    student = place(student.train().requires_grad_(True), cfg)
    for name in ("shape", "label_dim", "class_weights"):
        setattr(student, name, getattr(data, name))
    if not hasattr(student, "sigma_data"):              # a Denoiser has the one it was made for
        student.sigma_data = data.sigma_data
    student.sigma_init, student.levels = cfg.sigma_init, [cfg.sigma_init]
    student.most = cfg.batch // cfg.accumulate
    return student


def fit_teacher(cfg, data, exact=None):
    """A Denoiser fitted to the data, or to the answers of `exact`, a denoiser. It is kept in a
    folder named by settings, samples, answers and code: a later call loads it, or goes on."""
    toy, large = len(data.shape) == 1, cfg.net in ("ddpmpp", "adm")
    lr = 2e-3 if toy else 4e-3
    same = dict(data=cfg.data, net=cfg.net, width=cfg.width, cond=cfg.cond, dtype=cfg.dtype,
                steps=cfg.teacher_steps, minutes=cfg.minutes / 2, sigma_max=cfg.sigma_max,
                sigma_min=cfg.sigma_min, lr=1e-3 if large else lr, ema=0.99 if toy else 0.999,
                batch=512 if toy or large else 32, accumulate=1)
    while not toy and same["batch"] / same["accumulate"] > cfg.batch / cfg.accumulate:
        same["accumulate"] *= 2                         # no part is larger than the student's
    same["batch"] -= same["batch"] % (same["accumulate"] * processes())
    with fork_rng(pick_device(cfg)):                    # the caller's random numbers stay the same
        torch.manual_seed(0)
        x, label = data.sample(256)
        sigma = karras(uniform(x), cfg.sigma_min, cfg.sigma_max)
        answers = None if exact is None else exact(x + sigma, sigma, label)
        facts = [same, *map(inspect.getsource, (build, small_unet, train_teacher))]
        folder = runs_folder(cfg) / f"teacher-{cfg.data}-{checksum(facts, x, label, answers)}"
        if cfg.resume and getattr(cfg, "fitted", None):
            folder = Path(cfg.fitted)
        fit = Shared(**same, out=str(folder), resume=True, device=cfg.device, compile=cfg.compile,
                     recompute=cfg.recompute)
        done, = largest([(folder / "metrics.json").exists()])
        if not done:
            train_teacher(fit, data, exact)
    cfg.fitted = str(folder)
    return load_denoiser(folder, cfg)


def train_teacher(fit, data, exact):
    """The loop of fit_teacher, with the flags `fit`."""
    begin(fit, "teacher")
    D = initial_student(fit, data, student=build(fit, data))
    ema = copy.deepcopy(D).eval().requires_grad_(False)
    opt = torch.optim.Adam(D.parameters(), betas=(0.9, 0.99), fused=True)
    panels, _, label_show = gallery(fit, data)
    run = Run(fit, "teacher", D=D, ema=ema, opt=opt)
    for step in run.steps():
        set_lr(opt, fit.lr, run.progress, warmup=0.05)
        for _ in range(fit.accumulate):
            x, label = data.sample(run.part)
            sigma = lognormal_sigma(x)
            if fit.net not in ("ddpmpp", "adm"):        # few updates: the levels that decide most
                sigma = lognormal_sigma(x, mean=0.0 if x.shape[1] == 1 else -0.6)   # grey; colour
            if len(data.shape) == 1:
                sigma = karras(uniform(x), fit.sigma_min, fit.sigma_max)
            x_t = x + sigma * torch.randn_like(x)
            target = x if exact is None else exact(x_t, sigma, label)   # the best answer, if known
            loss = denoising_loss(D(x_t, sigma, label), target, sigma, data.sigma_data).mean()
            (loss / fit.accumulate).backward()
        opt.step()
        opt.zero_grad()
        update_ema(ema, D, fit.ema, step)
        run.log(loss=loss)
        if step == 0 and run.due():
            run.show(panels, label_show)                # so that one sees at once what was read
            run.drawing = 0.0                           # no more of them: for the time to go
    if rank() == 0:
        run.finish({})
    largest([0])                                        # the others wait for the first one's files


# ---- 6. the weighting op -------------------------------------------------------------------------

# One block a sample, two passes over it; the second read of d_real comes from the cache.
WEIGHTING_CUDA = r"""
extern "C" __global__ void weighted_score_gradient(const float* x, const float* d_real,
        const float* d_fake, const float* h, float* g, int size) {
    __shared__ float sums[1024];
    const long long start = (long long)blockIdx.x * size;
    float sum = 0;
    for (int i = threadIdx.x; i < size; i += 1024)
        sum += fabsf(x[start + i] - d_real[start + i]);
    sums[threadIdx.x] = sum;
    for (int half = 512; half > 0; half /= 2) {         // a tree: the total ends up in sums[0]
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    __syncthreads();
    const float weight = h[blockIdx.x] / (sums[0] / size);
    for (int i = threadIdx.x; i < size; i += 1024) {
        const float v = weight * (d_fake[start + i] - d_real[start + i]);
        g[start + i] = isfinite(v) ? v : 0.f;
    }
}
"""


@torch.no_grad()
def weighted_score_gradient(x, d_real, d_fake, h):
    """The student's gradient in its samples, g (B, ...) = h (d_fake - d_real) / mean|x - d_real|:
    distribution matching with DMD's weight (DMD, arXiv 2311.18828, Eqs. 7 and 8).

    x, d_real, d_fake (B, ...) float32: samples, the teacher's and the fake score's estimates of
    them from x_t; h (B,) weights. Elements that are not finite become 0, here and nowhere else. On
    a GPU it is one kernel, elsewhere the last lines. UserError if shapes differ."""
    need(x.shape == d_real.shape == d_fake.shape and h.shape == x.shape[:1],
         f"x {x.shape}, d_real {d_real.shape} and d_fake {d_fake.shape} must agree, h be (B,)")
    kernel = load_kernel() if x.is_cuda and x.numel() else None
    if kernel:
        x, d_real, d_fake, h = [t.float().contiguous() for t in (x, d_real, d_fake, h)]
        g = torch.empty_like(x)
        kernel((len(x), 1, 1), (1024, 1, 1), (x, d_real, d_fake, h, g, x[0].numel()))
        return g
    n = (x - d_real).abs().flatten(1).mean(1)                                       # (B,)
    g = (h / n).view(-1, *[1] * (x.ndim - 1)) * (d_fake - d_real)
    return torch.where(g.isfinite(), g, 0.0)


@functools.cache
def load_kernel():
    """The kernel, compiled by PyTorch's own NVRTC; None, after one warning, if that fails."""
    try:
        from torch.utils import cpp_extension
        cpp_extension.CUDA_HOME = cpp_extension.CUDA_HOME or ""     # asked for, though not by NVRTC
        return torch.cuda._compile_kernel(WEIGHTING_CUDA, "weighted_score_gradient")
    except Exception as e:          # no NVRTC, no such function in this PyTorch, a compiler's error
        warnings.warn(f"the weighting op runs in plain PyTorch, its CUDA kernel failed: {e}")


def loss_with_gradient(x, g):
    """Loss (B,) whose gradient in x (B, ...) is g / (elements of a sample); it is mean(g^2) / 2."""
    return (x - x.detach() + g).square().flatten(1).mean(1) / 2      # x - x is 0: g to the bit


# ---- 7. metrics ----------------------------------------------------------------------------------


@torch.no_grad()
def energy_coefficient(x, y):
    """Szekely and Rizzo's H = (2 E|X-Y| - E|X-X'| - E|Y-Y'|) / (2 E|X-Y|) of samples x (n, ...) and
    y (m, ...): 0 for equal laws, towards 1 for distant ones, free of scale. Without self-pairs,
    hence unbiased and sometimes slightly below 0."""
    def mean(a, b, pairs):
        return sum(torch.cdist(part, b).sum(1).double().sum() for part in a.split(250)) / pairs

    x, y, n, m = x.flatten(1), y.flatten(1), len(x), len(y)
    cross = 2 * mean(x, y, n * m)
    return float((cross - mean(x, x, n * (n - 1)) - mean(y, y, m * (m - 1))) / cross)


@torch.no_grad()
def toy_metrics(x, data):
    """How close samples x (n, ...) are to the data: H against n fresh ones; for a GaussianMixture
    also the share within 3 std of a mode, beside the data's, and the smallest and largest mode
    weight relative to the true one, each sample counted at its nearest mode."""
    y = data.sample(len(x))[0]
    out = dict(H=energy_coefficient(x, y))
    if isinstance(data, GaussianMixture):
        near, k = torch.cdist(torch.cat([x, y]), data.means).min(1)
        inside = (near < 3 * data.std).float().view(2, -1).mean(1).tolist()
        out |= dict(in_3std=inside[0], in_3std_data=inside[1])
        share = torch.bincount(k[:len(x)], minlength=len(data.means)) / len(x) / data.weights
        share = share[data.weights > 0]
        out |= dict(mode_min=float(share.min()), mode_max=float(share.max()))
    return out


def to_uint8(x):
    """[-1, 1] to 0..255, rounded as the data was."""
    return x if x.dtype == torch.uint8 else (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def inception_features(cfg, images):
    """Features (N, 2048) of images, on the CPU, by NVIDIA's TorchScript Inception network."""
    parts, device = [], pick_device(cfg)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                 # TorchScript is the format of this network
        inception = torch.jit.load(cfg.fid, map_location=device).eval()
        for part in tqdm(to_uint8(images).split(64), "inception", leave=False, ncols=79):
            part = part.to(device).expand(-1, 3, -1, -1)
            parts.append(inception(part, return_features=True).float().cpu())
    return torch.cat(parts)


def fid_reference(cfg, data):
    """(name, features (n, 2048) of training images, kept beside the runs, mean and covariance of
    them or of EDM's file --fid_ref). UserError if --fid cannot work: asked before long work."""
    given = not (cfg.fid_ref or "2").isdigit()
    with blame(f"--fid {cfg.fid} with --fid_ref {cfg.fid_ref!r} cannot be used"):
        count = min(len(data.images), 10000 if given else int(cfg.fid_ref or len(data.images)))
        need(min(count, cfg.samples) > 3, "at least 4 images and --samples are needed")
        i = torch.arange(count) * len(data.images) // count     # the first may be of one class
        real = data.images[i]
        network = hashlib.sha256(Path(cfg.fid).read_bytes()).hexdigest()
        key = checksum([count, len(data.images), network], real[:100])
        path = runs_folder(cfg) / f"fidref-{cfg.data}-{key}.pt"
        if not path.exists():
            features = inception_features(cfg, real)
            write_atomically(path, lambda f: torch.save(features, f))
        real = load_tensors(path)
        name = f"train{thousands(count)}"
        mean, cov = real.double().mean(0), real.double().T.cov()
        if given:
            with np.load(cfg.fid_ref) as z:
                mean, cov = [torch.from_numpy(z[name]).double() for name in ("mu", "sigma")]
            name = Path(cfg.fid_ref).stem
        need(mean.shape == real[0].shape, "its features are another network's")
    return name, real, mean, cov


def frechet_distance(mean1, cov1, mean2, cov2):
    """Frechet distance of Gaussians, |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), in float64."""
    values, vectors = torch.linalg.eigh(cov1)           # tr (C1 C2)^(1/2) = tr (root C2 root)^(1/2)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross)


@torch.no_grad()
def precision_recall(real, fake, k=3):
    """Shares (Kynkaanniemi et al., arXiv 1904.06991) of features fake (m, D) within the k-th
    neighbour's distance of some real (n, D), and of real within that of some fake."""
    def share(a, b):
        radius = [torch.cdist(part, b).kthvalue(k + 1, 1).values for part in b.split(500)]
        near = [(torch.cdist(part, b) <= torch.cat(radius)).any(1) for part in a.split(500)]
        return float(torch.cat(near).float().mean())

    return share(fake, real), share(real, fake)


def thousands(n):
    return f"{n // 1000}k" if n % 1000 == 0 else str(n)


def fid(cfg, data, draw):
    """FID of draw(n, label) -> x by --samples samples, precision and recall by up to 10,000. Names
    say it all: fid50k_train50k is 50,000 samples against 50,000 training images, spread evenly."""
    name, real, mean, cov = fid_reference(cfg, data)
    n = cfg.samples
    fake = inception_features(cfg, draw(n, draw_label(n, data, pick_device(cfg))))
    distance = frechet_distance(fake.double().mean(0), fake.double().T.cov(), mean, cov)
    k = min(len(real), n, 10000)
    real = real[torch.arange(k) * len(real) // k]
    precision, recall = precision_recall(real, fake[:k])
    return {f"fid{thousands(n)}_{name}": distance, f"precision{thousands(k)}": precision,
            f"recall{thousands(k)}": recall}


# ---- 8. a run ------------------------------------------------------------------------------------

ANGLE = "coloured by the angle of its noise"
COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999"]


def draw_panels(path, panels, paint):
    """A PNG of panels {title: content} side by side, each by paint(axes, title, content)."""
    from matplotlib.figure import Figure                # no pyplot: no global state
    figure = Figure(figsize=(3.2 * len(panels), 3.4), layout="constrained")
    for ax, title in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        ax.set_title(title, fontsize=9)
        paint(ax, title, panels[title])
    write_atomically(path, lambda f: figure.savefig(f, format="png", dpi=110))


def save_picture(path, panels, label=None, z=None, columns=8):
    """Panels {title: samples} side by side as a PNG: points (n, 2) on the first panel's axes,
    coloured by class if label is given, or images (n, C, H, W) in so many columns. With the noise z
    (n, 2) of the last panel, its points once more, coloured by the angle of z."""
    reach = 1.25 * float(next(iter(panels.values())).abs().max())
    if z is not None and z.ndim == 2:
        panels = {**panels, ANGLE: list(panels.values())[-1]}

    def paint(ax, title, x):
        x = x.detach().float().cpu()
        ax.set(aspect="equal", xticks=[], yticks=[])
        if x.ndim == 2:
            classes = torch.zeros(len(x), 1) if label is None else label[:len(x)]
            color = dict(c=[COLORS[k % len(COLORS)] for k in classes.argmax(1).tolist()])
            if title == ANGLE:
                color = dict(c=torch.atan2(z[:, 1], z[:, 0]).cpu(), cmap="hsv")
            ax.scatter(x[:, 0], x[:, 1], s=1, alpha=0.4, linewidths=0, **color)
            ax.set(xlim=(-reach, reach), ylim=(-reach, reach))
        else:
            wide = min(columns, len(x))
            rows = to_uint8(x[:len(x) // wide * wide]).unflatten(0, (-1, wide))
            grid = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)          # (H, W, C)
            ax.imshow(grid.squeeze(-1).numpy(), cmap="gray", interpolation="nearest")

    draw_panels(path, panels, paint)


def gallery(cfg, data, teacher=None):
    """(panels, z, label): pictures of data and teacher, latents and labels for the student's; of
    images with labels eight of a class a row, for up to ten classes."""
    n = 3000 if len(data.shape) == 1 else 64
    with fork_rng(pick_device(cfg)):
        torch.manual_seed(0)
        x, label = data.sample(n)
        if len(data.shape) > 1 and data.label_dim and isinstance(data, Images):
            places = [(data.labels == k).nonzero()[:, 0] for k in data.labels.unique()[:10]]
            x, label = data.take(torch.cat([i[torch.arange(8) % len(i)] for i in places]))
        z, panels = torch.randn_like(x), {f"data: {cfg.data}": x}
        if teacher is not None:
            shown = teacher_samples(cfg, teacher, z, label, cfg.sigma_max)
            panels["teacher, 35 network calls"] = shown
    return panels, z, label


def fork_rng(device):
    """Inside, random numbers are drawn that come again after it."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


# Under torchrun each process draws its own share of a batch with its own seed, and gradients are
# averaged before each step of an optimiser, so that weights stay equal. Only the first one writes.


def processes():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    return dist.get_rank() if processes() > 1 else 0


def join_processes():
    """Under torchrun: join the others, by NCCL between GPUs, by gloo between CPUs."""
    if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        if rank():
            sys.stdout = open(os.devnull, "w")


def largest(numbers):
    """The largest of the processes' numbers, each of a list; all wait here for each other."""
    t = torch.tensor(numbers, dtype=torch.float64)
    if processes() > 1:
        dist.all_reduce(t, op=dist.ReduceOp.MAX)
    return t.tolist()


def first_alone(function, *args):
    """function(*args), by the first process alone, then by the others: they find its files."""
    if rank():
        largest([0])
    out = function(*args)
    if not rank():
        largest([0])
    return out


def average_gradients(optimizer, *_):
    """Before a step of an optimiser: gradients become the mean of the processes'."""
    params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    flat = torch.cat([p.grad.flatten() for p in params])
    dist.all_reduce(flat)
    for p, part in zip(params, flat.split([p.numel() for p in params])):
        p.grad.copy_(part.view_as(p) / processes())


def write_atomically(path, write):
    """write(file), then rename: a kill or a full disk leaves the old file or the new one."""
    part = Path(f"{path}.{os.getpid()}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())                        # a power cut, too
        os.replace(part, path)
    except (OSError, RuntimeError) as e:                # torch.save's, of a full disk, is unclear
        cause = e if isinstance(e, OSError) else "the disk may be full"
        raise UserError(f"could not write {path}, what was there is kept: {cause}")
    finally:
        part.unlink(missing_ok=True)


def read_json(path):
    """The dictionary in a file, {} if there is none."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return dict(json.loads(Path(path).read_text()))
    return {}


def runs_folder(cfg):
    """Where runs and caches lie: runs/, or the folder that --out is in."""
    return Path(cfg.out).parent if cfg.out else Path("runs")


def run_folder(cfg, script):
    """--out, or runs/<script>-<data>[-flag=value]-<seed>, with flags that differ from presets."""
    now = dataclasses.asdict(cfg)
    chosen = [f.name for f in dataclasses.fields(cfg) if get_args(f.type)]
    plain = type(cfg)(data=cfg.data)
    usual = vars(type(cfg)(data=cfg.data, **{name: now[name] for name in chosen}))
    usual |= {name: getattr(plain, name) for name in chosen}
    names = [name for name in sorted(now.keys() - {*FREE, "seed"}) if now[name] != usual[name]]
    flags = "".join(f"-{name}={now[name]}" for name in names).replace(os.sep, "_")
    if len(flags) > 40:                                 # lines of output have 80 columns
        flags = f"{flags[:30]}-{checksum(flags)}"
    return Path(cfg.out or f"runs/{script}-{cfg.data}{flags}-{cfg.seed}")


def begin(cfg, script):
    """First of all in a train(): refuse what cannot work before any long work, and seed PyTorch."""
    check(cfg)
    cfg.started, folder = time.time(), run_folder(cfg, script)
    torch.manual_seed(cfg.seed)
    old = read_json(folder / "config.json")
    cfg.fitted = old.get("fitted") if cfg.resume else None      # its teacher, whatever --minutes is
    there = folder.is_file() or folder.is_dir() and any(folder.iterdir())
    need(old.get("script") == script or not there,
         f"{folder} exists and is no run's folder of {script}; choose another --out")
    free = (*FREE, "steps", "minutes") if cfg.resume else FREE
    for name in dataclasses.asdict(cfg).keys() & old.keys() - {*free}:
        need(old[name] == getattr(cfg, name), f"{folder} holds a run with --{name} {old[name]}, "
             f"not {getattr(cfg, name)}; choose another --out")
    largest([0])                                        # all have looked before one makes it


class Run:
    """The folder of one run: config.json, log.csv, log.png, samples.png, samples.gif, last.pt (all
    that --resume needs), ema.pt (the student, `ema` in `state`, where all has a state_dict) and
    metrics.json. In a loop over steps(): part, samples of one pass; progress in [0, 1]; device;
    log, due, show. After it: report. on_log is called with each row of log.csv, a dict."""

    def __init__(self, cfg, script, on_log=None, **state):
        self.cfg, self.script, self.on_log, self.state = cfg, script, on_log, state
        self.dir, self.device = run_folder(cfg, script), pick_device(cfg)
        self.part = cfg.batch // cfg.accumulate // processes()
        self.step, self.progress, self.last, self.stop = 0, 0.0, False, 0       # stop: a signal
        self.seconds, self.budget, self.drawing, self.rows, self.history = 0.0, 0.0, 0.0, [], []
        for part in state.values():
            if processes() > 1 and isinstance(part, torch.optim.Optimizer):
                part.register_step_pre_hook(average_gradients)
        torch.manual_seed(cfg.seed + 1_000_003 * rank())
        name = f"onestep-{checksum(str(self.dir.resolve()))}.lock"
        self.held = open(Path(tempfile.gettempdir()) / name, "w")       # until `steps` ends
        try:
            first_alone(self.open)
        except BaseException:                           # a notebook keeps errors, and so the run
            self.held.close()
            raise

    def open(self):
        if not rank():
            self.lock()
        found = (self.dir / "last.pt").exists()
        if found and self.cfg.resume:
            self.restore()
        elif found and not rank():
            aside = f"{self.dir}~{time.strftime('%Y%m%d-%H%M%S')}"
            self.dir.rename(aside)
            print(f"the earlier run in {self.dir} is now {aside}")
        elif self.cfg.resume and self.script != "teacher":
            print(f"nothing to resume in {self.dir}: it begins;\n--out names another run")
        if not rank():
            about = dict(script=self.script, torch=torch.__version__, processes=processes())
            about["fitted"] = getattr(self.cfg, "fitted", None)
            text = json.dumps(dataclasses.asdict(self.cfg) | about, indent=1)
            write_atomically(self.dir / "config.json", lambda f: f.write(text.encode()))

    def lock(self):
        """Keep other processes out of the folder; a second fit of the same teacher waits."""
        try:
            import fcntl
            fcntl.flock(self.held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:                             # Windows has none
            pass
        except BlockingIOError:
            need(self.script == "teacher", f"another process works in {self.dir}; wait for it")
            print(f"waiting for the process that fits {self.dir}", flush=True)
            fcntl.flock(self.held, fcntl.LOCK_EX)

    def steps(self):
        """Yield step numbers to the end of the training. Saves every --every steps, at the end, and
        when Ctrl-C or SIGTERM comes, which then raises KeyboardInterrupt."""
        cfg, first = self.cfg, self.step
        if self.step == 0:                              # what has passed went to data and teacher
            self.budget = max(1.0, 60 * cfg.minutes - (time.time() - cfg.started))
        self.began = time.time() - self.seconds
        length = f"{cfg.minutes:g} minutes" if cfg.minutes else f"{cfg.steps:,} steps"
        coming = f"{self.script} on {cfg.data}: {length}; watch\n{self.dir}/samples.png"
        if self.script == "teacher":
            coming = (f"first a teacher of {cfg.data}, fitted once: {length}; the data:\n"
                      f"{self.dir}/samples.png")
        print(coming)
        with contextlib.ExitStack() as undo:            # at the end, all is as it was before
            undo.callback(torch.set_num_threads, torch.get_num_threads())
            if len(self.state["ema"].shape) == 1:
                torch.set_num_threads(1)                # small matrices: a second one only waits
            if threading.current_thread() is threading.main_thread():
                for number in (signal.SIGINT, signal.SIGTERM):
                    undo.callback(signal.signal, number, signal.signal(number, self.remember))
            undo.callback(self.held.close)
            bar = undo.enter_context(tqdm(total=None if cfg.minutes else cfg.steps, ncols=79,
                                          initial=self.step, desc=self.script, disable=rank() > 0))
            while not self.last:
                self.look_at_clock()
                yield self.step
                bar.update()
                self.end_step()
                self.tell_time(bar, self.step - first)

    def remember(self, number, frame):
        """Let Ctrl-C and SIGTERM wait for the end of the step; a second one does not wait, but for
        torchrun's, which sends it by itself."""
        if self.stop and processes() == 1:
            raise KeyboardInterrupt
        self.stop = int(number)

    def tell_time(self, bar, done):
        """After 15 steps, the first five being slow: about how long the rest will take."""
        if done == 5:
            self.mark = time.time()
        if done == 15 and not self.cfg.minutes:
            pace = (time.time() - self.mark) / 10
            left = pace * (self.cfg.steps - self.step) + 24 * self.drawing
            bar.write(f"{self.script}: about {left:.0f} s to go")

    def end_step(self):
        self.step += 1
        self.seconds = time.time() - self.began
        if len(self.rows) >= 50:
            self.flush()
        stop, = largest([self.stop])                    # processes agree
        if self.step % self.cfg.every == 0 or self.last or stop:
            self.save()
        if stop and not self.last:
            sentence = f"stopped, saved at step {self.step}; go on with --resume"
            raise KeyboardInterrupt(128 + int(stop), sentence)

    def look_at_clock(self):
        """Progress in [0, 1] at a step's start, and whether it is the last; processes agree."""
        self.before, now = self.progress, self.step / self.cfg.steps
        if self.cfg.minutes:
            now = min(1.0, (time.time() - self.began) / self.budget)
        self.progress, = largest([now])
        self.last = self.step + 1 >= self.cfg.steps
        if self.cfg.minutes:                            # the last: the next would end too late
            self.last = 2 * self.progress - self.before >= 1

    def due(self):
        """True 24 times a run: the time for a picture."""
        due = self.step == 0 or self.last or int(24 * self.progress) > int(24 * self.before)
        return due and rank() == 0

    def log(self, **values):
        """Keep a step's scalars; every 50 steps they are checked, averaged and written."""
        self.rows.append({name: torch.as_tensor(v).detach() for name, v in values.items()})

    def flush(self):
        """A row of log.csv, written whole; UserError at the first value that is not finite."""
        if not self.rows:
            return
        names, first = list(self.rows[0]), self.step - len(self.rows)
        table = torch.stack([torch.stack([*row.values()]).float() for row in self.rows]).cpu()
        self.rows = []
        for i, k in (~table.isfinite()).nonzero().tolist():
            raise UserError(f"{names[k]} became {table[i, k]} at step {first + i}; the checkpoint "
                            f"before it is kept in {self.dir}; a lower --lr may help")
        means = table.mean(0).tolist()
        self.history.append([str(self.step), f"{self.seconds:.2f}", *[f"{v:.6g}" for v in means]])
        if self.on_log and rank() == 0:
            self.on_log(dict(step=self.step, **dict(zip(names, means))))
        if rank() == 0:
            lines = [",".join(row) + "\n" for row in [["step", "seconds", *names], *self.history]]
            write_atomically(self.dir / "log.csv", lambda f: f.write("".join(lines).encode()))

    def show(self, panels, label=None, z=None):
        """samples.png, and a frame of samples.gif, by save_picture."""
        path, start = self.dir / "samples" / f"{self.step + 1:07d}.png", time.time()
        save_picture(path, panels, label, z)
        write_atomically(self.dir / "samples.png", lambda f: f.write(path.read_bytes()))
        self.drawing = time.time() - start

    KEPT = ("step", "last", "progress", "budget", "seconds", "history")

    def save(self):
        """Checkpoint: ema.pt, then last.pt. Refuses weights that are not finite."""
        self.flush()
        ema = self.state["ema"]
        good = all(p.isfinite().all() for p in ema.parameters())
        need(good, f"weights are not finite at step {self.step}; {self.dir} keeps those before it")
        saved = {name: getattr(self, name) for name in self.KEPT} | dict(minutes=self.cfg.minutes)
        saved["rng"] = [torch.get_rng_state()]
        if self.device.type == "cuda":
            saved["rng"].append(torch.cuda.get_rng_state(self.device))
        saved["state"] = {name: part.state_dict() for name, part in self.state.items()}
        if rank() == 0:
            save_denoiser(self.dir / "ema.pt", ema, self.cfg)
            write_atomically(self.dir / "last.pt", lambda f: torch.save(saved, f))
            if self.history:
                draw_log(self.dir)
        largest([0])

    def restore(self):
        saved = load_tensors(self.dir / "last.pt")
        with blame(f"{self.dir}/last.pt is of other code; choose another --out to start afresh"):
            for name, part in self.state.items():
                part.load_state_dict(saved["state"][name])
            vars(self).update({name: saved[name] for name in self.KEPT})
        more = 60 * (self.cfg.minutes - saved["minutes"])
        self.budget += more
        self.last = self.last and more <= 0 if self.cfg.minutes else self.step >= self.cfg.steps
        torch.manual_seed(self.cfg.seed + 1_000_003 * rank() + self.step)
        if processes() == 1:
            torch.set_rng_state(saved["rng"][0])
            for state in saved["rng"][1:]:
                torch.cuda.set_rng_state(state, self.device)

    def finish(self, metrics):
        """metrics.json, and samples.gif: the run's pictures one after the other."""
        about = dict(steps=self.step, train_seconds=self.seconds, device=str(self.device))
        if self.device.type == "cuda":
            about["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        text = json.dumps(metrics | about, indent=1)
        write_atomically(self.dir / "metrics.json", lambda f: f.write(text.encode()))
        files = sorted((self.dir / "samples").glob("*.png"))
        frames = [Image.open(file).convert("P", palette=1, colors=32) for file in files]
        if frames:
            write_atomically(self.dir / "samples.gif", lambda f: frames[0].save(
                f, "GIF", save_all=True, append_images=frames[1:], duration=200, loop=0))

    def report(self, data, draw, **metrics):
        """Measure the student draw(n, label) -> x; write and print the figures, those given among
        them, and where the picture is."""
        if rank():
            return
        n = self.cfg.samples if len(data.shape) == 1 else min(self.cfg.samples, 2000)
        with fork_rng(self.device):
            torch.manual_seed(self.cfg.seed + 10**6)    # other numbers than the training's first
            metrics |= toy_metrics(draw(n, draw_label(n, data, self.device)), data)
            if self.cfg.fid:
                metrics |= fid(self.cfg, data, draw)
        self.finish(metrics)
        for name, value in metrics.items():
            print(f"{name:24} {value:.5f}" if isinstance(value, float) else f"{name:24} {value}")
        print(f"{self.step} steps in {self.seconds:.0f} s")
        if isinstance(self.state["ema"], Denoiser):     # one of your own: sample() in Python
            print(f"more samples: python {self.script}.py --sample {self.dir}")
        print(f"{self.dir}/samples.png")


def draw_log(folder):
    """log.png: each column of log.csv over the steps."""
    names, *rows = [line.split(",") for line in (folder / "log.csv").read_text().splitlines()]
    step, _, *columns = np.array(rows, float).T
    draw_panels(folder / "log.png", dict(zip(names[2:], columns)),
                lambda ax, title, column: ax.plot(step, column, color=COLORS[0], linewidth=1))


def draw(cfg, sample):
    """--sample: --samples of the student in a run's folder, as draw.npy and draw.png there."""
    check(cfg)
    student = load_denoiser(cfg.sample, cfg)
    student.config = dataclasses.asdict(cfg)            # the run's own, and the flags given now
    torch.manual_seed(cfg.seed)
    x = sample(student, cfg.samples)
    write_atomically(Path(cfg.sample) / "draw.npy", lambda f: np.save(f, x.cpu().numpy()))
    shown = x if x.ndim == 2 else x[:64]
    save_picture(Path(cfg.sample) / "draw.png", {f"{len(shown):,} samples": shown})
    print(f"{len(x):,} samples\n{cfg.sample}/draw.npy\n{cfg.sample}/draw.png")


if __name__ == "__main__":
    print(__doc__)
