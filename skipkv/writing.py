"""Files are written whole, or what was there before stays."""

import os
import secrets
import shutil
from contextlib import suppress

from skipkv.checks import path_of


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Make these bytes the content of a file.

    They are written beside it and take its place once all of them are there; symbolic links are followed. A pipe or a
    device is written as it is.

    Raises
    ------
    ConfigError
        No file can be called so.
    OSError
        They cannot be written; it names ``path``.
    """
    path_of("path", path)
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            with open(path, "wb") as file:
                file.write(data)
        else:
            _replace(os.path.realpath(path), data)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None


def _replace(target: str, data: bytes) -> None:
    temporary = os.path.join(os.path.dirname(target), f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
        if os.path.exists(target):
            with open(target, "ab"):  # a file that may not be written may not be replaced either
                shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
