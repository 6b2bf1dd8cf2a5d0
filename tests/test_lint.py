"""What the house promises of its sources, read from their text: who may include or import what, and how long."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
pytestmark = pytest.mark.skipif(not CSRC.is_dir(), reason="needs the sources beside the tests")

# ---------------------------------------------------------------------------------------------------------------------
# C

HEADERS = sorted(CSRC.rglob("*.h"))
SOURCES = sorted(CSRC.rglob("*.c"))
CUDA = sorted((ROOT / "cuda").rglob("*.cu*"))
FILES = [*HEADERS, *SOURCES, *CUDA]
PYTHON = CSRC / "python"
CPU = CSRC / "cpu"


def name_of(path):
    return str(path.relative_to(ROOT))


each_file = pytest.mark.parametrize("path", FILES, ids=name_of)


@cache
def code(path):
    """The text without comments, strings and characters; lines stay where they are."""
    blank = lambda found: re.sub(r"[^\n]", " ", found[0])  # noqa: E731
    text = path.read_text(encoding="utf-8")
    return re.sub(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'', blank, text, flags=re.DOTALL)


def includes(path):
    return re.findall(r'^\s*#\s*include\s+([<"][^>"]+[>"])', path.read_text(encoding="utf-8"), re.M)


def declared(path):
    """Functions that a header declares and does not itself define."""
    outside = re.sub(r"\{[^{}]*\}", ";", re.sub(r"\{[^{}]*\}", ";", code(path)))
    return re.findall(r"^(?!typedef|static|#|\s)[^;={}#]*?\b(\w+)\((?!\*)[^;{}]*\);", outside, re.M)


def functions(path):
    """(name, first line, lines) of the functions that a source defines."""
    lines = code(path).split("\n")
    found, first = [], None
    for i, line in enumerate(lines):
        if first is None and re.match(r"[A-Za-z_].*\w\(", line) and not line.rstrip().endswith((";", "\\", ",")):
            first = i
        elif first is None and re.match(r"[A-Za-z_].*\w\(", line) and line.rstrip().endswith(","):
            first = i  # parameters go on
        if first is not None and (line.startswith("}") or ";" in line and "{" not in "".join(lines[first : i + 1])):
            if line.startswith("}"):
                found.append((re.search(r"(\w+)\(", lines[first])[1], first + 1, i - first + 1))
            first = None
        elif first == i and line.rstrip().endswith("}"):
            found.append((re.search(r"(\w+)\(", line)[1], i + 1, 1))
            first = None
    return found


@each_file
def test_sizes(path):
    lines = path.read_text(encoding="utf-8").split("\n")
    assert len(lines) <= 600
    assert [i + 1 for i, line in enumerate(lines) if len(line) > 120] == []


@each_file
def test_a_function_fits_on_a_screen_or_two(path):
    assert [found for found in functions(path) if found[2] > 80] == []


@pytest.mark.parametrize("path", [h for h in HEADERS if h.name != "skipkv.h"], ids=name_of)
def test_a_headers_functions_live_in_its_own_source(path):
    """In csrc/ itself X.h belongs to X.c (backend.h to backends.c); below it, to a source of the same folder."""
    own = [path.with_suffix(".c"), path.with_name(path.stem + "s.c")]
    own = own if path.parent == CSRC else path.parent.rglob("*.c")
    defined = {name for source in own if source.exists() for name, _, _ in functions(source)}
    assert [name for name in declared(path) if name not in defined] == []


def test_every_function_of_the_public_header_is_there():
    defined = {name for source in SOURCES for name, _, _ in functions(source)}
    names = declared(CSRC / "skipkv.h")
    assert names and [name for name in names if not name.startswith("skv_") or name not in defined] == []


@each_file
def test_only_its_own_folder_knows_a_library(path):
    """Python and NumPy under python/, threads and instruction sets under cpu/, CUDA under cuda/."""
    found = " ".join(includes(path))
    if PYTHON not in path.parents:
        assert not re.search(r"Python\.h|numpy/", found)
    if CPU not in path.parents:
        assert not re.search(r"pthread\.h|stdatomic\.h|intrin\.h", found)
    if path.suffix in (".c", ".h"):
        assert not re.search(r"cuda|cublas", found)


@pytest.mark.parametrize("path", [p for p in FILES if PYTHON in p.parents], ids=name_of)
def test_the_binding_includes_the_public_header_only(path):
    own = {'"binding.h"', '"../skipkv.h"'}
    assert [name for name in includes(path) if name.startswith('"') and name not in own] == []


@pytest.mark.parametrize("path", [p for p in FILES if PYTHON not in p.parents and CPU not in p.parents], ids=name_of)
def test_nothing_above_the_seam_includes_a_backends_files(path):
    assert [name for name in includes(path) if re.search(r"(cpu|cuda|kernels|python)/|pages\.h|vec\.h", name)] == []


@each_file
def test_the_core_neither_prints_nor_exits_nor_reads_the_environment(path):
    banned = r"\b(v?f?printf|puts|putchar|perror|exit|_exit|abort|getenv|secure_getenv|setenv|system)\s*\("
    assert re.findall(banned, code(path)) == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_mutable_globals(path):
    """What varies is a table, and tables are const."""
    found = re.findall(r"^static (?!const\b|inline\b|_Thread_local\b)[^;(){}]*(?:=|;)", code(path), re.M)
    assert [line for line in found if " const " not in line and "PyObject" not in line and "Py" not in line] == []


# ---------------------------------------------------------------------------------------------------------------------
# Python: no file of the package imports upwards, and none hides an import to break a circle

PACKAGE = ROOT / "skipkv"
MODULES = sorted(PACKAGE.rglob("*.py"))
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
# Each may import what stands before it, and what stands beside it in its own line from left to right.
FLOORS = [
    ["_skipkv"],
    ["errors"],
    ["checks", "writing", "devices"],
    ["load"],
    ["methods", "trace", "steering", "sentences", "selection"],
    ["results", "engine"],
    ["run"],
    ["model"],
    ["tiny"],
    ["eval"],
    ["vectors"],
    ["viz"],
    ["commands"],
    ["cli"],
]
ORDER = {name: place for place, name in enumerate(name for floor in FLOORS for name in floor)}
# Within a folder, in the same way; `__init__` of each gathers the others.
INSIDE = {
    "load": ["files", "config", "safetensors", "checkpoint", "worker", "serve", "process", "template", "tokenizer",
             "texts"],
    "eval": ["table", "statistics", "records", "latex", "symbolic", "published", "grading", "inside", "sandbox",
             "programs", "figures", "results", "summary", "store", "prompts", "tasks", "runs", "marking", "work",
             "evaluate", "fidelity", "speed", "tiny", "paper", "scales", "calibrate", "suite", "cluster", "likelihood",
             "harness"],
    "vectors": ["released", "extraction"],
}  # fmt: skip
APART = [("eval", "vectors"), ("vectors", "eval"), ("viz", "vectors")]  # side by side, and strangers
VIZ_SEES = {"results", "figures", "table"}  # of eval
HEAVY = {"matplotlib", "torch", "ray", "huggingface_hub", "datasets", "tokenizers", "argparse"}  # imported where needed


def module(path):
    """("load", "files") of load/files.py; a folder's __init__ counts as the folder."""
    return tuple(part for part in path.relative_to(PACKAGE).with_suffix("").parts if part != "__init__")


