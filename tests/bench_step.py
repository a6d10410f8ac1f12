"""
Updates per second of each script, and memory, in one run.

    python tests/bench_step.py [--data moons ...]
"""
import importlib
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def measure(name, flags, folder):
    """Seconds of 300 updates with a cached teacher, from metrics.json, and peak memory in GiB."""
    import torch
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    import common
    module = importlib.import_module(name)
    common.Run.show = lambda *_: None
    cfg = common.parse(module.Config, module.PRESETS, ["--steps", "300", "--teacher_steps", "200",
                                                       "--out", f"{folder}/{name}", *flags])
    _, run = module.train(cfg)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps(dict(rate=run.step / run.seconds, memory=memory)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(sys.argv[2], sys.argv[4:], sys.argv[3])
    else:
        with tempfile.TemporaryDirectory() as folder:
            for script in ("fdistill", "dmd", "sim", "consistency", "rectflow"):
                command = [sys.executable, __file__, "measure", script, folder, *sys.argv[1:]]
                p = subprocess.run(command, capture_output=True, text=True, check=True)
                found = json.loads(p.stdout.splitlines()[-1])
                print(f"{script}: {found['rate']:.1f} updates/s, {found['memory']:.1f} GiB")
