"""Files that are written: whole, or what was there before stays."""

import os
import stat
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from skipkv import Trace, writing
from skipkv.steering import save_vectors
from skipkv.viz.curves import Picture
from skipkv.viz.page import Page
from skipkv.writing import write_whole

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
PICTURE = Picture(Figure(), "title")
SAVE = {
    "t.npz": Trace([1], ["a"], 1, 1, 1, "full").save, "p.html": Page("<p>" + "a" * 200, "title").save,
    "c.svg": PICTURE.save, "c.png": PICTURE.save, "c.pdf": PICTURE.save,
    "v.safetensors": lambda path: save_vectors(path, {0: np.ones(100)}, {}),
}  # fmt: skip


@contextmanager
def full_after(n_bytes):
    """Files may not become longer, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def fails_on(path, kind=OSError):
    with pytest.raises(kind) as error:
        yield
    assert error.value.filename == str(path) and str(path) in str(error.value)


@pytest.mark.parametrize("name", SAVE)
def test_what_cannot_be_written_leaves_what_was_there(tmp_path, name):
    path = tmp_path / name
    SAVE[name](path)  # and whatever its library loads is loaded
    path.unlink()
    with full_after(100), fails_on(path):
        SAVE[name](path)
    assert not list(tmp_path.iterdir())
    path.write_bytes(b"before")
    with full_after(100), fails_on(path):
        SAVE[name](path)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"before"
    with fails_on(tmp_path / "none" / name, FileNotFoundError):
        SAVE[name](tmp_path / "none" / name)
    with fails_on(tmp_path, IsADirectoryError):
        write_whole(tmp_path, b"")


def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    path = tmp_path / "a"
    path.write_bytes(b"before")
    monkeypatch.setattr(writing.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, b"after")
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"before"


def test_a_reader_of_the_old_file_sees_all_of_it(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"before")
    with path.open("rb") as reader:
        write_whole(path, b"after")
        assert reader.read() == b"before" and path.read_bytes() == b"after"


def test_links_are_followed_and_modes_are_kept(tmp_path):
    link, target = tmp_path / "link", tmp_path / "target"
    link.symlink_to("target")
    umask = os.umask(0o027)
    try:
        write_whole(link, b"new")
    finally:
        os.umask(umask)
    assert link.is_symlink() and target.read_bytes() == b"new" and stat.S_IMODE(target.stat().st_mode) == 0o640
    target.chmod(0o604)
    write_whole(link, b"newer")
    assert link.is_symlink() and target.read_bytes() == b"newer" and stat.S_IMODE(target.stat().st_mode) == 0o604


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_file_that_may_not_be_written_is_not_replaced(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"before")
    path.chmod(0o400)
    with fails_on(path, PermissionError):
        write_whole(path, b"after")
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"before"


def test_pipes_and_devices_are_written_as_they_are(tmp_path):
    path, read = tmp_path / "pipe", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: read.append(path.read_bytes()))
    reader.start()
    write_whole(path, b"data")
    reader.join(10)
    assert read == [b"data"] and path.is_fifo() and list(tmp_path.iterdir()) == [path]
    write_whole("/dev/null", b"data")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with fails_on("/dev/full"):
        write_whole("/dev/full", b"data")
