"""The notebooks run from top to bottom, and are as small and plain as they should be."""
import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

from conftest import ROOT

NOTEBOOKS = sorted(p.name for p in (ROOT / "notebooks").glob("*.ipynb"))
SMALL = """
import json, re, sys
book = json.load(open(sys.argv[1]))
code = [c for c in book['cells'] if c['cell_type'] == 'code']
for c in code:
    c['source'] = re.sub(r'^(STEPS|FIT) = \\d+', r'\\1 = 20', ''.join(c['source']), flags=re.M)
code[0]['source'] = "import sys; sys.path[:0] = ['..']; import common; common.gallery.__defaults__ = (100,)\\n" + code[0]['source']
"""                                                             # few updates, and few of the teacher's samples in each run's picture
EXEC = SMALL + "import matplotlib; matplotlib.use('Agg'); names = {}\nfor c in code: exec(c['source'], names)"
KERNEL = SMALL + "import nbclient, nbformat; nbclient.NotebookClient(nbformat.from_dict(book), timeout=240, kernel_name='python3').execute()"
JUPYTER = all(importlib.util.find_spec(name) for name in ("nbclient", "ipykernel"))


@pytest.mark.background
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_runs(name, tmp_path):
    """Every code cell, in order and with few updates: in a Jupyter kernel where there is one (.ci/run), else in one namespace."""
    env = dict(os.environ, IPYTHONDIR=str(tmp_path), JUPYTER_RUNTIME_DIR=str(tmp_path), OMP_NUM_THREADS="1")
    p = subprocess.run([sys.executable, "-c", KERNEL if JUPYTER else EXEC, name], cwd=ROOT / "notebooks", env=env, capture_output=True, text=True,
                       timeout=240)
    assert p.returncode == 0, p.stderr


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_form(name):
    """At most 12 code cells, executed in order without errors, no magics, 150 KB, exercises at the end; the tests take fewer updates."""
    book = json.loads((ROOT / "notebooks" / name).read_text())
    code = [c for c in book["cells"] if c["cell_type"] == "code"]
    assert 0 < len(code) <= 12 and [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    assert (ROOT / "notebooks" / name).stat().st_size <= 150_000
    assert not any(line.startswith(("%", "!")) for c in code for line in "".join(c["source"]).splitlines())
    assert not any(o["output_type"] == "error" for c in code for o in c["outputs"])
    assert "Exercises" in "".join(book["cells"][-1]["source"]) and "\nSTEPS = " in "".join(code[0]["source"])
    pictures = re.findall(r"!\[.*?\]\((\S+?)\)", "".join("".join(c["source"]) for c in book["cells"] if c["cell_type"] == "markdown"))
    assert all((ROOT / "notebooks" / p).exists() for p in pictures)
