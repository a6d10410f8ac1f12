"""
Memory of distilling EDM's networks on one GPU: what a step must hold, computed; on a GPU also measured.

    python tests/bench_memory.py            # ImageNet-64 (ADM): under a minute of one core, 7 GB
    python tests/bench_memory.py cifar10    # DDPM++

Held all the time, in float32: teacher, student, fake score, average, two Adam states of two numbers a weight each, one set of
gradients (student and fake score learn in turn, gradients are freed in between): nine times the weights. In the graph, for each
network of it: bf16 copies of the weights, which autocast makes, and per sample what autograd keeps for the backward pass. That is
counted in a real forward pass of one sample, every storage once, in float32: on CUDA autocast runs the norms in float32 and the
convolutions in bf16, which keeps copies of both kinds, about 10 bytes where float32 keeps 12 (norm, SiLU, convolution). With
--recompute: the outputs of all blocks and what the largest block keeps. Not counted: work space of the libraries and fragments,
for which a tenth of the card is left.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

GRAPHS = dict(fdistill=2, dmd=2, sim=3)             # student and fake score; sim's gradient passes through the teacher too
CARDS = (24, 48, 80, 141)                           # 10^9 bytes, as the cards are named


def kept(denoiser):
    """(bytes that autograd keeps of one sample, the same with --recompute), without the weights themselves."""
    seen, outputs, block, each = {}, {}, [None], {}
    own = {p.untyped_storage().data_ptr() for p in denoiser.parameters()}

    def note(into, t):
        store = t.untyped_storage()
        new = store.data_ptr() not in own and store.data_ptr() not in into
        if new:
            into[store.data_ptr()] = store.nbytes(), t                          # held, so that no address comes twice
        return store.nbytes() if new else 0

    def pack(t):
        each[block[0]] = each.get(block[0], 0) + note(seen, t)
        return t
    for module in denoiser.modules():
        if isinstance(module, common.Block):
            module.register_forward_pre_hook(lambda module, args: block.__setitem__(0, module))
            module.register_forward_hook(lambda module, args, out: (note(outputs, out), block.__setitem__(0, None)) and None)
    x = torch.randn(1, *denoiser.shape, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        denoiser(x, torch.ones(1), torch.eye(denoiser.label_dim)[:1])
    outside = each.pop(None, 0)
    return sum(each.values()) + outside, sum(size for size, _ in outputs.values()) + outside + max(each.values())


def measured(denoiser, n):
    """Peak bytes of n samples through a forward and backward pass on the GPU, beyond what was held before."""
    x = torch.randn(n, *denoiser.shape, device="cuda", requires_grad=True)
    label = torch.eye(denoiser.label_dim, device="cuda")[:1].expand(n, -1)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(denoiser(x, torch.ones(n, device="cuda"), label).square().sum(), x)
    return torch.cuda.max_memory_allocated() - before


def main(data="imagenet64"):
    net = common.UNet.adm() if data == "imagenet64" else common.UNet.ddpmpp(label_dim=10)
    weights = 4 * sum(p.numel() for p in net.parameters())
    fixed, copies = 9 * weights, weights / 2
    print(f"{data}: weights {weights / 1e9:.2f} GB, held all the time {fixed / 1e9:.1f} GB, bf16 copies {copies / 1e9:.2f} GB a network")
    for flag, sample in zip(("without --recompute", "with --recompute"), kept(common.Denoiser(net))):
        print(f"{flag}: {sample / 1e6:.0f} MB a sample and network in the graph")
        for script, graphs in GRAPHS.items():
            fits = [int((0.9e9 * card - fixed - graphs * copies) / (graphs * sample)) for card in CARDS]
            print(f"  {script:9s} --micro at most " + ", ".join(f"{max(n, 0)} on {card} GB" for card, n in zip(CARDS, fits)))
    if torch.cuda.is_available():
        denoiser = common.Denoiser(net, dtype="bf16").cuda().to(memory_format=torch.channels_last)
        for denoiser.net.recompute in (False, True):
            peak = [measured(denoiser, n) for n in (2, 2, 6)][1:]              # once to warm up
            print(f"measured, recompute {denoiser.net.recompute}: {(peak[1] - peak[0]) / 4e6:.0f} MB a sample and network")


if __name__ == "__main__":
    main(*sys.argv[1:])
