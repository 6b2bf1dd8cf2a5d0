"""Who may import whom: no file of the package imports upwards, and none hides an import to break a circle."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "skipkv"
FILES = sorted(PACKAGE.rglob("*.py"))
# Each may import what stands before it, and what stands beside it in its own line from left to right.
FLOORS = [
    ["_skipkv"],
    ["errors"],
    ["checks"],
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
    "load": ["files", "config", "safetensors", "checkpoint", "tokenizer", "texts"],
    "eval": ["table", "statistics", "grading", "results", "accuracy", "fidelity", "speed", "tiny"],
    "vectors": ["released", "extraction"],
}
APART = [("eval", "vectors"), ("vectors", "eval"), ("viz", "vectors")]  # side by side, and strangers
VIZ_SEES = {"results", "table"}  # of eval
HEAVY = {"matplotlib", "torch", "huggingface_hub", "tokenizers", "argparse"}  # may be imported where they are needed


def module(path):
    """("load", "files") of load/files.py; a folder's __init__ counts as the folder."""
    return tuple(part for part in path.relative_to(PACKAGE).with_suffix("").parts if part != "__init__")


def imports(path):
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
    for _, name in imports(path):
        first, *rest = [part for part in name.split(".") if part]
        if first == "skipkv":
            yield tuple(rest)


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(path.parts[path.parts.index("skipkv") + 1 :]))
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
    for path in FILES:
        me = module(path)
        assert not me or me[0] in ORDER or me == ("__main__",), path
        assert len(me) < 2 or me[1] in INSIDE.get(me[0], [me[1]]), path


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(path.parts[path.parts.index("skipkv") + 1 :]))
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
