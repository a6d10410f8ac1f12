"""
The notebooks run from top to bottom, their exercises have answers, and they tell the truth.

    python tests/test_notebooks.py notebooks/3_sim.ipynb ...    # runs them, stores their outputs
"""
import base64
import importlib.util
import io
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

JUPYTER = mock.MagicMock(version_info=(9, 0))           # stands in for IPython where it is missing
FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
METHODS = [name for name in NAMES if "1" <= name[0] <= "5"]


def load(name):
    """(the notebook as JSON, its code cells, all their text)."""
    book = json.loads((FOLDER / f"{name}.ipynb").read_text())
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    return book, cells, ["".join(cell["source"]) for cell in cells]


def execute(file):
    """Run and store a notebook, pictures in 48 colours; as plain Python if Jupyter is missing."""
    if not all(importlib.util.find_spec(name) for name in ("nbclient", "ipykernel")):
        sys.modules["IPython"] = sys.modules["IPython.display"] = JUPYTER
        cells = json.loads(file.read_text())["cells"]
        return exec("\n".join("".join(c["source"]) for c in cells if "outputs" in c), {})
    import nbclient
    import nbformat
    from PIL import Image
    book = nbformat.read(file, 4)
    nbclient.NotebookClient(book, timeout=300, record_timing=False, coalesce_streams=True).execute()
    pictures = []
    for output in [o for cell in book.cells for o in cell.get("outputs", [])]:
        print(output.get("text", ""))
        if "image/png" in output.get("data", {}):
            raw = base64.b64decode(output.data["image/png"])
            pictures.append((output, Image.open(io.BytesIO(raw)).convert("RGB")))
    method = Image.Quantize.MAXCOVERAGE                 # thin lines keep their colours
    for colours in (48, 24, 12):                        # until the notebook is small enough
        for output, picture in pictures:
            small = io.BytesIO()
            picture.quantize(colours, method, dither=0).save(small, "png", optimize=True)
            output.data["image/png"] = base64.b64encode(small.getvalue()).decode()
        if len(nbformat.writes(book)) < 195_000:
            break
    nbformat.write(book, file)


@pytest.mark.slow
@pytest.mark.background
@pytest.mark.parametrize("name", NAMES)
def test_runs(tmp_path, name):
    """Every cell, with few updates and a tenth of the samples; the worked answers are right."""
    from conftest import run                            # here: execute alone starts without PyTorch
    from test_readme import build_world
    build_world(tmp_path)                               # with an MNIST of 20 images
    book, cells, texts = load(name)
    parts = re.split(r"^# Exercise (\d)", (FOLDER / f"solutions/{name}.py").read_text(), flags=re.M)
    for cell, text in zip(cells, texts):
        number = re.match(r"# Exercise (\d)", text)
        if number:
            text = f"#{parts[2 * int(number[1])]}\n" + text.split("\n# Check\n")[1]
        text = re.sub(r"^(STEPS|FIT) = \d+", r"\1 = 10", text, flags=re.M)
        text = re.sub(r"^SECONDS = \d+", "SECONDS = 1", text, flags=re.M)
        text = text.replace('data="mnist"', f'data="mnist", data_dir="{tmp_path}/data"')
        cell["source"] = text.replace("000", "00")
    (tmp_path / f"{name}.ipynb").write_text(json.dumps(book))
    code, out, err = run(__file__, tmp_path / f"{name}.ipynb", cwd=FOLDER, MPLBACKEND="agg",
                         IPYTHONDIR=str(tmp_path), JUPYTER_RUNTIME_DIR=str(tmp_path))
    assert code == 0, err
    assert out.count(": right") == len(parts) // 2 and "not yet" not in out


@pytest.mark.parametrize("name", NAMES)
def test_form(name):
    """At most 17 code cells, run in order, no magics, one thread, no GPU, wide pictures, 200 KB;
    what to know before and after, how to open it in Colab, a stop for questions, two to four
    exercises without answers."""
    raw = (FOLDER / f"{name}.ipynb").read_text()
    book, cells, texts = load(name)
    assert [c["execution_count"] for c in cells] == [*range(1, len(cells) + 1)] and len(cells) <= 17
    assert not re.search("^[%!]|^.{101}", "\n".join(texts), re.M)
    assert "torch.set_num_threads(1)" in texts[0]
    assert name[0] == "0" or 'os.environ["CUDA_VISIBLE_DEVICES"] = ""' in texts[0]
    assert len(raw) <= 200_000 and not re.search('"(error|stderr)"', raw)
    pngs = re.findall(r'"image/png": "([^"\\]+)', raw)
    assert pngs and all(int.from_bytes(base64.b64decode(p)[16:20], "big") >= 900 for p in pngs)
    for words in ("**Know before:**", "**Know after:**", "**Open in Colab:**"):
        assert words in "".join(book["cells"][0]["source"])
    assert raw.count("**Stop for questions.**") == 1
    assert all((FOLDER / path).exists() for path in re.findall(r"!\[.*?\]\((\S+?)\)", raw))
    assert 2 <= raw.count("# Exercise ") == raw.count(": not yet\\n") <= 4