def imported(path):
    """(node, "a.b.c") of every name that a file imports from the package, those under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ["skipkv", *path.relative_to(PACKAGE).parent.parts]
            base = base[: len(base) - node.level + 1]
            yield from ((node, ".".join([*base, node.module or "", alias.name])) for alias in node.names)


def inner(path):
    """What a file imports of the package, as ("load", "files")."""
    for _, name in imported(path):
        first, *rest = [part for part in name.split(".") if part]
        if first == "skipkv" and rest != ["__version__"]:
            yield tuple(rest)


@each_module
def test_no_file_imports_upwards(path):
    me = module(path)
    if not me or me == ("__main__",) or me[0] == "tiny":
        return
    for there in inner(path):
        what = f"{'.'.join(me)} imports {'.'.join(there)}"
        if there[0] == me[0]:
            floor = INSIDE.get(me[0])
            if floor and len(me) > 1 and there[1] in floor:
                assert floor.index(there[1]) < floor.index(me[1]), what
            continue
        assert ORDER[there[0]] < ORDER[me[0]] and (me[0], there[0]) not in APART, what
        if me[0] == "viz" and there[0] == "eval":
            assert there[1] in VIZ_SEES, what


def test_the_model_in_the_box_stands_on_its_own():
    for path in (PACKAGE / "tiny").glob("*.py"):
        assert all(there[0] == "tiny" for there in inner(path)), path


def test_every_file_has_a_floor():
    for path in MODULES:
        me = module(path)
        assert not me or me[0] in ORDER or me == ("__main__",), path
        assert len(me) < 2 or me[1] in INSIDE.get(me[0], [me[1]]), path


@each_module
def test_an_import_inside_a_function_is_of_something_heavy(path):
    if "tiny" in path.parts:  # a program of its own, with imports of training
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for node in ast.walk(function):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or "."] if isinstance(node, ast.ImportFrom) else []
                assert all(name.split(".")[0] in HEAVY for name in names), f"{path}: {function.name} imports {names}"


# ---------------------------------------------------------------------------------------------------------------------
# Tests

TESTS = Path(__file__).parent


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_no_test_file_grows_past_600_lines(path):
    assert len(path.read_text(encoding="utf-8").split("\n")) <= 600


def test_basenames_of_tests_are_unique():
    """pytest puts the folders of tests on the path, so two files of one name would be one module, but for conftests."""
    names = [path.name for path in TESTS.rglob("*.py") if path.parent != TESTS / "spec" and path.stem != "conftest"]
    assert sorted(names) == sorted(set(names))
