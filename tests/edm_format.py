"""
EDM's checkpoint format from its facts, without EDM's code: the names and sizes of its networks as
data, its forward pass in plain functions of tensors, and pickles as its `persistence` makes them.
"""
import pickle
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

# blocks, channels in, channels out; "+" attends, "=" has a skip convolution at equal channels
DDPMPP = """
enc.32x32_block0 128 256, enc.32x32_block1-3 256 256, enc.16x16_down 256 256 =,
enc.16x16_block0-3 256 256 +, enc.8x8_down 256 256 =, enc.8x8_block0-3 256 256,
dec.8x8_in0 256 256 +, dec.8x8_in1 256 256, dec.8x8_block0-4 512 256, dec.16x16_up 256 256 =,
dec.16x16_block0-3 512 256, dec.16x16_block4 512 256 +, dec.32x32_up 256 256 =,
dec.32x32_block0-3 512 256, dec.32x32_block4 384 256"""
ADM = """
enc.64x64_block0-2 192 192, enc.32x32_down 192 192, enc.32x32_block0 192 384 +,
enc.32x32_block1-2 384 384 +, enc.16x16_down 384 384, enc.16x16_block0 384 576 +,
enc.16x16_block1-2 576 576 +, enc.8x8_down 576 576, enc.8x8_block0 576 768 +,
enc.8x8_block1-2 768 768 +, dec.8x8_in0 768 768 +, dec.8x8_in1 768 768,
dec.8x8_block0-2 1536 768 +, dec.8x8_block3 1344 768 +, dec.16x16_up 768 768,
dec.16x16_block0 1344 576 +, dec.16x16_block1-2 1152 576 +, dec.16x16_block3 960 576 +,
dec.32x32_up 576 576, dec.32x32_block0 960 384 +, dec.32x32_block1-2 768 384 +,
dec.32x32_block3 576 384 +, dec.64x64_up 384 384, dec.64x64_block0 576 192,
dec.64x64_block1-3 384 192"""


def rows(table):
    """(name, channels in, channels out, marks) of each block."""
    for row in table.split(","):
        names, c_in, c_out, *marks = row.split()
        first, _, last = names.partition("-")
        for k in range(int(first[-1]), int(last) + 1) if last else [first[-1]]:
            yield f"{first[:-1]}{k}", int(c_in), int(c_out), marks


def expected(kind):
    """{name: size} of all parameters: kind is cond, uncond (CIFAR-10) or adm (ImageNet-64)."""
    adm, out = kind == "adm", {}
    width, table, side, last = (192, ADM, 64, 192) if adm else (128, DDPMPP, 32, 256)

    def layer(name, *size):
        out.update({f"{name}.weight": size, f"{name}.bias": size[:1]})

    layer("map_layer0", 4 * width, width)
    layer("map_layer1", 4 * width, 4 * width)
    out.update({"map_label.weight": (768, 1000)} if adm else {"map_augment.weight": (128, 9)})
    if kind == "cond":
        layer("map_label", 128, 10)
    layer(f"enc.{side}x{side}_conv", width, 3, 3, 3)
    for name, c_in, c_out, marks in rows(table):
        layer(f"{name}.norm0", c_in)
        layer(f"{name}.conv0", c_out, c_in, 3, 3)
        layer(f"{name}.affine", (2 if adm else 1) * c_out, 4 * width)
        layer(f"{name}.norm1", c_out)
        layer(f"{name}.conv1", c_out, c_out, 3, 3)
        if c_in != c_out or "=" in marks:
            layer(f"{name}.skip", c_out, c_in, 1, 1)
        if "+" in marks:
            layer(f"{name}.norm2", c_out)
            layer(f"{name}.qkv", 3 * c_out, c_out, 1, 1)
            layer(f"{name}.proj", c_out, c_out, 1, 1)
    layer("out_norm" if adm else "dec.32x32_aux_norm", last)
    layer("out_conv" if adm else "dec.32x32_aux_conv", 3, last, 3, 3)
    return out


