"""
FID of N CIFAR-10 training images against N of the test set: two sets that differ by chance alone. What the metric gives here is
what a perfect student gets at this N.

    python tests/bench_fid.py data data/inception-2015-12-05.pt 10000       # 20,000 images: seconds on a GPU, 1 to 2 hours of a CPU core
"""
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common


def images(folder, names, n):
    """The first n images (n, 3, 32, 32) uint8 of files of the binary version; fewer if they have no more."""
    rows = np.concatenate([np.fromfile(Path(folder) / "cifar-10-batches-bin" / f"{name}.bin", np.uint8).reshape(-1, 3073) for name in names])
    return torch.from_numpy(rows[:n, 1:].reshape(-1, 3, 32, 32).copy())


@torch.no_grad()
def main(folder, network, n=10000):
    device = common.pick_device(common.Shared())
    inception, stats = common.load_inception(network, device), []
    for what, names in (("train", [f"data_batch_{i}" for i in range(1, 6)]), ("test", ["test_batch"])):
        x = images(folder, names, int(n))
        stats.append(common.feature_statistics(x, inception, desc=what, device=device))
    (*train, real), (*test, held_out) = stats
    fid, (precision, recall) = common.frechet_distance(*train, *test), common.precision_recall(held_out, real)
    print(f"{len(x):,} training against {len(x):,} test images: FID {fid:.4f}, precision {precision:.3f}, recall {recall:.3f}")
    return fid


if __name__ == "__main__":
    main(*sys.argv[1:])
