"""
EDM's checkpoint format from its facts, written without EDM's code: pickles as its `persistence` module makes them, the
names and sizes of its two networks as data, and its forward pass in plain functions of tensors.
"""
import pickle
import sys
import types
from collections import OrderedDict

import numpy as np
import torch
import torch.nn.functional as F

# block, channels in, channels out; "+" has attention, "=" has a skip convolution though the channels stay the same
DDPMPP = """
enc.32x32_block0 128 256, enc.32x32_block1 256 256, enc.32x32_block2 256 256, enc.32x32_block3 256 256, enc.16x16_down 256 256 =,
enc.16x16_block0 256 256 +, enc.16x16_block1 256 256 +, enc.16x16_block2 256 256 +, enc.16x16_block3 256 256 +, enc.8x8_down 256 256 =,
enc.8x8_block0 256 256, enc.8x8_block1 256 256, enc.8x8_block2 256 256, enc.8x8_block3 256 256,
dec.8x8_in0 256 256 +, dec.8x8_in1 256 256, dec.8x8_block0 512 256, dec.8x8_block1 512 256, dec.8x8_block2 512 256,
dec.8x8_block3 512 256, dec.8x8_block4 512 256, dec.16x16_up 256 256 =, dec.16x16_block0 512 256, dec.16x16_block1 512 256,
dec.16x16_block2 512 256, dec.16x16_block3 512 256, dec.16x16_block4 512 256 +, dec.32x32_up 256 256 =, dec.32x32_block0 512 256,
dec.32x32_block1 512 256, dec.32x32_block2 512 256, dec.32x32_block3 512 256, dec.32x32_block4 384 256"""
ADM = """
enc.64x64_block0 192 192, enc.64x64_block1 192 192, enc.64x64_block2 192 192, enc.32x32_down 192 192, enc.32x32_block0 192 384 +,
enc.32x32_block1 384 384 +, enc.32x32_block2 384 384 +, enc.16x16_down 384 384, enc.16x16_block0 384 576 +, enc.16x16_block1 576 576 +,
enc.16x16_block2 576 576 +, enc.8x8_down 576 576, enc.8x8_block0 576 768 +, enc.8x8_block1 768 768 +, enc.8x8_block2 768 768 +,
dec.8x8_in0 768 768 +, dec.8x8_in1 768 768, dec.8x8_block0 1536 768 +, dec.8x8_block1 1536 768 +, dec.8x8_block2 1536 768 +,
dec.8x8_block3 1344 768 +, dec.16x16_up 768 768, dec.16x16_block0 1344 576 +, dec.16x16_block1 1152 576 +, dec.16x16_block2 1152 576 +,
dec.16x16_block3 960 576 +, dec.32x32_up 576 576, dec.32x32_block0 960 384 +, dec.32x32_block1 768 384 +, dec.32x32_block2 768 384 +,
dec.32x32_block3 576 384 +, dec.64x64_up 384 384, dec.64x64_block0 576 192, dec.64x64_block1 384 192, dec.64x64_block2 384 192,
dec.64x64_block3 384 192"""


def expected(kind):
    """{name: size} of every parameter of EDM's networks: kind is cond, uncond (CIFAR-10) or adm (ImageNet-64)."""
    adm = kind == "adm"
    width, table = (192, ADM) if adm else (128, DDPMPP)
    layer = lambda name, *size: {f"{name}.weight": size, f"{name}.bias": size[:1]}
    out = {**layer("map_layer0", 4 * width, width), **layer("map_layer1", 4 * width, 4 * width)}
    out |= {"map_label.weight": (768, 1000)} if adm else {"map_augment.weight": (128, 9)}
    out |= layer("map_label", 128, 10) if kind == "cond" else {}
    out |= layer("enc.64x64_conv" if adm else "enc.32x32_conv", width, 3, 3, 3)
    for name, c_in, c_out, *marks in (row.split() for row in table.split(",")):
        c_in, c_out = int(c_in), int(c_out)
        out |= {**layer(f"{name}.norm0", c_in), **layer(f"{name}.conv0", c_out, c_in, 3, 3), **layer(f"{name}.norm1", c_out)}
        out |= {**layer(f"{name}.affine", (2 if adm else 1) * c_out, 4 * width), **layer(f"{name}.conv1", c_out, c_out, 3, 3)}
        out |= layer(f"{name}.skip", c_out, c_in, 1, 1) if c_in != c_out or "=" in marks else {}
        if "+" in marks:
            out |= {**layer(f"{name}.norm2", c_out), **layer(f"{name}.qkv", 3 * c_out, c_out, 1, 1), **layer(f"{name}.proj", c_out, c_out, 1, 1)}
    tail = ("out_norm", "out_conv") if adm else ("dec.32x32_aux_norm", "dec.32x32_aux_conv")
    return {**out, **layer(tail[0], width if adm else 256), **layer(tail[1], 3, width if adm else 256, 3, 3)}


