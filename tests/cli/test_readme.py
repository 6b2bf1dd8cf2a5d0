"""README's Python runs as it stands, and says what it claims."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0])
@pytest.mark.filterwarnings("ignore:.*never compacted")
def test_python_examples_run(block, capsys):
    exec(compile(block, str(README), "exec"), {})
    printed = capsys.readouterr().out
    assert printed
    if "skipkv.Custom" in block:
        assert printed.splitlines()[-1] == "True"  # the example keeps the slots of snapkv


@pytest.mark.parametrize("name", ["README.md", "SECURITY.md", "CHANGELOG.md", "cuda/README.md"])
def test_documents_name_what_is_there(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    named = re.findall(r"`((?:tests|skipkv|csrc|cuda|\.ci)/[\w/.-]+)`", text)
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_there_are_two_commands():
    assert len(re.findall(r"```sh\n", README.read_text(encoding="utf-8"))) == 2
