"""Hostile inputs out of valid ones: what a format is made of, changed by its own rules, and bytes that know of none.

    mutate(random.Random("5"), seeds, "json") → bytes       the third: a key of `INSIDE`

Bytes alone hardly ever get past a file's first check, so three of four inputs are changed inside: values of JSON, the
header of a safetensors file, arrays and pickles of an archive, words of a text.
"""

import io
import json
import re
import struct
import zipfile
from copy import deepcopy

import numpy as np

NUMBERS = [0, 1, -1, 2, 3, 7, 255, 256, 2**15, 2**31 - 1, 2**31, -(2**31), 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63,
           2**64 - 1, 2**64, 10**30, 10**400, 10**4000, 0.5, 1.5, -0.0, 1e-320, 1e-7, 1e17, 3e38, 1e308, -1e308,
           float("inf"), float("-inf"), float("nan")]  # fmt: skip
TEXTS = ["", "a", "\0", "\ud800", "\u2028", "\u202e", "\x1b[2J", "é" * 40, "x" * 300, "%s{}{0}", "../../etc/passwd",
         "__class__", "-", "true", "F32", "BF16", "default", "layer.1", "layer.١", "</think>", "\n\n"]  # fmt: skip
VALUES = [*NUMBERS, *TEXTS, None, True, False, [], {}, [[]], [None], [0, 0], {"": 0}]
# What a pickle can be made to do: other classes, huge lengths and places, calls, cycles.
PICKLED = [
    b"cos\nsystem\n", b"cbuiltins\neval\n", b"cnumpy\nndarray\n", b"\x8c\x02os\x8c\x06system\x93", b"h\0", b"\x82\x01",
    *(bytes([code]) for code in b"RQb02(t.]}aesN\x81\x85\x86\x94\x97\x98"), b"J\xff\xff\xff\xff", b"]" * 3000,
    b"r\xff\xff\xff\x7f", b"p999999999\n", b"j\xff\xff\xff\xff", b"\x8d" + b"\xff" * 8, b"\x8e\xff\xff\xff\x7f\0\0\0\0",
    b"\x8b\xff\xff\xff\x7f", b"B\xff\xff\xff\x7f", b"\x95" + b"\xff" * 7 + b"\x7f", b"\x96\xff\xff\xff\x7f\0\0\0\0",
    b"I" + b"9" * 5000 + b"\n", b"F1e999\n",
]  # fmt: skip
TORCH = [b"FloatStorage", b"BFloat16Storage", b"HalfStorage", b"DoubleStorage", b"_rebuild_tensor_v2", b"storage",
         b"_rebuild_parameter", b"OrderedDict"]  # fmt: skip
CLAIMS = [  # headers of .npy
    "{'descr': '<i4', 'fortran_order': False, 'shape': (%d,), }", "{'descr': '|O', 'shape': (%d,)}", "[%d]",
    "{'descr': '<U%d', 'fortran_order': False, 'shape': (), }",
    "{'descr': '<f4', 'fortran_order': True, 'shape': (-%d, 2), }",
    "{'descr': [('a', '<i4')], 'fortran_order': 0, 'shape': (%d,)}",
]


def _raw(text):
    return text.encode("utf-8", "surrogatepass")


def _text(raw):
    return raw.decode("utf-8", "surrogatepass")


class Twice(dict):
    """An object whose first key stands there twice."""

    def items(self):
        return [*super().items(), *list(super().items())[:1]]


def bytes_of(r, raw, other):
    """Flipped, overwritten, cut, repeated, spliced with another input."""
    raw = bytearray(raw)
    for _ in range(r.choice((1, 1, 2, 4))):
        at = r.randrange(len(raw) + 1)
        end = min(len(raw), at + r.choice((1, 2, 4, 8, 64, 4096)))
        how = r.randrange(8)
        if how == 0 and at < len(raw):
            raw[at] ^= 1 << r.randrange(8)
        elif how == 1:
            raw[at:end] = r.randbytes(r.randrange(9))
        elif how == 2:
            raw[at:end] = b""
        elif how == 3:
            del raw[at:]
        elif how == 4:
            raw[at:at] = raw[at:end] * r.choice((1, 2, 50))
        elif how == 5:
            first = r.randrange(len(other) + 1)
            raw[at:] = other[first:]
        elif how == 6:
            size = r.choice((1, 2, 4, 8))
            raw[at : at + size] = (r.choice(NUMBERS[:20]) % 256**size).to_bytes(size, "little")
        elif digits := list(re.finditer(rb"\d+", raw)):
            found = r.choice(digits)
            raw[slice(*found.span())] = str(r.choice(NUMBERS)).encode()
    return bytes(raw)


def text_of(r, raw, other):
    """Words, numbers and signs of texts, exchanged, repeated, dropped."""
    words, more = (re.findall(r"\w+|\s+|[^\w\s]", _text(text)) for text in (raw, other))
    for _ in range(r.choice((1, 1, 2, 4))):
        at = r.randrange(len(words) + 1)
        new = r.choice((r.choice(more or [""]), str(r.choice(NUMBERS)), r.choice(TEXTS), ""))
        how = r.randrange(4)
        if how == 0:
            words[at : at + 1] = [new]
        elif how == 1:
            words[at:at] = [new]
        elif how == 2:
            words[at:at] = words[at : at + r.randrange(1, 9)] * r.choice((1, 1, 1, 200))
        else:
            words[at : at + r.randrange(1, 4)] = []
    return _raw("".join(words))