def forward(W, x, sigma, label=None, sigma_data=0.5):
    """D(x, sigma, label) of EDM's network with weights W {name: tensor}, from the thirteen facts alone."""
    adm, f = "out_norm.weight" in W, torch.full((1, 1, 2, 2), 0.25)
    linear = lambda h, name: F.linear(h, W[f"{name}.weight"], W.get(f"{name}.bias"))
    conv = lambda h, name: F.conv2d(h, W[f"{name}.weight"], W[f"{name}.bias"], padding=W[f"{name}.weight"].shape[-1] // 2)
    norm = lambda h, name: F.group_norm(h, min(32, h.shape[1] // 4), W[f"{name}.weight"], W[f"{name}.bias"], 1e-5 if adm else 1e-6)

    def resample(h, name):
        c = h.shape[1]
        if name.endswith("_up"):
            return F.conv_transpose2d(h, 4 * f.expand(c, 1, 2, 2), stride=2, groups=c)
        return F.conv2d(h, f.expand(c, 1, 2, 2), stride=2, groups=c) if name.endswith("_down") else h

    def block(h, name):
        skip = resample(h, name)
        skip = conv(skip, f"{name}.skip") if f"{name}.skip.weight" in W else skip
        h = conv(resample(F.silu(norm(h, f"{name}.norm0")), name), f"{name}.conv0")
        e = linear(emb, f"{name}.affine")[:, :, None, None]
        if adm:
            scale, shift = e.chunk(2, 1)
            h = F.silu(norm(h, f"{name}.norm1") * (scale + 1) + shift)
        else:
            h = F.silu(norm(h + e, f"{name}.norm1"))
        factor = 1 if adm else np.sqrt(0.5)
        h = (conv(h, f"{name}.conv1") + skip) * factor
        if f"{name}.qkv.weight" in W:
            b, c, height, w = h.shape
            heads = c // 64 if adm else 1
            q, k, v = conv(norm(h, f"{name}.norm2"), f"{name}.qkv").reshape(b * heads, c // heads, 3, -1).unbind(2)
            a = torch.einsum("nqk,nck->ncq", torch.einsum("ncq,nck->nqk", q, k / np.sqrt(k.shape[1])).softmax(2), v)
            h = (h + conv(a.reshape(b, c, height, w), f"{name}.proj")) * factor
        return h

    s = sigma.reshape(-1, 1, 1, 1)
    half = W["map_layer0.weight"].shape[1] // 2
    angle = (sigma.log() / 4)[:, None] * (1 / 10000) ** (torch.arange(half) / (half if adm else half - 1))
    if adm:
        emb = linear(F.silu(linear(torch.cat([angle.cos(), angle.sin()], 1), "map_layer0")), "map_layer1")
        emb = F.silu(emb if label is None else emb + linear(label, "map_label"))
    else:
        emb = torch.cat([angle.sin(), angle.cos()], 1)
        emb = emb if label is None else emb + linear(label * np.sqrt(label.shape[1]), "map_label")
        emb = F.silu(linear(F.silu(linear(emb, "map_layer0")), "map_layer1"))
    names = list(dict.fromkeys(".".join(k.split(".")[:2]) for k in W if k.startswith(("enc.", "dec."))))
    h, skips = x / (s**2 + sigma_data**2).sqrt(), []
    for name in names:
        if name.endswith("_conv") and name.startswith("enc"):
            h = conv(h, name)
        elif "_aux_" not in name:
            if h.shape[1] != W[f"{name}.conv0.weight"].shape[1]:
                h = torch.cat([h, skips.pop()], 1)
            h = block(h, name)
        if name.startswith("enc"):
            skips.append(h)
    tail = ("out_norm", "out_conv") if adm else [n for n in names if "_aux_" in n]
    h = conv(F.silu(norm(h, tail[0])), tail[1])
    return sigma_data**2 / (s**2 + sigma_data**2) * x + s * sigma_data / (s**2 + sigma_data**2).sqrt() * h


# ---- writing a pickle -----------------------------------------------------------------------------------------------

SOURCE = "import pathlib\npathlib.Path('EXECUTED').touch()\n"          # what EDM's own loader would run


class Persistent(torch.nn.Module):
    """A module of one of EDM's classes, pickled as its `persistent_class` does."""

    def __init__(self, kind, **state):
        super().__init__()
        self.__dict__.update(state, kind=kind, _init_args=(), _init_kwargs=sys.modules["dnnlib.util"].EasyDict(state))

    def __reduce__(self):
        state = {k: v for k, v in self.__dict__.items() if k != "kind"}
        meta = dict(type="class", version=6, module_src=SOURCE, class_name=self.kind, state=state)
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,), None


def _fake_modules():
    """Modules of the names that EDM's classes have, so that pickle writes these names down."""
    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("called")
    _reconstruct_persistent_obj.__module__, _reconstruct_persistent_obj.__qualname__ = "torch_utils.persistence", "_reconstruct_persistent_obj"
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj
    util.EasyDict = type("EasyDict", (dict,), dict(__module__="dnnlib.util"))
    return {"torch_utils": types.ModuleType("torch_utils"), "torch_utils.persistence": persistence,
            "dnnlib": types.ModuleType("dnnlib"), "dnnlib.util": util}


def edm_bytes(weights, protocol=4, precond="EDMPrecond", sigma_data=0.5, half=False, odd={}):
    """A training snapshot in EDM's format with the weights {name: tensor} as its network, as bytes; odd {name: object} replace some."""
    old = {name: sys.modules.get(name) for name in _fake_modules()}
    sys.modules.update(_fake_modules())
    try:
        adm = "out_norm.weight" in weights
        channels = weights["map_layer0.weight"].shape[1]
        root = Persistent("DhariwalUNet" if adm else "SongUNet", model_channels=channels, label_dropout=0)
        root.map_noise = Persistent("PositionalEmbedding", num_channels=channels, max_positions=10000, endpoint=not adm)
        modules = {"": root}
        for name, value in weights.items():
            *path, leaf = name.split(".")
            for i in range(len(path)):
                here, parent = ".".join(path[:i + 1]), modules[".".join(path[:i])]
                if here not in modules:
                    kind = "UNetBlock" if i == 1 and len(path) == 3 else "Linear" if value.ndim == 2 else "Conv2d" if value.ndim == 4 else "GroupNorm"
                    modules[here] = torch.nn.ModuleDict() if here in ("enc", "dec") else Persistent(kind, skip_scale=np.sqrt(0.5))
                    parent._modules[path[i]] = modules[here]
            value = torch.nn.Parameter(value.half() if half else value, requires_grad=False)
            modules[".".join(path)]._parameters[leaf] = odd.get(name, value)
        for here, module in list(modules.items()):
            if here.endswith(("_down", "_up")):
                if "skip" not in module._modules:           # ADM: a skip that only resamples
                    module.skip = Persistent("Conv2d", weight=None, bias=None)
                for conv in (module.conv0, module.skip):
                    conv.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25))
            elif getattr(module, "kind", "") == "Conv2d":
                module.register_buffer("resample_filter", None)
        net = Persistent(precond, img_resolution=32, img_channels=3, sigma_min=0, sigma_max=float("inf"), sigma_data=sigma_data, use_fp16=False)
        net.model = root
        loss = Persistent("EDMLoss", P_mean=-1.2, P_std=1.2, sigma_data=0.5)
        pipe = Persistent("AugmentPipe", p=0.12, wavelets=np.asarray([0.5, -0.5]))
        return pickle.dumps(dict(ema=net.eval(), loss_fn=loss, augment_pipe=pipe,
                                 dataset_kwargs=sys.modules["dnnlib.util"].EasyDict(class_name="training.dataset.ImageFolderDataset", xflip=False)), protocol)
    finally:
        for name, module in old.items():
            sys.modules.pop(name) if module is None else sys.modules.__setitem__(name, module)
