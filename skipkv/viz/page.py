"""One HTML file out of templates and a data block.

    (header, arrays) → length of the header, header as JSON, arrays → zlib → base64 → <script type="text/plain">
    page.html ← title, body, page.css, scripts, data block

Whatever a token's text holds is inside the base64, so nothing of a trace can end the block or become markup.
"""

from __future__ import annotations

import base64
import html
import json
import os
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np

from skipkv.writing import write_whole


@dataclass(frozen=True, eq=False, repr=False)
class Page:
    """An HTML page that needs nothing else.

    Attributes
    ----------
    html, title : str
    height : int
        Of the frame in a notebook, in CSS pixels.
    """

    html: str
    title: str
    height: int = 760

    def __post_init__(self) -> None:
        for name in ("html", "title"):  # a lone surrogate, which a file of JSON can bring, cannot be written
            object.__setattr__(self, name, getattr(self, name).encode("utf-8", "replace").decode())

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.title!r}: {len(self.html.encode())} bytes; save(path) writes it>"

    def _repr_html_(self) -> str:
        """A frame of its own, so that neither the notebook's styles nor its scripts and the page's touch."""
        return (
            f'<iframe title="{html.escape(self.title)}" sandbox="allow-scripts" srcdoc="{html.escape(self.html)}" '
            f'style="width: 100%; height: {self.height}px; border: 0"></iframe>'
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page to a file."""
        write_whole(path, self.html.encode())


def asset(name: str) -> str:
    """A template of this package."""
    return (files("skipkv.viz") / name).read_text(encoding="utf-8")


def pack(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """The data block: base64 of zlib of (header's bytes as uint32, header, arrays); all little-endian.

    The header's ``arrays`` lists (name, dtype, elements) in the order in which the arrays follow.
    """
    parts, listed = [], []
    for name, array in arrays.items():
        array = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
        listed.append([name, array.dtype.name, array.size])
        parts.append(array.tobytes())
    # ASCII: a lone surrogate, which a file of JSON can bring, has no other form.
    head = json.dumps({**header, "arrays": listed}, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()
    return base64.b64encode(zlib.compress(b"".join([struct.pack("<I", len(head)), head, *parts]), 6)).decode()


def fill(title: str, body: str, scripts: Sequence[str], data: str = "") -> str:
    """page.html with everything in it: body is HTML, scripts are names of templates, data is of `pack`."""
    values = {
        "title": html.escape(title), "style": asset("page.css"), "body": body, "data": data,
        "script": "\n".join(asset(name) for name in scripts),
    }  # fmt: skip
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], asset("page.html"))
