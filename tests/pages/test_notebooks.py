"""The notebooks: what they look like, that they run, and that they still say what is committed.

    .venv/bin/python tests/pages/test_notebooks.py             run all and rewrite their outputs
    .venv/bin/python tests/pages/test_notebooks.py steering    only this one

Running them needs nbclient and ipykernel (``pip install -e ".[notebook]"``). Both the command and the test take the CPU
variant `CPU`, so that most machines compute the same numbers. Refresh the outputs when the model in the box changes.
"""

import ast
import difflib
import importlib.util
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import pytest

import skipkv
from skipkv import _skipkv

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
NAMES = ("quickstart", "kept_tokens", "methods_compared", "steering")
CPU = "avx2"
CELLS = 20  # fewer than this
BYTES = 1_000_000
TIMEOUT = 900  # seconds a cell: machines can be slow and busy
MACHINE = re.compile(r"/(?:home|root|tmp|work|usr|opt|var|mnt|Users)/|\\Users\\|site-packages|ipykernel_\d")
DATA = re.compile(r"[A-Za-z0-9+/=]{200,}")  # base64 of a page, in which any letters may meet
PAGE = re.compile(r"(?<=: )\d+ bytes(?=; save\(path\))")  # a page's size says nothing about what it shows


def read(name):
    return json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))


def code(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def joined(text):
    return text if isinstance(text, str) else "".join(text)


def shown(cell):
    """What a cell printed and returned, as text."""
    texts = (joined(o["text"] if o["output_type"] == "stream" else o["data"]["text/plain"]) for o in cell["outputs"])
    return PAGE.sub("", "".join(texts))


def kinds(cell):
    """The forms in which a cell shows what it returned."""
    return sorted(form for o in cell["outputs"] for form in o.get("data", {}))


def run(name, folder):
    """The notebook of this name, executed in a folder."""
    import nbclient
    import nbformat

    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(Path(skipkv.__file__).parents[1]),
        "IPYTHONDIR": str(folder / "ipython"),  # without the user's own start-up files
    }
    environment.pop("SKIPKV_CPU", None)
    if _skipkv.variants()[CPU][0]:
        environment["SKIPKV_CPU"] = CPU
    client = nbclient.NotebookClient(
        notebook, timeout=TIMEOUT, kernel_name="python3", record_timing=False, coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )  # fmt: skip
    client.execute(env=environment)
    notebook.metadata.language_info = {"name": "python"}  # without the version of this one
    return notebook


def test_these_are_the_notebooks():
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
class TestForm:
    def test_prose_stands_before_every_piece_of_code(self, name):
        notebook = read(name)
        cells = notebook["cells"]
        assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
        assert notebook["metadata"]["kernelspec"]["name"] == "python3"
        assert len(cells) < CELLS and len({cell["id"] for cell in cells}) == len(cells)
        types = [cell["cell_type"] for cell in cells]
        assert types == ["markdown", "code"] * (len(types) // 2) + ["markdown"]
        assert all(len(joined(cell["source"]).split()) >= 20 for cell in cells if cell["cell_type"] == "markdown")

    def test_outputs_are_there_and_small(self, name):
        assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size < BYTES
        for number, cell in enumerate(code(read(name)), 1):
            assert cell["execution_count"] == number  # run from top to bottom, in one go
            assert cell["outputs"], cell["source"]
            for output in cell["outputs"]:
                assert output["output_type"] in ("stream", "execute_result")
                assert output.get("name") != "stderr", output
                for text in [output.get("text", ""), *output.get("data", {}).values()]:
                    assert not MACHINE.search(DATA.sub("", joined(text))), cell["id"]

    def test_pages_show_themselves(self, name):
        for cell in code(read(name)):
            drawn = joined(cell["source"]).splitlines()[-1].startswith("viz.")
            assert kinds(cell) in ([], ["text/html", "text/plain"], ["image/svg+xml", "text/plain"])
            assert bool(kinds(cell)) == drawn
            for data in (output["data"] for output in cell["outputs"] if "data" in output):
                frame = joined(data.get("text/html", '<iframe sandbox="allow-scripts"'))
                assert frame.startswith("<iframe ") and 'sandbox="allow-scripts"' in frame

    def test_only_what_is_installed_with_skipkv_is_imported(self, name):
        allowed = {"skipkv", "numpy", "matplotlib"} | sys.stdlib_module_names
        for cell in code(read(name)):
            for node in ast.walk(ast.parse(joined(cell["source"]))):
                modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                modules += [node.module] if isinstance(node, ast.ImportFrom) else []
                assert {module.split(".")[0] for module in modules} <= allowed


@pytest.mark.notebook
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_and_says_what_is_committed(name, tmp_path):
    missing = [module for module in ("nbclient", "ipykernel") if importlib.util.find_spec(module) is None]
    if missing:
        pytest.skip(f"running notebooks needs {' and '.join(missing)}: pip install 'skipkv[notebook]'")
    committed, now = code(read(name)), code(run(name, tmp_path))
    assert list(map(kinds, now)) == list(map(kinds, committed))
    if not _skipkv.variants()[CPU][0]:
        pytest.skip(f"it runs; the committed outputs come from {CPU} kernels, which this processor does not run")
    for cell, before in zip(now, committed, strict=True):
        lines = [shown(c).splitlines() for c in (before, cell)]
        difference = "\n".join(difflib.unified_diff(*lines, "committed", "now", lineterm=""))
        assert not difference, f"{cell['id']} (refresh: python tests/pages/test_notebooks.py {name})\n{difference}"


if __name__ == "__main__":
    import nbformat

    for name in sys.argv[1:] or NAMES:
        with tempfile.TemporaryDirectory() as folder:
            notebook = run(name, Path(folder))
        path = NOTEBOOKS / f"{name}.ipynb"
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")
