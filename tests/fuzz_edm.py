"""
Hostile and damaged .pkl files against load_edm: none may run a call, hang, or end in anything but success or the one sentence.

    python tests/fuzz_edm.py [files] [seed]       # 12,000 files, a few minutes of one core

Python's audit hook watches each load: imports, exec, processes, sockets and any file opened but the checkpoint count as a call.
"""
import collections
import pickle
import random
import struct
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import common
from edm_format import edm_bytes

watching, events = [], []
FORBIDDEN = ("import", "exec", "compile", "open", "os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pickle.find_class", "urllib.",
             "marshal.", "code.", "builtins.input", "builtins.breakpoint", "sys.addaudithook", "webbrowser.", "tempfile.", "glob.", "pty.", "signal.")


def _hook(event, args):
    if watching and threading.current_thread() is threading.main_thread() and event.startswith(FORBIDDEN) and not (event == "open" and str(args[0]) == watching[0]):
        events.append((event, str(args)[:100]))


def watch(path):
    """Install the hook, once; it cannot be taken away again and sleeps outside of `load`. What is imported at first use, before."""
    str(b"a", "raw-unicode-escape")                     # a codec of Python's own, of pickletools
    for adm in (False, True):
        path.write_bytes(edm_bytes(tiny(adm)))
        common.load_edm(path, common.Shared(device="cpu"))
    if not getattr(sys, "_onestep_audit", False):
        sys.addaudithook(_hook)
        sys._onestep_audit = True


def load(path):
    """'loaded' or 'refused', seconds; AssertionError if the file made Python do something or another error came out."""
    events.clear()
    watching.append(str(path))
    start, error = time.perf_counter(), None
    try:
        common.load_edm(path, common.Shared(device="cpu"))
    except common.UserError as e:
        error = str(e)
    except BaseException as e:
        raise AssertionError(f"{type(e).__name__}: {e}") from e
    finally:
        watching.clear()
    assert not events, events[:3]
    assert error is None or ("is no EDM checkpoint: " in error and "\n" not in error and len(error) < 400 + len(str(path))), error
    return "refused" if error else "loaded", time.perf_counter() - start


def tiny(adm=False):
    """Weights of a very small network of EDM's kind."""
    net = common.UNet(8, 3, 2, width=4, mult=(1, 1), blocks=1, attention=(4,), augment_dim=0 if adm else 9, adm=adm)
    return {k: v.detach() for k, v in net.state_dict().items()}


def short(text):
    return b"\x8c" + bytes([len(text)]) + text.encode()


