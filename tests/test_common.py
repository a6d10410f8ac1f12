"""common.py against closed forms: mixtures, noise levels, sampler, networks, metrics, data files, command line."""
import dataclasses
import importlib
import io
import json
import math
import re
import tarfile

import numpy as np
import pytest
import torch

import common
import fdistill
from common import (EMA, MLP, TOYS, Denoiser, GaussianMixture, Shared, UNet, UserError, energy_coefficient, frechet_distance,
                    heun_sample, karras_sigmas, load_data, parse)
from conftest import main_in_process

F64 = torch.float64


def mixture(dim=2, std=0.3):
    return GaussianMixture(torch.randn(5, dim, dtype=F64), std, weights=torch.tensor([1, 2, 3, 4, 5.0]), groups=torch.tensor([0, 0, 1, 1, 2]))


# ---- the exact world ----


@pytest.mark.parametrize("std", [0.3, 0.0])
@pytest.mark.parametrize("labelled", [False, True])
def test_tweedie(labelled, std):
    """D(x, sigma) = x + sigma^2 grad log p(x; sigma) and score = grad log p, by autograd in float64, also per class."""
    m, x, sigma = mixture(std=std), torch.randn(50, 2, dtype=F64, requires_grad=True), torch.rand(50, dtype=F64) + 0.05
    label = torch.nn.functional.one_hot(torch.arange(50) % 3, 3).to(F64) if labelled else None
    grad, = torch.autograd.grad(m.log_prob(x, sigma, label).sum(), x)
    torch.testing.assert_close(m.denoise(x, sigma, label), x + sigma[:, None] ** 2 * grad, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(m.score(x, sigma, label), grad, rtol=1e-10, atol=1e-10)


def test_density_is_normalised_and_labels_partition_it():
    """The density integrates to 1, and the class densities weighted by class sum to the whole."""
    m = mixture(dim=1)
    x = torch.linspace(-12, 12, 20001, dtype=F64)[:, None]
    sigma = torch.full((len(x),), 0.4, dtype=F64)
    p = m.log_prob(x, sigma).exp()
    assert abs(torch.trapezoid(p, x[:, 0]) - 1) < 1e-9
    parts = sum(w * m.log_prob(x, sigma, torch.eye(3, dtype=F64)[k].expand(len(x), 3)).exp() for k, w in enumerate([3 / 15, 7 / 15, 5 / 15]))
    torch.testing.assert_close(parts, p)


def test_small_sigma_keeps_its_digits():
    """float32 at sigma 0.002 agrees with float64: distances are not formed by cancellation."""
    m = GaussianMixture(torch.randn(3000, 2))
    x = (m.means[:64] + 0.002 * torch.randn(64, 2))
    sigma = torch.full((64,), 0.002)
    exact = GaussianMixture(m.means.double()).denoise(x.double(), sigma.double())
    torch.testing.assert_close(m.denoise(x, sigma).double(), exact, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", TOYS)
def test_toys(name):
    """Each toy's samples have its mean and sigma_data, its labels are one-hot in the right proportion, it fits in [-2, 2]."""
    m = TOYS[name]
    x, label = m.sample(20000)
    assert x.shape == (20000, 2) and label.shape == (20000, m.label_dim) and (label.sum(1) == 1).all()
    assert x.abs().max() < 2 and abs((x - x.mean(0)).square().mean().sqrt() - m.sigma_data) < 0.01
    share = torch.zeros(m.label_dim).index_add_(0, m.groups, m.weights)
    torch.testing.assert_close(label.mean(0), share, rtol=0, atol=0.015)
    near = torch.cdist(x, m.means).argmin(1)
    if name in ("ring", "grid", "unequal"):
        assert (m.groups[near] == label.argmax(1)).float().mean() > 0.999
    torch.testing.assert_close(m.draw_label(20000).mean(0), share, rtol=0, atol=0.015)


def test_without_cond_there_are_no_labels():
    """load_data drops labels unless --cond, and does not touch the shared toy."""
    plain, cond = load_data(Shared(device="cpu")), load_data(Shared(device="cpu", cond=True))
    assert plain.sample(3)[1] is None and plain.draw_label(3) is None and cond.sample(3)[1].shape == (3, 8)
    assert TOYS["ring"].label_dim == 8


@pytest.mark.parametrize("bad", [dict(std=-1.0), dict(weights=[1.0]), dict(weights=[0.0, 0.0]), dict(groups=[0])])
def test_bad_mixture(bad):
    with pytest.raises(UserError):
        GaussianMixture(torch.zeros(2, 2), **bad)


# ---- noise levels and sampler ----


def test_karras_levels():
    """The published 18-step grid: ends at 80, 0.002 and 0; falls monotonically; level 500 of 1000 is 2.527."""
    s = karras_sigmas(18, 0.002, 80)
    assert len(s) == 19 and abs(s[0] - 80) < 1e-9 and abs(s[-2] - 0.002) < 1e-12 and s[-1] == 0 and (s.diff() < 0).all()
    assert abs(karras_sigmas(1000, 0.002, 80)[999 - 500] - 2.527) < 1e-3


def test_heun_is_second_order():
    """On one Gaussian the flow map is closed form; halving the step divides the error by four."""
    m, z = GaussianMixture(torch.tensor([[0.3, -0.2]], dtype=F64), 0.5), torch.randn(100, 2, dtype=F64)
    exact = m.means + (80 * z - m.means) * 0.5 / math.sqrt(0.25 + 80**2)
    error = [(heun_sample(m, z, steps=n) - exact).abs().mean().item() for n in (16, 32, 64, 128)]
    assert error[-1] < 1e-3
    for coarse, fine in zip(error, error[1:]):
        assert 3.2 < coarse / fine < 6


@pytest.mark.parametrize("churn", [0.0, 20.0])
def test_heun_recovers_the_mixture(churn):
    """Samples by the exact denoiser have the data's law, deterministic and with churn."""
    m = TOYS["unequal"]
    x = heun_sample(m, torch.randn(4000, 2), steps=40, sigma_min=0.01, sigma_max=20, churn=churn, s_min=0.02, s_noise=1.0)
    assert energy_coefficient(x, m.sample(4000)[0]) < 0.001


# ---- networks ----


def test_unet_sizes():
    """Parameter counts of EDM's CIFAR-10 networks; every tensor but EDM's 8 filter buffers."""
    for label_dim, count, tensors in ((0, 55_733_891, 417), (10, 55_735_299, 419)):
        net = UNet.ddpmpp(label_dim=label_dim)
        assert sum(p.numel() for p in net.parameters()) == count and len(net.state_dict()) == tensors
    assert net.state_dict()["dec.32x32_block4.conv0.weight"].shape == (256, 384, 3, 3)


def test_adm_size():
    """ImageNet-64's network has 295,899,267 parameters (built without memory)."""
    with torch.device("meta"):
        net = UNet.adm()
    assert sum(p.numel() for p in net.parameters()) == 295_899_267 and len(net.state_dict()) == 541


@pytest.mark.parametrize("adm", [False, True])
def test_unet_at_start(adm):
    """An untrained network predicts (almost) nothing: D = c_skip x, so that training starts at the best linear guess."""
    net = Denoiser(UNet(16, 3, 4, width=16, mult=(1, 2), blocks=1, attention=(8,), adm=adm))
    x, sigma = torch.randn(2, 3, 16, 16), torch.tensor([0.5, 2.0])
    want = common.bcast(0.25 / (sigma**2 + 0.25), x) * x
    torch.testing.assert_close(net(x, sigma, torch.eye(4)[:2]), want, rtol=0, atol=0 if adm else 1e-3)


@pytest.mark.parametrize("net", [MLP(2, 3, width=16), UNet(8, 1, 3, width=8, mult=(1, 2), blocks=1, attention=())])
def test_features_are_the_same_from_both_calls(net):
    """features="only" and "also" agree, and asking for them does not change x; a missing label counts as zeros."""
    d = Denoiser(net)
    x, sigma = torch.randn(4, *net.shape), torch.rand(4) + 0.1
    out, feature = d(x, sigma, torch.zeros(4, 3), features="also")
    assert torch.equal(out, d(x, sigma)) and torch.equal(feature, d(x, sigma, features="only"))
    assert feature.shape[1:] == net.feature_shape()


def test_attention_is_softmax_attention():
    """A block's attention equals softmax(q k / sqrt(c)) v written out, with q, k, v the fastest of the channels."""
    block = common.Block(8, 8, 4, adm=False, dropout=0.0, attention=True)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, emb = torch.randn(2, 8, 3, 3), torch.randn(2, 4)
    heads, block.heads = block.heads, 0
    before = block(x, emb)
    block.heads = heads
    qkv = block.qkv(block.norm2(before)).reshape(2, 8, 3, 9)
    weight = torch.einsum("bcq,bck->bqk", qkv[:, :, 0], qkv[:, :, 1] / 8**0.5).softmax(2)
    a = torch.einsum("bqk,bck->bcq", weight, qkv[:, :, 2]).reshape(2, 8, 3, 3)
    torch.testing.assert_close(block(x, emb), (block.proj(a) + before) * 0.5**0.5)


@pytest.mark.parametrize("width, adm", [(36, False), (100, True), (4, False)])
def test_unet_of_any_width(width, adm):
    """Widths that EDM's group and head counts do not divide work too."""
    net = Denoiser(UNet(8, 3, 0, width=width, mult=(1, 2), blocks=1, attention=(4,), adm=adm))
    x, feature = net(torch.randn(2, 3, 8, 8), torch.ones(2), features="also")
    assert x.shape == (2, 3, 8, 8) and fdistill.make_discriminator(net.net.feature_shape())(feature).shape == (2, 1)


def test_ema():
    """The average follows decay * old + (1 - decay) * new once its warm-up is over."""
    net = torch.nn.Linear(2, 2)
    ema = EMA(net, 0.5)
    for _ in range(20):
        ema.update(net)
    old = ema.model.weight.clone()
    with torch.no_grad():
        net.weight += 1
    ema.update(net)
    torch.testing.assert_close(ema.model.weight, 0.5 * old + 0.5 * net.weight)
    assert not ema.model.weight.requires_grad


def test_bf16_denoiser_returns_float32():
    d = Denoiser(MLP(width=16), dtype="bf16")
    assert d(torch.randn(4, 2), torch.ones(4)).dtype == torch.float32


# ---- metrics ----


def test_energy_coefficient():
    """0 within noise for equal laws, free of scale, and for two far points 1."""
    x, y = torch.randn(4000, 2), torch.randn(4000, 2)
    assert abs(energy_coefficient(x, y)) < 1e-3
    z = y + 0.3
    assert abs(energy_coefficient(x, z) - energy_coefficient(7 * x, 7 * z)) < 1e-6 and energy_coefficient(x, z) > 0.005
    assert energy_coefficient(torch.randn(50, 2) * 1e-3, torch.randn(50, 2) * 1e-3 + 100) > 0.999


def test_toy_metrics_know_data_from_a_missing_mode():
    """Fresh data: H near 0, 98.9 % near a mode. Without one mode of eight: H near the stated 0.009, forward KL up."""
    m = TOYS["ring"]
    good = common.toy_metrics(m.sample(10000)[0], m)
    assert abs(good["H"]) < 3e-4 and abs(good["in_3std"] - 0.989) < 0.003 and good["mode_min"] > 0.9
    x, label = m.sample(10000)
    bad = common.toy_metrics(x[label[:, 0] == 0], m)
    assert 0.006 < bad["H"] < 0.012 and bad["mode_min"] < 0.01
    assert bad["fkl"] > good["fkl"] + 0.1 and bad["rkl"] > good["rkl"] + 0.05
    # blurred by std modes hardly overlap: int q log 2q/(p+q) + p log 2p/(p+q) with q = 8/7 p on seven modes, 0 on one
    exact = 8 / 7 * 7 / 8 * math.log(2 * 8 / 15) + 7 / 8 * math.log(2 * 7 / 15) + math.log(2) / 8
    assert abs(bad["js"] - exact) < 0.02 and abs(good["js"]) < 0.02


def test_frechet_distance_of_gaussians():
    """Commuting covariances have |m|^2 + |sqrt C1 - sqrt C2|^2; others agree with the eigenvalues of the product."""
    q, _ = torch.linalg.qr(torch.randn(6, 6, dtype=F64))
    a, b, m = torch.rand(6, dtype=F64) + 0.1, torch.rand(6, dtype=F64) + 0.1, torch.randn(6, dtype=F64)
    got = frechet_distance(m, q * a @ q.T, 0 * m, q * b @ q.T)
    assert abs(got - float(m @ m + (a.sqrt() - b.sqrt()).square().sum())) < 1e-9
    c1, c2 = (lambda r: r @ r.T)(torch.randn(6, 8, dtype=F64)), (lambda r: r @ r.T)(torch.randn(6, 8, dtype=F64))
    product = torch.linalg.eigvals(c1 @ c2).real.sqrt().sum()
    assert abs(frechet_distance(m, c1, m, c2) - float(c1.trace() + c2.trace() - 2 * product)) < 1e-8


def test_feature_statistics_are_numpys():
    """Streamed mean and covariance equal numpy's on the whole; the features kept are at most 10,000, from first to last."""
    images = torch.randint(0, 256, (25, 3, 4, 4), dtype=torch.uint8)
    net = lambda x, return_features: x.float().flatten(1)[:, :10]
    mean, cov, some = common.feature_statistics(images, net, size=7)
    f = images.flatten(1)[:, :10].double().numpy()
    np.testing.assert_allclose(mean, f.mean(0))
    np.testing.assert_allclose(cov, np.cov(f.T), atol=1e-9)
    np.testing.assert_array_equal(some, f)
    i = common.feature_statistics(torch.arange(15_000.0).reshape(-1, 1), lambda x, return_features: x, size=700)[2]
    assert len(i) <= 10_000 and i.min() == 0 and i.max() > 14_990 and len(set(i.flatten().diff().tolist())) == 1      # spread evenly


def test_uint8_round_trip():
    """Stored bytes to [-1, 1] and back are the same bytes, so FID compares like with like."""
    b = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(common.to_uint8(b.float() / 127.5 - 1), b)
    assert [common.fid_name(n) for n in (50000, 1000, 500)] == ["fid50k", "fid1k", "fid500"]


# ---- CIFAR-10 files ----


def write_cifar(folder, n=20):
    """Five files in the official layout with n random images each; returns the rows."""
    folder.mkdir(parents=True)
    rows = np.random.default_rng(0).integers(0, 256, (5, n, 3073), np.uint8)
    rows[:, :, 0] %= 10
    for i in range(5):
        (folder / f"data_batch_{i + 1}.bin").write_bytes(rows[i].tobytes())
    return rows.reshape(-1, 3073)


def images_cfg(path, **kw):
    return Shared(data="cifar10", data_dir=str(path), device="cpu", **kw)


def test_cifar10_folder(tmp_path):
    """Rows are a label byte and 3x32x32 bytes; samples are in [-1, 1], some flipped, and keep their label."""
    rows = write_cifar(tmp_path / "d/cifar-10-batches-bin")
    for where in ("d", "d/cifar-10-batches-bin"):
        data = load_data(images_cfg(tmp_path / where, cond=True))
        assert np.array_equal(data.images.numpy().reshape(100, -1), rows[:, 1:]) and np.array_equal(data.labels.numpy(), rows[:, 0])
    x, label = data.sample(200)
    assert x.shape == (200, 3, 32, 32) and x.dtype == torch.float32 and x.min() == -1 and x.max() == 1
    stored = data.images.float() / 127.5 - 1
    distance = lambda x: torch.cdist(x.flatten(1), stored.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    plain, flipped = distance(x), distance(x.flip(3))
    best = torch.minimum(plain, flipped)
    assert best.min(1).values.max() < 1e-3 and torch.equal(data.labels[best.argmin(1)], label.argmax(1))
    assert 0.3 < (flipped.min(1).values < plain.min(1).values).float().mean() < 0.7


def archive(path, folder, damage=lambda raw: raw):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(folder, "cifar-10-batches-bin")
    path.write_bytes(damage(buffer.getvalue()))


def test_cifar10_archive(tmp_path):
    """An archive is read in place, under any name; nothing is unpacked."""
    rows = write_cifar(tmp_path / "x")
    archive(tmp_path / "mine.tar.gz", tmp_path / "x")
    data = load_data(images_cfg(tmp_path / "mine.tar.gz"))
    assert np.array_equal(data.images.numpy().reshape(100, -1), rows[:, 1:]) and data.sample(2)[1] is None
    assert not (tmp_path / "cifar-10-batches-bin").exists()


def test_damaged_files(tmp_path, monkeypatch):
    """Missing, truncated, wrong checksum, wrong size, foreign: one sentence each that names the file."""
    write_cifar(tmp_path / "x")
    archive(tmp_path / "cut.tar.gz", tmp_path / "x", lambda raw: raw[:len(raw) // 2])
    (tmp_path / "page.tar.gz").write_text("<html>not found</html>")
    (tmp_path / "sum").mkdir()
    archive(tmp_path / "sum/cifar-10-binary.tar.gz", tmp_path / "x")
    (tmp_path / "lone").mkdir()
    (tmp_path / "lone/data_batch_1.bin").write_bytes(bytes(3073))
    write_cifar(tmp_path / "size")
    (tmp_path / "size/data_batch_3.bin").write_bytes(bytes(3072))
    write_cifar(tmp_path / "label")
    (tmp_path / "label/data_batch_3.bin").write_bytes(bytes([11]) * 3073)
    (tmp_path / "other").mkdir()
    archive(tmp_path / "other.tar.gz", tmp_path / "other")

    def no_network(*_, **__):
        raise OSError("no network")
    monkeypatch.setattr(common.urllib.request, "urlopen", no_network)
    for where, words in {"cut.tar.gz": "no readable CIFAR-10", "page.tar.gz": "no readable CIFAR-10", "sum": "MD5",
                         "lone": "lacks data_batch_2.bin", "size": "data_batch_3.bin", "label": "data_batch_3.bin",
                         "other.tar.gz": "lacks data_batch_1.bin", "nowhere": "could not download"}.items():
        with pytest.raises(UserError, match=words) as e:
            load_data(images_cfg(tmp_path / where))
        assert "\n" not in str(e.value)


class Server(io.BytesIO):
    """What urlopen returns for part of a file."""

    def __init__(self, content, request, ranges=True, cut=None):
        start = int(request.headers.get("Range", "bytes=0-")[6:-1]) if ranges else 0
        super().__init__(content[start:cut])
        self.status, self.headers = 206 if start else 200, {"Content-Length": str(len(content) - start)}


@pytest.mark.parametrize("ranges", [True, False])
def test_download_continues_and_checks(tmp_path, monkeypatch, ranges):
    """A broken download goes on where it stopped (or afresh where the server cannot); a wrong sum is not kept."""
    content = np.random.default_rng(0).bytes(3 << 20)
    md5, target, asked = common.hashlib.md5(content).hexdigest(), tmp_path / "new/file", []

    def serve(request, timeout):
        asked.append(request.headers.get("Range"))
        return Server(content, request, ranges, cut=1 << 20 if len(asked) == 1 else None)
    monkeypatch.setattr(common.urllib.request, "urlopen", serve)
    with pytest.raises(UserError, match="continue"):
        common.download("http://x", target, md5)
    assert not target.exists()
    common.download("http://x", target, md5)
    assert target.read_bytes() == content and asked == [None, "bytes=1048576-"]
    with pytest.raises(UserError, match="MD5"):
        common.download("http://x", tmp_path / "wrong", "0" * 32)
    assert not list(tmp_path.glob("wrong*"))


# ---- command line ----


def test_default_preset_flag(monkeypatch):
    """Dataclass default < preset of --data < flag on the command line."""
    presets = {**fdistill.PRESETS, "grid": dict(steps=7, lr=0.5)}
    assert parse(fdistill.Config, presets, []).steps == fdistill.Config.steps
    cfg = parse(fdistill.Config, presets, ["--data", "grid", "--lr", "0.25"])
    assert (cfg.steps, cfg.lr, cfg.data) == (7, 0.25, "grid")
    assert parse(fdistill.Config, presets, ["--data=grid", "--cond"]).cond and parse(fdistill.Config, presets, ["--data=grid"]).steps == 7


@pytest.mark.parametrize("flags, words", {
    ("--divergance", "js"): "did you mean --divergence?", ("--divergence", "kl"): "rkl", ("--data", "mnist"): "ring",
    ("--steps", "0"): "must be at least 1", ("--steps", "many"): "steps", ("--micro", "100"): "does not divide",
    ("--ema", "1"): "decay", ("--lr", "-1"): "positive", ("--lr", "nan"): "finite", ("--net", "small"): "toys take mlp",
    ("--data", "cifar10", "--teacher", "exact"): "needs a toy", ("--data", "cifar10", "--net", "mlp"): "images small",
    ("--fid", "x"): "for images", ("--data", "cifar10", "--fid", "nowhere.pt"): "no such file", ("--st", "3"): "unknown argument",
    ("--data", "cifar10", "--fid", __file__): "is not the Inception network", ("--width", "6"): "multiple of 4", ("--teacher", "nowhere.pt"): "no such file", ("--sample", "nowhere"): "no such file",
    ("--data", "cifar10", "--fake", "exact"): "needs a toy", ("--sigma_min", "0"): "sigma", ("--sigma_max", "0.01"): "sigma",
    ("--bins", "0"): "bins", ("--fake_updates", "-1"): "fake_updates", ("--steps",): "expected one argument", ("--lr_fake", "-1"): "lr_fake",
    ("--gan_weight", "nan"): "--gan_weight must be a finite number", ("--ema=-inf",): "finite", ("--seed", "-1"): "--seed", ("--samples", "1"): "samples",
}.items())
def test_bad_flags(flags, words):
    """Each ends with exit code 2 and one sentence that says what to do, before any work is done."""
    code, err = main_in_process(fdistill, *flags)
    assert code == 2 and words in err and err.count("\n") == 1 and err.startswith("fdistill.py: "), err


@pytest.mark.parametrize("script", ["fdistill", "dmd", "sim", "consistency", "rectflow"])
def test_help(script, capsys, monkeypatch):
    """-h shows every flag with help and the default for the chosen data, in 80 columns."""
    module = importlib.import_module(script)
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as e:
        parse(module.Config, {**module.PRESETS, "grid": dict(steps=77)}, ["--data", "grid", "-h"])
    out = capsys.readouterr().out
    about = {words[0]: " ".join(words) for block in re.split(r"\n  (?=--)", out)[1:] if (words := block.split())}       # of each flag alone
    assert e.value.code == 0 and "student updates [77]" in about["--steps"] and max(map(len, out.splitlines())) <= 80
    for f in dataclasses.fields(module.Config):
        note = about.pop(f"--{f.name}" + "," * isinstance(f.default, bool))
        assert len(note.split()) > 3 and (f.default == "" or f.name == "steps" or f" [{f.default}]" in note), f.name
    assert not about


# ---- run folder ----


def test_a_failed_write_keeps_what_was_there(tmp_path):
    """Whatever breaks while writing, the old file stays whole and no fragment is left."""
    path = tmp_path / "last.pt"
    common.write_atomically(path, lambda f: f.write(b"old"))

    def full_disk(f):
        f.write(b"new")
        raise OSError(28, "No space left on device")
    with pytest.raises(UserError, match="No space left"):
        common.write_atomically(path, full_disk)
    with pytest.raises(KeyboardInterrupt):
        common.write_atomically(path, lambda f: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_pictures(tmp_path):
    """Both kinds of picture are PNG files of sensible size."""
    common.save_picture(tmp_path / "a.png", {"data": torch.randn(100, 2), "student": torch.randn(100, 2)})
    common.save_picture(tmp_path / "b.png", {"data": torch.rand(16, 3, 8, 8) * 2 - 1, "grey": torch.rand(9, 1, 8, 8)})
    for name in "ab":
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG" and (tmp_path / f"{name}.png").stat().st_size > 2000


def test_saved_student_loads_without_unpickling_code(tmp_path):
    """ema.pt is plain: weights_only=True reads it, and the denoiser comes back the same."""
    d = Denoiser(UNet(8, 1, 3, width=8, mult=(1, 2), blocks=1, attention=(4,)), 0.3)
    d.sigma_init = 2.5
    torch.save(common.pack_denoiser(d, Shared()), tmp_path / "ema.pt")
    again = common.load_denoiser(tmp_path, Shared(device="cpu"))
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(again(x, torch.ones(2)), d.eval()(x, torch.ones(2))) and (again.sigma_init, again.sigma_data) == (2.5, 0.3)


def test_foreign_checkpoints(tmp_path):
    """A text, a cut-off file, a pickle of something else, another dict: one sentence each."""
    torch.save({"model": 1}, tmp_path / "dict.pt")
    (tmp_path / "text.pt").write_text("hello")
    torch.save(common.pack_denoiser(Denoiser(MLP(width=8)), Shared()), tmp_path / "good.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:500])
    torch.save(np.random.default_rng(0), tmp_path / "code.pt")
    for name in ("dict", "text", "cut", "code"):
        with pytest.raises(UserError, match="no checkpoint of onestep"):
            common.load_denoiser(tmp_path / f"{name}.pt", Shared(device="cpu"))


def test_teacher_must_fit(tmp_path):
    """A teacher of another resolution, dimension or class count is refused with the reason."""
    def teacher(net):
        torch.save(common.pack_denoiser(Denoiser(net), Shared()), tmp_path / "t.pt")
        return str(tmp_path / "t.pt")
    with pytest.raises(UserError, match="shape"):
        common.load_teacher(Shared(device="cpu", teacher=teacher(MLP(3, width=8))))
    with pytest.raises(UserError, match="shape"):
        common.load_teacher(images_cfg(tmp_path, teacher=teacher(UNet(16, 3, width=8, mult=(1,), blocks=1))))
    with pytest.raises(UserError, match="add --cond"):
        common.load_teacher(Shared(device="cpu", teacher=teacher(MLP(2, 8, width=8))))
    with pytest.raises(UserError, match="5 classes"):
        common.load_teacher(Shared(device="cpu", cond=True, teacher=teacher(MLP(2, 5, width=8))))


def test_fitting_a_teacher_is_cached_and_leaves_the_seed_alone():
    """The second call loads the first one's result; the caller's random stream does not notice either."""
    cfg = Shared(device="cpu", teacher_steps=3)
    draws, teachers = [], []
    for _ in range(2):
        torch.manual_seed(5)
        teachers.append(common.load_teacher(cfg))
        draws.append(torch.rand(3))
    x = torch.randn(4, 2)
    assert torch.equal(*draws) and torch.equal(*(t(x, torch.ones(4)) for t in teachers))
    assert json.loads(next(common.Path("runs").glob("teacher-ring-*/metrics.json")).read_text())["step"] == 3
