"""ImageNet-64 in its two file formats, memory-mapped batches read ahead, FID's references, precision and recall, sampling."""
import dataclasses
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import bench_fid
import common
import sim
from common import Images, Shared, UserError, load_data, precision_recall
from conftest import ROOT, PowerCut, TinyInception, flat, main_in_process
from edm_format import edm_bytes
from test_common import write_cifar
from test_edm import network

CFG = dict(data="imagenet64", data_dir=".", device="cpu")


def write_batches(folder, sizes=(5, 7), classes=1000, data=None):
    """train_data_batch_<i>.npz in the official layout; returns images (N, 3, 64, 64) and labels from 1."""
    rng, images, labels = np.random.default_rng(0), [], []
    for i, n in enumerate(sizes):
        images.append(rng.integers(0, 256, (n, 12288), np.uint8))
        labels.append(rng.integers(1, classes + 1, n))
        np.savez(folder / f"train_data_batch_{i + 1}.npz", data=images[-1], labels=labels[-1], mean=images[-1].mean(0))
    return np.concatenate(images).reshape(-1, 3, 64, 64), np.concatenate(labels)


def png(image):
    """A PNG file's bytes for (H, W, 3) uint8, by the format's definition: no library's reader checks another's writer."""
    import struct
    import zlib
    h, w, _ = image.shape
    chunk = lambda kind, raw: struct.pack(">I", len(raw)) + kind + raw + struct.pack(">I", zlib.crc32(kind + raw))
    rows = b"".join(b"\0" + row.tobytes() for row in image)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(rows, 0)) + chunk(b"IEND", b"")


def write_zip(path, images, labels):
    with zipfile.ZipFile(path, "w") as z:
        names = [f"{i // 5:05d}/img{i:08d}.png" for i in range(len(images))]
        for name, image in zip(names, images):
            z.writestr(name, png(image.transpose(1, 2, 0)))
        z.writestr("dataset.json", json.dumps(dict(labels=[[n, int(k)] for n, k in reversed(list(zip(names, labels)))])))


def test_official_batches_and_edm_zip(tmp_path):
    """Both formats give the same images and classes, labels from 1 and from 0; the second call reads what the first wrote."""
    images, labels = write_batches(tmp_path)
    write_zip(tmp_path / "imagenet-64x64.zip", images, labels - 1)
    for where in (tmp_path, tmp_path / "imagenet-64x64.zip"):
        for _ in range(2):
            data = load_data(Shared(**{**CFG, "data_dir": str(where)}, cond=True))
            assert np.array_equal(data.images.numpy(), images) and np.array_equal(data.labels.numpy(), labels - 1)
            assert data.shape == (3, 64, 64) and data.label_dim == 1000 and data.draw_label(4).shape == (4, 1000)
    x, label = data.sample(50)
    back = {common.to_uint8(a).numpy().tobytes() for a in (x[0], x[0].flip(2))} & {i.tobytes() for i in images}
    assert len(back) == 1 and x.min() >= -1 and x.max() <= 1 and set(label.argmax(1).tolist()) <= set(labels - 1)
    assert set(data.draw_label(200).argmax(1).tolist()) == set(labels - 1)              # classes that occur, all of them


def test_cifar10_as_edm_zip(tmp_path):
    rows = write_cifar(tmp_path / "cifar-10-batches-bin", 2)
    write_zip(tmp_path / "cifar10-32x32.zip", rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0])
    data = load_data(Shared(data="cifar10", data_dir=str(tmp_path / "cifar10-32x32.zip"), device="cpu"))
    assert np.array_equal(data.images.flatten(1).numpy(), rows[:, 1:]) and np.array_equal(data.labels.numpy(), rows[:, 0])


def test_conversion_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """A kill in the second file: the next call reads only what is missing. A changed source starts over."""
    images, _ = write_batches(tmp_path, (9000, 4))          # more than one part of 8192
    real, asked = common._npz_rows, []

    def broken(path, *args):
        labels, rows = real(path, *args)

        def some(skip):
            asked.append((path.name[-5], skip))
            for part in rows(skip):
                yield part
                if len(part) == 8192 and len(asked) == 1:
                    raise PowerCut
        return labels, some
    monkeypatch.setattr(common, "_npz_rows", broken)
    with pytest.raises(UserError, match="PowerCut"):
        load_data(Shared(**CFG))
    data = load_data(Shared(**CFG))
    assert asked == [("1", 0), ("1", 8192), ("2", 0)] and np.array_equal(data.images.numpy(), images)
    assert data.crc == common.zlib.crc32(images)
    more, _ = write_batches(tmp_path, (3, 4))
    assert np.array_equal(load_data(Shared(**CFG)).images.numpy(), more)