def crafted():
    """Files made by hand, {name: bytes}: calls by every route that pickle has, bombs, and tensors that lie."""
    good = edm_bytes(tiny())
    call = lambda module, name, arg: b"c" + f"{module}\n{name}\n".encode() + short(arg) + b"\x85R"
    out = {"good": good, "adm": edm_bytes(tiny(True)), "empty": b"", "stop": b".", "none": b"N.", "zeros": bytes(1000), "text": b"hello",
           "html": b"\n <!DOCTYPE html><html></html>", "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 223\n"}
    for module, name in (("os", "system"), ("posix", "system"), ("builtins", "eval"), ("builtins", "exec"), ("__builtin__", "eval"), ("subprocess", "Popen"),
                         ("builtins", "__import__"), ("builtins", "getattr"), ("torch", "load"), ("torch.hub", "load"), ("torch.storage", "_load_from_bytes"),
                         ("numpy", "load"), ("numpy.testing._private.utils", "runstring"), ("torch.utils.cpp_extension", "load"), ("torch.serialization", "os.system"),
                         ("torch._utils", "os.system"), ("torch_utils.persistence", "exec"), ("dnnlib.util", "call_func_by_name"), ("collections", "OrderedDict"),
                         ("torch.jit", "load"), ("numpy.core.multiarray", "fromfile"), ("torch.nn", "__builtins__"), ("importlib", "import_module")):
        text = "touch EXECUTED"
        for i, raw in enumerate((call(module, name, text), short(module) + short(name) + b"\x93" + short(text) + b"\x85R",
                                 b"(" + short(text) + b"i" + f"{module}\n{name}\n".encode(), b"(c" + f"{module}\n{name}\n".encode() + short(text) + b"o",
                                 b"c" + f"{module}\n{name}\n".encode() + short(text) + b"\x85\x81", b"c" + f"{module}\n{name}\n".encode() + short(text) + b"\x85}\x92",
                                 call(module, name, text) + short(text) + b"b")):
            out[f"{module}.{name} {i}"] = b"\x80\x04" + raw + b"."
            if i == 0:
                out[f"{module}.{name} beside a network"] = good.replace(b"\x80\x04", b"\x80\x04" + raw + b"0", 1)
    for i in (b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00", b"Pos.system\n", b"N\x51", b"\x97", b"N\x98"):
        out[f"instruction {i}"] = b"\x80\x04" + i + b"."
    doubling = b")" + b"q\x00h\x00\x86" * 200
    out["tuple that doubles 200 times, as a key"] = b"\x80\x04}" + doubling + b"Ns."
    out["the same in a set"] = b"\x80\x04\x8f(" + doubling + b"\x90."
    out["the same, frozen"] = b"\x80\x04(" + doubling + b"\x91."
    out["the same as ema"] = b"\x80\x04}" + short("ema") + doubling + b"s."
    out["the same as a name"] = b"\x80\x04" + doubling + short("x") + b"\x93."
    out["the same as a class"] = b"\x80\x04}" + short("ema") + b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n}" + short("class_name") + \
        doubling + b"s\x85Rs."
    out["numbers of equal hash"] = b"\x80\x04}(" + b"".join(b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") + b"N" for k in range(1, 50000)) + b"u."
    for n in (10**3, 10**5, 900_000):
        out[f"{n} tuples in one another"] = b"\x80\x04)" + b"\x85" * n + b"."
        out[f"{n} lists in one another"] = b"\x80\x04" + b"]" * n + b"a" * (n - 1) + b"."
        out[f"{n} marks"] = b"\x80\x04" + b"(" * n + b"t" * n + b"."
    out["too many instructions"] = b"\x80\x04" + b"N0" * 600_000 + b"."
    for n in (2**31 - 1, 2**32 - 1):
        out[f"{n} bytes promised"] = b"\x80\x04B" + struct.pack("<I", n) + b"x."
    for n in (2**40, 2**62, 2**63 - 1, 2**64 - 1):
        for op in (b"\x8e", b"\x8d", b"\x96", b"\x95"):
            out[f"{n} bytes promised {op}"] = b"\x80\x04" + op + struct.pack("<Q", n) + b"x."
    out["a long number"] = b"\x80\x04L" + b"9" * 10**6 + b"L\n."
    out["a longer number"] = b"\x80\x04\x8b" + struct.pack("<i", 10**6) + b"\x7f" * 10**6 + b"."
    out["a negative length"] = b"\x80\x04\x8b" + struct.pack("<i", -1) + b"."

    class Tensor:
        def __init__(self, change):
            self.change = change

        def __reduce__(self):
            args = self.change(torch.zeros(16)._typed_storage(), 0, (16,), (1,))
            return torch._utils._rebuild_tensor_v2, (*args, False, collections.OrderedDict())

    def lie(change):                        # a file of which one tensor, of 16 numbers, is not what its record says
        return edm_bytes(tiny(), odd={"map_layer0.bias": Tensor(change)})

    double = ()
    for _ in range(200):
        double = (double, double)

    class Odd:
        def __init__(self, raw):
            self.raw = raw

        def __reduce__(self):
            return torch.storage._load_from_bytes, (self.raw,)
    storage = torch.zeros(16)._typed_storage().__reduce__()[1][0]
    out |= {"honest tensor": lie(lambda s, o, n, d: (s, o, n, d)), "offset outside": lie(lambda s, o, n, d: (s, 8, n, d)),
            "huge offset": lie(lambda s, o, n, d: (s, 2**62, n, d)), "negative offset": lie(lambda s, o, n, d: (s, -1, n, d)),
            "huge stride": lie(lambda s, o, n, d: (s, o, n, (2**60,))), "negative stride": lie(lambda s, o, n, d: (s, o, n, (-1,))),
            "stride 0 over a short storage": lie(lambda s, o, n, d: (torch.zeros(1)._typed_storage(), o, n, (0,))),
            "huge size": lie(lambda s, o, n, d: (s, o, (2**50,), (0,))), "100,000 axes": lie(lambda s, o, n, d: (s, o, (1,) * 10**5, (1,) * 10**5)),
            "size of 2^200 parts": lie(lambda s, o, n, d: (s, o, double, d)), "stride of them": lie(lambda s, o, n, d: (s, o, n, double)),
            "offset of them": lie(lambda s, o, n, d: (s, double, n, d)), "sizes of a million digits": lie(lambda s, o, n, d: (s, o, (1 << 4 * 10**6,), d)),
            "size of strings": lie(lambda s, o, n, d: (s, o, ("16",), d)), "size True": lie(lambda s, o, n, d: (s, o, (16.0,), d)),
            "no storage": lie(lambda s, o, n, d: (None, o, n, d)), "storage of text": lie(lambda s, o, n, d: (Odd("text"), o, n, d)),
            "whole torch.save": lie(lambda s, o, n, d: (Odd(b"PK\3\4" + bytes(100)), o, n, d)), "short": lie(lambda s, o, n, d: (Odd(storage[:-8]), o, n, d)),
            "long count": lie(lambda s, o, n, d: (Odd(storage[:-72] + b"\xff" * 8 + storage[-64:]), o, n, d)),
            "count 2^40": lie(lambda s, o, n, d: (Odd(storage[:-72] + struct.pack("<Q", 2**40) + storage[-64:]), o, n, d)),
            "evil storage": lie(lambda s, o, n, d: (Odd(b"\x80\x02cos\nsystem\n" + short("touch EXECUTED") + b"\x85R."), o, n, d)),
            "evil pickle in storage": lie(lambda s, o, n, d: (Odd(storage.replace(b"ctorch\nFloatStorage", b"cos\nsystem\n")), o, n, d))}
    W = tiny()
    for name, value in {"width of a million": torch.zeros(1, 3, 3, 3).expand(10**6, 3, 3, 3), "no channels": torch.zeros(0, 3, 3, 3)}.items():
        out[name] = edm_bytes({**W, "enc.8x8_conv.weight": value})
    out["level 10^9"] = edm_bytes({k.replace("8x8", "1000000000x1000000000"): v for k, v in W.items()})
    out["level of 5000 digits"] = edm_bytes({k.replace("8x8", "9" * 5000 + "x" + "9" * 5000): v for k, v in W.items()})
    for precond in ("VPPrecond", "", "x\ny" * 1000):
        out[f"class {precond[:9]!r}"] = edm_bytes(W, precond=precond)
    for sigma in (float("nan"), -1.0, 0, "0.5x", None, 10**400):
        out[f"sigma_data {str(sigma)[:9]}"] = edm_bytes(W, sigma_data=sigma)
    # modules inside one another: itself, and a tower in which each storey holds the one below twice
    meta = lambda modules: b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n}(" + short("class_name") + short("EDMPrecond") + short("state") + \
        b"}(" + short("_parameters") + b"}" + short("_buffers") + b"}" + short("_modules") + modules + b"uu\x85R"
    tower = meta(b"}")
    for i in range(60):
        tower += bytes([0x71, i, 0x30]) + meta(b"}(" + short("a") + bytes([0x68, i]) + short("b") + bytes([0x68, i]) + b"u")
    out["a tower of modules"] = b"\x80\x04}" + short("ema") + tower + b"s."
    out["a module in itself"] = b"\x80\x04}" + short("ema") + meta(b"}q\x00" + short("a") + b"h\x00s") + b"s."
    chain = meta(b"}") + b"r" + struct.pack("<I", 0) + b"0"
    for i in range(3000):
        chain += meta(b"}" + short("a") + b"j" + struct.pack("<I", i) + b"s") + b"r" + struct.pack("<I", i + 1) + b"0"
    out["3000 modules in one another"] = b"\x80\x04}" + short("ema") + chain + b"j" + struct.pack("<I", 3000) + b"s."
    return out


