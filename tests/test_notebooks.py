"""The notebooks run from top to bottom, and are as small and plain as they should be."""
import json
import subprocess
import sys

import pytest

from conftest import ROOT

NOTEBOOKS = sorted(p.name for p in (ROOT / "notebooks").glob("*.ipynb"))
RUN = "import json, sys, matplotlib; matplotlib.use('Agg'); names = {}\n" \
      "for c in json.load(open(sys.argv[1]))['cells']: c['cell_type'] == 'code' and exec(''.join(c['source']), names)"


@pytest.mark.background
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_runs(name, tmp_path):
    """Every code cell, in order, in one namespace and in the notebooks' folder."""
    p = subprocess.run([sys.executable, "-c", RUN, name], cwd=ROOT / "notebooks", capture_output=True, text=True, timeout=240)
    assert p.returncode == 0, p.stderr


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_form(name):
    """At most 12 code cells, executed in order without errors, no magics, 150 KB, exercises at the end."""
    book = json.loads((ROOT / "notebooks" / name).read_text())
    code = [c for c in book["cells"] if c["cell_type"] == "code"]
    assert 0 < len(code) <= 12 and [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    assert (ROOT / "notebooks" / name).stat().st_size <= 150_000
    assert not any(line.startswith(("%", "!")) for c in code for line in "".join(c["source"]).splitlines())
    assert not any(o["output_type"] == "error" for c in code for o in c["outputs"])
    assert "Exercises" in "".join(book["cells"][-1]["source"])
