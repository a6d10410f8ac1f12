"""EDM's networks and checkpoints against its facts written out; files are read, never run."""
import io
import pickle
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fdistill
import fuzz_edm
from common import Denoiser, Images, Shared, UNet, UserError, load_edm
from edm_format import edm_bytes, expected, forward

CPU = Shared(device="cpu")


@pytest.mark.parametrize("kind, count, tensors", [
    ("cond", 55_735_299, 427), ("uncond", 55_733_891, 425), ("adm", 295_899_267, 553)])
def test_names_and_sizes(kind, count, tensors):
    """Every parameter by name and size; with two filters a resampling block, EDM's tensors."""
    with torch.device("meta"):
        if kind == "adm":
            net = UNet(64, 3, 1000, 192, (1, 2, 3, 4), 3, (32, 16, 8), adm=True)
        else:
            net = UNet(32, 3, 10 if kind == "cond" else 0, augment_dim=9)
    want = expected(kind)
    assert {name: tuple(p.shape) for name, p in net.state_dict().items()} == want
    assert sum(p.numel() for p in net.parameters()) == count
    resampling = {name.split(".")[1] for name in want if "_down" in name or "_up" in name}
    assert len(want) + 2 * len(resampling) == tensors


def network(adm, label_dim=10, seed=0, **spec):
    """A small network of EDM's kind in which every weight matters."""
    torch.manual_seed(seed)
    usual = dict(resolution=32, width=64 if adm else 16, mult=(1, 2), blocks=2, attention=(16,),
                 augment_dim=0 if adm else 9)
    net = UNet(label_dim=label_dim, adm=adm, **(usual | spec))
    for name, p in net.named_parameters():
        torch.nn.init.normal_(p, 1 if "norm" in name and "weight" in name else 0, 0.1)
    return net.requires_grad_(False)


def inputs(label_dim=10, side=32):
    sigma = torch.tensor([0.01, 0.4, 3.0]).view(3, 1, 1, 1)
    x_t = torch.randn(3, 3, side, side) * (0.25 + sigma**2).sqrt()
    return x_t, sigma, torch.eye(label_dim)[[0, 1, 0]] if label_dim else None


@pytest.mark.parametrize("protocol, spec", [
    (3, dict(adm=False)), (4, dict(adm=True)), (5, dict(adm=False, label_dim=0)),
    (4, dict(adm=True, label_dim=0, blocks=3, attention=(32, 16, 8))),
    (4, dict(adm=False, label_dim=0, resolution=64, width=8, mult=(1, 2, 2, 2), blocks=4))])
def test_a_file_of_edm(protocol, spec):
    """Read, not run (the last is FFHQ's kind); equal to the facts' functions to 2e-5 of it."""
    net = network(**spec)
    Path("edm.pkl").write_bytes(edm_bytes(net, protocol=protocol, sigma_data=0.4))
    d, at = load_edm("edm.pkl", CPU), inputs(net.label_dim, net.shape[1])
    assert d.net.spec == net.spec and (d.sigma_data, d.training) == (0.4, False)
    assert (d.shape, d.label_dim) == (net.shape, net.label_dim)
    for name, p in d.net.state_dict().items():
        assert torch.equal(p, net.state_dict()[name]), name
    other = Denoiser(network(seed=1, **spec), 0.4)      # so much a network's weights matter
    for a, b, c in zip(d(*at), forward(net.state_dict(), *at, sigma_data=0.4), other(*at)):
        assert (a - b).norm() < 2e-5 * b.norm() < 2e-1 * (c - b).norm()
    assert not Path("EXECUTED").exists() and "torch_utils" not in sys.modules


def test_half_precision():
    net = network(False)
    half = {name: p.half() for name, p in net.state_dict().items()}
    Path("edm.pkl").write_bytes(edm_bytes(net, half))
    for name, p in load_edm("edm.pkl", CPU).net.state_dict().items():
        assert p.dtype == torch.float32 and torch.equal(p, half[name].float())


def test_other_files():
    """Each is refused in one sentence, EDM2's by its name."""
    net, zipped = fuzz_edm.tiny(), io.BytesIO()
    weights, good = net.state_dict(), edm_bytes(net)
    torch.save(weights, zipped)
    no_proj = {name: p for name, p in weights.items() if "proj" not in name}
    for raw, words in (
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", ""), (b"", ""),
            (b"\n<!DOCTYPE html><html>404</html>", ""), (zipped.getvalue(), ""),
            (good[:len(good) // 2], ""), (pickle.dumps(dict(a=1)), ""), (pickle.dumps([1, 2]), ""),
            (pickle.dumps(dict(ema=torch.zeros(2))), ""), (edm_bytes(net, no_proj), "DDPM"),
            (edm_bytes(net, precond="VPPrecond"), "VPPrecond"),
            (edm_bytes(net, precond="Precond"), "EDM2"), (edm_bytes(net, sigma_data=-1), "sigma_d"),
            (edm_bytes(net, weights | {"map_noise.freqs": torch.zeros(3)}), "DDPM")):
        Path("x.pkl").write_bytes(raw)
        with pytest.raises(UserError, match=f"^x.pkl is no EDM checkpoint: .*{words}[^\n]*$"):
            load_edm("x.pkl", CPU)


def test_hostile_files(tmp_path):
    """Files made by hand and forty damaged ones: nothing runs or hangs (12,000: fuzz_edm.py)."""
    rng, made, loaded = random.Random(0), fuzz_edm.crafted(), []
    fuzz_edm.watch(tmp_path / "x.pkl")
    parts = [raw for raw in made.values() if len(raw) < 10**6]
    for i in range(40):
        made[f"mutation {i}"] = fuzz_edm.mutated(rng, made["good"], parts)
    for name, raw in made.items():
        if not name.startswith(fuzz_edm.SLOW):
            (tmp_path / "x.pkl").write_bytes(raw)
            if fuzz_edm.load(tmp_path / "x.pkl"):
                loaded.append(name)
    assert len(made) > 100 and not Path("EXECUTED").exists()
    harmless = ("mutation", "beside")                   # a call beside a network is not made
    assert {name for name in loaded if not name.startswith(harmless)} == {"good", "adm", "honest"}


def test_a_script_takes_it_as_its_teacher(no_pictures):
    """Two steps; its student is a teacher for the next script; a teacher of no classes is told."""
    Path("edm.pkl").write_bytes(edm_bytes(network(False, width=8, blocks=1)))
    data = Images(np.random.default_rng(0).integers(0, 256, (20, 3, 32, 32), np.uint8),
                  np.arange(20) % 10)
    flags = dict(data="cifar10", device="cpu", steps=2, batch=4, accumulate=2, samples=4)
    _, run = fdistill.train(fdistill.Config(teacher="edm.pkl", recompute=True, **flags), data)
    fdistill.train(fdistill.Config(teacher=str(run.dir), **flags), data)
    with pytest.raises(UserError, match="--cond"):
        fdistill.train(fdistill.Config(teacher="edm.pkl", cond=False, **flags), data)