def test_damaged_images(tmp_path):
    """Each in one sentence: nothing there, a cut-off file, wrong shapes, labels out of range, PNGs of another size."""
    def refused(words, where="."):
        with pytest.raises(UserError, match=words):
            load_data(Shared(**{**CFG, "data_dir": str(where)}))
    refused("README says where")
    write_batches(tmp_path)
    raw = Path("train_data_batch_2.npz").read_bytes()
    Path("train_data_batch_2.npz").write_bytes(raw[:len(raw) // 2])
    refused("could not read or convert")
    np.savez("train_data_batch_2.npz", data=np.zeros((4, 3072), np.uint8), labels=np.ones(4, int))
    refused(r"data \(4, 3072\)")
    np.savez("train_data_batch_2.npz", data=np.zeros((2, 12288), np.uint8), labels=np.array([0, 1]))
    refused("labels 0 to 1, not 1 to 1000")
    write_zip(tmp_path / "x.zip", np.zeros((2, 3, 32, 32), np.uint8), [0, 1])
    refused("not 64x64 RGB", "x.zip")
    Path("y.zip").write_bytes(b"<html>")
    refused("could not read or convert", "y.zip")


@pytest.fixture
def mapped(tmp_path, monkeypatch):
    images, labels = write_batches(tmp_path, (40,))
    monkeypatch.setattr(common, "ON_DEVICE", 0)
    monkeypatch.setattr(Images, "ahead", None)
    return images


def test_batches_read_ahead(mapped):
    """What the thread read is what would be read without it; every image comes, half of them flipped; the seed decides all."""
    def draws(wait, sizes=(64, 64, 16, 64)):
        torch.manual_seed(3)
        Images.ahead, data = None, load_data(Shared(**CFG, cond=True))
        assert data.mapped
        out = []
        for n in sizes:
            if not wait:
                data.next = None                            # as if nothing had been read ahead
            out.append(data.sample(n))
            if wait:
                data.next[1].result()
        return out, torch.rand(3)
    (one, end), (two, end2) = draws(True), draws(False)
    assert all(torch.equal(a, b) for p, q in zip(one, two) for a, b in zip(p, q)) and torch.equal(end, end2)
    assert not torch.equal(one[0][0], one[1][0])
    where = {i.tobytes(): False for i in mapped} | {np.flip(i, 2).tobytes(): True for i in mapped}
    seen = [where[common.to_uint8(x).numpy().tobytes()] for x, _ in one for x in x]
    assert 0.35 < np.mean(seen) < 0.65 and len({common.to_uint8(x).numpy().tobytes() for x, _ in one for x in x}) > 60


def test_resume_with_batches_read_ahead_is_bit_exact(mapped, monkeypatch):
    """4 steps, power cut, resume: the same weights as in one go, though the seed of the next batch was drawn before the checkpoint."""
    def run(out, stop=None, resume=False):
        cfg = Shared(**CFG, steps=6, every=2, batch=8, out=out, resume=resume, seed=1)
        data, r = load_data(cfg), common.Run(cfg, "x")
        net = common.Denoiser(common.UNet(64, 3, width=4, mult=(1,), blocks=1, attention=()))
        ema = common.EMA(net, 0.5)
        for step in r.steps(dict(net=net, ema=ema)):
            if step == stop:
                raise PowerCut
            x, _ = data.sample(8)
            with torch.no_grad():
                next(net.parameters()).add_(x.mean() * torch.randn(()))
            ema.update(net)
            r.log(x=x.mean())
        r.release()
        return flat(net)
    straight = run("straight")
    with pytest.raises(PowerCut):
        run("broken", stop=5)
    common.Images.ahead = 12345
    assert torch.equal(run("broken", resume=True), straight)


def test_recompute_changes_no_gradient():
    """--recompute keeps fewer activations and gives the same gradients, in both networks."""
    for adm in (False, True):
        grads, kept = [], []
        for recompute in (False, True):
            d = common.Denoiser(network(adm, resolution=16).requires_grad_(True))
            d.net.recompute, sizes = recompute, []
            with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
                torch.manual_seed(0)
                loss = d(torch.randn(2, 3, 16, 16), torch.ones(2), torch.eye(10)[:2]).square().sum()
            loss.backward()
            grads.append(torch.cat([p.grad.flatten() for p in d.parameters() if p.grad is not None]))
            kept.append(sum(sizes))
        assert torch.equal(*grads) and kept[1] < 0.5 * kept[0]


def test_precision_recall():
    """Equal laws cover each other; a narrow sample is precise but recalls little, a wide one the reverse; a far one nothing."""
    real, same = torch.randn(2, 1000, 4)
    assert min(precision_recall(real, same)) > 0.9
    narrow, wide = precision_recall(real, 0.3 * same), precision_recall(real, 3 * same)
    assert narrow[0] > 0.95 and narrow[1] < 0.5 and wide[0] < 0.5 and wide[1] > 0.85
    assert precision_recall(real, same + 100) == (0, 0)
    # by hand, k = 1: each real point's ball reaches its neighbour
    real, fake = torch.tensor([[0.0], [1.0], [10.0]]), torch.tensor([[1.5], [30.0]])
    assert precision_recall(real, fake, k=1) == (0.5, 1.0)                  # 30 is out of reach; 30's and 1.5's balls hold all


def test_fid_against_a_file_and_training_images(tmp_path):
    """Names tell samples, reference and steps; equal samples and reference give 0; EDM's npz is the reference where it is named."""
    write_cifar(tmp_path / "data", n=20)
    torch.jit.script(TinyInception()).save("tiny.pt")
    cfg = Shared(data="cifar10", data_dir="data", device="cpu", fid="tiny.pt", samples=100)
    data = load_data(cfg)
    order = torch.randperm(100)
    real = lambda n, label: data.images[order[:n]].float() / 127.5 - 1
    got = common.image_metrics(cfg, data, {"1_step": real})
    assert abs(got["fid100_train100_1_step"]) < 1e-6 and got["precision100_1_step"] == got["recall100_1_step"] == 1
    few = common.image_metrics(dataclasses.replace(cfg, fid_ref="30"), data, {"1_step": real})
    assert few["fid100_train30_1_step"] > 1 and few["fid_ref"] == "cifar10 training images, 30" and few["fid_samples"] == 100
    f = data.images.float().mean((2, 3)).double()
    with pytest.raises(UserError, match="mu has shape"):
        np.savez("small.npz", mu=f.mean(0), sigma=np.cov(f.T))
        common.fid_reference(dataclasses.replace(cfg, fid_ref="small.npz"))
    for bad in ("nowhere.npz", "-3", "all", __file__):
        with pytest.raises(UserError, match="neither a number of training images nor"):
            common.check(dataclasses.replace(cfg, fid_ref=bad))


def test_train_against_test_benchmark(tmp_path, capsys):
    """tests/bench_fid.py: the first N images of the five training files, in order, against the first N of the test file."""
    rows = torch.from_numpy(write_cifar(tmp_path / "data" / "cifar-10-batches-bin", n=20))[:, 1:].reshape(-1, 3, 32, 32)
    Path("data/cifar-10-batches-bin/test_batch.bin").write_bytes(Path("data/cifar-10-batches-bin/data_batch_5.bin").read_bytes())
    torch.jit.script(TinyInception()).save("tiny.pt")
    stats = [common.feature_statistics(x, TinyInception()) for x in (rows[:10], rows[80:90])]
    assert bench_fid.main("data", "tiny.pt", "10") == pytest.approx(common.frechet_distance(*stats[0][:2], *stats[1][:2]), rel=1e-9)
    assert "10 training against 10 test images: FID" in capsys.readouterr().out


def test_edms_reference_file(tmp_path, monkeypatch):
    """FID against an npz of N(mu, I) is the closed form's, to 1e-6 relative."""
    write_cifar(tmp_path / "data", n=20)
    shift = torch.linspace(0, 1, 2048, dtype=torch.float64)
    np.savez("edm-ref.npz", mu=shift.numpy(), sigma=np.eye(2048))
    cfg = Shared(data="cifar10", data_dir="data", device="cpu", fid="tiny.pt", fid_ref="edm-ref.npz", samples=100)
    torch.jit.script(TinyInception()).save("tiny.pt")
    mean, cov = torch.zeros(2048, dtype=torch.float64), 4 * torch.eye(2048, dtype=torch.float64)
    real = common.feature_statistics
    monkeypatch.setattr(common, "feature_statistics", lambda *a, **k: (mean, cov, real(*a, **k)[2]))
    monkeypatch.setattr(common, "load_inception", lambda *a: lambda x, return_features: x.float().flatten(1)[:, :2048])
    got = common.image_metrics(cfg, load_data(cfg), {"1_step": lambda n, label: torch.zeros(n, 3, 32, 32)})
    want = float(shift.square().sum()) + 2048 * (2 - 1) ** 2
    assert abs(got["fid100_edm-ref_1_step"] - want) < 1e-6 * want and got["fid_ref"] == "edm-ref.npz"


def test_sampling_command(tmp_path):
    """python common.py sample: a checkpoint's pictures without any data; an unknown word says how it is used."""
    (tmp_path / "edm.pkl").write_bytes(edm_bytes(network(False, width=4, blocks=1).state_dict()))
    python = lambda *args: subprocess.run([sys.executable, str(ROOT / "common.py"), *map(str, args)], capture_output=True, text=True)
    p = python("sample", "--teacher", "edm.pkl", "--data", "cifar10", "--cond", "--samples", 4, "--heun", 3, "--churn", 4, "--out", "out", "--device", "cpu")
    assert p.returncode == 0, p.stderr
    assert np.load("out/samples.npy").shape == (4, 3, 32, 32) and Path("out/samples.png").read_bytes()[:4] == b"\x89PNG"
    metrics = json.loads(Path("out/metrics.json").read_text())
    assert metrics["calls"] == 5 and metrics["n"] == 4 and metrics["teacher"] == "edm.pkl"
    assert "common.py sample --teacher FILE" in python().stderr


def test_sampling_measures_a_toy():
    """The exact teacher's samples are the data's; EDM's settings are the presets of the two image sets."""
    code, err = main_in_process(type("m", (), dict(__name__="common", main=common.main, Config=common.Sampling, PRESETS=common.SAMPLING,
                                                   train=common.sample_teacher, sample=None)), "--teacher", "exact", "--samples", 3000, "--out", "out")
    assert code == 0, err
    assert abs(json.loads(Path("out/metrics.json").read_text())["H"]) < 2e-3
    presets = {name: common.parse(common.Sampling, common.SAMPLING, ["--data", name]) for name in ("cifar10", "imagenet64")}
    assert [(c.heun, c.churn, c.sigma_max) for c in presets.values()] == [(18, 0, 80), (256, 40, 80)]


def test_imagenet64_presets():
    """Batch sizes stay the papers', parts divide them, and the teacher's classes and shape are those of the data; a loss has its paper's rate."""
    import consistency
    import dmd
    import fdistill
    import rectflow
    for module, batch in ((fdistill, 512), (dmd, 280), (sim, 8192), (consistency, 2048), (rectflow, 2048)):
        cfg = common.parse(module.Config, module.PRESETS, ["--data", "imagenet64"])
        assert (cfg.batch, cfg.net, cfg.cond) == (batch, "adm", True) and cfg.batch % cfg.micro == 0
    of = lambda name, *flags: common.parse(consistency.Config, consistency.PRESETS, ["--data", name, *flags])
    second = {loss: of("cifar10", "--loss", loss).mid / 2 for loss in ("cd", "ct", "ect", "scd", "sct", "sprint", "boot")}
    assert {loss: round(sigma, 2) for loss, sigma in second.items()} == dict(       # sigma of the second call, in the papers
        cd=1.38, ct=0.82, ect=0.82, scd=0.98, sct=0.98, sprint=0.78, boot=1.38)     # (boot: cd's)
    assert [(of(name).q, of(name).stages, of(name, "--loss", "sprint").adv) for name in ("cifar10", "imagenet64")] == [(2, 8, 0.5), (4, 4, 0.5)]
    rate = lambda *flags: of(*flags).lr
    assert (rate("imagenet64"), rate("imagenet64", "--loss", "scd"), rate("cifar10"), rate("cifar10", "--lr", "0.5")) == (8e-6, 7e-5, 4e-4, 0.5)