def _slot(r, value):
    """A place in a JSON value, the nearer to the top the likelier: (container, key), or None."""
    found = None
    while isinstance(value, (dict, list)) and value:
        key = r.choice([*value]) if isinstance(value, dict) else r.randrange(len(value))
        found, value = (value, key), value[key]
        if r.random() < 0.3:
            break
    return found


def value_of(r, value, other):
    """A JSON value changed in place: one exchanged, dropped, doubled, renamed, moved, wrapped."""
    for _ in range(r.choice((1, 1, 1, 2, 3))):
        new = deepcopy(r.choice(VALUES))
        place, donor = _slot(r, value), _slot(r, other) or ([new], 0)
        if place is None:
            return new
        container, key = place
        old = container[key]
        how = r.randrange(9)
        if how <= 2:
            container[key] = new
        elif how == 3:
            del container[key]
        elif how == 4:
            container[key] = deepcopy(donor[0][donor[1]])
        elif how == 5:
            container[key] = [old] * r.choice((1, 2, 300)) if r.random() < 0.7 else {"a": old}
        elif how == 6 and isinstance(container, dict):
            container[donor[1] if isinstance(donor[1], str) else r.choice(TEXTS)] = container.pop(key)
        elif how == 7 and isinstance(old, dict) and old:
            container[key] = Twice(old)
        elif isinstance(old, str):
            container[key] = _text(text_of(r, _raw(old), b"a <b> 1"))
        elif isinstance(old, (int, float)):
            container[key] = r.choice((old + 1, old - 1, -old, old * 2, old // 2, str(old)))
        elif isinstance(container, list):
            container.insert(key, old)
    return value


def json_of(r, raw, other):
    if r.random() < 0.01:
        return b'{"a":' * 5000 + b"1"
    return json.dumps(value_of(r, json.loads(raw), json.loads(other))).encode()


def lines_of(r, raw, other):
    lines = raw.split(b"\n")
    at = r.randrange(len(lines))
    lines[at] = json_of(r, lines[at] or b"0", r.choice(other.split(b"\n")) or b"0")
    return b"\n".join(lines)


def safetensors_of(r, raw, other):
    """The header's values; its size, and the data behind it, as they were or a little off."""
    n = int.from_bytes(raw[:8], "little")
    header = json_of(r, raw[8 : 8 + n], other[8 : 8 + int.from_bytes(other[:8], "little")])
    off = r.choice((0, 0, 0, 0, 1, -1))
    return struct.pack("<Q", max(0, len(header) + off)) + header + raw[8 + n : len(raw) - r.choice((0, 0, 0, 1))]


def _array(r, raw):
    """A .npy file: its text, numbers, shape, type, or the header that claims them."""
    array, how = np.load(io.BytesIO(raw)), r.randrange(7)
    if how == 0:
        claim = r.choice(CLAIMS) % r.choice((0, 1, 3, 2**20, 2**31, 2**62, 2**63, 10**400))
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(claim) + 1) + claim.encode() + b"\n" + raw[128:]
    if array.dtype.kind == "U":
        text = json_of(r, str(array).encode(), str(array).encode()).decode()
        array = np.array(text if how < 6 else [text])
    elif how == 1:
        array = array.astype(r.choice(["<i8", "<f8", "<u2", "|S4", "<M8[s]", "?", "<c8", "<i2"]))
    elif how == 2:
        array = array.reshape(r.choice([(-1, 1), (1, -1), array.shape[::-1]]))
    elif how == 3:
        array = np.resize(array, (array.shape[0] + r.choice((-1, 1, 100)), *array.shape[1:])) if len(array) else array
    elif array.size:
        for _ in range(r.choice((1, 1, 5))):
            with np.errstate(all="ignore"):
                array.flat[r.randrange(array.size)] = np.array(r.choice(NUMBERS[:18])).astype(array.dtype)
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def _pickle(r, raw):
    if r.random() < 0.5:
        raw = raw.replace(r.choice(TORCH), r.choice(TORCH))
    at = r.randrange(len(raw))
    return raw[:at] + r.choice(PICKLED) * r.choice((1, 1, 2)) + raw[at + r.choice((0, 0, 1, 2)) :]


def archive_of(r, raw, other):
    """One member of a zip archive changed, dropped, renamed, doubled, or swapped with one of another."""
    parts = []
    for source in (raw, other):
        with zipfile.ZipFile(io.BytesIO(source)) as archive:
            parts.append([(name, archive.read(name)) for name in archive.namelist()])
    members, others = parts
    at, how = r.randrange(len(members)), r.randrange(10)
    name, content = members[at]
    if how <= 5:
        if name.endswith(".npy"):
            content = _array(r, content)
        elif name.endswith(".pkl"):
            content = _pickle(r, content)
        else:
            content = bytes_of(r, content, content)
    elif how == 6:
        content = bytes_of(r, content, content)
    elif how == 7:
        content = r.choice(others)[1]
    elif how == 8:
        name = r.choice([*(n for n, _ in members), "a/../b", ".npy", "archive/data/1", "/data.pkl"])
    members[at] = name, content
    members = members[:at] + members[at + 1 :] if how == 9 else members
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", r.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return out.getvalue()


INSIDE = {"text": text_of, "json": json_of, "lines": lines_of, "safetensors": safetensors_of, "archive": archive_of}


def mutate(r, seeds, inside):
    """An input near to the seeds, the same for the same state of the generator."""
    raw, other = r.choice(seeds), r.choice(seeds)
    return (bytes_of if r.random() < 0.25 else INSIDE[inside])(r, raw, other)
