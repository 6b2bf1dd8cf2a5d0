"""Files as they come from outside: read whole or not at all, JSON checked key by key, and quoted safely in messages."""

import json
import os
import re
import reprlib
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NoReturn

from skipkv.errors import CapacityError, CheckpointError

MAX_JSON_BYTES = 100_000_000  # the safetensors reference implementation's limit for a header

FOREIGN = [(re.compile(pattern), what) for pattern, what in (
    (rb"\Z", "an empty file"),
    (rb"version https://git-lfs", "a git-lfs pointer (the file itself was never fetched: git lfs pull)"),
    (rb"GGUF", "a GGUF file (take the safetensors that it was made from)"),
    (rb"PK\x03\x04", "a zip archive (torch.save's format)"),
    (rb"\x80[\x02-\x05][^\0]", "a pickle (torch.save's older format)"),
    (rb"(?i)(\xef\xbb\xbf)?\s*<(!doctype|html|\?xml)", "an HTML or XML page (a download's error page)"),
    (rb"\xff\xfe\0\0|\0\0\xfe\xff|([\t-~]\0\0\0|\0\0\0[\t-~]){2}", "UTF-32 text (save it as UTF-8)"),
    (rb"\xff\xfe|\xfe\xff|([\t-~]\0|\0[\t-~]){2}", "UTF-16 text (save it as UTF-8)"),
)]  # fmt: skip

_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxstring, _repr.maxother, _repr.maxlist, _repr.maxdict = 3, 120, 120, 8, 4


def show(value: object) -> str:
    """A value from a file as it may appear in a message: quoted, one line, and short however hostile the file."""
    return json.dumps(value) if value is None or isinstance(value, bool) else _repr.repr(value)


def some(names: Iterable[str]) -> str:
    """The first few of many names and their count."""
    names = sorted(names)
    return f"{len(names)}: {', '.join(map(show, names[:4]))}{', …' if len(names) > 4 else ''}"


def what_is(head: bytes | BinaryIO, archive: bool = False) -> str | None:
    """What often stands in a file's place, if its first bytes are of such; ``archive``: a zip is what should be."""
    if not isinstance(head, bytes):
        head.seek(0)
        head = head.read(64)
    if archive and head.startswith(b"PK"):
        return None
    return next((what for pattern, what in FOREIGN if pattern.match(head)), None)


def is_int(value: object) -> bool:
    return type(value) is int  # JSON's true is Python's True, which isinstance calls an int


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # json keeps the last of two equal keys; two readers of one file could then see two different models.
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"duplicate key {show(key)}")
        result[key] = value
    return result


def decode(raw: bytes, where: object) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        found = f"byte 0x{raw[error.start]:02x} at {error.start}"
        raise CheckpointError(f"{where}: expected UTF-8, found {found}") from None


def parse_object(text: str, where: object) -> dict[str, Any]:
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: invalid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found {show(value)}")
    return value


@contextmanager
def reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except MemoryError:
        raise CapacityError(f"{path}: expected a file that fits into memory, found more") from None


def require_file(path: Path) -> None:
    if not path.is_file():  # opening a pipe would block
        raise CheckpointError(f"{path}: expected a file, found {'something else' if path.exists() else 'nothing'}")


def open_file(path: Path) -> BinaryIO:
    """A file to read from, to be closed."""
    with reading(path):
        require_file(path)
        return path.open("rb")


def read_file(path: Path, limit: int | None = None) -> bytes:
    """A whole file of at most ``limit`` bytes."""
    with reading(path):
        require_file(path)
        size = path.stat().st_size
        if limit is not None and size > limit:
            raise CheckpointError(f"{path}: expected at most {limit} bytes, found {size}")
        return path.read_bytes()


def read_piped(path: Path) -> bytes:
    """A whole file, or what comes through a pipe or from a terminal until its end; a pipe nobody writes to is empty."""
    with reading(path), open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        kind = os.fstat(file.fileno()).st_mode
        if stat.S_ISBLK(kind) or stat.S_ISCHR(kind) and not file.isatty():  # many have no end
            raise CheckpointError(f"{path}: expected a file, found something else")
        os.set_blocking(file.fileno(), True)
        return file.read()


def read_text(path: Path, expected: str, limit: int | None = None) -> str:
    """The text of a UTF-8 file, without its byte order mark."""
    raw = read_file(path, limit)
    if found := what_is(raw):
        raise CheckpointError(f"{path}: expected {expected}, found {found}")
    return decode(raw, path).removeprefix("\ufeff")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds."""
    return parse_object(read_text(path, "a JSON object", MAX_JSON_BYTES), path)


class Fields:
    """A JSON object and its file; getters check type and range. As in transformers, null means absent."""

    def __init__(self, path: Path, values: Mapping[str, Any], labels: Mapping[str, str] = MappingProxyType({})) -> None:
        self.path, self.values, self.labels = path, values, labels  # labels: where a key stands, if not at the top

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def fail(self, key: str, expected: str, found: str | None = None) -> NoReturn:
        if found is None:
            found = show(self.get(key)) if key in self.values else "nothing"
        raise CheckpointError(f"{self.path}: {self.labels.get(key, key)}: expected {expected}, found {found}")

    def integer(self, key: str, high: int, default: int | None = None, low: int = 1) -> int:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not is_int(value) or not low <= value <= high:
            self.fail(key, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not (is_int(value) or isinstance(value, float)) or not low <= value <= high:  # NaN compares false
            self.fail(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def boolean(self, key: str, default: bool = False) -> bool:
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            self.fail(key, "true or false")
        return default if value is None else value

    def only(self, key: str, expected: object) -> None:
        """The key must be absent or hold the one value that the engine implements."""
        value = self.get(key)
        if value is not None and (isinstance(value, bool) or value != expected):
            self.fail(key, f"{json.dumps(expected)} (others are not supported)")
