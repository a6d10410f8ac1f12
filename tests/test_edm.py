"""EDM's networks and checkpoints: names, sizes and outputs against its facts written out, files read without running anything."""
import io
import json
import pickle
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import dmd
import fdistill
import fuzz_edm
import sim
from common import Denoiser, Shared, UNet, UserError, load_edm
from conftest import main_in_process
from edm_format import edm_bytes, expected, forward
from test_common import write_cifar

CPU = Shared(device="cpu")


@pytest.mark.parametrize("kind, count, tensors", [("cond", 55_735_299, 427), ("uncond", 55_733_891, 425), ("adm", 295_899_267, 553)])
def test_names_and_sizes(kind, count, tensors):
    """Every parameter of EDM's networks by name and size; with the filters, two a resampling block, as many tensors as EDM has."""
    with torch.device("meta"):
        net = UNet.adm() if kind == "adm" else UNet.ddpmpp(label_dim=10 * (kind == "cond"))
    want = expected(kind)
    assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == want
    assert sum(np.prod(size) for size in want.values()) == sum(p.numel() for p in net.parameters()) == count
    resampling = {k.split(".")[1] for k in want if "_down" in k or "_up" in k}
    assert len(want) + 2 * len(resampling) == tensors


def network(adm, label_dim=10, seed=0, resolution=32, **kw):
    """A small network of EDM's kind in which every weight matters."""
    torch.manual_seed(seed)
    net = UNet(resolution, 3, label_dim, **dict(dict(width=64 if adm else 16, mult=(1, 2), blocks=2, attention=(resolution // 2,),
                                                     augment_dim=0 if adm else 9, adm=adm), **kw))
    for name, p in net.named_parameters():
        torch.nn.init.normal_(p, 1 if "norm" in name and "weight" in name else 0, 0.1)
    return net.requires_grad_(False)


def inputs(label_dim=10, resolution=32):
    sigma = torch.tensor([0.01, 0.4, 3.0])
    label = torch.eye(label_dim)[[0, 1, 0]] if label_dim else None
    return torch.randn(3, 3, resolution, resolution) * (0.25 + sigma**2).sqrt().reshape(-1, 1, 1, 1), sigma, label


@pytest.mark.parametrize("label_dim", [10, 0])
@pytest.mark.parametrize("adm", [False, True])
def test_outputs(adm, label_dim):
    """The network's outputs equal the facts written in plain functions, to 2e-5 of their size, at every noise level."""
    net, at = network(adm, label_dim), inputs(label_dim)
    got, want = Denoiser(net)(*at), forward(net.state_dict(), *at)
    linear = Denoiser(network(adm, label_dim, seed=1))(*at)
    for a, b, other in zip(got, want, linear):
        assert (a - b).norm() < 2e-5 * b.norm() and (other - b).norm() > 1e-4 * b.norm()


@pytest.mark.parametrize("adm", [False, True])
@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_a_file_of_edm(adm, protocol, tmp_path):
    """A pickle in EDM's format gives its network, dimensions and sigma_data; the source inside is not run, EDM not imported."""
    net, at = network(adm), inputs()
    (tmp_path / "edm.pkl").write_bytes(edm_bytes(net.state_dict(), protocol, sigma_data=0.4))
    d = load_edm(tmp_path / "edm.pkl", CPU)
    assert d.net.spec == net.spec and d.sigma_data == 0.4 and (d.shape, d.label_dim) == ((3, 32, 32), 10) and not d.training
    torch.testing.assert_close(d(*at), forward(net.state_dict(), *at, sigma_data=0.4), rtol=2e-5, atol=2e-5)
    assert not Path("EXECUTED").exists() and "torch_utils" not in sys.modules


def test_half_precision_and_no_labels(tmp_path):
    net = network(False, 0)
    (tmp_path / "edm.pkl").write_bytes(edm_bytes(net.state_dict(), half=True))
    d = load_edm(tmp_path / "edm.pkl", CPU)
    assert d.label_dim == 0 and all(torch.equal(v, net.state_dict()[k].half().float()) for k, v in d.net.state_dict().items())


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_old_and_new_names_of_numpy(module, tmp_path, monkeypatch):
    """numpy's scalars among the settings (skip_scale is one) do not matter, under the module's name before and after numpy 2."""
    raw = edm_bytes(network(False, width=8, blocks=1).state_dict())
    name = np.float64(1).__reduce__()[0].__module__
    as_pickled = lambda s: b"\x8c" + bytes([len(s)]) + s.encode()
    assert as_pickled(name) in raw
    raw = raw.replace(as_pickled(name), as_pickled(module))             # frames are longer by it: only pickle itself would mind
    (tmp_path / "edm.pkl").write_bytes(raw)
    assert load_edm(tmp_path / "edm.pkl", CPU).net.spec["width"] == 8


def test_other_files(tmp_path):
    """Each says in one sentence what it is."""
    good, weights = edm_bytes(fuzz_edm.tiny()), fuzz_edm.tiny()
    zipped = io.BytesIO()
    torch.save(weights, zipped)
    files = {
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 223\n": "git-lfs pointer", b"": "end|exhausted|damaged",
        b"\n<!DOCTYPE html><html>404</html>": "web page", zipped.getvalue(): "zip archive", good[:len(good) // 2]: "expected|damaged",
        pickle.dumps(dict(a=1)): "damaged or holds something else", pickle.dumps([1, 2]): "something else",
        pickle.dumps(random.Random(0)): "asks for 'random", pickle.dumps(dict(ema=weights["map_layer0.bias"])): "something else",
        edm_bytes(weights, precond="VPPrecond"): "VPPrecond", edm_bytes({**weights, "map_noise.freqs": torch.zeros(3)}): "neither DDPM",
        edm_bytes({k: v for k, v in weights.items() if "proj" not in k}): "neither DDPM", edm_bytes(weights, sigma_data=-1): "sigma_data"}
    for i, (raw, words) in enumerate(files.items()):
        (tmp_path / f"{i}.pkl").write_bytes(raw)
        with pytest.raises(UserError, match=rf"\d.pkl is no EDM checkpoint: .*({words}).*README says where"):
            load_edm(tmp_path / f"{i}.pkl", CPU)
    with pytest.raises(UserError, match="no such file"):
        load_edm(tmp_path / "nowhere.pkl", CPU)


def test_hostile_files(tmp_path):
    """Every file made by hand and forty damaged ones: nothing runs, nothing hangs, success or one sentence (12,000: fuzz_edm.py)."""
    path, rng, made = tmp_path / "x.pkl", random.Random(0), fuzz_edm.crafted()
    fuzz_edm.watch(path)
    slow = ("900000", "too many")                           # half of the time; fuzz_edm.py has them
    base, parts = made["good"], [raw for raw in made.values() if len(raw) < 10**6]
    for i in range(40):
        made[f"mutation {i}"] = fuzz_edm.mutated(rng, base, parts)
    results = {}
    for name, raw in made.items():
        if not name.startswith(slow):
            path.write_bytes(raw)
            results[name], seconds = fuzz_edm.load(path)
            assert seconds < 20, name
    loaded = {name for name in results if results[name] == "loaded" and not name.startswith(("mutation", "torch", "numpy", "dnnlib", "collections"))}
    assert loaded == {"good", "adm", "honest tensor"} and not Path("EXECUTED").exists()
    assert len(results) > 250 and results["os.system beside a network"] == "refused"


@pytest.fixture
def teacher(tmp_path):
    """A small conditional CIFAR-10 checkpoint in EDM's format and a data set."""
    write_cifar(tmp_path / "data", n=20)
    (tmp_path / "edm.pkl").write_bytes(edm_bytes(network(False, width=8, blocks=1).state_dict()))
    return tmp_path / "edm.pkl"


def test_every_script_takes_it_and_gives_a_teacher(teacher, monkeypatch):
    """--teacher edm.pkl in each script for two steps; its student is a teacher for the next script; wrong classes are told."""
    flags = ["--data", "cifar10", "--data_dir", "data", "--device", "cpu", "--steps", 2, "--batch", 4, "--micro", 2, "--every", 2, "--net", "ddpmpp", "--samples", 4]
    for module in (fdistill, dmd, sim):
        monkeypatch.setattr(module, "gallery", lambda cfg, data, teacher: common.gallery(cfg, data, teacher, n=1))
    for module, more in ((fdistill, ["--recompute"]), (dmd, []), (sim, [])):
        code, err = main_in_process(module, *flags, "--cond", "--teacher", teacher, "--out", module.__name__, *more)
        assert code == 0, err
        teacher = f"{module.__name__}/ema.pt"
        assert json.loads(Path(module.__name__, "metrics.json").read_text())["step"] == 2
    for flag, words in (("--no-cond", "add --cond"), ("--cond", None)):
        code, err = main_in_process(sim, *flags, flag, "--teacher", "edm.pkl", "--out", f"run{flag}")
        assert (code == 0) if words is None else (code == 2 and words in err and err.count("\n") == 1), err
