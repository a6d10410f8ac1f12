"""
The notebooks run from top to bottom, and are as small and plain as they should be.

    python tests/test_notebooks.py notebooks/3_sim.ipynb ...    # runs them, stores their outputs
"""
import base64, importlib.util, io, json, os, re, subprocess, sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NAMES = sorted(path.name for path in FOLDER.glob("*.ipynb"))


def execute(file):
    """Run and store a notebook, pictures in 48 colours; as plain Python if Jupyter is missing."""
    if not all(importlib.util.find_spec(name) for name in ("nbclient", "ipykernel")):
        cells = json.loads(file.read_text())["cells"]
        return exec("\n".join("".join(c["source"]) for c in cells if "outputs" in c), {})
    import nbclient, nbformat
    from PIL import Image
    book = nbformat.read(file, 4)
    nbclient.NotebookClient(book, timeout=300, record_timing=False, coalesce_streams=True).execute()
    for output in [o for cell in book.cells for o in cell.get("outputs", [])]:
        if "image/png" in output.get("data", {}):
            small, picture = io.BytesIO(), io.BytesIO(base64.b64decode(output.data["image/png"]))
            Image.open(picture).convert("RGB").quantize(48, dither=0).save(small, "png")
            output.data["image/png"] = base64.b64encode(small.getvalue()).decode()
    nbformat.write(book, file)


@pytest.mark.background
@pytest.mark.parametrize("name", NAMES)
def test_runs(tmp_path, name):
    """Every cell, in order, with few updates and a tenth of the samples."""
    few = re.sub(r"(STEPS|FIT) = \d+", r"\1 = 10", (FOLDER / name).read_text())
    (tmp_path / name).write_text(few.replace("000", "00"))
    env = dict(os.environ, IPYTHONDIR=str(tmp_path), JUPYTER_RUNTIME_DIR=str(tmp_path),
               OMP_NUM_THREADS="1", MPLBACKEND="agg")
    p = subprocess.run([sys.executable, __file__, tmp_path / name], cwd=FOLDER, env=env, stderr=-1,
                       timeout=240)
    assert p.returncode == 0, p.stderr


@pytest.mark.parametrize("name", NAMES)
def test_form(name):
    """At most 12 code cells, run in order, no magics, 200 KB, wide pictures, 2 to 4 exercises."""
    raw = (FOLDER / name).read_text()
    cells, pngs = json.loads(raw)["cells"], re.findall(r'"image/png": "([^"\\]+)', raw)
    code = ["".join(c["source"]) for c in cells if "outputs" in c]
    assert [c["execution_count"] for c in cells if "outputs" in c] == [*range(1, len(code) + 1)]
    assert not re.search("^[%!]|^.{101}", "\n".join(code), re.M) and "\nSTEPS = " in code[0]
    assert len(code) <= 12 and len(raw) <= 200_000 and not re.search('"(error|stderr)"', raw)
    assert pngs and all(int.from_bytes(base64.b64decode(p)[16:20], "big") >= 900 for p in pngs)
    assert 2 <= len(re.findall(r'"\d\. ', raw.split("## Exercises")[1])) <= 4
    assert all((FOLDER / p).exists() for p in re.findall(r"!\[.*?\]\((\S+?)\)", raw))


for path in sys.argv[1:] if __name__ == "__main__" else []:
    execute(Path(path))