def run_here(texts, monkeypatch, folder=FOLDER):
    """The names that some cells leave, run in this process and this folder, without Jupyter."""
    import matplotlib.pyplot as plt
    for name in ("IPython", "IPython.display"):
        monkeypatch.setitem(sys.modules, name, JUPYTER)
    monkeypatch.setattr("common.Run.show", None)        # the cells set it: so it is put back
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")      # likewise; PyTorch may have looked already
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.chdir(folder)
    names = {}
    with plt.rc_context():
        exec("\n".join(texts), names)
    return names


@pytest.mark.parametrize("name", NAMES)
def test_colab(name, monkeypatch, tmp_path, capsys):
    """Alone in a folder, a notebook says which files it needs. In Colab it has these uploaded, by
    the same lines in each notebook, and finds them when its first cell is run once more."""
    text, *others = load(name)[2]
    modules = [m for m in re.findall(r"^(?:import|from) (\w+)", text, re.M)
               if (FOLDER.parent / f"{m}.py").exists()]
    needed = sorted(f"{m}.py" for m in modules) + ["digits.pt"] * ("digits.pt" in "".join(others))
    lines = re.search(r"^sys\.path.*?^if missing\(\):\n.*?\n", text, re.M | re.S)[0]
    assert lines in load(NAMES[0])[2][0]
    colab, uploaded, alone = mock.MagicMock(), [], tmp_path / "folder/in"
    alone.mkdir(parents=True)

    def upload():
        for file in capsys.readouterr().out.split(": ")[1].split():
            shutil.copy((FOLDER if file == "digits.pt" else FOLDER.parent) / file, file)
            uploaded.append(file)

    for module in modules:                              # from here on they are found by no path
        importlib.import_module(module)
    path = [place for place in sys.path if not Path(place, "common.py").exists()]
    monkeypatch.setattr(sys, "path", path)
    with pytest.raises(FileNotFoundError, match="put beside this notebook: common.py"):
        run_here([text], monkeypatch, alone)
    colab.files.upload = upload
    monkeypatch.setitem(sys.modules, "google", mock.MagicMock())
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.setattr(sys, "path", path)
    run_here([text, text], monkeypatch, alone)
    assert sorted(uploaded) == sorted(needed)


@pytest.mark.parametrize("name", NAMES)
def test_sources(name, monkeypatch):
    """What a notebook prints of the code is what the code is now."""
    _, cells, texts = load(name)
    names = run_here(texts[:1], monkeypatch)
    for cell, text in zip(cells, texts):
        printed = "".join("".join(output.get("text", "")) for output in cell["outputs"])
        for call in re.findall(r"inspect\.getsource\([\w.]+\)", text):
            assert eval(call, names) in printed, f"{call}: run the notebook again"


@pytest.mark.parametrize("name", METHODS)
def test_loop(name, monkeypatch, no_pictures):
    """The loop that a reader sees, at most 30 lines, gives the weights of the script's train after
    20 steps, to the bit; both without pictures, for which consistency draws random numbers."""
    from conftest import flat
    _, _, texts = load(name)
    shown = [text for text in texts if re.match("# (helpers|networks|loop)", text)]
    loop = next(text for text in shown if text.startswith("# loop"))
    assert len(loop.splitlines()) <= 31 and ".train(" not in loop       # its first line is a name
    setup = re.sub(r"^(STEPS|FIT) = \d+", r"\1 = 20", texts[0], flags=re.M)
    names = run_here([setup, *shown], monkeypatch)
    module = names[name[2:]]
    monkeypatch.setattr("common.Run.due", lambda self: False)
    cfg = replace(names["cfg"], samples=64)
    teacher = names.get("teacher", names.get("flow"))       # in rectflow, the flow is reflow's
    ema = module.train(cfg, teacher=teacher)[0]
    start = module.initial_student(cfg, names["data"], teacher)
    assert flat(ema).equal(flat(names["ema"])) and not flat(ema).equal(flat(start))


for path in sys.argv[1:] if __name__ == "__main__" else []:
    execute(Path(path))