def forward(W, x, sigma, label=None, sigma_data=0.5):
    """D(x, sigma (B, 1, 1, 1), label) of EDM's network with weights W {name: tensor}."""
    adm = "out_norm.weight" in W

    def linear(h, name):
        return F.linear(h, W[f"{name}.weight"], W.get(f"{name}.bias"))

    def conv(h, name):
        weight = W[f"{name}.weight"]
        return F.conv2d(h, weight, W[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def norm(h, name):
        groups, eps = min(32, h.shape[1] // 4), 1e-5 if adm else 1e-6
        return F.group_norm(h, groups, W[f"{name}.weight"], W[f"{name}.bias"], eps)

    def resample(h, name):
        f = torch.full((h.shape[1], 1, 2, 2), 0.25)
        if name.endswith("_up"):
            return F.conv_transpose2d(h, 4 * f, stride=2, groups=len(f))
        return F.conv2d(h, f, stride=2, groups=len(f)) if name.endswith("_down") else h

    def attend(h, name):
        b, c, height, w = h.shape
        heads = c // 64 if adm else 1
        qkv = conv(norm(h, f"{name}.norm2"), f"{name}.qkv")
        q, k, v = qkv.reshape(b * heads, c // heads, 3, -1).unbind(2)
        weight = torch.einsum("ncq,nck->nqk", q, k / np.sqrt(k.shape[1])).softmax(2)
        a = torch.einsum("nqk,nck->ncq", weight, v).reshape(b, c, height, w)
        return h + conv(a, f"{name}.proj")

    def block(h, name):
        factor, skip = 1 if adm else np.sqrt(0.5), resample(h, name)
        if f"{name}.skip.weight" in W:
            skip = conv(skip, f"{name}.skip")
        h = conv(resample(F.silu(norm(h, f"{name}.norm0")), name), f"{name}.conv0")
        e = linear(emb, f"{name}.affine")[:, :, None, None]
        if adm:
            scale, shift = e.chunk(2, 1)
            h = F.silu(norm(h, f"{name}.norm1") * (scale + 1) + shift)
        else:
            h = F.silu(norm(h + e, f"{name}.norm1"))
        h = (conv(h, f"{name}.conv1") + skip) * factor
        return attend(h, name) * factor if f"{name}.qkv.weight" in W else h

    half = W["map_layer0.weight"].shape[1] // 2
    power = torch.arange(half) / (half if adm else half - 1)
    angle = (sigma.flatten().log() / 4)[:, None] * (1 / 10000) ** power
    if adm:
        emb = linear(torch.cat([angle.cos(), angle.sin()], 1), "map_layer0")
        emb = linear(F.silu(emb), "map_layer1")
        emb = F.silu(emb if label is None else emb + linear(label, "map_label"))
    else:
        emb = torch.cat([angle.sin(), angle.cos()], 1)
        if label is not None:
            emb = emb + linear(label * np.sqrt(label.shape[1]), "map_label")
        emb = F.silu(linear(F.silu(linear(emb, "map_layer0")), "map_layer1"))
    total, skips = sigma**2 + sigma_data**2, []
    h, names = x / total.sqrt(), [".".join(k.split(".")[:2]) for k in W if k[3:4] == "."]
    names = list(dict.fromkeys(names))
    for name in names:
        if name.startswith("enc"):
            h = conv(h, name) if name.endswith("_conv") else block(h, name)
            skips.append(h)
        elif "_aux_" not in name:
            if "_block" in name:
                h = torch.cat([h, skips.pop()], 1)
            h = block(h, name)
    tail = ("out_norm", "out_conv") if adm else names[-2:]
    h = conv(F.silu(norm(h, tail[0])), tail[1])
    return sigma_data**2 / total * x + sigma * sigma_data / total.sqrt() * h


# ---- writing a pickle ----

SOURCE = "import pathlib\npathlib.Path('EXECUTED').touch()\n"       # EDM's own loader would run it


def _reconstruct_persistent_obj(meta):
    raise AssertionError("called")


class EasyDict(dict):
    pass


# under the names that EDM's have, so that pickle writes these names down
_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
EasyDict.__module__ = "dnnlib.util"
MODULES = {name: SimpleNamespace() for name in ("torch_utils", "dnnlib")}
MODULES["dnnlib.util"] = SimpleNamespace(EasyDict=EasyDict)
MODULES["torch_utils.persistence"] = SimpleNamespace(
    _reconstruct_persistent_obj=_reconstruct_persistent_obj)


class Persistent(torch.nn.Module):
    """A module of one of EDM's classes, pickled as its `persistent_class` does."""

    def __init__(self, kind, **given):
        super().__init__()
        self.kind, self._init_args, self._init_kwargs = kind, (), EasyDict(given)

    def __reduce__(self):
        meta = dict(type="class", version=6, module_src=SOURCE, class_name=self.kind)
        meta["state"] = {k: v for k, v in vars(self).items() if k != "kind"}
        return _reconstruct_persistent_obj, (meta,)


def edm_modules(net, weights, odd):
    """EDM's network as nested modules; its constructor arguments say what differs from defaults."""
    spec, adm = net.spec, net.adm
    usual = dict(num_blocks=3 if adm else 4, attn_resolutions=[32, 16, 8] if adm else [16])
    given = dict(num_blocks=spec["blocks"], attn_resolutions=list(spec["attention"]))
    given = {name: value for name, value in given.items() if value != usual[name]}
    if not adm:
        given["augment_dim"] = spec["augment_dim"]
    root = Persistent("DhariwalUNet" if adm else "SongUNet", **given, dropout=0.1,
                      img_resolution=spec["resolution"], in_channels=3, out_channels=3,
                      label_dim=spec["label_dim"], model_channels=spec["width"],
                      channel_mult=list(spec["mult"]))
    root.map_noise = Persistent("PositionalEmbedding", num_channels=spec["width"])
    for name, value in weights.items():
        *path, leaf = name.split(".")
        here = root
        for part in path:
            if part not in here._modules:
                here._modules[part] = Persistent("Any", kernel=3)
                if part in ("enc", "dec"):
                    here._modules[part] = torch.nn.ModuleDict()
                if part.endswith(("_down", "_up")):     # ADM's skip has no weights there
                    here._modules[part].skip = Persistent("Conv2d", kernel=0)
                    filters = torch.full((1, 1, 2, 2), 0.25)
                    here._modules[part].skip.register_buffer("resample_filter", filters)
                    here._modules[part].skip.register_parameter("weight", None)
            here = here._modules[part]
        here._parameters[leaf] = odd.get(name, torch.nn.Parameter(value, requires_grad=False))
    return root


def edm_bytes(net, weights=None, protocol=4, precond="EDMPrecond", sigma_data=0.5, odd={}):
    """A snapshot in EDM's format of a UNet, perhaps with other weights; odd {name: object} too."""
    given = dict(img_resolution=net.spec["resolution"], img_channels=3, label_dim=net.label_dim)
    outer = Persistent(precond, **given)
    vars(outer).update(given, sigma_min=0, sigma_max=float("inf"), sigma_data=sigma_data)
    outer.model = edm_modules(net, net.state_dict() if weights is None else weights, odd)
    pipe = Persistent("AugmentPipe", wavelets=np.asarray([0.5, -0.5]), scale=np.sqrt(0.5))
    snapshot = dict(ema=outer.eval(), loss_fn=Persistent("EDMLoss", P_mean=-1.2), augment_pipe=pipe,
                    dataset_kwargs=EasyDict(class_name="training.dataset.ImageFolderDataset"))
    with mock.patch.dict("sys.modules", MODULES):
        return pickle.dumps(snapshot, protocol)