def mutated(rng, base, parts):
    """One damaged copy of `base`: bits, bytes, cuts, repeats, exchanged numbers and names, pieces of `parts` put in."""
    raw = bytearray(base)
    where = lambda: min(len(raw) - 1, int(len(raw) * rng.random() ** rng.choice((1, 3))))       # the front is denser in structure
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        kind, i = rng.randrange(9), where()
        if kind == 0:
            raw[i] ^= 1 << rng.randrange(8)
        elif kind == 1:
            raw[i] = rng.randrange(256)
        elif kind == 2:
            raw = raw[:i + 1]
        elif kind == 3:
            del raw[i:i + rng.randrange(1, 64)]
        elif kind == 4:
            j = where()
            raw[i:i] = raw[j:j + rng.randrange(1, 256)]
        elif kind == 5:
            raw[i:i + 4] = struct.pack("<I", rng.choice((0, 1, 2**31 - 1, 2**32 - 1, rng.getrandbits(32))))
        elif kind == 6:
            raw[i:i] = bytes(rng.choices(b"().0123NRbctijopqrsu]}\x81\x85\x86\x87\x88\x89\x8c\x8f\x90\x93\x94\x95", k=rng.randrange(1, 12)))
        elif kind == 7:
            part = rng.choice(parts)
            j = rng.randrange(len(part) + 1)
            raw[i:i] = part[j:j + rng.randrange(1, 200)]
        else:
            words = (b"torch._utils", b"_rebuild_tensor_v2", b"_load_from_bytes", b"torch.storage", b"_parameters", b"_modules", b"state", b"FloatStorage", b"ema")
            word = rng.choice(words)
            raw = raw.replace(word, rng.choice((b"os", b"system", b"eval", b"builtins", *words)), rng.choice((1, -1)))
        if not raw:
            break
    return bytes(raw)


def main(files=12_000, seed=0):
    rng, counts, slowest = random.Random(seed), collections.Counter(), (0, "")
    folder = Path(tempfile.mkdtemp())
    path, made = folder / "x.pkl", crafted()
    watch(path)
    bases, parts = [edm_bytes(tiny(adm), protocol) for adm in (False, True) for protocol in (3, 4, 5)], list(made.values())
    parts = [p for p in parts if len(p) < 10**6]
    for i in range(max(files, len(made))):
        name, raw = list(made.items())[i] if i < len(made) else (f"mutation {i}", mutated(rng, rng.choice(bases), parts))
        path.write_bytes(raw)
        try:
            result, seconds = load(path)
        except AssertionError:
            Path("failed.pkl").write_bytes(raw)
            print(f"{name}: failed.pkl")
            raise
        counts[result] += 1
        slowest = max(slowest, (seconds, name))
        assert seconds < 20, (name, seconds)
        assert not list(folder.glob("EXECUTED")) and not Path("EXECUTED").exists()
    print(f"{i + 1:,} files ({len(made)} made by hand), seed {seed}: {counts['loaded']:,} loaded, {counts['refused']:,} refused with one sentence, "
          f"no call, slowest {slowest[0]:.2f} s ({slowest[1]})")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
